"""A tiny model and adapters of it, trained-like; what PEFT says that an adapter does, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

LINEARS = ("blocks.0.square", "blocks.0.wide", "blocks.1.square", "blocks.1.wide")


class Block(nn.Module):
    """A square linear, and one of an odd shape."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 13)


class Net(nn.Module):
    """Linears, an embedding, a convolution, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x))
        for block in self.blocks:
            h = block.square(h) + block.wide(h)[..., :8]
        return self.score(h) + self.conv(torch.ones(1, 3, 4, 4, dtype=self.conv.bias.dtype)).mean()


def net() -> Net:
    torch.manual_seed(7)
    return Net()


def write_base(path: Path) -> Path:
    save_file(net().state_dict(), path)
    return path


def trained(config: Any, seed: int, *, model: nn.Module | None = None, dtype: torch.dtype | None = None) -> PeftModel:
    """An adapter of the net of which every tensor has moved."""
    wrapped = get_peft_model(model or net(), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(p * (1 + 0.2 * noise) if "magnitude" in name else p + 0.3 * noise)
    if dtype is not None:
        wrapped = wrapped.to(dtype)
    return wrapped.eval()


def lora(path: Path, seed: int, *, dtype: torch.dtype | None = None, targets: Any = LINEARS, **config: Any) -> Path:
    """A LoRA that PEFT saved."""
    fields: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), **config}
    trained(LoraConfig(**fields), seed, dtype=dtype).save_pretrained(path)
    return path


def loaded(path: Path, **options: Any) -> PeftModel:
    """What PEFT makes of an adapter: no key may be missing or unexpected, no warning may be raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(net().double(), str(path), autocast_adapter_dtype=False, **options)
    result = model.load_adapter(str(path), "again", autocast_adapter_dtype=False)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    model.set_adapter("default")
    return model.double()


def deltas(path: Path) -> dict[str, Tensor]:
    """Module -> what PEFT adds to its weight, float64; `name.bias` -> what it adds to the bias."""
    model = loaded(path)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach()
            b = module.lora_B["default"] if hasattr(module, "lora_B") and "default" in module.lora_B else None
            if b is not None and getattr(b, "bias", None) is not None:
                found[f"{name}.bias"] = (b.bias * module.scaling["default"]).detach()
    return found


def same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], limit: float = 1e-6) -> None:
    """Equal to `limit` of each one's norm; wanted zeros may be absent."""
    assert got.keys() <= wanted.keys()
    for name, tensor in wanted.items():
        size = float(tensor.norm())
        if name not in got:
            assert size == 0, name
            continue
        assert got[name].shape == tensor.shape, name
        assert float((got[name] - tensor).norm()) <= limit * size, name


def total(parts: Mapping[Path, float]) -> dict[str, Tensor]:
    """The weighted sum of what PEFT says of each."""
    made: dict[str, Tensor] = {}
    for path, weight in parts.items():
        for name, delta in deltas(path).items():
            made[name] = made[name] + weight * delta if name in made else weight * delta
    return made
