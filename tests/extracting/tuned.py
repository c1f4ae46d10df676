"""Tiny checkpoints of real architectures and fine-tunes of them, for the tests of extraction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

torch.set_num_threads(1)

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "tied": (
        "LlamaForCausalLM",
        {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_positions": 24}),
    "bert": ("BertModel", {**SIZES, "intermediate_size": 40, "max_position_embeddings": 24}),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        {**SIZES, "intermediate_size": 40, "max_position_embeddings": 24, "num_labels": 3},
    ),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 3,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"},
    ),
}

EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM",
        {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            **SIZES,
            "intermediate_size": 40,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {
            **SIZES,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_key_value_heads": 2,
            "num_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **SIZES,
            "intermediate_size": 32,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}

Change = Callable[[str, Tensor], Tensor]


def make(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(seed)
    model = new(name).to(dtype)
    model.save_pretrained(folder)
    return folder


def new(name: str) -> nn.Module:
    """A model of this architecture, as its library makes it; biases and norms are made uneven."""
    class_name, fields = (CONFIGS | EXPERTS)[name]
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def load(folder: Path, **options: Any) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32, **options).eval()


def dense(name: str, value: Tensor) -> Tensor:
    """A change of full rank, with a falling spectrum."""
    step = torch.randn_like(value) * 0.02
    if value.dim() < 2:
        return step
    flat = step.flatten(1)
    low = torch.randn(flat.shape[0], 4) @ torch.randn(4, flat.shape[1])
    return step + 0.05 * low.view_as(value)


def low_rank(rank: int) -> Change:
    """A change of this rank in every weight; none elsewhere."""

    def change(name: str, value: Tensor) -> Tensor:
        if value.dim() < 2:
            return torch.zeros_like(value)
        flat = value.flatten(1)
        low = torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])
        return 0.05 * low.view_as(value)

    return change


def tune(
    base: Path, folder: Path, change: Change = dense, only: Callable[[str], bool] = lambda name: True, seed: int = 1
) -> Path:
    """The same checkpoint with changed tensors, file by file."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        torch.manual_seed(seed)
        for name in sorted(tensors):
            value = tensors[name]
            if value.is_floating_point() and only(name):
                tensors[name] = (value.float() + change(name, value.float())).to(value.dtype).contiguous()
        save_file(tensors, folder / path.name, {"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def with_peft(base: Path | nn.Module, adapter: Path) -> PeftModel:
    """The base with the adapter beside it, as PEFT loads it; every key of the file has a place, no place is left."""
    model = load(base) if isinstance(base, Path) else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(model, adapter)
        result = set_peft_model_state_dict(loaded, load_peft_weights(adapter, device="cpu"))
    own = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert not own and not result.unexpected_keys, (own, result.unexpected_keys)
    return loaded.eval()


def outputs(model: nn.Module, name: str, vocabulary: int = 48) -> Tensor:
    """What a model says to fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    inputs: Mapping[str, Tensor]
    if name in ("vit", "resnet"):
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, vocabulary, (2, 9), generator=generator)}
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if hasattr(found, "logits") else torch.cat([found.last_hidden_state[:, 0], found.pooler_output])
