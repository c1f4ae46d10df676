"""Low-rank pairs under every dialect's names, against `W + (alpha / rank) B A` in float64.

And against each dialect's own rule for an alpha that is missing or zero.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samples import LAYERS, RANK, SHAPES, Sample, base, samples
from torch import Tensor

import loramerge as lm

PAIRED = {
    "kohya": ("_", ".lora_down.weight", ".lora_up.weight"),
    "comfyui": (".", ".lora_down.weight", ".lora_up.weight"),
    "ai-toolkit": (".", ".lora_A.weight", ".lora_B.weight"),
    "onetrainer": ("_", ".lora_down.weight", ".lora_up.weight"),
    "bare": (".", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".", ".lora_A.weight", ".lora_B.weight"),
    "peft": (".", ".lora_A.weight", ".lora_B.weight"),
    "loralib": (".", ".lora_A", ".lora_B"),
}
"""Sample -> what separates segments, suffix of A, suffix of B."""

# What a missing alpha and an alpha of 0 mean where modules have their own: the scale.
ZERO = {"kohya": 1.0, "comfyui": 0.0, "onetrainer": 0.0}


def sample_of(name: str) -> Sample:
    return next(s for s in samples() if s.name == name)


def merged(sample: Sample, tensors: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    path = sample.write(directory, tensors)
    alpha = 1.0 if sample.dialect == "loralib" else None
    return lm.merge_tensors(base(), path, alpha=alpha, allow_pickle=True)


def check(sample: Sample, tensors: dict[str, Tensor], scale: float, directory: Path) -> None:
    separator, down, up = PAIRED[sample.name]
    got, before = merged(sample, tensors, directory), base()
    seen = 0
    for i in range(LAYERS):
        for module in SHAPES:
            name = f"transformer_blocks.{i}.{module}"
            stem = name.replace(".", separator)
            A = next((t for k, t in tensors.items() if k.endswith(stem + down)), None)
            B = next((t for k, t in tensors.items() if k.endswith(stem + up)), None)
            W = before[f"{name}.weight"].double()
            if A is not None and B is not None:
                seen += 1
                W = W + scale * (B.double().flatten(1) @ A.double().flatten(1)).view(W.shape)
            assert float((got[f"{name}.weight"].double() - W).norm() / W.norm()) < 1e-6
            assert torch.equal(got[f"{name}.bias"], before[f"{name}.bias"])
    assert seen >= LAYERS * 2


@pytest.mark.parametrize("name", PAIRED)
def test_the_scale_is_alpha_over_rank(name: str, tmp_path: Path) -> None:
    sample = sample_of(name)
    scale = 1.0 if name in ("ai-toolkit", "bare") else 1.0 / RANK
    check(sample, dict(sample.tensors), scale, tmp_path)


@pytest.mark.parametrize("name", ZERO)
def test_a_module_without_alpha_has_the_scale_one(name: str, tmp_path: Path) -> None:
    sample = sample_of(name)
    tensors = {k: v for k, v in sample.tensors.items() if not k.endswith(".alpha")}
    check(sample, tensors, 1.0, tmp_path)


@pytest.mark.parametrize("name", ZERO)
def test_an_alpha_of_zero_is_what_its_writer_makes_of_it(name: str, tmp_path: Path) -> None:
    sample = sample_of(name)
    tensors = {k: torch.tensor(0.0) if k.endswith(".alpha") else v for k, v in sample.tensors.items()}
    check(sample, tensors, ZERO[name], tmp_path)


def test_one_module_without_alpha_borrows_none(tmp_path: Path) -> None:
    sample = sample_of("kohya")
    lacking = "lora_unet_transformer_blocks_1_attn_to_q"
    tensors = {k: v for k, v in sample.tensors.items() if k != f"{lacking}.alpha"}
    got, before = merged(sample, tensors, tmp_path), base()
    for module, scale in (("transformer_blocks.1.attn.to_q", 1.0), ("transformer_blocks.2.attn.to_q", 0.5)):
        stem = "lora_unet_" + module.replace(".", "_")
        delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        torch.testing.assert_close(got[f"{module}.weight"], before[f"{module}.weight"] + scale * delta)


def test_rank_one_and_a_convolution_of_ones_as_a_linear(tmp_path: Path) -> None:
    """A 2-D pair on a 1 x 1 convolution, and a 4-D pair of ones on a linear."""
    torch.manual_seed(5)
    weights = {"a.proj_in.weight": torch.randn(6, 6, 1, 1), "a.proj_out.weight": torch.randn(6, 6)}
    tensors = {
        "lora_unet_a_proj_in.lora_down.weight": torch.randn(1, 6),
        "lora_unet_a_proj_in.lora_up.weight": torch.randn(6, 1),
        "lora_unet_a_proj_in.alpha": torch.tensor(0.5),
        "lora_unet_a_proj_out.lora_down.weight": torch.randn(1, 6, 1, 1),
        "lora_unet_a_proj_out.lora_up.weight": torch.randn(6, 1, 1, 1),
        "lora_unet_a_proj_out.alpha": torch.tensor(0.5),
    }
    path = Sample("x", "kohya", tensors).write(tmp_path)
    got = lm.merge_tensors(weights, path)
    for name in ("proj_in", "proj_out"):
        stem = f"lora_unet_a_{name}"
        delta = tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)
        W = weights[f"a.{name}.weight"]
        torch.testing.assert_close(got[f"a.{name}.weight"], W + 0.5 * delta.view(W.shape))
