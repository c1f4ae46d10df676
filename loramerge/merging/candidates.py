"""The undo codec: which of the few weights that an update turns into M the original was, so that W comes back exactly.

An update d moves a weight w to `M = round(w + d)`. Given M and d, w is a number of the base's grid between the two
rounding boundaries of M, moved back by d:

    (M_prev + M) / 2 - d  <=  w  <=  (M + M_next) / 2 - d

Mostly one number lies there, and nothing is stored. Where several do, the rank of W among them is. Where W is none of
them (M went through float32, W is -0.0 or not finite), W itself is: an escape.

What counts is d in float64, which both sides sum perhaps in another order. So the interval is widened by four times
what d may be off, its guard, which puts exact ties well inside; what then lies within a guard of a widened end is an
escape too. Both sides therefore see the same numbers. The arithmetic here is elementwise and correctly rounded, so that
the result does not depend on threads or libraries.

Most elements need no float64: with a d in float32 and a bound of its error (`deltas.py`) it is certain which
numbers lie in the interval. First all elements are looked at, for those that clearly have one candidate; then,
still in float32, the ends of the others' intervals; then, in float64, those that are left, some in ten thousand.
Each step gives what float64 would.

Updates that depend on W have no such interval: `encode_xor` stores how W and M differ.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.merging.deltas import Delta, Given

Array = NDArray[Any]

SLOW_CHUNK = 1 << 16
"""Elements worked on at once off the fast path, which has more temporaries."""

GUARD_OWN = 36
"""The guard is this power of 1/2 of |d| (1.5e-11), plus ..."""

GUARD_LARGEST = 44
"""... this power of 1/2 of the largest |d| of the block, for a d whose products cancel, plus ..."""

GUARD_MERGED = 50
"""... this power of 1/2 of |M|, for the float64 rounding of the interval's ends."""

GUARD_SINGLE = 22
"""Where d is in float32, the guard is this power of 1/2 of |d| and of |M| instead: the ends of the interval are summed
in float32 then, and moved, which takes about half of it. What d is off by comes on top."""

WIDE = 4.0
"""The interval is widened by so many guards."""

NEAR = 8
"""Fast path: how close a float32 `M - d` may come to a rounding boundary, in float32 units in the last place.

Let X be the power of two at or below |M - d|; where the fast path is taken, |M| < 2 X and |d| < 4 X. Rounding d costs
up to 1 unit, rounding the difference half of one, the widening and its guard less than 5 (see `LEAST`)."""

LEAST = 20
"""Fast path: |M - d| is at least this power of 1/2 of the largest |d|, so that the guard for it is below 1 unit."""

EXACT_BASES = 32
"""Ranks among up to so many candidates are digits to exactly that base, among more to the next power of two."""

MOST_SLACK = 60

VERSION = 1
HEADER = struct.Struct("<BBBxhxxIIIIII")
CHECK = struct.Struct("<I")
XOR_HEADER = struct.Struct("<BBxxI")


@dataclass(frozen=True, slots=True)
class Grid:
    """One binary format. The key of a number is its sign and magnitude bits as an int: ordered, consecutive."""

    code: int
    dtype: torch.dtype
    bits: torch.dtype
    mantissa: int
    bias: int
    slack: int
    """A further widening: this power of 1/2 of |d|, 0 for none. For merges whose own d is only float32."""

    @property
    def top(self) -> int:
        """The bits of infinity, which are also the mask of the exponent."""
        return (2 * self.bias + 1) << self.mantissa

    @property
    def sign(self) -> int:
        return (2 * self.bias + 2) << self.mantissa

    @property
    def drop(self) -> int:
        """Bits of a float64 mantissa below this one's last."""
        return 52 - self.mantissa


GRIDS = {
    grid.dtype: grid
    for grid in (
        Grid(1, torch.bfloat16, torch.int16, 7, 127, 0),
        Grid(2, torch.float16, torch.int16, 10, 15, 0),
        Grid(3, torch.float32, torch.int32, 23, 127, 22),
    )
}


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Found:
    """What M and d alone say of W.

    The elements `index` (k,), ascending, are those of which the fast path does not tell. They have `count` candidates,
    with the keys `first`, `first + 1`, ...; where there is none, `first` is the number nearest to M - d, as for all
    other elements. Those that are `doubtful` (k,) are not safe to rely on. Where the original weights were given,
    `weights` (k,) are theirs, and `others` the other elements that have another than the fast path says.
    """

    index: Array
    first: Array
    count: Array
    doubtful: Array
    weights: Array
    others: Array


