"""Where the rows of a base's tensors live in the layout of a target: module by module, with every row's number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loramerge.adapters.views import Part, View, whole_view
from loramerge.binding.binding import Binding
from loramerge.binding.layouts import Layout, Name, detect_layout
from loramerge.binding.tables import Component
from loramerge.converting.naming import MAIN, row_fits, rows_everywhere
from loramerge.converting.target import Target

Cell = tuple[str, int, bool]
"""(stored tensor, first element, flipped) of one row of a module's weight."""


@dataclass(frozen=True)
class Home:
    """A module of the target's layout: its role and path, the view of its weight, and its tensor where it is one."""

    role: str
    path: str
    view: View
    stored: str | None
    leaf: str = "weight"


@dataclass
class Homes:
    """The modules of a base as a target names them: in the target's layout where the base's family has two, else by
    the names that the base has."""

    binding: Binding
    target: Target
    layout: Layout | None = field(init=False)

    def __post_init__(self) -> None:
        slots = self.binding.names.slots
        self.layout = detect_layout({name: slot.shape for name, slot in slots.items()})

    def side(self, component: str) -> str:
        """The layout in which the target wants a component (`[write.layout]`; by role, by role@family, or `any`)."""
        assert self.layout is not None
        wanted: Mapping[str, str] = self.target.write.get("layout", {})
        role = self._role(component, "")
        named = wanted.get(f"{role}@{self.layout.family.name}") or wanted.get(role) or wanted.get("any")
        return named or self.layout.sides[component]

    def _role(self, component: str, path: str) -> str:
        assert self.layout is not None
        found = {held.component.folder: held.component for held in self.layout.held}[component]
        return _role_of(found, path) or (MAIN if found is self.layout.family.components[0] else component)

    def exact(self, view: View) -> Home | None:
        """The module whose weight is just this view, row by row."""
        if self.layout is not None:
            for side in dict.fromkeys(self.side(component) for component in self.layout.sides):
                names = self.layout.called(view, side)
                if len(names) == 1 and self.side(names[0].component) == side:
                    return self._home(names[0], view)
            return None
        part = view.parts[0]
        if len(view.parts) > 1 or not self._is_whole(part):
            return None
        module, _, leaf = part.tensor.rpartition(".")
        return Home("", module, view, part.tensor, leaf)

    def _home(self, name: Name, view: View) -> Home:
        module, _, leaf = name.path.rpartition(".")
        stored = view.parts[0].tensor if len(view.parts) == 1 and self._is_whole(view.parts[0]) else None
        return Home(self._role(name.component, module), module, view, stored, leaf)

    def _is_whole(self, part: Part) -> bool:
        """Whether a part is all of its stored tensor, straight or turned, rows in their order."""
        shape = self.binding.grown.get(part.tensor, self.binding.names[part.tensor].shape)
        whole = whole_view(part.tensor, shape, flipped=part.flipped).parts[0]
        return part.place == whole.place and list(_rows(part)) == list(range(sum(map(len, whole.take))))

    def owners(self, view: View) -> Iterator[tuple[Home, dict[Cell, int]]]:
        """Every module of the target that has rows of a view, and which row of it each of them is."""
        for key in dict.fromkeys((part.tensor, part.flipped) for part in view.parts):
            for home in self._by_tensor.get(key, ()) if self.layout is not None else (self._stored(*key),):
                yield home, cells(home.view.parts)

    def _stored(self, tensor: str, flipped: bool) -> Home:
        view = whole_view(tensor, self.binding.names[tensor].shape, flipped=flipped)
        module, _, leaf = tensor.rpartition(".")
        return Home("", module, view, tensor, leaf)

    @cached_property
    def _by_tensor(self) -> Mapping[tuple[str, bool], list[Home]]:
        index: dict[tuple[str, bool], list[Home]] = defaultdict(list)
        assert self.layout is not None
        for side in dict.fromkeys(self.side(component) for component in self.layout.sides):
            for name, view in self.layout.parameters(side).items():
                if self.side(name.component) == side:
                    home = self._home(name, view)
                    for key in dict.fromkeys((part.tensor, part.flipped) for part in view.parts):
                        index[key].append(home)
        return index


def _role_of(component: Component, path: str) -> str:
    """The role that some dialect's rows give to a component, by one of its prefixes."""
    for prefix in (*component.dotted, f"{component.folder}.", *component.flat):
        for row in rows_everywhere():
            if row["prefix"] == prefix and (not path or row_fits(row, path)):
                return str(row["role"])
    return ""


def _rows(part: Part) -> Iterator[int]:
    for take in part.take:
        yield from range(take.start, take.stop, take.step)


def cells(parts: Iterable[Part]) -> dict[Cell, int]:
    """Cell -> row of the view, over its parts."""
    found: dict[Cell, int] = {}
    for part in parts:
        place = part.place
        for i, row in enumerate(_rows(part)):
            at = place.begin + (place.c0 + i * place.step if part.flipped else i * place.cols + place.c0)
            found[part.tensor, at, part.flipped] = row
    return found
