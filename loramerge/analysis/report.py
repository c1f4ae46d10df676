"""The document of an analysis: totals over modules, parameter and storage counts, the few sentences that matter.

Numbers that there are not are null: of a change of zero, of a weight that cannot be read, without a base. Those about
single elements (signs, what cancels, kept_sign, retention) are of `collisions.sampled_rows`: of all rows up to 131072
elements, else of evenly spaced ones. All others are of everything, in float64.

`adapters`, in the order given:
    source, dialect, weight, modules (analysed), bytes (of all its tensors); parameters (elements of the factors of all
    its modules that were asked for), theta (sum of r (m + n) over the modules analysed; 2 L d r for L square ones),
    changed_parameters (sum of m n);
    fewer: how many times fewer than full fine-tuning: changed (changed_parameters over theta), and with a base model
    (its parameters over parameters) and bytes (its bytes over bytes);
    norm (of the whole change); stored_rank, rank, rank_90, rank_99: least and most over modules; entropy_rank,
    stable_rank: means;
    free: modules whose stored rank a lower one could replace, the parameters that would save, and their share;
    with a base: relative_norm, amplification and over_chance (medians), retention: for each output dtype the mean (by
    squared size) and the least with its module;
    with several adapters: kept, kept_sign (means by squared size).
`pairs`, one for every two adapters a < b:
    modules (in common), cosine (of the whole changes), sign_conflict, cancelled, cancelled_chance, first_left ...
    second_both (means of `common`); phi: side -> i, j, mean, chance (rows by i), modules.
`modules`, one a weight, in natural order of their names:
    module, shape [m, n], updates (one an adapter, null where it has none), pairs, base; retention of the sum where
    several adapters change it with a base.
    An update: module (the adapter's own name), kind, dtype and by_factors (whether A and B are the stored ones);
    stored_rank, rank, rank_90, rank_99, entropy_rank, stable_rank, free_rank, norm, spectral_norm, singular_values
    (`spectra.spectrum`); survival: kept, kept_sign (`collisions.survival`); relative_norm, amplification
    (`against.amplification`), retention (`against.retention`), base_directions (`against.shared_directions`).
    A pair: a, b, cosine, inner, common and common_chance (`collisions.Overlap.common`), sign_conflict, cancelled,
    cancelled_chance, elements, magnitude (`collisions.Signs`); phi: side -> i, j, phi (rows by i), dimension, whose
    chance level is max(i, j) / dimension. Sides: left, right (vectors of B A), A, B (of the factors alone).
    base: tensor (as stored), dtype, norm, non_finite, singular_values (the leading ones), exact.
`skipped`: adapter, module, reason. `base`: source, parameters, bytes. `notes`, `summary`: text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import prod
from statistics import median
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.analysis.units import Found
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.text import plural

SCHEMA = 1
LOW_RETENTION = 0.95
"""Below this share of the change a dtype is said to lose it."""

Row = Mapping[str, Any]


def report(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    base: Checkpoint | None,
    found: Found,
    rows: Sequence[Row],
    phis: Mapping[tuple[int, int], Mapping[str, Any]],
    selected: Callable[[str], bool],
) -> dict[str, Any]:
    """The document, whose fields are those above."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "base": None if base is None else _base(base),
        "adapters": [_adapter(i, a, weights[i], rows, base, selected) for i, a in enumerate(adapters)],
        "pairs": [_pair(i, j, rows, phis.get((i, j), {})) for i, j in combinations(range(len(adapters)), 2)],
        "modules": list(rows),
        "skipped": [
            {"adapter": s.adapter, "module": s.module, "reason": s.reason}
            for s in sorted(found.skipped, key=lambda s: s.adapter)
        ],
        "notes": list(dict.fromkeys([*(note for a in adapters for note in a.notes), *found.notes])),
    }
    data["summary"] = summary(data)
    return data


def _base(base: Checkpoint) -> dict[str, Any]:
    parameters = sum(prod(t.info.shape) for t in base.tensors.values())
    return {"source": base.name, "parameters": parameters, "bytes": sum(t.info.nbytes for t in base.tensors.values())}


