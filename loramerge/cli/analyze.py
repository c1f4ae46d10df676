"""`loramerge analyze`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size
from loramerge.errors import UsageError
from loramerge.tensors.text import plural

Row = Mapping[str, Any]

LABEL = 12
UNKNOWN = "-"
ORDER, CHANGE, LOST, AMPLIFIED, COLLISION, RANK = "order", "change", "lost", "amplified", "collision", "rank"
SORTS = (ORDER, CHANGE, LOST, AMPLIFIED, COLLISION, RANK)


@click.command("analyze", no_args_is_help=False)
@click.argument("adapters", nargs=-1, required=True, type=options.ADAPTER, metavar="ADAPTER[=WEIGHT]...")
@click.option(
    "--base", metavar="BASE", help="The model that they change: adds sizes, amplification, what rounding keeps."
)
@click.option("--html", metavar="FILE", help="Write one self-contained page with spectra and heat maps.")
@click.option("--png", metavar="DIR", help="Write pictures (needs the extra: pip install 'loramerge[plot]').")
@click.option("--force", is_flag=True, help="Replace FILE or DIR if it exists.")
@click.option("--top", type=click.IntRange(min=0), default=12, show_default=True, metavar="N", help="Modules to list.")
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    help="Which modules to list first; by default by collision with several adapters, else by change.",
)
@click.option(
    "--points",
    type=click.IntRange(min=2),
    default=24,
    show_default=True,
    metavar="N",
    help="Most ranks a side at which similarity is given for each module.",
)
@click.option(
    "--leading",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Leading directions of each weight of BASE to compare with; 0: none, which is faster.",
)
@click.option("--alpha", type=float, metavar="N", help="Alpha, where nothing on disk says it.")
@click.option("--enable-lora", type=options.FLAGS, metavar="1,0,1", help="Trained parts of a grouped linear.")
@click.option("--residual-base", is_flag=True, help="BASE is the residual model that the adapter's start left.")
@click.option("--original-base", is_flag=True, help="BASE is the model before training changed it (KaSA).")
@click.option("--grouped-experts", is_flag=True, help="B of stacked experts is grouped by expert (some of unsloth).")
@click.option("--allow-unmatched", is_flag=True, help="Let adapter tensors that match nothing in BASE be.")
@options.selection
@options.jobs
@options.allow_pickle
@options.common
@options.hub
def command(sink: Sink, adapters: Sequence[tuple[str, float]], top: int, sort: str | None, **flags: Any) -> None:
    """Tell what adapters do, from their factors.

    For each module the rank it uses, its singular values, how large the change is; between two adapters the
    subspaces they share, what cancels and what their sum keeps of each; with --base how much of the weight each
    change is, what it amplifies, and how much of it a merge keeps in each dtype. Modules are paired by their paths,
    or through --base. Numbers about single elements are of evenly spaced rows where a weight is large. -v lists
    all modules; --json -v adds singular values and similarities of each.

    \b
    Examples:
      loramerge analyze lora
      loramerge analyze lora --base model --html lora.html
      loramerge analyze style=0.7 tone=0.3 --json
    """
    import loramerge as lm

    with sink.progress_bar("analyze") as progress:
        data = lm.analyze(adapters, progress=progress, **flags)
    for note in data["notes"]:
        sink.warn(note)
    lines = _lines(sink, data, top, _sort(data, sort))
    if sink.json and not sink.verbose:
        data = _short(data)
    written = [data[key] for key in ("html", "png") if data.get(key)]
    sink.result(data, lines, written[0] if written else _quiet(data))


def _quiet(data: Row) -> str:
    """The one value that matters: the cosine of two adapters, else the mean effective rank of the first."""
    if data["pairs"]:
        return _number(data["pairs"][0]["cosine"], "+.4f")
    return _number(data["adapters"][0]["entropy_rank"], ".3g")


def _sort(data: Row, sort: str | None) -> str:
    if sort is None:
        return COLLISION if data["pairs"] else CHANGE
    if sort in (LOST, AMPLIFIED) and data["base"] is None:
        raise UsageError("usage.sort", f"--sort {sort} needs the weights that change", fix="give --base BASE")
    if sort == COLLISION and not data["pairs"]:
        raise UsageError(
            "usage.sort", "--sort collision needs two adapters", fix="give another adapter, or --sort change"
        )
    return sort


# ------------------------------------------------------------------------------------------------ for people


def _lines(sink: Sink, data: Row, top: int, sort: str) -> list[str]:
    lines = [line for a in data["adapters"] for line in _adapter(a)]
    if data["base"] is not None:
        base = data["base"]
        lines.append(
            _line("base", f"{base['source']}   {_count(base['parameters'])} parameters   {size(base['bytes'])}")
        )
    for pair in data["pairs"]:
        lines += _pair(pair, data["adapters"])
    lines += [_line("in short" if at == 0 else "", text) for at, text in enumerate(data["summary"])]
    if data["skipped"]:
        reasons: dict[str, int] = {}
        for row in data["skipped"]:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
        lines += [_line("skipped", f"{plural(n, 'module')}: {reason}") for reason, n in reasons.items()]
    rows = _ordered(data, sort)
    kept = rows if sink.verbose else rows[:top]
    if kept:
        header, cells = _columns(data)
        lines += ["", *sink.table([[cell(row) for cell in cells] for row in kept], header=header)]
        if len(rows) > len(kept):
            lines.append(f"and {len(rows) - len(kept)} more (-v lists them all; first: {_SAID[sort]})")
    lines += ["", *(_line("wrote", data[key]) for key in ("html", "png") if data.get(key))]
    return lines if lines[-1] else lines[:-1]


_SAID = {
    ORDER: "as they come",
    CHANGE: "the largest change",
    LOST: "where rounding loses most",
    AMPLIFIED: "the most amplified",
    COLLISION: "where most cancels",
    RANK: "the highest effective rank",
}


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def _adapter(a: Row) -> list[str]:
    weight = "" if a["weight"] == 1 else f"={a['weight']:g}"
    what = f"{a['source']}{weight}   {a['dialect']}   {plural(a['modules'], 'module')}   {size(a['bytes'])}"
    lines = [_line("adapter", what)]
    if not a["modules"]:
        return lines
    ranks = f"{_span(a['stored_rank'])} stored   {_span(a['rank_90'])} hold 90 %   {_span(a['rank_99'])} hold 99 %"
    lines.append(
        _line("  rank", f"{ranks}   effective {a['entropy_rank']:.1f} (entropy), {a['stable_rank']:.1f} (stable)")
    )
    relative = a.get("relative_norm")
    sized = f"   {_percent(relative)} of the base" if relative is not None else ""
    lines.append(_line("  size", f"norm {a['norm']:.4g}{sized}"))
    fewer = [f"{_count(a['parameters'])} parameters change {_count(a['changed_parameters'])}"]
    for key, word in (("changed", "fewer"), ("model", "fewer than the model's"), ("bytes", "smaller on disk")):
        if a["fewer"][key]:
            ratio = a["fewer"][key]
            fewer.append(f"{ratio:,.0f} x {word}" if ratio >= 10 else f"{ratio:.2g} x {word}")
    lines.append(_line("  count", "   ".join(fewer)))
    if a.get("retention"):
        kept = [f"{name} {_number(row['mean'], '.3f')}" for name, row in a["retention"].items()]
        lines.append(_line("  kept", f"of the change when merged: {'   '.join(kept)}"))
    return lines


def _pair(pair: Row, adapters: Sequence[Row]) -> list[str]:
    names = f"{adapters[pair['a']]['source']} and {adapters[pair['b']]['source']}"
    lines = [_line("together", f"{names}   {plural(pair['modules'], 'module')} in common")]
    if not pair["modules"]:
        return lines
    share = [_percent(pair[key]) for key in ("first_right", "second_right", "first_left", "second_left")]
    lines.append(
        _line(
            "  common",
            f"cosine {_number(pair['cosine'], '+.4f')}   inputs {share[0]} and {share[1]}   "
            f"outputs {share[2]} and {share[3]} of each lie in the other's",
        )
    )
    cancels = f"{_percent(pair['cancelled'])} of magnitude cancels (by chance {_percent(pair['cancelled_chance'])})"
    text = f"{_percent(pair['sign_conflict'])} of elements   {cancels}"
    lines.append(_line("  opposed", text))
    lines += [_line("  phi", text) for text in _phi(pair["phi"])]
    return lines


def _phi(tables: Row) -> list[str]:
    """phi at a few ranks: of the updates' inputs and outputs, beside chance."""
    said = []
    for name, of in (("right", "inputs of B A"), ("left", "outputs of B A"), ("A", "A alone"), ("B", "B alone")):
        if name not in tables:
            continue
        t = tables[name]
        cells = []
        wanted = [1, 4, 16, min(t["i"][-1], t["j"][-1])]
        for r in dict.fromkeys(w for w in wanted if w in t["i"] and w in t["j"]):
            at = t["i"].index(r), t["j"].index(r)
            cells.append(f"{r}: {t['mean'][at[0]][at[1]]:.2f} (chance {t['chance'][at[0]][at[1]]:.2g})")
        said.append(f"{of:<15}{'   '.join(cells)}")
    return said


