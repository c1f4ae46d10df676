"""Adapters whose names or fusions are not those of their base, against transformers' own modelling and loading code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft_oracle import check, expected, load_model, save_adapter, train_like, with_adapter, write_adapter
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import VOCAB, build, inputs_for, outputs, read_json, read_tensors, save

import loramerge as lm

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK


def random_pair(out: int, width: int, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Trained-looking A (r, in) and B (out, r)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator) * 0.2, torch.randn(out, rank, generator=generator) * 0.2


def lora(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int = RANK) -> dict[str, Tensor]:
    """Writes a PEFT adapter for modules of these (out, in) and returns their changes in float64."""
    factors, deltas = {}, {}
    for i, (module, (out, width)) in enumerate(shapes.items()):
        A, B = random_pair(out, width, 31 * i + out, rank)
        factors[f"base_model.model.{module}.lora_A.weight"] = A
        factors[f"base_model.model.{module}.lora_B.weight"] = B
        deltas[module] = ALPHA / rank * (B.double() @ A.double())
    write_adapter(folder, factors, r=rank, lora_alpha=ALPHA)
    return deltas


def close(got: Tensor, wanted: Tensor, name: str = "") -> None:
    limit = 2e-6 * wanted.abs().max().item()
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)}, not {tuple(wanted.shape)}"
    worst = (got.double() - wanted.double()).abs().max().item()
    assert worst <= limit, f"{name}: off by {worst:.3g}, largest value {wanted.abs().max().item():.3g}"


# --- fused projections: what q, k and v of the model's own code become --------------------------------


@dataclass
class Fused:
    """A model whose q, k and v are one weight."""

    arch: str
    module: str
    """The fused module of layer 0."""
    parent: str
    probe: Callable[[nn.Module], dict[str, Tensor]]
    """Where the split q, k, v of layer 0 will be found after a forward pass."""
    sizes: dict[str, Any] = field(default_factory=dict)


def _attention_interface(model: nn.Module) -> dict[str, Tensor]:
    """Records the arguments of the attention function; with one token rotary positions change nothing."""
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            seen.setdefault(name, tensor.transpose(1, 2).reshape(-1))
        return torch.zeros_like(query.transpose(1, 2)), None

    transformers.AttentionInterface.register("record", record)
    model.set_attn_implementation("record")
    return seen


def _splitting_method(name: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Records what the attention's own splitting method returns, broadcast heads once."""

    def probe(model: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        module = next(m for m in model.modules() if hasattr(m, name))
        split = getattr(module, name)

        def record(fused: Tensor) -> Any:
            parts = split(fused)
            for part, tensor in zip("qkv", parts, strict=True):
                flat = tensor.reshape(-1, tensor.shape[-1])
                kept = [flat[0], *(b for a, b in pairwise(flat) if not torch.equal(a, b))]
                seen.setdefault(part, torch.cat(kept))
            return parts

        setattr(module, name, record)
        return seen

    return probe


FUSED = {
    "phi3": Fused("phi3", "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn", _attention_interface),
    "gpt2": Fused("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.attn", _attention_interface),
    "neox": Fused(
        "gpt_neox", "gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention", _attention_interface
    ),
    "bloom": Fused(
        "bloom",
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention",
        _splitting_method("_reshape"),
    ),
    "falcon-new": Fused(
        "falcon_new",
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention",
        _splitting_method("_split_heads"),
    ),
    "falcon-mq": Fused(
        "falcon_mq",
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention",
        _splitting_method("_split_heads"),
    ),
    "falcon-old": Fused(
        "falcon_mq",
        "transformer.h.0.self_attention.query_key_value",
        "transformer.h.0.self_attention",
        _splitting_method("_split_heads"),
        {"multi_query": False},
    ),
}


def _split_outputs(case: Fused, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The input of layer 0's fused module and the q, k, v that the model makes of its output, in float64."""
    model = build(case.arch, **case.sizes).double().eval()
    state = model.state_dict()
    missing = [n for n in state if n not in tensors]
    assert all("lm_head" in n or "embed_out" in n for n in missing), missing
    model.load_state_dict({n: t.double() for n, t in tensors.items()}, strict=False)
    seen = case.probe(model)
    module = model.get_submodule(case.module)
    inputs: list[Tensor] = []
    module.register_forward_hook(lambda _, args, __: inputs.append(args[0].reshape(-1)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    return inputs[0], seen


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("name", FUSED)
def test_split_adapter_changes_the_q_k_v_of_a_fused_model(name: str, rank: int, tmp_path: Path) -> None:
    case = FUSED[name]
    base = save(build(case.arch, **case.sizes), tmp_path / "base")
    tensors = read_tensors(base)
    h, before = _split_outputs(case, tensors)
    modules = {f"{case.parent}.{p}_proj": (before[p].numel(), h.numel()) for p in "qkv"}
    deltas = lora(tmp_path / "adapter", modules, rank)
    merged = lm.merge_tensors(tensors, tmp_path / "adapter", config=read_json(base))
    h_after, after = _split_outputs(case, merged)
    assert torch.equal(h, h_after)
    for part in "qkv":
        close(after[part] - before[part], deltas[f"{case.parent}.{part}_proj"] @ h, part)
    changed = [n for n in tensors if not torch.equal(tensors[n], merged[n])]
    assert changed == [f"{case.module}.weight"]


@pytest.mark.parametrize("name", ["gpt2", "falcon-new", "neox"])
def test_split_adapter_on_disk_is_merged_as_in_memory(name: str, tmp_path: Path) -> None:
    case = FUSED[name]
    base = save(build(case.arch, **case.sizes), tmp_path / "base", dtype=torch.bfloat16)
    h, before = _split_outputs(case, read_tensors(base))
    lora(tmp_path / "adapter", {f"{case.parent}.{p}_proj": (before[p].numel(), h.numel()) for p in "qv"})
    lm.merge(base, {tmp_path / "adapter": 0.5}, tmp_path / "out")
    wanted = lm.merge_tensors(read_tensors(base), {tmp_path / "adapter": 0.5}, config=read_json(base))
    got = read_tensors(tmp_path / "out")
    assert all(torch.equal(got[n], wanted[n]) for n in got)


# --- Phi-3 and its Llama form: the same function in two fusions ----------------------------------------


def _llama_of(phi: Path, folder: Path) -> Path:
    """The checkpoint of Phi-3 as one of Llama: rows as Phi3Attention and Phi3MLP take them (modeling_phi3.py)."""
    config, tensors = read_json(phi), {}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    for name, tensor in read_tensors(phi).items():
        if "qkv_proj" in name:
            parts = tensor.split([heads * size, groups * size, groups * size])
            split = dict(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True))
            tensors |= {name.replace("qkv_proj", p): t.contiguous() for p, t in split.items()}
        elif "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            tensors[name.replace("gate_up_proj", "gate_proj")] = gate.contiguous()
            tensors[name.replace("gate_up_proj", "up_proj")] = up.contiguous()
        else:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = {k: v for k, v in config.items() if not k.startswith(("rope_scaling", "sliding", "auto_map"))}
    kept |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": size}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def two_forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("forms")
    phi = save(build("phi3"), root / "phi")
    llama = _llama_of(phi, root / "llama")
    inputs = inputs_for("phi3")
    a, b = outputs(load_model(phi, "Phi3ForCausalLM"), inputs), outputs(load_model(llama, "LlamaForCausalLM"), inputs)
    close(a, b, "the two forms are one function")
    return phi, llama


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("direction", ["split-on-fused", "fused-on-split"])
def test_adapter_of_the_other_form_gives_the_trained_function(
    two_forms: tuple[Path, Path], direction: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trained, base = two_forms if direction == "fused-on-split" else two_forms[::-1]
    classes = {two_forms[0]: "Phi3ForCausalLM", two_forms[1]: "LlamaForCausalLM"}
    model = load_model(trained, classes[trained], torch.float32)
    config = LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", **options)
    adapter = save_adapter(train_like(model, config, seed=3), tmp_path / "adapter")
    inputs = inputs_for("phi3")
    wanted = outputs(with_adapter(load_model(trained, classes[trained]), adapter), inputs)
    before = outputs(load_model(base, classes[base]), inputs)
    lm.merge(base, adapter, tmp_path / "out")
    got = outputs(load_model(tmp_path / "out", classes[base]), inputs)
    assert (wanted - before).abs().max() > 1e-2
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# --- names: every module under the names of disk and of memory, transformers' loading is the truth --------


_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_MOE: dict[str, Any] = {**_TEXT, "num_experts_per_tok": 2}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

# config class, model class, sizes
TYPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", _SIGHT),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2Model", {**_SIGHT, "use_swiglu_ffn": True}),
    "swin": (
        "SwinConfig",
        "SwinModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 12],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 10,
        },
    ),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_SIGHT, "projection_dim": 20},
            "image_token_index": 9,
        },
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma3_text", **_TEXT, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGHT},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _MROPE},
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 20,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_TEXT, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_MOE, "num_local_experts": 3}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {**_MOE, "num_local_experts": 3, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_MOE, "num_experts": 3, "moe_intermediate_size": 20, "head_dim": 12},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**_MOE, "num_experts": 3}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {**_MOE, "num_local_experts": 3}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **_MOE,
            "num_hidden_layers": 2,
            "num_experts": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **_MOE,
                "num_experts": 3,
                "moe_intermediate_size": 20,
                "head_dim": 8,
                "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 20,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
    ),
    "aria": (
        "AriaConfig",
        "AriaForConditionalGeneration",
        {
            "text_config": {**_TEXT, "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGHT},
            "projector_patch_to_query_dict": {16: 4},
        },
    ),
    "paligemma": (
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **_TEXT, "head_dim": 8},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGHT},
            "projection_dim": 32,
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **_SIGHT},
        },
    ),
    "qwen2_audio": (
        "Qwen2AudioConfig",
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 20,
                "max_source_positions": 10,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 0,
            "q_lora_rank": 6,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            **_MOE,
            "num_hidden_layers": 2,
            "num_experts": 3,
            "moe_intermediate_size": 20,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            **_MOE,
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": 3,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 12,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 4,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {**_MOE, "num_local_experts": 3, "head_dim": 8, "layer_types": ["full_attention"]},
    ),
    "beit": ("BeitConfig", "BeitModel", _SIGHT),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Config", "JinaEmbeddingsV3Model", {**_TEXT, "type_vocab_size": 1}),
    "gte": ("GteConfig", "GteModel", {**_TEXT, "num_key_value_heads": 4, "type_vocab_size": 1}),
    "conditional_detr": (
        "ConditionalDetrConfig",
        "ConditionalDetrModel",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
        },
    ),
    "nomic_bert": ("NomicBertConfig", "NomicBertModel", {**_TEXT, "num_key_value_heads": 4}),
    "detr": (
        "DetrConfig",
        "DetrModel",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Both:
    """One random model under both sets of names."""

    folder: Path
    cls: str
    disk: dict[str, Tensor]
    memory: dict[str, Tensor]
    linears: dict[str, tuple[int, int]]
    """Modules in memory that are linears."""

    def loaded(self, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """What transformers makes of a checkpoint: its state dict."""
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((self.folder / "config.json").read_bytes())
        model, info = getattr(transformers, self.cls).from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not info["unexpected_keys"] and not info["missing_keys"], info
        return dict(model.state_dict())


@pytest.fixture(scope="module", params=TYPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    config_cls, cls, sizes = TYPES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config_cls)(**sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    linears = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    return Both(folder, cls, read_tensors(folder), dict(model.state_dict()), linears)


def test_adapter_with_names_of_memory_on_a_base_with_names_of_disk(both: Both, tmp_path: Path) -> None:
    deltas = lora(tmp_path / "adapter", both.linears)
    merged = lm.merge_tensors(both.disk, tmp_path / "adapter", config=read_json(both.folder))
    assert merged.keys() == both.disk.keys()
    state = both.loaded(merged, tmp_path / "out")
    for name, tensor in both.memory.items():
        delta = deltas.get(name.removesuffix(".weight"))
        close(state[name], tensor.double() if delta is None else tensor.double() + delta, name)


def test_adapter_with_names_of_disk_on_a_base_with_names_of_memory(both: Both, tmp_path: Path) -> None:
    known = {n.removesuffix(".weight"): t for n, t in both.disk.items() if n.endswith(".weight") and t.ndim == 2}
    embeddings = ("embed", "lm_head", "position", "wte", "query_pos")
    shapes = {n: (t.shape[0], t.shape[1]) for n, t in known.items() if not any(e in n for e in embeddings)}
    deltas = lora(tmp_path / "adapter", shapes)
    truth = {n: t.double() + deltas.get(n.removesuffix(".weight"), 0) for n, t in both.disk.items()}
    wanted = both.loaded({n: t.float() for n, t in truth.items()}, tmp_path / "truth")
    merged = lm.merge_tensors(both.memory, tmp_path / "adapter", config=read_json(both.folder))
    assert merged.keys() == both.memory.keys()
    assert sum(not torch.equal(wanted[n], t) for n, t in both.memory.items()) >= 3
    for name, tensor in merged.items():
        close(tensor, wanted[name], name)


# --- experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["granitemoe", "qwen3_vl_moe", "qwen3_moe", "phimoe"])
def test_stacked_adapter_of_experts_on_the_layout_of_disk(kind: str, tmp_path: Path) -> None:
    """PEFT trains the stacks of memory; on disk they are renamed, transposed or unstacked."""
    config_cls, cls, sizes = TYPES[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config_cls)(**sizes)).eval()
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    adapter = save_adapter(train_like(load_model(base, cls, torch.float32), config, seed=5), tmp_path / "adapter")
    truth = expected(base, {adapter: 1.0}, cls)
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)


@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
def test_stacked_linear_of_older_granite(memory: bool, tmp_path: Path) -> None:
    """Up to transformers 4 the stacks were modules of their own: `target_parameters=["input_linear.weight", ...]`."""
    experts, hidden, inner, rank = 3, 8, 6, 2
    block = "model.layers.0.block_sparse_moe"
    stored = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
    shapes = {"input_linear.weight": (experts, 2 * inner, hidden), "output_linear.weight": (experts, hidden, inner)}
    base, factors, truth = {}, {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        key = f"{block}.{stored[name] if memory else name}"
        base[key] = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        A, B = random_pair(shape[1], shape[2], i, experts * rank)
        module = name.removesuffix(".weight")
        factors[f"base_model.model.{block}.{module}.lora_A.weight"] = A
        factors[f"base_model.model.{block}.{module}.lora_B.weight"] = B
        A3, B3 = A.double().view(experts, rank, -1), B.double().view(-1, rank, experts)
        truth[key] = base[key].double() + 2.5 * torch.einsum("bre,era->eba", B3, A3)
    write_adapter(tmp_path / "a", factors, r=rank, lora_alpha=5, target_parameters=list(shapes), peft_version="0.19.1")
    merged = lm.merge_tensors(base, tmp_path / "a", config={"model_type": "granitemoe"})
    for key, wanted in truth.items():
        close(merged[key], wanted, key)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "qwen3_vl_moe"])
