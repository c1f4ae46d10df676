"""Extracts an adapter from two checkpoints: paired, compared, sorted, factored side by side, written all or nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as _pad

from loramerge.adapters import operators
from loramerge.algebra.extract import Extraction
from loramerge.algebra.threads import cores
from loramerge.converting import from_pairs
from loramerge.converting.items import PAIR, Item, read_tensor
from loramerge.converting.target import Target, default_target, target_named
from loramerge.errors import MismatchError
from loramerge.extracting import report
from loramerge.extracting.crew import Meter, Progress, work
from loramerge.extracting.factoring import Made, factored
from loramerge.extracting.options import Options
from loramerge.extracting.pairing import Match, pair, selector
from loramerge.extracting.parts import Sorted, Stacked, Whole
from loramerge.extracting.reading import Change, is_equal, norm_of, subtract, whole_value
from loramerge.extracting.sorting import Sorter
from loramerge.merging.lanes import choose_device
from loramerge.tensors import mounts
from loramerge.tensors.checkpoint import PickleReader, open_checkpoint
from loramerge.tensors.text import plural


def extract(
    base: str,
    tuned: str,
    out: str,
    options: Options,
    *,
    read_pickle: PickleReader | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.extract`."""
    options.check()
    target = target_named(options.to) if options.to else default_target()
    from_pairs.check_place(out, target, [base, tuned], force=options.force)
    device = str(choose_device(options.device))
    jobs = options.jobs or cores()
    with contextlib.ExitStack() as opened:
        before, after = (
            opened.enter_context(contextlib.closing(open_checkpoint(path, read_pickle=read_pickle)))
            for path in (base, tuned)
        )
        pairing = pair(before, after, selector(options.include, options.exclude))
        meter = Meter(2 * sum(m.nbytes for m in pairing.matches), progress)
        equal = work(pairing.matches, is_equal, jobs=jobs, cost=_bytes_of, meter=meter)
        changed = frozenset(m.name for m, same in zip(pairing.matches, equal, strict=True) if not same)
        if not changed:
            raise _nothing(before.name, after.name, pairing.excluded)
        sorter = Sorter(
            pairing,
            changed,
            target,
            before.name,
            after.name,
            options.embeddings == "low-rank",
            options.only_linear,
        )
        sorted_ = sorter.sort()
        if not sorted_.units and not sorted_.wholes:
            raise MismatchError(
                "extract.empty",
                f"{plural(len(changed), 'tensor')} changed, and all of them are left out",
                fix="see --only-linear, --include and --exclude",
                file=after.name,
            )
        told = report.Report(base, tuned, out, target, options, pairing, changed, sorted_)
        if options.dry_run:
            return told.planned()
        meter.total = sum(m.nbytes for m in pairing.matches) + sum(unit.nbytes for unit in sorted_.units)
        made = factored(sorted_.units, options, target, sorted_, device, jobs, meter)
        left = work(sorted_.left_out, _left_norm(before.name, after.name), jobs=jobs, cost=_none, meter=meter)
        wholes = [_value(whole, before.name, after.name) for whole in sorted_.wholes]
        items = [item for one in made if one.found.rank and one.unit.stacked is None for item in _items(one, target)]
        items += _stacks(made, target)
        items += [value.item for value in wholes]
        if not items:
            raise _all_noise(made, after.name, options)
        prepared = from_pairs.prepare(
            items, target, out, settings=_settings(base, sorted_, made), names=pairing.names, where=after.name
        )
        before.check_unchanged()
        after.check_unchanged()
        data = told.done(made, wholes, left, prepared)
        prepared.write(force=options.force)
    return data


def _bytes_of(match: Match) -> int:
    return match.nbytes


def _none(match: Match) -> int:
    return 0


def _left_norm(base: str, tuned: str) -> Callable[[Match], float | None]:
    def norm(match: Match) -> float | None:
        return norm_of(Change(match, base, tuned)) if match.tuned_shape == match.shape else None

    return norm


# -------------------------------------------------------------------------------------------------------------- items


def _items(made: Made, target: Target) -> list[Item]:
    """The pair of one module, and of those that share its weight."""
    unit, found = made.unit, made.found
    B, A = (found.A.T, found.B.T) if unit.flipped else (found.B, found.A)
    items = [
        from_pairs.pair(unit.path, B, A, shape=unit.shape, exact_shape=True, embedding=unit.embedding, role=unit.role)
    ]
    if unit.embedding and "embedding-A" not in target.keys.get(PAIR, {}):
        items = [from_pairs.pair(unit.path, found.B, found.A, shape=unit.change.shape, exact_shape=True)]
    items += [from_pairs.pair(path, found.B, found.A, exact_shape=True) for path in unit.also]
    return items


