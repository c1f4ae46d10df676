"""Where an elementwise method acts: on the updates themselves, or on coordinates that keep the result low-rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loramerge.algebra.core import Factors, Stack, signs
from loramerge.algebra.thresholds import Array, Whole

SPACES = ("full", "knots", "core")
KNOTS_CUT = 1e-5
"""Singular values up to this share of the largest are left out in the space `knots` (its authors: 1e-5, absolute)."""

Back = Callable[[Tensor], Factors]


def coordinates(stack: Stack, space: str, cut: float = KNOTS_CUT) -> tuple[Sequence[Array], Back | None]:
    """The arrays X_i of the adapters, in the order of the stack, and the way back from a merged X to factors.

    ======  =====================================================  ===========  =========
    space   X_i                                                    shape        way back
    ======  =====================================================  ===========  =========
    full    D_i, by blocks of rows                                 (m, n)       none
    knots   S V_i of `U S [V_1 .. V_T] = svd([D_1 .. D_T])`        (k, n)       U X
    core    U^T D_i V, U the left singular vectors of              (k, l)       U X V^T
            [D_1 .. D_T], V the right ones of [D_1; ..; D_T]
    ======  =====================================================  ===========  =========

    `full` is what papers define; its result has full rank. `knots`: arXiv 2410.19735; the authors mask S V_i, not V_i.
    `core`: after arXiv 2509.17786, in singular bases, which unlike those of a QR do not depend on how the updates are
    factored. Both bases are unique up to equal singular values.
    """
    if space == "full":
        return stack.adapters, None
    if space == "knots":
        basis = _left_basis(stack, cut)
        inner = basis.T @ stack.left
        arrays = [Whole(_without_noise(inner @ core @ stack.right.T, stack)) for core in stack.cores]
        return arrays, lambda x: Factors(basis, x).factors()
    if space == "core":
        left, right = _left_basis(stack, 0.0), _right_basis(stack)
        inner, outer = stack.left.T @ left, stack.right.T @ right
        cores = [Whole(_without_noise(inner.T @ core @ outer, stack)) for core in stack.cores]
        return cores, lambda x: Factors(left, x @ right.T).factors()
    raise ValueError(f"no space {space!r}: it is one of {', '.join(SPACES)}")


def _without_noise(x: Tensor, stack: Stack) -> Tensor:
    """Zero for rounding errors: an element that an adapter lacks must not vote on signs."""
    return torch.where(x.abs() > stack.tolerance, x, torch.zeros_like(x))


def _left_basis(stack: Stack, cut: float) -> Tensor:
    """Left singular vectors (m, k) of [D_1 .. D_T], signs fixed, without those of small singular values."""
    u, s, _ = torch.linalg.svd(torch.cat(list(stack.cores), 1), full_matrices=False)
    return _kept(stack, stack.left @ u, s, cut)


def _right_basis(stack: Stack) -> Tensor:
    """Right singular vectors (n, l) of [D_1; ..; D_T], signs fixed."""
    _, s, v = torch.linalg.svd(torch.cat(list(stack.cores)), full_matrices=False)
    return _kept(stack, stack.right @ v.T, s, 0.0)


def _kept(stack: Stack, vectors: Tensor, s: Tensor, cut: float) -> Tensor:
    largest = float(s[0]) if len(s) else 0.0
    kept = vectors[:, : int((s > max(cut * largest, stack.tolerance)).sum())]
    return kept * signs(kept)
