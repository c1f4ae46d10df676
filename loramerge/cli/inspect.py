"""`loramerge inspect`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size
from loramerge.tensors.text import plural

WIDTH = 12
"""Of the labels: "checkpoint" is longer than those of other commands."""

SHOWN = 8
"""Names in one line, where -v does not ask for all."""


@click.command("inspect", no_args_is_help=False)
@click.argument("source")
@options.allow_pickle
@options.common
@options.hub
def command(sink: Sink, source: str, allow_pickle: bool, **reach: Any) -> None:
    """Tell what a file or directory is.

    Reads headers and configs only: an adapter (which kind, its rank, alpha and scale, what it was trained on,
    whether it can be merged) or a checkpoint (its files, dtypes, parameters, what was merged into it). -v lists
    every tensor and module, with --json too. -q prints one word: adapter or checkpoint.

    \b
    Examples:
      loramerge inspect lora
      loramerge inspect model.safetensors -v
      loramerge inspect merged --json
    """
    import loramerge as lm

    data = lm.inspect(source, allow_pickle=allow_pickle, **reach)
    lines = [_line(label, text) for label, text in _facts(data) if text]
    lines += [_line("note", note) for note in data["notes"]]
    if data["kind"] == "adapter":
        lines += _verdict(data)
    if sink.verbose:
        lines += _details(sink, data)
    else:
        data = {key: value for key, value in data.items() if key not in ("contents", "module_list")}
    sink.result(data, lines, data["kind"])


def _line(label: str, text: str) -> str:
    return f"{label:<{WIDTH}}{text}"


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text, a line each; empty texts are left out."""
    files = data["files"]
    kinds = sorted({file["format"] for file in files})
    what = plural(len(files), "shard" if data.get("index") else "file")
    rows = [
        (data["kind"], data["source"]),
        ("files", f"{what}   {size(sum(file['bytes'] for file in files))}   {', '.join(kinds)}"),
        ("tensors", f"{data['tensors']}   {_count(data['parameters'])} parameters   {_dtypes(data['dtypes'])}"),
    ]
    return rows + (_adapter_facts(data) if data["kind"] == "adapter" else _checkpoint_facts(data))


def _adapter_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    traits = [data["title"] or "of a dialect that is not known", data["type"] or ""]
    traits += [
        name for name, key in (("DoRA", "dora"), ("rsLoRA", "rslora"), ("LoRA bias", "lora_bias")) if data.get(key)
    ]
    traits.append(f"written by version {data['version']}" if data.get("version") else "")
    rows = [("dialect", "   ".join(filter(None, traits))), ("trained", _trained(data))]
    hint = f"   ({data['family_hint']})" if data.get("family_hint") else ""
    rows.append(("family", f"{' or '.join(data['family'])}{hint}".strip()))
    if "modules" not in data:
        return rows
    numbers = [_range(name, data.get(name)) for name in ("rank", "alpha", "scale")]
    rows.append(("update", "   ".join(filter(None, numbers))))
    kinds = [f"{count} {kind}" for kind, count in data["kinds"].items()]
    rows.append(("modules", f"{data['modules']}   {', '.join(kinds)}" if kinds else "none"))
    rows.append(("targets", _some([f"{name} ({count})" for name, count in data["targets"].items()])))
    rows.append(("whole", _some(data["plain"])))
    rows.append(("saved", _some(data["modules_to_save"])))
    if data["bias"] not in (None, "none"):
        rows.append(("bias", str(data["bias"])))
    return rows


def _trained(data: Mapping[str, Any]) -> str:
    task = f"   for {data['task']}" if data.get("task") else ""
    return f"on {data['base']}{task}" if data.get("base") else task.strip()


def _verdict(data: Mapping[str, Any]) -> list[str]:
    if data["mergeable"]:
        return [_line("merge", "yes"), _line("more", f"what it does: loramerge analyze {shlex.quote(data['source'])}")]
    lines = [_line("merge", f"no: {data['why']}")]
    lines += [_line("", name) for name in data["about"] if name not in data["why"]]
    return [*lines, _line("fix", data["fix"])] if data["fix"] else lines


def _checkpoint_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = [", ".join(map(str, data["architectures"])), f"({data['model_type']})" if data["model_type"] else ""]
    if isinstance(data["layers"], int):
        model.append(plural(data["layers"], "layer"))
    rows = [("model", "   ".join(filter(None, model)))]
    if data["family"] is not None:
        sides = {"hf": "diffusers layout", "ldm": "original layout"}
        layouts = [f"{component} in {sides[side]}" for component, side in data["family"]["layouts"].items()]
        rows.append(("family", f"{data['family']['name']}   {', '.join(layouts)}"))
    rows += [("component", _component(row)) for row in data["models"]]
    if data["tied_embeddings"] is not None:
        rows.append(("embedding", "tied to the head" if data["tied_embeddings"] else "not tied to the head"))
    if data["quantised"] and not data["models"]:
        rows.append(("quantised", f"{data['quantised']}: nothing can be merged into these weights"))
    receipt = data["receipt"]
    if receipt is not None:
        named = [row for row in receipt["adapters"] if row["source"]]
        merged = [row["source"] + ("" if row["weight"] in (1, None) else f"={row['weight']:g}") for row in named]
        rows.append(("merged", f"{_some(merged) or 'nothing'}   into {receipt['base'] or 'a base that is not named'}"))
    return rows


def _component(row: Mapping[str, Any]) -> str:
    parts = [
        row["folder"],
        row["class"],
        plural(row["files"], "file"),
        f"{_count(row['parameters'])} parameters",
        _dtypes(row["dtypes"]),
        f"quantised ({row['quantised']})" if row["quantised"] else "",
    ]
    return "   ".join(filter(None, parts))


def _details(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    """Every module of an adapter, every file of several, every tensor."""
    lines: list[str] = []
    if modules := data.get("module_list"):
        rows = [
            (row["path"], row["kind"], *(_number(row.get(name)) for name in ("rank", "alpha", "scale")))
            for row in modules
        ]
        lines += ["", *sink.table(rows, header=("module", "kind", "rank", "alpha", "scale"), align="llrrr")]
    if len(data["files"]) > 1:
        rows_ = [(file["name"], str(file["tensors"]), str(file["bytes"])) for file in data["files"]]
        lines += ["", *sink.table(rows_, header=("file", "tensors", "bytes"))]
    tensors = [
        (row["name"], row["dtype"], "x".join(map(str, row["shape"])) or "()", str(row["bytes"]))
        for row in data["contents"]
    ]
    return [*lines, "", *sink.table(tensors, header=("tensor", "dtype", "shape", "bytes"), align="llrr")]


def _dtypes(dtypes: Mapping[str, Mapping[str, int]]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({row['tensors']})" for name, row in dtypes.items())


def _range(name: str, values: list[float] | None) -> str:
    if values is None:
        return ""
    least, most = (_number(value) for value in values)
    return f"{name} {least}" if least == most else f"{name} {least} to {most}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _count(number: int) -> str:
    """``1_235_814_400`` -> ``"1.24 G"``: three digits, as models are called."""
    for step, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return str(number)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
