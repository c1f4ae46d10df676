"""An export from end to end: plan, stream the merge into the data file, write the graphs, compare, commit."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramerge.errors import LoramergeError
from loramerge.exporting import onnx_files, packages, sidecar
from loramerge.exporting.plan import ExportPlan, Settings, open_model, plan_export
from loramerge.exporting.weights import WeightSink
from loramerge.merging import receipt as receipts
from loramerge.merging import run, sidefiles
from loramerge.merging.stream import Progress, Result, stream
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import digest_tensor, sha256_file
from loramerge.tensors.output import Output, check_destination, check_space
from loramerge.tensors.writer import write_small_file


def export(
    model: run.Pathlike | Checkpoint,
    adapters: run.Adapters,
    out: run.Pathlike,
    options: run.Options,
    settings: Settings,
    version: str,
    on_plan: Callable[[ExportPlan], None] | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Exports to ONNX. See `loramerge.export`."""
    packages.check_exporter()
    if settings.verify and not dry_run:
        packages.check_runtime("checking an export")
    started = time.monotonic()
    plan = plan_export(model, adapters, out, options, settings)
    try:
        if on_plan is not None:
            on_plan(plan)
        if dry_run:
            notes = [*plan.merge.notes, *plan.notes]
            return {"out": os.fspath(out), "to": "onnx", "dry_run": True, "plan": plan.to_data(), "notes": notes}
        data = _carry_out(plan, Path(out), options, version, progress)
    finally:
        for given, opened in zip(
            [model, *(a for a, _ in run.weighted(adapters))],
            [plan.base, *(a.checkpoint for a, _ in plan.merge.adapters)],
            strict=True,
        ):
            if isinstance(given, str | os.PathLike):
                opened.close()
    return {**data, "seconds": time.monotonic() - started}


def _carry_out(
    plan: ExportPlan, destination: Path, options: run.Options, version: str, progress: Progress | None
) -> dict[str, Any]:
    output = Output(destination, "directory", options.force)
    try:
        with output:
            folder = output.directory
            results = _write_weights(plan, folder, options, progress)
            adapters = receipts.adapter_data(plan.merge)
            facts = _facts(plan, results, adapters)
            identity = hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
            about = onnx_files.properties(identity, version, plan.base.name, adapters) | plan.properties
            onnx_files.write_graphs(plan, folder, about)
            onnx_files.check(plan, folder)
            side = _write_side_files(plan, folder)
            parity = _compare(plan, folder, options, results)
            held = [f.name for f in plan.merge.files] if plan.settings.link_weights else [plan.data_file]
            files = [_row(folder, name) for name in [*(g.path for g in plan.graphs), *held]]
            data = {
                "schema": receipts.SCHEMA,
                "tool": "loramerge",
                "version": version,
                "command": "export",
                "identity": identity,
                **facts,
                "parity": parity,
                "files": [],
                "tensors": {},
                "side_files": [*files, *side],
                "notes": [*plan.merge.notes, *plan.notes],
            }
            write_small_file(folder / receipts.NAME, receipts.encode(data))
            plan.base.check_unchanged()
            for adapter, _ in plan.merge.adapters:
                adapter.checkpoint.check_unchanged()
            output.commit()
    finally:
        output.close()
    return {
        **data,
        "out": str(destination),
        "to": "onnx",
        "plan": plan.to_data(),
        "receipt": str(destination / receipts.NAME),
        "bytes_written": plan.written,
    }


def _write_weights(
    plan: ExportPlan, folder: Path, options: run.Options, progress: Progress | None
) -> dict[str, Result]:
    """Streams the merge into the data file, or into safetensors files of its own."""
    if plan.settings.link_weights:
        files = run.FileSink(folder, link=True)
        try:
            return stream(plan.merge, files, jobs=plan.merge.jobs, device=options.device, progress=progress)
        except BaseException:
            files.abort()
            raise
    path = folder / plan.data_file
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = WeightSink(path, plan.targets, plan.weights)
    try:
        results = stream(plan.merge, sink, jobs=plan.merge.jobs, device=options.device, progress=progress)
        sink.finish()
    finally:
        sink.close()
    return results


