"""The merge from end to end: open, bind, plan, stream, commit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge import pickled
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.dialect import detect
from loramerge.adapters.opening import open_adapter
from loramerge.binding.binding import Binding
from loramerge.errors import MismatchError, UnsupportedError, UsageError
from loramerge.merging import closing, methods, onnx, sidefiles, undo
from loramerge.merging import receipt as receipts
from loramerge.merging.bound import bind_checkpoint
from loramerge.merging.plan import ONE_FILE, IndexFile, OutputFile, Plan, make_plan
from loramerge.methods import Chosen, chosen
from loramerge.tensors import mounts
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.hashing import block_digest, sha256_file
from loramerge.tensors.output import Output, check_destination, check_space
from loramerge.tensors.pipeline import input_folders
from loramerge.tensors.text import plural, quoted, some
from loramerge.tensors.writer import FileWriter, copy_whole_file, fsync_path, write_small_file

if TYPE_CHECKING:
    from loramerge.merging.stream import Progress, Result

Pathlike = str | os.PathLike[str]
Adapters = Pathlike | Adapter | Mapping[Any, float] | Sequence[Any]

SPACE_MARGIN = 16 << 20
"""Room for what is not weights: headers, receipt, side files of usual size."""


@dataclass(frozen=True)
class Options:
    """How to merge; the flags of the command line under the same names."""

    dtype: str = "keep"
    compute_dtype: str = "float32"
    device: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    jobs: int | None = None
    max_memory: int | None = None
    force: bool = False
    allow_unmatched: bool = False
    tokenizer: str = "auto"
    shard_size: int | None = None
    allow_pickle: bool = False
    alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    residual_base: bool = False
    original_base: bool = False
    grouped_experts: bool = False
    reversible: bool = False
    link: bool = False
    in_place: bool = False
    no_undo: bool = False
    method: str = methods.LINEAR
    method_options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None

    def chosen(self, count: int | None = None) -> Chosen:
        """The method, with all of its options. See `loramerge.methods.chosen`."""
        return chosen(self.method, self.method_options, count=count)

    def recorded(self) -> dict[str, Any]:
        """What changes the result, for plan and receipt; not how fast or how safely it is made."""
        how = self.chosen()
        return {
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
            "device": self.device.partition(":")[0],
            "include": list(self.include),
            "exclude": list(self.exclude),
            "allow_unmatched": self.allow_unmatched,
            "tokenizer": self.tokenizer,
            "shard_size": self.shard_size,
            "alpha": self.alpha,
            "enable_lora": None if self.enable_lora is None else [bool(b) for b in self.enable_lora],
            "residual_base": self.residual_base,
            "original_base": self.original_base,
            "grouped_experts": self.grouped_experts,
            "checkpoint": self.checkpoint,
            "method": how.name,
            "method_options": dict(how.options),
        }

    def check(self) -> None:
        """Raises UsageError for values that mean nothing."""
        choices = {"compute_dtype": ("float32", "float64"), "tokenizer": ("auto", "base", "adapter")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    "usage.value", f"{name} is {getattr(self, name)!r}", fix=f"one of {', '.join(allowed)}"
                )
        for name in ("jobs", "max_memory", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError("usage.value", f"{name} is {value}", fix="give a positive number")
        if self.in_place:
            from loramerge.merging import in_place

            in_place.check_flags(self)
        elif self.no_undo:
            raise UsageError("usage.value", "--no-undo is for --in-place", fix="leave it away")
        if self.reversible and self.dtype != "keep":
            raise UsageError(
                "usage.reversible",
                "an output of another dtype than the base's does not come back",
                fix="leave --dtype or --reversible away; --base brings such a model back",
            )
        if self.device == "mps" and self.compute_dtype == "float64":
            raise UsageError("usage.device", "mps has no float64", fix="--device cpu")
        self.chosen()


def weighted(adapters: Adapters) -> list[tuple[Pathlike | Adapter, float]]:
    """Adapters as given by a user: one, a mapping to weights, or a sequence of either or of pairs."""
    if isinstance(adapters, Mapping):
        return [(a, float(w)) for a, w in adapters.items()]
    if isinstance(adapters, str | os.PathLike | Adapter):
        return [(adapters, 1.0)]
    return [(a[0], float(a[1])) if isinstance(a, tuple) else (a, 1.0) for a in adapters]


def plan_merge(base: Pathlike | Checkpoint, adapters: Adapters, out: Pathlike, options: Options) -> Plan:
    """Decides everything from headers, and checks the destination. Nothing is written.

    Raises:
        LoramergeError: anything wrong with the inputs, their match, the destination or the space for it.
    """
    from loramerge.merging import in_place

    options.check()
    given = weighted(adapters)
    if not given:
        raise UsageError("usage.adapters", "no adapter given")
    destination = Path(out)
    single = destination.suffix in ONE_FILE
    check = partial(check_destination, destination, force=options.force, what="file" if single else "directory")
    typed = [p for p in (base, *(a for a, _ in given)) if isinstance(p, str | os.PathLike)]
    existing = [Path(p) for p in typed if os.path.exists(p)]
    if all(os.path.exists(p) or mounts.exists(p) for p in typed) and not options.in_place:
        check(inputs=[*existing, *(folder for path in existing for folder in input_folders(path))])
    plan = plan_tensors(base, given, options, single_file=destination.name if single else None)
    if not options.in_place:
        onnx.check_output(plan.base, destination)
    if not options.force and (before := receipts.merged_before(plan.base, [a for a, _ in plan.adapters])):
        raise MismatchError(
            "base.already-merged",
            f"the base's own receipt says that {before} is merged into it already",
            fix="merge into the original base, or --force to apply it twice",
            file=plan.base.name,
        )
    if options.in_place:
        in_place.check_way_back(plan.base, options)
        plan = in_place.arranged(plan, plan.base, options)
    else:
        check_space(destination, plan.bytes_written + SPACE_MARGIN)
    plan = replace(plan, recording=options.reversible)
    return replace(plan, jobs=jobs_for(plan, options))


def plan_tensors(
    base: Pathlike | Checkpoint,
    given: Sequence[tuple[Pathlike | Adapter, float]],
    options: Options,
    *,
    single_file: str | None = None,
) -> Plan:
    """The plan without a destination, as `verify` replays it."""
    read_pickle = pickled.read_header if options.allow_pickle else None
    opened = (
        base if isinstance(base, Checkpoint) else open_checkpoint(os.fspath(base), read_pickle=read_pickle, onnx=True)
    )
    _check_base(opened)
    onnx.check_options(opened, options)
    if opened.components and single_file is not None:
        raise UsageError(
            "usage.pipeline", "the base is a pipeline of several models, which no single file holds", fix="-o DIRECTORY"
        )
    pairs = open_pairs(given, options)
    binding = bind_checkpoint(opened, pairs, options)
    if pairs:  # without, it is a copy
        binding = methods.combined(binding, options.chosen(len(pairs)), pairs, options.compute_dtype)
    if opened.components:
        _check_pipeline(binding, opened.name)
    elif opened.config is None and opened.directory is not None:
        say = f"; one must say {binding.config}" if binding.config else ""
        binding.notes.append(f"the base has no config.json{say}")
    for model in opened.models:
        if model.checkpoint.index_name is not None and model.checkpoint.directory is not None:
            single = model.checkpoint.directory / "model.safetensors"
            if single.is_file() and all(f.name != single.name for f in model.checkpoint.files):
                whose = f"{model.folder} of the base" if model.folder else "the base"
                binding.notes.append(
                    f"{whose} has both {model.checkpoint.index_name} and {single.name}; the shards are used"
                )
    files: list[sidefiles.SideFile] = []
    if single_file is None:
        files, _ = sidefiles.collect(opened, [a for a, _ in pairs], options.tokenizer)
    return make_plan(
        opened,
        pairs,
        binding,
        side_files=files,
        dtype=options.dtype,
        shard_size=options.shard_size,
        single_file=single_file,
        options=options.recorded(),
    )


def open_pairs(given: Sequence[tuple[Pathlike | Adapter, float]], options: Options) -> list[tuple[Adapter, float]]:
    """Opens the adapters that are still paths.

    Raises:
        UsageError: `usage.weight` for a weight that is not a finite number.
    """
    pairs: list[tuple[Adapter, float]] = []
    for adapter, weight in given:
        if not math.isfinite(weight):
            raise UsageError("usage.weight", f"the weight of {adapter} is {weight}")
        if not isinstance(adapter, Adapter):
            adapter = open_adapter(
                os.fspath(adapter),
                read_pickle=pickled.read_header if options.allow_pickle else None,
                alpha=options.alpha,
                enable_lora=options.enable_lora,
                residual_base=options.residual_base,
                original_base=options.original_base,
                grouped_experts=options.grouped_experts,
            )
        pairs.append((adapter, weight))
    return pairs


def _check_base(base: Checkpoint) -> None:
    """A base of nothing but factors is an adapter."""
    if base.onnx is not None:
        return
    if not base.tensors:
        raise MismatchError("base.empty", "holds no tensors", fix="give a model directory or file", file=base.name)
    dialect = detect(list(base.tensors)[:64], None)
    if dialect is not None and all(dialect.parse(k).kind != "plain" for k in base.tensors):
        raise MismatchError(
            "base.is-adapter",
            "is an adapter, not a model",
            fix="the order is BASE ADAPTER; were they swapped?",
            file=base.name,
        )


def _check_pipeline(binding: Binding, name: str) -> None:
    """What changes the shape of a model cannot be done in a pipeline: its config says nothing of all the others.

    Raises:
        UnsupportedError: `pipeline.shape`.
    """
    names = binding.names
    resized = [n for n, new in binding.replaced.items() if n in names and new.factor.shape != names[n].shape]
    changed = [*binding.added, *resized, *binding.grown, *binding.untied]
    if changed or binding.config:
        raise UnsupportedError(
            "pipeline.shape",
            f"the adapter adds or resizes {some(changed)}" if changed else "the adapter changes a model's config",
            fix="merge it into the folder of that component alone",
            file=name,
            tensors=changed,
        )


def jobs_for(plan: Plan, options: Options) -> int:
    """How many workers: one more than cores, so that some compute while others wait for the disk; fewer where memory
    is limited.

    Raises:
        UnsupportedError: `plan.memory` where even one worker needs more than `max_memory`.
    """
    jobs = options.jobs or min(8, (os.cpu_count() or 1) + 1)
    if options.max_memory is None:
        return jobs
    while jobs > 1 and plan.memory(jobs) > options.max_memory:
        jobs -= 1
    if plan.memory(jobs) > options.max_memory:
        raise UnsupportedError(
            "plan.memory",
            f"needs about {plan.memory(1) / 1e6:.0f} MB, more than the {options.max_memory / 1e6:.0f} MB allowed",
            fix=f"--max-memory {plan.memory(1) / 1e6:.0f}MB",
        )
    return jobs


def merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike,
    options: Options,
    version: str,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> receipts.Receipt:
    """Merges, writes and commits. See `loramerge.merge`."""
    from loramerge.merging import in_place

    if options.in_place:
        options.check()
        place = base.path if isinstance(base, Checkpoint) else base
        if (done := in_place.resume(place, "merge", weighted(adapters), options)) is not None:
            return done
    plan = plan_merge(base, adapters, out, options)
    if on_plan is not None:
        on_plan(plan)
    try:
        if plan.in_place is not None:
            return in_place.carry_out(plan, options, version, progress)
        return carry_out(plan, Path(out), options, version, progress)
    finally:
        given = [base, *(a for a, _ in weighted(adapters))]
        opened = [plan.base, *(a.checkpoint for a, _ in plan.adapters)]
        for ours, theirs in zip(opened, given, strict=True):
            if isinstance(theirs, str | os.PathLike):
                ours.close()


def carry_out(
    plan: Plan,
    destination: Path,
    options: Options,
    version: str,
    progress: Progress | None,
    about: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Result]], Mapping[str, Any]] | None = None,
) -> receipts.Receipt:
    """Streams a plan into its destination, all or nothing.

    `about`: what the receipt says of the run where that is no merge (`command`, `base`). `check` raises where what
    became of the tensors is not right, before anything is seen; what it gives is more for the receipt.
    """
    single = destination.suffix in ONE_FILE
    receipt_at = receipts.receipt_path(destination, single)
    undo_at = undo.undo_path(destination, single)
    companions = (receipt_at.name, *((undo_at.name,) if options.reversible else ())) if single else ()
    if single and plan.base.onnx is not None:
        companions += tuple(onnx.data_names(plan.base))
    from loramerge.merging.bring_back import Recorder
    from loramerge.merging.lanes import choose_device
    from loramerge.merging.stream import stream

    choose_device(options.device)
    started = time.monotonic()
    output = Output(destination, "file" if single else "directory", options.force, companions)
    try:
        with output:
            sink = FileSink(output.directory, options.link)
            writer = undo.UndoWriter(output.directory / undo_at.name) if options.reversible else None
            recorder = None if writer is None else Recorder(writer, plan.factor_files)
            try:
                results = stream(
                    plan, sink, jobs=plan.jobs, device=options.device, progress=progress, recorder=recorder
                )
                more = {} if check is None else check(results)
            except BaseException:
                sink.abort()
                if writer is not None:
                    writer.close()
                raise
            side = _write_side_files(plan, output.directory, options)
            for index in plan.indexes:
                write_small_file(output.directory / index.name, index_content(plan, index))
                side.append(_row(output.directory, index.name, "loramerge"))
            notes = [*plan.notes, *methods.notes_after(plan.binding)]
            unchanged = sum(1 for step in plan.steps if results[step.tensor].unchanged)
            if about is None and unchanged and unchanged == sum(1 for step in plan.steps if step.do == "change"):
                notes.append("every update is zero: the result equals the base")
            adapter_rows = receipts.adapter_data(plan)
            data = receipts.receipt_data(plan, results, adapter_rows, sink.rows(plan), side, notes, version)
            data |= about or {}
            data |= more
            if writer is not None and recorder is not None:
                closing.close_undo(
                    writer, recorder, plan, results, adapter_rows, lambda name: (output.directory / name).read_bytes()
                )
                row = _row(output.directory, undo_at.name, "loramerge")
                data["undo"] = {name: row[name] for name in ("name", "size", "sha256")}
            write_small_file(output.directory / receipt_at.name, receipts.encode(data))
            plan.base.check_unchanged()
            if plan.undo is not None:
                plan.undo.source.check_unchanged()
            for adapter, _ in plan.adapters:
                adapter.checkpoint.check_unchanged()
            output.commit()
    finally:
        output.close()
    total = data["retention"]["total"]
    least = data["retention"]["least"]
    if output.leftover is not None:
        notes.append(f"the old output could not be removed: {output.leftover}")
    return receipts.Receipt(
        data=data,
        path=receipt_at,
        out=destination,
        seconds=time.monotonic() - started,
        retention=total,
        least_retention=None if least is None else (least["value"], least["module"]),
        counts=plan.counts(),
        bytes_written=plan.bytes_written,
        carried=carried(plan, options),
        notes=tuple(notes),
    )


class FileSink:
    """Writes the files of a plan into a directory."""

    def __init__(self, directory: Path, link: bool) -> None:
        self._directory = directory
        self._link = link
        self._writers: dict[str, FileWriter] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._cloned: set[str] = set()

    def begin(self, file: OutputFile, header: bytes, size: int) -> bool:
        path = self._directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {"name": file.name, "size": size, "header": block_digest(header).hex()}
        if file.component:
            row["component"] = file.component
        if file.gaps is not None and file.model is not None:
            row["kind"] = file.model.kind
        self._rows[file.name] = row
        if file.whole is not None:
            row["copied_whole"] = True
            fd = getattr(file.whole.source, "fd", None)
            how = None if fd is None else copy_whole_file(fd, path, link=self._link)
            if how == "linked":
                row["linked"] = True
                return False
            if how == "cloned":
                self._cloned.add(file.name)
                return True
        writer = FileWriter(path, size)
        self._writers[file.name] = writer
        at = 0
        for begin, end in file.gaps if file.gaps is not None else ((0, len(header)),):
            writer.write(begin, memoryview(header)[at : at + end - begin])
            at += end - begin
        return True

    def write(self, file: OutputFile, offset: int, view: memoryview) -> None:
        if file.name not in self._cloned:
            self._writers[file.name].write(offset, view)

    def end(self, file: OutputFile) -> None:
        if file.name in self._cloned:
            fsync_path(self._directory / file.name)
        else:
            self._writers.pop(file.name).finish()

    def abort(self) -> None:
        """Closes what is open."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()

    def rows(self, plan: Plan) -> list[dict[str, Any]]:
        """What was written, for the receipt, in the order of the plan."""
        return [self._rows[file.name] for file in plan.files]


