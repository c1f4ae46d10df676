"""One small file of every dialect, written by hand as its trainer would, and a base that it fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS = 4
RANK = 2

SHAPES: dict[str, tuple[int, ...]] = {
    "attn.to_q": (12, 12),
    "attn.to_k": (8, 12),
    "ff.conv": (8, 6, 3, 3),
}


@dataclass(frozen=True)
class Sample:
    """The tensors of one file, what lies beside and in it, and the base."""

    name: str
    dialect: str
    tensors: Mapping[str, Tensor]
    file: str = "adapter.safetensors"
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    config_name: str = "adapter_config.json"

    def write(self, directory: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        """Writes it (or the same with other tensors) and returns what to open."""
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        held = {k: v.contiguous() for k, v in (self.tensors if tensors is None else tensors).items()}
        if self.file.endswith(".safetensors"):
            save_file(held, directory / self.file, metadata=dict(self.metadata) or None)
        else:
            torch.save(held, directory / self.file)
        if self.config is not None:
            (directory / self.config_name).write_text(json.dumps(self.config))
        return directory / self.file


def base() -> dict[str, Tensor]:
    """A base with layers of three sorts, biases and a norm."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for i in range(LAYERS):
        for module, shape in SHAPES.items():
            tensors[f"transformer_blocks.{i}.{module}.weight"] = torch.randn(shape)
            tensors[f"transformer_blocks.{i}.{module}.bias"] = torch.randn(shape[0])
        tensors[f"transformer_blocks.{i}.norm.weight"] = torch.randn(12)
        tensors[f"transformer_blocks.{i}.norm.bias"] = torch.randn(12)
    return tensors


Make = Callable[[tuple[int, ...]], dict[str, Tensor]]


def _pair(down: str, up: str, *, alpha: str = "", mid: str = "") -> Make:
    def make(shape: tuple[int, ...]) -> dict[str, Tensor]:
        ones = (1,) * len(shape[2:])
        kernel = ones if mid else shape[2:]
        made = {down: torch.randn(RANK, shape[1], *kernel), up: torch.randn(shape[0], RANK, *ones)}
        if mid and len(shape) > 2:
            made[mid] = torch.randn(RANK, RANK, *shape[2:])
        if alpha:
            made[alpha] = torch.tensor(1.0)
        return made

    return make


def _with(make: Make, suffix: str, tensor: Callable[[tuple[int, ...]], Tensor]) -> Make:
    return lambda shape: {**make(shape), suffix: tensor(shape)}


