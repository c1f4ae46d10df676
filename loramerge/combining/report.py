"""What a combination tells: every module's rank and error, what was kept or left out, and the totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loramerge.combining.computing import Stored
from loramerge.combining.matching import Slot
from loramerge.combining.ranks import Ranks
from loramerge.combining.reading import Source
from loramerge.combining.wholes import Whole
from loramerge.converting.from_pairs import Prepared
from loramerge.converting.target import Target
from loramerge.methods import Chosen

SCHEMA = 1


@dataclass
class Result:
    """What was computed. `left_out`: places of which nothing is left."""

    sources: Sequence[Source]
    target: Target
    stored: list[tuple[Slot, Stored]]
    wholes: list[Whole]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    metadata_left: list[str] = field(default_factory=list)


def report(
    result: Result, prepared: Prepared, out: str, method: Chosen, ranks: Ranks, notes: Sequence[str]
) -> dict[str, Any]:
    """Plain data, JSON. Errors are relative: of a module to the norm of its update, in total to that of all."""
    rows = [_row(slot, stored) for slot, stored in result.stored]
    kept = [row for row in rows if row["module"] not in result.left_out]
    factors = [row["rank"] for row in kept if row["rank"] is not None]
    stored = [s for _, s in result.stored]
    norms = [s.norm for s in stored]
    return {
        "schema": SCHEMA,
        "out": out,
        "method": method.to_data(),
        "adapters": [
            {
                "name": s.name,
                "weight": s.weight,
                "dialect": s.adapter.dialect.name,
                "dialect_title": s.adapter.dialect.title,
                "modules": len(s.adapter.modules),
            }
            for s in result.sources
        ],
        "to": result.target.name,
        "to_title": result.target.title,
        "modules": len(kept),
        "left_out": list(result.left_out),
        "asked": {name: value for name, value in vars(ranks).items() if value is not None},
        "ranks": {"least": min(factors), "most": max(factors)} if factors else None,
        "converted": sum(row["how"] == "approximated" for row in rows),
        "error": _total([s.error * s.norm for s in stored], norms),
        "distance": _total([(s.distance or 0.0) * s.sum_norm for s in stored], [s.sum_norm for s in stored])
        if any(s.distance is not None for s in stored)
        else None,
        "norm": math.sqrt(sum(n * n for n in norms)),
        "whole": [
            {"name": f"{w.item.module}.{w.item.leaf or 'weight'}", "kind": w.item.kind, "how": w.how}
            for w in result.wholes
        ],
        "metadata": {"kept": sorted(result.metadata), "left_out": sorted(result.metadata_left)},
        "files": {name: len(data) for name, data in prepared.built.files.items()},
        "bytes": prepared.nbytes,
        "rows": rows,
        "notes": list(dict.fromkeys([*notes, *result.notes, *result.target.notes])),
    }


def _row(slot: Slot, stored: Stored) -> dict[str, Any]:
    return {
        "module": slot.key.name,
        "adapters": len(slot.held),
        "shape": list(stored.shape),
        "rank": None if stored.factors is None else stored.rank,
        "stored_rank": None if stored.factors is None else stored.factors.rank,
        "full_rank": None if stored.factors is None else stored.full_rank,
        "error": stored.error,
        "distance": stored.distance,
        "norm": stored.norm,
        "how": stored.how,
    }


def _total(errors: Sequence[float], norms: Sequence[float]) -> float:
    """Of the norm of all together."""
    whole = math.sqrt(sum(n * n for n in norms))
    return math.sqrt(sum(e * e for e in errors)) / whole if whole else 0.0
