"""The k-th largest magnitude of arrays that exist only in blocks of rows, exactly, without sorting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loramerge.algebra.core import TILE

BLOCK_ELEMENTS = 1 << 22
"""Elements held at a time."""

INFINITE_BITS = 0x7F800000


class Array(Protocol):
    """A matrix (p, q) given by blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, the same bits however it is cut."""


class Whole:
    """A tensor (p, q) as an array."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.tensor.shape[0], self.tensor.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the tensor."""
        return self.tensor[start:stop]


def spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Row ranges of blocks of bounded size that cover an array."""
    rows, columns = shape
    step = max(TILE, BLOCK_ELEMENTS // max(columns, 1) // TILE * TILE)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def magnitudes(block: Tensor) -> Tensor:
    """`abs(x)` in float32, what thresholds compare."""
    return block.abs().to(torch.float32)


def kth_largest(arrays: Sequence[Array], ks: Sequence[int]) -> list[float]:
    """The k-th largest float32 magnitude over all elements of the arrays together, for every k from 1 to their number.

    Two passes of a histogram of the bit patterns, which order non-negative floats: the upper 16 bits find the bin, the
    lower 16 bits the value in it. The result does not depend on the order of elements, blocks, threads or device.
    """
    total = sum(rows * columns for rows, columns in (array.shape for array in arrays))
    if not all(1 <= k <= total for k in ks):
        raise ValueError(f"ranks {list(ks)} are not among {total} elements")
    upper = torch.zeros(1 << 15, dtype=torch.int64)
    for bits in _bit_blocks(arrays):
        upper += torch.bincount(bits >> 16, minlength=1 << 15).cpu()
    chosen = [_bin_from_top(upper, k) for k in ks]
    lower = {bin_: torch.zeros(1 << 16, dtype=torch.int64) for bin_, _ in chosen}
    for bits in _bit_blocks(arrays):
        high = bits >> 16
        for bin_, counts in lower.items():
            counts += torch.bincount(bits[high == bin_] & 0xFFFF, minlength=1 << 16).cpu()
    patterns = [bin_ << 16 | _bin_from_top(lower[bin_], left)[0] for bin_, left in chosen]
    return [float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32)) for pattern in patterns]


def _bit_blocks(arrays: Sequence[Array]) -> Iterator[Tensor]:
    for array in arrays:
        for start, stop in spans(array.shape):
            bits = magnitudes(array.rows(start, stop)).contiguous().flatten().view(torch.int32)
            if len(bits) and int(bits.max()) >= INFINITE_BITS:
                raise ValueError("an update holds values that are not finite in float32")
            yield bits


def _bin_from_top(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element from the top, and its place among that bin's."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    return len(counts) - 1 - place, k - (int(above[place - 1]) if place else 0)
