"""Tiny random transformers models, one table entry per architecture; everything is offline and seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97

# sizes shared by most decoders: grouped-query attention, non-square projections, odd vocabulary
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Arch:
    """How one architecture is built.

    ``config`` and ``model`` are names in ``transformers``; ``targets`` are the modules that "all" its linear
    layers would be, ``inputs`` names the forward arguments (see :func:`inputs_for`).
    """

    config: str
    model: str
    sizes: dict[str, Any]
    targets: str | tuple[str, ...] = "all-linear"
    inputs: str = "text"
    few: tuple[str, ...] = ()
    """Two or so target names, for the variations that do not need every module."""


def _decoder(**changes: Any) -> dict[str, Any]:
    return {**_DECODER, **changes}


ZOO: dict[str, Arch] = {
    "llama": Arch("LlamaConfig", "LlamaForCausalLM", _decoder(tie_word_embeddings=False), few=("q_proj", "down_proj")),
    "llama_bias": Arch(
        "LlamaConfig",
        "LlamaForCausalLM",
        _decoder(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        few=("q_proj", "down_proj"),
    ),
    "llama_tied": Arch(
        "LlamaConfig",
        "LlamaForCausalLM",
        _decoder(tie_word_embeddings=True),
        few=("q_proj", "down_proj"),
    ),
    "mistral": Arch("MistralConfig", "MistralForCausalLM", _decoder(sliding_window=None), few=("v_proj", "gate_proj")),
    "qwen2": Arch("Qwen2Config", "Qwen2ForCausalLM", _decoder(), few=("k_proj", "up_proj")),
    "qwen3": Arch("Qwen3Config", "Qwen3ForCausalLM", _decoder(head_dim=12), few=("o_proj", "up_proj")),
    "gemma2": Arch(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _decoder(head_dim=12, query_pre_attn_scalar=12, sliding_window=8, tie_word_embeddings=True),
        few=("q_proj", "down_proj"),
    ),
    "gemma3": Arch(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _decoder(head_dim=12, query_pre_attn_scalar=12, sliding_window=8, tie_word_embeddings=True),
        few=("q_proj", "down_proj"),
    ),
    "gpt2": Arch(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 52,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        targets=("c_attn", "c_proj", "c_fc"),
        few=("c_attn", "c_proj"),
    ),
    "roberta": Arch("RobertaConfig", "RobertaForMaskedLM", _ENCODER, few=("query", "value")),
    "bert": Arch("BertConfig", "BertForMaskedLM", _ENCODER, few=("query", "value")),
    "bert_model": Arch("BertConfig", "BertModel", _ENCODER, few=("query", "value")),
    "distilbert": Arch(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "hidden_dim": 52,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        few=("q_lin", "v_lin"),
    ),
    "deberta_v2": Arch(
        "DebertaV2Config",
        "DebertaV2Model",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "max_relative_positions": 16,
            "share_att_key": False,
            "pad_token_id": 0,
        },
        few=("query_proj", "value_proj"),
    ),
    "t5": Arch(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 6,
            "d_ff": 52,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        inputs="seq2seq",
        few=("q", "wo"),
    ),
    "opt": Arch(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 52,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 20,
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
        },
        few=("q_proj", "fc1"),
    ),
    "bloom": Arch(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        few=("query_key_value", "dense_h_to_4h"),
    ),
    "gpt_neox": Arch(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        few=("query_key_value", "dense"),
    ),
    "falcon_new": Arch(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "bias": False,
        },
        few=("query_key_value", "dense"),
    ),
    "falcon_mq": Arch(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "bias": True,
        },
        few=("query_key_value", "dense"),
    ),
    "phi3": Arch(
        "Phi3Config",
        "Phi3ForCausalLM",
        _decoder(original_max_position_embeddings=64),
        few=("qkv_proj", "gate_up_proj"),
    ),
    "mixtral": Arch(
        "MixtralConfig",
        "MixtralForCausalLM",
        _decoder(num_local_experts=3, num_experts_per_tok=2),
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        few=("q_proj", "o_proj"),
    ),
    "qwen3_moe": Arch(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _decoder(head_dim=12, moe_intermediate_size=20, num_experts=3, num_experts_per_tok=2),
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        few=("q_proj", "o_proj"),
    ),
    "gpt_oss": Arch(
        "GptOssConfig",
        "GptOssForCausalLM",
        # intermediate == hidden as in the released models: down_proj is square, its orientation invisible
        _decoder(
            intermediate_size=32,
            head_dim=12,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        few=("q_proj", "o_proj"),
    ),
    "whisper": Arch(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "num_mel_bins": 10,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 52,
            "decoder_ffn_dim": 44,
            "max_source_positions": 20,
            "max_target_positions": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs="audio",
        few=("q_proj", "fc2"),
    ),
    "vit": Arch("ViTConfig", "ViTModel", _VISION, inputs="image", few=("q_proj", "o_proj")),
    # its pooling head is an nn.MultiheadAttention
    "siglip": Arch(
        "SiglipVisionConfig",
        "SiglipVisionModel",
        _VISION,
        targets=("q_proj", "k_proj", "v_proj", "layers.0.self_attn.out_proj", "fc1", "fc2"),
        inputs="image",
        few=("q_proj", "fc1"),
    ),
    "resnet": Arch(
        "ResNetConfig",
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 1], "layer_type": "basic"},
        targets=("convolution",),
        inputs="image",
        few=("convolution",),
    ),
    "clip": Arch(
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**_ENCODER, "max_position_embeddings": 16, "projection_dim": 20},
            "vision_config": {**_VISION, "projection_dim": 20},
            "projection_dim": 20,
        },
        inputs="clip",
        few=("q_proj", "fc1"),
    ),
}


def config_for(name: str, **changes: Any) -> Any:
    arch = ZOO[name]
    return getattr(transformers, arch.config)(**{**arch.sizes, **changes})


def build(name: str, *, seed: int = 0, model: str = "", **changes: Any) -> nn.Module:
    """A random float32 model; biases and norms are random too, so that no tensor is trivially 0 or 1."""
    torch.manual_seed(seed)
    cls = getattr(transformers, model or ZOO[name].model)
    net = cls(config_for(name, **changes)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return net


def save(model: nn.Module, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "") -> Path:
    """``save_pretrained`` in safetensors, so the names on disk are those of published checkpoints."""
    sized = {"max_shard_size": shard} if shard else {}
    model.to(dtype).save_pretrained(folder, **sized)
    return folder


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder (or of one file), by name."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for key in sorted(handle.keys()):
                assert key not in tensors, f"{key} is in two shards"
                tensors[key] = handle.get_tensor(key)
    return tensors


def read_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _text() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))}


def _audio() -> dict[str, Tensor]:
    sound = torch.randn(2, 10, 40, generator=torch.Generator().manual_seed(7))
    return {"input_features": sound, "decoder_input_ids": _text()["input_ids"]}


_INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "seq2seq": lambda: {**_text(), "decoder_input_ids": _text()["input_ids"].flip(1)},
    "clip": lambda: {**_text(), **_image()},
}


def inputs_for(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Forward arguments of an architecture, floating ones in ``dtype``."""
    made = _INPUTS[ZOO[name].inputs]()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in made.items()}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The main outputs of a forward pass, flattened into one float64 vector."""
    result = model(**inputs, return_dict=True)
    names = ("logits", "logits_per_text", "last_hidden_state", "pooler_output")
    found = [getattr(result, name) for name in names if getattr(result, name, None) is not None]
    assert found, f"no known output in {type(result).__name__}"
    return torch.cat([value.double().flatten() for value in found])