def encode(W: Tensor, M: Tensor, d: Tensor | Delta, slack: int | None = None) -> bytes:
    """What it takes, besides M and d, to get W back bit for bit. Deterministic.

    Args:
        W: (n,) the original weights, bfloat16, float16 or float32.
        M: (n,) the merged ones, same dtype: `round(W + d)`, or anything, at a price.
        d: the update, (n,) float64 or chunk by chunk.
        slack: widens the interval by 2**-slack of |d|, where M was made with a d that is off by as much; 0 for none. By
            default what suits a float32 sum; 0 saves 7 bytes of 8 for a float32 M that was summed in float64.
    """
    grid = _grid(W.dtype)
    if M.dtype != W.dtype or M.numel() != W.numel():
        raise ValueError(f"W has {W.numel()} elements of {W.dtype}, M has {M.numel()} of {M.dtype}")
    slack = grid.slack if slack is None else slack
    if not 0 <= slack <= MOST_SLACK or W.numel() >= 1 << 32:
        raise ValueError(f"a slack of {slack} or a block of {W.numel()} elements cannot be coded")
    update = _update(d, M)
    scale = _scale(update.largest)
    w = _bits(W, grid)
    found = _find(_flat(M), update, grid, slack, scale, weights=w)

    key = _keys(found.weights, grid)
    rank = key - found.first
    inside = (rank >= 0) & (rank < found.count) & (found.weights != _signed(grid.sign, grid)) & ~found.doubtful
    wrong = np.concatenate((found.others, found.index[~inside]))
    escapes = np.sort(wrong)
    kept = np.flatnonzero(inside & (found.count > 1))
    first, count, rank, key = found.first[kept], found.count[kept], rank[kept], key[kept]

    around = _around_zero(first, count)
    zero = key[around] == 0
    ranked = np.ones(rank.size, np.bool_)
    ranked[around[zero]] = False
    places = _varints(np.diff(escapes, prepend=-1) - 1)
    ranks = _pack(rank[ranked], count[ranked])
    head = (VERSION, grid.code, slack, scale, w.size, escapes.size, len(places), rank.size, around.size, len(ranks))
    coded = b"".join(
        (HEADER.pack(*head), places, w[escapes].tobytes(), np.packbits(zero, bitorder="little").tobytes(), ranks)
    )
    return coded + CHECK.pack(zlib.crc32(coded))


