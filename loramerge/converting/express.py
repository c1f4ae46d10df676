"""Items in the kinds of a target: as they are where it has their kind, multiplied out or approximated where asked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.binding.families import families
from loramerge.converting.factors import as_pair, low_rank, padded
from loramerge.converting.items import PAIR, Item
from loramerge.converting.target import Target
from loramerge.converting.uniform import uniform
from loramerge.errors import UnsupportedError
from loramerge.tensors.text import plural, quoted, some

SCALED_BY = ("B", "embedding-B", "w1", "w1_a")
"""The factor that takes the scale, where a target has no other place for it."""


@dataclass(frozen=True)
class Expressed:
    """What to write: items by the target's kinds, the method that they share, and what was left out."""

    items: tuple[Item, ...]
    method: Mapping[str, Any]
    dropped: tuple[Item, ...] = ()
    alpha: float | None = None
    """The alpha that a reader must be given, where the file does not say it."""


def express(items: Iterable[Item], target: Target, *, rank: int | None, drop: bool, where: str) -> Expressed:
    """Items that the target can hold.

    Args:
        rank: the rank of the pair that takes the place of what the target cannot hold.
        drop: leave out what it cannot hold even so.

    Raises:
        UnsupportedError: `convert.kind`: what it cannot hold, why, and the nearest route.
    """
    normal = [part for item in items for part in _normal(item, target)]
    method = _method(normal, target)
    if rank is not None and any(_reason(item, target, method) for item in normal):
        pairs = (m for m in target.write.get("method", ()) if PAIR in m["kinds"])
        method = next(pairs, method)  # what does not fit becomes pairs
    normal, uneven = _made_again(normal, method)
    kept: list[Item] = []
    refused: list[tuple[Item, str]] = []
    for item in normal:
        reason = _reason(item, target, method)
        if reason is None and item.kind in uneven:
            reason = f"{target.title} makes all factors from one config, and no one config gives these"
        if reason is None:
            kept.append(item)
            continue
        made = None
        split = as_pair(item)
        if split is not None and split.own and item.kind != PAIR:
            made = low_rank(item, None)
        elif rank is not None:
            made = low_rank(item, rank)
        if made is not None and _reason(made, target, method) is None:
            kept.append(made)
        else:
            refused.append((item, reason))
    if refused and not drop:
        raise _refusal(refused, target, rank, where)
    if not kept:
        raise UnsupportedError(
            "convert.empty", f"nothing of the adapter is left for {target.title}", fix="see --include", file=where
        )
    kept, alpha = _scaled(kept, target)
    return Expressed(tuple(kept), method, tuple(item for item, _ in refused), alpha)


def _normal(item: Item, target: Target) -> list[Item]:
    """An item in the words of the target: embeddings by their own factors, a bias as a difference of its own."""
    keys = target.keys.get(PAIR, {})
    if item.kind == PAIR and "A" in item.factors and "embedding-A" in keys and not item.exact_shape and _is_input(item):
        item = replace(item, factors={"embedding-A": item.factors["A"], "embedding-B": item.factors["B"]}, options={})
    if item.kind == PAIR and "bias" in item.factors and "bias" not in keys:
        factors = {n: f for n, f in item.factors.items() if n != "bias"}
        bias = (item.factors["bias"].double() * item.scale).to(item.factors["bias"].dtype)
        rest = Item(item.module, "difference", {"diff": bias}, leaf="bias", role=item.role, path=item.path)
        return [replace(item, factors=factors), rest]
    return [item]


def _is_input(item: Item) -> bool:
    """Whether a module has the name of an input embedding."""
    name = item.module.rpartition(".")[2]
    return name in {pair.input.removesuffix(".weight").rpartition(".")[2] for pair in families().tied}


def _method(items: Sequence[Item], target: Target) -> Mapping[str, Any]:
    """The method of the target's file: the one that holds most of the items; the first of several."""
    methods: Sequence[Mapping[str, Any]] = target.write.get("method", ())
    if not methods:
        return {}
    methods = [m for m in methods if set(m["kinds"]) & target.keys.keys()] or methods
    counts = Counter(item.kind for item in items)
    return max(methods, key=lambda m: sum(counts[kind] for kind in m["kinds"]))


