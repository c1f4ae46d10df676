"""Update kinds: what an adapter does to one stored weight, as plain data, and the operator that does it to a block.

An update is decided from headers and kept as plain data in the plan. `operator` reads its factors and gives the
operator, which changes blocks of the weight in place, in the compute dtype. Notation: `W` is the weight as its
module sees it, (out, in); `s` is scale times weight; a *flipped* tensor stores W transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

ReadFactor = Callable[[int, str], "Tensor"]
"""(adapter, key) -> the factor, in the compute dtype, on the compute device."""

Blocks = Callable[[], Iterator[tuple[int, "Tensor"]]]
"""() -> (first element, block) over a whole stored tensor in the compute dtype, for updates that need two passes."""


class Operator(Protocol):
    """Changes the elements `first, first + 1, ...` of a stored tensor in place."""

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        """`block` (n,) holds the sum so far, `original` (n,) the weight before any update; both compute dtype."""

    def addends(self, index: Tensor) -> Tensor | None:
        """What it adds to the elements `index` (k,) of the tensor, in float64; None where it does more than add."""


class Update(Protocol):
    """One update of one stored tensor."""

    kind: ClassVar[str]

    @property
    def adapter(self) -> int:
        """Which adapter of the plan it comes from."""

    @property
    def module(self) -> str:
        """The module of that adapter."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter's keys that it uses."""

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        """Reads the factors. None where the update changes nothing, so that the bytes can be copied."""


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a stored tensor that an update acts on.

    `rows` rows of `cols` elements from element `begin` on; of each row the columns `c0` to `c1`.
    """

    begin: int
    rows: int
    cols: int
    c0: int
    c1: int


class Pick(NamedTuple):
    """Which part of factors that several updates share: all of it, expert or slot `at` of `of`."""

    how: str = "whole"
    at: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """`W' = W + s B A` (Hu et al. 2021, equation 3), B (out, r), A (r, in), or a part of it.

    `pick` says where B and A are in the factors: the whole; `expert` e of E stacked ones, A (E*r, in) with the
    expert slowest and B (out, r*E) with the expert fastest (peft 0.21.2, tuners/lora/layer.py ParamWrapper);
    `slot` j of g of a grouped linear (loralib 0.1.2, layers.py MergedLinear).
    `take` are the rows of the stored change that this place gets. Convolutions are flattened: (out, in*kh*kw).
    """

    kind: ClassVar[str] = "low-rank"
    adapter: int
    module: str
    A: str
    B: str
    scale: float
    rank: int
    pick: Pick
    flipped: bool
    take: tuple[int, int]
    place: Place

    @property
    def keys(self) -> tuple[str, ...]:
        return self.A, self.B

    def factors(self, read: ReadFactor) -> tuple[Tensor, Tensor] | None:
        """`(L, R)` with the change of the place = L R, L (rows, r), R (r, columns); None where it is all zero."""
        if self.scale == 0:
            return None
        A, B = read(self.adapter, self.A), read(self.adapter, self.B)
        r = self.rank
        if self.pick.how == "expert":
            A = A.reshape(self.pick.of, r, -1)[self.pick.at]
            B = B.reshape(-1, r, self.pick.of)[:, :, self.pick.at]
        elif self.pick.how == "slot":
            A = A.reshape(self.pick.of, r, -1)[self.pick.at]
            B = B.reshape(self.pick.of, -1, r)[self.pick.at]
        else:
            A, B = A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)
        if not (A.any() and B.any()):
            return None
        B = B * self.scale
        L, R = (A.T, B.T) if self.flipped else (B, A)
        return L[self.take[0] : self.take[1]].contiguous(), R.contiguous()

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        factors = self.factors(read)
        return None if factors is None else _Product(*factors, self.place)


@dataclass(frozen=True, slots=True)
class _Product:
    """block += L R on its place."""

    L: Tensor
    R: Tensor
    place: Place

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        p = self.place
        lo, hi = max(first, p.begin), min(first + block.numel(), p.begin + p.rows * p.cols)
        if lo >= hi:
            return
        part = block[lo - first : hi - first]
        if (lo - p.begin) % p.cols or part.numel() % p.cols:
            self._cut_rows(part, lo - p.begin)  # grouped convolutions of loralib, whose rows are not the weight's
            return
        rows = part.view(-1, p.cols)
        if p.c1 - p.c0 != p.cols:
            rows = rows[:, p.c0 : p.c1]
        row = (lo - p.begin) // p.cols
        rows.addmm_(self.L[row : row + rows.shape[0]], self.R)

    def addends(self, index: Tensor) -> Tensor | None:
        p = self.place
        at = index - p.begin
        row, col = at.div(p.cols, rounding_mode="floor"), at.remainder(p.cols) - p.c0
        inside = (row >= 0) & (row < p.rows) & (col >= 0) & (col < p.c1 - p.c0)
        row, col = row.where(inside, 0), col.where(inside, 0)
        return (self.L[row].double() * self.R[:, col].T.double()).sum(dim=1).where(inside, 0.0)

    def _cut_rows(self, part: Tensor, at: int) -> None:
        """`part` starts and ends within rows of the place, `at` elements after its beginning."""
        cols = self.place.cols
        row, last = at // cols, (at + part.numel() - 1) // cols
        product = self.L[row : last + 1] @ self.R
        part += product.view(-1)[at - row * cols :][: part.numel()]


@dataclass(frozen=True, slots=True)
class DoRA:
    """`W' = m / ||V|| * V` with `V = W0 + s B A`, norms per output channel (Liu et al. 2024, equation 5).

    `m` is the magnitude (out,). Norms are those of the unmerged W0, also where other updates came before
    (peft 0.21.2, tuners/lora/dora.py). `by_column`: the output channels are columns of the stored matrix
    (transposed linears; embeddings, where the norm runs over the vocabulary).
    """

    kind: ClassVar[str] = "dora"
    adapter: int
    module: str
    low: LowRank
    magnitude: str
    by_column: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.low.keys, self.magnitude)

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        delta = self.low.operator(read, blocks)
        magnitude = read(self.adapter, self.magnitude).reshape(-1)
        if not self.by_column:
            return _DoRARows(delta, magnitude, self.low.place.cols)
        squares = magnitude.double().zero_()
        for first, block in blocks():
            if delta is not None:
                delta.apply(block, first, block)
            squares += block.view(-1, self.low.place.cols).double().square().sum(dim=0)
        ratio = (magnitude.double() / squares.sqrt()).to(magnitude.dtype)
        return _DoRAColumns(delta, ratio)


@dataclass(frozen=True, slots=True)
class _DoRARows:
    delta: Operator | None
    magnitude: Tensor
    cols: int

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        same = original.data_ptr() == block.data_ptr()
        if self.delta is not None:
            self.delta.apply(block, first, original)
        if same:
            v = block
        else:
            v = original.clone()
            if self.delta is not None:
                self.delta.apply(v, first, original)
        row = first // self.cols
        norms = v.view(-1, self.cols).double().square().sum(dim=1).sqrt_()
        m = self.magnitude[row : row + norms.numel()].double()
        block.view(-1, self.cols).mul_((m / norms).to(block.dtype)[:, None])

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class _DoRAColumns:
    delta: Operator | None
    ratio: Tensor

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        if self.delta is not None:
            self.delta.apply(block, first, original)
        block.view(-1, self.ratio.numel()).mul_(self.ratio)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class Difference:
    """`W' = W + s d` with a stored difference d of the weight's shape, for example the bias of `lora_B`."""

    kind: ClassVar[str] = "difference"
    adapter: int
    module: str
    key: str
    scale: float

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        if self.scale == 0:
            return None
        difference = read(self.adapter, self.key).reshape(-1)
        return _Add(difference * self.scale) if difference.any() else None


