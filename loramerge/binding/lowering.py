"""Updates of parameters as an adapter knows them, made updates of the tensors that hold those parameters in other ways.

A parameter may lie in a stored tensor turned around, as rows or columns of one, in several, or more than once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod
from typing import Any

from loramerge.adapters.kinds.base import Context
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.adapters.updates import Blend, ByKind, Difference, DoRA, LowRank, Magnitude, TokenRows, Update
from loramerge.adapters.views import Part, Place, Take, View, whole_view
from loramerge.errors import UnsupportedError
from loramerge.tensors.text import quoted


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a parameter, seen as a matrix, and where a stored tensor has it.

    Rows `r0` to `r1` and columns `c0` to `c1` of the parameter begin at row `row`, column `col` of the stored tensor,
    a matrix of `cols` columns; `turned`: the tensor's rows are the parameter's columns.
    """

    tensor: str
    cols: int
    r0: int
    r1: int
    c0: int
    c1: int
    row: int = 0
    col: int = 0
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """One complete place of a parameter: pieces that cover it.

    `same`: it is one tensor just as the parameter is. `alone`: it is one tensor that holds nothing else.
    """

    pieces: tuple[Piece, ...]
    same: bool = False
    alone: bool = False


def whole_site(tensor: str, stored: Sequence[int], *, turned: bool = False) -> Site:
    """A tensor of the shape `stored` that is a parameter, or its transpose."""
    rows, cols = (stored[0], prod(stored[1:])) if stored else (1, 1)
    r, c = (cols, rows) if turned else (rows, cols)
    return Site((Piece(tensor, cols, 0, r, 0, c, turned=turned),), not turned, True)


def site_of(pieces: tuple[Piece, ...], shape: Sequence[int], stored: Sequence[int]) -> Site:
    """A site of a parameter of this shape; `stored`: the shape of the tensor of its first piece."""
    alone = len(pieces) == 1 and prod(stored) == prod(shape)
    return Site(pieces, alone and not pieces[0].turned and tuple(stored) == tuple(shape), alone)


def site_data(shape: Sequence[int], sites: Sequence[Site]) -> dict[str, Any]:
    """Where a parameter of this shape lies, as plain data."""
    return {"shape": list(shape), "sites": [[list(astuple(piece)) for piece in site.pieces] for site in sites]}


def _piece(tensor: Any, cols: Any, r0: Any, r1: Any, c0: Any, c1: Any, row: Any, col: Any, turned: Any) -> Piece:
    numbers = [int(n) for n in (cols, r0, r1, c0, c1, row, col)]
    return Piece(
        str(tensor), numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], bool(turned)
    )


def sites_from(data: Any, shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], list[Site]]:
    """What `site_data` gave this data for: (shape, sites).

    Raises:
        ValueError: it is no such data, or lies outside of the tensors of these shapes.
    """
    shape = tuple(int(n) for n in data["shape"])
    rows, cols = (shape[0], prod(shape[1:])) if shape else (1, 1)
    sites = []
    for given in data["sites"]:
        pieces = tuple(_piece(*row) for row in given)
        for p in pieces:
            stored = shapes[p.tensor]
            height, width = (stored[0], prod(stored[1:])) if stored else (1, 1)
            down, across = (p.c1 - p.c0, p.r1 - p.r0) if p.turned else (p.r1 - p.r0, p.c1 - p.c0)
            inside = 0 <= p.r0 < p.r1 <= rows and 0 <= p.c0 < p.c1 <= cols and min(p.row, p.col) >= 0
            if not inside or p.cols != width or p.row + down > height or p.col + across > width:
                raise ValueError(f"a piece of {p.tensor} lies outside")
        if not pieces:
            raise ValueError("a site without pieces")
        sites.append(site_of(pieces, shape, shapes[pieces[0].tensor]))
    return shape, sites


def lowered(name: str, shape: Sequence[int], site: Site, update: Update) -> Iterator[tuple[str, Update]]:
    """(stored tensor, update) for one update of a parameter at one of its sites.

    Args:
        name, shape: of the parameter.

    Raises:
        UnsupportedError: `onnx.layout` where no update of the stored tensors does the same.
    """
    if isinstance(update, LowRank):
        for part in _parts(update.part, shape, site, name):
            yield part.tensor, replace(update, part=part)
    elif isinstance(update, DoRA):
        yield from _dora(name, shape, site, update)
    elif isinstance(update, Difference | Blend):
        if site.same:
            yield site.pieces[0].tensor, update
        else:
            weight = update.scale if isinstance(update, Difference) else update.weight
            kind, factor = ("difference", "diff") if isinstance(update, Difference) else ("replacement", "value")
            keys = ((factor, update.key),)
            yield from whole_change(name, shape, site, kind, update.adapter, update.module, keys, weight)
    elif isinstance(update, TokenRows) and site.same:
        yield site.pieces[0].tensor, update
    else:
        raise _unsupported(name, f"the adapter changes it by {update.kind}, which needs it as it was trained")


