"""Tells modules that were found under another leading path than the rest of their adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from loramerge.binding.namespace import Namespace
from loramerge.tensors.text import some


def uneven_leads(names: Namespace, paths: Iterable[str]) -> list[str]:
    """One sentence for each leading path that only some of an adapter's modules had to drop or to get.

    A whole adapter may lead with another class's path than the base (`transformer.h` on `h`); a single module that
    does was probably renamed.

    Args:
        paths: parameters of the adapter's modules, `X.weight`.
    """
    leads: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        stored = names.find(path)
        if stored is None:
            continue
        stored = stored.replace("/", ".")
        if path == stored or path.endswith(f".{stored}"):
            leads[path[: len(path) - len(stored)], ""].append(path)
        elif stored.endswith(f".{path}"):
            leads["", stored[: len(stored) - len(path)]].append(path)
    usual = max(leads, key=lambda lead: (len(leads[lead]), lead == ("", "")), default=None)
    return [
        f"{some(found, 3)} matched {'without its' if ours else 'under the'} leading {(ours or theirs)[:-1]!r}, "
        "unlike the other modules: renamed?"
        for (ours, theirs), found in leads.items()
        if (ours or theirs) and (ours, theirs) != usual
    ]
