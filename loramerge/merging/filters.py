"""Tells for most of a tensor's elements, in a few passes over 16 bits each, that they need no undo data.

A pass over 16 bits costs a third of one over float32, and finding the few elements that are left as much as all of
them. Everything here is about numbers of 16 bits.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.merging.grids import Grid, bits_in, values

Array = NDArray[Any]

NEAR = 8
"""How close x may come to a rounding boundary, in float32 units in its last place, beside what it is off by.

Let X be the power of two at or below |x|. Rounding x costs half of one, and that of a difference that it is made of one
more; widening the interval and the guard for that less than 5 (see `LEAST`)."""

LEAST = 20
"""|x| is at least this power of 1/2 of the largest |d|, so that the guard for it is below 1 unit."""

PART = 1 << 14
"""Elements that are looked at more closely at once: few enough for a core's own cache, many for a call of numpy's."""


class Nearness(NamedTuple):
    """How near x may come to a boundary, in units in the last place, and the bits of the least number that it may have.

    `units` 0: nothing can be told.
    """

    units: int
    least: int


def nearness(bits: Array, relative: float, error: float, scale: int, grid: Grid) -> Nearness:
    """`NEAR` units, what `relative` comes to, and as many more as `error` comes to for the least x.

    The more units, the smaller that may be. Here they are about what leaves the fewest elements, for the typical M.

    float16's subnormals have another unit in the last place than float32's exponent says; bfloat16's are float32's.

    Args:
        bits: (n,) M's.
        relative: what x is off by, times |M|.
        error: what it is off by beyond that.
        scale: the exponent of a power of two above every |d|.
    """
    half = 1 << (22 - grid.mantissa)
    units = NEAR + math.ceil(relative * 2.0**24)  # |M| is below 2 X
    if not bits.size or units > half // 4:
        return Nearness(0, grid.top + 1)
    exponent = scale - LEAST
    if error:
        sample = np.sort(bits[:: max(1, bits.size >> 9)] & np.int16(grid.sign - 1))
        typical = float(values(sample[sample.size // 2 :][:1], grid)[0])
        wanted = half * error * 2.0**23 / typical if 0 < typical < math.inf else 0.0
        more = int(min(max(math.sqrt(wanted), 1.0), half / 4))
        units += more
        exponent = max(exponent, math.frexp(error * 2.0**23 / more)[1])
    exponent = max(-100 if grid.bias == 127 else -14, min(exponent, grid.bias + 1))
    return Nearness(units, ((exponent + grid.bias) << grid.mantissa) + 1)


class _Buffers(NamedTuple):
    low: Array
    size: Array
    few: Array
    other: Array


_held = threading.local()


def _buffers(n: int) -> _Buffers:
    """Those of this thread, for n elements."""
    held: _Buffers | None = getattr(_held, "buffers", None)
    if held is None or held.low.size < n:
        dtypes = (np.uint16, np.int16, np.bool_, np.bool_)
        held = _held.buffers = _Buffers(*(np.empty(n, dtype) for dtype in dtypes))
    return _Buffers(*(buffer[:n] for buffer in held))


def not_alone(x: Array, near: Array, merged: Array, close: Nearness, grid: Grid) -> Array:
    """Which elements may have another candidate than the number nearest to M - d, (n,) bool in a buffer of the thread.

    Let e be the exponent of M. Of the numbers above 2**e in size, those beside one are at least an ulp of M away from
    it, and the interval of candidates is at most an ulp of M and twice the widening long. So where the number nearest
    to x is above 2**e in size, and x is not about halfway between two numbers, there is no other candidate than that.
    It is certain only where that number is not too small, and finite.

    Args:
        x: (n,) float32, M - d.
        near: (n,) the bits of the number nearest to x.
        merged: (n,) the bits of M.
    """
    low, size, few, other = _buffers(x.size)
    if not close.units:
        few[:] = True
        return few
    # What rounding x drops, in the upper bits of a word that wraps around: half a unit, and `units` to each side of it.
    np.copyto(low, x.view(np.int32), casting="unsafe")
    shift = grid.mantissa - 7
    if shift:
        np.left_shift(low, np.uint16(shift), out=low)
    np.add(low, np.uint16((1 << 15) + (close.units << shift)), out=low)
    np.less(low, np.uint16(2 * close.units << shift), out=few)
    exponent = np.bitwise_and(merged, np.int16(grid.top), out=low.view(np.int16))
    np.bitwise_and(near, np.int16(grid.sign - 1), out=size)
    few |= np.less_equal(size, exponent, out=other)
    few |= np.less(size, np.int16(close.least), out=other)
    if size.max(initial=0) >= grid.top:
        few |= size >= grid.top
    return few


def below_or_infinite(near: Array, merged: Array, grid: Grid) -> Array:
    """Which numbers are at most 2**e in size, e the exponent of M, or not finite: (n,) bool in a buffer of the thread.

    Numbers above 2**e are at least an ulp of M apart, so that about one of them is moved to M.

    Args:
        near: (n,) the bits of the numbers.
        merged: (n,) the bits of M.
    """
    low, size, few, _ = _buffers(near.size)
    exponent = np.bitwise_and(merged, np.int16(grid.top), out=low.view(np.int16))
    np.bitwise_and(near, np.int16(grid.sign - 1), out=size)
    np.less_equal(size, exponent, out=few)
    if size.max(initial=0) >= grid.top:
        few |= size >= grid.top
    return few


class Left(NamedTuple):
    """Elements that need a closer look: `places` (k,), ascending; bits of M; of W, if that is given; x or d."""

    places: Array
    merged: Array
    weights: Array
    numbers: Array


class Found(NamedTuple):
    """What M and d alone say of the elements `places` (k,), ascending, of which the filter does not tell.

    They have `counts` candidates, with the keys `first`, `first + 1`, ...; where there is none, `first` is the number
    nearest to M - d, as for all other elements. Those that are `doubtful` (k,) are not safe to rely on. Where the
    original weights were given, `weights` (k,) are theirs.
    """

    places: Array
    first: Array
    counts: Array
    doubtful: Array
    weights: Array


def nothing(m: Tensor, grid: Grid) -> Left:
    """No elements at all."""
    none = bits_in(m, grid)[:0]
    return Left(np.zeros(0, np.int64), none, none, np.zeros(0, np.float32))


def joined(parts: Iterable[Left]) -> Iterator[Left]:
    """The same elements, at least `PART` at a time but for the last."""
    held: list[Left] = []
    size = 0
    for part in parts:
        held.append(part)
        size += part.places.size
        if size >= PART:
            yield _join(held)
            held, size = [], 0
    if held:
        yield _join(held)


def _join(parts: list[Left]) -> Left:
    return parts[0] if len(parts) == 1 else Left(*map(np.concatenate, zip(*parts, strict=True)))


class Room:
    """Where the numbers nearest to M - d go: into a tensor (n,), or into memory that is used again."""

    def __init__(self, grid: Grid, nearest: Tensor | None) -> None:
        self._nearest = nearest
        self._held = torch.empty(0, dtype=grid.dtype)

    def of(self, at: int, count: int) -> Tensor:
        """That of the elements `at, at + 1, ...`."""
        if self._nearest is not None:
            return self._nearest[at : at + count]
        if self._held.numel() < count:
            self._held = torch.empty(count, dtype=self._held.dtype)
        return self._held[:count]


def add_unlike(others: list[Array], w: Array, near: Array, few: Array, at: int) -> None:
    """Adds the elements that are not among few and have another weight than the nearest one."""
    unlike = w != near
    np.greater(unlike, few, out=unlike)
    if unlike.any():
        others.append(np.flatnonzero(unlike) + at)


def scale_of(largest: float) -> int:
    """The exponent of a power of two above every finite |d|, in what the undo code allows."""
    return math.frexp(min(largest, sys.float_info.max))[1] if largest else -1074


def where(flags: Array) -> Array:
    """`flatnonzero` of (n,) bool, faster for some percent in irregular places, which cost it a wrong branch each.

    Words of eight that hold any are looked for first, then those in them: both are frequent enough for numpy's way
    without branches.
    """
    whole = flags.size & ~7
    if np.count_nonzero(flags) > flags.size // 10:
        return np.flatnonzero(flags)
    words = flags[:whole].view(np.uint64)
    held = np.flatnonzero(words != 0)
    at = np.flatnonzero(words.take(held).view(np.bool_))
    index: Array = held.take(at >> 3)
    index <<= 3
    at &= 7
    index += at
    if whole == flags.size:
        return index
    return np.concatenate((index, np.flatnonzero(flags[whole:]) + whole))
