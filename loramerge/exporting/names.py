"""Which tensors of a checkpoint make each parameter of a model: the library's own rules, followed without numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loramerge.errors import InputError, UnsupportedError
from loramerge.tensors.text import some

Box = tuple[tuple[int, int], ...]
"""(start, size) by axis."""


@dataclass(frozen=True)
class Piece:
    """A box of a stored tensor and where it lies in a parameter.

    `axes[i]` is the parameter's axis that the stored tensor's axis i becomes; `starts` is where the box begins, by
    the parameter's axes.
    """

    key: str
    box: Box
    axes: tuple[int, ...]
    starts: tuple[int, ...]

    def extents(self) -> tuple[int, ...]:
        """The box's size by the parameter's axes."""
        sizes = [1] * len(self.starts)
        for (_, size), axis in zip(self.box, self.axes, strict=True):
            sizes[axis] = size
        return tuple(sizes)

    def turned(self, a: int, b: int) -> Piece:
        """The same in the parameter with two axes exchanged."""
        swap = {a: b, b: a}
        starts = list(self.starts)
        starts[a], starts[b] = starts[b], starts[a]
        return replace(self, axes=tuple(swap.get(x, x) for x in self.axes), starts=tuple(starts))


class Origin:
    """A parameter as pieces of stored tensors. Stands for a tensor in the library's conversions (cat, stack, ...)."""

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)

    @classmethod
    def of(cls, key: str, shape: Sequence[int]) -> Origin:
        """A stored tensor itself."""
        return cls(shape, [Piece(key, tuple((0, n) for n in shape), tuple(range(len(shape))), (0,) * len(shape))])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known: dict[Any, Any] = {
            torch.cat: _cat,
            torch.stack: _stack,
            torch.transpose: _transpose,
            torch.chunk: _chunk,
            torch.split: _split,
        }
        if function not in known:
            raise _Untold(getattr(function, "__name__", str(function)))
        return known[function](*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> Origin:
        return self

    def squeeze(self, dim: int) -> Origin:
        dim %= self.ndim
        pieces = []
        for piece in self.pieces:
            if dim in piece.axes and piece.box[piece.axes.index(dim)][1] != 1:
                raise _Untold("squeeze")
            if dim in piece.axes:
                raise _Untold("squeeze of a stored axis")
            axes = tuple(a - (a > dim) for a in piece.axes)
            pieces.append(replace(piece, axes=axes, starts=piece.starts[:dim] + piece.starts[dim + 1 :]))
        return Origin([n for i, n in enumerate(self.shape) if i != dim], pieces)

    def __getattr__(self, name: str) -> Any:
        raise _Untold(name)


class _Untold(Exception):
    """A conversion that moves numbers in a way that is not followed here."""


def _cat(tensors: Sequence[Origin], dim: int = 0) -> Origin:
    shape = list(tensors[0].shape)
    dim %= len(shape)
    at, pieces = 0, []
    for tensor in tensors:
        for piece in tensor.pieces:
            starts = list(piece.starts)
            starts[dim] += at
            pieces.append(replace(piece, starts=tuple(starts)))
        at += tensor.shape[dim]
    shape[dim] = at
    return Origin(shape, pieces)


def _stack(tensors: Sequence[Origin], dim: int = 0) -> Origin:
    shape = list(tensors[0].shape)
    dim %= len(shape) + 1
    pieces = []
    for index, tensor in enumerate(tensors):
        for piece in tensor.pieces:
            axes = tuple(a + (a >= dim) for a in piece.axes)
            starts = (*piece.starts[:dim], index, *piece.starts[dim:])
            pieces.append(replace(piece, axes=axes, starts=starts))
    return Origin([*shape[:dim], len(tensors), *shape[dim:]], pieces)


def _transpose(tensor: Origin, dim0: int, dim1: int) -> Origin:
    a, b = dim0 % tensor.ndim, dim1 % tensor.ndim
    shape = list(tensor.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return Origin(shape, [piece.turned(a, b) for piece in tensor.pieces])


def _chunk(tensor: Origin, chunks: int, dim: int = 0) -> tuple[Origin, ...]:
    return _split(tensor, math.ceil(tensor.shape[dim] / chunks), dim)


def _split(tensor: Origin, sizes: int | Sequence[int], dim: int = 0) -> tuple[Origin, ...]:
    dim %= tensor.ndim
    total = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    made, at = [], 0
    for size in sizes:
        pieces = [p for piece in tensor.pieces if (p := _cut(piece, dim, at, at + size)) is not None]
        made.append(Origin([size if i == dim else n for i, n in enumerate(tensor.shape)], pieces))
        at += size
    return tuple(made)


def _cut(piece: Piece, dim: int, begin: int, end: int) -> Piece | None:
    """The part of a piece that lies in a range of one axis of the parameter, which becomes that range."""
    start = piece.starts[dim]
    size = piece.extents()[dim]
    low, high = max(begin, start), min(end, start + size)
    if low >= high:
        return None
    starts = list(piece.starts)
    starts[dim] = low - begin
    box = list(piece.box)
    if dim in piece.axes:
        axis = piece.axes.index(dim)
        box[axis] = (box[axis][0] + low - start, high - low)
    return replace(piece, box=tuple(box), starts=tuple(starts))


def origins(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Origin]:
    """Every parameter and stored buffer of a model that the checkpoint has, as pieces of the checkpoint's tensors.

    Args:
        model: the model, without weights.
        shapes: the checkpoint's tensors.

    Raises:
        UnsupportedError: `export.conversion`: the library rearranges weights in a way that is not followed.
        InputError: `export.shape`: a tensor is not of the shape that the config says.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    found: dict[str, Origin] = {}
    groups: dict[str, tuple[Any, dict[str, list[Origin]]]] = {}
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            continue
        if pattern is None:
            found[name] = Origin.of(key, shapes[key])
        else:
            converter, collected = groups.setdefault(name, (copy.deepcopy(by_pattern[pattern]), {}))
            collected.setdefault(pattern, []).append(Origin.of(key, shapes[key]))
    for name, (converter, collected) in groups.items():
        found |= _converted(name, converter, collected, model)
    for name, origin in found.items():
        if tuple(origin.shape) != tuple(state[name].shape):
            raise InputError(
                "export.shape",
                f"{origin.pieces[0].key} is {tuple(origin.shape)}, the config says {tuple(state[name].shape)}",
                fix="the config belongs to another model: take both from one place",
                tensors=[origin.pieces[0].key],
            )
    return found


def _converted(name: str, converter: Any, collected: dict[str, list[Origin]], model: Any) -> dict[str, Origin]:
    """What the library's conversion makes of some tensors, by parameter."""
    keys = [p.key for parts in collected.values() for origin in parts for p in origin.pieces]
    current: dict[str, Any] = dict(collected)
    try:
        for operation in converter.operations:
            current = operation.convert(
                current,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=model.config,
                missing_keys=None,
            )
    except (_Untold, TypeError, AttributeError, ValueError) as error:
        raise UnsupportedError(
            "export.conversion",
            f"the model's weights are rearranged when they are loaded ({type(operation).__name__}: {error}): "
            f"{some(keys)}",
            fix="load and save the model once, then export what was saved",
            tensors=keys,
        ) from None
    full = name.replace("*.", "0.")
    prefix, suffix = next(
        ((before, after) for k in current for before, at, after in [full.partition(k)] if at), ("", "")
    )
    single = {k: v[0] if isinstance(v, list) else v for k, v in current.items()}
    return {prefix + k + suffix: v for k, v in single.items()}


def canonical(model: Any, found: Mapping[str, Origin]) -> dict[str, str]:
    """Name of a parameter -> the one name of the memory that it shares with others: one that the checkpoint knows."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        groups.setdefault(id(buffer), []).append(name)
    table: dict[str, str] = {}
    for names in groups.values():
        chosen = next((name for name in names if name in found), names[0])
        table |= dict.fromkeys(names, chosen)
    return table
