"""The files that an input is made of, each with its SHA-256: on disk, or at a commit on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from loramerge import pickled
from loramerge.adapters.dialect import dialects, weight_names
from loramerge.building.recipe import Source
from loramerge.errors import InputError, LoramergeError
from loramerge.merging import sidefiles
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.source import unreadable

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""

CHUNK = 4 << 20
READERS = 4


def file_digests(
    files: Sequence[tuple[str, Path]], what: str, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """`{"name", "size", "sha256"}` of files, by name, read side by side.

    Raises:
        InputError: `input.*`: one cannot be read.
    """
    try:
        total = sum(path.stat().st_size for _, path in files)
    except OSError as error:
        raise unreadable(error, what) from None
    done = [0]

    def row(given: tuple[str, Path]) -> dict[str, Any]:
        name, path = given
        digest, size, buffer = sha256(), 0, bytearray(CHUNK)
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])
                    size += count
                    done[0] += count
        except OSError as error:
            raise unreadable(error, os.path.join(what, name)) from None
        return {"name": name, "size": size, "sha256": digest.hexdigest()}

    rows = []
    with ThreadPoolExecutor(max_workers=max(1, min(READERS, os.cpu_count() or 1, len(files)))) as pool:
        for found in pool.map(row, files):
            rows.append(found)
            if progress is not None:
                progress(min(done[0], total), total)
    return sorted(rows, key=lambda r: str(r["name"]))


def local_files(role: str, path: Path, name: str, allow_pickle: bool) -> list[tuple[str, Path]]:
    """The files on disk that a merge reads of an input or carries from it, by their names in it.

    Of a directory: its weights with their index, configs, and what travels with a base; of an adapter its weights, its
    config and its tokenizer. Headers are read, weights are not.

    Raises:
        InputError, MismatchError, UnsafeError: as `open_checkpoint`.
    """
    opened = _opened(role, path, allow_pickle)
    try:
        root = path if opened.directory is not None else path.parent
        found = {file.name: root / file.name for file in opened.files}
        if role == "adapter":
            found |= {n: root / n for n in _beside_adapter(root, opened.directory is not None)}
        else:
            found |= {file.name: file.path for file in sidefiles.collect(opened, [])[0]}
            found |= {n: root / n for n in _indexes(opened)}
        return sorted(found.items())
    finally:
        opened.close()


def _opened(role: str, path: Path, allow_pickle: bool) -> Checkpoint:
    read_pickle = pickled.read_header if allow_pickle else None
    names = weight_names() if role == "adapter" and path.is_dir() else None
    return open_checkpoint(path, read_pickle=read_pickle, weight_names=names, onnx=True)


def _indexes(opened: Checkpoint) -> Iterable[str]:
    for model in opened.models:
        if model.checkpoint.index_name is not None:
            yield f"{model.folder}/{model.checkpoint.index_name}" if model.folder else model.checkpoint.index_name


def _beside_adapter(folder: Path, whole: bool) -> list[str]:
    """What says something of an adapter beside its weights; `whole`: the folder is the adapter's own."""
    names = {dialect.detect["config"] for dialect in dialects() if "config" in dialect.detect}
    globs = (*sidefiles.TOKENIZER, "generation_config.json") if whole else ()
    with os.scandir(folder) as entries:
        files = [e.name for e in entries if e.is_file()]
    return [n for n in files if n in names or any(fnmatchcase(n, g) for g in globs)]


@dataclass
class Inputs:
    """Looks inputs up and digests them; what a lock has pinned of the Hub is not asked for again.

    Args:
        pinned: rows of a lock by (role, source), for what lies on the Hub.
        allow_pickle: read PyTorch files.
    """

    token: str | None = field(default=None, repr=False)
    offline: bool = False
    progress: Progress | None = None

    def row(self, role: str, source: Source, allow_pickle: bool = False) -> dict[str, Any]:
        """An input as the lock has it: its source, role and files; on the Hub its repository and commit too.

        Raises:
            InputError, MismatchError, UnsafeError: it cannot be read. RemoteError: `hub.*`.
        """
        about: dict[str, Any] = {"source": source.text, "role": role}
        if source.path is None:
            return {**about, **self._remote(role, source, allow_pickle)}
        return {**about, "files": self.local(role, source, allow_pickle)}

    def local(self, role: str, source: Source, allow_pickle: bool) -> list[dict[str, Any]]:
        """The files of an input on disk."""
        assert source.path is not None
        try:
            files = local_files(role, source.path, source.text, allow_pickle)
        except LoramergeError as error:
            error.file = _shown(error.file, source)
            raise
        return file_digests(files, source.text, self.progress)

    def _remote(self, role: str, source: Source, allow_pickle: bool) -> dict[str, Any]:
        from loramerge.hub import finding, pull
        from loramerge.hub.reference import parse, resolve, snapshot_of

        assert source.reference is not None
        reference = parse(source.reference)
        assert reference is not None
        found = resolve(reference, self.token, self.offline)
        finder = finding.Finder(self.token, self.offline, self.progress)
        finder.know(reference, found)
        if role == "adapter":
            files = finding.adapter_files(found)[1]
        else:
            files = list(pull.choose(reference, found, finder, (), (), allow_pickle).files)
        unknown = [f for f in files if f.sha256 is None]
        finder.fetch(found, unknown, self.progress)
        rows = []
        for file in files:
            path = snapshot_of(found) / file.name
            digest = file.sha256 or file_digests([(file.name, path)], found.name)[0]["sha256"]
            rows.append({"name": file.name, "size": file.size, "sha256": digest})
        return {
            "repo": found.repo,
            "revision": found.revision,
            "commit": found.commit,
            **({"path": found.path} if found.path else {}),
            "files": sorted(rows, key=lambda r: str(r["name"])),
        }


def pinned_reference(row: dict[str, Any]) -> str:
    """The reference that a row of a lock stands for: it means the same for ever."""
    path = f"/{row['path']}" if row.get("path") else ""
    return f"hf://{row['repo']}@{row['commit']}{path}"


def _shown(file: str | None, source: Source) -> str | None:
    """A path of an error in the recipe's own words."""
    if file is None or source.path is None:
        return file
    whole = str(source.path)
    if file == whole:
        return source.text
    return source.text + file[len(whole) :] if file.startswith(whole + os.sep) else file


def output_files(place: Path, single: bool, companions: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """The files of an output, by their names in it; of a single file, those that go with it too."""
    if single:
        names = [place.name, *companions]
        return [(n, place.with_name(n)) for n in names if os.path.lexists(place.with_name(n))]
    found = []
    for folder, folders, names in os.walk(place):
        folders.sort()
        inside = Path(folder).relative_to(place)
        found += [((inside / name).as_posix(), Path(folder) / name) for name in names]
    return sorted(found)


def same_files(place: Path, single: bool, rows: Sequence[dict[str, Any]], progress: Progress | None = None) -> bool:
    """Whether an output is there, with these files and, in a directory, no others."""
    names = sorted(str(row["name"]) for row in rows)
    sizes = {str(row["name"]): row["size"] for row in rows}
    try:
        files = output_files(place, single, [n for n in names if n != place.name])
        if sorted(n for n, _ in files) != names or any(p.stat().st_size != sizes[n] for n, p in files):
            return False
        return file_digests(files, str(place), progress) == sorted(rows, key=lambda r: str(r["name"]))
    except (OSError, InputError):
        return False
