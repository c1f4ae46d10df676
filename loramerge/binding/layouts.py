"""Layouts: which of a family's two layouts a base has, and every name that either of them gives to its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from loramerge.adapters.views import Part, Take, View, whole_view
from loramerge.binding.rows import join, select, transposed
from loramerge.binding.tables import SIDES, Component, Equality, Family, filled, layout_families
from loramerge.errors import MismatchError
from loramerge.tensors.text import quoted, some

V = TypeVar("V")

Shapes = Mapping[str, tuple[int, ...]]
"""Stored tensor -> shape."""


class Name(NamedTuple):
    """A parameter of one layout: the component's folder, and the path inside it."""

    component: str
    path: str


class _Ref(NamedTuple):
    """How a parameter lies in stored tensors: through an equality (part `part` of it where several `hf` paths are the
    rows of one stored tensor), then perhaps only the rows `rows`, texts in `H`."""

    stored: tuple[str, ...]
    equality: Equality | None = None
    part: int | None = None
    rows: tuple[str, str] | None = None


class _Multi(Generic[V]):
    """Values by name, where almost every name has one (of many thousands, so nothing is made for each)."""

    def __init__(self) -> None:
        self.first: dict[str, V] = {}
        self._others: dict[str, list[V]] = {}

    def add(self, name: str, value: V) -> None:
        if self.first.setdefault(name, value) != value:
            self._others.setdefault(name, []).append(value)

    def get(self, name: str) -> list[V]:
        """All values of a name."""
        return [self.first[name], *self._others.get(name, ())] if name in self.first else []


class _Held:
    """A component that the base has, in one of its layouts."""

    def __init__(self, component: Component, side: str, prefix: str, names: Mapping[str, str], shapes: Shapes) -> None:
        self.component = component
        self.side = side
        self.prefix = prefix
        self._stored = names
        """Path inside the component -> stored tensor."""
        self._shapes = shapes
        self._views: dict[_Ref, View | None] = {}
        self._endings = tuple(f".{old}" for old, _ in component.also)

    @cached_property
    def _own(self) -> dict[str, str]:
        """Paths with the root that some writers leave out -> stored tensor."""
        root = self.component.root
        if not root or any(path.startswith(root) for path in self._stored):
            return dict(self._stored)
        rooted = {f"{root}{path}": stored for path, stored in self._stored.items()}
        equal = self._equalities([*rooted, *self._stored])
        return {
            path if _matching(equal, path, whole=True) else f"{root}{path}": stored
            for path, stored in self._stored.items()
        }

    def _equalities(self, names: list[str]) -> dict[str, tuple[Equality, int]]:
        """Own path -> the equality that it is in, and which of its paths it is."""
        found: dict[str, tuple[Equality, int]] = {}
        for equality in self.component.equalities(names, self.side):
            for i, path in enumerate(equality.paths(self.side)):
                found.setdefault(path, (equality, i))
        return found

    @cached_property
    def refs(self) -> dict[str, dict[str, _Ref]]:
        """Layout -> path inside the component -> where it lies."""
        own = self._own
        equal = self._equalities(list(own))
        mine = {path: _Ref((stored,)) for path, stored in own.items()}
        theirs: dict[str, _Ref] = {}
        joined: dict[tuple[Equality, str], dict[int, str]] = defaultdict(dict)
        for path, stored in own.items():
            if (match := _matching(equal, path)) is None:
                continue
            equality, at, rest = match
            if self.side == "hf" and len(equality.hf) > 1:
                joined[equality, rest][at] = stored
            elif self.side == "hf":
                theirs[_tail(equality.ldm, rest)] = _Ref((stored,), equality)
            else:
                several = len(equality.hf) > 1
                for i, other in enumerate(equality.hf):
                    theirs[_tail(other, rest)] = _Ref((stored,), equality, i if several else None)
        for (equality, rest), parts in joined.items():
            if len(parts) == len(equality.hf):
                stored_parts = tuple(parts[i] for i in range(len(parts)))
                theirs[_tail(equality.ldm, rest)] = _Ref(stored_parts, equality)
        return {self.side: mine, SIDES[self.side == "hf"]: theirs}

    def view(self, ref: _Ref) -> View | None:
        """The view; None where shapes do not allow it."""
        if ref not in self._views:
            self._views[ref] = self._made(ref)
        return self._views[ref]

    def _made(self, ref: _Ref) -> View | None:
        views = [whole_view(stored, self._shapes[stored]) for stored in ref.stored]
        view: View | None = views[0] if len(views) == 1 else _joined(views)
        equality = ref.equality
        if view is not None and equality is not None and equality.transpose:
            view = transposed(view) if len(view.shape) == 2 else None
        if view is not None and equality is not None and equality.swap:
            half = view.rows // 2
            view = select(view, (Take(half, view.rows), Take(0, half))) if view.rows % 2 == 0 else None
        if view is not None and equality is not None and ref.part is not None:
            view = self._part(view, ref.stored[0], equality, ref.part)
        if view is not None and ref.rows is not None:
            H = self._width(ref)
            low, high = (_size(text, H) for text in ref.rows)
            view = None if H is None or not 0 <= low < high <= view.rows else select(view, (Take(low, high),))
        return view

    def _part(self, view: View, stored: str, equality: Equality, part: int) -> View | None:
        """The rows of a fused tensor that are the `part`-th of its `hf` paths."""
        n = len(equality.hf)
        if not equality.heights:
            height = view.rows // n
            return None if view.rows % n else select(view, (Take(part * height, (part + 1) * height),))
        H = self._columns(self._beside(stored, equality.ldm))
        fixed = [_size(text, H) for text in equality.heights if text != "*"]
        rest = view.rows - sum(fixed)
        if H is None or rest < 0 or len(equality.heights) != n:
            return None
        heights = [rest if text == "*" else _size(text, H) for text in equality.heights]
        first = sum(heights[:part])
        return select(view, (Take(first, first + heights[part]),)) if heights[part] else None

    def _beside(self, stored: str, module: str) -> str:
        """The weight of the module that a fused tensor belongs to."""
        at = stored.rindex(module) + len(module)
        return f"{stored[:at]}.weight"

    def _columns(self, stored: str | None) -> int | None:
        shape = self._shapes.get(stored or "", ())
        return shape[1] if len(shape) > 1 else None

    def _width(self, ref: _Ref) -> int | None:
        """`H` of a tensor or of several: the columns of its weight."""
        head, _, _ = ref.stored[0].rpartition(".")
        return self._columns(f"{head}.weight")

    def spellings(self, side: str, path: str) -> Iterator[str]:
        """A path and its other spellings: without the optional root, with other last segments."""
        root = self.component.root
        heads = ("", root) if root and path.startswith(root) else ("",)
        module, _, leaf = path.rpartition(".")
        other = side == "hf" and module.endswith(self._endings)
        for head in heads:
            yield path[len(head) :]
            if other:
                for old, new in self.component.also:
                    if module.endswith(f".{old}"):
                        yield f"{module[len(head) : -len(old)]}{new}.{leaf}"


