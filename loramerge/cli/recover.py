"""`loramerge recover`."""

from __future__ import annotations

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink


@click.command("recover", no_args_is_help=False)
@click.argument("model")
@options.common
def command(sink: Sink, model: str) -> None:
    """Finish a run in place that was interrupted.

    A run of merge, unmerge or switch --in-place that was killed is finished, where all that it was to write lay in
    its journal; before that MODEL is still the old one, and what the run left is cleared away. The next run
    --in-place does this by itself; all other commands refuse such a model until then. Safe to run at any time.

    \b
    Examples:
      loramerge recover merged
      loramerge recover merged --json
    """
    import loramerge as lm

    report = lm.recover(model)
    lines = [f"{'finished':<10}{row['command']} of {row['model']}" for row in report["recovered"]]
    sink.result(report, lines or [f"{'ok':<10}nothing waits to be finished"], "finished" if lines else "ok")
