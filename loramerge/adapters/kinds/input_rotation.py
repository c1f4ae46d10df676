"""Block-diagonal rotations on the input side, kept as the upper triangles of skew-symmetric matrices (OFT v2)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, Shapes, Unfit
from loramerge.adapters.kinds.cayley import block_size, cayley, cayley_series, skew
from loramerge.adapters.kinds.partway import row_map
from loramerge.adapters.kinds.versions import older

if TYPE_CHECKING:
    from torch import Tensor


class InputRotation:
    """`W' = W blk(R)ᵀ`, R_i from Q_i, the skew-symmetric (b, b) matrix with the upper triangle `skew[i]` (Qiu 2023).

    `skew` is (n, b(b-1)/2) with n b = in * prod(kernel), or n = 1 for the same block everywhere. λ ≠ 1 goes a part of
    the way from W to W'. R is `(I - Q)(I + Q)⁻¹`, or with the setting `neumann` the series `cayley_series(Q, N)`,
    N = `neumann-terms`, whose Q has the other sign: both are what is trained. Before the release
    `full-tail-before` (or without a `version`, where that setting is there) the series ends otherwise. `coft` first
    shrinks each Q to the norm `coft-eps` / √n. Source: peft 0.21.2, 0.17.1, 0.16.0, tuners/oft/layer.py.

    An embedding (num, dim) has `embedding-skew` and `W' = W blk(R)`.

    A flag `scaled` divides Q by 2 √(b-1) (OneTrainer, modules/module/oft_utils.py, "Scaled OFT").

    Convolutions: OneTrainer trains `W' = W blk(R)` (modules/module/LoRAModule.py OFTModule; setting
    `turned-convolutions`). peft 0.16 to 0.21.2 rotates patches of the input and adds them up where they overlap, which
    for a kernel of 1 is a linear layer and for larger ones the work of no convolution: refused.
    """

    name: ClassVar[str] = "input-rotation"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("skew", "embedding-skew", "scaled")
    integers: ClassVar[tuple[str, ...]] = ("scaled",)
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
        upper = shapes.get("skew", ())
        if len(upper) != 2 or upper[0] == 1:
            return None
        try:
            return None, upper[0] * block_size(upper[1])
        except Unfit:
            return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        names = [name for name in ("skew", "embedding-skew") if name in shapes]
        if len(names) != 1:
            raise Unfit(f"it has {' and '.join(names) or 'neither skew nor embedding-skew'}")
        n, b = _blocks(names[0], shapes[names[0]], shape)
        turned = names[0] == "embedding-skew"
        if turned and len(shape) != 2:
            raise Unfit(f"embedding-skew for the weight {shape}")
        if len(shape) > 2:
            turned = bool(settings.get("turned-convolutions", False))
            if not turned and prod(shape[2:]) > 1:
                raise Refused(
                    "on a kernel larger than 1 its training adds up rotated patches where they overlap, "
                    "which no convolution's weight does"
                )
        terms = settings.get("neumann-terms", 5) if settings.get("neumann", False) else None
        if terms is not None and (type(terms) is not int or not 0 < terms <= 1000):
            raise Unfit(f"a series of {terms!r} terms")
        limit = settings.get("coft-eps") if settings.get("coft") else None
        if settings.get("coft") and not isinstance(limit, int | float):
            raise Unfit(f"COFT with a limit of {limit!r}")
        first = settings.get("full-tail-before")
        return {
            "block": b,
            "turned": turned,
            "terms": terms,
            "full-tail": first is not None and older(settings.get("version"), first, unknown=True),
            "limit": None if limit is None else limit / sqrt(n),
            "divisor": 2 * sqrt(b - 1) if "scaled" in shapes else 1.0,
        }

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        upper = factors["skew"] if "skew" in factors else factors["embedding-skew"]
        if context.weight == 0 or not upper.any():
            return None
        b = context.options["block"]
        R = rotation(skew(upper, b), context.options)
        M = R if context.options["turned"] else R.mT

        def turn(rows: Tensor, r0: int) -> Tensor:
            return blockwise(rows, M)

        return row_map(turn, context.weight)


def _blocks(name: str, upper: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """(stored blocks, their size)."""
    if len(upper) != 2 or len(shape) < 2:
        raise Unfit(f"{name} {upper} for the weight {shape}")
    b = block_size(upper[1])
    cols = prod(shape[1:])
    if cols % b or upper[0] not in (1, cols // b):
        raise Unfit(f"{name} {upper}, blocks of {b}, do not fit the {cols} columns of the weight {shape}")
    if b == 1:
        raise Unfit(f"{name} {upper} has blocks of 1, which turn nothing")
    return upper[0], b


def rotation(Q: Tensor, options: Mapping[str, Any]) -> Tensor:
    """R of every block, (n, b, b)."""
    if options["limit"] is not None:
        norms = Q.norm(dim=(1, 2), keepdim=True)
        Q = Q.where(norms <= options["limit"], Q * (options["limit"] / norms))
    Q = Q / options["divisor"]
    if options["terms"] is None:
        return cayley(-Q)
    return cayley_series(Q, options["terms"], options["full-tail"])


def blockwise(rows: Tensor, M: Tensor) -> Tensor:
    """Rows (m, n * b) times the block diagonal of M (n or 1, b, b)."""
    parts = rows.reshape(len(rows), -1, M.shape[-1])
    if len(M) == 1:
        return (parts @ M[0]).reshape(rows.shape)
    return (parts.transpose(0, 1) @ M).transpose(0, 1).reshape(rows.shape)
