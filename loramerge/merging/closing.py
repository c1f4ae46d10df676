"""Closes the undo file of a merge: the originals that no code can give back, the factors, the base's headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loramerge.adapters.updates import uses
from loramerge.merging.plan import Plan, Step
from loramerge.merging.sidefiles import SideFile, collect, read_side_file
from loramerge.merging.undo import WHOLE, Segment, UndoWriter
from loramerge.tensors.checkpoint import Located
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import block_digest, row_blocks, row_layout, tensor_digest

if TYPE_CHECKING:
    from loramerge.merging.bring_back import Recorder
    from loramerge.merging.stream import Result


def close_undo(
    writer: UndoWriter,
    recorder: Recorder,
    plan: Plan,
    results: Mapping[str, Result],
    adapters: list[dict[str, Any]],
    output: Callable[[str], bytes],
) -> None:
    """Writes what remains of an undo file, and its index.

    Args:
        results: what became of each tensor.
        adapters: as the receipt names them.
        output: tells what the output has as a side file or index.
    """
    steps = {step.tensor: step for step in plan.steps}
    digests = {name: (result.source_digest, result.digest) for name, result in results.items()}
    tensors = recorder.rows(plan.steps, digests)
    originals = _originals(plan)
    for name, located in originals.items():
        step = steps.get(name)
        if name not in tensors and not _is_still_there(step, located, results):
            tensors[name] = _whole(writer, plan, located, results.get(name))
    writer.finish(
        {
            "base": plan.base.name if plan.undo is None else plan.undo.index["base"],
            "adapters": adapters,
            "tensors": tensors,
            "factors": _factors(writer, plan, tensors),
            "added": sorted(name for name in steps if name not in originals),
            "files": _files(writer, plan),
            "side_files": _side_files(writer, plan, output),
        }
    )


def _originals(plan: Plan) -> dict[str, Located]:
    """Every tensor of the base: of the given one, or of that which an undo file in use brings back."""
    if plan.undo is None:
        return dict(plan.base.tensors)
    found = {name: located for name, located in plan.base.tensors.items() if name not in plan.undo.index["added"]}
    return found | {name: plan.undo.located(name) for name, row in plan.undo.tensors.items() if row.how == WHOLE}


def _is_still_there(step: Step | None, located: Located, results: Mapping[str, Result]) -> bool:
    """Whether a tensor of the base lies in the output unchanged, under its own name."""
    if step is None or step.source.file is not located.file or step.source.info is not located.info:
        return False
    # What was brought back and then not changed is the original.
    return step.verbatim or step.undo is not None or results[step.tensor].unchanged


def _whole(writer: UndoWriter, plan: Plan, located: Located, result: Result | None) -> dict[str, Any]:
    """A tensor of the base byte for byte; where the base is a merged model, brought back first."""
    import torch

    from loramerge.merging.bring_back import bring_back, check_digests
    from loramerge.merging.deltas import Deltas
    from loramerge.merging.kernels import TORCH_DTYPES

    info, source, name = located.info, located.file.source, located.info.name
    undone = None if plan.undo is None else plan.undo.tensors.get(name)
    coded = undone is not None and undone.how != WHOLE
    deltas = Deltas(plan.undo.adapters) if plan.undo is not None and coded else None
    rows, row_bytes = row_layout(bits(info.dtype), info.shape)
    at = writer.reserve(info.nbytes)
    before, after = [], []
    for index, (r0, r1) in enumerate(row_blocks(rows, row_bytes)):
        raw: bytes | bytearray | memoryview = bytearray((r1 - r0) * row_bytes)
        source.read_into(info.begin + r0 * row_bytes, memoryview(raw))
        if undone is not None and plan.undo is not None and deltas is not None:
            after.append(block_digest(raw))
            cols = row_bytes * 8 // bits(info.dtype)
            stored = torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype])
            original = bring_back(plan.undo, name, index, stored, r0 * cols, cols, deltas)
            raw = original.view(torch.uint8).numpy().data
        before.append(block_digest(raw))
        writer.write(raw, at + r0 * row_bytes)
    if undone is not None and plan.undo is not None:
        check_digests(plan.undo, name, after if coded else None, before, plan.base.name)
    return {
        "how": WHOLE,
        "segments": [[at, info.nbytes, ""]],
        "dtype": info.dtype,
        "shape": list(info.shape),
        "base": tensor_digest(before),
        "merged": None if result is None else result.digest,
    }


def _factors(writer: UndoWriter, plan: Plan, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The factors that updates name, by adapter and key; the small, exact half of the way back."""
    wanted: dict[int, set[str]] = {index: set() for index in range(len(plan.factor_files))}
    for step in plan.steps:
        if "updates" in tensors.get(step.tensor, ()):
            for update in step.updates:
                for number, key in uses(update):
                    wanted[number].add(key)
    factors: dict[str, Any] = {}
    for index, adapter in enumerate(plan.factor_files):
        rows = factors[str(index)] = {}
        for key in sorted(wanted[index]):
            located = adapter.checkpoint.tensors[key]
            info = located.info
            rows[key] = {
                "at": writer.put(located.file.source.read(info.begin, info.nbytes)),
                "dtype": info.dtype,
                "shape": list(info.shape),
                **({"transposed": True} if key in adapter.transposed else {}),
            }
    return factors


def _files(writer: UndoWriter, plan: Plan) -> list[dict[str, Any]]:
    """The base's weight files with their headers; none where it was not of safetensors files."""
    if plan.undo is not None:
        rows = [
            (row["name"], row["component"], plan.undo.read(row["header"], row["name"]))
            for row in plan.undo.index["files"]
        ]
    elif any(file.kind != "safetensors" for file in plan.base.files):
        rows = []
    else:
        rows = [(f.name, f.component, f.source.read(0, f.header.data_start)) for f in plan.base.files]
    return [{"name": name, "component": component, "header": writer.put(raw)} for name, component, raw in rows]


def _side_files(writer: UndoWriter, plan: Plan, output: Callable[[str], bytes]) -> dict[str, Segment | None]:
    """What the base has in the place of every side file of the output that is not the base's own."""
    rows: dict[str, Segment | None] = {}
    if plan.undo is not None:
        kept = plan.undo.index["side_files"]
        rows = {name: None if at is None else writer.put(plan.undo.read(at, name)) for name, at in kept.items()}
    if plan.base.directory is None:
        return rows
    names = {file.name for file in plan.side_files}
    had = {file.name for file in collect(plan.base, [], "base")[0]}  # the adapter's tokenizer may leave some out
    if all(file.kind == "safetensors" for file in plan.base.files) and (plan.undo is None or plan.undo.index["files"]):
        # The index of other files says nothing of those that the base comes back in.
        names |= {index.name for index in plan.indexes}
        indexes = [(model.folder, model.checkpoint.index_name) for model in plan.base.models]
        had |= {f"{folder}/{name}" if folder else name for folder, name in indexes if name is not None}
    for name in sorted(names | had):
        if name in rows:
            continue
        own = plan.base.directory / name
        if not own.is_file():
            rows[name] = None
            continue
        raw = read_side_file(SideFile(name, own, str(own)))
        if name not in names or raw != output(name):
            rows[name] = writer.put(raw)
    return rows
