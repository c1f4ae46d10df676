"""Where each weight lies in the file beside a graph, and the sink that puts a merge's blocks there."""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loramerge.errors import LoramergeError, UnsupportedError
from loramerge.exporting.names import Origin, Piece
from loramerge.merging.plan import OutputFile
from loramerge.tensors.dtypes import bits
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.writer import fsync_fd, output_errors, start_write_back

LARGE, LARGE_ALIGN, PAGE, SMALL_ALIGN = 1 << 20, 1 << 16, 4096, 64
"""Large tensors begin where every system can map them, middling ones at a page, small ones at a cache line."""

_WRITE_BACK = 64 << 20


@dataclass(frozen=True)
class Target:
    """One weight in a data file of the output: `shape` is what the graph has, `turned` whether that is transposed."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    turned: bool = False

    @property
    def itemsize(self) -> int:
        return bits(self.dtype) // 8

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


def arrange(weights: Mapping[str, tuple[Origin, str]], turned: set[str], file: str) -> dict[str, Target]:
    """A place for every weight in one file, in the order given.

    Args:
        weights: name -> what it is made of, and its dtype in the output.
        turned: those that the graphs have transposed.
    """
    at, targets = 0, {}
    for name, (origin, dtype) in weights.items():
        shape = tuple(reversed(origin.shape)) if name in turned else tuple(origin.shape)
        nbytes = prod(shape) * bits(dtype) // 8
        align = LARGE_ALIGN if nbytes >= LARGE else PAGE if nbytes >= PAGE else SMALL_ALIGN
        at = -(-at // align) * align
        targets[name] = Target(name, file, shape, dtype, at, name in turned)
        at += nbytes
    return targets


def linked(weights: Mapping[str, tuple[Origin, str]], files: Sequence[OutputFile]) -> dict[str, Target]:
    """The places of weights in the merge's own files.

    Raises:
        UnsupportedError: `export.link-weights`: a weight that is no stored tensor as it lies.
    """
    lies: dict[str, tuple[str, TensorInfo]] = {}
    for file in files:
        _, infos = file.layout()
        lies |= {step.tensor: (file.name, info) for step, info in zip(file.steps, infos, strict=True)}
    targets = {}
    for name, (origin, dtype) in weights.items():
        piece = origin.pieces[0]
        file_name, info = lies[piece.key]
        whole = len(origin.pieces) == 1 and _in_order(piece) and piece.extents() == tuple(info.shape)
        if not whole or tuple(origin.shape) != tuple(info.shape):
            raise UnsupportedError(
                "export.link-weights",
                f"{name} is put together from several tensors when it is loaded",
                fix="leave --link-weights away",
                tensors=[p.key for p in origin.pieces],
            )
        targets[name] = Target(name, file_name, info.shape, dtype, info.begin)
    return targets


class WeightSink:
    """A sink of a merge (`loramerge.merging.stream.Sink`) that writes into the data file, and nothing else.

    Args:
        path: the file to create.
        targets: where each weight lies.
        weights: what each is made of.
    """

    def __init__(self, path: Path, targets: Mapping[str, Target], weights: Mapping[str, tuple[Origin, str]]) -> None:
        self.path = path
        self.size = max((t.offset + t.nbytes for t in targets.values()), default=0)
        self.written = 0
        self._since = 0
        self._lock = threading.Lock()
        self._infos: dict[str, tuple[list[int], list[tuple[str, TensorInfo]]]] = {}
        self._places: dict[str, list[tuple[Target, Piece]]] = {}
        for name, target in targets.items():
            for piece in weights[name][0].pieces:
                placed = piece.turned(0, 1) if target.turned else piece
                self._places.setdefault(piece.key, []).append((target, placed))
        self._expected = sum(t.nbytes for t in targets.values())
        with output_errors(path):
            self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
            os.ftruncate(self._fd, self.size)

    def begin(self, file: OutputFile, header: bytes, size: int) -> bool:
        _, infos = file.layout()
        rows = sorted(
            ((step.tensor, info) for step, info in zip(file.steps, infos, strict=True)), key=lambda row: row[1].begin
        )
        self._infos[file.name] = ([info.begin for _, info in rows], rows)
        return True

    def write(self, file: OutputFile, offset: int, view: memoryview) -> None:
        begins, rows = self._infos[file.name]
        end = offset + len(view)
        index = max(0, bisect.bisect_right(begins, offset) - 1)
        while index < len(rows) and rows[index][1].begin < end:
            key, info = rows[index]
            low, high = max(offset, info.begin), min(end, info.end)
            if low < high and key in self._places:
                part = view[low - offset : high - offset]
                for target, piece in self._places[key]:
                    self._place(part, info, low - info.begin, target, piece)
            index += 1

    def end(self, file: OutputFile) -> None:
        """All of one of the base's files went by; others may come."""

    def finish(self) -> None:
        """All went by: every byte of every weight was written, and is on the device.

        Raises:
            LoramergeError: `internal`: something is missing.
        """
        if self.written != self._expected:
            raise LoramergeError("internal", f"{self.written} of {self._expected} bytes of the weights were written")
        with output_errors(self.path):
            fsync_fd(self._fd)
        self.close()

    def close(self) -> None:
        """Closes the file; safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _place(self, part: memoryview, info: TensorInfo, first: int, target: Target, piece: Piece) -> None:
        """Writes a range of a stored tensor (bytes from `first`) to where a piece of it lies."""
        size = target.itemsize
        extents = piece.extents()
        whole = all(b == (0, n) for b, n in zip(piece.box, info.shape, strict=True))
        if whole and _in_order(piece) and _in_one_run(extents, target.shape):
            at = target.offset + _flat(piece.starts, target.shape) * size + first
            self._put(at, part)
            return
        numbers = np.frombuffer(part, dtype=f"u{size}")
        for box, values in _boxes(numbers, first // size, info.shape):
            cut = _intersection(box, piece.box)
            if cut is None:
                continue
            inside = tuple(slice(s - b, s - b + n) for (s, n), (b, _) in zip(cut, box, strict=True))
            self._put_box(values[inside], cut, target, piece)

    def _put_box(
        self, values: NDArray[np.generic], cut: Sequence[tuple[int, int]], target: Target, piece: Piece
    ) -> None:
        starts, extents = list(piece.starts), [1] * len(target.shape)
        for (start, size), (begin, _), axis in zip(cut, piece.box, piece.axes, strict=True):
            starts[axis] += start - begin
            extents[axis] = size
        order = sorted(range(len(piece.axes)), key=lambda i: piece.axes[i])
        turned = np.ascontiguousarray(values.transpose(order)).reshape(extents)
        lead = len(extents) - 1
        while lead and extents[lead] == target.shape[lead]:
            lead -= 1
        run = prod(extents[lead:])
        flat = memoryview(turned.reshape(-1).view(np.uint8).data)
        nbytes = run * target.itemsize
        for number, index in enumerate(itertools.product(*(range(n) for n in extents[:lead]))):
            place = [s + i for s, i in zip(starts, index, strict=False)] + starts[lead:]
            at = target.offset + _flat(place, target.shape) * target.itemsize
            self._put(at, flat[number * nbytes : (number + 1) * nbytes], count=False)
        self._count(len(flat))

    def _put(self, at: int, data: memoryview, count: bool = True) -> None:
        done = 0
        with output_errors(self.path):
            while done < len(data):
                done += os.pwrite(self._fd, data[done:] if done else data, at + done)
        if count:
            self._count(len(data))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.written += nbytes
            self._since += nbytes
            due = self._since >= _WRITE_BACK
            if due:
                self._since = 0
        if due:
            with output_errors(self.path):
                start_write_back(self._fd, 0, self.size)


def _in_order(piece: Piece) -> bool:
    return list(piece.axes) == sorted(piece.axes)


def _in_one_run(extents: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box of these extents lies in one piece in an array of this shape."""
    lead = 0
    while lead < len(extents) and extents[lead] == 1:
        lead += 1
    return all(extents[i] == shape[i] for i in range(lead + 1, len(extents)))


