"""Factors into factors: exact products, cuts of block-diagonal pairs, low-rank approximations with their error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Context, Dense, Form, Product, RowDelta, RowMap, WholeMap
from loramerge.adapters.kinds.hadamard import Hadamard
from loramerge.adapters.kinds.kronecker import Kronecker
from loramerge.adapters.kinds.magnitude import dora, inside
from loramerge.adapters.kinds.tucker import through_core
from loramerge.converting.items import PAIR, PRODUCT, Item

Pair = tuple[Tensor, Tensor]
"""(B, A): (out, r) and (r, in * prod(kernel)), float64."""


@dataclass(frozen=True)
class Split:
    """An update as `scale * B A`. `own`: the rank is the kind's own, not a product of ranks."""

    B: Tensor
    A: Tensor
    scale: float
    own: bool

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


def as_pair(item: Item) -> Split | None:
    """The update as one exact product, where its kind is one.

    Low-rank and Tucker products have their own rank, as all kinds do whose formula is a product; a Hadamard product
    has r^2 (rows of B are Kronecker products of rows, columns of A of columns), a Kronecker product the product of its
    factors' ranks (`(a b) (x) (c d) = (a (x) c)(b (x) d)`).
    """
    if item.magnitude is not None:
        return None
    f = {name: factor.double() for name, factor in item.factors.items() if factor.is_floating_point()}
    if item.kind == PAIR and "A" in f:
        return Split(f["B"].flatten(1), f["A"].flatten(1), item.scale, True)
    if item.kind == PRODUCT:
        return Split(f["B"].flatten(1), through_core(f["mid"], f["A"].flatten(1)), item.scale, True)
    if item.kind == Hadamard.name:
        (a1, b1), (a2, b2) = (_hadamard_side(f, n) for n in "12")
        return Split(_by_rows(a1, a2), _by_rows(b1.T, b2.T).T, item.scale, False)
    if item.kind == Kronecker.name and not item.options.get("trailing"):
        return Split(*_kronecker_pair(f), item.scale, False)
    kind = KINDS.get(item.kind)
    if kind is not None and kind.additive and item.shape is not None and "embedding-A" not in f:
        form = kind.form(_numbers(item), Context(item.shape, item.scale, 1.0, item.options))
        if isinstance(form, Product):
            return Split(form.L, form.R, 1.0, True)
    return None


def _numbers(item: Item) -> dict[str, Tensor]:
    """Factors as formulas take them."""
    return {name: t.double() if t.is_floating_point() else t.long() for name, t in item.factors.items()}


def _hadamard_side(f: Mapping[str, Tensor], n: str) -> Pair:
    if f"t{n}" in f:
        return f[f"w{n}_a"].T, through_core(f[f"t{n}"], f[f"w{n}_b"])
    return f[f"w{n}_a"].flatten(1), f[f"w{n}_b"].flatten(1)


def _by_rows(a: Tensor, b: Tensor) -> Tensor:
    """Row i is the Kronecker product of the rows i: (n, p), (n, q) -> (n, p q)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def _kronecker_pair(f: Mapping[str, Tensor]) -> Pair:
    def split(whole: Tensor) -> Pair:
        rows, cols = whole.shape
        eye = torch.eye(min(rows, cols), dtype=whole.dtype)
        return (whole, eye) if cols <= rows else (eye, whole)

    b1, a1 = split(f["w1"]) if "w1" in f else (f["w1_a"], f["w1_b"])
    if "w2" in f:
        b2, a2 = split(f["w2"].flatten(1))
    elif "t2" in f:
        b2, a2 = f["w2_a"].T, through_core(f["t2"], f["w2_b"])
    else:
        b2, a2 = f["w2_a"].flatten(1), f["w2_b"].flatten(1)
    return torch.kron(b1.contiguous(), b2.contiguous()), torch.kron(a1.contiguous(), a2.contiguous())


def delta_of(item: Item) -> Tensor | None:
    """The whole change of the weight (out, in * prod(kernel)), float64, scale and magnitude in it; None where it needs
    the weight and there is none."""
    kind = KINDS.get(item.kind)
    if kind is None or item.shape is None or "embedding-A" in item.factors:
        return None
    context = Context(item.shape, item.scale, 1.0, item.options)
    factors = _numbers(item)
    form: Form | None
    if item.magnitude is None:
        form = kind.form(factors, context)
    else:
        form = kind.form(factors, inside(context, item.magnitude.style))
        form = dora(form, item.magnitude.vector.double(), context, item.magnitude.axis, item.magnitude.style)
    rows, cols = item.shape[0], prod(item.shape[1:])
    match form:
        case None:
            return torch.zeros(rows, cols, dtype=torch.float64)
        case Product(L, R):
            return L @ R
        case RowDelta(of_rows):
            return of_rows(0, rows)
        case Dense(delta):
            return delta
    if item.weight is None:
        return None
    weight = item.weight()
    if isinstance(form, RowMap):
        return form.apply(weight.clone(), 0) - weight
    assert isinstance(form, WholeMap)
    return form.apply(weight.clone()) - weight


def product_norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of B A without making it: of the small core `R_B R_A^T`."""
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
    return float(torch.linalg.matrix_norm(core))


