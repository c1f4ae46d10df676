"""Un-merges and switches: which way back there is, the plans of the exact one, and the proof that it went well."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge import pickled
from loramerge.adapters.adapter import Adapter
from loramerge.binding.binding import Binding
from loramerge.binding.families import families
from loramerge.binding.namespace import Namespace, slots_of
from loramerge.errors import MismatchError, UnsafeError, UnsupportedError, UsageError
from loramerge.merging import in_place, methods, onnx, recorded, sidefiles
from loramerge.merging import receipt as receipts
from loramerge.merging.bound import bind_checkpoint
from loramerge.merging.from_base import header_of, index_files, other_base, plan_from_base
from loramerge.merging.plan import ONE_FILE, IndexFile, OutputFile, Plan, Step, step_of
from loramerge.merging.run import SPACE_MARGIN, Options, Pathlike, carry_out, jobs_for, open_pairs
from loramerge.merging.subtract import Tally, plan_subtract
from loramerge.merging.undo import MAX_INDEX_BYTES, WHOLE, UndoFile, damaged, open_undo, undo_path
from loramerge.tensors import mounts, strictjson
from loramerge.tensors.checkpoint import Checkpoint, Located, is_index, open_checkpoint
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import digest_tensor
from loramerge.tensors.output import check_destination, check_space
from loramerge.tensors.padded import PaddedSource
from loramerge.tensors.pipeline import input_folders
from loramerge.tensors.safetensors import parse_header
from loramerge.tensors.shards import check_name
from loramerge.tensors.text import plural, quoted, some

if TYPE_CHECKING:
    from loramerge.merging.stream import Progress, Result

UNDO_FILE, BASE, SUBTRACTION = "undo file", "base", "subtraction"
"""The ways back (`Plan.way`)."""

Given = Sequence[tuple[Pathlike | Adapter, float]]


@dataclass(frozen=True)
class Merged:
    """A merged model, what its receipt says, and its undo file, where there is one."""

    checkpoint: Checkpoint
    receipt: Mapping[str, Any]
    undo: UndoFile | None

    def close(self) -> None:
        """Closes its files."""
        self.checkpoint.close()
        if self.undo is not None:
            self.undo.close()


NO_UNDO = "give the base (--base BASE), or --inexact to subtract, which does not give every weight back"
NO_UNDO_SWITCH = "merge the other adapters into the base: loramerge merge BASE ADAPTER... -o OUT --reversible"


def open_merged(path: Pathlike, *, needs_undo: bool, ignore_undo: bool = False, fix: str = NO_UNDO) -> Merged:
    """Opens a merged model with what lies beside it.

    Args:
        path: what a merge wrote.
        needs_undo: an undo file must be there; `fix` is what helps without.
        ignore_undo: do not even look at an undo file.

    Raises:
        MismatchError: `unmerge.no-receipt`, `unmerge.no-undo`; InputError: either is damaged.
    """
    checkpoint = open_checkpoint(os.fspath(path), onnx=True)
    try:
        single = checkpoint.directory is None
        receipt_at = receipts.receipt_path(checkpoint.path, single)
        if not receipt_at.is_file():
            raise MismatchError(
                "unmerge.no-receipt",
                "has no receipt of loramerge, so nothing says what was merged into it",
                fix="give what `loramerge merge` wrote, with its loramerge.json",
                file=checkpoint.name,
            )
        receipt = receipts.read_receipt(receipt_at, str(receipt_at))
        undo_at = undo_path(checkpoint.path, single)
        undo = open_undo(undo_at, str(undo_at)) if undo_at.is_file() and not ignore_undo else None
        if undo is None and needs_undo:
            lost = f"its undo file is not beside it any more ({undo_at.name})" if "undo" in receipt else ""
            why = lost or "has no undo file: it was merged without --reversible"
            raise MismatchError("unmerge.no-undo", why, fix=fix, file=checkpoint.name)
        if undo is not None:
            _check_tensors(checkpoint, undo)
        return Merged(checkpoint, receipt, undo)
    except BaseException:
        checkpoint.close()
        raise


def _check_tensors(merged: Checkpoint, undo: UndoFile) -> None:
    """The merged model has every tensor that is to come back, in the dtype and shape that it was written in."""
    for name, row in undo.tensors.items():
        if row.how == WHOLE:
            continue
        located = merged.tensors.get(name)
        if located is None or (located.info.dtype, located.info.shape) != (row.dtype, row.shape):
            had = "is not in it" if located is None else f"is {located.info.dtype} {located.info.shape} in it"
            raise MismatchError(
                "undo.foreign",
                f"the undo file is of another model: {quoted(name)} {had}",
                fix="take the model and the undo file of one merge",
                file=undo.name,
                tensors=[name],
            )


def check_adapters(
    receipt: Mapping[str, Any], pairs: Sequence[tuple[Adapter, float]], where: str
) -> list[tuple[Adapter, float]]:
    """Adapters that the user names are those that were merged. A weight of 1 may be one that was not typed.

    Returns:
        them in the order of the receipt, with its weights.

    Raises:
        MismatchError: `unmerge.adapter`.
    """
    rows = receipt["adapters"]
    names = some([str(row.get("source")) for row in rows])
    left = [(adapter, weight, [receipts.digest_file(f) for f in adapter.checkpoint.files]) for adapter, weight in pairs]
    found = []
    for row in rows:
        weight = recorded.weight_of(row, where)
        fits = [item for item in left if item[2] == recorded.digests_of(row) and item[1] in (1, weight)]
        if fits:
            best = max(fits, key=lambda item: item[1] == weight)
            left.remove(best)
            found.append((best[0], weight))
    if left:
        adapter, weight, digests = left[0]
        same = [recorded.weight_of(row, where) for row in rows if recorded.digests_of(row) == digests]
        what = f"was merged with weight {same[0]:g}, not {weight:g}" if same and weight not in (1, *same) else ""
        what = what or f"is not what was merged into {where}, which the receipt says was {names}"
        raise MismatchError(
            "unmerge.adapter", what, fix="leave the adapter away: the receipt tells what was merged", file=adapter.name
        )
    if pairs and len(found) != len(rows):
        raise MismatchError(
            "unmerge.adapter",
            f"{plural(len(rows), 'adapter')} are merged into {where}, {len(pairs)} named: all come out together",
            fix="name all or none; to keep some: loramerge switch",
            file=where,
        )
    return found


def original_tensors(merged: Merged) -> dict[str, Located]:
    """Every tensor that the un-merged model has, and where its bytes (or those that it is brought back from) lie."""
    undo = merged.undo
    assert undo is not None
    found = {n: located for n, located in merged.checkpoint.tensors.items() if n not in set(undo.index["added"])}
    return found | {name: undo.located(name) for name, row in undo.tensors.items() if row.how == WHOLE}


def plan_unmerge(merged: Merged, options: Options) -> Plan:
    """The plan that brings the base back from the undo file.

    Raises:
        InputError, MismatchError: the undo file does not fit.
    """
    undo = merged.undo
    assert undo is not None
    binding = Binding(_names(merged, {}))
    return _plan(merged, binding, (), options)


def plan_switch(merged: Merged, given: Given, options: Options) -> Plan:
    """The plan that takes out what is merged and merges other adapters instead, in one pass."""
    pairs = open_pairs(given, options)
    config = _base_config(merged)
    slots = list(_names(merged, config).slots.values())
    binding = bind_checkpoint(merged.checkpoint, pairs, options, slots=slots, config=config, receipt=merged.receipt)
    binding = methods.combined(binding, options.chosen(len(pairs)), pairs, options.compute_dtype)
    return _plan(merged, binding, pairs, options)


def _names(merged: Merged, config: Mapping[str, Any]) -> Namespace:
    shapes = {name: (where.info.dtype, where.info.shape) for name, where in original_tensors(merged).items()}
    return Namespace(slots_of(shapes), families(), config)


def _base_config(merged: Merged) -> dict[str, Any]:
    """The config.json of the base: the merged model's, or what the undo file has of it."""
    undo = merged.undo
    assert undo is not None
    if undo.index["side_files"].get("config.json") is None:
        return dict(merged.checkpoint.config or {})
    return _json(undo, "config.json")


