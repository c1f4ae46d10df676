"""Combining and resizing from end to end: opened, matched, computed place by place, written all or nothing."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from loramerge import pickled
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter
from loramerge.algebra import Factors, adapter_threshold, fixed, fold
from loramerge.algebra.threads import cores, one_thread
from loramerge.combining.computing import Cut, Made, Stored, gather, make, needs_rank, store
from loramerge.combining.matching import Slot, matched
from loramerge.combining.ranks import Ranks, of_budget
from loramerge.combining.reading import UPDATE, WHOLE, Source, sources
from loramerge.combining.report import Result, report
from loramerge.combining.settings import metadata_kept, settings_of
from loramerge.combining.wholes import Whole, whole
from loramerge.combining.writing import items_of
from loramerge.converting.from_pairs import Prepared, check_place, prepare
from loramerge.converting.items import Item
from loramerge.converting.target import Target, target_named, target_names
from loramerge.errors import UnsupportedError, UsageError
from loramerge.methods import Chosen, chosen
from loramerge.tensors.checkpoint import open_checkpoint
from loramerge.tensors.text import plural

Progress = Callable[[int, int], None]
"""Told bytes of factors done, and in all."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_JOBS = 4
HEADER_ENTRY = 96
"""Bytes that a tensor takes in the header of a file, beside the path of its module: a first guess."""
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How to combine; the flags of the command line under the same names."""

    to: str | None = None
    base: str | None = None
    dtype: str = "float32"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    alpha: float | None = None
    allow_pickle: bool = False
    force: bool = False
    dry_run: bool = False
    jobs: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    padded: bool = False
    """Whether factors below the stated rank are brought up to it with zeros."""

    def check(self) -> None:
        """Raises UsageError for values that mean nothing."""
        if self.dtype not in ("keep", *DTYPES):
            raise UsageError("usage.value", f"dtype is {self.dtype!r}", fix=f"one of keep, {', '.join(DTYPES)}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError("usage.value", f"jobs is {self.jobs}", fix="give a positive number")
        self.ranks.check()


def combine(
    adapters: Sequence[tuple[Any, float]],
    out: str,
    method: str,
    method_options: Mapping[str, Any],
    options: Options,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.combine`; `resize` is the sum of one adapter."""
    options.check()
    if not adapters:
        raise UsageError("usage.missing", "no adapter is given", fix="give one or more")
    how = chosen(method, method_options, count=len(adapters))
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise UsageError("usage.weight", f"the weight of {_path(adapter)} is {weight}")
    target = None if options.to is None else target_named(options.to)
    read_pickle = pickled.read_header if options.allow_pickle else None
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Adapter, float]] = []
        for adapter, weight in adapters:
            if not isinstance(adapter, Adapter):
                adapter = open_adapter(os.fspath(adapter), read_pickle=read_pickle, alpha=options.alpha)
                stack.callback(adapter.checkpoint.close)
            opened.append((adapter, weight))
        if target is None:
            target = own_target(opened[0][0])
        inputs = [*(str(_path(a)) for a, _ in adapters), *([options.base] if options.base else [])]
        check_place(out, target, inputs, force=options.force)
        base = None
        if options.base is not None:
            opening = open_checkpoint(options.base, read_pickle=read_pickle)
            base = stack.enter_context(contextlib.closing(opening))
        found = sources(
            opened,
            target,
            base,
            include=options.include,
            exclude=options.exclude,
            rank=options.ranks.rank,
            apart=options.to is not None,
        )
        job = _Job(found, matched(found), how, target, out, options, progress or (lambda done, total: None))
        prepared, result = job.carry_out()
    data = report(result, prepared, out, how, options.ranks, [*(n for s in found for n in s.adapter.notes)])
    if not options.dry_run:
        prepared.write(force=options.force)
    return data


def own_target(adapter: Adapter) -> Target:
    """The dialect of an adapter, as a target.

    Raises:
        UsageError: `usage.target` for one that is read only.
    """
    if not adapter.dialect.write.get("keys"):
        raise UsageError(
            "usage.target",
            f"{adapter.dialect.title}, the dialect of {adapter.name}, is read, not written",
            fix=f"say what to write: --to DIALECT, one of {', '.join(target_names())}",
        )
    return target_named(adapter.dialect.name)


