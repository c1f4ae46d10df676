"""Methods on the way into a base: the updates that several adapters make to one matrix become one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from loramerge.adapters.kinds.lowrank import LowRankPair
from loramerge.adapters.updates import (
    ByKind,
    LowRank,
    Pick,
    ReadFactor,
    Update,
    Weights,
    only_adds,
    to_data,
    view_from_data,
)
from loramerge.adapters.updates import from_data as update_from_data
from loramerge.binding.binding import Binding
from loramerge.errors import UnsupportedError, UsageError
from loramerge.merging.products import Products
from loramerge.merging.sites import Member, Shapes, Site, Window, is_member, sites_of
from loramerge.methods import Chosen, chosen
from loramerge.tensors.text import plural, quoted, some

if TYPE_CHECKING:
    from loramerge.adapters.operators import Operator
    from loramerge.merging.stream import FactorFile

T = TypeVar("T")

LINEAR = "linear"
"""The method that needs none of this: every update is added by itself."""

BLOCK_ELEMENTS = 1 << 22
"""Elements that `loramerge.algebra.thresholds` looks at at once."""

BYTES_OF_BLOCK, BYTES_WHOLE, BYTES_TURNED = 40, 32, 12
"""Memory for each of these elements, for each element of an update without factors, and of a turned matrix."""

ORDERED = ("della",)
"""Methods that rank numbers."""

KEPT = 4
"""Sites of several parts whose result is kept."""

MEANS = ("slerp", "karcher", "model_stock")
"""Methods for whose result an adapter counts that does nothing to a matrix."""


@dataclass(frozen=True, eq=False)
class Combined:
    """`W' = W + M`, M what a method that acts element by element makes of the updates `W'_i - W` of several adapters.

    Updates that look at the weight see the base's, each by itself. `part`: which part of the site the tensor has.
    """

    kind: ClassVar[str] = "combined"
    site: Site
    part: int
    how: Chosen
    all: Sites = field(repr=False)

    @property
    def adapter(self) -> int:
        """The first adapter that takes part."""
        return next(self._updates()).adapter

    @property
    def module(self) -> str:
        return self.site.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the first adapter; `uses` are all."""
        return tuple(dict.fromkeys(key for adapter, key in self.uses if adapter == self.adapter))

    @property
    def uses(self) -> tuple[tuple[int, str], ...]:
        """(adapter, key) of every factor that takes part."""
        return tuple(dict.fromkeys((update.adapter, key) for update in self._updates() for key in update.keys))

    def _updates(self) -> Iterator[Update]:
        return (update for of in self.site.members for member in of for update in member.updates)

    @property
    def looks_at_weights(self) -> bool:
        """Whether some member depends on the weight."""
        return not all(map(only_adds, self._updates()))

    @property
    def held_bytes(self) -> int:
        """Memory that finding thresholds takes, and what is held whole: an estimate from headers."""
        elements = self.site.view.rows * self.site.view.cols
        parts = self.site.view.parts
        held = sum(BYTES_WHOLE for update in self._updates() if not isinstance(update, LowRank))
        held += BYTES_TURNED if any(part.flipped for part in parts) else 0
        return BYTES_OF_BLOCK * min(elements, BLOCK_ELEMENTS) + held * elements

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        from loramerge.merging.mixing import operator

        return operator(self, read, weights)

    @property
    def computes_again(self) -> bool:
        """Whether the same comes out from factors alone, on another machine too.

        Not where a result hangs on the order of numbers that may be equal but for their last bits.
        """
        return not self.looks_at_weights and self.how.name not in ORDERED

    def data(self) -> dict[str, Any]:
        """As plain data, for plans and undo files. See `from_data`."""
        of = [
            {
                "adapter": i,
                "updates": [to_data(update) for update in member.updates],
                **({"cuts": [list(cut) for cut in member.cuts]} if member.cuts else {}),
            }
            for i, members in enumerate(self.site.members)
            for member in members
        ]
        thresholds = self.all.thresholds
        return {
            "kind": self.kind,
            "method": self.how.name,
            "options": dict(self.how.options),
            "module": self.module,
            "view": asdict(self.site.view),
            "part": self.part,
            "adapters": len(self.site.members),
            "of": of,
            **({} if thresholds is None else {"thresholds": thresholds}),
        }


