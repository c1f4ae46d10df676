"""Writes the graphs: weights as references into the data file, identity as properties, then checked from disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramerge.errors import LoramergeError
from loramerge.exporting.plan import ExportPlan, Graph
from loramerge.exporting.weights import Target
from loramerge.tensors.writer import write_small_file


def write_graphs(plan: ExportPlan, directory: Path, properties: Mapping[str, str]) -> None:
    """Writes every graph of a plan beside its data file."""
    for graph in plan.graphs:
        path = directory / graph.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_small_file(path, encode(graph, plan.targets, properties))


def encode(graph: Graph, targets: Mapping[str, Target], properties: Mapping[str, str]) -> bytes:
    """The bytes of one graph.

    Args:
        targets: where the weights lie, by name.
        properties: written into the model's `metadata_props`.
    """
    import onnx_ir as ir

    model = graph.model
    held: dict[str, Any] = {}
    for name, value in model.graph.initializers.items():
        target = targets.get(name)
        if target is None:
            continue
        held[name] = value.const_value
        kind = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64}[target.dtype]
        value.const_value = ir.ExternalTensor(
            Path(target.file).name, target.offset, target.nbytes, kind, shape=ir.Shape(target.shape), name=name
        )
        value.dtype = kind
    try:
        model.producer_name = "loramerge"
        model.producer_version = properties.get("loramerge.version", "")
        model.metadata_props.update(properties)
        proto = ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            model.graph.initializers[name].const_value = tensor
    del proto.graph.value_info[:]  # what a trace knew of shapes between; a reader infers them again
    return bytes(proto.SerializeToString(deterministic=True))


def check(plan: ExportPlan, directory: Path) -> None:
    """Reads every graph back as its readers will.

    Raises:
        LoramergeError: `internal`: the checker refuses what was written.
    """
    import onnx

    if plan.settings.link_weights:
        return  # the checker refuses files with a second name, which is what linked weights are; runtimes take them
    for graph in plan.graphs:
        try:
            onnx.checker.check_model(str(directory / graph.path), full_check=True)
        except Exception as error:  # its own errors, those of shape inference, and of protobuf
            first = str(error).strip().splitlines()[0][:300]
            raise LoramergeError("internal", f"the checker refuses {graph.path}: {first}") from error


def properties(identity: str, version: str, base: str, adapters: list[dict[str, Any]]) -> dict[str, str]:
    """What a graph says of itself: what it was made of, and the identity of the receipt."""
    rows = [
        {"source": a["source"], "weight": a["weight"], "files": [f["digest"] for f in a["files"]]} for a in adapters
    ]
    return {
        "loramerge.version": version,
        "loramerge.identity": identity,
        "loramerge.base": base,
        "loramerge.adapters": json.dumps(rows, ensure_ascii=False),
    }
