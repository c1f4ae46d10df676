"""Differences and replacements of whole parameters, weights, biases and norms alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowDelta, RowMap, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class Difference:
    """`W' = W + λ diff`, diff of the parameter's own shape but for axes of length 1. No alpha.

    LyCORIS 4.1.3, modules/full.py (`diff`, `diff_b`) and norms.py (`w_norm`, `b_norm`).
    """

    name: ClassVar[str] = "difference"
    required: ClassVar[tuple[str, ...]] = ("diff",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return _matrix_shape(shapes["diff"])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        _check_whole("diff", shapes["diff"], shape)
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0 or not factors["diff"].any():
            return None
        diff = factors["diff"].reshape(_matrix_shape(context.shape))
        return RowDelta(lambda r0, r1: diff[r0:r1] * context.weight)


class Replacement:
    """`W' = W + λ (value - W)`, for λ = 1 the value itself, bit for bit: value has the parameter's own shape.

    ComfyUI, comfy/lora.py (`set_weight`, which it applies whole whatever the strength).
    """

    name: ClassVar[str] = "replacement"
    required: ClassVar[tuple[str, ...]] = ("value",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return _matrix_shape(shapes["value"])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        _check_whole("value", shapes["value"], shape)
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        value = factors["value"].reshape(_matrix_shape(context.shape))
        if context.weight == 1:
            return RowMap(lambda rows, r0: rows.copy_(value[r0 : r0 + rows.shape[0]]))
        return RowMap(lambda rows, r0: rows.lerp_(value[r0 : r0 + rows.shape[0]], context.weight))


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _check_whole(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if [n for n in stored if n != 1] != [n for n in shape if n != 1]:
        raise Unfit(f"{name} {stored} has not the shape {shape} of the parameter")
