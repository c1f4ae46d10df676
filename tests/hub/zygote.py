"""Runs commands in processes of their own, forked from one that has imported what is slow to import.

Reads one JSON object a line from stdin: `args`, `cwd`, `env`, `out` and `err` (files), `set` (module attributes, such
as the length of pauses); answers with the exit code, a line each. What reads its environment when it is imported, as
the Hub's client does, is not imported here: every command has an environment of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any


def child(asked: dict[str, Any]) -> int:
    """Runs one command."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    for place, value in asked["set"].items():
        module, _, attribute = place.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    from loramerge.cli.main import run

    code = run(asked["args"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    import click  # noqa: F401
    import torch
    import yaml  # noqa: F401

    import loramerge.api
    import loramerge.hub.pull
    import loramerge.merging.stream  # noqa: F401
    from loramerge.adapters.dialect import dialects
    from loramerge.binding.families import families
    from loramerge.cli.main import COMMANDS

    dialects()
    families()
    commands = [f"loramerge.cli.{name}" for name in COMMANDS]
    client = ("httpx2", "httpx", "httpcore2", "httpcore", "h11", "anyio", "truststore", "certifi", "hf_xet")
    for name in (*commands, *client, "tqdm.auto", "fsspec", "filelock", "concurrent.futures.thread"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    assert "huggingface_hub" not in sys.modules and torch.__version__
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(json.loads(line))
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
