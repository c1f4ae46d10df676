"""Families: reads `formats/families/*.toml`, what the names of a checkpoint do not say by themselves."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from loramerge.formats import extra_formats, load_formats


@dataclass(frozen=True)
class Tied:
    """An input embedding and the head that may share its tensor."""

    input: str
    output: str
    also: Mapping[str, str]
    refuse: str
    model_types: frozenset[str]
    """Only these, where a name alone does not tell; empty for any."""


@dataclass(frozen=True)
class Fused:
    """A weight whose rows are those of several modules in the other layout of its family."""

    fused: str
    """Module path by its last segments; with `{leaf}`, a parameter's path."""
    parts: tuple[str, ...]
    rows: tuple[str | int, ...]
    """How high the parts are, to scale; names are sizes of the config, `*` multiplies. Empty: all the same."""
    groups: str | int
    """Groups of rows that each hold an equal share of every part: 1, or a size; `rows` for rows in turn."""
    model_types: frozenset[str]
    when: Mapping[str, Any]
    """Fields of the config that must have these values, and what a config without them means."""
    assumed: Mapping[str, Any]
    like: str
    """A module beside it with as many columns as the first part has rows, for a base without a config."""
    rotary: frozenset[int]
    """Parts whose rows the fused weight keeps in pairs, and the split one in two halves of each head."""
    config: str
    """The nested config that the sizes are in, where it is not the language model's."""


@dataclass(frozen=True)
class Renamed:
    """Paths that a model's code renames on loading: on disk, in memory. `*` is any segment, `^` the path's start."""

    model_types: frozenset[str]
    """Only these; empty for any."""
    parts: tuple[tuple[str, str], ...]
    loading: bool = True
    """Whether the code of a model does it, not two models that hold one another."""

    def in_memory(self, name: str) -> str:
        """The name in memory of a path on disk; itself where it is the same."""
        return _replaced(name, self._forward)

    def other(self, name: str) -> str:
        """The name in the other of the two layouts; itself where it is the same in both."""
        changed = _replaced(name, self._forward)
        return changed if changed != name else _replaced(name, self._backward)

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(disk, memory) for disk, memory in self.parts]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return [_rule(memory, disk) for disk, memory in reversed(self.parts)]


@dataclass(frozen=True)
class ExpertLayout:
    """How models store stacked experts, where it is not (expert, gate then up, in)."""

    model_types: frozenset[str]
    transposed: bool
    """(expert, in, out) on disk."""
    alternating: bool
    """Gate and up take turns."""


@dataclass(frozen=True)
class Families:
    """All tables of `formats/families/`, joined."""

    transposed: tuple[tuple[frozenset[str], frozenset[str]], ...]
    tied: tuple[Tied, ...]
    tie_field: str
    tie_nested: tuple[str, ...]
    tie_heads: tuple[str, ...]
    stacks: tuple[tuple[str, tuple[str, ...]], ...]
    experts_transposed: frozenset[str]
    aliases: tuple[tuple[str, str, str], ...]
    renamed: tuple[Renamed, ...]
    fused: tuple[Fused, ...]
    sizes: Mapping[str, tuple[str, ...]]
    nested: tuple[str, ...]
    expert_layouts: tuple[ExpertLayout, ...]
    expert_pair: tuple[str, str]
    layers: Mapping[str, Any]
    heads: tuple[Mapping[str, Any], ...]
    no_linear: tuple[str, ...]
    shared: tuple[str, ...]
    buffers: tuple[str, ...]
    tasks: tuple[Mapping[str, Any], ...]

    def is_transposed(self, model_type: str | None, module: str) -> bool | None:
        """Whether this linear is stored (in, out); None where the model type is unknown."""
        name = module.rpartition(".")[2]
        if model_type is None:
            return None if any(name in modules for _, modules in self.transposed) else False
        return any(model_type in types and name in modules for types, modules in self.transposed)

    def is_vocabulary(self, module: str) -> bool:
        """Whether a module is named like an input embedding or a language-model head."""
        name = module.rpartition(".")[2]
        ends = {t.rpartition(".")[0].rpartition(".")[2] for pair in self.tied for t in (pair.input, pair.output)}
        return name in ends

    def is_linear(self, module: str) -> bool:
        """Whether a module with a weight of two axes is a linear, as far as its name tells: no embedding, no router."""
        return not _ends_in(module, (*self.no_linear, *self.shared))

    def is_shared(self, module: str) -> bool:
        """Whether several modules in memory share this one's weight, beside a tied head."""
        return _ends_in(module, self.shared)

    def is_buffer(self, name: str) -> bool:
        """Whether a model makes this tensor for itself, so that a file may lack it."""
        return name.rpartition(".")[2] in self.buffers

    def task_of(self, config: Mapping[str, Any]) -> str | None:
        """What a model is for, by its architecture, where it needs no head of its own for that."""
        known = config.get("architectures")
        name = str(known[0]) if isinstance(known, list) and known else ""
        for row in self.tasks:
            fits = all(config.get(field) == value for field, value in row.get("when", {}).items())
            if fits and name.endswith(tuple(row["architectures"])):
                return str(row["task"])
        return None

    def head_of(self, module: str) -> Mapping[str, Any] | None:
        """The kind of task head that a parameter path belongs to."""
        segments = module.split(".")
        return next((h for h in self.heads if any(m in segments for m in h["modules"])), None)


