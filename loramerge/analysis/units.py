"""What is analysed together: the updates that several adapters make to one module, found by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.kronecker import Kronecker
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.adapters.kinds.tucker import through_core
from loramerge.adapters.views import Place
from loramerge.analysis.spectra import ROUNDOFF, Decomposed, Triplets, kronecker
from loramerge.binding.bind import selector
from loramerge.converting.factors import Pair, as_pair
from loramerge.converting.items import PAIR, Item, item_of, weight_shape
from loramerge.converting.naming import with_roles
from loramerge.errors import LoramergeError, MismatchError, UnsupportedError
from loramerge.tensors.checkpoint import Located

FULL = "no product of two thin matrices: a change of full rank"
OF_WEIGHT = "its change depends on the weight, so that it has no factors of its own"
NO_MATRIX = "changes no weight matrix"
STORED_WHOLE = "a parameter that is stored whole"
STACKED = "stacked parameters (experts): --base BASE tells them apart"

Read = Callable[[], "Pair | Triplets"]
"""How an update is had: as factors (B, A) in float64, scale in B, or decomposed where that costs less."""

COMMON_SEGMENTS = 3
"""So many last segments at least must two paths share to be one module, where one has more in front."""


@dataclass(frozen=True)
class Piece:
    """One adapter's update of one module: what its header says, and how to have it as (B, A) in float64, scale in B.

    `by_factors`: whether these are the stored factors, whose own singular vectors mean something. `dtype`: the
    narrowest that they are stored in. `origin`: what parts of one product of factors have in common.
    """

    adapter: int
    module: str
    kind: str
    dtype: str
    by_factors: bool
    read: Read
    origin: tuple[object, ...] = ()

    def decomposed(self, weight: float, shape: tuple[int, int]) -> Decomposed:
        """The update times the user's weight.

        Raises:
            UnsupportedError, MismatchError: it is no product of factors, or the header of another adapter says another
                shape of this module.
        """
        made = self.read()
        if isinstance(made, Triplets):
            if (len(made.U), len(made.V)) != shape:
                raise MismatchError(
                    "analyze.shape", f"its factors make {len(made.U)}x{len(made.V)}, not {times(shape)}"
                )
            made = made.times(weight)
            return Decomposed(*made.pair, made)
        B, A = made
        if (B.shape[0], A.shape[1]) != shape:
            if (A.shape[1], B.shape[0]) != shape:
                raise MismatchError("analyze.shape", f"its factors make {B.shape[0]}x{A.shape[1]}, not {times(shape)}")
            B, A = A.T, B.T  # an embedding that is kept as if it were a linear
        return Decomposed((B * weight).contiguous(), A.contiguous())


@dataclass(frozen=True)
class Spot:
    """Where a unit's weight lies in the base: rows (columns where `flipped`) of a stored tensor; None: not readable."""

    tensor: str
    place: Place
    flipped: bool
    located: Located | None


@dataclass
class Unit:
    """One weight, or the part of one, that adapters change: at most one piece of each adapter."""

    name: str
    shape: tuple[int, int]
    pieces: dict[int, Piece] = field(default_factory=dict)
    spot: Spot | None = None

    def take(self, piece: Piece) -> None:
        """Adds a piece; to another one of the same adapter, their sum."""
        held = self.pieces.get(piece.adapter)
        self.pieces[piece.adapter] = piece if held is None else summed(held, piece)


@dataclass(frozen=True)
class Skipped:
    """A module of an adapter that is not analysed, and why."""

    adapter: int
    module: str
    reason: str


@dataclass
class Found:
    """Units in the order of the first adapter (or of the base), and what is left out."""

    units: list[Unit] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def summed(first: Piece, second: Piece) -> Piece:
    """Two updates that one adapter makes to one unit, as one: factors side by side, or rows of one B."""

    def read() -> Pair:
        (b1, a1), (b2, a2) = as_factors(first.read()), as_factors(second.read())
        if a1.shape == a2.shape and torch.equal(a1, a2):
            return b1 + b2, a1
        return torch.cat([b1, b2], 1), torch.cat([a1, a2])

    dtype = narrowest([first.dtype, second.dtype])
    by_factors = first.by_factors and second.by_factors and bool(first.origin) and first.origin == second.origin
    return Piece(first.adapter, first.module, first.kind, dtype, by_factors, read, first.origin)


def narrowest(dtypes: Sequence[str]) -> str:
    """Of the dtypes that factors are stored in, the one that rounds most."""
    return max((d for d in dtypes if d in ROUNDOFF), key=ROUNDOFF.__getitem__, default="F32")


def times(shape: Sequence[int]) -> str:
    """(4096, 64) -> ``"4096x64"``."""
    return "x".join(map(str, shape))


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def refusal(adapter: Adapter, module: Module) -> str | None:
    """Why a module cannot be analysed, from its header alone; None where nothing there speaks against it."""
    kind = KINDS.get(module.kind)
    if MAGNITUDES.keys() & module.factors.keys() or (kind is not None and not kind.additive):
        return OF_WEIGHT
    if kind is None and module.kind != PAIR:
        return NO_MATRIX
    if "diff" in module.factors:
        return FULL
    return None