def _path(adapter: Any) -> Any:
    return adapter.path if isinstance(adapter, Adapter) else adapter


@dataclass
class _Job:
    """One run: what is read, how it is computed, and what is made of it."""

    sources: list[Source]
    slots: list[Slot]
    method: Chosen
    target: Target
    out: str
    options: Options
    progress: Progress
    done: int = 0

    def carry_out(self) -> tuple[Prepared, Result]:
        """Computes everything, and prepares what is written."""
        updates = [slot for slot in self.slots if slot.key.what == UPDATE]
        self._check_full_rank(updates)
        others = [slot for slot in self.slots if slot.key.what != UPDATE]
        updated = {slot.key._replace(what=WHOLE) for slot in updates}
        wholes = [whole(slot, self.sources, updated=slot.key in updated) for slot in others]
        passes = 2 if self.options.ranks.budget is not None else 1
        total = passes * sum(self._nbytes(slot) for slot in updates)
        settings, notes = settings_of(self.sources)
        with one_thread():
            thresholds = self._thresholds(updates)
            if self.options.ranks.budget is None:
                ranks = self.options.ranks
                cut = Cut(ranks.rule(), ranks.rank, ranks.energy)
                found = self._over(updates, lambda slot: self._stored(slot, thresholds, cut), total)
                return self._prepared(found, wholes, settings, notes)
            return self._within_budget(updates, thresholds, wholes, settings, notes, total)

    def _within_budget(
        self,
        updates: list[Slot],
        thresholds: list[float] | None,
        wholes: list[Whole],
        settings: dict[str, Any],
        notes: list[str],
        total: int,
    ) -> tuple[Prepared, Result]:
        """Two passes: singular values of all places, then the factors of the ranks that these give."""
        limit = self.options.ranks.budget
        assert limit is not None
        seen = self._over(updates, lambda slot: self._spectrum(slot, thresholds), total)
        spectra = {slot.key.name: s for slot, (s, _, _) in zip(updates, seen, strict=True) if s is not None}
        costs = {slot.key.name: cost for slot, (s, cost, _) in zip(updates, seen, strict=True) if s is not None}
        room = limit - sum(size for _, _, size in seen) - sum(_nbytes(w.item) for w in wholes)
        least = 0 if self.target.one_rank or not costs else min(sum(cost) for cost in costs.values())
        room -= sum(2 * (len(slot.path) + HEADER_ENTRY) for slot in updates)
        while True:
            ranks = of_budget(spectra, costs, room, self.target)
            found = self._over(updates, partial(self._ranked, thresholds, ranks), total)
            prepared, result = self._prepared(found, wholes, settings, notes)
            size = len(prepared.built.files[prepared.built.weights])
            if size <= limit:
                return prepared, result
            room -= max(size - limit, least)  # what headers and alphas take

    def _over(self, slots: Sequence[Slot], work: Callable[[Slot], T], total: int) -> list[T]:
        """Results for every place, in order, by some threads."""
        jobs = self.options.jobs or min(MOST_JOBS, cores())
        made = []
        with ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(1)) as pool:
            try:
                for slot, result in zip(slots, pool.map(work, slots), strict=True):
                    made.append(result)
                    self.done += self._nbytes(slot)
                    self.progress(min(self.done, total), total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return made

    def _nbytes(self, slot: Slot) -> int:
        return sum(self.sources[n].nbytes(key) for n, key in slot.held.items())

    def _check_full_rank(self, updates: Sequence[Slot]) -> None:
        """Elementwise methods make updates of full rank, but where all are stored whole, and so is the result."""
        if not self.method.full_rank or self.options.ranks.stated:
            return
        kinds = {
            slot.key.name: {
                getattr(e, "kind", "") for n, key in slot.held.items() for e in self.sources[n].entries[key]
            }
            for slot in updates
            if slot.key.leaf != "bias"
        }
        names = [name for name, found in kinds.items() if found != {"difference"}]
        if names:
            error = needs_rank(names, f"{self.method.name} in space full makes updates of full rank")
            error.fix += "; --space knots or core keeps them low-rank"
            raise error

    def _thresholds(self, updates: Sequence[Slot]) -> list[float] | None:
        if self.method.options.get("trim") != "adapter":
            return None
        density = self.method.options["density"]
        return [
            adapter_threshold([_Lazy(self.sources, slot, n) for slot in updates if n in slot.held], density)
            for n in range(len(self.sources))
        ]

    def _made(self, slot: Slot, thresholds: list[float] | None) -> Made:
        gathered = gather(slot, self.sources)
        cut = not gathered.vector and (self.options.ranks.stated or not gathered.differences)
        if cut and gathered.dense and not self.options.ranks.stated:
            raise needs_rank([slot.key.name], "an update that is no product of factors has full rank")
        method = chosen("linear") if gathered.vector and self.method.method.factors else self.method
        return make(gathered, method, slot.key.name, thresholds=thresholds, cut=cut)

    def _stored(self, slot: Slot, thresholds: list[float] | None, cut: Cut) -> Stored:
        made = self._made(slot, thresholds)
        padded = self.options.ranks.rank if self.options.padded else None
        return store(made, cut, self._dtype(made.gathered.dtype), slot.key.name, padded=padded)

    def _ranked(self, thresholds: list[float] | None, ranks: Mapping[str, int], slot: Slot) -> Stored:
        rank = ranks.get(slot.key.name, 0)
        return self._stored(slot, thresholds, Cut(fixed(rank), rank))

    def _spectrum(self, slot: Slot, thresholds: list[float] | None) -> tuple[Tensor | None, tuple[int, int], int]:
        """Singular values, the cost of a rank in bytes for either factor; or the size of what is stored whole."""
        made = self._made(slot, thresholds)
        width = self._dtype(made.gathered.dtype).itemsize
        m, n = made.gathered.size
        if made.svd is None and not made.large:
            return None, (0, 0), m * n * width
        return made.spectrum().clone(), (m * width, n * width), 0

    def _dtype(self, own: torch.dtype) -> torch.dtype:
        return own if self.options.dtype == "keep" else DTYPES[self.options.dtype]

    # ------------------------------------------------------------------------------------------------ what is written

    def _prepared(
        self, found: list[Stored], wholes: list[Whole], settings: dict[str, Any], notes: list[str]
    ) -> tuple[Prepared, Result]:
        updates = [slot for slot in self.slots if slot.key.what == UPDATE]
        kept, left = metadata_kept(self.sources, self.target)
        stored = list(zip(updates, found, strict=True))
        result = Result(self.sources, self.target, stored, wholes, metadata=kept, metadata_left=left)
        items = items_of(result)
        result.notes += [*notes, *(w.note for w in wholes if w.note)]
        if self.method.method.factors and any(s.vector for s in found):
            result.notes.append("biases were summed: methods on factors say nothing of them")
        if wholes and self.method.name != "linear":
            result.notes.append(f"{plural(len(wholes), 'whole parameter')} were summed by weight, not by the method")
        where = self.sources[0].name
        names = self.sources[0].rebase.binding.names if self.sources[0].rebase else None
        rank = self.options.ranks.rank
        try:
            prepared = prepare(
                items,
                self.target,
                self.out,
                settings=settings,
                names=names,
                metadata=result.metadata,
                as_they_are=all(
                    s.adapter.dialect.name == self.target.dialect.name and not s.rebase for s in self.sources
                ),
                rank=rank,
                where=where,
            )
        except UnsupportedError as error:
            if error.code == "convert.kind":
                error.fix = "--to a dialect that holds it, or leave it out: --exclude GLOB"
            raise
        result.notes += prepared.notes
        return prepared, result


class _Lazy:
    """One adapter's update of one place, read when its rows are asked for."""

    def __init__(self, sources: Sequence[Source], slot: Slot, number: int) -> None:
        self._slot = Slot(slot.key, slot.path, slot.flat, slot.module, {number: slot.held[number]})
        self._sources, self._number = sources, number
        self._held: Factors | None = None
        one = gather(self._slot, sources).updates[number]
        self.shape = (one.b.shape[0], one.a.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the update."""
        if start == 0 or self._held is None:
            w = gather(self._slot, self._sources).updates[self._number]
            self._held = fold(w.b, w.a, scale=w.scale, weight=w.weight)
        made = self._held.rows(start, stop)
        if stop == self.shape[0]:
            self._held = None
        return made


def _nbytes(item: Item) -> int:
    return sum(f.numel() * f.element_size() for f in item.factors.values())