def test_adapter_of_single_experts_on_a_transposed_stack(kind: str, tmp_path: Path) -> None:
    """gate and up as the modelling code takes them: gpt_oss `[..., ::2]`, the others `chunk(2, dim=-1)`."""
    experts, hidden, inner = 3, 8, 6
    block = "model.layers.0.feed_forward" if kind == "llama4" else "model.layers.0.mlp"
    generator = torch.Generator().manual_seed(2)
    base = {
        f"{block}.experts.gate_up_proj": torch.randn(experts, hidden, 2 * inner, generator=generator),
        f"{block}.experts.down_proj": torch.randn(experts, inner, hidden, generator=generator),
    }
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    deltas = lora(tmp_path / "a", {f"{block}.experts.{e}.{n}": s for e in (0, 2) for n, s in sizes.items()})
    merged = lm.merge_tensors(base, tmp_path / "a", config={"model_type": kind})
    gate_up, down = (t.double().clone() for t in base.values())
    for e in (0, 2):
        gate, up = (gate_up[e, :, ::2], gate_up[e, :, 1::2]) if kind == "gpt_oss" else gate_up[e].chunk(2, dim=-1)
        gate += deltas[f"{block}.experts.{e}.gate_proj"].T
        up += deltas[f"{block}.experts.{e}.up_proj"].T
        down[e] += deltas[f"{block}.experts.{e}.down_proj"].T
    close(merged[f"{block}.experts.gate_up_proj"], gate_up, "gate_up_proj")
    close(merged[f"{block}.experts.down_proj"], down, "down_proj")
    assert torch.equal(merged[f"{block}.experts.down_proj"][1], base[f"{block}.experts.down_proj"][1])


