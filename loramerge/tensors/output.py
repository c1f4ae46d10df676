"""All-or-nothing outputs: checks before the first byte, a partial beside the destination, one last rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal

from loramerge.errors import OutputError, UsageError
from loramerge.tensors.interrupted import refuse_interrupted
from loramerge.tensors.writer import fsync_path, linux_call, output_error, output_errors

What = Literal["file", "directory"]
Role = Literal["partial", "old"]

_MARKERS = {"loramerge.json", "config.json", "adapter_config.json", "model_index.json"}
_SHARD = re.compile(r"-\d+-of-\d+(?=\.safetensors$)")

_renameat2 = linux_call("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
# EPERM: some sandboxes say so for a call they do not know; where it is meant, the plain rename says it again.
_NO_SUCH_RENAME = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}


# ---------------------------------------------------------------------------------------------------- checks


def check_destination(dest: Path, *, inputs: Sequence[Path], force: bool, what: What) -> None:
    """Refuses a destination that must not or cannot be written, before anything is.

    Args:
        dest: where the output is to be, as the user gave it.
        inputs: every file and directory that the user named as an input.
        force: replace what is there.
        what: whether a file or a directory is to be written.

    Raises:
        UsageError: ``output.name``: not a name that a file can have.
        OutputError: ``output.is-input`` (equal to, inside or around an input; with ``force`` too),
            ``output.exists``, ``output.no-parent``, ``output.permission``, ``output.kind``,
            ``output.not-a-model`` (``force`` would delete something that is no model), ``output.io``.
        InputError: ``input.interrupted``: there is a model that was being rewritten in place.
    """
    if "\0" in str(dest):
        raise UsageError("output.name", "the output's name has a null byte in it", fix="choose another name with -o")
    refuse_interrupted(dest, str(dest))
    with output_errors(dest):
        place = _locate(dest)
        parent = _stat(place.parent)
        if parent is None or not stat.S_ISDIR(parent.st_mode):
            problem = "is not a directory" if parent else "does not exist"
            raise OutputError(
                "output.no-parent",
                f"the directory for the output {problem}: {place.parent}",
                fix=f"mkdir -p {shlex.quote(str(dest.parent))}" if parent is None else "choose another place with -o",
                file=dest,
            )
        _check_inputs(place, inputs, dest)
        there = _lstat(place)
        if there is not None:
            if not force:
                raise _exists(dest)
            _check_replaceable(place, there, what, dest)
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise output_error(PermissionError(errno.EACCES, "", str(place.parent)), place.parent)


def check_space(dest: Path, needed: int) -> None:
    """Refuses an output of ``needed`` bytes that the destination's file system has no room for.

    Raises:
        OutputError: ``output.no-space``, or ``output.io`` where the file system cannot be asked.
    """
    with output_errors(dest):
        total, _, free = shutil.disk_usage(_locate(dest).parent)
    if total and needed > free:  # a total of zero: a file system that does not tell
        raise OutputError(
            "output.no-space",
            f"the output needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
            fix="free some space, or write to another disk with -o",
            file=dest,
        )


def _check_inputs(place: Path, inputs: Sequence[Path], dest: Path) -> None:
    """The destination is not an input, not inside an input directory, and has no input inside."""
    here = _identity(place)
    above = {_identity(parent) for parent in place.parents}
    for source in [*inputs, *(link for directory in inputs for link in _links_in(directory))]:
        real = Path(os.path.realpath(source))
        name = _identity(real)
        if name is None:
            continue  # reported where inputs are opened
        # A directory would take both the file itself and the links by which the user named it with it.
        parents = (*real.parents, *_locate(source).parents, *Path(os.path.abspath(source)).parents)
        around = {_identity(parent) for parent in parents}
        if here is not None and here == name:
            relation = "is the input"
        elif name in above:
            relation = "lies inside the input"
        elif here is not None and here in around:
            relation = "contains the input"
        else:
            continue
        raise OutputError(
            "output.is-input",
            f"the output {relation} {source}",
            fix="choose another place with -o",
            file=dest,
        )


def _links_in(source: Path) -> list[Path]:
    """The links to files in an input directory: what they lead to is input as well."""
    try:
        with os.scandir(source) as entries:
            return [Path(entry.path) for entry in entries if entry.is_symlink() and entry.is_file()]
    except OSError:
        return []  # a file, or reported where inputs are opened


def _check_replaceable(place: Path, there: os.stat_result, what: What, dest: Path) -> None:
    """What ``--force`` may replace: a file; a directory that is a model or empty; each by its like."""
    fits = stat.S_ISREG if what == "file" else stat.S_ISDIR
    if not fits(there.st_mode):
        raise OutputError(
            "output.kind",
            f"a {what} is to be written, and {_kind(there.st_mode)} is there",
            fix="move it away, or choose another place with -o",
            file=dest,
        )
    if what == "file":
        return
    if not os.access(place, os.W_OK | os.X_OK | os.R_OK):
        raise output_error(PermissionError(errno.EACCES, "", str(place)), dest)
    reason = _why_no_model(place)
    if reason:
        raise OutputError(
            "output.not-a-model",
            f"refusing to delete a directory that {reason}",
            fix="remove it yourself, or choose another place with -o",
            file=dest,
        )


def _why_no_model(place: Path) -> str:
    here = _identity(place)
    if place == place.parent or os.path.ismount(place):
        return "is a mount point"
    if here == _identity(Path(os.path.expanduser("~"))):
        return "is a home directory"
    cwd = Path.cwd()
    if here in {_identity(p) for p in (cwd, *cwd.parents)}:
        return "is the current directory or holds it"
    names = os.listdir(place)
    if not names or not _MARKERS.isdisjoint(names):
        return ""
    # The weights of one model, and not a folder of many: those are a collection that took time to download.
    models = {_SHARD.sub("", name) for name in names if name.endswith(".safetensors")}
    if len(models) == 1:
        return ""
    return "holds many models" if models else "is not a model"


def _exists(dest: Path) -> OutputError:
    fix = "give --force to replace it, or choose another place with -o"
    return OutputError("output.exists", "the output exists already", fix=fix, file=dest)


def _kind(mode: int) -> str:
    tests = {
        "a symbolic link": stat.S_ISLNK,
        "a directory": stat.S_ISDIR,
        "a file": stat.S_ISREG,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, test in tests.items() if test(mode)), "a device")


def _locate(path: Path) -> Path:
    """The absolute path with every link resolved but a last one: what a rename would act on."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of what a path leads to: the same for any spelling of it. None where nothing is."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# -------------------------------------------------------------------------------------------------- partials
