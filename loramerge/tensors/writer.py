"""Writing files: aligned buffers, direct writes by many threads, durable small files, clones.

Direct I/O (``O_DIRECT``) hands a worker's buffer to the device and skips the page cache, which is what makes
a durable merge as fast as a durable copy. It wants buffer, offset and length aligned; :class:`AlignedBuffer`
and :class:`FileWriter` see to that, and write through the page cache where the file system refuses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from loramerge.errors import OutputError

if sys.platform != "win32":
    import fcntl

PAGE = 4096
"""Alignment of direct writes: no current device has larger logical blocks."""

# Dirty bytes that a file in buffered mode may have in the page cache before a writer waits for the device.
_DIRTY_BYTES = 64 << 20
_FICLONE = 0x40049409
_NOT_SUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

_ERRORS = {
    errno.ENOSPC: ("output.no-space", "free some space, or write to another disk with -o"),
    errno.EDQUOT: ("output.no-space", "free some of your quota, or write to another disk with -o"),
    errno.EFBIG: (
        "output.too-large",
        "write smaller files with --shard-size, or raise the limit (ulimit -f)",
    ),
    errno.EACCES: ("output.permission", "write to a place that you may write to with -o"),
    errno.EPERM: ("output.permission", "write to a place that you may write to with -o"),
    errno.EROFS: ("output.permission", "write to a file system that is not read-only with -o"),
    errno.ENAMETOOLONG: ("output.io", "choose a shorter name with -o"),
}


def output_error(exc: OSError, path: Path) -> OutputError:
    """The :class:`OutputError` for an operating system's error about ``path``.

    Codes: ``output.no-space``, ``output.too-large``, ``output.permission``, and ``output.io`` for the rest.
    """
    code, fix = _ERRORS.get(exc.errno or 0, ("output.io", "check the disk, or write elsewhere with -o"))
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    return OutputError(code, f"cannot write the output: {reason}", fix=fix, file=path)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into the :class:`OutputError` about ``path``."""
    try:
        yield
    except OSError as exc:
        raise output_error(exc, path) from exc


def linux_call(name: str, *argtypes: Any) -> Callable[..., int] | None:
    """A function of the C library, made to raise OSError where it fails; None where it is missing."""
    function = None
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.argtypes = argtypes
    function.restype = ctypes.c_int

    def call(*args: object) -> int:
        while function(*args) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        return 0

    return call


