"""`loramerge unmerge`, `merge --reversible` and `verify` of both, as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramerge.cli import main


@pytest.fixture(autouse=True)
def in_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def merged(base: Path, adapter: Path, capsys: Any) -> Path:
    """`merged` with an undo file; the fixture's adapter is big, so that subtraction loses much."""
    assert run(capsys, "merge", "base", "lora", "-o", "merged", "--reversible", "-q")[0] == 0
    return Path("merged")


@pytest.fixture
def plain(base: Path, adapter: Path, capsys: Any) -> Path:
    """`plain` without an undo file."""
    assert run(capsys, "merge", "base", "lora=0.5", "-o", "plain", "-q")[0] == 0
    return Path("plain")


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    return code, *capsys.readouterr()


def document(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert len(out.splitlines()) == 1
    return code, json.loads(out)


def labels(text: str) -> dict[str, str]:
    return {line[:10].strip(): line[10:] for line in text.splitlines()}


def same_weights(out: str, base: str = "base") -> bool:
    return Path(out, "model.safetensors").read_bytes() == Path(base, "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------- merge --reversible


def test_a_reversible_merge_tells_of_its_undo_file(base: Path, adapter: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "merge", "base", "lora", "-o", "./m/", "--reversible", "--no-progress")
    size = Path("m/loramerge.undo").stat().st_size
    assert code == 0
    assert labels(out)["undo"].startswith("./m/loramerge.undo   ") and list(labels(out))[-2:] == ["undo", "wrote"]
    code, data = document(capsys, "merge", "base", "lora", "-o", "n", "--reversible")
    assert code == 0 and data["undo"] == {"path": "n/loramerge.undo", "size": size}
    assert document(capsys, "merge", "base", "lora", "-o", "o")[1]["undo"] is None
    assert not Path("o/loramerge.undo").exists()


def test_a_reversible_merge_keeps_the_dtype(base: Path, adapter: Path, capsys: Any) -> None:
    code, data = document(capsys, "merge", "base", "lora", "-o", "m", "--reversible", "--dtype", "bfloat16")
    assert code == 2 and data["error"]["code"] == "usage.reversible"


# ------------------------------------------------------------------------------------------------------ unmerge


def test_human_output_of_the_undo_file(merged: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "unmerge", "merged", "-o", "./u", "--no-progress")
    assert code == 0 and same_weights("u")
    said, told = labels(err), labels(out)
    assert list(said) == ["merged", "plan"]
    assert said["merged"] == "merged   float32" and said["plan"].startswith("4 of 14 tensors brought back; reads ")
    assert list(told) == ["unmerged", "back", "removed", "carried", "wrote"]
    assert told["unmerged"].startswith("4.16 kB in ") and told["unmerged"].endswith("/s)   way back: undo file")
    assert told["back"] == "4 tensors brought back, 10 copied   all proved by their hashes"
    assert told["removed"] == "lora" and told["wrote"] == "./u   receipt ./u/loramerge.json"


def test_human_output_with_the_base(plain: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "unmerge", "plain", "lora=0.5", "-o", "u", "--base", "./base", "--no-progress")
    assert code == 0 and same_weights("u")
    assert labels(err)["base"] == "./base"
    told = labels(out)
    assert told["unmerged"].endswith("way back: base") and told["removed"] == "lora   weight 0.5"
    assert told["back"] == "4 tensors read from the base, 10 copied   all proved by their hashes"


def test_human_output_of_a_subtraction(plain: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "unmerge", "plain", "-o", "u", "--inexact", "--no-progress")
    assert code == 0 and not same_weights("u")
    warning = next(line for line in err.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: subtracted: of 256 changed weights about ") and "--base" in warning
    told = labels(out)
    assert told["unmerged"].endswith("way back: subtraction")
    assert told["back"] == "4 tensors subtracted from, 10 copied   0 of 4 proved by their hashes"
    assert labels(err)["adapter"] == "lora   weight 0.5"
    receipt = json.loads(Path("u/loramerge.json").read_text())
    assert f"{receipt['inexact']['share']:.2%}" in warning and receipt["inexact"]["elements"] == 256


def test_quiet_and_json(merged: Path, plain: Path, capsys: Any) -> None:
    assert run(capsys, "unmerge", "merged", "-o", "./u", "-q") == (0, "./u\n", "")
    code, data = document(capsys, "unmerge", "merged", "lora", "-o", "v")
    assert code == 0
    assert {
        "schema": 1,
        "ok": True,
        "out": "v",
        "receipt": "v/loramerge.json",
        "way": "undo file",
        "removed": [{"source": "lora", "weight": 1.0}],
        "tensors_back": 4,
        "tensors_copied": 10,
        "proved": 4,
        "unproved": [],
        "inexact": None,
        "bytes_written": 4160,
        "notes": [],
    }.items() <= data.items()
    assert data["seconds"] > 0 and data["gb_per_s"] > 0
    code, data = document(capsys, "unmerge", "plain", "-o", "w", "--inexact")
    assert code == 0 and data["way"] == "subtraction" and len(data["unproved"]) == 4
    assert 0 < data["inexact"]["share"] <= data["inexact"]["may_differ"] <= 1


def test_verbose_names_what_is_not_proved(plain: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "unmerge", "plain", "-o", "u", "--inexact", "-v")
    assert code == 0 and sum(line.startswith("unproved  model.layers.") for line in out.splitlines()) == 4


def test_a_base_that_nothing_proves_is_warned_of(base: Path, adapter: Path, capsys: Any) -> None:
    assert run(capsys, "merge", "base", "lora", "-o", "m", "--dtype", "bfloat16", "-q")[0] == 0
    code, _, err = run(capsys, "unmerge", "m", "-o", "u", "--base", "base", "--no-progress")
    assert code == 0 and same_weights("u")
    assert "warning: the receipt has no hash of 14 tensors as the base had it" in err


def test_dry_run_writes_nothing(merged: Path, capsys: Any) -> None:
    before = sorted(p.name for p in Path().iterdir())
    code, out, _ = run(capsys, "unmerge", "merged", "-o", "u", "--dry-run")
    assert code == 0 and labels(out)["plan"].startswith("4 of 14 tensors brought back")
    code, data = document(capsys, "unmerge", "merged", "-o", "u", "--dry-run")
    assert code == 0 and data["plan"]["way"] == "undo file"
    undone = [s for f in data["plan"]["files"] for s in f["steps"] if s.get("undo") == "candidates"]
    assert len(undone) == 4
    assert sorted(p.name for p in Path().iterdir()) == before


def test_an_existing_out_needs_force(merged: Path, capsys: Any) -> None:
    assert run(capsys, "merge", "base", "lora=2", "-o", "u", "-q")[0] == 0
    code, data = document(capsys, "unmerge", "merged", "-o", "u")
    assert code == 4 and data["error"]["code"] == "output.exists" and not same_weights("u")
    assert run(capsys, "unmerge", "merged", "-o", "u", "--force", "-q")[0] == 0
    assert same_weights("u")


def test_threads_and_memory(merged: Path, capsys: Any) -> None:
    assert run(capsys, "unmerge", "merged", "-o", "u", "--jobs", "1", "-q")[0] == 0
    assert same_weights("u")
    code, data = document(capsys, "unmerge", "merged", "-o", "v", "--max-memory", "1MB")
    assert code == 3 and data["error"]["code"] == "plan.memory"


def test_a_single_file(base: Path, adapter: Path, capsys: Any) -> None:
    shutil.copy("base/model.safetensors", "sd.safetensors")
    assert run(capsys, "merge", "sd.safetensors", "lora", "-o", "m.safetensors", "--reversible", "-q")[0] == 0
    assert Path("m.loramerge.undo").is_file()
    code, data = document(capsys, "unmerge", "m.safetensors", "-o", "u")
    assert code == 2 and data["error"]["code"] == "usage.output"
    code, data = document(capsys, "unmerge", "m.safetensors", "-o", "./u.safetensors")
    assert code == 0 and data["receipt"] == "./u.loramerge.json"
    assert Path("u.safetensors").read_bytes() == Path("sd.safetensors").read_bytes()
    assert not Path("u.loramerge.undo").exists()
    # The three files of a merge may be given other names, together.
    for end in (".safetensors", ".loramerge.json", ".loramerge.undo"):
        Path("m" + end).rename("renamed" + end)
    code, data = document(capsys, "verify", "renamed.safetensors", "--undo")
    assert code == 0 and data["undo"]["back"] == 4
    assert run(capsys, "unmerge", "renamed.safetensors", "-o", "v.safetensors", "-q")[0] == 0
    assert Path("v.safetensors").read_bytes() == Path("sd.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------ refusals


def refused(capsys: Any, *arguments: str) -> dict[str, Any]:
    """The error of a command that ends with 3 and writes nothing."""
    before = sorted(p.name for p in Path().iterdir())
    code, data = document(capsys, *arguments)
    assert code == 3 and not data["ok"] and data["exit_code"] == 3
    assert sorted(p.name for p in Path().iterdir()) == before
    return dict(data["error"])


def test_without_an_undo_file_both_ways_are_named(plain: Path, capsys: Any) -> None:
    error = refused(capsys, "unmerge", "plain", "-o", "u")
    assert error["code"] == "unmerge.no-undo" and error["file"] == "plain"
    assert "--base" in error["hint"] and "--inexact" in error["hint"]


def test_a_lost_undo_file_is_told_from_one_that_never_was(merged: Path, capsys: Any) -> None:
    (merged / "loramerge.undo").unlink()
    assert "not beside it any more" in refused(capsys, "unmerge", "merged", "-o", "u")["message"]


def test_a_model_without_a_receipt(base: Path, capsys: Any) -> None:
    assert refused(capsys, "unmerge", "base", "-o", "u")["code"] == "unmerge.no-receipt"
    assert refused(capsys, "unmerge", "nowhere", "-o", "u")["code"] == "input.missing"


def test_another_adapter(merged: Path, make: SimpleNamespace, capsys: Any) -> None:
    make.adapter(Path("tone"), make.adapter_tensors(2))
    error = refused(capsys, "unmerge", "merged", "tone", "-o", "u")
    assert error["code"] == "unmerge.adapter" and error["file"] == "tone" and "'lora'" in error["message"]
    assert refused(capsys, "unmerge", "merged", "lora=0.25", "-o", "u")["code"] == "unmerge.adapter"


def test_another_base(merged: Path, make: SimpleNamespace, capsys: Any) -> None:
    make.base(Path("other"), make.base_tensors(7))
    error = refused(capsys, "unmerge", "merged", "-o", "u", "--base", "other")
    assert error["code"] == "unmerge.base" and error["file"] == "other"
    assert sorted(error["tensors"]) == [
        f"model.layers.{i}.self_attn.{m}.weight" for i in range(2) for m in ("q_proj", "v_proj")
    ]


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_a_truncated_undo_file(merged: Path, capsys: Any, cut: int) -> None:
    undo = merged / "loramerge.undo"
    undo.write_bytes(undo.read_bytes()[:cut])
    error = refused(capsys, "unmerge", "merged", "-o", "u")
    assert error["code"] == "undo.damaged" and "--base" in error["hint"]
    code, data = document(capsys, "verify", "merged")
    assert code == 1 and [f["name"] for f in data["files"] if not f["ok"]] == ["loramerge.undo"]
    code, data = document(capsys, "verify", "merged", "--undo")
    assert code == 1 and not data["undo"]["ok"]


def test_an_edited_model(merged: Path, capsys: Any) -> None:
    weights = merged / "model.safetensors"
    good = weights.read_bytes()
    for at in range(-len(good[8 + int.from_bytes(good[:8], "little") :]), 0, 97):
        raw = bytearray(good)
        raw[at] ^= 1
        weights.write_bytes(raw)
        error = refused(capsys, "unmerge", "merged", "-o", "u")
        assert error["code"] in ("undo.edited", "unmerge.edited") and len(error["tensors"]) == 1


# -------------------------------------------------------------------------------------------------------- verify


def test_verify_tells_what_it_did(merged: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "verify", "merged", "--undo", "--no-progress")
    assert code == 0
    assert out.splitlines() == ["ok: 14/14 tensors (as the receipt says)", "  undo: 4 tensors come back bit for bit"]
    assert run(capsys, "unmerge", "merged", "-o", "u", "-q")[0] == 0
    code, out, _ = run(capsys, "verify", "u", "--base", "base", "--no-progress")
    assert code == 0 and out == "ok: 14/14 tensors (as in the base)\n"
    (merged / "loramerge.undo").unlink()
    code, out, _ = run(capsys, "verify", "merged", "--no-progress")
    assert code == 1 and "  loramerge.undo: No such file" in out
    code, data = document(capsys, "verify", "merged", "--undo")
    assert code == 3 and data["error"]["code"] == "unmerge.no-undo"
