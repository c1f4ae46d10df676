"""Low-rank updates as factors, and the small core in which a stack of them is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

RankRule = Callable[[Tensor], int]
"""From singular values (k,), falling, to how many of them to keep; see `loramerge.algebra.rank`."""

TILE = 64
"""Rows of a product that are always computed together, so that their bits do not depend on the rows asked for."""

SMALLEST_SIZE = 64
"""Rounding errors of small matrices do not shrink with their size: the tolerance is that of at least this size."""


class Update(Protocol):
    """An update of one module, a matrix (m, n) that need not exist as a whole."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the module."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the update, (stop - start, n); the same bits however it is cut."""

    def dense(self) -> Tensor:
        """The update as one tensor (m, n)."""

    def factors(self, rule: RankRule | None = None) -> Factors:
        """The update as factors: all of its numerical rank, or what `rule` keeps of it."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The update `D = b a` of one module, weight and scale folded in: b (m, r), a (r, n), r may be 0.

    `key` identifies the adapter to the random methods (`masks.py`); by default it is a hash of the factors' bytes.
    """

    b: Tensor
    a: Tensor
    key: bytes = b""

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ValueError(f"factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} have no product")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of b; the numerical rank may be lower."""
        return self.a.shape[0]

    @cached_property
    def identity(self) -> bytes:
        """`key`, or the hash that stands in for it."""
        return self.key or content_key(self.b, self.a)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of `b a`, computed in tiles of fixed position."""
        first = start - start % TILE
        tiles = [self.b[at : at + TILE] @ self.a for at in range(first, stop, TILE)]
        return torch.cat([self.b[:0] @ self.a, *tiles])[start - first : stop - first]

    def dense(self) -> Tensor:
        """`b a`, (m, n)."""
        return self.rows(0, self.shape[0])

    def svd(self) -> Svd:
        """Singular values and vectors of `b a` at its numerical rank, by QR of both factors (never forms `b a`)."""
        left, upper = torch.linalg.qr(_computable(self.b))
        right, lower = torch.linalg.qr(_computable(self.a).T)
        core = upper @ lower.T
        return svd_of_core(left, core, right, float(torch.linalg.vector_norm(core)))

    def factors(self, rule: RankRule | None = None) -> Factors:
        """The same update at its numerical rank, or the best one of the rank that `rule` chooses (Eckart-Young)."""
        return self.svd().factors(rule)

    def scaled(self, factor: float) -> Factors:
        """`factor D`: the factor goes to b."""
        return Factors(self.b * factor, self.a, self.key)

    def transposed(self) -> Factors:
        """`D^T` as factors (n, r), (r, m): embeddings, layers that store (in, out)."""
        return Factors(self.a.T, self.b.T, self.key)

    def to(self, dtype: torch.dtype) -> Factors:
        """The factors rounded to a dtype; ValueError where a value leaves its range."""
        b, a = self.b.to(dtype), self.a.to(dtype)
        if not (b.isfinite().all() and a.isfinite().all()):
            raise ValueError(f"factors do not fit the range of {dtype}")
        return Factors(b, a, self.key)


@dataclass(frozen=True, eq=False)
class Svd:
    """`D = u diag(s) v`: u (m, k), s (k,) falling, v (k, n) with right singular vectors as rows; signs are fixed.

    Held as `left (x diag(s) y) right^T` with x (p, k), y (k, q): only the vectors that are asked for are lifted.
    """

    left: Tensor
    x: Tensor
    s: Tensor
    y: Tensor
    right: Tensor

    @property
    def u(self) -> Tensor:
        """Left singular vectors (m, k)."""
        return self._vectors(len(self.s))[0]

    @property
    def v(self) -> Tensor:
        """Right singular vectors (k, n)."""
        return self._vectors(len(self.s))[1]

    def factors(self, rule: RankRule | None = None) -> Factors:
        """b = u sqrt(s), a = sqrt(s) v: of all splits the one with the smallest largest entries."""
        k = len(self.s) if rule is None else min(rule(self.s), len(self.s))
        u, v = self._vectors(k)
        root = self.s[:k].sqrt()
        return Factors(u.mul_(root), v.mul_(root[:, None]))

    def tail(self, k: int) -> float:
        """Frobenius norm of what rank k leaves out, `sqrt(sum_{j>k} s_j^2)`."""
        return float(torch.linalg.vector_norm(self.s[k:].double()))

    def _vectors(self, k: int) -> tuple[Tensor, Tensor]:
        u = self.left @ self.x[:, :k]
        sign = signs(u)
        return u.mul_(sign), (sign[:, None] * self.y[:k]) @ self.right.T


def content_key(*tensors: Tensor) -> bytes:
    """A hash (32 bytes) of dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def fold(
    b: Tensor,
    a: Tensor,
    *,
    scale: float = 1.0,
    weight: float = 1.0,
    key: bytes = b"",
    dtype: torch.dtype = torch.float64,
) -> Factors:
    """`D = weight scale b a` of one adapter's module, as every method here takes it.

    Args:
        b: (m, r) or a convolution's (m, r, 1, ...), any float dtype.
        a: (r, n) or a convolution's (r, c, *kernel), flattened to n = c prod(kernel).
        scale: what the adapter's own settings say (alpha / r, alpha / sqrt(r), ...).
        weight: what the user gives the adapter; its sign counts.
        key: the adapter's identity for random methods; by default a hash of the bytes of b and a as given, so that
            the weight does not change the random choices.
        dtype: of the computation.

    Raises:
        ValueError: shapes that have no product, values that are not finite.
    """
    key = key or content_key(b, a)
    if not (_finite(b) and _finite(a) and isfinite(weight * scale)):
        raise ValueError("factors, scale or weight are not finite")
    return Factors(b.flatten(1).to(dtype) * (weight * scale), a.flatten(1).to(dtype), key)


