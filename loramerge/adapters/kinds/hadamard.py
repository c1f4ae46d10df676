"""The elementwise product of two low-rank matrices (LoHa)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowDelta, Shapes, Unfit
from loramerge.adapters.kinds.tucker import check_matrices, same_kernel, through_core

if TYPE_CHECKING:
    from torch import Tensor


class Hadamard:
    """`W' = W + λ s (w1_a w1_b) ∘ (w2_a w2_b)`: w_a (out, r), w_b (r, in * prod(kernel)) (Hyeon-Woo et al. 2021).

    With cores t1, t2 (r, r, *kernel) both products are Tucker ones and w_a is (r, out), w_b (r, in):
    LyCORIS 4.1.3, functional/loha.py; peft 0.21.2, tuners/loha/layer.py (a 1-D kernel k is stored as (k, 1) there).
    """

    name: ClassVar[str] = "hadamard"
    required: ClassVar[tuple[str, ...]] = ("w1_a", "w1_b", "w2_a", "w2_b")
    optional: ClassVar[tuple[str, ...]] = ("t1", "t2")
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["w1_b"][0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        a, b = shapes["w1_a"], shapes["w1_b"]
        if len(a) < 2 or len(b) < 2:
            return None
        return (a[1], b[1] * prod(shapes["t1"][2:])) if "t1" in shapes else (a[0], prod(b[1:]))

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        if ("t1" in shapes) != ("t2" in shapes):
            raise Unfit("it has only one of the cores t1 and t2")
        check_matrices(shapes, *Hadamard.required, *Hadamard.optional)
        for n in ("1", "2"):
            _check_product(shapes, n, shape)
        if shapes["w1_b"][0] != shapes["w2_b"][0]:
            raise Unfit(f"w1_b has rank {shapes['w1_b'][0]}, w2_b has rank {shapes['w2_b'][0]}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        factor = context.scale * context.weight
        if factor == 0 or not all(f.any() for f in factors.values()):
            return None
        left1, right1 = _product(factors, "1")
        left2, right2 = _product(factors, "2")
        left1 = left1 * factor
        return RowDelta(lambda r0, r1: (left1[r0:r1] @ right1).mul_(left2[r0:r1] @ right2))


def _check_product(shapes: Shapes, n: str, shape: tuple[int, ...]) -> None:
    a, b, core = shapes[f"w{n}_a"], shapes[f"w{n}_b"], shapes.get(f"t{n}")
    if core is None:
        joins = prod(a[1:]) == b[0]
        fits = (a[0], prod(b[1:])) == (shape[0], prod(shape[1:]))
    else:
        joins = core[:2] == (a[0], b[0])
        fits = (*a[1:], *b[1:]) == shape[:2] and same_kernel(core[2:], shape[2:])
    if not joins:
        raise Unfit(f"w{n}_a {a} and w{n}_b {b} have no rank in common" + (f" with t{n} {core}" if core else ""))
    if not fits:
        raise Unfit(f"w{n}_a {a} and w{n}_b {b} do not fit the weight {shape}")


def _product(factors: Mapping[str, Tensor], n: str) -> tuple[Tensor, Tensor]:
    """One of the two matrices as (out, r) and (r, cols)."""
    a, b = factors[f"w{n}_a"], factors[f"w{n}_b"]
    if f"t{n}" in factors:
        return a.T, through_core(factors[f"t{n}"], b)
    return a.flatten(1), b.flatten(1)
