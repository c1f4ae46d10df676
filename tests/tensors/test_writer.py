"""Writing: every byte lands where it belongs, every failure is an OutputError, nothing is left half done."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramerge.errors import OutputError
from loramerge.tensors import writer
from loramerge.tensors.writer import (
    AlignedBuffer,
    FileWriter,
    copy_whole_file,
    fsync_path,
    output_error,
    write_small_file,
)

ROOT = Path(writer.__file__).parents[2]
PLACES = ["disk", *(["/dev/shm"] if os.access("/dev/shm", os.W_OK) else [])]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=request.param))
    yield folder
    shutil.rmtree(folder)


def python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter; what it prints is the result."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)


def noise(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


# ------------------------------------------------------------------------------------------------- buffers


@given(st.integers(0, 1 << 50), st.integers(0, 70000))
def test_a_window_is_aligned_like_its_offset(offset: int, length: int) -> None:
    buffer = AlignedBuffer(70000)
    window = buffer.window(offset, length)
    assert len(window) == length
    if length:
        address = np.frombuffer(window, np.uint8).ctypes.data
        assert address % 4096 == offset % 4096
        window[0] = 77
        assert buffer.memory[buffer.start_of(offset)] == 77


def test_windows_outlive_the_buffer_and_stay_in_it() -> None:
    buffer = AlignedBuffer(5000)
    window = buffer.window(4095, 5000)
    window[-1] = 5
    buffer.close()
    assert window[-1] == 5
    window.release()
    buffer.close()
    buffer.close()
    for length in (-1, 5001):
        with pytest.raises(ValueError, match="window"):
            AlignedBuffer(5000).window(0, length)


def test_torch_sees_the_same_bytes() -> None:
    torch = pytest.importorskip("torch")
    buffer = AlignedBuffer(100)
    buffer.window(4098, 8)[:] = np.arange(4, dtype=np.int16).tobytes()
    seen = torch.frombuffer(buffer.memory, dtype=torch.int16, count=4, offset=buffer.start_of(4098))
    assert seen.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------- files


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_by_any_threads_gives_the_file(place: Path, data: st.DataObject) -> None:
    """Cut a file anywhere, write the pieces from aligned, misaligned and read-only memory, in any order."""
    size = data.draw(st.integers(0, 60_000))
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=12))})
    pieces = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    how = data.draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces)))
    whole = noise(size, size)
    path = place / "out.bin"
    path.unlink(missing_ok=True)

    def write(piece: tuple[tuple[int, int], int]) -> None:
        (begin, end), way = piece
        if way == 3:
            file.write(begin, memoryview(whole)[begin:end])
            return
        buffer = AlignedBuffer(end - begin + way)
        view = buffer.window(begin, end - begin + way)[way:]  # way 1 and 2: not aligned like the offset
        view[:] = whole[begin:end]
        file.write(begin, view)

    with ThreadPoolExecutor(data.draw(st.integers(1, 4))) as pool, FileWriter(path, size) as file:
        list(pool.map(write, zip(pieces, how, strict=True)))
    assert path.read_bytes() == whole


def test_large_blocks_by_threads_with_odd_edges(place: Path) -> None:
    size = (40 << 20) + 12345
    whole = memoryview(noise(size))
    edges = [0, 777, 4096, 9000, (8 << 20) + 1, 16 << 20, (24 << 20) + 4095, (24 << 20) + 4097, size]
    with ThreadPoolExecutor(3) as pool, FileWriter(place / "f", size) as file:

        def write(i: int) -> None:
            buffer = AlignedBuffer(edges[i + 1] - edges[i])
            window = buffer.window(edges[i], edges[i + 1] - edges[i])
            window[:] = whole[edges[i] : edges[i + 1]]
            file.write(edges[i], window)

        list(pool.map(write, reversed(range(len(edges) - 1))))
    assert (place / "f").read_bytes() == whole


def test_views_of_other_formats_are_bytes(place: Path) -> None:
    values = np.arange(6000, dtype=np.float32).reshape(60, 100)
    with FileWriter(place / "f", values.nbytes) as file:
        file.write(0, memoryview(values))
        file.write(5, memoryview(b""))
    assert (place / "f").read_bytes() == values.tobytes()


def test_offsets_beyond_32_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_fallocate", None)  # sparse
    offset = (5 << 30) + 3
    buffer = AlignedBuffer(20000)
    window = buffer.window(offset, 20000)
    window[:] = noise(20000)
    with FileWriter(place / "f", offset + 20000) as file:
        file.write(offset, window)
    with open(place / "f", "rb") as f:
        f.seek(offset)
        assert f.read() == window
        f.seek(1 << 30)
        assert not any(f.read(4096))


def test_ranges_outside_and_writes_after_the_end_are_refused(tmp_path: Path) -> None:
    file = FileWriter(tmp_path / "f", 10)
    for offset, length in ((-1, 1), (0, 11), (10, 1)):
        with pytest.raises(ValueError, match="lie"):
            file.write(offset, memoryview(bytes(length)))
    file.finish()
    file.finish()
    with pytest.raises(ValueError, match="closed"):
        file.write(0, memoryview(b"x"))
    file.abort()
    assert (tmp_path / "f").exists(), "abort after finish keeps the file"


def test_an_exception_deletes_the_file_and_closes_it(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with pytest.raises(KeyboardInterrupt), FileWriter(tmp_path / "f", 100_000) as file:
        file.write(0, memoryview(b"x"))
        raise KeyboardInterrupt
    assert not (tmp_path / "f").exists()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_abort_waits_for_writes_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the descriptor's number could be another file's when the write goes on."""
    monkeypatch.setattr(writer, "_open_direct", lambda path: -1)
    entered, go, aborted = threading.Event(), threading.Event(), threading.Event()
    real = os.pwrite

    def slow(fd: int, data: memoryview, offset: int) -> int:
        entered.set()
        assert go.wait(10)
        assert not aborted.is_set()
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    file = FileWriter(tmp_path / "f", 10)
    writing = threading.Thread(target=file.write, args=(0, memoryview(b"0123456789")))
    writing.start()
    assert entered.wait(10)
    aborting = threading.Thread(target=lambda: (file.abort(), aborted.set()))
    aborting.start()
    assert not aborted.wait(0.1)
    go.set()
    writing.join(10)
    aborting.join(10)
    assert aborted.is_set()


