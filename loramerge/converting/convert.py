"""Converts an adapter: opened, its items neutral, named and expressed for the target, written all or nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter
from loramerge.binding.bind import selector
from loramerge.binding.namespace import Namespace
from loramerge.converting.express import Expressed
from loramerge.converting.from_pairs import check_place, prepare
from loramerge.converting.items import Item, item_of, plain_items
from loramerge.converting.naming import with_roles
from loramerge.converting.rebase import CUT, JOINED, Rebase
from loramerge.converting.target import Target, target_named
from loramerge.converting.write import Built
from loramerge.errors import MismatchError, UnsupportedError, UsageError
from loramerge.tensors.checkpoint import Checkpoint, PickleReader, open_checkpoint

SCHEMA = 1


def convert(
    source: str,
    out: str,
    to: str,
    *,
    base: str | None = None,
    rank: int | None = None,
    drop: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    read_pickle: PickleReader | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """See `loramerge.convert`."""
    target = target_named(to)
    if rank is not None and rank < 1:
        raise UsageError("usage.rank", f"a rank of {rank}", fix="--rank N with N at least 1")
    check_place(out, target, [source, *([base] if base else [])], force=force)
    adapter = open_adapter(source, read_pickle=read_pickle, alpha=alpha)
    notes = list(adapter.notes)
    with contextlib.ExitStack() as opened:
        opened.callback(adapter.checkpoint.close)
        checkpoint = (
            None
            if base is None
            else opened.enter_context(contextlib.closing(open_checkpoint(base, read_pickle=read_pickle)))
        )
        items, names = _items(adapter, target, rank, checkpoint, include, exclude)
        prepared = prepare(
            items, target, out, settings=adapter.settings, names=names, rank=rank, drop=drop, where=adapter.name
        )
        notes += prepared.notes
        report = _report(adapter, target, prepared.expressed, prepared.built, out, notes)
    if not dry_run:
        prepared.write(force=force)
    return report


def _items(
    adapter: Adapter,
    target: Target,
    rank: int | None,
    base: Checkpoint | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[list[Item], Namespace | None]:
    """What of the adapter is asked for, by the names of the base where there is one; and those."""
    if adapter.settings.get("layer-replication"):
        raise UnsupportedError(
            "convert.layers",
            "the adapter replicates layers, and no other dialect says that",
            fix="merge it instead",
            file=adapter.name,
        )
    selected = selector(include, exclude)
    modules = [module for module in adapter.modules if selected(module.path)]
    plain = with_roles(plain_items(adapter, selected), adapter.dialect)
    if not modules and not plain:
        raise MismatchError(
            "convert.none", "no module of the adapter is selected", fix="see --include and --exclude", file=adapter.name
        )
    read = (item_of(adapter, module, has_base=base is not None) for module in modules)
    items = with_roles(read, adapter.dialect)
    if base is None:
        return items + plain, None
    rebase = Rebase(adapter, base, target, include, exclude)
    found = rebase.items(zip(modules, items, strict=True), rank) + rebase.plain(plain)
    return found, rebase.binding.names


def _report(
    adapter: Adapter, target: Target, expressed: Expressed, built: Built, out: str, notes: list[str]
) -> dict[str, Any]:
    rows = [
        {
            "module": item.module,
            "path": item.path,
            "kind": item.kind,
            "rank": item.rank,
            "scale": item.scale,
            "how": item.how,
            "error": item.error,
        }
        for item in expressed.items
    ]
    told = [*notes, *target.notes]
    if expressed.alpha is not None:
        told.append(f"the file does not say alpha: merge it with --alpha {expressed.alpha:g}")
    made = [i for i in expressed.items if i.how in ("multiplied", "approximated") and not i.exact_shape]
    if target.roles and any(i.shape is None or len(i.shape) == 2 for i in made):
        told.append(
            "made pairs have the shape of linears; where a module is a convolution, --base BASE tells its kernel"
        )
    warn = target.write.get("warn", {})
    if any(item.magnitude is not None for item in expressed.items) and "magnitude" in warn:
        told.append(warn["magnitude"])
    approximated = [item for item in expressed.items if item.how == "approximated"]
    return {
        "schema": SCHEMA,
        "out": out,
        "source": adapter.name,
        "from": adapter.dialect.name,
        "from_title": adapter.dialect.title,
        "to": target.name,
        "to_title": target.title,
        "modules": len(rows),
        "exact": len(rows) - len(approximated),
        "approximated": len(approximated),
        "error": _total_error(approximated),
        "renamed": sum(not item.path.endswith(item.module) for item in expressed.items),
        "joined": sum(item.how == JOINED for item in expressed.items),
        "cut": sum(item.how == CUT for item in expressed.items),
        "dropped": [item.module + (f".{item.leaf}" if item.leaf else "") for item in expressed.dropped],
        "alpha": expressed.alpha,
        "files": {name: len(data) for name, data in built.files.items()},
        "bytes": sum(map(len, built.files.values())),
        "rows": rows,
        "notes": list(dict.fromkeys(told)),
    }


def _total_error(items: Sequence[Item]) -> float | None:
    """The relative error over all approximated modules together: of the norm of all their changes."""
    if not items:
        return None
    whole = sum((item.norm or 0.0) ** 2 for item in items)
    rest = sum(((item.norm or 0.0) * (item.error or 0.0)) ** 2 for item in items)
    return math.sqrt(rest / whole) if whole else 0.0