def _made_again(items: Sequence[Item], method: Mapping[str, Any]) -> tuple[list[Item], tuple[str, ...]]:
    """Items with the rank that the config must claim, where the reader makes their factors from it (`[write.method]
    again`); and the kinds for which no one config does."""
    kind = method.get("again")
    mine = [item for item in items if item.kind == kind]
    if not mine:
        return list(items), ()
    found = uniform(mine)
    if found is None:
        return list(items), (str(kind),)
    ranks = iter(found.ranks)
    return [replace(item, claimed=next(ranks)) if item.kind == kind else item for item in items], ()


def _reason(item: Item, target: Target, method: Mapping[str, Any]) -> str | None:
    """Why the target cannot hold an item as it is; None where it can."""
    if item.kind == "plain":
        return _plain_reason(item, target)
    keys = target.keys.get(item.kind)
    title = target.title
    if keys is None:
        return target.refuse.get(item.kind) or target.refuse.get(item.leaf) or f"{title} has no such kind"
    if method and item.kind not in method["kinds"]:
        return f"{title} keeps one kind in a file, and the others are {some(sorted(method['kinds']), 3)}"
    for name in item.factors:
        if suffix_of(keys, name, item.leaf) is None:
            return target.refuse.get(name, f"{title} has no {name}" + (f" of a {item.leaf}" if item.leaf else ""))
    if item.magnitude is not None:
        if not MAGNITUDES.keys() & keys.keys():
            return target.refuse.get("magnitude", f"{title} has no DoRA magnitude")
        if item.magnitude.axis == "input" and not any(MAGNITUDES.get(n) == "interpolated" for n in keys):
            return f"{title} has no magnitude along the input axis"
        if "embedding-A" in item.factors:
            return "the magnitude of an embedding has no common form"
    axes = target.write.get("axes")
    if axes and any(f.dim() > axes for f in item.factors.values()):
        return f"{title} has another form for convolutions"
    ranks = target.ranks
    if ranks and item.rank is not None and item.rank > max(ranks):
        return f"{title} takes ranks up to {max(ranks)}, this has {item.rank}"
    return None


def _plain_reason(item: Item, target: Target) -> str | None:
    if target.plain is True:
        return None
    if target.plain and item.path.rpartition(".")[2] in target.plain:
        return None
    if suffix_of(target.keys.get("plain", {}), "value", item.leaf) is not None:
        return None
    return target.refuse.get("plain", f"{target.title} has no whole parameters")


def suffix_of(keys: Mapping[str, Any], factor: str, leaf: str = "") -> str | None:
    """The suffix of a factor: `factor@leaf` for a parameter other than the weight; `x.{n}` for numbered factors."""
    name, number = (factor, "") if factor in keys else (f"{factor.rpartition('.')[0]}.{{n}}", factor.rpartition(".")[2])
    if leaf and leaf != "weight":
        name = f"{factor}@{leaf}"
    row = keys.get(name)
    suffix = row["suffix"] if isinstance(row, Mapping) else row
    return None if suffix is None else str(suffix).replace("{n}", number)


def is_turned(keys: Mapping[str, Any], factor: str) -> bool:
    """Whether the file holds a factor transposed."""
    row = keys.get(factor)
    return isinstance(row, Mapping) and bool(row.get("transpose"))


def _refusal(refused: Sequence[tuple[Item, str]], target: Target, rank: int | None, where: str) -> UnsupportedError:
    """What cannot be held, by reason, and the nearest route."""
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item, reason in refused:
        groups[item.kind, reason].append(item)
    (kind, reason), items = max(groups.items(), key=lambda pair: len(pair[1]))
    others = f"; and {plural(len(refused) - len(items), 'other module')}" if len(groups) > 1 else ""
    what = f"{plural(len(items), 'module')} ({kind}) cannot be written for {target.title}: {reason}{others}"
    item = items[0]
    pair = as_pair(item)
    never = kind not in KINDS or "embedding-A" in item.factors
    blind = pair is None and item.weight is None  # neither a product nor, without a base, anything else
    if never or item.leaf not in ("", "weight"):
        fix = "--drop leaves it out; merging it keeps it"
    elif pair is not None and kind != PAIR and rank is None:
        fix = f"--rank N writes the nearest low-rank pair (rank {pair.rank} is exact); --drop leaves them out"
    elif rank is None:
        needs = " with --base BASE" if blind else ""
        fix = f"--rank N{needs} writes the nearest low-rank pair and tells its error; --drop leaves them out"
    elif blind:
        fix = "its change depends on the weight: give --base BASE; or --drop leaves it out"
    else:
        fix = "--drop leaves them out; merging keeps them"
    return UnsupportedError("convert.kind", what, fix=fix, file=where, tensors=[i.module for i, _ in refused])