def _json(undo: UndoFile, name: str) -> dict[str, Any]:
    """One of the base's side files that is a JSON object."""
    raw = undo.read(undo.index["side_files"][name], name)
    content = strictjson.loads(raw, where=f"{undo.name}: {name}", code="undo.damaged", max_bytes=MAX_INDEX_BYTES)
    return content if isinstance(content, dict) else {}


def _plan(merged: Merged, binding: Binding, pairs: Sequence[tuple[Adapter, float]], options: Options) -> Plan:
    undo, checkpoint = merged.undo, merged.checkpoint
    assert undo is not None
    tensors = original_tensors(merged)
    steps = {name: step_of(tensors, binding, name, "keep") for name in binding.names.slots}
    files = _arranged(merged, {name: _with_undo(step, undo) for name, step in steps.items()})
    notes = [f"{a.name}: {note}" for a, _ in pairs for note in a.notes]
    indexes = _indexes(merged, bool(pairs))
    return Plan(
        base=checkpoint,
        adapters=tuple(pairs),
        files=files,
        indexes=tuple(indexes.values()),
        binding=binding,
        side_files=tuple(_side_files(merged, [a for a, _ in pairs], indexes, options)),
        options=options.recorded(),
        notes=(*notes, *binding.notes),
        undo=undo,
    )