def _flat(place: Sequence[int], shape: Sequence[int]) -> int:
    at = 0
    for index, size in zip(place, shape, strict=True):
        at = at * size + index
    return at


def _boxes(
    numbers: NDArray[np.generic], first: int, shape: Sequence[int]
) -> Iterator[tuple[list[tuple[int, int]], NDArray[np.generic]]]:
    """A range of whole rows of an array as boxes of it: rows of one matrix each."""
    if len(shape) < 2:
        yield [(first, len(numbers))] if shape else [], numbers.reshape(-1 if shape else ())
        return
    rows, cols = shape[-2], shape[-1]
    row, left, at = first // cols, len(numbers) // cols, 0
    while left:
        matrix, inside = divmod(row, rows)
        count = min(left, rows - inside)
        lead: list[tuple[int, int]] = []
        for size in reversed(shape[:-2]):
            matrix, here = divmod(matrix, size)
            lead.insert(0, (here, 1))
        block = numbers[at * cols : (at + count) * cols]
        yield [*lead, (inside, count), (0, cols)], block.reshape(*(1 for _ in lead), count, cols)
        row, left, at = row + count, left - count, at + count


def _intersection(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    cut = []
    for (p, n), (q, m) in zip(a, b, strict=True):
        low, high = max(p, q), min(p + n, q + m)
        if low >= high:
            return None
        cut.append((low, high - low))
    return cut
