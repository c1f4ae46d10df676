"""Which family a checkpoint is of, and which an adapter was trained on, from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product

from loramerge.binding.layouts import detect_layout
from loramerge.binding.tables import SIDES, Component, Family, filled, layout_families
from loramerge.formats import extra_formats

SHARE = 0.5
"""How many of an adapter's modules a family must know to be named."""


def family_of_checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object] | None:
    """`{"name": ..., "layouts": {component: "hf" or "ldm"}}`; None where no table knows the names.

    Args:
        shapes: tensor -> shape.
    """
    layout = detect_layout(shapes)
    if layout is None or layout.family.fallback:
        return None
    return {"name": layout.family.name, "layouts": layout.sides}


def families_of_adapter(paths: Sequence[str]) -> list[str]:
    """The families that know most of an adapter's modules: the best one, or several that know as many.

    Args:
        paths: module paths, dotted or flattened, with or without the prefix of a component.
    """
    counts = {}
    for name, network, beside in _patterns(extra_formats()):
        others = [path for path in paths if path.startswith(beside)] if beside else []
        known = [path for path in paths if network.fullmatch(path)]
        # Text encoders are much alike: they only tell families apart whose network is there too.
        counts[name] = len(known) and len({*known, *others})
    most = max(counts.values(), default=0)
    return [name for name, count in counts.items() if count == most] if most and most >= SHARE * len(paths) else []


@cache
def _patterns(extra: str) -> tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...]:
    """(family, any module path of its network with any prefix, prefixes of its other components)."""
    return tuple(_pattern(family) for family in layout_families())


def _pattern(family: Family) -> tuple[str, re.Pattern[str], tuple[str, ...]]:
    main, *others = family.components
    forms = {path for path in (*_paths(main), *(name for name, _ in family.also)) if path}
    dotted = "|".join(map(_regex, sorted(forms)))
    flat = "|".join(_regex(form.replace(".", "_")) for form in sorted(forms))
    heads = (
        ("|".join(map(re.escape, sorted(prefixes, key=len, reverse=True)))) for prefixes in (main.dotted, main.flat)
    )
    whole = rf"(?:{next(heads)})?(?:{dotted})(?:\..+)?|(?:{next(heads)})(?:{flat})(?:_.+)?" if forms else r"(?!)"
    beside = tuple(prefix for c in others for prefix in (*c.dotted, *c.flat))
    return family.name, re.compile(whole), beside


def _regex(path: str) -> str:
    return re.escape(path.replace("{n}", "\0")).replace("\0", r"\d+").replace(r"\\d", r"\d")


def _paths(component: Component) -> Iterator[str]:
    """Module paths of both layouts, `{n}` standing for any number."""
    yield from component.modules
    for row in component.rows:
        leaves: dict[str, object] = {}
        for key in ("leaf", "last"):
            leaves |= component.leaves[row[key]] if key in row else {}
        each = row.get("each", {})
        for values in product(*(range(n) for n in each.values())):
            env = dict(zip(each, values, strict=True))
            heads = {side: filled(row[side], env) if each else row[side] for side in SIDES}
            # What both layouts call alike says little; `modules` has what matters of it.
            if heads["hf"] != heads["ldm"] and not row.get("closed"):
                yield from heads.values()
            for inner, outer in leaves.items():
                yield from (f"{heads['hf']}.{part}" for part in inner.split("|"))
                yield f"{heads['ldm']}.{outer['ldm'] if isinstance(outer, Mapping) else outer}"
