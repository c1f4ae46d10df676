"""Items under the names and shapes of a base: renamed, cut where its layout splits a module, joined where it fuses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loramerge.adapters import operators as ops
from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.updates import ByKind, DoRA, LowRank, Update
from loramerge.adapters.views import Part, View
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import slots_of
from loramerge.converting.factors import as_pair, low_rank, unstacked
from loramerge.converting.homes import Home, Homes, cells
from loramerge.converting.items import PAIR, Item, read_tensor
from loramerge.converting.naming import same_path
from loramerge.converting.target import Target
from loramerge.errors import UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.text import quoted

JOINED, CUT, REORDERED = "joined", "cut", "reordered"


@dataclass(frozen=True)
class _Piece:
    """Rows `rows` of a home's weight change by s B A, B (len(rows), r), A (r, in * prod(kernel))."""

    home: Home
    item: Item
    rows: tuple[int, ...]
    B: Tensor
    A: Tensor


class Rebase:
    """One conversion with a base: what the adapter changes there, and how the target names it.

    Raises:
        MismatchError, UnsupportedError: see `loramerge.binding.bind`: every tensor of the adapter has a home.
    """

    def __init__(
        self, adapter: Adapter, base: Checkpoint, target: Target, include: Sequence[str], exclude: Sequence[str]
    ) -> None:
        self.adapter = adapter
        self.base = base
        shapes = {name: (t.info.dtype, t.info.shape) for name, t in base.tensors.items()}
        self.binding: Binding = bind(
            slots_of(shapes), base.config, [(adapter, 1.0)], include=include, exclude=exclude, base_name=base.name
        )
        self.homes = Homes(self.binding, target)

    def items(self, pairs: Iterable[tuple[Module, Item]], rank: int | None) -> list[Item]:
        """Items as modules of the target's layout.

        Raises:
            UnsupportedError: `convert.fused` for a kind that has no exact factors on a part of a module or on several.
        """
        updates: dict[str, list[tuple[str, Update]]] = defaultdict(list)
        for stored, found in self.binding.updates.items():
            for update in found:
                updates[update.module].append((stored, update))
        made: list[Item] = []
        pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for module, item in pairs:
            keys = {f.key for f in module.factors.values()}
            own = [(stored, u) for stored, u in updates[module.path] if keys & set(u.keys)]
            parts = [(part, u) for _, u in own if (part := _part(u)) is not None]
            if not parts:  # no product of a weight: a difference, rows of tokens
                made.append(self.placed(item, own[0][0] if own else ""))
                continue
            view, home = self._exact(parts)
            if home is not None and view is not None:
                made.append(self._at(item, home, view, parts[0][1]))
                continue
            if (reordered := self._reordered(item, parts)) is not None:
                made.append(reordered)
                continue
            for piece in self._pieces(item, parts, rank):
                pieces[piece.home.role, piece.home.path].append(piece)
        return made + [_joined(group) for group in pieces.values()]

    def plain(self, items: Iterable[Item]) -> list[Item]:
        """Whole parameters under the names of the target's layout."""
        homes = {replaced.path: stored for stored, replaced in self.binding.replaced.items()}
        return [self.placed(item, homes.get(f"{item.path}.{item.leaf}", "")) for item in items]

    def placed(self, item: Item, stored: str) -> Item:
        """An item that changes a stored parameter as a whole."""
        if stored not in self.binding.names:
            return item
        home = self.homes.exact(_view(self.binding, stored))
        return item if home is None else replace(_named(item, home), leaf=item.leaf and home.leaf)

    def _exact(self, parts: Sequence[tuple[Part, Update]]) -> tuple[View | None, Home | None]:
        """The view that one module changes, and the module of the target that it is, where it is one."""
        first = parts[0][1]
        if isinstance(first, ByKind):
            view = first.view
        elif all(isinstance(u, DoRA) or (isinstance(u, LowRank) and u.pick.how == "whole") for _, u in parts):
            rows = sum(len(take) for part, _ in parts for take in part.take)
            place = parts[0][0].place
            cols = place.rows if parts[0][0].flipped else place.width
            view = View((rows, cols), tuple(part for part, _ in parts))
            if len(parts) == 1 and not parts[0][0].flipped:
                shape = self._shape(parts[0][0].tensor)
                view = View((rows, *shape[1:]), view.parts) if len(shape) > 2 else view
        else:
            return None, None
        return view, self.homes.exact(view)

    def _reordered(self, item: Item, parts: Sequence[tuple[Part, Update]]) -> Item | None:
        """A pair whose rows are those of one module in another order, its magnitude's along with them; None else."""
        if item.kind != PAIR or "A" not in item.factors:
            return None
        low = parts[0][1].low if isinstance(parts[0][1], DoRA) else parts[0][1]
        rows = cells(part for part, _ in parts)
        owners = list(self.homes.owners(View((), tuple(part for part, _ in parts))))
        homes = [(home, owned) for home, owned in owners if owned.keys() == rows.keys()]
        if (
            (isinstance(low, LowRank) and low.pick.how != "whole")
            or len(homes) != 1
            or item.factors["B"].shape[0] != len(rows)
        ):
            return None
        home, owned = homes[0]
        order = torch.empty(len(rows), dtype=torch.long)
        for cell, row in owned.items():
            order[row] = rows[cell]
        factors = {n: f if n == "A" else f[order] for n, f in item.factors.items()}
        magnitude = item.magnitude
        if magnitude is not None and magnitude.axis == "output":
            magnitude = replace(magnitude, vector=magnitude.vector[order])
        made = replace(item, factors=factors, magnitude=magnitude, how=REORDERED)
        return self._at(made, home, home.view, parts[0][1])

    def _shape(self, stored: str) -> tuple[int, ...]:
        return self.binding.grown.get(stored, self.binding.names[stored].shape)

    def _at(self, item: Item, home: Home, view: View, update: Update) -> Item:
        """An item that changes the whole weight of one module: named, its shape and scale known."""
        if home.leaf not in self.homes.target.dialect.leaves:
            raise UnsupportedError(
                "convert.leaf",
                f"{self.homes.target.title} has no name for {quoted(home.path)}.{home.leaf}, which is no weight",
                fix="leave it out with --exclude, or merge it instead",
                file=self.adapter.name,
                tensors=[item.module],
            )
        made = replace(_named(item, home), shape=view.shape, exact_shape=True)
        if isinstance(update, ByKind):
            made = replace(made, scale=update.context.scale, options=update.context.options)
        else:
            low = update.low if isinstance(update, DoRA) else update
            assert isinstance(low, LowRank)
            made = replace(made, scale=low.scale)
        if made.options.get("scaled") is False:
            made = replace(made, scale=1.0)
        if view.parts[0].flipped and self.binding.names.families.is_vocabulary(home.path):
            made = _as_embedding(made)
        elif made.kind == PAIR and "A" in made.factors:
            made = replace(made, factors={**made.factors, **_shaped(made.factors["B"], made.factors["A"], view.shape)})
        return replace(made, weight=self._reader(view))

    def _reader(self, view: View) -> Callable[[], Tensor] | None:
        located = {part.tensor: self.base.tensors.get(self.binding.names[part.tensor].source) for part in view.parts}
        if self.binding.grown.keys() & located.keys() or None in located.values():
            return None

        def read() -> Tensor:
            flat = {n: read_tensor(t, self.base.name).double().flatten() for n, t in located.items() if t is not None}
            return ops.gather(view, flat)

        return read

    def _pieces(self, item: Item, parts: Sequence[tuple[Part, Update]], rank: int | None) -> Iterable[_Piece]:
        """What an item does to the rows of each module of the target."""
        for part, update in parts:
            if isinstance(update, DoRA) or item.magnitude is not None or {"bias", "embedding-A"} & item.factors.keys():
                raise self._no_factors(item, part)
            B, A, scale = self._product(item, part, update, rank)
            if not part.flipped and part.place.width != part.place.cols:
                raise self._no_factors(item, part)
            rows = cells([part])
            left = len(rows)
            for home, owned in self.homes.owners(View((), (part,))):
                here = [(row, owned[cell]) for cell, row in rows.items() if cell in owned]
                if not here or len(home.view.shape) < 2:
                    continue
                left -= len(here)
                block = B[[row for row, _ in here]]
                if not block.any() and B.any():
                    continue  # a module that only its neighbours in the fused one change
                low_B, low_A = unstacked(block, A)
                yield _Piece(home, replace(item, scale=scale), tuple(row for _, row in here), low_B, low_A)
            if left:
                raise self._no_factors(item, part)

    def _product(self, item: Item, part: Part, update: Update, rank: int | None) -> tuple[Tensor, Tensor, float]:
        """B (rows that `part` takes from, r), A (r, ...) and s of one update."""
        if isinstance(update, LowRank):
            A, B = update.picked(item.factors["A"], item.factors["B"])
            return B, A, update.scale
        assert isinstance(update, ByKind)
        item = replace(item, shape=update.context.shape, scale=update.context.scale, options=update.context.options)
        if item.kind == PAIR:
            return item.factors["B"].flatten(1), item.factors["A"], item.scale
        split = as_pair(item)
        own = split is not None and split.own
        made = low_rank(item, None if own else rank) if own or rank else None
        if made is None:
            raise self._no_factors(item, part)
        return made.factors["B"].flatten(1), made.factors["A"], made.scale

    def _no_factors(self, item: Item, part: Part) -> UnsupportedError:
        additive = as_pair(item) is not None
        return UnsupportedError(
            "convert.fused",
            f"{quoted(item.module)} ({item.kind}) is no whole module where {quoted(part.tensor)} of the base lies, and "
            "its kind has no factors for a part",
            fix="--rank N writes low-rank pairs"
            if additive
            else "give a base in the layout that it was trained on, or merge it instead",
            file=self.adapter.name,
            tensors=[part.tensor],
        )


