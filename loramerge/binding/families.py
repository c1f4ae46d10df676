"""Families: reads `formats/families/*.toml`, what the names of a checkpoint do not say by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from loramerge.formats import load_formats


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
    renamed: tuple[tuple[frozenset[str], tuple[tuple[str, str], ...]], ...]
    layers: Mapping[str, Any]
    heads: tuple[Mapping[str, Any], ...]

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

    def head_of(self, module: str) -> Mapping[str, Any] | None:
        """The kind of task head that a parameter path belongs to."""
        segments = module.split(".")
        return next((h for h in self.heads if any(m in segments for m in h["modules"])), None)


@cache
def families() -> Families:
    """The joined tables."""
    tables = load_formats("families")

    def rows(key: str) -> list[Mapping[str, Any]]:
        return [row for table in tables for row in table.get(key, ())]

    def only(key: str) -> Mapping[str, Any]:
        return next((table[key] for table in tables if key in table), {})

    tie = only("tie")
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
        renamed=tuple((frozenset(r["model-types"]), tuple((a, b) for a, b in r["parts"])) for r in rows("renamed")),
        layers=only("layers"),
        heads=tuple(rows("head")),
    )
