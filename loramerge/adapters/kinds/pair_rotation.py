"""Rotations of pairs of output channels, each with its own length (RoAd)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Shapes, Unfit
from loramerge.adapters.kinds.partway import whole_map

if TYPE_CHECKING:
    from torch import Tensor


class PairRotation:
    """`W' = c1 ∘ W + c2 ∘ rot(W)` by rows, `c1 = α cos θ`, `c2 = α sin θ`; the bias alike.

    Rows come in groups of g (setting `group-size`), each two halves: rot(W) is (-second half, first half). `angle` θ
    and `length` α have out/2 numbers (one for each pair), out (one for each row), or 2 out: (groups, 2, g), the first
    for c1 and the second for c2. λ ≠ 1 goes a part of the way from W to W'. Liao and Monz 2024; peft 0.21.2,
    tuners/road/layer.py.
    """

    name: ClassVar[str] = "pair-rotation"
    required: ClassVar[tuple[str, ...]] = ("angle", "length")
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
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        g, count = settings.get("group-size"), prod(shapes["angle"])
        if type(g) is not int or g < 2 or g % 2 or shape[0] % g:
            raise Unfit(f"groups of {g!r} for the {shape[0]} rows of the weight {shape}")
        if prod(shapes["length"]) != count:
            raise Unfit(f"angle {shapes['angle']} and length {shapes['length']} are not alike")
        variant = next(
            (v for v, numbers in ((1, shape[0] // 2), (2, shape[0]), (4, 2 * shape[0])) if numbers == count), 0
        )
        if not variant:
            raise Unfit(f"angle {shapes['angle']} does not fit the weight {shape}")
        claimed = settings.get("variant")
        if claimed is not None and not str(claimed).endswith(f"_{variant}"):
            raise Unfit(f"angle {shapes['angle']} is not that of variant {claimed}")
        return {"variant": variant, "group-size": g}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        g = context.options["group-size"]
        angle, length = (_by_row(factors[name], context.options["variant"], g) for name in ("angle", "length"))
        c1, c2 = length[0] * angle[0].cos(), length[1] * angle[1].sin()
        if bool((c1 == 1).all()) and not c2.any():
            return None

        def turn(W: Tensor) -> Tensor:
            halves = W.reshape(-1, 2, g // 2, W.shape[1])
            turned = halves.flip(1)
            turned[:, 0].neg_()
            return (W * c1[:, None]).addcmul_(turned.reshape(W.shape), c2[:, None])

        return whole_map(turn, context.weight)

    @staticmethod
    def bias(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
        return True

    @staticmethod
    def bias_form(factors: Mapping[str, Tensor], context: Context, weight: Callable[[], Tensor]) -> Form | None:
        return PairRotation.form(factors, context)


def _by_row(values: Tensor, variant: int, g: int) -> Tensor:
    """One number a row for c1 and one for c2, (2, out)."""
    import torch

    if variant == 4:
        return values.reshape(-1, 2, g).transpose(0, 1).reshape(2, -1)
    if variant == 1:
        values = values.reshape(-1, 1, g // 2).expand(-1, 2, -1)
    return torch.stack([values.reshape(-1)] * 2)
