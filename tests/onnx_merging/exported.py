"""Tiny random models of transformers, exported by torch's two exporters, with PEFT adapters that are not zero."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

C = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (config class, its arguments, model class, modules to train)
MODELS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "llama": ("LlamaConfig", {**C, "num_key_value_heads": 2}, "LlamaForCausalLM", LLAMA),
    "llama-tied": (
        "LlamaConfig",
        {**C, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "LlamaForCausalLM",
        LLAMA,
    ),
    "qwen3": ("Qwen3Config", {**C, "num_key_value_heads": 2, "head_dim": 8}, "Qwen3ForCausalLM", LLAMA),
    "gemma3": ("Gemma3TextConfig", {**C, "num_key_value_heads": 2, "head_dim": 8}, "Gemma3ForCausalLM", LLAMA),
    "phi3": (
        "Phi3Config",
        {**C, "num_key_value_heads": 2, "pad_token_id": 0},
        "Phi3ForCausalLM",
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "GPT2LMHeadModel",
        ["c_attn", "c_proj", "c_fc"],
    ),
    "bert": ("BertConfig", C, "BertForSequenceClassification", ["query", "key", "value", "dense", "word_embeddings"]),
    "roberta": ("RobertaConfig", C, "RobertaForSequenceClassification", ["query", "value", "dense"]),
    "deberta": (
        "DebertaV2Config",
        {
            **C,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 16,
            "max_relative_positions": -1,
        },
        "DebertaV2ForSequenceClassification",
        ["query_proj", "key_proj", "value_proj", "dense"],
    ),
    "vit": (
        "ViTConfig",
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
        },
        "ViTForImageClassification",
        ["q_proj", "v_proj", "fc1", "fc2"],
    ),
    "t5": (
        "T5Config",
        {
            "vocab_size": 61,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        "T5ForConditionalGeneration",
        ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    ),
}


class Logits(torch.nn.Module):
    """Two tensors in, logits out, whatever the model."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.m = model
        self.name = name

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.name == "vit":
            return self.m(pixel_values=x).logits
        if self.name == "t5":
            return self.m(input_ids=x, decoder_input_ids=y).logits
        more = {} if self.name in ("bert", "roberta", "deberta") else {"use_cache": False}
        return self.m(input_ids=x, attention_mask=y, **more).logits


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(5)
    if name == "vit":
        return torch.randn(2, 3, 16, 16, generator=made), torch.ones(2)
    if name == "t5":
        return torch.randint(0, 61, (2, 9), generator=made), torch.randint(0, 61, (2, 5), generator=made)
    return torch.randint(3, 61, (2, 9), generator=made), torch.ones(2, 9, dtype=torch.long)


def base(name: str, folder: Path) -> torch.nn.Module:
    """The model, saved into a folder. No parameter is a constant: exporters join what is equal."""
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    config_class, arguments, model_class, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def export(model: torch.nn.Module, name: str, how: str, path: Path) -> Path:
    """`ts`: the exporter of TorchScript; `opt`: today's; `raw`: today's without optimising, its weights beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = Logits(model, name).eval()
    names = {"input_names": ["x", "y"], "output_names": ["logits"]}
    if how == "ts":
        torch.onnx.export(wrapped, inputs(name), str(path), dynamo=False, opset_version=17, **names)
    else:
        raw = how == "raw"
        torch.onnx.export(
            wrapped, inputs(name), str(path), dynamo=True, optimize=not raw, external_data=raw, verbose=False, **names
        )
    return path


def anonymised(source: Path, path: Path) -> Path:
    """The same graph without a name that means anything, as some optimisers leave it."""
    made = onnx.load(str(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {t.name: f"onnx::MatMul_{i}" for i, t in enumerate(made.graph.initializer)}
    for tensor in made.graph.initializer:
        tensor.name = names[tensor.name]
    for i, node in enumerate(made.graph.node):
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)
        node.name = f"n{i}"
        del node.metadata_props[:]
    del made.graph.value_info[:]
    onnx.save(made, str(path))
    return path


def adapted(model: torch.nn.Module, name: str, folder: Path) -> np.ndarray[Any, Any]:
    """Saves an adapter of random numbers; the logits of the model with it, unmerged."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODELS[name][3], fan_in_fan_out=name == "gpt2")
    trained = peft.get_peft_model(model, config).eval()
    for key, parameter in trained.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(folder)
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = Logits(trained.base_model.model, name)(*inputs(name)).numpy()
    return logits


def run(path: Path, name: str) -> np.ndarray[Any, Any]:
    """The logits in onnxruntime, after `onnx.checker` has seen the model."""
    import onnxruntime as ort

    onnx.checker.check_model(str(path), full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    feeds = {n: t.numpy() for n, t in zip(("x", "y"), inputs(name), strict=True) if n in wanted}
    logits: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return logits
