"""Pull: the files of a repository that a merge needs, into the cache or a directory, every one checked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from loramerge import pickled
from loramerge.errors import InputError, RemoteError, UsageError
from loramerge.hub import cache, client, crew, finding
from loramerge.hub.digest import Digest
from loramerge.hub.finding import Finder
from loramerge.hub.problems import offline as offline_error
from loramerge.hub.reference import FORM, Reference, RemoteFile, Resolved, is_offline, parse, resolve, snapshot_of
from loramerge.hub.reference import with_revision as _with_revision
from loramerge.tensors.checkpoint import open_checkpoint
from loramerge.tensors.output import Output, check_destination, check_space
from loramerge.tensors.text import quoted, some
from loramerge.tensors.writer import AlignedBuffer, FileWriter, write_small_file

SCHEMA = 1
BUFFER = 4 << 20
SIDE_BY_SIDE = 3


@dataclass(frozen=True)
class Chosen:
    """What is to be pulled: `kind` is `base`, `adapter` or `files` (those that globs choose)."""

    found: Resolved
    kind: str
    files: tuple[RemoteFile, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def pull(
    repo: str,
    out: Path | None = None,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    offline: bool = False,
    progress: cache.Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.pull`."""
    reference = as_reference(repo, revision)
    found = resolve(reference, token, offline)
    there = {f.name for f in found.files if cache.is_cached(found, f)}  # before choosing, which fetches configs
    finder = Finder(token, offline)
    finder.know(reference, found)
    chosen = choose(reference, found, finder, include, exclude, allow_pickle)
    if is_offline(offline) and (missing := [f.name for f in chosen.files if f.name not in there]):
        raise offline_error(reference.text, f"the cache lacks {some(missing)}, and this is offline")
    if out is not None:
        check_destination(out, inputs=[], force=force, what="directory")
        check_space(out, chosen.nbytes)
    if not dry_run:
        if out is None:
            cache.fetch(found, chosen.files, token=token, offline=offline, progress=progress)
        else:
            into_directory(chosen, out, token, force, progress)
    place = snapshot_of(found) / found.path if out is None else out
    rows = [
        {"name": f.name, "size": f.size, "sha256": f.sha256, "git": f.git, "cached": f.name in there}
        for f in chosen.files
    ]
    return {
        "schema": SCHEMA,
        "source": found.name,
        "repo": found.repo,
        "revision": found.revision,
        "commit": found.commit,
        "kind": chosen.kind,
        "out": str(place),
        "files": rows,
        "bytes": chosen.nbytes,
        "downloaded": sum(row["size"] for row in rows if not row["cached"]),
        "private": found.private,
        "gated": found.gated,
        "dry_run": dry_run,
        "notes": list(chosen.notes),
    }


def as_reference(repo: str, revision: str | None = None) -> Reference:
    """What a command that means the Hub in any case was given: `ns/name` needs no `hf://`, whatever lies here.

    Raises:
        UsageError: ``hub.reference``, ``usage.revision``.
    """
    try:
        reference = parse(repo if "://" in repo else f"hf://{repo}")
    except UsageError:
        raise UsageError("hub.reference", f"{quoted(repo)} is no reference to a repository", fix=FORM) from None
    assert reference is not None
    return _with_revision(reference, revision)


def choose(
    reference: Reference,
    found: Resolved,
    finder: Finder,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_pickle: bool = False,
) -> Chosen:
    """Decides what to pull, from names and headers: what a merge needs, or what the globs say.

    Raises:
        InputError: ``hub.nothing``: no file is left; and all that `open_checkpoint` raises.
    """
    notes: list[str] = []
    if include:
        kind, files = "files", [f for f in found.inside if _selected(f, include)]
    elif finding.looks_like_adapter(found):
        kind = "adapter"
        files = finding.adapter_files(found)[1]
    else:
        kind = "base"
        try:
            files = _base_files(reference, found, finder, allow_pickle)
        except InputError as error:
            if error.code != "checkpoint.no-weights":
                raise
            fix = "--include '*' takes all files, --include GLOB some"
            raise InputError(error.code, error.message, fix=fix, file=error.file) from None
    files = [f for f in files if not _selected(f, exclude)]
    if not files:
        names = some([f.name for f in found.inside], 8)
        raise InputError("hub.nothing", "no file is left to pull", fix=f"it holds {names}", file=found.name)
    return Chosen(found, kind, tuple(files), tuple(notes))


