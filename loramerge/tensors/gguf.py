"""GGUF files: names, shapes and offsets of their tensors, metadata as text; quantised tensors are read as float32.

Layout: ggml-org/ggml, docs/gguf.md (versions 2 and 3). The header is read here, with every count and offset checked
against the file; the package `gguf` is wanted for quantised tensors only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

from loramerge.errors import InputError, UnsupportedError
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted

MAGIC = b"GGUF"
MAX_HEADER = 64 * 1024 * 1024
MAX_STRING = 1024 * 1024
_CHUNK = 256 * 1024

# Value types of metadata: number -> struct format. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = 64  # items of an array that are kept, which is enough to see that it is not empty

# Types of tensors that need no decoding: number -> (dtype, bytes of an element).
_PLAIN = {0: ("F32", 4), 1: ("F16", 2), 24: ("I8", 1), 25: ("I16", 2), 26: ("I32", 4), 27: ("I64", 8)} | {
    28: ("F64", 8),
    30: ("BF16", 2),
}


def read_header(source: ByteSource) -> tuple[Header, ByteSource]:
    """The tensors and the metadata of a GGUF file, and the source that their bytes are to be read from.

    Shapes are in the order of numpy, slowest axis first. Quantised tensors are given as F32: the source decodes them
    when they are read. Metadata is text: strings as they are, numbers and arrays as JSON.

    Raises:
        InputError: `gguf.header` for a file that contradicts itself or ends too early.
        UnsupportedError: `gguf.version`, `gguf.quantised` (the package `gguf` is missing or does not know the type).
    """
    cursor = _Cursor(source)
    if cursor.take(4) != MAGIC:
        raise cursor.broken("does not begin as a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        what = "big-endian" if version and version & 0xFFFF == 0 else f"of version {version}"
        fix = "convert the adapter again with the llama.cpp of today"
        raise UnsupportedError("gguf.version", f"is a GGUF file {what}; 2 and 3 are read", fix=fix, file=source.name)
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, str] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.broken(f"has two values for {quoted(key)}")
        metadata[key] = _text(cursor.value(cursor.number("I")))
    rows = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", "32")
    if not alignment.isdecimal() or int(alignment) == 0 or int(alignment) & (int(alignment) - 1):
        raise cursor.broken(f"aligns tensors to {quoted(alignment)}")
    start = -(-cursor.at // int(alignment)) * int(alignment)
    decoded = _Decoded(source)
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise cursor.broken(f"has two tensors {quoted(name)}")
        tensors[name] = decoded.place(name, shape, kind, start + offset)
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
    return Header(ordered, metadata, start, source.size), decoded if decoded.regions else source


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) of the next tensor."""
    name = cursor.string()
    axes = cursor.number("I")
    if axes > 8:
        raise cursor.broken(f"{quoted(name)} has {axes} axes")
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    if math.prod(shape) > cursor.source.size * 8:
        raise cursor.broken(f"{quoted(name)} {shape} is larger than the file")
    return name, shape, cursor.number("I"), cursor.number("Q")


def _broken(reason: str, where: str) -> InputError:
    return InputError("gguf.header", f"is a damaged GGUF file: {reason}", fix="download the file again", file=where)


def _text(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)


class _Cursor:
    """Reads the header from its beginning on."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.at = 0
        self._held = b""
        self._first = 0

    def broken(self, reason: str) -> InputError:
        return _broken(reason, self.source.name)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.skip(count)
        first = self.at - count
        if not (self._first <= first and self.at <= self._first + len(self._held)):
            length = min(max(count, _CHUNK), self.source.size - first)
            self._held, self._first = self.source.read(first, length), first
        return self._held[first - self._first : self.at - self._first]

    def skip(self, count: int) -> None:
        if self.at + count > min(self.source.size, MAX_HEADER):
            raise self.broken("ends within its header" if self.source.size < MAX_HEADER else "has too long a header")
        self.at += count

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise self.broken(f"has a text of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken("has a text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of metadata; of an array the first items."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.broken(f"has a value of an unknown type ({kind})")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[item]}")
            first = [self.number(_SCALARS[item]) for _ in range(min(count, _KEPT))]
            self.skip((count - len(first)) * width)
            return first
        if item != _STRING:
            raise self.broken(f"has an array of an unknown type ({item})")
        kept = []
        for i in range(count):  # ends with the file at the latest: every text takes eight bytes or more
            text = self.string()
            if i < _KEPT:
                kept.append(text)
        return kept


class _Decoded:
    """The bytes of a GGUF file, with each quantised tensor as float32 behind its end."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._end = source.size
        self.regions: list[tuple[int, int, int, Callable[[bytes], bytes], int, int]] = []
        """(begin, end, type, decoder, first byte in the file, bytes in the file) of each."""

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def size(self) -> int:
        return self._source.size

    def place(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> TensorInfo:
        """Where the values of a tensor are to be read."""
        count = math.prod(shape)
        plain = _PLAIN.get(kind)
        if plain is not None:
            self._check(name, begin, count * plain[1])
            return TensorInfo(name, plain[0], shape, begin, begin + count * plain[1])
        block, width, decode = _quantised(name, kind, self._source.name)
        if not shape or shape[-1] % block:
            raise _broken(f"{quoted(name)} {shape} does not divide into blocks of {block}", self.name)
        self._check(name, begin, count // block * width)
        first, self._end = self._end, self._end + 4 * count
        self.regions.append((first, self._end, kind, decode, begin, count // block * width))
        return TensorInfo(name, "F32", shape, first, self._end)

    def _check(self, name: str, begin: int, nbytes: int) -> None:
        if begin + nbytes > self._source.size:
            reason = f"{quoted(name)} ends at byte {begin + nbytes}, the file has {self._source.size}"
            raise _broken(reason, self.name)

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        length = buffer.nbytes
        for begin, end, _, decode, first, nbytes in self.regions:
            if begin <= offset and offset + length <= end and length:
                values = decode(self._source.read(first, nbytes))
                buffer.cast("B")[:] = values[offset - begin : offset - begin + length]
                return
        self._source.read_into(offset, buffer)

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()


def _quantised(name: str, kind: int, where: str) -> tuple[int, int, Callable[[bytes], bytes]]:
    """(elements of a block, its bytes, decoder to float32) of a type of tensors."""

    def unsupported(reason: str, fix: str) -> UnsupportedError:
        message = f"tensor {quoted(name)} is quantised, and {reason}"
        return UnsupportedError("gguf.quantised", message, fix=fix, file=where, tensors=[name])

    again = "convert the adapter again with --outtype f32"
    try:
        import numpy
        from gguf import quants
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise unsupported("the package gguf is not installed", 'pip install "loramerge[gguf]"') from None
    try:
        known = GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise unsupported(f"its type ({kind}) is not known", again) from None

    def decode(raw: bytes) -> bytes:
        packed = numpy.frombuffer(raw, dtype=numpy.uint8).reshape(-1, width)
        try:
            values = quants.dequantize(packed, known)
        except NotImplementedError:
            raise unsupported(f"{known.name} cannot be decoded", again) from None
        return values.astype("<f4").tobytes()

    return block, width, decode
