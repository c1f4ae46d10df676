"""What each adapter changes, by place: told from headers where no base is given, read one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter, Module, Plain
from loramerge.adapters.kinds import KINDS
from loramerge.binding.bind import selector
from loramerge.converting.items import PAIR, Item, item_of, read_factor, read_tensor
from loramerge.converting.naming import MAIN, same_path, with_roles
from loramerge.converting.rebase import Rebase
from loramerge.converting.target import Target
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.text import quoted

UPDATE, WHOLE, TOKENS = "update", "whole", "tokens"

TOKEN_ROWS = "token-rows"
WHOLES = ("plain", "replacement")
"""Kinds whose factor `value` takes the place of a parameter."""


class Key(NamedTuple):
    """One thing that adapters change: a parameter of a module of a component, by an update, whole, or in rows."""

    role: str
    path: str
    leaf: str
    what: str

    @property
    def name(self) -> str:
        """For people, and for masks of its own."""
        role = "" if self.role in ("", MAIN) else f"{self.role}:"
        return f"{role}{self.path}" + ("" if self.leaf == "weight" else f".{self.leaf}")


@dataclass
class Source:
    """One adapter: its weight, and where it changes what.

    `entries`: what it has for each key, in the order of the file. `display`: the path under which a key is written,
    where that is not the key's own; `flat`: the keys whose path has `_` for `.`; `modules`: the adapter's own path.
    """

    adapter: Adapter
    weight: float
    rebase: Rebase | None = None
    rank: int | None = None
    apart: bool = False
    """Whether stacked parameters may be written one by one."""
    entries: dict[Key, list[Module | Plain]] = field(default_factory=dict)
    display: dict[Key, str] = field(default_factory=dict)
    flat: set[Key] = field(default_factory=set)
    modules: dict[Key, str] = field(default_factory=dict)
    stored: dict[Key, str] = field(default_factory=dict)
    """Key of a whole parameter -> the tensor of the base that it replaces."""
    _last: tuple[Module, list[tuple[Item, list[Key]]]] | None = field(default=None, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def name(self) -> str:
        return self.adapter.name

    def items(self, key: Key) -> list[Item]:
        """What the adapter does there, factors read; nothing where it does nothing.

        Raises:
            InputError: factors that are not finite, and what else `item_of` tells.
        """
        found = []
        for entry in self.entries.get(key, ()):
            if isinstance(entry, Plain):
                found.append(replace(self._stub(entry), factors={"value": read_factor(self.adapter, entry.factor)}))
            else:
                found += [item for item, keys in self._held(entry) if key in keys]
        return found

    def nbytes(self, key: Key) -> int:
        """Of the factors that `items` reads."""
        return sum(
            factor.info.nbytes
            for entry in self.entries.get(key, ())
            for factor in ([entry.factor] if isinstance(entry, Plain) else entry.factors.values())
        )

    def before(self, key: Key) -> Tensor | None:
        """The base's own value of a parameter that the adapter replaces; None without a base."""
        name = self.stored.get(key)
        if self.rebase is None or name is None:
            return None
        located = self.rebase.base.tensors.get(self.rebase.binding.names[name].source)
        return None if located is None else read_tensor(located, self.rebase.base.name)

    def _stub(self, entry: Module | Plain) -> Item:
        """An item without its factors: what headers tell of its place."""
        if isinstance(entry, Plain):
            module, _, leaf = entry.path.rpartition(".")
            stub = Item(module, "plain", {}, leaf=leaf, path=module)
        else:
            stub = Item(entry.path, entry.kind, {}, leaf=entry.leaf, path=entry.path)
        return with_roles([stub], self.adapter.dialect)[0]

    def _held(self, module: Module) -> list[tuple[Item, list[Key]]]:
        """What `_read` gives, kept until another module is asked for: a module may be many places in a base."""
        with self._lock:
            if self._last is None or self._last[0] is not module:
                self._last = None
                self._last = module, list(self._read(module))
            return self._last[1]

    def _read(self, module: Module) -> Iterator[tuple[Item, list[Key]]]:
        """A module's items with their keys."""
        item = with_roles([item_of(self.adapter, module, has_base=self.rebase is not None)], self.adapter.dialect)[0]
        if self.rebase is None:
            yield item, _keys(item, "bias" in item.factors)
            return
        # Asked for as flattened, every item gets the name that the base gives it.
        for made in self.rebase.items([(module, replace(item, flat=True))], self.rank):
            here = replace(made, flat=item.flat and made.flat)
            yield here, _keys(here, "bias" in here.factors)

    def find(self, selected: Callable[[str], bool]) -> None:
        """Fills `entries` with what is selected."""
        for module in self.adapter.modules:
            if selected(module.path):
                self._check(module)
                self._find(module)
        plain = [p for p in self.adapter.plain if selected(p.path.rpartition(".")[0])]
        stubs = [self._stub(p) for p in plain]
        placed = list(stubs)
        if self.rebase is not None:
            moved = self.rebase.plain([replace(stub, flat=True) for stub in stubs])
            placed = [replace(m, flat=stub.flat and m.flat) for m, stub in zip(moved, stubs, strict=True)]
            homes = {replaced.path: stored for stored, replaced in self.rebase.binding.replaced.items()}
        for entry, stub, item in zip(plain, stubs, placed, strict=True):
            key = Key(item.role, item.path, item.leaf, WHOLE)
            self._add(key, entry, item.flat, stub)
            if self.rebase is not None and entry.path in homes:
                self.stored[key] = homes[entry.path]

    def _find(self, module: Module) -> None:
        stub = self._stub(module)
        if self.rebase is None:
            for key in _keys(stub, "bias" in module.factors):
                self._add(key, module, stub.flat, stub)
            return
        for item, keys in self._read(module):
            for key in keys:
                self._add(key, module, item.flat, stub)

    def _add(self, key: Key, entry: Module | Plain, flat: bool, stub: Item) -> None:
        held = self.entries.setdefault(key, [])
        if entry not in held:
            held.append(entry)
        self.modules.setdefault(key, stub.module)
        if flat:
            self.flat.add(key)
        if not key.role and not stub.flat and same_path(stub.path, key.path):
            self.display[key] = stub.path

    def _check(self, module: Module) -> None:
        """Raises for what cannot be combined."""
        kind = KINDS.get(module.kind)
        if kind is not None and hasattr(kind, "bias_form"):
            raise UnsupportedError(
                "combine.kind",
                f"{quoted(module.path)} ({module.kind}) changes a bias by what it is",
                fix="merge it into a base instead; or leave it out: --exclude GLOB",
                file=self.name,
                tensors=[module.path],
            )
        shapes = module.shapes()
        stacked = self.adapter.settings.get("target-parameters") or ()
        parents = {str(name).rpartition(".")[0] for name in stacked}
        wrapped = any(module.path == p or module.path.endswith(f".{p}") for p in parents if p)
        if stacked and "A" in shapes:  # of several experts, the factors have several times the rank
            wrapped |= shapes["A"][0] != self.adapter.claimed_rank(module.path)
        axes = module.kind == PAIR and {"A", "B"} <= shapes.keys() and shapes["A"][0] != _numel(shapes["B"][1:])
        if (wrapped or axes) and (self.rebase is None or not self.apart):
            raise UnsupportedError(
                "combine.stacked",
                f"{quoted(module.path)} changes stacked parameters (experts), which are not combined as a stack",
                fix="merge the adapters into the base: merge --method; --base BASE --to DIALECT writes each expert",
                file=self.name,
                tensors=[module.path],
            )


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _keys(item: Item, bias: bool) -> list[Key]:
    """What an item changes."""
    if item.kind in WHOLES:
        return [Key(item.role, item.path, item.leaf or "weight", WHOLE)]
    if item.kind == TOKEN_ROWS:
        return [Key(item.role, item.path, item.leaf or "weight", TOKENS)]
    keys = [Key(item.role, item.path, item.leaf or "weight", UPDATE)]
    if bias:
        keys.append(Key(item.role, item.path, "bias", UPDATE))
    return keys


