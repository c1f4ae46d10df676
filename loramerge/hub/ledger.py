"""What is known of a repository in the cache beside its files: the list of a commit's files, and which were checked.

Both lie in the repository's own folder of the cache and go with it. The cache may be one that cannot be written to:
then they are made anew every time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = ".loramerge"
SCHEMA = 1
MAX_BYTES = 64_000_000


def read_note(folder: Path, name: str) -> dict[str, Any]:
    """A note; empty where there is none, or none that can be read."""
    path = folder / FOLDER / f"{name}.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else {}


def write_note(folder: Path, name: str, data: Mapping[str, Any]) -> None:
    """Writes a note, whole or not at all."""
    path = folder / FOLDER / f"{name}.json"
    part = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"schema": SCHEMA, **data}), encoding="utf-8")
        os.replace(part, path)


def stamp(path: Path) -> list[int]:
    """What tells that a file is still the one that was checked: size, time, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def was_checked(folder: Path, path: Path, digest: str) -> bool:
    """Whether a file of the cache was found to have this digest, and has not been touched since."""
    note = read_note(folder, "checked").get("files")
    row = note.get(digest) if isinstance(note, dict) else None
    try:
        return row is not None and row == stamp(path)
    except OSError:
        return False


def checked(folder: Path, path: Path, digest: str) -> None:
    """Notes that a file of the cache has this digest."""
    note = read_note(folder, "checked").get("files")
    rows = dict(note) if isinstance(note, dict) else {}
    with contextlib.suppress(OSError):
        write_note(folder, "checked", {"files": {**rows, digest: stamp(path)}})