@posix
@pytest.mark.parametrize("step", [1, 4096, 5000])
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = os.pwrite
    # Direct writes are shortened to whole pages, or the kernel would refuse them.
    monkeypatch.setattr(os, "pwrite", lambda fd, d, o: real(fd, d[: max(step, 4096) if len(d) >= 8192 else step], o))
    whole = noise(30_000)
    buffer = AlignedBuffer(30_000)
    window = buffer.window(100, 29_900)
    window[:] = whole[100:]
    with FileWriter(tmp_path / "f", 30_000) as file:
        file.write(100, window)
        file.write(0, memoryview(whole)[:100])
    assert (tmp_path / "f").read_bytes() == whole


def test_direct_writes_that_end_mid_page_go_on_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileWriter(tmp_path / "f", 40960) as file:
        if not file.direct:
            pytest.skip("no direct I/O here")
        whole = noise(40960)
        window = AlignedBuffer(40960).window(0, 40960)
        window[:] = whole
        real = os.pwrite

        def half(fd: int, data: memoryview, offset: int) -> int:
            if fd != file._direct_fd:
                return real(fd, data, offset)
            assert real(fd, data[:8192], offset) == 8192
            return 5000

        monkeypatch.setattr(os, "pwrite", half)
        file.write(0, window)
    assert (tmp_path / "f").read_bytes() == whole


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(OutputError) as info, FileWriter(tmp_path / "f", 10) as file:
        file.write(0, memoryview(b"0123456789"))
    assert info.value.code == "output.io"


