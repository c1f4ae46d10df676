"""An entrywise affine map of a weight and its bias, each part a matrix, a vector or one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Dense, Form, RowMap, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("A", "B", "C", "D", "E")


class EntrywiseAffine:
    """`W' = W + λ (W ∘ A + B)`, bias `b' = b + λ (b ∘ D + E + W C)` (Chavan et al. 2023, as PEFT writes it).

    Each of A, B (out, in) and C (in, 1) is either a product of `X-down` (rows, r) and `X-up` (r, columns), or `X`: a
    column (rows, 1) or one number; D and E are `X`, (out,) or one number. `X-zeros` stands for a part that is zero; one
    of the three is always there. W and b are those before the update. peft 0.21.2, tuners/glora/layer.py. `WeightMap`
    is what LyCORIS calls by the same name.
    """

    name: ClassVar[str] = "entrywise-affine"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = tuple(
        f"{part}{end}" for part in _PARTS for end in ("", "-down", "-up", "-zeros")
    )
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        for part in ("A", "B"):
            if {f"{part}-down", f"{part}-up"} <= shapes.keys():
                return shapes[f"{part}-down"][0], prod(shapes[f"{part}-up"][1:])
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shape) != 2:
            raise Unfit(f"it is for the weight of a linear layer, not for {shape}")
        sizes = {"A": shape, "B": shape, "C": (shape[1], 1), "D": (shape[0], 1), "E": (shape[0], 1)}
        for part, size in sizes.items():
            _check_part(shapes, part, size)
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        A, B = (_part(factors, part, context.weight) for part in ("A", "B"))
        if context.weight == 0 or (A is None and B is None):
            return None

        def apply(rows: Tensor, r0: int) -> Tensor:
            r1 = r0 + len(rows)
            added = None if B is None else B(r0, r1)
            if A is not None:
                rows = rows.addcmul_(rows.clone(), A(r0, r1).expand_as(rows))
            return rows if added is None else rows.add_(added)

        return RowMap(apply)

    @staticmethod
    def bias(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
        return any(name[0] in "CDE" and not name.endswith("-zeros") for name in shapes)

    @staticmethod
    def bias_form(factors: Mapping[str, Tensor], context: Context, weight: Callable[[], Tensor]) -> Form | None:
        C, D, E = (_part(factors, part, context.weight) for part in ("C", "D", "E"))
        if context.weight == 0 or (C is None and D is None and E is None):
            return None
        rows, cols = context.shape
        added = E(0, rows) if E is not None else None
        if C is not None:
            through = weight() @ C(0, cols).expand(cols, 1)
            added = through if added is None else added + through
        if D is None:
            assert added is not None
            return Dense(added.expand(rows, 1).contiguous())
        scale, shift = D(0, rows).expand(rows, 1), added

        def apply(b: Tensor, r0: int) -> Tensor:
            r1 = r0 + len(b)
            moved = b + b * scale[r0:r1]
            return moved if shift is None else moved + shift.expand(rows, 1)[r0:r1]

        return RowMap(apply)


def _check_part(shapes: Shapes, part: str, size: tuple[int, ...]) -> None:
    whole, down, up = (shapes.get(f"{part}{end}") for end in ("", "-down", "-up"))
    if not any(f"{part}{end}" in shapes for end in ("", "-down", "-up", "-zeros")):
        raise Unfit(f"it lacks {part}")
    if whole is not None:
        if down is not None or up is not None:
            raise Unfit(f"it has both {part} and factors of it")
        if prod(whole) not in (1, size[0]):
            raise Unfit(f"{part} {whole} does not fit {size}")
    elif (down is None) != (up is None):
        raise Unfit(f"it has only one of {part}-down and {part}-up")
    elif down and up and (len(down) != 2 or len(up) != 2 or down[1] != up[0] or (down[0], up[1]) != size):
        raise Unfit(f"{part}-down {down} and {part}-up {up} do not fit {size}")


def _part(factors: Mapping[str, Tensor], part: str, weight: float) -> Callable[[int, int], Tensor] | None:
    """Rows of one part times λ, (r1 - r0 or 1, columns or 1); None where it is zero."""
    if part in factors:
        whole = factors[part].reshape(-1, 1) * weight
        if not whole.any():
            return None
        return lambda r0, r1: whole if len(whole) == 1 else whole[r0:r1]
    if f"{part}-down" not in factors:
        return None
    down, up = factors[f"{part}-down"] * weight, factors[f"{part}-up"]
    if not (down.any() and up.any()):
        return None
    return lambda r0, r1: down[r0:r1] @ up
