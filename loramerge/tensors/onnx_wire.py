"""The protobuf wire format, read from a byte source field by field; what is long is stepped over, not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loramerge.errors import InputError
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

MAX_TEXT = 1 << 20
"""Bytes of a name or another text at most."""

_CHUNK = 1 << 20
_FIX = "download the model again; if that does not help, it was written wrongly: export it again"


class Field(NamedTuple):
    """One field of a message: its number, its wire type, the number that it holds or the bytes `begin` to `end`."""

    number: int
    wire: int
    value: int
    begin: int
    end: int


def damaged(reason: str, where: str) -> InputError:
    """The error for a file that contradicts itself."""
    return InputError("onnx.damaged", f"is a damaged ONNX model: {reason}", fix=_FIX, file=where)


class Wire:
    """Reads messages of one file. Nothing but a window of it is ever in memory.

    Encoding: protobuf.dev/programming-guides/encoding. Groups, which ONNX never had, are refused.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self._held = b""
        self._first = 0

    def damaged(self, reason: str) -> InputError:
        return damaged(reason, self.source.name)

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message in the bytes `begin` to `end`.

        Raises:
            InputError: `onnx.damaged`.
        """
        at = begin
        while at < end:
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if number == 0:
                raise self.damaged(f"a field without a number at byte {at}")
            if wire == VARINT:
                value, at = self._varint(at, end)
                yield Field(number, wire, value, at, at)
                continue
            if wire == LENGTH:
                size, at = self._varint(at, end)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise self.damaged(f"a field of the unknown wire type {wire} at byte {at}")
            if size > end - at:
                raise self.damaged(f"a field at byte {at} is {size} bytes long, {end - at} are left")
            yield Field(number, wire, 0, at, at + size)
            at += size

    def raw(self, field: Field) -> bytes:
        """The bytes of a field that is a text or the like.

        Raises:
            InputError: `onnx.damaged` where it is none, or is longer than texts are.
        """
        if field.wire != LENGTH or field.end - field.begin > MAX_TEXT:
            raise self.damaged(f"the text at byte {field.begin} is none")
        return self._take(field.begin, field.end)

    def text(self, field: Field) -> str:
        """The text of a field."""
        raw = self.raw(field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"a text that is not UTF-8: {quoted(raw[:40].decode('latin-1'))}") from None

    def integers(self, field: Field) -> list[int]:
        """The signed 64-bit integers of a field, one or packed, at most as many as a text has bytes."""
        if field.wire == VARINT:
            return [_signed(field.value)]
        if field.wire != LENGTH or field.end - field.begin > MAX_TEXT:
            raise self.damaged(f"the numbers at byte {field.begin} are none")
        found, at = [], field.begin
        while at < field.end:
            value, at = self._varint(at, field.end)
            found.append(_signed(value))
        return found

    def read(self, begin: int, end: int) -> bytes:
        """A few bytes, whatever they are."""
        return self._take(begin, end)

    def _take(self, begin: int, end: int) -> bytes:
        first = self._first
        if not first <= begin <= end <= first + len(self._held):
            size = min(max(end - begin, _CHUNK), self.source.size - begin)
            self._held, self._first = self.source.read(begin, size), begin
            first = begin
        return self._held[begin - first : end - first]

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= end:
                raise self.damaged(f"ends within a number at byte {at}")
            i = at - self._first
            if not 0 <= i < len(self._held):
                self._take(at, at + 1)
                i = at - self._first
            byte = self._held[i]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise self.damaged(f"a number of more than ten bytes at byte {at}")
        return value & 0xFFFF_FFFF_FFFF_FFFF, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
