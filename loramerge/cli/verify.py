"""`loramerge verify`."""

from __future__ import annotations

from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink
from loramerge.tensors.text import plural

SHOWN = 20


@click.command("verify", no_args_is_help=False)
@click.argument("out")
@click.option("--base", metavar="BASE", help="Replay the merge from this base.")
@click.option(
    "--adapter",
    "adapters",
    metavar="ADAPTER[=WEIGHT]",
    multiple=True,
    type=options.ADAPTER,
    help="Replay it with this adapter; may be repeated.",
)
@click.option("--undo", is_flag=True, help="Bring every tensor back with the undo file, without writing.")
@options.allow_pickle
@options.jobs
@options.common
@options.hub
def command(
    sink: Sink,
    out: str,
    base: str | None,
    adapters: tuple[tuple[str, float], ...],
    undo: bool,
    allow_pickle: bool,
    jobs: int | None,
    **reach: Any,
) -> None:
    """Check an output against its receipt, or replay its merge.

    OUT is what merge, unmerge or switch wrote. Every file of it is hashed and compared with the receipt. With
    --base the merge is done once more, without writing, and compared bit for bit; what unmerge wrote is compared
    with BASE itself. With --undo every tensor is brought back with the undo file, and its hash compared with that of
    the base. Exit code 1 if anything differs.

    \b
    Examples:
      loramerge verify merged
      loramerge verify merged --base base --adapter lora
      loramerge verify merged --undo
    """
    import loramerge as lm

    with sink.progress_bar("verify") as progress:
        report = lm.verify(
            out,
            base=base,
            adapters=list(adapters) or None,
            undo=undo,
            allow_pickle=allow_pickle,
            jobs=jobs,
            progress=progress,
            **reach,
        )
    ok = bool(report["ok"])
    how = "as the receipt says"
    if report["replayed"]:
        how = "as in the base" if report["command"] == "unmerge" else "replayed bit for bit"
    lines = [f"{'ok' if ok else 'differs'}: {report['equal']}/{report['tensors']} tensors ({how})"]
    if (back := report["undo"]) is not None:
        lines.append(f"  undo: {plural(back['back'], 'tensor')} come back bit for bit" if back["ok"] else back["why"])
    differ = list(report.get("differ") or ())
    shown = differ if sink.verbose else differ[:SHOWN]
    lines += [f"  {name}" for name in shown]
    if len(differ) > len(shown):
        lines.append(f"  and {plural(len(differ) - len(shown), 'tensor')} more (-v lists them)")
    for file in report.get("files") or ():
        if not file["ok"] or sink.verbose:
            lines.append(f"  {file['name']}: {'ok' if file['ok'] else file['why']}")
    sink.result(report, lines, "ok" if ok else "differs")
    if not ok:
        raise SystemExit(1)
