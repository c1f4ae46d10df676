"""Names: from the paths of one dialect to a component and a path in it, and to the keys of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from loramerge.adapters.dialect import Dialect, dialects
from loramerge.converting.items import Item
from loramerge.converting.target import Target
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.formats import extra_formats
from loramerge.tensors.text import quoted, some

Row = Mapping[str, Any]

MAIN = "main"
"""The role of a pipeline's denoiser: what updates without a component are taken to be of."""


def with_roles(items: Iterable[Item], dialect: Dialect) -> list[Item]:
    """Items by component: their role, and their path without the prefix of that component."""
    return [_with_role(item, dialect) for item in items]


def _with_role(item: Item, dialect: Dialect) -> Item:
    if dialect.write and not dialect.write.get("component"):
        return item  # a dialect of one model: its paths have no prefixes of components
    rows = dialect.write.get("component") or rows_everywhere()
    flat = any(item.path.startswith(prefix) for prefix in dialect.flat)
    best: tuple[int, Row] | None = None
    for row in rows:
        prefix = row["prefix"]
        if flat != (not prefix.endswith(".")) or not item.path.startswith(prefix):
            continue
        if row_fits(row, item.path[len(prefix) :]) and (best is None or len(prefix) > best[0]):
            best = len(prefix), row
    if best is not None:
        return replace(item, role=best[1]["role"], path=item.path[best[0] :], flat=flat)
    if flat:
        prefix = max((p for p in dialect.flat if item.path.startswith(p)), key=len)
        return replace(item, path=item.path[len(prefix) :], flat=True)
    return item


def rows_everywhere() -> tuple[Row, ...]:
    """The component rows of every dialect: what those that are only read may use."""
    return _all_rows(extra_formats())


@cache
def _all_rows(extra: str) -> tuple[Row, ...]:
    return tuple(row for d in dialects() for row in d.write.get("component", ()))


def row_fits(row: Row, path: str) -> bool:
    """Whether a path in a component is one of this row: any, or one of those that the row lists."""
    starts: Sequence[str] = row.get("begins", ())
    path = path.replace(".", "_")
    return not starts or any(path.startswith(s.replace(".", "_")) for s in starts)


def same_path(a: str, b: str) -> bool:
    """Whether two paths are one but for leading segments."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


# ------------------------------------------------------------------------------------------------ names of the target


def named(items: Sequence[Item], target: Target, where: str, notes: list[str]) -> list[Item]:
    """Items with the names of the target: `path` is then what stands before the suffix of a key.

    Raises:
        MismatchError: `convert.needs-base` for a flattened name that the target writes with dots.
        UnsupportedError: `convert.components` for several components where the target holds one model.
    """
    flat_target = target.write["path"] == "flat"
    if not flat_target and (flat := [item.module for item in items if item.flat]):
        raise MismatchError(
            "convert.needs-base",
            f"{target.title} writes module paths with dots, and the adapter's are flattened: {some(flat, 3)}",
            fix="give the model it was trained on: --base BASE (its headers tell the names)",
            file=where,
            tensors=flat[:5],
        )
    if not target.roles:
        parts = sorted({item.role for item in items if item.role})
        if len(parts) > 1:
            raise UnsupportedError(
                "convert.components",
                f"{target.title} holds one model, and the adapter changes {len(parts)}: {', '.join(parts)}",
                fix="convert one at a time: --include GLOB over its module paths",
                file=where,
            )
        prefix = target.write.get("prefix", "")
        return [replace(item, path=f"{prefix}{_styled(item.path, flat_target)}") for item in items]
    made, assumed = [], []
    roles = {item.role for item in items}
    for item in items:
        row = _row(item, target, roles)
        if row is None:
            raise UnsupportedError(
                "convert.components",
                f"{target.title} has no place for {item.role} ({quoted(item.module)})",
                fix="leave it out: --exclude GLOB over its module paths",
                file=where,
                tensors=[item.module],
            )
        if not item.role and not row.get("begins"):
            assumed.append(item.module)
        made.append(replace(item, role=row["role"], path=row["prefix"] + _styled(item.path, flat_target)))
    if assumed:
        prefix = made[0].path[: len(made[0].path) - len(items[0].path)]
        notes.append(f"nothing names the component of {len(assumed)} modules; written as {prefix}...")
    return made


def _styled(path: str, flat: bool) -> str:
    return path.replace(".", "_") if flat else path


def _row(item: Item, target: Target, roles: set[str]) -> Row | None:
    """The first row of the target that fits: of the item's role, or of any where nothing names one; rows that go `with`
    other roles only beside one of them."""
    rows = [row for row in target.roles if not item.role or row["role"] == item.role]
    rows = [row for row in rows if not row.get("with") or roles & set(row["with"])]
    fitting = [row for row in rows if row.get("begins") and row_fits(row, item.path)]
    rest = [row for row in rows if not row.get("begins") and (item.role or row["role"] == MAIN)]
    return next(iter(fitting or rest), None)
