"""`loramerge extract`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size
from loramerge.tensors.text import plural, some

SHOWN = 20
"""Modules listed, those with most of the lost change first, where -v does not ask for all."""

HEADER = ("module", "shape", "rank", "error", "optimum", "kept", "share")


@click.command("extract", no_args_is_help=False)
@click.argument("base")
@click.argument("tuned")
@options.output
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="At most this rank for each module.")
@click.option(
    "--energy", type=float, metavar="E", help="Keep this share of each module's squared change, such as 0.95."
)
@click.option(
    "--budget", type=options.SIZE, metavar="SIZE", help="Size of the adapter; ranks go where they count most."
)
@click.option("--to", metavar="DIALECT", help="What to write: a dialect, or a server that reads one (default: peft).")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Floating-point type of the factors.",
)
@click.option(
    "--noise-floor/--no-noise-floor",
    default=True,
    show_default=True,
    help="Leave out what is no larger than the rounding of a bfloat16 or float16 fine-tune.",
)
@click.option(
    "--embeddings",
    type=click.Choice(["whole", "low-rank"]),
    default="whole",
    show_default=True,
    help="How to keep embeddings and heads.",
)
@click.option(
    "--only-linear", is_flag=True, help="Leave out norms, biases, embeddings, heads: all that would go whole."
)
@options.selection
@click.option(
    "--device",
    type=options.DEVICE,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]|mps",
    help="Compute on.",
)
@options.jobs
@options.allow_pickle
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, base: str, tuned: str, out: str, **flags: Any) -> None:
    """Make an adapter of what a full fine-tune changed.

    The best low-rank pair of TUNED - BASE for every linear and convolution, proved to be within a thousandth of
    the optimum; norms, biases, embeddings and heads that changed go along whole. At least one of --rank, --energy
    and --budget says how large it may be. Globs match names of tensors or modules.

    \b
    Examples:
      loramerge extract base tuned -o lora --rank 16
      loramerge extract base tuned -o lora --energy 0.95 -v
      loramerge extract base tuned -o lora --budget 50MB --dtype bfloat16
      loramerge extract base tuned -o lora.safetensors --rank 32 --to comfyui
    """
    import loramerge as lm

    with sink.progress_bar("extract") as progress:
        data = lm.extract(base, tuned, out, progress=progress, **flags)
    for note in data["notes"]:
        sink.warn(note)
    lines = _planned(sink, data) if flags["dry_run"] else _done(sink, data)
    sink.result(data, lines, out)


def _done(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    rows = sorted(data["rows"], key=lambda row: -row["share"] * row["error"] ** 2)
    shown = data["rows"] if sink.verbose else rows[:SHOWN]
    lines = sink.table([_row(row) for row in shown], header=HEADER) if shown else []
    if len(rows) > len(shown):
        lines.append(f"and {len(rows) - len(shown)} more (-v lists them)")
    result = [f"{plural(data['modules'], 'module')}{_ranks(data['ranks'])}"]
    if data["modules"]:
        result.append(f"error {_percent(data['error'])} of the change")
        result.append(f"at most {data['certificate']:.4f} x the optimum")
    counts = data["tensors"]
    told = [
        ("compared", f"{data['base']} and {data['tuned']}   {counts['changed']} of {_all(counts)} changed"),
        ("extracted", "   ".join(result)),
    ]
    if data["whole"]:
        told.append(("whole", _whole(data)))
    if data["left_out"]:
        told.append(("left out", f"{plural(len(data['left_out']), 'tensor')}: {some(data['left_out'], 3)}"))
    told.append(("total", f"base + adapter is {_percent(data['model_error'])} of the change away from the fine-tune"))
    told.append(("wrote", f"{data['out']}   {data['to_title']}   {size(data['bytes'])}"))
    return lines + [f"{label:<10}{text}" for label, text in told]


def _planned(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    counts = data["tensors"]
    lines = []
    if sink.verbose:
        cells = [(r["module"], _shape(r["shape"]), "-" if r["rank"] is None else str(r["rank"])) for r in data["rows"]]
        lines = sink.table(cells, header=HEADER[:3]) if cells else []
    told = [
        ("compared", f"{data['base']} and {data['tuned']}   {counts['changed']} of {_all(counts)} changed"),
        ("pairs", plural(len(data["rows"]), "module")),
    ]
    if data["whole"]:
        told.append(("whole", _whole(data)))
    if data["left_out"]:
        told.append(("left out", f"{plural(len(data['left_out']), 'tensor')}: {some(data['left_out'], 3)}"))
    most = "" if data["bytes_at_most"] is None else f"   at most {size(data['bytes_at_most'])}"
    told.append(("would be", f"{data['out']}   {data['to_title']}{most}"))
    return lines + [f"{label:<10}{text}" for label, text in told]


def _all(counts: Mapping[str, int]) -> str:
    return plural(counts["equal"] + counts["changed"], "tensor")


def _whole(data: Mapping[str, Any]) -> str:
    names = [row["name"] for row in data["whole"]]
    return f"{plural(len(names), 'parameter')}, {size(sum(row['bytes'] for row in data['whole']))}: {some(names, 3)}"


def _ranks(ranks: list[int] | None) -> str:
    if not ranks:
        return ""
    low, high = ranks
    return f" of rank {low}" if low == high else f" of ranks {low} to {high}"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    proof = "-" if row["certificate"] is None else f"x {row['certificate']:.4f}"
    kept = f"{100 * row['energy']:.2f} %"
    return (
        row["module"],
        _shape(row["shape"]),
        str(row["rank"]),
        _percent(row["error"]),
        proof,
        kept,
        f"{100 * row['share']:.2f} %",
    )


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
