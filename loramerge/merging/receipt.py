"""The receipt: `loramerge.json`, which tells what went in, what came out, and how to check it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge.adapters.adapter import Adapter
from loramerge.errors import InputError
from loramerge.merging.methods import distances
from loramerge.merging.plan import Plan
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import Checkpoint, WeightFile
from loramerge.tensors.hashing import digest_tensor
from loramerge.tensors.interrupted import beside
from loramerge.tensors.padded import PaddedSource
from loramerge.tensors.source import FileSource

if TYPE_CHECKING:
    from loramerge.merging.stream import Result

NAME = "loramerge.json"
SCHEMA = 1


@dataclass(frozen=True)
class Receipt:
    """What a merge did. `data` is what the receipt file holds; the rest is of this run only.

    `retention` is the share of the update that rounding kept, over all changed tensors, and `least_retention` the
    module that kept least: `<M - W, D> / <D, D>` on sampled rows, 1 is ideal, None where nothing was added.
    """

    data: Mapping[str, Any]
    path: Path
    out: Path
    seconds: float
    retention: float | None
    least_retention: tuple[float, str] | None
    counts: Mapping[str, int]
    bytes_written: int
    carried: str
    notes: tuple[str, ...]


def receipt_path(out: Path, single_file: bool) -> Path:
    """Where the receipt of an output lies: inside a directory, beside a single file."""
    return beside(out, NAME) if single_file else out / NAME


def digest_file(file: WeightFile) -> str:
    """Digest of a whole file, as of a tensor of bytes."""
    return digest_tensor(file.source, 0, 8, (file.source.size,))


def file_row(file: WeightFile) -> dict[str, Any]:
    """An input file as the receipt names it, with its SHA-256 where that is known without reading it."""
    known = {} if file.sha256 is None else {"sha256": file.sha256}
    return {"name": file.name, "size": file.source.size, **known}


def adapter_data(plan: Plan) -> list[dict[str, Any]]:
    """The adapters of a plan as the receipt names them, with digests of their files (which are read for it)."""
    rows: list[dict[str, Any]] = []
    for row, (adapter, _) in zip(plan.to_data_adapters(), plan.adapters, strict=True):
        files = [{**file_row(f), "digest": digest_file(f)} for f in adapter.checkpoint.files]
        settings = {k: v for k, v in adapter.settings.items() if k in ("rank", "alpha", "rslora", "dora", "base")}
        rows.append({**row, **adapter.checkpoint.origin, "settings": settings, "files": files})
    return rows


def retention(plan: Plan, results: Mapping[str, Result]) -> dict[str, Any]:
    """Retention of every changed tensor, of all together, and the least."""
    kept = wanted = 0.0
    modules: dict[str, float] = {}
    for step in plan.steps:
        result = results[step.tensor]
        value = result.retention
        if value is None or not math.isfinite(value):
            continue
        kept += result.kept
        wanted += result.wanted
        modules[step.tensor.removesuffix(".weight")] = round(value, 6)
    least = min(((v, k) for k, v in modules.items()), default=None)
    return {
        "total": round(kept / wanted, 6) if wanted else None,
        "least": None if least is None else {"module": least[1], "value": least[0]},
        "modules": modules,
    }


def receipt_data(
    plan: Plan,
    results: Mapping[str, Result],
    adapters: list[dict[str, Any]],
    files: list[dict[str, Any]],
    side_files: list[dict[str, Any]],
    notes: list[str],
    version: str,
) -> dict[str, Any]:
    """The content of the receipt. Holds no times and no paths but those the user typed: same run, same bytes."""
    tensors: dict[str, Any] = {}
    for file in plan.files:
        for step in file.steps:
            result = results[step.tensor]
            row: dict[str, Any] = {"file": file.name, "do": step.do, "digest": result.digest}
            if step.source.name != step.tensor or step.source.input:
                row["from"] = {"input": step.source.input, "tensor": step.source.name}
            if isinstance(step.source.file.source, PaddedSource):
                row["grown"] = True  # so that `base_digest` is that of the base's tensor with zeros behind it
            if step.do == "change" and result.source_digest is not None:
                row["base_digest"] = result.source_digest
            tensors[step.tensor] = row
    apart = distances(plan.binding)
    return {
        "schema": SCHEMA,
        "tool": "loramerge",
        "version": version,
        "command": "merge",
        "base": {
            "source": plan.base.name,
            **plan.base.origin,
            "files": [file_row(f) for f in plan.base.files],
        },
        "adapters": adapters,
        "options": dict(plan.options),
        "config": dict(plan.binding.config),
        "retention": retention(plan, results),
        **({"sites": plan.binding.sites} if plan.binding.sites else {}),
        **({"distance": apart} if apart else {}),
        "files": files,
        "side_files": side_files,
        "tensors": tensors,
        "notes": notes,
    }


def encode(data: Mapping[str, Any]) -> bytes:
    """A receipt's bytes."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def read_receipt(path: Path, shown: str) -> dict[str, Any]:
    """Reads a receipt back, as untrusted as any other input.

    Raises:
        InputError: `receipt.invalid`, or `input.missing`.
    """
    source = FileSource(path, shown)
    try:
        raw = source.read(0, source.size)
    finally:
        source.close()
    data = strictjson.loads(raw, where=shown, code="receipt.invalid", max_bytes=1 << 30)
    shape = {"tensors": dict, "files": list, "side_files": list, "adapters": list, "options": dict, "base": dict}
    good = isinstance(data, dict) and data.get("tool") == "loramerge"
    if not good or any(not isinstance(data.get(k), t) for k, t in shape.items()):
        raise InputError("receipt.invalid", "is not a receipt of loramerge", file=shown)
    rows = [*data["tensors"].values(), *data["files"], *data["side_files"], *data["adapters"]]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError("receipt.invalid", "is not a receipt of loramerge", file=shown)
    if data.get("schema") != SCHEMA:
        raise InputError("receipt.invalid", f"has schema {data.get('schema')}, this is {SCHEMA}", file=shown)
    return dict(data)


def merged_before(base: Checkpoint, adapters: list[Adapter]) -> str | None:
    """The name of an adapter that the base's own receipt says is merged into it already."""
    places = [base, *(component.checkpoint for component in base.components)]
    paths = [receipt_path(place.path, place.directory is None) for place in places]
    rows = [row for path in paths if path.is_file() for row in read_receipt(path, str(path))["adapters"]]
    if not rows:
        return None
    files = [f for row in rows for f in row.get("files", ()) if isinstance(f, dict)]
    known = {f.get("digest") for f in files}
    return next((a.name for a in adapters for f in a.checkpoint.files if digest_file(f) in known), None)
