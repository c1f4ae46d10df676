"""The merge of a state dict in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.operators import Operator
from loramerge.adapters.updates import Update, apply_earlier, in_place
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import slots_of
from loramerge.errors import UnsupportedError
from loramerge.merging.kernels import CACHED_ELEMENTS, COMPUTE_DTYPES, TORCH_DTYPES, NonFinite, change_block
from loramerge.merging.methods import combined, factor_files
from loramerge.merging.run import Adapters, Options, open_pairs, weighted
from loramerge.merging.stream import FactorFile, Factors
from loramerge.tensors.hashing import row_layout
from loramerge.tensors.text import quoted

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

DEVICE_ELEMENTS = 1 << 20
"""Elements that another device than the CPU works on at once: few kernels to start, 4 MB in float32."""


def merge_tensors(
    tensors: Mapping[str, Tensor], adapters: Adapters, config: Mapping[str, Any] | None, options: Options
) -> dict[str, Tensor]:
    """See `loramerge.merge_tensors`."""
    options.check()
    pairs = open_pairs(weighted(adapters), options)
    binding = bind(
        slots_of(shapes_of(tensors)),
        config,
        pairs,
        include=options.include,
        exclude=options.exclude,
        allow_unmatched=options.allow_unmatched,
        base_name="the state dict",
    )
    binding = combined(binding, options.chosen(len(pairs)), pairs, options.compute_dtype)
    files = factor_files(binding, [a for a, _ in pairs])
    merging = Merging(tensors, binding, files, COMPUTE_DTYPES[options.compute_dtype])
    with torch.inference_mode(False), torch.no_grad(), exact_products():
        return {name: merging.merged(name) for name in binding.names.slots}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape), as a checkpoint's header says them."""
    return {name: (DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def columns_of(tensor: Tensor) -> int:
    """Elements of a row, as blocks are made of whole rows."""
    _, row_bytes = row_layout(8 * tensor.element_size(), tensor.shape)
    return max(1, row_bytes // tensor.element_size())


def block_elements(device: torch.device, cols: int) -> int:
    """Elements of a block of whole rows that is changed at once. The same for all merges in memory, so that their
    sums are the same to the last bit."""
    size = CACHED_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
    return max(1, size // cols) * cols


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices are made in float32, whatever the program around allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def overflow(name: str, error: NonFinite, dtype: torch.dtype) -> UnsupportedError:
    """The error for results that their dtype cannot hold."""
    message = f"{error.count} values of {quoted(name)} do not fit {dtype}"
    return UnsupportedError("merge.overflow", message, tensors=[name])


class Merging:
    """One merge: the tensors, what is bound to them, and where sums are made.

    Args:
        original: the tensor of a name as it was before the merge, where that changes `tensors` as it goes.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        binding: Binding,
        adapters: Sequence[FactorFile],
        dtype: torch.dtype,
        original: Callable[[str], Tensor] | None = None,
    ) -> None:
        self.tensors = tensors
        self.binding = binding
        self.adapters = adapters
        self.dtype = dtype
        self._original = original or tensors.__getitem__

    def updates(self, name: str) -> tuple[Update, ...]:
        """What is done to a tensor, in order."""
        return tuple(self.binding.updates.get(name, ()))

    def device(self, name: str) -> torch.device:
        """Where the tensor is changed."""
        kept = self.tensors.get(self.binding.names[name].source)
        return kept.device if kept is not None else torch.device("cpu")

    def source(self, name: str) -> Tensor:
        """The tensor that updates start from: the state dict's, or the adapter's that takes its place."""
        slot, new = self.binding.names[name], self.binding.replaced.get(name)
        if new is None:
            tensor, grown = self._original(slot.source), self.binding.grown.get(name)
            if grown is None:
                return tensor
            padded = tensor.new_zeros(grown)
            padded[tuple(slice(n) for n in tensor.shape)] = tensor
            return padded
        kept = self.tensors.get(slot.source)
        factors = Factors(self.adapters, TORCH_DTYPES[new.factor.info.dtype], self.device(name))
        stored = factors.read(new.adapter, new.factor.key)
        return stored.to(kept.dtype) if kept is not None else stored.clone()

    def operators(self, name: str, updates: Sequence[Update]) -> list[Operator]:
        """What changes the blocks of a tensor; none where its updates are all zero."""
        weights = _Weights(self, name)
        made = [update.operator(weights.factors.read, weights) for update in updates]
        return [operator for operator in made if operator is not None]

    def merged(self, name: str) -> Tensor:
        """One tensor of the result."""
        slot, updates = self.binding.names[name], self.updates(name)
        source = self.source(name)
        if not updates:
            return source.clone() if name != slot.source and name not in self.binding.replaced else source
        operators = self.operators(name, updates)
        if not operators:
            return source
        contiguous = source.detach().contiguous()
        target, cols = torch.empty_like(contiguous), columns_of(contiguous)
        size = min(block_elements(source.device, cols), max(1, source.numel()))
        compute = torch.empty(size, dtype=self.dtype, device=source.device)
        try:
            keep = not in_place(updates)
            change_block(contiguous.view(-1), target.view(-1), 0, cols, operators, compute, keep, False)
        except NonFinite as error:
            raise overflow(name, error, source.dtype) from None
        return target


class _Weights:
    """The tensors of the state dict as an update of one of them may see them (`adapters.updates.Weights`)."""

    def __init__(self, merging: Merging, name: str, device: torch.device | None = None) -> None:
        self._merging = merging
        self._name = name
        self._device = device or merging.device(name)
        self.factors = Factors(merging.adapters, merging.dtype, self._device)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        source = self._merging.source(self._name).detach().contiguous()
        flat, cols = source.view(-1), columns_of(source)
        step = max(1, (4 << 20) // cols) * cols
        for at in range(0, flat.numel(), step):
            yield at, flat[at : at + step].to(self._device, self._merging.dtype, copy=True)

    def before(self, tensor: str, update: Update) -> Tensor:
        source = self._merging.source(tensor).detach().contiguous()
        whole = source.view(-1).to(self._device, self._merging.dtype, copy=True)
        weights = _Weights(self._merging, tensor, self._device)
        apply_earlier(whole, self._merging.updates(tensor), update, weights.factors.read, weights)
        return whole
