"""Candidates where two sides may sum the update in another order, so that its last bits are not the same.

What counts is d in float64. The interval is widened by four times what d may be off, its guard, which puts exact ties
well inside; what then lies within a guard of a widened end is in doubt, and an escape. So both sides see the same
numbers. The arithmetic here is elementwise and correctly rounded: the result depends on no threads or libraries.

Most elements need no float64: with x, about M - d, in float32 and a bound of its error (`deltas.py`) it is certain
which numbers lie in the interval. First all elements are looked at, for those that clearly have one candidate
(`filters.py`); then, still in float32, the ends of the others' intervals; then, in float64, those that are left, some
in ten thousand. Each step gives what float64 would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.merging.deltas import Delta
from loramerge.merging.filters import Found, Left, Room, add_unlike, joined, nearness, not_alone, nothing, where
from loramerge.merging.grids import Grid, bits_in, boundaries, floor_keys, halves, nearest_keys, values

Array = NDArray[Any]

SLOW_CHUNK = 1 << 16
"""Elements worked on at once in float64, which has more temporaries."""

ENDS = 1 << 15
"""Elements of which the ends are worked out at once in float32: what is made of them stays in a core's own cache."""

GUARD_OWN = 36
"""The guard is this power of 1/2 of |d| (1.5e-11), plus ..."""

GUARD_LARGEST = 44
"""... this power of 1/2 of the largest |d| of the block, for a d whose products cancel, plus ..."""

GUARD_MERGED = 50
"""... this power of 1/2 of |M|, for the float64 rounding of the interval's ends."""

ROUNDINGS = 4
"""Where x is in float32, the guard is what that is off by and so many 2**-24 of |M| more: for the ends of the interval,
which are summed in float32 then, and for an x that is `(M - sum) + W`."""

WIDE = 4.0
"""The interval is widened by so many guards."""


class NoFloat32(ArithmeticError):
    """Float32 tells too little, or was none."""


def look(
    m: Tensor,
    update: Delta,
    grid: Grid,
    slack: int,
    scale: int,
    weights: Array | None = None,
    nearest: Tensor | None = None,
    others: list[Array] | None = None,
) -> Iterator[Found]:
    """The candidates of the elements that the filter leaves, some at a time, at least once.

    Args:
        m: (n,) the merged weights.
        slack, scale: as the header has them.
        weights: (n,) the original ones, for what depends on them and for doubts.
        nearest: (n,) where to write the numbers nearest to M - d, those of all other elements.
        others: gathers elements whose weight is another one than the filter says.

    Raises:
        NoFloat32: the update is to be in float64.
    """
    widen = Widen(slack, scale)
    single = update.error > 0 and not slack and grid.mantissa < 23
    with np.errstate(all="ignore"):
        if not single:
            update = update.double()
            for part in joined(_left(m, update, False, grid, widen, weights, nearest, others)):
                yield _by_double(part, grid, widen, weights is not None)
            return
        for part in joined(_left(m, update, True, grid, widen, weights, nearest, others)):
            relative, error = update.relative, update.error
            yield _by_single(part, part.numbers, update, relative, error, grid, widen, weights is not None)


def _left(
    m: Tensor,
    update: Delta,
    single: bool,
    grid: Grid,
    widen: Widen,
    weights: Array | None,
    nearest: Tensor | None,
    others: list[Array] | None,
) -> Iterator[Left]:
    """The elements that the filter leaves, with M - d in float32 or d in float64."""
    bits = bits_in(m, grid)
    relative, error = (update.relative, update.error) if single else (0.0, 0.0)
    close = nearness(bits, relative, error, widen.scale, grid) if grid.mantissa < 23 else None
    room = Room(grid, nearest)
    yield nothing(m, grid)
    for at, numbers in update.back(m) if single else update.chunks():
        part = slice(at, at + numbers.size)
        here = room.of(at, numbers.size)
        near, b = bits_in(here, grid), bits[part]
        if close is None:
            few = _not_alone32(m[part], b, numbers, grid, widen, here)
        else:
            x = numbers if single else m[part].float().numpy() - numbers.astype(np.float32)
            here.copy_(torch.from_numpy(x))
            few = not_alone(x, near, b, close, grid)
            if widen.slack:
                few[:] = True
        w = b[:0] if weights is None else weights[part]
        if others is not None and weights is not None:
            add_unlike(others, w, near, few, at)
        i = where(few)
        yield Left(i + at, b.take(i), w.take(i) if weights is not None else w, numbers.take(i))


