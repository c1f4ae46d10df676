"""Adapters on a live model: applied where its weights lie, switched and removed, exactly, without a copy of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.operators import Operator
from loramerge.adapters.updates import Update, in_place
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding, Replaced
from loramerge.binding.namespace import slots_of
from loramerge.errors import UsageError
from loramerge.merging.crew import Task
from loramerge.merging.crew import work as run_all
from loramerge.merging.deltas import Deltas
from loramerge.merging.fitting import changed_names
from loramerge.merging.held import Block, Held, digest, edited, hold_adapters, how_to_hold
from loramerge.merging.kernels import COMPUTE_DTYPES, TORCH_DTYPES, NonFinite, change_block
from loramerge.merging.live import Live, Rows, config_of
from loramerge.merging.memory import Merging, block_elements, exact_products, overflow, shapes_of
from loramerge.merging.methods import combined, factor_files
from loramerge.merging.run import Adapters, Options, open_pairs, weighted
from loramerge.merging.stream import FactorFile
from loramerge.merging.undo import CANDIDATES

JOBS = 8
"""Workers at most: each takes about 8 MB."""

OPTIONS = {
    *("compute_dtype", "include", "exclude", "allow_unmatched", "allow_pickle"),
    *("alpha", "enable_lora", "residual_base", "original_base", "grouped_experts"),
    *("method", "method_options"),
}
"""Those of `loramerge.merge_tensors`."""


@dataclass(frozen=True)
class _Request:
    """Adapters, opened, as they are to be applied."""

    pairs: Sequence[tuple[Adapter, float]]
    options: Options


@dataclass(frozen=True)
class _Prepared:
    """A request, bound to the model's tensors, and the names by which those that change are changed."""

    request: _Request
    live: Live
    binding: Binding
    names: Sequence[str]


@dataclass
class _Applied:
    """Adapters on the model: what is held of the tensors that they changed, and the factors to come back with."""

    request: _Request
    adapters: Sequence[FactorFile]
    held: dict[str, Held]
    complete: bool = False
    """Whether all of it is on the model; otherwise something was interrupted, and what is must come off."""

    @property
    def nbytes(self) -> int:
        factors = sum(getattr(adapter, "nbytes", 0) for adapter in self.adapters)
        return factors + sum(held.nbytes for held in self.held.values())


