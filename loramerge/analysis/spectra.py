"""One update decomposed: singular values and vectors from its core, and the numbers that a spectrum tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loramerge.algebra.core import relative_tolerance

ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Half a unit in the last place, relative, of the dtypes that factors are stored in."""


GRAM_CONDITION = 1e3
"""A factor whose columns, scaled to one length, have a condition number below this is decomposed through its Gram
matrix, five times faster: the relative error of singular values is about eps * condition², 1e-10 at most."""


class Side:
    """`X = Q R` of a thin factor X (length, r), float64: Q orthonormal, R (., r); Q is formed only where it must be."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.R, self._inverse = _by_gram(x)
        self._q: Tensor | None = None
        if self._inverse is None:
            self._q, self.R = torch.linalg.qr(x)

    def times(self, m: Tensor) -> Tensor:
        """Q m, for m (., k)."""
        if self._inverse is not None:
            made: Tensor = self.x @ (self._inverse @ m)
            return made
        assert self._q is not None
        return self._q @ m

    def between(self, other: Side) -> Tensor:
        """Q^T Q' with the Q' of another factor of the same length."""
        left, right = (s.x if s._q is None else s._q for s in (self, other))
        product = left.T @ right
        if self._inverse is not None:
            product = self._inverse.T @ product
        return product if other._inverse is None else product @ other._inverse

    @cached_property
    def basis(self) -> Tensor:
        """x with Q x the singular vectors of X on its long side, at its numerical rank, falling."""
        x, s, _ = torch.linalg.svd(self.R, full_matrices=False)
        largest = float(s[0]) if len(s) else 0.0
        kept: Tensor = x[:, s > relative_tolerance(s.dtype, (len(self.x), len(self.x))) * largest]
        return kept


def _by_gram(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """R by Cholesky of `X^T X`, columns scaled to length 1, and its inverse; None where X is too ill-conditioned."""
    r = x.shape[1]
    gram = x.T @ x
    lengths = gram.diagonal().sqrt()
    if not r or len(x) < r or not 1e-100 < float(lengths.min()) <= float(lengths.max()) < 1e100:
        return gram, None
    lower, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None])
    if int(failed):
        return gram, None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(r, dtype=x.dtype), upper=False)
    if not float(torch.linalg.matrix_norm(inverse)) * math.sqrt(r) < GRAM_CONDITION:
        return gram, None
    return lower.T * lengths, inverse.T / lengths[:, None]


@dataclass(frozen=True, eq=False)
class Triplets:
    """U (m, k), s (k,) falling and positive, V (n, k): a decomposition that is known from how the update is made."""

    U: Tensor
    s: Tensor
    V: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(B, A) with the same product."""
        return self.U * self.s, self.V.T

    def times(self, weight: float) -> Triplets:
        """Times a number; of rank 0 where that is 0."""
        if weight == 0:
            return Triplets(self.U[:, :0], self.s[:0], self.V[:, :0])
        return Triplets(self.U * math.copysign(1.0, weight), self.s * abs(weight), self.V)


def kronecker(first: Tensor, second: Tensor) -> Triplets:
    """The decomposition of `first (x) second`: products of singular values, Kronecker products of singular vectors."""
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(x.double(), full_matrices=False) for x in (first, second))
    s, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    m, n = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    k = int((s > relative_tolerance(s.dtype, (m, n)) * s[:1].sum()).sum())
    i, j = order[:k] // len(s2), order[:k] % len(s2)
    U = (u1[:, i][:, None, :] * u2[:, j][None, :, :]).reshape(m, k)
    V = (v1.T[:, i][:, None, :] * v2.T[:, j][None, :, :]).reshape(n, k)
    return Triplets(U, s[:k], V)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """`D = B A` with scale and weight in B; B (m, r), A (r, n), float64. D itself is never formed.

    `B = Q_b R_b`, `A^T = Q_a R_a`, `R_b R_a^T = x diag(s) y`, so that `D = (Q_b x) diag(s) (y Q_a^T)`. Where the
    decomposition is known already, B = U diag(s) and A = V^T of it.
    """

    B: Tensor
    A: Tensor
    known: Triplets | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.B.shape[0], self.A.shape[1]

    @cached_property
    def left(self) -> Side:
        """B."""
        return Side(self.B)

    @cached_property
    def right(self) -> Side:
        """A^T."""
        return Side(self.A.T)

    @cached_property
    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x, s, y) at the numerical rank: x (., k), s (k,) falling, y (k, .)."""
        x, s, y = torch.linalg.svd(self.left.R @ self.right.R.T, full_matrices=False)
        largest = float(s[0]) if len(s) else 0.0
        k = int((s > relative_tolerance(s.dtype, self.shape) * largest).sum())
        return x[:, :k], s[:k], y[:k]

    @cached_property
    def s(self) -> Tensor:
        """Singular values above rounding, (k,) falling."""
        return self.core[1] if self.known is None else self.known.s

    @property
    def rank(self) -> int:
        """k, the numerical rank."""
        return len(self.s)

    @cached_property
    def norm2(self) -> float:
        """‖D‖², Frobenius."""
        return float((self.s * self.s).sum())

    @property
    def norm(self) -> float:
        """‖D‖."""
        return math.sqrt(self.norm2)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """U (m, k) and V (n, k): left and right singular vectors as columns."""
        if self.known is not None:
            return self.known.U, self.known.V
        x, _, y = self.core
        return self.left.times(x), self.right.times(y.T)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of D, (len(index), n)."""
        made: Tensor = self.B[index] @ self.A
        return made


def reach(squares: Tensor, share: float) -> int:
    """The smallest k whose leading values hold `share` of the sum of all."""
    if not len(squares):
        return 0
    sums = squares.cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1


def free_rank(s: Tensor, dtype: str) -> int:
    """The smallest k with `‖D - D_k‖ <= u ‖D‖`, u the unit roundoff of the dtype that the factors are stored in.

    What a cut to that rank loses is no more than what their rounding has lost already.
    """
    if not len(s):
        return 0
    tails = (s * s).flip(0).cumsum(0).flip(0).sqrt()  # tails[k] = ‖D - D_k‖
    return int((tails > ROUNDOFF[dtype] * tails[0]).sum())


def spectrum(d: Decomposed, stored_rank: int, dtype: str) -> dict[str, Any]:
    """What the singular values of one update tell, as plain data.

    `rank`: numerical; `entropy_rank`: `exp(-sum p log p)`, p = s / sum s (Roy and Vetterli 2007); `stable_rank`:
    ‖D‖² / s_1²; `rank_90`, `rank_99`: the smallest k with that share of ‖D‖²; `free_rank`: see `free_rank`.
    """
    s = d.s
    p = s / s.sum() if d.rank else s
    return {
        "stored_rank": stored_rank,
        "rank": d.rank,
        "rank_90": reach(s * s, 0.90),
        "rank_99": reach(s * s, 0.99),
        "entropy_rank": math.exp(-float((p * p.log()).sum())) if d.rank else 0.0,
        "stable_rank": d.norm2 / float(s[0] * s[0]) if d.rank else 0.0,
        "free_rank": free_rank(s, dtype),
        "norm": d.norm,
        "spectral_norm": float(s[0]) if d.rank else 0.0,
        "singular_values": s.tolist(),
    }