def decode(M: Tensor, d: Tensor | Delta, coded: bytes) -> Tensor:
    """W (n,) bit for bit, from M (n,), d (n,) as at encoding but for its last bits, and what `encode` gave.

    Raises:
        ValueError: the bytes are damaged, or are not those of this M and d as far as their counts tell. A d that is
            slightly wrong may pass: compare a hash of W.
    """
    grid = _grid(M.dtype)
    size = M.element_size()
    coded = _checked(coded, HEADER.size)
    version, code, slack, scale, n, escaped, at_places, several, at_zero, at_ranks = HEADER.unpack_from(coded)
    if version != VERSION or code != grid.code or not (-1100 <= scale <= 1024 and slack <= MOST_SLACK):
        raise ValueError(f"undo data is not that of a {M.dtype} tensor, or of another version")
    if n != M.numel():
        raise ValueError(f"undo data is for {n} elements, not {M.numel()}")
    sizes = (at_places, escaped * size, -(-at_zero // 8), at_ranks)
    if len(coded) != HEADER.size + sum(sizes):
        raise ValueError("undo data has the wrong length")
    parts = []
    at = HEADER.size
    for length in sizes:
        parts.append(coded[at : at + length])
        at += length

    escapes = np.cumsum(_from_varints(parts[0], escaped) + 1) - 1
    if escaped and escapes[-1] >= n:
        raise ValueError("undo data names an element that does not exist")
    W = torch.empty(n, dtype=grid.dtype)
    out = _bits(W, grid)
    found = _find(_flat(M), _update(d, M), grid, slack, scale, nearest=W)
    several_here = found.count > 1
    at_escapes = np.minimum(np.searchsorted(found.index, escapes), max(0, found.index.size - 1))
    if found.index.size:
        several_here[at_escapes[found.index[at_escapes] == escapes]] = False
    kept = np.flatnonzero(several_here)
    key, first, count = found.first, found.first[kept], found.count[kept]
    around = _around_zero(first, count)
    if kept.size != several or around.size != at_zero:
        raise ValueError("undo data is not that of this merged tensor and update: other counts of candidates")
    zero = np.unpackbits(np.frombuffer(parts[2], np.uint8), bitorder="little")
    if zero[at_zero:].any():
        raise ValueError("undo data is damaged: bits beyond its end")
    ranked = np.ones(several, np.bool_)
    ranked[around[zero[:at_zero] == 1]] = False
    rank = np.negative(first)  # of the number 0
    rank[ranked] = _unpack(parts[3], count[ranked])
    key[kept] = first + rank
    out[found.index] = _bits_of(key, grid)
    out[escapes] = np.frombuffer(parts[1], out.dtype)
    return W


def ambiguity(M: Tensor, d: Tensor, slack: int | None = None) -> tuple[int, float]:
    """How well M and d alone tell W, without what `encode` gave: where W is taken to be the number nearest to M - d.

    Args:
        M, d, slack: as for `encode`.

    Returns:
        how many elements have several candidates, and how many of them are to be expected wrong: one of n equally
        likely candidates is taken, so `1 - 1/n` of an element.
    """
    grid = _grid(M.dtype)
    slack = grid.slack if slack is None else slack
    update = _update(d, M)
    count = _find(_flat(M), update, grid, slack, _scale(update.largest)).count
    count = count[count > 1]
    return count.size, float((1 - 1 / count).sum()) if count.size else 0.0


def encode_xor(W: Tensor, M: Tensor) -> bytes:
    """What it takes, besides M, to get W back bit for bit, whatever made M of it. Any one dtype.

    Of the bits of a float as an ordered number, the difference between W and M: it is smaller than their exclusive or,
    which carries spread over. Byte planes are compressed apart: the high ones are nearly all zero.
    """
    if M.dtype != W.dtype or M.numel() != W.numel() or W.numel() >= 1 << 32:
        raise ValueError(f"W has {W.numel()} elements of {W.dtype}, M has {M.numel()} of {M.dtype}")
    w, m = _ordered(W), _ordered(M)
    steps = w - m
    steps = (steps << 1) ^ (steps >> (8 * steps.itemsize - 1))  # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...
    pieces = [XOR_HEADER.pack(VERSION, steps.itemsize, steps.size)]
    planes = steps.astype(steps.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, steps.itemsize)
    for plane in planes.T:
        packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        packed = packer.compress(plane.tobytes()) + packer.flush()
        pieces += [CHECK.pack(len(packed)), packed]
    coded = b"".join(pieces)
    return coded + CHECK.pack(zlib.crc32(coded))


def decode_xor(M: Tensor, coded: bytes) -> Tensor:
    """W (n,) bit for bit, from M (n,) and what `encode_xor` gave.

    Raises:
        ValueError: the bytes are damaged, or are for a tensor of another size.
    """
    m = _ordered(M)
    coded = _checked(coded, XOR_HEADER.size)
    if XOR_HEADER.unpack_from(coded) != (VERSION, m.itemsize, m.size):
        raise ValueError(f"undo data is not for {m.size} elements of {m.itemsize} bytes, or of another version")
    planes = np.empty((m.size, m.itemsize), np.uint8)
    at = XOR_HEADER.size
    for i in range(m.itemsize):
        if len(coded) < at + CHECK.size:
            raise ValueError("undo data is cut off")
        (length,) = CHECK.unpack_from(coded, at)
        at += CHECK.size
        unpacker = zlib.decompressobj()
        try:
            plane = unpacker.decompress(coded[at : at + length], m.size + 1)
        except zlib.error as error:
            raise ValueError("undo data is damaged: it cannot be decompressed") from error
        if len(plane) != m.size or not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
            raise ValueError("undo data has the wrong length")
        at += length
        planes[:, i] = np.frombuffer(plane, np.uint8)
    if at != len(coded):
        raise ValueError("undo data has the wrong length")
    steps = planes.view(m.dtype.newbyteorder("<")).reshape(-1).astype(m.dtype)
    steps = ((steps >> 1) & np.iinfo(m.dtype).max) ^ -(steps & 1)
    return torch.from_numpy(_reordered(steps + m)).view(M.dtype)


def _ordered(tensor: Tensor) -> Array:
    """The bits of floats as ints in the order of their values, -0.0 one below 0.0; `_reordered` undoes it."""
    return _reordered(_flat(tensor).view(INTEGERS[tensor.element_size()]).numpy())


def _reordered(bits: Array) -> Array:
    return np.asarray(bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max))


def _checked(coded: bytes, least: int) -> bytes:
    """The bytes without their checksum, which is right."""
    if len(coded) < least + CHECK.size:
        raise ValueError("undo data is cut off")
    coded, (check,) = coded[: -CHECK.size], CHECK.unpack(coded[-CHECK.size :])
    if zlib.crc32(coded) != check:
        raise ValueError("undo data is damaged: its checksum is wrong")
    return coded


def _find(
    m: Tensor,
    update: Delta,
    grid: Grid,
    slack: int,
    scale: int,
    weights: Array | None = None,
    nearest: Tensor | None = None,
) -> Found:
    """The candidates of the elements that the fast path leaves.

    `weights`: the original ones, for what depends on them and for doubts. `nearest` (n,): where to write the numbers
    nearest to M - d, those of all other elements.
    """
    if slack or grid.dtype == torch.float32:
        update = update.double()
    error = update.error
    bits = _bits(m, grid)
    widen = Widen(slack, scale)
    near = _nearness(bits, error, grid, widen)
    lists: list[tuple[Array, ...]] = []
    others = []
    none = np.zeros(0, np.int64)
    with np.errstate(all="ignore"):
        for at, d in update.chunks():
            part = slice(at, at + d.size)
            b = bits[part]
            slow, close = _quick(m[part], b, d, grid, widen, near, None if nearest is None else nearest[part])
            i = _where(slow)
            w = none
            if weights is not None:
                w = weights[part]
                unlike = np.not_equal(w, close, out=_buffers(d.size).other)
                np.greater(unlike, slow, out=unlike)
                if unlike.any():
                    others.append(np.flatnonzero(unlike) + at)
                w = w[i]
            lists.append((i + at, b[i], d[i], w))
        if not lists:
            lists.append((none, bits[:0], np.zeros(0), none))
        index, b, d, w = (np.concatenate(column) for column in zip(*lists, strict=True))
        ends = [
            _ends(b[part], d[part], grid, widen, weights is not None, error)
            for part in (slice(at, at + SLOW_CHUNK) for at in range(0, max(1, index.size), SLOW_CHUNK))
        ]
        first, count, doubtful = (np.concatenate(column) for column in zip(*ends, strict=True))
        if error:
            again = np.flatnonzero(doubtful)  # float32 cannot tell
            if again.size > m.numel() >> 5:
                return _find(m, update.double(), grid, slack, scale, weights, nearest)
            exact = update.exact(index[again])
            if not (np.abs(exact - d[again]) <= error)[np.isfinite(d[again])].all():
                return _find(m, update.double(), grid, slack, scale, weights, nearest)  # it was no float32
            first[again], count[again], doubtful[again] = _ends(b[again], exact, grid, widen, weights is not None, 0.0)
            d = d.astype(np.float64)
            d[again] = exact  # those without candidates among them
        without = np.flatnonzero(count < 1)
        if without.size:
            first[without] = _nearest(b[without], d[without], grid)
    return Found(index, first, count, doubtful, w, np.concatenate([none, *others]))


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


def _quick(
    m: Tensor, bits: Array, d: Array, grid: Grid, widen: Widen, near: tuple[int, int], nearest: Tensor | None
) -> tuple[Array, Array]:
    """((n,) whether there may be other candidates than the number nearest to M - d, bits of that number).

    Both may lie in buffers of the thread. The numbers are written to `nearest` where that is given.
    """
    buffers = _buffers(m.numel())
    if nearest is None:
        nearest = torch.from_numpy(buffers.nearest).view(grid.dtype)[: m.numel()]
    slow = (_quick32 if grid.dtype == torch.float32 else _quick16)(m, bits, d, grid, widen, near, nearest, buffers)
    return slow, nearest.view(grid.bits).numpy()


def _quick16(
    m: Tensor,
    bits: Array,
    d: Array,
    grid: Grid,
    widen: Widen,
    near: tuple[int, int],
    nearest: Tensor,
    buffers: Buffers,
) -> Array:
    """Writes the numbers nearest to M - d; (n,) tells where they may not be the only candidate.

    Let e be the exponent of M and C the number nearest to x = M - d. Where |C| > 2**e, the numbers next to C are at
    least an ulp of M away from it, and the interval is at most an ulp of M and twice the widening long, with x in its
    middle or nearer to its shorter side: it holds C alone, or nothing, unless x is about halfway between two numbers.
    float32 is exact enough to tell, see `NEAR` and `_nearness`.
    """
    units, least = near
    x, low, size, slow, other = buffers.x, buffers.low, buffers.size, buffers.slow, buffers.other
    there = torch.from_numpy(x)
    there.copy_(m)
    if d.dtype == np.float64:
        np.copyto(buffers.update, d, casting="same_kind")
        d = buffers.update
    np.subtract(x, d, out=x)
    nearest.copy_(there)
    # What the rounding drops, in the upper bits of a word that wraps around: half a unit, and NEAR to each side of it.
    np.copyto(low, x.view(np.int32), casting="unsafe")
    shift = grid.mantissa - 7
    if shift:
        np.left_shift(low, np.uint16(shift), out=low)
    np.add(low, np.uint16((1 << 15) + (units << shift)), out=low)
    np.less(low, np.uint16(2 * units << shift), out=slow)
    close = nearest.view(grid.bits).numpy()
    np.bitwise_and(close, np.int16(grid.sign - 1), out=size)
    np.bitwise_and(bits, np.int16(grid.top), out=low.view(np.int16))
    slow |= np.less_equal(size, low.view(np.int16), out=other)
    # Below the least one or at least infinity: wraps around as well.
    np.subtract(size, np.int16(least), out=size)
    slow |= np.greater_equal(size.view(np.uint16), np.uint16(max(0, grid.top - least)), out=other)
    return slow


def _nearness(bits: Array, error: float, grid: Grid, widen: Widen) -> tuple[int, int]:
    """Fast path of 16 bits: how near x may come to a boundary, in float32 units in the last place, and the bits of the
    least number that x may be near to.

    NEAR units, and as many more as `error` comes to for the least x: the more units, the smaller that may be. Here the
    units are about what leaves the fewest elements to the slow path, for the typical M.

    float16's subnormals have another unit in the last place than float32's exponent says; bfloat16's are float32's.
    """
    if widen.slack or grid.mantissa == 23 or not bits.size:
        return NEAR, grid.top + 1
    exponent, units = widen.scale - LEAST, NEAR
    if error:
        sample = np.sort(bits[:: max(1, bits.size >> 9)] & np.int16(grid.sign - 1))
        typical = float(_values(sample[sample.size // 2 :][:1], grid)[0])
        half = 1 << (22 - grid.mantissa)
        wanted = half * error * 2.0**23 / typical if 0 < typical < math.inf else 0.0
        more = int(min(max(math.sqrt(wanted), 1.0), half / 4))
        units += more
        exponent = max(exponent, math.frexp(error * 2.0**23 / more)[1])
    exponent = max(-100 if grid.bias == 127 else -14, min(exponent, grid.bias + 1))
    return units, ((exponent + grid.bias) << grid.mantissa) + 1


class Buffers(NamedTuple):
    """Where the fast path works, for n elements."""

    x: Array
    update: Array
    low: Array
    size: Array
    slow: Array
    other: Array
    nearest: Array


_held = threading.local()


def _buffers(n: int) -> Buffers:
    """Those of this thread."""
    held: Buffers | None = getattr(_held, "buffers", None)
    if held is None or held.x.size < n:
        dtypes = (np.float32, np.float32, np.uint16, np.int16, np.bool_, np.bool_, np.int32)
        held = _held.buffers = Buffers(*(np.empty(n, dtype) for dtype in dtypes))
    return Buffers(*(buffer[:n] for buffer in held))


def _quick32(
    m: Tensor,
    bits: Array,
    d: Array,
    grid: Grid,
    widen: Widen,
    near: tuple[int, int],
    nearest: Tensor,
    buffers: Buffers,
) -> Array:
    """As `_quick16`, with the distance of x to C in float64, and half an ulp of M, or 0 where that is no float32."""
    merged = m.numpy().astype(np.float64)
    x = merged - d
    close = nearest.numpy()
    close[...] = x
    wide, guard = widen(np.abs(merged) * 2.0**-GUARD_MERGED, d)
    away = np.abs(x - close)
    away += wide
    away += guard
    exponent = bits & grid.top
    half = exponent.view(np.float32) * np.float32(2.0**-24)
    size = close.view(np.int32) & (grid.sign - 1)
    slow: Array = ~(away < half)
    slow |= size <= exponent
    slow |= size >= grid.top
    return slow


def _ends(bits: Array, d: Array, grid: Grid, widen: Widen, doubts: bool, error: float) -> tuple[Array, Array, Array]:
    """(keys of the least candidates, counts of candidates, whether they are doubtful), (k,) each.

    Where there is no candidate, the count is below 1. Where M or d is not finite, both are any numbers, and doubtful.
    `error`: d is float32 and off by so much; what that does not settle is doubtful.
    """
    if error:
        at = _numbers(bits)
        below, above, own = (table.take(at, mode="wrap") for table in _tables(grid, True))
        below -= d
        above -= d
        guard = np.abs(d)
        guard *= np.float32(2.0**-GUARD_SINGLE)
        guard += own
        guard += np.float32(error * (1 + 2.0**-10) + widen.largest * 2 * WIDE)
        first, last, doubtful = _between(below, above, guard, -guard, grid)
        return first.astype(np.int64), last.astype(np.int64), doubtful
    if grid.mantissa == 23:
        below, above, own = _borders(bits, grid)
    else:
        at = _numbers(bits)
        below, above, own = (table.take(at, mode="wrap") for table in _tables(grid, False))
    below -= d
    above -= d
    wide, guard = widen(own, d)
    if doubts:
        return _between(below, above, wide + guard, wide - guard, grid)
    np.subtract(wide, below, out=below)
    above += wide
    first, count = _floor(below, grid), _floor(above, grid)
    count += first
    count += 1
    return np.negative(first, out=first), count, np.zeros(bits.size, np.bool_)


def _between(below: Array, above: Array, outer: Array, inner: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """As `_ends`, for ends that are to be moved outward by something between `outer` and `inner`."""
    doubtful = ~np.isfinite(below)
    doubtful |= ~np.isfinite(above)
    first, last = _floor(outer - below, grid), _floor(outer + above, grid)
    doubtful |= first != _floor(inner - below, grid)
    doubtful |= last != _floor(inner + above, grid)
    last += first
    last += 1
    doubtful |= last < 1
    return np.negative(first, out=first), last, doubtful


def _borders(bits: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """(rounding boundary below M, above M, M's part of the guard), float64."""
    size = bits.astype(np.int64) & (grid.sign - 1)
    m = _values(bits, grid)
    exponent = np.maximum(size >> grid.mantissa, 1)
    outward = ((exponent + (1022 - grid.bias - grid.mantissa)) << 52).view(np.float64)  # half an ulp
    inward = outward.copy()
    inward[((size & ((1 << grid.mantissa) - 1)) == 0) & (exponent > 1)] *= 0.5
    negative = bits < 0
    below = m - np.where(negative, outward, inward)
    above = m + np.where(negative, inward, outward)
    return below, above, np.abs(m) * 2.0**-GUARD_MERGED


@lru_cache
def _tables(grid: Grid, single: bool) -> tuple[Array, Array, Array]:
    """`_borders` of all numbers of 16 bits, in the order of their bits without a sign.

    `single`: in float32, which the boundaries are, with the guard for that.
    """
    with np.errstate(all="ignore"):
        below, above, own = _borders(np.arange(1 << 16).astype(np.uint16).view(np.int16), grid)
        if not single:
            return below, above, own
        own *= 2.0 ** (GUARD_MERGED - GUARD_SINGLE)
        return below.astype(np.float32), above.astype(np.float32), own.astype(np.float32)


def _nearest(bits: Array, d: Array, grid: Grid) -> Array:
    """Keys of the numbers nearest to M - d; of any where that is not finite."""
    x = _values(bits, grid) - d
    key = _floor(x, grid)
    above = np.minimum(key + 1, grid.top - 1)
    closer = _values(_bits_of(above, grid), grid) - x < x - _values(_bits_of(key, grid), grid)
    return np.asarray(np.where(closer, above, key))


def _numbers(bits: Array) -> Array:
    """16 bits as indices: converted here, once, and faster than by numpy's indexing."""
    return bits.view(np.uint16).astype(np.intp)


def _floor(x: Array, grid: Grid) -> Array:
    """Keys of the greatest numbers up to x (k,) float64, at most the largest finite one.

    Below the least finite number: one less than its key. Anything where x is not finite.
    """
    bias, mantissa, kind = (127, 23, np.int32) if x.dtype == np.float32 else (1023, 52, np.int64)
    raw: Array = x.view(kind)
    top = np.iinfo(kind).max
    negative = raw >> kind(8 * raw.itemsize - 1)  # all ones
    key = raw & top
    if bias != grid.bias:
        key -= kind((bias - grid.bias) << mantissa)
    least, most = (int(key.min()), int(key.max())) if key.size else (top, 0)
    key ^= negative
    key -= negative
    key >>= kind(mantissa - grid.mantissa)
    if least < 1 << mantissa:  # up to the least normal number: units of the least subnormal
        small = np.flatnonzero(np.abs(x) < 2.0 ** (1 - grid.bias))
        key[small] = np.floor(np.ldexp(x[small], grid.bias - 1 + grid.mantissa)).astype(kind)
    if most >= grid.top << (mantissa - grid.mantissa):
        np.clip(key, -grid.top, grid.top - 1, out=key)
    return np.asarray(key)


def _values(bits: Array, grid: Grid) -> Array:
    return torch.from_numpy(bits).view(grid.dtype).double().numpy()


def _keys(bits: Array, grid: Grid) -> Array:
    negative = bits >> (8 * bits.itemsize - 1)
    key = bits & bits.dtype.type(grid.sign - 1)
    key ^= negative
    key -= negative
    return np.asarray(key.astype(np.int64))


def _bits_of(key: Array, grid: Grid) -> Array:
    bits: Array = key.astype(np.int16 if grid.bits == torch.int16 else np.int32)
    negative = bits >> (8 * bits.itemsize - 1)
    bits ^= negative
    bits -= negative
    negative &= bits.dtype.type(-grid.sign)
    bits += negative
    return np.asarray(bits)


def _signed(bits: int, grid: Grid) -> int:
    return bits - 2 * grid.sign if bits >= grid.sign else bits


def _around_zero(first: Array, count: Array) -> Array:
    """Indices of the intervals that hold 0: thousands of numbers, of which 0 is by far the likeliest.

    A weight that was pruned or padded costs one bit this way, not fifteen.
    """
    return np.flatnonzero((first <= 0) & (first + count > 0))


def _pack(digits: Array, counts: Array) -> bytes:
    """Digits (k,) below their counts (k,): by base, several to a word of up to 8 bytes."""
    pieces = []
    for base, index in _by_base(counts):
        per, words, width = _layout(base, index.size)
        padded = np.zeros(per * words, np.uint64)
        padded[: index.size] = digits[index]
        if base == 2:
            bits = padded.reshape(per, words).astype(np.uint8)
            pieces.append(np.packbits(bits.T, axis=1, bitorder="little").tobytes())
            continue
        powers = np.array([base**k for k in range(per)], np.uint64)
        packed = (padded.reshape(per, words) * powers[:, None]).sum(axis=0, dtype=np.uint64)
        pieces.append(packed.astype("<u8").view(np.uint8).reshape(words, 8)[:, :width].tobytes())
    return b"".join(pieces)


def _unpack(coded: bytes, counts: Array) -> Array:
    """The inverse of `_pack`: digits (k,).

    Raises:
        ValueError: not what `_pack` writes for some digits below these counts.
    """
    digits = np.zeros(counts.size, np.int64)
    at = 0
    for base, index in _by_base(counts):
        per, words, width = _layout(base, index.size)
        held = np.frombuffer(coded[at : at + words * width], np.uint8)
        if held.size != words * width:
            raise ValueError("undo data is cut off")
        at += held.size
        if base == 2:
            digit = np.unpackbits(held.reshape(words, width), axis=1, bitorder="little").T
            if digit[per:].any():
                raise ValueError("undo data is damaged: a rank is too large")
            digits[index] = _first(np.ascontiguousarray(digit[:per]), index.size)
            continue
        wide = np.zeros((words, 8), np.uint8)
        wide[:, :width] = held.reshape(words, width)
        left = wide.view("<u8").reshape(words).astype(np.uint64)
        rows = left.reshape(1, words)
        half = (1 << (per - 1).bit_length()) // 2
        while half:  # numbers of twice as many digits: the lower ones, and those above
            split = np.empty((len(rows), 2, words), np.uint64)
            np.floor_divide(rows, np.uint64(base**half), out=split[:, 1])
            np.multiply(split[:, 1], np.uint64(base**half), out=split[:, 0])
            np.subtract(rows, split[:, 0], out=split[:, 0])
            rows = split.reshape(-1, words)
            half //= 2
        digits[index] = _first(rows, index.size)
    if at != len(coded):
        raise ValueError("undo data is not that of this merged tensor and update: ranks are left over")
    if (digits >= counts).any():
        raise ValueError("undo data is damaged: a rank is too large")
    return digits


def _first(rows: Array, size: int) -> Array:
    """The digits of a base, in rows of one of each word, without those that fill the last words up."""
    flat = rows.reshape(-1)
    if flat[size:].any():
        raise ValueError("undo data is damaged: a rank is too large")
    return flat[:size].astype(np.int64)


def _by_base(counts: Array) -> Iterator[tuple[int, Array]]:
    """(base, indices of the elements of that base, ascending), by ascending base."""
    two = counts == 2
    if two.any():
        yield 2, _where(two)  # most of them
    others = _where(~two)
    left = counts[others]
    code = np.minimum(left, EXACT_BASES + 1).astype(np.uint8)
    large = np.flatnonzero(code > EXACT_BASES)
    if large.size:  # the bits of the greatest rank
        code[large] = EXACT_BASES + np.frexp((left[large] - 1).astype(np.float64))[1]
    order = others[np.argsort(code, kind="stable")]
    at = 0
    for value, size in enumerate(np.bincount(code).tolist()):
        if size:
            yield value if value <= EXACT_BASES else 1 << (value - EXACT_BASES), order[at : at + size]
            at += size


def _layout(base: int, digits: int) -> tuple[int, int, int]:
    """(digits a word, words, bytes a word)."""
    words = -(-digits // _per_word(base))
    per = -(-digits // words)
    return per, words, _width(base, per)


def _width(base: int, per: int) -> int:
    return (int(base**per - 1).bit_length() + 7) // 8


@lru_cache(maxsize=128)
def _per_word(base: int) -> int:
    """How many digits fill a word of up to 8 bytes best."""
    fits = range(1, int(64 / math.log2(base) + 1e-9) + 1)
    return max(fits, key=lambda per: (per / _width(base, per), -per))


def _varints(values: Array) -> bytes:
    """Non-negative numbers below 2**35, 7 bits a byte, the lowest first; all bytes of one but the last have bit 7."""
    length = np.ones(values.size, np.int64)
    for shift in (7, 14, 21, 28):
        length += values >> shift > 0
    ends = np.cumsum(length)
    out = np.zeros(int(ends[-1]) if values.size else 0, np.uint8)
    starts = ends - length
    for i in range(int(length.max()) if values.size else 0):
        more = np.flatnonzero(length > i)
        byte = (values[more] >> (7 * i)) & 0x7F
        byte[length[more] > i + 1] |= 0x80
        out[starts[more] + i] = byte
    return out.tobytes()


def _from_varints(coded: bytes, count: int) -> Array:
    """The inverse of `_varints`.

    Raises:
        ValueError: not `count` numbers below 2**35.
    """
    data = np.frombuffer(coded, np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if ends.size != count or (data.size and data[-1] >= 0x80):
        raise ValueError("undo data is damaged: escapes")
    if not count:
        return np.zeros(0, np.int64)
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    if (ends - starts).max() > 4:
        raise ValueError("undo data is damaged: escapes")
    place = np.arange(data.size) - np.repeat(starts, ends - starts + 1)
    return np.add.reduceat((data & 0x7F).astype(np.int64) << (7 * place), starts)


def _grid(dtype: torch.dtype) -> Grid:
    if dtype not in GRIDS:
        raise ValueError(f"no undo data for {dtype}")
    return GRIDS[dtype]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1)


def _bits(tensor: Tensor, grid: Grid) -> Array:
    return _flat(tensor).view(grid.bits).numpy()


def _update(d: Tensor | Delta, M: Tensor) -> Delta:
    update = Given(d) if isinstance(d, Tensor) else d
    if update.size != M.numel():
        raise ValueError(f"the update has {update.size} elements, not {M.numel()}")
    return update


def _scale(largest: float) -> int:
    """The exponent of a power of two above every finite |d|, in what the header allows."""
    return math.frexp(min(largest, sys.float_info.max))[1] if largest else -1074


def _where(flags: Array) -> Array:
    """`flatnonzero` of (n,) bool, faster for some percent in irregular places, which cost it a wrong branch each.

    Words of eight that hold any are looked for first, then those in them: both are frequent enough for numpy's way
    without branches.
    """
    whole = flags.size & ~7
    if np.count_nonzero(flags) > flags.size // 10:
        return np.flatnonzero(flags)
    words = flags[:whole].view(np.uint64)
    held = np.flatnonzero(words != 0)
    at = np.flatnonzero(words[held].view(np.bool_))
    index: Array = held[at >> 3]
    index <<= 3
    at &= 7
    index += at
    if whole == flags.size:
        return index
    return np.concatenate((index, np.flatnonzero(flags[whole:]) + whole))
