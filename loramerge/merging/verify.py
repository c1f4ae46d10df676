"""Checks an output against its receipt, replays the merge that made it, and tries its way back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge import pickled
from loramerge.errors import InputError, LoramergeError, MismatchError
from loramerge.merging import receipt as receipts
from loramerge.merging import recorded, unmerge
from loramerge.merging.plan import OutputFile, Plan
from loramerge.merging.run import Adapters, Options, Pathlike, jobs_for, plan_tensors, weighted
from loramerge.merging.undo import undo_path
from loramerge.tensors.checkpoint import WeightFile, open_checkpoint
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import block_digest, digest_tensor, sha256_file
from loramerge.tensors.interrupted import refuse_interrupted
from loramerge.tensors.safetensors import Header, read_header
from loramerge.tensors.shards import check_name
from loramerge.tensors.source import FileSource

if TYPE_CHECKING:
    from loramerge.merging.stream import Progress, Result


def verify(
    out: Pathlike,
    base: Pathlike | None,
    adapters: Adapters | None,
    *,
    undo: bool = False,
    allow_pickle: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.verify`."""
    path = Path(out)
    refuse_interrupted(path, str(out))
    single = path.is_file()
    receipt_at = receipts.receipt_path(path, single)
    where = str(receipt_at)
    data = receipts.read_receipt(receipt_at, where)
    if undo:
        _check_has_undo(path, single)
    folder = path.parent if single else path
    tensors: dict[str, dict[str, Any]] = data["tensors"]
    files = [_check_side_file(folder, row) for row in data["side_files"]]
    if isinstance(data.get("undo"), dict):
        # A single file may have been renamed, with what lies beside it.
        name = undo_path(path, single).name
        files.append(_check_side_file(folder, {**data["undo"], "name": name}))
    found: dict[str, str | None] = {}
    quiet = base is not None or undo
    for name, opened, row in _weight_files(path, single, data["files"], where):
        files.append(_digest_file(folder, name, opened, row, found, jobs or 2, None if quiet else progress))
    expected = {name: row.get("digest") for name, row in tensors.items()}
    sources = _sources(data)
    if sources:  # of an export: its files are checked as a whole, and with them what they were made of
        expected, found = dict(sources), dict(sources)
    differ = [name for name, digest in expected.items() if digest is not None and found.get(name) != digest]
    differ += [name for name in found if name not in expected]
    if base is not None:
        options = recorded.options_of(data, where, jobs=jobs, allow_pickle=allow_pickle)
        if data.get("command") == "unmerge":
            digests = _digests_of(base, options, None if undo else progress)
        else:
            given = recorded.adapters_of(data, where) if adapters is None else adapters
            digests = _replay(base, given, options, path.name if single else None, None if undo else progress)
        differ += [n for n in expected if n not in differ and digests.get(n) != found.get(n)]
        if not sources:
            differ += [n for n in digests if n not in expected and n not in differ]
    back = _bring_back(path, jobs, progress) if undo else None
    return {
        "schema": 1,
        "ok": not differ and all(row["ok"] for row in files) and (back is None or back["ok"]),
        "out": str(out),
        "command": str(data.get("command", "merge")),
        "tensors": len(expected),
        "equal": len([n for n in expected if n not in set(differ)]),
        "differ": sorted(differ),
        "files": files,
        "replayed": base is not None,
        "undo": back,
    }


def _sources(receipt: Mapping[str, Any]) -> dict[str, str | None]:
    """The tensors that the weights of an export were made of, and their digests."""
    rows = receipt.get("weights")
    if not isinstance(rows, dict):
        return {}
    found: dict[str, str | None] = {}
    for row in rows.values():
        made_of = row.get("from") if isinstance(row, dict) else None
        if isinstance(made_of, dict):
            found |= {str(name): str(digest) for name, digest in made_of.items()}
    return found


def _check_has_undo(path: Path, single: bool) -> None:
    """Raises MismatchError where there is no undo file to try."""
    if not undo_path(path, single).is_file():
        raise MismatchError(
            "unmerge.no-undo",
            "has no undo file beside it",
            fix="leave --undo away; merge with --reversible to have one",
            file=str(path),
        )