def families() -> Families:
    """The joined tables."""
    return _families(extra_formats())


@cache
def _families(extra: str) -> Families:
    tables = load_formats("families")

    def rows(key: str) -> list[Mapping[str, Any]]:
        return [row for table in tables for row in table.get(key, ())]

    def only(key: str) -> Mapping[str, Any]:
        return next((table[key] for table in tables if key in table), {})

    tie = only("tie")
    pair = only("experts").get("pair", ("", ""))
    return Families(
        transposed=tuple((frozenset(r["model-types"]), frozenset(r["modules"])) for r in rows("transposed")),
        tied=tuple(
            Tied(r["input"], r["output"], r.get("also", {}), r.get("refuse", ""), frozenset(r.get("model-types", ())))
            for r in rows("tied")
        ),
        tie_field=tie.get("field", ""),
        tie_nested=tuple(tie.get("nested", ())),
        tie_heads=tuple(tie.get("heads", ())),
        stacks=tuple((r["stacked"], tuple(r["rows"])) for r in rows("stack")),
        experts_transposed=frozenset(only("experts").get("transposed", ())),
        aliases=tuple((r["from"], r["to"], r.get("below", "")) for r in rows("alias")),
        renamed=tuple(
            Renamed(
                frozenset(r.get("model-types", ())),
                tuple((a, b) for a, b in r["parts"]),
                r.get("loading", True),
            )
            for r in rows("renamed")
        ),
        fused=tuple(_fused(r) for r in rows("fused")),
        sizes={name: tuple(fields) for name, fields in only("sizes").items()},
        nested=tuple(only("nested").get("configs", ())),
        expert_layouts=tuple(
            ExpertLayout(frozenset(r["model-types"]), r.get("transposed", False), r.get("alternating", False))
            for r in rows("expert-layout")
        ),
        expert_pair=(pair[0], pair[1]),
        layers=only("layers"),
        heads=tuple(rows("head")),
        no_linear=tuple(only("no-linear").get("modules", ())),
        shared=tuple(only("no-linear").get("shared", ())),
        buffers=tuple(only("no-linear").get("buffers", ())),
        tasks=tuple(rows("task")),
    )


def _ends_in(module: str, globs: Iterable[str]) -> bool:
    """Whether the last segments of a path match a glob of as many segments."""
    segments = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(segments[-glob.count(".") - 1 :]), glob) for glob in globs)


def _rule(old: str, new: str) -> tuple[re.Pattern[str], str]:
    """A pattern for `^.`, the path and a dot, and its replacement."""
    old, new = (f"^.{side[1:]}" if side.startswith("^") and side != "^" else side for side in (old, new))
    pattern = re.escape(old).replace(r"\*", r"([^.]+)")
    count = 0

    def group(_: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return rf"\g<{count}>"

    before = "" if old.startswith("^") else r"(?<=\.)"
    return re.compile(rf"{before}{pattern}(?=\.)"), re.sub(r"\*", group, new)


def _replaced(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    text = f"^.{name}."
    for pattern, new in rules:
        text = pattern.sub(new, text, count=1)
    return text[2:-1]


def _fused(row: Mapping[str, Any]) -> Fused:
    parts = tuple(row["parts"])
    return Fused(
        fused=row["fused"],
        parts=parts,
        rows=tuple(row.get("rows", ())),
        groups=row.get("groups", 1),
        model_types=frozenset(row.get("model-types", ())),
        when=row.get("when", {}),
        assumed=row.get("assumed", {}),
        like=row.get("like", ""),
        rotary=frozenset(parts.index(p) for p in row.get("rotary", ())),
        config=row.get("config", ""),
    )
