"""The journal: a model is rewritten where it lies, and a kill at any moment leaves it old, new, or to be finished.

All that is to change is written beside the model first, durably; one rename makes it binding; then it is copied into
place. Until that rename the model is the old one, from then on it becomes the new one, however often the copying has
to begin again. The journal is a directory (`interrupted.journal_path`), as foreign as any input when it is read:

    index.json      what to do, format 1:
      command         what the run was to do, for people
      files           the weight files: name, size, ranges `[offset, length, where in data, digest]`
      replace         whole small files: name, size, sha256
      remove          names of files that go
    data            the new bytes of the ranges, each at a position congruent to its offset modulo 4096
    files/          the whole files, moved from here into place

While it is filled it has the name of a partial (`output.partial_path`), which a later run sweeps away.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loramerge.errors import InputError, LoramergeError, OutputError, UnsafeError
from loramerge.tensors import strictjson
from loramerge.tensors.hashing import block_digest, sha256_file
from loramerge.tensors.interrupted import INDEX, MAX_INDEX_BYTES, journal_path, journals, model_of
from loramerge.tensors.output import partial_path, remove_tree, sweep_partials
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import quoted
from loramerge.tensors.writer import (
    PAGE,
    FileWriter,
    fsync_fd,
    fsync_path,
    output_errors,
    start_write_back,
    write_all,
    write_small_file,
)

if sys.platform != "win32":
    import fcntl

FORMAT = 1
DATA, FILES = "data", "files"
CHUNK = 8 << 20

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a weight file, and where in the journal's data their new content lies."""

    offset: int
    length: int
    at: int
    digest: str


@dataclass(frozen=True, slots=True)
class Target:
    """A weight file of which ranges are rewritten; its size stays."""

    name: str
    size: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Whole:
    """A small file that is replaced as a whole."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What a journal does to a model."""

    command: str
    targets: tuple[Target, ...]
    replace: tuple[Whole, ...]
    remove: tuple[str, ...]

    def to_data(self) -> dict[str, Any]:
        """As `index.json` has it."""
        return {
            "format": FORMAT,
            "command": self.command,
            "files": [
                {"name": t.name, "size": t.size, "ranges": [[r.offset, r.length, r.at, r.digest] for r in t.ranges]}
                for t in self.targets
            ],
            "replace": [{"name": w.name, "size": w.size, "sha256": w.sha256} for w in self.replace],
            "remove": list(self.remove),
        }


# --------------------------------------------------------------------------------------------------- staging