def _name(row: Any, where: str) -> str:
    """A file name from a receipt, which is as foreign as any input: it must not lead anywhere else."""
    name = row.get("name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise InputError("receipt.invalid", "names a file by something that is no name", file=where)
    check_name(name, (Path(name).suffix,), where)
    return name


def _weight_files(
    path: Path, single: bool, rows: list[dict[str, Any]], where: str
) -> list[tuple[str, WeightFile | None, dict[str, Any]]]:
    """Weight files that a receipt lists: where each is now, what its format says of it if it is ONNX, and its row.

    A single file may have another name by now; external data may not.
    """
    if not any("kind" in row for row in rows):
        return [(path.name if single else _name(row, where), None, row) for row in rows]
    opened = open_checkpoint(str(path), onnx=True)
    opened.close()  # its headers are what is wanted
    files = {file.name: file for file in opened.files}
    found = []
    for row in rows:
        name = path.name if single and row.get("kind") == "onnx" else _name(row, where)
        found.append((name, files.get(name), row))
    return found


def _check_side_file(folder: Path, row: Any) -> dict[str, Any]:
    name = _name(row, str(folder))
    try:
        same = sha256_file(folder / name) == row.get("sha256")
    except OSError as error:
        return {"name": name, "ok": False, "why": error.strerror or "cannot be read"}
    return {"name": name, "ok": same, "why": "" if same else "was changed"}


def _digest_file(
    folder: Path,
    name: str,
    opened: WeightFile | None,
    row: Mapping[str, Any],
    found: dict[str, str | None],
    jobs: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Digests every tensor of one file into `found`."""
    component = row.get("component")
    inside = f"{component}/" if isinstance(component, str) and component else ""
    try:
        source = FileSource(folder / name, str(folder / name))
        header = read_header(source) if opened is None else opened.header
    except InputError as error:
        return {"name": name, "ok": False, "why": error.message}
    with ThreadPoolExecutor(jobs) as pool:
        infos = list(header.tensors.values())
        digests = pool.map(lambda i: digest_tensor(source, i.begin, bits(i.dtype), i.shape), infos)
        done = 0
        for info, digest in zip(infos, digests, strict=True):
            found[inside + info.name] = digest
            done += info.nbytes
            if progress is not None:
                progress(done, header.size)
    why = _header_differs(source, header, row)
    source.close()
    return {"name": name, "ok": not why, "why": why}


def _header_differs(source: FileSource, header: Header, row: Mapping[str, Any]) -> str:
    if source.size != row.get("size"):
        return f"has {source.size} bytes, the receipt says {row.get('size')}"
    if block_digest(WeightFile("", source, header, "").frame).hex() != row.get("header"):
        return "has another header"
    return ""


class _NoSink:
    """Takes the bytes of a replay and keeps nothing."""

    def begin(self, file: OutputFile, header: bytes, size: int) -> bool:
        return True

    def write(self, file: OutputFile, offset: int, view: memoryview) -> None:
        """Nothing is written: the digest is what counts."""

    def end(self, file: OutputFile) -> None:
        """Nothing was opened."""


def _replay(
    base: Pathlike, adapters: Adapters, options: Options, single: str | None, progress: Progress | None
) -> dict[str, str | None]:
    plan: Plan = plan_tensors(base, weighted(adapters), options, single_file=single)
    return {name: result.digest for name, result in _streamed(plan, options, progress).items()}


def _digests_of(base: Pathlike, options: Options, progress: Progress | None) -> dict[str, str | None]:
    """The digests of all tensors of a checkpoint."""
    read_pickle = pickled.read_header if options.allow_pickle else None
    checkpoint = open_checkpoint(os.fspath(base), read_pickle=read_pickle, onnx=True)
    done, digests = 0, {}
    try:
        for name, located in checkpoint.tensors.items():
            info = located.info
            digests[name] = digest_tensor(located.file.source, info.begin, bits(info.dtype), info.shape)
            done += info.nbytes
            if progress is not None:
                progress(done, checkpoint.nbytes)
    finally:
        checkpoint.close()
    return {**digests}


def _bring_back(path: Path, jobs: int | None, progress: Progress | None) -> dict[str, Any]:
    """Un-merges without writing: whether every tensor that the undo file has comes back as it was."""
    options = Options(jobs=jobs)
    try:
        merged = unmerge.open_merged(path, needs_undo=True)
        try:
            plan = unmerge.plan_unmerge(merged, options)
            results = _streamed(plan, options, progress)
            proved = unmerge.check_results(plan, merged, {}, None, results)["proved"]
        finally:
            merged.close()
    except LoramergeError as error:
        if not error.code.startswith(("undo.", "unmerge.")):
            raise
        return {"ok": False, "why": error.message, "tensors": list(error.tensors), "back": 0}
    return {"ok": True, "why": "", "tensors": [], "back": proved}


def _streamed(plan: Plan, options: Options, progress: Progress | None) -> Mapping[str, Result]:
    from loramerge.merging.stream import stream

    return stream(plan, _NoSink(), jobs=jobs_for(plan, options), device=options.device, progress=progress)