def truncated(B: Tensor, A: Tensor, rank: int) -> Pair:
    """The best product of this rank to B A (Eckart and Young), from the SVD of its small core; halves of sigma each."""
    qb, rb = torch.linalg.qr(B)
    qa, ra = torch.linalg.qr(A.T)
    u, sigma, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    return qb @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ qa.T


def padded(B: Tensor, A: Tensor, rank: int) -> Pair:
    """The same product with this rank: zero rows of A, zero columns of B."""
    more = rank - A.shape[0]
    return torch.nn.functional.pad(B, (0, more)), torch.nn.functional.pad(A, (0, 0, 0, more))


def low_rank(item: Item, rank: int | None) -> Item | None:
    """The item as a low-rank pair: exactly where its kind is a product of no higher rank (or of any, without `rank`),
    else the nearest of this rank, with its relative error. None where its delta cannot be had.

    New factors have the item's own dtype, and the error is that of what is written. The scale becomes part of them
    where the delta was made whole.
    """
    split = as_pair(item)
    if split is not None:
        pair, scale = (split.B, split.A), split.scale
    else:
        delta = delta_of(item)
        if delta is None or delta.dim() != 2 or rank is None:
            return None
        eye = torch.eye(min(delta.shape), dtype=delta.dtype)
        pair, scale = (eye, delta) if delta.shape[0] < delta.shape[1] else (delta, eye), 1.0
    B, A = pair
    if rank is not None and A.shape[0] > rank:
        B, A = truncated(B, A, min(rank, B.shape[0], A.shape[1]))
        how = "approximated"
    else:
        how = "multiplied"
    shape = item.shape or (B.shape[0], A.shape[1])
    kept = {}
    if "bias" in item.factors:  # scaled as the product is
        bias = item.factors["bias"]
        kept["bias"] = bias if scale == item.scale else (bias.double() * item.scale / scale).to(bias.dtype)
    low_B, low_A = B.to(item.dtype), A.to(item.dtype)
    whole = product_norm(*pair)
    rest = product_norm(torch.cat([pair[0], low_B.double()], 1), torch.cat([pair[1], -low_A.double()]))
    ones = [1] * (len(shape) - 2)
    return replace(
        item,
        kind=PAIR,
        factors={
            "A": low_A.reshape(-1, *shape[1:]).contiguous(),
            "B": low_B.reshape(*low_B.shape, *ones).contiguous(),
            **kept,
        },
        scale=scale,
        magnitude=None,
        options={},
        how=how,
        error=rest / whole if whole else 0.0,
        norm=whole * abs(scale),
    )


def unstacked(B: Tensor, A: Tensor) -> Pair:
    """The pair without the ranks that do nothing: columns of B that are zero, with their rows of A.

    What remains of a block-diagonal pair when rows of B are taken.
    """
    used = B.flatten(1).any(dim=0)
    if bool(used.all()) or not bool(used.any()):
        return B, A
    return B[:, used].contiguous(), A[used].contiguous()