class Staging:
    """Gathers the changes to a model in a journal, makes them binding and carries them out.

    A context manager: leaving it before :meth:`commit` drops the journal, and the model was never touched.

    Args:
        model: the model's directory or file.
        single_file: which of them it is.
        command: what the run does, for people.
        runs: name of a weight file -> its size and the byte ranges `[begin, end)` that will be written, in order and
            apart from one another.

    Raises:
        OutputError: `output.busy`, `output.no-space`, `output.permission`, `output.io`; `in-place.link` is refused by
            :func:`check_links` before.
    """

    def __init__(
        self,
        model: Path,
        single_file: bool,
        command: str,
        runs: Mapping[str, tuple[int, Sequence[tuple[int, int]]]],
    ) -> None:
        # Absolute from here on: the working directory may change.
        self._model = Path(os.path.abspath(model))
        self._root = self._model.parent if single_file else self._model
        self._place = journal_path(self._model, single_file)
        self._command = command
        self._sizes = {name: size for name, (size, _) in runs.items()}
        self._begins: dict[str, list[int]] = {}
        self._shifts: dict[str, list[int]] = {}
        position = 0
        for name, (_, pieces) in runs.items():
            self._begins[name] = [begin for begin, _ in pieces]
            self._shifts[name] = []
            for begin, end in pieces:
                position += (begin - position) % PAGE
                self._shifts[name].append(position - begin)
                position += end - begin
        self._data_size = position
        self._ranges: dict[str, list[Range]] = {name: [] for name in runs}
        self._remove: list[str] = []
        self._lock = threading.Lock()
        self._locks = contextlib.ExitStack()
        self._partial: Path | None = None
        self._writer: FileWriter | None = None
        self._changes: Changes | None = None

    def __enter__(self) -> Staging:
        try:
            with output_errors(self._model):
                self._locks.enter_context(locked(self._root, self._model, list(self._ranges)))
                if os.path.lexists(self._place):
                    raise _busy(self._model)
                sweep_partials(self._place)
                self._partial = partial_path(self._place)
                os.mkdir(self._partial)
                os.mkdir(self._partial / FILES)
            self._writer = FileWriter(self._partial / DATA, self._data_size)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.abort()
        if self._partial is not None:
            remove_tree(self._partial)
            self._partial = None
        self._locks.close()

    @property
    def directory(self) -> Path:
        """Where whole files are to be built, under their names in the model."""
        assert self._partial is not None
        return self._partial / FILES

    def write(self, name: str, offset: int, view: memoryview) -> None:
        """New bytes for a range of a weight file, within one of its runs. Called by many threads at once."""
        assert self._writer is not None
        run = bisect.bisect_right(self._begins[name], offset) - 1
        at = offset + self._shifts[name][run]
        self._writer.write(at, view)
        done = Range(offset, len(view), at, block_digest(view).hex())
        with self._lock:
            self._ranges[name].append(done)

    def remove(self, name: str) -> None:
        """A file goes."""
        self._remove.append(name)

    def commit(self) -> None:
        """Makes the changes durable and binding. The model's readers refuse it from now on.

        Raises:
            OutputError: `output.busy` where another run was faster; codes as for a file that is written.
        """
        assert self._writer is not None and self._partial is not None
        self._writer.finish()
        whole = []
        with output_errors(self._place):
            for folder, _, names in os.walk(self.directory):
                for name in names:
                    path = Path(folder) / name
                    relative = path.relative_to(self.directory).as_posix()
                    whole.append(Whole(relative, path.stat().st_size, sha256_file(path)))
            targets = tuple(
                Target(name, self._sizes[name], tuple(sorted(ranges, key=lambda r: r.offset)))
                for name, ranges in self._ranges.items()
                if ranges
            )
            changes = Changes(self._command, targets, tuple(sorted(whole, key=lambda w: w.name)), tuple(self._remove))
            write_small_file(self._partial / INDEX, json.dumps(changes.to_data(), separators=(",", ":")).encode())
            for folder, _, _ in os.walk(self._partial, topdown=False):
                fsync_path(Path(folder))
            try:
                os.rename(self._partial, self._place)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise _busy(self._model) from None
                raise
            self._partial = None
            self._changes = changes
            fsync_path(self._place.parent)

    def apply(self) -> None:
        """Copies the changes into place and removes the journal. Where this fails, the next run finishes it."""
        assert self._changes is not None
        _apply(self._place, self._root, self._changes)


@contextlib.contextmanager
def locked(root: Path, model: Path, names: Sequence[str]) -> Iterator[None]:
    """Holds a model's directory and weight files against another run in place on this machine.

    Only courtesy: where a file system knows no locks, the rename of the journal decides.

    Raises:
        OutputError: `output.busy`.
    """
    with contextlib.ExitStack() as stack:
        places = [root] if root == model else []
        for place in (*places, *(root / name for name in names)):
            if sys.platform == "win32":
                break
            try:
                fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # reported where it is opened
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(model) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield


def _busy(model: Path) -> OutputError:
    message = "another run is rewriting this model in place"
    return OutputError("output.busy", message, fix="wait until it has ended", file=model)


