"""Leading singular triplets of a large matrix by block Krylov, with a bound on what they miss.

Everything here is about one matrix D (m, n), seen only through products with thin matrices. Notation: G = D Dᵀ,
Q (m, K) the orthonormal basis of the Krylov space, N = I - QQᵀ, E = N D what the space does not hold, θ the Ritz values
(squared singular values of Qᵀ D), λ the eigenvalues of G. ``|.|`` is the Frobenius norm, ``|.|₂`` the spectral one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements of a row block in one product. Sums over rows go block by block, so this is part of the result's bytes."""

HOLD = 1 << 28
"""Elements up to which a delta in blocks is kept whole (fp32) instead of being asked for at every product."""

PROBES = 8
FAILURE = 1e-7
"""Chance, per trial of a certificate, that the probes miss: P(|N(0,1)| < t) < 0.8 t for each of them, all at once."""

_EPS = 2.0**-23
_ROUNDING = 16 * _EPS
"""Relative size below which the column of a product, or what is left of it outside the space, is taken as rounding."""


class Delta(Protocol):
    """A matrix that is read in row blocks, as often as asked."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def blocks(self) -> Iterable[tuple[int, Tensor]]:
        """(first row, rows as fp32), in order, covering every row once."""
        ...


class Operator:
    """D as products with thin matrices, scaled by a power of two so that its norm is near 1, the short side first.

    The row blocks are cut again to a height that depends on the shape alone: the same bytes whatever blocks came in.
    """

    def __init__(self, delta: Delta | Tensor, device: str = "cpu", hold: int = HOLD) -> None:
        shape = tuple(delta.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"a matrix is needed, not the shape {shape}")
        self.rows, self.columns = shape
        self.device = device
        self.flipped = self.rows > self.columns
        self.shape = (self.columns, self.rows) if self.flipped else (self.rows, self.columns)
        self._height = max(1, CHUNK // self.columns)
        self._delta: Delta | None = None
        self._dense: Tensor | None = None
        self._source = None if isinstance(delta, torch.Tensor) else delta
        if isinstance(delta, torch.Tensor):
            self._dense = delta.detach().to(device)
        elif self.rows * self.columns <= hold:
            self._delta = delta
            self._dense = torch.empty(self.rows, self.columns, device=device)
            for first, rows in self._cut():
                self._dense[first : first + len(rows)] = rows
            self._delta = None
        else:
            self._delta = delta
        self.norm2 = sum(_square_sum(rows) for _, rows in self._blocks())
        """|D|², unscaled, summed in fp64."""
        if not math.isfinite(self.norm2):
            raise ValueError("the difference holds NaN or infinite values")
        self.scale = 1.0 if self.norm2 == 0 else 2.0 ** -round(math.log2(self.norm2) / 2)

    def release(self) -> None:
        """Gives back the copy of a delta that can be read again; from now on every product reads it."""
        if self._source is not None:
            self._delta, self._dense = self._source, None

    @property
    def scaled_norm2(self) -> float:
        """|scale D|², between 1/2 and 2."""
        return self.norm2 * self.scale**2

    def _cut(self) -> Iterator[tuple[int, Tensor]]:
        """The blocks of the delta, joined and cut to the one height, on the device."""
        assert self._delta is not None
        parts: list[Tensor] = []
        first = held = 0
        for start, block in self._delta.blocks():
            if start != first + held or block.ndim != 2 or block.shape[1] != self.columns:
                raise ValueError(f"block {tuple(block.shape)} at row {start} is not the next one")
            block = block.to(self.device, torch.float32)
            while len(block):
                take = block[: self._height - held]
                parts.append(take)
                held += len(take)
                block = block[len(take) :]
                if held == self._height:
                    yield first, parts[0] if len(parts) == 1 else torch.cat(parts)
                    first, held, parts = first + held, 0, []
        if held:
            yield first, parts[0] if len(parts) == 1 else torch.cat(parts)
        if first + held != self.rows:
            raise ValueError(f"{first + held} rows came, not {self.rows}")

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        if self._dense is None:
            yield from self._cut()
            return
        for first in range(0, self.rows, self._height):
            yield first, self._dense[first : first + self._height].to(torch.float32)

    def _times(self, x: Tensor) -> Tensor:
        """D x, (columns, k) -> (rows, k)."""
        out = x.new_empty(self.rows, x.shape[1])
        for first, rows in self._blocks():
            out[first : first + len(rows)] = rows @ x
        return out.mul_(self.scale)

    def _transposed(self, y: Tensor) -> Tensor:
        """Dᵀ y, (rows, k) -> (columns, k)."""
        out = y.new_zeros(y.shape[1], self.columns)  # (yᵀ D)ᵀ is the faster order
        for first, rows in self._blocks():
            out.addmm_(y[first : first + len(rows)].T, rows)
        return out.mul_(self.scale).T

    def times(self, x: Tensor) -> Tensor:
        """Long side in, short side out."""
        return self._transposed(x) if self.flipped else self._times(x)

    def transposed(self, y: Tensor) -> Tensor:
        """Short side in, long side out."""
        return self._times(y) if self.flipped else self._transposed(y)

    def gram(self) -> Tensor:
        """D Dᵀ of the short side, scaled, in fp64."""
        out = torch.zeros(self.shape[0], self.shape[0], dtype=torch.float64, device=self.device)
        if self.flipped:
            for _, rows in self._blocks():
                wide = rows.double()
                out.addmm_(wide.T, wide)
            return out.mul_(self.scale**2)
        for first, rows in self._blocks():
            wide = rows.double()
            for other, below in self._blocks():
                if other >= first:
                    product = wide @ below.double().T
                    out[first : first + len(rows), other : other + len(below)] = product
                    out[other : other + len(below), first : first + len(rows)] = product.T
        return out.mul_(self.scale**2)

    def residual2(self, b: Tensor, a: Tensor) -> float:
        """|D - b a|², unscaled, by row blocks; b (rows, k), a (k, columns) as fp32."""
        return sum(
            _square_sum(torch.addmm(rows, b[first : first + len(rows)], a, alpha=-1)) for first, rows in self._blocks()
        )


def _square_sum(rows: Tensor) -> float:
    """Sum of squares: fp32 within a row, fp64 over the rows; all in fp64 where fp32 might overflow or vanish."""
    total = float((torch.linalg.vector_norm(rows, dim=1).double() ** 2).sum())
    if 1e-24 * rows.numel() < total < math.inf:
        return total
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2)


def gaussian(seed: int, module: str, stream: int, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) standard normal fp32 numbers that depend on the arguments and on nothing else."""
    digest = hashlib.blake2b(f"{seed}\0{module}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))
    return generator.standard_normal((rows, columns), dtype=np.float32)


class Krylov:
    """The space of D Ω, G D Ω, G² D Ω, ... with Gaussian Ω (n, b), grown block by block (Musco and Musco 2015)."""

    def __init__(self, operator: Operator, width: int, seed: int, module: str) -> None:
        self.operator, self.seed, self.module = operator, seed, module
        m, n = operator.shape
        self.q = torch.empty(m, 0, device=operator.device)
        """Q (m, K)."""
        self.z = torch.empty(n, 0, device=operator.device)
        """Dᵀ Q (n, K)."""
        self.t = torch.empty(0, 0, dtype=torch.float64, device=operator.device)
        """Qᵀ G Q (K, K) in fp64."""
        self.depth = -1
        self._streams = 0
        self._noise = 0.0
        self._next = self._outside(self._random(n, width))
        """D Ω, or N G Q of the last block with the columns of Dᵀ Q at length 1: what the next block is made of."""
        self.deepen()

    def _random(self, rows: int, columns: int) -> Tensor:
        self._streams += 1
        made = gaussian(self.seed, self.module, self._streams, rows, columns)
        return torch.from_numpy(made).to(self.operator.device)

    @property
    def size(self) -> int:
        """K."""
        return self.q.shape[1]

    @property
    def width(self) -> int:
        """Columns of the next block."""
        return self._next.shape[1]

    def project(self, y: Tensor) -> Tensor:
        """N y."""
        return y.addmm(self.q, self.q.T @ y, alpha=-1) if self.size else y

    def _outside(self, z: Tensor) -> Tensor:
        """N D z; notes below which size it is the rounding of fp32."""
        y = self.operator.times(z)
        self._noise = max(self._noise, _ROUNDING * float(torch.linalg.vector_norm(y, dim=0).max()))
        return self.project(y)

    def widen(self, extra: int) -> None:
        """Let the next block have `extra` fresh random columns beside what it follows from."""
        self._next = torch.cat([self._next, self._outside(self._random(self.operator.shape[1], extra))], 1)

    def deepen(self) -> bool:
        """Add one block: two products with D, as wide as the block. False where nothing is left but rounding."""
        # Directions of rounding alone are left out: they would lie half inside the space, and cost its orthogonality.
        sizes, turn = torch.linalg.eigh(thin_gram(self._next, self._next))
        kept = sizes > self._noise**2
        if not bool(kept.any()):
            return False
        y = self._next @ (turn[:, kept] / sizes[kept].sqrt()).float()
        y = torch.linalg.qr(self.project(y))[0]
        z = self.operator.transposed(y)
        self.q, self.z = torch.cat([self.q, y], 1), torch.cat([self.z, z], 1)
        border = thin_gram(self.z, z)
        t = border.new_empty(self.size, self.size)
        old = self.size - y.shape[1]
        t[:old, :old] = self.t
        t[:, old:] = border
        t[old:, :] = border.T
        self.t = t
        self._noise = 0.0
        # Columns of one length: a rounding error is then as small beside a small singular value as beside a large one.
        self._lengths = torch.linalg.vector_norm(z, dim=0).clamp(min=1e-30)
        self._next = self._outside(z / self._lengths)
        self._last = y.shape[1]
        self.depth += 1
        return True

    def ritz(self) -> Ritz:
        """The Ritz values and vectors of G in the space, and how they hang together with the rest."""
        theta, w = torch.linalg.eigh(self.t)
        theta, w = theta.flip(0).clamp(min=0), w.flip(1)
        last = self._lengths.double()[:, None] * w[-self._last :]
        coupling = last.T @ thin_gram(self._next, self._next) @ last
        coupling = coupling + torch.diag(_ROUNDING**2 * theta[0] * theta)
        t_last = self.t[-self._last :, -self._last :]
        outside = float(torch.linalg.eigvalsh(t_last)[-1])
        return Ritz(self, theta, w, coupling, outside)


class Ritz:
    """What one state of the space knows about the leading eigenvalues of G.

    In the basis of the Ritz vectors and their complement, G = [[diag θ, Cᵀ], [C, G₂]] with C = N G Q W and
    G₂ = N G N ≤ μ. An eigenvalue λ_j > μ of G is the j-th eigenvalue of diag θ + Cᵀ (λ_j - G₂)⁻¹ C (its Schur
    complement), and λ_j ≥ θ_j; so wherever θ_j - μ ≥ δ > 0, λ_j is at most the j-th eigenvalue of diag θ + Cᵀ C / δ.
    What the leading k may have beyond their θ thus falls with the *square* of the residual C, where Ky Fan's k μ does
    not depend on it. It is never more than |E|² either, because the smaller Ritz values are below the smaller λ too.
    """

    def __init__(self, space: Krylov, theta: Tensor, w: Tensor, coupling: Tensor, outside: float) -> None:
        self.space, self.theta, self.w = space, theta, w
        self._coupling = coupling
        self.outside = outside
        """Guess of |E|₂²: the largest Ritz value of the last block alone."""
        whole = space.operator.scaled_norm2
        self.missed2 = max(0.0, whole - float(theta.sum())) + 4 * _EPS * whole
        """At least |E|² (with room for the rounding of fp32 products)."""

    def proof(self, k: int, enough: float, least_mu: float) -> tuple[float, Tensor] | None:
        """The largest |E|₂² with which the leading k have an excess of at most `enough`, and the excess of 0..k.

        None where that would take less than `least_mu`, a value that |E|₂² is known to have or guessed to have.
        """
        counts = torch.arange(k + 1, dtype=torch.float64, device=self.theta.device)
        if k == 0 or self.missed2 <= enough:
            return math.inf, counts.clamp(max=1) * self.missed2
        if least_mu * k <= enough:
            return enough / k, (counts * (enough / k)).clamp(max=self.missed2)
        # The first order of the excess is the trace of the leading block of CᵀC/δ; its higher orders take a larger δ.
        lowest = float(self.theta[k - 1])
        delta = max(0.02 * lowest, float((self._coupling.diagonal()[:k] / self.theta[:k]).sum()) * lowest / enough)
        while delta <= lowest - least_mu:
            excess = self._lift(k, lowest - delta)
            if float(excess.sum()) <= enough:
                return lowest - delta, torch.cat([excess.new_zeros(1), excess.cumsum(0)]).clamp(max=self.missed2)
            delta *= max(1.02, math.sqrt(float(excess.sum()) / enough))
        return None

    def _lift(self, k: int, mu: float) -> Tensor:
        """How far each of the k leading λ may lie above its θ, given |E|₂² <= mu < θ_k."""
        leading = self.theta[:k]
        excess = torch.empty_like(leading)
        first_below = k
        step = float(leading[-1])
        while first_below:
            # All values within a factor of 16 share the gap of the smallest of them.
            group = int((leading[:first_below] >= 16 * step).sum())
            gap = float(leading[first_below - 1]) - mu
            lifted = torch.linalg.eigvalsh(torch.diag(self.theta) + self._coupling / gap).flip(0)
            excess[group:first_below] = (lifted - self.theta)[group:first_below]
            first_below = group
            step = float(leading[group - 1]) if group else 0.0
        return excess.clamp(min=0)

    def triplets(self, k: int) -> tuple[Tensor, Tensor]:
        """Q W (m, k) and its Dᵀ Q W (n, k) for the k leading Ritz vectors, fp32."""
        w = self.w[:, :k].to(self.space.q.dtype)
        return self.space.q @ w, self.space.z @ w


def thin_gram(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y in fp64, by row blocks: an fp64 copy of the whole space would be larger than the space."""
    out = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    height = max(1, CHUNK // max(1, x.shape[1]))
    for first in range(0, len(x), height):
        rows = slice(first, first + height)
        out.addmm_(x[rows].T.double(), y[rows].double())
    return out


class Probes:
    """Upper bounds on |E|₂² from Gaussian probes, tighter with each step (two products with D, `PROBES` wide).

    From y = N g the Lanczos process of G₂ = N G N gives orthonormal vectors v_k and polynomials p_k; an eigenvector z
    of G₂ with eigenvalue λ has Σ_k (zᵀ v_k)² = (zᵀ y / |y|)² Σ_k p_k(λ)² ≤ 1. Unless |zᵀ g| < t for all probes at
    once (probability below (0.8 t)^PROBES), the largest λ therefore has Σ p_k(λ)² ≤ |y|²/t² for one of them.
    (Hochstenbach 2013, probabilistic upper bounds for the two-norm. Halko, Martinsson and Tropp 2011, lemma 4.1, is the
    bound from a single product.)
    """

    def __init__(self, space: Krylov) -> None:
        self.space = space
        y = space.project(space.project(space._random(space.operator.shape[0], PROBES)))
        norm = torch.linalg.vector_norm(y, dim=0).clamp(min=1e-30)
        self._norm2 = (norm.double() ** 2).cpu().numpy()
        self._basis = [y / norm]
        self._ended = torch.zeros(PROBES, dtype=torch.bool, device=y.device)
        self._alpha: list[np.ndarray] = []
        self._beta: list[np.ndarray] = []
        self.bound = math.inf
        self.reached = 0.0
        """A lower bound on |E|₂²: the largest Ritz value so far."""

    @property
    def steps(self) -> int:
        return len(self._alpha)

    def step(self) -> float:
        """One Lanczos step for each probe, fully reorthogonalised; the new bound."""
        operator = self.space.operator
        v = self._basis[-1]
        seen = operator.transposed(v)
        self._alpha.append((torch.linalg.vector_norm(seen, dim=0).double() ** 2).cpu().numpy())
        w = operator.times(seen)
        noise = _ROUNDING * torch.linalg.vector_norm(w, dim=0).clamp(min=_EPS**2)
        for _ in range(2):
            w = self.space.project(w)
            for earlier in self._basis:
                w = w - earlier * (earlier * w).sum(0)
        beta = torch.linalg.vector_norm(w, dim=0)
        # What is left of rounding alone is no direction to go on with: such a probe has said all that it can.
        ended = beta <= noise
        self._basis.append(torch.where(ended, 0, w / beta))
        beta = torch.where(ended, noise, beta)
        self._beta.append(torch.where(self._ended, math.inf, beta).double().cpu().numpy())
        self._ended = self._ended | ended
        self.bound = min(self.bound, self._largest())
        return self.bound

    def _largest(self) -> float:
        """The largest λ that one of the probes allows."""
        s = self.steps
        alpha, beta = np.stack(self._alpha), np.stack(self._beta)
        jacobi = np.zeros((PROBES, s, s))
        for i in range(s):
            jacobi[:, i, i] = alpha[i]
            if i + 1 < s:
                jacobi[:, i, i + 1] = jacobi[:, i + 1, i] = np.where(np.isinf(beta[i]), 0, beta[i])
        ritz = np.linalg.eigvalsh(jacobi)[:, -1].clip(min=0)
        self.reached = max(self.reached, float(ritz.max()))
        slack = (8 * _EPS) ** 2 * self.space.operator.scaled_norm2
        t = FAILURE ** (1 / PROBES) / 0.8
        allowed = self._norm2 / t**2
        floor = np.maximum(ritz, 1e-300)

        def weight(x: np.ndarray) -> np.ndarray:
            """Σ p_k(x)², which grows beyond the largest Ritz value."""
            before, now, total = np.zeros_like(x), np.ones_like(x), np.ones_like(x)
            for k in range(s):
                after = (
                    (x - alpha[k]) * now - (np.where(before == 0, 0, beta[k - 1] * before) if k else 0)
                ) / np.maximum(beta[k], 1e-300)
                before, now = now, after
                total = total + after**2
            return total

        with np.errstate(over="ignore", invalid="ignore"):
            low, high = floor.copy(), floor * 2
            while not np.all(done := ~(weight(high) <= allowed)):
                high = np.where(done, high, high * 2)
            for _ in range(14):
                middle = (low + high) / 2
                inside = weight(middle) <= allowed
                low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        return float(high.max()) + slack
