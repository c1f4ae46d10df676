"""The report as one page that needs nothing else: data as escaped JSON in a template whose script draws it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loramerge.analysis.report import count, percent, times_fewer

Row = Mapping[str, Any]

TABLE_BYTES = 1_300_000
"""For the similarity tables of all modules together: with many modules each gets fewer points."""

SPECTRUM_NUMBERS = 60_000
"""Singular values of all modules together."""

MOST_POINTS, FEWEST_POINTS = 24, 4

WORDS = [
    ("effective rank", "exp of the entropy of the singular values as shares of their sum: 1 for one direction."),
    (
        "enough",
        "the lowest rank whose error is within the rounding of the stored factors: to cut down to it costs nothing.",
    ),
    ("90 %", "how many directions hold 90 % of the squared size of the change."),
    ("size", "Frobenius norm of the change, scale and weight included; of base: relative to the weight's own."),
    (
        "amplifies",
        "size of the change over size of the weight on the directions of the change (LoRA paper, section 7.3).",
    ),
    (
        "x chance",
        "size of the weight on those directions over what random ones would have: 1 where the adapter works in"
        " directions that the model does not stress.",
    ),
    (
        "kept",
        "the share of the change that is left after the merged weight is rounded to its dtype; sampled rows.",
    ),
    ("cosine", "of two changes as vectors: 1 the same, 0 independent, -1 opposite."),
    ("cancels", "the share of the sum of magnitudes that is lost when two changes are added; sampled rows."),
    (
        "similarity φ(i, j)",
        "equation 4 of the LoRA paper; chance is max(i, j) over the number of dimensions. Of B A it does not depend on"
        " how the change is split into factors; of A or B alone it does.",
    ),
]


def page(data: Row, version: str) -> str:
    """The whole page for the document of `loramerge.analyze`."""
    folder = Path(__file__).parent
    template, style, script = ((folder / f"page.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js"))
    title = (
        "What "
        + " and ".join(a["source"] for a in data["adapters"][:3])
        + " "
        + ("does" if len(data["adapters"]) == 1 else "do")
    )
    title = title.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text
    parts = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "style-hash": _hash(style),
        "script-hash": _hash(script),
        "data": embedded(compact(data)),
        "made": html.escape(f"Made by loramerge {version}. Everything on this page is in this file."),
    }
    # Cut before anything is put in: what is put in is never searched for marks.
    made = []
    for piece in template.split("{{"):
        name, mark, rest = piece.partition("}}")
        made.append(parts[name] + rest if mark else piece)
    return "".join(made)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"sha256-{digest}"


def embedded(data: object) -> str:
    """JSON that cannot end the script element it stands in, nor begin a comment or another element there."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def compact(data: Row) -> dict[str, Any]:
    """What the script needs: columns and cells, spectra with four digits, similarities as bytes."""
    modules = data["modules"]
    columns = _columns(data)
    tables = max((len(_tables(row)) for row in modules), default=0) * len(modules)
    points = min(MOST_POINTS, int(math.sqrt(TABLE_BYTES * 3 / 4 / tables))) if tables else 0
    updates = sum(u is not None for row in modules for u in row["updates"])
    values = max(4, SPECTRUM_NUMBERS // max(1, updates))
    rows = [_module(row, columns, points, values) for row in modules]
    metric = 0
    for at, column in enumerate(columns):
        if column["key"] in ("cosine", "relative", "norm"):
            metric = at
            break
    sizes = [max((u["norm"] for u in row["updates"] if u is not None), default=0.0) for row in modules]
    both = [bool(row["pairs"]) for row in modules]
    order = sorted(range(len(modules)), key=lambda k: (both[k], sizes[k]), reverse=True)
    return {
        "adapters": [{"name": a["source"], "facts": _adapter(a)} for a in data["adapters"]],
        "base": None if data["base"] is None else _base(data["base"]),
        "summary": data["summary"],
        "pairs": [_pair(pair) for pair in data["pairs"]],
        "columns": [{k: v for k, v in column.items() if k in ("label", "title", "form")} for column in columns],
        "modules": rows,
        "metric": metric,
        "first": order[0] if order else 0,
        "skipped": _skipped(data),
        "words": WORDS,
    }


# ----------------------------------------------------------------------------------------------- numbers


def _digits(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def _columns(data: Row) -> list[dict[str, Any]]:
    """Label, explanation, form and value of every column; with several adapters each has its own."""
    made: list[dict[str, Any]] = []
    several = len(data["adapters"]) > 1

    def add(key: str, label: str, title: str, form: str, value: Callable[[Row], float | None]) -> None:
        made.append({"key": key, "label": label, "title": title, "form": form, "value": value})

    def of(k: int, value: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
        return lambda row: None if row["updates"][k] is None else value(row["updates"][k])

    for k in range(len(data["adapters"])):
        tail = f" {k + 1}" if several else ""
        if not several:
            add("rank", "rank", "stored rank", "int", of(k, lambda u: u["stored_rank"]))
            add("free", "enough", "a rank that loses no more than rounding has", "int", of(k, lambda u: u["free_rank"]))
            add("rank_90", "90 %", "directions with 90 % of the change", "int", of(k, lambda u: u["rank_90"]))
        add("effective", f"effective{tail}", "effective rank (entropy)", "", of(k, lambda u: u["entropy_rank"]))
        add("norm", f"size{tail}", "norm of the change", "", of(k, lambda u: u["norm"]))
        if data["base"] is not None:
            title = "norm of the change over that of the weight"
            add("relative", f"of base{tail}", title, "percent", of(k, lambda u: u.get("relative_norm")))
            title = "amplification factor"
            add("factor", f"amplifies{tail}", title, "", of(k, lambda u: u.get("amplification", {}).get("factor")))
            title = "the weight in these directions, over chance"
            add("over", f"x chance{tail}", title, "", of(k, lambda u: u.get("amplification", {}).get("over_chance")))
            title = "share of the change that a merge in the weight's dtype keeps"
            add("kept", f"kept{tail}", title, "fixed", of(k, lambda u: u.get("retention", {}).get("keep")))
    for pair in data["pairs"]:
        a, b = pair["a"], pair["b"]
        tail = f" {a + 1}, {b + 1}" if len(data["pairs"]) > 1 else ""

        def between(key: str, a: int = a, b: int = b) -> Callable[[Row], float | None]:
            return lambda row: next((p[key] for p in row["pairs"] if (p["a"], p["b"]) == (a, b)), None)

        add("cosine", f"cosine{tail}", "of the two changes", "signed", between("cosine"))
        add("cancels", f"cancels{tail}", "share of magnitude lost in the sum", "percent", between("cancelled"))
        add("conflict", f"opposed{tail}", "share of elements with opposite signs", "percent", between("sign_conflict"))
    return made


def _module(row: Row, columns: Sequence[Row], points: int, values: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": row["module"],
        "shape": row["shape"],
        "cells": [_digits(column["value"](row)) for column in columns],
        "s": [None if u is None else _spectrum(u["singular_values"], values) for u in row["updates"]],
    }
    if any(u is not None and "amplification" in u for u in row["updates"]):
        made["seven"] = [
            None
            if u is None or "amplification" not in u
            else [
                [t["rank"], *(_digits(t[k]) for k in ("update", "base", "random"))] for t in u["amplification"]["table"]
            ]
            for u in row["updates"]
        ]
    if points >= FEWEST_POINTS:
        made["phi"] = [
            {
                "a": p["a"],
                "b": p["b"],
                **{s: _quantised(t, t["phi"], t["dimension"], points) for s, t in p["phi"].items()},
            }
            for p in row["pairs"]
        ]
        made["base"] = [
            None
            if u is None or "base_directions" not in u
            else {
                side: _quantised(
                    u["base_directions"], u["base_directions"][side], row["shape"][side == "right"], points
                )
                for side in ("left", "right")
            }
            for u in row["updates"]
        ]
    return made


def _tables(row: Row) -> list[str]:
    """A name for every similarity table of a module."""
    found = [f"{p['a']}-{p['b']}-{side}" for p in row["pairs"] for side in p["phi"]]
    return found + [s for u in row["updates"] if u is not None and "base_directions" in u for s in ("left", "right")]


def _spectrum(s: Sequence[float], most: int) -> dict[str, Any]:
    kept = _thin(len(s), most)
    return {"x": [k + 1 for k in kept], "y": [_digits(s[k]) for k in kept]}


def _thin(size: int, most: int) -> list[int]:
    """At most so many of 0 .. size - 1, evenly, first and last among them."""
    if size <= most:
        return list(range(size))
    return [round(k * (size - 1) / (most - 1)) for k in range(most)]


def _quantised(axes: Row, values: Sequence[Sequence[float]], dimension: int, points: int) -> dict[str, Any] | None:
    """A table of numbers in [0, 1] as one byte each."""
    rows, columns = _thin(len(axes["i"]), points), _thin(len(axes["j"]), points)
    if not rows or not columns:
        return None
    raw = bytes(min(255, max(0, round(255 * values[a][b]))) for a in rows for b in columns)
    return {
        "i": [axes["i"][a] for a in rows],
        "j": [axes["j"][b] for b in columns],
        "q": base64.b64encode(raw).decode(),
        "d": dimension,
    }


# ----------------------------------------------------------------------------------------------- facts


def _span(values: Sequence[int] | None) -> str:
    if values is None:
        return "none"
    return str(values[0]) if values[0] == values[1] else f"{values[0]} to {values[1]}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _adapter(a: Row) -> list[tuple[str, str]]:
    rows = [
        ("layout", a["dialect"] + ("" if a["weight"] == 1 else f", weight {a['weight']:g}")),
        ("modules", str(a["modules"])),
        ("rank", f"{_span(a['stored_rank'])}; 90 % in {_span(a['rank_90'])}, 99 % in {_span(a['rank_99'])}"),
        (
            "effective rank",
            f"{_number(a['entropy_rank'], '.1f')} (entropy), {_number(a['stable_rank'], '.1f')} (stable)",
        ),
        ("parameters", f"{count(a['parameters'])}, for {count(a['changed_parameters'])} that change"),
        ("size", f"{a['norm']:.4g}"),
    ]
    if a["fewer"]["model"]:
        rows.append(
            (
                "against the model",
                f"{times_fewer(a['fewer']['model'])} times fewer parameters,"
                f" {times_fewer(a['fewer']['bytes'])} times fewer bytes",
            )
        )
    if a.get("relative_norm") is not None:
        rows.append(("of the base", percent(a["relative_norm"])))
    if a.get("amplification") is not None:
        rows.append(("amplifies", f"{a['amplification']:.3g} times (median)"))
    if a.get("retention"):
        kept = (f"{name} {_number(row['mean'], '.4f')}" for name, row in a["retention"].items())
        rows.append(("kept when merged", ", ".join(kept)))
    if a["free"] and a["free"]["modules"]:
        rows.append(
            ("free to cut", f"{percent(a['free']['share'])} of its parameters, in {a['free']['modules']} modules")
        )
    return rows


def _base(base: Row) -> dict[str, Any]:
    facts = [("parameters", count(base["parameters"])), ("bytes", count(base["bytes"]))]
    return {"name": base["source"], "facts": facts}


def _pair(pair: Row) -> dict[str, Any]:
    facts = [
        ("modules in common", str(pair["modules"])),
        ("cosine", _number(pair["cosine"], "+.4f")),
        ("opposite signs", f"{percent(pair['sign_conflict'])} of elements"),
        (
            "cancels in the sum",
            f"{percent(pair['cancelled'])} of magnitude (by chance {percent(pair['cancelled_chance'])})",
        ),
        ("inputs in common", f"{percent(pair['first_right'])} and {percent(pair['second_right'])}"),
        ("outputs in common", f"{percent(pair['first_left'])} and {percent(pair['second_left'])}"),
    ]
    phi = {}
    for side, table in pair["phi"].items():
        phi[side] = {
            "i": table["i"],
            "j": table["j"],
            "v": [_digits(v) for row in table["mean"] for v in row],
            "c": [_digits(v) for row in table["chance"] for v in row],
            "n": f"{table['modules']} modules",
        }
    return {"a": pair["a"], "b": pair["b"], "facts": facts, "phi": phi}


def _skipped(data: Row) -> list[str]:
    names = [a["source"] for a in data["adapters"]]
    counts = Counter((names[s["adapter"]], s["reason"]) for s in data["skipped"])
    return [f"{n} of {source}: {reason}" for (source, reason), n in counts.items()]