@dataclass(frozen=True, slots=True)
class _Add:
    difference: Tensor

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        block += self.difference[first : first + block.numel()]

    def addends(self, index: Tensor) -> Tensor | None:
        return self.difference[index].double()


@dataclass(frozen=True, slots=True)
class Blend:
    """`W' = W + w (N - W)`: a replacement N with a weight w other than 1."""

    kind: ClassVar[str] = "blend"
    adapter: int
    module: str
    key: str
    weight: float

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        return _Blend(read(self.adapter, self.key).reshape(-1), self.weight) if self.weight else None


@dataclass(frozen=True, slots=True)
class _Blend:
    new: Tensor
    weight: float

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        block += self.weight * (self.new[first : first + block.numel()] - original)

    def addends(self, index: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Whole rows of an embedding: row `indices[i]` becomes row i of the factor (n, dim), to the weight w.

    Despite its name PEFT's `trainable_tokens_delta` holds the rows themselves, not differences
    (peft 0.21.2, tuners/trainable_tokens/layer.py).
    """

    kind: ClassVar[str] = "token-rows"
    adapter: int
    module: str
    key: str
    indices: tuple[int, ...]
    weight: float
    cols: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def operator(self, read: ReadFactor, blocks: Blocks) -> Operator | None:
        rows = read(self.adapter, self.key)
        return _Rows(rows, tuple(enumerate(self.indices)), self.weight, self.cols) if self.weight else None


@dataclass(frozen=True, slots=True)
class _Rows:
    rows: Tensor
    pairs: tuple[tuple[int, int], ...]
    weight: float
    cols: int

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        view = block.view(-1, self.cols)
        was = original.view(-1, self.cols)
        row0 = first // self.cols
        for i, index in self.pairs:
            if row0 <= index < row0 + view.shape[0]:
                at = index - row0
                if self.weight == 1:
                    view[at] = self.rows[i]
                else:
                    view[at] += self.weight * (self.rows[i] - was[at])

    def addends(self, index: Tensor) -> Tensor | None:
        return None


KINDS: dict[str, type[Any]] = {c.kind: c for c in (LowRank, DoRA, Difference, Blend, TokenRows)}


def to_data(update: Update) -> dict[str, Any]:
    """An update as plain data for a plan or a receipt."""
    data: dict[str, Any] = {"kind": update.kind, "adapter": update.adapter, "module": update.module}
    low = update.low if isinstance(update, DoRA) else update
    if isinstance(low, LowRank):
        p = low.place
        data |= {"A": low.A, "B": low.B, "scale": low.scale, "rank": low.rank, "pick": list(low.pick)}
        data |= {
            "flipped": low.flipped,
            "take": list(low.take),
            "place": [p.begin, p.rows, p.cols, p.c0, p.c1],
        }
    if isinstance(update, DoRA):
        data |= {"magnitude": update.magnitude, "by_column": update.by_column}
    if isinstance(update, Difference):
        data |= {"key": update.key, "scale": update.scale}
    if isinstance(update, Blend | TokenRows):
        data |= {"key": update.key, "weight": update.weight}
    if isinstance(update, TokenRows):
        data |= {"indices": list(update.indices)}
    return data


def in_place(updates: tuple[Update, ...]) -> bool:
    """Whether no operator looks at the original weight after another has changed it, so none need be kept."""
    return len(updates) < 2 or all(isinstance(u, LowRank | Difference) for u in updates)
