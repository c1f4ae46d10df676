"""`loramerge pull`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size
from loramerge.tensors.text import plural


@click.command("pull", no_args_is_help=False)
@click.argument("repo")
@click.option("-o", "--out", metavar="DIR", help="A directory to write to (default: the Hub's own cache).")
@click.option("--force", is_flag=True, help="Replace DIR if it exists.")
@click.option("--revision", metavar="REV", help="A branch, tag or commit, where REPO says none after @.")
@click.option("--include", multiple=True, metavar="GLOB", help="Take files that match instead; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out files that match; may be repeated.")
@options.allow_pickle
@options.dry_run
@options.common
@options.hub
def command(sink: Sink, repo: str, out: str | None, **flags: Any) -> None:
    """Get a base or an adapter from the Hub, checked.

    REPO is hf://NAMESPACE/NAME, with @REVISION and /PATH if wanted; hf:// may be left away. Only what a merge needs
    is downloaded: weights in one format, configs, the tokenizer, the licence. Every file is compared with the
    SHA-256 (or git id) that the Hub lists. -q prints where the files are.

    \b
    Examples:
      loramerge pull meta-llama/Llama-3.2-1B
      loramerge pull acme/lora@v2 -o lora
      loramerge pull acme/model --include '*.gguf' -o gguf --dry-run
    """
    import loramerge as lm

    with sink.progress_bar("pull") as progress:
        data = lm.pull(repo, out, progress=progress, **flags)
    sink.result(data, _lines(sink, data), data["out"])


def _lines(sink: Sink, data: Mapping[str, Any]) -> list[str]:
    files = data["files"]
    there = sum(row["cached"] for row in files)
    what = f"{plural(len(files), 'file')}   {size(data['bytes'])}"
    if there:
        what += f"   {plural(there, 'file')} in the cache already"
    rows = [
        (data["kind"], data["source"]),
        ("files", what),
        *(("note", note) for note in data["notes"]),
        ("would be" if data["dry_run"] else "checked", data["out"]),
    ]
    lines = [f"{label:<10}{text}" for label, text in rows]
    if sink.verbose or data["dry_run"]:
        cells = [(row["name"], str(row["size"]), "cached" if row["cached"] else "") for row in files]
        lines += ["", *sink.table(cells, header=("file", "bytes", ""), align="lrl")]
    return lines
