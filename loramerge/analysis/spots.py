"""Units through a base: what binding says each adapter changes in each stored tensor, and where."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from threading import Lock

import torch
from torch import Tensor

from loramerge.adapters import operators as ops
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.updates import ByKind, DoRA, LowRank, Update
from loramerge.adapters.views import Part, Place
from loramerge.analysis.spectra import Triplets
from loramerge.analysis.units import (
    FULL,
    NO_MATRIX,
    OF_WEIGHT,
    STORED_WHOLE,
    Found,
    Piece,
    Read,
    Skipped,
    Spot,
    Unit,
    as_factors,
    narrowest,
    natural,
    product_of,
)
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import slots_of
from loramerge.converting.factors import Pair
from loramerge.converting.items import PAIR, Item, read_factor
from loramerge.tensors.checkpoint import Checkpoint, Located

READABLE = ("F64", "F32", "F16", "BF16")

CACHE_BYTES = 64 << 20
"""Of factors that stay in memory, for updates that share them (experts); two stay whatever their size."""


class _Factors:
    """Reads an adapter's factors in float64, checked to be finite."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._factors = adapter.factors()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def read(self, key: str) -> Tensor:
        """One factor, in our orientation; whole numbers as int64.

        Raises:
            InputError: `adapter.non-finite`.
        """
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        stored = read_factor(self._adapter, self._factors[key])
        tensor = stored.double() if stored.is_floating_point() else stored.long()
        with self._lock:
            self._cache[key] = tensor
            while len(self._cache) > 2 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return tensor


def by_base(
    adapters: Sequence[Adapter],
    base: Checkpoint,
    include: Sequence[str],
    exclude: Sequence[str],
    allow_unmatched: bool,
) -> Found:
    """Units by the place in the base that adapters change, whatever they call it.

    Raises:
        MismatchError, UnsupportedError, InputError: see `loramerge.binding.bind`.
    """
    found = Found()
    shapes = {name: (t.info.dtype, t.info.shape) for name, t in base.tensors.items()}
    pieces: dict[str, list[tuple[Part, Piece]]] = defaultdict(list)
    located: dict[str, Located | None] = {}
    order: dict[str, int] = {}
    for index, adapter in enumerate(adapters):
        binding = bind(
            slots_of(shapes),
            base.config,
            [(adapter, 1.0)],
            include=include,
            exclude=exclude,
            allow_unmatched=allow_unmatched,
            base_name=base.name,
        )
        found.notes += [note for note in binding.notes if note not in found.notes]
        factors = _Factors(adapter)
        for stored, updates in binding.updates.items():
            order.setdefault(stored, len(order))
            for update in updates:
                made = _piece(index, adapter, factors, update)
                if isinstance(made, str):
                    found.skipped.append(Skipped(index, update.module, made))
                else:
                    pieces[stored].append(made)
                    located.setdefault(stored, _located(binding, base, stored))
        found.skipped += [Skipped(index, r.path, STORED_WHOLE) for r in binding.replaced.values()]
    for stored in sorted(pieces, key=order.__getitem__):
        found.units += _units(stored, pieces[stored], located[stored])
    _name(found.units)
    found.units.sort(key=lambda unit: natural(unit.name))
    found.skipped = list(dict.fromkeys(found.skipped))
    return found


def _located(binding: Binding, base: Checkpoint, stored: str) -> Located | None:
    """The stored tensor, where its numbers can be read as they lie: not one that zeros make larger."""
    held = base.tensors.get(binding.names[stored].source)
    return held if held is not None and held.info.dtype in READABLE and stored not in binding.grown else None


def _piece(index: int, adapter: Adapter, factors: _Factors, update: Update) -> tuple[Part, Piece] | str:
    """The part that an update changes and its piece, or why there is none."""
    if isinstance(update, DoRA):
        return OF_WEIGHT
    dtypes = [adapter.checkpoint.tensors[key].info.dtype for key in update.keys]
    if isinstance(update, LowRank):
        origin: tuple[object, ...] = (index, update.keys, update.pick)
        dtype = narrowest(dtypes)
        return update.part, Piece(index, update.module, PAIR, dtype, True, _low_rank(factors, update), origin)
    if not isinstance(update, ByKind) or update.bias_of is not None:
        return NO_MATRIX
    if update.magnitude is not None or not KINDS[update.kind].additive:
        return OF_WEIGHT
    if any(name == "diff" for name, _ in update.factors):
        return FULL
    part = update.view.parts[update.part]
    by_factors = update.kind == PAIR
    read, origin = _of_kind(factors, update, part), (index, update.keys)
    return part, Piece(index, update.module, update.kind, narrowest(dtypes), by_factors, read, origin)


