"""Tucker (CP) factors of convolutions: a core with the kernel axes between an outer and an inner factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


def same_kernel(stored: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether kernel axes are the same but for axes of length 1, which some trainers append."""
    return [k for k in stored if k != 1] == [k for k in kernel if k != 1]


def check_matrices(shapes: Shapes, *names: str) -> None:
    """
    Raises:
        Unfit: one of these factors, where it is there, has fewer than two axes.
    """
    for name in names:
        if name in shapes and len(shapes[name]) < 2:
            raise Unfit(f"{name} {shapes[name]} is no matrix")


def through_core(core: Tensor, inner: Tensor) -> Tensor:
    """`R[i, (c, k...)] = sum_j core[i, j, k...] inner[j, c]`: core (r, r', *kernel), inner (r', in) -> (r, in * prod).

    With it a Tucker product is an ordinary one: outer (out, r) times R.
    """
    import torch

    return torch.einsum("ij...,jc->ic...", core, inner).flatten(1)


class Tucker:
    """`W' = W + λ s ΔW`, `ΔW[o, c, k...] = sum_ij B[o, i] mid[i, j, k...] A[j, c]`.

    A (r, in, 1...), B (out, r, 1...), mid (r, r, *kernel), a convolution between two of kernel 1 (Yeh et al. 2023).
    LyCORIS 4.1.3, modules/locon.py with `use_tucker`; functional/general.py tucker_weight_from_conv.
    """

    name: ClassVar[str] = "tucker"
    required: ClassVar[tuple[str, ...]] = ("A", "B", "mid")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["A"][0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        A, B, mid = shapes["A"], shapes["B"], shapes["mid"]
        return (B[0], prod(A[1:]) * prod(mid[2:])) if A and B else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        check_matrices(shapes, "A", "B", "mid")
        A, B, mid = shapes["A"], shapes["B"], shapes["mid"]
        if mid[:2] != (prod(B[1:]), A[0]):
            raise Unfit(f"mid {mid} does not fit between B {B} and A {A}")
        if (B[0], prod(A[1:])) != shape[:2] or not same_kernel(mid[2:], shape[2:]):
            raise Unfit(f"A {A}, mid {mid} and B {B} do not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        A, B, mid = factors["A"], factors["B"], factors["mid"]
        factor = context.scale * context.weight
        if factor == 0 or not (A.any() and B.any() and mid.any()):
            return None
        return Product(B.flatten(1) * factor, through_core(mid, A.flatten(1)))
