"""What an extraction tells: every module with its rank, error and certificate, and what all of them keep together."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramerge.converting.items import Item
from loramerge.extracting.pairing import Match, Pairing
from loramerge.extracting.parts import Sorted, Whole
from loramerge.tensors import mounts
from loramerge.tensors.text import plural, some

if TYPE_CHECKING:
    from loramerge.converting.from_pairs import Prepared
    from loramerge.converting.target import Target
    from loramerge.extracting.factoring import Made
    from loramerge.extracting.options import Options

SCHEMA = 1


@dataclass(frozen=True)
class Kept:
    """A parameter that goes whole, ready to be written; `norm` of its change, 0 where it cannot be told."""

    whole: Whole
    item: Item
    norm: float


@dataclass(frozen=True)
class Report:
    """Collects what is told before and after the work."""

    base: str
    tuned: str
    out: str
    target: Target
    options: Options
    pairing: Pairing
    changed: Collection[str]
    sorted: Sorted

    def planned(self) -> dict[str, Any]:
        """What would be done, from a comparison of bytes alone."""
        size = {"float32": 4}.get(self.options.dtype, 2)
        rows = []
        for unit in self.sorted.units:
            rank = None if self.options.rank is None else min(self.options.rank, *unit.change.shape)
            rows.append({"module": unit.module, "shape": list(unit.shape), "rank": rank})
        most = None
        if self.options.rank is not None:
            most = sum(u.side * size * min(self.options.rank, *u.change.shape) for u in self.sorted.units)
            most += sum(w.nbytes for w in self.sorted.wholes)
        return {**self._head(), "rows": rows, "whole": self._whole([]), "bytes_at_most": most, "notes": self._notes([])}

    def done(
        self, made: Sequence[Made], wholes: Sequence[Kept], left: Sequence[float | None], prepared: Prepared
    ) -> dict[str, Any]:
        """What was done."""
        total2 = sum(one.found.norm**2 for one in made)
        lost2 = sum((one.found.norm * one.found.error) ** 2 for one in made)
        model2 = total2 + sum(k.norm**2 for k in wholes) + sum((n or 0.0) ** 2 for n in left)
        left2 = sum((n or 0.0) ** 2 for n in left)
        rows = [_row(one, model2) for one in made]
        kept = [one for one in made if one.found.rank]
        return {
            **self._head(),
            "modules": len(kept),
            "rank_zero": [one.unit.module for one in made if not one.found.rank],
            "ranks": [min(o.found.rank for o in kept), max(o.found.rank for o in kept)] if kept else None,
            "error": math.sqrt(lost2 / total2) if total2 else 0.0,
            "model_error": math.sqrt((lost2 + left2) / model2) if model2 else 0.0,
            "certificate": _number(max((one.found.certificate for one in made), default=1.0)),
            "norm": math.sqrt(model2),
            "rows": rows,
            "whole": self._whole(wholes),
            "files": {name: len(data) for name, data in prepared.built.files.items()},
            "bytes": prepared.nbytes,
            "alpha": prepared.expressed.alpha,
            "notes": self._notes(made, prepared),
        }

    def _head(self) -> dict[str, Any]:
        equal = len(self.pairing.matches) - len(self.changed)
        return {
            "schema": SCHEMA,
            "base": mounts.shown(self.base),
            "tuned": mounts.shown(self.tuned),
            "out": self.out,
            "to": self.target.name,
            "to_title": self.target.title,
            "asked": {k: getattr(self.options, k) for k in ("rank", "energy", "budget")},
            "tensors": {"equal": equal, "changed": len(self.changed), "excluded": self.pairing.excluded},
            "left_out": [m.name for m in self.sorted.left_out],
        }

    def _whole(self, wholes: Sequence[Kept]) -> list[dict[str, Any]]:
        norms = {id(kept.whole): kept.norm for kept in wholes}
        return [
            {
                "name": f"{w.path}.{w.leaf}".rstrip("."),
                "how": "difference" if w.difference else "unchanged" if w.same else "tied" if w.tied else "whole",
                "bytes": w.nbytes,
                "norm": norms.get(id(w)),
            }
            for w in self.sorted.wholes
        ]

    def _notes(self, made: Sequence[Made], prepared: Prepared | None = None) -> list[str]:
        notes = [*self.pairing.notes, *self.sorted.notes]
        grown = [w for w in self.sorted.wholes if any(_grew(m) for m in w.matches)]
        if grown:
            match = grown[0].matches[0]
            rows = match.tuned_shape[0]
            notes.append(
                f"the vocabulary went from {match.shape[0]} to {rows}: resize the base to {rows} tokens before the "
                "adapter is loaded beside it (merging it needs nothing)"
            )
        zero = [one.unit.module for one in made if not one.found.rank]
        if zero:
            noisy = any(one.floor for one in made if not one.found.rank)
            why = "changed by no more than rounding" if noisy else "got no rank"
            notes.append(
                f"{plural(len(zero), 'module')} {why} and {'is' if len(zero) == 1 else 'are'} left out: {some(zero, 3)}"
            )
        if self.sorted.left_out:
            notes.append(
                f"{plural(len(self.sorted.left_out), 'changed tensor')} left out: "
                f"{some([m.name for m in self.sorted.left_out], 3)}"
            )
        if prepared is not None:
            notes += [*prepared.notes, *self.target.notes]
            if prepared.expressed.alpha is not None:
                notes.append(f"the file does not say alpha: merge it with --alpha {prepared.expressed.alpha:g}")
        return list(dict.fromkeys(notes))


def _grew(match: Match) -> bool:
    return match.tuned_shape != match.shape


def _row(made: Made, total2: float) -> dict[str, Any]:
    found = made.found
    return {
        "module": made.unit.module,
        "path": made.unit.path,
        "shape": list(made.unit.shape),
        "rank": found.rank,
        "error": found.error,
        "rounding": found.rounding,
        "certificate": _number(found.certificate),
        "method": found.method,
        "energy": found.energy,
        "norm": found.norm,
        "share": found.norm**2 / total2 if total2 else 0.0,
        "floor": made.floor or None,
    }


def _number(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