class Stack:
    """Adapters of one module, in an order of their own, with the core they share.

    `q_b r_b = qr([b_1 .. b_T])`, `q_a r_a = qr([a_1; ..; a_T]^T)`, `C_i = r_b[:, i] r_a[:, i]^T`, so that
    `D_i = q_b C_i q_a^T` exactly. With R the sum of ranks, left is (m, min(m, R)), right (n, min(n, R)) and every core
    (min(m, R), min(n, R)): whatever commutes with orthogonal changes of basis is computed on the cores and lifted once
    (Core Space, arXiv 2509.17786). Costs O((m + n) R^2 + R^3).

    Adapters are sorted by their content, so that the order in which they are given changes no bit of a result.
    `order[i]` is the place at which `adapters[i]` was given.
    """

    def __init__(self, adapters: Sequence[Factors], dtype: torch.dtype = torch.float64) -> None:
        if not adapters:
            raise ValueError("a stack needs at least one adapter")
        if len({f.shape for f in adapters}) > 1:
            raise ValueError(f"adapters of different shapes: {sorted({f.shape for f in adapters})}")
        # Adapters with one key may differ by their weights: the folded bytes decide.
        keys = [f.identity for f in adapters]
        ranked = [
            (key, content_key(f.b, f.a) if keys.count(key) > 1 else b"") for key, f in zip(keys, adapters, strict=True)
        ]
        self.order = tuple(sorted(range(len(adapters)), key=ranked.__getitem__))
        self.adapters = tuple(Factors(adapters[i].b.to(dtype), adapters[i].a.to(dtype), keys[i]) for i in self.order)

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.adapters[0].shape

    @property
    def rank(self) -> int:
        """R, the sum of ranks."""
        return sum(f.rank for f in self.adapters)

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        left, upper = torch.linalg.qr(torch.cat([f.b for f in self.adapters], 1))
        right, lower = torch.linalg.qr(torch.cat([f.a for f in self.adapters]).T)
        ends = [0, *accumulate(f.rank for f in self.adapters)]
        return left, right, tuple(upper[:, i:j] @ lower[:, i:j].T for i, j in pairwise(ends))

    @property
    def left(self) -> Tensor:
        """q_b (m, min(m, R)), orthonormal columns."""
        return self._decomposed[0]

    @property
    def right(self) -> Tensor:
        """q_a (n, min(n, R)), orthonormal columns."""
        return self._decomposed[1]

    @property
    def cores(self) -> tuple[Tensor, ...]:
        """C_i (min(m, R), min(n, R)), one an adapter."""
        return self._decomposed[2]

    @cached_property
    def size(self) -> float:
        """The largest ‖D_i‖: rounding errors of results are relative to it, however much cancels."""
        return max(float(torch.linalg.vector_norm(core)) for core in self.cores)

    @property
    def tolerance(self) -> float:
        """Singular values of a core up to this size are rounding errors."""
        return relative_tolerance(self.left.dtype, self.shape) * self.size

    def gram(self) -> Tensor:
        """`<D_i, D_j>` (T, T), Frobenius inner products."""
        flat = torch.stack([core.flatten() for core in self.cores])
        return flat @ flat.T

    def lift(self, core: Tensor) -> Svd:
        """A core matrix as the update `q_b core q_a^T`, decomposed, at its numerical rank."""
        return svd_of_core(self.left, core, self.right, self.size)

    def given(self, values: Sequence[float]) -> list[float]:
        """Values for the adapters as given, in the order of `adapters`."""
        if len(values) != len(self):
            raise ValueError(f"{len(values)} values for {len(self)} adapters")
        return [float(values[i]) for i in self.order]


