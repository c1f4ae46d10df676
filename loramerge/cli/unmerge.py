"""`loramerge unmerge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loramerge.cli import options
from loramerge.cli.merge import receipt_path, speed
from loramerge.cli.sink import Sink, duration, size
from loramerge.tensors.dtypes import display
from loramerge.tensors.text import plural, quoted

if TYPE_CHECKING:
    from loramerge.merging.plan import Plan
    from loramerge.merging.receipt import Receipt

VERBS = {"undo file": "brought back", "base": "read from the base", "subtraction": "subtracted from"}


@click.command("unmerge", no_args_is_help=False)
@click.argument("merged")
@click.argument("adapters", metavar="[ADAPTER[=WEIGHT]...]", nargs=-1, type=options.ADAPTER)
@options.place("merged")
@click.option("--base", metavar="BASE", help="Read what the merge changed from BASE again, and nothing else of it.")
@click.option("--inexact", is_flag=True, help="With neither an undo file nor --base: subtract, at a loss.")
@options.allow_pickle
@options.jobs
@options.max_memory
@options.dry_run
@options.common
@options.hub
def command(
    sink: Sink,
    merged: str,
    adapters: tuple[tuple[str, float], ...],
    out: str,
    in_place: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Take out of a model what was merged into it.

    MERGED is what loramerge merge wrote. With its undo file (merge --reversible) or with --base every weight comes
    back bit for bit, and hashes prove it. Subtraction (--inexact) gives some weights back wrong, and tells how many.
    ADAPTERs, if given, must be those that were merged.

    \b
    Examples:
      loramerge unmerge merged -o restored
      loramerge unmerge merged -o restored --base base
      loramerge unmerge merged lora -o restored --inexact
      loramerge unmerge merged --in-place
    """
    import loramerge as lm

    if dry_run:
        plan = lm.plan_unmerge(merged, None if in_place else out, list(adapters), in_place=in_place, **flags)
        lines = [f"{label:<10}{text}" for label, text in _plan_lines(plan, merged)]
        sink.result({"plan": plan.to_data()} if sink.json else {}, lines, out)
        return

    def on_plan(plan: Plan) -> None:
        for label, text in _plan_lines(plan, merged):
            sink.say(label, text)

    with sink.progress_bar("unmerge") as progress:
        place = None if in_place else out
        receipt = lm.unmerge(
            merged, place, list(adapters), in_place=in_place, on_plan=on_plan, progress=progress, **flags
        )
    for note in receipt.notes:
        sink.warn(note)
    if (warning := _warning(receipt)) is not None:
        sink.warn(warning)
    sink.result(_document(receipt, out), _result_lines(sink, receipt, out), out)


def _plan_lines(plan: Plan, merged: str) -> list[tuple[str, str]]:
    """The plan for people: a label and a text a line."""
    dtypes = sorted({display(step.dtype) for step in plan.steps})
    lines = [("merged", "   ".join((merged, ", ".join(dtypes))))]
    if plan.way == "base":
        lines.append(("base", plan.base.name))
    for adapter, weight in plan.adapters:
        lines.append(("adapter", adapter.name + (f"   weight {weight:g}" if weight != 1 else "")))
    back = sum(1 for step in plan.steps if step.do == "change" or step.source.file.kind == "undo")
    moved = f"reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}, memory {size(plan.memory(plan.jobs))}"
    return [*lines, ("plan", f"{back} of {len(plan.steps)} tensors {VERBS[plan.way]}; {moved}")]


def _back(receipt: Receipt) -> int:
    return int(receipt.data["proved"]) + len(receipt.data["unproved"])


def _result_lines(sink: Sink, receipt: Receipt, out: str) -> list[str]:
    way, unproved = receipt.data["way"], receipt.data["unproved"]
    back = _back(receipt)
    wrote = f"{size(receipt.bytes_written)} in {duration(receipt.seconds)} ({size(speed(receipt) * 1e9)}/s)"
    if not unproved:
        proof = "all proved by their hashes"
    else:
        proof = f"{receipt.data['proved']} of {back} proved by their hashes"
    total = sum(receipt.counts.values())
    lines = [
        f"{'unmerged':<10}{wrote}   way back: {way}",
        f"{'back':<10}{plural(back, 'tensor')} {VERBS[way]}, {total - back} copied   {proof}",
    ]
    lines += [f"{'removed':<10}{_adapter(row)}" for row in receipt.data["removed"]]
    if receipt.carried:
        lines.append(f"{'carried':<10}{receipt.carried}")
    lines.append(f"{'wrote':<10}{out}   receipt {receipt_path(receipt, out)}")
    return lines + ([f"{'unproved':<10}{name}" for name in unproved] if sink.verbose else [])


def _adapter(row: dict[str, Any]) -> str:
    return str(row["source"]) + (f"   weight {row['weight']:g}" if row["weight"] != 1 else "")


def _warning(receipt: Receipt) -> str | None:
    """What is not known to be exact."""
    inexact, unproved = receipt.data.get("inexact"), receipt.data["unproved"]
    if inexact is not None:
        return (
            f"subtracted: of {inexact['elements']} changed weights about {inexact['share']:.2%} differ from the base, "
            f"and {inexact['may_differ']:.2%} may; --base BASE gives all of them back"
        )
    if unproved:
        some = quoted(unproved[0]) if len(unproved) == 1 else plural(len(unproved), "tensor")
        return (
            f"the receipt has no hash of {some} as the base had it: nothing proves that BASE is the one that was merged"
        )
    return None


def _document(receipt: Receipt, out: str) -> dict[str, Any]:
    data = receipt.data
    back = _back(receipt)
    return {
        "out": out,
        "receipt": receipt_path(receipt, out),
        "way": data["way"],
        "removed": data["removed"],
        "tensors_back": back,
        "tensors_copied": sum(receipt.counts.values()) - back,
        "proved": data["proved"],
        "unproved": data["unproved"],
        "inexact": data.get("inexact"),
        "seconds": receipt.seconds,
        "bytes_written": receipt.bytes_written,
        "gb_per_s": speed(receipt),
        "notes": list(receipt.notes),
    }
