"""`loramerge diff`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink
from loramerge.tensors.text import plural

SHOWN = 20
"""Lines of a list, where -v does not ask for all."""

HEADER = ("tensor", "relative change", "norm", "norm of change", "largest", "elements changed")
UNKNOWN = "-"
"""Stands for a number that there is not: integers and narrow floats have no norms here."""


@click.command("diff", no_args_is_help=False)
@click.argument("a")
@click.argument("b")
@options.selection
@options.allow_pickle
@options.common
@options.hub
def command(sink: Sink, a: str, b: str, **flags: Any) -> None:
    """Compare two checkpoints tensor by tensor.

    Files or directories, checkpoints or adapters; how they are cut into files does not matter. Tells which
    tensors are equal, changed (and by how much, in float64), of another dtype or shape, or in one only. Globs
    match whole tensor names. Exit code 1 if anything differs. -q prints equal or different.

    \b
    Examples:
      loramerge diff base merged
      loramerge diff base merged --include '*q_proj*' -v
      loramerge diff merged unsharded --json
    """
    import loramerge as lm

    with sink.progress_bar("diff") as progress:
        data = lm.diff(a, b, progress=progress, **flags)
    sink.result(data, _lines(sink, data), "equal" if data["same"] else "different")
    if not data["same"]:
        raise SystemExit(1)


def _lines(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    counts = data["counts"]
    lines = [f"equal: {plural(counts['equal'], 'tensor')}"] if counts["equal"] or data["same"] else []
    if data["changed"]:
        lines.append(f"changed: {plural(counts['changed'], 'tensor')}")
        lines += _shown(sink, [_row(row) for row in data["changed"]], HEADER)
    if data["dtype"]:
        lines.append(f"other dtype: {plural(counts['dtype'], 'tensor')}")
        rows = [(*_row(row), f"{row['a']} -> {row['b']}") for row in data["dtype"]]
        lines += _shown(sink, rows, (*HEADER, "dtypes"))
    if data["shape"]:
        lines.append(f"other shape: {plural(counts['shape'], 'tensor')}")
        shapes = [(row["name"], f"{_shape(row['a'])} -> {_shape(row['b'])}") for row in data["shape"]]
        lines += _shown(sink, shapes, None)
    for side in ("a", "b"):
        names = data[f"only_{side}"]
        if names:
            lines.append(f"only in {data[side]}: {plural(len(names), 'tensor')}")
            lines += _shown(sink, [(name,) for name in names], None)
    return lines


def _shown(sink: Sink, rows: Sequence[Sequence[str]], header: Sequence[str] | None) -> list[str]:
    kept = rows if sink.verbose else rows[:SHOWN]
    lines = [f"  {line}" for line in sink.table(kept, header=header)]
    if len(rows) > len(kept):
        lines.append(f"  and {len(rows) - len(kept)} more (-v lists them)")
    return lines


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    relative = row.get("relative")
    from_zero = relative is None and row.get("norm") == 0
    numbers = [_number(row.get(name)) for name in ("norm", "norm_change", "max_change")]
    share = f"{row['share']:.2%}" if "share" in row else UNKNOWN
    odd = f" ({row['non_finite']} not finite)" if row.get("non_finite") else ""
    first = "from zero" if from_zero else _number(relative)
    return (row["name"], first, *numbers, share + odd)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "()"
