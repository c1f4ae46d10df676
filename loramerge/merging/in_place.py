"""Carries plans out where the model lies: only the bytes that change are written, through a journal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge.adapters.adapter import Adapter
from loramerge.errors import LoramergeError, MismatchError, OutputError, UnsupportedError, UsageError
from loramerge.merging import closing, methods, run, sidefiles, undo
from loramerge.merging import receipt as receipts
from loramerge.merging.plan import ONE_FILE, OutputFile, Plan, is_stale
from loramerge.tensors import journal
from loramerge.tensors.checkpoint import Checkpoint, WeightFile
from loramerge.tensors.hashing import block_digest, sha256_file
from loramerge.tensors.interrupted import journal_path
from loramerge.tensors.output import check_space
from loramerge.tensors.safetensors import parse_header
from loramerge.tensors.text import some
from loramerge.tensors.writer import write_small_file

if TYPE_CHECKING:
    from loramerge.merging.run import Options, Pathlike
    from loramerge.merging.stream import Progress, Result

ELSEWHERE = "write a new model with -o OUT"


# ------------------------------------------------------------------------------------------------------- plan


def check_flags(options: Options) -> None:
    """Flags that ask for another output than the model as it lies.

    Raises:
        UsageError: `usage.in-place`.
    """
    wrong = [
        flag
        for flag, given in (
            ("--dtype", options.dtype != "keep"),
            ("--shard-size", options.shard_size is not None),
            ("--link", options.link),
        )
        if given
    ]
    if wrong:
        message = f"{' and '.join(wrong)} ask for other files than those that are there"
        raise UsageError("usage.in-place", message, fix=f"leave away {' and '.join(wrong)}, or {ELSEWHERE}")


def check_way_back(model: Checkpoint, options: Options) -> None:
    """A merge in place leaves no base behind: it must be able to come back, or the user must not want that.

    Raises:
        UsageError: `usage.in-place`; MismatchError: `in-place.merged`.
    """
    if options.reversible and options.no_undo:
        raise UsageError("usage.in-place", "--reversible and --no-undo ask for opposite things", fix="give one of them")
    if not options.reversible and not options.no_undo:
        raise UsageError(
            "usage.in-place",
            "a merge in place leaves no base behind, and without an undo file it does not come back",
            fix="--reversible to be able to go back, or --no-undo to do without",
        )
    if undo.undo_path(model.path, model.directory is None).exists() and not options.force:
        raise MismatchError(
            "in-place.merged",
            "has an undo file of what is merged into it already, which would be lost, and the base with it",
            fix="take that out in the same pass: loramerge switch --in-place; or --force to lose the base",
            file=model.name,
        )


def arranged(plan: Plan, model: Checkpoint, options: Options) -> Plan:
    """A plan with its steps in the model's own files, so that what does not change is not touched.

    Raises:
        UnsupportedError: `in-place.format`, `in-place.layout`: the result does not fit where the model lies.
        OutputError: `in-place.link`, `output.permission`, `output.no-space`.
    """
    _check_layout(plan, model)
    steps = {step.tensor: step for step in plan.steps}
    planned = {file.name: file for file in plan.files}
    files = []
    for file in model.files:
        header = _header(file, planned.get(file.name), bool(plan.adapters))
        own = tuple(steps[name] for name in file.header.tensors)
        files.append(OutputFile(file.name, own, file.header.metadata, None, file.component, header, file))
    made = replace(plan, files=tuple(files), indexes=(), in_place=model)
    root = _root(model)
    changed = [file.name for file in made.files if _runs(file)]
    journal.check_links(root, changed, model.name)
    for name in changed:
        if not os.access(root / name, os.W_OK):
            raise OutputError(
                "output.permission", "may not be written to", fix="write elsewhere with -o OUT", file=root / name
            )
    check_space(journal_path(model.path, model.directory is None), made.bytes_written + run.SPACE_MARGIN)
    return made


def _root(model: Checkpoint) -> Path:
    return model.path.parent if model.directory is None else model.directory


def _check_layout(plan: Plan, model: Checkpoint) -> None:
    """Every tensor of the result has its place in the model, and no tensor of the model is left over."""

    def refuse(code: str, message: str, tensors: Sequence[str]) -> UnsupportedError:
        return UnsupportedError(
            code, f"cannot be rewritten in place: {message}", fix=ELSEWHERE, file=model.name, tensors=tensors
        )

    if model.directory is None and model.path.suffix not in ONE_FILE:
        raise refuse("in-place.format", f"its name does not end in {' or '.join(ONE_FILE)}", [])
    if other := [file.name for file in model.files if file.kind not in ("safetensors", "onnx", "onnx-data")]:
        raise refuse("in-place.format", f"{some(other)} is no safetensors file", [])
    steps = {step.tensor: step for step in plan.steps}
    if added := [name for name in steps if name not in model.tensors]:
        raise refuse("in-place.layout", f"the result has {some(added)}, which it lacks", added)
    if dropped := [name for name in model.tensors if name not in steps]:
        raise refuse("in-place.layout", f"the result has no {some(dropped)}", dropped)
    for name, step in steps.items():
        info = model.tensors[name].info
        if step.dtype != info.dtype or step.shape != info.shape:
            now, then = f"{info.dtype} {list(info.shape)}", f"{step.dtype} {list(step.shape)}"
            raise refuse("in-place.layout", f"{some([name])} is {now}, and would be {then}", [name])


def _header(file: WeightFile, planned: OutputFile | None, changes: bool) -> bytes:
    """The file's header after it is rewritten: of the same length, and with the same tensors in the same places.

    It is the base's own where that comes back, and says no more what the old weights' hashes were.
    """
    header = file.frame
    if file.header.gaps is not None:
        return header
    given = None if planned is None else planned.header
    if given is not None and len(given) == len(header) and parse_header(given) == parse_header(header):
        header = given
    return _without_hashes(header) if changes else header


def _without_hashes(header: bytes) -> bytes:
    """A header without hashes of weights in its metadata, blanks in their place."""
    content = json.loads(header[8:])
    metadata = content.get("__metadata__") or {}
    kept = {key: value for key, value in metadata.items() if not is_stale(key)}
    if kept == metadata:
        return header
    text = json.dumps({**content, "__metadata__": kept}, separators=(",", ":"), ensure_ascii=False).encode()
    return header if len(text) > len(header) - 8 else header[:8] + text.ljust(len(header) - 8)


def _runs(file: OutputFile) -> list[tuple[int, int]]:
    """The byte ranges of a file that are written: its header, if that changes, and tensors."""
    assert file.into is not None
    header, infos = file.layout()
    runs: list[tuple[int, int]] = []
    if header != file.into.frame:
        runs.append((0, len(header)))
    for step, info in zip(file.steps, infos, strict=True):
        if file.lies_there(step) or not info.nbytes:
            continue
        if runs and runs[-1][1] == info.begin:
            runs[-1] = (runs[-1][0], info.end)
        else:
            runs.append((info.begin, info.end))
    return runs


# ------------------------------------------------------------------------------------------------------ carry


def carry_out(
    plan: Plan,
    options: Options,
    version: str,
    progress: Progress | None,
    about: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Result]], Mapping[str, Any]] | None = None,
) -> receipts.Receipt:
    """Streams what changes into a journal, makes it binding, and copies it into place. As `run.carry_out`.

    Raises:
        OutputError: `output.busy` where another run is at it. Before the journal is binding the model is as it was;
            afterwards it is finished by the next run, or by `recover`.
    """
    from loramerge.merging.bring_back import Recorder
    from loramerge.merging.lanes import choose_device
    from loramerge.merging.stream import stream

    model = plan.in_place
    assert model is not None
    choose_device(options.device)
    started = time.monotonic()
    single, root = model.directory is None, _root(model)
    receipt_at, undo_at = receipts.receipt_path(model.path, single), undo.undo_path(model.path, single)
    command = str((about or {}).get("command", "merge"))
    runs = {f.name: (f.into.source.size, pieces) for f in plan.files if f.into is not None and (pieces := _runs(f))}
    with journal.Staging(model.path, single, command, runs) as staging:
        sink = _JournalSink(staging, set(runs))
        writer = undo.UndoWriter(staging.directory / undo_at.name) if options.reversible else None
        try:
            recorder = None if writer is None else Recorder(writer, plan.factor_files)
            results = stream(plan, sink, jobs=plan.jobs, device=options.device, progress=progress, recorder=recorder)
            _fill_digests(plan, results, receipt_at)
            more = {} if check is None else check(results)
            contents, side = _side_files(plan, options, staging)
            notes = [*plan.notes, *methods.notes_after(plan.binding)]
            adapter_rows = receipts.adapter_data(plan)
            data = receipts.receipt_data(plan, results, adapter_rows, sink.rows, side, notes, version)
            data |= {"in_place": True, **(about or {}), **more}
            if writer is not None and recorder is not None:
                closing.close_undo(
                    writer,
                    recorder,
                    plan,
                    results,
                    adapter_rows,
                    lambda name: contents[name] if name in contents else _read(root / name),
                )
                size, digest = os.path.getsize(staging.directory / undo_at.name), sha256_file(writer.path)
                data["undo"] = {"name": undo_at.name, "size": size, "sha256": digest}
            elif undo_at.exists():
                staging.remove(undo_at.name)
        finally:
            if writer is not None:
                writer.close()
        write_small_file(staging.directory / receipt_at.name, receipts.encode(data))
        for opened in (model, plan.base):
            opened.check_unchanged()
        if plan.undo is not None:
            plan.undo.source.check_unchanged()
        for adapter, _ in plan.adapters:
            adapter.checkpoint.check_unchanged()
        staging.commit()
        staging.apply()
    return _receipt(
        data, receipt_at, model.path, plan.counts(), plan.bytes_written, started, run.carried(plan, options)
    )


class _JournalSink:
    """Takes the bytes of tensors that change, and the headers that do."""

    def __init__(self, staging: journal.Staging, changed: set[str]) -> None:
        self._staging = staging
        self._changed = changed
        self.rows: list[dict[str, Any]] = []

    def begin(self, file: OutputFile, header: bytes, size: int) -> bool:
        assert file.into is not None
        row: dict[str, Any] = {"name": file.name, "size": file.into.source.size, "header": block_digest(header).hex()}
        if file.component:
            row["component"] = file.component
        self.rows.append(row)
        if file.gaps is not None:
            row["kind"] = file.into.kind
        if header != file.into.frame:
            self._staging.write(file.name, 0, memoryview(header))
        return file.name in self._changed

    def write(self, file: OutputFile, offset: int, view: memoryview) -> None:
        self._staging.write(file.name, offset, view)

    def end(self, file: OutputFile) -> None:
        """The journal is one file for all."""


def _fill_digests(plan: Plan, results: Mapping[str, Result], receipt_at: Path) -> None:
    """Tensors that stay were not read: what the old receipt says of them still holds, or nobody knows."""
    try:
        rows = receipts.read_receipt(receipt_at, str(receipt_at))["tensors"]
    except LoramergeError:
        return
    for file in plan.files:
        for step in file.steps:
            digest = rows.get(step.tensor, {}).get("digest")
            if file.lies_there(step) and isinstance(digest, str):
                results[step.tensor].digest = digest


def _side_files(
    plan: Plan, options: Options, staging: journal.Staging
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Stages the small files that change; gives what was staged, and a row for each file that the model has then."""
    model = plan.in_place
    assert model is not None
    if model.directory is None:
        return {}, []
    staged: dict[str, bytes] = {}
    rows = []
    for file, raw in run.side_contents(plan, options):
        path = model.directory / file.name
        if _is_index(file.name) and not (path.is_file() and _weight_map(raw) == _weight_map(_read(path))):
            continue  # of other files than those that are here
        if not path.is_file() or _read(path) != raw:
            target = staging.directory / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_small_file(target, raw)
            staged[file.name] = raw
        rows.append(run.side_row(file.name, file.origin, raw))
    kept = {file.name for file in plan.side_files}
    for file in sidefiles.collect(model, [], "base")[0]:
        if file.name not in kept:
            staging.remove(file.name)
    named = {row["name"] for row in rows}
    for component in model.models:
        if component.checkpoint.index_name is not None:
            name = "/".join(filter(None, (component.folder, component.checkpoint.index_name)))
            if name not in named:
                rows.append(run.side_row(name, os.path.join(model.name, name), _read(model.directory / name)))
    return staged, rows