def _matching(
    equal: Mapping[str, tuple[Equality, int]], path: str, *, whole: bool = False
) -> tuple[Equality, int, str] | None:
    """The longest path of an equality that a parameter's path begins with: (equality, which path, the rest).

    `whole`: an equality of everything does not count.
    """
    at = len(path)
    while at >= 0:
        if (found := equal.get(path[:at])) is not None:
            return (*found, path[at:])
        at = path.rfind(".", 0, at)
    if not whole and (found := equal.get("")) is not None:
        return (*found, f".{path}")
    return None


def _tail(path: str, rest: str) -> str:
    return f"{path}{rest}" if path else rest.removeprefix(".")


def _joined(views: list[View]) -> View | None:
    """One view of several, one after the other."""
    if len({view.shape[1:] for view in views}) != 1:
        return None
    runs, at = [], 0
    for view in views:
        runs.append((Take(at, at + view.rows),))
        at += view.rows
    return join(views, runs)


def _size(text: str, H: int | None) -> int:
    """`3H`, `H` or a number of rows; 0 where H is wanted and unknown."""
    if text.endswith("H"):
        return int(text[:-1] or 1) * (H or 0)
    return int(text)


@dataclass(eq=False)
class Layout:
    """The family of a base, the layout of each of its components, and lookups by any name of either layout.

    Raises (all lookups):
        MismatchError: `binding.ambiguous` where a name could be two parameters.
    """

    family: Family
    held: tuple[_Held, ...]

    @property
    def sides(self) -> dict[str, str]:
        """Component -> the layout in which the base has it."""
        return {held.component.folder: held.side for held in self.held}

    def lacks(self, name: str) -> bool:
        """Whether a name belongs, by its prefix, to a component of the family that the base does not have."""
        here = [held.component for held in self.held]
        if any(name.startswith((*c.dotted, *c.flat)) for c in here):
            return False
        return any(name.startswith((*c.dotted, *c.flat)) for c in self.family.components)

    def view(self, name: str) -> View | None:
        """The view of a parameter by its dotted or flattened path, with or without the prefix of a component."""
        hits: dict[View, None] = {}
        module, _, leaf = name.rpartition(".")
        for held in self.held:
            index = self._index[held.component.folder]
            paths = list(_without(name, ("", *held.component.dotted)))
            if module.startswith(held.component.flat):
                flat = module.replace(".", "_")
                for path in _without(flat, held.component.flat):
                    paths += self._flat[held.component.folder].get(f"{path}.{leaf}")
            refs = [ref for path in paths for ref in index.get(path)]
            hits |= {view: None for ref in refs if (view := held.view(ref)) is not None}
        if len(hits) > 1 and len({_normal(view) for view in hits}) > 1:
            tensors = sorted({part.tensor for view in hits for part in view.parts})
            raise MismatchError(
                "binding.ambiguous",
                f"{quoted(name)} of the adapter could be {some(tensors)} of the base",
                fix="give the one component's folder as the base, or an adapter that names the component",
                tensors=tensors,
            )
        return next(iter(hits), None)

    @cached_property
    def _index(self) -> dict[str, _Multi[_Ref]]:
        """Component -> every dotted spelling -> where it lies."""
        return {held.component.folder: self._spelled(held) for held in self.held}

    def _spelled(self, held: _Held) -> _Multi[_Ref]:
        index: _Multi[_Ref] = _Multi()
        for side, refs in held.refs.items():
            for path, ref in refs.items():
                for spelling in held.spellings(side, path):
                    index.add(spelling, ref)
        if held.component is self.family.components[0]:
            for spelling, ref in self._further(held.refs["ldm"]):
                index.add(spelling, ref)
        return index

    def _further(self, refs: Mapping[str, _Ref]) -> Iterator[tuple[str, _Ref]]:
        """The family's further names of modules."""
        numbers = sorted({s for path in refs for s in path.split(".") if s.isdecimal()} if self.family.also else ())
        for name, module in self.family.also:
            module, _, rows = module.removesuffix("]").partition("[")
            low, _, high = rows.partition(":")
            for n in numbers:
                for leaf in ("weight", "bias"):
                    ref = refs.get(f"{filled(module, {'n': int(n)})}.{leaf}")
                    if ref is not None:
                        cut = (low, high) if rows else None
                        yield f"{filled(name, {'n': int(n)})}.{leaf}", ref._replace(rows=cut)

    @cached_property
    def _flat(self) -> dict[str, _Multi[str]]:
        """Component -> flattened module path and parameter -> dotted spelling."""
        flat: dict[str, _Multi[str]] = {}
        for folder, index in self._index.items():
            made = flat[folder] = _Multi()
            for path in index.first:
                module, _, leaf = path.rpartition(".")
                made.add(f"{module.replace('.', '_')}.{leaf}", path)
        return flat

    def parameters(self, side: str) -> dict[Name, View]:
        """Every parameter of the base as a layout names it, with the view of it that the base stores."""
        made = {}
        for held in self.held:
            for path, ref in held.refs[side].items():
                if (view := held.view(ref)) is not None:
                    made[Name(held.component.folder, path)] = view
        return made

    def called(self, view: View, side: str) -> tuple[Name, ...]:
        """What a layout calls a view: the one parameter that it is, or those whose rows it joins; else nothing."""
        wanted = _normal(view)
        if wanted in self._names[side]:
            return (self._names[side][wanted],)
        cells, found = _cells(view), []
        for name in {name for part in view.parts for name in self._by_tensor[side].get(part.tensor, ())}:
            rows = [cells.get(cell) for cell in _cells(self._parameters[side][name])]
            if None not in rows:
                found.append((min(row for row in rows if row is not None), name))
        names = tuple(name for _, name in sorted(found))
        whole = _joined([self._parameters[side][name] for name in names]) if names else None
        return names if whole is not None and _normal(whole) == wanted else ()

    @cached_property
    def _parameters(self) -> dict[str, dict[Name, View]]:
        return {side: self.parameters(side) for side in SIDES}

    @cached_property
    def _names(self) -> dict[str, dict[View, Name]]:
        return {
            side: {_normal(view): name for name, view in parameters.items()}
            for side, parameters in self._parameters.items()
        }

    @cached_property
    def _by_tensor(self) -> dict[str, dict[str, list[Name]]]:
        index: dict[str, dict[str, list[Name]]] = {side: defaultdict(list) for side in SIDES}
        for side, parameters in self._parameters.items():
            for name, view in parameters.items():
                for tensor in {part.tensor for part in view.parts}:
                    index[side][tensor].append(name)
        return index