def _ordered(data: Row, sort: str) -> list[Row]:
    def of_updates(row: Row, value: Callable[[Row], float | None]) -> float:
        found = [v for u in row["updates"] if u is not None and (v := value(u)) is not None]
        return max(found, default=float("-inf"))

    keys: dict[str, Callable[[Row], float]] = {
        CHANGE: lambda row: of_updates(row, lambda u: u.get("relative_norm") or u["norm"]),
        LOST: lambda row: of_updates(row, lambda u: -u["retention"]["keep"] if _kept(u) is not None else None),
        AMPLIFIED: lambda row: of_updates(
            row, lambda u: u["amplification"]["factor"] if "amplification" in u else None
        ),
        COLLISION: lambda row: max((p["cancelled"] or 0.0 for p in row["pairs"]), default=-1.0),
        RANK: lambda row: of_updates(row, lambda u: u["entropy_rank"]),
    }
    rows = list(data["modules"])
    return rows if sort == ORDER else sorted(rows, key=keys[sort], reverse=True)


def _kept(update: Row) -> float | None:
    value: float | None = update.get("retention", {}).get("keep")
    return value


def _columns(data: Row) -> tuple[list[str], list[Callable[[Row], str]]]:
    """Header and cells of the table of modules; with several adapters their values side by side."""
    header = ["module", "shape", "rank", "enough", "90 %", "effective", "norm"]

    def each(value: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: " ".join(UNKNOWN if u is None else value(u) for u in row["updates"])

    cells: list[Callable[[Row], str]] = [
        lambda row: str(row["module"]),
        lambda row: "x".join(map(str, row["shape"])),
        each(lambda u: str(u["stored_rank"])),
        each(lambda u: str(u["free_rank"])),
        each(lambda u: str(u["rank_90"])),
        each(lambda u: f"{u['entropy_rank']:.1f}"),
        each(lambda u: f"{u['norm']:.3g}"),
    ]
    if data["base"] is not None:
        header += ["of base", "amplifies", "x chance", "kept"]
        cells += [
            each(lambda u: _percent(u.get("relative_norm"))),
            each(lambda u: _number(u.get("amplification", {}).get("factor"), ".3g")),
            each(lambda u: _number(u.get("amplification", {}).get("over_chance"), ".2g")),
            each(lambda u: _number(_kept(u), ".3f")),
        ]
    if data["pairs"]:
        header += ["cosine", "cancels"]
        cells += [
            lambda row: " ".join(_number(p["cosine"], "+.3f") for p in row["pairs"]) or UNKNOWN,
            lambda row: " ".join(_percent(p["cancelled"]) for p in row["pairs"]) or UNKNOWN,
        ]
    return header, cells


def _short(data: Row) -> dict[str, Any]:
    """The document without what each module has of tables and singular values."""
    long = ("singular_values", "base_directions", "phi")
    modules = []
    for row in data["modules"]:
        updates = [None if u is None else {k: v for k, v in u.items() if k not in long} for u in row["updates"]]
        for u in updates:
            if u is not None and "amplification" in u:
                u["amplification"] = {k: v for k, v in u["amplification"].items() if k != "table"}
        pairs = [{k: v for k, v in p.items() if k not in long} for p in row["pairs"]]
        base = None if row["base"] is None else {k: v for k, v in row["base"].items() if k not in long}
        modules.append({**row, "base": base, "updates": updates, "pairs": pairs})
    return {**data, "modules": modules}


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]} to {values[1]}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _percent(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value:.2g} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def _count(number: float) -> str:
    for step, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return f"{number:.0f}"
