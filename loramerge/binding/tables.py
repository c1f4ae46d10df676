"""Reads the families that have two layouts (`formats/families/*.toml`): their components, and which paths are equal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from loramerge.errors import InputError
from loramerge.formats import extra_formats, load_formats

SIDES = ("hf", "ldm")
"""The two layouts of a family: a folder for each component, as diffusers keeps it, and the original single file."""

_EXPRESSION = re.compile(r"\{([^{}]+)\}")
_TERM = re.compile(r"([+-]?)([^+-]+)")


@dataclass(frozen=True)
class Equality:
    """Paths that are the same in both layouts: module paths, or whole parameters; what follows them keeps its name.

    Several `hf` paths are the rows of the one `ldm` path, one after the other; `heights` tells how many each has
    (`H`: as many as the weight has columns, `*`: the rest), empty for equal shares. `swap`: the halves of the rows
    are exchanged. `transpose`: rows and columns are.
    """

    hf: tuple[str, ...]
    ldm: str
    heights: tuple[str, ...] = ()
    swap: bool = False
    transpose: bool = False

    def paths(self, side: str) -> tuple[str, ...]:
        """Its paths in one layout."""
        return self.hf if side == "hf" else (self.ldm,)


@dataclass(frozen=True)
class Component:
    """One model of a family.

    `folder`: its name in the `hf` layout. `ldm`: its prefixes in single files. `dotted`, `flat`: prefixes that
    adapters write before its paths. `root`: a leading part of its paths that may be missing. `also`: other last
    segments of modules (`hf` paths). `detect`: layout -> parameters that it has; with `!` before it, has not.
    `modules`: further module paths that tell an adapter's family, alike in both layouts.
    """

    folder: str
    ldm: tuple[str, ...]
    dotted: tuple[str, ...]
    flat: tuple[str, ...]
    root: str
    also: tuple[tuple[str, str], ...]
    detect: Mapping[str, tuple[str, ...]]
    rows: tuple[Mapping[str, Any], ...]
    leaves: Mapping[str, Mapping[str, Any]]
    modules: tuple[str, ...] = ()

    def equalities(self, names: Sequence[str], side: str) -> list[Equality]:
        """All equalities that may say something of parameters with these names in that layout."""
        known = {int(s) for name in names for s in name.split(".") if s.isascii() and s.isdecimal() and len(s) < 7}
        return [equal for row in self.rows for equal in self._expanded(row, sorted(known), names, side)]

    def _expanded(
        self, row: Mapping[str, Any], known: Sequence[int], names: Sequence[str], side: str
    ) -> Iterator[Equality]:
        each = row.get("each")
        ranges: dict[str, Sequence[int]] = {name: range(n) for name, n in each.items()} if each else {}
        if not each and "{n}" in row["hf"]:
            ranges = {"n": _present(row[side], known, names)}
        last = max(ranges["n"], default=None) if "last" in row else None
        for values in product(*ranges.values()):
            env = dict(zip(ranges, values, strict=True))
            hf, ldm = filled(row["hf"], env), filled(row["ldm"], env)
            leaf = dict(self.leaves[row["leaf"]]) if "leaf" in row else {}
            if last is not None and env["n"] == last:
                leaf |= self.leaves[row["last"]]
            for inner, outer in leaf.items():
                facts = outer if isinstance(outer, Mapping) else {"ldm": outer}
                yield _equality([_path(hf, part) for part in inner.split("|")], _path(ldm, facts["ldm"]), facts)
            if not row.get("closed"):
                yield _equality([hf], ldm, row)


def _present(pattern: str, known: Sequence[int], names: Sequence[str]) -> Sequence[int]:
    """The indices n with which a path begins some name."""
    head, _, _ = pattern.partition("{n}")
    found = set()
    for name in names:
        if name.startswith(head):
            found.add(name[len(head) :].partition(".")[0])
    return [n for n in known if str(n) in found]


def _equality(hf: Sequence[str], ldm: str, facts: Mapping[str, Any]) -> Equality:
    swap, transpose = facts.get("swap_halves", False), facts.get("transpose", False)
    return Equality(tuple(hf), ldm, tuple(facts.get("heights", ())), swap, transpose)


def _path(head: str, tail: str) -> str:
    return f"{head}.{tail}" if head else tail


def filled(pattern: str, env: Mapping[str, int]) -> str:
    """`down_blocks.{3*i+1}` with i = 2 -> `down_blocks.7`: sums of products of numbers and indices."""

    def value(match: re.Match[str]) -> str:
        total = 0
        for sign, term in _TERM.findall(match[1]):
            amount = 1
            for factor in term.split("*"):
                amount *= env[factor] if factor in env else int(factor)
            total += -amount if sign == "-" else amount
        return str(total)

    return _EXPRESSION.sub(value, pattern)


@dataclass(frozen=True)
class Family:
    """A family with two layouts. The first component is its network; `also`: further names of modules (ldm paths),
    each with the ldm path that it stands for, perhaps with the rows `[0:3H]` of it. `fallback`: it stands for models
    without a table, with equal layouts."""

    name: str
    components: tuple[Component, ...]
    also: tuple[tuple[str, str], ...]
    fallback: bool


def layout_families() -> tuple[Family, ...]:
    """All families that have components.

    Raises:
        InputError: `formats.invalid` for a table that refers to what is not there.
    """
    return _layout_families(extra_formats())


@cache
def _layout_families(extra: str) -> tuple[Family, ...]:
    tables = {table["name"]: table for table in load_formats("families")}
    roles: dict[str, Any] = {}
    wrappers: list[str] = []
    for table in tables.values():
        roles |= table.get("role", {})
        wrappers += table.get("wrappers", ())
    made = []
    for table in tables.values():
        if "component" not in table:
            continue
        try:
            components = tuple(
                _component(folder, *_resolved(table, row, tables), roles, wrappers)
                for folder, row in table["component"].items()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "formats.invalid",
                f"a component refers to what is not there: {error}",
                fix="formats/README.md tells what a family must say",
                file=table.get("file"),
            ) from None
        also = tuple(table.get("also", {}).items())
        made.append(Family(table["name"], components, also, table.get("fallback", False)))
    return tuple(made)


def _resolved(
    table: Mapping[str, Any], row: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """A component with what it takes from the one that it is `like`, and the leaves that its rows name."""
    if "like" not in row:
        return row, table.get("leaf", {})
    name, _, component = row["like"].partition(".")
    other = tables[name]
    found, leaves = _resolved(other, other["component"][component], tables)
    return {**found, **row}, leaves


def _component(
    folder: str,
    row: Mapping[str, Any],
    leaves: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, Any],
    wrappers: Iterable[str],
) -> Component:
    role = roles[row["role"]]
    for named in row["rows"]:
        for key in ("leaf", "last"):
            if key in named:
                leaves[named[key]]  # KeyError: told as such
    ldm = tuple(row.get("ldm", role.get("ldm", ())))
    plain = dict.fromkeys((f"{folder}.", *role.get("dotted", ()), *row.get("dotted", ()), *filter(None, ldm)))
    dotted = [head for one in plain for head in (one, *(f"{one}{wrapper}" for wrapper in wrappers))]
    return Component(
        folder=folder,
        ldm=ldm,
        dotted=tuple(dotted),
        flat=tuple(dict.fromkeys((*role.get("flat", ()), *row.get("flat", ())))),
        root=row.get("root", ""),
        also=tuple(role.get("also", {}).items()),
        detect={side: tuple(names) for side, names in row.get("detect", {}).items()},
        rows=tuple(row["rows"]),
        leaves=leaves,
        modules=tuple(row.get("modules", ())),
    )
