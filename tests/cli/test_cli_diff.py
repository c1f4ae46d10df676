"""`loramerge diff` at the shell: exit codes, lines, JSON, one word."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    """The base with one tensor doubled, one in float16, one reshaped, one renamed."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    at = "model.layers.0.mlp.up_proj.weight"
    tensors[at] = tensors[at].reshape(-1)
    tensors["renamed"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_equal_is_exit_0_and_one_line(cli: Run, base: Path) -> None:
    done = cli("diff", "base", "base/model.safetensors", "--no-progress")
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal: 14 tensors\n", "")
    assert cli("diff", "base", "base", "-q").stdout == "equal\n"


def test_every_way_to_differ_is_told(cli: Run, base: Path, other: Path) -> None:
    done = cli("diff", "base", "other.safetensors", "--no-progress")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "equal: 10 tensors"
    assert lines[1] == "changed: 1 tensor"
    assert lines[2].split("  ")[1] == "tensor"
    assert lines[3].split()[:2] == ["lm_head.weight", "1"] and lines[3].endswith("100.00%")
    text = done.stdout
    assert "other dtype: 1 tensor" in text and "float32 -> float16" in text
    assert "other shape: 1 tensor" in text and "16x8 -> 128" in text
    assert "only in base: 1 tensor\n  model.layers.1.mlp.up_proj.weight\n" in text
    assert text.endswith("only in other.safetensors: 1 tensor\n  renamed\n")


def test_json_and_one_word(cli: Run, base: Path, other: Path) -> None:
    done = cli("diff", "base", "other.safetensors", "--json", "--no-progress")
    data = json.loads(done.stdout)
    assert (done.returncode, done.stderr, data["schema"], data["same"]) == (1, "", 1, False)
    assert data["counts"] == {"equal": 10, "changed": 1, "dtype": 1, "shape": 1, "only_a": 1, "only_b": 1}
    assert data["changed"][0]["relative"] == 1.0
    quiet = cli("diff", "base", "other.safetensors", "-q")
    assert (quiet.returncode, quiet.stdout) == (1, "different\n")


def test_include_and_exclude_choose_tensors(cli: Run, base: Path, other: Path) -> None:
    assert cli("diff", "base", "other.safetensors", "--include", "*q_proj*").stdout == "equal: 2 tensors\n"
    done = cli("diff", "base", "other.safetensors", "--include", "*weight", "--exclude", "model*")
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "changed: 1 tensor")
    done = cli("diff", "base", "other.safetensors", "--include", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--include" in done.stderr


def test_long_lists_are_shortened_without_v(cli: Run, tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        save_file({f"t{i:02d}": np.full(2, value, np.float32) for i in range(30)}, tmp_path / f"{name}.safetensors")
    short, long = cli("diff", "a.safetensors", "b.safetensors"), cli("diff", "a.safetensors", "b.safetensors", "-v")
    assert short.stdout.endswith("  and 10 more (-v lists them)\n")
    assert sum(line.startswith("  t") for line in short.stdout.splitlines()) == 20 + 1  # and the header
    assert sum(line.startswith("  t") for line in long.stdout.splitlines()) == 30 + 1


def test_a_merge_that_changes_nothing_equals_its_base(cli: Run, base: Path, adapter: Path) -> None:
    assert cli("merge", "base", "lora=0", "-o", "zero", "-q").returncode == 0
    assert cli("diff", "base", "zero").stdout == "equal: 14 tensors\n"
    assert cli("merge", "base", "lora", "-o", "one", "-q").returncode == 0
    data = json.loads(cli("diff", "base", "one", "--json").stdout)
    expected = {f"model.layers.{i}.self_attn.{m}.weight" for i in (0, 1) for m in ("q_proj", "v_proj")}
    assert {row["name"] for row in data["changed"]} == expected


def test_changes_from_zero_and_of_integers_have_no_ratio(cli: Run, tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 1)):
        tensors = {"f": np.full(2, value, np.float32), "i": np.full(2, value, np.int64)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    rows = [line.split() for line in cli("diff", "a.safetensors", "b.safetensors").stdout.splitlines()[2:]]
    assert ["f", "from", "zero", "0", "1.41", "1", "100.00%"] in rows
    assert ["i", "-", "-", "-", "-", "100.00%"] in rows


@pytest.mark.parametrize("sides", [("base", "nowhere"), ("nowhere", "base")])
def test_a_missing_side_is_exit_3(cli: Run, base: Path, sides: tuple[str, str]) -> None:
    done = cli("diff", *sides)
    assert (done.returncode, done.stdout) == (3, "")
    assert "nowhere" in done.stderr


def test_one_side_is_usage(cli: Run, base: Path) -> None:
    assert cli("diff", "base").returncode == 2
