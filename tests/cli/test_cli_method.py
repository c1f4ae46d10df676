"""`--method` of merge and switch at the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from loramerge.cli.main import run

Cli = Callable[..., Any]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, in the temporary directory."""
    monkeypatch.chdir(tmp_path)

    def start(*args: str) -> SimpleNamespace:
        code = run(list(args))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return start


@pytest.fixture
def two(make: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A base and two adapters, as numbers too."""
    make.base(tmp_path / "base")
    tensors = [make.adapter_tensors(seed) for seed in (1, 2)]
    for name, own in zip(("one", "two"), tensors, strict=True):
        make.adapter(tmp_path / name, own)
    prefix = f"base_model.model.{Q}.lora_"
    deltas = [2.0 * own[f"{prefix}B.weight"] @ own[f"{prefix}A.weight"] for own in tensors]
    return SimpleNamespace(base=make.base_tensors(), deltas=deltas)


def weight(folder: Path) -> np.ndarray:
    return load_file(folder / "model.safetensors")[f"{Q}.weight"]


def test_merge_with_a_method(cli: Cli, two: SimpleNamespace, tmp_path: Path) -> None:
    done = cli("merge", "base", "one=0.7", "two=0.3", "-o", "out", "--method", "slerp", "--t", "0.25")
    assert done.returncode == 0, done.stderr
    assert "method" in done.stderr and "slerp   t 0.25" in done.stderr
    a, b = 0.7 * two.deltas[0], 0.3 * two.deltas[1]
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    change = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
    assert np.allclose(weight(tmp_path / "out"), two.base[f"{Q}.weight"] + change, atol=1e-5)
    receipt = json.loads((tmp_path / "out" / "loramerge.json").read_text())
    assert (receipt["options"]["method"], receipt["options"]["method_options"]) == ("slerp", {"t": 0.25})
    checked = cli("verify", "out", "--base", "base")
    assert checked.returncode == 0, checked.stderr


def test_a_dry_run_tells_the_method_and_writes_nothing(cli: Cli, two: Any, tmp_path: Path) -> None:
    flags = ("merge", "base", "one", "two", "-o", "out", "--method", "dare-linear", "--drop-rate", "0.5", "--dry-run")
    said = cli(*flags)
    assert said.returncode == 0 and "dare   p 0.5   elect off   seed 0   space full" in said.stdout
    plan = json.loads(cli(*flags, "--json").stdout)["plan"]
    assert plan["options"]["method"] == "dare" and plan["options"]["method_options"]["p"] == 0.5
    assert not (tmp_path / "out").exists()


def test_the_usual_sum_says_nothing_of_methods(cli: Cli, two: Any) -> None:
    done = cli("merge", "base", "one", "two", "-o", "out")
    assert done.returncode == 0 and "method" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--method", "tis"), "usage.method", "ties"),
        (("--density", "0.5"), "usage.method-option", "ties"),
        (("--method", "ties", "--density", "2"), "usage.method-option", "at most 1"),
        (("--method", "della"), "usage.method-option", "--density"),
    ],
)
def test_flags_that_do_not_fit(
    flags: tuple[str, ...], code: str, says: str, cli: Cli, two: Any, tmp_path: Path
) -> None:
    done = cli("merge", "base", "one", "two", "-o", "out", "--json", *flags)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code and says in json.dumps(error)
    assert not (tmp_path / "out").exists()


def test_methods_on_factors_say_how_far_they_are_from_the_sum(cli: Cli, two: SimpleNamespace) -> None:
    done = cli("merge", "base", "one=0.5", "two=0.5", "-o", "out", "--method", "peft-linear", "--json")
    assert done.returncode == 0, done.stderr
    (note,) = json.loads(done.stdout)["notes"]
    assert "peft-linear" in note and "not the sum" in note and "not the sum" in done.stderr


def test_a_switch_with_a_method(cli: Cli, two: Any, tmp_path: Path) -> None:
    assert cli("merge", "base", "one", "-o", "first", "--reversible").returncode == 0
    done = cli("switch", "first", "one=0.7", "two=0.3", "-o", "second", "--method", "ties", "--density", "0.5")
    assert done.returncode == 0, done.stderr
    assert cli("merge", "base", "one=0.7", "two=0.3", "-o", "ties", "--method", "ties", "--density=0.5").returncode == 0
    assert np.array_equal(weight(tmp_path / "second"), weight(tmp_path / "ties"))
    assert cli("unmerge", "second", "-o", "back").returncode == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("back", "base")]
    assert same[0] == same[1]