def _view(binding: Binding, stored: str) -> View:
    from loramerge.adapters.views import whole_view

    return whole_view(stored, binding.names[stored].shape)


def _part(update: Update) -> Part | None:
    if isinstance(update, LowRank):
        return update.part
    if isinstance(update, DoRA):
        return update.low.part
    if isinstance(update, ByKind) and update.bias_of is None:
        return update.view.parts[update.part]
    return None


def _named(item: Item, home: Home) -> Item:
    """The item under the name of its home; its own where both are one name but for leading segments (one wraps the
    other: a model with its head, a model alone)."""
    if not home.role and not item.flat and same_path(item.path, home.path):
        return item
    return replace(item, role=home.role or item.role, path=home.path, flat=False)


def _as_embedding(item: Item) -> Item:
    """A pair on an embedding, by the names of its factors."""
    if item.kind != PAIR or "A" not in item.factors:
        return item
    return replace(item, factors={"embedding-A": item.factors["A"], "embedding-B": item.factors["B"]})


def _shaped(B: Tensor, A: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """A pair with as many axes as the weight: a 1x1 convolution's for a linear, or the other way."""
    ones = [1] * (len(shape) - 2)
    return {"A": A.reshape(A.shape[0], *shape[1:]), "B": B.reshape(B.shape[0], -1, *ones)}


def _joined(pieces: Sequence[_Piece]) -> Item:
    """The pieces of one module as one pair: A stacked, B block-diagonal; one A where all have the same."""
    first, home = pieces[0], pieces[0].home
    out = home.view.rows
    scales = {p.item.scale for p in pieces}
    scale = scales.pop() if len(scales) == 1 else 1.0
    dtype = first.item.dtype
    for piece in pieces[1:]:
        dtype = torch.promote_types(dtype, piece.item.dtype)
    own = [p.B if scale == p.item.scale else p.B.double() * p.item.scale for p in pieces]
    blocks = [(p.rows, B.to(dtype), p.A.to(dtype)) for p, B in zip(pieces, own, strict=True)]
    one = all(A.shape == blocks[0][2].shape and torch.equal(A, blocks[0][2]) for _, _, A in blocks)
    A = blocks[0][2] if one else torch.cat([A.flatten(1) for _, _, A in blocks])
    B = torch.zeros(out, A.shape[0], dtype=dtype)
    at = 0
    for rows, block, below in blocks:
        columns = slice(0, A.shape[0]) if one else slice(at, at + below.shape[0])
        B[list(rows), columns] += block
        at += below.shape[0]
    whole = len(pieces) == 1 and len(first.rows) == out
    return replace(
        _named(first.item, home),
        kind=PAIR,
        factors=_shaped(B, A, home.view.shape),
        scale=scale,
        magnitude=None,
        shape=home.view.shape,
        exact_shape=True,
        options={},
        how=CUT if whole else JOINED,
    )
