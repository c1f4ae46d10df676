"""The arithmetic of one block: read, add every update in the compute dtype, check, measure, round once.

Blocks go through a buffer of the compute dtype that stays in the cache: a merge then costs about what a copy costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from loramerge.adapters.operators import Operator

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

COMPUTE_DTYPES = {"float32": torch.float32, "float64": torch.float64}

CACHED_ELEMENTS = 1 << 18
"""Elements of the compute buffer: 1 MB in float32, so that it lives in a core's own cache."""

NEAR = 12
"""How many units in the last place of float32 a sum may be off, generously, before it is rounded to float16."""

_SUBNORMAL_BITS = 0x38800000
"""2**-14 as float32: where float16 becomes subnormal."""

SAMPLE = 64
"""Retention is measured on one row in this many of every block, and on no fewer elements than SAMPLE_ELEMENTS."""

SAMPLE_ELEMENTS = 1 << 16


@dataclass(slots=True)
class Measured:
    """What one block tells: `<M - W, D>` and `<D, D>` over its sampled rows, in float64."""

    kept: float = 0.0
    wanted: float = 0.0


class NonFinite(ArithmeticError):
    """A rounded result is not finite. `count` of them, the largest finite magnitude, and whether the input was."""

    def __init__(self, count: int, largest: float, inherited: bool) -> None:
        super().__init__("non-finite result")
        self.count = count
        self.largest = largest
        self.inherited = inherited


def change_block(
    source: Tensor,
    target: Tensor,
    first: int,
    cols: int,
    operators: Sequence[Operator],
    compute: Tensor,
    keep_original: bool,
    measure: bool,
) -> Measured:
    """Applies operators to the elements `first, first + 1, ...` of a stored tensor and rounds the result once.

    Args:
        source: (n,) the stored elements, whole rows. May share memory with `target` if the dtypes are equal.
        target: (n,) where the result goes, in the output dtype, same device.
        first: index of the first element in the tensor.
        cols: elements of a row.
        operators: in the order to apply them.
        compute: the buffer, in the compute dtype; its size bounds the rows that are worked on at once.
        keep_original: whether an operator needs the weight from before the updates.
        measure: whether to measure retention.

    Raises:
        NonFinite: some result does not fit the output dtype.
    """
    measured = Measured()
    n = source.numel()
    step = max(1, compute.numel() // cols) * cols
    if step > compute.numel():  # one row is longer than the buffer
        compute = compute.new_empty(step)
    limit = _overflow(target.dtype)
    for at in range(0, n, step):
        stored = source[at : at + step]
        sums = compute[: stored.numel()]
        sums.copy_(stored)
        sample = None
        if measure and at == 0:
            sample = sums[: max(n // cols // SAMPLE, -(-SAMPLE_ELEMENTS // cols)) * cols].clone()
        original = sums.clone() if keep_original else sums
        for operator in operators:
            operator.apply(sums, first + at, original)
        low, high = torch.aminmax(sums)
        if not (-limit < low.item() and high.item() < limit):
            raise _non_finite(sums, stored, limit)
        rounded = target[at : at + step]
        close = _near_ties(sums, stored, operators, first + at) if target.dtype == torch.float16 else None
        round_into(rounded, sums)
        if close is not None:
            index, exact = close
            fixed = torch.empty_like(exact, dtype=rounded.dtype)
            round_into(fixed, exact)
            rounded[index] = fixed
        if sample is not None:
            wanted = sums[: sample.numel()].sub_(sample)
            kept = rounded[: sample.numel()] - sample
            measured = Measured(_dot(kept, wanted), _dot(wanted, wanted))
    return measured


def _near_ties(sums: Tensor, stored: Tensor, operators: Sequence[Operator], first: int) -> tuple[Tensor, Tensor] | None:
    """Elements of a float32 sum whose rounding to float16 its own error could turn, and their sums in float64.

    Float16 keeps 11 of float32's 24 bits: one sum in 8192 falls exactly between two float16 numbers, far more than
    for bfloat16, and half of those would go the wrong way. Below 2**-14 float16's steps stay the same size, so what
    a sum that cancelled to there is off counts for more: all of those are among them.
    """
    if sums.dtype != torch.float32:
        return None
    bits = sums.view(torch.int32)
    dropped = bits.sub(0x1000 - NEAR).bitwise_and_(0x1FFF)
    index = _where_either(dropped, 2 * NEAR, bits.bitwise_and(0x7FFFFFFF), _SUBNORMAL_BITS)
    exact = stored[index].double()
    for operator in operators:
        addends = operator.addends(index + first)
        if addends is None:
            return None
        exact += addends
    return index, exact


def _where_either(a: Tensor, most_a: int, b: Tensor, most_b: int) -> Tensor:
    """Indices of the few elements with `a <= most_a` or `b <= most_b`; numpy finds them 10 times faster than torch."""
    if a.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero((a.numpy() <= most_a) | (b.numpy() <= most_b)))
    return ((a <= most_a) | (b <= most_b)).nonzero().view(-1)


def round_into(target: Tensor, values: Tensor) -> None:
    """Rounds to nearest, ties to even, into the dtype of `target`.

    torch rounds float64 to 16 bits through float32, which rounds twice. Rounding to odd in between keeps what the
    second rounding must know (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums").
    """
    if values.dtype == torch.float64 and target.dtype in (torch.bfloat16, torch.float16):
        near = values.float()
        inexact = near.double() != values
        bits = near.view(torch.int32)
        away = near.double().abs() > values.abs()
        bits.sub_((away & inexact).int())  # towards zero
        bits.bitwise_or_(inexact.int())
        target.copy_(bits.view(torch.float32))
    else:
        target.copy_(values)


def _overflow(dtype: torch.dtype) -> float:
    """The least magnitude that rounds to infinity: the largest number plus half a unit in its last place."""
    if dtype not in (torch.bfloat16, torch.float16):
        return float("inf")
    info = torch.finfo(dtype)
    exponent = 127 if dtype == torch.bfloat16 else 15
    return float(info.max) + float(info.eps) * 2.0**exponent / 2


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()))


def _non_finite(sums: Tensor, stored: Tensor, limit: float) -> NonFinite:
    bad = ~(sums.abs() < limit)
    fine = sums[torch.isfinite(sums)]
    largest = float(fine.abs().max()) if fine.numel() else float("inf")
    inherited = bool((~torch.isfinite(stored.float())).any())
    return NonFinite(int(bad.sum()), largest, inherited)
