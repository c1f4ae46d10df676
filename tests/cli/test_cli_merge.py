"""`loramerge merge` and `loramerge verify` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.cli import main

SCALE = 4 / 2  # alpha / rank of the fixtures


@pytest.fixture(autouse=True)
def in_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run where base and adapter lie, so that paths are what a user would type."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    return code, *capsys.readouterr()


def document(capsys: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert len(out.splitlines()) == 1
    return code, json.loads(out)


def expected(make: SimpleNamespace, weights: dict[int, float]) -> dict[str, np.ndarray]:
    """`W + sum of weight * scale * B A` in float64; keys of `weights` are the seeds of the adapters."""
    tensors = {k: v.astype(np.float64) for k, v in make.base_tensors().items()}
    for seed, weight in weights.items():
        factors = make.adapter_tensors(seed)
        for key, A in factors.items():
            if ".lora_A." in key:
                B = factors[key.replace(".lora_A.", ".lora_B.")]
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                tensors[f"{module}.weight"] += weight * SCALE * (B.astype(np.float64) @ A.astype(np.float64))
    return tensors


def assert_equals(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    merged = load_file(directory / "model.safetensors")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)


# --------------------------------------------------------------------------------------------------- merge


def test_human_output(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    code, out, err = run(capsys, "merge", "base", "lora", "-o", "./merged", "--no-progress")
    assert code == 0
    assert_equals(Path("merged"), expected(make, {1: 1.0}))
    said = {line[:10].strip(): line[10:] for line in err.splitlines()}
    assert list(said) == ["base", "adapter", "plan"]
    assert said["base"].startswith("base   1 file   4.16 kB   float32")
    assert said["adapter"].startswith("lora   PEFT r=2 scale 2") and "4/4 modules" in said["adapter"]
    assert said["plan"].startswith("4 of 14 tensors change")
    told = {line[:10].strip(): line[10:] for line in out.splitlines()}
    assert list(told) == ["merged", "changed", "carried", "wrote"]
    assert "retention 1.000 (least 1.00, model.layers." in told["merged"] and "4.16 kB in " in told["merged"]
    assert "config" in told["carried"]
    assert told["wrote"] == "./merged   receipt ./merged/loramerge.json"


def test_weights_stand_beside_their_adapters(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    make.adapter(Path("tone"), make.adapter_tensors(2))
    code, _, err = run(capsys, "merge", "base", "lora=0.7", "tone=-0.2", "-o", "m")
    assert code == 0
    assert_equals(Path("m"), expected(make, {1: 0.7, 2: -0.2}))
    assert "weight 0.7" in err and "weight -0.2" in err and err.count("scale 2 ") == 2


def test_a_path_that_ends_in_a_number(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    adapter.rename("a=0.5")
    assert run(capsys, "merge", "base", "a=0.5=1", "-o", "m")[0] == 0
    assert_equals(Path("m"), expected(make, {1: 1.0}))


def test_quiet_is_the_path_as_typed(base: Path, adapter: Path, capsys: Any) -> None:
    assert run(capsys, "merge", "base", "lora", "-o", "./m", "-q") == (0, "./m\n", "")


def test_json(base: Path, adapter: Path, capsys: Any) -> None:
    code, out, err = run(capsys, "merge", "base", "lora", "-o", "m/", "--json")
    data = json.loads(out)
    assert code == 0 and err == ""
    assert {
        "schema": 1,
        "ok": True,
        "out": "m/",
        "receipt": "m/loramerge.json",
        "tensors_changed": 4,
        "tensors_copied": 10,
        "tensors_added": 0,
        "modules": 4,
        "modules_matched": 4,
        "bytes_written": 4160,
        "notes": [],
    }.items() <= data.items()
    assert data["retention"] == pytest.approx(1.0, abs=1e-3)
    assert data["seconds"] > 0 and data["gb_per_s"] > 0
    assert json.loads(Path(data["receipt"]).read_text())["tool"] == "loramerge"


def test_verbose_lists_modules(base: Path, adapter: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "merge", "base", "lora", "-o", "m", "-v")
    assert code == 0
    assert sum("self_attn" in line for line in out.splitlines()[3:]) == 4


def test_a_single_file(base: Path, adapter: Path, capsys: Any) -> None:
    shutil.copy("base/model.safetensors", "sd.safetensors")
    code, data = document(capsys, "merge", "sd.safetensors", "lora", "-o", "./new.safetensors")
    assert code == 0 and Path("new.safetensors").is_file()
    assert data["receipt"] == "./new.loramerge.json" and Path(data["receipt"]).is_file()


def bfloat16(tensor: np.ndarray) -> np.ndarray:
    """Truncated to what bfloat16 can hold, as float32."""
    return (tensor.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(
    ("dtype", "option", "remedy"), [(np.float16, "keep", "float32"), (np.float32, "bfloat16", "float32 or float16")]
)
def test_low_retention_warns_with_its_remedy(
    make: SimpleNamespace, capsys: Any, dtype: type, option: str, remedy: str
) -> None:
    make.base(Path("base"), {k: bfloat16(v).astype(dtype) for k, v in make.base_tensors().items()})
    make.adapter(Path("tiny"), {k: v * np.float32(1e-3) for k, v in make.adapter_tensors().items()})
    arguments = ("merge", "base", "tiny", "-o", "m", "--dtype", option, "--no-progress")
    code, _, err = run(capsys, *arguments)
    assert code == 0
    warning = err.splitlines()[-1]
    assert warning.startswith("warning: rounding kept only ")
    assert warning.endswith(f"of the change; --dtype {remedy} keeps more of it")
    assert run(capsys, *arguments, "-q", "--force") == (0, "m\n", "")


def test_include_and_exclude(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    code, data = document(capsys, "merge", "base", "lora", "-o", "m", "--include", "*q_proj", "--exclude", "*.0.*")
    assert code == 0 and data["tensors_changed"] == 1
    assert "--include" not in data


def test_shards(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    code, _ = document(capsys, "merge", "base", "lora", "-o", "m", "--shard-size", "2kB")
    assert code == 0
    names = sorted(p.name for p in Path("m").glob("*.safetensors"))
    assert len(names) > 1 and Path("m/model.safetensors.index.json").is_file()
    merged = {k: v for name in names for k, v in load_file(Path("m") / name).items()}
    for name, tensor in expected(make, {1: 1.0}).items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-5)


def test_an_existing_output_needs_force(base: Path, adapter: Path, capsys: Any) -> None:
    assert run(capsys, "merge", "base", "lora", "-o", "m")[0] == 0
    code, out, err = run(capsys, "merge", "base", "lora", "-o", "m")
    assert code == 4 and out == ""
    assert err.splitlines()[0].startswith("error: ") and "(m)" in err and "--force" in err.splitlines()[-1]
    assert run(capsys, "merge", "base", "lora", "-o", "m", "--force")[0] == 0


@pytest.mark.parametrize("out", ["base", "lora", "base/inside", "."])
def test_an_output_that_is_an_input_is_refused_always(base: Path, adapter: Path, capsys: Any, out: str) -> None:
    code, data = document(capsys, "merge", "base", "lora", "-o", out, "--force")
    assert code == 4 and data["exit_code"] == 4 and data["error"]["code"] == "output.is-input"
    assert sorted(p.name for p in Path("base").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["nothing", "lora"], 3, "input.missing"),
        (["base", "nothing"], 3, "input.missing"),
        (["base", "base"], 3, "adapter.is-model"),
        (["lora", "lora"], 3, None),
        (["base", "lora", "--tokenizer", "adapter"], 3, "adapter.tokenizer"),
        (["base", "lora", "--include", "nothing*"], 3, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_inputs(
    base: Path, adapter: Path, capsys: Any, arguments: list[str], exit_code: int, code: str | None
) -> None:
    before = sorted(Path().iterdir())
    status, data = document(capsys, "merge", *arguments, "-o", "m")
    assert (status, data["ok"], data["exit_code"]) == (exit_code, False, exit_code)
    assert code is None or data["error"]["code"] == code
    assert data["error"]["message"]
    assert sorted(Path().iterdir()) == before


def test_an_output_without_a_parent(base: Path, adapter: Path, capsys: Any) -> None:
    code, data = document(capsys, "merge", "base", "lora", "-o", "no/where/m")
    assert code == 4 and data["error"]["code"] == "output.no-parent"


def test_unmatched_factors(base: Path, make: SimpleNamespace, capsys: Any) -> None:
    make.adapter(Path("deeper"), make.adapter_tensors(layers=4))
    code, data = document(capsys, "merge", "base", "deeper", "-o", "m")
    assert code == 3 and data["error"]["code"] == "adapter.unmatched"
    assert data["error"]["tensors"] and data["error"]["hint"] and not Path("m").exists()
    _, _, err = run(capsys, "merge", "base", "deeper", "-o", "m")
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and "deeper" in lines[0] and lines[-1].startswith("fix:   ")
    assert len(lines) <= 8
    code, _, err = run(capsys, "merge", "base", "deeper", "-o", "m", "--allow-unmatched")
    assert code == 0 and "4/8 modules" in err and "8 tensors unmatched" in err
    assert_equals(Path("m"), expected(make, {1: 1.0}))


def test_alpha_from_the_command_line(base: Path, adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    (adapter / "adapter_config.json").unlink()
    code, data = document(capsys, "merge", "base", "lora", "-o", "m")
    assert code == 3 and "--alpha" in data["error"]["hint"]
    assert document(capsys, "merge", "base", "lora", "-o", "m", "--alpha", "4")[0] == 0
    assert_equals(Path("m"), expected(make, {1: 1.0}))


# ------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_prints_the_plan_and_writes_nothing(base: Path, adapter: Path, capsys: Any) -> None:
    before = sorted(Path().iterdir())
    code, out, err = run(capsys, "merge", "base", "lora", "-o", "m", "--dry-run")
    assert code == 0 and err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["base", "adapter", "plan"]
    code, data = document(capsys, "merge", "base", "lora", "-o", "m", "--dry-run")
    assert code == 0 and data["ok"] and data["plan"]["tensors_changed"] == 4
    steps = [step for file in data["plan"]["files"] for step in file["steps"]]
    assert len(steps) == 14 and sum(step["do"] == "change" for step in steps) == 4
    assert run(capsys, "merge", "base", "lora", "-o", "m", "--dry-run", "-q") == (0, "m\n", "")
    assert sorted(Path().iterdir()) == before


def test_a_dry_run_fails_as_the_run_would(base: Path, adapter: Path, capsys: Any) -> None:
    Path("m").mkdir()
    assert document(capsys, "merge", "base", "lora", "-o", "m", "--dry-run")[0] == 4
    assert document(capsys, "merge", "base", "nothing", "-o", "n", "--dry-run")[0] == 3


@pytest.fixture
def poison(tmp_path: Path) -> str:
    """A path with a `torch` and other heavy packages that must not be imported."""
    folder = tmp_path / "poison"
    folder.mkdir()
    for name in ("torch", "numpy", "transformers", "huggingface_hub", "onnx", "peft"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return str(folder)


def test_a_dry_run_and_verify_never_import_torch(base: Path, adapter: Path, cli: Any, poison: str, capsys: Any) -> None:
    root = str(Path(__file__).resolve().parents[2])
    env = {"PYTHONPATH": f"{poison}:{root}"}
    done = cli("merge", "base", "lora", "-o", "m", "--dry-run", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["tensors_changed"] == 4
    assert run(capsys, "merge", "base", "lora", "-o", "m")[0] == 0
    done = cli("verify", "m", "--json", env=env)
    assert done.returncode == 0, done.stderr
    done = cli("merge", "base", "nothing", "-o", "n", "--json", env=env)
    assert done.returncode == 3, done.stderr


# -------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def merged(base: Path, adapter: Path, capsys: Any) -> Path:
    assert run(capsys, "merge", "base", "lora=0.5", "-o", "m", "-q")[0] == 0
    return Path("m")


def test_verify_by_the_receipt(merged: Path, capsys: Any) -> None:
    assert run(capsys, "verify", "m", "--no-progress") == (0, "ok: 14/14 tensors (as the receipt says)\n", "")
    assert run(capsys, "verify", "m", "-q") == (0, "ok\n", "")
    code, data = document(capsys, "verify", "m")
    assert code == 0 and data["schema"] == 1 and data["ok"] and data["differ"] == [] and not data["replayed"]


def test_verify_replays(merged: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "verify", "m", "--base", "base", "--adapter", "lora=0.5")
    assert (code, out) == (0, "ok: 14/14 tensors (replayed bit for bit)\n")
    assert run(capsys, "verify", "m", "--base", "base")[0] == 0
    code, data = document(capsys, "verify", "m", "--base", "base", "--adapter", "lora=0.6")
    assert code == 1 and not data["ok"] and len(data["differ"]) == 4 and data["replayed"]


def test_verify_finds_one_flipped_bit(merged: Path, capsys: Any) -> None:
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, err = run(capsys, "verify", "m", "--no-progress")
    assert code == 1 and err == "" and out.startswith("differs: 13/14 tensors") and len(out.splitlines()) == 2
    assert run(capsys, "verify", "m", "-q") == (1, "differs\n", "")
    code, data = document(capsys, "verify", "m")
    assert code == 1 and data["ok"] is False and len(data["differ"]) == 1


def test_verify_finds_a_changed_side_file(merged: Path, capsys: Any) -> None:
    (merged / "config.json").write_text("{}")
    code, out, _ = run(capsys, "verify", "m")
    assert code == 1 and "config.json: " in out


def test_verify_needs_a_receipt(base: Path, capsys: Any) -> None:
    code, data = document(capsys, "verify", "base")
    assert code == 3 and data["error"]["code"] == "input.missing"


def test_a_tensor_name_from_a_file_is_escaped(adapter: Path, make: SimpleNamespace, capsys: Any) -> None:
    make.base(Path("base"))
    tensors = make.adapter_tensors() | {"base_model.model.\x1b[31mevil.lora_A.weight": np.ones((2, 8), np.float32)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    code, out, err = run(capsys, "merge", "base", "lora", "-o", "m")
    assert code == 3 and "\x1b" not in out + err and "\\x1b" in err