class Switcher:
    """Applies adapters to a live model, switches between them, and gives every weight back bit for bit.

    Each weight is `round(W + sum of updates)` of the base's W, whatever was applied before: nothing drifts. Tensors
    are changed where they are, on their device: parameters stay the same objects at the same address. Of each changed
    tensor the host's memory holds what rounding lost (see `candidates.py`), of those whose update looks at the weight
    the bits that changed, of those that an adapter replaces the original.

    Every method changes all or nothing: what fails or is interrupted leaves the model as it was before. Methods may
    be called from several threads; running the model meanwhile is the caller's to prevent.

    Args:
        model: a module, or a dict of tensors, on any devices.
        config: the model's config as a dict, where names and shapes do not tell; by default the module's own.
        check: refuse to take an adapter off weights that somebody else changed meanwhile. Without, such weights come
            back wrong, or not at all.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._model = model
        self._config = config
        self._check = check
        self._lock = threading.RLock()
        self._applied: _Applied | None = None

    @property
    def active(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of each adapter that is applied."""
        applied = self._applied
        if applied is None or not applied.complete:
            return ()
        return tuple((adapter.name, weight) for adapter, weight in applied.request.pairs)

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that are held to come back: codes, originals of what is replaced, factors."""
        applied = self._applied
        return 0 if applied is None else applied.nbytes

    def apply(self, adapters: Adapters, **options: Any) -> None:
        """Merges adapters into the model, which has none.

        Args:
            adapters: a path, an `Adapter`, `{either: weight}`, or a list of either or of pairs.
            options: as for `loramerge.merge_tensors`: `compute_dtype`, `include`, `exclude`, `allow_unmatched`,
                `allow_pickle`, `alpha`, `enable_lora`, `residual_base`, `original_base`, `grouped_experts`, `method`,
                `method_options`.

        Raises:
            UsageError: `switcher.active` where adapters are applied already.
            UnsupportedError: `switcher.*` for what cannot be done to a live model; `merge.overflow`.
            LoramergeError: as `loramerge.merge_tensors`.
        """
        with self._lock:
            self._settle()
            if self._applied is not None:
                names = ", ".join(name for name, _ in self.active)
                raise UsageError("switcher.active", f"{names} is applied already", fix="switch(), or remove() first")
            self._apply(self._prepared(self._request(adapters, options)))

    def switch(self, adapters: Adapters, **options: Any) -> None:
        """Takes off what is applied and merges other adapters instead. Arguments and errors as `apply` and `remove`.

        Where the new ones cannot be applied, the old ones are again.
        """
        with self._lock:
            self._settle()
            self._switch(self._request(adapters, options))

    def remove(self) -> None:
        """Takes off what is applied: every weight is the base's again, bit for bit.

        Raises:
            MismatchError: `switcher.edited` where somebody else changed a weight meanwhile; nothing is changed then.
        """
        with self._lock:
            self._settle()
            if self._applied is not None:
                self._refuse_edited(self._applied)
                self._bring_back(self._applied)

    @contextmanager
    def applied(self, adapters: Adapters, **options: Any) -> Iterator[Switcher]:
        """A context in which adapters are applied; what was applied before is again after it."""
        with self._lock:
            self._settle()
            before = None if self._applied is None else self._applied.request
            self.switch(adapters, **options)
        try:
            yield self
        finally:
            with self._lock:
                if before is None:
                    self.remove()
                else:
                    self._settle()
                    self._switch(before)

    def __repr__(self) -> str:
        return f"Switcher({type(self._model).__name__}, active={self.active})"

    def _request(self, adapters: Adapters, options: Mapping[str, Any]) -> _Request:
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"unknown options {sorted(unknown)}: known are {sorted(OPTIONS)}")
        given, chosen = weighted(adapters), Options(**options)
        if not given:
            raise UsageError("usage.adapters", "no adapter given", fix="remove() takes off what is applied")
        chosen.check()
        return _Request(open_pairs(given, chosen), chosen)

    def _prepared(self, request: _Request) -> _Prepared:
        """What the adapters change. Nothing is changed yet."""
        options, live = request.options, Live(self._model)
        binding = bind(
            slots_of(shapes_of(live.tensors)),
            self._config if self._config is not None else config_of(self._model),
            request.pairs,
            include=options.include,
            exclude=options.exclude,
            allow_unmatched=options.allow_unmatched,
            base_name="the model",
        )
        binding = combined(binding, options.chosen(len(request.pairs)), request.pairs, options.compute_dtype)
        names = changed_names(binding, factor_files(binding, [adapter for adapter, _ in request.pairs]), live)
        if options.compute_dtype == "float64" and any(live.tensors[name].device.type == "mps" for name in names):
            raise UsageError("usage.device", "mps has no float64", fix="compute_dtype='float32'")
        return _Prepared(request, live, binding, names)

    def _switch(self, request: _Request) -> None:
        prepared, before = self._prepared(request), self._applied
        if before is None:
            self._apply(prepared)
            return
        self._refuse_edited(before)
        try:
            self._bring_back(before)
            self._apply(prepared)
        except BaseException as error:
            if self._applied is None:
                try:
                    self._apply(self._prepared(before.request))
                except BaseException as another:
                    error.add_note(f"the adapters from before could not be applied again: {another}")
            raise

    def _apply(self, prepared: _Prepared) -> None:
        request, live, binding, names = prepared.request, prepared.live, prepared.binding, prepared.names
        held: dict[str, Held] = {}
        added: list[Update] = []
        for name in names:
            tensor, updates = live.tensors[name], tuple(binding.updates.get(name, ()))
            how = how_to_hold(updates, name in binding.replaced, tensor.dtype)
            step = Rows(tensor).step
            held[name] = Held(name, how, tensor.dtype, tuple(tensor.shape), step, updates)
            added += updates if how == CANDIDATES else ()
        adapters = hold_adapters(factor_files(binding, [adapter for adapter, _ in request.pairs]), added)
        applied = _Applied(request, adapters, held)
        change = _Change(live, binding, applied, COMPUTE_DTYPES[request.options.compute_dtype])
        self._applied = applied
        try:
            _run(change.tasks(), change.blocks, live, names)
            for name in names:
                if not held[name].blocks:
                    del held[name]  # every update of it turned out to be zero
            applied.complete = True
        except BaseException:
            self._bring_back(applied)
            raise

    def _settle(self) -> None:
        """Finishes what an interruption of an interruption left."""
        if self._applied is not None and not self._applied.complete:
            self._bring_back(self._applied)

    def _refuse_edited(self, applied: _Applied) -> None:
        if not self._check:
            return
        live = Live(self._model)
        found = _Edited(live, applied)
        _run(found.tasks(), found.blocks, live, list(applied.held))
        if found.names:
            raise edited(sorted(found.names, key=list(applied.held).index))

    def _bring_back(self, applied: _Applied) -> None:
        """Takes off what is on the model of these adapters. One interruption waits until that is done."""
        live = Live(self._model)
        interrupted: KeyboardInterrupt | None = None
        while True:
            restore = _Restore(live, applied, self._check)
            applied.complete = False
            try:
                _run(restore.tasks(), restore.blocks, live, list(applied.held))
                break
            except KeyboardInterrupt as error:
                if interrupted is not None:
                    raise
                interrupted = error
        self._applied = None
        if interrupted is not None:
            raise interrupted


def _run(tasks: Iterator[Task], blocks: int, live: Live, names: Sequence[str]) -> None:
    devices = {live.tensors[name].device for name in names if name in live.tensors}
    jobs = min(JOBS, os.cpu_count() or 1, blocks)
    if jobs:
        with exact_products():
            run_all(tasks, jobs, sorted(devices, key=str))


class _AllDeltas:
    """The updates in float64, made on the device of each tensor, or on the CPU where that has no float64."""

    def __init__(self, adapters: Sequence[FactorFile]) -> None:
        self._adapters = adapters
        self._made: dict[torch.device, Deltas] = {}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Deltas:
        device = torch.device("cpu") if device.type == "mps" else device
        with self._lock:
            if device not in self._made:
                self._made[device] = Deltas(self._adapters, device)
            return self._made[device]


@dataclass
class _Work:
    """One tensor while it is changed."""

    held: Held
    rows: Rows
    device: torch.device
    new: Replaced | None
    keep: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    operators: list[Operator] | None = None
    source: Tensor | None = None
    """The whole tensor that takes its place, where it cannot be read in pieces."""


class _Change:
    """The merge of adapters into tensors where they are."""

    def __init__(self, live: Live, binding: Binding, applied: _Applied, dtype: torch.dtype) -> None:
        self._live = live
        self._dtype = dtype
        self._merging = Merging(live.tensors, binding, applied.adapters, dtype, self._original)
        self._deltas = _AllDeltas(applied.adapters)
        self._works = {
            name: _Work(
                held,
                held.rows(live.tensors),
                live.tensors[name].device,
                binding.replaced.get(name),
                not in_place(held.updates),
            )
            for name, held in applied.held.items()
        }
        self._of_memory = {other: name for name in self._works for other in live.group[name]}
        self._local = threading.local()
        self.blocks = sum(w.rows.count for w in self._works.values())

    def tasks(self) -> Iterator[Task]:
        for work in self._works.values():
            for index in range(work.rows.count):
                yield partial(self._block, work, index)

    def _block(self, work: _Work, index: int) -> None:
        held, rows = work.held, work.rows
        operators = self._operators(work)
        if not operators and work.new is None:
            return  # every update is zero: the bytes, not their sum with zero
        stored = rows.read(index)
        first, count = rows.span(index)
        source = stored if work.new is None else self._replacement(work, work.new, first, count)
        merged = source
        if operators:
            merged = torch.empty_like(stored)
            buffer = self._buffer(work.device, block_elements(work.device, rows.cols))
            try:
                change_block(source, merged, first, rows.cols, operators, buffer, work.keep, False)
            except NonFinite as error:
                raise overflow(held.name, error, held.dtype) from None
        block = held.encode(stored.cpu(), merged.cpu(), index, rows, self._deltas.on(work.device))
        with held.lock:
            held.blocks[index] = block
            rows.write(index, merged)

    def _operators(self, work: _Work) -> list[Operator]:
        with work.lock:
            if work.operators is None:
                self._local.building = work.held.name
                try:
                    work.operators = self._merging.operators(work.held.name, work.held.updates)
                finally:
                    self._local.building = None
            return work.operators

    def _original(self, name: str) -> Tensor:
        """A tensor as it was before, for updates that look at weights."""
        changed = self._of_memory.get(name)
        if changed is None or changed == getattr(self._local, "building", None):
            return self._live.tensors[name]  # its operators come before any change of it
        work = self._works[changed]
        deltas = self._deltas.on(work.device)
        blocks = []
        for index in range(work.rows.count):
            with work.held.lock:
                now, block = work.rows.read(index).to("cpu", copy=True), work.held.blocks.get(index)
            blocks.append(now if block is None else work.held.decode(block, now, index, work.rows, deltas))
        return torch.cat(blocks).view(work.held.shape).to(work.device)

    def _replacement(self, work: _Work, new: Replaced, first: int, count: int) -> Tensor:
        """Elements of the tensor that takes another's place, in the other's dtype."""
        info, name = new.factor.info, work.held.name
        dtype = TORCH_DTYPES[info.dtype]
        if new.factor.transposed:
            with work.lock:
                if work.source is None:
                    work.source = self._merging.source(name).contiguous().view(-1)
            return work.source[first : first + count]
        raw = bytearray(count * dtype.itemsize)
        new.factor.file.source.read_into(info.begin + first * dtype.itemsize, memoryview(raw))
        stored = torch.frombuffer(raw, dtype=dtype)
        if not bool(torch.isfinite(stored).all()):
            self._merging.source(name)  # raises, and tells how many are not
        return stored.to(work.device, work.held.dtype)

    def _buffer(self, device: torch.device, elements: int) -> Tensor:
        buffers: dict[torch.device, Tensor] = self._local.__dict__.setdefault("buffers", {})
        buffer = buffers.get(device)
        if buffer is None or buffer.numel() < elements:
            buffer = buffers[device] = torch.empty(elements, dtype=self._dtype, device=device)
        return buffer[:elements]


class _Restore:
    """Brings tensors back where they are."""

    def __init__(self, live: Live, applied: _Applied, check: bool) -> None:
        self._check = check
        self._deltas = _AllDeltas(applied.adapters)
        held = [h for h in applied.held.values() if h.blocks]
        self._works = [(h, h.rows(live.tensors), live.tensors[h.name].device) for h in held]
        self.blocks = sum(len(h.blocks) for h in held)

    def tasks(self) -> Iterator[Task]:
        for held, rows, device in self._works:
            for index, block in sorted(held.blocks.items()):
                yield partial(self._block, held, rows, device, index, block)

    def _block(self, held: Held, rows: Rows, device: torch.device, index: int, block: Block) -> None:
        now = rows.read(index).cpu()
        found = digest(now)
        if found != block.before:  # else it is back already: by an earlier, interrupted way, or by the user
            if self._check and found != block.after:
                raise edited([held.name])
            original = held.decode(block, now, index, rows, self._deltas.on(device))
            if self._check and digest(original) != block.before:
                raise edited([held.name])
            rows.write(index, original)
        del held.blocks[index]


class _Edited:
    """Looks for tensors that are not as the merge left them."""

    def __init__(self, live: Live, applied: _Applied) -> None:
        self._works = [(h, h.rows(live.tensors)) for h in applied.held.values() if h.blocks]
        self.blocks = sum(len(h.blocks) for h, _ in self._works)
        self.names: set[str] = set()

    def tasks(self) -> Iterator[Task]:
        for held, rows in self._works:
            for index, block in held.blocks.items():
                yield partial(self._block, held, rows, index, block)

    def _block(self, held: Held, rows: Rows, index: int, block: Block) -> None:
        if digest(rows.read(index).cpu()) not in (block.before, block.after):
            self.names.add(held.name)
