"""Rotations from skew-symmetric matrices: Cayley's transform, exact and as the truncated series of OFT v2."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from loramerge.adapters.kinds.base import Unfit

if TYPE_CHECKING:
    from torch import Tensor


def block_size(elements: int) -> int:
    """b of a skew-symmetric (b, b) matrix that has this many numbers above its diagonal.

    Raises:
        Unfit: no matrix has.
    """
    b = (1 + isqrt(1 + 8 * elements)) // 2
    if b * (b - 1) // 2 != elements:
        raise Unfit(f"{elements} numbers are not the upper triangle of a square matrix")
    return b


def skew(upper: Tensor, b: int) -> Tensor:
    """Upper triangles (..., b(b-1)/2), row by row, as skew-symmetric matrices (..., b, b)."""
    import torch

    Q = upper.new_zeros(*upper.shape[:-1], b, b)
    rows, cols = torch.triu_indices(b, b, 1, device=upper.device)
    Q[..., rows, cols] = upper
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """`(I + Q)(I - Q)⁻¹`, (..., b, b)."""
    import torch

    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(eye - Q, eye + Q)  # the two commute
    return R


def cayley_series(Q: Tensor, terms: int, full_tail: bool = False) -> Tensor:
    """`I + 2Q + ... + 2Qᴷ + Qᴷ⁺¹` with K = max(2, terms - 2); where `full_tail`, `I + 2Q + ... + 2Qᴷ`, K = terms - 1.

    One term is I, two are I + 2Q in both. peft 0.21.2 and 0.17.1, tuners/oft/layer.py `_cayley_batch`: the last power
    has its right coefficient since 0.18.0.
    """
    import torch

    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms < 2:
        return eye.clone()
    if terms == 2:
        return eye + 2 * Q
    whole = terms - 1 if full_tail else max(2, terms - 2)
    R, power = eye + 2 * Q, Q
    for _ in range(2, whole + 1):
        power = power @ Q
        R = R + 2 * power
    return R if full_tail else R + power @ Q
