"""`loramerge merge`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, duration, size
from loramerge.errors import UsageError
from loramerge.tensors.dtypes import display
from loramerge.tensors.text import plural

if TYPE_CHECKING:
    from loramerge.merging.plan import Plan
    from loramerge.merging.receipt import Receipt

LOW_RETENTION = 0.95
"""Below this a merge warns: rounding took more than a twentieth of what training gave."""


@click.command("merge", no_args_is_help=False)
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True, type=options.ADAPTER)
@options.place("base")
@click.option("--base", "checkpoint", metavar="CHECKPOINT", help="BASE is an ONNX model; it was exported from this.")
@options.arithmetic
@options.method
@options.selection
@options.adapters
@click.option("--reversible", is_flag=True, help="Write an undo file too, for loramerge unmerge and switch.")
@click.option("--no-undo", is_flag=True, help="With --in-place: do without an undo file; BASE is gone then.")
@click.option("--shard-size", type=options.SIZE, metavar="SIZE", help="Cut the output into files of this size.")
@click.option("--link", is_flag=True, help="Hard-link files that do not change instead of copying them.")
@click.option("--attest", metavar="FILE", help="Write where OUT comes from, as an in-toto statement, to be signed.")
@click.option("--builder-id", metavar="URI", help="Who builds, for --attest.")
@options.allow_pickle
@options.jobs
@options.max_memory
@options.dry_run
@options.common
@options.hub
def command(
    sink: Sink,
    base: str,
    adapters: tuple[tuple[str, float], ...],
    out: str,
    in_place: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Merge adapters into a checkpoint.

    BASE is a file or a directory. A number after = is the weight of an adapter. Several adapters are summed, or joined
    module by module by another method, exactly and without cutting ranks: weights are in the updates before it sees
    them, and negative ones subtract. Nothing is written before everything has been checked, and OUT appears only when
    it is complete. In place, a run that is killed is finished or undone by the next one, and until then the model is
    refused by every other command.

    \b
    Examples:
      loramerge merge base lora -o merged
      loramerge merge base style=0.7 tone=-0.2 -o merged --dtype bfloat16
      loramerge merge base style=0.7 tone=0.3 -o merged --method ties --density 0.5
      loramerge merge base lora -o merged --reversible
      loramerge merge hf://meta-llama/Llama-3.2-1B acme/lora@v2 -o merged
      loramerge merge base lora -o merged --dry-run
      loramerge merge base lora --in-place --reversible
      loramerge merge model.onnx lora -o tuned/model.onnx
    """
    import loramerge as lm

    if dry_run:
        if flags.pop("attest") is not None:
            raise UsageError("usage.attest", "a dry run makes nothing to attest", fix="leave --attest away")
        flags.pop("builder_id")
        plan = lm.plan_merge(base, list(adapters), None if in_place else out, in_place=in_place, **flags)
        lines = [f"{label:<10}{text}" for label, text in plan_lines(plan)]
        lines += [f"{'note':<10}{note}" for note in plan.notes]
        sink.result({"plan": plan.to_data()} if sink.json else {}, lines, out)
        return

    dtypes: set[str] = set()

    def on_plan(plan: Plan) -> None:
        dtypes.update(step.dtype for step in plan.steps if step.updates)
        for label, text in plan_lines(plan):
            sink.say(label, text)

    with sink.progress_bar("merge") as progress:
        place = None if in_place else out
        receipt = lm.merge(base, list(adapters), place, in_place=in_place, on_plan=on_plan, progress=progress, **flags)
    for note in receipt.notes:
        sink.warn(note)
    if receipt.retention is not None and receipt.retention < LOW_RETENTION:
        text = f"rounding kept only {receipt.retention:.2g} of the change"
        finer = "float32 or float16" if "BF16" in dtypes else "float32"
        sink.warn(text if dtypes <= {"F32"} else f"{text}; --dtype {finer} keeps more of it")
    lines = result_lines(receipt, out) + (module_lines(sink, receipt) if sink.verbose else [])
    sink.result(document(receipt, out), lines, out)


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """The plan for people: a label and a text a line."""
    base = plan.base
    files = len(base.files)
    dtypes = sorted({display(located.info.dtype) for located in base.tensors.values()})
    shards = plural(files, "file") if base.index_name is None else plural(files, "shard")
    parts = [base.name, shards, size(base.nbytes), ", ".join(dtypes)]
    if base.origin:
        streamed = any(hasattr(file.source, "window_bytes") for file in base.files)
        parts.append("(streamed)" if streamed else "(cached)")
    lines = [("base", "   ".join(parts))]
    for number, (adapter, weight) in enumerate(plan.adapters):
        matches = plan.binding.matches[number]
        parts = [adapter.name, " ".join([adapter.dialect.title, *_scales(plan, number, weight)])]
        if weight != 1:
            parts.append(f"weight {weight:g}")
        parts.append(f"{matches.matched}/{matches.modules} modules")
        if matches.excluded:
            parts.append(f"{plural(len(matches.excluded), 'tensor')} left out")
        if matches.unmatched:
            parts.append(f"{plural(len(matches.unmatched), 'tensor')} unmatched")
        lines.append(("adapter", "   ".join(parts)))
    if how := method_text(plan):
        lines.append(("method", how))
    counts = plan.counts()
    changes = f"{counts['changed']} of {len(plan.steps)} tensors change"
    if counts["added"]:
        changes += f", {counts['added']} added"
    moved = f"reads {size(plan.bytes_read)}, writes {size(plan.bytes_written)}"
    lines.append(("plan", f"{changes}; {moved}, memory {size(plan.memory(plan.jobs))}"))
    return lines