# ------------------------------------------------------------------------------------------------------- the scale


def _scaled(items: Sequence[Item], target: Target) -> tuple[list[Item], float | None]:
    """Items whose scale the target can say: by alpha, or multiplied into a factor."""
    mode = target.scale
    items = _one_rank(items, target) if target.one_rank else items
    made = list(items)
    alpha: float | None = None
    if mode in ("ask", "common"):  # one alpha for all: to be given by the reader, or in the file
        counts = Counter(round_alpha(i.scale * i.rank) for i in items if i.rank is not None)
        alpha = next((value for value, _ in counts.most_common() if value), 1.0)
        made = [_baked(i, alpha / i.rank) if i.rank else i for i in items]
    elif mode == "absolute":
        counts = Counter(i.scale for i in items if i.rank is not None)
        common = next((value for value, _ in counts.most_common() if value), 1.0)
        made = [_baked(i, common) if i.rank else i for i in items]
    elif mode == "baked":
        made = [_baked(i, 1.0) for i in items]
    elif target.dialect.scale.get("zero") == "one":
        made = [_baked(i, 1.0) if i.scale == 0 else i for i in items]
    if target.dialect.options.get("full-scale-one"):
        made = [_baked(i, 1.0) if i.rank is None else i for i in made]
    return made, alpha if mode == "ask" else None


def _one_rank(items: Sequence[Item], target: Target) -> list[Item]:
    """All pairs with one rank: the largest, or the next that is allowed. The scale stays, so alpha grows along."""
    rank = max((i.rank for i in items if i.rank is not None), default=1)
    if target.ranks:
        rank = min(r for r in target.ranks if r >= rank)
    return [_with_rank(i, rank) for i in items]


def round_alpha(alpha: float) -> float:
    """The whole number that alpha is but for rounding, or itself."""
    whole = round(alpha)
    return float(whole) if abs(alpha - whole) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def _baked(item: Item, scale: float) -> Item:
    """The same update with another scale: the rest of it goes into a factor."""
    name = next((n for n in SCALED_BY if n in item.factors), None)
    if name is None or item.scale == scale:
        return item
    ratio = item.scale / scale
    scaled = {
        n: (item.factors[n].double() * ratio).to(item.factors[n].dtype) for n in (name, "bias") if n in item.factors
    }
    if not all(bool(torch.isfinite(factor).all()) for factor in scaled.values()):
        raise UnsupportedError(
            "convert.overflow",
            f"{quoted(item.module)}: its scale {ratio:g} does not fit into {item.factors[name].dtype} factors",
            fix="convert to a dialect that keeps alpha",
            tensors=[item.module],
        )
    return replace(item, factors={**item.factors, **scaled}, scale=scale)


def _with_rank(item: Item, rank: int) -> Item:
    """A pair with zeros up to a common rank; its scale stays, so its alpha grows with it."""
    if item.kind != PAIR or item.rank is None or item.rank == rank:
        return item
    names = ("embedding-A", "embedding-B") if "embedding-A" in item.factors else ("A", "B")
    A, B = (item.factors[n] for n in names)
    low_B, low_A = padded(B.flatten(1), A.flatten(1), rank)
    factors = {
        **item.factors,
        names[0]: low_A.reshape(rank, *A.shape[1:]),
        names[1]: low_B.reshape(B.shape[0], rank, *B.shape[2:]),
    }
    return replace(item, factors=factors)
