"""Configs of adapters: the file beside the weights or the metadata in them, under our names for their fields."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramerge.adapters.adapter import Section
from loramerge.adapters.dialect import Dialect, dialect_named, dialects, dotted
from loramerge.adapters.patterns import Patterns
from loramerge.errors import InputError, UnsupportedError
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import plural, quoted, some

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
_FLAGS = ("rslora", "dora", "lora-bias", "fan-in-fan-out", "tied")


@dataclass(frozen=True)
class Config:
    """The fields of a config, and the file that they were read from as the user would name it."""

    fields: Mapping[str, Any]
    where: str


def read_config(checkpoint: Checkpoint) -> Config | None:
    """The config beside an adapter's weights; None where there is none.

    Raises:
        InputError: `adapter.config` for what is not a JSON object (or YAML mapping, by its name).
    """
    folder = checkpoint.directory or checkpoint.path.parent
    for name in sorted({d.detect["config"] for d in dialects() if "config" in d.detect}):
        file = folder / name
        if not file.is_file():
            continue
        shown = str(Path(checkpoint.name) / name) if checkpoint.directory else str(file)
        source = FileSource(file, shown)
        try:
            raw = source.read(0, source.size)
        finally:
            source.close()
        parse: Callable[..., Any] = strictjson.loads
        if name.endswith((".yaml", ".yml")):
            from loramerge.tensors import strictyaml

            parse = strictyaml.loads
        value = parse(raw, where=shown, code="adapter.config")
        if not isinstance(value, dict):
            raise InputError("adapter.config", "is not a JSON object", file=shown)
        return Config(value, shown)
    return None


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of an adapter's weight files, joined."""
    joined: dict[str, str] = {}
    for file in checkpoint.files:
        joined |= file.header.metadata
    return joined


def settings_of(
    dialect: Dialect,
    config: Mapping[str, Any],
    where: str,
    residual_base: bool,
    notes: list[str],
    original_base: bool = False,
) -> dict[str, Any]:
    """The values of a config under our own names, each checked for its type.

    Args:
        residual_base, original_base: what the user says of the base, where training changed it first: it is the changed
            one, or the one before.

    Raises:
        UnsupportedError: a type, field or initialisation that cannot be merged, by name.
        InputError: `adapter.config` for values of the wrong type.
    """
    kind = dotted(config, dialect.config["type"]) if "type" in dialect.config else None
    method = dialect.methods.get(str(kind), {})
    names = {k: v for k, v in dialect.config.items() if k not in ("harmless", "open")} | dict(method.get("config", {}))
    names = {ours: theirs for ours, theirs in names.items() if theirs}  # "": this method has no such field
    settings = {ours: value for ours, theirs in names.items() if (value := dotted(config, theirs)) is not None}
    if kind is not None and dialect.types and kind not in dialect.types.get("merge", ()):
        reason = dialect.types.get("refuse", {}).get(kind, "this kind of adapter is not known")
        raise UnsupportedError(
            "adapter.type",
            f"{kind} cannot be merged: {reason}",
            fix="load it beside its model with the library that trained it",
            file=where,
        )
    refuse = {**dialect.refuse, **method.get("refuse", {})}
    for name, reason in refuse.items():
        if name not in names.values() and config.get(name):
            raise UnsupportedError(
                "adapter.refused",
                f"{name}: {reason}",
                fix="load it beside its model with the library that trained it",
                file=where,
            )
    for name, reason in method.get("require", {}).items():
        if not config.get(name):
            raise UnsupportedError(
                "adapter.refused",
                f"{name} is not set: {reason}",
                fix=f"train or save it again with {name}, or load it beside its model with the library that trained it",
                file=where,
            )
    init_field = dialect.init.get("field", "")
    init = config.get(init_field)
    if isinstance(init, str) and init not in dialect.init["plain"] and not residual_base:
        raise UnsupportedError(
            "adapter.init",
            f"{init_field} = {quoted(init)} trains on a changed base, and nothing on disk tells which base this is",
            fix="if BASE is the residual model saved with it: --residual-base; else convert it with PEFT first",
            file=where,
        )
    changed = {name: reason for name, reason in dialect.init.get("fields", {}).items() if config.get(name)}
    for name, reason in changed.items():
        if not residual_base and not original_base:
            raise UnsupportedError(
                "adapter.refused",
                f"{name}: {reason}",
                fix="say which BASE is: --original-base (before training) or --residual-base (as training changed it)",
                file=where,
            )
        settings["residual-base"] = residual_base
    known = {*names.values(), *dialect.config.get("harmless", ()), *method.get("harmless", ()), *refuse, init_field}
    known |= changed.keys()
    known |= {name.partition(".")[0] for name in known}
    unknown = sorted(k for k, v in config.items() if k not in known and v not in _EMPTY)
    if unknown and dialect.config and not dialect.config.get("open"):
        raise UnsupportedError(
            "adapter.field",
            f"the config has {plural(len(unknown), 'field')} whose meaning is not known: {some(unknown)}",
            fix="a newer loramerge may know it; if it changes nothing, remove it from the config",
            file=where,
        )
    for ours, low in (("rank", 1), ("alpha", 0), ("scale", -math.inf)):
        if ours in settings:
            settings[ours] = number(settings[ours], names[ours], low, where)
    for ours in _FLAGS:
        if ours in settings and not isinstance(settings[ours], bool):
            raise InputError("adapter.config", f"{names[ours]} is not true or false", file=where)
    if settings.get("alpha") == 0 and dialect.scale.get("zero") != "one":
        notes.append("alpha is 0: the adapter changes nothing")
    if "note" in method:
        notes.append(method["note"])
    if "note-unversioned" in method and not settings.get("version") and settings.get("alpha") != settings.get("rank"):
        notes.append(method["note-unversioned"])
    return settings


