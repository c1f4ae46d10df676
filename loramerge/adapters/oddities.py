"""What is odd about an adapter's modules: factors that a few of them lack, layers with a hole."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from loramerge.adapters.adapter import Module, Plain
from loramerge.adapters.kinds import KINDS
from loramerge.tensors.text import plural, some

_INDEX = re.compile(r"(?<![^._])\d+(?![^._])")
"""A number between dots or underscores: the index of a layer in a path, flattened or not."""

SHOWN = 3


def oddities(modules: Sequence[Module], plain: Sequence[Plain], targets: object) -> list[str]:
    """One sentence for each thing that a complete file would not show. None of them stops a merge: trainers do write
    such files, but so do interrupted saves and edits.

    Args:
        targets: the modules that the config says were trained, where it lists them by the ends of their paths.
    """
    return [*_uneven_factors(modules), *_holes(modules), *_untrained(modules, plain, targets)]


def _untrained(modules: Sequence[Module], plain: Sequence[Plain], targets: object) -> list[str]:
    """Modules that the config lists and of which the file has nothing."""
    if not isinstance(targets, list):
        return []
    paths = [f".{m.path}." for m in modules] + [f".{p.path}." for p in plain]
    lacking = [t for t in targets if isinstance(t, str) and not any(f".{t}." in path for path in paths)]
    return [f"the config trains {some(lacking, SHOWN)}, of which the file has nothing: cut short?"] if lacking else []


def _uneven_factors(modules: Iterable[Module]) -> list[str]:
    """Factors that only some modules of a kind have, and that change what the module computes."""
    by_kind: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        by_kind[module.kind].append(module)
    found = []
    for kind, group in by_kind.items():
        counts = Counter(name for module in group for name in module.factors)
        for name, count in counts.items():
            # Whole and decomposed factors, bias and none, go together in one file: only a minority is odd.
            if len(group) / 2 <= count < len(group):
                lacking = [module.path for module in group if name not in module.factors]
                if any(_replaced(module, name) for module in group if name not in module.factors):
                    continue
                of = f"{len(lacking)} of {plural(len(group), 'module')}"
                found.append(f"{of} ({kind}) have no {name}: {some(lacking, SHOWN)}")
    return found


def _replaced(module: Module, name: str) -> bool:
    """Whether a module has another form of the factor: `w1` for `w1_a`, `D.zeros` for `D.X`, `embedding-A` for `A`."""
    stem = _stem(name)
    return any(
        other != name and (stem in (other, _stem(other)) or other in (f"embedding-{name}", stem))
        for other in module.factors
    )


def _stem(name: str) -> str:
    return re.sub(r"[-_.][^-_.]*$", "", name)


def _holes(modules: Iterable[Module]) -> list[str]:
    """Layers that lack a module which most of their siblings have."""
    lists: dict[str, dict[tuple[str, str], set[int]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        scaled = module.kind in KINDS and KINDS[module.kind].scaled
        what = module.leaf or ("" if scaled else module.kind)
        for match in _INDEX.finditer(module.path):
            lists[module.path[: match.start()]][module.path[match.end() :], what].add(int(match[0]))
    found: list[str] = []
    told: set[tuple[str, str]] = set()
    for head in sorted(lists, key=len, reverse=True):  # the innermost list first: a hole shows in outer ones too
        tails = lists[head]
        indices = set().union(*tails.values())
        for (tail, what), present in tails.items():
            lacking = [(f"{head}{index}{tail}", what) for index in sorted(indices - present)]
            new = [path for path, _ in lacking if (path, what) not in told]
            if new and len(present) > len(indices) / 2 and len(present) > 1:
                told |= set(lacking)
                of = f" ({what})" if what else ""
                found.append(f"there is no {some(new, SHOWN)}{of}, though its sibling layers have it")
    return found[:SHOWN] + ([f"and {len(found) - SHOWN} more holes of that sort"] if len(found) > SHOWN else [])
