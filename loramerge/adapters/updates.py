"""Updates: what an adapter does to one stored tensor, as plain data, and the operator that does it to a block.

An update is decided from headers and kept as plain data in the plan. `operator` reads its factors and gives the
operator, which changes blocks of the weight in place, in the compute dtype. Notation: `W` is the weight as its
module sees it, (out, in); `s` is scale times weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

from loramerge.adapters import operators as ops
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Context, Dense, Form, Product, RowDelta, RowMap, WholeMap
from loramerge.adapters.kinds.magnitude import dora, inside
from loramerge.adapters.operators import Operator
from loramerge.adapters.views import Part, Place, Take, View

if TYPE_CHECKING:
    from torch import Tensor

ReadFactor = Callable[[int, str], "Tensor"]
"""(adapter, key) -> the factor, in the compute dtype, on the compute device."""


class Weights(Protocol):
    """The weights of the base, for updates that must look at more than the block that they change."""

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first element, block) over the whole tensor that is being changed, before any update."""

    def before(self, tensor: str, update: Update) -> Tensor:
        """A whole stored tensor, flat, in the compute dtype, after all updates that come before this one."""


class Update(Protocol):
    """One update of one stored tensor."""

    @property
    def kind(self) -> str:
        """Its name in plans and receipts."""

    @property
    def adapter(self) -> int:
        """Which adapter of the plan it comes from."""

    @property
    def module(self) -> str:
        """The module of that adapter."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter's keys that it uses."""

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        """Reads the factors. None where the update changes nothing, so that the bytes can be copied."""


class Pick(NamedTuple):
    """Which part of factors that several updates share: all of it, expert, layer or slot `at` of `of`."""

    how: str = "whole"
    at: int = 0
    of: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """`W' = W + s B A` (Hu et al. 2021, equation 3), B (out, r), A (r, in), or a part of it.

    `pick` says where B and A are in the factors: the whole; `expert` e of E stacked ones, A (E*r, in) with the
    expert slowest and B (out, r*E) with the expert fastest (peft 0.21.2, tuners/lora/layer.py ParamWrapper), or
    `turned-expert`, the same transposed;
    with `grouped-` before `expert` B is (out, E*r) with the expert slowest (old unsloth);
    `layer` e of factors with an axis for experts, A (E or 1, r, in) or (E*r, in), B (E or 1, out, r); `slot` j of g of
    a grouped linear (loralib 0.1.2, layers.py MergedLinear), `rank` j of g likewise, but with all of B. `part` is where
    the change goes. Convolutions are flattened: (out, in*kh*kw). Embeddings of one dialect store A^T: see
    `Factor.transposed`.
    """

    kind: ClassVar[str] = "low-rank"
    adapter: int
    module: str
    A: str
    B: str
    scale: float
    rank: int
    pick: Pick
    part: Part

    @property
    def keys(self) -> tuple[str, ...]:
        return self.A, self.B

    def factors(self, read: ReadFactor) -> tuple[Tensor, Tensor] | None:
        """`(L, R)` with the change of the place = L R, L (rows, r), R (r, columns); None where it is all zero."""
        if self.scale == 0:
            return None
        A, B = self.picked(read(self.adapter, self.A), read(self.adapter, self.B))
        if not (A.any() and B.any()):
            return None
        B = ops.taken(B, self.part) * self.scale
        L, R = (A.T, B.T) if self.part.flipped else (B, A)
        return L.contiguous(), R.contiguous()

    def picked(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """What `pick` says of the stored factors: A (r, in), B (rows that `part` takes from, r)."""
        r = self.rank
        at, of = self.pick.at, self.pick.of
        if self.pick.how.endswith("expert"):
            A = A.reshape(of, r, -1)[at]
            grouped = "grouped" in self.pick.how
            B = B.reshape(-1, of, r)[:, at] if grouped else B.reshape(-1, r, of)[:, :, at]
            if self.pick.how.startswith("turned"):
                A, B = B.T, A.T
        elif self.pick.how == "layer":
            A = A.reshape(of, r, -1) if A.dim() == 2 else A
            A = A[min(at, A.shape[0] - 1)]
            B = B[min(at, B.shape[0] - 1)]
        elif self.pick.how == "rank":
            A, B = A.reshape(of, r, -1)[at], B.reshape(B.shape[0], -1)
        elif self.pick.how == "slot":
            A = A.reshape(of, r, -1)[at]
            B = B.reshape(of, -1, r)[at]
        else:
            A, B = A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)
        return A, B

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        factors = self.factors(read)
        return None if factors is None else ops.AddProduct(*factors, self.part.place)


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

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        delta = self.low.operator(read, weights)
        magnitude = read(self.adapter, self.magnitude).reshape(-1)
        cols = self.low.part.place.cols
        if not self.by_column:
            return ops.DoRARows(delta, magnitude, cols)
        squares = magnitude.new_zeros(len(magnitude)).double()
        for first, block in weights.blocks():
            if delta is not None:
                delta.apply(block, first, block)
            squares += block.view(-1, cols).double().square().sum(dim=0)
        ratio = (magnitude.double() / squares.sqrt()).to(magnitude.dtype)
        return ops.DoRAColumns(delta, ratio)


