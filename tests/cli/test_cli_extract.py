"""`loramerge extract` at a shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from loramerge.cli.main import run

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: starting one with torch each time would cost more than all that is tested."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> SimpleNamespace:
        code = run(list(arguments))
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


@pytest.fixture
def tuned(base: Path, tmp_path: Path, make: SimpleNamespace) -> Path:
    """The base with every q_proj changed by rank 2 and a norm by a little."""
    rng = np.random.default_rng(5)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if "q_proj" in name:
            tensors[name] = value + (rng.standard_normal((8, 2)) @ rng.standard_normal((2, 8))).astype(np.float32)
        if name == "model.layers.1.input_layernorm.weight":
            tensors[name] = value + np.float32(0.5)
    folder: Path = make.base(tmp_path / "tuned", tensors)
    return folder


def test_a_fine_tune_becomes_an_adapter_that_merges_into_it(cli: Run, tuned: Path, tmp_path: Path) -> None:
    done = cli("extract", "base", "tuned", "-o", "lora", "--rank", "4")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["module", "shape", "rank", "error", "optimum", "kept", "share"]
    assert [line.split()[2] for line in lines[1:3]] == ["2", "2"]
    assert lines[3] == "compared  base and tuned   3 of 14 tensors changed"
    assert lines[4].startswith("extracted 2 modules of rank 2   error ")
    assert lines[5] == "whole     1 parameter, 32 B: 'model.layers.1.input_layernorm.weight'"
    assert lines[-1].startswith("wrote     lora   PEFT   ")
    assert cli("merge", "base", "lora", "-o", "merged").returncode == 0
    for name, value in load_file(tuned / "model.safetensors").items():
        assert np.allclose(load_file(tmp_path / "merged" / "model.safetensors")[name], value, atol=1e-5), name


def test_json_is_one_document(cli: Run, tuned: Path) -> None:
    data = json.loads(cli("extract", "base", "tuned", "-o", "lora", "--energy", "0.9", "--json").stdout)
    assert (data["schema"], data["ok"], data["modules"], data["to"]) == (1, True, 2, "peft")
    assert all(row["energy"] >= 0.9 and row["certificate"] <= 1.001 for row in data["rows"])
    assert data["asked"] == {"rank": None, "energy": 0.9, "budget": None}
    assert data["tensors"] == {"equal": 11, "changed": 3, "excluded": 0}
    assert cli("extract", "base", "tuned", "-o", "quiet", "--rank", "1", "-q").stdout == "quiet\n"


def test_a_dry_run_writes_nothing(cli: Run, tuned: Path, tmp_path: Path) -> None:
    done = cli("extract", "base", "tuned", "-o", "lora", "--rank", "1", "--dry-run")
    assert done.returncode == 0 and "would be  lora" in done.stdout and not (tmp_path / "lora").exists()
    # Two modules of 8 x 8 at rank 1 in float32, and a norm of 8.
    assert done.stdout.splitlines()[-1].endswith("at most 160 B")


def test_only_linear_and_globs(cli: Run, tuned: Path) -> None:
    done = cli("extract", "base", "tuned", "-o", "lora", "--rank", "2", "--only-linear", "--exclude", "*.0.*")
    assert done.returncode == 0 and "1 module of rank 2" in done.stdout
    assert "warning: 1 changed tensor left out: 'model.layers.1.input_layernorm.weight'" in done.stderr


def test_errors_have_two_lines_and_their_exit_code(cli: Run, tuned: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("base", "tuned"), 2, "--rank N"),
        (("base", "base", "--rank", "4"), 3, "nothing to extract"),
        (("base", "tuned", "--budget", "10kb", "--rank", "0"), 2, "--rank"),
        (("base", "tuned", "--budget", "700"), 2, "at least"),
        (("base", "gone", "--rank", "4"), 3, "does not exist"),
        (("base", "tuned", "--rank", "4", "--to", "nothing"), 2, "no dialect"),
    ):
        done = cli("extract", *arguments, "-o", "lora")
        assert done.returncode == code, done.stderr
        assert said in done.stderr and len(done.stderr.splitlines()) == 2
        assert done.stdout == "" and not (tmp_path / "lora").exists()
    assert cli("extract", "base", "tuned", "-o", "base", "--rank", "4", "--force").returncode == 4
