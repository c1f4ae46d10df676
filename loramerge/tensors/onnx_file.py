"""An ONNX model as a container of tensors: byte ranges of its graph file and of the files of its external data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from loramerge.errors import InputError, UnsafeError
from loramerge.tensors.dtypes import is_float
from loramerge.tensors.onnx_graph import Graph, Model, Weight, read_model
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted

Opener = Callable[[Path, str], ByteSource]
"""Opens a file (path, name for messages), and sees that it is closed."""

MAX_GAP = 4 << 20
"""Bytes between tensors that are held in memory at once; longer runs are tensors of bytes of their own."""

_FIX = "download the model again; if that does not help, it was written wrongly: export it again"


def open_parts(
    path: Path, name: str, source: ByteSource, opener: Opener
) -> tuple[Model, dict[str, tuple[ByteSource, Header]]]:
    """A model, and its files: "" for the graph itself, and each external file by its location.

    Args:
        path: the graph file.
        name: the same as the user typed it.
        source: its bytes.
        opener: opens its external files.

    Raises:
        InputError: `onnx.*`: it contradicts itself, or a file is missing or too short; UnsafeError: `onnx.location`
            where external data lies anywhere but below the model; UnsupportedError: `onnx.dtype`, `onnx.sparse`.
    """
    model = read_model(source)
    placed: dict[str, list[Weight]] = {"": []}
    _name_all(model, source.name)
    for weight in all_weights(model):
        if weight.place is not None and weight.place[1] < weight.place[2] and not _is_setting(weight):
            placed.setdefault(weight.place[0], []).append(weight)
    files: dict[str, tuple[ByteSource, Header]] = {}
    for location in sorted(placed):
        opened: ByteSource = source
        if location:
            check_location(path, location, name)
            where = os.path.join(os.path.dirname(name), location)
            try:
                opened = opener(path.parent / location, where)
            except InputError as error:
                if error.code != "input.missing":
                    raise
                message = f"keeps weights in {quoted(location)}, which is not beside it"
                raise InputError(
                    "onnx.missing-data", message, fix="download that file into the same folder", file=name
                ) from None
            if os.path.exists(path.parent / location) and os.path.samefile(path.parent / location, path):
                raise _overlap(f"keeps weights in {quoted(location)}, which is the model itself", name, "")
        metadata = {} if location else model.metadata
        files[location] = opened, _header(placed[location], opened, metadata, location or "the model")
    return model, files


def all_weights(model: Model) -> Iterator[Weight]:
    """Every weight of a model, those of subgraphs and functions too."""
    yield from model.graph.weights.values()
    for _, graph in _inner(model):
        yield from graph.weights.values()


def _is_setting(weight: Weight) -> bool:
    """Whether a constant node holds a number that is no weight: an epsilon, a shape. It stays with the graph."""
    single = math.prod(weight.shape) <= 1 or not is_float(weight.dtype)
    return weight.constant and single and weight.place is not None and not weight.place[0]


def _inner(model: Model) -> Iterator[tuple[str, Graph]]:
    """Subgraphs and bodies of functions, with where they are."""
    yield from _below(model.graph, "")
    for (domain, name, overload), body in model.functions.items():
        where = f"{domain}:{name}{f':{overload}' if overload else ''}"
        yield where, body
        yield from _below(body, f"{where}/")


def _below(graph: Graph, prefix: str) -> Iterator[tuple[str, Graph]]:
    for number, node in enumerate(graph.nodes):
        for attribute, inner in node.graphs.items():
            where = f"{prefix}{node.name or f'{node.op}#{number}'}.{attribute}"
            yield where, inner
            yield from _below(inner, f"{where}/")


def _name_all(model: Model, where: str) -> None:
    """Gives every weight its `key`: its own name, with the place of its graph before it where that is not the only one.

    Subgraphs and functions may use a name again.
    """
    taken: set[str] = set()
    for weight in model.graph.weights.values():
        weight.key = weight.name
        taken.add(weight.key)
    for place, graph in _inner(model):
        for weight in graph.weights.values():
            weight.key = weight.name if weight.name not in taken else f"{place}/{weight.name}"
            if weight.key in taken:
                message = f"two weights are called {quoted(weight.key)}"
                raise InputError("onnx.duplicate", message, fix="export the model again", file=where)
            taken.add(weight.key)


def _header(weights: list[Weight], source: ByteSource, metadata: dict[str, str], label: str) -> Header:
    """The tensors of one file by where they lie, and the gaps between them.

    Two weights of the same bytes, dtype and shape are one tensor, under the name of the first.
    """
    size, where = source.size, source.name
    tensors: dict[str, TensorInfo] = {}
    known: dict[tuple[int, int], TensorInfo] = {}
    for weight in weights:
        assert weight.place is not None
        _, begin, end = weight.place
        if end > size:
            message = f"truncated: {quoted(weight.name)} ends at byte {end}, the file has {size}"
            raise InputError("onnx.truncated", message, fix=_FIX, file=where, tensors=[weight.name])
        info = TensorInfo(weight.key, weight.dtype, weight.shape, begin, end)
        same = known.setdefault((begin, end), info)
        if (same.dtype, same.shape) != (info.dtype, info.shape):
            raise _overlap(f"{quoted(weight.name)} and {quoted(same.name)} are the same bytes", where, weight.name)
        weight.key = same.name
        tensors[same.name] = same
    ordered = sorted(tensors.values(), key=lambda i: i.begin)
    gaps: list[tuple[int, int]] = []
    made: dict[str, TensorInfo] = {}
    at = 0
    for info in [*ordered, TensorInfo("", "U8", (0,), size, size)]:
        if info.begin < at:
            raise _overlap(f"{quoted(info.name)} begins within the tensor before it", where, info.name)
        if info.begin - at > MAX_GAP:
            name = f"bytes {at} to {info.begin} of {label}"
            if name in tensors:
                raise _overlap(f"a weight is called {quoted(name)}", where, name)
            made[name] = TensorInfo(name, "U8", (info.begin - at,), at, info.begin)
        elif info.begin > at:
            gaps.append((at, info.begin))
        if info.end > info.begin:
            made[info.name] = info
        at = info.end
    return Header(made, metadata, 0, size, tuple(gaps))


def _overlap(message: str, where: str, name: str) -> InputError:
    return InputError("onnx.overlap", message, fix=_FIX, file=where, tensors=[name] if name else [])


def check_location(model: Path, location: str, where: str) -> None:
    """Refuses external data that could lie anywhere but in the model's folder or below it, on any operating system.

    A link is allowed where the model is one too and both lead to the same folder, as in the cache of the Hub: that is
    the rule of onnxruntime (its pull request 27374).

    Raises:
        UnsafeError: `onnx.location`.
    """
    windows, posix = PureWindowsPath(location), PurePosixPath(location)
    reason = ""
    if windows.drive or windows.root or posix.is_absolute():
        reason = "is not relative"
    elif ".." in windows.parts or ".." in posix.parts:
        reason = "leaves the folder of the model"
    elif any(char in location for char in "\\\0:") or any(part in ("", ".") for part in location.split("/")):
        reason = "is not a plain relative path"
    elif any(os.path.islink(model.parent / parent) for parent in list(posix.parents)[:-1]):
        reason = "goes through a link"
    elif os.path.islink(model.parent / location) and not _in_one_cache(model, model.parent / location):
        reason = "is a link"
    if reason:
        fix = "do not use this model unless you know who made it; copy the file beside the model"
        message = f"keeps weights in {quoted(location)}, which {reason}"
        raise UnsafeError("onnx.location", message, fix=fix, file=where)


def _in_one_cache(model: Path, data: Path) -> bool:
    return os.path.islink(model) and os.path.dirname(os.path.realpath(model)) == os.path.dirname(os.path.realpath(data))