def relative_tolerance(dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """Relative size below which singular values of a matrix (m, n) are rounding errors."""
    return torch.finfo(dtype).eps * max(*shape, SMALLEST_SIZE)


def svd_of_core(left: Tensor, core: Tensor, right: Tensor, size: float = 0.0) -> Svd:
    """`left core right^T` decomposed, without the singular values that are rounding errors beside it and `size`.

    Args: left (m, p) and right (n, q) with orthonormal columns, core (p, q).
    """
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    largest = float(s[0]) if len(s) else 0.0
    cut = relative_tolerance(core.dtype, (left.shape[0], right.shape[0])) * max(size, largest)
    k = int((s > cut).sum())
    return Svd(left, u[:, :k], s[:k], v[:k], right)


def signs(u: Tensor) -> Tensor:
    """1 or -1 for every column of u (m, k), so that its largest entry becomes positive, the first of equals."""
    if not u.numel():
        return u.new_ones(u.shape[1])
    lowest, highest = u.aminmax(dim=0)
    sign = torch.where(highest >= -lowest, 1.0, -1.0).to(u.dtype)
    # Entries that are equal but for rounding are equal here: the sign must not hang on the last bit.
    near = ((highest + lowest).abs() <= 1e-6 * highest.abs()).nonzero()[:, 0]
    if len(near):
        sizes = u[:, near].abs()
        first = (sizes >= sizes.amax(0) * (1 - 2e-6)).int().argmax(0)
        sign[near] = torch.where(u[first, near] < 0, -1.0, 1.0).to(u.dtype)
    return sign


def norm(update: Factors) -> float:
    """Frobenius norm ‖b a‖ by the QR of both factors."""
    upper = torch.linalg.qr(_computable(update.b), mode="r").R
    lower = torch.linalg.qr(_computable(update.a).T, mode="r").R
    return float(torch.linalg.vector_norm(upper @ lower.T))


def relative_error(approximation: Factors, exact: Factors) -> float:
    """`‖approximation - exact‖ / ‖exact‖` in float64 by the core of both; 0 for two zeros, inf for one."""
    both = Stack([exact, approximation.scaled(-1.0)])
    distance = float(torch.linalg.vector_norm(both.cores[0] + both.cores[1]))
    size = norm(Factors(exact.b.double(), exact.a.double()))
    if size == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / size


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite: their sum says so, unless it overflows."""
    return isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _computable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that can be decomposed."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.double()
