"""What the modules of adapters do to a site, in float64: as factors where their kind has some, else as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramerge.adapters import operators as ops
from loramerge.adapters.kinds.base import Product, RowDelta
from loramerge.adapters.kinds.hadamard import Hadamard
from loramerge.adapters.kinds.kronecker import Kronecker
from loramerge.adapters.updates import ByKind, LowRank, ReadFactor, Update, Weights, only_adds
from loramerge.adapters.views import Take, View
from loramerge.algebra import factored
from loramerge.algebra.core import Factors, content_key
from loramerge.algebra.peft_compat import Weighted
from loramerge.merging.sites import Member, Site, part_of
from loramerge.merging.tiles import Tiles

if TYPE_CHECKING:
    from loramerge.merging.methods import Combined

CPU = torch.device("cpu")


class Exact:
    """Reads factors in float64, where blocks are. `dtype`, `device`: what and where the merge computes."""

    def __init__(self, read: ReadFactor, update: Combined | None) -> None:
        self._read = read
        self.dtype, self.device = torch.float64, CPU
        if update is not None:
            found = [read(*use) for use in update.uses[:1]]
            found += [read(*use) for use in update.uses if not found[0].is_floating_point()]
            one = next((tensor for tensor in found if tensor.is_floating_point()), None)
            self.dtype = torch.float32 if one is None else one.dtype
            self.device = found[0].device
        self.at = CPU if self.device.type == "mps" else self.device

    def stored(self, adapter: int, key: str) -> Tensor:
        """A factor as it was read."""
        return self._read(adapter, key).to(self.at)

    def __call__(self, adapter: int, key: str) -> Tensor:
        tensor = self.stored(adapter, key)
        return tensor.double() if tensor.is_floating_point() else tensor

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.at)


class Look:
    """How updates that look at weights see them: the base's, in float64, whatever else changes them."""

    def __init__(self, weights: Weights, update: Combined) -> None:
        self._weights, self._update = weights, update

    def whole(self, tensor: str, at: torch.device) -> Tensor:
        """A stored tensor, flat."""
        return self._weights.before(tensor, self._update).to(at).double()

    def of(self, tensor: str, at: torch.device) -> Weights:
        """As an update of this tensor may see them."""
        return _Base(self, tensor, at)


class _Base:
    """See `adapters.updates.Weights`."""

    def __init__(self, look: Look, tensor: str, at: torch.device) -> None:
        self._look, self._tensor, self._at = look, tensor, at

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self._look.whole(self._tensor, self._at)

    def before(self, tensor: str, update: Update) -> Tensor:
        return self._look.whole(tensor, self._at)


def array_of(member: Member, site: Site, exact: Exact, look: Look | None) -> Any:
    """A member's change of the site as factors or an array of rows; None where it changes nothing."""
    if (factors := _factors(member, exact)) is not None:
        return factors if factors.rank else None
    first = member.updates[0]
    if look is not None and isinstance(first, ByKind) and only_adds(first) and _is_whole(member):
        form = first.form(exact, _nothing)
        if form is None:
            return None
        if isinstance(form, RowDelta):
            return _Rows(Tiles(form.rows, site.view.rows).rows, (site.view.rows, site.view.cols), _key(member, exact))
    dense = _dense(member, site.view, exact, look)
    if dense is None:
        return None
    if look is not None:
        return _Rows(lambda i, j: dense[i:j], (site.view.rows, site.view.cols), _key(member, exact))
    eye = torch.eye(min(dense.shape), dtype=dense.dtype, device=dense.device)
    b, a = (eye, dense) if dense.shape[0] < dense.shape[1] else (dense, eye)
    return Factors(b, a, _key(member, exact))


def _is_whole(member: Member) -> bool:
    """Whether a member's matrix is the site's, row by row."""
    if member.cuts:
        return False
    first = member.updates[0]
    if len(member.updates) > 1 or not isinstance(first, ByKind):
        return True
    return len(first.view.parts) == 1 and first.view.parts[0].take == (Take(0, first.view.rows),)


def _factors(member: Member, exact: Exact) -> Factors | None:
    """The change as factors, scale and weight in b; None where its kind has none. Rank 0 for no change."""
    update = member.updates[0]
    if isinstance(update, LowRank):
        A, B = _picked(update, exact)
        factors = Factors(B * update.scale, A, content_key(B, A))
    elif isinstance(update, ByKind) and only_adds(update):
        found = _product(update, exact)
        if found is None:
            return None
        factors = Factors(found.b, found.a, _key(member, exact))
    else:
        return None
    b, a = _cut(member, factors.b, factors.a)
    if not (bool(b.any()) and bool(a.any())):
        b, a = b[:, :0], a[:0]
    return Factors(b, a, factors.key)