def _is_index(name: str) -> bool:
    return name.endswith(".json") and ".index." in name.rpartition("/")[2]


def _weight_map(raw: bytes) -> Any:
    try:
        return json.loads(raw).get("weight_map")
    except (ValueError, AttributeError):
        return None


def _read(path: Path) -> bytes:
    return sidefiles.read_side_file(sidefiles.SideFile(path.name, path, str(path)))


# --------------------------------------------------------------------------------------------------- recovery


def recover(path: Pathlike) -> dict[str, Any]:
    """See `loramerge.recover`."""
    from loramerge.tensors.source import stat_file

    stat_file(Path(path), os.fspath(path))
    done = journal.recover(Path(path))
    return {
        "schema": 1,
        "model": os.fspath(path),
        "recovered": [{"model": str(each.model), "command": each.command} for each in done],
    }


def resume(
    path: Pathlike, command: str, given: Sequence[tuple[Pathlike | Adapter, float]], options: Options
) -> receipts.Receipt | None:
    """Finishes interrupted runs on a model. If the last of them was this very command, it is done with that.

    Returns:
        the receipt of the run that was finished, where it did what is asked for.
    """
    started = time.monotonic()
    model = Path(path)
    if not os.path.lexists(model) or not journal.recover(model):
        return None
    receipt_at = receipts.receipt_path(model, not model.is_dir())
    if not receipt_at.is_file():
        return None
    data = receipts.read_receipt(receipt_at, str(receipt_at))
    if data.get("command") != command:
        return None
    if command != "unmerge":
        pairs = run.open_pairs(given, options)
        asked = [([receipts.digest_file(f) for f in a.checkpoint.files], weight) for a, weight in pairs]
        for (adapter, _), (theirs, _) in zip(pairs, given, strict=True):
            if not isinstance(theirs, Adapter):
                adapter.checkpoint.close()
        there = [
            ([f.get("digest") for f in row.get("files", ()) if isinstance(f, dict)], row.get("weight"))
            for row in data["adapters"]
        ]
        if asked != there or data["options"] != json.loads(json.dumps(options.recorded())):
            return None
    counts = {"copied": 0, "changed": 0, "added": 0}
    for row in data["tensors"].values():
        key = {"copy": "copied", "change": "changed"}.get(row.get("do"), "added")
        counts[key] += 1
    note = "an interrupted run of the same command was finished"
    data["notes"] = [*data.get("notes", ()), note]
    return _receipt(data, receipt_at, model, counts, 0, started, "what the interrupted run had written")


def _receipt(
    data: Mapping[str, Any],
    receipt_at: Path,
    model: Path,
    counts: Mapping[str, int],
    written: int,
    started: float,
    carried: str,
) -> receipts.Receipt:
    retention = data.get("retention") or {}
    least = retention.get("least")
    return receipts.Receipt(
        data=data,
        path=receipt_at,
        out=model,
        seconds=time.monotonic() - started,
        retention=retention.get("total"),
        least_retention=None if least is None else (least["value"], least["module"]),
        counts=counts,
        bytes_written=written,
        carried=carried,
        notes=tuple(data.get("notes") or ()),
    )
