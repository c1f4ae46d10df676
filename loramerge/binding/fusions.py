"""Fused weights: one tensor in one layout of a family, several in another; experts of a stack among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loramerge.adapters.views import Part, Place, Take, View, whole_view
from loramerge.binding.families import Fused
from loramerge.binding.rows import Runs, arranged, halves_of_pairs, join, select, transposed
from loramerge.errors import MismatchError
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from loramerge.binding.namespace import Namespace

_LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class _Sizes:
    """Sizes by the fields of a config, its own and those of the configs that it nests."""

    config: Mapping[str, Any]
    nested: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]

    def field(self, name: str, within: str = "") -> Any:
        """A field of the config `within`, or of the first that has it."""
        inner = [self.config.get(n) for n in ((within,) if within else self.nested)]
        configs = [*(() if within else (self.config,)), *(c for c in inner if isinstance(c, dict))]
        return next((c[name] for c in configs if c.get(name) is not None), None)

    def __call__(self, size: str | int, within: str = "") -> int | None:
        """A size: a number, a product of named ones, None where the config does not say."""
        if isinstance(size, int):
            return size
        total = 1
        for factor in size.split("*"):
            fields = self.names.get(factor, (factor,))
            found = next((v for f in fields if type(v := self.field(f, within)) is int and v > 0), None)
            if found is None:
                return None
            total *= found
        return total


class Fusions:
    """Finds what a base stores in another fusion than that in which the adapter names it."""

    def __init__(self, names: Namespace) -> None:
        self._names = names
        facts = names.families
        self._sizes = _Sizes(names.config, facts.nested, facts.sizes)
        self._seen: set[str] = set()

    @cached_property
    def _rules(self) -> tuple[Fused, ...]:
        """The rules for this model; one that names its type stands before those for any."""
        fitting = [r for r in self._names.families.fused if self._fits(r)]
        own = {r.fused for r in fitting if r.model_types}
        return tuple(r for r in fitting if r.model_types or r.fused not in own)

    def _fits(self, rule: Fused) -> bool:
        if rule.model_types and not rule.model_types & self._names.model_types:
            return False
        for name, wanted in rule.when.items():
            value = self._sizes.field(name)
            if (rule.assumed.get(name) if value is None else value) != wanted:
                return False
        return True

    def find(self, name: str) -> View | None:
        """The view of a parameter that the base stores fused with others, or of one that it stores in parts.

        Raises:
            MismatchError: `binding.sizes` where only the base's config could tell which rows are meant.
        """
        if name in self._seen:  # a part of itself, by two rules
            return None
        self._seen.add(name)
        try:
            found = self._expert(name)
            return found or self._part(name) or self._joined(name)
        finally:
            self._seen.discard(name)

    def parts(self, name: str) -> list[View] | None:
        """The views of the parts of a fused parameter, in their order, whether the base stores it so or in parts.

        Raises:
            MismatchError: `binding.sizes`.
        """
        for rule in self._rules:
            for prefix, leaf in _matches(rule.fused, name):
                whole = self._stored(name)
                if whole is not None:
                    heights = self._heights(rule, prefix, whole.rows, name)
                    return [select(whole, runs) for runs in self._runs(rule, heights, name)]
                targets = [self._names.target(prefix + _path(part, leaf)) for part in rule.parts]
                views = [t.view for t in targets if t is not None]
                if len(views) == len(rule.parts) and len({v.shape[1:] for v in views}) == 1:
                    return views
        return None

    def size(self, name: str) -> int | None:
        """A size that the base's config says (`[sizes]`)."""
        return self._sizes(name)

    # --- fused projections ------------------------------------------------------------------------

    def _part(self, name: str) -> View | None:
        """A split parameter, of a fused one that the base has."""
        for rule in self._rules:
            for i, part in enumerate(rule.parts):
                for prefix, leaf in _matches(part, name):
                    whole = self._stored(prefix + _path(rule.fused, leaf))
                    if whole is None:
                        continue
                    heights = self._heights(rule, prefix, whole.rows, name)
                    return select(whole, self._runs(rule, heights, name)[i])
        return None

    def _joined(self, name: str) -> View | None:
        """A fused parameter, of the split ones that the base has."""
        for rule in self._rules:
            for prefix, leaf in _matches(rule.fused, name):
                targets = [self._names.target(prefix + _path(part, leaf)) for part in rule.parts]
                views = [t.view for t in targets if t is not None]
                if len(views) != len(rule.parts) or len({v.shape[1:] for v in views}) != 1:
                    continue
                return join(views, self._runs(rule, [v.rows for v in views], name))
        return None

    def _stored(self, name: str) -> View | None:
        """A stored tensor as (out, in)."""
        found = self._names.find(name)
        if found is None:
            return None
        shape = self._names[found].shape
        flipped = len(shape) == 2 and self._names.families.is_transposed(
            self._names.model_type, found.rpartition(".")[0]
        )
        return whole_view(found, shape, flipped=bool(flipped))

    def _heights(self, rule: Fused, prefix: str, rows: int, name: str) -> list[int]:
        """The rows of each part of a fused weight with `rows` rows."""
        scale = [self._sizes(size, rule.config) for size in rule.rows] or [1] * len(rule.parts)
        known = [n for n in scale if n is not None]
        if len(known) == len(scale) and rows % sum(known) == 0:
            return [rows // sum(known) * n for n in known]
        beside = self._stored(f"{prefix}{rule.like}.weight") if rule.like else None
        if beside is not None and len(known) < len(scale):
            first, others = beside.cols, len(rule.parts) - 1
            if 0 < first < rows and (rows - first) % others == 0:
                return [first, *[(rows - first) // others] * others]
        raise self._unknown(name, rule, rows)

    def _runs(self, rule: Fused, heights: list[int], name: str) -> list[Runs]:
        groups = min(heights) if rule.groups == "rows" else self._sizes(rule.groups, rule.config)
        if groups is None or any(height % groups for height in heights):
            raise self._unknown(name, rule, sum(heights))
        runs = arranged(heights, groups)
        for i in rule.rotary:
            heads = self._sizes("heads", rule.config)
            if heads is None or heights[i] % (2 * heads) or groups != 1:
                raise self._unknown(name, rule, sum(heights))
            runs[i] = halves_of_pairs(heights[i], heads, sum(heights[:i]))
        return runs

    def _unknown(self, name: str, rule: Fused, rows: int) -> MismatchError:
        needed = sorted({f for size in (*rule.rows, rule.groups) if isinstance(size, str) for f in size.split("*")})
        return MismatchError(
            "binding.sizes",
            f"{quoted(name)} is rows of a weight with {rows}, and the base's config does not tell which "
            f"({', '.join(needed)})",
            fix="give the base with its own config.json",
            tensors=[name],
        )

    # --- experts ----------------------------------------------------------------------------------

    def _expert(self, name: str) -> View | None:
        """One expert's matrix: a slice of a stack, or the same tensor under the name of another layout."""
        for stacked, rows in self._stacks:
            for i, row in enumerate(rows):
                found = row.match(name)
                if found is None:
                    continue
                prefix, e = found[1], int(found[2])
                stack = self._names.find(prefix + stacked)
                if stack is not None and len(self._names[stack].shape) == 3:
                    return self._slice(stack, e, i, len(rows))
                for other, templates in self._names.families.stacks:
                    if (other, len(templates)) == (stacked, len(rows)):
                        same = prefix + templates[i].format(e=e)
                        if same != name and (stored := self._names.find(same)) is not None:
                            return whole_view(stored, self._names[stored].shape)
        return None

    @cached_property
    def _stacks(self) -> list[tuple[str, list[re.Pattern[str]]]]:
        """Stacked parameters and what a path of an expert's matrix looks like: what is before it, the expert."""

        def pattern(row: str) -> re.Pattern[str]:
            return re.compile(r"((?:.*\.)?)" + re.escape(row).replace(r"\{e\}", r"(\d+)") + "$")

        return [(stacked, [pattern(row) for row in rows]) for stacked, rows in self._names.families.stacks]

    def _slice(self, stack: str, e: int, i: int, count: int) -> View | None:
        """Matrix i of the `count` that expert e of a stack joins."""
        experts, d1, d2 = self._names[stack].shape
        if e >= experts:
            return None
        place = Place(e * d1 * d2, d1, d2, 0, d2)
        view = View((d1, d2), (Part(stack, place, False, (Take(0, d1),)),))
        view = transposed(view) if self._is_turned(stack) else view
        if count == 1:
            return view
        layout = self._layout
        height = view.rows // count
        if height * count != view.rows:
            return None
        return select(view, arranged([height] * count, height if layout is not None and layout.alternating else 1)[i])

    def _is_turned(self, stack: str) -> bool:
        """Whether a stack is (expert, in, out): gate and up must have twice the rows that down has columns."""
        first, last = self._names.families.expert_pair
        parent, _, own = stack.rpartition(".")
        gate, down = (self._names.find(f"{parent}.{leaf}") for leaf in (first, last))
        if own in (first, last) and gate is not None and down is not None:
            (_, g1, g2), (_, d1, d2) = self._names[gate].shape, self._names[down].shape
            straight, turned = (g1, g2) == (2 * d2, d1), (g1, g2) == (d2, 2 * d1)
            if straight or turned:
                return turned
        return self._layout is not None and self._layout.transposed

    @cached_property
    def _layout(self) -> Any:
        types = self._names.model_types
        return next((x for x in self._names.families.expert_layouts if x.model_types & types), None)


def _path(pattern: str, leaf: str) -> str:
    return pattern.replace("{leaf}", leaf) if "{leaf}" in pattern else f"{pattern}.{leaf}"


def _matches(pattern: str, name: str) -> Iterator[tuple[str, str]]:
    """(what stands before, parameter) where a path ends in the pattern and a parameter."""
    for leaf in _LEAVES:
        end = _path(pattern, leaf)
        if name == end or name.endswith(f".{end}"):
            yield name[: len(name) - len(end)], leaf