def _product(update: ByKind, exact: Exact) -> Factors | None:
    """An update that adds as a product, where it is one of a lower rank than the weight's sides."""
    f = {name: exact(update.adapter, key) for name, key in update.factors}
    scale, shape = update.context.scale * update.context.weight, update.context.shape
    found: Factors | None = None
    if update.kind == Hadamard.name and "t1" not in f:
        one, two = (Factors(f[f"w{n}_a"].flatten(1), f[f"w{n}_b"].flatten(1)) for n in "12")
        if one.rank * two.rank < min(update.view.rows, update.view.cols):
            found = factored.hadamard(one, two).scaled(scale)
    elif update.kind == Kronecker.name and "t2" not in f and not update.context.options.get("trailing"):
        first = f["w1"] if "w1" in f else (f["w1_a"], f["w1_b"])
        second = f["w2"].flatten(1) if "w2" in f else (f["w2_a"].flatten(1), f["w2_b"].flatten(1))
        found = factored.kronecker(first, second).scaled(scale)
    else:
        form = update.form(exact, _nothing)
        if form is None:
            return Factors(exact.zeros(shape[0] if shape else 1, 0), exact.zeros(0, update.view.cols))
        if isinstance(form, Product):
            found = Factors(form.L, form.R)
    fits = found is not None and found.shape == (update.view.rows, update.view.cols)
    return found if fits else None


class _NoWeights:
    """Updates that only add look at no weight."""

    def blocks(self) -> Any:
        raise AssertionError("an update that only adds looked at the weight")

    def before(self, tensor: str, update: Update) -> Tensor:
        raise AssertionError("an update that only adds looked at the weight")


_nothing = _NoWeights()


def weighted_of(member: Member, exact: Exact) -> Weighted:
    """A pair as it is, with its scale beside it."""
    update = member.updates[0]
    if isinstance(update, LowRank):
        A, B = _picked(update, exact)
        scale, key = update.scale, content_key(B, A)
    else:
        assert isinstance(update, ByKind)
        f = {name: exact(update.adapter, k) for name, k in update.factors}
        A, B = f["A"].flatten(1), f["B"].flatten(1)
        scale, key = update.context.scale * update.context.weight, content_key(B, A)
    return Weighted(*_cut(member, B, A), scale, 1.0, key)


def _picked(update: LowRank, exact: Exact) -> tuple[Tensor, Tensor]:
    """A and B of one expert, or slot, of a file's factors: only those become float64."""
    A, B = update.picked(exact.stored(update.adapter, update.A), exact.stored(update.adapter, update.B))
    return A.double(), B.double()


def _cut(member: Member, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Of the factors of a module's whole matrix those of the site."""
    parts = [part_of(update) for update in member.updates]
    if not member.cuts:
        return (ops.taken(b, parts[0]) if len(parts) == 1 and parts[0] is not None else b), a
    pieces = []
    for part, (r0, r1, _, _) in zip(parts, member.cuts, strict=True):
        assert part is not None  # a whole tensor has no factors
        pieces.append(ops.taken(b, part)[r0:r1])
    _, _, c0, c1 = member.cuts[0]
    return torch.cat(pieces), a[:, c0:c1]


def _dense(member: Member, view: View, exact: Exact, look: Look | None) -> Tensor | None:
    """`W'_i - W` as a matrix (rows, columns) of the site, whole, whatever the kind; None for no change."""
    ends: dict[str, int] = {}
    for part in view.parts:
        end = part.place.begin + part.place.rows * part.place.cols
        ends[part.tensor] = max(end, ends.get(part.tensor, 0))
    bases: dict[str, Tensor] = {}
    flats: dict[str, Tensor] = {}
    seen: set[tuple[str, int]] = set()
    for own, part in zip(member.updates, view.parts, strict=True):
        if (part.tensor, id(own)) in seen:
            continue  # several parts of the site are of one update
        seen.add((part.tensor, id(own)))
        made = own.operator(exact, _nothing if look is None else look.of(part.tensor, exact.at))
        if part.tensor not in flats:
            if look is None or only_adds(own):
                bases[part.tensor] = exact.zeros(ends[part.tensor])
            else:
                bases[part.tensor] = look.whole(part.tensor, exact.at)
            flats[part.tensor] = bases[part.tensor].clone()
        if made is not None:
            made.apply(flats[part.tensor], 0, bases[part.tensor])
    for name, flat in flats.items():
        flat -= bases[name]
    return ops.gather(view, flats) if any(bool(flat.any()) for flat in flats.values()) else None


def _key(member: Member, exact: Exact) -> bytes:
    """What tells the adapter's random numbers here: its factors, without the weight."""
    first = member.updates[0]
    return content_key(*(exact(first.adapter, key) for key in first.keys))


class _Rows:
    """An array (m, n) by rows, of an adapter that a key tells (`algebra.thresholds.Array`)."""

    def __init__(self, rows: Callable[[int, int], Tensor], shape: tuple[int, int], identity: bytes) -> None:
        self.rows, self.shape, self.identity = rows, shape, identity


def sum_of(arrays: Sequence[Any]) -> Any:
    """What several members of one adapter add up to."""
    found = [array for array in arrays if array is not None]
    if len(found) < 2:
        return found[0] if found else None
    key = b"".join(sorted(array.identity for array in found))
    if all(isinstance(array, Factors) for array in found):
        return Factors(torch.cat([f.b for f in found], 1), torch.cat([f.a for f in found]), key)

    def rows(start: int, stop: int) -> Tensor:
        total: Tensor = found[0].rows(start, stop).clone()
        for array in found[1:]:
            total += array.rows(start, stop)
        return total

    return _Rows(rows, found[0].shape, key)
