"""The digest by which the Hub knows a file."""

from __future__ import annotations

import hashlib

from loramerge.hub.reference import RemoteFile


class Digest:
    """The digest by which the Hub knows a file: SHA-256, or git's id of its content."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        if self._file.sha256 is not None:
            self._sha256.update(data)
        elif self._file.git is not None:
            self._git.update(data)

    def differs(self) -> str | None:
        """What is wrong; None where the digest is right, or none is known."""
        if self._file.sha256 is not None and self._sha256.hexdigest() != self._file.sha256:
            return f"its SHA-256 is {self._sha256.hexdigest()}, not {self._file.sha256}"
        if self._file.sha256 is None and self._file.git is not None and self._git.hexdigest() != self._file.git:
            return f"its git id is {self._git.hexdigest()}, not {self._file.git}"
        return None
