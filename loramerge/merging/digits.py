"""Whole numbers in few bytes: digits to given bases, and gaps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXACT_BASES = 32
"""Ranks among up to so many candidates are digits to exactly that base, among more to the next power of two."""


def pack(digits: Array, counts: Array) -> bytes:
    """Digits (k,) below their counts (k,): by base, several to a word of up to 8 bytes."""
    pieces = []
    for base, index in _by_base(counts):
        per, words, width = _layout(base, index.size)
        padded = np.zeros(per * words, np.uint64)
        padded[: index.size] = digits[index]
        powers = np.array([base**k for k in range(per)], np.uint64)
        packed = (padded.reshape(per, words) * powers[:, None]).sum(axis=0, dtype=np.uint64)
        pieces.append(packed.astype("<u8").view(np.uint8).reshape(words, 8)[:, :width].tobytes())
    return b"".join(pieces)


def unpack(coded: bytes, counts: Array) -> Array:
    """The inverse of `pack`: digits (k,).

    Raises:
        ValueError: not what `pack` writes for some digits below these counts.
    """
    digits = np.zeros(counts.size, np.int64)
    at = 0
    for base, index in _by_base(counts):
        per, words, width = _layout(base, index.size)
        held = np.frombuffer(coded[at : at + words * width], np.uint8)
        if held.size != words * width:
            raise ValueError("undo data is cut off")
        at += held.size
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
    code = np.minimum(counts, EXACT_BASES + 1).astype(np.uint8)
    large = np.flatnonzero(code > EXACT_BASES)
    if large.size:  # the bits of the greatest rank
        code[large] = EXACT_BASES + np.frexp((counts[large] - 1).astype(np.float64))[1]
    order = np.argsort(code, kind="stable")
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


def varints(values: Array) -> bytes:
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


def from_varints(coded: bytes, count: int) -> Array:
    """The inverse of `varints`.

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