def method_text(plan: Plan) -> str:
    """The method of a merge and its options; nothing for the usual sum."""
    name, given = plan.options.get("method", "linear"), plan.options.get("method_options") or {}
    if name == "linear":
        return ""
    parts = [f"{key.replace('_', '-')} {_said(value)}" for key, value in given.items() if value is not None]
    return "   ".join((str(name), *parts))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scales(plan: Plan, number: int, weight: float) -> list[str]:
    """Rank and scale of an adapter's updates, as ranges where they differ."""
    ranks: set[float] = set()
    scales: set[float] = set()
    for updates in plan.binding.updates.values():
        for update in updates:
            low: Any = getattr(update, "low", update)  # DoRA's own, or the update itself
            if update.adapter == number and hasattr(low, "rank"):
                ranks.add(low.rank)
                scales.add(low.scale / weight if weight else 0.0)
    parts = []
    for name, values in (("r=", ranks), ("scale ", scales if weight else set())):
        if values:
            least, most = f"{min(values):.4g}", f"{max(values):.4g}"
            parts.append(name + (least if least == most else f"{least}..{most}"))
    return parts


def speed(receipt: Receipt) -> float:
    """GB/s."""
    return receipt.bytes_written / 1e9 / max(receipt.seconds, 1e-6)


def result_lines(receipt: Receipt, out: str, done: str = "merged") -> list[str]:
    """The end of a merge for people."""
    merged = f"{size(receipt.bytes_written)} in {duration(receipt.seconds)} ({size(speed(receipt) * 1e9)}/s)"
    if receipt.retention is not None:
        merged += f"   retention {receipt.retention:.3f}"
        if receipt.least_retention is not None:
            least, module = receipt.least_retention
            merged += f" (least {least:.2f}, {module})"
    adapters = receipt.data["adapters"]
    matched, modules = (sum(row[key] for row in adapters) for key in ("modules_matched", "modules"))
    counts = receipt.counts
    changes = f"{counts['changed']} tensors changed, {counts['copied']} copied"
    if counts["added"]:
        changes += f", {counts['added']} added"
    lines = [f"{done:<10}{merged}", f"{'changed':<10}{matched}/{modules} modules   {changes}"]
    if receipt.carried:
        lines.append(f"{'carried':<10}{receipt.carried}")
    if undo := undo_file(receipt, out):
        lines.append(f"{'undo':<10}{undo['path']}   {size(undo['size'])}")
    return [*lines, f"{'wrote':<10}{out}   receipt {receipt_path(receipt, out)}"]


def receipt_path(receipt: Receipt, out: str) -> str:
    """The receipt's path in the user's own words for OUT."""
    return _beside(receipt, out, receipt.path.name)


def undo_file(receipt: Receipt, out: str) -> dict[str, Any] | None:
    """The undo file that was written, if one was: its path in the user's own words, its size."""
    undo = receipt.data.get("undo")
    return None if undo is None else {"path": _beside(receipt, out, undo["name"]), "size": undo["size"]}


def _beside(receipt: Receipt, out: str, name: str) -> str:
    inside = receipt.path.parent == receipt.out
    return os.path.join(out if inside else os.path.dirname(out), name)


def module_lines(sink: Sink, receipt: Receipt) -> list[str]:
    """Every module's retention, the least first."""
    modules = (receipt.data.get("retention") or {}).get("modules") or {}
    rows = sorted((float(value), name) for name, value in modules.items() if value is not None)
    return sink.table([(name, f"{value:.4f}") for value, name in rows], header=("module", "retention")) if rows else []


def document(receipt: Receipt, out: str) -> dict[str, Any]:
    """The end of a merge for programs."""
    adapters = receipt.data.get("adapters") or []
    return {
        "out": out,
        "receipt": receipt_path(receipt, out),
        "tensors_changed": receipt.counts["changed"],
        "tensors_copied": receipt.counts["copied"],
        "tensors_added": receipt.counts["added"],
        "modules": sum(a.get("modules", 0) for a in adapters),
        "modules_matched": sum(a.get("modules_matched", 0) for a in adapters),
        "undo": undo_file(receipt, out),
        "retention": receipt.retention,
        "least_retention": None
        if receipt.least_retention is None
        else {"module": receipt.least_retention[1], "retention": receipt.least_retention[0]},
        "seconds": receipt.seconds,
        "bytes_written": receipt.bytes_written,
        "gb_per_s": speed(receipt),
        "notes": list(receipt.notes),
    }