def _of(index: int, rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(module, its update by this adapter)."""
    return [(row, row["updates"][index]) for row in rows if row["updates"][index] is not None]


def _adapter(
    index: int,
    adapter: Adapter,
    weight: float,
    rows: Sequence[Row],
    base: Checkpoint | None,
    selected: Callable[[str], bool],
) -> dict[str, Any]:
    own = _of(index, rows)
    norm2 = sum(u["norm"] ** 2 for _, u in own)
    modules = [m for m in adapter.modules if selected(m.path)]
    factors = [f for m in modules for name, f in m.factors.items() if name not in ("alpha", "shape")]
    parameters = sum(prod(f.shape) for f in factors)
    kept = {u["by_factors"] for _, u in own}
    free = [(row, u) for row, u in own if u["by_factors"] and u["free_rank"] < u["stored_rank"]]
    saved = sum((u["stored_rank"] - u["free_rank"]) * sum(row["shape"]) for row, u in free)
    data: dict[str, Any] = {
        "source": adapter.name,
        "dialect": adapter.dialect.title,
        "weight": weight,
        "modules": len(own),
        "parameters": parameters,
        "bytes": adapter.nbytes,
        "theta": sum(u["stored_rank"] * sum(row["shape"]) for row, u in own),
        "changed_parameters": sum(prod(row["shape"]) for row, _ in own),
        "norm": math.sqrt(norm2),
        "stored_rank": _range(u["stored_rank"] for _, u in own),
        "rank": _range(u["rank"] for _, u in own),
        "rank_90": _range(u["rank_90"] for _, u in own),
        "rank_99": _range(u["rank_99"] for _, u in own),
        "entropy_rank": _mean(u["entropy_rank"] for _, u in own),
        "stable_rank": _mean(u["stable_rank"] for _, u in own),
        "free": {"modules": len(free), "parameters": saved, "share": saved / parameters if parameters else 0.0}
        if True in kept
        else None,
    }
    data["fewer"] = {
        "changed": _ratio(data["changed_parameters"], data["theta"]),
        "model": None,
        "bytes": None,
    }
    if base is not None:
        facts = _base(base)
        data["fewer"]["model"] = _ratio(facts["parameters"], parameters)
        data["fewer"]["bytes"] = _ratio(facts["bytes"], adapter.nbytes)
        data |= _against_base(own)
    if any("survival" in u for _, u in own):
        data["kept"] = _weighted((u["survival"]["kept"], u["norm"] ** 2) for _, u in own if "survival" in u)
        data["kept_sign"] = _weighted((u["survival"]["kept_sign"], u["norm"] ** 2) for _, u in own if "survival" in u)
    return data


def _against_base(own: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    measured = [(row, u) for row, u in own if "amplification" in u]
    squares = sum(row["base"]["norm"] ** 2 for row, _ in measured)
    factors = [u["amplification"]["factor"] for _, u in measured if u["amplification"]["factor"] is not None]
    over = [u["amplification"]["over_chance"] for _, u in measured if u["amplification"]["over_chance"] is not None]
    retention: dict[str, Any] = {}
    for name in measured[0][1]["retention"] if measured else ():
        values = [(u["retention"][name], u["norm"] ** 2, row["module"]) for row, u in measured]
        known = [(value, module) for value, _, module in values if value is not None]
        least = min(known, default=None)
        retention[name] = {
            "mean": _weighted((value, size) for value, size, _ in values),
            "least": None if least is None else {"value": least[0], "module": least[1]},
        }
    return {
        "relative_norm": math.sqrt(sum(u["norm"] ** 2 for _, u in measured) / squares) if squares else None,
        "amplification": median(factors) if factors else None,
        "over_chance": median(over) if over else None,
        "retention": retention,
    }


def _pair(i: int, j: int, rows: Sequence[Row], phis: Mapping[str, Any]) -> dict[str, Any]:
    """Totals of two adapters: of the whole updates, so that modules of one alone count in the norms."""
    both = [pair for row in rows for pair in row["pairs"] if (pair["a"], pair["b"]) == (i, j)]
    inner = sum(pair["inner"] for pair in both)
    norms = [math.sqrt(sum(u["norm"] ** 2 for _, u in _of(k, rows))) for k in (i, j)]
    size = norms[0] * norms[1]
    data = {
        "a": i,
        "b": j,
        "modules": len(both),
        "cosine": max(-1.0, min(1.0, inner / size)) if size else None,
        "sign_conflict": _weighted((pair["sign_conflict"], pair["elements"]) for pair in both),
        "cancelled": _weighted((pair["cancelled"], pair["magnitude"]) for pair in both),
        "cancelled_chance": _weighted((pair["cancelled_chance"], pair["magnitude"]) for pair in both),
        "phi": {name: value for name, value in phis.items() if value is not None},
    }
    for name in ("first", "second"):
        index = i if name == "first" else j
        for side in ("left", "right", "both"):
            values = [
                (pair["common"][f"{name}_{side}"], row["updates"][index]["norm"] ** 2)
                for row in rows
                for pair in row["pairs"]
                if (pair["a"], pair["b"]) == (i, j)
            ]
            data[f"{name}_{side}"] = _weighted(values)
    return data


def _range(values: Iterable[int]) -> list[int] | None:
    held = list(values)
    return [min(held), max(held)] if held else None


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return math.fsum(held) / len(held) if held else None


def _weighted(values: Iterable[tuple[float | None, float]]) -> float | None:
    """Weighted mean of what is known."""
    known = [(value, weight) for value, weight in values if value is not None and weight > 0]
    size = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / size if size else None


def _ratio(whole: float, part: float) -> float | None:
    return whole / part if part else None


# ----------------------------------------------------------------------------------------------- sentences


def summary(data: Mapping[str, Any]) -> list[str]:
    """What matters, one sentence a line: what it uses, what it costs, what the base does to it, what collides."""
    adapters = data["adapters"]
    lines = []
    for told in (_uses, _free, _amplifies, _loses):
        for a in adapters:
            name = f"{a['source']}: " if len(adapters) > 1 else ""
            if line := told(a):
                lines.append(name + line)
    return lines + [_collides(pair, adapters) for pair in data["pairs"]]


def _uses(a: Row) -> str:
    if not a["modules"]:
        return "none of its modules can be analysed"
    text = f"rank {_span(a['stored_rank'])} in {plural(a['modules'], 'module')}"
    if a["stored_rank"][1] > 1:
        text += f", where {_span(a['rank_90'])} directions hold 90 % of the change"
    fewer = a["fewer"]["model"]
    of = "the model's" if fewer else "the changed weights'"
    fewer = fewer or a["fewer"]["changed"]
    return f"{text}; {count(a['parameters'])} parameters, {times_fewer(fewer)} times fewer than {of}" if fewer else text


def _free(a: Row) -> str:
    free = a["free"]
    if not free or not free["modules"]:
        return ""
    modules, share = plural(free["modules"], "module"), percent(free["share"])
    return f"a lower rank would cost nothing in {modules} and save {share} of its parameters"


def _amplifies(a: Row) -> str:
    if a.get("amplification") is None:
        return ""
    return (
        f"{percent(a['relative_norm'])} of the base in size, and {a['amplification']:.3g} times what the base has in"
        f" the same directions (median), where the base has {a['over_chance']:.2g} times the chance level"
    )


def _loses(a: Row) -> str:
    retention = a.get("retention")
    if not retention or retention["keep"]["mean"] is None:
        return ""
    mean, least = retention["keep"]["mean"], retention["keep"]["least"]
    text = f"merged in the base's own dtype {mean:.3f} of the change is kept"
    text += f" (least {least['value']:.3f}, {least['module']})"
    if mean >= LOW_RETENTION:
        return text
    better = [n for n in ("bfloat16", "float16", "float32") if (retention[n]["mean"] or 0) >= LOW_RETENTION]
    return f"{text}; --dtype {better[0]} would keep {retention[better[0]]['mean']:.3f}" if better else text


def _collides(pair: Row, adapters: Sequence[Row]) -> str:
    a, b = adapters[pair["a"]]["source"], adapters[pair["b"]]["source"]
    if not pair["modules"]:
        return f"{a} and {b} change no module in common: their sum keeps both whole"
    text = f"{a} and {b}: cosine {pair['cosine']:+.3f}" if pair["cosine"] is not None else f"{a} and {b}: one is zero"
    if pair["cancelled"] is not None:
        text += f"; {percent(pair['cancelled'])} of their magnitude cancels in the sum"
        text += f" (by chance {percent(pair['cancelled_chance'])})"
    kept = [adapters[k].get("kept") for k in (pair["a"], pair["b"])]
    if None not in kept and len(adapters) == 2:
        text += f", which keeps {kept[0]:.2f} of the first and {kept[1]:.2f} of the second"
    return text


def percent(share: float | None) -> str:
    """Two digits: ``"0.84 %"``, ``"28 %"``."""
    if share is None:
        return "-"
    value = 100 * share
    return f"{value:.2g} %" if abs(value) < 10 else f"{value:.0f} %"


def times_fewer(ratio: float) -> str:
    """``"3.1"``, ``"10,120"``."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]} to {values[1]}"


def count(number: float) -> str:
    """``1_235_814_400`` -> ``"1.24 G"``."""
    for step, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return f"{number:.0f}"
