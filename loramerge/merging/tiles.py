"""Rows of matrices that are computed when they are needed, in tiles, and the operator that adds them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from loramerge.adapters import operators as ops
from loramerge.adapters.views import Part, Place
from loramerge.algebra.core import TILE


class Tiles:
    """Rows of an array in tiles of fixed position, so that their bits do not depend on the rows asked for. Each thread
    keeps the tiles that it was given last: the next rows mostly begin in the last of them."""

    def __init__(self, rows: Callable[[int, int], Tensor], count: int) -> None:
        self._rows, self._count = rows, count
        self._kept = threading.local()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop."""
        kept: dict[int, Tensor] = getattr(self._kept, "tiles", {})
        tiles = {at: kept[at] for at in range(start - start % TILE, stop, TILE) if at in kept}
        for at in range(start - start % TILE, stop, TILE):
            if at not in tiles:
                tiles[at] = self._rows(at, min(at + TILE, self._count))
        self._kept.tiles = tiles
        ordered = [tiles[at] for at in sorted(tiles)]
        whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
        first = start - start % TILE
        return whole[start - first : stop - first]


class Taken:
    """The rows of a part, from those of the site's matrix."""

    def __init__(self, tiles: Tiles, part: Part) -> None:
        self._tiles, self._part = tiles, part

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the part's place."""
        pieces, at = [], 0
        for take in self._part.take:
            lo, hi = max(start, at), min(stop, at + len(take))
            if lo < hi:
                first = take.start + (lo - at) * take.step
                pieces.append(self._tiles.rows(first, first + (hi - lo - 1) * take.step + 1)[:: take.step])
            at += len(take)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class AddRows:
    """block += rows of a matrix on a place: `rows(r0, r1)` gives (r1 - r0, place width)."""

    def __init__(self, place: Place, rows: Callable[[int, int], Tensor]) -> None:
        self._place, self._rows = place, rows
        self._last = threading.local()

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        """See `operators.Operator`."""
        p = self._place
        lo, hi = ops.overlap(p, first, block.numel())
        self._last.added = (first, block.numel(), lo, hi, None)
        if lo >= hi:
            return
        r0, r1 = (lo - p.begin) // p.cols, -((p.begin - hi) // p.cols)
        delta = self._rows(r0, r1)
        if block.device.type == "mps":
            delta = delta.to(block.dtype)
        delta = delta.to(block.device)
        part = block[lo - first : hi - first]
        if (p.c0, p.c1, p.step) == (0, p.cols, 1):
            # Rows of the place need not be the tensor's: a block may begin within one.
            flat = delta.reshape(-1)[lo - p.begin - r0 * p.cols : hi - p.begin - r0 * p.cols]
            part += flat
            self._last.added = (first, block.numel(), lo, hi, flat)
        else:
            part.view(-1, p.cols)[:, p.c0 : p.c1 : p.step] += delta

    def addends(self, index: Tensor) -> Tensor | None:
        """What was added to elements of the block that this thread changed last."""
        first, count, lo, hi, flat = getattr(self._last, "added", (0, 0, 0, 0, None))
        if flat is None or flat.dtype != torch.float64:
            return None
        if index.numel() and not (first <= int(index.min()) and int(index.max()) < first + count):
            return None
        inside = (index >= lo) & (index < hi)
        found: Tensor = flat[(index - lo).where(inside, 0)].where(inside, 0.0)
        return found