def _modules(path: Callable[[str], str], make: Make, linear_only: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for i in range(LAYERS):
        for module, shape in SHAPES.items():
            if linear_only and len(shape) > 2:
                continue
            stem = path(f"transformer_blocks.{i}.{module}")
            tensors |= {stem + suffix: tensor for suffix, tensor in make(shape).items()}
    return tensors


def flat(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module


KOHYA_PAIR = _pair(".lora_down.weight", ".lora_up.weight", alpha=".alpha")


def _norms(path: Callable[[str], str]) -> dict[str, Tensor]:
    made = {}
    for i in range(LAYERS):
        made[path(f"transformer_blocks.{i}.norm") + ".w_norm"] = torch.randn(12)
        made[path(f"transformer_blocks.{i}.norm") + ".b_norm"] = torch.randn(12)
    return made


def _hadamard(shape: tuple[int, ...]) -> dict[str, Tensor]:
    cols = torch.Size(shape[1:]).numel()
    made = {}
    for n in "12":
        made[f".hada_w{n}_a"] = torch.randn(shape[0], RANK)
        made[f".hada_w{n}_b"] = torch.randn(RANK, cols)
    return {**made, ".alpha": torch.tensor(1.0)}


def _kronecker(shape: tuple[int, ...]) -> dict[str, Tensor]:
    rows, cols = shape[0] // 2, torch.Size(shape[1:]).numel() // 2
    made = {".lokr_w1": torch.randn(2, 2), ".lokr_w2_a": torch.randn(rows, RANK), ".lokr_w2_b": torch.randn(RANK, cols)}
    return {**made, ".alpha": torch.tensor(1.0)}


def _rotation(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {".oft_blocks": torch.randn(shape[0] // 4, 4, 4), ".alpha": torch.tensor(0.0)}


def _ia3(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {".weight": torch.randn(shape[0], *(1,) * (len(shape) - 1)), ".on_input": torch.tensor(False)}


def _glora(shape: tuple[int, ...]) -> dict[str, Tensor]:
    ones = (1,) * len(shape[2:])
    return {
        ".a1.weight": torch.randn(shape[1], RANK, *ones),
        ".a2.weight": torch.randn(RANK, shape[1], *ones),
        ".b1.weight": torch.randn(shape[0], RANK, *ones),
        ".b2.weight": torch.randn(RANK, shape[1], *shape[2:]),
        ".alpha": torch.tensor(1.0),
    }


def _full(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {".diff": torch.randn(shape), ".diff_b": torch.randn(shape[0])}


def _peft(make: Make, **config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = _modules(dotted("base_model.model."), make)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["to_q", "to_k", "conv"], **config}
    return tensors, {"peft_version": "0.21.2", **fields}


PEFT_PAIR = _pair(".lora_A.weight", ".lora_B.weight")


def samples() -> list[Sample]:
    """All of them."""
    unet, made = flat("lora_unet_"), []
    made.append(Sample("kohya", "kohya", _modules(unet, KOHYA_PAIR), metadata={"ss_network_dim": "2"}))
    tucker = _pair(".lora_down.weight", ".lora_up.weight", alpha=".alpha", mid=".lora_mid.weight")
    made.append(Sample("kohya-tucker", "kohya", _modules(unet, tucker)))
    dora = _with(KOHYA_PAIR, ".dora_scale", lambda s: torch.rand(s[0], *(1,) * (len(s) - 1)) + 0.5)
    made.append(Sample("kohya-dora", "kohya", _modules(unet, dora)))
    made.append(Sample("kohya-oft", "kohya", _modules(flat("oft_unet_"), _rotation)))
    for name, make in {
        "loha": _hadamard,
        "lokr": _kronecker,
        "diag-oft": _rotation,
        "ia3": _ia3,
        "glora": _glora,
        "full": _full,
    }.items():
        made.append(Sample(f"lycoris-{name}", "lycoris", _modules(unet, make)))
    made.append(Sample("lycoris-norms", "lycoris", {**_modules(unet, KOHYA_PAIR), **_norms(unet)}))
    made.append(Sample("simpletuner", "simpletuner", _modules(flat("lycoris_"), _kronecker)))
    made.append(Sample("comfyui", "comfyui", _modules(dotted("diffusion_model."), KOHYA_PAIR)))
    made.append(
        Sample(
            "ai-toolkit",
            "aitoolkit",
            _modules(dotted("diffusion_model."), PEFT_PAIR),
            metadata={"software": json.dumps({"name": "ai-toolkit"})},
        )
    )
    made.append(
        Sample(
            "onetrainer", "onetrainer", _modules(flat("lora_transformer_"), KOHYA_PAIR), metadata={"ot_revision": "1"}
        )
    )
    made.append(Sample("bare", "bare", _modules(dotted(""), PEFT_PAIR)))
    parts = {"transformer.r": RANK, "transformer.lora_alpha": 1, "transformer.peft_type": "LORA"}
    made.append(
        Sample(
            "diffusers",
            "diffusers",
            _modules(dotted("transformer."), PEFT_PAIR),
            file="pytorch_lora_weights.safetensors",
            metadata={"lora_adapter_metadata": json.dumps(parts)},
        )
    )
    tensors, config = _peft(PEFT_PAIR)
    made.append(Sample("peft", "peft", tensors, "adapter_model.safetensors", config=config))
    with_magnitude = _with(
        PEFT_PAIR, ".lora_magnitude_vector", lambda s: torch.rand(1, s[0], 1, 1) if len(s) > 2 else torch.rand(s[0])
    )
    tensors, config = _peft(with_magnitude, use_dora=True)
    made.append(Sample("peft-dora", "peft", tensors, "adapter_model.safetensors", config=config))
    tensors, config = _peft(_with(PEFT_PAIR, ".lora_B.bias", lambda s: torch.randn(s[0])), lora_bias=True)
    made.append(Sample("peft-bias", "peft", tensors, "adapter_model.safetensors", config=config))
    loralib = {k.replace(".weight", ""): v for k, v in _modules(dotted(""), PEFT_PAIR, linear_only=True).items()}
    made.append(Sample("loralib", "loralib", loralib, "lora.bin"))
    return made
