"""Adapter-ready graphs: the factors of an adapter are inputs, of rank 0 by default, so that no adapter is the base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from loramerge.exporting.plan import ExportPlan, Graph

SITES = "loramerge.adapter_sites"
"""Property of an adapter-ready model: the stored tensor behind every site, and all of the checkpoint's tensors."""

SCHEMA = 1


def site_names(module: str) -> tuple[str, str]:
    """Names of a site's inputs: A (in, r), and B (r, out) with the scale in it."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def make_ready(plan: ExportPlan) -> list[str]:
    """Adds `(x A) B` to every linear layer of every graph; gives their modules.

    Heads that share their weight with the embeddings, experts that are stacked, and convolutions are no sites.
    """
    sites: dict[str, dict[str, Any]] = {}
    for graph in plan.graphs:
        for name in list(plan.weights):
            key = _whole_tensor(plan, name)
            if key is None or not name.endswith(".weight") or name not in graph.model.graph.initializers:
                continue
            uses = list(_products(graph, name))
            if not uses:
                continue
            inner, outer = plan.targets[name].shape
            if uses[0][1]:
                inner, outer = outer, inner
            module = name.removesuffix(".weight")
            _add(graph, module, [node for node, _ in uses], inner, outer)
            turned = plan.targets[name].turned or uses[0][1]
            sites[module] = {"tensor": key, "stored": "out-in" if turned else "in-out"}
    tensors = {s.tensor: [s.dtype, list(s.shape)] for s in plan.merge.steps}
    plan.properties[SITES] = json.dumps({"schema": SCHEMA, "sites": sites, "tensors": tensors})
    return sorted(sites)


def _whole_tensor(plan: ExportPlan, name: str) -> str | None:
    """The stored tensor that a weight is, where it is one."""
    origin = plan.weights[name][0]
    if len(origin.pieces) != 1 or len(origin.shape) != 2:
        return None
    piece = origin.pieces[0]
    whole = piece.box == tuple((0, n) for n in plan.stored_shape(piece.key))
    return piece.key if whole and piece.axes == (0, 1) else None


def _products(graph: Graph, name: str) -> Iterator[tuple[Any, bool]]:
    """Nodes that multiply by a weight, and whether they transpose it themselves."""
    value = graph.model.graph.initializers[name]
    for use in value.uses():
        node = use.node
        if use.idx != 1 or node.domain not in ("", "ai.onnx") or node.graph is not graph.model.graph:
            continue
        if node.op_type == "MatMul":
            yield node, False
        elif node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
            yield node, bool(node.attributes.get_int("transB", 0))


def _add(graph: Graph, module: str, nodes: list[Any], inner: int, outer: int) -> None:
    import onnx_ir as ir

    inside = graph.model.graph
    weight = inside.initializers[f"{module}.weight"]
    rank: Any = ir.SymbolicDim(f"{module}.lora_rank")
    factors = []
    for name, shape, empty in zip(
        site_names(module), ((inner, rank), (rank, outer)), ((inner, 0), (0, outer)), strict=True
    ):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(weight.dtype))
        value.const_value = ir.tensor(np.empty(empty, weight.dtype.numpy()), name=name)
        inside.inputs.append(value)
        inside.initializers[name] = value
        factors.append(value)
    for number, node in enumerate(nodes):
        out = node.outputs[0]
        stem = f"{module}.lora" if not number else f"{module}.lora.{number}"
        first = ir.node("MatMul", [node.inputs[0], factors[0]], name=f"{stem}_A")
        second = ir.node("MatMul", [first.outputs[0], factors[1]], name=f"{stem}_B")
        total = ir.node("Add", [out, second.outputs[0]], name=stem)
        for made in (first, second, total):
            made.outputs[0].type = out.type
            made.outputs[0].name = f"{made.name}.out"
        total.outputs[0].shape = out.shape
        if out.is_graph_output():
            out.name, total.outputs[0].name = f"{stem}.base", out.name
        ir.convenience.replace_all_uses_with(out, total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, out)
        inside.insert_after(node, [first, second, total])