def test_gpt_oss_experts_compute_what_single_experts_would(tmp_path: Path) -> None:
    """The model's own experts on merged weights against gate, up and down of one expert written out."""
    model = build("gpt_oss").double()
    experts = model.model.layers[0].mlp.experts
    prefix, e = "model.layers.0.mlp.experts", 1
    sizes = {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}
    deltas = lora(tmp_path / "a", {f"{prefix}.{e}.{n}": s for n, s in sizes.items()})
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = {n: getattr(experts, n)[e].detach().clone() for n in ("gate_up_proj", "gate_up_proj_bias")}
    down, down_bias = experts.down_proj[e].detach().clone(), experts.down_proj_bias[e].detach().clone()
    both = x @ weights["gate_up_proj"] + weights["gate_up_proj_bias"]
    gate = both[:, ::2] + x @ deltas[f"{prefix}.{e}.gate_proj"].T
    up = both[:, 1::2] + x @ deltas[f"{prefix}.{e}.up_proj"].T
    gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    wanted = inner @ (down + deltas[f"{prefix}.{e}.down_proj"].T) + down_bias
    state = lm.merge_tensors(
        model.state_dict(), tmp_path / "a", config={"model_type": "gpt_oss"}, compute_dtype="float64"
    )
    model.load_state_dict(state)
    chosen, ones = torch.full((5, 1), e), torch.ones(5, 1, dtype=torch.float64)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        close(experts(x, chosen, ones), wanted, "experts")