@dataclass(frozen=True, slots=True)
class Magnitude:
    """A DoRA magnitude over any kind that adds: its key, the axis that it lies along, and the dialect's formula."""

    key: str
    axis: str
    style: str


@dataclass(frozen=True, slots=True)
class ByKind:
    """An update of any kind of `loramerge.adapters.kinds`, on one part of the view that its module sees.

    `factors`: (factor name, key) pairs. `bias_of`: where it changes a bias, the view of the weight beside it.
    """

    kind: str
    adapter: int
    module: str
    factors: tuple[tuple[str, str], ...]
    context: Context
    view: View
    part: int
    magnitude: Magnitude | None = None
    bias_of: View | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        own = tuple(key for _, key in self.factors)
        return own if self.magnitude is None else (*own, self.magnitude.key)

    def form(self, read: ReadFactor, weights: Weights) -> Form | None:
        """The kind's formula with its factors read."""
        kind, factors = KINDS[self.kind], {name: read(self.adapter, key) for name, key in self.factors}
        magnitude = self.magnitude
        bias_of = self.bias_of
        if bias_of is not None:
            form: Form | None = kind.bias_form(factors, self.context, lambda: self._matrix(bias_of, weights))
            return form
        if magnitude is None:
            form = kind.form(factors, self.context)
            return form
        form = kind.form(factors, inside(self.context, magnitude.style))
        m = read(self.adapter, magnitude.key)
        return dora(form, m, self.context, magnitude.axis, magnitude.style)

    def _matrix(self, view: View, weights: Weights) -> Tensor:
        return ops.gather(view, {name: weights.before(name, self) for name in {p.tensor for p in view.parts}})

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        form, part = self.form(read, weights), self.view.parts[self.part]
        if form is None:
            return None
        if isinstance(form, Product):
            L = ops.taken(form.L, part)
            L, R = (form.R.T, L.T) if part.flipped else (L, form.R)
            return ops.AddProduct(L.contiguous(), R.contiguous(), part.place)
        place = part.place
        if isinstance(form, RowDelta | RowMap) and not part.flipped and place.width == place.cols:
            return ops.ByRows(form, part)
        adds = isinstance(form, RowDelta | Dense)
        if isinstance(form, RowDelta):
            matrix = form.rows(0, self.view.rows)
        elif isinstance(form, Dense):
            matrix = form.delta
        elif isinstance(form, RowMap):
            matrix = form.apply(self._matrix(self.view, weights), 0)
        else:
            assert isinstance(form, WholeMap)
            matrix = form.apply(self._matrix(self.view, weights))
        values = ops.taken(matrix.view(self.view.rows, -1), part)
        return ops.Whole((values.T if part.flipped else values).contiguous(), place, adds)


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

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        if self.scale == 0:
            return None
        difference = read(self.adapter, self.key).reshape(-1)
        return ops.Add(difference * self.scale) if difference.any() else None


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

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        return ops.Mix(read(self.adapter, self.key).reshape(-1), self.weight) if self.weight else None


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

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        rows = read(self.adapter, self.key)
        return ops.Rows(rows, tuple(enumerate(self.indices)), self.weight, self.cols) if self.weight else None


