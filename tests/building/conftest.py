"""A small base in two shards, three adapters, and a folder with a recipe for each test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
DIM, ODD, RANKS = 16, 37, {"style": 3, "tone": 1}
ALPHA = 5

torch.set_num_threads(1)


def write_base(folder: Path) -> None:
    """A square and an odd weight in each of two layers, bfloat16 and float32, two shards."""
    folder.mkdir()
    g = torch.Generator().manual_seed(1)
    where = {}
    for layer, dtype in ((0, torch.bfloat16), (1, torch.float32)):
        at = f"model.layers.{layer}"
        part = {
            f"{at}.self_attn.q_proj.weight": torch.randn(DIM, DIM, generator=g).to(dtype),
            f"{at}.mlp.up_proj.weight": torch.randn(ODD, DIM, generator=g).to(dtype),
            f"{at}.input_layernorm.weight": torch.randn(DIM, generator=g).to(dtype),
        }
        name = f"model-{layer + 1:05d}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")


def write_adapter(folder: Path, rank: int, seed: int, modules: tuple[str, ...] = ("q_proj", "up_proj")) -> None:
    """A PEFT adapter, no factor of which is zero."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, rows, at in (("q_proj", DIM, "self_attn"), ("up_proj", ODD, "mlp")):
            if module in modules:
                path = f"base_model.model.model.layers.{layer}.{at}.{module}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(rank, DIM, generator=g)
                tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_base(folder / "base")
    for seed, (name, rank) in enumerate(RANKS.items(), 5):
        write_adapter(folder / name, rank, seed)
    write_adapter(folder / "other", 2, 9)
    wrong = folder / "wrong"  # of another model: its modules are in no base here
    write_adapter(wrong, 2, 11)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["x_proj"]}))
    save_file(
        {
            f"base_model.model.model.layers.7.self_attn.x_proj.lora_{f}.weight": torch.ones(s)
            for f, s in (("A", (2, DIM)), ("B", (DIM, 2)))
        },
        wrong / "adapter_model.safetensors",
    )
    return folder


Workshop = Callable[..., Path]


@pytest.fixture
def workshop(made: Path, tmp_path: Path) -> Workshop:
    """Copies the inputs into a folder and writes a recipe there; gives the recipe."""

    def write(text: str, name: str = "here") -> Path:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(made, folder)
        recipe = folder / "recipe.toml"
        recipe.write_text(text)
        return recipe

    return write


def shell(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    program = [sys.executable, "-m", "loramerge", *map(str, arguments)]
    return subprocess.run(program, cwd=cwd, env=env, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
