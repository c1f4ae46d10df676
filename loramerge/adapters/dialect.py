"""Dialects: reads `formats/adapters/*.toml` and takes a key apart into module path, update kind and factor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loramerge.formats import load_formats


@dataclass(frozen=True)
class KeyPattern:
    """One `[[key]]` of a dialect: a suffix, and the factor that a key with this suffix is."""

    suffix: str
    kind: str
    factor: str
    regex: re.Pattern[str]


@dataclass(frozen=True)
class ParsedKey:
    """A key of an adapter file, taken apart.

    `path` is the module path without wrappers; `depth` counts the transparent wrapper segments at its end
    (`X.base_layer.lora_A.weight` is `X` at depth 1); `inner` is the path that followed such a segment.
    """

    key: str
    path: str
    kind: str
    factor: str
    depth: int = 0
    inner: str = ""
    adapter_name: str = ""
    saved: bool = False


@dataclass(frozen=True)
class Dialect:
    """One file of `formats/adapters/`, ready for use. The fields are the tables of that file."""

    name: str
    title: str
    detect: Mapping[str, Any]
    patterns: tuple[KeyPattern, ...]
    prefixes: tuple[str, ...]
    wrappers: frozenset[str]
    transparent: str
    saved: str
    leaves: tuple[str, ...]
    plain: Mapping[str, str]
    scale: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    refuse: Mapping[str, str] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)
    quirks: tuple[Mapping[str, Any], ...] = ()
    experts: Mapping[str, Any] = field(default_factory=dict)

    def parse(self, key: str) -> ParsedKey:
        """Takes a key apart; a key without a known suffix is a plain parameter (kind `"plain"`)."""
        for pattern in self.patterns:
            match = pattern.regex.search(key)
            if match and match.start() > 0:
                name = next((g for g in match.groups() if g), "")
                path, depth, inner, saved = self._clean(key[: match.start()])
                return ParsedKey(key, path, pattern.kind, pattern.factor, depth, inner, name, saved)
        module, _, leaf = key.rpartition(".")
        path, depth, inner, saved = self._clean(module)
        name = ""
        if saved:  # a raw dump: X.modules_to_save.<adapter name>.<path inside X>.weight
            segments = path.split(".")
            at = segments.index(self.saved)
            name = segments[at + 1] if len(segments) > at + 1 else ""
            path = ".".join(segments[:at] + segments[at + 2 :])
        return ParsedKey(key, f"{path}.{leaf}" if path else leaf, "plain", leaf, depth, inner, name, saved)

    def _clean(self, path: str) -> tuple[str, int, str, bool]:
        """Removes prefixes and wrapper segments. Returns (path, depth, inner, saved)."""
        segments = [s for s in path.split(".") if s not in self.wrappers]
        path = ".".join(segments)
        while prefix := next((p for p in self.prefixes if f"{path}.".startswith(p)), ""):
            path = path[len(prefix) :]
        segments = path.split(".")
        depth = 0
        while self.transparent and segments and segments[-1] == self.transparent:
            segments.pop()
            depth += 1
        inner = ""
        if self.transparent in segments:
            inner = ".".join(segments[segments.index(self.transparent) + 1 :])
            segments = [s for s in segments if s != self.transparent]
        return ".".join(segments), depth, inner, self.saved in segments if self.saved else False


def _compile(suffix: str) -> re.Pattern[str]:
    """`[.*]` and `[.word]` are optional segments, `*` is anything; the rest stands for itself."""
    out = ""
    for part in re.split(r"(\[[^\]]*\]|\*)", suffix):
        if part == "[.*]":
            out += r"(?:\.([^.]+))?"
        elif part.startswith("["):
            out += f"(?:{re.escape(part[1:-1])})?"
        elif part == "*":
            out += ".*"
        else:
            out += re.escape(part)
    return re.compile(out + r"\Z")


@cache
def dialects() -> tuple[Dialect, ...]:
    """All dialects of `formats/adapters/`."""
    return tuple(_from_table(table) for table in load_formats("adapters"))


def _from_table(table: Mapping[str, Any]) -> Dialect:
    path = table.get("path", {})
    patterns = [
        KeyPattern(k["suffix"], k["kind"], k.get("factor", ""), _compile(k["suffix"])) for k in table.get("key", ())
    ]
    patterns.sort(key=lambda p: -len(p.suffix))
    return Dialect(
        name=table["name"],
        title=table["title"],
        detect=table["detect"],
        patterns=tuple(patterns),
        prefixes=tuple(path.get("prefixes", ())),
        wrappers=frozenset(path.get("wrappers", ())),
        transparent=path.get("transparent", ""),
        saved=path.get("saved", ""),
        leaves=tuple(path.get("leaves", ("weight",))),
        plain=table.get("plain", {}),
        scale=table.get("scale", {}),
        config=table.get("config", {}),
        types=table.get("types", {}),
        refuse=table.get("refuse", {}),
        init=table.get("init", {}),
        quirks=tuple(table.get("quirk", ())),
        experts=table.get("experts", {}),
    )


def weight_names() -> tuple[str, ...]:
    """File names under which adapters are looked for in a directory, over all dialects."""
    return tuple(name for d in dialects() for name in d.detect.get("files", ()))


def detect(keys: Iterable[str], config: Mapping[str, Any] | None) -> Dialect | None:
    """The dialect of a file with these keys, beside a config with these fields; None where nothing fits."""
    keys = list(keys)
    for dialect in dialects():
        wanted = dialect.detect.get("keys")
        if wanted and config is not None and all(k in config for k in wanted):
            return dialect
    for dialect in dialects():
        suffixes = tuple(dialect.detect.get("suffixes", ()))
        if suffixes and any(k.endswith(suffixes) for k in keys):
            return dialect
    # No config: whose factor names are these? The caller will miss the config and say so.
    for dialect in dialects():
        if any(p.regex.search(k) for k in keys for p in dialect.patterns if p.kind == "low-rank"):
            return dialect
    return None
