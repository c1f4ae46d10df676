"""The zip container of PyTorch files: where its records lie, checked without unpickling anything.

Layout (torch/serialization.py and caffe2/serialize/inline_container.cc): stored members ``ROOT/data.pkl``
(the pickle), ``ROOT/data/KEY`` (one storage each), ``ROOT/byteorder`` and a few marks.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

from loramerge.errors import InputError, LoramergeError, UnsafeError, UnsupportedError
from loramerge.tensors import magic
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted

MAX_MEMBERS = 500_000
MAX_PICKLE_BYTES = 256 * 1024 * 1024
_LOCAL_HEADER = 30
_MAX_READ = 256 * 1024 * 1024


@dataclass(frozen=True)
class Archive:
    """`pickle`: the bytes of ``data.pkl``; `storages`: key -> (begin, end) in the file, of ``data/KEY``."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]


def read_archive(source: ByteSource) -> Archive:
    """Find the pickle and the storages of a PyTorch zip file.

    Raises:
        InputError: ``input.format``, ``input.empty``, ``pickle.archive`` (damaged, or not from PyTorch);
            UnsafeError: ``pickle.archive`` (compressed, encrypted or overlapping members, names that are
            duplicate or lead outside); UnsupportedError: ``pickle.legacy``, ``pickle.torchscript``,
            ``pickle.big-endian``.
    """
    kind = magic.identify(source.read(0, min(source.size, magic.PREFIX_BYTES)), source.size)
    if kind == "pickle":
        message = "is in the old PyTorch format from before version 1.6"
        fix = f"save it again: f={source.name!r}; torch.save(torch.load(f, 'cpu', weights_only=True), f)"
        raise UnsupportedError("pickle.legacy", message, fix=fix, file=source.name)
    if kind != "zip":
        what, fix = magic.describe(kind)
        raise InputError("input.empty" if kind == "empty" else "input.format", f"is {what}", fix=fix, file=source.name)
    members = _members(source)
    ranges = {info.orig_filename: _range(source, info) for info in members}
    _check_overlap(source, members, ranges)
    roots = [name.removesuffix("/data.pkl") for name in ranges if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        fix = "give a PyTorch checkpoint or a .safetensors file"
        raise InputError("pickle.archive", "is a zip archive, not a PyTorch checkpoint", fix=fix, file=source.name)
    root = roots[0] + "/"
    stray = next((name for name in ranges if not name.startswith(root)), None)
    if stray is not None:
        raise _unsafe(source, f"member {quoted(stray)} lies outside {quoted(root)}")
    if root + "constants.pkl" in ranges:
        message = "is a TorchScript program, not a checkpoint"
        raise UnsupportedError("pickle.torchscript", message, fix="save its state_dict()", file=source.name)
    _check_byteorder(source, ranges.get(root + "byteorder"))
    begin, end = ranges[root + "data.pkl"]
    if end - begin > MAX_PICKLE_BYTES:
        raise _unsafe(source, f"pickle of {end - begin} bytes, more than the {MAX_PICKLE_BYTES} that are accepted")
    prefix = root + "data/"
    storages = {name.removeprefix(prefix): place for name, place in ranges.items() if name.startswith(prefix)}
    return Archive(source.read(begin, end - begin), storages)


class _Seekable:
    """As much of a file object as `zipfile` needs, on top of a byte source."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._source.size)[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        rest = max(self._source.size - self._position, 0)
        count = rest if count < 0 else min(count, rest)
        if count > _MAX_READ:
            raise _unsafe(self._source, f"directory of {count} bytes, more than the {_MAX_READ} that are accepted")
        data = self._source.read(self._position, count)
        self._position += count
        return data


def _members(source: ByteSource) -> list[zipfile.ZipInfo]:
    try:
        members = zipfile.ZipFile(_Seekable(source)).infolist()
    except LoramergeError:
        raise
    except Exception as error:  # zipfile meets damage with a dozen kinds of exception
        fix = "download the file again"
        message = f"is a damaged zip archive: {quoted(error)}"
        raise InputError("pickle.archive", message, fix=fix, file=source.name) from None
    if len(members) > MAX_MEMBERS:
        raise _unsafe(source, f"{len(members)} members, more than the {MAX_MEMBERS} that are accepted")
    seen: set[str] = set()
    for info in members:
        name = info.orig_filename  # `filename` is cut at a NUL
        parts = name.split("/")
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in parts or name[1:3] == ":/":
            raise _unsafe(source, f"member {quoted(name)} leads outside the archive")
        if name in seen:
            raise _unsafe(source, f"two members are called {quoted(name)}")
        seen.add(name)
        if info.flag_bits & 0x1:
            raise _unsafe(source, f"member {quoted(name)} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            sizes = f"{info.compress_size} bytes of {info.file_size}"
            raise _unsafe(source, f"member {quoted(name)} is compressed ({sizes}), which PyTorch never does")
    return members


def _range(source: ByteSource, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a stored member's bytes lie; the directory and the member's own header must agree on its name."""
    name = info.orig_filename
    if info.header_offset < 0 or info.header_offset + _LOCAL_HEADER > source.size:
        raise _unsafe(source, f"member {quoted(name)} begins at {info.header_offset}, beyond the file")
    local = source.read(info.header_offset, _LOCAL_HEADER)
    name_bytes, extra_bytes = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    begin = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
    if local[:4] != b"PK\x03\x04" or local[8:10] != b"\0\0" or begin + info.file_size > source.size:
        message = f"member {quoted(name)} of {info.file_size} bytes does not lie in the file of {source.size}"
        raise _unsafe(source, message)
    own = source.read(info.header_offset + _LOCAL_HEADER, name_bytes)
    if own != name.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise _unsafe(source, f"member {quoted(name)} calls itself {quoted(own)}")
    return begin, begin + info.file_size


def _check_overlap(source: ByteSource, members: list[zipfile.ZipInfo], ranges: dict[str, tuple[int, int]]) -> None:
    position = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < position:
            raise _unsafe(source, f"member {quoted(info.orig_filename)} overlaps the one before it")
        position = ranges[info.orig_filename][1]


def _check_byteorder(source: ByteSource, place: tuple[int, int] | None) -> None:
    if place is None:
        return
    begin, end = place
    order = source.read(begin, min(end - begin, 16))
    if order == b"big":
        fix = "load and save it on a little-endian machine with torch.load and torch.save"
        raise UnsupportedError("pickle.big-endian", "holds big-endian numbers", fix=fix, file=source.name)
    if order != b"little":
        fix = "download the file again"
        raise InputError("pickle.archive", f"unknown byte order {quoted(order)}", fix=fix, file=source.name)


def _unsafe(source: ByteSource, message: str) -> UnsafeError:
    fix = "do not use this file unless you know who made it"
    return UnsafeError("pickle.archive", message, fix=fix, file=source.name)
