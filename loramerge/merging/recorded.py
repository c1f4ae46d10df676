"""What a receipt says of the run that wrote it, checked, so that the run can be replayed or taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramerge.errors import InputError
from loramerge.merging.run import Options
from loramerge.tensors.text import quoted


def options_of(
    receipt: Mapping[str, Any],
    where: str,
    *,
    jobs: int | None = None,
    max_memory: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
) -> Options:
    """The options of the run: only those that a receipt records, each of its own type. The rest are the caller's.

    Raises:
        InputError: `receipt.invalid`.
    """
    known = Options().recorded()
    kinds: dict[str, Any] = {
        "include": list,
        "exclude": list,
        "enable_lora": list,
        "alpha": (int, float),
        "shard_size": int,
        "checkpoint": str,
        "method_options": dict,
    }
    recorded: dict[str, Any] = receipt["options"]
    for name, value in recorded.items():
        kind = kinds.get(name, type(known.get(name)))
        if name not in known or not (value is None or isinstance(value, kind)):
            raise InputError("receipt.invalid", f"has an option {quoted(name)} that means nothing", file=where)
    return Options(**recorded, jobs=jobs, max_memory=max_memory, allow_pickle=allow_pickle, force=force)


def weight_of(row: Mapping[str, Any], where: str) -> float:
    """The weight of an adapter that a receipt names.

    Raises:
        InputError: `receipt.invalid`.
    """
    weight = row.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InputError("receipt.invalid", "has an adapter without a weight", file=where)
    return float(weight)


def adapters_of(receipt: Mapping[str, Any], where: str) -> list[tuple[str, float]]:
    """The adapters of the run, as its user typed them, with their weights."""
    return [(str(row.get("source")), weight_of(row, where)) for row in receipt["adapters"]]


def digests_of(row: Mapping[str, Any]) -> list[Any]:
    """The digests of the files of an adapter that a receipt names."""
    files = row.get("files")
    return [f.get("digest") for f in files if isinstance(f, dict)] if isinstance(files, list) else []
