"""The analysis from end to end: open, find what belongs together, measure every module on a few threads, sum up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter
from loramerge.algebra.threads import cores
from loramerge.analysis import against, collisions
from loramerge.analysis.collisions import Overlap
from loramerge.analysis.report import report
from loramerge.analysis.similarity import Mean, axis, phi, table
from loramerge.analysis.spectra import Decomposed, spectrum
from loramerge.analysis.units import Found, Skipped, Unit, by_name
from loramerge.binding.bind import selector
from loramerge.errors import MismatchError, UnsupportedError, UsageError
from loramerge.tensors.checkpoint import Checkpoint, PickleReader, open_checkpoint
from loramerge.tensors.output import Output, What, check_destination, check_space
from loramerge.tensors.writer import write_small_file

SCHEMA = 1
TICK = 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """See `loramerge.analyze`."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    points: int = 24
    leading: int = 64
    jobs: int | None = None
    alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    residual_base: bool = False
    original_base: bool = False
    grouped_experts: bool = False
    allow_unmatched: bool = False

    def check(self) -> None:
        """Raises UsageError for values that mean nothing."""
        for name, least in (("points", 0), ("leading", 0), ("jobs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError("usage.value", f"{name} is {value}", fix=f"give at least {least}")


@dataclass
class _Sums:
    """What adds up over modules; filled by workers, in an order that changes nothing (see `Mean`)."""

    lock: Lock = field(default_factory=Lock)
    phi: dict[tuple[int, int], dict[str, Mean]] = field(default_factory=dict)

    def add(self, pair: tuple[int, int], tables: Mapping[str, tuple[Tensor, int]]) -> None:
        """One module's phi of a pair of adapters, by name, and the dimension of its vectors."""
        with self.lock:
            means = self.phi.setdefault(pair, {})
            for name, (values, dimension) in tables.items():
                means.setdefault(name, Mean()).add(values, dimension)


def analyze(
    given: Sequence[tuple[str | Adapter, float]],
    base: str | None,
    options: Options,
    version: str,
    *,
    html: str | None = None,
    png: str | None = None,
    force: bool = False,
    read_pickle: PickleReader | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.analyze`."""
    options.check()
    if not given:
        raise UsageError("usage.adapters", "no adapter given", fix="loramerge analyze ADAPTER...")
    inputs = [Path(s) if isinstance(s, str) else s.path for s, _ in given] + ([Path(base)] if base is not None else [])
    for place in (html, png):
        if place is not None:
            what: What = "file" if place == html else "directory"
            check_destination(Path(place), inputs=inputs, force=force, what=what)
    if png is not None:
        from loramerge.analysis import plots

        plots.check()
    with contextlib.ExitStack() as opened:
        adapters = []
        for source, _ in given:
            if isinstance(source, Adapter):
                adapters.append(source)
                continue
            adapter = open_adapter(
                source,
                read_pickle=read_pickle,
                alpha=options.alpha,
                enable_lora=options.enable_lora,
                residual_base=options.residual_base,
                original_base=options.original_base,
                grouped_experts=options.grouped_experts,
            )
            opened.callback(adapter.checkpoint.close)
            adapters.append(adapter)
        checkpoint: Checkpoint | None = None
        if base is not None:
            from loramerge.analysis.spots import by_base

            checkpoint = open_checkpoint(base, read_pickle=read_pickle)
            opened.callback(checkpoint.close)
            found = by_base(adapters, checkpoint, options.include, options.exclude, options.allow_unmatched)
        else:
            found = by_name(adapters, options.include, options.exclude)
        if not found.units:
            raise _nothing(found, adapters, options)
        weights = [weight for _, weight in given]
        sums = _Sums()
        rows = _measure(found, weights, options, sums, progress)
        for adapter in adapters:
            adapter.checkpoint.check_unchanged()
        if not rows:
            raise _nothing(found, adapters, options)
        phis = {pair: {n: mean.data(options.points) for n, mean in means.items()} for pair, means in sums.phi.items()}
        data = report(adapters, weights, checkpoint, found, rows, phis, selector(options.include, options.exclude))
    if html is not None:
        from loramerge.analysis.page import page

        _write(Path(html), page(data, version), force)
    if png is not None:
        plots.write(data, Path(png), force)
    return data | {name: place for name, place in (("html", html), ("png", png)) if place is not None}


def _write(place: Path, text: str, force: bool) -> None:
    content = text.encode()
    check_space(place, len(content))
    with Output(place, "file", force) as output:
        write_small_file(output.directory / place.name, content)
        output.commit()


def _nothing(found: Found, adapters: Sequence[Adapter], options: Options) -> Exception:
    if not found.skipped:
        message = "no module of the adapters is selected"
        return UsageError("analyze.none", message, fix="see --include and --exclude: globs over module paths")
    first = found.skipped[0]
    return UnsupportedError(
        "analyze.unsupported",
        f"none of {len(found.skipped)} modules can be analysed: {first.reason}",
        fix="merge it and see what that changes: loramerge diff BASE MERGED",
        file=adapters[first.adapter].name,
        tensors=[s.module for s in found.skipped[:5]],
    )


# ----------------------------------------------------------------------------------------------- one module


def _measure(
    found: Found, weights: Sequence[float], options: Options, sums: _Sums, progress: Progress | None
) -> list[dict[str, Any]]:
    """One row a unit, in order; units without a piece that can be read are left out."""
    jobs = options.jobs or min(cores(), 8)
    costs = [_cost(unit) for unit in found.units]
    total, done = sum(costs), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers run over modules; threads inside an operation would only wait for one another
    skipped: list[tuple[int, Skipped]] = []

    def one(at: int) -> dict[str, Any] | None:
        with torch.inference_mode():
            return measure_unit(found.units[at], weights, options, sums, lambda s: skipped.append((at, s)))

    try:
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            futures = {pool.submit(one, at): at for at in range(len(found.units))}
            try:
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, timeout=TICK, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                        done += costs[futures[future]]
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
    found.skipped += [s for _, s in sorted(skipped, key=lambda entry: entry[0])]
    rows = [future.result() for future in futures]
    return [row for row in rows if row is not None]


def _cost(unit: Unit) -> int:
    """Bytes that its progress counts: of the weight, or of factors of some rank."""
    located = unit.spot.located if unit.spot is not None else None
    return located.info.nbytes if located is not None else 8 * sum(unit.shape) * len(unit.pieces)


def measure_unit(
    unit: Unit, weights: Sequence[float], options: Options, sums: _Sums, skip: Callable[[Skipped], None]
) -> dict[str, Any] | None:
    """Everything about one module; None where no adapter's update of it can be had as factors."""
    updates: dict[int, Decomposed] = {}
    for index, piece in sorted(unit.pieces.items()):
        try:
            updates[index] = piece.decomposed(weights[index], unit.shape)
        except (UnsupportedError, MismatchError) as error:
            reason = error.message if error.code.startswith("analyze.") else f"{error.message} ({error.fix})"
            skip(Skipped(index, piece.module, reason))
    if not updates:
        return None
    entries: list[dict[str, Any] | None] = [None] * len(weights)
    for index, d in updates.items():
        piece = unit.pieces[index]
        told = {"module": piece.module, "kind": piece.kind, "dtype": piece.dtype, "by_factors": piece.by_factors}
        entries[index] = {**told, **spectrum(d, d.B.shape[1], piece.dtype)}
    row: dict[str, Any] = {"module": unit.name, "shape": list(unit.shape), "base": None, "updates": entries}
    if unit.spot is not None and unit.spot.located is not None:
        _against_base(unit, updates, options, row, entries)
    row["pairs"] = _together(updates, unit, options, sums, entries, len(weights))
    return row


def _against_base(
    unit: Unit,
    updates: dict[int, Decomposed],
    options: Options,
    row: dict[str, Any],
    entries: list[dict[str, Any] | None],
) -> None:
    assert unit.spot is not None
    most = min(options.leading, max(d.rank for d in updates.values()))
    w = against.read_weight(unit.spot, updates, most, unit.name)
    row["base"] = against.base_facts(w, unit.spot)
    total = None
    for index, d in updates.items():
        entry = entries[index]
        assert entry is not None
        rows = against.stored_rows(d, w)
        total = rows if total is None else total + rows
        entry["relative_norm"] = d.norm / w.norm if w.norm else None
        entry["amplification"] = against.amplification(d, w, index)
        entry["retention"] = against.retention(rows, w)
        if w.leading is not None and d.rank:
            entry["base_directions"] = against.shared_directions(d, w.leading, options.points)
    if len(updates) > 1 and total is not None:
        row["retention"] = against.retention(total, w)


def _together(
    updates: dict[int, Decomposed],
    unit: Unit,
    options: Options,
    sums: _Sums,
    entries: list[dict[str, Any] | None],
    count: int,
) -> list[dict[str, Any]]:
    """What each two adapters have in common here."""
    if count < 2:
        return []
    m, n = unit.shape
    index = collisions.sampled_rows(m, n)
    rows = {i: d.rows(index) for i, d in updates.items()}
    gram = [[0.0] * count for _ in range(count)]
    pairs = []
    for i, d in updates.items():
        gram[i][i] = d.norm2
    for i, j in combinations(updates, 2):
        first, second = updates[i], updates[j]
        overlap = Overlap.of(first, second)
        gram[i][j] = gram[j][i] = overlap.inner
        signs = collisions.signs(rows[i], rows[j])
        by_factors = unit.pieces[i].by_factors and unit.pieces[j].by_factors
        tables = {"left": (overlap.left, m), "right": (overlap.right, n)}
        if by_factors:
            left, right = overlap.of_factors()
            tables |= {"B": (left, m), "A": (right, n)}
        sums.add((i, j), {name: (phi(t), size) for name, (t, size) in tables.items()})
        pairs.append(
            {
                "a": i,
                "b": j,
                "cosine": collisions.cosine(overlap.inner, first.norm2, second.norm2),
                "inner": overlap.inner,
                "common": overlap.common(),
                "common_chance": _chances(first.rank, second.rank, m, n),
                **signs.data(),
                "elements": signs.both,
                "magnitude": signs.magnitude,
                "phi": {name: _phi(t, size, options.points) for name, (t, size) in tables.items()},
            }
        )
    kept = collisions.survival([rows.get(i) for i in range(count)], gram)
    for entry, told in zip(entries, kept, strict=True):
        if entry is not None and told is not None:
            entry["survival"] = told
    return pairs


def _chances(first: int, second: int, m: int, n: int) -> dict[str, float]:
    """What `common` is on average for random subspaces of these ranks."""
    return {
        "first_left": min(1.0, second / m),
        "first_right": min(1.0, second / n),
        "second_left": min(1.0, first / m),
        "second_right": min(1.0, first / n),
    }


def _phi(overlap: Tensor, dimension: int, points: int) -> dict[str, Any]:
    p, q = overlap.shape
    i, j = axis(p, points), axis(q, points)
    return {
        "i": i,
        "j": j,
        "phi": table(phi(overlap), i, j),
        "dimension": dimension,
    }
