"""`loramerge resize`."""

from __future__ import annotations

from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.combine import late_bar, tell
from loramerge.cli.sink import Sink


@click.command("resize", no_args_is_help=False)
@click.argument("adapter")
@options.output
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Every module to this rank, down or up.")
@click.option("--energy", type=float, metavar="SHARE", help="Keep this share of every module's sum of squares.")
@click.option("--ratio", type=float, metavar="X", help="Keep singular values above the largest divided by X.")
@click.option("--budget", type=options.SIZE, metavar="SIZE", help="Make a weight file of at most this size.")
@click.option("--to", metavar="DIALECT", help="What to write (default: the adapter's own dialect).")
@click.option("--base", metavar="BASE", help="The model it was trained on: tells the weights that some kinds need.")
@options.factor_dtype("keep")
@click.option("--alpha", type=float, metavar="N", help="Alpha, where nothing on disk says it.")
@options.selection
@options.allow_pickle
@options.jobs
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, adapter: str, out: str, **flags: Any) -> None:
    """Bring an adapter to other ranks.

    Every module becomes the best product of its rank, and the error is printed. A lower rank than asked for is filled
    up with zeros; modules of which nothing is left are left out and named. A budget is spent where it keeps most.

    \b
    Examples:
      loramerge resize lora -o small --rank 16
      loramerge resize lora -o small --energy 0.95
      loramerge resize lora.safetensors -o small.safetensors --budget 20MB
    """
    import loramerge as lm

    with late_bar(sink, "resize") as progress:
        data = lm.resize(adapter, out, progress=progress, **flags)
    tell(sink, data, out, flags["dry_run"], "resized")