def by_name(adapters: Sequence[Adapter], include: Sequence[str], exclude: Sequence[str]) -> Found:
    """Units by module path: one module where paths are the same but for `.` or `_` and what stands before them."""
    found = Found()
    selected = selector(include, exclude)
    units: dict[tuple[str, str], Unit] = {}
    for index, adapter in enumerate(adapters):
        search = _by_ending(units)
        for module in adapter.modules:
            if not selected(module.path):
                continue
            reason = refusal(adapter, module)
            shape = None if reason else _header_shape(module)
            if shape is None:
                found.skipped.append(Skipped(index, module.path, reason or FULL))
                continue
            item = with_roles([Item(module.path, module.kind, {}, path=module.path)], adapter.dialect)[0]
            key = item.role, item.path.replace(".", "_")
            unit = units.get(key) or search(key)
            if unit is None:
                unit = units[key] = Unit(module.path, shape)
            if unit.shape != shape:
                reason = f"its shape is {times(shape)}, that of {unit.name} in another adapter {times(unit.shape)}"
                found.skipped.append(Skipped(index, module.path, reason))
            else:
                unit.take(_piece(adapter, index, module))
        plain = [p.path for p in adapter.plain if selected(p.path.rpartition(".")[0])]
        found.skipped += [Skipped(index, path, STORED_WHOLE) for path in plain]
    found.units = sorted(units.values(), key=lambda unit: natural(unit.name))
    return found


def _header_shape(module: Module) -> tuple[int, int] | None:
    """(m, n) of the weight, flattened."""
    shapes = module.shapes()
    if "embedding-A" in shapes and "embedding-B" in shapes:
        return shapes["embedding-B"][0], shapes["embedding-A"][1]
    try:
        shape = weight_shape(module.kind, shapes)
    except (KeyError, IndexError):
        return None
    if shape is None or len(shape) < 2:
        return None
    n = 1
    for size in shape[1:]:
        n *= size
    return shape[0], n


def _piece(adapter: Adapter, index: int, module: Module) -> Piece:
    def read() -> Pair | Triplets:
        try:
            return product_of(item_of(adapter, module))
        except LoramergeError as error:
            stacked = error.code == "adapter.rank" and adapter.settings.get("target-parameters")
            if stacked or error.code == "convert.wrapped":
                raise UnsupportedError(error.code, STACKED) from None
            raise

    dtypes = [f.info.dtype for name, f in module.factors.items() if name not in ("alpha", "bias")]
    return Piece(index, module.path, module.kind, narrowest(dtypes), module.kind == PAIR, read)


def as_factors(made: Pair | Triplets) -> Pair:
    """(B, A)."""
    return made.pair if isinstance(made, Triplets) else made


def product_of(item: Item) -> Pair | Triplets:
    """(B, A) of an item, float64, scale in B; a Kronecker product, whose rank is often full, decomposed.

    Raises:
        UnsupportedError: `analyze.full-rank`.
    """
    if item.magnitude is None and "embedding-A" in item.factors:
        return item.factors["embedding-B"].double() * item.scale, item.factors["embedding-A"].double()
    if item.kind == Kronecker.name and item.magnitude is None and not item.options.get("trailing"):
        return kronecker(*_sides(item.factors)).times(item.scale)
    split = as_pair(item)
    if split is None:
        raise UnsupportedError("analyze.full-rank", OF_WEIGHT if item.magnitude is not None else FULL)
    return split.B * split.scale, split.A


def _sides(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both matrices of a Kronecker product, (o1, i1) and (o2, i2 * prod(kernel))."""
    f = {name: factor.double() for name, factor in factors.items() if factor.is_floating_point()}
    first = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "w2" in f:
        second = f["w2"].flatten(1)
    elif "t2" in f:
        second = f["w2_a"].T @ through_core(f["t2"], f["w2_b"])
    else:
        second = f["w2_a"].flatten(1) @ f["w2_b"].flatten(1)
    return first, second


def _by_ending(units: dict[tuple[str, str], Unit]) -> Callable[[tuple[str, str]], Unit | None]:
    """A search among the units of earlier adapters for a path that is the other's ending, where just one is."""
    paths: dict[str, list[Unit]] = defaultdict(list)
    endings: dict[str, list[Unit]] = defaultdict(list)
    for (_, path), unit in units.items():
        paths[path].append(unit)
        for ending in _endings(path):
            endings[ending].append(unit)

    def search(key: tuple[str, str]) -> Unit | None:
        path = key[1]
        hits = paths[path] if path in paths else endings.get(path, [])
        for ending in _endings(path):
            if hits:
                break
            hits = paths.get(ending, [])
        return hits[0] if len(hits) == 1 else None

    return search


def _endings(path: str) -> list[str]:
    parts = path.split("_")
    return ["_".join(parts[at:]) for at in range(1, len(parts) - COMMON_SEGMENTS + 1)]
