"""`loramerge demo`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import LABEL, Sink, duration, size


@click.command("demo", no_args_is_help=False)
@click.option("-o", "--out", default="loramerge-demo", show_default=True, metavar="DIR", help="Where to write.")
@click.option("--force", is_flag=True, help="Make it again where an earlier demo is.")
@options.common
def command(sink: Sink, out: str, force: bool) -> None:
    """Make a tiny model, merge two adapters into it, verify the result.

    Works offline, in seconds, and takes 45 MB: a Llama-shaped checkpoint with random weights, two PEFT adapters,
    and the output. Two of its weights are compared with W + s B A in float64. Prints commands to go on with.
    Exit code 1 if a check fails.

    \b
    Examples:
      loramerge demo
      loramerge demo -o elsewhere --json
    """
    from loramerge import demo

    with sink.progress_bar("merge") as progress:
        data = demo.run(out, force=force, progress=progress)
    sink.result({**data, "next": _commands(data)}, _lines(data), data["paths"][demo.MERGED])
    if not data["ok"]:
        raise SystemExit(1)


def _lines(data: Mapping[str, Any]) -> list[str]:
    paths = data["paths"]
    merged = f"{size(data['bytes'])} in {duration(data['seconds'])}   {data['tensors_changed']} tensors changed"
    merged += f", {data['tensors_copied']} copied"
    if data["retention"] is not None:
        merged += f"   retention {data['retention']:.3f}"
    rows = [
        ("made", f"{paths['base']}   a Llama-shaped checkpoint in bfloat16, two shards"),
        ("made", f"{paths['style']}   LoRA r=8 alpha=16 on the attention"),
        ("made", f"{paths['tone']}   rsLoRA r=4 alpha=8 (12 for down_proj)"),
        ("merged", merged),
        ("verified", "every tensor is as the receipt says" if data["verified"] else "NOT as the receipt says"),
        ("replayed", "bit for bit the same" if data["replayed"] else "NOT the same"),
    ]
    for row in data["checked"]:
        rows.append(("checked", f"{row['name']}   {row['exact']:.4%} exact, worst error {row['worst']:.3f} units"))
    rows.append(("wrote", paths["merged"]))
    lines = [f"{label:<{LABEL}}{text}" for label, text in rows]
    return [*lines, "", "next, for example:", *(f"  {line}" for line in _commands(data))]


def _commands(data: Mapping[str, Any]) -> list[str]:
    """Commands that can be pasted as they are."""
    paths, weights = data["paths"], data["weights"]
    base, style, tone, merged = (shlex.quote(paths[name]) for name in ("base", "style", "tone", "merged"))
    again = shlex.quote(os.path.join(data["directory"], "stronger"))
    weighted = [shlex.quote(f"{paths[name]}={weight:g}") for name, weight in weights.items()]
    replay = " ".join(f"--adapter {text}" for text in weighted)
    return [
        f"loramerge inspect {style}",
        f"loramerge inspect {tone} -v",
        f"loramerge diff {base} {merged}",
        f"loramerge merge {base} {shlex.quote(paths['style'] + '=1.5')} -o {again}",
        f"loramerge verify {merged} --base {base} {replay}",
    ]
