"""Finds the weights of a checkpoint among the tensors of a model that was exported from it, by their values alone.

Exporters turn weights around, join some in one tensor, cut others and keep copies, under names of their own. A weight
is found by its first row and column among those of every tensor, and compared as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from loramerge.binding.lowering import Piece, Site, site_of, sites_from
from loramerge.binding.namespace import Slot, slots_of
from loramerge.errors import InputError, MismatchError
from loramerge.tensors.checkpoint import Checkpoint, Located
from loramerge.tensors.dtypes import bits
from loramerge.tensors.text import quoted, some

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BLOCK = 4 << 20
_HITS = 64


class Values:
    """The tensors of a model, looked up by the values of a checkpoint."""

    def __init__(self, model: Checkpoint, base: Checkpoint, turned: Callable[[str, str], bool]) -> None:
        """`turned`: whether the graph reads a tensor as the transpose of a parameter, for where values do not tell."""
        self.model, self.base, self.turned = model, base, turned
        self.stored = {k: _Matrix(t) for k, t in model.tensors.items() if t.info.dtype in _FLOATS and t.info.numel}
        self.known = {k: _Matrix(t) for k, t in base.tensors.items() if t.info.dtype in _FLOATS and t.info.numel}

    @property
    def slots(self) -> list[Slot]:
        """The tensors of the checkpoint."""
        return slots_of({name: (t.info.dtype, t.info.shape) for name, t in self.base.tensors.items()})

    def find(self, names: Sequence[str]) -> Mapping[str, list[Site]]:
        """Every place of these weights of the checkpoint, those that cover a weight in pieces too.

        Raises:
            MismatchError: `onnx.ambiguous` where another weight of the checkpoint has the same values.
        """
        found: dict[str, list[Site]] = {}
        for name in names:
            if name not in self.known:
                continue
            pieces = self._one_way(name, list(self._pieces(name)))
            sites = _sites(pieces, self.known[name], self.stored)
            if sites:
                self._check_only(name)
                found[name] = sites
        return found

    def _one_way(self, name: str, pieces: list[Piece]) -> list[Piece]:
        """Of a symmetric matrix, which is found turned and not, what the graph does with it."""
        ways: dict[tuple[str, int, int, int, int], list[Piece]] = defaultdict(list)
        for piece in pieces:
            ways[piece.tensor, piece.r0, piece.c0, piece.row, piece.col].append(piece)
        return [
            own[0] if len(own) == 1 else next((p for p in own if p.turned == self.turned(name, p.tensor)), own[0])
            for own in ways.values()
        ]

    def _check_only(self, name: str) -> None:
        own = self.known[name]
        twins = [
            n for n, m in self.known.items() if n != name and m.shape == own.shape and m.dtype == own.dtype
            and m.row0(own.dtype) == own.row0(own.dtype) and _same(own, m, Piece(n, m.cols, 0, m.rows, 0, m.cols))
        ]  # fmt: skip
        if twins:
            raise MismatchError(
                "onnx.ambiguous",
                f"{quoted(name)} and {some(twins)} of the checkpoint have the same values: nothing tells them apart",
                fix="export the model with the names of its parameters (optimize=False), or merge into the checkpoint",
                file=self.model.name,
                tensors=[name, *twins],
            )

    def _pieces(self, name: str) -> Iterator[Piece]:
        """Rectangles of a weight that are in some tensor: all of it, or all of the tensor."""
        own = self.known[name]
        for key, stored in self.stored.items():
            if len(own.shape) != 2 or len(stored.shape) != 2:
                if own.shape == stored.shape:
                    piece = Piece(key, stored.cols, 0, own.rows, 0, own.cols)
                    yield from [piece] if _same(own, stored, piece) else []
                continue
            made = dict.fromkeys(p for turned in (False, True) for p in _candidates(own, stored, key, turned))
            yield from (piece for piece in made if _same(own, stored, piece))


class Recorded:
    """What an earlier merge into the same model found by values, from its receipt.

    Raises:
        InputError: `receipt.invalid`.
    """

    def __init__(self, model: Checkpoint, data: Mapping[str, Any]) -> None:
        shapes = {name: located.info.shape for name, located in model.tensors.items()}
        self.slots: list[Slot] = []
        self._sites: dict[str, list[Site]] = {}
        try:
            for name, given in data.items():
                shape, sites = sites_from(given, shapes)
                dtype = model.tensors[sites[0].pieces[0].tensor].info.dtype
                self.slots.append(Slot(name, name, dtype, shape))
                self._sites[name] = sites
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            message = f"its receipt says of weights where they cannot be ({error})"
            raise InputError("receipt.invalid", message, file=model.name) from None

    def find(self, names: Sequence[str]) -> Mapping[str, list[Site]]:
        """The places of these weights."""
        return {name: self._sites[name] for name in names if name in self._sites}


class _Matrix:
    """A stored tensor as a matrix, its first row and column read when they are wanted."""

    def __init__(self, located: Located) -> None:
        info = located.info
        self.located = located
        self.shape = info.shape
        self.rows, self.cols = (info.shape[0], prod(info.shape[1:])) if info.shape else (1, 1)
        self.dtype = info.dtype
        self.size = bits(info.dtype) // 8
        self._lines: dict[tuple[str, str], bytes] = {}

    def rectangle(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """Some rows and columns, (r1 - r0, c1 - c0)."""
        import torch

        begin, source = self.located.info.begin, self.located.file.source
        width = self.cols * self.size
        if c1 - c0 == 1 and self.cols > 1:
            raw = bytearray((r1 - r0) * self.size)
            view = memoryview(raw)
            for i in range(r1 - r0):
                at = begin + (r0 + i) * width + c0 * self.size
                source.read_into(at, view[i * self.size : (i + 1) * self.size])
            return torch.frombuffer(raw, dtype=getattr(torch, _FLOATS[self.dtype])).view(-1, 1)
        raw = bytearray(source.read(begin + r0 * width, (r1 - r0) * width))
        return torch.frombuffer(raw, dtype=getattr(torch, _FLOATS[self.dtype])).view(r1 - r0, self.cols)[:, c0:c1]

    def row0(self, dtype: str) -> bytes:
        """The first row in another dtype."""
        return self._line("row", dtype)

    def col0(self, dtype: str) -> bytes:
        """The first column in another dtype."""
        return self._line("column", dtype)

    def _line(self, which: str, dtype: str) -> bytes:
        if (which, dtype) not in self._lines:
            rows, cols = (1, self.cols) if which == "row" else (self.rows, 1)
            self._lines[which, dtype] = _raw(self.rectangle(0, rows, 0, cols), dtype)
        return self._lines[which, dtype]


def _raw(values: Tensor, dtype: str) -> bytes:
    import torch

    cast = values.to(getattr(torch, _FLOATS[dtype])).contiguous().flatten()
    return bytes(cast.view(torch.uint8).numpy().data)


def _candidates(own: _Matrix, stored: _Matrix, key: str, turned: bool) -> Iterator[Piece]:
    """Where a weight could lie in a tensor, or the tensor in it, as first rows and columns tell."""
    rows, cols = (stored.cols, stored.rows) if turned else (stored.rows, stored.cols)
    dtype, size = stored.dtype, stored.size
    down, across = (stored.row0, stored.col0) if turned else (stored.col0, stored.row0)
    for along, same, mine, theirs in (
        ("rows", cols == own.cols, own.rows, rows),
        ("cols", rows == own.rows, own.cols, cols),
    ):
        if not same:
            continue
        long, short = (down, own.col0) if along == "rows" else (across, own.row0)
        a, b = long(dtype), short(dtype)
        inside = theirs >= mine
        for k in _finds(a, b, size) if inside else _finds(b, a, size):
            low, n = (0, mine) if inside else (k, theirs)
            at = k if inside else 0
            r0, r1, c0, c1 = (low, low + n, 0, own.cols) if along == "rows" else (0, own.rows, low, low + n)
            here = (at, 0) if (along == "rows") != turned else (0, at)
            yield Piece(key, stored.cols, r0, r1, c0, c1, here[0], here[1], turned)


def _finds(long: bytes, short: bytes, size: int) -> Iterator[int]:
    """Elements at which one run of numbers begins in another."""
    at = long.find(short)
    hits = 0
    while at >= 0 and hits < _HITS:
        if at % size == 0:
            hits += 1
            yield at // size
        at = long.find(short, at + 1)


def _same(own: _Matrix, stored: _Matrix, piece: Piece) -> bool:
    """Whether a rectangle of a weight has the very values that a tensor has there, in the tensor's dtype."""
    import torch

    width = piece.c1 - piece.c0
    step = max(1, _BLOCK // max(1, width * 4))
    turned_block = None
    for r0 in range(piece.r0, piece.r1, step):
        r1 = min(r0 + step, piece.r1)
        mine = own.rectangle(r0, r1, 0, own.cols)[:, piece.c0 : piece.c1]
        if piece.turned:
            if turned_block is None:  # its rows are our columns: each block of ours needs all of them
                turned_block = stored.rectangle(piece.row, piece.row + width, 0, stored.cols)
            left = piece.col + r0 - piece.r0
            theirs = turned_block[:, left : left + r1 - r0].T
        else:
            top = piece.row + r0 - piece.r0
            theirs = stored.rectangle(top, top + r1 - r0, 0, stored.cols)[:, piece.col : piece.col + width]
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.size]
        if not torch.equal(mine.to(theirs.dtype).contiguous().view(word), theirs.contiguous().view(word)):
            return False
    return True