def whole_change(
    name: str,
    shape: Sequence[int],
    site: Site,
    kind: str,
    adapter: int,
    module: str,
    keys: tuple[tuple[str, str], ...],
    weight: float,
) -> Iterator[tuple[str, Update]]:
    """A change of a whole parameter by a factor of its shape."""
    view = lowered_view(whole_view(name, shape), {name: shape}, {name: site})
    context = Context(tuple(shape), weight=weight)
    for i, part in enumerate(view.parts):
        yield part.tensor, ByKind(kind, adapter, module, keys, context, view, i)


def lowered_view(view: View, shapes: Mapping[str, Sequence[int]], sites: Mapping[str, Site]) -> View:
    """A view of parameters as the view of stored tensors that it is at these sites."""
    parts = [p for part in view.parts for p in _parts(part, shapes[part.tensor], sites[part.tensor], part.tensor)]
    return View(view.shape, tuple(parts))


def _dora(name: str, shape: Sequence[int], site: Site, update: DoRA) -> Iterator[tuple[str, Update]]:
    """A DoRA update: as such where it is one matrix, by its general formula where it is in pieces."""
    parts = list(_parts(update.low.part, shape, site, name))
    tensor = site.pieces[0].tensor
    if site.alone and len(parts) == 1:  # the norms of its rows or columns are those of the parameter
        yield tensor, replace(update, low=replace(update.low, part=parts[0]), by_column=parts[0].flipped)
        return
    low = update.low
    rows, cols = shape[0], prod(shape[1:])
    out_in = (cols, rows) if low.part.flipped else tuple(shape)
    view = View(out_in, tuple(parts))
    style = MAGNITUDES["magnitude"]
    magnitude = Magnitude(update.magnitude, "output", style)
    context = Context(out_in, low.scale)
    keys = (("A", low.A), ("B", low.B))
    for i, part in enumerate(parts):
        yield part.tensor, ByKind("low-rank", update.adapter, update.module, keys, context, view, i, magnitude)


def _parts(part: Part, shape: Sequence[int], site: Site, name: str) -> Iterator[Part]:
    """The parts of stored tensors that a part of a parameter is."""
    if site.same:
        yield replace(part, tensor=site.pieces[0].tensor)
        return
    place = part.place
    cols = prod(shape[1:]) if shape else 1
    if place.cols != cols or place.begin % cols:
        raise _unsupported(name, "the adapter sees it in another shape than it was trained in")
    top = place.begin // cols
    found = 0
    for piece in site.pieces:
        made = _part(part, piece, top, name)
        if made is not None:
            found += sum(map(len, made.take))
            yield made
    if found != sum(map(len, part.take)):
        raise _unsupported(name, "only some of it was found")


def _part(part: Part, piece: Piece, top: int, name: str) -> Part | None:
    """What of a part lies in a piece. `top`: the parameter's row that is the part's first."""
    place = part.place
    columns = range(place.c0, place.c1, place.step)
    r0, r1 = max(top, piece.r0), min(top + place.rows, piece.r1)
    i0 = max(0, -(-(piece.c0 - place.c0) // place.step))
    i1 = min(len(columns), -(-(piece.c1 - place.c0) // place.step))
    if r0 >= r1 or i0 >= i1:
        return None
    whole = (r1 - r0 == place.rows) if part.flipped else (i1 - i0 == len(columns))
    if not whole:  # an update brings all columns of a row of what its module sees
        raise _unsupported(name, "it lies in pieces that cut its inputs")
    if piece.turned and place.step != 1:
        raise _unsupported(name, "the adapter changes every other column of it")
    take = _some_of(part.take, i0, i1) if part.flipped else _some_of(part.take, r0 - top, r1 - top)
    c0 = columns[i0] - piece.c0
    c1 = columns[i1 - 1] + 1 - piece.c0
    if piece.turned:
        begin, left = (piece.row + c0) * piece.cols, piece.col + r0 - piece.r0
        return Part(piece.tensor, Place(begin, c1 - c0, piece.cols, left, left + r1 - r0), not part.flipped, take)
    begin = (piece.row + r0 - piece.r0) * piece.cols
    made = Place(begin, r1 - r0, piece.cols, piece.col + c0, piece.col + c1, place.step)
    return Part(piece.tensor, made, part.flipped, take)


def _some_of(takes: Sequence[Take], low: int, high: int) -> tuple[Take, ...]:
    """Rows `low` to `high` of those that takes list."""
    made, at = [], 0
    for take in takes:
        a, b = max(low - at, 0), min(high - at, len(take))
        if a < b:
            first = take.start + a * take.step
            made.append(Take(first, first + (b - a - 1) * take.step + 1, take.step))
        at += len(take)
    return tuple(made)


def _unsupported(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        "onnx.layout",
        f"{quoted(name)} does not lie in the model as it was trained, and {why}",
        fix="merge into the checkpoint that the model was exported from, and export that",
        tensors=[name],
    )
