"""Rows that a trainer keeps in another order than the base, and fused modules of which it trains some parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.dialect import holds
from loramerge.adapters.updates import LowRank, Pick
from loramerge.adapters.views import Part, Take, View
from loramerge.binding.namespace import Namespace, Target
from loramerge.binding.rows import halves_of_pairs, join
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.text import plural, quoted

_MAX_PARTS = 12  # every subset of the parts is looked at


def rule_of(adapter: Adapter, module: Module, names: Namespace) -> Mapping[str, Any] | None:
    """The row of `[[rows]]` that holds for a module of this adapter on this base.

    `modules`: ends of the module's path. `when`: settings of the adapter and the values that they must have.
    `except-model-types`: bases for which the trainer changes no order.
    """
    path = f".{module.path}"
    for rule in adapter.dialect.rows:
        named = any(path.endswith(f".{end}") for end in rule["modules"])
        kept = names.model_types & set(rule.get("except-model-types", ()))
        if named and not kept and holds(rule.get("when", {}), adapter.settings):
            return rule
    return None


def arranged_target(
    adapter: Adapter, module: Module, target: Target, rule: Mapping[str, Any], names: Namespace
) -> Target:
    """The target with its rows in the adapter's order.

    `order = "pairs"`: in each head the adapter has row j of the first half and row j of the second next to each other,
    as rotary embeddings that turn neighbours want them (llama.cpp, conversion/llama.py LlamaModel.permute; torchtune
    0.6.1, models/convert_weights.py). `heads` says which size of the config counts the heads.

    Raises:
        MismatchError: `binding.sizes` where the base's config does not tell, `adapter.shape` where it cannot be right.
        UnsupportedError: `adapter.refused` for factors that nothing here reorders.
    """
    view, heads = target.view, names.size(rule["heads"])
    if heads is None:
        raise MismatchError(
            "binding.sizes",
            f"{quoted(module.path)} has its rows in another order than the base, and the base's config does not tell "
            f"how many heads there are ({rule['heads']})",
            fix="give the base with its own config.json",
            file=adapter.name,
            tensors=[part.tensor for part in view.parts],
        )
    if view.rows % (2 * heads):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: {plural(view.rows, 'row')} do not divide into {plural(heads, 'head')}",
            file=adapter.name,
            tensors=[part.tensor for part in view.parts],
        )
    if module.kind != "low-rank" or "bias" in module.factors:
        raise UnsupportedError(
            "adapter.refused",
            f"{quoted(module.path)} ({module.kind}) has its rows in another order than the base, and only low-rank "
            "factors and their magnitude can be reordered",
            file=adapter.name,
        )
    return Target(join([view], [halves_of_pairs(view.rows, heads)]))


def slot_updates(
    adapter: Adapter, index: int, weight: float, module: Module, rule: Mapping[str, Any], names: Namespace
) -> list[LowRank] | None:
    """The updates of the parts of a fused module, one pair of factors for each part that was trained.

    `A (g r, in)`, `B (sum of the heights of g parts, r)`, parts of any heights, in their order (litgpt 0.5.13, lora.py
    LoRAQKVLinear). `slots` names the settings that say which parts were trained.

    Returns:
        None where the base has no such module.

    Raises:
        MismatchError: `adapter.slots` where the factors fit no choice of parts, or several and nothing tells which.
    """
    A, B = module.factors["A"].shape, module.factors["B"].shape
    views = names.parts(f"{module.path}.weight")
    if views is None:
        return None
    g, heights = A[0] // B[1] if B[1] else 0, [view.rows for view in views]
    fitting = [s for s in _subsets(len(views)) if len(s) == g and sum(heights[i] for i in s) == B[0]]
    said = _said(adapter, rule, len(views))
    chosen = [s for s in fitting if said is None or s == said]
    if A[0] % max(1, B[1]) or len(chosen) != 1 or any(view.cols != A[1] for view in views):
        why = "several choices fit, and nothing says which was trained" if len(chosen) > 1 else "no choice fits"
        fix = "is this the base that the adapter was trained on?"
        if fitting:
            example = ",".join("1" if i in (said or fitting[0]) else "0" for i in range(len(views)))
            fix = f"give them, for example --enable-lora {example}"
        raise MismatchError(
            "adapter.slots",
            f"{quoted(module.path)}: A {A} and B {B} for parts of {heights} rows: {why}",
            fix=fix,
            file=adapter.name,
            tensors=[part.tensor for view in views for part in view.parts],
        )
    key_a, key_b = module.factors["A"].key, module.factors["B"].key
    scale = adapter.scale(module.path, B[1], own=adapter.alpha(module)) * weight
    return [
        LowRank(index, module.path, key_a, key_b, scale, B[1], Pick("rank", at, g), part)
        for at, (first, view) in enumerate(_stacked([views[i] for i in chosen[0]]))
        for part in _shifted(view, first)
    ]


def _said(adapter: Adapter, rule: Mapping[str, Any], count: int) -> tuple[int, ...] | None:
    """Which parts the settings say were trained."""
    flags = adapter.settings.get("enable-lora")
    if flags is None:
        flags = [adapter.settings.get(name) for name in rule["slots"]]
    if len(flags) != count or any(not isinstance(flag, bool) for flag in flags):
        return None
    return tuple(i for i, flag in enumerate(flags) if flag)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    for bits in range(1, 1 << min(count, _MAX_PARTS)):
        yield tuple(i for i in range(count) if bits >> i & 1)


def _stacked(views: list[View]) -> Iterator[tuple[int, View]]:
    """(first row among all rows, view) of views one after the other."""
    first = 0
    for view in views:
        yield first, view
        first += view.rows


def _shifted(view: View, first: int) -> Iterator[Part]:
    for part in view.parts:
        takes = tuple(Take(t.start + first, t.stop + first, t.step) for t in part.take)
        yield Part(part.tensor, part.place, part.flipped, takes)