#
# A partial's name says whose it is: <stem>.partial-<host>-<pid>-<start ticks>-<random>. Making it is one
# mkdir, so there is no moment at which a kill leaves a partial without an owner.


@cache
def _host_hash() -> str:
    """Eight hex digits that are equal only where process ids mean the same processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text())
    # Two containers of one host may share its name and a volume, but not its process ids.
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:8]


def _process(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process; None where that cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])


def _suffix() -> str:
    mine = _process(os.getpid())
    return f"{_host_hash()}-{os.getpid()}-{mine[1] if mine else 0}-{secrets.token_hex(4)}"


def _alive(pid: int, ticks: int) -> bool:
    """Whether the process that made a partial may still run; in doubt it does."""
    if os.name == "nt":
        return True  # there, os.kill(pid, 0) is no question
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False  # no process has such a number
    except OSError:
        pass  # somebody else's
    process = _process(pid)
    if process is None or not ticks:
        return True
    return process[1] == ticks and process[0] not in "ZX"


def _stem(place: Path) -> str:
    """The destination's name, cut where the suffix would make it too long for the file system."""
    limit = 255
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limit = os.pathconf(place.parent, "PC_NAME_MAX")
    raw = os.fsencode(place.name)
    room = limit - 64  # the longest suffix has 58 bytes; fixed, so that every process finds the same stem
    if len(raw) <= room:
        return place.name
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return raw[: max(0, room - 17)].decode(errors="ignore") + "~" + digest


