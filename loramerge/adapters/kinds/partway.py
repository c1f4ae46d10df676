"""The user's weight on updates that map a weight to another, and on their streaming over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loramerge.adapters.kinds.base import RowMap, WholeMap

if TYPE_CHECKING:
    from torch import Tensor


def row_map(turn: Callable[[Tensor, int], Tensor], weight: float) -> RowMap:
    """`W' = W + λ (f(W) - W)` by rows: `turn(rows, r0)` -> f of these rows, which it must leave as they are."""
    if weight == 1:
        return RowMap(turn)
    return RowMap(lambda rows, r0: rows.lerp(turn(rows, r0), weight))


def whole_map(turn: Callable[[Tensor], Tensor], weight: float) -> WholeMap:
    """The same for an f that must see the whole of W."""
    if weight == 1:
        return WholeMap(turn)
    return WholeMap(lambda W: W.lerp(turn(W), weight))
