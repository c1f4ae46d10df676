"""Orthogonal updates on the output side: block-diagonal and butterfly rotations of the rows of a weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Shapes, Unfit, WholeMap

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-8  # both trainers add it to the norm
_SPLITS = tuple(f"blocks.{i}" for i in range(8))


class OutputRotation:
    """`W' = rescale ∘ (λR + (1-λ)I)ᵀ W` by blocks of rows, `R = (I + Q)(I - Q)⁻¹`, `Q = P - Pᵀ` (Qiu et al. 2023).

    `blocks` is P (n, b, b), n b = out. Where it is (m, n, b, b), the `λR_i + (1-λ)I`, *not* transposed, act in turn,
    i = 0..m-1, on rows in butterfly order (Liu et al. 2023): with K = 2ⁱ b/2, rows (c, 2, K) are read as (c, K, 2).
    `blocks.0`, `blocks.1`, ... instead of `blocks` are rotations of successive runs of rows (fused projections).
    `rescale` has one number for each row and no part of λ.

    `alpha` is no scale but a limit: Q is shrunk to the norm `alpha * out` (of all blocks together, `out` being the rows
    of the run) where it is larger. Setting `zero-limit`: `"unlimited"` (the default; LyCORIS 4.1.3,
    functional/diag_oft.py and boft.py), where a limit of 0 is none, or `"none"` (sd-scripts, networks/oft.py and
    oft_flux.py), where it leaves nothing of Q. Without an alpha there is no limit.

    λ = 0 changes nothing, although LyCORIS would still apply `rescale`.
    """

    name: ClassVar[str] = "output-rotation"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("blocks", *_SPLITS, "rescale", "alpha")
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
        runs = _runs(shapes)
        for name in runs:
            _check_blocks(name, shapes[name])
        rows = sum(_rows(shapes[name]) for name in runs)
        if rows != shape[0]:
            raise Unfit(f"the rotations are of {rows} rows, the weight {shape} has {shape[0]}")
        if "rescale" in shapes and prod(shapes["rescale"]) != shape[0]:
            raise Unfit(f"rescale {shapes['rescale']} does not fit the weight {shape}")
        return {"zero-limit": settings.get("zero-limit", "unlimited")}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0:
            return None
        blocks = [factors[name] for name in _runs(factors)]
        rotations = [_blended(P, factors.get("alpha"), context) for P in blocks]
        rescale = factors.get("rescale")
        if rescale is None and all(r is None for r in rotations):
            return None

        def rotate(W: Tensor) -> Tensor:
            row = 0
            for P, rotation in zip(blocks, rotations, strict=True):
                run = W[row : row + _rows(P.shape)]
                row += run.shape[0]
                if rotation is not None:
                    run.copy_(_rotated(run, rotation))
            return W if rescale is None else W.mul_(rescale.reshape(-1, 1))

        return WholeMap(rotate)


def _runs(names: Collection[str]) -> list[str]:
    """The names of the rotations, one for each run of rows."""
    splits = [name for name in _SPLITS if name in names]
    if "blocks" in names:
        if splits:
            raise Unfit("it has both a rotation of all rows and numbered ones")
        return ["blocks"]
    if not splits or splits != list(_SPLITS[: len(splits)]):
        raise Unfit(f"of the numbered rotations there are only {', '.join(splits) or 'none'}")
    return splits


def _rows(blocks: Sequence[int]) -> int:
    return blocks[-3] * blocks[-1]


def _check_blocks(name: str, blocks: tuple[int, ...]) -> None:
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise Unfit(f"{name} {blocks} is no stack of square blocks")
    if len(blocks) == 4 and (blocks[-1] % 2 or blocks[1] % 2 ** (blocks[0] - 1)):
        raise Unfit(f"{name} {blocks} is no butterfly: {blocks[0]} levels over {blocks[1]} blocks of {blocks[-1]}")


def _blended(P: Tensor, alpha: Tensor | None, context: Context) -> Tensor | None:
    """`λR + (1-λ)I` of every block, (n, b, b) or (m, n, b, b); None where it is I."""
    import torch

    Q = _limited(P - P.mT, alpha, _rows(P.shape), context.options["zero-limit"])
    if not Q.any():
        return None
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(eye - Q, eye + Q)  # the two commute
    return R if context.weight == 1 else context.weight * R + (1 - context.weight) * eye


def _limited(Q: Tensor, alpha: Tensor | None, rows: int, rule: str) -> Tensor:
    if alpha is None:
        return Q
    limit, norm = float(alpha) * rows, float(Q.norm())
    if rule == "none":
        return Q * ((min(norm, limit) + _TINY) / (norm + _TINY)) if limit > 0 else Q * 0
    return Q * (limit / (norm + _TINY)) if 0 < limit < norm + _TINY else Q


def _rotated(rows: Tensor, M: Tensor) -> Tensor:
    """Rows (n * b, cols) turned by M."""
    if M.ndim == 3:
        return (M.mT @ rows.reshape(M.shape[0], M.shape[1], -1)).view_as(rows)
    shape, half = rows.shape, M.shape[-1] // 2
    for i, level in enumerate(M):
        K = half << i
        shuffled = rows.reshape(-1, 2, K, shape[1]).transpose(1, 2).reshape(level.shape[0], level.shape[1], -1)
        rows = (level @ shuffled).view(-1, K, 2, shape[1]).transpose(1, 2).reshape(shape)
    return rows
