"""The undo codec: which of the few weights that an update turns into M the original was, so that W comes back exactly.

An update d moves a weight w to `M = round(w + d)`. Given M and d, w is a number of the base's grid between the two
rounding boundaries of M, moved back by d:

    (M_prev + M) / 2 - d  <=  w  <=  (M + M_next) / 2 - d

Mostly one number lies there, and nothing is stored. Where several do, the rank of W among them is. Where W is none of
them (M went through float32, W is -0.0 or not finite), W itself is: an escape.

Both sides must see the same numbers there, on whatever machine. There are two ways:

- fixed: d comes out the same bit for bit, whoever computes it (`fixed.py`), and so does `x = M - d` in float32. Let e
  be the exponent of M. Where the number nearest to x is above 2**e in size, the numbers beside it are at least an ulp
  of M away, and it is taken for W; an escape says where it is not. For the others the ends of the interval are summed
  in float32. For low-rank updates of weights of 16 bits.
- guarded: d is known but for its last bits, see `guarded.py`.

Updates that depend on W have no such interval: see `differences.py`.

The code of n elements, version 2, little-endian:

    header      version, dtype, slack, way, scale; n, counts of the rest
    gaps        between escapes, as varints; then the escapes' weights
    pairs       of elements with two candidates the rank, a bit each
    zeros       of elements with more, one of which is 0: whether W is that, a bit each
    ranks       of all others, in mixed bases (`digits.py`)
    last 4      CRC-32
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.merging.deltas import Delta, Given
from loramerge.merging.differences import CHECK, checked
from loramerge.merging.digits import from_varints, pack, unpack, varints
from loramerge.merging.filters import (
    Found,
    Left,
    Room,
    add_unlike,
    below_or_infinite,
    joined,
    nothing,
    scale_of,
    where,
)
from loramerge.merging.grids import Grid, bits_in, bits_of, flat, floor_keys, grid_of, halves, keys, nearest_keys
from loramerge.merging.guarded import NoFloat32, look

Array = NDArray[Any]

OTHER_COUNTS = "undo data is not that of this merged tensor and update: other counts of candidates"

MOST_SLACK = 60

VERSION = 2
HEADER = struct.Struct("<BBBBhxxIIIIIII")
GUARDED, FIXED = 0, 1


def encode(W: Tensor, M: Tensor, d: Tensor | Delta, slack: int | None = None) -> bytes:
    """What it takes, besides M and d, to get W back bit for bit. Deterministic.

    Args:
        W: (n,) the original weights, bfloat16, float16 or float32.
        M: (n,) the merged ones, same dtype: `round(W + d)`, or anything, at a price.
        d: the update, (n,) float64 or chunk by chunk.
        slack: widens the interval by 2**-slack of |d|, where M was made with a d that is off by as much; 0 for none. By
            default what suits a float32 sum; 0 saves 7 bytes of 8 for a float32 M that was summed in float64.
    """
    grid = grid_of(W.dtype)
    if M.dtype != W.dtype or M.numel() != W.numel():
        raise ValueError(f"W has {W.numel()} elements of {W.dtype}, M has {M.numel()} of {M.dtype}")
    slack = grid.slack if slack is None else slack
    if not 0 <= slack <= MOST_SLACK or W.numel() >= 1 << 32:
        raise ValueError(f"a slack of {slack} or a block of {W.numel()} elements cannot be coded")
    update = _update(d, M)
    way = _way(update, grid, slack)
    scale = scale_of(update.largest) if way == GUARDED else 0
    w = bits_in(W, grid)
    try:
        escapes, pairs, first, count, rank = _coded(flat(M), update, grid, slack, scale, way, w)
    except NoFloat32:
        escapes, pairs, first, count, rank = _coded(flat(M), update.double(), grid, slack, scale, way, w)

    around = _around_zero(first, count)
    zero = rank.take(around) == -first.take(around)
    ranked = np.ones(rank.size, np.bool_)
    ranked[around[zero]] = False
    places = varints(np.diff(escapes, prepend=-1) - 1)
    ranks = pack(rank[ranked], count[ranked])
    sizes = (w.size, escapes.size, len(places), pairs.size, rank.size, around.size, len(ranks))
    coded = b"".join(
        (
            HEADER.pack(VERSION, grid.code, slack, way, scale, *sizes),
            places,
            w[escapes].tobytes(),
            np.packbits(pairs, bitorder="little").tobytes(),
            np.packbits(zero, bitorder="little").tobytes(),
            ranks,
        )
    )
    return coded + CHECK.pack(zlib.crc32(coded))


def _coded(
    m: Tensor, update: Delta, grid: Grid, slack: int, scale: int, way: int, w: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """(escapes; ranks of pairs, bool; of elements with more candidates: first one, how many, rank)."""
    others: list[Array] = []
    pairs: list[Array] = []
    several: list[tuple[Array, ...]] = []
    for found in _find(m, update, grid, slack, scale, way, w, None, others):
        rank = keys(found.weights, grid) - found.first
        inside = rank >= 0
        inside &= rank < found.counts
        inside &= found.weights != grid.negative_zero
        inside &= ~found.doubtful
        others.append(found.places[~inside])
        two = np.equal(found.counts, 2)
        two &= inside
        pairs.append(rank.take(where(two)).astype(np.bool_))
        inside &= found.counts > 2
        more = where(inside)
        several.append((found.first.take(more), found.counts.take(more), rank.take(more)))
    first, count, rank = (np.concatenate(column) for column in zip(*several, strict=True))
    return np.sort(np.concatenate(others)), np.concatenate(pairs), first, count, rank


def decode(M: Tensor, d: Tensor | Delta, coded: bytes, out: Tensor | None = None) -> Tensor:
    """W (n,) bit for bit, from M (n,), d (n,) as at encoding but for its last bits, and what `encode` gave.

    Args:
        out: (n,) where W goes, if not into new memory; apart from M.

    Raises:
        ValueError: the bytes are damaged, or are not those of this M and d as far as their counts tell. A d that is
            slightly wrong may pass: compare a hash of W.
    """
    grid = grid_of(M.dtype)
    coded = checked(coded, HEADER.size)
    version, code, slack, way, scale, n, *counts = HEADER.unpack_from(coded)
    escaped, at_places, at_pairs, several, at_zero, at_ranks = counts
    if version != VERSION or code != grid.code or not (-1100 <= scale <= 1024 and slack <= MOST_SLACK):
        raise ValueError(f"undo data is not that of a {M.dtype} tensor, or of another version")
    update = _update(d, M)
    if way not in (GUARDED, FIXED) or (way == FIXED and _way(update, grid, slack) != FIXED):
        raise ValueError("undo data is not that of this update: it is of another sort")
    if n != M.numel():
        raise ValueError(f"undo data is for {n} elements, not {M.numel()}")
    sizes = (at_places, escaped * M.element_size(), -(-at_pairs // 8), -(-at_zero // 8), at_ranks)
    if len(coded) != HEADER.size + sum(sizes):
        raise ValueError("undo data has the wrong length")
    parts = []
    at = HEADER.size
    for length in sizes:
        parts.append(coded[at : at + length])
        at += length

    escapes = np.cumsum(from_varints(parts[0], escaped) + 1) - 1
    if escaped and escapes[-1] >= n:
        raise ValueError("undo data names an element that does not exist")
    W = torch.empty(n, dtype=grid.dtype) if out is None else out
    numbers = bits_in(W, grid)
    pairs = _flags(parts[2], at_pairs)
    try:
        index, first, count = _decoded(flat(M), update, grid, slack, scale, way, W, escapes, pairs)
    except NoFloat32:
        index, first, count = _decoded(flat(M), update.double(), grid, slack, scale, way, W, escapes, pairs)
    around = _around_zero(first, count)
    if (index.size, around.size) != (several, at_zero):
        raise ValueError(OTHER_COUNTS)
    ranked = np.ones(several, np.bool_)
    ranked[around[_flags(parts[3], at_zero)]] = False
    rank = np.negative(first)  # of the number 0
    rank[ranked] = unpack(parts[4], count[ranked])
    numbers[index] = bits_of(first + rank, grid)
    numbers[escapes] = np.frombuffer(parts[1], numbers.dtype)
    return W


def _decoded(
    m: Tensor, update: Delta, grid: Grid, slack: int, scale: int, way: int, W: Tensor, escapes: Array, pairs: Array
) -> tuple[Array, Array, Array]:
    """Writes the weights that have one or two candidates; gives (index, first candidate, how many) of the others."""
    numbers = bits_in(W, grid)
    several: list[tuple[Array, ...]] = []
    done = 0
    for found in _find(m, update, grid, slack, scale, way, None, W):
        index, key, count = found.places, found.first, found.counts
        if index.size:
            here = escapes[slice(*np.searchsorted(escapes, (index[0], index[-1] + 1)))]
            if here.size:
                at = np.searchsorted(index, here)
                count[at[index[at] == here]] = 0
        two, more = where(np.equal(count, 2)), where(count > 2)
        several.append((index.take(more), key.take(more), count.take(more)))
        if done + two.size > pairs.size:
            raise ValueError(OTHER_COUNTS)
        key[two] += pairs[done : done + two.size]
        done += two.size
        numbers[index] = bits_of(key, grid)
    if done != pairs.size:
        raise ValueError(OTHER_COUNTS)
    index, first, count = (np.concatenate(column) for column in zip(*several, strict=True))
    return index, first, count


def _flags(packed: bytes, count: int) -> Array:
    flags = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(np.bool_)
    if flags[count:].any():
        raise ValueError("undo data is damaged: bits beyond its end")
    return flags[:count]


def ambiguity(M: Tensor, d: Tensor, slack: int | None = None) -> tuple[int, float]:
    """How well M and d alone tell W, without what `encode` gave: where W is taken to be the number nearest to M - d.

    Args:
        M, d, slack: as for `encode`.

    Returns:
        how many elements have several candidates, and how many of them are to be expected wrong: one of n equally
        likely candidates is taken, so `1 - 1/n` of an element.
    """
    grid = grid_of(M.dtype)
    slack = grid.slack if slack is None else slack
    update = _update(d, M)
    size, wrong = 0, 0.0
    for found in _find(flat(M), update, grid, slack, scale_of(update.largest), GUARDED):
        count = found.counts[found.counts > 1]
        size += count.size
        wrong += float((1 - 1 / count).sum())
    return size, wrong


def _find(
    m: Tensor,
    update: Delta,
    grid: Grid,
    slack: int,
    scale: int,
    way: int,
    weights: Array | None = None,
    nearest: Tensor | None = None,
    others: list[Array] | None = None,
) -> Iterator[Found]:
    """As `guarded.look`, in either way."""
    if way == FIXED:
        with np.errstate(all="ignore"):
            for part in joined(_moved(m, update, grid, weights, nearest, others)):
                yield _by_fixed(part, grid)
    else:
        yield from look(m, update, grid, slack, scale, weights, nearest, others)


def _way(update: Delta, grid: Grid, slack: int) -> int:
    return FIXED if update.moved is not None and grid.mantissa < 23 and not slack else GUARDED


def _moved(
    m: Tensor, update: Delta, grid: Grid, weights: Array | None, nearest: Tensor | None, others: list[Array] | None
) -> Iterator[Left]:
    """The elements that may have several candidates, with M - d in float32 that is the same everywhere."""
    bits = bits_in(m, grid)
    room = Room(grid, nearest)
    yield nothing(m, grid)
    assert update.moved is not None
    for at, x in update.moved(m):
        here = room.of(at, x.size)
        here.copy_(torch.from_numpy(x))
        near, b = bits_in(here, grid), bits[at : at + x.size]
        few = below_or_infinite(near, b, grid)
        w = b[:0] if weights is None else weights[at : at + x.size]
        if others is not None and weights is not None:
            add_unlike(others, w, near, few, at)
        i = where(few)
        yield Left(i + at, b.take(i), w if weights is None else w.take(i), x.take(i))


def _by_fixed(part: Left, grid: Grid) -> Found:
    """What is found with M - d in float32 that is the same everywhere: nothing is in doubt."""
    b, x = part.merged, part.numbers
    below, above = (table.take(b.view(np.uint16).astype(np.intp), mode="wrap") for table in halves(grid))
    ends = np.empty((2, b.size), np.float32)
    np.subtract(below, x, out=ends[0])
    np.add(above, x, out=ends[1])
    first, count = floor_keys(ends, grid)
    count += first
    count += 1
    doubtful = ~np.isfinite(x)
    if doubtful.any():  # always escapes: a NaN's bits are not the same everywhere
        count[doubtful] = 0
    np.negative(first, out=first)
    without = np.flatnonzero(count < 1)
    if without.size:
        first[without] = nearest_keys(x[without].astype(np.float64), grid)
    return Found(part.places, first, count, doubtful, part.weights)


def _around_zero(first: Array, count: Array) -> Array:
    """Indices of the intervals that hold 0: thousands of numbers, of which 0 is by far the likeliest.

    A weight that was pruned or padded costs one bit this way, not fifteen.
    """
    return np.flatnonzero((first <= 0) & (first + count > 0))


def _update(d: Tensor | Delta, M: Tensor) -> Delta:
    update = Given(d) if isinstance(d, Tensor) else d
    if update.size != M.numel():
        raise ValueError(f"the update has {update.size} elements, not {M.numel()}")
    return update
