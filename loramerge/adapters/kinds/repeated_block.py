"""One small block repeated over the weight (MiSS, before it Bone)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowDelta, Shapes, Unfit
from loramerge.adapters.kinds.partway import row_map

if TYPE_CHECKING:
    from torch import Tensor


class RepeatedBlock:
    """`W'[o, c] = W[o, c] + λ block[c mod r, o mod m]`: block (r, m), m = out or a divisor of it.

    A block (out/r, r, r) changes W by itself (setting `init`: `"bat"`): each (r, r) piece of the i-th run of r rows
    becomes `W_b + W_b M_i + M_i`; λ ≠ 1 goes a part of the way. Kang and Yin 2024; peft 0.21.2, tuners/miss/layer.py;
    peft 0.14 to 0.17, tuners/bone/layer.py.
    """

    name: ClassVar[str] = "repeated-block"
    required: ClassVar[tuple[str, ...]] = ("block",)
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
        block = shapes["block"]
        by_weight = settings.get("init") == "bat"
        if by_weight != (len(block) == 3):
            raise Unfit(f"block {block} is not what the initialisation {settings.get('init')!r} makes")
        if len(shape) != 2:
            raise Unfit(f"block {block} for the weight {shape}, which is no matrix")
        if by_weight:
            fits = block[1] == block[2] and block[0] * block[1] == shape[0] and shape[1] % block[1] == 0
        else:
            fits = len(block) == 2 and 0 < block[0] <= shape[1] and shape[0] % block[1] == 0
            if settings.get("init") != "mini":
                fits = fits and block[1] == shape[0]
        if not fits:
            raise Unfit(f"block {block} does not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        block = factors["block"]
        if context.weight == 0 or not block.any():
            return None
        cols, device = context.shape[1], block.device
        if block.ndim == 2:
            repeats = -(-cols // len(block))
            columns = (block.T * context.weight).contiguous()  # (m, r)

            def of_rows(r0: int, r1: int) -> Tensor:
                rows = torch.arange(r0, r1, device=device) % len(columns)
                return columns[rows].repeat(1, repeats)[:, :cols]

            return RowDelta(of_rows)
        r = block.shape[-1]

        def turn(rows: Tensor, r0: int) -> Tensor:
            at = torch.arange(r0, r0 + len(rows), device=device)
            M = block[at // r]  # (rows, r, r)
            pieces = rows.reshape(len(rows), -1, r)
            own = M[torch.arange(len(rows), device=device), at % r]  # row o of its M
            return (pieces + pieces @ M + own[:, None]).reshape(rows.shape)

        return row_map(turn, context.weight)
