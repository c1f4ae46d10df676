"""A learned factor for each output or input channel (IA3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowMap, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class ChannelScaling:
    """`W' = W ∘ (1 + λ (l - 1))`: l one factor for each row, then of the bias too, or for each input channel.

    Linears: l (out, 1) or (1, in). Convolutions: (1, channels, 1...), the input's where the setting `feedforward` names
    the module (equal to the path or its end; a text is a pattern for all of it) and the output's elsewhere. A grouped
    convolution has the input channels of all groups in l. Liu et al. 2022; peft 0.21.2, tuners/ia3/{layer,model}.py.
    """

    name: ClassVar[str] = "channel-scaling"
    required: ClassVar[tuple[str, ...]] = ("l",)
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
        scales = shapes["l"]
        if len(scales) != 2 or scales == (1, 1) or 1 not in scales:
            return None
        return (scales[0], None) if scales[1] == 1 else (None, scales[1])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        scales = shapes["l"]
        count = prod(scales)
        on_input = _is_named(settings.get("feedforward"), str(settings.get("module", "")))
        if len(scales) == len(shape) == 2 and scales in ((shape[0], 1), (1, shape[1])) and shape != (1, 1):
            on_input = scales != (shape[0], 1)
        groups = count // shape[1] if len(shape) > 2 and on_input and count % shape[1] == 0 else 1
        fits = groups * shape[1] if on_input else shape[0]
        if count != fits or max(scales, default=0) != count or groups == 0 or shape[0] % groups:
            side = "input" if on_input else "output"
            raise Unfit(f"l {scales} does not fit the {side} channels of the weight {shape}")
        return {"input": on_input, "groups": groups}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        scales = factors["l"].flatten()
        if context.weight == 0 or bool((scales == 1).all()):
            return None
        factor = 1 + context.weight * (scales - 1)
        if not context.options["input"]:
            return RowMap(lambda rows, r0: rows.mul_(factor[r0 : r0 + len(rows), None]))
        return RowMap(_by_input(factor.view(context.options["groups"], -1), context.shape))

    @staticmethod
    def bias(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
        return not ChannelScaling.options(shapes, settings, shape)["input"]

    @staticmethod
    def bias_form(factors: Mapping[str, Tensor], context: Context, weight: Callable[[], Tensor]) -> Form | None:
        return ChannelScaling.form(factors, context)


def _by_input(factor: Tensor, shape: tuple[int, ...]) -> Callable[[Tensor, int], Tensor]:
    """Multiplies the input channels of rows; factor (groups, in per group)."""
    import torch

    columns = factor.repeat_interleave(prod(shape[2:]), dim=1)
    if len(columns) == 1:
        return lambda rows, r0: rows.mul_(columns)
    in_group = shape[0] // len(columns)

    def multiply(rows: Tensor, r0: int) -> Tensor:
        group = torch.arange(r0, r0 + len(rows), device=rows.device) // in_group
        return rows.mul_(columns[group])

    return multiply


def _is_named(wanted: Any, module: str) -> bool:
    """Whether a list of ends of paths, or one pattern of whole paths, names a module."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, module) is not None
        except re.error as error:
            raise Unfit(f"the pattern {wanted!r} of feedforward modules is broken: {error}") from None
    if wanted is None:
        return False
    if not isinstance(wanted, list | tuple):
        raise Unfit(f"feedforward modules {wanted!r} are no list of names")
    return any(isinstance(end, str) and module.endswith(end) for end in wanted)