def _base_files(reference: Reference, found: Resolved, finder: Finder, allow_pickle: bool) -> list[RemoteFile]:
    path = finder.base(reference.text)
    opened = open_checkpoint(path, read_pickle=pickled.read_header if allow_pickle else None, onnx=True)
    try:
        folder = found.path.rpartition("/")[0] if found.is_file else found.path
        weights = {f"{folder}/{file.name}" if folder else file.name for file in opened.files}
    finally:
        opened.close()
    beside = [f for f in finding.carried(found) if f.name not in weights]
    return [f for f in found.files if f.name in weights] + beside


def _selected(file: RemoteFile, globs: Sequence[str]) -> bool:
    """As the client's own patterns: a folder means all that is in it."""
    return any(fnmatchcase(file.name, f"{glob}*" if glob.endswith("/") else glob) for glob in globs)


# ------------------------------------------------------------------------------------------------ into a directory


def into_directory(chosen: Chosen, out: Path, token: str | None, force: bool, progress: cache.Progress | None) -> None:
    """Writes files into a new directory, which appears complete or not at all. Nothing goes through the cache.

    Raises:
        RemoteError, OutputError.
    """
    found = chosen.found
    folder = found.path.rpartition("/")[0] if found.is_file else found.path
    done: dict[str, int] = {}
    stop = threading.Event()
    output = Output(out, "directory", force)

    def tick() -> None:
        if progress is not None:
            progress(sum(done.copy().values()), chosen.nbytes)

    try:
        with output:
            tasks = []
            for file in chosen.files:
                inside = file.name[len(folder) + 1 :] if folder else file.name
                target = output.directory / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                tasks.append(partial(_write, found, file, target, token, done, stop))
            crew.run_all(tasks, SIDE_BY_SIDE, tick, stop)
            if progress is not None:
                progress(chosen.nbytes, chosen.nbytes)
            output.commit()
    finally:
        output.close()


def _write(
    found: Resolved, file: RemoteFile, target: Path, token: str | None, done: dict[str, int], stop: threading.Event
) -> None:
    """Writes one file, from the cache if it is there and right, else from the Hub; a damaged one is fetched again."""
    if cache.is_cached(found, file) and cache.check(found, file):
        _copy(snapshot_of(found) / file.name, target, file, done)
        return
    for attempt in range(2):
        digest = Digest(file)
        _stream(found, file, target, token, digest, done, stop)
        if digest.differs() is None:
            return
        target.unlink()
        if attempt:
            break
    raise cache.damaged(found, file)


def _copy(source: Path, target: Path, file: RemoteFile, done: dict[str, int]) -> None:
    with open(source, "rb") as opened:
        _fill(target, file, iter(lambda: opened.read(BUFFER), b""), done, threading.Event())


def _stream(
    found: Resolved,
    file: RemoteFile,
    target: Path,
    token: str | None,
    digest: Digest,
    done: dict[str, int],
    stop: threading.Event,
) -> None:
    where = f"hf://{found.repo}@{found.commit}/{file.name}"
    reader = client.RemoteReader(found, file, token, where)
    reader.stop = stop

    def pieces() -> Any:
        for piece in reader.all():
            digest.update(memoryview(piece))
            yield piece

    try:
        _fill(target, file, pieces(), done, stop)
    except client.Stopped:
        raise RemoteError("interrupted", "the download was stopped", file=where) from None


def _fill(target: Path, file: RemoteFile, pieces: Any, done: dict[str, int], stop: threading.Event) -> None:
    """Writes pieces one after the other."""
    if file.size <= BUFFER:
        write_small_file(target, b"".join(pieces))
        done[file.name] = file.size
        return
    buffer = AlignedBuffer(BUFFER)
    try:
        with FileWriter(target, file.size) as writer:
            at = held = 0
            view = buffer.window(0, min(BUFFER, file.size))
            for piece in pieces:
                rest = memoryview(piece)
                while len(rest):
                    count = min(len(rest), len(view) - held)
                    view[held : held + count] = rest[:count]
                    held, rest = held + count, rest[count:]
                    if held == len(view):
                        writer.write(at, view)
                        at, held = at + held, 0
                        done[file.name] = at
                        view = buffer.window(at, min(BUFFER, file.size - at))
                if stop.is_set():
                    raise client.Stopped
    finally:
        buffer.close()