def _with_undo(step: Step, undo: UndoFile) -> Step:
    """The step with what brings its source back first."""
    row = undo.tensors.get(step.source.name) if step.source.input == 0 else None
    if row is None or row.how == WHOLE:
        return step
    if isinstance(step.source.file.source, PaddedSource):
        raise UnsupportedError(
            "switch.grown",
            f"the adapter widens {quoted(step.tensor)}, which must come back first",
            fix="in two steps: loramerge unmerge, then loramerge merge --reversible",
            tensors=[step.tensor],
        )
    return replace(step, undo=row, do="change")


def _arranged(merged: Merged, steps: Mapping[str, Step]) -> tuple[OutputFile, ...]:
    """Output files as the base has them, with its own headers where they still are true; what it lacks comes last."""
    undo, checkpoint = merged.undo, merged.checkpoint
    assert undo is not None
    left = dict(steps)
    inputs = {file.name: file for file in checkpoint.files}
    files: list[OutputFile] = []
    for row in _layout(merged):
        inside = f"{row.component}/" if row.component else ""
        own = [left.pop(inside + name) for name in row.tensors if inside + name in left]
        files.append(OutputFile(row.name, tuple(own), row.metadata, None, row.component, row.header))
    if left:
        files[-1] = replace(files[-1], steps=(*files[-1].steps, *left.values()))
    made = []
    for file, row in zip(files, _layout(merged), strict=True):
        same = row.header is not None and [(file.stored_name(s), s.dtype, s.shape) for s in file.steps] == row.entries
        source = inputs.get(file.name)
        untouched = source is not None and all(s.verbatim and s.source.file is source for s in file.steps)
        if source is not None and source.header.gaps is not None:
            made.append(replace(file, frame=source))  # its frame is the base's: a merge leaves it as it is
        elif same and untouched and source is not None and header_of(source) == row.header:
            made.append(replace(file, whole=source))
        else:
            made.append(file if same else replace(file, header=None))
    return tuple(made)


@dataclass(frozen=True)
class _Row:
    """One weight file of the base."""

    name: str
    component: str
    header: bytes | None
    entries: list[tuple[str, str, tuple[int, ...]]]
    metadata: Mapping[str, str]

    @property
    def tensors(self) -> list[str]:
        return [name for name, _, _ in self.entries]


def _layout(merged: Merged) -> list[_Row]:
    """The base's weight files; the merged model's where the base had no safetensors files."""
    undo, checkpoint = merged.undo, merged.checkpoint
    assert undo is not None
    metadata = {file.name: file.header.metadata for file in checkpoint.files}
    rows = []
    for row in undo.index["files"]:
        name, header = str(row["name"]), undo.read(row["header"], str(row["name"]))
        check_name(name, (".safetensors",), undo.name)
        infos = parse_header(header, undo.name).values()
        entries = [(i.name, i.dtype, i.shape) for i in infos]
        rows.append(_Row(name, str(row["component"]), header, entries, metadata.get(name, {"format": "pt"})))
    if rows:
        return rows
    added = set(undo.index["added"])
    for file in checkpoint.files:
        inside = f"{file.component}/" if file.component else ""
        kept = [i for i in file.header.tensors.values() if inside + i.name not in added]
        rows.append(
            _Row(file.name, file.component, None, [(i.name, i.dtype, i.shape) for i in kept], file.header.metadata)
        )
    return rows


