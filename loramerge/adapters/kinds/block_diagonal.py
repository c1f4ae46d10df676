"""A low-rank pair of which one side is block-diagonal and stored without its zeros (BD-LoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class BlockDiagonalPair:
    """`W' = W + λ s B A` with A (r, in / n) or B (out, r / n) the n blocks of a block diagonal, one below the other.

    Setting `block-diagonal`: the number n of blocks (`nblocks`), and of which modules A (`target_modules_bd_a`) or B
    (`target_modules_bd_b`) is stored so: any part of their path. peft 0.21.2, tuners/lora/variants.py
    BdLoraLinearVariant.
    """

    name: ClassVar[str] = "block-diagonal"
    required: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["A"][0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None] | None:
        return (shapes["B"][0], None) if shapes["B"] else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        wanted = settings.get("block-diagonal") or {}
        side, n = compact_sides(str(settings.get("module", "")), wanted), wanted.get("nblocks")
        if len(side) != 1:
            raise Unfit("its config names it both for a block-diagonal A and a block-diagonal B")
        if type(n) is not int or n < 1:
            raise Unfit(f"{n!r} blocks")
        A, B = shapes["A"], shapes["B"]
        if len(A) != 2 or len(B) != 2 or len(shape) != 2 or A[0] % n or B[0] % n:
            raise Unfit(f"A {A} and B {B} for {n} blocks and the weight {shape}")
        inner, cols = (A[0], A[1] * n) if side == "A" else (A[0], A[1])
        if (B[0], cols) != shape or B[1] * (n if side == "B" else 1) != inner:
            raise Unfit(f"A {A} and B {B}, of which {side} is {n} blocks, do not fit the weight {shape}")
        return {"side": side, "blocks": n}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        factor = context.scale * context.weight
        if factor == 0 or not all(f.any() for f in factors.values()):
            return None
        side = context.options["side"]
        blocks = factors[side].chunk(context.options["blocks"])
        full = {**factors, side: torch.block_diag(*blocks)}  # type: ignore[no-untyped-call]
        return Product(full["B"] * factor, full["A"])


def compact_sides(module: str, wanted: Mapping[str, Any]) -> str:
    """Which factors of a module the setting `block-diagonal` names as stored compactly: `"A"`, `"B"`, `"AB"`, `""`."""
    return "".join(side for side in "AB" if _names(module, wanted.get(f"target_modules_bd_{side.lower()}")))


def _names(module: str, parts: Sequence[str] | None) -> bool:
    return any(isinstance(part, str) and part in module for part in parts or ())
