"""`loramerge convert` at a shell."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def flat_adapter(path: Path, make: SimpleNamespace) -> Path:
    """The same factors under flattened names."""
    tensors = {}
    for key, tensor in make.adapter_tensors().items():
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0].replace(".", "_")
        tensors[f"lora_unet_{module}.{'lora_down' if 'lora_A' in key else 'lora_up'}.weight"] = tensor
    save_file(tensors, path)
    return path


def test_an_adapter_is_written_for_a_server(cli: Any, adapter: Path, tmp_path: Path) -> None:
    done = cli("convert", "lora", "-o", "served", "--to", "vllm")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "adapter   lora   PEFT to vLLM"
    assert lines[1] == "converted 4 modules   4 exact   0 renamed"
    assert lines[2].startswith("wrote     served   ")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 8, ["q_proj", "v_proj"])
    assert cli("convert", "lora", "-o", "quiet", "--to", "vllm", "-q").stdout == "quiet\n"


def test_the_output_is_merged_like_the_input(cli: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert cli("convert", "lora", "-o", "lora.safetensors", "--to", "comfyui").returncode == 0
    for name in ("lora", "lora.safetensors"):
        assert cli("merge", "base", name, "-o", f"merged-{name}").returncode == 0
    assert cli("diff", "merged-lora", "merged-lora.safetensors").returncode == 0 or np.allclose(
        *(next(iter(load_file(p / "model.safetensors").values())) for p in sorted(tmp_path.glob("merged-*")))
    )


def test_json_is_one_document(cli: Any, adapter: Path) -> None:
    done = cli("convert", "lora", "-o", "out.safetensors", "--to", "kohya", "--json")
    data = json.loads(done.stdout)
    assert (data["schema"], data["ok"], data["to"], data["modules"], data["exact"]) == (1, True, "kohya", 4, 4)
    assert data["dropped"] == [] and data["files"].keys() == {"out.safetensors"} and "rows" not in data
    rows = json.loads(cli("convert", "lora", "-o", "o.safetensors", "--to", "kohya", "--json", "-v").stdout)["rows"]
    assert {row["scale"] for row in rows} == {2.0} and len(rows) == 4


def test_a_dry_run_writes_nothing(cli: Any, adapter: Path, tmp_path: Path) -> None:
    done = cli("convert", "lora", "-o", "out", "--to", "sglang", "--dry-run")
    assert done.returncode == 0 and "would be  out" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_exists_is_kept(cli: Any, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    done = cli("convert", "lora", "-o", "out.safetensors", "--to", "kohya")
    assert done.returncode == 4 and "--force" in done.stderr
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    assert cli("convert", "lora", "-o", "out.safetensors", "--to", "kohya", "--force").returncode == 0
    assert cli("convert", "lora", "-o", "lora", "--to", "peft", "--force").returncode == 4


@pytest.mark.parametrize(
    ("to", "out", "says"),
    [
        ("kohia", "out.safetensors", "did you mean kohya?"),
        ("xlabs", "out.safetensors", "is read, not written"),
        ("kohya", "out", "-o out.safetensors"),
        ("vllm", "out.safetensors", "-o DIRECTORY"),
    ],
)
def test_requests_that_make_no_sense(cli: Any, adapter: Path, to: str, out: str, says: str) -> None:
    done = cli("convert", "lora", "-o", out, "--to", to)
    assert done.returncode == 2 and says in done.stderr and not done.stdout


def test_flattened_names_ask_for_the_base(cli: Any, base: Path, make: SimpleNamespace, tmp_path: Path) -> None:
    flat_adapter(tmp_path / "flat.safetensors", make)
    done = cli("convert", "flat.safetensors", "-o", "out", "--to", "peft", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (3, "convert.needs-base") and "--base" in error["hint"]
    assert not (tmp_path / "out").exists()
    done = cli("convert", "flat.safetensors", "-o", "out", "--to", "peft", "--base", "base")
    assert done.returncode == 0 and "4 renamed" in done.stdout
    wanted = make.adapter_tensors()
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert made.keys() == wanted.keys() and all(np.array_equal(made[k], wanted[k]) for k in wanted)


def test_another_base_is_no_help(cli: Any, make: SimpleNamespace, tmp_path: Path) -> None:
    flat_adapter(tmp_path / "flat.safetensors", make)
    make.base(tmp_path / "other", {"transformer.wte.weight": np.zeros((4, 8), np.float32)})
    done = cli("convert", "flat.safetensors", "-o", "out", "--to", "peft", "--base", "other")
    assert done.returncode == 3 and not (tmp_path / "out").exists()
