"""One place of the result: the updates of all adapters there, what the method makes of them, and its factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from loramerge.algebra import Factors, RankRule, Svd, Update, cat, extract, fold, norm, pad, truncated
from loramerge.algebra.core import Stack
from loramerge.algebra.methods import absent, combined
from loramerge.algebra.peft_compat import Weighted
from loramerge.algebra.thresholds import spans
from loramerge.combining.matching import Slot
from loramerge.combining.reading import Source, vector, widest
from loramerge.converting.factors import as_pair, delta_of
from loramerge.converting.items import PAIR, Item
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.methods import Chosen
from loramerge.tensors.text import plural, quoted

DIFFERENCE = "difference"
LARGE = 768
"""Of the short side of an update of full rank: beyond it only the leading vectors are computed (`algebra.extract`)."""

EXACT, MULTIPLIED, APPROXIMATED, KEPT = "exact", "multiplied", "approximated", "kept"


@dataclass(frozen=True)
class Gathered:
    """The updates of one place, (m, n) each, in the order of the adapters.

    `shape`: of the weight, with its kernel where an adapter shows it. `dense`: some update is no product of factors.
    `differences`: all of them are stored whole. `vector`: it is a bias or a norm.
    """

    updates: tuple[Weighted, ...]
    shape: tuple[int, ...]
    exact_shape: bool
    dtype: torch.dtype
    embedding: bool = False
    vector: bool = False
    dense: bool = False
    differences: bool = False
    how: str = EXACT

    @property
    def size(self) -> tuple[int, int]:
        """(m, n)."""
        return self.updates[0].b.shape[0], self.updates[0].a.shape[1]


@dataclass(frozen=True)
class Made:
    """What the method makes of one place: the update, and its singular values and vectors where it is to be cut.

    `svd`: None where the update is stored whole, and where it is `large`: of full rank, and so large that only the
    leading vectors are computed, once their number is known. `norm`: of the update. `distance`: from the weighted sum,
    relative to `sum_norm`, where the method acts on factors.
    """

    gathered: Gathered
    update: Update
    svd: Svd | None
    norm: float
    distance: float | None = None
    sum_norm: float = 0.0
    large: bool = False

    def spectrum(self) -> Tensor:
        """Singular values, falling."""
        if self.svd is not None:
            return self.svd.s
        matrix = self.update.dense()
        matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
        values: Tensor = torch.linalg.eigvalsh(matrix.T @ matrix).clamp(min=0).sqrt()
        return values.flip(0)


@dataclass(frozen=True)
class Cut:
    """Where to cut one place: by a rule, which is also told as a most rank or a share where it is one of these."""

    rule: RankRule | None = None
    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Stored:
    """Factors as they are written, and how far their product is from the method's exact result. Nothing else is held.

    `factors`: None where the update is stored whole, in `whole`. `full_rank`: what the rank could be. `error`: relative
    to `norm`, the norm of the exact result. The rest is as in `Gathered` and `Made`.
    """

    factors: Factors | None
    whole: Tensor | None
    rank: int
    full_rank: int
    error: float
    norm: float
    distance: float | None
    sum_norm: float
    shape: tuple[int, ...]
    exact_shape: bool
    embedding: bool
    vector: bool
    how: str


def gather(slot: Slot, sources: Sequence[Source]) -> Gathered:
    """Reads one place of all adapters.

    Raises:
        MismatchError: `combine.shape`. UnsupportedError: `combine.weight` for kinds whose change depends on a weight
            that is not given.
    """
    items = {number: sources[number].items(key) for number, key in slot.held.items()}
    every = [item for found in items.values() for item in found]
    vectors = [item for item in every if _is_vector(item, slot)]
    if vectors:
        return _vectors(slot, sources, items)
    parts = {number: [_part(item, sources[number]) for item in found] for number, found in items.items()}
    sizes = {n: {(p.b.shape[0], p.a.shape[1]) for p in found} for n, found in parts.items()}
    _check_sizes(slot, sources, {n: next(iter(s)) if len(s) == 1 else None for n, s in sizes.items()})
    like = next(iter(parts.values()))[0]
    m, n = like.b.shape[0], like.a.shape[1]
    updates = []
    for number, source in enumerate(sources):
        found = parts.get(number)
        if found:
            updates.append(_one(found, source.weight))
        else:
            updates.append(absent((m, n), like))
    shapes = [item.shape for item in every if item.shape is not None and prod(item.shape) == m * n]
    shape = max(shapes, key=len, default=(m, n))
    dense = [item for item in every if as_kept_pair(item) is None]
    made = [item for item in every if item.kind != PAIR]
    return Gathered(
        tuple(updates),
        shape if shape[0] == m else (m, n),
        any(item.exact_shape for item in every),
        widest([item.dtype for item in every]),
        embedding=any("embedding-A" in item.factors for item in every),
        dense=bool(dense),
        differences=all(item.kind == DIFFERENCE for item in every),
        how=APPROXIMATED if dense else MULTIPLIED if made else EXACT,
    )


def as_kept_pair(item: Item) -> tuple[Tensor, Tensor, float] | None:
    """(B, A, scale) of an item that is a product of factors, float64; of an embedding for the transposed change."""
    if item.kind == PAIR and "embedding-A" in item.factors and item.magnitude is None:
        return item.factors["embedding-B"].double(), item.factors["embedding-A"].double(), item.scale
    split = as_pair(item)
    return None if split is None else (split.B, split.A, split.scale)


def _part(item: Item, source: Source) -> Weighted:
    pair = as_kept_pair(item)
    if pair is not None:
        return Weighted(*pair)
    delta = delta_of(item)
    if delta is None or delta.dim() != 2:
        based = source.rebase is not None
        raise UnsupportedError(
            "combine.weight",
            f"{quoted(item.module)} ({'DoRA' if item.magnitude is not None else item.kind}) changes its weight by what "
            f"that is{', and has no matrix for it' if based else ''}",
            fix="leave it out: --exclude GLOB; or merge it into the base"
            if based
            else "give the model it was trained on, and a rank: --base BASE --rank N",
            file=source.name,
            tensors=[item.module],
        )
    eye = torch.eye(min(delta.shape), dtype=delta.dtype)
    return Weighted(eye, delta) if delta.shape[0] < delta.shape[1] else Weighted(delta, eye)


def _one(parts: Sequence[Weighted], weight: float) -> Weighted:
    """The parts of one adapter as one update, with the user's weight."""
    if len(parts) == 1:
        return Weighted(parts[0].b, parts[0].a, parts[0].scale, weight)
    return Weighted(torch.cat([p.b * p.scale for p in parts], 1), torch.cat([p.a for p in parts]), 1.0, weight)


