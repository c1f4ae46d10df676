"""Targets of a conversion: a dialect with a `[write]` table, or a server (`formats/servers/`) that reads one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loramerge.adapters.dialect import Dialect, dialect_named, dialects
from loramerge.errors import InputError, UsageError
from loramerge.formats import load_formats


@dataclass(frozen=True)
class Target:
    """What to write. `write` is the dialect's `[write]` table; the other fields are what a server restricts.

    `keys`: kind -> factor -> suffix. `ranks`: the ranks that are allowed, empty for any; `one_rank`: all modules get
    the same. `refuse`: part -> why the server does not read it.
    """

    name: str
    title: str
    dialect: Dialect
    write: Mapping[str, Any]
    keys: Mapping[str, Mapping[str, str]]
    scale: str
    one_rank: bool = False
    ranks: tuple[int, ...] = ()
    last_names: bool = False
    plain: bool | tuple[str, ...] = False
    refuse: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[Mapping[str, Any], ...]:
        """Rows of component prefixes; empty for dialects of one model."""
        return tuple(self.write.get("component", ()))


def target_names() -> list[str]:
    """Every name that `--to` takes."""
    written = [d for d in dialects() if d.write.get("keys")]
    return sorted({n for d in written for n in (d.name, *d.also)} | {t["name"] for t in load_formats("servers")})


def default_target() -> Target:
    """What is written where nothing says what to write: the dialect whose `[write]` table says `default`."""
    return target_named(next(d.name for d in dialects() if d.write.get("default")))


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        UsageError: `usage.target` with the nearest name.
    """
    name = name.lower()
    name = next((d.name for d in dialects() if name in d.also), name)
    server = next((t for t in load_formats("servers") if t["name"] == name), None)
    dialect = dialect_named(server["dialect"] if server else name)
    if dialect is None or not dialect.write.get("keys"):
        near = difflib.get_close_matches(name, target_names(), n=1)
        reads = dialect is not None or any(d.name == name for d in dialects())
        what = f"{name!r} is read, not written" if reads else f"there is no dialect {name!r} to convert to"
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(target_names())}"
        raise UsageError("usage.target", what, fix=fix)
    write = dialect.write
    if server is None:
        plain = write.get("plain", False)
        one_rank = write.get("one-rank", False)
        return Target(name, dialect.title, dialect, write, write["keys"], write["scale"], one_rank, plain=plain)
    _check_server(server)
    refuse = server.get("refuse", {})
    keys = {
        kind: {factor: suffix for factor, suffix in row.items() if factor not in refuse}
        for kind, row in write["keys"].items()
        if kind in server["kinds"]
    }
    return Target(
        name,
        server["title"],
        dialect,
        write,
        keys,
        server.get("scale", write["scale"]),
        server.get("one-rank", False),
        tuple(server.get("ranks", ())),
        server.get("last-names", False),
        tuple(server.get("whole-modules", ())),
        refuse,
        tuple(server.get("notes", ())),
    )


def _check_server(server: Mapping[str, Any]) -> None:
    for name in ("title", "dialect", "kinds"):
        if name not in server:
            raise InputError("formats.invalid", f"has no {name}", fix="see formats/README.md", file=server.get("file"))
