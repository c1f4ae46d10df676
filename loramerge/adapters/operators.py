"""Operators: what changes a block of a stored tensor in place, in the compute dtype. Made by updates, run by workers.

Blocks are flat runs of whole stored rows: `first` is the index of a block's first element in its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from loramerge.adapters.kinds.base import RowDelta, RowMap
from loramerge.adapters.views import Part, Place, View

if TYPE_CHECKING:
    from torch import Tensor


class Operator(Protocol):
    """Changes the elements `first, first + 1, ...` of a stored tensor in place."""

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        """`block` (n,) holds the sum so far, `original` (n,) the weight before any update; both compute dtype."""

    def addends(self, index: Tensor) -> Tensor | None:
        """What it adds to the elements `index` (k,) of the tensor, in float64; None where it does more than add."""


def overlap(place: Place, first: int, count: int) -> tuple[int, int]:
    """The elements of the block [first, first + count) that lie in the rows of a place; empty where lo >= hi."""
    return max(first, place.begin), min(first + count, place.begin + place.rows * place.cols)


def rectangle(place: Place, stored: Tensor) -> Tensor:
    """The (rows, width) rectangle of a place in a flat stored tensor, as a view."""
    rows = stored[place.begin : place.begin + place.rows * place.cols].view(place.rows, place.cols)
    return _columns(place, rows)


def _columns(place: Place, rows: Tensor) -> Tensor:
    if (place.c0, place.c1, place.step) == (0, place.cols, 1):
        return rows
    return rows[:, place.c0 : place.c1 : place.step]


def taken(matrix: Tensor, part: Part) -> Tensor:
    """The rows of a view's matrix (rows of the view, ...) that a part holds, in the part's order."""
    import torch

    pieces = [matrix[t.start : t.stop : t.step] for t in part.take]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def gather(view: View, tensors: dict[str, Tensor]) -> Tensor:
    """A view's matrix (rows, cols), from the flat stored tensors that its parts lie in."""
    matrix = next(iter(tensors.values())).new_empty(view.rows, view.cols)
    for part in view.parts:
        held = rectangle(part.place, tensors[part.tensor])
        held = held.T if part.flipped else held
        at = 0
        for t in part.take:
            matrix[t.start : t.stop : t.step] = held[at : at + len(t)]
            at += len(t)
    return matrix


@dataclass(frozen=True, slots=True)
class AddProduct:
    """block += L R on its place, L (place rows, r), R (r, place width)."""

    L: Tensor
    R: Tensor
    place: Place

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        p = self.place
        lo, hi = overlap(p, first, block.numel())
        if lo >= hi:
            return
        part = block[lo - first : hi - first]
        if (lo - p.begin) % p.cols or part.numel() % p.cols:
            self._cut_rows(part, lo - p.begin)  # grouped convolutions of loralib, whose rows are not the weight's
            return
        rows = _columns(p, part.view(-1, p.cols))
        row = (lo - p.begin) // p.cols
        rows.addmm_(self.L[row : row + rows.shape[0]], self.R)

    def addends(self, index: Tensor) -> Tensor | None:
        p = self.place
        at = index - p.begin
        row, col = at.div(p.cols, rounding_mode="floor"), at.remainder(p.cols) - p.c0
        inside = (row >= 0) & (row < p.rows) & (col >= 0) & (col < p.c1 - p.c0)
        if p.step != 1:
            inside &= col.remainder(p.step) == 0
            col = col.div(p.step, rounding_mode="floor")
        row, col = row.where(inside, 0), col.where(inside, 0)
        return (self.L[row].double() * self.R[:, col].T.double()).sum(dim=1).where(inside, 0.0)

    def _cut_rows(self, part: Tensor, at: int) -> None:
        """`part` starts and ends within rows of the place, `at` elements after its beginning."""
        cols = self.place.cols
        row, last = at // cols, (at + part.numel() - 1) // cols
        product = self.L[row : last + 1] @ self.R
        part += product.view(-1)[at - row * cols :][: part.numel()]


