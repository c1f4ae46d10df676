"""Parameters that adapters replace, rows of tokens among them: kept where all agree, else summed by their changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loramerge.combining.matching import Slot
from loramerge.combining.reading import TOKENS, Source, widest
from loramerge.converting.items import Item
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.text import quoted, some

CLOSE = 1e-9
"""How far the sum of weights may be from 1 for a mean."""

KEPT, AVERAGED, SUMMED = "kept", "averaged", "summed"


@dataclass(frozen=True)
class Whole:
    """A value to write: as an item of the kind that it had, how it came about, and what to tell about it."""

    item: Item
    how: str
    note: str = ""


def whole(slot: Slot, sources: Sequence[Source], *, updated: bool) -> Whole:
    """What several replacements N_i of one parameter W come to: `W + sum w_i (N_i - W)`.

    Equal ones are kept, whatever the weights; with weights that sum to 1 it is the weighted mean, which needs no W.

    Args:
        updated: the adapters also have updates of it, so that the value is the weight that these were trained on.

    Raises:
        MismatchError: `combine.shape`, `combine.needs-base`. UnsupportedError: `combine.whole`.
    """
    items = {n: sources[n].items(key)[0] for n, key in slot.held.items()}
    factor = "rows" if slot.key.what == TOKENS else "value"
    values = {n: item.factors[factor] for n, item in items.items()}
    first = items[min(items)]
    name = slot.key.name
    names = [sources[n].name for n in values]
    shapes = {tuple(v.shape) for v in values.values()}
    if len(shapes) > 1:
        raise MismatchError(
            "combine.shape",
            f"{quoted(name)} has not one shape: {', '.join(map(str, sorted(shapes)))}",
            fix="give adapters of one model, or leave it out: --exclude GLOB",
            tensors=[name],
        )
    if slot.key.what == TOKENS:
        _check_indices(slot, sources)
    total = sum(sources[n].weight for n in values)
    held = list(values.values())
    made = replace(first, path=slot.path, role=slot.key.role, flat=slot.flat, module=slot.module)
    if len(held) > 1 and all(_equal(held[0], other) for other in held[1:]):
        note = "" if abs(total - 1) <= CLOSE else f"{quoted(name)} is equal in {some(names, 3)} and kept as it is"
        return Whole(made, KEPT, note)
    if len(held) == 1 and abs(total - 1) <= CLOSE:
        return Whole(made, KEPT)
    if updated or not held[0].is_floating_point():
        why = "the weight that updates were trained on" if updated else "not a number to be averaged"
        raise UnsupportedError(
            "combine.whole",
            f"{quoted(name)} differs between {some(names, 3)} and is {why}",
            fix="merge the adapters into the base instead; or leave it out: --exclude GLOB",
            tensors=[name],
        )
    dtype = widest([value.dtype for value in held])
    weights = {n: sources[n].weight for n in values}
    before = _before(slot, sources) if abs(total - 1) > CLOSE else None
    if before is not None and before.shape == held[0].shape:
        new = (1 - total) * before.double() + _weighted(values, weights)
        return Whole(_with(made, factor, new, dtype), SUMMED)
    if abs(total - 1) <= CLOSE:
        return Whole(_with(made, factor, _weighted(values, weights), dtype), AVERAGED)
    based = slot.key.what != TOKENS and all(source.rebase is None for source in sources)
    raise MismatchError(
        "combine.needs-base",
        f"{quoted(name)} is replaced in {some(names, 3)} with weights that sum to {total:g}: what it was is needed",
        fix="give the model they were trained on: --base BASE; or weights that sum to 1; or --exclude GLOB"
        if based
        else "give weights that sum to 1, or leave it out: --exclude GLOB",
        tensors=[name],
    )


def _before(slot: Slot, sources: Sequence[Source]) -> Tensor | None:
    for number, key in slot.held.items():
        before = sources[number].before(key)
        if before is not None:
            return before
    return None


def _weighted(values: dict[int, Tensor], weights: dict[int, float]) -> Tensor:
    """The weighted sum, float64, the same bits in any order of the adapters."""
    from loramerge.algebra import content_key

    order = sorted(values, key=lambda n: (content_key(values[n]), weights[n]))
    total = torch.zeros(values[order[0]].shape, dtype=torch.float64)
    for n in order:
        total += weights[n] * values[n].double()
    return total


def _with(item: Item, factor: str, value: Tensor, dtype: torch.dtype) -> Item:
    rounded = value.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise UnsupportedError("combine.overflow", f"{quoted(item.path)} does not fit {dtype}", tensors=[item.path])
    return replace(item, factors={**item.factors, factor: rounded})


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _check_indices(slot: Slot, sources: Sequence[Source]) -> None:
    """Rows are of one set of tokens."""
    told = [sources[n].adapter.settings.get("token-rows") for n in slot.held]
    if any(other != told[0] for other in told[1:]):
        raise UnsupportedError(
            "combine.tokens",
            f"{quoted(slot.key.name)}: the adapters train rows of different tokens",
            fix="merge the adapters into the base instead; or leave it out: --exclude GLOB",
            tensors=[slot.key.name],
        )
