"""`loramerge convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.combine import percent
from loramerge.cli.sink import Sink, size
from loramerge.tensors.text import plural, some

HEADER = ("module", "written as", "kind", "rank", "scale", "how", "error")


@click.command("convert", no_args_is_help=False)
@click.argument("adapter")
@options.output
@click.option("--to", required=True, metavar="DIALECT", help="What to write: a dialect, or a server that reads one.")
@click.option(
    "--base", metavar="BASE", help="The model it was trained on: tells names that are flattened, and weights."
)
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="N", help="Write low-rank pairs for what DIALECT cannot hold."
)
@click.option("--drop", is_flag=True, help="Leave out what DIALECT cannot hold.")
@click.option("--alpha", type=float, metavar="N", help="Alpha, where nothing on disk says it.")
@options.selection
@options.allow_pickle
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, adapter: str, out: str, to: str, **flags: Any) -> None:
    """Write an adapter in another dialect.

    Exact where the dialect can hold it; else an error that tells the nearest route. --rank writes the nearest
    low-rank pair of what it cannot hold and tells the error. Names that are flattened need --base. Servers get
    their restrictions: vllm, sglang, trtllm, llama.cpp.

    \b
    Examples:
      loramerge convert style.safetensors -o style --to diffusers --base sd15
      loramerge convert lora -o lora.safetensors --to comfyui
      loramerge convert lora -o served --to vllm
    """
    import loramerge as lm

    data = lm.convert(adapter, out, to, **flags)
    for note in data["notes"]:
        sink.warn(note)
    lines = _lines(data, flags["dry_run"])
    if sink.verbose:
        lines += sink.table([_row(row) for row in data["rows"]], header=HEADER)
    elif sink.json:
        data = {key: value for key, value in data.items() if key != "rows"}
    sink.result(data, lines, out)


def _lines(data: Mapping[str, Any], dry_run: bool) -> list[str]:
    how = [f"{data['exact']} exact"]
    if data["approximated"]:
        how.append(f"{data['approximated']} approximated (error {percent(data['error'])})")
    names = [f"{data['renamed']} renamed"]
    names += [f"{data[key]} {word}" for key, word in (("cut", "cut"), ("joined", "joined")) if data[key]]
    rows = [
        ("adapter", f"{data['source']}   {data['from_title']} to {data['to_title']}"),
        ("converted", f"{plural(data['modules'], 'module')}   {', '.join(how)}   {', '.join(names)}"),
    ]
    if data["dropped"]:
        rows.append(("dropped", f"{plural(len(data['dropped']), 'module')}: {some(data['dropped'])}"))
    rows.append(("would be" if dry_run else "wrote", f"{data['out']}   {size(data['bytes'])}"))
    return [f"{label:<10}{text}" for label, text in rows]


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    rank = "-" if row["rank"] is None else str(row["rank"])
    error = "-" if row["error"] is None else percent(row["error"])
    return row["module"], row["path"], row["kind"], rank, f"{row['scale']:.4g}", row["how"], error
