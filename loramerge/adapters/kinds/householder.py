"""Chains of Householder reflections on the input side (HRA)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Shapes, Unfit
from loramerge.adapters.kinds.partway import row_map

if TYPE_CHECKING:
    from torch import Tensor


class Reflections:
    """`W' = W (I - 2 u_1 u_1ᵀ) ... (I - 2 u_r u_rᵀ)`, u_i the normalised columns of `u` (in * prod(kernel), r).

    Setting `gram-schmidt`: the columns are made orthogonal first, in their order. λ ≠ 1 goes a part of the way from W
    to W'. Yuan et al. 2024; peft 0.21.2, tuners/hra/layer.py.
    """

    name: ClassVar[str] = "reflections"
    required: ClassVar[tuple[str, ...]] = ("u",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None] | None:
        return (None, shapes["u"][0]) if shapes["u"] else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shapes["u"]) != 2 or shapes["u"][0] != prod(shape[1:]):
            raise Unfit(f"u {shapes['u']} does not fit the weight {shape}")
        return {"gram-schmidt": bool(settings.get("gram-schmidt", False))}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        U = factors["u"]
        if context.options["gram-schmidt"]:
            U = _orthogonal(U)
            # Orthogonal reflections are one map, and independent of their order.
            return row_map(lambda rows, r0: rows - 2 * (rows @ U) @ U.T, context.weight)
        U = U / U.norm(dim=0)

        def reflect(rows: Tensor, r0: int) -> Tensor:
            for u in U.T:
                rows = rows.addr(rows @ u, u, alpha=-2)
            return rows

        return row_map(reflect, context.weight)


def _orthogonal(U: Tensor) -> Tensor:
    """Gram-Schmidt in its modified form, which is what is trained where columns are nearly parallel."""
    import torch

    done: list[Tensor] = []
    for u in U.T:
        for v in done:
            u = u - (v @ u) * v
        done.append(u / u.norm())
    return torch.stack(done, dim=1)
