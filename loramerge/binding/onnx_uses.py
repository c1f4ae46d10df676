"""What the nodes of an ONNX graph do with its weights: which operator reads each, which way round, for which module."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from loramerge.errors import InputError
from loramerge.tensors.onnx_graph import Graph, Model, Node, Weight

MAX_VISITS = 4_000_000
"""Nodes that are looked at at most: functions that call functions can multiply."""
_MAX_DEPTH = 32

LINEAR, EMBEDDING, CONV, SCALE, BIAS, OTHER = "linear", "embedding", "convolution", "scale", "bias", "other"


class Use(NamedTuple):
    """One use of a weight.

    `flipped`: a linear's or embedding's weight lies as (in, out), or (dimension, vocabulary). `path`: the module that
    the node is of, "" where nothing says. `quantised`: it is read as codes, or as numbers decoded from codes. `scaled`:
    the operator multiplies the product with a number other than 1.
    """

    kind: str
    flipped: bool
    path: str
    op: str
    quantised: bool = False
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class _Value:
    """A weight as some node gets it: perhaps transposed, decoded, or in a shape that nothing is known of."""

    weight: Weight
    shape: tuple[int, ...]
    turned: bool = False
    quantised: bool = False
    unclear: bool = False
    path: str = ""


# Operators that read a normalised weight: which input is its scale, which its bias.
_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "BatchNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2, None),
}
# Operators that read codes (onnx and com.microsoft): which inputs are codes of weights.
_CODES = {
    "MatMulNBits": (1,),
    "MatMulBnb4": (1,),
    "MatMulFpQ4": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "DynamicQuantizeMatMul": (1,),
    "QLinearMatMul": (3,),
    "QGemm": (3,),
    "QAttention": (1,),
    "QLinearConv": (3,),
    "ConvInteger": (1,),
    "GatherBlockQuantized": (0,),
}
_SAME = {"Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape", "Flatten"}
_SCOPE = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


def uses_of(model: Model) -> dict[str, list[Use]]:
    """Every use of every weight, by the weight's key in the checkpoint.

    Raises:
        InputError: `onnx.limit` for functions that call one another without end.
    """
    walk = _Walk(model)
    walk.graph(model.graph, ChainMap(), "", 0)
    return walk.uses


class _Walk:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.uses: dict[str, list[Use]] = {}
        self.visits = 0

    def graph(self, graph: Graph, env: ChainMap[str, _Value | None], caller: str, depth: int) -> None:
        """Looks at the nodes of a graph. `env`: the weights among the values that it sees from outside."""
        if depth > _MAX_DEPTH:
            raise InputError("onnx.limit", "functions call one another without end", fix="export the model again")
        for name, weight in graph.weights.items():
            env[name] = _Value(weight, weight.shape)
        for node in graph.nodes:
            self.visits += 1
            if self.visits > MAX_VISITS:
                raise InputError("onnx.limit", "functions call one another too often", fix="export the model again")
            body = self.model.functions.get((node.domain, node.op, node.overload))
            if body is not None:
                formal: dict[str, _Value | None] = dict.fromkeys(body.inputs)
                formal |= {inner: env.get(outer) for inner, outer in zip(body.inputs, node.inputs, strict=False)}
                self.graph(body, ChainMap(formal), path_of(node) or caller, depth + 1)
                continue
            for inner in node.graphs.values():
                hidden: dict[str, _Value | None] = {n: None for n in inner.inputs if n not in inner.weights}
                self.graph(inner, env.new_child(hidden), path_of(node) or caller, depth + 1)
            given = [env.get(name) if name else None for name in node.inputs]
            for output in node.outputs:
                if output:
                    env[output] = None  # a name of an outer graph may be used again
            if any(value is not None for value in given):
                self.node(node, given, env, path_of(node) or caller)
        for output in graph.outputs:
            if (value := env.get(output)) is not None:
                self.uses.setdefault(value.weight.key, []).append(Use(OTHER, False, value.path, "an output"))

    def node(self, node: Node, given: list[_Value | None], env: MutableMapping[str, _Value | None], path: str) -> None:
        passed = _passed(node, given)
        if passed is not None and len(node.outputs) == 1:
            env[node.outputs[0]] = replace(passed, path=path or passed.path)
            return
        for index, value in enumerate(given):
            if value is not None:
                use = _use(node, index, value, given)
                self.uses.setdefault(value.weight.key, []).append(use._replace(path=path or value.path))


def _passed(node: Node, given: list[_Value | None]) -> _Value | None:
    """The weight that a node only hands on, as it then is."""
    value = given[0] if given else None
    if value is None:
        return None
    if node.op == "Transpose":
        order = node.numbers.get("perm") or tuple(reversed(range(len(value.shape))))
        if tuple(order) == tuple(range(len(value.shape))):
            return value
        if tuple(order) == (1, 0) and len(value.shape) == 2:
            return replace(value, turned=not value.turned, shape=value.shape[::-1])
        return replace(value, unclear=True)
    if node.op == "DequantizeLinear":
        return replace(value, quantised=True)
    if node.op not in _SAME:
        return None
    if node.op in ("Identity", "Cast", "CastLike"):
        return value
    if node.op == "Reshape" and (wanted := given[1] if len(given) > 1 else None) is not None:
        ints = wanted.weight.ints
        if ints is not None and _without_ones(_filled(ints, value.shape)) == _without_ones(value.shape):
            return replace(value, shape=_filled(ints, value.shape))
    if node.op in ("Squeeze", "Unsqueeze") and 1 not in value.shape and len(_without_ones(value.shape)) == 2:
        return replace(value, unclear=node.op == "Unsqueeze")
    return replace(value, unclear=True)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _filled(ints: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a Reshape to `ints` gives: 0 keeps an axis, -1 is what is left."""
    made = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(ints)]
    if made.count(-1) == 1:
        known = total = 1
        for n in made:
            known *= n if n > 0 else 1
        for n in shape:
            total *= n
        made[made.index(-1)] = total // known if known else 0
    return tuple(made)


