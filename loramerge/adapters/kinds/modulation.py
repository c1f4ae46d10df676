"""A low-rank pair that multiplies the weight element by element (HiRA)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowMap, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class Modulation:
    """`W' = W + λ W ∘ (B A)`: A (r, in, *kernel), B (out, r, 1...), no other scale.

    An embedding (num, dim) has `embedding-A` (r, num) and `embedding-B` (dim, r): `W' = W + λ W ∘ (B A)ᵀ`. Huang et al.
    2025; peft 0.21.2, tuners/hira/layer.py.
    """

    name: ClassVar[str] = "modulation"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("A", "B", "embedding-A", "embedding-B")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        A, B = shapes.get("A", ()), shapes.get("B", ())
        return (B[0], prod(A[1:])) if len(A) > 1 and len(B) > 1 else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        pairs = [p for p in (("A", "B"), ("embedding-A", "embedding-B")) if p[0] in shapes or p[1] in shapes]
        if len(pairs) != 1 or not all(name in shapes for name in pairs[0]):
            raise Unfit(f"{', '.join(shapes) or 'nothing'} is not one pair")
        A, B = (shapes[name] for name in pairs[0])
        if len(A) < 2 or len(B) < 2 or A[0] != prod(B[1:]):
            raise Unfit(f"A {A} and B {B} have no rank in common")
        fits = (A[1], B[0]) == shape if pairs[0][0] != "A" else (B[0], prod(A[1:])) == (shape[0], prod(shape[1:]))
        if not fits:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0 or not all(f.any() for f in factors.values()):
            return None
        if "A" in factors:
            L, R = factors["B"].flatten(1), factors["A"].flatten(1)
        else:
            L, R = factors["embedding-A"].T, factors["embedding-B"].T
        L = L * context.weight
        return RowMap(lambda rows, r0: rows.addcmul_(rows, L[r0 : r0 + len(rows)] @ R))
