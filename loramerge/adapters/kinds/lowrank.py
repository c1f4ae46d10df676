"""The low-rank pair as a kind, for views and magnitudes that the streaming `LowRank` update does not cover."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class LowRankPair:
    """`W' = W + λ s B A`: A (r, in, *kernel), B (out, r, 1...) (Hu et al. 2021, equation 3).

    Convolutions flatten: `fl(B) fl(A)` is (out, in * prod(kernel)).
    """

    name: ClassVar[str] = "low-rank"
    required: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["A"][0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return shapes["B"][0], prod(shapes["A"][1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B = shapes["A"], shapes["B"]
        if A[0] != prod(B[1:]):
            raise Unfit(f"A {A} has rank {A[0]}, B {B} has rank {prod(B[1:])}")
        if (B[0], prod(A[1:])) != (shape[0], prod(shape[1:])):
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        A, B = factors["A"], factors["B"]
        if context.scale * context.weight == 0 or not (A.any() and B.any()):
            return None
        return Product(B.reshape(B.shape[0], -1) * (context.scale * context.weight), A.reshape(A.shape[0], -1))
