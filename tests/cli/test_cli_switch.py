"""`loramerge switch` as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramerge.cli import main


@pytest.fixture(autouse=True)
def models(
    tmp_path: Path, base: Path, adapter: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`merged`: lora, reversibly. `tone`: another adapter."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    make.adapter(Path("tone"), make.adapter_tensors(2))
    assert run(capsys, "merge", "base", "lora", "-o", "merged", "--reversible", "-q")[0] == 0


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    return code, *capsys.readouterr()


def document(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert len(out.splitlines()) == 1
    return code, json.loads(out)


def labels(text: str) -> dict[str, str]:
    return {line[:10].strip(): line[10:] for line in text.splitlines()}


def digests(out: str) -> dict[str, str]:
    receipt = json.loads(Path(out, "loramerge.json").read_text())
    return {name: row["digest"] for name, row in receipt["tensors"].items()}


def test_a_switch_is_a_merge_into_the_base(capsys: Any) -> None:
    code, out, err = run(capsys, "switch", "merged", "tone=0.5", "lora=-1", "-o", "./s", "--no-progress")
    assert code == 0
    said, told = labels(err), labels(out)
    assert list(said) == ["merged", "back", "adapter", "plan"] and said["back"] == "4 tensors from the undo file"
    assert list(told) == ["switched", "back", "changed", "carried", "undo", "wrote"]
    assert told["back"] == "4 tensors by the undo file   proved by their hashes"
    assert "retention 1.000" in told["switched"] and "/s)" in told["switched"]
    assert told["undo"].startswith("./s/loramerge.undo   ") and told["wrote"] == "./s   receipt ./s/loramerge.json"
    assert run(capsys, "merge", "base", "tone=0.5", "lora=-1", "-o", "fresh", "-q")[0] == 0
    assert digests("s") == digests("fresh")


def test_quiet_and_json(capsys: Any) -> None:
    assert run(capsys, "switch", "merged", "tone", "-o", "s/", "-q") == (0, "s/\n", "")
    code, data = document(capsys, "switch", "s", "lora", "-o", "t")
    assert code == 0
    size = Path("t/loramerge.undo").stat().st_size
    assert {
        "schema": 1,
        "ok": True,
        "out": "t",
        "receipt": "t/loramerge.json",
        "way": "undo file",
        "tensors_back": 4,
        "proved": 4,
        "tensors_changed": 4,
        "modules_matched": 4,
        "undo": {"path": "t/loramerge.undo", "size": size},
        "notes": [],
    }.items() <= data.items()
    assert digests("t") == digests("merged")
    receipt = json.loads(Path("t/loramerge.json").read_text())
    assert receipt["command"] == "switch" and receipt["from"] == "s" and receipt["base"]["source"] == "base"


def test_there_and_back_again(capsys: Any) -> None:
    at = "merged"
    for number, adapter in enumerate(["tone", "lora=0.3", "tone=-2", "lora"]):
        assert run(capsys, "switch", at, adapter, "-o", f"s{number}", "-q")[0] == 0
        at = f"s{number}"
    assert run(capsys, "unmerge", at, "lora", "-o", "u", "-q")[0] == 0
    assert Path("u/model.safetensors").read_bytes() == Path("base/model.safetensors").read_bytes()
    assert run(capsys, "verify", at, "--base", "base", "--undo", "-q") == (0, "ok\n", "")


def test_dry_run_writes_nothing(capsys: Any) -> None:
    before = sorted(p.name for p in Path().iterdir())
    code, out, _ = run(capsys, "switch", "merged", "tone", "-o", "s", "--dry-run")
    assert code == 0 and labels(out)["plan"].startswith("4 of 14 tensors change")
    code, data = document(capsys, "switch", "merged", "tone", "-o", "s", "--dry-run")
    assert code == 0 and data["plan"]["tensors_changed"] == 4
    assert sorted(p.name for p in Path().iterdir()) == before


def test_options_of_a_merge(capsys: Any) -> None:
    arguments = ("--exclude", "*v_proj", "--compute-dtype", "float64", "--jobs", "1")
    code, data = document(capsys, "switch", "merged", "tone", "-o", "s", *arguments)
    assert code == 0 and data["modules_matched"] == 2
    assert run(capsys, "merge", "base", "tone", "-o", "fresh", "-q", *arguments)[0] == 0
    assert digests("s") == digests("fresh")
    for option in (("--dtype", "bfloat16"), ("--shard-size", "1GB"), ("--link",), ("--base", "base")):
        code, data = document(capsys, "switch", "merged", "tone", "-o", "t", *option)
        assert code == 2 and not Path("t").exists()


def test_refusals(make: SimpleNamespace, capsys: Any) -> None:
    before = sorted(p.name for p in Path().iterdir())
    assert run(capsys, "switch", "merged", "-o", "s")[0] == 2
    code, data = document(capsys, "switch", "merged", "merged", "-o", "s")
    assert code == 3
    code, data = document(capsys, "switch", "base", "tone", "-o", "s")
    assert code == 3 and data["error"]["code"] == "unmerge.no-receipt"
    code, data = document(capsys, "switch", "merged", "tone", "-o", "merged", "--force")
    assert code == 4
    code, data = document(capsys, "switch", "merged", "tone", "-o", "s.safetensors")
    assert code == 2 and data["error"]["code"] == "usage.output"
    assert sorted(p.name for p in Path().iterdir()) == before
    Path("merged/loramerge.undo").unlink()
    code, data = document(capsys, "switch", "merged", "tone", "-o", "s")
    assert code == 3 and data["error"]["code"] == "unmerge.no-undo"
    assert "loramerge merge BASE" in data["error"]["hint"] and "--inexact" not in data["error"]["hint"]


def test_a_single_file(capsys: Any) -> None:
    shutil.copy("base/model.safetensors", "sd.safetensors")
    assert run(capsys, "merge", "sd.safetensors", "lora", "-o", "m.safetensors", "--reversible", "-q")[0] == 0
    code, data = document(capsys, "switch", "m.safetensors", "tone", "-o", "./s.safetensors")
    assert code == 0 and data["undo"]["path"] == "./s.loramerge.undo" and Path("s.loramerge.undo").is_file()
    assert run(capsys, "unmerge", "s.safetensors", "-o", "u.safetensors", "-q")[0] == 0
    assert Path("u.safetensors").read_bytes() == Path("sd.safetensors").read_bytes()


def test_an_existing_out_needs_force(capsys: Any) -> None:
    Path("s").mkdir()
    code, data = document(capsys, "switch", "merged", "tone", "-o", "s")
    if code == 0:  # an empty directory may be taken as no output yet
        code, data = document(capsys, "switch", "merged", "tone", "-o", "s")
    assert code == 4 and data["error"]["code"] == "output.exists"
    assert run(capsys, "switch", "merged", "tone", "-o", "s", "--force", "-q")[0] == 0