def check_links(root: Path, names: Sequence[str], shown: str) -> None:
    """Weight files to rewrite are files of their own: no links, nor files with a second name.

    Raises:
        OutputError: `in-place.link`.
    """
    for name in names:
        with output_errors(root / name):
            found = os.lstat(root / name)
        if stat.S_ISLNK(found.st_mode):
            what = f"is a link to {quoted(os.readlink(root / name))}, which others may use (a download cache does)"
        elif found.st_nlink > 1:
            what = f"has {found.st_nlink} names (hard links): all of them would change"
        else:
            continue
        raise OutputError("in-place.link", f"{quoted(name)} {what}", fix="write a new model with -o OUT", file=shown)


# -------------------------------------------------------------------------------------------------- recovery


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run that was finished: the model, and what was being done to it."""

    model: Path
    command: str


def recover(model: Path) -> list[Recovered]:
    """Finishes interrupted runs on a model and clears what others left that had not come so far.

    Raises:
        InputError: `journal.damaged`, `journal.version`, `journal.foreign`; UnsafeError: `journal.unsafe-name`;
            OutputError: `output.busy`, and what writing raises: the model then waits to be recovered again.
    """
    done = []
    for journal in journals(model):
        whose = model_of(journal)
        root = journal.parent
        changes = read_journal(journal)
        with locked(root, whose, [t.name for t in changes.targets]):
            if not journal.is_dir():
                continue  # another run was faster
            _check_all(journal, root, changes)
            _apply(journal, root, changes)
        done.append(Recovered(whose, changes.command))
    place = journal_path(Path(os.path.abspath(model)), not model.is_dir())
    if place.parent.is_dir():
        with output_errors(model):
            sweep_partials(place)
    return done


_NO_WEIGHTS = (".json", ".txt", ".model", ".py", ".undo")


def read_journal(journal: Path) -> Changes:
    """The index of a journal, checked.

    Raises:
        InputError: `journal.damaged`, `journal.version`; UnsafeError: `journal.unsafe-name`.
    """
    where = str(journal)
    try:
        source = FileSource(journal / INDEX, where)
    except InputError:
        raise _damaged(journal, "it has no index") from None
    try:
        if source.size > MAX_INDEX_BYTES:
            raise _damaged(journal, "its index is too large")
        raw = source.read(0, source.size)
    finally:
        source.close()
    index = strictjson.loads(raw, where=where, code="journal.damaged", max_bytes=MAX_INDEX_BYTES)
    try:
        if index["format"] != FORMAT:
            message = f"is a journal of format {index['format']}, this loramerge knows {FORMAT}"
            raise InputError("journal.version", message, fix="recover with the loramerge that began", file=where)
        targets = tuple(
            Target(_name(row["name"], where), _count(row["size"]), tuple(_range(r) for r in row["ranges"]))
            for row in index["files"]
        )
        replace = tuple(
            Whole(_name(row["name"], where), _count(row["size"]), str(row["sha256"])) for row in index["replace"]
        )
        remove = tuple(_name(name, where) for name in index["remove"])
        for target in targets:
            if target.name.endswith(_NO_WEIGHTS):  # external data of ONNX may be called anything else
                raise ValueError(f"{target.name} is no weight file")
            if any(r.offset + r.length > target.size for r in target.ranges):
                raise ValueError(f"a range lies outside of {target.name}")
        return Changes(str(index["command"]), targets, replace, remove)
    except LoramergeError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(journal, f"its index means nothing ({error})") from None


def _name(name: Any, where: str) -> str:
    """A name that leads nowhere else."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part or ":" in part for part in parts):
        raise UnsafeError("journal.unsafe-name", f"it names a file {quoted(name)}", file=where)
    return str(name)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count of bytes")
    return value


def _range(row: Any) -> Range:
    offset, length, at, digest = row
    return Range(_count(offset), _count(length), _count(at), str(digest))


def _damaged(journal: Path, what: str) -> InputError:
    return InputError(
        "journal.damaged",
        f"the journal of the interrupted run cannot be used: {what}",
        fix=f"take the model from where it came from: it is half old, half new ({journal})",
        file=journal,
    )


