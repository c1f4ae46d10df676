"""A stored tensor with zeros behind each of its axes, as a source of bytes: what a wider layer starts from."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from loramerge.tensors.source import ByteSource


class PaddedSource:
    """The bytes of a tensor `shape` at `begin` of `inner`, seen as a tensor `grown` with zeros at the end of each axis.

    Args:
        inner: where the tensor lies.
        begin: its first byte.
        itemsize: bytes of one element.
        shape, grown: the stored and the wanted shape, of the same number of axes, none smaller.
    """

    def __init__(
        self, inner: ByteSource, begin: int, itemsize: int, shape: Sequence[int], grown: Sequence[int]
    ) -> None:
        if len(shape) != len(grown) or any(n < o for o, n in zip(shape, grown, strict=True)):
            raise ValueError(f"{tuple(shape)} cannot be padded to {tuple(grown)}")
        self.name = inner.name
        self.size = prod(grown) * itemsize
        self._inner = inner
        self._begin = begin
        self._shape = tuple(shape)
        self._grown = tuple(grown)
        self._stored_row = shape[-1] * itemsize
        self._row = grown[-1] * itemsize

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole of `buffer` from `offset` on."""
        buffer[:] = bytes(len(buffer))
        end = offset + len(buffer)
        for row in range(offset // self._row, -(-end // self._row)):
            stored = self._stored_index(row)
            if stored is None:
                continue
            lo, hi = max(offset, row * self._row), min(end, row * self._row + self._stored_row)
            if lo < hi:
                at = self._begin + stored * self._stored_row + lo - row * self._row
                self._inner.read_into(at, buffer[lo - offset : hi - offset])

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        raw = bytearray(length)
        self.read_into(offset, memoryview(raw))
        return bytes(raw)

    def check_unchanged(self) -> None:
        """Raises InputError if the source is not what it was when it was opened."""
        self._inner.check_unchanged()

    def close(self) -> None:
        """Nothing: the source belongs to whoever opened it."""

    def _stored_index(self, row: int) -> int | None:
        """Which run of the last axis of the stored tensor a run of the grown one is; None where it is all zeros."""
        index, factor = 0, 1
        for old, new in zip(self._shape[-2::-1], self._grown[-2::-1], strict=True):
            row, at = divmod(row, new)
            if at >= old:
                return None
            index += at * factor
            factor *= old
        return index
