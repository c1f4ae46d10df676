"""Methods on singular directions: KnOTS, TSV-M, Iso-C, Iso-CTS, SVC and WUDI, all in the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loramerge.algebra.core import Factors, RankRule, Stack, relative_tolerance
from loramerge.algebra.masks import dare, ties
from loramerge.algebra.spaces import KNOTS_CUT

POLAR_CUT = 1e-10
"""Directions below this share of the largest are arbitrary in a polar factor, and left out."""


class Triplets(NamedTuple):
    """`u diag(s) v` of a core: u (p, k), s (k,) falling, v (k, q)."""

    u: Tensor
    s: Tensor
    v: Tensor


def knots(
    stack: Stack,
    density: float = 1.0,
    *,
    p: float | None = None,
    seed: int = 0,
    module: str = "",
    scale: float = 1.0,
    cut: float = KNOTS_CUT,
    rule: RankRule | None = None,
) -> Factors:
    """KnOTS (arXiv 2410.19735): TIES, or with `p` DARE-TIES, on `S V_i` of `svd([D_1 .. D_T])`; rank at most R."""
    if p is not None:
        merged = dare(stack, p, seed=seed, module=module, elect=True, scale=scale, space="knots", cut=cut)
    else:
        merged = ties(stack, density, scale=scale, space="knots", cut=cut)
    return merged.factors(rule)


def tsv(stack: Stack, ranks: Sequence[int] | Literal["own", "share"] = "own", rule: RankRule | None = None) -> Factors:
    """TSV-M (arXiv 2412.00081): the top k_i triplets of every D_i, singular vectors of all made orthogonal together.

    `U = [U_1 .. U_T]`, `V = [V_1; ..; V_T]`, `S = (S_1, ..)`, `M = polar(U) diag(S) polar(V)` with `polar(X) = P Q` of
    `P s Q = svd(X)` over `s > 1e-10 s_1`. Only directions that the updates have take part.

    Args:
        ranks: k_i of the adapters as given; `"own"`: all of each; `"share"`: at most R / T, as published.
    """
    if ranks == "own":
        limits = [f.rank for f in stack.adapters]
    elif ranks == "share":
        limits = [min(f.rank, stack.rank // len(stack)) for f in stack.adapters]
    else:
        limits = [int(k) for k in stack.given([float(k) for k in ranks])]
    if min(limits) < 0:
        raise ValueError("ranks must not be negative")
    parts = [_top(core, k, stack.tolerance) for core, k in zip(stack.cores, limits, strict=True)]
    core = _orthogonal_sum(parts, torch.cat([part.s for part in parts]))
    return stack.lift(core).factors(rule)


def iso_c(stack: Stack, rule: RankRule | None = None) -> Factors:
    """Iso-C (arXiv 2502.04959): `mean(S) U V` of `U S V = svd(sum D_i)`, over its numerical rank.

    One adapter alone does not come back as itself: all its singular values become equal.
    """
    total = _top(_sum(stack), stack.rank, stack.tolerance)
    flat = total.s.mean() if len(total.s) else total.s.sum()
    return stack.lift(flat * (total.u @ total.v)).factors(rule)


def iso_cts(stack: Stack, common: float = 0.8, rule: RankRule | None = None) -> Factors:
    """Iso-CTS (arXiv 2502.04959): common directions of the sum, and of every adapter those outside of them, flattened.

    `K = min(R, m, n)`, `c = int(common K)`, per adapter `t = round((K - c) / T)`, at most K // T, `c = K - t T`. The
    top c triplets of the sum (U_c) and the top t triplets of every `(I - U_c U_c^T) D_i`, as far as these have them,
    are stacked; `M = mean(all S) polar(U) polar(V)`.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"the common share must be from 0 to 1, not {common}")
    count = len(stack)
    whole = min(stack.rank, *stack.shape)
    own = min(round((whole - int(common * whole)) / count), whole // count)
    total = _top(_sum(stack), whole - own * count, stack.tolerance)
    outside = [core - total.u @ (total.u.T @ core) for core in stack.cores]
    parts = [total, *(_top(core, own, stack.tolerance) for core in outside)]
    values = torch.cat([part.s for part in parts])
    if not len(values):
        return stack.lift(torch.zeros_like(stack.cores[0])).factors(rule)
    return stack.lift(_orthogonal_sum(parts, values.mean().expand_as(values))).factors(rule)


def svc(merged: Factors, stack: Stack, alpha: float = 1.0, rule: RankRule | None = None) -> Factors:
    """SVC (arXiv 2602.05536), a step after any method: shrinks directions in which the updates add up.

    `M = U S V`, `g[j, i] = <u_j^T M, u_j^T D_i> / ‖u_j^T D_i‖^2` (0 where D_i has nothing in the direction),
    `S_j <- S_j T / sum_i max(alpha, g[j, i])`, over the numerical rank of M. With alpha <= 1 one adapter gives itself.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, not {alpha}")
    whole = Factors(merged.b.to(stack.left.dtype), merged.a.to(stack.left.dtype)).svd()
    u, v = whole.u, whole.v
    gains = torch.zeros_like(whole.s)
    for update in stack.adapters:
        seen = (u.T @ update.b) @ update.a
        length = torch.linalg.vector_norm(seen, dim=1)
        inner = whole.s * (v * seen).sum(1)
        present = length > stack.tolerance
        share = torch.where(present, inner / torch.where(present, length, 1.0).square(), 0.0)
        gains += share.clamp(min=alpha)
    return Factors(u * (whole.s * len(stack) / gains), v).factors(rule)


def wudi(stack: Stack, ridge: float = 1e-6, rule: RankRule | None = None) -> Factors:
    """WUDI (arXiv 2503.08099) in closed form: the X that least disturbs what every adapter reads.

    Minimises `sum_i ‖(X - D_i) D_i^T‖^2 / ‖D_i‖^2 + rho ‖X - sum D_i‖^2`: with `G_i = D_i^T D_i / ‖D_i‖^2` (zero
    updates skipped) `X = (sum D_i G_i + rho sum D_i) (sum G_i + rho I)^+`,
    `rho = ridge trace(sum G_i) / rank(sum G_i)`. The authors take 300 gradient steps from the sum; the second term does
    what stopping there does, and keeps X from growing without bound where row spaces overlap. ridge = 0 is the exact
    minimum.
    """
    if not ridge >= 0:
        raise ValueError(f"the ridge must not be negative, as {ridge} is")
    active = [(core, float(torch.linalg.vector_norm(core))) for core in stack.cores]
    active = [(core, size) for core, size in active if size > 0]
    if not active:
        return stack.lift(torch.zeros_like(stack.cores[0])).factors(rule)
    # sum G_i = N^T N: its eigenvectors come from N, so that the condition is not squared.
    normed = torch.cat([core / size for core, size in active])
    _, s, v = torch.linalg.svd(normed, full_matrices=False)
    k = int((s > relative_tolerance(s.dtype, stack.shape) * s[0]).sum())
    squares, v = s[:k].square(), v[:k]
    rho = ridge * float(squares.sum()) / k
    right = rho * _sum(stack) @ v.T
    for core, size in active:
        unit = core / size
        right = right + core @ (unit.T @ (unit @ v.T))
    return stack.lift((right / (squares + rho)) @ v).factors(rule)


def _sum(stack: Stack) -> Tensor:
    total = torch.zeros_like(stack.cores[0])
    for core in stack.cores:
        total = total + core
    return total


def _top(core: Tensor, k: int, tolerance: float) -> Triplets:
    """The top k triplets of a core, fewer where it has no more."""
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    k = min(k, int((s > tolerance).sum()))
    return Triplets(u[:, :k], s[:k], v[:k])


def _orthogonal_sum(parts: Sequence[Triplets], values: Tensor) -> Tensor:
    """`polar(U) diag(values) polar(V)` of all triplets stacked."""
    return (_polar(torch.cat([p.u for p in parts], 1)) * values) @ _polar(torch.cat([p.v for p in parts]))


def _polar(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows, without the directions that x lacks."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    k = int((s > POLAR_CUT * s[0]).sum()) if len(s) else 0
    polar: Tensor = u[:, :k] @ v[:k]
    return polar
