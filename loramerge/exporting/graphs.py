"""What becomes of a traced graph: constants folded, inputs and outputs named, transpositions of weights removed."""

from __future__ import annotations

import re
from typing import Any

from loramerge.exporting.tasks import GraphSpec

SCOPES = "pkg.torch.onnx.name_scopes"
"""The one property of a node that is kept: the module that it is of, by which an adapter finds its place."""


def fold(model: Any, weights: set[str]) -> None:
    """Folds what is constant, with all weights hidden: none is read, and each keeps its name.

    `weights`: their names; every other initializer may be folded away.
    """
    from onnxscript import optimizer

    hidden = {}
    for name, value in model.graph.initializers.items():
        if name in weights:
            hidden[name], value.const_value = value.const_value, None
    optimizer.optimize_ir(model, onnx_shape_inference=True)
    for name, tensor in hidden.items():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = tensor


def name_ports(model: Any, spec: GraphSpec) -> None:
    """Inputs and outputs get the names of the spec, and their axes the names that tell what they are."""
    import onnx_ir as ir

    graph = model.graph
    assert len(graph.inputs) == len(spec.inputs), f"{len(graph.inputs)} inputs were traced, not {len(spec.inputs)}"
    names: dict[str, str] = {}
    for value, port in zip(graph.inputs, spec.inputs, strict=True):
        for found, axis in zip(value.shape or (), port.axes, strict=True):
            if isinstance(axis, str) and not isinstance(found, int):
                names.setdefault(str(getattr(found, "value", found)), axis)
        value.name = port.name
        value.shape = ir.Shape(port.axes)
    if spec.outputs:
        del graph.outputs[len(spec.outputs) :]
        for value, port in zip(graph.outputs, spec.outputs, strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.axes)
    else:
        for value in graph.outputs:
            axes = [d if isinstance(d, int) else names.get(str(getattr(d, "value", d))) for d in value.shape or ()]
            value.shape = ir.Shape(axes)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if value.name == "encoder_hidden_states" and not value.uses():
            graph.inputs.remove(value)
    for ports in (graph.inputs, graph.outputs):
        ordered = sorted(ports, key=lambda value: _layer(value.name))
        del ports[:]
        ports.extend(ordered)


def _layer(name: str) -> int:
    """Order of ports: caches of two sides go layer by layer, as readers that count on an order have them."""
    found = re.fullmatch(r"(?:past_key_values|present)\.(\d+)\.\w+\.\w+", name)
    return -1 if found is None else int(found[1])


def rename_initializer(model: Any, value: Any, name: str) -> None:
    """Gives an initializer another name; one of that name takes over its uses."""
    import onnx_ir as ir

    there = model.graph.initializers.get(name)
    del model.graph.initializers[value.name]
    if there is not None:
        ir.convenience.replace_all_uses_with(value, there)
        return
    value.name = name
    model.graph.initializers[name] = value


def turnable(model: Any, weights: set[str]) -> set[str]:
    """The matrices that a graph uses transposed and in no other way."""
    found = set()
    for name in weights:
        value = model.graph.initializers[name]
        users = [use.node for use in value.uses()]
        matrix = value.shape is not None and len(value.shape) == 2 and not value.is_graph_output()
        if matrix and users and all(_transposes(node) and node.graph is model.graph for node in users):
            found.add(name)
    return found


def turn_weights(model: Any, turned: set[str]) -> None:
    """Removes the transposition of weights: their initializers are (in, out) from here on, not (out, in)."""
    import onnx_ir as ir

    for name in turned & set(model.graph.initializers):
        value = model.graph.initializers[name]
        value.const_value = None
        value.shape = ir.Shape((value.shape[1], value.shape[0]))
        for node in [use.node for use in value.uses()]:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)


def _transposes(node: Any) -> bool:
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return False
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def strip(model: Any) -> None:
    """Drops what a trace leaves for debugging; the names of modules stay."""
    model.doc_string = None
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        if scopes:
            node.metadata_props[SCOPES] = scopes
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
