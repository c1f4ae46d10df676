"""Which modules of several adapters are one: by name where the names are of one kind, by a base where they are not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from loramerge.combining.reading import TOKENS, UPDATE, WHOLE, Key, Source
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.text import quoted, some

_NUMBER = re.compile(r"\d+")


@dataclass
class Slot:
    """One place of the result: what it is called there, in the first adapter that has it (`module`), and the key that
    each has for it."""

    key: Key
    path: str
    flat: bool
    module: str
    held: dict[int, Key] = field(default_factory=dict)


def matched(sources: Sequence[Source]) -> list[Slot]:
    """Every place that some adapter changes, in the order of the first, then of the others.

    Raises:
        MismatchError: `combine.needs-base` where names are of different kinds; `combine.architecture` where adapters
            are of different models. UnsupportedError: `combine.collision` where one replaces what another adds to.
    """
    roles = _roles(sources)
    based = all(source.rebase is not None for source in sources)
    if not based and len(sources) > 1:
        _check_names(sources, roles)
    slots: dict[Key, Slot] = {}
    for number, source in enumerate(sources):
        for key in source.entries:
            shared = key._replace(role=roles[number].get(key.role, key.role))
            slot = slots.get(shared)
            if slot is None:
                path = source.display.get(key, key.path)
                slot = slots[shared] = Slot(shared, path, key in source.flat, source.modules[key])
            slot.held[number] = key
    _check_collisions(list(slots.values()), sources)
    return list(slots.values())


def _roles(sources: Sequence[Source]) -> list[dict[str, str]]:
    """What the component that an adapter does not name is called by the others, where they all name but one."""
    named = {key.role for source in sources for key in source.entries if key.role}
    made = []
    for source in sources:
        own = {key.role for key in source.entries}
        made.append({"": next(iter(named))} if own == {""} and len(named) == 1 else {})
    return made


def _check_names(sources: Sequence[Source], roles: Sequence[dict[str, str]]) -> None:
    kinds = {bool(source.flat) for source in sources}
    mixed = len(kinds) > 1
    named = [{roles[n].get(k.role, k.role) for k in s.entries} for n, s in enumerate(sources)]
    unnamed = any(r == {""} for r in named) and any(r != {""} for r in named)
    if mixed or unnamed:
        first = sources[0]
        other = next(
            s
            for n, s in enumerate(sources)
            if bool(s.flat) != bool(first.flat) or (unnamed and (named[n] == {""}) != (named[0] == {""}))
        )
        raise MismatchError(
            "combine.needs-base",
            f"{first.name} ({first.adapter.dialect.title}) and {other.name} ({other.adapter.dialect.title}) name "
            f"modules in different ways: {some([_example(first), _example(other)])}",
            fix="give the model they were trained on, whose headers tell both: --base BASE",
            file=other.name,
        )
    stems = [_stems(s, roles[n]) for n, s in enumerate(sources)]
    for number in range(1, len(sources)):
        for role in stems[0].keys() & stems[number].keys():
            if stems[0][role].isdisjoint(stems[number][role]):
                raise MismatchError(
                    "combine.architecture",
                    f"{sources[0].name} and {sources[number].name} are of different models, or name one in different "
                    f"ways: {some([min(stems[0][role]), min(stems[number][role])])}",
                    fix="give adapters of one model; if they are, --base BASE tells which of their modules are one",
                    file=sources[number].name,
                )


def _example(source: Source) -> str:
    return next(iter(source.entries)).path


def _stems(source: Source, roles: dict[str, str]) -> dict[str, set[str]]:
    """By component: what stands before the first number in paths, which is where a model keeps its layers."""
    found: dict[str, set[str]] = defaultdict(set)
    for key in source.entries:
        number = _NUMBER.search(key.path)
        if number is not None:
            found[roles.get(key.role, key.role)].add(key.path[: number.start()])
    return found


def _check_collisions(slots: Sequence[Slot], sources: Sequence[Source]) -> None:
    """One adapter's own copy of a weight beside its update of it is one thing; another's is not."""
    places: dict[Key, dict[str, Slot]] = defaultdict(dict)
    for slot in slots:
        places[slot.key._replace(what="")][slot.key.what] = slot
    for found in places.values():
        if WHOLE not in found:
            continue
        for what in (UPDATE, TOKENS):
            if what in found and found[what].held.keys() - found[WHOLE].held.keys():
                one = sources[next(iter(found[WHOLE].held))].name
                other = sources[min(found[what].held.keys() - found[WHOLE].held.keys())].name
                raise UnsupportedError(
                    "combine.collision",
                    f"{one} replaces {quoted(found[WHOLE].key.name)}, and {other} adds to it",
                    fix="leave one out with --exclude, or merge the adapters into the base",
                    tensors=[found[WHOLE].key.name],
                )
