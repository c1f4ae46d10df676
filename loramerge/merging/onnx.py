"""Merging into ONNX models: where their adapters bind, and what may be written where."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge import pickled
from loramerge.adapters.adapter import Adapter
from loramerge.binding.binding import Binding
from loramerge.binding.onnx_bind import bind_onnx
from loramerge.binding.onnx_lowering import MERGE_FIRST
from loramerge.errors import OutputError, UsageError
from loramerge.merging.methods import LINEAR
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.text import quoted, some

if TYPE_CHECKING:
    from loramerge.merging.run import Options

SUFFIX = ".onnx"


def bind_model(
    model: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    options: Options,
    receipt: Mapping[str, Any] | None = None,
) -> Binding:
    """What adapters do to each tensor of an ONNX model. Errors as `loramerge.binding.onnx_bind.bind_onnx`."""
    base, sites = None, None if receipt is None else receipt.get("sites")
    if options.checkpoint is not None and not sites:
        read_pickle = pickled.read_header if options.allow_pickle else None
        base = open_checkpoint(options.checkpoint, read_pickle=read_pickle)
    try:
        return bind_onnx(
            model,
            adapters,
            include=options.include,
            exclude=options.exclude,
            allow_unmatched=options.allow_unmatched,
            base=base,
            sites=sites,
            copies=options.chosen().name == LINEAR,
        )
    finally:
        if base is not None:
            base.close()


def check_options(base: Checkpoint, options: Options) -> None:
    """Refuses options that do not go with their base: an ONNX model keeps the dtypes that its graph knows.

    Raises:
        UsageError: `usage.dtype`, `usage.value`.
    """
    if base.onnx is None:
        if options.checkpoint is not None:
            raise UsageError("usage.value", "--base is for ONNX models", fix="leave it away: BASE is the checkpoint")
        return
    if options.dtype != "keep":
        raise UsageError(
            "usage.dtype", "the graph is made for the dtypes that it has", fix=f"leave --dtype away, or {MERGE_FIRST}"
        )
    if options.shard_size is not None:
        raise UsageError("usage.value", "an ONNX model keeps its files as they are", fix="leave --shard-size away")


def check_output(base: Checkpoint, destination: Path) -> None:
    """Refuses outputs of another format than their base.

    Raises:
        UsageError: `usage.output`. OutputError: `output.exists` where the external data would replace another file.
    """
    suffix = destination.suffix
    if base.onnx is None:
        if suffix == SUFFIX:
            fix = "-o DIRECTORY or -o NAME.safetensors; an ONNX model is made by loramerge export"
            raise UsageError("usage.output", f"{base.name} is no ONNX model, and a merge keeps the format", fix=fix)
        return
    if suffix == ".safetensors":
        raise UsageError("usage.output", f"{base.name} is an ONNX model, and stays one", fix="-o NAME.onnx")
    if suffix == SUFFIX:
        _check_data(base, destination)


def _check_data(base: Checkpoint, destination: Path) -> None:
    """External data goes beside the new model under the names that the graph says, and replaces nothing there."""
    names = data_names(base)
    if nested := [name for name in names if "/" in name]:
        message = f"the weights of {base.name} lie in folders ({some(nested)}), which one file does not have"
        raise UsageError("usage.output", message, fix="-o DIRECTORY")
    if destination.name in names:
        message = f"the graph says that its weights are in {quoted(destination.name)}, the name given for the model"
        raise UsageError("usage.output", message, fix="another name with -o")
    for name in names:
        if os.path.lexists(destination.parent / name):
            raise OutputError(
                "output.exists",
                f"the weights go into {quoted(name)} beside it, as the graph says, and that is there already",
                fix="write into a folder of its own: -o DIRECTORY, or -o DIRECTORY/NAME.onnx",
                file=destination.parent / name,
            )


def data_names(base: Checkpoint) -> list[str]:
    """The external files of a model as its graph names them: relative to it."""
    graph = base.files[0].name
    folder = graph[: graph.rfind("/") + 1]
    return [file.name.removeprefix(folder) for file in base.files[1:]]
