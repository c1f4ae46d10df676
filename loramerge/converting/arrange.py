"""Rows and names in a target's own order and words, where these are not those of the base (`[[rows]]`, `rename`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from loramerge.adapters.dialect import holds
from loramerge.adapters.views import whole_view
from loramerge.binding.namespace import Namespace
from loramerge.binding.rows import halves_of_pairs, join
from loramerge.converting.homes import cells
from loramerge.converting.items import Item
from loramerge.converting.target import Target
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.formats import load_formats
from loramerge.tensors.text import quoted, some

_PART = re.compile(r"\\?\{n\\?\}")
"""The one number of a `rename` pair, escaped or not."""


def architecture(target: Target, names: Namespace | None, where: str) -> str | None:
    """What the target calls the base's architecture (`[write.architecture]`); None where it does not ask.

    Raises:
        MismatchError: `convert.needs-base`. UnsupportedError: `convert.architecture` for one that it has no name for.
    """
    known: Mapping[str, str] = target.write.get("architecture", {})
    if not known:
        return None
    if names is None:
        raise MismatchError(
            "convert.needs-base",
            f"{target.title} names and orders weights by architecture, which the adapter does not tell",
            fix="give the model it was trained on: --base BASE",
            file=where,
        )
    found = next((known[t] for t in sorted(names.model_types) if t in known), None)
    if found is None:
        raise UnsupportedError(
            "convert.architecture",
            f"how {target.title} names the weights of {some(sorted(names.model_types)) or 'this model'} is not known",
            fix=f"known: {', '.join(sorted(known))}",
            file=where,
        )
    return found


def arranged(items: Iterable[Item], target: Target, names: Namespace | None, settings: Mapping[str, Any]) -> list[Item]:
    """Items with their output rows in the target's order.

    Raises:
        MismatchError: `convert.needs-base`, `binding.sizes` where nothing tells how many heads there are.
        UnsupportedError: `convert.rows` for kinds whose rows cannot be moved.
    """
    return [_arranged(item, target, names, settings) for item in items]


def _arranged(item: Item, target: Target, names: Namespace | None, settings: Mapping[str, Any]) -> Item:
    path = f".{item.path}"
    rule = next(
        (
            rule
            for rule in target.dialect.rows
            if any(path.endswith(f".{end}") for end in rule["modules"]) and holds(rule.get("when", {}), settings)
        ),
        None,
    )
    if rule is None or item.kind == "plain":
        return item
    if names is None:
        raise MismatchError(
            "convert.needs-base",
            f"{target.title} keeps the rows of {quoted(item.module)} in another order, in each head",
            fix="give the model it was trained on, which tells how many heads there are: --base BASE",
            tensors=[item.module],
        )
    if names.model_types & set(rule.get("except-model-types", ())):
        return item
    heads = names.size(rule["heads"])
    if heads is None:
        raise MismatchError(
            "binding.sizes",
            f"the base's config does not tell how many heads there are ({rule['heads']})",
            fix="give the base with its own config.json",
            tensors=[item.module],
        )
    if "B" not in item.factors or {"mid"} & item.factors.keys() or rule.get("order") != "pairs":
        raise UnsupportedError(
            "convert.rows",
            f"{quoted(item.module)} ({item.kind}): {target.title} keeps its rows in another order, and only low-rank "
            "pairs can be reordered",
            fix="merge it instead",
            tensors=[item.module],
        )
    rows = item.factors["B"].shape[0]
    held = cells(join([whole_view("", (rows, 1))], [halves_of_pairs(rows, heads)]).parts)
    order = torch.empty(rows, dtype=torch.long)
    for (_, stored, _), row in held.items():
        order[row] = stored
    moved = {n: f[order] for n, f in item.factors.items() if n in ("B", "bias")}
    magnitude = item.magnitude
    if magnitude is not None and magnitude.axis == "output":
        magnitude = replace(magnitude, vector=magnitude.vector[order])
    return replace(item, factors={**item.factors, **moved}, magnitude=magnitude, how="reordered")


def own_names(items: Sequence[Item], target: Target, settings: Mapping[str, Any], where: str) -> list[Item]:
    """Items under the target's own words for modules: its `rename` pairs the other way round.

    Raises:
        UnsupportedError: `convert.name` for a module that it has no word for.
    """
    if target.write.get("names") != "own":
        return list(items)
    table = next(t["path"] for t in load_formats("adapters") if t["name"] == target.dialect.name)
    special = [pair for row in table.get("rename-where", ()) if holds(row["when"], settings) for pair in row["rename"]]
    pairs = [
        (re.compile(_PART.sub(r"(\\d+)", re.escape(now))), _PART.sub(r"\\g<1>", old.removeprefix("^")))
        for old, now in (*special, *table.get("rename", ()))
    ]
    made = []
    for item in items:
        new = next((pattern.sub(to, item.path) for pattern, to in pairs if pattern.fullmatch(item.path)), None)
        if new is None:
            raise UnsupportedError(
                "convert.name",
                f"{target.title} has no name for {quoted(item.module)} that is known here",
                fix="leave it out with --exclude",
                file=where,
                tensors=[item.module],
            )
        made.append(replace(item, path=new))
    return made