def metadata_settings(dialect: Dialect, metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Settings that a dialect keeps in the metadata of its weight file: the first of the names that is there."""
    settings: dict[str, Any] = {}
    for ours, theirs in dialect.metadata.items():
        if ours in ("sections", "section-dialect", "refuse"):
            continue
        for name in [theirs] if isinstance(theirs, str) else theirs:
            if name in metadata:
                settings[ours] = _value(metadata[name])
                break
    for ours, low in (("rank", 1), ("alpha", 0)):
        if ours in settings:
            if not isinstance(settings[ours], int | float):
                del settings[ours]  # "Dynamic", "None": what informs only need not be a number
            else:
                settings[ours] = number(settings[ours], ours, low, where)
    for name, reason in dialect.metadata.get("refuse", {}).items():
        if _value(metadata.get(name, "")) not in _EMPTY:
            raise UnsupportedError("adapter.refused", f"{name}: {reason}", file=where)
    return settings


def sections_of(dialect: Dialect, metadata: Mapping[str, str], where: str, notes: list[str]) -> tuple[Section, ...]:
    """Configs of several components that a dialect keeps as one JSON text in its metadata (`component.field`).

    Raises:
        InputError: `adapter.config`.
        UnsupportedError: as `settings_of`.
    """
    text = metadata.get(dialect.metadata.get("sections", ""))
    if not text:
        return ()
    value = strictjson.loads(text.encode(), where=where, code="adapter.config")
    if not isinstance(value, dict):
        raise InputError("adapter.config", "its metadata is not a JSON object", file=where)
    parts: dict[str, dict[str, Any]] = {}
    for name, entry in value.items():
        component, _, field = name.partition(".")
        parts.setdefault(component, {})[field] = entry
    inner = dialect_named(dialect.metadata["section-dialect"])
    assert inner is not None
    made = []
    for component, config in parts.items():
        settings = settings_of(inner, config, where, False, notes)
        made.append(Section(f"{component}.", settings, *patterns_of(inner, settings, where)))
    return tuple(made)


def patterns_of(dialect: Dialect, settings: Mapping[str, Any], where: str) -> tuple[Patterns, Patterns]:
    """The rank and the alpha patterns of a config."""
    rank, alpha = (_numbers(settings.get(ours), ours, dialect, where) for ours in ("rank-pattern", "alpha-pattern"))
    return Patterns(rank, where), Patterns(alpha, where)


def _value(text: str) -> Any:
    """A metadata string as the JSON value that it spells, or itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if not isinstance(value, float) or math.isfinite(value) else text


def number(value: Any, name: str, low: float, where: str) -> float:
    """A finite number of a config, at least `low`.

    Raises:
        InputError: `adapter.config`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError("adapter.config", f"{name} is {quoted(value)}, not a number", file=where)
    if value < low:
        raise InputError("adapter.config", f"{name} is {value}, less than {low}", file=where)
    return value


def _numbers(value: Any, ours: str, dialect: Dialect, where: str) -> dict[str, float]:
    if value is None:
        return {}
    name = dialect.config.get(ours, ours)
    if not isinstance(value, dict):
        raise InputError("adapter.config", f"{name} is not an object", file=where)
    low = 1 if ours == "rank-pattern" else 0
    return {k: number(v, f"{name}[{quoted(k)}]", low, where) for k, v in value.items()}
