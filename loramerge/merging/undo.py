"""The undo file: what a merge's rounding lost, so that the base comes back bit for bit.

It lies in the output (`loramerge.undo`) or beside a single file (`<name>.loramerge.undo`), needs the merged weights and
nothing else, and is as foreign as any input when it is read. Format 2, all numbers little-endian:

    bytes 0..7      magic, b"LMUNDO\\0\\2"
    then            segments, one after the other, in any order
    index           JSON, zlib-compressed
    last 48 bytes   offset and length of the index (2 x u64), SHA-256 of its bytes

The index says where each segment lies, as `[offset, length, digest]`, and:

- `tensors`: name -> how (`candidates`: see `candidates.py`; `xor`: the bits that changed, for updates that look at the
  weight; `whole`: the original's bytes), its segments (one for each block of whole rows, or one), `dtype`, `shape`,
  `base` and `merged` (digests of the tensor before and after), and for `candidates` the `updates` that were added, in
  order.
- `factors`: adapter number -> key -> segment, `dtype`, `shape`, `transposed`: the factors that `updates` name. What a
  method made of factors is one more adapter, after the last.
- `added`: tensors that the base does not have.
- `files`: the base's weight files: name, component, and its header as a segment, so that the file comes back and not
  only its tensors; empty where the base was no safetensors file.
- `side_files`: name -> segment with the base's bytes, or null where the base has no such file; files that are not
  listed are the base's already.
- `adapters`: as in the receipt. `base`: the base as it was named.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loramerge.adapters.updates import Update, uses
from loramerge.errors import InputError
from loramerge.merging.methods import from_data
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import Located, WeightFile
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import BLOCK_BYTES, block_digest, row_layout
from loramerge.tensors.interrupted import beside
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource, FileSource
from loramerge.tensors.text import quoted
from loramerge.tensors.writer import output_errors

NAME = "loramerge.undo"
FORMAT = 2
MAGIC = b"LMUNDO\0\2"
FOOTER = struct.Struct("<QQ32s")
MAX_INDEX_BYTES = 1 << 28

CANDIDATES, XOR, WHOLE = "candidates", "xor", "whole"

Segment = list[Any]
"""`[offset, length, digest]`."""


def undo_path(out: Path, single_file: bool) -> Path:
    """Where the undo file of an output lies: inside a directory, beside a single file."""
    return beside(out, NAME) if single_file else out / NAME


class UndoWriter:
    """Writes an undo file: segments as they come, from many threads; the index at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with output_errors(path):
            self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        self._at = 0
        self._append(MAGIC)

    def put(self, data: bytes | bytearray | memoryview) -> Segment:
        """Appends a segment and tells where it lies."""
        return [self._append(data), len(data), block_digest(data).hex()]

    def reserve(self, length: int) -> int:
        """Room for so many bytes; tells where."""
        with self._lock:
            at = self._at
            self._at += length
        return at

    def write(self, data: bytes | bytearray | memoryview, at: int) -> None:
        """Fills room that was reserved."""
        view, done = memoryview(data), 0
        with output_errors(self.path):
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], at + done)

    def _append(self, data: bytes | bytearray | memoryview) -> int:
        at = self.reserve(len(data))
        self.write(data, at)
        return at

    def finish(self, index: Mapping[str, Any]) -> None:
        """Writes the index and makes all of it durable."""
        raw = zlib.compress(json.dumps({"format": FORMAT, **index}, separators=(",", ":")).encode(), 6)
        at = self._append(raw)
        self._append(FOOTER.pack(at, len(raw), hashlib.sha256(raw).digest()))
        with output_errors(self.path):
            os.fsync(self._fd)
        self.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._at

    def close(self) -> None:
        """Closes the file; what it holds is complete only after `finish`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Undone:
    """How one tensor comes back."""

    how: str
    segments: Sequence[Segment]
    dtype: str
    shape: tuple[int, ...]
    base: str
    merged: str | None
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True)
class _Tensors:
    """The factors of one adapter, by key, as a checkpoint has its tensors."""

    tensors: Mapping[str, Located]


@dataclass(frozen=True)
class StoredAdapter:
    """The factors of an adapter that an undo file holds, for whoever reads factors (`stream.Factors`)."""

    name: str
    checkpoint: _Tensors
    transposed: frozenset[str]


@dataclass
class UndoFile:
    """An undo file, its index read and checked."""

    name: str
    source: ByteSource
    index: Mapping[str, Any]
    tensors: Mapping[str, Undone]
    adapters: tuple[StoredAdapter, ...]

    def read(self, segment: Segment, about: str) -> bytes:
        """One segment.

        Raises:
            InputError: `undo.damaged` where its bytes are not those that were written.
        """
        offset, length, digest = segment
        data = self.source.read(offset, length)
        _check(self.name, data, digest, about)
        return data

    def located(self, name: str) -> Located:
        """A tensor whose original bytes it holds whole, as a tensor of a weight file. The same one each time."""
        return self._wholes[name]

    @cached_property
    def _wholes(self) -> dict[str, Located]:
        file = WeightFile(NAME, self.source, Header({}, {}, 0, self.source.size), "undo")
        wholes = {}
        for name, undone in self.tensors.items():
            if undone.how == WHOLE:
                offset, length, _ = undone.segments[0]
                wholes[name] = Located(file, TensorInfo(name, undone.dtype, undone.shape, offset, offset + length))
        return wholes

    def close(self) -> None:
        self.source.close()


class _Segments:
    """Segments of a file, each read whole and checked, as a source of bytes."""

    def __init__(self, inner: ByteSource, segments: Mapping[tuple[int, int], tuple[Segment, str]]) -> None:
        self.name, self.size = inner.name, inner.size
        self._inner = inner
        self._segments = segments
        self.check_unchanged, self.close = inner.check_unchanged, inner.close

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._inner.read_into(offset, buffer)
        (_, _, digest), about = self._segments[offset, len(buffer)]  # an empty one begins where the next does
        _check(self.name, buffer, digest, about)

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)


def _check(name: str, data: bytes | memoryview, digest: str, about: str) -> None:
    if block_digest(data).hex() != digest:
        raise damaged(name, f"what it holds of {quoted(about)} was changed", [about])


def damaged(name: str, what: str, tensors: Sequence[str] = ()) -> InputError:
    """The error for an undo file that is not what a merge wrote."""
    return InputError(
        "undo.damaged",
        f"this undo file is damaged or foreign: {what}",
        fix="copy it again from where the merge wrote it, or give the base: --base BASE",
        file=name,
        tensors=list(tensors),
    )


def open_undo(path: Path, shown: str) -> UndoFile:
    """Opens an undo file and checks its index.

    Raises:
        InputError: `undo.damaged`, `undo.version`; `input.missing` where there is none.
    """
    source = FileSource(path, shown)
    try:
        return _opened(source, shown)
    except BaseException:
        source.close()
        raise


def _opened(source: FileSource, shown: str) -> UndoFile:
    size = source.size
    if size < len(MAGIC) + FOOTER.size:
        raise damaged(shown, "it is too short")
    magic = source.read(0, len(MAGIC))
    if magic != MAGIC:
        if magic[:7] == MAGIC[:7]:
            message = f"is an undo file of format {magic[7]}, this loramerge reads {FORMAT}"
            raise InputError("undo.version", message, fix="use the loramerge that wrote it", file=shown)
        raise damaged(shown, "it does not begin as one")
    at, length, digest = FOOTER.unpack(source.read(size - FOOTER.size, FOOTER.size))
    if at < len(MAGIC) or length > MAX_INDEX_BYTES or at + length != size - FOOTER.size:
        raise damaged(shown, "it is cut short, or something was added to it")
    raw = source.read(at, length)
    if hashlib.sha256(raw).digest() != digest:
        raise damaged(shown, "its index was changed")
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(raw, MAX_INDEX_BYTES)
    except zlib.error:
        raise damaged(shown, "its index cannot be read") from None
    if inflate.unconsumed_tail:
        raise damaged(shown, "its index is too large")
    index = strictjson.loads(text, where=shown, code="undo.damaged", max_bytes=MAX_INDEX_BYTES)
    try:
        if not isinstance(index, dict) or index["format"] != FORMAT:
            raise ValueError("no index of this format")
        return _interpreted(source, shown, index, at)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(shown, f"its index means nothing ({error})") from None


def _interpreted(source: FileSource, shown: str, index: Mapping[str, Any], end: int) -> UndoFile:
    tensors = {str(name): _undone(row, end) for name, row in index["tensors"].items()}
    adapters: list[StoredAdapter] = []
    for number, factors in sorted(index["factors"].items(), key=lambda item: int(item[0])):
        if int(number) != len(adapters):
            raise ValueError("adapters out of order")
        adapters.append(_stored(source, shown, factors, end))
    for name, undone in tensors.items():
        for update in undone.updates:
            for number, key in uses(update):
                if not 0 <= number < len(adapters):
                    raise ValueError(f"{name} has an update of no adapter")
                if key not in adapters[number].checkpoint.tensors:
                    raise ValueError(f"{name} has an update without its factors")
    names = [row["name"] for row in index["files"]]
    for row in index["files"]:
        _segment(row["header"], end)
        if not isinstance(row["name"], str) or not isinstance(row["component"], str) or names.count(row["name"]) > 1:
            raise ValueError("a file has no name of its own")
    for name, at in index["side_files"].items():
        if name.endswith((".safetensors", "loramerge.json", NAME)):
            raise ValueError("weights are no side file")
        if at is not None:
            _segment(at, end)
    for rows, kind in ((index["added"], str), (index["adapters"], dict)):
        if not isinstance(rows, list) or not all(isinstance(row, kind) for row in rows):
            raise ValueError("no list")
    return UndoFile(shown, source, index, tensors, tuple(adapters))


def _stored(source: FileSource, shown: str, factors: Mapping[str, Any], end: int) -> StoredAdapter:
    """The factors of one adapter."""
    segments = {key: _segment(row["at"], end) for key, row in factors.items()}
    checked = _Segments(source, {(at[0], at[1]): (at, key) for key, at in segments.items()})
    file = WeightFile(NAME, checked, Header({}, {}, 0, source.size), "undo")
    located = {}
    for key, row in factors.items():
        offset, length, _ = segments[key]
        info = TensorInfo(key, str(row["dtype"]), tuple(map(int, row["shape"])), offset, offset + length)
        if _nbytes(info.dtype, info.shape) != length:
            raise ValueError(f"factor {key} of another size")
        located[key] = Located(file, info)
    return StoredAdapter(shown, _Tensors(located), frozenset(k for k, row in factors.items() if row.get("transposed")))


def _undone(row: Mapping[str, Any], end: int) -> Undone:
    how, shape, dtype = str(row["how"]), tuple(map(int, row["shape"])), str(row["dtype"])
    segments = [_segment(at, end) for at in row["segments"]]
    if how not in (CANDIDATES, XOR, WHOLE):
        raise ValueError(f"{how} is no way back")
    nbytes = _nbytes(dtype, shape)
    if how == WHOLE and (len(segments) != 1 or segments[0][1] != nbytes):
        raise ValueError("an original of another size")
    if how != WHOLE and len(segments) != _blocks(*row_layout(bits(dtype), shape)):
        raise ValueError("another number of blocks")
    updates = tuple(from_data(update) for update in row.get("updates", ()))
    merged = row["merged"]
    return Undone(how, segments, dtype, shape, str(row["base"]), None if merged is None else str(merged), updates)


def _blocks(rows: int, row_bytes: int) -> int:
    """How many `row_blocks` gives, which would list them."""
    return -(-rows // max(1, BLOCK_BYTES // row_bytes)) if rows and row_bytes else 0


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    nbytes, odd = divmod(math.prod(shape) * bits(dtype), 8)
    if odd or min(shape, default=0) < 0:
        raise ValueError(f"no tensor is of {dtype} and {shape}")
    return nbytes


def _segment(at: Any, end: int) -> Segment:
    offset, length, digest = at
    good = type(offset) is int and type(length) is int and isinstance(digest, str)
    if not good or offset < len(MAGIC) or length < 0 or offset + length > end:
        raise ValueError("a segment lies outside")
    return [offset, length, digest]
