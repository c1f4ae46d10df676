"""Where bytes come from: a small protocol, and what implements it: a file on disk, and memory."""

from __future__ import annotations

import difflib
import errno
import itertools
import os
import stat as stat_module
import threading
from pathlib import Path
from typing import Protocol

from loramerge.errors import InputError
from loramerge.tensors.text import quoted


class ByteSource(Protocol):
    """A sequence of bytes of known size that can be read anywhere, by many threads at once."""

    @property
    def name(self) -> str:
        """The source as the user typed it."""

    @property
    def size(self) -> int:
        """Bytes in it when it was opened."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset` on, or raise InputError."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, or InputError."""

    def check_unchanged(self) -> None:
        """Raise InputError ``input.changed`` if it is not what it was when it was opened."""

    def close(self) -> None:
        """Give back what it holds. It is not read again."""


class FileSource:
    """A regular file, stat'ed now and opened at the first read. Thread safe.

    Args:
        path: the file; links are followed.
        name: the file as the user typed it, for messages (`path` by default).

    Raises:
        InputError: ``input.missing``, ``input.dangling``, ``input.loop``, ``input.directory``,
            ``input.not-regular``, ``input.unreadable``.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = str(path) if name is None else name
        self.stat = stat_file(self.path, self.name)
        if stat_module.S_ISDIR(self.stat.st_mode):
            fix = "name a file inside it"
            raise InputError("input.directory", "is a directory, not a file", fix=fix, file=self.name)
        if not stat_module.S_ISREG(self.stat.st_mode):
            message = f"is {_special(self.stat.st_mode)}, not a regular file"
            raise InputError("input.not-regular", message, fix="save it to a file first", file=self.name)
        self.size = self.stat.st_size
        self._lock = threading.Lock()
        self._fd = -1
        self._closed = False

    @property
    def fd(self) -> int:
        """The file descriptor, opened on first use. InputError if the file is gone or another by now."""
        if self._fd < 0:
            with self._lock:
                if self._closed:
                    raise ValueError(f"{self.name}: read after close")
                if self._fd < 0:
                    self._fd = self._open()
        return self._fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` (contiguous, writable) from `offset` on.

        Raises:
            InputError: ``input.truncated`` (beyond the end), ``input.changed`` (the file shrank),
                ``input.unreadable`` (the system reports an error).
        """
        rest = buffer.cast("B")
        if offset < 0 or offset + len(rest) > self.size:
            message = f"bytes {offset} to {offset + len(rest)} are asked for, the file has {self.size}"
            raise InputError("input.truncated", message, fix="download the file again", file=self.name)
        fd = self.fd
        while len(rest):
            try:
                count = os.preadv(fd, [rest], offset)
            except OSError as error:
                raise self._unreadable(error) from None
            if count == 0:
                raise self._changed(f"it ends at byte {offset} now")
            rest = rest[count:]
            offset += count

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; raises as `read_into` does."""
        if offset < 0 or length < 0 or offset + length > self.size:
            length = max(length, 0)
            message = f"bytes {offset} to {offset + length} are asked for, the file has {self.size}"
            raise InputError("input.truncated", message, fix="download the file again", file=self.name)
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise InputError ``input.changed`` if size, mtime or inode differ from those at opening."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise self._changed(error.strerror or "it is gone") from None
        self._compare(now)

    def close(self) -> None:
        """Close the file. Safe to call twice; not while other threads read."""
        with self._lock:
            fd, self._fd, self._closed = self._fd, -1, True
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # A plan that nobody carries out holds sources that nobody closes.
        if getattr(self, "_fd", -1) >= 0 and os is not None:  # None when Python is about to end
            self.close()

    def __repr__(self) -> str:
        return f"FileSource({self.name!r}, size={self.size})"

    def _open(self) -> int:
        # O_NONBLOCK: if a fifo has taken the file's place, open() must not wait for its writer.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            fd = os.open(self.path, flags)
        except FileNotFoundError:
            raise self._changed("it is gone") from None
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            self._compare(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return fd

    def _compare(self, now: os.stat_result) -> None:
        then = self.stat
        if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
            raise self._changed("another file has its name now")
        if now.st_size != then.st_size:
            raise self._changed(f"it had {then.st_size} bytes and has {now.st_size} now")
        if now.st_mtime_ns != then.st_mtime_ns:
            raise self._changed("it was written to")

    def _changed(self, detail: str) -> InputError:
        fix = "run the command again when nothing else writes to the file"
        return InputError("input.changed", f"changed while it was being read: {detail}", fix=fix, file=self.name)

    def _unreadable(self, error: OSError) -> InputError:
        return unreadable(error, self.name)


class MemorySource:
    """Bytes in memory.

    Args:
        data: the bytes.
        name: what they are of, for messages.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset` on."""
        buffer.cast("B")[:] = self.read(offset, buffer.nbytes)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; InputError ``input.truncated`` beyond the end."""
        if offset < 0 or length < 0 or offset + length > self.size:
            message = f"bytes {offset} to {offset + length} are asked for, there are {self.size}"
            raise InputError("input.truncated", message, file=self.name)
        return self._data[offset : offset + length]

    def check_unchanged(self) -> None:
        """Nothing changes them."""

    def close(self) -> None:
        """Nothing is open."""


def stat_file(path: Path, name: str) -> os.stat_result:
    """`os.stat` with links followed, every failure an InputError that says what is the matter with `name`."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            target = quoted(os.readlink(path))
            message = f"is a link to {target}, which does not exist; was a cache evicted?"
            raise InputError("input.dangling", message, fix="download it again", file=name) from None
        raise _missing(path, name) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError("input.loop", "is a link that leads back to itself", fix="remove it", file=name) from None
        if error.errno == errno.ENAMETOOLONG:
            raise _missing(path, name) from None
        raise unreadable(error, name) from None
    except ValueError:  # a NUL character in the path
        raise _missing(None, name) from None


def unreadable(error: OSError, name: str) -> InputError:
    """The InputError for a read or an open that the system refused."""
    fix = "check its permissions" if isinstance(error, PermissionError) else "check the disk, or copy the file again"
    return InputError("input.unreadable", f"cannot be read: {error.strerror or error}", fix=fix, file=name)


def _missing(path: Path | None, name: str) -> InputError:
    fix = "check the path"
    if path is not None:
        try:
            with os.scandir(path.parent) as entries:
                names = [entry.name for entry in itertools.islice(entries, 10_000)]
        except (OSError, ValueError):
            names = []
        near = difflib.get_close_matches(path.name[:255], names, n=1, cutoff=0.6)
        if near:
            fix = f"did you mean {quoted(near[0])}, which is there?"
    return InputError("input.missing", "does not exist", fix=fix, file=name)


def _special(mode: int) -> str:
    if stat_module.S_ISFIFO(mode):
        return "a pipe"
    if stat_module.S_ISSOCK(mode):
        return "a socket"
    return "a device"
