"""A rotation within the largest singular components of the weight (PSOFT)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, Shapes, Unfit
from loramerge.adapters.kinds.cayley import block_size, cayley, cayley_series, skew
from loramerge.adapters.kinds.partway import whole_map

if TYPE_CHECKING:
    from torch import Tensor


class PrincipalRotation:
    """`W' = W + U S (R - I) Vᵀ` with U S Vᵀ the r largest singular components of W; λ ≠ 1 goes a part of the way.

    `R = diag(b) R₀ diag(a)`, b and a (r) or absent, R₀ `(I + Q)(I - Q)⁻¹` of the skew-symmetric Q with the upper
    triangle `rotation` (r(r-1)/2), or with the setting `neumann` its series; or `rotation` (r, r) itself. Setting
    `neumann-limit` shrinks Q to that norm before the series. Setting `split`: `"pissa_init"` takes
    √S (R - I) √S for S (R - I). alpha and rank cancel out.

    The signs of U and V enter, which a library chooses freely: like the trainer on loading, this takes those of
    `torch.linalg.svd` in float32. Setting `svd` other than `"full"`: a random projection, which differs from device to
    device. peft 0.21.2, tuners/psoft/layer.py.
    """

    name: ClassVar[str] = "principal-rotation"
    required: ClassVar[tuple[str, ...]] = ("rotation",)
    optional: ClassVar[tuple[str, ...]] = ("a", "b")
    may_be_empty: ClassVar[tuple[str, ...]] = ("rotation",)  # of rank 1, which has no triangle
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        stored = shapes["rotation"]
        if len(stored) == 2 and stored[0] == stored[1]:
            r = stored[0]
        elif len(stored) == 1:
            r = block_size(stored[0])
        else:
            raise Unfit(f"rotation {stored} is neither a square matrix nor the upper triangle of one")
        if settings.get("rank", r) != r:
            raise Unfit(f"rotation {stored} is of rank {r}, the config says {settings['rank']}")
        if len(shape) != 2 or r > min(shape):
            raise Unfit(f"a rotation of rank {r} for the weight {shape}")
        if any(prod(shapes[name]) != r for name in ("a", "b") if name in shapes):
            raise Unfit(f"a and b do not have the rank {r} of the rotation")
        if settings.get("svd", "full") != "full":
            raise Refused("the base's singular vectors came from a random projection, which is not in the file")
        split = settings.get("split", "psoft_init")
        if split not in ("psoft_init", "pissa_init"):
            raise Unfit(f"the way {split!r} to split the weight is not known")
        terms = settings.get("neumann-terms", 5) if settings.get("neumann", False) else None
        if terms is not None and (type(terms) is not int or not 0 < terms <= 1000):
            raise Unfit(f"a series of {terms!r} terms")
        return {"rank": r, "even": split == "pissa_init", "terms": terms, "limit": settings.get("neumann-limit")}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        if context.weight == 0:
            return None
        r = context.options["rank"]
        R = _rotation(factors["rotation"], context.options)
        if "b" in factors:
            R = factors["b"].view(-1, 1) * R
        if "a" in factors:
            R = R * factors["a"].view(1, -1)
        change = R - torch.eye(r, dtype=R.dtype, device=R.device)
        if not change.any():
            return None

        def turn(W: Tensor) -> Tensor:
            U, S, Vt = (part.to(W.dtype) for part in torch.linalg.svd(W.float(), full_matrices=False))
            U, S, Vt = U[:, :r], S[:r], Vt[:r]
            if context.options["even"]:
                return W.addmm(U * S.sqrt() @ change, S.sqrt()[:, None] * Vt)
            return W.addmm(U * S @ change, Vt)

        return whole_map(turn, context.weight)


def _rotation(stored: Tensor, options: Mapping[str, Any]) -> Tensor:
    if stored.ndim == 2:
        return stored
    Q = skew(stored, options["rank"])
    if options["terms"] is None:
        return cayley(Q)
    norm = float(Q.norm())
    if options["limit"] is not None and norm > options["limit"]:
        Q = Q * (options["limit"] / (norm + 1e-12))
    return cayley_series(Q, options["terms"])
