"""The names of a base and every alias under which an adapter may know them; lookups that never guess."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from loramerge.binding.families import Families
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


class Namespace:
    """Names, dtypes and shapes of a base, with lookups by alias.

    Raises (all lookups):
        MismatchError: `binding.ambiguous` where a name could be two tensors.
    """

    def __init__(self, slots: Iterable[Slot], families: Families, model_type: str | None) -> None:
        self.slots: dict[str, Slot] = {slot.name: slot for slot in slots}
        self.families = families
        self.model_type = model_type
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

    def _one(self, name: str, hits: set[str]) -> str:
        if len(hits) > 1:
            raise MismatchError(
                "binding.ambiguous",
                f"{quoted(name)} of the adapter could be {some(sorted(hits))} of the base",
                tensors=sorted(hits),
            )
        return next(iter(hits))

    def _make_aliases(self) -> dict[str, set[str]]:
        aliases: dict[str, set[str]] = defaultdict(set)
        for new, old, below in self.families.aliases:
            was, now = f".{old}.", f".{new}."
            for name in self.slots:
                dotted = f".{name}."
                at = dotted.find(was)
                if at >= 0 and (not below or dotted[:at].endswith(f".{below}")):
                    aliases[(dotted[:at] + now + dotted[at + len(was) :])[1:-1]].add(name)
        for types, parts in self.families.renamed:
            if self.model_type not in types:
                continue
            for name in self.slots:
                dotted = f".{name}."
                for disk, memory in parts:
                    dotted = dotted.replace(f".{disk}.", f".{memory}.", 1)
                if dotted[1:-1] != name:
                    aliases[dotted[1:-1]].add(name)
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


def slots_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[Slot]:
    """Slots for tensors given as name -> (dtype, shape)."""
    return [Slot(name, name, dtype, shape) for name, (dtype, shape) in shapes.items()]