def _sites(pieces: list[Piece], own: _Matrix, stored: Mapping[str, _Matrix]) -> list[Site]:
    """Complete places: tensors that have all of the weight, and sets of tensors that cover it without overlap."""
    sites = []
    parts: dict[tuple[int, int, int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        if (piece.r0, piece.r1, piece.c0, piece.c1) == (0, own.rows, 0, own.cols):
            sites.append(site_of((piece,), own.shape, stored[piece.tensor].shape))
        else:
            parts[piece.r0, piece.r1, piece.c0, piece.c1].append(piece)
    while parts:
        cover = _cover(list(parts), own)
        if not cover:
            break
        sites.append(Site(tuple(parts[span].pop() for span in cover)))
        parts = defaultdict(list, {span: left for span, left in parts.items() if left})
    return sites


def _cover(spans: list[tuple[int, int, int, int]], own: _Matrix) -> list[tuple[int, int, int, int]]:
    """Spans of whole rows, or of whole columns, that follow one another from the first to the last; [] without."""
    for lines, size in ((0, own.rows), (2, own.cols)):
        other = (2, own.cols) if lines == 0 else (0, own.rows)
        fits = [s for s in spans if (s[other[0]], s[other[0] + 1]) == (0, other[1])]
        by_first: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        for span in fits:
            by_first[span[lines]].append(span)
        chosen: list[tuple[int, int, int, int]] = []
        at = 0
        while at < size and by_first[at]:
            chosen.append(max(by_first[at], key=lambda s: s[lines + 1]))
            at = chosen[-1][lines + 1]
        if at == size:
            return chosen
    return []
