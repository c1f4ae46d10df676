"""`loramerge verify`."""

from __future__ import annotations

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
@options.allow_pickle
@options.jobs
@options.common
def command(
    sink: Sink,
    out: str,
    base: str | None,
    adapters: tuple[tuple[str, float], ...],
    allow_pickle: bool,
    jobs: int | None,
) -> None:
    """Check an output against its receipt, or replay its merge.

    Without --base, every file of OUT is hashed and compared with the receipt. With it, the merge is done once
    more, without writing, and compared bit for bit. Exit code 1 if anything differs.

    \b
    Examples:
      loramerge verify merged
      loramerge verify merged --base base --adapter lora
    """
    import loramerge as lm

    with sink.progress_bar("verify") as progress:
        report = lm.verify(
            out, base=base, adapters=list(adapters) or None, allow_pickle=allow_pickle, jobs=jobs, progress=progress
        )
    ok = bool(report["ok"])
    how = "replayed bit for bit" if report.get("replayed") else "as the receipt says"
    lines = [f"{'ok' if ok else 'differs'}: {report['equal']}/{report['tensors']} tensors ({how})"]
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