def side_contents(plan: Plan, options: Options) -> Iterator[tuple[sidefiles.SideFile, bytes]]:
    """The side files of an output, with what each holds there."""
    configs = {f"{model.folder}/config.json" if model.folder else "config.json" for model in plan.base.models}
    dtype = None if options.dtype == "keep" else options.dtype
    for file in plan.side_files:
        raw = sidefiles.read_side_file(file)
        if file.name in configs:
            raw = sidefiles.patched_config(raw, plan.binding.config, dtype)
        yield file, raw


def side_row(name: str, origin: str, raw: bytes) -> dict[str, Any]:
    """What a receipt says of a side file."""
    return {"name": name, "from": origin, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _write_side_files(plan: Plan, directory: Path, options: Options) -> list[dict[str, Any]]:
    rows = []
    for file, raw in side_contents(plan, options):
        target = directory / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_small_file(target, raw)
        rows.append(_row(directory, file.name, file.origin))
    return rows


def _row(directory: Path, name: str, origin: str) -> dict[str, Any]:
    path = directory / name
    return {"name": name, "from": origin, "size": path.stat().st_size, "sha256": sha256_file(path)}


def index_content(plan: Plan, index: IndexFile) -> bytes:
    metadata = {k: v for k, v in index.metadata.items() if k not in ("total_size", "total_parameters")}
    files = [file for file in plan.files if file.component == index.component]
    metadata["total_size"] = sum(step.nbytes for file in files for step in file.steps)
    folder = f"{index.component}/" if index.component else ""
    weights = {file.stored_name(step): file.name.removeprefix(folder) for file in files for step in file.steps}
    content = {"metadata": metadata, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def carried(plan: Plan, options: Options) -> str:
    """Whose files travel with the weights, in one line."""
    if not plan.side_files:
        return "nothing beside the weights"
    names = [f.name for f in plan.side_files]
    if plan.base.components:
        folders = {os.path.dirname(name) for name in names} - {""}
        return f"the pipeline's {plural(len(names), 'file')} beside the weights, in {plural(len(folders), 'folder')}"
    tokenizers = {os.path.dirname(f.origin) for f in plan.side_files if f.name in sidefiles.VOCABULARY}
    parts = []
    if tokenizers:
        parts.append(f"tokenizer from {quoted(sorted(tokenizers)[0] or '.')}")
    if "config.json" in names:
        parts.append("config (changed)" if plan.binding.config or options.dtype != "keep" else "config")
    others = len([n for n in names if n != "config.json" and n not in sidefiles.VOCABULARY])
    if others:
        parts.append(f"{plural(others, 'more file')}")
    return ", ".join(parts)