@dataclass(frozen=True, slots=True)
class ByRows:
    """A form that works on any rows of the view alone, on a part that stores whole rows as rows."""

    form: RowDelta | RowMap
    part: Part

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        p = self.part.place
        lo, hi = overlap(p, first, block.numel())
        if lo >= hi:
            return
        rows = block[lo - first : hi - first].view(-1, p.cols)
        for at, count, v0, step in self._runs((lo - p.begin) // p.cols, (hi - p.begin) // p.cols):
            if step != 1:
                for i in range(count):
                    self._change(rows[at + i : at + i + 1], v0 + i * step)
            else:
                self._change(rows[at : at + count], v0)

    def _change(self, rows: Tensor, v0: int) -> None:
        if isinstance(self.form, RowDelta):
            rows += self.form.rows(v0, v0 + rows.shape[0])
        else:
            rows.copy_(self.form.apply(rows, v0))

    def _runs(self, r0: int, r1: int) -> Iterator[tuple[int, int, int, int]]:
        """(row in the block, how many, first row of the view, step) of the rows r0 to r1 of the place."""
        at = 0
        for t in self.part.take:
            lo, hi = max(r0, at), min(r1, at + len(t))
            if lo < hi:
                yield lo - r0, hi - lo, t.start + (lo - at) * t.step, t.step
            at += len(t)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class Whole:
    """Adds a matrix (place rows, place width) to its place, or puts it there."""

    values: Tensor
    place: Place
    adds: bool

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        p = self.place
        lo, hi = overlap(p, first, block.numel())
        if lo >= hi:
            return
        rows = _columns(p, block[lo - first : hi - first].view(-1, p.cols))
        row = (lo - p.begin) // p.cols
        values = self.values[row : row + rows.shape[0]]
        if self.adds:
            rows += values
        else:
            rows.copy_(values)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class DoRARows:
    """`m / ||V|| V` with the norms of stored rows."""

    delta: Operator | None
    magnitude: Tensor
    cols: int

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        same = original.data_ptr() == block.data_ptr()
        if self.delta is not None:
            self.delta.apply(block, first, original)
        if same:
            v = block
        else:
            v = original.clone()
            if self.delta is not None:
                self.delta.apply(v, first, original)
        row = first // self.cols
        norms = v.view(-1, self.cols).double().square().sum(dim=1).sqrt_()
        m = self.magnitude[row : row + norms.numel()].double()
        block.view(-1, self.cols).mul_((m / norms).to(block.dtype)[:, None])

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class DoRAColumns:
    """`m / ||V|| V` with norms over stored columns, which are known already."""

    delta: Operator | None
    ratio: Tensor

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        if self.delta is not None:
            self.delta.apply(block, first, original)
        block.view(-1, self.ratio.numel()).mul_(self.ratio)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class Add:
    """block += difference, a flat tensor as long as the stored one."""

    difference: Tensor

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        block += self.difference[first : first + block.numel()]

    def addends(self, index: Tensor) -> Tensor | None:
        return self.difference[index].double()


@dataclass(frozen=True, slots=True)
class Mix:
    """block += weight * (new - original)."""

    new: Tensor
    weight: float

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        block += self.weight * (self.new[first : first + block.numel()] - original)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class Rows:
    """Puts whole rows into a tensor of `cols` columns: row `index` from row i of `rows`, for each pair."""

    rows: Tensor
    pairs: tuple[tuple[int, int], ...]
    weight: float
    cols: int

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        view = block.view(-1, self.cols)
        was = original.view(-1, self.cols)
        row0 = first // self.cols
        for i, index in self.pairs:
            if row0 <= index < row0 + view.shape[0]:
                at = index - row0
                if self.weight == 1:
                    view[at] = self.rows[i]
                else:
                    view[at] += self.weight * (self.rows[i] - was[at])

    def addends(self, index: Tensor) -> Tensor | None:
        return None
