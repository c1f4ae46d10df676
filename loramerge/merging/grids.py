"""The 16 and 32 bit float formats as grids of numbers that have integers for keys, in the order of their values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


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
        """The sign bit."""
        return (2 * self.bias + 2) << self.mantissa

    @property
    def negative_zero(self) -> int:
        """The bits of -0.0 as a signed int."""
        return -self.sign


GRIDS = {
    grid.dtype: grid
    for grid in (
        Grid(1, torch.bfloat16, torch.int16, 7, 127, 0),
        Grid(2, torch.float16, torch.int16, 10, 15, 0),
        Grid(3, torch.float32, torch.int32, 23, 127, 22),
    )
}


def grid_of(dtype: torch.dtype) -> Grid:
    """The grid of a dtype.

    Raises:
        ValueError: it has none.
    """
    if dtype not in GRIDS:
        raise ValueError(f"no undo data for {dtype}")
    return GRIDS[dtype]


def flat(tensor: Tensor) -> Tensor:
    """The elements (n,) on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1)


def bits_in(tensor: Tensor, grid: Grid) -> Array:
    """The bits (n,) of a tensor's elements, signed; the tensor's own memory if it is flat and on the CPU."""
    return flat(tensor).view(grid.bits).numpy()


def values(bits: Array, grid: Grid) -> Array:
    """The numbers (k,) of bits, float64."""
    return torch.from_numpy(bits).view(grid.dtype).double().numpy()


def keys(bits: Array, grid: Grid) -> Array:
    """The keys (k,) int32 of numbers, of 0.0 and -0.0 the same."""
    key = bits.astype(np.int32)
    negative = key >> 31
    key &= grid.sign - 1
    key ^= negative
    key -= negative
    return np.asarray(key)


def bits_of(key: Array, grid: Grid) -> Array:
    """The bits (k,) of the numbers of keys."""
    bits: Array = key.astype(np.int16 if grid.bits == torch.int16 else np.int32)
    negative = bits >> (8 * bits.itemsize - 1)
    bits ^= negative
    bits -= negative
    negative &= bits.dtype.type(-grid.sign)
    bits += negative
    return np.asarray(bits)


def floor_keys(x: Array, grid: Grid) -> Array:
    """Keys of the greatest numbers up to x (..., k) float32 or float64, at most the largest finite one.

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
        small = np.nonzero(np.abs(x) < 2.0 ** (1 - grid.bias))
        key[small] = np.floor(np.ldexp(x[small], grid.bias - 1 + grid.mantissa)).astype(kind)
    if most >= grid.top << (mantissa - grid.mantissa):
        np.clip(key, -grid.top, grid.top - 1, out=key)
    return np.asarray(key)


def nearest_keys(x: Array, grid: Grid) -> Array:
    """Keys of the numbers nearest to x (k,) float64; of any where that is not finite."""
    key = floor_keys(x, grid)
    above = np.minimum(key + 1, grid.top - 1)
    closer = values(bits_of(above, grid), grid) - x < x - values(bits_of(key, grid), grid)
    return np.asarray(np.where(closer, above, key))


def boundaries(bits: Array, grid: Grid) -> tuple[Array, Array]:
    """(rounding boundary below, above) of numbers, float64."""
    size = bits.astype(np.int64) & (grid.sign - 1)
    m = values(bits, grid)
    exponent = np.maximum(size >> grid.mantissa, 1)
    outward = ((exponent + (1022 - grid.bias - grid.mantissa)) << 52).view(np.float64)  # half an ulp
    inward = outward.copy()
    inward[((size & ((1 << grid.mantissa) - 1)) == 0) & (exponent > 1)] *= 0.5
    negative = bits < 0
    return m - np.where(negative, outward, inward), m + np.where(negative, inward, outward)


@lru_cache
def halves(grid: Grid) -> tuple[Array, Array]:
    """Of all M of 16 bits, by their bits without a sign: how far the boundaries below and above are, float32.

    |M| is at most so many of either: 2 to the power of the mantissa's bits and 2.
    """
    bits = np.arange(1 << 16).astype(np.uint16).view(np.int16)
    with np.errstate(all="ignore"):
        below, above = boundaries(bits, grid)
        m = values(bits, grid)
        return (m - below).astype(np.float32), (above - m).astype(np.float32)
