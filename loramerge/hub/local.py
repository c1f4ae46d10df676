"""What of a directory, or of a file, is pushed: which files, that they are whole, and what stays behind."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loramerge.errors import InputError, UnsafeError
from loramerge.merging.receipt import read_receipt, receipt_path
from loramerge.merging.undo import undo_path
from loramerge.tensors import magic, safetensors, strictjson
from loramerge.tensors.checkpoint import is_index
from loramerge.tensors.interrupted import refuse_interrupted
from loramerge.tensors.source import FileSource, stat_file
from loramerge.tensors.text import plural, quoted, some

CARD = "README.md"
PARTIAL = ("*.partial-*", "*.old-*", "*.incomplete", "*.lock", "*loramerge.journal*", "*~")
"""What runs that were interrupted leave behind, and other programs while they write."""

HIDDEN = "hidden"
UNFINISHED = "left behind by a run that did not finish"
UNDO = "not asked for (--with-undo)"
EXCLUDED = "excluded"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_PICKLED = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|PK\x05\x06")


@dataclass(frozen=True)
class LocalFile:
    """A file to push: `name` in the repository, `path` on disk; or `content`, of what is made for the push.

    `stamp`: what tells that it is still the one that was looked at.
    """

    name: str
    path: Path
    size: int
    stamp: tuple[int, ...] = ()
    content: bytes | None = None


@dataclass(frozen=True)
class Gathered:
    """What is to be pushed. `left`: (name, why) of what stays behind. `receipt`: what the model's own says."""

    source: str
    files: tuple[LocalFile, ...]
    left: tuple[tuple[str, str], ...]
    receipt: Mapping[str, Any] | None
    receipt_file: LocalFile | None

    @property
    def names(self) -> set[str]:
        return {file.name for file in self.files}

    def file(self, name: str) -> LocalFile | None:
        """A file by its name."""
        return next((f for f in self.files if f.name == name), None)

    def read(self, name: str, limit: int = 16_000_000) -> bytes | None:
        """The bytes of a small file; None where there is none."""
        file = self.file(name)
        if file is None or file.size > limit:
            return None
        return file.content if file.content is not None else file.path.read_bytes()


def gather(
    source: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    with_undo: bool = False,
    allow_pickle: bool = False,
) -> Gathered:
    """Chooses the files to push, and sees from names, sizes and headers that they are a whole model.

    Hidden files, what unfinished runs left and the undo file stay behind. Links are followed to files in the same
    directory, or in the Hub's cache, and nowhere else.

    Raises:
        InputError: ``input.missing``, ``input.interrupted``, ``push.empty``, ``push.incomplete``, ``push.name``,
            and whatever is wrong with a header; UnsafeError: ``push.link``, ``push.pickle``.
    """
    shown = str(source)
    refuse_interrupted(source, shown)
    alone = not source.is_dir()
    if alone:
        stat_file(source, shown)
    if fnmatchcase(os.path.basename(os.path.abspath(source)), "*.partial-*"):
        raise InputError("push.incomplete", "is the unfinished output of a run", fix="run that again", file=shown)
    files: list[LocalFile] = []
    left: list[tuple[str, str]] = []
    undo = undo_path(source, alone).name
    for name, path in _beside(source) if alone else _below(source, left):
        if why := _unwanted(name, undo, with_undo, include, exclude):
            left.append((name, why))
        else:
            files.append(_checked(source, name, path, allow_pickle))
    if not files:
        raise InputError(
            "push.empty", "there is nothing in it to push", fix="name the directory of a model", file=shown
        )
    receipt_name = receipt_path(source, alone).name
    made = next((f for f in files if f.name == receipt_name), None)
    receipt = None if made is None else read_receipt(made.path, os.path.join(shown, receipt_name))
    gathered = Gathered(shown, tuple(sorted(files, key=lambda f: f.name)), tuple(sorted(left)), receipt, made)
    _check_whole(gathered, {n for n, why in left if why == EXCLUDED}, bool(include))
    return gathered


def _beside(source: Path) -> Iterator[tuple[str, Path]]:
    """A single file, and what belongs to it."""
    yield source.name, source
    for path in (receipt_path(source, True), undo_path(source, True)):
        if path.exists():
            yield path.name, path


def _below(source: Path, left: list[tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(source, onerror=_raise):
        inside = Path(folder).relative_to(source)
        keep = []
        for name in sorted(folders):
            relative = (inside / name).as_posix()
            if name.startswith("."):
                left.append((f"{relative}/", HIDDEN))
            elif _matches(name, (*PARTIAL, "__pycache__")):
                left.append((f"{relative}/", UNFINISHED))
            elif os.path.islink(os.path.join(folder, name)):
                raise _link(source, relative, "is a link to a folder")
            else:
                keep.append(name)
        folders[:] = keep
        for name in sorted(names):
            yield (inside / name).as_posix(), Path(folder) / name


def _raise(error: OSError) -> None:
    raise InputError("input.permission", f"cannot be read: {error.strerror}", file=error.filename, fix="check its mode")


def _unwanted(name: str, undo: str, with_undo: bool, include: Sequence[str], exclude: Sequence[str]) -> str:
    last = name.rsplit("/", 1)[-1]
    if last.startswith("."):
        return HIDDEN
    if _matches(last, PARTIAL):
        return UNFINISHED
    if name == undo and not with_undo:
        return UNDO
    if (include and not _matches(name, include)) or _matches(name, exclude):
        return EXCLUDED
    return ""


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, f"{glob}*" if glob.endswith("/") else glob) for glob in globs)


