"""`loramerge build`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Progress, Sink, size
from loramerge.tensors.text import plural

STATES = {
    "built": "built",
    "current": "unchanged",
    "absent": "would build",
    "stale": "would rebuild",
    "foreign": "would replace",
}


@click.command("build", no_args_is_help=False)
@click.argument("recipe")
@click.option("--locked", is_flag=True, help="Fail if anything would differ from the lock; change nothing in it.")
@click.option("--no-lock", is_flag=True, help="Neither read nor write a lock.")
@click.option("--attest", metavar="FILE", help="Write where the outputs come from, as an in-toto statement.")
@click.option("--builder-id", metavar="URI", help="Who builds, for --attest, such as the URI of a workflow.")
@click.option("--no-push", is_flag=True, help="Publish nothing, whatever the recipe says.")
@click.option("--force", is_flag=True, help="Replace outputs that are there and not from the lock.")
@options.jobs
@options.max_memory
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, recipe: str, **flags: Any) -> None:
    """Build the outputs of a recipe, the same bytes every time.

    RECIPE is a TOML file: a base, adapters, a method, numerics, and outputs; paths in it are taken from its folder.
    Outputs that are there and came from the same inputs are left as they are. The lock beside the recipe pins the
    commits of what is on the Hub and holds the SHA-256 of every file that goes in or comes out; with --locked nothing
    is built from anything else, and what comes out otherwise does not appear.

    \b
    Examples:
      loramerge build recipe.toml
      loramerge build recipe.toml --dry-run
      loramerge build recipe.toml --locked --offline
      loramerge build recipe.toml --attest provenance.json
    """
    import loramerge as lm

    with contextlib.ExitStack() as bars:

        def on_step(output: str, what: str) -> Progress | None:
            bars.close()
            return bars.enter_context(sink.progress_bar(f"{what} {output}"))

        data = lm.build(recipe, on_step=on_step, **flags)
    for note in data["notes"]:
        sink.warn(note)
    for output in data["outputs"]:
        for note in output["notes"]:
            sink.warn(f"{output['path']}: {note}")
    sink.result(data, lines(sink, data), data["lock"] or data["recipe"])


def lines(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    """The end of a build for people."""
    rows = input_lines(data["inputs"])
    for output in data["outputs"]:
        parts = [output["path"], STATES[output["status"]]]
        if output["files"] and output["status"] in ("built", "current"):
            parts.append(f"{plural(len(output['files']), 'file')}, {size(output['bytes'])}")
        if output["retention"] is not None:
            parts.append(f"retention {output['retention']:.3f}")
        rows.append(("output", "   ".join(parts)))
        if (plan := output.get("plan")) is not None:
            rows.append(("", f"{plan['tensors_changed']} tensors change, {size(plan['bytes_written'])}"))
        if output["pushed"]:
            commit = output["pushed"].get("commit")
            rows.append(("pushed", output["pushed"]["repo"] + (f"   {commit}" if commit else "")))
        if sink.verbose:
            rows += [("", f"{file['sha256']}  {file['name']}") for file in output["files"]]
    if data["lock"] is not None and not data["dry_run"]:
        rows.append(("lock", f"{data['lock']}   {'written' if data['lock_written'] else 'unchanged'}"))
    if data["attestation"] is not None:
        rows.append(("attested", data["attestation"]))
    return [f"{label:<10}{text}" for label, text in rows]


def input_lines(inputs: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A label and a text for every input."""
    rows = []
    for row in inputs:
        parts = [row["source"]]
        if "commit" in row:
            parts.append(f"commit {row['commit'][:12]}")
        parts.append(f"{plural(row['files'], 'file')}, {size(row['bytes'])}")
        rows.append((row["role"], "   ".join(parts)))
    return rows
