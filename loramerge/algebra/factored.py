"""Exact factors of updates that are stored in other forms: Hadamard, Kronecker, Tucker, fused, split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramerge.algebra.core import Factors

Matrix = Tensor | tuple[Tensor, Tensor]
"""A matrix as it is, or as the two factors of a product."""


def hadamard(first: Factors, second: Factors) -> Factors:
    """`(b1 a1) o (b2 a2)`, the elementwise product (LoHa, Hyeon-Woo et al. 2021), rank r1 r2.

    `B[i, (p, q)] = b1[i, p] b2[i, q]`, `A[(p, q), j] = a1[p, j] a2[q, j]`.
    """
    if first.shape != second.shape:
        raise ValueError(f"no elementwise product of shapes {first.shape} and {second.shape}")
    b = first.b[:, :, None] * second.b[:, None, :]
    a = first.a[:, None, :] * second.a[None, :, :]
    return Factors(b.flatten(1), a.flatten(0, 1))


def kronecker(first: Matrix, second: Matrix) -> Factors:
    """`kron(first, second)` (LoKr, Yeh et al. 2023), each a matrix or a pair of factors.

    `kron(x1 y1, x2 y2) = kron(x1, x2) kron(y1, y2)`. A whole matrix counts as its product with a unit matrix on its
    shorter side, so the rank is the product of ranks or shorter sides: exact, without a decomposition.
    """
    (b1, a1), (b2, a2) = _pair(first), _pair(second)
    return Factors(torch.kron(b1.contiguous(), b2.contiguous()), torch.kron(a1.contiguous(), a2.contiguous()))


def tucker(up: Tensor, core: Tensor, down: Tensor) -> Factors:
    """`W[o, i, k..] = sum_pq up[o, p] core[p, q, k..] down[q, i]` with the core folded into down, rank p.

    Args:
        up: (m, p); some projects store its transpose.
        core: (p, q, *kernel).
        down: (q, c).

    Returns:
        Factors (m, p), (p, c prod(kernel)): columns in the order of a weight (m, c, *kernel) that is flattened.
    """
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != core.shape[0] or core.shape[1] != down.shape[0]:
        raise ValueError(f"a core {tuple(core.shape)} does not fit {tuple(up.shape)} and {tuple(down.shape)}")
    a = torch.einsum("pq...,qi->pi...", core, down)
    return Factors(up, a.flatten(1))


def split_rows(update: Factors, sizes: Sequence[int]) -> list[Factors]:
    """The updates of the modules that one fused module holds above one another: rows of b, all of a."""
    if sum(sizes) != update.shape[0]:
        raise ValueError(f"parts of {list(sizes)} rows do not make up {update.shape[0]}")
    return [Factors(b, update.a) for b in torch.split_with_sizes(update.b, list(sizes))]


def fuse_rows(updates: Sequence[Factors]) -> Factors:
    """The update of a module that holds several above one another, of their summed outputs.

    Block-diagonal b and stacked a, of the summed rank; where all share one a, it stays and the rank with it.
    """
    if len({u.shape[1] for u in updates}) != 1:
        raise ValueError("modules to fuse must have the same number of inputs")
    first = updates[0].a
    if all(u.a is first or torch.equal(u.a, first) for u in updates[1:]):
        return Factors(torch.cat([u.b for u in updates]), first)
    b: Tensor = torch.block_diag(*[u.b for u in updates])  # type: ignore[no-untyped-call]
    return Factors(b, torch.cat([u.a for u in updates]))


def _pair(matrix: Matrix) -> tuple[Tensor, Tensor]:
    if isinstance(matrix, tuple):
        return matrix[0].flatten(1), matrix[1].flatten(1)
    whole = matrix.flatten(1)
    rows, columns = whole.shape
    unit = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (unit, whole) if rows < columns else (whole, unit)