def _checked(source: Path, name: str, path: Path, allow_pickle: bool) -> LocalFile:
    shown = os.path.join(source, name) if source.is_dir() else str(path)
    if not _is_name(name):
        message = "has a name that no file in a repository can have"
        raise InputError("push.name", message, fix="rename it, or leave it out with --exclude", file=shown)
    if os.path.islink(path) and not _inside(path, source):
        raise _link(source, name, "is a link to a file outside")
    found = stat_file(path, shown)
    if not stat.S_ISREG(found.st_mode):
        raise InputError("push.special", "is no file", fix="leave it out with --exclude", file=shown)
    if not allow_pickle and name.endswith(PICKLES) and _is_pickle(path):
        fix = "convert it to safetensors, leave it out with --exclude, or --allow-pickle"
        raise UnsafeError("push.pickle", "is a pickle, which can run code where it is loaded", fix=fix, file=shown)
    return LocalFile(name, path, found.st_size, stamp_of(found))


def _is_name(name: str) -> bool:
    """Whether it can be the name of a file in a repository, and on any machine that it is pulled to."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.isprintable() and not any(c in name for c in '\\:*?"<>|') and len(name.encode()) < 500


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _inside(path: Path, source: Path) -> bool:
    """Whether a link leads to a file in the same directory, or from one place of the Hub's cache to another."""
    from huggingface_hub import constants

    target = Path(os.path.realpath(path))
    here = [Path(os.path.realpath(source if source.is_dir() else source.parent))]
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    if here[0].is_relative_to(cache):
        here.append(cache)
    return any(target.is_relative_to(place) for place in here)


def _link(source: Path, name: str, what: str) -> UnsafeError:
    fix = "put a copy (cp --reflink=auto) or a hard link (ln) there, or leave it out with --exclude"
    return UnsafeError("push.link", f"{what} of the directory", fix=fix, file=os.path.join(source, name))


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return _PICKLED.match(file.read(4)) is not None


# ------------------------------------------------------------------------------------------------ that it is whole


def _check_whole(gathered: Gathered, excluded: set[str], chosen: bool) -> None:
    """Headers, indices and the receipt: that nothing is missing or cut off. Globs may choose a part of a model."""
    for file in gathered.files:
        where = os.path.join(gathered.source, file.name)
        if file.name.endswith(".safetensors"):
            _check_header(file, where)
        if is_index(file.name.rsplit("/", 1)[-1]):
            _check_index(gathered, file, where, excluded, chosen)
    for row in (gathered.receipt or {}).get("files", ()):
        name, size = row.get("name"), row.get("size")
        there = gathered.file(name) if isinstance(name, str) else None
        if there is None and (chosen or name in excluded):
            continue
        if there is None:
            raise _incomplete(gathered.source, f"lacks {quoted(name)}, which its receipt names")
        if there.size != size:
            message = f"{quoted(name)} has {there.size} bytes, its receipt says {size}"
            raise _incomplete(gathered.source, message)


def _check_header(file: LocalFile, where: str) -> None:
    source = FileSource(file.path, where)
    try:
        kind = magic.identify(source.read(0, min(source.size, magic.PREFIX_BYTES)), source.size)
        if kind != "safetensors":
            what, fix = magic.describe(kind)
            raise InputError("push.incomplete", f"is no safetensors file, but {what}", fix=fix, file=where)
        safetensors.read_header(source)
    finally:
        source.close()


def _check_index(gathered: Gathered, file: LocalFile, where: str, excluded: set[str], chosen: bool) -> None:
    index = strictjson.loads(file.path.read_bytes(), where=where, code="index.invalid", max_bytes=1 << 28)
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict):
        return  # of another kind: whoever made it knows
    folder = file.name.rpartition("/")[0]
    wanted = {f"{folder}/{name}" if folder else str(name) for name in listed.values()}
    missing = sorted(wanted - gathered.names - excluded)
    if missing and not chosen:
        message = f"names {plural(len(missing), 'file')} that {'is' if len(missing) == 1 else 'are'} not there"
        raise _incomplete(where, f"{message}: {some(missing)}")


def _incomplete(where: str, message: str) -> InputError:
    return InputError("push.incomplete", message, fix="merge or download it again: a part of it is missing", file=where)
