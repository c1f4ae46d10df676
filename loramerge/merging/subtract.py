"""The lossy way back: what was merged is computed again and subtracted, and how much may be wrong is measured."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.operators import Operator
from loramerge.adapters.updates import ReadFactor, Update, Weights, only_adds, to_data
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.merging import sidefiles
from loramerge.merging.bound import bind_checkpoint
from loramerge.merging.methods import Combined, combined
from loramerge.merging.plan import OutputFile, Plan, Step, make_plan
from loramerge.merging.run import Options
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.text import plural, quoted, some

if TYPE_CHECKING:
    from torch import Tensor

CODED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes whose loss can be measured, and what torch calls them."""


class Tally:
    """Counts over all changed weights, for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.elements = 0
        self.ambiguous = 0
        self.wrong = 0.0

    def add(self, merged: Tensor, delta: Tensor) -> None:
        """Elements of a tensor: merged (n,) in its own dtype, delta (n,) float64."""
        from loramerge.merging.candidates import ambiguity

        ambiguous, wrong = ambiguity(merged, delta)
        with self._lock:
            self.elements += merged.numel()
            self.ambiguous += ambiguous
            self.wrong += wrong

    def to_data(self) -> dict[str, Any]:
        """`share`: of the changed weights, how many are expected to differ from the base; `may_differ`: how many were
        rounded from more than one weight, so that M and d do not tell which."""
        n = max(self.elements, 1)
        return {
            "elements": self.elements,
            "share": float(f"{self.wrong / n:.4g}"),
            "may_differ": float(f"{self.ambiguous / n:.4g}"),
        }


@dataclass(frozen=True)
class Minus:
    """`W' = M - d` in float64, d the sum of `of`: all updates of a tensor for the first of them, none for the rest."""

    update: Update
    of: InitVar[tuple[Update, ...]]
    dtype: InitVar[str]
    tally: InitVar[Tally]

    def __post_init__(self, of: tuple[Update, ...], dtype: str, tally: Tally) -> None:
        # Not fields: they are no part of the plan's data.
        object.__setattr__(self, "_own", (of, dtype, tally))

    @property
    def kind(self) -> str:
        return f"minus {self.update.kind}"

    @property
    def adapter(self) -> int:
        return self.update.adapter

    @property
    def module(self) -> str:
        return self.update.module

    @property
    def keys(self) -> tuple[str, ...]:
        return self.update.keys

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {"kind": self.kind, "update": to_data(self.update)}

    def operator(self, read: ReadFactor, weights: Weights) -> Operator | None:
        of, dtype, tally = self.__dict__["_own"]
        made = [update.operator(read, weights) for update in of]
        operators = tuple(operator for operator in made if operator is not None)
        return _Subtract(operators, dtype, tally) if operators else None


@dataclass(frozen=True)
class _Subtract:
    """block -= what the operators add to it."""

    operators: tuple[Operator, ...]
    dtype: str
    tally: Tally

    def apply(self, block: Tensor, first: int, original: Tensor) -> None:
        import torch

        delta = torch.zeros_like(block)
        for operator in self.operators:
            operator.apply(delta, first, delta)
        self.tally.add(block.to(getattr(torch, CODED[self.dtype])), delta)  # block is M still, exactly
        block -= delta

    def addends(self, index: Tensor) -> Tensor | None:
        return None


def plan_subtract(
    merged: Checkpoint,
    receipt: Mapping[str, Any],
    pairs: Sequence[tuple[Adapter, float]],
    options: Options,
    single_file: str | None,
) -> tuple[Plan, Tally]:
    """The plan that subtracts from a merged model what its receipt says was merged.

    Args:
        pairs: the adapters with the weights that they were merged with, in the receipt's order.
        options: those of the merge.

    Raises:
        UnsupportedError: `unmerge.not-additive`: some tensor was not only added to. MismatchError: `unmerge.adapter`.
    """
    _check_receipt(merged, receipt)
    how = options.chosen(len(pairs))
    binding = bind_checkpoint(merged, pairs, options, receipt=receipt)
    binding = combined(binding, how, pairs, options.compute_dtype)
    others = [n for n, updates in binding.updates.items() if not all(map(_adds, updates))]
    odd = [n for n in binding.updates if n in merged.tensors and merged.tensors[n].info.dtype not in CODED]
    refused = [*others, *odd, *binding.replaced, *binding.added, *binding.untied, *binding.grown]
    if refused:
        raise _not_additive(merged, list(dict.fromkeys(refused)), "changed by more than an addition")
    changed = {n for n, row in receipt["tensors"].items() if _changed(row)}
    if lost := sorted(changed - binding.updates.keys()):
        raise MismatchError(
            "unmerge.adapter",
            f"the adapters do not change {some(lost)}, which the receipt says were changed",
            fix="give the base: --base BASE",
            file=merged.name,
            tensors=lost,
        )
    tally = Tally()
    updates = {n: binding.updates[n] for n in binding.updates if n in changed}
    own = {
        name: (Minus(u[0], tuple(u), merged.tensors[name].info.dtype, tally), *_rest(u, tally))
        for name, u in updates.items()
    }
    plan = make_plan(
        merged,
        pairs,
        replace(binding, updates={}, config={}),
        side_files=sidefiles.collect(merged, [], "base")[0] if single_file is None else (),
        single_file=single_file,
        options=replace(options, dtype="keep", compute_dtype="float64", shard_size=None).recorded(),
    )
    return replace(plan, files=tuple(_with(file, own) for file in plan.files)), tally


def _adds(update: Update) -> bool:
    """Whether what it adds can be computed again without the base."""
    return not update.looks_at_weights if isinstance(update, Combined) else only_adds(update)


def _rest(updates: Sequence[Update], tally: Tally) -> tuple[Minus, ...]:
    return tuple(Minus(update, (), "", tally) for update in updates[1:])


def _with(file: OutputFile, own: Mapping[str, tuple[Minus, ...]]) -> OutputFile:
    steps = tuple(_minus(step, own[step.tensor]) if step.tensor in own else step for step in file.steps)
    whole = None if any(step.updates for step in steps) else file.whole
    return replace(file, steps=steps, whole=whole)


def _minus(step: Step, updates: tuple[Minus, ...]) -> Step:
    return replace(step, do="change", updates=updates)


def _changed(row: Mapping[str, Any]) -> bool:
    """Whether a tensor is another than the base's."""
    return row.get("do") != "copy" and (row.get("base_digest") is None or row["base_digest"] != row.get("digest"))


def _check_receipt(merged: Checkpoint, receipt: Mapping[str, Any]) -> None:
    """What the receipt alone says cannot be subtracted."""
    rows = receipt["tensors"]
    if refused := sorted(n for n, row in rows.items() if row.get("do") == "add" or "from" in row or "grown" in row):
        raise _not_additive(merged, refused, "added, replaced or resized")
    if receipt["options"].get("dtype", "keep") != "keep":
        raise _not_additive(merged, [], "rounded to another dtype than the base's")
    if receipt.get("config"):
        raise _not_additive(merged, [], f"the config was changed ({some(sorted(receipt['config']))})")


def _not_additive(merged: Checkpoint, names: Sequence[str], what: str) -> UnsupportedError:
    if len(names) == 1:
        what = f"{quoted(names[0])} was {what}"
    elif names:
        what = f"{plural(len(names), 'tensor')} were {what}: {some(names)}"
    else:
        what = f"it was {what}" if what.startswith("rounded") else what
    return UnsupportedError(
        "unmerge.not-additive",
        f"cannot be brought back by subtraction: {what}",
        fix="give the base: --base BASE",
        file=merged.name,
        tensors=names,
    )
