"""Generalised LoRA as LyCORIS writes it: a low-rank map of the weight itself beside a low-rank addition."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, RowMap, Shapes, Unfit
from loramerge.adapters.kinds.tucker import check_matrices, same_kernel, through_core

if TYPE_CHECKING:
    from torch import Tensor

_SWAPPED = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}


class WeightMap:
    """`W' = W + λ s (W a1 a2 + b1 b2)`: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, *kernel) (Chavan et al. 2023).

    On a convolution a1 a2 acts on the input channels. With `bm` (r, r, *kernel) the addition is a Tucker product and b2
    is (r, in). LyCORIS 4.1.3, modules/glora.py. Files of its early releases exchange 1 and 2 in the names,
    `W a2 a1 + b2 b1`, which only shapes tell; where all are r x r they do not, and the setting `factor-order`
    (`"new"` or `"old"`) must.
    """

    name: ClassVar[str] = "weight-map"
    required: ClassVar[tuple[str, ...]] = ("a1", "a2", "b1", "b2")
    optional: ClassVar[tuple[str, ...]] = ("bm",)
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        layouts = _layouts(shapes)
        # Where both readings are possible the rank is the shorter side; `options` holds it against the weight.
        return min((_named(shapes, old)["a2"][0] for old in layouts), default=None)

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        check_matrices(shapes, *WeightMap.required, *WeightMap.optional)
        fitting = [old for old in _layouts(shapes) if _fits(_named(shapes, old), shape, old)]
        if len(fitting) == 2:
            asked = settings.get("factor-order")
            if asked not in ("old", "new"):
                raise Refused("a1, a2, b1 and b2 are all square, so the order that they are multiplied in is not known")
            fitting = [asked == "old"]
        if not fitting:
            held = ", ".join(f"{name} {shapes[name]}" for name in ("a1", "a2", "b1", "b2", "bm") if name in shapes)
            raise Unfit(f"{held} do not fit the weight {shape}")
        if _named(shapes, fitting[0])["a2"][0] != WeightMap.rank(shapes):
            raise Refused("its rank is larger than the weight, so alpha / rank cannot be told")
        return {"old": fitting[0]}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        factor = context.scale * context.weight
        named = factors
        if context.options.get("old"):
            named = {_SWAPPED.get(name, name): tensor for name, tensor in factors.items()}
        a1, a2, b1, b2 = (named[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        maps, adds = bool(a1.any() and a2.any()), bool(b1.any() and b2.any())
        if factor == 0 or not (maps or adds):
            return None
        if "bm" in named:
            b2 = through_core(named["bm"], b2)
        a1, b1 = a1 * factor, b1 * factor

        def apply(rows: Tensor, r0: int) -> Tensor:
            mapped = _through_channels(rows, a1, a2) if maps else None
            if adds:
                rows = rows.addmm_(b1[r0 : r0 + rows.shape[0]], b2)
            return rows if mapped is None else rows.add_(mapped)

        return RowMap(apply)


def _named(shapes: Shapes, old: bool) -> Shapes:
    return {_SWAPPED.get(name, name): shape for name, shape in shapes.items()} if old else shapes


def _layouts(shapes: Shapes) -> list[bool]:
    """Which layouts the factors fit among themselves: False is the new one, True the old one."""
    found = []
    for old in (False, True):
        s = _named(shapes, old)
        r, core = s["a2"][0], s.get("bm")
        ranks = (prod(s["a1"][1:]), prod(s["b1"][1:]), s["b2"][0])
        channels = prod(s["a2"][1:])
        if ranks == (r, r, r) and s["a1"][0] == channels and (core is None or core[:2] == (r, r)):
            found.append(old)
    return found


def _fits(s: Shapes, shape: tuple[int, ...], old: bool) -> bool:
    cols = prod(shape[1:])
    channels = cols if old or len(shape) == 1 else shape[1]
    if s["a1"][0] != channels or s["b1"][0] != shape[0]:
        return False
    if "bm" in s:
        return s["b2"][1] == channels and same_kernel(s["bm"][2:], shape[2:])
    return prod(s["b2"][1:]) == cols


def _through_channels(rows: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """`W a1 a2` over the input channels of rows (n, in * prod(kernel)); a1 (in, r), a2 (r, in)."""
    if rows.shape[1] == a1.shape[0]:
        return rows @ a1 @ a2
    by_channel = rows.reshape(rows.shape[0], a1.shape[0], -1).mT
    return (by_channel @ a1 @ a2).mT.reshape(rows.shape)