def _indexes(merged: Merged, anew: bool) -> dict[str, IndexFile]:
    """The indexes that the base has, to be written anew as a merge does; none where the base's own come back.

    Weights that were no safetensors files stay in the files of the merged model.
    """
    undo = merged.undo
    assert undo is not None
    if merged.checkpoint.directory is None or not (anew or not undo.index["files"]):
        return {}
    found = {}
    for model in merged.checkpoint.models:
        if model.checkpoint.index_name is not None:
            name = f"{model.folder}/{model.checkpoint.index_name}" if model.folder else model.checkpoint.index_name
            found[name] = IndexFile(name, model.folder, model.checkpoint.index or {})
    for name, at in undo.index["side_files"].items():
        if at is None:
            found.pop(name, None)
        elif is_index(name):
            index = _json(undo, name)
            metadata = index.get("metadata")
            found[name] = IndexFile(name, name.rpartition("/")[0], metadata if isinstance(metadata, dict) else {})
    return found


def _side_files(
    merged: Merged, adapters: Sequence[Adapter], indexes: Mapping[str, IndexFile], options: Options
) -> list[sidefiles.SideFile]:
    """The base's side files: the merged model's, those that the merge changed as they were."""
    undo = merged.undo
    assert undo is not None
    if merged.checkpoint.directory is None:
        return []
    found, _ = sidefiles.collect(merged.checkpoint, [], "base")
    files = {file.name: file for file in found} | index_files(merged.checkpoint)
    for name, at in undo.index["side_files"].items():
        if at is None:
            files.pop(name, None)
        else:
            _check_side_name(name, undo.name)
            files[name] = sidefiles.SideFile(
                name, undo_path(merged.checkpoint.path, False), undo.name, undo.read(at, name)
            )
    own = [files[name] for name in sorted(files) if name not in indexes and not (indexes and is_index(name))]
    return sidefiles.with_tokenizer(own, adapters, options.tokenizer)