def _low_rank(factors: _Factors, update: LowRank) -> Read:
    def read() -> Pair:
        A, B = update.picked(factors.read(update.A), factors.read(update.B))
        return ops.taken(B, update.part) * update.scale, A

    return read


def _of_kind(factors: _Factors, update: ByKind, part: Part) -> Read:
    whole = torch.arange(update.view.rows)
    in_place = torch.equal(ops.taken(whole, part), whole)

    def read() -> Pair | Triplets:
        tensors = {name: factors.read(key) for name, key in update.factors}
        context = update.context
        item = Item(update.module, update.kind, tensors, context.scale, shape=context.shape, options=context.options)
        if context.options.get("scaled") is False:
            item = replace(item, scale=1.0)
        made = product_of(item)
        if in_place:
            return made
        B, A = as_factors(made)
        return ops.taken(B, part), A

    return read


def _units(stored: str, pieces: Sequence[tuple[Part, Piece]], located: Located | None) -> list[Unit]:
    """Pieces of one stored tensor by where they lie. Those that overlap without being the same (one adapter trained a
    fused weight, another a part of it), and those of one module (its rows lie among others'), are in one place that
    holds them all."""
    groups: list[list[tuple[Part, Piece]]] = []
    for part, piece in pieces:
        hits = [group for group in groups if any(_together((part, piece), entry) for entry in group)]
        groups = [group for group in groups if group not in hits]
        groups.append([*(entry for group in hits for entry in group), (part, piece)])
    units = []
    for group in groups:
        first = min(_rows(part)[0] for part, _ in group)
        last = max(_rows(part)[1] for part, _ in group)
        part = group[0][0]
        place = part.place if len({p.place for p, _ in group}) == 1 else _around(part, first, last)
        rows, cols = (place.width, place.rows) if part.flipped else (place.rows, place.width)
        unit = Unit(stored, (rows, cols), {}, Spot(stored, place, part.flipped, located))
        for part, piece in group:
            unit.take(piece if part.place == place else _moved(piece, _rows(part)[0] - first, rows))
        units.append(unit)
    return units


def _rows(part: Part) -> tuple[int, int]:
    """Which rows a part covers, as its module sees rows: columns of the stored tensor where it is flipped."""
    p = part.place
    return (p.c0, p.c1) if part.flipped else (p.begin // p.cols, p.begin // p.cols + p.rows)


def _together(a: tuple[Part, Piece], b: tuple[Part, Piece]) -> bool:
    """Whether two parts are one unit: the same place; or of one layout, and with rows in common or of one module."""
    (part, piece), (other, its) = a, b
    p, q = part.place, other.place
    if part.flipped != other.flipped:
        return False
    if p == q:
        return True
    if part.flipped:
        alike = (p.begin, p.rows, p.cols) == (q.begin, q.rows, q.cols)
    else:
        alike = (p.c0, p.c1, p.cols) == (q.c0, q.c1, q.cols) and p.begin % p.cols == q.begin % q.cols == 0
    (first, last), (start, end) = _rows(part), _rows(other)
    one_module = piece.origin == its.origin
    return alike and p.step == q.step == 1 and (one_module or max(first, start) < min(last, end))


def _around(part: Part, first: int, last: int) -> Place:
    if part.flipped:
        return replace(part.place, c0=first, c1=last)
    return replace(part.place, begin=first * part.place.cols, rows=last - first)


def _moved(piece: Piece, at: int, rows: int) -> Piece:
    """The piece among this many rows, from row `at` on; zeros elsewhere."""

    def read() -> Pair:
        B, A = as_factors(piece.read())
        return torch.nn.functional.pad(B, (0, 0, at, rows - at - B.shape[0])), A

    return replace(piece, read=read)


def _name(units: Sequence[Unit]) -> None:
    """By the module that the adapters know; by the stored tensor where that is several units, or has several names."""
    counts = Counter(min(unit.pieces.values(), key=lambda p: p.adapter).module for unit in units)
    for unit in units:
        modules = {piece.module for piece in unit.pieces.values()}
        first = min(unit.pieces.values(), key=lambda p: p.adapter).module
        if counts[first] == 1 and (len(modules) == 1 or not _is_part(unit)):
            unit.name = first
            continue
        spot = unit.spot
        assert spot is not None
        unit.name = spot.tensor.removesuffix(".weight")
        if _is_part(unit):
            start = spot.place.c0 if spot.flipped else spot.place.begin // max(spot.place.cols, 1)
            unit.name += f"[{start}:{start + unit.shape[0]}]"


def _is_part(unit: Unit) -> bool:
    """Whether the unit is only some of its stored tensor."""
    spot = unit.spot
    return spot is not None and spot.located is not None and prod(unit.shape) != prod(spot.located.info.shape)
