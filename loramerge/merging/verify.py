"""Checks an output against its receipt, and replays the merge that made it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge.errors import InputError
from loramerge.merging import receipt as receipts
from loramerge.merging.plan import OutputFile, Plan
from loramerge.merging.run import Adapters, Options, Pathlike, jobs_for, plan_tensors, weighted
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import block_digest, digest_tensor, sha256_file
from loramerge.tensors.safetensors import Header, read_header
from loramerge.tensors.shards import check_name
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from loramerge.merging.stream import Progress


def verify(
    out: Pathlike,
    base: Pathlike | None,
    adapters: Adapters | None,
    *,
    allow_pickle: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.verify`."""
    path = Path(out)
    single = path.is_file()
    receipt_at = receipts.receipt_path(path, single)
    data = receipts.read_receipt(receipt_at, str(receipt_at))
    folder = path.parent if single else path
    tensors: dict[str, dict[str, Any]] = data["tensors"]
    files = [_check_side_file(folder, row) for row in data["side_files"]]
    found: dict[str, str | None] = {}
    for row in data["files"]:
        name = path.name if single else _name(row, str(receipt_at))
        files.append(_digest_file(folder, name, row, tensors, found, jobs or 2, progress if base is None else None))
    expected = {name: row.get("digest") for name, row in tensors.items()}
    differ = [name for name, digest in expected.items() if digest is not None and found.get(name) != digest]
    differ += [name for name in found if name not in expected]
    replayed = base is not None
    if base is not None:
        if adapters is None:
            adapters = [(str(row.get("source")), _weight(row, str(receipt_at))) for row in data["adapters"]]
        options = _options(data["options"], str(receipt_at), jobs, allow_pickle)
        digests = _replay(base, adapters, options, path.name if single else None, progress)
        differ += [n for n in expected if n not in differ and digests.get(n) != found.get(n)]
        differ += [n for n in digests if n not in expected and n not in differ]
    return {
        "schema": 1,
        "ok": not differ and all(row["ok"] for row in files),
        "out": str(out),
        "tensors": len(expected),
        "equal": len([n for n in expected if n not in set(differ)]),
        "differ": sorted(differ),
        "files": files,
        "replayed": replayed,
    }


def _options(recorded: dict[str, Any], where: str, jobs: int | None, allow_pickle: bool) -> Options:
    """The options of the merge, from its receipt: only those that a receipt records, each of its own type."""
    known = Options().recorded()
    kinds: dict[str, Any] = {
        "include": list,
        "exclude": list,
        "enable_lora": list,
        "alpha": (int, float),
        "shard_size": int,
    }
    for name, value in recorded.items():
        kind = kinds.get(name, type(known.get(name)))
        if name not in known or not (value is None or isinstance(value, kind)):
            raise InputError("receipt.invalid", f"has an option {quoted(name)} that means nothing", file=where)
    return Options(**recorded, jobs=jobs, allow_pickle=allow_pickle)


def _weight(row: Mapping[str, Any], where: str) -> float:
    weight = row.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InputError("receipt.invalid", "has an adapter without a weight", file=where)
    return float(weight)


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
            found[info.name] = digest
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
    from loramerge.merging.stream import stream

    results = stream(plan, _NoSink(), jobs=jobs_for(plan, options), device=options.device, progress=progress)
    return {name: result.digest for name, result in results.items()}