def _is_vector(item: Item, slot: Slot) -> bool:
    if slot.key.leaf == "bias" and "bias" in item.factors:
        return True
    return "diff" in item.factors and item.factors["diff"].dim() < 2


def _vectors(slot: Slot, sources: Sequence[Source], items: dict[int, list[Item]]) -> Gathered:
    found = {n: [vector(item).flatten() for item in own] for n, own in items.items()}
    lengths = {n: {len(v) for v in own} for n, own in found.items()}
    _check_sizes(slot, sources, {n: (next(iter(x)), 1) if len(x) == 1 else None for n, x in lengths.items()})
    one = torch.ones(1, 1, dtype=torch.float64)
    like = Weighted(next(iter(found.values()))[0][:, None], one)
    updates = [
        Weighted(torch.stack(found[n]).sum(0)[:, None], one, 1.0, source.weight)
        if n in found
        else absent((like.b.shape[0], 1), like)
        for n, source in enumerate(sources)
    ]
    every = [item for own in items.values() for item in own]
    dtypes = [(item.factors["diff"] if "diff" in item.factors else item.factors["bias"]).dtype for item in every]
    return Gathered(tuple(updates), (like.b.shape[0],), False, widest(dtypes), vector=True)


def _check_sizes(slot: Slot, sources: Sequence[Source], sizes: dict[int, tuple[int, int] | None]) -> None:
    if len(set(sizes.values())) == 1 and None not in sizes.values():
        return
    told = "; ".join(f"{size} in {sources[n].name}" for n, size in sizes.items())
    raise MismatchError(
        "combine.shape",
        f"{quoted(slot.key.name)} has not one shape: {told}",
        fix="give adapters of one model",
        file=sources[max(sizes)].name,
        tensors=[slot.key.name],
    )


def make(
    gathered: Gathered, method: Chosen, name: str, *, thresholds: Sequence[float] | None = None, cut: bool = True
) -> Made:
    """What a method makes of one place.

    Args:
        name: of the place, for random masks of its own.
        cut: the result is to be factors, so its singular values are needed.

    Raises:
        UnsupportedError: `combine.method` where the method cannot be applied to these updates.
    """
    if gathered.differences and method.name == "linear" and not cut:
        total = torch.zeros(gathered.size, dtype=torch.float64)
        for part in gathered.updates:
            total += part.weight * part.scale * (part.b @ part.a)
        return Made(gathered, Factors(total, torch.eye(total.shape[1]).double()), None, float(total.norm()))
    try:
        alone = method.name == "linear" and len(gathered.updates) == 1  # its place needs no hash of its bytes
        key = b"alone" if alone else b""
        folded = [fold(w.b, w.a, scale=w.scale, weight=w.weight, key=key) for w in gathered.updates]
        if method.name == "linear" and cut:
            stack = Stack(folded)
            svd = stack.lift(torch.stack(stack.cores).sum(0))
            return Made(gathered, cat(stack), svd, svd.tail(0))
        result = combined(method.name, gathered.updates, method.options, module=name, thresholds=thresholds)
    except ValueError as error:
        raise UnsupportedError(
            "combine.method",
            f"{quoted(name)}: {method.name}: {error}",
            fix="--method linear takes any updates",
            tensors=[name],
        ) from None
    distance = result.distance
    sum_norm = 0.0 if distance is None else norm(cat(Stack(folded)))
    if isinstance(result.update, Factors):
        svd_or_none = result.update.svd() if cut else None
        size = norm(result.update) if svd_or_none is None else svd_or_none.tail(0)
        return Made(gathered, result.update, svd_or_none, size, distance, sum_norm)
    if not cut:
        return Made(gathered, result.update, None, _norm(result.update), distance, sum_norm)
    dense = result.update.dense()
    large = min(dense.shape) > LARGE
    svd_or_none = None if large else truncated(dense).svd()
    return Made(gathered, Dense(dense), svd_or_none, float(dense.norm()), distance, sum_norm, large)