def from_data(data: Mapping[str, Any]) -> Update:
    """The update that `to_data` gave this data for, of those that can be computed again.

    Raises:
        ValueError: it is no such data.
    """
    if data.get("kind") != Combined.kind:
        return update_from_data(data)
    try:
        view, part = view_from_data(data["view"]), int(data["part"])
        members: list[list[Member]] = [[] for _ in range(int(data["adapters"]))]
        for of in data["of"]:
            updates = tuple(update_from_data(update) for update in of["updates"])
            cuts = tuple(Window(*map(int, cut)) for cut in of.get("cuts", ()))
            if len(updates) != len(view.parts) or len(cuts) not in (0, len(updates)):
                raise ValueError("a member has another number of parts")
            members[int(of["adapter"])].append(Member(updates, cuts))
        how = chosen(str(data["method"]), data["options"])
        if not how.full_rank or not 0 <= part < len(view.parts) or not any(members):
            raise ValueError("no update of full rank")
        site = Site(str(data["module"]), view, tuple(tuple(of) for of in members))
        sites = Sites((site,))
        if "thresholds" in data:
            thresholds = [float(x) for x in data["thresholds"]]
            sites.once("thresholds", lambda: thresholds)
        return Combined(site, part, how, sites)
    except (KeyError, TypeError, AttributeError, IndexError, UsageError) as error:
        raise ValueError(f"no update: {error}") from None


@dataclass(eq=False)
class _Once:
    """A value that one thread makes while others wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False
    value: Any = None


@dataclass(eq=False)
class Sites:
    """All sites of a merge, and what was found out about all of them together."""

    each: tuple[Site, ...] = ()
    _known: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _made: OrderedDict[Any, _Once] = field(default_factory=OrderedDict)

    @property
    def thresholds(self) -> list[float] | None:
        """Those of whole adapters, where they were found."""
        found: list[float] | None = self._known.get("thresholds")
        return found

    def once(self, what: str, find: Callable[[], T]) -> T:
        """What `find` finds, which is asked by the first thread that needs it."""
        with self._lock:
            if what not in self._known:
                self._known[what] = find()
            found: T = self._known[what]
            return found

    def made(self, site: Site, about: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes of a site, kept for its other parts for a while."""
        if len(site.view.parts) == 1:
            return make()
        with self._lock:
            once = self._made.setdefault((id(site), about), _Once())
            self._made.move_to_end((id(site), about))
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        with once.lock:
            if not once.done:
                once.value, once.done = make(), True
            return once.value


def combined(
    binding: Binding, how: Chosen, adapters: Sequence[tuple[FactorFile, float]], compute_dtype: str
) -> Binding:
    """A binding whose updates a method has combined; the same for `linear`.

    Matrices are combined, and parameters with one axis as matrices of one column; methods on factors sum those. Whole
    tensors that adapters bring, and rows of embeddings, are taken as a linear merge takes them.

    What has full rank becomes `Combined` updates, everything else low-rank ones whose factors are computed when they
    are read: those of one more adapter, `Binding.products`.

    Args:
        binding: what each adapter does by itself.
        how: the method.
        adapters: with their weights.
        compute_dtype: of the merge.

    Raises:
        UnsupportedError: `method.needs-factors`, `method.needs-pairs`, `method.ranks`, `method.layout`.
    """
    if how.name == LINEAR:
        return binding
    shapes = _shapes(binding)
    taking = {
        name: [u for u in own if is_member(u)]
        for name, own in binding.updates.items()
        if not how.method.factors or _axes(shapes[name]) > 1
    }
    sites = Sites(tuple(sites_of({name: own for name, own in taking.items() if own}, shapes, len(adapters))))
    for site in sites.each:
        _check(site, how)
    products = None
    updates: dict[str, list[Update]] = {}
    if not how.full_rank and sites.each:
        dtype = "F64" if compute_dtype == "float64" else "F32"
        products = Products([adapter for adapter, _ in adapters], sites.each, how, dtype)
    for number, site in enumerate(sites.each):
        for i, part in enumerate(site.view.parts):
            update: Update = Combined(site, i, how, sites)
            if products is not None:
                update = LowRank(len(adapters), site.name, *products.keys_of(number), 1.0, 0, Pick(), part)
            updates.setdefault(part.tensor, []).append(update)
    made: dict[str, list[Update]] = {}
    for name, own in binding.updates.items():
        rest = [u for u in own if name not in taking or not is_member(u)]
        made[name] = [*updates.get(name, ()), *rest]
    notes = [*binding.notes, *_notes(binding, how, shapes, sites)]
    return replace(binding, updates=made, notes=notes, products=products)


