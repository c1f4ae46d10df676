"""What two adapters have in common in one module, and what their sum keeps of each, from factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramerge.analysis.spectra import Decomposed

SAMPLE_SHARE = 256
SAMPLE_ELEMENTS = 1 << 17
"""Element by element a module is looked at on one row in SAMPLE_SHARE, and on no fewer elements than these."""


def sampled_rows(m: int, n: int) -> Tensor:
    """Evenly spaced rows of a matrix (m, n); all of a small one."""
    count = min(m, max(m // SAMPLE_SHARE, math.ceil(SAMPLE_ELEMENTS / max(n, 1))))
    return torch.arange(count, dtype=torch.int64) * m // max(count, 1)


@dataclass(frozen=True, eq=False)
class Overlap:
    """`left = U_1^T U_2` and `right = V_1^T V_2` of two updates; `between` the same of the Q of their factors.

    Of updates whose decomposition was known there are no such Q, and `between` is empty.
    """

    first: Decomposed
    second: Decomposed
    left: Tensor
    right: Tensor
    between: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, first: Decomposed, second: Decomposed) -> Overlap:
        """Costs two products (r, m) (m, r) and (r, n) (n, r); everything else is r x r."""
        if first.known is not None or second.known is not None:
            (u1, v1), (u2, v2) = first.vectors, second.vectors
            return cls(first, second, u1.T @ u2, v1.T @ v2, (u1[:0], v1[:0]))
        left, right = first.left.between(second.left), first.right.between(second.right)
        (x1, _, y1), (x2, _, y2) = first.core, second.core
        return cls(first, second, x1.T @ left @ x2, y1 @ right @ y2.T, (left, right))

    def of_factors(self) -> tuple[Tensor, Tensor]:
        """The same of B's left singular vectors and of A's right ones, which is what the paper compares (its eq. 4).

        They change under (B M, M^-1 A), as `left` and `right` do not.
        """
        left, right = self.between
        left = self.first.left.basis.T @ left @ self.second.left.basis
        return left, self.first.right.basis.T @ right @ self.second.right.basis

    @property
    def inner(self) -> float:
        """`<D_1, D_2>` = sum over a, b of `s_1a s_2b left_ab right_ab`."""
        return float(self.first.s @ (self.left * self.right) @ self.second.s)

    def common(self) -> dict[str, float]:
        """Which share of each update's energy lies in the span of the other's outputs, inputs, and both.

        `first_left`: `‖U_2 U_2^T D_1‖² / ‖D_1‖²`, `first_right`: `‖D_1 V_2 V_2^T‖² / ‖D_1‖²`, `first_both`: both at
        once; `second_*` the other way round. Chance levels: rank of the other over m, over n, and their product.
        """
        s1, s2 = self.first.s, self.second.s
        both_1 = self.left.T @ (s1[:, None] * self.right)
        both_2 = self.left @ (s2[:, None] * self.right.T)
        return {
            "first_left": _share((s1[:, None] * self.left).square().sum(), self.first),
            "first_right": _share((s1[:, None] * self.right).square().sum(), self.first),
            "first_both": _share(both_1.square().sum(), self.first),
            "second_left": _share((self.left * s2).square().sum(), self.second),
            "second_right": _share((self.right * s2).square().sum(), self.second),
            "second_both": _share(both_2.square().sum(), self.second),
        }


def _share(energy: Tensor, of: Decomposed) -> float:
    return min(1.0, float(energy) / of.norm2) if of.norm2 else 0.0


def cosine(inner: float, first2: float, second2: float) -> float | None:
    """`<D_1, D_2> / (‖D_1‖ ‖D_2‖)` from the inner product and the squared norms; None where one is zero."""
    size = math.sqrt(first2) * math.sqrt(second2)
    return max(-1.0, min(1.0, inner / size)) if size else None


@dataclass
class Signs:
    """Element-wise sums over (sampled) rows of two updates."""

    both: int = 0
    opposed: int = 0
    cancelled: float = 0.0
    overlapping: float = 0.0
    magnitude: float = 0.0

    def data(self) -> dict[str, float | None]:
        """`sign_conflict`: share of the elements that both change in which they disagree about the direction;
        `cancelled`: `1 - sum abs(D_1 + D_2) / sum (abs(D_1) + abs(D_2))`, the share of their magnitude that is lost;
        `cancelled_chance`: what that is on average where signs have nothing to do with one another."""
        return {
            "sign_conflict": self.opposed / self.both if self.both else None,
            "cancelled": self.cancelled / self.magnitude if self.magnitude else None,
            "cancelled_chance": self.overlapping / self.magnitude if self.magnitude else None,
        }


def signs(first: Tensor, second: Tensor) -> Signs:
    """Of the same rows of two updates."""
    agreement = first.sign() * second.sign()
    sizes = first.abs(), second.abs()
    magnitude = float(sizes[0].sum() + sizes[1].sum())
    return Signs(
        both=int(torch.count_nonzero(agreement)),
        opposed=int((agreement < 0).sum()),
        cancelled=magnitude - float((first + second).abs().sum()),
        overlapping=float(torch.minimum(*sizes).sum()),
        magnitude=magnitude,
    )


def survival(rows: Sequence[Tensor | None], gram: Sequence[Sequence[float]]) -> list[dict[str, Any] | None]:
    """What the sum of all adapters keeps of each, S = sum D_j; None for adapters that do not change the module.

    `kept`: `<S, D_i> / ‖D_i‖²`, the coefficient of D_i in S: 1 where the others leave it alone, below where they work
    against it, above where they do the same. `kept_sign`: the share of ‖D_i‖² (over the rows given) on elements that
    S changes in the direction of D_i.
    """
    total: Tensor | None = None
    for r in rows:
        if r is not None:
            total = r if total is None else total + r
    made: list[dict[str, Any] | None] = []
    for i, r in enumerate(rows):
        if r is None or total is None:
            made.append(None)
            continue
        squares = r.square()
        whole = float(squares.sum())
        agreeing = float(squares[(r.sign() * total.sign()) > 0].sum())
        own = gram[i][i]
        made.append({"kept": sum(gram[i]) / own if own else None, "kept_sign": agreeing / whole if whole else None})
    return made
