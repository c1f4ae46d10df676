"""`loramerge push`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size
from loramerge.tensors.text import plural, some


@click.command("push", no_args_is_help=False)
@click.argument("source", metavar="DIR")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Make a new repository public (default: private).")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the branch.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to, made if it is not there (default: main).")
@click.option("--tag", metavar="TAG", help="Tag the commit.")
@click.option("-m", "--commit-message", "message", metavar="TEXT", help="The commit's message.")
@click.option(
    "--card",
    type=click.Choice(["auto", "new", "none"]),
    default="auto",
    help="The model card: auto writes one where there is none but ours, new in any case (default: auto).",
)
@click.option("--with-undo", is_flag=True, help="Push the undo file, too.")
@click.option("--prune", is_flag=True, help="Delete weights in the repository that are not of this model.")
@click.option("--include", multiple=True, metavar="GLOB", help="Push only files that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out files that match; may be repeated.")
@click.option("--allow-pickle", is_flag=True, help="Push .bin, .pt, .pth and .ckpt files that are pickles, too.")
@options.dry_run
@options.common
@options.token
def command(sink: Sink, source: str, repo: str, **flags: Any) -> None:
    """Put a model or an adapter on the Hub, in one commit.

    DIR is a directory, or a single file with its receipt; REPO is NAMESPACE/NAME, with @BRANCH if wanted. All files
    appear together or not at all. Files that the repository has already are not sent, nor is what an interrupted push
    has uploaded. A new repository is private. Hidden files and the undo file stay here. -q prints the commit.

    \b
    Examples:
      loramerge push out acme/model
      loramerge push out acme/model --create-pr -m "Merge of the March adapter"
      loramerge push lora acme/lora --public --tag v1 --dry-run
    """
    import loramerge as lm

    with sink.progress_bar("push") as progress:
        data = lm.push(source, repo, progress=progress, **flags)
    sink.result(data, _lines(sink, data), str(data["pull_request"] or data["commit"] or data["url"]))


def _lines(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    files, dry = data["files"], data["dry_run"]
    there = [row for row in files if row["there"]]
    sent = [row for row in files if not row["there"]]
    where = f"{data['repo']}   branch {data['branch']}   {'private' if data['private'] else 'public'}"
    rows = [("to", where + (f"   {'would be created' if dry else 'created'}" if data["created"] else ""))]
    what = f"{plural(len(sent), 'file')}   {size(data['uploaded'])}" if sent else "nothing"
    if there:
        what += f"   {plural(len(there), 'file')} there already"
    rows.append(("would send" if dry else "sent", what))
    if any(row["made"] for row in sent):
        rows.append(("card", "README.md, written from the receipt and the headers"))
    if data["deleted"]:
        rows.append(("would delete" if dry else "deleted", some(data["deleted"])))
    if data["left"]:
        rows.append(("left", ", ".join(f"{row['name']} ({row['why']})" for row in data["left"][:5])))
    if data["pull_request"]:
        rows.append(("proposed", data["pull_request"]))
    elif data["commit"]:
        rows.append(("commit", data["commit"] + (f"   tag {data['tag']}" if data["tag"] else "")))
    rows.append(("page", data["url"]))
    lines = [f"{label:<12}{text}" for label, text in rows]
    if sink.verbose or dry:
        cells = [(row["name"], str(row["size"]), _state(row)) for row in files]
        lines += ["", *sink.table(cells, header=("file", "bytes", ""), align="lrl")]
    if sink.verbose and data["card"]:
        lines += ["", *data["card"].splitlines()]
    return lines


def _state(row: Mapping[str, Any]) -> str:
    return "there already" if row["there"] else "written for it" if row["made"] else "sent"
