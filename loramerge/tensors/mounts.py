"""Sources that lie elsewhere: a path on disk that stands for one, what it is called, and where its bytes come from.

A repository of the Hub has a folder in the cache. Files that are there are read there; the others have an opener here,
under the path where they would lie. So everything that takes a path takes such a source.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from loramerge.tensors.source import ByteSource

Opener = Callable[[str], ByteSource]
"""Opens a file that lies elsewhere; takes its name for messages."""


@dataclass(frozen=True)
class Mount:
    """A source that lies elsewhere.

    `path`: where it is, or would be, on disk; `name`: what it is called, in messages and receipts; `openers`: by the
    path that each file would have, for the files that are not there. `origin`: what a receipt says of where it comes
    from; `digests`: the SHA-256 of files, by their paths, where it is known before they are read.
    """

    path: Path
    name: str
    openers: Mapping[Path, Opener] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[Path, str] = field(default_factory=dict)

    def names_in(self, folder: Path) -> list[str]:
        """The names of files in a folder that are not there on disk."""
        return [path.name for path in self.openers if path.parent == folder]


_mounts: dict[str, Mount] = {}
_lock = threading.Lock()


def mount(made: Mount) -> str:
    """Lets a path stand for a source. Returns the path, to be given to whatever takes a source."""
    with _lock:
        _mounts[os.path.abspath(made.path)] = made
    return str(made.path)


def unmount(path: str | os.PathLike[str]) -> None:
    """Lets a path be nothing but itself again."""
    with _lock:
        _mounts.pop(os.path.abspath(path), None)


def mounted(path: str | os.PathLike[str]) -> Mount | None:
    """What a path, or a folder above it, stands for; None for a path that is nothing but itself."""
    if not _mounts:
        return None
    at = os.path.abspath(path)
    with _lock:
        while True:
            if (found := _mounts.get(at)) is not None:
                return found
            parent = os.path.dirname(at)
            if parent == at:
                return None
            at = parent


_finder: ContextVar[Callable[[str], str] | None] = ContextVar("loramerge_finder", default=None)


@contextlib.contextmanager
def found_by(finder: Callable[[str], str]) -> Iterator[None]:
    """Inside, names that are no paths are looked up by `finder`."""
    token = _finder.set(finder)
    try:
        yield
    finally:
        _finder.reset(token)


def located(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A path for what may be another name, such as one that a receipt has; a path as it is."""
    finder = _finder.get()
    if finder is None or not isinstance(source, str) or "://" not in source or os.path.lexists(source):
        return source
    return finder(source)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path is there: on disk or elsewhere."""
    if os.path.lexists(path):
        return True
    found = mounted(path)
    return found is not None and Path(os.path.abspath(path)) in found.openers


def shown(path: str | os.PathLike[str]) -> str:
    """What to call a path: its name where it stands for a source that lies elsewhere."""
    found = mounted(path)
    if found is None:
        return str(path)
    inside = os.path.relpath(os.path.abspath(path), os.path.abspath(found.path))
    return found.name if inside == "." else f"{found.name}/{inside}"
