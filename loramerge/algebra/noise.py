"""The part of a fine-tune that is the rounding of its own storage: singular values under it mean nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist

import torch
from torch import Tensor

_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LEAST = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}
"""Exponents of the smallest normal numbers; below them the steps stay as wide."""
_OFFSET, _BINS = 160, 320
"""Exponents are counted in bins from -160 up."""


def floor(
    weights: Tensor | Iterable[Tensor],
    dtype: torch.dtype | None = None,
    *,
    base: Tensor | Iterable[Tensor] | None = None,
) -> float:
    """About the largest singular value of the rounding error of weights (m, n) that were stored in `dtype`.

    u (√m + √n) with u² the mean of ulp(w)²/12: the norm of a matrix of independent errors, each spread evenly over one
    step of its weight. Where the fine-tune moved weights by less than about a step, the error is rather the lost change
    itself, and that estimate too high. With a base *in the same dtype*, weights of one exponent are taken together: if
    their changes are x ~ N(0, s²) steps, a share P(abs(x) > 1/2) of them moves, which gives s, and
    E (x - round x)² = 1/12 + Σ_k (-1)^k / (π k)² exp(-2 (π k s)²).

    Args:
        weights: the tuned weights, whole or in row blocks (any dtype that holds their values).
        dtype: what they were stored in; by default that of the tensor.
        base: the same of the base, in the same blocks; leave it out where it was stored in another dtype.
    """
    if isinstance(weights, Tensor):
        dtype = dtype or weights.dtype
        weights = [weights]
    if dtype not in _MANTISSA:
        raise ValueError(f"no rounding is known for {dtype}")
    before = [base] if isinstance(base, Tensor) else base
    pairs = ((w, None) for w in weights) if before is None else zip(weights, before, strict=True)
    rows = columns = 0
    counts, moved = torch.zeros(_BINS, dtype=torch.int64), torch.zeros(_BINS, dtype=torch.int64)
    for tuned, old in pairs:
        rows, columns = rows + tuned.shape[0], tuned.shape[1]
        exponent = torch.frexp(tuned.float())[1] - 1
        bins = torch.where(tuned == 0, _LEAST[dtype], exponent).clamp(min=_LEAST[dtype]).flatten() + _OFFSET
        counts += torch.bincount(bins.cpu(), minlength=_BINS)
        if old is not None:
            changed = (tuned.float() != old.to(tuned.device).float()).flatten()
            moved += torch.bincount(bins[changed].cpu(), minlength=_BINS)
    if not rows * columns:
        return 0.0
    u2 = 0.0
    for place in counts.nonzero().flatten().tolist():
        count = int(counts[place])
        share = 1.0 if before is None else int(moved[place]) / count
        u2 += count / (rows * columns) * _lost(share) * math.ldexp(1.0, 2 * (place - _OFFSET - _MANTISSA[dtype]))
    return math.sqrt(u2) * (math.sqrt(rows) + math.sqrt(columns))


def _lost(moved: float) -> float:
    """E (x - round x)² in steps² for the Gaussian x of which the share `moved` rounds to other than 0."""
    if moved <= 0:
        return 0.0
    if moved >= 1:
        return 1 / 12
    s = 0.5 / NormalDist().inv_cdf(1 - moved / 2)
    if s < 0.05:
        return s * s
    terms = ((-1.0) ** k / (math.pi * k) ** 2 * math.exp(-2 * (math.pi * k * s) ** 2) for k in range(1, 60))
    return max(0.0, 1 / 12 + sum(terms))
