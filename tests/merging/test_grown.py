"""Layers that an adapter widens: the base is padded with zeros first, in memory and on disk alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.padded import PaddedSource
from loramerge.tensors.source import FileSource


def base() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "img_in.weight": torch.randn(6, 4),
        "img_in.bias": torch.randn(6),
        "double_blocks.0.img_mod.lin.weight": torch.randn(6, 6),
    }


def control(width: int) -> dict[str, Tensor]:
    """As the control LoRAs of Flux: wider input, a bias, a norm's scale."""
    torch.manual_seed(1)
    return {
        "img_in.lora_A.weight": torch.randn(2, width),
        "img_in.lora_B.weight": torch.randn(6, 2),
        "img_in.lora_B.bias": torch.randn(6),
        "double_blocks.0.img_mod.lin.lora_A.weight": torch.randn(2, 6),
        "double_blocks.0.img_mod.lin.lora_B.weight": torch.randn(6, 2),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(4),
    }


def truth(tensors: dict[str, Tensor], adapter: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    out = {k: v.double() for k, v in tensors.items()}
    out["img_in.weight"] = torch.cat([out["img_in.weight"], torch.zeros(6, width - 4)], dim=1)
    for module in ("img_in", "double_blocks.0.img_mod.lin"):
        A, B = (adapter[f"{module}.lora_{x}.weight"].double() for x in "AB")
        out[f"{module}.weight"] = out[f"{module}.weight"] + B @ A
    out["img_in.bias"] = out["img_in.bias"] + adapter["img_in.lora_B.bias"].double()
    out["double_blocks.0.img_attn.norm.query_norm.scale"] = adapter["double_blocks.0.img_attn.norm.query_norm.scale"]
    return out


@pytest.mark.parametrize("width", [4, 8, 5])
@pytest.mark.parametrize("how", ["memory", "file"])
def test_a_wider_input_layer(how: str, width: int, tmp_path: Path) -> None:
    tensors, adapter = base(), control(width)
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(4)
    save_file(adapter, tmp_path / "control.safetensors")
    if how == "memory":
        merged = lm.merge_tensors(tensors, tmp_path / "control.safetensors")
    else:
        save_file(tensors, tmp_path / "base.safetensors")
        lm.merge(tmp_path / "base.safetensors", tmp_path / "control.safetensors", tmp_path / "out.safetensors")
        merged = load_file(tmp_path / "out.safetensors")
    wanted = truth(tensors, adapter, width)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), wanted[name].double(), rtol=1e-6, atol=1e-6)
    if width > 4:  # what was added before the update is nothing but zeros
        A, B = adapter["img_in.lora_A.weight"], adapter["img_in.lora_B.weight"]
        torch.testing.assert_close(merged["img_in.weight"][:, 4:], (B @ A)[:, 4:], rtol=1e-6, atol=1e-6)


def test_a_file_that_says_the_shape_itself(tmp_path: Path) -> None:
    torch.manual_seed(2)
    W = torch.randn(6, 3, 2, 2)
    down, up = torch.randn(2, 5, 2, 2), torch.randn(6, 2, 1, 1)
    save_file(
        {
            "diffusion_model.conv_in.lora_down.weight": down,
            "diffusion_model.conv_in.lora_up.weight": up,
            "diffusion_model.conv_in.reshape_weight": torch.tensor([6, 5, 2, 2]),
        },
        tmp_path / "wide.safetensors",
    )
    merged = lm.merge_tensors({"conv_in.weight": W}, tmp_path / "wide.safetensors")["conv_in.weight"]
    wanted = torch.cat([W, torch.zeros(6, 2, 2, 2)], dim=1) + (up.flatten(1) @ down.flatten(1)).view(6, 5, 2, 2)
    torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-6)


def test_a_shape_that_would_shrink_is_refused(tmp_path: Path) -> None:
    save_file(
        {
            "diffusion_model.x.lora_down.weight": torch.randn(2, 3),
            "diffusion_model.x.lora_up.weight": torch.randn(6, 2),
            "diffusion_model.x.reshape_weight": torch.tensor([6, 3]),
        },
        tmp_path / "narrow.safetensors",
    )
    with pytest.raises(MismatchError) as caught:
        lm.merge_tensors({"x.weight": torch.randn(6, 4)}, tmp_path / "narrow.safetensors")
    assert caught.value.code == "adapter.shape" and "padded" in caught.value.message


def test_the_receipt_says_that_a_tensor_grew(tmp_path: Path) -> None:
    tensors = base() | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4)}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(control(8), tmp_path / "control.safetensors")
    lm.merge(tmp_path / "base.safetensors", tmp_path / "control.safetensors", tmp_path / "out.safetensors")
    receipt = json.loads((tmp_path / "out.loramerge.json").read_text())
    assert any("img_in.weight" in note and "grows" in note for note in receipt["notes"])


@pytest.mark.parametrize("shape", [((3, 4), (3, 7)), ((2, 3, 2), (4, 5, 3)), ((5,), (9,)), ((1, 1), (1, 1))], ids=str)
def test_any_range_of_a_padded_tensor(shape: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path) -> None:
    old, new = shape
    tensor = torch.arange(1, torch.Size(old).numel() + 1, dtype=torch.int16).view(old)
    (tmp_path / "raw").write_bytes(b"\xff" * 3 + tensor.numpy().tobytes())
    whole = torch.zeros(new, dtype=torch.int16)
    whole[tuple(slice(n) for n in old)] = tensor
    raw = whole.numpy().tobytes()
    source = FileSource(tmp_path / "raw", "raw")
    padded = PaddedSource(source, 3, 2, old, new)
    assert padded.size == len(raw)
    for begin in range(len(raw)):
        for length in range(len(raw) - begin + 1):
            assert padded.read(begin, length) == raw[begin : begin + length]
    source.close()


def test_a_merged_layer_is_not_widened_in_one_pass(tmp_path: Path) -> None:
    """What is merged must come back before zeros are put beside it: a switch refuses, the two steps work."""
    tensors = base() | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4)}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(control(4), tmp_path / "narrow.safetensors")
    save_file(control(8), tmp_path / "wide.safetensors")
    merged = tmp_path / "merged.safetensors"
    lm.merge(tmp_path / "base.safetensors", tmp_path / "narrow.safetensors", merged, reversible=True)
    with pytest.raises(UnsupportedError) as caught:
        lm.switch(merged, tmp_path / "wide.safetensors", tmp_path / "out.safetensors")
    assert caught.value.code == "switch.grown" and "img_in.weight" in caught.value.tensors
    assert not (tmp_path / "out.safetensors").exists()
    lm.unmerge(merged, tmp_path / "back.safetensors")
    lm.merge(tmp_path / "back.safetensors", tmp_path / "wide.safetensors", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["img_in.weight"].shape == (6, 8)
