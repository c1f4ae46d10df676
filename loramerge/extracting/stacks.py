"""Stacked parameters (experts): found by their names in memory or their pieces on disk, one unit for each matrix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from loramerge.adapters.views import Part, Place, Take, View
from loramerge.binding.namespace import Namespace, Stack
from loramerge.extracting.parts import Stacked, Unit
from loramerge.extracting.reading import AnyChange, Change, SliceChange, ViewChange

WEIGHT = "weight"


def stack_of(name: str, axes: int, names: Namespace) -> tuple[str, tuple[str, ...]] | None:
    """The stacked parameter that a stored tensor is, or is a matrix of, and the last names of its pieces on disk."""
    for stacked, rows in names.families.stacks:
        last = tuple(row.removesuffix(f".{WEIGHT}").rpartition(".")[2] for row in rows)
        if axes == 3:
            memory = name
            for rule in names.families.renamed:
                if rule.loading and (not rule.model_types or rule.model_types & names.model_types):
                    memory = rule.in_memory(memory)
            if f".{memory}".endswith(f".{stacked}"):
                return memory, last
        for row in rows:
            match = re.search(rf"(?:^|\.){re.escape(row).replace(re.escape('{e}'), '[0-9]+')}$", name)
            if match is not None and axes == 2:
                prefix = name[: match.start() + 1] if match.group().startswith(".") else ""
                return f"{prefix}{stacked}", last
    return None


def _rows_of(piece: tuple[str, int, int], cols: int) -> Part:
    """The rows of an expert's matrix that one tensor is."""
    name, first, rows = piece
    return Part(name, Place(0, rows, cols, 0, cols), False, (Take(first, first + rows),))


def wrapped_outside(parameter: str, found: Collection[str], order: Sequence[str]) -> int:
    """How many parameters of the same module a reader wraps after this one, and so around it."""
    module, _, leaf = parameter.rpartition(".")
    later = order[order.index(leaf) + 1 :] if leaf in order else ()
    return sum(f"{module}.{other}" in found for other in later)


def units_of(
    parameter: str, stack: Stack, changes: Mapping[str, Change], inner: int, names: Namespace
) -> Iterator[Unit]:
    """One unit for each matrix of a stack; `changes` of the tensors that it lies in."""
    count, rows, cols = stack.shape
    flipped = not stack.pieces and names.model_type in names.families.experts_transposed
    group = Stacked(parameter, count, flipped, inner)
    for e in range(count):
        change: AnyChange
        if stack.pieces:
            parts = tuple(_rows_of(piece, cols) for piece in stack.pieces[e])
            change = ViewChange(View((rows, cols), parts), tuple(changes[name] for name, _, _ in stack.pieces[e]))
        else:
            change = SliceChange(changes[stack.name], e)
        shape = (cols, rows) if flipped else (rows, cols)
        module = parameter.rpartition(".")[0]
        yield Unit(f"{parameter}[{e}]", module, change, shape, flipped, stacked=group)
