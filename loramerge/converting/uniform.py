"""One config for many Kronecker products: the factor and the ranks from which a reader makes their shapes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramerge.converting.items import Item


@dataclass(frozen=True)
class Uniform:
    """`factor`: what every dimension is divided by, -1 for near its root; `both`: whether w1 may be decomposed too;
    `ranks`: of each item."""

    factor: int
    both: bool
    ranks: tuple[int, ...]


def uniform(items: Sequence[Item]) -> Uniform | None:
    """The one config from which all these products can be made; None where there is none.

    A reader divides out and in by the factor, (o1, o2) and (i1, i2); w1 (o1, i1) is whole unless `both` and
    r < max(o1, i1) / 2, w2 (o2, i2) whole unless r < max(o2, i2) / 2 (peft 0.21.2, tuners/lokr/layer.py).
    """
    parts = [_dimensions(item) for item in items]
    both = any("w1_a" in item.factors for item in items)
    ranks = [_rank(item, dims, both) for item, dims in zip(items, parts, strict=True)]
    if None in ranks:
        return None
    candidates = dict.fromkeys((-1, *(n for (o1, _), (i1, _) in parts for n in (o1, i1))))
    for factor in candidates:
        if factor and all(_divided(a * b, factor) == (a, b) for pair in parts for a, b in pair):
            return Uniform(factor, both, tuple(r for r in ranks if r is not None))
    return None


def _dimensions(item: Item) -> tuple[tuple[int, int], tuple[int, int]]:
    """((o1, o2), (i1, i2))."""
    f = item.shapes
    o1, i1 = f["w1"] if "w1" in f else (f["w1_a"][0], f["w1_b"][1])
    if "w2" in f:
        o2, i2 = f["w2"][:2]
    elif "t2" in f:
        o2, i2 = f["w2_a"][1], f["w2_b"][1]
    else:
        o2, i2 = f["w2_a"][0], f["w2_b"][1]
        shape = item.shape or ()
        i2 = shape[1] // i1 if len(shape) > 1 else i2
    return (o1, o2), (i1, i2)


def _rank(item: Item, dims: tuple[tuple[int, int], tuple[int, int]], both: bool) -> int | None:
    """The rank that gives an item its factors; None where none does."""
    (o1, o2), (i1, i2) = dims
    own = item.rank
    least = -(-max(o2, i2) // 2) if "w2" in item.factors else 1
    if "w1" in item.factors and both:
        least = max(least, -(-max(o1, i1) // 2))
    if own is None:
        return max(least, 1)
    fits = own >= least
    fits &= "w2" in item.factors or own < max(o2, i2) / 2
    fits &= "w1" in item.factors or own < max(o1, i1) / 2
    return own if fits else None


def _divided(n: int, factor: int) -> tuple[int, int]:
    """n as (a, b): by the factor where it divides n, else a <= b with a the largest divisor up to the factor (-1: any)
    for which a + b shrinks (peft 0.21.2 and LyCORIS 4.1.3, `factorization`)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor == -1 else factor
    a, b = 1, n
    for candidate in range(2, n + 1):
        if n % candidate:
            continue
        if a >= b or candidate + n // candidate > a + b or candidate > limit:
            break
        a, b = candidate, n // candidate
    return (b, a) if a > b else (a, b)
