"""A low-rank pair whose components have a bounded norm (DeLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-4  # norms below it count as this


class BoundedPair:
    """`W' = W + λ (bound / r) Σ_i b_i a_i / (‖b_i‖ ‖a_i‖) ∘ norms`: a_i rows of A (r, in), b_i columns of B (out, r).

    `bound` is one number, `norms` (in) those of the columns of W when training began. Bini et al. 2025; peft 0.21.2,
    tuners/delora/layer.py.
    """

    name: ClassVar[str] = "bounded-low-rank"
    required: ClassVar[tuple[str, ...]] = ("A", "B", "bound", "norms")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        A, B = shapes["A"], shapes["B"]
        return (B[0], A[1]) if len(A) == len(B) == 2 else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B = shapes["A"], shapes["B"]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (B[0], A[1]) != shape:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        if prod(shapes["bound"]) != 1 or prod(shapes["norms"]) != shape[1]:
            raise Unfit(f"bound {shapes['bound']} and norms {shapes['norms']} do not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        A, B, bound, norms = factors["A"], factors["B"], factors["bound"].flatten(), factors["norms"].flatten()
        if context.weight == 0 or not (A.any() and B.any() and bound.any()):
            return None
        lengths = A.norm(dim=1).clamp(min=_LEAST) * B.norm(dim=0).clamp(min=_LEAST)
        return Product(B * (context.weight / len(A) * bound / lengths), A * norms)