def _check_all(journal: Path, root: Path, changes: Changes) -> None:
    """Everything that is to be copied is what was written, and there is a file for it."""
    buffer = memoryview(bytearray(CHUNK))
    with output_errors(journal):
        data = os.open(journal / DATA, os.O_RDONLY)
        try:
            for target in changes.targets:
                os.close(_open_target(root, target))
                for r in target.ranges:
                    view = buffer[: r.length] if r.length <= CHUNK else memoryview(bytearray(r.length))
                    if not _read(data, r.at, view) or block_digest(view).hex() != r.digest:
                        raise _damaged(journal, f"the bytes for {target.name} are not those that were written")
        finally:
            os.close(data)
        for whole in changes.replace:
            _check_parents(root, whole.name)
            if not _is(journal / FILES / whole.name, whole) and not _is(root / whole.name, whole):
                raise _damaged(journal, f"{quoted(whole.name)} is missing or was changed")
        for name in changes.remove:
            _check_parents(root, name)


def _is(path: Path, whole: Whole) -> bool:
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == whole.size and sha256_file(path) == whole.sha256


def _check_parents(root: Path, name: str) -> None:
    """No folder on the way to a file of the model is a link."""
    folder = root
    for part in name.split("/")[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise UnsafeError("journal.unsafe-name", f"{quoted(name)} lies behind a link", file=root)


# ------------------------------------------------------------------------------------------------------ apply


def _apply(journal: Path, root: Path, changes: Changes) -> None:
    """Copies everything into place. Done once or many times, in part before: the result is the same."""
    folders = {root}
    with output_errors(root):
        data = os.open(journal / DATA, os.O_RDONLY)
        try:
            for target in changes.targets:
                fd = _open_target(root, target)
                try:
                    _copy(data, fd, target, journal)
                    fsync_fd(fd)
                finally:
                    os.close(fd)
        finally:
            os.close(data)
        for whole in changes.replace:
            new, place = journal / FILES / whole.name, root / whole.name
            if os.path.lexists(new):
                _check_parents(root, whole.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_file() and not place.is_symlink():
                    os.chmod(new, stat.S_IMODE(os.lstat(place).st_mode))
                os.replace(new, place)
            folders |= {place.parent}
        for name in changes.remove:
            _check_parents(root, name)
            (root / name).unlink(missing_ok=True)
            folders |= {(root / name).parent}
        for folder in folders:
            fsync_path(folder)
        # Under its own name a journal is whole: it loses that before its files.
        gone = partial_path(journal)
        os.rename(journal, gone)
        fsync_path(gone.parent)
        remove_tree(gone)


def _open_target(root: Path, target: Target) -> int:
    """A weight file, open for writing, surely the one that the journal is for."""
    _check_parents(root, target.name)
    path = root / target.name
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise
        raise _foreign(path, "it is gone" if error.errno == errno.ENOENT else "a link is there") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size != target.size:
        os.close(fd)
        raise _foreign(path, f"it has {found.st_size} bytes and {found.st_nlink} names, not {target.size} bytes and 1")
    return fd


def _foreign(path: Path, what: str) -> InputError:
    return InputError(
        "journal.foreign",
        f"the journal of an interrupted run is for another file than is there: {what}",
        fix="put the file back, or remove the journal if the model was replaced since",
        file=path,
    )


def _copy(data: int, fd: int, target: Target, journal: Path) -> None:
    """The ranges of one file, in order."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(data, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    memory = memoryview(bytearray(CHUNK))
    for r in target.ranges:
        for done in range(0, r.length, CHUNK):
            view = memory[: min(CHUNK, r.length - done)]
            if not _read(data, r.at + done, view):
                raise _damaged(journal, "it is cut short")
            write_all(fd, view, r.offset + done)
            start_write_back(fd, r.offset + done, len(view))


def _read(fd: int, offset: int, view: memoryview) -> bool:
    """Fills a view; False where the file ends before."""
    while len(view):
        count = os.preadv(fd, [view], offset)
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True