def _check_side_name(name: str, where: str) -> None:
    """A file name from an undo file leads nowhere else."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part or ":" in part for part in parts):
        raise UnsafeError("undo.unsafe-name", f"it names a file {quoted(name)}", file=where)


@dataclass(frozen=True)
class Prepared:
    """An un-merge or a switch, decided from headers alone.

    `about`: what the receipt says of it. `check`: looks at what became of the tensors, see `carry_out`. `opened`: what
    must be closed at the end.
    """

    plan: Plan
    options: Options
    about: Mapping[str, Any]
    check: Callable[[Mapping[str, Result]], Mapping[str, Any]]
    opened: Sequence[Merged | Checkpoint]

    def close(self) -> None:
        """Closes every file."""
        for each in self.opened:
            each.close()


def prepare_unmerge(
    path: Pathlike,
    adapters: Given,
    out: Pathlike,
    options: Options,
    base: Pathlike | None = None,
    inexact: bool = False,
) -> Prepared:
    """Decides how a merged model comes back: from `base` if that is given, else by its undo file, else by subtraction.

    Raises:
        LoramergeError: anything wrong with the inputs, the destination or the space for it; see `loramerge.unmerge`.
    """
    options = replace(options, reversible=False, link=False)
    options.check()
    opened: list[Merged | Checkpoint] = []
    try:
        merged = open_merged(path, needs_undo=base is None and not inexact, ignore_undo=base is not None)
        opened.append(merged)
        given = _open_merged_adapters(merged, adapters, options)
        opened += [adapter.checkpoint for adapter, _ in given]
        pairs = check_adapters(merged.receipt, given, merged.checkpoint.name)
        single = Path(out).name if Path(out).suffix in ONE_FILE else None
        digests: Mapping[str, str | None] = {}
        tally: Tally | None = None
        if base is not None:
            read_pickle = pickled.read_header if options.allow_pickle else None
            source = open_checkpoint(os.fspath(base), read_pickle=read_pickle, onnx=True)
            opened.append(source)
            plan, digests = plan_from_base(merged.checkpoint, merged.receipt, source, options, single)
            plan = replace(plan, way=BASE)
        elif merged.undo is not None:
            plan = replace(plan_unmerge(merged, options), way=UNDO_FILE)
        else:
            if not pairs:
                given = _open_recorded_adapters(merged, options)
                opened += [adapter.checkpoint for adapter, _ in given]
                pairs = check_adapters(merged.receipt, given, merged.checkpoint.name)
            replayed = replace(_replayed(merged, options), force=options.force)
            plan, tally = plan_subtract(merged.checkpoint, merged.receipt, pairs, replayed, single)
            plan = replace(plan, way=SUBTRACTION)
        plan = _placed(plan, merged, out, options)
        removed = [{"source": s, "weight": w} for s, w in recorded.adapters_of(merged.receipt, merged.checkpoint.name)]
        about = {
            "command": "unmerge",
            "from": merged.checkpoint.name,
            "way": plan.way,
            "adapters": [],
            "removed": removed,
        }
        check = partial(check_results, plan, merged, digests, tally)
        return Prepared(plan, options, about, check, opened)
    except BaseException:
        for each in opened:
            each.close()
        raise


def prepare_switch(path: Pathlike, adapters: Given, out: Pathlike, options: Options) -> Prepared:
    """Decides a switch.

    Raises:
        LoramergeError: anything wrong with the inputs, the destination or the space for it; see `loramerge.switch`.
    """
    options = replace(options, reversible=True, link=False)
    options.check()
    if options.shard_size is not None:
        raise UsageError("usage.value", "a switch keeps the files as they are cut", fix="leave the shard size away")
    if not adapters:
        raise UsageError("usage.adapters", "no adapter given", fix="to take out what is merged: loramerge unmerge")
    opened: list[Merged | Checkpoint] = []
    try:
        merged = open_merged(path, needs_undo=True, fix=NO_UNDO_SWITCH)
        opened.append(merged)
        assert merged.undo is not None
        plan = replace(plan_switch(merged, adapters, options), way=UNDO_FILE)
        opened += [adapter.checkpoint for adapter, _ in plan.adapters]
        plan = _placed(plan, merged, out, options)
        base = {"source": str(merged.undo.index["base"]), "files": []}
        about = {"command": "switch", "from": merged.checkpoint.name, "base": base}
        return Prepared(plan, options, about, partial(check_results, plan, merged, {}, None), opened)
    except BaseException:
        for each in opened:
            each.close()
        raise


def _open_merged_adapters(merged: Merged, adapters: Given, options: Options) -> list[tuple[Adapter, float]]:
    """Opens the adapters that a user says were merged, as the merge did."""
    return open_pairs(adapters, _replayed(merged, options)) if adapters else []


def _open_recorded_adapters(merged: Merged, options: Options) -> list[tuple[Adapter, float]]:
    """Opens the adapters where the receipt says that they were.

    Raises:
        MismatchError: `unmerge.adapter-missing`.
    """
    recorded_pairs = recorded.adapters_of(merged.receipt, merged.checkpoint.name)
    given = [(mounts.located(source), weight) for source, weight in recorded_pairs]
    if missing := [str(source) for source, _ in given if not os.path.exists(source)]:
        raise MismatchError(
            "unmerge.adapter-missing",
            f"subtracting needs what was merged into {merged.checkpoint.name}, and {some(missing)} is not there",
            fix="name the adapters where they are now: loramerge unmerge MERGED ADAPTER... --inexact -o OUT",
            file=missing[0],
        )
    return open_pairs(given, _replayed(merged, options))


def _replayed(merged: Merged, options: Options) -> Options:
    return recorded.options_of(
        merged.receipt,
        merged.checkpoint.name,
        jobs=options.jobs,
        max_memory=options.max_memory,
        allow_pickle=options.allow_pickle,
    )


def _placed(plan: Plan, merged: Merged, out: Pathlike, options: Options) -> Plan:
    """Checks the destination, names the output's one file after it, and decides how many workers there are."""
    plan = replace(plan, recording=options.reversible)
    if options.in_place:
        plan = in_place.arranged(plan, merged.checkpoint, options)
        return replace(plan, jobs=jobs_for(plan, options))
    destination, single = Path(out), merged.checkpoint.directory is None
    one_file = destination.suffix in ONE_FILE
    onnx.check_output(plan.base, destination)
    if plan.way == BASE:
        if one_file and plan.base.components:
            raise UsageError("usage.pipeline", f"{plan.base.name} is a pipeline, no single file", fix="-o DIRECTORY")
    elif single != one_file:
        what = "is one file" if single else "is a directory"
        fix = f"-o NAME{merged.checkpoint.path.suffix}" if single else "-o DIRECTORY"
        raise UsageError("usage.output", f"{merged.checkpoint.name} {what}, and so is what comes of it", fix=fix)
    sources = [merged.checkpoint.path, plan.base.path]
    inputs = [*sources, *(f for path in sources for f in input_folders(path)), *(a.path for a, _ in plan.adapters)]
    check_destination(destination, inputs=inputs, force=options.force, what="file" if one_file else "directory")
    check_space(destination, plan.bytes_written + SPACE_MARGIN)
    if one_file:
        plan = replace(plan, files=tuple(replace(f, name=_single_name(f, destination.name)) for f in plan.files))
    return replace(plan, jobs=jobs_for(plan, options))


