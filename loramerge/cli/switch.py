"""`loramerge switch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from loramerge.cli import options
from loramerge.cli.merge import document, module_lines, plan_lines, result_lines
from loramerge.cli.sink import Sink
from loramerge.tensors.text import plural

if TYPE_CHECKING:
    from loramerge.merging.plan import Plan


@click.command("switch", no_args_is_help=False)
@click.argument("merged")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True, type=options.ADAPTER)
@options.place("merged")
@options.computing
@options.method
@options.selection
@options.adapters
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
    """Merge other adapters instead of those in a model.

    MERGED is what loramerge merge --reversible or loramerge switch wrote. What is merged into it comes out, bit for
    bit, and the adapters go in, in one pass: the result is what merging them into the base gives. OUT can be
    switched again, and un-merged, however often.

    \b
    Examples:
      loramerge switch merged other-lora -o switched
      loramerge switch merged style=0.5 tone -o switched
      loramerge switch merged other-lora -o switched --dry-run
      loramerge switch merged other-lora --in-place
    """
    import loramerge as lm

    if dry_run:
        plan = lm.plan_switch(merged, list(adapters), None if in_place else out, in_place=in_place, **flags)
        lines = [f"{label:<10}{text}" for label, text in _plan_lines(plan)]
        lines += [f"{'note':<10}{note}" for note in plan.notes]
        sink.result({"plan": plan.to_data()} if sink.json else {}, lines, out)
        return

    def on_plan(plan: Plan) -> None:
        for label, text in _plan_lines(plan):
            sink.say(label, text)

    with sink.progress_bar("switch") as progress:
        place = None if in_place else out
        receipt = lm.switch(
            merged, list(adapters), place, in_place=in_place, on_plan=on_plan, progress=progress, **flags
        )
    for note in receipt.notes:
        sink.warn(note)
    proved = receipt.data["proved"]
    back = f"{plural(proved, 'tensor')} by the undo file   proved by their hashes"
    first, *rest = result_lines(receipt, out, done="switched")
    lines = [first, f"{'back':<10}{back}", *rest, *(module_lines(sink, receipt) if sink.verbose else [])]
    sink.result({**document(receipt, out), "way": "undo file", "tensors_back": proved, "proved": proved}, lines, out)


def _plan_lines(plan: Plan) -> list[tuple[str, str]]:
    (_, base), *rest = plan_lines(plan)
    back = sum(1 for step in plan.steps if step.undo is not None or step.source.file.kind == "undo")
    return [("merged", base), ("back", f"{plural(back, 'tensor')} from the undo file"), *rest]
