"""Interrupted while bytes come from the Hub: nothing is left, at once, and the same command then succeeds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub.conftest import PYTHONPATH, Run, content
from tests.hub.server import FOREVER, Hub


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        (("merge", "hf://me/base", "LORA", "-o", "out"), signal.SIGINT, 130),
        (("pull", "me/base", "-o", "out"), signal.SIGTERM, 143),
        (("merge", "hf://me/base", "LORA", "-o", "out"), signal.SIGKILL, -9),
    ],
    ids=["merge", "pull", "kill"],
)
def test_interrupted(
    hub: Hub, run: Run, made: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], number: int, code: int
) -> None:
    work, command = tmp_path / "work", [str(made["lora"]) if a == "LORA" else a for a in arguments]
    stall = hub.fault(
        "GET", "/blob/.*model-00002", "sleep", 8.0, times=FOREVER, skip=1 if arguments[0] == "merge" else 0
    )
    env = hub.env(tmp_path / "home", PYTHONPATH=PYTHONPATH)
    process = subprocess.Popen(
        [sys.executable, "-m", "loramerge", *command], cwd=work, env=env, stderr=subprocess.PIPE, text=True
    )
    begin = time.monotonic()
    while time.monotonic() - begin < 60 and not list(work.glob("out.partial-*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    begin = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert time.monotonic() - begin < 4
    if number != signal.SIGKILL:
        assert not list(work.iterdir())
    stall.times = 0
    run(*command)
    name = "base-merged" if arguments[0] == "merge" else "base"
    assert content(work / "out") == content(made[name])
    assert [p.name for p in work.iterdir()] == ["out"]
