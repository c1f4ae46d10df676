"""Adapters of language models: row orders of rotary projections, names of other tools, one rank and one alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import MismatchError, UnsupportedError

HEADS, KV_HEADS, SIZE, VOCABULARY = 4, 2, 4, 11
WIDTH = HEADS * SIZE
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
}
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_HEADS * SIZE, WIDTH),
    "self_attn.v_proj": (KV_HEADS * SIZE, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (24, WIDTH),
    "mlp.down_proj": (WIDTH, 24),
}


def model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {f"model.layers.{n}.{m}.weight": torch.randn(s) for n in range(2) for m, s in SHAPES.items()}
    return {"model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH), **state}


def write_base(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    save_file(model(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def write_adapter(folder: Path, dora: bool = False, embedding: bool = False) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for i, name in enumerate(n for n in model() if "embed" not in n):
        path, shape, r = name.removesuffix(".weight"), model()[name].shape, i % 3 + 1
        head = f"base_model.model.{path}"
        tensors[f"{head}.lora_A.weight"] = torch.randn(r, shape[1], generator=generator)
        tensors[f"{head}.lora_B.weight"] = torch.randn(shape[0], r, generator=generator)
        if dora:
            tensors[f"{head}.lora_magnitude_vector"] = torch.rand(shape[0], generator=generator) + 1
        ranks[path], alphas[path] = r, float(i % 4 + 1)
    targets = [m.rpartition(".")[2] for m in SHAPES]
    if embedding:
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(2, VOCABULARY)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(WIDTH, 2)
        ranks["model.embed_tokens"], alphas["model.embed_tokens"] = 2, 5
        targets.append("embed_tokens")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "use_dora": dora}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changes(adapter: Path, **config: Any) -> dict[str, Tensor]:
    state = {name: tensor.double() for name, tensor in model().items()}
    options: dict[str, Any] = {"compute_dtype": "float64", "allow_pickle": True, "config": {**CONFIG, **config}}
    merged = lm.merge_tensors(state, adapter, **options)
    return {name: merged[name] - state[name] for name in state}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], limit: float = 1e-6) -> None:
    assert a.keys() == b.keys() and any(bool(t.any()) for t in a.values())
    for name in a:
        assert float((a[name] - b[name]).norm()) <= limit * max(float(a[name].norm()), 1e-12), name


CASES = [
    ("mlx", "out", False, True),
    ("mlx", "out", True, False),
    ("torchtune", "out", False, False),
    ("torchtune", "out", True, False),
    ("llama.cpp", "out.gguf", False, True),
]


@pytest.mark.parametrize(("target", "out", "dora", "embedding"), CASES)
def test_there_and_back_changes_nothing(tmp_path: Path, target: str, out: str, dora: bool, embedding: bool) -> None:
    base = write_base(tmp_path / "base")
    source = write_adapter(tmp_path / "source", dora, embedding)
    wanted = changes(source)
    assert wanted["model.embed_tokens.weight"].any() == embedding
    report = lm.convert(source, tmp_path / out, target, base=base)
    assert report["approximated"] == 0
    same(changes(tmp_path / out), wanted, 2e-6)
    lm.convert(tmp_path / out, tmp_path / "back", "peft", base=base, allow_pickle=True)
    same(changes(tmp_path / "back"), wanted, 2e-6)
    names = set(load_file(source / "adapter_model.safetensors"))
    assert set(load_file(tmp_path / "back" / "adapter_model.safetensors")) == names


def permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp, conversion/llama.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def test_gguf_holds_what_llama_cpp_expects(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base, source = write_base(tmp_path / "base"), write_adapter(tmp_path / "source", embedding=True)
    lm.convert(source, tmp_path / "out.gguf", "GGUF", base=base)  # as people call it
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    alpha = fields.pop("adapter.lora.alpha")
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    held = {t.name: torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    wanted = changes(source)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    for theirs, ours in names.items():
        a, b = (held[f"blk.1.{theirs}.weight.lora_{x}"] for x in "ab")
        delta = wanted[f"model.layers.1.{ours}.weight"]
        if theirs != "ffn_down":
            delta = permuted(delta, HEADS if theirs == "attn_q" else KV_HEADS)
        same({"": alpha / b.shape[1] * b @ a}, {"": delta})
    a, b = held["token_embd.weight.lora_a"], held["token_embd.weight.lora_b"]
    same({"": alpha / b.shape[1] * a @ b.T}, {"": wanted["model.embed_tokens.weight"]})


def test_mlx_gets_its_config_and_turned_factors(tmp_path: Path) -> None:
    base, source = write_base(tmp_path / "base"), write_adapter(tmp_path / "source", embedding=True)
    lm.convert(source, tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    parameters = config["lora_parameters"]
    assert parameters["keys"] == sorted([*SHAPES, "model.embed_tokens"]) and parameters["rank"] == 3
    held = {k: t.double() for k, t in load_file(tmp_path / "out" / "adapters.safetensors").items()}
    assert {min(t.shape) for t in held.values()} == {3}
    for name, delta in changes(source).items():
        a, b = (held[f"{name.removesuffix('.weight')}.lora_{x}"] for x in "ab")
        product = a @ b if "embed" in name else b.T @ a.T
        same({"": parameters["scale"] * product}, {"": delta})
    assert base.exists()


def test_torchtune_rows_are_those_of_meta(tmp_path: Path) -> None:
    base, source = write_base(tmp_path / "base"), write_adapter(tmp_path / "source")
    lm.convert(source, tmp_path / "out", "torchtune", base=base)
    held = {k: t.double() for k, t in torch.load(tmp_path / "out" / "adapter_model.pt", weights_only=True).items()}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for ours, theirs, heads in (("q_proj", "attn.q_proj", HEADS), ("k_proj", "attn.k_proj", KV_HEADS)):
        delta = changes(source)[f"model.layers.0.self_attn.{ours}.weight"]
        a, b = (held[f"layers.0.{theirs}.lora_{x}.weight"] for x in "ab")
        same({"": scale * b @ a}, {"": permuted(delta, heads)})


@pytest.mark.parametrize("target", ["torchtune", "llama.cpp"])
def test_row_orders_need_the_base(tmp_path: Path, target: str) -> None:
    source, base = write_adapter(tmp_path / "source"), write_base(tmp_path / "base")
    out = tmp_path / ("out.gguf" if target == "llama.cpp" else "out")
    with pytest.raises(MismatchError) as caught:
        lm.convert(source, out, target)
    assert caught.value.code == "convert.needs-base"
    lm.convert(source, out, target, base=base)
    with pytest.raises(MismatchError) as caught:
        lm.convert(out, tmp_path / "back", "peft", allow_pickle=True)
    assert caught.value.code == "convert.needs-base"


def test_architectures_that_are_not_known_are_refused(tmp_path: Path) -> None:
    source, base = write_adapter(tmp_path / "source"), write_base(tmp_path / "base", model_type="mamba")
    with pytest.raises(UnsupportedError) as caught:
        lm.convert(source, tmp_path / "out.gguf", "llama.cpp", base=base)
    assert caught.value.code == "convert.architecture"


def gpt2_like(folder: Path, dora: bool) -> tuple[dict[str, Tensor], Path]:
    """Linears stored (in, out), one of them square, and PEFT's adapter of them."""
    generator = torch.Generator().manual_seed(8)
    shapes = {"transformer.h.0.attn.c_attn": (8, 24), "transformer.h.0.attn.c_proj": (8, 8)}
    state = {f"{path}.weight": torch.randn(shape, generator=generator) for path, shape in shapes.items()}
    tensors: dict[str, Tensor] = {}
    for path, (width, out) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
        if dora:
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    return state, folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("target", ["kohya", "comfyui", "mlx"])
def test_linears_that_are_stored_turned(tmp_path: Path, target: str, dora: bool) -> None:
    state, source = gpt2_like(tmp_path / "source", dora)
    out = tmp_path / ("out" if target == "mlx" else "out.safetensors")
    lm.convert(source, out, target)
    options: dict[str, Any] = {"config": {"model_type": "gpt2"}, "compute_dtype": "float64"}
    merged = lm.merge_tensors({n: t.double() for n, t in state.items()}, out, **options)
    again = lm.merge_tensors({n: t.double() for n, t in state.items()}, source, **options)
    factors = load_file(source / "adapter_model.safetensors")
    for name, weight in state.items():
        head = f"base_model.model.{name.removesuffix('.weight')}"
        B, A = (factors[f"{head}.lora_{x}.weight"].double() for x in "BA")
        wanted = weight.double().T + 1.5 * B @ A
        if dora:
            wanted *= (factors[f"{head}.lora_magnitude_vector"].double() / wanted.norm(dim=1))[:, None]
        torch.testing.assert_close(merged[name], wanted.T, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[name], wanted.T, rtol=1e-9, atol=1e-9)


def test_peft_finds_whole_biases_beside_their_factors(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    tensors = load_file(source / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    save_file({**tensors, key: torch.randn(WIDTH)}, source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "bias": "lora_only"}))
    lm.convert(source, tmp_path / "out", "peft")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == {*tensors, key}
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert made["bias"] == "lora_only" and "modules_to_save" not in made