def _abandoned(place: Path, role: Role) -> Iterator[Path]:
    """Directories of dead processes of this host beside a destination."""
    pattern = re.compile(rf"{re.escape(_stem(place))}\.{role}-([0-9a-f]{{8}})-(\d{{1,10}})-(\d{{1,20}})-[0-9a-f]{{8}}")
    with os.scandir(place.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if not match or match[1] != _host_hash() or not entry.is_dir(follow_symlinks=False):
                continue
            if not _alive(int(match[2]), int(match[3])):
                yield Path(entry.path)


def sweep(dest: Path) -> None:
    """Clears what killed runs left beside ``dest``; what live processes and other hosts have there stays.

    An old output that a run had moved aside, and died before its new one was in place, is put back.

    Raises:
        OutputError: ``output.permission``, ``output.io``: the directory around it cannot be read.
    """
    with output_errors(dest):
        place = _locate(dest)
        for old in sorted(_abandoned(place, "old")):
            if _lstat(place) is None:
                with contextlib.suppress(OSError):  # another run was faster
                    os.rename(old, place)
            else:
                remove_tree(old)
        sweep_partials(place)


def partial_path(place: Path) -> Path:
    """A name beside ``place``, of this process alone, for what is to become it or has been it."""
    return place.with_name(f"{_stem(place)}.partial-{_suffix()}")


def sweep_partials(place: Path) -> None:
    """Clears the partials that dead processes of this host left beside ``place``."""
    for partial in list(_abandoned(place, "partial")):
        remove_tree(partial)


def remove_tree(directory: Path) -> bool:
    """Deletes a tree, links in it and not what they lead to; whether it is gone."""
    shutil.rmtree(directory, ignore_errors=True)
    return _lstat(directory) is None


# ---------------------------------------------------------------------------------------------------- output


class Output:
    """An output that is absent, old or complete for everybody else, whatever happens to this process.

    As a context manager it makes a partial beside the destination, to be filled through ``directory``;
    :meth:`commit` puts it in place; leaving without that, or by an exception, removes it. A directory is
    built *in* ``directory``; a file as ``directory / dest.name``, with its companions beside it.

    Args:
        dest: the destination, already checked by :func:`check_destination`.
        what: what is to be there.
        force: replace what is there.
        companions: names of the files that go with a single file (receipt, undo file). They may be left
            unbuilt; an old one of that name beside the destination then goes.

    Raises:
        OutputError: ``output.exists``, ``output.no-space``, ``output.permission``, ``output.io``.
    """

    def __init__(self, dest: Path, what: What, force: bool, companions: Sequence[str] = ()) -> None:
        self.dest = dest
        self.what: What = what
        self.force = force
        self.companions = tuple(companions)
        #: What was replaced and could not be deleted: the output is complete, the user may want to know.
        self.leftover: Path | None = None
        self._partial: Path | None = None
        self._old: Path | None = None

    @property
    def directory(self) -> Path:
        """The partial, to be filled. ValueError outside the ``with`` block."""
        if self._partial is None:
            raise ValueError("the output is not open")
        return self._partial

    def __enter__(self) -> Output:
        sweep(self.dest)
        with output_errors(self.dest):
            # Absolute from here on: the working directory may change.
            self._place = _locate(self.dest)
            if not self.force and _lstat(self._place) is not None:
                raise _exists(self.dest)
            stem, suffix = _stem(self._place), _suffix()
            self._aside = self._place.with_name(f"{stem}.old-{suffix}")
            # Named before it is made: a signal may raise between any two of these lines.
            self._partial = self._place.with_name(f"{stem}.partial-{suffix}")
            try:
                os.mkdir(self._partial)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes what was built and not committed. Safe to call again.

        For a caller's own ``finally``: a signal can raise after ``__enter__`` and before the ``with`` block.
        """
        if self._old is not None:
            # Interrupted between the two renames, or just after them.
            with contextlib.suppress(OSError):
                if _lstat(self._place) is None:
                    os.rename(self._old, self._place)
                else:
                    remove_tree(self._old)
        if self._partial is not None and not remove_tree(self._partial):
            self.leftover = self._partial
        self._partial = None

    def commit(self) -> None:
        """Puts the output in place. Its files must be on the device already; their names are made so here.

        Raises:
            OutputError: ``output.exists`` (somebody else was faster), ``output.kind``,
                ``output.not-a-model``, ``output.permission``, ``output.io``. The destination is then as it
                was, unless it was the very last sync that failed.
        """
        with output_errors(self.dest):
            for folder, _, _ in os.walk(self.directory, topdown=False):
                fsync_path(Path(folder))
            there = _lstat(self._place)
            if there is not None:
                if not self.force:
                    raise _exists(self.dest)
                # A merge takes a while: look again at what is about to be deleted.
                _check_replaceable(self._place, there, self.what, self.dest)
            try:
                if self.what == "file":
                    self._commit_file(there)
                else:
                    self._commit_directory(there)
            except FileExistsError as exc:
                raise _exists(self.dest) from exc
            fsync_path(self._place.parent)

    def _commit_file(self, there: os.stat_result | None) -> None:
        """Companions first, the file last: whoever sees the new file sees its receipt."""
        built = self.directory / self._place.name
        mine = _identity(built)
        if there is not None:
            os.chmod(built, stat.S_IMODE(there.st_mode))
            fsync_path(built)
        beside = {name: self._place.with_name(name) for name in self.companions}
        placed: list[tuple[Path, Path, tuple[int, int] | None]] = []
        try:
            for name, target in beside.items():
                new = self.directory / name
                if _lstat(new) is not None:
                    placed.append((new, target, _identity(new)))
                    _place_companion(new, target)
            if placed:
                fsync_path(self._place.parent)
            if self.force:
                os.replace(built, self._place)
            else:
                _rename_new(built, self._place)
        except BaseException:
            if _identity(self._place) != mine:
                for new, target, identity in reversed(placed):
                    _put_back(new, target, identity)
            raise
        for name, target in beside.items():
            if not any(done == target for _, done, _ in placed) and _lstat(self.directory / name) is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(target)

    def _commit_directory(self, there: os.stat_result | None) -> None:
        if there is None:
            _rename_new(self.directory, self._place)
            self._partial = None
            return
        os.chmod(self.directory, stat.S_IMODE(there.st_mode))
        fsync_path(self.directory)
        if _rename2(self.directory, self._place, _EXCHANGE):
            # The old output now has the partial's name: should we be killed here, the next run sweeps it.
            fsync_path(self._place.parent)
            if not remove_tree(self.directory):
                self.leftover = self._partial
            self._partial = None
            return
        self._old = self._aside
        os.rename(self._place, self._aside)
        try:
            os.rename(self.directory, self._place)
        except BaseException:
            if _lstat(self._place) is None:
                os.rename(self._aside, self._place)
            raise
        self._partial = None
        fsync_path(self._place.parent)
        if not remove_tree(self._aside):
            self.leftover = self._aside
        self._old = None


def _rename2(source: Path, target: Path, flag: int) -> bool:
    """``renameat2`` with a flag; False where there is no such thing."""
    if _renameat2 is None:
        return False
    try:
        _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag)
    except OSError as exc:
        if exc.errno in _NO_SUCH_RENAME:
            return False
        raise
    return True


def _rename_new(source: Path, target: Path) -> None:
    """Renames to a name that must be free. FileExistsError where it is not."""
    try:
        if _rename2(source, target, _NOREPLACE):
            return
        if source.is_file() and _link_new(source, target):
            return
        # A plain rename replaces a file, but no directory unless it is empty: little is left to chance.
        if _lstat(target) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from exc
        raise


def _link_new(source: Path, target: Path) -> bool:
    """A hard link fails where the name is taken, on every system that has hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        return False
    os.unlink(source)
    return True


def _place_companion(new: Path, target: Path) -> None:
    """Puts a companion in place; what it replaces is kept in the partial, so that it can be put back."""
    while True:
        try:
            if _lstat(target) is None:
                _rename_new(new, target)
                return
            if _rename2(new, target, _EXCHANGE):
                return
            _kept(new).unlink(missing_ok=True)
            try:
                os.link(target, _kept(new))
            except (OSError, NotImplementedError):
                shutil.copy2(target, _kept(new), follow_symlinks=False)
            os.replace(new, target)
            return
        except (FileExistsError, FileNotFoundError):
            # Another run put its own there, or took it away, since we looked.
            if _lstat(new) is None:
                raise


def _put_back(new: Path, target: Path, identity: tuple[int, int] | None) -> None:
    """Undoes :func:`_place_companion`, unless another run has put its own companion there since."""
    with contextlib.suppress(OSError):
        if _identity(target) != identity:
            return
        # An exchange has left the old one under the new one's name.
        old = next((path for path in (new, _kept(new)) if _lstat(path) is not None), None)
        if old is None:
            os.unlink(target)
        else:
            os.replace(old, target)


def _kept(new: Path) -> Path:
    name = hashlib.sha256(os.fsencode(new.name)).hexdigest()[:16]
    return new.with_name(f"{name}.replaced")
