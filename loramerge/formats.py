"""Finds `formats/`, the on-disk layouts kept as data, in a wheel or in a checkout."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def formats_directory() -> Path:
    """The folder that holds `adapters/*.toml` and `families/*.toml`."""
    installed = Path(__file__).parent / "_formats"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "formats"


@cache
def load_formats(kind: str) -> tuple[dict[str, Any], ...]:
    """Every table of one kind (`"adapters"` or `"families"`), sorted by file name."""
    tables = []
    for path in sorted((formats_directory() / kind).glob("*.toml")):
        with path.open("rb") as stream:
            tables.append(tomllib.load(stream))
    return tuple(tables)
