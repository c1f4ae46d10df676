"""`loramerge doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loramerge.cli import options
from loramerge.cli.sink import Sink, size

WIDTH = 18
"""Of the labels: they are longer here than elsewhere."""


@click.command("doctor", no_args_is_help=False)
@click.option(
    "--directory", default=".", show_default=True, metavar="DIR", help="Try the file system of this directory."
)
@options.common
def command(sink: Sink, directory: str) -> None:
    """Check this machine and this installation.

    Tells versions, processor, devices, what the file system of a directory can do, and whether the Hub is set
    up (without asking it), and makes a merge of its own in a temporary directory. Exit code 1 if a package is
    missing or that merge fails. -q prints ok or failed.

    \b
    Examples:
      loramerge doctor
      loramerge doctor --directory /mnt/models --json
    """
    from loramerge import demo, doctor

    def self_test(scratch: Path) -> Mapping[str, Any]:
        return demo.run(scratch / "demo")

    data = doctor.examine(directory, self_test=self_test)
    sink.result(data, _lines(data), "ok" if data["ok"] else "failed")
    if not data["ok"]:
        raise SystemExit(1)


def _lines(data: Mapping[str, Any]) -> list[str]:
    rows = [(name, text) for name, text in data["versions"].items()]
    for name, package in data["packages"].items():
        rows.append((name, "   ".join(filter(None, (package["version"], package["problem"])))))
    rows += [(name, version or "not installed (not needed)") for name, version in data["extras"].items()]
    rows += _machine(data["processor"], data["devices"]) + _disk(data["directory"]) + _hub(data["hub"])
    test = data["self_test"]
    verdict = "ok" if test["ok"] else "failed"
    rows.append(("self test", f"{verdict}: {test['why']}" if test["why"] else f"{verdict}   {test['seconds']} s"))
    return [f"{label:<{WIDTH}}{text}" for label, text in rows]


def _machine(processor: Mapping[str, Any], devices: Mapping[str, Any]) -> list[tuple[str, str]]:
    cores = f"{processor['usable']} of {processor['cores']} cores usable"
    memory = f"{size(processor['memory'])} of memory" if processor["memory"] else ""
    threads = f"torch takes {devices['threads']} threads" if devices["threads"] else ""
    rows = [
        ("processor", "   ".join(filter(None, (processor["model"], cores, threads, memory)))),
        ("matrix units", ", ".join(processor["matrix_units"]) or "none known"),
        ("cuda", ", ".join(devices["cuda"]) or "none"),
    ]
    return [*rows, ("mps", "yes")] if devices["mps"] else rows


def _disk(directory: Mapping[str, Any]) -> list[tuple[str, str]]:
    free = f"{size(directory['free'])} free" if directory["free"] is not None else "free space not known"
    rows = [("directory", f"{directory['path']}   {free}")]
    if not directory["writable"]:
        return [*rows, ("file system", f"not tried, cannot write here: {directory['why']}")]
    names = {
        "direct_io": "direct I/O",
        "fallocate": "fallocate",
        "reflink": "reflinks",
        "exchange": "rename exchange",
        "hard_links": "hard links",
    }
    able = [f"{name}: {'yes' if directory[key] else 'no'}" for key, name in names.items()]
    rate = directory["fsync_per_second"]
    able.append(f"fsync: {rate:.0f}/s" if rate else "fsync: no")
    return [*rows, ("file system", "   ".join(able))]


def _hub(hub: Mapping[str, Any]) -> list[tuple[str, str]]:
    if hub["why"]:
        return [("hub", hub["why"])]
    login = "logged in" if hub["logged_in"] else "not logged in"
    return [("hub", f"{hub['endpoint']}   {login}{'   offline' if hub['offline'] else ''}")]