def _facts(plan: ExportPlan, results: Mapping[str, Result], adapters: list[dict[str, Any]]) -> dict[str, Any]:
    """What was made of what: the part of the receipt that its identity is the digest of."""
    tensors = {}
    for name, (origin, _) in plan.weights.items():
        target = plan.targets[name]
        row: dict[str, Any] = {"file": target.file, "offset": target.offset, "bytes": target.nbytes, "from": {}}
        for piece in origin.pieces:
            row["from"][piece.key] = results[piece.key].digest or _digest(plan, piece.key)
        if target.turned:
            row["transposed"] = True
        tensors[name] = row
    data = plan.to_data()
    return {
        "base": {
            "source": plan.base.name,
            "files": [{"name": f.name, "size": f.source.size} for f in plan.base.files],
        },
        "adapters": adapters,
        "options": dict(plan.merge.options),
        "export": {key: data[key] for key in ("task", "architecture", "dtype", "opset", "layout")},
        "config": dict(plan.merge.binding.config),
        "weights": tensors,
    }


def _digest(plan: ExportPlan, key: str) -> str:
    """The digest of a tensor that no byte of was read, as its file was linked."""
    located = plan.base.tensors[key]
    return digest_tensor(located.file.source, located.info.begin, bits(located.info.dtype), located.info.shape)


def _write_side_files(plan: ExportPlan, folder: Path) -> list[dict[str, Any]]:
    """The model's other files, byte for byte but for what adapters change of the config, and what a layout adds."""
    rows = []
    for file in plan.merge.side_files:
        raw = sidefiles.read_side_file(file)
        if file.name == "config.json":
            raw = sidecar.config(plan, sidefiles.patched_config(raw, plan.merge.binding.config, None))
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_small_file(target, raw)
        rows.append(run.side_row(file.name, file.origin, raw))
    more = dict(sidecar.more(plan))
    if plan.settings.link_weights:
        more |= {index.name: run.index_content(plan.merge, index) for index in plan.merge.indexes}
    for name, raw in more.items():
        write_small_file(folder / name, raw)
        rows.append(run.side_row(name, "loramerge", raw))
    return rows


def _row(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"name": name, "from": "loramerge", "size": path.stat().st_size, "sha256": sha256_file(path)}


def _compare(
    plan: ExportPlan, folder: Path, options: run.Options, results: Mapping[str, Result]
) -> dict[str, Any] | None:
    """Runs the export against the model it came from.

    Raises:
        LoramergeError: `export.differs` (exit 1): the difference is over the tolerance; nothing is kept.
    """
    if not plan.settings.verify:
        return None
    from loramerge.exporting import parity

    report = parity.compare(plan, folder, options, results)
    if not report["ok"]:
        raise LoramergeError(
            "export.differs",
            f"onnxruntime and torch differ by {report['largest']:.3g}, the tolerance is {report['tolerance']:.3g} "
            f"(worst: {report['worst']})",
            fix="please report the model's config; --no-verify writes it all the same",
        )
    return report


def export_safetensors(
    model: run.Pathlike | Checkpoint,
    adapters: run.Adapters,
    out: run.Pathlike,
    options: run.Options,
    version: str,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """A merge; without adapters a copy of the model, in another dtype or cut otherwise if that is asked."""
    given, destination, started = run.weighted(adapters), Path(out), time.monotonic()
    if given:
        plan = run.plan_merge(model, adapters, out, options)
    else:
        options.check()
        opened = model if isinstance(model, Checkpoint) else open_model(model, options)
        check_destination(destination, inputs=[opened.path], force=options.force, what="directory")
        plan = run.plan_tensors(opened, [], options)
        plan = replace(plan, jobs=run.jobs_for(plan, options))
        check_space(destination, plan.bytes_written + run.SPACE_MARGIN)
    data: dict[str, Any] = {"out": os.fspath(out), "to": "safetensors", "plan": plan.to_data()}
    if dry_run:
        return {**data, "dry_run": True, "notes": list(plan.notes)}
    about = None if given else {"command": "export"}
    receipt = run.carry_out(plan, destination, options, version, progress, about)
    return {
        **data,
        **receipt.data,
        "notes": list(receipt.notes),
        "receipt": str(receipt.path),
        "bytes_written": receipt.bytes_written,
        "seconds": time.monotonic() - started,
    }
