"""`loramerge export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, duration, size
from loramerge.tensors.text import plural

TASKS = (
    "text-generation, text2text-generation, automatic-speech-recognition, feature-extraction, fill-mask, "
    "text-classification, token-classification, question-answering, multiple-choice, image-classification, "
    "audio-classification"
)


@click.command("export", no_args_is_help=False)
@click.argument("model")
@options.output
@click.option(
    "--to", type=click.Choice(["onnx", "safetensors"]), default="onnx", show_default=True, help="What to write."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=options.ADAPTER,
    metavar="ADAPTER[=WEIGHT]",
    help="Merge this adapter on the way; may be repeated.",
)
@click.option(
    "--task", metavar="TASK", help=f"What the model is to do; by default what its config says. One of {TASKS}."
)
@click.option(
    "--layout",
    type=click.Choice(["optimum", "transformersjs", "genai"]),
    default="optimum",
    show_default=True,
    help="File names and configs of which reader.",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
    help="Floating-point type of the weights (default for ONNX: float32, or float16 where they are; else keep).",
)
@click.option("--opset", type=click.IntRange(18, 23), metavar="N", help="ONNX opset (default: the exporter's).")
@click.option("--no-verify", is_flag=True, help="Do not run the result against torch.")
@click.option("--link-weights", is_flag=True, help="Keep the weights in safetensors files, hard-linked where possible.")
@click.option("--adapter-ready", is_flag=True, help="Leave room for adapters that are chosen at run time.")
@options.computing
@options.selection
@options.adapters
@options.allow_pickle
@options.jobs
@options.max_memory
@options.dry_run
@options.common
@options.hub
def command(
    sink: Sink,
    model: str,
    out: str,
    to: str,
    adapters: tuple[tuple[str, float], ...],
    no_verify: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Export a model to ONNX, adapters merged on the way.

    MODEL is a model's directory. The graph is traced without loading weights, which then stream from the checkpoint
    into the output; what was written is run in onnxruntime and compared with torch before it appears.

    \b
    Examples:
      loramerge export model -o served
      loramerge export base --adapter lora=0.7 -o served --dtype float16
      loramerge export base -o served --layout genai
      loramerge export base --adapter lora -o merged --to safetensors
    """
    import loramerge as lm

    with sink.progress_bar("export") as progress:
        data = lm.export(
            model,
            out,
            to=to,
            adapters=list(adapters),
            verify=not no_verify,
            dry_run=dry_run,
            progress=progress,
            **flags,
        )
    for note in data["notes"]:
        sink.warn(note)
    lines = _lines(data, out)
    sink.result({**data, "out": out}, [f"{label:<10}{text}" for label, text in lines], out)


def _lines(data: Mapping[str, Any], out: str) -> list[tuple[str, str]]:
    plan = data["plan"]
    lines = [("model", plan["base"])]
    for row in plan["adapters"]:
        text = f"{row['source']}   {row['modules_matched']}/{row['modules']} modules"
        lines.append(("adapter", text if row["weight"] == 1 else f"{text}   weight {row['weight']:g}"))
    if data["to"] == "onnx":
        lines.append(("graph", f"{plan['architecture']}   {plan['task']}   opset {plan['opset']}, {plan['dtype']}"))
        lines += [("", f"{g['file']}   {plural(g['nodes'], 'node')}") for g in plan["graphs"]]
    if data.get("dry_run"):
        return [*lines, ("would be", f"{out}   {size(plan['bytes_written'])}")]
    if data["to"] == "onnx":
        lines.append(("parity", _parity(data["parity"])))
    wrote = f"{out}   {size(data['bytes_written'])} in {duration(data['seconds'])}   receipt {data['receipt']}"
    return [*lines, ("wrote", wrote)]


def _parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "not checked"
    if parity["largest"] is None:
        return str(parity["note"])
    text = f"largest difference {parity['largest']:.2g} (tolerance {parity['tolerance']:.2g})"
    text += f", {plural(parity['runs'], 'run')} against torch"
    return f"{text}; {parity['note']}" if parity["note"] else text
