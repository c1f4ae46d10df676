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
from loramerge.tensors.checkpoint import open_checkpoint
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
    for row in data["files"]:
        name = path.name if single else _name(row, where)
        files.append(_digest_file(folder, name, row, tensors, found, jobs or 2, None if quiet else progress))
    expected = {name: row.get("digest") for name, row in tensors.items()}
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
    row: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    found: dict[str, str | None],
    jobs: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Digests every tensor of one file into `found`."""
    component = row.get("component")
    inside = f"{component}/" if isinstance(component, str) and component else ""
    try:
        source = FileSource(folder / name, str(folder / name))
        header = read_header(source)
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
    if block_digest(source.read(0, header.data_start)).hex() != row.get("header"):
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
    checkpoint = open_checkpoint(os.fspath(base), read_pickle=read_pickle)
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
