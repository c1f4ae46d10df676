"""Weighted sums of updates: linear, and the means whose coefficients follow from inner products."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, sin, sqrt

import torch
from torch import Tensor

from loramerge.algebra.core import Factors, RankRule, Stack

NEARLY_PARALLEL = 0.9995
"""Beyond this cosine the arc is a straight line (mergekit 0.1.5, merge_methods/slerp.py)."""


def cat(stack: Stack) -> Factors:
    """`sum D_i` as stacked factors `[b_1 .. b_T] [a_1; ..; a_T]`, rank R: exact, nothing is computed."""
    return Factors(torch.cat([f.b for f in stack.adapters], 1), torch.cat([f.a for f in stack.adapters]))


def linear(stack: Stack, rule: RankRule | None = None) -> Factors:
    """`sum D_i` (task arithmetic, arXiv 2212.04089) at its numerical rank, or the best update of a lower one.

    `A - A` has rank 0. The error of a truncation to k is `sqrt(sum_{j>k} s_j^2)` (Eckart-Young), see `Svd.tail`.
    """
    return weighted(stack, [1.0] * len(stack), rule)


def weighted(stack: Stack, coefficients: Sequence[float], rule: RankRule | None = None) -> Factors:
    """`sum c_i D_i` with coefficients for `stack.adapters`, in that order (see `Stack.given`)."""
    core = torch.zeros_like(stack.cores[0])
    for coefficient, c in zip(coefficients, stack.cores, strict=True):
        core = core + coefficient * c
    return stack.lift(core).factors(rule)


def slerp(stack: Stack, t: float, rule: RankRule | None = None) -> Factors:
    """The point at t in [0, 1] of the arc from the adapter given first to the one given second.

    `th = acos(<D_0, D_1> / (‖D_0‖ ‖D_1‖))`, `(sin((1 - t) th) D_0 + sin(t th) D_1) / sin th`; the straight line where
    the cosine exceeds 0.9995 in size, or where one update is zero (mergekit 0.1.5, merge_methods/slerp.py).
    """
    if len(stack) != 2:
        raise ValueError(f"slerp lies between two adapters, not {len(stack)}")
    if not 0 <= t <= 1:
        raise ValueError(f"t must be from 0 to 1, not {t}")
    gram = stack.gram()
    cosine = float(cosines(gram)[0, 1])
    shares = [1 - t, t]
    if abs(cosine) <= NEARLY_PARALLEL and float(gram.diagonal().min()) > 0:
        angle = acos(cosine)
        shares = [sin(share * angle) / sin(angle) for share in shares]
    return weighted(stack, stack.given(shares), rule)


def karcher(
    stack: Stack,
    shares: Sequence[float] | None = None,
    rule: RankRule | None = None,
    *,
    tolerance: float = 1e-12,
    iterations: int = 1000,
) -> Factors:
    """The mean of directions on the sphere, times the mean of norms.

    `(sum a_i ‖D_i‖) sum c_i u_i`, `u_i = D_i / ‖D_i‖`: the fixed point of `m = exp_m(sum a_i log_m(u_i))` in the
    coefficients c of m, from the cosines alone (Karcher 1977; mergekit 0.1.5, merge_methods/karcher.py, stops after 10
    rounds or at 1e-5). A zero update has no direction: it lowers the mean of norms only. Directions that cancel have
    no mean: the result is zero.

    Args:
        shares: a_i of the adapters as given, summing to anything positive; equal by default.
        tolerance: length of the tangent step at which it stops.
    """
    given = stack.given(shares if shares is not None else [1.0] * len(stack))
    if min(given) < 0 or sum(given) <= 0:
        raise ValueError("shares of a mean must not be negative, and not all zero")
    gram = stack.gram().double().cpu()
    norms = gram.diagonal().sqrt()
    weights = torch.tensor(given, dtype=torch.float64) / sum(given)
    directions = _karcher_direction(cosines(gram), weights * (norms > 0), tolerance, iterations)
    length = float(weights @ norms)
    return weighted(
        stack, [length * d / x if x else 0.0 for d, x in zip(directions, norms.tolist(), strict=True)], rule
    )


def model_stock(stack: Stack, rule: RankRule | None = None) -> Factors:
    """`t/T sum D_i`, `t = T c / (1 + (T - 1) c)`, c the mean cosine of pairs (Model Stock, arXiv 2403.19522).

    The base is the origin, as updates are differences to it. One adapter is itself. A zero update has cosine 0.
    """
    count = len(stack)
    h = cosines(stack.gram())
    if count == 1:
        return weighted(stack, [1.0], rule)
    mean = float(h.sum() - h.diagonal().sum()) / (count * (count - 1))
    below = 1 + (count - 1) * mean
    t = count * mean / below if below > 1e-12 else 0.0
    return weighted(stack, [t / count] * count, rule)


def cosines(gram: Tensor) -> Tensor:
    """`H_ij = <D_i, D_j> / (‖D_i‖ ‖D_j‖)` (T, T) from inner products; 0 where an update is zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    h = (gram * inverse[:, None] * inverse).clamp(-1, 1)
    return h.diagonal_scatter((norms > 0).to(h.dtype))


def _karcher_direction(h: Tensor, shares: Tensor, tolerance: float, iterations: int) -> list[float]:
    """Coefficients c of the mean direction `sum c_i u_i`, of length 1; all 0 where there is none."""
    length = float(shares @ h @ shares)
    if length <= 1e-13:  # the square of a length, as exact as the cosines
        return [0.0] * len(shares)
    c = shares / sqrt(length)
    for _ in range(iterations):
        dots = (h @ c).clamp(-1, 1)
        bent = torch.tensor([_angle_over_sine(x) for x in dots.tolist()], dtype=torch.float64) * shares
        step = bent - (bent @ dots) * c
        size = sqrt(max(float(step @ h @ step), 0.0))
        if size < tolerance:
            break
        c = cos(size) * c + sin(size) / size * step
        c = c / sqrt(float(c @ h @ c))
    return [float(x) for x in c]


def _angle_over_sine(cosine: float) -> float:
    angle = acos(cosine)
    sine = sin(angle)
    return angle / sine if sine > 1e-12 else 1.0