def test_a_refused_direct_write_turns_the_file_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise(100_000)
    with FileWriter(tmp_path / "f", 100_000) as file:
        if not file.direct:
            pytest.skip("no direct I/O here")
        real = os.pwrite

        def refuse(fd: int, data: memoryview, offset: int) -> int:
            if fd == file._direct_fd:
                raise OSError(errno.EINVAL, "no")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse)
        window = AlignedBuffer(100_000).window(0, 100_000)
        window[:] = whole
        file.write(0, window[:50_000])
        assert not file.direct
        file.write(50_000, window[50_000:])
    assert (tmp_path / "f").read_bytes() == whole


def test_buffered_files_keep_few_dirty_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if writer._sync_file_range is None:
        pytest.skip("no sync_file_range here")
    monkeypatch.setattr(writer, "_open_direct", lambda path: -1)
    monkeypatch.setattr(writer, "_DIRTY_BYTES", 1 << 20)
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(writer, "_sync_file_range", lambda fd, offset, n, flags: calls.append((offset, n, flags)))
    block = memoryview(noise(1 << 19))
    with FileWriter(tmp_path / "f", 5 << 19) as file:
        for i in range(5):
            file.write(i << 19, block)
    assert [c[:2] for c in calls if c[2] == 2] == [(i << 19, 1 << 19) for i in range(5)]
    assert [c[:2] for c in calls if c[2] == 7] == [(i << 19, 1 << 19) for i in range(3)]
    assert (tmp_path / "f").read_bytes() == bytes(block) * 5


def test_without_fallocate_the_size_is_still_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no")

    for i, replacement in enumerate((None, unsupported)):
        monkeypatch.setattr(writer, "_fallocate", replacement)
        with FileWriter(tmp_path / str(i), 12345):
            pass
        assert (tmp_path / str(i)).read_bytes() == bytes(12345)


def test_an_existing_file_is_never_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    for name in ("f", "link"):
        with pytest.raises(OutputError) as info:
            FileWriter(tmp_path / name, 10)
        assert info.value.code == "output.io"
        with pytest.raises(OutputError):
            write_small_file(tmp_path / name, b"other")
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    code = """
import os, sys
from pathlib import Path
from loramerge.tensors.writer import *
os.umask(int(sys.argv[2]))
folder = Path(sys.argv[1])
with FileWriter(folder / "a", 10): pass
write_small_file(folder / "b", b"x")
"""
    result = python(code, tmp_path, mask)
    assert result.returncode == 0, result.stderr
    assert {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in "ab"} == {0o666 & ~mask}


# ------------------------------------------------------------------------------------------------- failures


@posix
@pytest.mark.parametrize("buffered", [False, True])
def test_a_file_size_limit_is_too_large_even_after_a_short_write(tmp_path: Path, buffered: bool) -> None:
    code = """
import os, resource, signal, sys
from pathlib import Path
from loramerge.errors import OutputError
from loramerge.tensors import writer
from loramerge.tensors.writer import AlignedBuffer, FileWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[2] == "True":
    writer._open_direct = lambda path: -1
path = Path(sys.argv[1])
counts = []
real = os.pwrite
def pwrite(*args):
    counts.append(real(*args))
    return counts[-1]
os.pwrite = pwrite
try:
    with FileWriter(path, 1 << 20) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        file.write(0, AlignedBuffer(1 << 20).window(0, 1 << 20))
except OutputError as exc:
    print(exc.code, counts[0] < 1 << 20, path.exists())
try:
    FileWriter(path, 1 << 20)
except OutputError as exc:
    print(exc.code, path.exists())
try:
    writer.write_small_file(path.with_name("small"), bytes(1 << 20))
except OutputError as exc:
    print(exc.code)
"""
    result = python(code, tmp_path / "f", buffered)
    too_large = "output.too-large"
    assert result.stdout.split() == [too_large, "True", "False", too_large, "False", too_large], result.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_shows_at_once_and_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError) as info:
        FileWriter(small_disk / "f", 4 << 20)
    assert info.value.code == "output.no-space"
    assert info.value.exit_code == 4
    assert str(small_disk) in str(info.value.file)
    monkeypatch.setattr(writer, "_fallocate", None)
    with pytest.raises(OutputError) as info, FileWriter(small_disk / "f", 4 << 20) as file:
        file.write(0, memoryview(bytearray(4 << 20)))
    assert info.value.code == "output.no-space"
    assert list(small_disk.iterdir()) == []
    with pytest.raises(OutputError) as info:
        write_small_file(small_disk / "g", bytes(4 << 20))
    assert info.value.code == "output.no-space"