def _by_single(
    part: Left, x: Array, update: Delta, relative: float, error: float, grid: Grid, widen: Widen, doubts: bool
) -> Found:
    """What is found with x, M - d in float32 that is off by at most `relative` |M| and `error`."""
    relative += ROUNDINGS * 2.0**-24
    first, count, doubtful = _ends_of(part.merged, x, relative, error + 2 * WIDE * widen.largest, grid)
    finite = np.isfinite(x)
    if not finite.all():
        doubtful |= ~finite
    again = where(doubtful)  # float32 cannot tell
    if again.size:
        if again.size > max(64, (int(part.places[-1]) - int(part.places[0])) >> 5):
            raise NoFloat32
        exact = update.exact(part.places[again])
        b = part.merged[again]
        m = values(b, grid)
        off = np.abs(m - exact - x[again])
        if not (off <= np.abs(m) * relative + error)[finite[again]].all():
            raise NoFloat32
        start, many, doubtful[again] = _ends(b, exact, grid, widen, doubts)
        without = np.flatnonzero(many < 1)
        start[without] = nearest_keys((m - exact)[without], grid)
        first[again], count[again] = start, many
    return Found(part.places, first, count, doubtful, part.weights)


def _by_double(part: Left, grid: Grid, widen: Widen, doubts: bool) -> Found:
    """What is found with d in float64."""
    b, d = part.merged, part.numbers
    ends = [
        _ends(b[cut], d[cut], grid, widen, doubts)
        for cut in (slice(at, at + SLOW_CHUNK) for at in range(0, max(1, b.size), SLOW_CHUNK))
    ]
    first, count, doubtful = (np.concatenate(column) for column in zip(*ends, strict=True))
    without = np.flatnonzero(count < 1)
    if without.size:
        first[without] = nearest_keys(values(b[without], grid) - d[without], grid)
    return Found(part.places, first, count, doubtful, part.weights)


class Widen:
    """How far the ends of an interval move, and how far they may be off."""

    def __init__(self, slack: int, scale: int) -> None:
        self.slack = 2.0**-slack if slack else 0.0
        self.scale = scale
        self.largest = math.ldexp(1.0, scale - GUARD_LARGEST)

    def __call__(self, own: Array, d: Array) -> tuple[Array, Array]:
        """(widening, guard) of elements, float64. `own`: the guard for M's size."""
        size = np.abs(d)
        guard = size * 2.0**-GUARD_OWN
        guard += self.largest
        guard += own
        wide = guard * WIDE
        if self.slack:
            wide += size * self.slack
        return wide, guard


def _not_alone32(m: Tensor, bits: Array, d: Array, grid: Grid, widen: Widen, nearest: Tensor) -> Array:
    """As `not_alone` and `outside`, of float32, with the distance of M - d to `nearest`, written here, in float64."""
    merged = m.double().numpy()
    x = merged - d
    close = nearest.numpy()
    close[...] = x
    wide, guard = widen(np.abs(merged) * 2.0**-GUARD_MERGED, d)
    away = np.abs(x - close)
    away += wide
    away += guard
    exponent = bits & grid.top
    half = exponent.view(np.float32) * np.float32(2.0**-24)  # of an ulp of M, or 0 where that is no float32
    size = close.view(np.int32) & (grid.sign - 1)
    few: Array = ~(away < half)
    few |= size <= exponent
    few |= size >= grid.top
    return few


