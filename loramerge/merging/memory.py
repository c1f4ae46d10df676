"""The merge of a state dict in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import Operator, Update, in_place
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import slots_of
from loramerge.errors import UnsupportedError
from loramerge.merging.kernels import CACHED_ELEMENTS, COMPUTE_DTYPES, TORCH_DTYPES, NonFinite, change_block
from loramerge.merging.run import Adapters, Options, open_pairs, weighted
from loramerge.merging.stream import Factors
from loramerge.tensors.text import quoted

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def merge_tensors(
    tensors: Mapping[str, Tensor], adapters: Adapters, config: Mapping[str, Any] | None, options: Options
) -> dict[str, Tensor]:
    """See `loramerge.merge_tensors`."""
    options.check()
    pairs = open_pairs(weighted(adapters), options)
    shapes = {n: (DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors.items()}
    binding = bind(
        slots_of(shapes),
        config,
        pairs,
        include=options.include,
        exclude=options.exclude,
        allow_unmatched=options.allow_unmatched,
        base_name="the state dict",
    )
    merged: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name in binding.names.slots:
            merged[name] = _merge_one(name, tensors, binding, [a for a, _ in pairs], options)
    return merged


def _merge_one(
    name: str, tensors: Mapping[str, Tensor], binding: Binding, adapters: Sequence[Adapter], options: Options
) -> Tensor:
    slot, new = binding.names[name], binding.replaced.get(name)
    updates: tuple[Update, ...] = tuple(binding.updates.get(name, ()))
    if new is not None:
        stored = TORCH_DTYPES[new.factor.info.dtype]
        kept = tensors.get(slot.source)
        device = kept.device if kept is not None else torch.device("cpu")
        source = Factors(adapters, stored, device).read(new.adapter, new.factor.key).clone()
        source = source.to(kept.dtype) if kept is not None else source
    else:
        source = tensors[slot.source]
        if not updates:
            return source.clone() if name != slot.source else source
    dtype = COMPUTE_DTYPES[options.compute_dtype]
    source = source.detach().contiguous()
    rows = source.shape[0] if source.dim() > 1 else source.numel()
    cols = source.numel() // max(1, rows)
    factors = Factors(adapters, dtype, source.device)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        flat = source.view(-1)
        step = max(1, (4 << 20) // max(1, cols)) * cols
        for at in range(0, flat.numel(), step):
            yield at, flat[at : at + step].to(dtype, copy=True)

    operators: list[Operator] = []
    for update in updates:
        operator = update.operator(factors.read, blocks)
        if operator is not None:
            operators.append(operator)
    if not operators:
        return source if new is not None else tensors[slot.source]
    target = torch.empty_like(source)
    size = CACHED_ELEMENTS if source.device.type == "cpu" else max(1, source.numel())
    compute = torch.empty(size, dtype=dtype, device=source.device)
    try:
        keep = not in_place(updates)
        change_block(source.view(-1), target.view(-1), 0, cols, operators, compute, keep, False)
    except NonFinite as error:
        raise UnsupportedError(
            "merge.overflow", f"{error.count} values of {quoted(name)} do not fit {source.dtype}", tensors=[name]
        ) from None
    return target
