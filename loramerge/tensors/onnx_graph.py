"""What an ONNX model says of itself: nodes, weights and where their bytes lie, subgraphs, functions. Reads no weight.

Message and field numbers: onnx 1.23.2, onnx/onnx.proto.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

from loramerge.errors import InputError, UnsupportedError
from loramerge.tensors.dtypes import BITS
from loramerge.tensors.onnx_wire import FIXED32, LENGTH, VARINT, Field, Wire
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted

MAX_DEPTH = 32
MAX_THINGS = 4_000_000
"""Nodes, weights, names and attributes of a model at most."""

_KEPT = 64  # integers of a small constant that are kept: shapes, splits, permutations

# TensorProto.DataType -> dtype on disk. 4-bit and 2-bit numbers, texts and complex128 have none there: bits follow.
_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ", 23: "F4",
    24: "F8_E8M0",
}  # fmt: skip
_BITS = {15: 128, 21: 4, 22: 4, 25: 2, 26: 2}
_TEXT = 8
_TYPED = {4: "float_data", 5: "int32_data", 6: "string_data", 7: "int64_data", 10: "double_data", 11: "uint64_data"}
_IN_PLACE = {(4, "F32"), (10, "F64")}  # packed little-endian numbers, just as raw_data has them


@dataclass(slots=True)
class Weight:
    """A tensor of the model.

    `dtype` is "U8" and `shape` its bytes for what has no dtype on disk. `place`: (external file or "" for the model
    itself, first byte, end); None where its numbers are encoded otherwise, in the field `encoded`. `key`: what a
    checkpoint calls it. `ints`: the numbers of a small constant of integers. `checksum`: an external file has one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: tuple[str, int, int] | None
    encoded: str = ""
    ints: tuple[int, ...] | None = None
    key: str = ""
    checksum: bool = False
    constant: bool = False


@dataclass(slots=True)
class Node:
    """One node. `scopes`: what its exporter noted of the module that it is of. `numbers`: attributes that are such."""

    name: str
    op: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    numbers: dict[str, Any]
    scopes: str
    graphs: dict[str, Graph]
    overload: str = ""


@dataclass(slots=True)
class Graph:
    """A graph, or the body of a function: nodes in their order, and weights by name."""

    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Model:
    """A model. `functions`: (domain, name, overload) -> body. `metadata`: its `metadata_props`."""

    graph: Graph
    functions: dict[tuple[str, str, str], Graph]
    metadata: dict[str, str]


def read_model(source: ByteSource) -> Model:
    """The model of a file.

    Raises:
        InputError: `onnx.damaged`, `onnx.size`, `onnx.duplicate`, `onnx.limit`; UnsupportedError: `onnx.dtype`,
            `onnx.sparse`.
    """
    return _Reader(source).model()


