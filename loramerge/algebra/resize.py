"""Other ranks for one adapter's module, without its product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loramerge.algebra.core import Factors, RankRule, relative_error


@dataclass(frozen=True, eq=False)
class Resized:
    """The best update of a lower rank, and what it costs."""

    factors: Factors
    singular_values: Tensor
    """Of the update before it was cut, (numerical rank,), falling."""
    error: float
    """‖cut - whole‖ / ‖whole‖ before factors are rounded to a storage dtype; 0 for a zero update."""

    @property
    def rank(self) -> int:
        """How many singular values were kept."""
        return self.factors.rank


def resize(update: Factors, rule: RankRule) -> Resized:
    """Keeps the singular values of `D = b a` that a rule keeps: the best approximation of that rank (Eckart-Young).

    `q_b r_b = qr(b)`, `q_a r_a = qr(a^T)`, `svd(r_b r_a^T)`: O((m + n) r^2 + r^3), no (m, n) array. b and a come back
    with the square roots of the singular values each; the scale of the result is 1 (alpha = rank). A rule cannot raise
    the numerical rank: see `pad`. Half precision is computed in float64, float32 in float32.
    """
    whole = update.svd()
    kept = whole.factors(rule)
    total = whole.tail(0)
    return Resized(Factors(kept.b, kept.a, update.key), whole.s, whole.tail(kept.rank) / total if total > 0 else 0.0)


def pad(update: Factors, rank: int) -> Factors:
    """The same update with zero columns of b and zero rows of a up to `rank`, for tools that want equal ranks."""
    more = rank - update.rank
    if more < 0:
        raise ValueError(f"an update of rank {update.rank} cannot be padded to {rank}")
    (m, n), b, a = update.shape, update.b, update.a
    return Factors(torch.cat([b, b.new_zeros(m, more)], 1), torch.cat([a, a.new_zeros(more, n)]), update.key)


def store(update: Factors, dtype: torch.dtype) -> tuple[Factors, float]:
    """The factors rounded to a dtype, and the relative error of their product for that.

    Raises:
        ValueError: a value leaves the range of the dtype.
    """
    stored = update.to(dtype)
    return stored, relative_error(stored, update)
