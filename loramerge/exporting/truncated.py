"""For models too large to run: a graph of a few layers on the same weights, and digests of all the others."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramerge.errors import LoramergeError
from loramerge.exporting import onnx_files, tasks, tracing
from loramerge.exporting import plan as plans
from loramerge.exporting.names import Piece
from loramerge.exporting.plan import DTYPES, ExportPlan
from loramerge.exporting.weights import Target
from loramerge.merging.stream import Result
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import block_digest, digest_tensor, row_blocks, row_layout, tensor_digest
from loramerge.tensors.source import FileSource

DEPTH = 2
"""Layers that run."""

_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def shallow(plan: ExportPlan) -> ExportPlan:
    """The same model with its first layers only, as graphs on the weights that were written."""
    config = copy.deepcopy(plan.config)
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        for name in _COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(DEPTH, getattr(part, name)))
        for name in ("layer_types", "mlp_layer_types"):
            if getattr(part, name, None):
                setattr(part, name, list(getattr(part, name))[:DEPTH])
    cls = plan.task.cls
    task = tasks.task_of(cls, config, DTYPES[plan.dtype], plan.task.name)
    made = replace(plan, task=task, config=config, graphs=[], weights={}, whole=False)
    plans.trace_graphs(made, tracing.build(cls, config, DTYPES[plan.dtype]), only=plan.turned)
    plans.name_files(made)
    missing = sorted(set(made.weights) - set(plan.targets))
    if missing:
        raise LoramergeError("internal", f"a shallow graph has weights that the whole one has not: {missing[:3]}")
    return made


@contextlib.contextmanager
def sessions(plan: ExportPlan, directory: Path, *, whole: bool) -> Iterator[dict[str, Any]]:
    """A session for every graph, by its path; graphs that are no part of the output go when they are done with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not whole:
        options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay where they are mapped
    cpu = ["CPUExecutionProvider"]
    if whole:
        yield {
            g.path: onnxruntime.InferenceSession(str(directory / g.path), options, providers=cpu) for g in plan.graphs
        }
        return
    data = (directory / plan.data_file).parent
    with tempfile.TemporaryDirectory(dir=data, prefix=".check-") as folder:
        made = {}
        for number, graph in enumerate(plan.graphs):
            # Weights are found beside the graph, or where a reader is told to look for them.
            path = data / f"{Path(folder).name}-{number}.onnx"
            try:
                path.write_bytes(onnx_files.encode(graph, plan.targets, {}))
                made[graph.path] = onnxruntime.InferenceSession(str(path), options, providers=cpu)
            finally:
                path.unlink(missing_ok=True)
        yield made


def compare_digests(plan: ExportPlan, directory: Path, results: Mapping[str, Result]) -> int:
    """Reads every weight back and compares it with the digest of what the merge made; gives how many.

    Raises:
        LoramergeError: `export.differs`.
    """
    count = 0
    for name, target in plan.targets.items():
        path = directory / target.file
        for piece in plan.weights[name][0].pieces:
            expected, shape = results[piece.key].digest, plan.stored_shape(piece.key)
            if expected is None or piece.box != tuple((0, n) for n in shape):
                continue  # linked; or a part of a stored tensor, whose digest is not that of the whole
            alone = len(plan.weights[name][0].pieces) == 1 and list(piece.axes) == sorted(piece.axes)
            if alone and target.turned:
                found = _digest(partial(_columns, path, target), shape, target.dtype)
            elif alone:
                with contextlib.closing(FileSource(path, str(path))) as source:
                    found = digest_tensor(source, target.offset, bits(target.dtype), shape)
            else:
                found = _digest(_rows(path, target, piece), shape, target.dtype)
            if found != expected:
                raise LoramergeError(
                    "export.differs", f"{name} is not in the data file as it was made of {piece.key}", tensors=[name]
                )
            count += 1
    return count


def _columns(path: Path, target: Target, first: int, last: int) -> NDArray[Any]:
    """Rows of a matrix that is stored transposed, by a row of the file at a time: a mapping would count as memory."""
    inner, outer = target.shape
    block = np.empty((inner, last - first), dtype=f"u{target.itemsize}")
    with open(path, "rb", buffering=0) as file:
        for row in range(inner):
            file.seek(target.offset + (row * outer + first) * target.itemsize)
            file.readinto(block[row].data)
    return block.T


def _rows(path: Path, target: Target, piece: Piece) -> Callable[[int, int], NDArray[Any]]:
    """Rows of a stored tensor from where a piece of it lies."""
    kind = f"u{target.itemsize}"
    if not target.nbytes:
        empty = np.empty(tuple(n for _, n in piece.box), dtype=kind)
        return lambda first, last: empty
    array = np.memmap(path, dtype=kind, mode="r", offset=target.offset, shape=target.shape)
    straight = array.T if target.turned else array
    part = straight[tuple(slice(s, s + n) for s, n in zip(piece.starts, piece.extents(), strict=True))]
    order = [piece.axes.index(axis) for axis in range(len(piece.starts)) if axis in piece.axes]
    sizes = [piece.box[i][1] for i in order]
    stored = part.reshape(sizes).transpose(np.argsort(order)) if sizes else part
    rows, _ = row_layout(target.itemsize * 8, stored.shape)
    matrix = stored if stored.ndim < 2 or rows == stored.shape[0] else stored.reshape(rows, -1)
    return lambda first, last: matrix[first:last] if matrix.ndim else matrix


def _digest(read: Callable[[int, int], NDArray[Any]], shape: tuple[int, ...], dtype: str) -> str:
    """The digest of a tensor, a block of rows at a time."""
    rows, row_bytes = row_layout(bits(dtype), shape)
    blocks = row_blocks(rows, row_bytes)
    return tensor_digest(
        [block_digest(np.ascontiguousarray(read(a, b)).reshape(-1).view(np.uint8).data) for a, b in blocks]
    )
