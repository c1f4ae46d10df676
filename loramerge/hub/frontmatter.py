"""The front matter of model cards: read from those of the inputs, as untrusted as anything, and written anew."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramerge.errors import InputError, LoramergeError
from loramerge.hub import cache
from loramerge.hub.reference import MAIN, SCHEME, resolve
from loramerge.tensors import strictyaml
from loramerge.tensors.text import quoted

MAX_BYTES = 2_000_000
CARD = "README.md"

_FENCE = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_PINNED = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?")
_CACHED = re.compile(
    r"(?:\A|.*/)models--(?P<repo>[\w.-]+--[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?/?"
)
_LINE = re.compile(r"[\w .,:/+()-]{1,200}")


@dataclass(frozen=True)
class Input:
    """A base or an adapter that something was made of: as its user named it, and on the Hub where that is known.

    `card`: the front matter of its card, empty where there is none or none that can be read.
    """

    source: str
    repo: str | None = None
    commit: str | None = None
    path: str = ""
    weight: float | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it in public: its place on the Hub, or the last part of its path."""
        if self.repo is not None:
            return self.repo
        return os.path.basename(os.path.abspath(self.source)) or self.source

    @property
    def license(self) -> str:
        """The licence that its card names, "" where it names none."""
        return _words(self.card.get("license_name")) or _words(self.card.get("license"))


def parse(raw: bytes, where: str) -> dict[str, Any]:
    """The front matter of a card; empty where it has none.

    Raises:
        InputError: ``card.invalid``.
    """
    match = _FENCE.match(raw[:MAX_BYTES])
    if match is None:
        return {}
    found = strictyaml.loads(match[1], where=where, code="card.invalid")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError("card.invalid", "has a front matter that is no mapping", fix="repair it", file=where)
    return found


def render(fields: Mapping[str, Any]) -> str:
    """A front matter, its fields in the order they come in."""
    import yaml  # type: ignore[import-untyped]

    kept = {k: v for k, v in fields.items() if v not in (None, "", [], {})}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    return f"---\n{text}---\n"


def located(source: str) -> tuple[str | None, str | None, str]:
    """Repository, commit and path in it of a source that is on the Hub for certain: a pinned reference, or a path in
    the cache."""
    match = _PINNED.fullmatch(source) or _CACHED.fullmatch(source)
    if match is None:
        return None, None, ""
    return match["repo"].replace("--", "/"), match["commit"], match["path"] or ""


def read_input(
    row: Mapping[str, Any], token: str | None, notes: list[str], repo: str | None = None, commit: str | None = None
) -> Input:
    """An input of a receipt, with the card that it has, on the Hub or beside its files. `repo`: known otherwise."""
    source = str(row.get("source", ""))
    path = ""
    if repo is None:
        repo, commit, path = located(source)
    weight = row.get("weight")
    card: dict[str, Any] = {}
    try:
        raw = _fetched(repo, commit, token) if repo is not None else _beside(row, source)
        card = {} if raw is None else parse(raw, f"{source}/{CARD}")
    except (LoramergeError, OSError) as error:
        notes.append(f"the card of {quoted(source)} cannot be read, so nothing is taken from it: {error}")
    number = float(weight) if isinstance(weight, int | float) and not isinstance(weight, bool) else None
    return Input(source, repo, commit, path, number, card)


def _fetched(repo: str, commit: str | None, token: str | None) -> bytes | None:
    """The card of a commit, from the cache or the Hub, checked; None where it has none."""
    found = resolve(f"{SCHEME}{repo}@{commit or MAIN}", token)
    card = found.file(CARD)
    if card is None or card.size > MAX_BYTES:
        return None
    return (cache.fetch(found, [card], token=token) / CARD).read_bytes()


def _beside(row: Mapping[str, Any], source: str) -> bytes | None:
    """The card in a directory, if it holds the very files that the receipt names: paths may mean others by now."""
    folder = Path(source)
    files = row.get("files")
    if "://" in source or not isinstance(files, list) or not files or not folder.is_dir():
        return None
    for file in files:
        name, size = file.get("name"), file.get("size")
        with contextlib.suppress(OSError, TypeError, ValueError):
            if (folder / name).stat().st_size == size:
                continue
        return None
    path = folder / CARD
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_BYTES else None


def copied(card: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Fields of another card that are what they should be: a line of text, or a list of such."""
    found: dict[str, Any] = {}
    for name in names:
        value = card.get(name)
        if isinstance(value, list):
            value = [v for v in value if isinstance(v, str) and _LINE.fullmatch(v)][:50]
        elif not (isinstance(value, str) and _LINE.fullmatch(value)):
            continue
        if value:
            found[name] = value
    return found


def joined(cards: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The values of a field of several cards, each once, in order."""
    found: dict[str, None] = {}
    for card in cards:
        value = copied(card, [name]).get(name, [])
        found |= dict.fromkeys([value] if isinstance(value, str) else value)
    return list(found)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(v for v in value if isinstance(v, str))
    return value if isinstance(value, str) else ""
