"""IA3 stored as what is added to a factor of one, as LyCORIS writes it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowMap, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class SignedScaling:
    """`W' = W ∘ (1 + λ w)`: w (out) for each row, or (in) for each input channel where `on_input` holds 1.

    The bias is left alone. LyCORIS 4.1.3, modules/ia3.py; Liu et al. 2022. w may have axes of length 1.
    """

    name: ClassVar[str] = "signed-scaling"
    required: ClassVar[tuple[str, ...]] = ("w", "on_input")
    optional: ClassVar[tuple[str, ...]] = ()
    integers: ClassVar[tuple[str, ...]] = ("on_input",)
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
        if prod(shapes["w"]) not in shape[:2]:
            raise Unfit(f"w {shapes['w']} is neither the rows nor the input channels of the weight {shape}")
        if prod(shapes["on_input"]) != 1:
            raise Unfit(f"on_input {shapes['on_input']} is not one number")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        """
        Raises:
            Unfit: `on_input`, which only its value tells, names the axis that w does not have the length of.
        """
        w, on_input = factors["w"].flatten(), bool(factors["on_input"].any())
        channels = context.shape[1] if on_input else context.shape[0]
        if len(w) != channels:
            raise Unfit(f"w has {len(w)} elements, on_input asks for {channels}")
        if context.weight == 0 or not w.any():
            return None
        factor = 1 + context.weight * w
        if on_input:
            columns = factor.repeat_interleave(prod(context.shape[2:]))
            return RowMap(lambda rows, r0: rows.mul_(columns))
        return RowMap(lambda rows, r0: rows.mul_(factor[r0 : r0 + rows.shape[0], None]))
