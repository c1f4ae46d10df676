"""The names of a base and every alias under which an adapter may know them; lookups that never guess."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loramerge.adapters.views import View, whole_view
from loramerge.binding.families import Families
from loramerge.binding.fusions import Fusions
from loramerge.binding.layouts import Layout, detect_layout
from loramerge.errors import MismatchError
from loramerge.tensors.text import quoted, some


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that the output may hold: its name, and the base tensor that its bytes come from."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stacked parameter (experts, rows, columns), whole in the base or spread over row pieces.

    `pieces[e]` are `(tensor name, first row of the expert's matrix, rows)`; empty where the base stores it whole.
    """

    name: str
    shape: tuple[int, int, int]
    pieces: tuple[tuple[tuple[str, int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a parameter of an adapter lies in the base.

    `stored`: the one tensor that it is as it lies, where it is one; whether that is (out, in) is then still open.
    """

    view: View
    stored: str | None = None


class Namespace:
    """Names, dtypes and shapes of a base, with lookups by alias. `oriented`: modules known to be (out, in).

    Raises (all lookups):
        MismatchError: `binding.ambiguous` where a name could be two tensors.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        families: Families,
        config: Mapping[str, Any],
        oriented: frozenset[str] = frozenset(),
    ) -> None:
        self.slots: dict[str, Slot] = {slot.name: slot for slot in slots}
        self.families = families
        self.config = config
        self.oriented = oriented
        model_type = config.get("model_type")
        self.model_type = model_type if isinstance(model_type, str) else None
        self.model_types = _model_types(config)
        self._fusions = Fusions(self)
        self._aliases = self._make_aliases()
        self._suffixes: dict[str, list[str]] | None = None
        self._found: dict[str, str | None] = {}

    def __getitem__(self, name: str) -> Slot:
        return self.slots[name]

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def add(self, slot: Slot) -> None:
        """Adds a tensor that the base does not store under this name."""
        self.slots[slot.name] = slot
        self._found.clear()

    def remove(self, name: str) -> None:
        """Takes a name away again."""
        self.slots.pop(name)
        self._found.clear()

    def replicate(self, ranges: Iterable[tuple[int, int]], containers: Iterable[str]) -> tuple[str, int, list[int]]:
        """Renames layers: the new list is the layers of each range in turn.

        Returns:
            the container's path, how many layers there are now, and the source of each.

        Raises:
            MismatchError: no list of layers, or a range beyond it.
        """
        pattern = re.compile(rf"^((?:.*?\.)?(?:{'|'.join(map(re.escape, containers))}))\.(\d+)\.(.*)$")
        layers: dict[str, dict[int, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for name in self.slots:
            if match := pattern.match(name):
                layers[match[1]][int(match[2])].append((name, match[3]))
        if len(layers) != 1:
            raise MismatchError(
                "binding.layers",
                f"layer_replication needs one list of layers, the base has {some(sorted(layers)) or 'none'}",
            )
        (container, by_index), order = next(iter(layers.items())), []
        for first, last in ranges:
            order += list(range(first, last))
        if missing := [i for i in order if i not in by_index]:
            raise MismatchError(
                "binding.layers", f"layer_replication names layer {missing[0]}, the base has {len(by_index)}"
            )
        slots: dict[str, Slot] = {}
        placed = False
        for name, slot in self.slots.items():
            if not pattern.match(name):
                slots[name] = slot
            elif not placed:
                placed = True
                for new, old in enumerate(order):
                    for source, rest in by_index[old]:
                        renamed = f"{container}.{new}.{rest}"
                        slots[renamed] = replace(self.slots[source], name=renamed)
        self.slots = slots
        self._aliases, self._suffixes = self._make_aliases(), None
        self._found.clear()
        return container, len(order), order

    def find(self, name: str) -> str | None:
        """The base's name for a parameter path of an adapter, or None.

        In this order: the exact name, an alias, the name without leading segments that the base does not have
        (`transformer.h.0` on `h.0`), the unique name that ends in it (`encoder.layer.0` on `bert.encoder.layer.0`).
        Segments that are numbers are never dropped or added.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> str | None:
        if name in self.slots:
            return name
        if name in self._aliases:
            return self._one(name, self._aliases[name])
        if (inside := self._in_component(name)) is not None:
            return inside
        hits: set[str] = set()
        segments = name.split(".")
        for k in range(1, len(segments) - 1):
            if segments[k - 1].isdigit():
                break
            rest = ".".join(segments[k:])
            found = {rest} if rest in self.slots else self._aliases.get(rest, set())
            if found:
                hits |= found
                break
        hits |= {
            full
            for known in self._suffix_index().get(name, ())
            for full in self._aliases.get(known, {known})
            if not any(s.isdigit() for s in known[: -len(name)].split("."))
        }
        return self._one(name, hits) if hits else None

    def _in_component(self, name: str) -> str | None:
        """A name in a base of several components, whose tensors are `folder/X`: `folder.X` by the rules for X inside
        that component, or X itself where one component alone has it."""
        folder, _, rest = name.partition(".")
        if folder in self._components:
            found = self._components[folder].find(rest)
            return None if found is None else f"{folder}/{found}"
        hits = {f"{folder}/{name}" for folder, inner in self._components.items() if name in inner}
        return self._one(name, hits) if hits else None

    @cached_property
    def _components(self) -> Mapping[str, Namespace]:
        """The components of a pipeline, each as a base of its own."""
        groups: dict[str, list[Slot]] = defaultdict(list)
        for name, slot in self.slots.items():
            folder, slash, rest = name.partition("/")
            if slash:
                groups[folder].append(replace(slot, name=rest))
        return {folder: Namespace(slots, self.families, {}) for folder, slots in groups.items()}

    def _one(self, name: str, hits: set[str]) -> str:
        if len(hits) > 1:
            raise MismatchError(
                "binding.ambiguous",
                f"{quoted(name)} of the adapter could be {some(sorted(hits))} of the base",
                tensors=sorted(hits),
            )
        return next(iter(hits))

    def target(self, name: str, flat: Sequence[str] = ()) -> Target | None:
        """Where a parameter path of an adapter lies, whatever layout of its family either of them uses.

        Args:
            flat: prefixes of flattened module paths (`lora_unet_down_blocks_0_...`) that the dialect may write.
        """
        if name in self.slots:
            return self._stored(name)
        if (view := self._layout_view(name)) is not None:
            return self._as_target(view)
        if self._layout is not None and self._layout.lacks(name):
            return None  # not to be found in another component
        if flat and (found := self._find_flat(name, flat)) is not None:
            return found
        if (stored := self.find(name)) is not None:
            return self._stored(stored)
        view = self._fusions.find(name)
        return None if view is None else self._as_target(view)

    def parts(self, name: str) -> list[View] | None:
        """Where the parts of a fused parameter lie, in their order; None where no rule knows it."""
        return self._fusions.parts(name)

    def size(self, name: str) -> int | None:
        """A size of the model (`heads`, ...), from its config; None where that does not say."""
        return self._fusions.size(name)

    def _layout_view(self, name: str) -> View | None:
        """The view of a name of either layout of the base's family, where it has two."""
        return None if self._layout is None else self._layout.view(name)

    @cached_property
    def _layout(self) -> Layout | None:
        return detect_layout({name: slot.shape for name, slot in self.slots.items()})

    def _find_flat(self, name: str, flat: Sequence[str]) -> Target | None:
        """A flattened path: prefix, module path with `_` for `.`, then the parameter."""
        module, _, leaf = name.partition(".")
        for prefix in flat:
            if module.startswith(prefix):
                found = self._flattened.get(f"{module[len(prefix) :]}.{leaf}", ())
                if found:
                    return self._stored(self._one(name, set(found)))
        return None

    @cached_property
    def _flattened(self) -> Mapping[str, list[str]]:
        """Flattened module path and parameter -> stored names."""
        index: dict[str, list[str]] = defaultdict(list)
        for name in self.slots:
            module, _, leaf = name.rpartition(".")
            index[f"{module.replace('.', '_')}.{leaf}"].append(name)
        return index

    def _stored(self, name: str) -> Target:
        return Target(whole_view(name, self.slots[name].shape), name)

    def _as_target(self, view: View) -> Target:
        stored = view.parts[0].tensor
        if view.whole and view.shape == self.slots[stored].shape:
            return Target(view, stored)
        return Target(view)

    def is_flipped(self, claimed: Any, module: str) -> bool:
        """Whether a linear is stored (in, out) where its shape does not tell: its architecture does, or what the
        adapter's config claims."""
        if module in self.oriented:
            return False
        known = self.families.is_transposed(self.model_type, module)
        return bool(claimed) if known is None else known

    def _make_aliases(self) -> dict[str, set[str]]:
        renamed = [r for r in self.families.renamed if not r.model_types or r.model_types & self.model_types]
        aliases: dict[str, set[str]] = defaultdict(set)
        for name in self.slots:
            known = [name]
            for new, old, below in self.families.aliases:
                was, now = f".{old}.", f".{new}."
                for form in tuple(known):
                    dotted = f".{form}."
                    at = dotted.find(was)
                    if at >= 0 and (not below or dotted[:at].endswith(f".{below}")):
                        known.append((dotted[:at] + now + dotted[at + len(was) :])[1:-1])
            for rule in renamed:
                known += [other for form in tuple(known) if (other := rule.other(form)) not in known]
            for form in known[1:]:
                aliases[form].add(name)
        return aliases

    def _suffix_index(self) -> dict[str, list[str]]:
        if self._suffixes is None:
            index: dict[str, list[str]] = defaultdict(list)
            for name in (*self.slots, *self._aliases):
                at = name.find(".")
                while at >= 0:
                    index[name[at + 1 :]].append(name)
                    at = name.find(".", at + 1)
            self._suffixes = index
        return self._suffixes

    def find_stack(self, name: str) -> Stack | None:
        """A stacked parameter by its name in memory, whole or as pieces on disk."""
        whole = self.find(name)
        if whole is not None:
            shape = self.slots[whole].shape
            return Stack(whole, (shape[0], shape[1], shape[2]), ()) if len(shape) == 3 else None
        for stacked, rows in self.families.stacks:
            if name != stacked and not name.endswith(f".{stacked}"):
                continue
            prefix = name[: len(name) - len(stacked)]
            pieces: list[tuple[tuple[str, int, int], ...]] = []
            while True:
                names = [self.find(prefix + row.format(e=len(pieces))) for row in rows]
                found = [n for n in names if n is not None]
                if len(found) != len(rows):
                    break
                first, expert = 0, []
                for n in found:
                    expert.append((n, first, self.slots[n].shape[0]))
                    first += self.slots[n].shape[0]
                pieces.append(tuple(expert))
            if pieces:
                columns = self.slots[pieces[0][0][0]].shape[1]
                return Stack(name, (len(pieces), sum(n for _, _, n in pieces[0]), columns), tuple(pieces))
        return None

    def hint(self, name: str) -> str:
        """Why a name may have matched nothing: the layers that the base has, or its nearest name."""
        segments = name.split(".")
        for i, segment in enumerate(segments):
            if not segment.isdigit() or i == 0:
                continue
            parent = segments[i - 1]
            indices = {
                int(m[1])
                for full in self.slots
                for m in [re.search(rf"(?:^|\.){re.escape(parent)}\.(\d+)\.", full)]
                if m
            }
            if indices and int(segment) > max(indices):
                return f"the base has {parent} 0..{max(indices)}"
        leaf = segments[-2:] if len(segments) > 1 else segments
        pool = [n for n in self.slots if n.endswith(".".join(leaf))] or list(self.slots)
        near = difflib.get_close_matches(name, pool[:2000], n=1, cutoff=0.5)
        return f"the nearest name in the base is {quoted(near[0])}" if near else ""


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """The model type of a config and those of the configs that it nests."""
    found = [config.get("model_type"), *(c.get("model_type") for c in config.values() if isinstance(c, dict))]
    return frozenset(t for t in found if isinstance(t, str))


def slots_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[Slot]:
    """Slots for tensors given as name -> (dtype, shape)."""
    return [Slot(name, name, dtype, shape) for name, (dtype, shape) in shapes.items()]
