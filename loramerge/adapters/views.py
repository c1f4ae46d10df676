"""Views: what one adapter module sees of a base, as rectangles of stored tensors. Plain data.

A module's weight `W` is (out, in) or (out, in, *kernel), flattened to (out, in * prod(kernel)). Its rows may lie in
several stored tensors, in a part of one, in another order or as columns; a view says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a stored tensor that an update acts on.

    `rows` rows of `cols` elements from element `begin` on; of each row the columns `c0`, `c0 + step`, ... below `c1`.
    """

    begin: int
    rows: int
    cols: int
    c0: int
    c1: int
    step: int = 1

    @property
    def width(self) -> int:
        """Columns that it takes of each row."""
        return len(range(self.c0, self.c1, self.step))


class Take(NamedTuple):
    """Rows `start`, `start + step`, ... below `stop` of a view."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a view, and where they are stored.

    `take` lists them in the order of the place's rows, or of its columns where `flipped` (the tensor stores them
    as columns).
    """

    tensor: str
    place: Place
    flipped: bool
    take: tuple[Take, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A weight as one module of an adapter sees it: every row is in exactly one part."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        return prod(self.shape[1:])

    @property
    def whole(self) -> bool:
        """Whether it is one stored tensor as it lies."""
        if len(self.parts) != 1:
            return False
        part = self.parts[0]
        whole = Place(0, self.rows, self.cols, 0, self.cols)
        return not part.flipped and part.place == whole and part.take == (Take(0, self.rows),)


def whole_view(tensor: str, shape: Sequence[int], *, flipped: bool = False) -> View:
    """The view of one stored tensor with this stored shape, all of it; `flipped` where it stores (in, out)."""
    rows, cols = (shape[0], prod(shape[1:])) if shape else (1, 1)
    place = Place(0, rows, cols, 0, cols)
    if flipped:
        return View((cols, rows), (Part(tensor, place, True, (Take(0, cols),)),))
    return View(tuple(shape), (Part(tensor, place, False, (Take(0, rows),)),))