def _single_name(file: OutputFile, name: str) -> str:
    """What a file of an output of one file is called: external data as the graph says."""
    return file.name if file.frame is not None and file.frame.kind != "onnx" else name


def check_results(
    plan: Plan,
    merged: Merged,
    digests: Mapping[str, str | None],
    tally: Tally | None,
    results: Mapping[str, Result],
) -> dict[str, Any]:
    """Checks that every tensor was read as the merge left it, or as it was before.

    Args:
        digests: tensors that came from the base, and the digests that they must have, None where nobody knows.
        tally: of a subtraction.

    Returns:
        `proved`: how many tensors that were brought back have the digest that they had in the base; `unproved`: the
        names of those for which it is not known; `inexact`: of a subtraction, see `Tally`.

    Raises:
        MismatchError: `unmerge.edited`, `unmerge.base`. InputError: `undo.mismatch`.
    """
    rows, own = merged.receipt["tensors"], {id(file) for file in merged.checkpoint.files}
    proved, unproved, edited, strange = 0, [], [], []
    for step in plan.steps:
        if step.source.input:
            continue
        name, result = step.source.name, results[step.tensor]
        row = rows.get(name, {})
        if step.undo is not None:  # its digests were compared when its last block was done
            proved += 1
        elif merged.undo is not None and name in merged.undo.tensors and merged.undo.tensors[name].how == WHOLE:
            if _read(step, result, merged.undo.located(name)) != merged.undo.tensors[name].base:
                raise damaged(merged.undo.name, f"what it holds of {quoted(name)} was changed", [name])
            proved += 1
        elif plan.way == BASE and id(step.source.file) not in own:
            wanted = digests.get(name)
            if wanted is None:
                unproved.append(name)
            elif result.source_digest != wanted:
                strange.append(name)
            else:
                proved += 1
        else:
            wanted, held = row.get("digest"), _read(step, result, merged.checkpoint.tensors[name])
            if wanted is not None and held is not None and held != wanted:
                edited.append(name)
            elif tally is not None and step.updates:
                before = row.get("base_digest")
                if before is not None and result.digest == before:
                    proved += 1
                else:
                    unproved.append(name)
    if edited:
        raise MismatchError(
            "unmerge.edited",
            f"{some(edited)} of {merged.checkpoint.name} is not what the merge wrote: the model was changed since",
            fix="take the model as it was merged, or the base itself",
            file=merged.checkpoint.name,
            tensors=edited,
        )
    if strange:
        raise other_base(plan.base, merged.checkpoint, f"{some(strange)} is not what was merged", strange)
    merged.checkpoint.check_unchanged()
    found: dict[str, Any] = {"proved": proved, "unproved": unproved}
    return found if tally is None else found | {"inexact": tally.to_data()}


def _read(step: Step, result: Result, located: Located) -> str | None:
    """The digest of a step's source as it is stored."""
    if isinstance(step.source.file.source, PaddedSource):
        return digest_tensor(located.file.source, located.info.begin, bits(located.info.dtype), located.info.shape)
    return result.source_digest or (result.digest if step.verbatim else None)


def unmerge(
    merged: Pathlike,
    adapters: Given,
    out: Pathlike,
    options: Options,
    version: str,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    base: Pathlike | None = None,
    inexact: bool = False,
) -> receipts.Receipt:
    """See `loramerge.unmerge`."""
    if options.in_place and (done := in_place.resume(merged, "unmerge", adapters, options)) is not None:
        return done
    return _carried_out(prepare_unmerge(merged, adapters, out, options, base, inexact), out, version, on_plan, progress)


def switch(
    merged: Pathlike,
    adapters: Given,
    out: Pathlike,
    options: Options,
    version: str,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> receipts.Receipt:
    """See `loramerge.switch`."""
    if options.in_place and (done := in_place.resume(merged, "switch", adapters, options)) is not None:
        return done
    return _carried_out(prepare_switch(merged, adapters, out, options), out, version, on_plan, progress)


def _carried_out(
    prepared: Prepared,
    out: Pathlike,
    version: str,
    on_plan: Callable[[Plan], None] | None,
    progress: Progress | None,
) -> receipts.Receipt:
    try:
        if on_plan is not None:
            on_plan(prepared.plan)
        plan, options, about = prepared.plan, prepared.options, prepared.about
        if plan.in_place is not None:
            return in_place.carry_out(plan, options, version, progress, about, prepared.check)
        return carry_out(plan, Path(out), options, version, progress, about, prepared.check)
    finally:
        prepared.close()
