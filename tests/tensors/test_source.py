"""Byte sources: files read anywhere by many threads, and every way in which a path is not a file."""

from __future__ import annotations

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramerge.errors import InputError
from loramerge.tensors.source import ByteSource, FileSource


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def refused(path: Path, code: str, *words: str) -> InputError:
    with pytest.raises(InputError) as caught:
        FileSource(path, "as/typed")
    assert caught.value.code == code
    assert caught.value.file == "as/typed"
    assert caught.value.fix
    for word in words:
        assert word in caught.value.message
    return caught.value


def test_a_file_is_a_byte_source(file: Path) -> None:
    source: ByteSource = FileSource(file, "typed")
    assert (source.name, source.size) == ("typed", 4096)
    assert source.read(10, 4) == bytes([10, 11, 12, 13])
    assert source.read(4096, 0) == b""
    buffer = bytearray(8)
    source.read_into(4088, memoryview(buffer))
    assert buffer == bytes(range(248, 256))
    source.check_unchanged()
    source.close()
    source.close()


def test_the_name_is_the_path_unless_given(file: Path) -> None:
    assert FileSource(str(file)).name == str(file)


def test_it_is_opened_at_the_first_read_only(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    sources = [FileSource(file) for _ in range(50)]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
    assert sources[0].fd == sources[0].fd
    sources[0].close()


def test_reading_after_close_is_a_programming_error(file: Path) -> None:
    source = FileSource(file)
    source.close()
    with pytest.raises(ValueError, match="close"):
        source.read(0, 1)


def test_typed_buffers_are_filled_as_bytes(file: Path) -> None:
    buffer = memoryview(bytearray(16)).cast("I")
    FileSource(file).read_into(0, buffer)
    assert buffer.tobytes() == bytes(range(16))


@pytest.mark.parametrize(("offset", "length"), [(4090, 7), (5000, 1), (-1, 4), (0, 4097), (2**63, 1)])
def test_reads_outside_the_file_are_refused(file: Path, offset: int, length: int) -> None:
    source = FileSource(file)
    with pytest.raises(InputError) as caught:
        source.read(offset, length)
    assert caught.value.code == "input.truncated"
    assert "4096" in caught.value.message
    with pytest.raises(InputError):
        source.read_into(offset, memoryview(bytearray(length)))


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    assert FileSource(file).read(3, 1000) == file.read_bytes()[3:1003]


def test_a_read_error_is_an_input_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputError, match="Input/output error") as caught:
        FileSource(file).read(0, 1)
    assert caught.value.code == "input.unreadable"


def test_many_threads_read_at_once(file: Path) -> None:
    source, data = FileSource(file), file.read_bytes()
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda i: source.read(i * 8, 8), range(512)))
    assert b"".join(parts) == data


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as out:
        out.truncate(6 * 2**30)
        out.seek(5 * 2**30)
        out.write(b"here")
    assert FileSource(path).read(5 * 2**30 - 1, 6) == b"\0here\0"


def test_links_are_followed(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert FileSource(link).read(0, 2) == b"\0\1"


def test_what_is_missing_gets_a_hint(file: Path) -> None:
    assert "'weights.safetensors'" in refused(file.with_name("wieghts.safetensors"), "input.missing").fix
    assert "mean" not in refused(file.with_name("zzz"), "input.missing").fix


def test_paths_that_cannot_exist_are_missing(file: Path) -> None:
    refused(file / "below", "input.missing", "does not exist")
    refused(file.with_name("n" * 300), "input.missing")
    refused(Path("nul\0byte"), "input.missing")


def test_dangling_links_and_loops_are_named(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("../blobs/gone\x1b")
    (tmp_path / "loop").symlink_to("loop")
    assert "\x1b" not in refused(tmp_path / "dangling", "input.dangling", "cache", "gone").message
    refused(tmp_path / "loop", "input.loop", "leads back")


def test_what_is_not_a_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:
    refused(tmp_path, "input.directory", "directory")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "input.not-regular", "pipe")
    refused(Path("/dev/null"), "input.not-regular", "device")
    cwd = os.getcwd()
    os.chdir(tmp_path)  # socket paths are short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
            refused(tmp_path / "socket", "input.not-regular", "socket")
    finally:
        os.chdir(cwd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_no_permission_is_unreadable(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(InputError) as caught:
        FileSource(file).read(0, 1)
    assert caught.value.code == "input.unreadable"
    assert "permission" in caught.value.fix


def changed(source: FileSource, word: str) -> None:
    with pytest.raises(InputError) as caught:
        source.check_unchanged()
    assert caught.value.code == "input.changed"
    assert word in caught.value.message


def test_a_change_of_size_time_or_inode_is_noticed(file: Path) -> None:
    data = file.read_bytes()
    source = FileSource(file)
    file.write_bytes(data + b"more")
    changed(source, "4096")
    source = FileSource(file)
    os.utime(file, ns=(source.stat.st_atime_ns, source.stat.st_mtime_ns + 1))
    changed(source, "written")
    source = FileSource(file)
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(source.stat.st_atime_ns, source.stat.st_mtime_ns))
    other.replace(file)
    changed(source, "another file")
    source = FileSource(file)
    file.unlink()
    changed(source, "No such file")


def test_a_change_before_the_first_read_is_noticed(file: Path) -> None:
    source = FileSource(file)
    file.write_bytes(b"short")
    with pytest.raises(InputError) as caught:
        source.read(0, 4)
    assert caught.value.code == "input.changed"
    source = FileSource(file)
    file.unlink()
    with pytest.raises(InputError) as caught:
        source.read(0, 4)
    assert caught.value.code == "input.changed"


def test_a_fifo_in_its_place_does_not_block(file: Path) -> None:
    source = FileSource(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError) as caught:
        source.read(0, 4)
    assert caught.value.code == "input.changed"


def test_a_file_that_shrinks_while_open_is_noticed(file: Path) -> None:
    source = FileSource(file)
    source.read(0, 4)
    os.truncate(file, 100)
    with pytest.raises(InputError) as caught:
        source.read(90, 20)
    assert caught.value.code == "input.changed"
    assert "100" in caught.value.message