def _use(node: Node, index: int, value: _Value, given: list[_Value | None]) -> Use:
    """What a node does with a weight that it gets as its input `index`."""
    if node.op in _CODES:
        codes = index in _CODES[node.op]
        return Use(LINEAR if codes else OTHER, False, "", node.op, quantised=codes)
    kind, flipped, scaled = _role(node, index, value, given)
    if value.unclear:
        kind = OTHER
    return Use(kind, flipped != value.turned, "", node.op, value.quantised, scaled)


def _role(node: Node, index: int, value: _Value, given: list[_Value | None]) -> tuple[str, bool, bool]:
    """(kind, whether the node's operand is the weight turned around, whether the product is scaled)."""
    op, matrix, line = node.op, len(value.shape) == 2, len(value.shape) == 1
    if op in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm") and matrix and index < 2:
        turned = [bool(node.numbers.get(name, 0)) for name in ("transA", "transB")][index] and op != "MatMul"
        other = given[1 - index] if len(given) > 1 else None
        if index == 1:  # x W, W (in, out)
            return LINEAR, not turned, node.numbers.get("alpha", 1.0) != 1.0
        if other is None:  # W x, W (out, in)
            return LINEAR, turned, node.numbers.get("alpha", 1.0) != 1.0
    if op in ("Gemm", "FusedGemm") and index == 2:
        return BIAS, False, node.numbers.get("beta", 1.0) != 1.0
    if op == "Attention" and node.domain == "com.microsoft" and index in (1, 2):
        return (LINEAR, True, False) if index == 1 and matrix else (BIAS, False, False)
    if op in ("Conv", "ConvTranspose", "FusedConv") and index in (1, 2):
        return (CONV if index == 1 else BIAS), False, False
    if op == "Gather" and index == 0 and matrix and node.numbers.get("axis", 0) == 0:
        return EMBEDDING, False, False
    if op in _NORMS and index in _NORMS[op]:
        return (SCALE if index == _NORMS[op][0] else BIAS), False, False
    if op == "Add" and line:
        return BIAS, False, False
    if op == "Mul" and line and value.shape[0] > 1:
        return SCALE, False, False
    return OTHER, False, False


def path_of(node: Node) -> str:
    """The path of the module that a node is of, as its exporter noted it; "" where it did not.

    torch's exporter writes the names of all modules around the node, the module's last but one, the node's own last;
    the older one, and optimum with it, names nodes `/model/layers.0/self_attn/q_proj/MatMul`.
    """
    if node.scopes:
        names = [match[1] or match[2] or "" for match in _SCOPE.finditer(node.scopes)]
        return names[-2] if len(names) > 1 else ""
    if node.name.startswith("/"):
        return node.name.strip("/").rpartition("/")[0].replace("/", ".")
    return ""
