"""Dialects: reads `formats/adapters/*.toml` and takes a key apart into module path, update kind and factor."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.errors import InputError
from loramerge.formats import extra_formats, load_formats

NO_FACTOR = ("harmless", "refused")
"""Kinds of keys that are no factors: without effect on a merge, or more than a weight can hold."""

OWN_KINDS = ("token-rows",)
"""Kinds that have no formula class of their own."""

ANY_KIND = "*"
"""The kind of a `[[key]]` whose factor belongs to whatever else the module has (its alpha, a magnitude)."""


@dataclass(frozen=True)
class KeyPattern:
    """One `[[key]]` of a dialect: a suffix, and the factor that a key with this suffix is.

    `leaf`: the parameter that it changes, where the kind does not say. `beside`: the suffix counts only where the
    module has a key with this other suffix. `modules`: only for modules whose path ends in one of these segments.
    `transposed`: the file holds the factor's last two axes exchanged, where it has so many as `axes` (0: any number).
    """

    suffix: str
    kind: str
    factor: str
    regex: re.Pattern[str]
    leaf: str = ""
    beside: str = ""
    transposed: bool = False
    modules: frozenset[str] = frozenset()
    axes: int = 0


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
    leaf: str = ""
    transposed: bool = False
    axes: int = 0


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
    renames: tuple[tuple[re.Pattern[str], str], ...]
    flat: tuple[str, ...]
    grows: bool
    plain: Mapping[str, str]
    scale: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    refuse: Mapping[str, str] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)
    quirks: tuple[Mapping[str, Any], ...] = ()
    experts: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Mapping[str, str], ...] = ()
    carried: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    renames_where: tuple[tuple[Mapping[str, Any], tuple[tuple[re.Pattern[str], str], ...]], ...] = ()
    only: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unreadable: str = ""
    placeholders: bool = False

    def settled(self, settings: Mapping[str, Any]) -> Dialect:
        """The dialect of a file with these settings: with the renames that hold only for some."""
        own = [r for when, renames in self.renames_where if holds(when, settings) for r in renames]
        return replace(self, renames=(*own, *self.renames)) if own else self

    def parse(self, key: str, keys: Mapping[str, Any] | None = None) -> ParsedKey:
        """Takes a key apart; a key without a known suffix is a plain parameter (kind `"plain"`).

        `keys` are all keys of the file, for suffixes that count only beside others.
        """
        for pattern in self.patterns:
            match = pattern.regex.search(key)
            if not match or match.start() == 0:
                continue
            if pattern.beside and (keys is None or key[: match.start()] + pattern.beside not in keys):
                continue
            if pattern.modules and key[: match.start()].rpartition(".")[2] not in pattern.modules:
                continue
            name = next((g for g in match.groups() if g), "")
            path, depth, inner, saved = self._clean(key[: match.start()])
            factor = pattern.factor.replace("{n}", name) if "{n}" in pattern.factor else pattern.factor
            named = "" if factor != pattern.factor else name
            return ParsedKey(
                key,
                path,
                pattern.kind,
                factor,
                depth,
                inner,
                named,
                saved,
                pattern.leaf,
                pattern.transposed,
                pattern.axes,
            )
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
        saved = self.saved in segments if self.saved else False
        path = ".".join(segments)
        for pattern, new in self.renames:
            path = pattern.sub(new, path)
        return path, depth, inner, saved


def _compile(suffix: str) -> re.Pattern[str]:
    """`[.*]` and `[.word]` are optional segments, `{n}` a number, `*` is anything; the rest stands for itself."""
    out = ""
    for part in re.split(r"(\[[^\]]*\]|\*|\{n\})", suffix):
        if part == "[.*]":
            out += r"(?:\.([^.]+))?"
        elif part == "{n}":
            out += r"(\d+)"
        elif part.startswith("["):
            out += f"(?:{re.escape(part[1:-1])})?"
        elif part == "*":
            out += ".*"
        else:
            out += re.escape(part)
    return re.compile(out + r"\Z")


def _rename(old: str, new: str) -> tuple[re.Pattern[str], str]:
    """A rename of whole segments: `{n}` on both sides is the same number; `^` ties it to the beginning."""
    anchored = old.startswith("^")
    body = re.escape(old.removeprefix("^")).replace(r"\{n\}", r"(\d+)")
    pattern = re.compile((r"^" if anchored else r"(?<![^.])") + body + r"(?![^.])")
    count = iter(range(1, 10))
    return pattern, re.sub(r"\{n\}", lambda _: rf"\g<{next(count)}>", new)


def dialects() -> tuple[Dialect, ...]:
    """All dialects of `formats/adapters/`, in the order in which they are tried.

    Raises:
        InputError: `formats.*` for a table that says less, or other things, than a dialect must.
    """
    return _dialects(extra_formats())


@cache
def _dialects(extra: str) -> tuple[Dialect, ...]:
    tables = {table["name"]: table for table in load_formats("adapters")}
    made = [_from_table(table, tables) for table in tables.values()]
    return tuple(sorted(made, key=lambda d: (d.detect.get("order", 50), d.name)))


def dialect_named(name: str) -> Dialect | None:
    """The dialect of this name."""
    return next((d for d in dialects() if d.name == name), None)


def _key_rows(table: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `[[key]]` rows of a dialect and of those it includes; its own come first."""
    rows = list(table.get("key", ()))
    for name in table.get("include", ()):
        if name not in tables:
            raise InputError("formats.include", f"there is no dialect {name}", file=f"{table['name']}.toml")
        rows += _key_rows(tables[name], tables)
    return rows