def _without(name: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    """What remains of a name after each prefix that it has."""
    return (name[len(prefix) :] for prefix in prefixes if name.startswith(prefix))


def _normal(view: View) -> View:
    """The same view with as few parts and runs as it can be written."""
    parts = []
    for part in select(view, (Take(0, view.rows),)).parts if view.rows else view.parts:
        takes: list[Take] = []
        for take in part.take:
            if takes and takes[-1].stop == take.start and takes[-1].step == take.step == 1:
                takes[-1] = Take(takes[-1].start, take.stop)
            else:
                takes.append(take)
        parts.append(Part(part.tensor, part.place, part.flipped, tuple(takes)))
    return View(view.shape, tuple(parts))


def _cells(view: View) -> dict[tuple[str, int, bool], int]:
    """(tensor, first element, flipped) of every stored row -> row of the view."""
    cells = {}
    for part in view.parts:
        rows = [row for take in part.take for row in range(*take)]
        for i, row in enumerate(rows):
            place = part.place
            at = place.begin + (place.c0 + i * place.step if part.flipped else i * place.cols + place.c0)
            cells[part.tensor, at, part.flipped] = row
    return cells


def detect_layout(shapes: Shapes) -> Layout | None:
    """The family of a base and the layout that its tensors have; None where no table knows them.

    Args:
        shapes: stored tensor -> shape: of a whole pipeline, a single file or one component of it.
    """
    best: tuple[int, Family, str, dict[str, str]] | None = None
    for family in layout_families():
        for side in SIDES:
            prefixes = _prefixes(family, side, shapes)
            if prefixes and (best is None or len(prefixes) > best[0]):
                best = len(prefixes), family, side, prefixes
    if best is None:
        return _unknown(shapes)
    _, family, side, detected = best
    return Layout(family, tuple(_held(family, side, detected, shapes)))


def _unknown(shapes: Shapes) -> Layout | None:
    """The layout of a model without a table: its components by their folders, or the prefix of its network."""
    for family in layout_families():
        if not family.fallback:
            continue
        held = [
            _Held(component, side, prefix, names, shapes)
            for component in family.components
            for side, prefixes in (("hf", (f"{component.folder}/",)), ("ldm", component.ldm))
            for prefix in prefixes
            if prefix and (names := {n[len(prefix) :]: n for n in shapes if n.startswith(prefix)})
        ]
        if held:
            return Layout(family, tuple(held))
    return None


def _prefixes(family: Family, side: str, shapes: Shapes) -> dict[str, str]:
    """Component -> the prefix under which the base has what tells it; empty where that is not the network."""
    found = {}
    for component in family.components:
        wanted = component.detect.get(side, ())
        for prefix in _candidates(component, side):
            if wanted and all((prefix + n.removeprefix("!") in shapes) != n.startswith("!") for n in wanted):
                found[component.folder] = prefix
                break
        if component is family.components[0] and not found:
            return {}
    return found


def _candidates(component: Component, side: str) -> tuple[str, ...]:
    return (f"{component.folder}/", f"{component.folder}.", "") if side == "hf" else component.ldm


def _held(family: Family, side: str, detected: Mapping[str, str], shapes: Shapes) -> Iterator[_Held]:
    """The components that are there. Those of a pipeline's folders all have folders."""
    main = family.components[0]
    separator = detected[main.folder].removeprefix(main.folder) if side == "hf" else ""
    claimed: list[str] = []
    for component in reversed(family.components):  # the network last: its prefix may be empty
        if component is main:
            prefixes = [detected[main.folder]]
        elif side == "hf":
            prefixes = [f"{component.folder}{separator}"] if separator else []
        else:
            prefixes = [p for p in component.ldm if p]
        for prefix in prefixes:
            names = {
                name[len(prefix) :]: name
                for name in shapes
                if name.startswith(prefix) and not (not prefix and name.startswith(tuple(claimed)))
            }
            if names:
                claimed.append(prefix)
                yield _Held(component, side, prefix, names, shapes)
                break
