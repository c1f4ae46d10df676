"""Block rotations of the input side in butterfly order, with a factor for each row (BOFT, and OFT before its v2)."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, Shapes, Unfit
from loramerge.adapters.kinds.cayley import cayley
from loramerge.adapters.kinds.input_rotation import blockwise
from loramerge.adapters.kinds.partway import row_map

if TYPE_CHECKING:
    from torch import Tensor


class InputButterfly:
    """`W' = rows ∘ (W B_0ᵀ B_1ᵀ ...)`, `B_i = P_i blk(R_i) P_iᵀ`, `R = (I - K)(I + K)⁻¹`, `K = (P - Pᵀ) / 2`.

    `blocks` is P (levels, n, b, b), n b = in * prod(kernel) (Liu et al. 2023; peft 0.21.2, tuners/boft/layer.py). P_i
    sorts within each run of 2ⁱ b columns the chunks of b/2, even ones first; P_0 changes nothing. `rows` has one number
    a row, in any shape; the bias is left alone. λ ≠ 1 goes a part of the way from W to W'.

    Blocks with three axes (n, b, b), or (1, b, b) for all, are one level, OFT of peft 0.14 and 0.15
    (tuners/oft/layer.py there). The setting `coft` shrinks each P to the norm `coft-eps` ⌈out / n⌉² / √(stored blocks);
    without a `block-size` in the config it is the OFT of older releases, which is another.
    """

    name: ClassVar[str] = "input-butterfly"
    required: ClassVar[tuple[str, ...]] = ("blocks",)
    optional: ClassVar[tuple[str, ...]] = ("rows",)
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
        blocks = shapes["blocks"]
        cols = blocks[-3] * blocks[-1] if len(blocks) > 3 or (len(blocks) == 3 and blocks[0] > 1) else None
        return (prod(shapes["rows"]) if "rows" in shapes else None), cols

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        blocks, cols = shapes["blocks"], prod(shape[1:])
        if len(blocks) == 3 and settings.get("block-size") is None:
            raise Refused("without a block size in the config this is an older parametrisation, which no release reads")
        if "rows" not in shapes:
            raise Unfit("it lacks rows")
        if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2] or 0 in blocks:
            raise Unfit(f"blocks {blocks} are no stack of square blocks")
        b = blocks[-1]
        stored = (1, cols // b) if len(blocks) == 3 else (cols // b,)
        if cols % b or blocks[-3] not in stored:
            raise Unfit(f"blocks {blocks} do not fit the {cols} columns of the weight {shape}")
        if len(blocks) == 4 and blocks[0] > 1 and (b % 2 or blocks[1] % 2 ** (blocks[0] - 1)):
            raise Unfit(f"blocks {blocks} are no butterfly: {blocks[0]} levels over {blocks[1]} blocks of {b}")
        if prod(shapes["rows"]) != shape[0]:
            raise Unfit(f"rows {shapes['rows']} do not fit the weight {shape}")
        limit = None
        if len(blocks) == 3 and settings.get("coft"):
            limit = settings.get("coft-eps")
            if not isinstance(limit, int | float):
                raise Unfit(f"COFT with a limit of {limit!r}")
            limit *= ceil(shape[0] / (cols // b)) ** 2 / sqrt(blocks[0])
        return {"limit": limit}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        P, scale = factors["blocks"], factors["rows"].flatten()
        if context.weight == 0:
            return None
        limit = context.options["limit"]
        if limit is not None:
            norms = P.norm(dim=(-2, -1), keepdim=True)
            P = P.where(norms <= limit, P * (limit / norms))
        K = (P - P.mT) / 2
        turns = bool(K.any())
        if not turns and bool((scale == 1).all()):
            return None
        levels = cayley(-K).mT.unsqueeze(0) if K.ndim == 3 else cayley(-K).mT

        def turn(rows: Tensor, r0: int) -> Tensor:
            new = _through(rows, levels) if turns else rows
            return new * scale[r0 : r0 + len(rows), None]

        return row_map(turn, context.weight)


def _through(rows: Tensor, levels: Tensor) -> Tensor:
    """Rows (m, cols) times every level (levels, n, b, b) in turn, each in its butterfly order."""
    b = levels.shape[-1]
    for i, M in enumerate(levels):
        if i == 0:
            rows = blockwise(rows, M)
            continue
        runs = rows.reshape(len(rows), -1, 2, 2**i, b // 2).transpose(2, 3).reshape(rows.shape)
        turned = blockwise(runs, M).reshape(len(rows), -1, 2**i, 2, b // 2)
        rows = turned.transpose(2, 3).reshape(rows.shape)
    return rows