def _carried(table: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`[carried]` of a dialect and of those it includes."""
    joined = dict(table.get("carried", {}))
    for name in table.get("include", ()):
        joined = {**_carried(tables[name], tables), **joined}
    return joined


def _from_table(table: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> Dialect:
    _check_table(table)
    path = table.get("path", {})
    patterns: dict[tuple[str, str, frozenset[str]], KeyPattern] = {}
    for k in _key_rows(table, tables):
        row = KeyPattern(
            suffix=k["suffix"],
            kind=k["kind"],
            factor=k.get("factor", ""),
            regex=_compile(k["suffix"]),
            leaf=k.get("leaf", ""),
            beside=k.get("beside", ""),
            transposed=k.get("transpose", False),
            modules=frozenset(k.get("modules", ())),
            axes=k.get("axes", 0),
        )
        patterns.setdefault((row.suffix, row.beside, row.modules), row)
    # Longest first; of equal suffixes the one with a condition.
    ordered = sorted(patterns.values(), key=lambda p: (-len(p.suffix), not (p.beside or p.modules)))
    return Dialect(
        name=table["name"],
        title=table["title"],
        detect=table["detect"],
        patterns=tuple(ordered),
        prefixes=tuple(path.get("prefixes", ())),
        wrappers=frozenset(path.get("wrappers", ())),
        transparent=path.get("transparent", ""),
        saved=path.get("saved", ""),
        leaves=tuple(path.get("leaves", ("weight",))),
        renames=tuple(_rename(old, new) for old, new in path.get("rename", ())),
        flat=tuple(path.get("flat", ())),
        grows=path.get("grows", False),
        plain=table.get("plain", {}),
        scale=table.get("scale", {}),
        config=table.get("config", {}),
        metadata=table.get("metadata", {}),
        types=table.get("types", {}),
        methods=table.get("method", {}),
        shared=table.get("shared", {}),
        refuse=table.get("refuse", {}),
        init=table.get("init", {}),
        quirks=tuple(table.get("quirk", ())),
        experts=table.get("experts", {}),
        rows=tuple(table.get("rows", ())),
        options=table.get("options", {}),
        write=table.get("write", {}),
        notes=tuple(table.get("note", ())),
        carried=_carried(table, tables),
        also=tuple(table.get("also", ())),
        renames_where=tuple(
            (row["when"], tuple(_rename(old, new) for old, new in row["rename"]))
            for row in path.get("rename-where", ())
        ),
        only=table.get("only", {}),
        unreadable=table.get("unreadable", ""),
        placeholders=table.get("placeholders", False),
    )


def _check_table(table: Mapping[str, Any]) -> None:
    """What a person who writes a table may get wrong."""

    def wrong(what: str, fix: str) -> InputError:
        return InputError("formats.invalid", what, fix=fix, file=table.get("file"))

    for name in ("title", "detect"):
        if name not in table:
            raise wrong(f"has no {name}", "formats/README.md tells what a dialect must say")
    for row in table.get("key", ()):
        if not isinstance(row, Mapping) or not {"suffix", "kind"} <= row.keys():
            raise wrong("a [[key]] needs a suffix and a kind", "formats/README.md has examples")
        kind, factor = row["kind"], row.get("factor", "")
        if kind in NO_FACTOR:
            continue
        if kind != ANY_KIND and kind not in KINDS and kind not in OWN_KINDS:
            near = difflib.get_close_matches(str(kind), [*KINDS, *OWN_KINDS], n=1)
            known = f"did you mean {near[0]}?" if near else f"one of {', '.join(sorted(KINDS))}"
            raise wrong(f"[[key]] {row['suffix']}: there is no kind {kind}", known)
        names = factor_names(kind)
        if names and "{n}" not in factor and factor not in names:
            raise wrong(
                f"[[key]] {row['suffix']}: {kind} has no factor {factor or '(none given)'}",
                f"one of {', '.join(sorted(names))}",
            )


def factor_names(kind: str) -> set[str]:
    """The factors that a kind may have; empty where any name goes."""
    if kind == "low-rank":
        return {"A", "B", "mid", "diag", "bias", "embedding-A", "embedding-B", "alpha", *MAGNITUDES}
    if kind in OWN_KINDS or kind == ANY_KIND:
        return set()
    known = KINDS[kind]
    return {*known.required, *known.optional, "alpha", *MAGNITUDES}


def weight_names() -> tuple[str, ...]:
    """File names under which adapters are looked for in a directory, over all dialects."""
    names = (name for d in dialects() if not d.unreadable for name in d.detect.get("files", ()))
    return tuple(dict.fromkeys(names))


def detect(
    keys: Iterable[str], config: Mapping[str, Any] | None, metadata: Mapping[str, str] | None = None
) -> Dialect | None:
    """The dialect of a file with these keys and this metadata, beside a config with these fields; None where nothing
    fits."""
    keys = list(keys)
    by_config = [
        d
        for d in dialects()
        if told_by_config(d, config) and (not _names_conditions(d) or _told_by_names(d, keys, metadata or {}))
    ]
    for dialect in by_config:  # which may also lie beside a file that it does not belong to
        if any(p.regex.search(k) for k in keys for p in dialect.patterns if p.kind not in (ANY_KIND, *NO_FACTOR)):
            return dialect
    for dialect in dialects():
        if _told_by_names(dialect, keys, metadata or {}):
            return dialect
    if by_config:
        return by_config[0]
    # No config: whose factor names are these? The caller will miss the config and say so.
    for dialect in dialects():
        if (
            "config" in dialect.detect
            and not _names_conditions(dialect)
            and any(p.regex.search(k) for k in keys for p in dialect.patterns if p.kind == "low-rank")
        ):
            return dialect
    return None


def _names_conditions(dialect: Dialect) -> bool:
    """Whether a config alone does not tell the dialect: others have the same one."""
    return bool(dialect.detect.get("both"))


def told_by_config(dialect: Dialect, config: Mapping[str, Any] | None) -> bool:
    """Whether a config holds the fields that tell the dialect."""
    wanted: Sequence[str] = dialect.detect.get("keys", ())
    return bool(wanted) and config is not None and all(dotted(config, k) is not None for k in wanted)


def _told_by_names(dialect: Dialect, keys: Sequence[str], metadata: Mapping[str, str]) -> bool:
    """All conditions that the dialect names: `suffixes`, `prefixes`, `contains` (each of some key), `metadata`
    (`key` or `key=value`, any of them), `metadata-contains` (words in values), and `without`, what no key contains."""
    detect = dialect.detect
    tests = []
    if "suffixes" in detect:
        tests.append(any(k.endswith(tuple(detect["suffixes"])) for k in keys))
    if "prefixes" in detect:
        tests.append(any(k.startswith(tuple(detect["prefixes"])) for k in keys))
    if "contains" in detect:
        tests.append(any(word in k for k in keys for word in detect["contains"]))
    if "metadata" in detect:
        tests.append(any(_holds(metadata, row) for row in detect["metadata"]))
    for name, word in detect.get("metadata-contains", {}).items():
        tests.append(word in metadata.get(name, ""))
    if not tests:
        return False
    if "without" in detect:
        tests.append(not any(word in k for k in keys for word in detect["without"]))
    return all(tests)


def _holds(metadata: Mapping[str, str], row: str) -> bool:
    name, equals, value = row.partition("=")
    return name in metadata and (not equals or metadata[name] == value)


def holds(when: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether each setting named has one of the values given."""
    return all(settings.get(name) in values for name, values in when.items())


def unreadable(name: str) -> Dialect | None:
    """The dialect of a file of this name that is known and cannot be read."""
    return next((d for d in dialects() if d.unreadable and _is_file_of(d, name)), None)


def _is_file_of(dialect: Dialect, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in dialect.detect.get("files", ()))


def dotted(config: Mapping[str, Any], name: str) -> Any:
    """A field of a config, `a.b` reaching into nested ones; None where there is none."""
    value: Any = config
    if name in config:
        return config[name]
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
