"""The factors of every module: how many ranks each gets, and the noise that is cut away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from loramerge.algebra import noise
from loramerge.algebra import rank as ranks
from loramerge.algebra.extract import Extraction
from loramerge.algebra.extract import extract as factor
from loramerge.converting.target import Target
from loramerge.errors import UsageError
from loramerge.extracting.crew import Meter, work
from loramerge.extracting.options import Options
from loramerge.extracting.parts import Sorted, Stacked, Unit
from loramerge.extracting.reading import NARROW

TOLERANCE = 1.001
"""Errors are at most this many times the smallest possible."""

HEADER_BYTES = 120
"""At most, beside its name, what a tensor takes of a file's header."""

MARGIN_BYTES = 2048
"""Beside its tensors, what a file's metadata may take."""

SAMPLE = 1 << 16
"""Weights from which the size of rounding is estimated."""

FIRST_RANK = 8
"""Ranks tried beyond the mean of a budget before more are asked for."""


@dataclass(frozen=True)
class Made:
    """One module's factors; `floor`: singular values under it are rounding."""

    unit: Unit
    found: Extraction
    floor: float


def factored(
    units: Sequence[Unit],
    options: Options,
    target: Target,
    sorted_: Sorted,
    device: str,
    jobs: int,
    meter: Meter,
) -> list[Made]:
    """The factors of every module, within all that was asked for."""
    if options.budget is None:
        return _all(units, partial(_one, rank=options.rank, options=options, device=device), jobs, meter)
    room = _room(units, options, target, sorted_)
    size = dtype_named(options.dtype).itemsize
    least = min(unit.side * size for unit in units) if units else 0
    if units and room < least:
        raise UsageError(
            "usage.budget",
            f"a budget of {options.budget} bytes holds not one rank: the parameters that go whole and the names take "
            f"{options.budget - room} bytes, the smallest pair {least}",
            fix=f"--budget of at least {options.budget - room + least} bytes"
            + ("" if options.only_linear or not sorted_.wholes else ", or --only-linear"),
        )
    mean = room // max(1, sum(unit.side for unit in units) * size)
    most = {u.module: min(*u.change.shape, options.rank or math.inf) for u in units}
    wanted = {module: int(min(limit, 2 * mean + FIRST_RANK)) for module, limit in most.items()}
    made: dict[str, Made] = {}
    asked: Sequence[Unit] = units
    while asked:
        for one in _all(asked, partial(_up_to, wanted=wanted, options=options, device=device), jobs, meter):
            made[one.unit.module] = one
        chosen = _chosen(units, made, room, size, target.one_rank)
        # Where all that was computed is wanted, there may be more worth having.
        asked = [u for u in units if chosen[u.module] == wanted[u.module] < most[u.module]]
        for unit in asked:
            wanted[unit.module] = int(min(most[unit.module], 2 * wanted[unit.module]))
    chosen = _level(units, chosen) if units else {}
    return [replace(made[u.module], found=made[u.module].found.cut(chosen[u.module]).final()) for u in units]


def _up_to(unit: Unit, *, wanted: Mapping[str, int], options: Options, device: str) -> Made:
    return _one(unit, rank=wanted[unit.module], options=options, device=device)


def _chosen(units: Sequence[Unit], made: Mapping[str, Made], room: int, size: int, one_rank: bool) -> dict[str, int]:
    """Ranks within the budget: greedy by the energy for each byte, or one rank for all."""
    if not one_rank:
        spectra = {m: one.found.singular_values for m, one in made.items()}
        shapes = {u.module: (u.side, 0) for u in units}
        return ranks.budget(spectra, shapes, room, size)
    most = max((one.found.rank for one in made.values()), default=0)
    for k in range(most, 0, -1):
        if sum(u.side * size * k for u in units if made[u.module].found.rank) <= room:
            return {m: min(k, one.found.rank) for m, one in made.items()}
    return dict.fromkeys(made, 0)


def _level(units: Sequence[Unit], chosen: Mapping[str, int]) -> dict[str, int]:
    """Ranks with one for all matrices of a stack, which then take no more room than before."""
    level = dict(chosen)
    stacks: dict[Stacked, list[str]] = {}
    for unit in units:
        if unit.stacked is not None:
            stacks.setdefault(unit.stacked, []).append(unit.module)
    for modules in stacks.values():
        mean = sum(chosen[module] for module in modules) // len(modules)
        level |= {module: mean for module in modules}
    return level


def _room(units: Sequence[Unit], options: Options, target: Target, sorted_: Sorted) -> int:
    """Bytes of the budget that are left for factors."""
    assert options.budget is not None
    prefix = max([len(str(target.write.get("prefix", ""))), *(len(row["prefix"]) for row in target.roles)])
    names = sum(3 * (len(u.path) + prefix + HEADER_BYTES) * (1 + len(u.also)) for u in units)
    whole = sum(w.nbytes + len(w.path) + prefix + HEADER_BYTES for w in sorted_.wholes)
    return options.budget - whole - names - MARGIN_BYTES


def _all(units: Sequence[Unit], do: Callable[[Unit], Made], jobs: int, meter: Meter) -> list[Made]:
    return work(units, do, jobs=jobs, cost=_unit_bytes, meter=meter)


def _floor(unit: Unit) -> float:
    """Singular values under it are the rounding of a narrow fine-tune; 0 where it is a wide one.

    From a sample of rows, evenly spaced: it is the mean of a function of single weights, and the whole tensor would
    cost as much as the factors themselves.
    """
    old, new = unit.change.dtypes
    if new not in NARROW:
        return 0.0
    rows, cols = unit.change.shape
    before, after = unit.change.sample(max(1, rows * cols // SAMPLE))
    found = noise.floor(after, new, base=before if old == new else None)
    if not math.isfinite(found):
        unit.change.check_finite()
    return found * (math.sqrt(rows) + math.sqrt(cols)) / (math.sqrt(len(after)) + math.sqrt(cols))


def _one(unit: Unit, *, rank: int | None, options: Options, device: str) -> Made:
    """The factors of one module.

    Raises:
        InputError: `extract.non-finite`.
    """
    floor = _floor(unit) if options.noise_floor else 0.0
    try:
        found = factor(
            unit.change,
            rank,
            energy=options.energy,
            floor=floor,
            tolerance=TOLERANCE,
            dtype=dtype_named(options.dtype),
            module=unit.module,
            device=device,
        )
    except ValueError:
        unit.change.check_finite()
        raise
    return Made(unit, found if options.budget is not None else found.final(), floor)


def dtype_named(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    found: torch.dtype = getattr(torch, name)
    return found


def _unit_bytes(unit: Unit) -> int:
    return unit.nbytes