@dataclass(frozen=True, eq=False)
class Dense:
    """An update that is held whole."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop."""
        return self.matrix[start:stop]

    def dense(self) -> Tensor:
        """All of it."""
        return self.matrix

    def factors(self, rule: RankRule | None = None) -> Factors:
        """The best factors of a rank."""
        return truncated(self.matrix, rule)


def store(made: Made, cut: Cut, dtype: torch.dtype, name: str, *, padded: int | None = None) -> Stored:
    """The factors to write: cut, rounded, perhaps with zeros up to a rank; or the whole where it stays whole.

    Raises:
        UnsupportedError: `combine.overflow`.
    """
    if made.svd is None and not made.large:
        whole = made.update.dense()
        rounded = whole.to(dtype)
        _check_range(rounded, dtype, name)
        error = float((rounded.double() - whole).norm()) / made.norm if made.norm else 0.0
        return _stored(made, error, whole=rounded)
    kept, full = _kept(made, cut, name)
    rank = kept.rank
    wide = pad(kept, padded) if padded is not None and 0 < rank < padded else kept
    try:
        stored = wide.to(dtype)
    except ValueError:
        raise _overflow(dtype, name) from None
    return _stored(made, _error(stored, wide, made), factors=stored, rank=rank, full_rank=full)


def _stored(
    made: Made,
    error: float,
    *,
    factors: Factors | None = None,
    whole: Tensor | None = None,
    rank: int = 0,
    full_rank: int = 0,
) -> Stored:
    of = made.gathered
    return Stored(
        factors,
        whole,
        rank,
        full_rank,
        error,
        made.norm,
        made.distance,
        made.sum_norm,
        of.shape,
        of.exact_shape,
        of.embedding,
        of.vector,
        of.how,
    )


def _kept(made: Made, cut: Cut, name: str) -> tuple[Factors, int]:
    """The best factors where the cut is, and how many there could be."""
    if made.svd is not None:
        return made.svd.factors(cut.rule), len(made.svd.s)
    assert isinstance(made.update, Dense)
    if cut.rank is None and cut.energy is None:
        svd = truncated(made.update.matrix).svd()
        return svd.factors(cut.rule), len(svd.s)
    found = extract(made.update.matrix, cut.rank, energy=cut.energy, module=name)
    return Factors(found.B.double(), found.A.double()), min(made.update.shape)


def _error(stored: Factors, kept: Factors, made: Made) -> float:
    """Of what is stored, relative to the update: what was cut off, which is orthogonal to the rest, and rounding."""
    if not made.norm:
        return 0.0
    exact = Factors(stored.b.double(), stored.a.double())
    if made.svd is not None and isinstance(made.update, Factors):
        lost = made.svd.tail(kept.rank)
        # b a - b' a' = (b - b') a + b' (a - a')
        b, a = torch.cat([kept.b - exact.b, exact.b], 1), torch.cat([kept.a, kept.a - exact.a])
        return math.hypot(lost, norm(Factors(b, a))) / made.norm
    square = 0.0
    for start, stop in spans(made.update.shape):
        square += float((exact.rows(start, stop) - made.update.rows(start, stop)).square().sum())
    return math.sqrt(square) / made.norm


def _norm(update: Update) -> float:
    return math.sqrt(sum(float(update.rows(i, j).square().sum()) for i, j in spans(update.shape)))


def _check_range(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if not bool(tensor.isfinite().all()):
        raise _overflow(dtype, name)


def _overflow(dtype: torch.dtype, name: str) -> UnsupportedError:
    short = str(dtype).removeprefix("torch.")
    return UnsupportedError(
        "combine.overflow", f"{quoted(name)} does not fit the range of {short}", fix="--dtype float32", tensors=[name]
    )


def needs_rank(names: Sequence[str], why: str) -> UnsupportedError:
    """For results of full rank where no rank is stated."""
    return UnsupportedError(
        "combine.rank",
        f"{plural(len(names), 'module')}: {why}, and no rank says where to cut it",
        fix="--rank N, --energy SHARE or --budget SIZE writes the nearest product and tells its error",
        tensors=list(names),
    )