# The C library's fallocate is the bare system call; its posix_fallocate writes zeros where that is missing.
_fallocate = linux_call("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64) or linux_call(
    "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
_sync_file_range = linux_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_START_WRITE_BACK = 2
_WAIT_FOR_WRITE_BACK = 1 | 2 | 4


class AlignedBuffer:
    """Page-aligned memory for file ranges of up to ``capacity`` bytes, used again and again.

    ``memory`` is the whole of it: ``torch.frombuffer(buffer.memory, offset=buffer.start_of(offset), ...)``
    and ``buffer.window(offset, ...)`` see the same bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # A window starts up to a page late. Private memory, where there is a choice, as it faults in faster.
        length = -(-capacity // PAGE) * PAGE + PAGE
        if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
            self.memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self.memory = mmap.mmap(-1, length)

    def start_of(self, offset: int) -> int:
        """Index in ``memory`` of the window for the file range that starts at ``offset``."""
        return offset % PAGE

    def window(self, offset: int, length: int) -> memoryview:
        """``length`` bytes at an address congruent to ``offset`` modulo 4096: written there without a copy.

        Raises:
            ValueError: ``length`` is negative or exceeds the capacity.
        """
        if not 0 <= length <= self.capacity:
            raise ValueError(f"a window of {length} bytes in a buffer for {self.capacity}")
        start = self.start_of(offset)
        return memoryview(self.memory)[start : start + length]

    def close(self) -> None:
        """Gives the memory back; while windows or tensors still show it, they keep it."""
        with contextlib.suppress(BufferError):
            self.memory.close()


class FileWriter:
    """One new file of known size, written at any offsets by many threads.

    Ranges written at the same time must not overlap. As a context manager it finishes, or aborts on an
    exception.

    Args:
        path: the file; it must not exist.
        size: its size in bytes, reserved on the disk at once where the file system can.

    Raises:
        OutputError: ``output.no-space``, ``output.too-large``, ``output.permission``, ``output.io``.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._state = threading.Condition()
        self._writing = 0
        self._open = True
        self._behind: deque[tuple[int, int]] = deque()
        self._dirty = 0
        with output_errors(path):
            self._fd = _create(path)
            self._direct_fd = -1
            try:
                _reserve(self._fd, size)
                self._unit = _cache_unit(self._fd)
                self._direct_fd = _open_direct(path)
            except BaseException:
                self.abort()
                raise
        self._direct = self._direct_fd >= 0

    @property
    def direct(self) -> bool:
        """Whether writes bypass the page cache at present."""
        return self._direct

    def write(self, offset: int, view: memoryview) -> None:
        """Writes all of ``view`` at ``offset``.

        Raises:
            OutputError: as the constructor.
            ValueError: the range leaves the file, or the writer is closed.
        """
        data = view if view.format == "B" and view.ndim == 1 else view.cast("B")
        end = offset + len(data)
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"bytes {offset} to {end} do not lie in a file of {self.size}")
        if not data:
            return
        with self._in_flight(), output_errors(self.path):
            # A page that lies wholly in a range belongs to one writer and goes around the page cache. A page
            # at the edge of a range is an edge of the neighbouring range too: both writers send it through
            # the page cache, which keeps them coherent. So no page is ever written in both ways.
            first = -(-offset // self._unit) * self._unit
            last = end // self._unit * self._unit
            if self._direct and first < last and _address(data) % PAGE == offset % PAGE:
                self._write_buffered(offset, data[: first - offset])
                written = self._write_direct(first, data[first - offset : last - offset])
                self._write_buffered(first + written, data[first - offset + written :])
            else:
                self._write_buffered(offset, data)

    def finish(self) -> None:
        """Waits for the bytes to be on the device and closes the file.

        Raises:
            OutputError: as the constructor.
        """
        if self._shut():
            try:
                with output_errors(self.path):
                    fsync_fd(self._fd)
            finally:
                self._close()

    def abort(self) -> None:
        """Closes and deletes the file; never raises, does nothing after the end."""
        if self._shut():
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    @contextlib.contextmanager
    def _in_flight(self) -> Iterator[None]:
        # Descriptors are closed only when no thread is in a write: a number that is closed and used again
        # for another file would send the rest of a write there.
        with self._state:
            if not self._open:
                raise ValueError(f"{self.path} is closed")
            self._writing += 1
        try:
            yield
        finally:
            with self._state:
                self._writing -= 1
                self._state.notify_all()

    def _shut(self) -> bool:
        """Refuses further writes, waits for those in flight; False if that has been done before."""
        with self._state:
            was_open, self._open = self._open, False
            while self._writing:
                self._state.wait()
        return was_open

    def _close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)

    def _write_direct(self, offset: int, data: memoryview) -> int:
        """Writes aligned ``data`` around the page cache; returns how much, the rest goes the other way."""
        done = 0
        while done < len(data) and done % PAGE == 0:
            try:
                done += _some(os.pwrite(self._direct_fd, data[done:], offset + done))
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                # Opened, but refused at the write (some network and FUSE file systems): not asked again.
                self._direct = False
                break
        return done

    def _write_buffered(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += _some(_pwrite(self._fd, data[done:], offset + done, self._state))
        if not self._direct:
            self._write_behind(offset, len(data))

    def _write_behind(self, offset: int, length: int) -> None:
        """Starts the write-back of a range, and waits for the oldest ones while too many bytes are dirty.

        Without this the kernel lets dirty pages grow to a share of all memory and writes them at the final
        fsync.
        """
        if _sync_file_range is None or not length:
            return
        due = []
        with self._state:
            self._behind.append((offset, length))
            self._dirty += length
            while self._dirty > _DIRTY_BYTES:
                due.append(self._behind.popleft())
                self._dirty -= due[-1][1]
        try:
            _sync_file_range(self._fd, offset, length, _START_WRITE_BACK)
            for begin, count in due:
                _sync_file_range(self._fd, begin, count, _WAIT_FOR_WRITE_BACK)
                os.posix_fadvise(self._fd, begin, count, os.POSIX_FADV_DONTNEED)
        except OSError as exc:
            # A file system may not know the call. A failed write-back is reported here, not again at fsync.
            if exc.errno not in _NOT_SUPPORTED | {errno.ESPIPE}:
                raise


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of ``data`` into an open file, at ``offset``. Raises OSError."""
    done = 0
    while done < len(data):
        done += _some(os.pwrite(fd, data[done:], offset + done))


def start_write_back(fd: int, offset: int, length: int) -> None:
    """Has the kernel begin to write a range to the device, where it knows how, so that a later fsync waits less."""
    if _sync_file_range is not None and length:
        try:
            _sync_file_range(fd, offset, length, _START_WRITE_BACK)
        except OSError as exc:
            if exc.errno not in _NOT_SUPPORTED | {errno.ESPIPE}:
                raise


def write_small_file(path: Path, data: bytes) -> None:
    """Creates ``path`` with these bytes, on the device when it returns.

    Raises:
        OutputError: it exists already or cannot be written; codes as for :func:`output_error`.
    """
    with output_errors(path):
        fd = _create(path)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[_some(os.write(fd, rest)) :]
            fsync_fd(fd)
        finally:
            os.close(fd)


def copy_whole_file(source: int | Path, dest: Path, *, link: bool) -> str | None:
    """Makes ``dest`` a copy of a whole file that shares its data, if the file system can.

    Args:
        source: an open descriptor, or a path (links are followed).
        dest: the new file; it must not exist.
        link: a hard link will do. It *is* the source: nobody may write to either afterwards.

    Returns:
        ``"linked"``, ``"cloned"`` (call :func:`fsync_path` later), or None: nothing is there, copy the bytes.

    Raises:
        OutputError: ``dest`` exists or cannot be created; codes as for :func:`output_error`.
        OSError: the source cannot be opened.
    """
    if isinstance(source, Path):
        fd = os.open(source, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            return copy_whole_file(fd, dest, link=link)
        finally:
            os.close(fd)
    with output_errors(dest):
        if link and _link(source, dest):
            return "linked"
        return "cloned" if _clone(source, dest) else None


def fsync_path(path: Path) -> None:
    """Waits until a file's bytes, or a directory's entries, are on the device.

    Raises:
        OutputError: codes as for :func:`output_error`.
    """
    with output_errors(path):
        directory = path.is_dir()
        if os.name == "nt" and directory:
            return  # directories cannot be opened there
        fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            fsync_fd(fd)
        except OSError as exc:
            # Some network file systems cannot sync a directory; the files themselves are safe.
            if not (directory and exc.errno in _NOT_SUPPORTED | {errno.EBADF}):
                raise
        finally:
            os.close(fd)


def fsync_fd(fd: int) -> None:
    """``fsync`` that reaches the device: on macOS it takes a call of its own to empty the drive's cache."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)  # less the umask


def _reserve(fd: int, size: int) -> None:
    """Gives a new file its size, with the space for it reserved where the file system can."""
    if _fallocate is not None and size:
        try:
            _fallocate(fd, 0, 0, size)
            return
        except OSError as exc:
            if exc.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(fd, size)


def _open_direct(path: Path) -> int:
    """A descriptor that bypasses the page cache, or -1."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or not hasattr(os, "pwrite"):
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError as exc:
        if exc.errno not in _NOT_SUPPORTED:
            raise
        return -1


def _cache_unit(fd: int) -> int:
    """Bytes that the page cache writes back as one: the larger of a page and a block of the file system."""
    block = os.fstatvfs(fd).f_bsize if hasattr(os, "fstatvfs") else PAGE
    # Network file systems name their transfer size here; their cache works in pages.
    usable = block <= 65536 and block & (block - 1) == 0
    return max(PAGE, mmap.PAGESIZE, block if usable else 0)


def _address(data: memoryview) -> int:
    """Address of a view's memory; an odd one, never aligned, for memory that cannot be asked (read-only)."""
    return 1 if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))


def _some(count: int) -> int:
    """A write's count, which may be short but not nothing: that would repeat for ever."""
    if not count:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return count


def _pwrite(fd: int, data: memoryview, offset: int, lock: threading.Condition) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _link(fd: int, dest: Path) -> bool:
    """A hard link to the very file that is open, whatever has become of its name."""
    try:
        # An absolute path makes the directory descriptor irrelevant; giving one makes Python follow the link.
        os.link(f"/proc/self/fd/{fd}", dest, src_dir_fd=fd, follow_symlinks=True)
        return True
    except NotImplementedError:
        return False
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return False


def _clone(fd: int, dest: Path) -> bool:
    if sys.platform != "linux":
        return False
    target = _create(dest)
    cloned = False
    try:
        fcntl.ioctl(target, _FICLONE, fd)
        cloned = True
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
    finally:
        os.close(target)
        if not cloned:
            os.unlink(dest)
    return cloned
