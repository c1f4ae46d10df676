"""`loramerge combine`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Progress, Sink, size
from loramerge.tensors.text import plural, some

HEADER = ("module", "adapters", "rank", "of", "error")


@click.command("combine", no_args_is_help=False)
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True, type=options.ADAPTER)
@options.output
@options.method
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Cut every module to at most this rank.")
@click.option("--energy", type=float, metavar="SHARE", help="Keep this share of every module's sum of squares.")
@click.option("--budget", type=options.SIZE, metavar="SIZE", help="Make a weight file of at most this size.")
@click.option("--to", metavar="DIALECT", help="What to write (default: the dialect of the first adapter).")
@click.option("--base", metavar="BASE", help="The model they were trained on: tells names, and weights.")
@options.factor_dtype("float32")
@click.option("--alpha", type=float, metavar="N", help="Alpha, where nothing on disk says it.")
@options.selection
@options.allow_pickle
@options.jobs
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, adapters: tuple[tuple[str, float], ...], out: str, **flags: Any) -> None:
    """Make one adapter of several.

    By default the weighted sum of their updates, exact whatever their ranks; weights may be negative. Weights are in
    the updates before a method sees them, so that the published lambda is a common factor of the weights. Ties, dare,
    della, breadcrumbs and magnitude compare single elements: in the space full, which is how they are published,
    results have full rank and --rank, --energy or --budget says where to cut them; in the spaces knots and core they
    stay low-rank. What is written is compared with the exact result, and the error is printed.

    \b
    Examples:
      loramerge combine style=0.7 tone=0.3 -o both
      loramerge combine style tone=-0.5 -o both --rank 16
      loramerge combine a b c -o all --method ties --density 0.3 --space knots
      loramerge combine a b -o all --method tsv --budget 50MB
    """
    import loramerge as lm

    with late_bar(sink, "combine") as progress:
        data = lm.combine(list(adapters), out, progress=progress, **flags)
    tell(sink, data, out, flags["dry_run"], "combined")


@contextlib.contextmanager
def late_bar(sink: Sink, what: str) -> Iterator[Progress]:
    """A progress bar from the first call on: what comes before it is planning."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(sink.progress_bar(what)))
            bars[0](done, total)

        yield update


def tell(sink: Sink, data: Mapping[str, Any], out: str, dry_run: bool, done: str) -> None:
    """The end of `combine` and `resize`."""
    for note in data["notes"]:
        sink.warn(note)
    lines = [f"{label:<10}{text}" for label, text in _lines(data, dry_run, done)]
    if sink.verbose:
        lines += sink.table([_row(row) for row in data["rows"]], header=HEADER)
    elif sink.json:
        data = {key: value for key, value in data.items() if key != "rows"}
    sink.result(data, lines, out)


def _lines(data: Mapping[str, Any], dry_run: bool, done: str) -> list[tuple[str, str]]:
    rows = []
    for adapter in data["adapters"]:
        weight = "" if adapter["weight"] == 1 else f"   weight {adapter['weight']:g}"
        title, count = adapter["dialect_title"], plural(adapter["modules"], "module")
        rows.append(("adapter", f"{adapter['name']}   {title}{weight}   {count}"))
    method = data["method"]
    if done == "combined":
        said = "   ".join(
            [method["name"], *(f"{key} {_value(v)}" for key, v in method["options"].items() if v is not None)]
        )
        rows.append(("method", said))
    parts = [plural(data["modules"], "module")]
    if data["ranks"]:
        parts.append(f"rank {_range(data['ranks']['least'], data['ranks']['most'])}")
    parts.append(f"error {percent(data['error'])}{_worst(data['rows'])}")
    if data["distance"] is not None:
        parts.append(f"{percent(data['distance'])} away from the weighted sum")
    if data["converted"]:
        parts.append(f"{plural(data['converted'], 'module')} converted to products")
    rows.append((done, "   ".join(parts)))
    if data["left_out"]:
        rows.append(("left out", f"{plural(len(data['left_out']), 'module')} of rank 0: {some(data['left_out'], 3)}"))
    if data["whole"]:
        hows = [w["how"] for w in data["whole"]]
        counts = [f"{hows.count(how)} {how}" for how in dict.fromkeys(hows)]
        rows.append(("whole", f"{plural(len(hows), 'parameter')}   {', '.join(counts)}"))
    if metadata := data["metadata"]["left_out"]:
        kept = plural(len(data["metadata"]["kept"]), "entry").replace("entrys", "entries")
        rows.append(("metadata", f"{kept} kept, {len(metadata)} about the training left out: {some(metadata, 2)}"))
    rows.append(("would be" if dry_run else "wrote", f"{data['out']}   {data['to_title']}   {size(data['bytes'])}"))
    return rows


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    worst = max(rows, key=lambda row: row["error"], default=None)
    if worst is None or len(rows) < 2 or worst["error"] < 1e-5:
        return ""
    return f" (most {percent(worst['error'])}, {worst['module']})"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    rank = "-" if row["rank"] is None else str(row["rank"])
    whole = "-" if row["full_rank"] is None else str(row["full_rank"])
    return row["module"], str(row["adapters"]), rank, whole, percent(row["error"])


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least}..{most}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def percent(error: float) -> str:
    """A relative error for people; what is below float32's own rounding is 0."""
    if error < 1e-9:
        return "0 %"
    return f"{100 * error:.2g} %" if error < 0.995 else f"{100 * error:.0f} %"
