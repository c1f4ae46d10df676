"""Dense float64 definitions of every method, straight from the papers' formulas, in numpy; and inputs for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from loramerge.algebra import Factors, Stack, fold

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Adapters of one module: shape, ranks, scales, weights, and the seed of their entries."""

    seed: int
    m: int
    n: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            (
                torch.randn(self.m, r, generator=generator, dtype=torch.float64),
                torch.randn(r, self.n, generator=generator, dtype=torch.float64),
            )
            for r in self.ranks
        ]

    def folded(self) -> list[Factors]:
        """The adapters, each with a name, as the random methods need it under changes of basis."""
        return [
            fold(b, a, scale=s, weight=w, key=bytes([i + 1]))
            for i, ((b, a), s, w) in enumerate(zip(self.pairs(), self.scales, self.weights, strict=True))
        ]

    def stack(self) -> Stack:
        return Stack(self.folded())

    def dense(self) -> list[Array]:
        return [
            w * s * (b.numpy() @ a.numpy())
            for (b, a), s, w in zip(self.pairs(), self.scales, self.weights, strict=True)
        ]

    def size(self) -> float:
        return max(1e-300, *(float(np.linalg.norm(d)) for d in self.dense()))


numbers = st.sampled_from([1.0, 0.7, -0.5, 2.0, 0.25])


@st.composite
def cases(draw: st.DrawFn, least: int = 1, most: int = 4, largest: int = 12, zeros: bool = True) -> Case:
    """Tall, wide, square; rank 1; sums of ranks above min(m, n); sometimes an adapter of weight 0."""
    m = draw(st.integers(1, largest))
    n = draw(st.one_of(st.just(m), st.integers(1, largest)))
    count = draw(st.integers(least, most))
    ranks = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    scales = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=count, max_size=count))
    weight = st.one_of(numbers, st.just(0.0)) if zeros else numbers
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    return Case(draw(st.integers(0, 2**20)), m, n, tuple(ranks), tuple(scales), tuple(weights))


def rank_of(s: Array, size: float) -> int:
    return int((s > 1e-12 * size).sum())


