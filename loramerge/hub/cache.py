"""Files of a commit in the Hub's cache: which are there, and getting the others, every one checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loramerge.errors import OutputError, RemoteError
from loramerge.hub import client, crew, ledger, problems
from loramerge.hub.reference import RemoteFile, Resolved, folder_of, is_offline, snapshot_of
from loramerge.tensors.text import plural, some

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""

WORKERS = 4


def is_cached(resolved: Resolved, file: RemoteFile) -> bool:
    """Whether the cache has a file of a commit, as long as it should be."""
    path = snapshot_of(resolved) / file.name
    try:
        return path.stat().st_size == file.size
    except OSError:
        return False


def fetch(
    resolved: Resolved,
    files: Sequence[RemoteFile],
    *,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Gets files into the cache, as the client keeps them there, and checks the digest of every one.

    A file whose digest was found right before, and that has not been touched since, is not read again.

    Returns:
        the folder that they lie in.

    Raises:
        RemoteError: ``hub.*``; ``hub.digest``: a file is not what the Hub lists, twice; ``hub.offline``: it is not in
            the cache. OutputError: ``output.cache``: the cache cannot be written to.
    """
    snapshot = snapshot_of(resolved)
    missing = [f.name for f in files if not is_cached(resolved, f)]
    if missing and is_offline(offline):
        detail = f"{plural(len(missing), 'file')} not in the cache, and this is offline: {some(missing)}"
        raise problems.offline(resolved.name, detail)
    meter = _Meter(sum(f.size for f in files), progress)
    tasks = [partial(_fetch_one, resolved, file, token, meter) for file in files]
    crew.run_all(tasks, WORKERS, meter.show, threading.Event())
    meter.show(last=True)
    return snapshot


def was_checked(resolved: Resolved, file: RemoteFile) -> bool:
    """Whether the digest of a file in the cache is known to be right without reading it."""
    wanted = file.sha256 or file.git
    path = snapshot_of(resolved) / file.name
    return wanted is None or ledger.was_checked(folder_of(resolved.repo), path, wanted)


def check(resolved: Resolved, file: RemoteFile) -> bool:
    """Whether a file in the cache is the one that the Hub lists: read once, believed where no digest is known."""
    path = snapshot_of(resolved) / file.name
    wanted = file.sha256 or file.git
    if wanted is None:
        return path.stat().st_size == file.size
    if ledger.was_checked(folder_of(resolved.repo), path, wanted):
        return True
    if digest_of(path, file) != wanted:
        return False
    with _ledger_lock:
        ledger.checked(folder_of(resolved.repo), path, wanted)
    return True


_ledger_lock = threading.Lock()


def digest_of(path: Path, file: RemoteFile) -> str:
    """The digest of a file on disk, of the kind that is known of it on the Hub."""
    with open(path, "rb") as opened:
        if file.sha256 is not None:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(opened.fileno()).st_size, usedforsecurity=False)
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def damaged(resolved: Resolved, file: RemoteFile) -> RemoteError:
    """The error for a file that is not what the Hub lists."""
    fix = "run it again; if that does not help, the file is damaged on the Hub"
    where = f"hf://{resolved.repo}@{resolved.commit}/{file.name}"
    return RemoteError("hub.digest", "is not the file that the Hub lists: its digest is another", fix=fix, file=where)


def _fetch_one(resolved: Resolved, file: RemoteFile, token: str | None, meter: _Meter) -> None:
    for attempt in range(2):
        if not is_cached(resolved, file):
            _download(resolved, file, token, meter)
        if check(resolved, file):
            meter.complete(file)
            return
        _remove(snapshot_of(resolved) / file.name)
        meter.reset(file)
        if attempt:
            break
    raise damaged(resolved, file)


def _download(resolved: Resolved, file: RemoteFile, token: str | None, meter: _Meter) -> None:
    """Has the client download one file; it does not try again after a 5xx by itself."""
    from huggingface_hub import hf_hub_download

    where = f"hf://{resolved.repo}@{resolved.commit}/{file.name}"
    for attempt in range(client.ATTEMPTS):
        try:
            with problems.translated(where, repo=resolved.repo, revision=resolved.commit):
                hf_hub_download(
                    resolved.repo,
                    file.name,
                    revision=resolved.commit,
                    token=token,
                    library_name="loramerge",
                    tqdm_class=meter.bar(file),
                )
        except RemoteError as error:
            passing = error.code in ("hub.server", "hub.unreachable", "hub.limit")
            if not passing or attempt + 1 == client.ATTEMPTS:
                raise
            time.sleep(min(client.LONGEST_PAUSE, client.FIRST_PAUSE * 2**attempt))
        except OSError as error:
            # The client says of a body that is too short only that it is not consistent.
            if "onsistency" not in str(error):
                message = f"the cache cannot be written to: {error.strerror or error}"
                fix = "make room there, or set HF_HOME to another place"
                raise OutputError("output.cache", message, fix=fix, file=where) from None
            if attempt + 1 == client.ATTEMPTS:
                raise damaged(resolved, file) from None
            meter.reset(file)
        else:
            if is_cached(resolved, file):
                return
            _remove(snapshot_of(resolved) / file.name)
            meter.reset(file)
    raise damaged(resolved, file)


def _remove(path: Path) -> None:
    """Takes a damaged file out of the cache, with all that it is a link to there."""
    targets = [path]
    while targets[-1].is_symlink() and len(targets) < 5:
        targets.append(targets[-1].parent / os.readlink(targets[-1]))
    for target in targets:
        with contextlib.suppress(OSError):
            os.unlink(target)


class _Meter:
    """How many bytes of several files are there, from the client's own bars, of which some show a file twice."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._bars: dict[str, list[Any]] = {}
        self._done: dict[str, int] = {}
        self._lock = threading.Lock()

    def bar(self, file: RemoteFile) -> Any:
        """A class of bars that only count, for one file."""
        bars = self._bars.setdefault(file.name, [])

        class Bar:
            def __init__(self, *_: Any, **kwargs: Any) -> None:
                self.total = kwargs.get("total")
                self.n = int(kwargs.get("initial") or 0)
                bars.append(self)

            def update(self, n: float | None = 1) -> None:
                self.n += int(n or 0)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                """Nothing is drawn."""

            def __getattr__(self, name: str) -> Any:
                if name.startswith("__") or name == "update_transfer":
                    raise AttributeError(name)
                return lambda *_, **__: None

        return Bar

    def complete(self, file: RemoteFile) -> None:
        with self._lock:
            self._done[file.name] = file.size

    def reset(self, file: RemoteFile) -> None:
        self._bars.pop(file.name, None)

    def show(self, last: bool = False) -> None:
        if self._progress is None:
            return
        with self._lock:
            done = dict(self._done)
        under_way = {n: max((b.n for b in list(bars)), default=0) for n, bars in list(self._bars.items())}
        count = sum(done.values()) + sum(n for name, n in under_way.items() if name not in done)
        self._progress(self._total if last else min(count, self._total), self._total)