def _stacks(made: Sequence[Made], target: Target) -> list[Item]:
    """The pairs of stacked parameters: A (E r, in), expert by expert, and B (out, r E), rank by rank.

    (peft 0.21.2, tuners/lora/layer.py ParamWrapper: delta[e] = B.reshape(out, r, E)[:, :, e] A.reshape(E, r, in)[e].)
    """
    groups: dict[Stacked, list[Extraction]] = {}
    for one in made:
        if one.unit.stacked is not None:
            groups.setdefault(one.unit.stacked, []).append(one.found)
    items = []
    for stacked, found in groups.items():
        rank = max(f.rank for f in found)
        if rank == 0:
            continue
        pairs = [(f.A.T, f.B.T) if stacked.flipped else (f.B, f.A) for f in found]
        padded = [(_pad(B, (0, rank - B.shape[1])), _pad(A, (0, 0, 0, rank - A.shape[0]))) for B, A in pairs]
        A = torch.cat([A for _, A in padded])
        B = torch.stack([B for B, _ in padded], -1).flatten(1)
        path = stacked.parameter.rpartition(".")[0] + f".{target.dialect.transparent}" * stacked.inner
        item = from_pairs.pair(path, B, A, exact_shape=True)
        items.append(replace(item, claimed=rank, parameter=stacked.parameter))
    return items


def _value(whole: Whole, base: str, tuned: str) -> report.Kept:
    """A parameter that goes whole, read; checked to be finite."""
    changes = [Change(m, base, tuned) for m in whole.matches]
    norm = 0.0
    comparable = all(m.tuned_shape == m.shape for m in whole.matches)
    floating = all(t.info.dtype in ("F64", "F32", "F16", "BF16") for m in whole.matches for t in (m.base, *m.sources))
    if comparable and floating and not whole.same and not whole.tied:
        norm = math.sqrt(sum(norm_of(c) ** 2 for c in changes))
    value = _tuned_value(whole, tuned)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        changes[0].check_finite()
    if whole.difference:
        old = {m.name: read_tensor(m.base, base).flatten() for m in whole.matches}
        before = (
            operators.gather(whole.view, old).reshape(value.shape) if whole.view else old[whole.name].view(value.shape)
        )
        return report.Kept(
            whole, from_pairs.difference(whole.path, whole.leaf, subtract(value, before), role=whole.role), norm
        )
    return report.Kept(whole, from_pairs.whole(whole.path, whole.leaf, value, role=whole.role), norm)


def _tuned_value(whole: Whole, tuned: str) -> Tensor:
    if whole.view is None:
        return whole_value(whole.matches[0], tuned)
    held = {m.name: whole_value(m, tuned).flatten() for m in whole.matches}
    return operators.gather(whole.view, held).reshape(whole.view.shape)


def _settings(base: str, sorted_: Sorted, made: Sequence[Made]) -> dict[str, Any]:
    """What a config says beside ranks and names."""
    found = mounts.mounted(base)  # of a base on the Hub the repository, not where the cache has it
    settings: dict[str, Any] = {"base": base if found is None else found.origin.get("repo", found.name)}
    if sorted_.task:
        settings["task"] = sorted_.task
    if sorted_.saved:
        settings["modules-to-save"] = list(sorted_.saved)
    if sorted_.biases:
        settings["bias"] = "all"
    pairs = [one.unit for one in made if one.found.rank and not one.unit.embedding]
    if pairs and all(unit.flipped for unit in pairs):
        settings["fan-in-fan-out"] = True
    return settings


# ------------------------------------------------------------------------------------------------------------- errors


def _nothing(base: str, tuned: str, excluded: int) -> MismatchError:
    left = f" but for the {plural(excluded, 'tensor')} left out" if excluded else ""
    return MismatchError(
        "extract.equal",
        f"{base} and {tuned} have the same weights{left}: there is nothing to extract, and nothing was written",
        fix="is this the fine-tune, and not the base again?",
        file=tuned,
    )


def _all_noise(made: Sequence[Made], tuned: str, options: Options) -> MismatchError:
    floors = [one for one in made if one.floor]
    why = (
        "every change lies below what rounding to the checkpoint's own dtype makes"
        if floors
        else "every change is zero"
    )
    return MismatchError(
        "extract.empty",
        f"{plural(len(made), 'module')} changed, and {why}: nothing was written",
        fix="--no-noise-floor keeps it all the same" if floors and options.noise_floor else "is this the fine-tune?",
        file=tuned,
    )