def test_dev_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: real("/dev/full", os.O_RDWR))
    with pytest.raises(OutputError) as info:
        write_small_file(tmp_path / "f", b"data")
    assert info.value.code == "output.no-space"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "output.no-space"),
        (errno.EDQUOT, "output.no-space"),
        (errno.EFBIG, "output.too-large"),
        (errno.EACCES, "output.permission"),
        (errno.EPERM, "output.permission"),
        (errno.EROFS, "output.permission"),
        (errno.EIO, "output.io"),
        (errno.ENAMETOOLONG, "output.io"),
    ],
)
def test_every_error_of_the_system_has_a_code_and_a_fix(number: int, code: str) -> None:
    error = output_error(OSError(number, "x"), Path("out"))
    assert (error.code, error.file, error.exit_code) == (code, "out", 4)
    assert error.fix and os.strerror(number) in error.message
    assert output_error(OSError("no number"), Path("out")).code == "output.io"


def test_a_name_too_long_and_a_missing_directory(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "missing" / "f"):
        with pytest.raises(OutputError) as info:
            FileWriter(path, 10)
        assert info.value.code == "output.io"


def test_a_failed_sync_is_an_error_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "no")

    file = FileWriter(tmp_path / "f", 10)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as info:
        file.finish()
    assert info.value.code == "output.io"
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file._fd)
    with pytest.raises(OutputError):
        fsync_path(tmp_path / "f")


# ------------------------------------------------------------------------------------------------- copies


def test_a_whole_file_is_linked_only_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(noise(10_000))
    os.symlink(source, tmp_path / "named")
    assert copy_whole_file(tmp_path / "named", tmp_path / "a", link=True) == "linked"
    assert (tmp_path / "a").lstat().st_ino == source.stat().st_ino, "the file, not the link to it"
    fd = os.open(source, os.O_RDONLY)
    assert copy_whole_file(fd, tmp_path / "b", link=True) == "linked"
    assert os.fstat(fd).st_nlink == 3
    os.close(fd)

    done = copy_whole_file(source, tmp_path / "c", link=False)
    assert done in ("cloned", None)
    if done:
        assert (tmp_path / "c").read_bytes() == source.read_bytes()
        fsync_path(tmp_path / "c")
    else:
        assert not (tmp_path / "c").exists()
    for link in (True, False):
        with pytest.raises(OutputError):
            copy_whole_file(source, tmp_path / "a", link=link)
    with pytest.raises(FileNotFoundError):
        copy_whole_file(tmp_path / "missing", tmp_path / "d", link=True)


def test_across_file_systems_nothing_is_shared(tmp_path: Path) -> None:
    if len(PLACES) < 2 or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert copy_whole_file(source, Path(folder) / "f", link=True) is None
        assert list(Path(folder).iterdir()) == []


def test_a_clone_where_the_file_system_can(tmp_path: Path) -> None:
    """XFS in a loop device: needs root and mkfs.xfs."""
    image, folder = tmp_path / "image", tmp_path / "mnt"
    folder.mkdir()
    image.touch()
    os.truncate(image, 320 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no XFS here")
    try:
        (folder / "a").write_bytes(noise(100_000))
        assert copy_whole_file(folder / "a", folder / "b", link=False) == "cloned"
        assert (folder / "b").read_bytes() == (folder / "a").read_bytes()
        assert (folder / "b").stat().st_ino != (folder / "a").stat().st_ino
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_small_files_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd))[1])
    write_small_file(tmp_path / "f", b"abc")
    write_small_file(tmp_path / "empty", b"")
    fsync_path(tmp_path)
    assert synced == [p.stat().st_ino for p in (tmp_path / "f", tmp_path / "empty", tmp_path)]
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_the_page_size_divides_the_systems() -> None:
    assert mmap.PAGESIZE % writer.PAGE == 0
