"""Digests of local files: those that a receipt or an earlier push has found, and computing the others."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loramerge.hub import ledger
from loramerge.hub.local import Gathered, LocalFile
from loramerge.hub.reference import RemoteFile

NOTE = "pushed"
KEPT = 2000
"""How many digests are remembered."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
BUFFER = 4 << 20


class Known:
    """SHA-256 of local files, each computed at most once, also over several runs. Thread safe.

    What a receipt says of a file is believed where neither the file nor its place in the directory was touched after
    the receipt was written; what an earlier push found, where size, times and inode are still the same.
    """

    def __init__(self, gathered: Gathered) -> None:
        self._lock = threading.Lock()
        self._found = _from_receipt(gathered)
        self._noted = _read_notes()
        self._new: dict[str, Any] = {}

    def sha256(self, file: LocalFile) -> str | None:
        """The digest of a file, where it is known without reading it."""
        if file.content is not None:
            return hashlib.sha256(file.content).hexdigest()
        row = self._noted.get(os.path.abspath(file.path))
        if isinstance(row, list) and row[:-1] == list(file.stamp) and _SHA256.fullmatch(str(row[-1])):
            return str(row[-1])
        return self._found.get(file.name)

    def compute(self, file: LocalFile, stop: threading.Event) -> str | None:
        """The digest of a file, which is read where that is needed; None where `stop` was set meanwhile."""
        if (known := self.sha256(file)) is not None:
            return known
        digest = hashlib.sha256()
        with open(file.path, "rb", buffering=0) as opened:
            buffer = bytearray(BUFFER)
            while count := opened.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                if stop.is_set():
                    return None
        self.note(file, digest.hexdigest())
        return digest.hexdigest()

    def note(self, file: LocalFile, sha256: str) -> None:
        """Remembers the digest of a file, for a push that is repeated."""
        if file.content is not None:
            return
        with self._lock:
            self._found[file.name] = sha256
            self._new[os.path.abspath(file.path)] = [*file.stamp, sha256]
            rows = {**_read_notes(), **self._new}
            ledger.write_note(_home(), NOTE, {"files": dict(list(rows.items())[-KEPT:])})

    def is_there(self, file: LocalFile, remote: RemoteFile | None, stop: threading.Event) -> bool:
        """Whether a repository has a file with the same bytes under its name."""
        if remote is None or remote.size != file.size:
            return False
        if remote.sha256 is not None:
            return self.compute(file, stop) == remote.sha256
        return remote.git is not None and git_id(file) == remote.git


def git_id(file: LocalFile) -> str:
    """What git calls the content of a file."""
    raw = file.content if file.content is not None else file.path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def _home() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME)


def _read_notes() -> dict[str, Any]:
    rows = ledger.read_note(_home(), NOTE).get("files")
    return dict(rows) if isinstance(rows, dict) else {}


def _from_receipt(gathered: Gathered) -> dict[str, str]:
    """name -> SHA-256, of what a receipt knows and nobody touched since."""
    receipt, made = gathered.receipt, gathered.receipt_file
    if receipt is None or made is None:
        return {}
    written = made.stamp[1]
    said = {str(row.get("name")): row for row in _rows(receipt.get("side_files"))}
    base = {str(row.get("name")): row for row in _rows(receipt["base"].get("files"))}
    for row in _rows(receipt.get("files")):
        if row.get("copied_whole"):
            said[str(row.get("name"))] = base.get(str(row.get("name")), {})
    found = {}
    for file in gathered.files:
        digest, size = (said.get(file.name, {}).get(key) for key in ("sha256", "size"))
        untouched = len(file.stamp) > 2 and max(file.stamp[1:3]) <= written
        if untouched and size == file.size and isinstance(digest, str) and _SHA256.fullmatch(digest):
            found[file.name] = digest
    return found


def _rows(rows: Any) -> Iterable[Mapping[str, Any]]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
