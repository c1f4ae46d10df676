"""`loramerge lock`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.build import input_lines
from loramerge.cli.sink import Sink
from loramerge.tensors.text import plural


@click.command("lock", no_args_is_help=False)
@click.argument("recipe")
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, recipe: str, **flags: Any) -> None:
    """Pin the inputs of a recipe.

    Looks up every reference to the Hub again, digests every input, and writes the lock beside the recipe:
    recipe.lock for recipe.toml. Outputs keep the digests of an earlier build where all that goes into them is the
    same; loramerge build adds the others. Nothing is built, and no large file is downloaded: loramerge pull puts what
    is locked into the cache, for builds without a network.

    \b
    Examples:
      loramerge lock recipe.toml
      loramerge lock recipe.toml --dry-run
    """
    import loramerge as lm

    with sink.progress_bar("lock") as progress:
        data = lm.lock(recipe, progress=progress, **flags)
    sink.result(data, [f"{label:<10}{text}" for label, text in _lines(data)], data["lock"])


def _lines(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = input_lines(data["inputs"])
    locked = sum(output["locked"] for output in data["outputs"])
    rows.append(("outputs", f"{locked} of {plural(len(data['outputs']), 'output')} with digests of a build"))
    rows.append(("numerics", ", ".join(f"{name} {value}" for name, value in data["numerics"].items())))
    rows += [("changed", text) for text in data["changes"]]
    state = "written" if data["written"] else "would be written" if data["dry_run"] else "unchanged"
    return [*rows, ("lock", f"{data['lock']}   {state}")]
