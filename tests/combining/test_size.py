"""Nothing of the size of a weight is formed where the factors are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loramerge as lm

ROWS, COLUMNS = 150_000, 120_000
"""A matrix of them would take 72 GB in float32."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for seed in (1, 2):
        folder, generator = tmp_path_factory.mktemp(f"wide{seed}"), torch.Generator().manual_seed(seed)
        head = "base_model.model.layers.0.proj"
        tensors = {
            f"{head}.lora_A.weight": torch.randn(2, COLUMNS, generator=generator),
            f"{head}.lora_B.weight": torch.randn(ROWS, 2, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        made.append(folder)
    return made


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("karcher", {}),
        ("tsv", {}),
        ("iso_cts", {}),
        ("wudi", {}),
        ("svc", {}),
        ("knots", {"density": 0.5}),
        ("ties", {"density": 0.5, "space": "core"}),
        ("peft-linear", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_factors_are_enough(wide: list[Path], tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    report = lm.combine(wide, tmp_path / "out", method=method, method_options=options, rank=3)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in made.values()} <= {(r, COLUMNS) for r in (2, 3)} | {(ROWS, r) for r in (2, 3)}
    assert report["norm"] > 0 and report["error"] < 1


def test_a_resize_takes_no_product(wide: list[Path], tmp_path: Path) -> None:
    report = lm.resize(wide[0], tmp_path / "out", rank=1)
    assert 0 < report["error"] < 1