class _Reader:
    def __init__(self, source: ByteSource) -> None:
        self.wire = Wire(source)
        self.where = source.name
        self.size = source.size
        self.things = 0

    def count(self, n: int = 1) -> None:
        self.things += n
        if self.things > MAX_THINGS:
            raise self.error("limit", f"has more than {MAX_THINGS} nodes, weights and names")

    def error(self, code: str, message: str, name: str = "") -> InputError:
        text = f"{quoted(name)}: {message}" if name else message
        return InputError(f"onnx.{code}", text, fix="export the model again", file=self.where)

    def nested(self, f: Field) -> tuple[int, int]:
        """Where a message within a message lies."""
        if f.wire != LENGTH:
            raise self.wire.damaged(f"a message is expected at byte {f.begin}")
        return f.begin, f.end

    def model(self) -> Model:
        graph: Graph | None = None
        functions: dict[tuple[str, str, str], Graph] = {}
        metadata: dict[str, str] = {}
        for f in self.wire.fields(0, self.size):
            if f.number == 7:
                if graph is not None:
                    raise self.error("duplicate", "has two graphs")
                graph = self.graph(*self.nested(f), 0)
            elif f.number == 14:
                key, value = self.pair(f)
                metadata[key] = value
            elif f.number == 25:
                key3, body = self.function(*self.nested(f))
                if key3 in functions:
                    raise self.error("duplicate", f"two functions {quoted(key3[1])}")
                functions[key3] = body
        if graph is None:
            raise self.wire.damaged("it has no graph")
        return Model(graph, functions, metadata)

    def graph(self, begin: int, end: int, depth: int) -> Graph:
        if depth > MAX_DEPTH:
            raise self.error("limit", f"graphs within graphs, more than {MAX_DEPTH} deep")
        made = Graph()
        for f in self.wire.fields(begin, end):
            if f.number == 1:
                self.node(made, *self.nested(f), depth)
            elif f.number == 5:
                self.add(made, self.tensor(*self.nested(f)))
            elif f.number in (11, 12):
                names = made.inputs if f.number == 11 else made.outputs
                names += [self.wire.text(g) for g in self.wire.fields(*self.nested(f)) if g.number == 1]
                self.count()
            elif f.number == 15:
                raise UnsupportedError(
                    "onnx.sparse", "has sparse weights", fix="export the model with dense ones", file=self.where
                )
        return made

    def add(self, graph: Graph, weight: Weight) -> None:
        if weight.name in graph.weights:
            raise self.error("duplicate", f"two weights of one graph are called {quoted(weight.name)}")
        graph.weights[weight.name] = weight

    def function(self, begin: int, end: int) -> tuple[tuple[str, str, str], Graph]:
        made, name, domain, overload = Graph(), "", "", ""
        for f in self.wire.fields(begin, end):
            if f.number == 1:
                name = self.wire.text(f)
            elif f.number == 4:
                made.inputs.append(self.wire.text(f))
                self.count()
            elif f.number == 5:
                made.outputs.append(self.wire.text(f))
                self.count()
            elif f.number == 7:
                self.node(made, *self.nested(f), 1)
            elif f.number == 10:
                domain = self.wire.text(f)
            elif f.number == 13:
                overload = self.wire.text(f)
        return (domain, name, overload), made

    def node(self, graph: Graph, begin: int, end: int, depth: int) -> None:
        """Adds a node to its graph; a constant as a weight."""
        made = Node("", "", "", [], [], {}, "", {})
        tensor: Weight | None = None
        self.count()
        for f in self.wire.fields(begin, end):
            if f.number == 1:
                made.inputs.append(self.wire.text(f))
                self.count()
            elif f.number == 2:
                made.outputs.append(self.wire.text(f))
                self.count()
            elif f.number == 3:
                made.name = self.wire.text(f)
            elif f.number == 4:
                made.op = self.wire.text(f)
            elif f.number == 7:
                made.domain = self.wire.text(f)
            elif f.number == 8:
                made.overload = self.wire.text(f)
            elif f.number == 5:
                name, value = self.attribute(*self.nested(f), depth)
                self.count()
                if isinstance(value, Weight):
                    tensor = value if name == "value" else tensor
                elif isinstance(value, Graph):
                    if name in made.graphs:
                        raise self.error("duplicate", f"two attributes {quoted(name)} of one node")
                    made.graphs[name] = value
                elif value is not None:
                    made.numbers[name] = value
            elif f.number == 9:
                key, scopes = self.pair(f, wanted="pkg.torch.onnx.name_scopes")
                made.scopes = scopes if key else made.scopes
        if made.op == "Constant" and made.domain in ("", "ai.onnx") and len(made.outputs) == 1:
            numbers = made.numbers.get("value_ints", made.numbers.get("value_int"))
            if tensor is not None:
                tensor.name, tensor.constant = made.outputs[0], True
                self.add(graph, tensor)
            elif numbers is not None:
                ints = tuple(numbers) if isinstance(numbers, tuple) else (numbers,)
                self.add(graph, Weight(made.outputs[0], "I64", (len(ints),), None, "value_ints", ints, constant=True))
            return
        graph.nodes.append(made)

    def attribute(
        self, begin: int, end: int, depth: int
    ) -> tuple[str, Weight | Graph | int | float | tuple[int, ...] | None]:
        """(name, value) of an attribute: a tensor, a graph, a number, some integers, or None for what is not kept."""
        name, ints = "", list[int]()
        value: Weight | Graph | int | float | None = None
        for f in self.wire.fields(begin, end):
            if f.number == 1:
                name = self.wire.text(f)
            elif f.number == 2 and f.wire == FIXED32:
                value = struct.unpack("<f", self.wire.read(f.begin, f.end))[0]
            elif f.number == 3 and f.wire == VARINT:
                value = self.wire.integers(f)[0]
            elif f.number == 5:
                value = self.tensor(*self.nested(f), named=False)
            elif f.number == 6:
                value = self.graph(*self.nested(f), depth + 1)
            elif f.number == 8 and len(ints) < _KEPT:
                ints += self.wire.integers(f)[:_KEPT]
            elif f.number == 11:
                # Graphs in a list: no operator of ONNX has one. What they hold would be missed.
                raise self.error("damaged", "a node has a list of graphs", name)
        return name, value if value is not None else (tuple(ints) if ints else None)

    def pair(self, entry: Field, wanted: str | None = None) -> tuple[str, str]:
        """A StringStringEntryProto; ("", "") where it is not about `wanted`, whatever long text it then holds."""
        key, value = "", ""
        for f in self.wire.fields(*self.nested(entry)):
            if f.number == 1:
                key = self.wire.text(f)
                if wanted is not None and key != wanted:
                    return "", ""
            elif f.number == 2 and (wanted is None or key == wanted):
                value = self.wire.text(f)
        return key, value

    def tensor(self, begin: int, end: int, named: bool = True) -> Weight:
        """A TensorProto."""
        dims: list[int] = []
        kind, name, external, location = 0, "", {}, 0
        data: list[Field] = []
        self.count()
        for f in self.wire.fields(begin, end):
            if f.number == 1:
                dims += self.wire.integers(f)
                if len(dims) > 64:
                    raise self.error("limit", f"has {len(dims)} axes", name)
            elif f.number == 2 and f.wire == VARINT:
                kind = f.value
            elif f.number == 8:
                name = self.wire.text(f)
            elif f.number == 9 or f.number in _TYPED:
                data.append(f)
            elif f.number == 13:
                key, value = self.pair(f)
                external[key] = value
            elif f.number == 14 and f.wire == VARINT:
                location = f.value
            elif f.number == 3:
                raise self.error("damaged", "is a segment of a tensor", name)
        if named and not name:
            raise self.error("damaged", "a weight has no name")
        dtype, shape, nbytes = self.layout(name, kind, dims)
        if location == 1:
            if data:
                raise self.error("damaged", "has its data both in the model and in another file", name)
            return self.external(name, dtype, shape, nbytes, external)
        return self.inline(name, dtype, shape, nbytes, data)

    def layout(self, name: str, kind: int, dims: list[int]) -> tuple[str, tuple[int, ...], int | None]:
        """(dtype, shape, bytes) of a tensor; no bytes for texts."""
        if min(dims, default=0) < 0:
            raise self.error("size", f"has the shape {dims[:8]}", name)
        total = 1
        for n in dims:  # from the left: a zero after an overflow does not help
            total *= n
            if total >= 1 << 60:
                raise self.error("size", f"the shape {dims[:8]} is larger than any file", name)
        if kind == _TEXT:
            return "", tuple(dims), None
        if kind in _DTYPES:
            dtype = _DTYPES[kind]
            if total * BITS[dtype] % 8 == 0:
                return dtype, tuple(dims), total * BITS[dtype] // 8
            return "U8", (-(-total * BITS[dtype] // 8),), -(-total * BITS[dtype] // 8)
        if kind in _BITS:
            nbytes = -(-total * _BITS[kind] // 8)
            return "U8", (nbytes,), nbytes
        message = f"{quoted(name)} is of the dtype {kind}, which ONNX did not have when this was written"
        raise UnsupportedError("onnx.dtype", message, fix="upgrade loramerge", file=self.where, tensors=[name])

    def external(
        self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int | None, entries: dict[str, str]
    ) -> Weight:
        location = entries.get("location", "")
        numbers = {}
        for key in ("offset", "length"):
            text = entries.get(key, "")
            if text and not (text.isascii() and text.isdecimal() and len(text) < 20):
                raise self.error("damaged", f"its {key} is {quoted(text)}", name)
            numbers[key] = int(text) if text else None
        if not location or nbytes is None:
            raise self.error("damaged", "has no file for its data", name)
        if numbers["length"] not in (None, nbytes):
            message = f"shape {list(shape)} of {dtype} takes {nbytes} bytes, its file is to have {numbers['length']}"
            raise self.error("size", message, name)
        begin = numbers["offset"] or 0
        return Weight(name, dtype, shape, (location, begin, begin + nbytes), checksum="checksum" in entries)

    def inline(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int | None, data: list[Field]) -> Weight:
        raw = [f for f in data if f.number == 9]
        if raw and (len(data) > 1 or nbytes is None or raw[0].wire != LENGTH):
            raise self.error("damaged", "has its data twice", name)
        if raw:
            begin, end = raw[0].begin, raw[0].end
            if end - begin != nbytes:
                raise self.error(
                    "size", f"shape {list(shape)} of {dtype} takes {nbytes} bytes, it has {end - begin}", name
                )
            return Weight(name, dtype, shape, ("", begin, end), ints=self.small(dtype, shape, begin, end))
        if not data and nbytes:
            raise self.error("size", f"shape {list(shape)} of {dtype} takes {nbytes} bytes, it has none", name)
        first = data[0] if data else None
        if first is None:
            return Weight(name, dtype, shape, ("", 0, 0) if nbytes == 0 and dtype else None)
        whole = len(data) == 1 and first.wire == LENGTH and (first.number, dtype) in _IN_PLACE
        if whole:
            if first.end - first.begin != nbytes:
                raise self.error(
                    "size",
                    f"shape {list(shape)} of {dtype} takes {nbytes} bytes, it has {first.end - first.begin}",
                    name,
                )
            return Weight(name, dtype, shape, ("", first.begin, first.end))
        ints = None
        if dtype == "I64" and math.prod(shape) <= _KEPT and all(f.number == 7 for f in data):
            ints = tuple(n for f in data for n in self.wire.integers(f))
        return Weight(name, dtype, shape, None, _TYPED[first.number], ints)

    def small(self, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> tuple[int, ...] | None:
        if dtype != "I64" or len(shape) > 1 or end - begin > 8 * _KEPT:
            return None
        return struct.unpack(f"<{(end - begin) // 8}q", self.wire.read(begin, end))