def to_data(update: Update) -> dict[str, Any]:
    """An update as plain data for a plan or a receipt."""
    own = getattr(update, "data", None)  # of updates that hold more than plain data
    if own is not None:
        return dict(own())
    return {"kind": update.kind, **asdict(cast(Any, update))}


def from_data(data: Mapping[str, Any]) -> Update:
    """The update that `to_data` gave this data for, of the kinds that only add (`only_adds`).

    Raises:
        ValueError: it is no such data.
    """
    try:
        fields = {name: value for name, value in data.items() if name != "kind"}
        if data["kind"] == "difference" and "key" in fields:
            return Difference(**_typed(fields, adapter=int, module=str, key=str, scale=float))
        if "pick" in fields:
            how, at, of = fields["pick"]
            made = _typed(fields, adapter=int, module=str, A=str, B=str, scale=float, rank=int, part=dict, pick=list)
            return LowRank(**made | {"pick": Pick(str(how), int(at), int(of)), "part": _part(fields["part"])})
        context = fields["context"]
        return ByKind(
            kind=str(data["kind"]),
            adapter=int(fields["adapter"]),
            module=str(fields["module"]),
            factors=tuple((str(name), str(key)) for name, key in fields["factors"]),
            context=Context(
                tuple(map(int, context["shape"])),
                float(context["scale"]),
                float(context["weight"]),
                dict(context["options"]),
            ),
            view=view_from_data(fields["view"]),
            part=int(fields["part"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no update: {error}") from None


def _typed(fields: Mapping[str, Any], **types: type) -> dict[str, Any]:
    """The fields, each of its type and no others (whole numbers are floats too)."""
    if fields.keys() != types.keys():
        raise ValueError(f"fields {sorted(fields)}")
    for name, kind in types.items():
        wanted = (int, float) if kind is float else (kind,)
        if not isinstance(fields[name], wanted) or isinstance(fields[name], bool):
            raise ValueError(f"{name} is {fields[name]!r}")
    return dict(fields)


def view_from_data(data: Mapping[str, Any]) -> View:
    """The view that `asdict` gave this data for.

    Raises:
        ValueError, KeyError, TypeError: it is no such data.
    """
    return View(tuple(map(int, data["shape"])), tuple(_part(part) for part in data["parts"]))


def _part(data: Mapping[str, Any]) -> Part:
    place = data["place"]
    numbers = [int(place[name]) for name in ("begin", "rows", "cols", "c0", "c1", "step")]
    takes = tuple(Take(*(int(n) for n in take)) for take in data["take"])
    if min(numbers) < 0 or any(t.start < 0 or t.step < 1 for t in takes):
        raise ValueError("a place lies outside")
    return Part(str(data["tensor"]), Place(*numbers), bool(data["flipped"]), takes)


def only_adds(update: Update) -> bool:
    """Whether it adds something that does not depend on the weight, so that it can be subtracted again."""
    together: bool | None = getattr(update, "computes_again", None)
    if together is not None:
        return together
    if isinstance(update, LowRank | Difference):
        return True
    if not isinstance(update, ByKind):
        return False
    return bool(KINDS[update.kind].additive) and update.magnitude is None and update.bias_of is None


def apply_earlier(
    whole: Tensor, updates: tuple[Update, ...], before: Update, read: ReadFactor, weights: Weights
) -> None:
    """Applies to a whole flat tensor those of its updates that come before all updates of `before`'s module.

    Updates that several adapters make together are made of what each does to the base: none comes before them.
    """
    if hasattr(before, "uses"):
        return
    original = None if in_place(updates) else whole.clone()
    for update in updates:
        if (update.adapter, update.module) == (before.adapter, before.module):
            return
        operator = update.operator(read, weights)
        if operator is not None:
            operator.apply(whole, 0, whole if original is None else original)


def uses(update: Update) -> tuple[tuple[int, str], ...]:
    """(adapter, key) of every factor that an update needs."""
    together: tuple[tuple[int, str], ...] | None = getattr(update, "uses", None)
    return tuple((update.adapter, key) for key in update.keys) if together is None else together


def in_place(updates: tuple[Update, ...]) -> bool:
    """Whether no operator looks at the original weight after another has changed it, so none need be kept."""
    return len(updates) < 2 or not any(isinstance(u, DoRA | Blend | TokenRows) for u in updates)