def _ends_of(b: Array, x: Array, relative: float, error: float, grid: Grid) -> tuple[Array, Array, Array]:
    """As `_ends`, from M - d in float32; what it cannot tell is doubtful, and whatever has no candidate.

    Args:
        relative: what the ends may be off by, times |M|.
        error: what they may be off by beyond that, the widening and its guard among it.
    """
    first, count = np.empty((2, b.size), np.int32)
    doubtful = np.empty(b.size, np.bool_)
    for at in range(0, b.size, ENDS):
        part = slice(at, at + ENDS)
        first[part], count[part], doubtful[part] = _ends_here(b[part], x[part], relative, error, grid)
    return first, count, doubtful


def _ends_here(b: Array, x: Array, relative: float, error: float, grid: Grid) -> tuple[Array, Array, Array]:
    at = b.view(np.uint16).astype(np.intp)
    below, above = (table.take(at, mode="wrap") for table in halves(grid))
    ends = np.empty((4, b.size), np.float32)
    np.subtract(below, x, out=ends[0])  # the lower one's opposite: the greatest number up to that is wanted as well
    np.add(above, x, out=ends[1])
    guard = np.multiply(above, np.float32(relative * 2.0 ** (grid.mantissa + 2) * 1.001), out=above)
    guard += np.float32(error * 1.001 + 2.0**-140)
    np.subtract(ends[:2], guard, out=ends[2:])
    ends[:2] += guard
    floors = floor_keys(ends, grid)
    unlike = floors[:2] != floors[2:]
    doubtful = np.bitwise_or(unlike[0], unlike[1], out=unlike[0])
    first, count = floors[0], floors[1]
    count += first
    count += 1
    doubtful |= np.less(count, 1, out=unlike[1])
    return np.negative(first, out=first), count, doubtful


def _ends(bits: Array, d: Array, grid: Grid, widen: Widen, doubts: bool) -> tuple[Array, Array, Array]:
    """(keys of the least candidates, counts of candidates, whether they are doubtful), (k,) each, from d in float64.

    Where there is no candidate, the count is below 1. Where M or d is not finite, both are any numbers, and doubtful.
    """
    if grid.mantissa == 23:
        below, above = boundaries(bits, grid)
        own = np.abs(values(bits, grid)) * 2.0**-GUARD_MERGED
    else:
        at = bits.view(np.uint16).astype(np.intp)
        below, above, own = (table.take(at, mode="wrap") for table in _tables(grid))
    below -= d
    above -= d
    wide, guard = widen(own, d)
    if doubts:
        return _between(below, above, wide + guard, wide - guard, grid)
    np.subtract(wide, below, out=below)
    above += wide
    first, count = floor_keys(below, grid), floor_keys(above, grid)
    count += first
    count += 1
    return np.negative(first, out=first), count, np.zeros(bits.size, np.bool_)


def _between(below: Array, above: Array, outer: Array, inner: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """As `_ends`, for ends that are to be moved outward by something between `outer` and `inner`."""
    doubtful = ~np.isfinite(below)
    doubtful |= ~np.isfinite(above)
    first, last = floor_keys(outer - below, grid), floor_keys(outer + above, grid)
    doubtful |= first != floor_keys(inner - below, grid)
    doubtful |= last != floor_keys(inner + above, grid)
    last += first
    last += 1
    doubtful |= last < 1
    return np.negative(first, out=first), last, doubtful


@lru_cache
def _tables(grid: Grid) -> tuple[Array, Array, Array]:
    """(boundary below, above, M's part of the guard) of all numbers of 16 bits, by their bits without a sign."""
    bits = np.arange(1 << 16).astype(np.uint16).view(np.int16)
    with np.errstate(all="ignore"):
        below, above = boundaries(bits, grid)
        return below, above, np.abs(values(bits, grid)) * 2.0**-GUARD_MERGED
