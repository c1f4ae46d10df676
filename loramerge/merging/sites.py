"""Sites: the matrices that several adapters change together, found among their updates of stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from loramerge.adapters.updates import ByKind, Difference, DoRA, LowRank, Update
from loramerge.adapters.views import Part, Place, Take, View, whole_view
from loramerge.errors import UnsupportedError
from loramerge.tensors.text import quoted

Shapes = Mapping[str, tuple[int, ...]]
"""Stored tensor -> its shape as updates see it."""


class Window(NamedTuple):
    """Rows r0 to r1 and columns c0 to c1 of what a part takes of a module's matrix."""

    r0: int
    r1: int
    c0: int
    c1: int


@dataclass(frozen=True)
class Member:
    """What one module of one adapter does to a site: an update for each of its parts, in their order.

    `cuts`: for each part the window of what its update's own part takes of the module's matrix; all that parts take,
    where there is none. Without cuts several updates are the whole matrix, row by row as the site has it.
    """

    updates: tuple[Update, ...]
    cuts: tuple[Window, ...] = ()


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix that adapters change: what of it is in which stored tensor, and what each adapter does to it.

    A method acts on sites. Usually a site is the weight of a module. Where one adapter sees several modules as one
    (fused projections) and another does not, sites are as large as all of them can be: the finest cut counts.
    `members[i]` is what the i-th adapter does, which may be nothing.
    """

    name: str
    view: View
    members: tuple[tuple[Member, ...], ...]


@dataclass(frozen=True)
class _Group:
    """The updates that belong to one matrix of one adapter, and where the matrix lies."""

    adapter: int
    parts: tuple[Part, ...]
    updates: tuple[Update, ...]
    cuts: tuple[Window, ...] = ()


def is_member(update: Update) -> bool:
    """Whether an update is a change of a matrix, which a method may combine with others (replacements are not)."""
    return isinstance(update, LowRank | DoRA | ByKind | Difference)


def sites_of(updates: Mapping[str, Sequence[Update]], shapes: Shapes, count: int) -> list[Site]:
    """The sites of all updates that are members, in the order of the tensors.

    Args:
        updates: stored tensor -> its updates.
        shapes: of these tensors.
        count: how many adapters there are.

    Raises:
        UnsupportedError: `method.layout` where two adapters cut one tensor in ways that have no common refinement.
    """
    groups = _groups(updates, shapes)
    sites = []
    for connected in _connected(groups):
        for same in _agreed(connected):
            sites.append(_site(same, shapes, count))
    order = {name: i for i, name in enumerate(updates)}
    return sorted(sites, key=lambda s: (order[s.view.parts[0].tensor], s.view.parts[0].place.begin))


def _groups(updates: Mapping[str, Sequence[Update]], shapes: Shapes) -> list[_Group]:
    found: dict[Any, list[tuple[Part, Update]]] = {}
    flipped = {name: _flipped(name, own) for name, own in updates.items()}
    for name, own in updates.items():
        for update in own:
            if is_member(update):
                part = _part_of(update, name, shapes[name], flipped[name])
                found.setdefault(_matrix_of(update), []).append((part, update))
    groups = []
    for pieces in found.values():
        parts = tuple(part if len(pieces) > 1 else _alone(part) for part, _ in pieces)
        groups.append(_Group(pieces[0][1].adapter, parts, tuple(update for _, update in pieces)))
    return groups


def _matrix_of(update: Update) -> Any:
    """The same for updates that are parts of one matrix."""
    if isinstance(update, LowRank | DoRA):
        low = update.low if isinstance(update, DoRA) else update
        return update.adapter, update.module, update.kind, low.keys, low.pick
    if isinstance(update, ByKind):
        return update.adapter, update.module, update.kind, update.factors, update.view, update.bias_of is None
    return update.adapter, update.module, update.kind, update.keys, id(update)


def _flipped(name: str, updates: Sequence[Update]) -> bool:
    """Whether modules see a tensor turned, so that a difference of the stored one must be turned as well."""
    parts = [part_of(update) for update in updates if is_member(update)]
    return any(part.flipped for part in parts if part is not None)


def part_of(update: Update) -> Part | None:
    """Where the change of an update goes; None where that is a whole tensor as it lies."""
    if isinstance(update, LowRank):
        return update.part
    if isinstance(update, DoRA):
        return update.low.part
    return update.view.parts[update.part] if isinstance(update, ByKind) else None


def _part_of(update: Update, name: str, shape: tuple[int, ...], flipped: bool) -> Part:
    own = part_of(update)
    if own is not None:
        return own
    return whole_view(name, shape if len(shape) > 1 else (*shape, 1), flipped=flipped and len(shape) == 2).parts[0]


# ------------------------------------------------------------------------------------------- what lies together


def _connected(groups: Sequence[_Group]) -> list[list[_Group]]:
    """Groups that overlap one another, directly or through others."""
    parent = list(range(len(groups)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    by_tensor: dict[str, dict[Place, list[int]]] = {}
    for i, group in enumerate(groups):
        for part in group.parts:
            by_tensor.setdefault(part.tensor, {}).setdefault(part.place, []).append(i)
    for places in by_tensor.values():
        for same in places.values():
            for other in same[1:]:
                parent[root(other)] = root(same[0])
        ordered = sorted(places, key=lambda p: p.begin)
        for at, place in enumerate(ordered):
            for other_place in ordered[at + 1 :]:
                if other_place.begin >= place.begin + place.rows * place.cols:
                    break
                if _overlap(place, other_place):
                    parent[root(places[other_place][0])] = root(places[place][0])
    found: dict[int, list[_Group]] = {}
    for i, group in enumerate(groups):
        found.setdefault(root(i), []).append(group)
    return list(found.values())


def _overlap(a: Place, b: Place) -> bool:
    """Whether two places whose rows overlap have elements in common; places on other rows may have."""
    if a.cols != b.cols or (b.begin - a.begin) % a.cols:
        return True
    if max(a.c0, b.c0) >= min(a.c1, b.c1):
        return False
    if a.step == b.step:
        return (a.c0 - b.c0) % a.step == 0
    return not set(range(a.c0, a.c1, a.step)).isdisjoint(range(b.c0, b.c1, b.step))


def _agreed(groups: list[_Group]) -> Iterable[list[_Group]]:
    """Groups that are connected, as sets of groups of the same elements: cut where they have to be, and as little."""
    if len({group.parts for group in groups}) == 1:
        yield groups
        return
    cells: dict[Any, list[tuple[Part, list[tuple[int, Update, Window]]]]] = {}
    for tensor in dict.fromkeys(part.tensor for group in groups for part in group.parts):
        pieces = [
            (i, part, update)
            for i, group in enumerate(groups)
            for part, update in zip(group.parts, group.updates, strict=True)
            if part.tensor == tensor
        ]
        for part, own in _cells(pieces, [group.updates[0].module for group in groups]):
            columns = tuple(window[2:] for _, _, window in own)
            cells.setdefault((tuple(i for i, _, _ in own), columns), []).append((part, own))
    for (origins, _), same in cells.items():
        parts, at = [], 0
        for part, _ in same:
            count = sizes(part)[0]
            parts.append(replace(part, take=(Take(at, at + count),)))
            at += count
        yield [
            _Group(
                groups[i].adapter,
                tuple(parts),
                tuple(own[place][1] for _, own in same),
                tuple(own[place][2] for _, own in same),
            )
            for place, i in enumerate(origins)
        ]


def _alone(part: Part) -> Part:
    """The part as if it were all of its matrix."""
    return replace(part, take=(Take(0, sizes(part)[0]),))


def sizes(part: Part) -> tuple[int, int]:
    """(rows, columns) of what a part holds, as the module sees it."""
    place = part.place
    return (place.width, place.rows) if part.flipped else (place.rows, place.width)


def _cells(
    pieces: Sequence[tuple[int, Part, Update]], modules: Sequence[str]
) -> list[tuple[Part, list[tuple[int, Update, Window]]]]:
    """Rectangles of one tensor cut along all edges of those that overlap it, in the order of the tensor: each with the
    groups that it belongs to, their updates, and the window that it is of what those take."""
    first = pieces[0][1]
    alike = all(
        part.flipped == first.flipped
        and part.place.cols == first.place.cols
        and part.place.step == first.place.step
        and (part.place.begin - first.place.begin) % first.place.cols == 0
        and (part.place.c0 - first.place.c0) % first.place.step == 0
        for _, part, _ in pieces
    )
    if not alike:
        names = sorted({modules[i] for i, _, _ in pieces})
        raise UnsupportedError(
            "method.layout",
            f"adapters see {quoted(first.tensor)} in ways that have no common parts ({', '.join(names)})",
            fix="convert them to one layout first (loramerge convert), or --method linear",
            tensors=[first.tensor],
        )
    places = [part.place for _, part, _ in pieces]
    rows = sorted({edge for p in places for edge in (p.begin, p.begin + p.rows * p.cols)})
    cols = sorted({edge for p in places for edge in (p.c0, p.c0 + p.width * p.step)})
    found: dict[Place, list[tuple[int, Update, Window]]] = {}
    for i, part, update in pieces:
        place = part.place
        for begin, stop in pairwise(e for e in rows if place.begin <= e <= place.begin + place.rows * place.cols):
            for c0, c1 in pairwise(e for e in cols if place.c0 <= e <= place.c0 + place.width * place.step):
                cell = Place(begin, (stop - begin) // place.cols, place.cols, c0, min(c1, place.cols), place.step)
                r0, k0 = (begin - place.begin) // place.cols, (c0 - place.c0) // place.step
                high, wide = (r0, r0 + cell.rows), (k0, k0 + cell.width)
                window = Window(*wide, *high) if part.flipped else Window(*high, *wide)
                found.setdefault(cell, []).append((i, update, window))
    return [(_alone(replace(first, place=cell)), found[cell]) for cell in sorted(found, key=lambda p: (p.begin, p.c0))]


def _site(groups: Sequence[_Group], shapes: Shapes, count: int) -> Site:
    parts = groups[0].parts
    rows = sum(sizes(part)[0] for part in parts)
    view = View((rows, sizes(parts[0])[1]), parts)
    members = tuple(tuple(Member(g.updates, g.cuts) for g in groups if g.adapter == i) for i in range(count))
    return Site(_name(parts, shapes), view, members)


def _name(parts: Sequence[Part], shapes: Shapes) -> str:
    """The tensor, or the places in tensors: whatever the adapters call it, the same."""
    names = []
    for part in parts:
        place, name = part.place, part.tensor.removesuffix(".weight")
        size = 1
        for n in shapes[part.tensor]:
            size *= n
        if place.rows * place.width != size:
            name += f"[{place.begin}+{place.rows}x{place.cols},{place.c0}:{place.c1}:{place.step}]"
        names.append(name)
    return "+".join(dict.fromkeys(names))
