"""Finds `formats/`, the on-disk layouts kept as data: our own, in a wheel or in a checkout, and those of the user."""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from loramerge.errors import InputError

VARIABLE = "LORAMERGE_FORMATS"
"""Environment variable: folders of the user's own formats (separated like PATH), each laid out as `formats/` is."""


@cache
def formats_directory() -> Path:
    """The folder that holds `adapters/*.toml` and `families/*.toml`."""
    installed = Path(__file__).parent / "_formats"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "formats"


def extra_formats() -> str:
    """What the environment says of the user's own formats; what is made from tables is cached under it."""
    return os.environ.get(VARIABLE, "")


def load_formats(kind: str) -> tuple[dict[str, Any], ...]:
    """Every table of one kind (`"adapters"`, `"families"`, ...), sorted by file name, the user's last.

    A table of the user's replaces one of ours that has its name.

    Raises:
        InputError: `formats.invalid` for a file that is no TOML or has no name, `formats.missing` for a folder that is
            not there.
    """
    return _load(kind, extra_formats())


@cache
def _load(kind: str, extra: str) -> tuple[dict[str, Any], ...]:
    tables: dict[str, dict[str, Any]] = {}
    folders = [formats_directory()]
    for text in filter(None, extra.split(os.pathsep)):
        folder = Path(text)
        if not folder.is_dir():
            raise InputError("formats.missing", f"{VARIABLE} names a folder that is not there", file=text)
        folders.append(folder)
    for folder in folders:
        for path in sorted((folder / kind).glob("*.toml")):
            table = _read(path)
            tables[table["name"]] = table
    return tuple(tables.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("formats.invalid", f"is not a TOML file that can be read: {error}", file=path) from None
    if not isinstance(table.get("name"), str) or not table["name"]:
        raise InputError("formats.invalid", "has no name", fix='begin it with: name = "..."', file=path)
    return {**table, "file": str(path)}