def sources(
    adapters: Sequence[tuple[Adapter, float]],
    target: Target,
    base: Checkpoint | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rank: int | None = None,
    apart: bool = False,
) -> list[Source]:
    """Every adapter with what is selected of it.

    `apart`: stacked experts, whose own form no combination has, may be written one by one.

    Raises:
        MismatchError: `combine.none` for an adapter of which nothing is selected; those of a merge where a base is
            given. UnsupportedError: `combine.layers`, `combine.stacked`, `combine.kind`.
    """
    selected = selector(include, exclude)
    made = []
    for adapter, weight in adapters:
        if adapter.settings.get("layer-replication"):
            raise UnsupportedError(
                "combine.layers",
                "the adapter replicates layers, which no other adapter can say",
                fix="merge it instead",
                file=adapter.name,
            )
        rebase = None if base is None else Rebase(adapter, base, target, include, exclude)
        source = Source(adapter, weight, rebase, rank, apart)
        source.find(selected)
        if not source.entries:
            raise MismatchError(
                "combine.none",
                "no module of the adapter is selected",
                fix="see --include and --exclude",
                file=adapter.name,
            )
        made.append(source)
    return made


def vector(item: Item) -> Tensor:
    """What an item adds to a bias or a norm, float64."""
    if "diff" in item.factors:
        return item.factors["diff"].double()
    return item.factors["bias"].double() * item.scale


def widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of these."""
    made = dtypes[0]
    for dtype in dtypes[1:]:
        made = torch.promote_types(made, dtype)
    return made