def svd(x: Array, size: float) -> tuple[Array, Array, Array]:
    """Triplets that are no rounding errors."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    k = rank_of(s, size)
    return u[:, :k], s[:k], v[:k]


def largest_positive(u: Array) -> Array:
    """Signs (k,) that make the largest entry of every column positive."""
    return np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])


# --- elementwise -----------------------------------------------------------------------------------------------------


def kth(x: Array, k: int) -> np.float32:
    if not x.size:
        return np.float32(0)
    return np.sort(np.abs(x).astype(np.float32), axis=None)[-k]


def trimmed(x: Array, density: float) -> Array:
    k = max(1, int(density * x.size))
    return np.where(np.abs(x).astype(np.float32) >= kth(x, k), x, 0.0)


def without_largest(x: Array, density: float, gamma: float) -> Array:
    top, size = int(gamma * x.size), np.abs(x).astype(np.float32)
    last = min(top + max(1, int(density * x.size)), x.size)
    kept = size >= kth(x, last)
    return np.where(kept & (size < kth(x, top)) if top else kept, x, 0.0)


def uniform(shape: tuple[int, int], seed: int, key: bytes, module: str) -> Array:
    digest = hashlib.sha256(f"{seed};{len(key)};".encode() + key + module.encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(shape[0] * shape[1]).reshape(shape)


def dropped(x: Array, p: float, u: Array) -> Array:
    return np.where(u < 1 - p, x / (1 - p), 0.0)


def della_row(row: Array, density: float, eps: float, u: Array) -> Array:
    n = len(row)
    out = np.zeros(n)
    for place, j in enumerate(sorted(range(n), key=lambda j: (abs(row[j]), j))):
        q = density - eps + 2 * eps * place / (n - 1) if n > 1 else density
        if u[j] < q:
            out[j] = row[j] / q
    return out


def elected(xs: list[Array], scale: float = 1.0) -> Array:
    total = np.zeros_like(xs[0])
    for x in xs:
        total = total + x
    g = np.sign(total)
    g[g == 0] = np.sign(g.sum())
    out = np.zeros_like(total)
    for e in np.ndindex(*total.shape):
        agree = [x[e] for x in xs if np.sign(x[e]) == g[e] and x[e] != 0]
        out[e] = scale * sum(agree) / max(1, len(agree))
    return out


@dataclass(frozen=True)
class Space:
    """Coordinates of the updates, and the matrices that lead back."""

    xs: list[Array]
    left: Array | None = None
    right: Array | None = None

    def back(self, x: Array) -> Array:
        if self.left is not None:
            x = self.left @ x
        return x if self.right is None else x @ self.right.T


def space(ds: list[Array], name: str, size: float) -> Space:
    if name == "full":
        return Space(ds)
    u, s, _ = svd(np.concatenate(ds, 1), size)
    if name == "knots":
        u = u[:, s > 1e-5 * s[0]] if len(s) else u
        u = u * largest_positive(u)
        xs = [u.T @ d for d in ds]
        return Space([np.where(np.abs(x) > 1e-13 * size, x, 0) for x in xs], u)
    u = u * largest_positive(u)
    v = svd(np.concatenate(ds, 0), size)[2].T
    v = v * largest_positive(v)
    xs = [u.T @ d @ v for d in ds]
    return Space([np.where(np.abs(x) > 1e-13 * size, x, 0) for x in xs], u, v)


# --- means -----------------------------------------------------------------------------------------------------------


def slerp(a: Array, b: Array, t: float) -> Array:
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    if na == 0 or nb == 0 or abs((a * b).sum() / (na * nb)) > 0.9995:
        return (1 - t) * a + t * b
    th = np.arccos((a * b).sum() / (na * nb))
    return (np.sin((1 - t) * th) * a + np.sin(t * th) * b) / np.sin(th)


def karcher(ds: list[Array], shares: list[float]) -> Array:
    """Gradient steps with dense logarithms and exponentials on the sphere of all matrices."""
    weights = np.array(shares) / sum(shares)
    norms = [np.linalg.norm(d) for d in ds]
    us = [(d / x, w) for d, x, w in zip(ds, norms, weights, strict=True) if x > 0]
    mean = sum(w * u for u, w in us)
    mean = mean / np.linalg.norm(mean)
    for _ in range(500):
        step = np.zeros_like(mean)
        for u, w in us:
            aside = u - (u * mean).sum() * mean
            sine = np.linalg.norm(aside)
            if sine > 1e-14:
                step = step + w * np.arctan2(sine, (u * mean).sum()) / sine * aside
        length = np.linalg.norm(step)
        if length < 1e-13:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean = mean / np.linalg.norm(mean)
    return float((weights * np.array(norms)).sum()) * mean


def model_stock(ds: list[Array]) -> Array:
    count = len(ds)
    cosines = []
    for i in range(count):
        for j in range(i):
            size = np.linalg.norm(ds[i]) * np.linalg.norm(ds[j])
            cosines.append((ds[i] * ds[j]).sum() / size if size else 0.0)
    c = np.mean(cosines)
    return count * c / (1 + (count - 1) * c) / count * sum(ds)


# --- subspaces -------------------------------------------------------------------------------------------------------


def polar(x: Array) -> Array:
    u, s, v = np.linalg.svd(x, full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum()) if len(s) else 0
    return u[:, :k] @ v[:k]


def tsv(ds: list[Array], ranks: list[int], size: float) -> Array:
    parts = [svd(d, size) for d in ds]
    u = np.concatenate([p[0][:, :k] for p, k in zip(parts, ranks, strict=True)], 1)
    s = np.concatenate([p[1][:k] for p, k in zip(parts, ranks, strict=True)])
    v = np.concatenate([p[2][:k] for p, k in zip(parts, ranks, strict=True)])
    return polar(u) @ np.diag(s) @ polar(v) if len(s) else np.zeros_like(ds[0])


def iso_c(ds: list[Array], size: float) -> Array:
    u, s, v = svd(sum(ds), size)
    return s.mean() * u @ v if len(s) else np.zeros_like(ds[0])


def iso_cts(ds: list[Array], common: float, rank: int, size: float) -> Array:
    count = len(ds)
    k = min(rank, *ds[0].shape)
    own = min(round((k - int(common * k)) / count), k // count)
    c = k - own * count
    u, s, v = svd(sum(ds), size)
    us, ss, vs = [u[:, :c]], [s[:c]], [v[:c]]
    outside = np.eye(len(u)) - us[0] @ us[0].T
    for d in ds:
        pu, ps, pv = svd(outside @ d, size)
        us.append(pu[:, :own])
        ss.append(ps[:own])
        vs.append(pv[:own])
    values = np.concatenate(ss)
    if not len(values):
        return np.zeros_like(ds[0])
    return values.mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs))


def svc(merged: Array, ds: list[Array], alpha: float, size: float) -> Array:
    u, s, v = svd(merged, size)
    out = np.zeros_like(merged)
    for j in range(len(s)):
        gains = []
        for d in ds:
            seen = u[:, j] @ d
            here = np.linalg.norm(seen) > 1e-12 * size
            gains.append(max(alpha, (u[:, j] @ merged) @ seen / (seen @ seen) if here else 0.0))
        out += s[j] * len(ds) / sum(gains) * np.outer(u[:, j], v[j])
    return out


def wudi(ds: list[Array], ridge: float) -> Array:
    """The least-squares problem as it stands: X [D_i^T/‖D_i‖, sqrt(rho) I] = [D_i D_i^T/‖D_i‖, sqrt(rho) sum D]."""
    active = [d for d in ds if np.linalg.norm(d) > 0]
    if not active:
        return np.zeros_like(ds[0])
    units = [d / np.linalg.norm(d) for d in active]
    rank = np.linalg.matrix_rank(np.concatenate(units), tol=1e-12)
    rho = ridge * len(active) / rank
    known = np.concatenate([*[u.T for u in units], np.sqrt(rho) * np.eye(ds[0].shape[1])], 1)
    wanted = np.concatenate([*[d @ u.T for d, u in zip(active, units, strict=True)], np.sqrt(rho) * sum(ds)], 1)
    return np.linalg.lstsq(known.T, wanted.T, rcond=1e-12)[0].T


def wudi_objective(x: Array, ds: list[Array]) -> float:
    return sum(float(np.linalg.norm((x - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2) for d in ds)