def factor_files(binding: Binding, adapters: Sequence[T]) -> list[T]:
    """What the updates of a binding name by number: the adapters, and after them what a method made of them."""
    return [*adapters, *([] if binding.products is None else [binding.products])]


def distances(binding: Binding) -> dict[str, float]:
    """Of a merge that ran with a method on factors: for each matrix how far the result is from the sum of updates,
    relative to that."""
    found = {} if binding.products is None else binding.products.distances
    return {name: float(f"{distance:.6g}") for name, distance in sorted(found.items())}


def notes_after(binding: Binding) -> list[str]:
    """What is to be said after a merge: the worst distance."""
    found = distances(binding)
    if not found or binding.products is None:
        return []
    worst = max(found, key=lambda site: found[site])
    return [
        f"{binding.products.name} acts on factors: what it gives is not the sum of the updates but up to "
        f"{found[worst]:.2f} of its norm away from it ({quoted(worst)})"
    ]


def _shapes(binding: Binding) -> Shapes:
    """The shapes of changed tensors as updates see them."""
    found = {}
    for name in binding.updates:
        new = binding.replaced.get(name)
        shape = binding.names[name].shape if new is None else new.factor.shape
        found[name] = binding.grown.get(name, shape)
    return found


def _axes(shape: tuple[int, ...]) -> int:
    return len([n for n in shape if n != 1])


def _notes(binding: Binding, how: Chosen, shapes: Shapes, sites: Sites) -> list[str]:
    vectors = [n for n, own in binding.updates.items() if _axes(shapes[n]) < 2 and any(map(is_member, own))]
    notes = []
    if vectors and how.method.factors:
        notes.append(f"{plural(len(vectors), 'parameter')} with one axis have no factors for {how.name}: summed")
    alone = [site for site in sites.each if not all(site.members)]
    if alone and how.name in MEANS:
        notes.append(
            f"{len(alone)} of {plural(len(sites.each), 'module')} are not changed by every adapter: "
            f"the others count as zero in the mean that {how.name} takes"
        )
    whole = [name for name, own in binding.updates.items() if not all(map(is_member, own))]
    if whole := [*binding.replaced, *(name for name in whole if name not in binding.replaced)]:
        notes.append(f"{how.name} leaves alone what adapters bring whole: {some(whole)}")
    return notes


def _check(site: Site, how: Chosen) -> None:
    """Raises where a method cannot take a member of a site."""
    if how.full_rank and how.options.get("trim") != "adapter":
        return
    for update in (u for of in site.members for member in of for u in member.updates):
        if not only_adds(update):
            trims = how.full_rank
            raise UnsupportedError(
                "method.needs-factors",
                f"{quoted(update.module)} is of the kind {update.kind}, which depends on the weight: it has no factors "
                f"for {how.name}" + (" --trim adapter" if trims else ""),
                fix="--trim tensor"
                if trims
                else "--method ties, dare, ... --space full; or make a low-rank adapter "
                "of it first: loramerge convert ADAPTER --to DIALECT --base BASE --rank N",
                tensors=[part.tensor for part in site.view.parts],
            )
        pair = isinstance(update, LowRank) or (isinstance(update, ByKind) and update.kind == LowRankPair.name)
        if how.method.factors and not pair:
            raise UnsupportedError(
                "method.needs-pairs",
                f"{quoted(update.module)} is of the kind {update.kind}, and {how.name} acts on the factors of pairs",
                fix="take a method that acts on updates, such as --method linear",
                tensors=[part.tensor for part in site.view.parts],
            )
    if how.method.factors:
        _check_ranks(site, how)


def _check_ranks(site: Site, how: Chosen) -> None:
    ranks = {u.rank for of in site.members for m in of for u in m.updates if isinstance(u, LowRank)}
    if len(ranks) > 1 or any(len(of) > 1 for of in site.members):
        raise UnsupportedError(
            "method.ranks",
            f"{quoted(site.name)} has ranks {', '.join(map(str, sorted(ranks)))}, and {how.name} needs equal ones",
            fix="take a method that acts on updates, such as --method linear",
            tensors=[part.tensor for part in site.view.parts],
        )
