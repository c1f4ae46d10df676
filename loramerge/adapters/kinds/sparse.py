"""Sparse updates: trained numbers at fixed places of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowDelta, Shapes, Unfit
from loramerge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class SparseEntries:
    """`W'[i, j] = W[i, j] + λ v` at the places of `indices`, beside them perhaps a pair: `+ λ (alpha / r) B A`.

    `values` (n,); `indices` (2, n), rows and columns, or (n,), places in the flattened weight. Values at one place add.
    A (r, in), B (out, r), setting `alpha`. n is `rank` (in + out) in the first case, out in (1 - `sparsity`) in the
    other. Bhardwaj et al. 2024 (SHiRA); peft 0.21.2, tuners/shira/layer.py and tuners/supertuning/layer.py.
    """

    name: ClassVar[str] = "sparse-entries"
    required: ClassVar[tuple[str, ...]] = ("values", "indices")
    optional: ClassVar[tuple[str, ...]] = ("A", "B")
    integers: ClassVar[tuple[str, ...]] = ("indices",)
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return (shapes["B"][0], prod(shapes["A"][1:])) if {"A", "B"} <= shapes.keys() else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        values, indices = shapes["values"], shapes["indices"]
        if len(values) != 1 or indices not in (values, (2, *values)):
            raise Unfit(f"values {values} and indices {indices} do not fit one another")
        count = _count(indices, settings, shape)
        if count not in (None, values[0]):
            raise Unfit(f"for a weight {shape} there should be {count} values, there are {values[0]}")
        if ("A" in shapes) != ("B" in shapes):
            raise Unfit("it has only one of the factors A and B")
        if "A" not in shapes:
            return {}
        A, B = shapes["A"], shapes["B"]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (B[0], A[1]) != shape:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        if settings.get("alpha") is None:
            raise Unfit("it has factors A and B, and the config does not say alpha")
        return {"scale": float(settings["alpha"]) / A[0]}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        values, indices = factors["values"] * context.weight, factors["indices"]
        pair = "A" in factors and bool(factors["A"].any() and factors["B"].any())
        if context.weight == 0 or not (values.any() or pair):
            return None
        rows, cols = context.shape[0], prod(context.shape[1:])
        if indices.ndim == 2:
            at = check_range(indices[0], rows) * cols + check_range(indices[1], cols)
        else:
            at = check_range(indices, rows * cols)
        order = at.argsort(stable=True)
        at, values = at[order], values[order]
        left = factors["B"] * (context.options["scale"] * context.weight) if pair else None

        def delta(r0: int, r1: int) -> Tensor:
            first, last = (int(torch.searchsorted(at, r * cols)) for r in (r0, r1))
            if left is None:
                block = torch.zeros(r1 - r0, cols, dtype=values.dtype, device=values.device)
            else:
                block = left[r0:r1] @ factors["A"]
            block.view(-1).index_add_(0, at[first:last] - r0 * cols, values[first:last])
            return block

        return RowDelta(delta)


def _count(indices: tuple[int, ...], settings: Mapping[str, Any], shape: tuple[int, ...]) -> int | None:
    """How many values a weight of this shape has by the settings, where they say it: only this tells its size."""
    if len(indices) == 2:
        rank = settings.get("rank")
        return None if rank is None else int(rank) * (shape[0] + prod(shape[1:]))
    sparsity = settings.get("sparsity")
    return None if sparsity is None else int(prod(shape) * (1 - sparsity))


def check_range(indices: Tensor, limit: int) -> Tensor:
    """The indices as whole numbers, all of them in [0, limit). Some systems write them as floats.

    Raises:
        InputError: `adapter.indices`.
    """
    indices = indices.long()
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
        raise InputError("adapter.indices", f"it has an index that is not within the {limit} that there are")
    return indices
