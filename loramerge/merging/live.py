"""The tensors of a live model: their names, the memory that they share, their blocks of whole rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from loramerge.errors import UnsupportedError
from loramerge.merging.memory import block_elements, columns_of
from loramerge.tensors.hashing import row_layout
from loramerge.tensors.text import quoted

COMPILED = "_orig_mod."
"""What torch.compile puts into names."""


class Live:
    """The tensors of a module, or of a dict, as they are now.

    `tensors`: by name, those that share all their memory under each of their names. `group`: name -> the names of the
    same memory, the first of them first. `owner`: tells names of one attribute of one module, which that module has
    under several paths, from different parameters that were tied.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.owner: dict[str, Hashable] = {}
        for name, owner, tensor in _named(model):
            self.tensors.setdefault(name, tensor)
            self.owner.setdefault(name, owner)
        by_memory: dict[Hashable, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            by_memory[_memory(tensor)].append(name)
        self.group = {name: tuple(names) for names in by_memory.values() for name in names}

    def check(self, names: Sequence[str]) -> None:
        """Whether these can be changed where they are.

        Raises:
            UnsupportedError: `switcher.meta`, `switcher.tensor`, `switcher.overlap`.
        """
        for name in names:
            tensor = self.tensors[name]
            if tensor.device.type == "meta":
                raise UnsupportedError(
                    "switcher.meta",
                    f"{quoted(name)} is on the meta device: it holds no values",
                    fix="load the model's weights first, without offloading them",
                    tensors=[name],
                )
            plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided
            if not plain or any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise UnsupportedError(
                    "switcher.tensor",
                    f"{quoted(name)} is no ordinary tensor ({type(tensor).__name__}, {tensor.layout}): its elements "
                    "cannot be changed one by one",
                    tensors=[name],
                )
        self._check_overlaps(set(names))

    def _check_overlaps(self, names: set[str]) -> None:
        """No other tensor lies in the memory of those that are changed."""
        spans: dict[torch.device, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            plain = tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel()
            if not plain or name != self.group[name][0] or type(tensor.detach()) is not Tensor:
                continue
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            spans[tensor.device].append((begin, begin + (last + 1) * tensor.element_size(), name))
        firsts = {self.group[name][0]: name for name in names}
        for rows in spans.values():
            rows.sort()
            furthest, before = 0, ""  # the end of what begins earlier, and whose it is
            for begin, end, name in rows:
                if begin < furthest and (name in firsts or before in firsts):
                    raise UnsupportedError(
                        "switcher.overlap",
                        f"{quoted(before)} and {quoted(name)} lie in the same memory, but are not the same tensor",
                        fix="give each its own memory, or only one of them to the Switcher",
                        tensors=[before, name],
                    )
                if end > furthest:
                    furthest, before = end, name


def config_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """The config that a module carries, as plain data; None where it has none."""
    config = getattr(_unwrapped(model), "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)
    return dict(to_dict()) if callable(to_dict) else None


def _unwrapped(model: nn.Module | Mapping[str, Tensor]) -> nn.Module | Mapping[str, Tensor]:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or (isinstance(model, nn.Module) and hasattr(model, COMPILED[:-1])):
        inner = model.module if isinstance(model, wrappers) else getattr(model, COMPILED[:-1])
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _named(model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Hashable, Tensor]]:
    """(name, owner, tensor) of every parameter and buffer."""
    model = _unwrapped(model)
    if not isinstance(model, nn.Module):
        yield from ((name, name, tensor) for name, tensor in model.items() if isinstance(tensor, Tensor))
        return
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}.".replace(COMPILED, "") if path else ""
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + name, (id(module), name), parameter
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield prefix + name, (id(module), name), buffer


def _memory(tensor: Tensor) -> Hashable:
    """The same for tensors that are the same elements in the same order, and for no others."""
    whole = tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel()
    if not whole or type(tensor.detach()) is not Tensor:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class Rows:
    """A tensor as blocks of whole rows in the order of its elements, however it lies in memory.

    Args:
        tensor: the tensor.
        step: rows of a block; by default as many as a merge changes at once.
    """

    def __init__(self, tensor: Tensor, step: int | None = None) -> None:
        self._tensor = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        shape = tuple(self._tensor.shape)
        self._rows, _ = row_layout(8 * tensor.element_size(), shape)
        self.cols = columns_of(tensor)
        self._lead = next(k for k in range(1, len(shape) + 1) if prod(shape[:k]) == self._rows)
        self.step = step or block_elements(tensor.device, self.cols) // self.cols
        self.count = -(-self._rows // self.step) if tensor.numel() else 0

    def span(self, index: int) -> tuple[int, int]:
        """(first element, how many) of a block."""
        row = index * self.step
        return row * self.cols, (min(row + self.step, self._rows) - row) * self.cols

    def read(self, index: int) -> Tensor:
        """A block, flat: the tensor's own memory where it is contiguous."""
        parts = [part.reshape(-1) for part in self._parts(index)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, index: int, values: Tensor) -> None:
        """Puts a block (n,) into its place."""
        at = 0
        for part in self._parts(index):
            part.copy_(values[at : at + part.numel()].view(part.shape))
            at += part.numel()

    def _parts(self, index: int) -> Iterator[Tensor]:
        """The rows of a block as they lie in the tensor, whose first axes may be rows together."""
        row, end = index * self.step, min((index + 1) * self.step, self._rows)
        *outer, inner = tuple(self._tensor.shape)[: self._lead]
        while row < end:
            at, first = divmod(row, inner)
            last = min(inner, first + end - row)
            place: list[int] = []
            for size in reversed(outer):
                at, here = divmod(at, size)
                place.insert(0, here)
            part = self._tensor
            for here in place:
                part = part[here]
            yield part[first:last]
            row += last - first
