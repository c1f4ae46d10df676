"""The way back with the base at hand: only what the merge changed is read from it, the rest from the merged model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loramerge.binding.binding import Binding
from loramerge.binding.families import families
from loramerge.binding.namespace import Namespace, slots_of
from loramerge.errors import MismatchError
from loramerge.merging import sidefiles
from loramerge.merging.plan import OutputFile, Plan, Source, Step, make_plan
from loramerge.merging.run import Options
from loramerge.tensors.checkpoint import Checkpoint, Located, WeightFile
from loramerge.tensors.text import plural, quoted, some


def plan_from_base(
    merged: Checkpoint, receipt: Mapping[str, Any], base: Checkpoint, options: Options, single_file: str | None
) -> tuple[Plan, dict[str, str | None]]:
    """The plan that writes the base again.

    Returns:
        the plan, and the digest of every tensor that is taken from the base, None where the receipt has none.

    Raises:
        MismatchError: `unmerge.base`: headers alone tell that it is another base.
    """
    rows = receipt["tensors"]
    _check_names(merged, rows, base)
    kept = {name for name, where in base.tensors.items() if _untouched(rows.get(name), where, merged.tensors.get(name))}
    taken = {n: _digest(rows.get(n), base.tensors[n], merged.tensors.get(n)) for n in base.tensors if n not in kept}
    _check_files(receipt, base, [name for name, digest in taken.items() if digest is None])
    shapes = {name: (where.info.dtype, where.info.shape) for name, where in base.tensors.items()}
    side_files = [] if single_file is not None else sidefiles.collect(base, [], "base")[0]
    plan = make_plan(
        base,
        (),
        Binding(Namespace(slots_of(shapes), families(), base.config or {})),
        side_files=side_files,
        single_file=single_file,
        options=options.recorded(),
    )
    files = tuple(_file(file, merged, kept) for file in plan.files)
    if single_file is not None:
        return replace(plan, files=files), taken
    indexes = index_files(base)
    return replace(
        plan,
        files=files,
        indexes=tuple(index for index in plan.indexes if index.name not in indexes),
        side_files=tuple(sorted((*side_files, *indexes.values()), key=lambda file: file.name)),
    ), taken


def index_files(checkpoint: Checkpoint) -> dict[str, sidefiles.SideFile]:
    """The indexes of a checkpoint of safetensors files, as files to carry as they are."""
    found = {}
    for model in checkpoint.models:
        index, directory = model.checkpoint.index_name, model.checkpoint.directory
        if index is None or directory is None or any(f.kind != "safetensors" for f in model.checkpoint.files):
            continue
        name = f"{model.folder}/{index}" if model.folder else index
        found[name] = sidefiles.SideFile(name, directory / index, os.path.join(checkpoint.name, name))
    return found


def header_of(file: WeightFile) -> bytes:
    """The bytes of a safetensors file before its tensors."""
    return file.source.read(0, file.header.data_start)


def _file(file: OutputFile, merged: Checkpoint, kept: set[str]) -> OutputFile:
    """An output file with its steps reading from where they should, and with the base's own header."""
    source = _one_file(file.steps)
    steps = tuple(_step(step, merged.tensors[step.tensor] if step.tensor in kept else None) for step in file.steps)
    file = replace(file, steps=steps, whole=None)
    if source is None or source.kind != "safetensors" or [s.tensor for s in steps] != list(source.header.tensors):
        return file
    header, held = header_of(source), _one_file(steps)
    if held is not None and held.name == file.name and held is not source and header_of(held) == header:
        return replace(file, whole=held)
    return replace(file, header=header)


def _one_file(steps: Sequence[Step]) -> WeightFile | None:
    """The file that all steps read, if it is one."""
    files = {id(step.source.file): step.source.file for step in steps}
    return next(iter(files.values())) if len(files) == 1 else None


def _step(step: Step, held: Located | None) -> Step:
    """From the merged model where that still holds it, else from the base."""
    if held is None:
        return replace(step, do="change")
    return replace(step, source=Source(0, step.tensor, held.file, held.info))


def _untouched(row: Mapping[str, Any] | None, base: Located, held: Located | None) -> bool:
    """Whether the merged model's tensor is the base's, by the receipt, and can be checked to be."""
    if row is None or held is None or not _alike(base, held) or not isinstance(row.get("digest"), str):
        return False
    return "from" not in row and (row.get("do") == "copy" or row.get("base_digest") == row["digest"])


def _alike(a: Located, b: Located) -> bool:
    return (a.info.dtype, a.info.shape) == (b.info.dtype, b.info.shape)


def _digest(row: Mapping[str, Any] | None, base: Located, held: Located | None) -> str | None:
    """The digest that a tensor of the base must have: what the merge read, where that was all of it and only it."""
    if row is None or held is None or not _alike(base, held) or row.get("do") == "add":
        return None
    digest = row.get("base_digest", row.get("digest") if row.get("do") == "copy" else None)
    return digest if isinstance(digest, str) else None


def _check_names(merged: Checkpoint, rows: Mapping[str, Any], base: Checkpoint) -> None:
    """The base has every tensor that was copied or changed, and the copied ones as they are."""
    wrong = []
    for name, row in rows.items():
        if row.get("do") == "add" or "from" in row:
            continue
        where, held = base.tensors.get(name), merged.tensors.get(name)
        copied = row.get("do") == "copy" and "grown" not in row and held is not None
        if where is None or (copied and held is not None and not _alike(where, held)):
            wrong.append(name)
    if wrong:
        names = some(sorted(wrong))
        raise other_base(base, merged, f"it lacks {names}, or has it in another dtype or shape", wrong)


def _check_files(receipt: Mapping[str, Any], base: Checkpoint, unproved: list[str]) -> None:
    """Where no digest proves a tensor, the base must at least have the files that the merge read."""
    recorded = receipt["base"].get("files")
    if not unproved or not isinstance(recorded, list) or not recorded:
        return
    known = [(row.get("name"), row.get("size")) for row in recorded if isinstance(row, dict)]
    if known != [(file.name, file.source.size) for file in base.files]:
        raise MismatchError(
            "unmerge.base",
            f"its files are not those that were merged (names or sizes differ), and the receipt has no digest of "
            f"{_few(unproved)} to prove that they are the same",
            fix=f"give the base as it was merged: {quoted(receipt['base'].get('source'))}",
            file=base.name,
            tensors=unproved,
        )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return quoted(names[0]) if len(names) == 1 else plural(len(names), "tensor")


def other_base(base: Checkpoint, merged: Checkpoint, why: str, names: list[str]) -> MismatchError:
    """The error for a base that is not the one that was merged."""
    return MismatchError(
        "unmerge.base",
        f"is not the base of {merged.name}: {why}",
        fix="give the base that was merged, unchanged",
        file=base.name,
        tensors=names,
    )
