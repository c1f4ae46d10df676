"""Adapters of MLX, llama.cpp, torchtune, litgpt, Tinker, Megatron, NeMo and unsloth, written as each of them writes.

The truth is what the trainer's own layer computes, in float64: its forward, and where it stores weights in another
order than Hugging Face, its own conversion.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import loramerge as lm
from loramerge.errors import InputError, LoramergeError, MismatchError, UnsupportedError

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = 16, 4, 2, 20, 11
KV = KV_HEADS * HIDDEN // HEADS
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


def llama(layers: int = 2) -> dict[str, Tensor]:
    """The weights of a tiny Llama as Hugging Face stores them."""
    base = {f"model.layers.{n}.{p}.weight": torch.randn(s) for n in range(layers) for p, s in SHAPES.items()}
    norms = {f"model.layers.{n}.input_layernorm.weight": torch.randn(HIDDEN) for n in range(layers)}
    ends = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    return {**base, **norms, **ends}


def merge(base: Mapping[str, Tensor], path: Path, config: Mapping[str, Any] | None = LLAMA, **flags: Any) -> Any:
    return lm.merge_tensors(base, str(path), config=config, compute_dtype="float64", allow_pickle=True, **flags)


def check(merged: Mapping[str, Tensor], base: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The expected weights are there, all others as they were."""
    assert merged.keys() == base.keys()
    for name, before in base.items():
        if name in expected:
            assert not torch.allclose(expected[name].float(), before.float(), atol=1e-3), (
                f"{name}: the oracle changes nothing"
            )
            torch.testing.assert_close(merged[name], expected[name].to(before.dtype), rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert torch.equal(merged[name], before), name


def weight_of(forward: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """The weight (out, in) that a linear forward has."""
    return forward(torch.eye(width, dtype=torch.float64)).T


def d(x: Tensor) -> Tensor:
    return x.double()


def factors(out: int, width: int, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r)."""
    return torch.randn(r, width), torch.randn(out, r)


# ------------------------------------------------------------------------------------------------ MLX


def mlx_folder(path: Path, tensors: Mapping[str, Tensor], scale: float | None = 3.5, kind: str = "lora") -> Path:
    parameters = {"rank": 3, "dropout": 0.0} | ({} if scale is None else {"scale": scale})
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "model": "x", "seed": 0}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapters.safetensors", {"format": "mlx"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def mlx_linear(W: Tensor, a: Tensor, b: Tensor, scale: float, m: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """mlx-lm 0.32.2, tuner/lora.py LoRALinear.__call__, tuner/dora.py DoRALinear.__call__."""

    def forward(x: Tensor) -> Tensor:
        y = x @ d(W).T + scale * ((x @ d(a)) @ d(b))
        if m is None:
            return y
        adapted = d(W) + (scale * d(b).T) @ d(a).T
        return d(m) / adapted.norm(dim=1) * y

    return forward


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("dora", [False, True])
def test_mlx_linears(r: int, dora: bool, tmp_path: Path) -> None:
    base, tensors, expected = llama(), {}, {}
    for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        name, (out, width) = f"model.layers.1.{path}", SHAPES[path]
        a, b = torch.randn(width, r), torch.randn(r, out)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        m = torch.rand(out) + 1 if dora else None
        if m is not None:
            tensors[f"{name}.m"] = m
        expected[f"{name}.weight"] = weight_of(mlx_linear(base[f"{name}.weight"], a, b, 3.5, m), width)
    folder = mlx_folder(tmp_path, tensors, kind="dora" if dora else "lora")
    check(merge(base, folder), base, expected)


def test_mlx_scale_is_absolute_and_20_where_the_config_has_none(tmp_path: Path) -> None:
    base, a, b = llama(), torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN)
    name = "model.layers.0.self_attn.o_proj"
    folder = mlx_folder(tmp_path, {f"{name}.lora_a": a, f"{name}.lora_b": b}, scale=None)
    W = weight_of(mlx_linear(base[f"{name}.weight"], a, b, 20.0), HIDDEN)
    check(merge(base, folder), base, {f"{name}.weight": W})
    checkpoint = tmp_path / "0000100_adapters.safetensors"
    (tmp_path / "adapters.safetensors").rename(checkpoint)
    check(merge(base, checkpoint), base, {f"{name}.weight": W})


@pytest.mark.parametrize("vocab", [VOCAB, HIDDEN])
@pytest.mark.parametrize("dora", [False, True])
def test_mlx_embeddings(vocab: int, dora: bool, tmp_path: Path) -> None:
    """tuner/lora.py LoRAEmbedding, tuner/dora.py DoRAEmbedding: rows are looked up, norms are of rows."""
    base = llama() | {"model.embed_tokens.weight": torch.randn(vocab, HIDDEN)}
    W, a, b, m = base["model.embed_tokens.weight"], torch.randn(vocab, 2), torch.randn(2, HIDDEN), torch.rand(vocab) + 1
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    tokens = torch.arange(vocab)
    out = d(W)[tokens] + 3.5 * d(a)[tokens] @ d(b)
    if dora:
        tensors["model.embed_tokens.m"] = m
        out = (d(m)[tokens] / out.norm(dim=-1))[:, None] * out
    folder = mlx_folder(tmp_path, tensors, kind="dora" if dora else "lora")
    check(merge(base, folder), base, {"model.embed_tokens.weight": out})


def moe_base(layout: str, experts: int) -> tuple[dict[str, Tensor], Callable[[int, str], tuple[str, Any]]]:
    """Weights of experts, and where one expert's matrix lies: (tensor, index)."""
    sizes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    stem = "model.layers.0.mlp"
    if layout == "apart":
        base = {f"{stem}.experts.{e}.{p}.weight": torch.randn(s) for e in range(experts) for p, s in sizes.items()}
        return base, lambda e, p: (f"{stem}.experts.{e}.{p}.weight", ...)
    if layout == "switch":
        base = {f"{stem}.switch_mlp.{p}.weight": torch.randn(experts, *s) for p, s in sizes.items()}
        return base, lambda e, p: (f"{stem}.switch_mlp.{p}.weight", e)
    down = {f"{stem}.experts.down_proj": torch.randn(experts, HIDDEN, INNER)}
    if layout == "stacked":
        rows = {"gate_proj": slice(0, INNER), "up_proj": slice(INNER, None)}
        base = {f"{stem}.experts.gate_up_proj": torch.randn(experts, 2 * INNER, HIDDEN)} | down
        return (
            base,
            lambda e, p: (
                (f"{stem}.experts.gate_up_proj", (e, rows[p])) if p in rows else (f"{stem}.experts.down_proj", e)
            ),
        )
    assert layout == "mixtral"
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    stem = "model.layers.0.block_sparse_moe.experts"
    base = {f"{stem}.{e}.{words[p]}.weight": torch.randn(s) for e in range(experts) for p, s in sizes.items()}
    return base, lambda e, p: (f"{stem}.{e}.{words[p]}.weight", ...)


def moe_expected(
    base: Mapping[str, Tensor], place: Callable[[int, str], tuple[str, Any]], deltas: Mapping[tuple[int, str], Tensor]
) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = {}
    for (e, projection), delta in deltas.items():
        name, index = place(e, projection)
        expected.setdefault(name, d(base[name]).clone())[index] += delta
    return expected


@pytest.mark.parametrize("layout", ["apart", "switch", "stacked", "mixtral"])
@pytest.mark.parametrize("flat", [False, True], ids=["3-axes", "older"])
def test_mlx_experts(layout: str, flat: bool, tmp_path: Path) -> None:
    """tuner/lora.py LoRASwitchLinear.fuse: scale lora_b lora_a for each expert."""
    experts, r = 3, 2
    base, place = moe_base(layout, experts)
    stem = "block_sparse_moe" if layout == "mixtral" else "mlp"
    tensors, deltas = {}, {}
    for projection, (out, width) in {"gate_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        a, b = torch.randn(experts, r, width), torch.randn(experts, out, r)
        name = f"model.layers.0.{stem}.switch_mlp.{projection}"
        tensors |= {f"{name}.lora_a": a.reshape(experts * r, width) if flat else a, f"{name}.lora_b": b}
        deltas |= {(e, projection): 3.5 * d(b[e]) @ d(a[e]) for e in range(experts)}
    folder = mlx_folder(tmp_path, tensors)
    config = {"model_type": "mixtral" if layout == "mixtral" else "qwen3_moe"}
    check(merge(base, folder, config), base, moe_expected(base, place, deltas))


def test_mlx_full_fine_tuning_replaces_weights(tmp_path: Path) -> None:
    base, name = llama(), "model.layers.1.mlp.up_proj.weight"
    new = torch.randn(INNER, HIDDEN)
    check(merge(base, mlx_folder(tmp_path, {name: new}, kind="full")), base, {name: new})
    halfway = d(base[name]) + 0.5 * (d(new) - d(base[name]))
    merged = lm.merge_tensors(base, {str(tmp_path): 0.5}, config=LLAMA, compute_dtype="float64")
    check(merged, base, {name: halfway})
    with pytest.raises(MismatchError) as error:
        merge(base, mlx_folder(tmp_path, {name: new, "model.layers.1.mlp.other.weight": new + 1}, kind="full"))
    assert error.value.code == "adapter.unmatched"


def test_mlx_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_a": torch.randn(HIDDEN, 1), f"{name}.lora_b": torch.randn(1, HIDDEN)}
    with pytest.raises(UnsupportedError, match="'lokr'"):
        merge(llama(), mlx_folder(tmp_path, tensors, kind="lokr"))


# ------------------------------------------------------------------------------------------------ llama.cpp


def permute(weights: Tensor, heads: int) -> Tensor:
    """Hugging Face's rows in the order of llama.cpp (conversion/llama.py LlamaModel.permute)."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    architecture: str = "llama",
    alpha: float | None = 6.0,
    quantise: str | None = None,
    tokens: list[int] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if tokens is not None:
        value, item = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, tokens, value, item)
    for name, tensor in tensors.items():
        data = tensor.contiguous().numpy()
        if quantise is None:
            writer.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType[quantise]
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_factors(r: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"model.layers.1.{path}": factors(out, width, r) for path, (out, width) in SHAPES.items()}


def gguf_tensors(pairs: Mapping[str, tuple[Tensor, Tensor]], permuted: bool) -> dict[str, Tensor]:
    """convert_lora_to_gguf.py: names mapped, rows of q and k permuted with the weights that they belong to."""
    tensors = {}
    for module, (A, B) in pairs.items():
        layer, path = module.removeprefix("model.layers.").split(".", 1)
        if permuted and path.endswith(("q_proj", "k_proj")):
            B = permute(B, HEADS if path.endswith("q_proj") else KV_HEADS)
        name = f"blk.{layer}.{GGUF_NAMES[path]}.weight"
        tensors |= {f"{name}.lora_a": A, f"{name}.lora_b": B}
    return tensors


def plus(base: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    """Weights plus s B A, by module."""
    return {f"{m}.weight": d(base[f"{m}.weight"]) + scale * d(B) @ d(A) for m, (A, B) in pairs.items()}


@pytest.mark.parametrize(("architecture", "permuted"), [("llama", True), ("granite", True), ("qwen2", False)])
@pytest.mark.parametrize("r", [1, 4])
def test_gguf_rows_follow_the_architecture(architecture: str, permuted: bool, r: int, tmp_path: Path) -> None:
    base, pairs = llama(), llama_factors(r)
    file = write_gguf(tmp_path / "lora.gguf", gguf_tensors(pairs, permuted), architecture)
    config = LLAMA | {"model_type": architecture}
    check(merge(base, file, config), base, plus(base, pairs, 6.0 / r))


def test_gguf_on_disk_in_bfloat16(tmp_path: Path) -> None:
    base = {k: v.bfloat16() for k, v in llama().items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    pairs = llama_factors(3)
    file = write_gguf(tmp_path / "lora.gguf", gguf_tensors(pairs, True))
    receipt = lm.merge(tmp_path / "base", {file: 0.5}, tmp_path / "out", compute_dtype="float64")
    assert receipt.data["adapters"][0]["dialect"] == "llama.cpp"
    check(load_file(tmp_path / "out" / "model.safetensors"), base, plus(base, pairs, 0.5 * 6.0 / 3))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_of_every_precision(kind: str, tmp_path: Path) -> None:
    base = {"model.layers.0.mlp.gate_proj.weight": torch.randn(96, 64)}
    A, B = torch.randn(32, 64), torch.randn(96, 32)
    tensors = {"blk.0.ffn_gate.weight.lora_a": A, "blk.0.ffn_gate.weight.lora_b": B}
    file = write_gguf(tmp_path / "lora.gguf", tensors, quantise=kind)
    quantised = gguf.GGMLQuantizationType[kind]

    def stored(x: Tensor) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), quantised), quantised))

    pairs = {"model.layers.0.mlp.gate_proj": (stored(A), stored(B))}
    check(merge(base, file), base, plus(base, pairs, 6.0 / 32))


@pytest.mark.parametrize("vocab", [VOCAB, HIDDEN])
def test_gguf_token_embeddings(vocab: int, tmp_path: Path) -> None:
    """llama-graph.cpp build_inp_embd: rows of lora_a are looked up, lora_b (dim, r) is applied to them."""
    base = llama() | {"model.embed_tokens.weight": torch.randn(vocab, HIDDEN)}
    a, b = torch.randn(vocab, 3), torch.randn(HIDDEN, 3)
    tensors = {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}
    head = factors(VOCAB, HIDDEN, 3)
    tensors |= {"output.weight.lora_a": head[0], "output.weight.lora_b": head[1]}
    file = write_gguf(tmp_path / "lora.gguf", tensors)
    looked_up = torch.stack([d(a)[t] @ d(b).T for t in range(vocab)])
    expected = {"model.embed_tokens.weight": d(base["model.embed_tokens.weight"]) + 2.0 * looked_up}
    check(merge(base, file), base, expected | plus(base, {"lm_head": head}, 2.0))


@pytest.mark.parametrize("layout", ["apart", "stacked", "mixtral"])
def test_gguf_experts(layout: str, tmp_path: Path) -> None:
    experts, r = 3, 2
    base, place = moe_base(layout, experts)
    tensors, deltas = {}, {}
    for projection, out, width in (("gate", INNER, HIDDEN), ("down", HIDDEN, INNER)):
        a, b = torch.randn(experts, r, width), torch.randn(experts, out, r)
        tensors |= {f"blk.0.ffn_{projection}_exps.weight.lora_a": a, f"blk.0.ffn_{projection}_exps.weight.lora_b": b}
        deltas |= {(e, f"{projection}_proj"): 3.0 * d(b[e]) @ d(a[e]) for e in range(experts)}
    file = write_gguf(tmp_path / "lora.gguf", tensors, "llama" if layout == "mixtral" else "qwen3moe")
    config = {"model_type": "mixtral" if layout == "mixtral" else "qwen3_moe"}
    check(merge(base, file, config), base, moe_expected(base, place, deltas))


def test_gguf_of_phi3_fuses_gate_and_up(tmp_path: Path) -> None:
    base = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(HIDDEN + 2 * KV, HIDDEN),
        "model.layers.0.mlp.gate_up_proj.weight": torch.randn(2 * INNER, HIDDEN),
    }
    qkv, up = factors(HIDDEN + 2 * KV, HIDDEN, 2), factors(2 * INNER, HIDDEN, 2)
    tensors = {"blk.0.attn_qkv.weight.lora_a": qkv[0], "blk.0.attn_qkv.weight.lora_b": qkv[1]}
    tensors |= {"blk.0.ffn_up.weight.lora_a": up[0], "blk.0.ffn_up.weight.lora_b": up[1]}
    file = write_gguf(tmp_path / "lora.gguf", tensors, "phi3")
    pairs = {"model.layers.0.self_attn.qkv_proj": qkv, "model.layers.0.mlp.gate_up_proj": up}
    check(merge(base, file, LLAMA | {"model_type": "phi3"}), base, plus(base, pairs, 3.0))


def test_gguf_norms_replace_and_alpha_0_means_scale_1(tmp_path: Path) -> None:
    base, pairs, norm = llama(), {"model.layers.1.mlp.up_proj": factors(INNER, HIDDEN, 2)}, torch.randn(HIDDEN)
    expected = plus(base, pairs, 1.0) | {"model.layers.0.input_layernorm.weight": norm}
    tensors = gguf_tensors(pairs, True) | {"blk.0.attn_norm.weight": norm}
    for alpha in (0.0, None):
        check(merge(base, write_gguf(tmp_path / "lora.gguf", tensors, alpha=alpha)), base, expected)


def test_gguf_that_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base, tensors = llama(), gguf_tensors(llama_factors(2), True)
    with pytest.raises(UnsupportedError, match="invocation tokens"):
        merge(base, write_gguf(tmp_path / "a.gguf", tensors, tokens=[1, 2]))
    with pytest.raises(UnsupportedError, match="'gpt2'"):
        merge(base, write_gguf(tmp_path / "b.gguf", tensors, "gpt2"))
    with pytest.raises(MismatchError) as error:  # without a config nobody knows the heads
        merge(base, write_gguf(tmp_path / "c.gguf", tensors), None)
    assert error.value.code == "binding.sizes"
    with pytest.raises(MismatchError) as error:
        merge(base, tmp_path / "c.gguf", LLAMA | {"num_attention_heads": 5})
    assert error.value.code == "adapter.shape"
    file = write_gguf(tmp_path / "d.gguf", {"blk.0.ffn_up.weight.lora_a": torch.randn(2, HIDDEN)})
    with pytest.raises(InputError, match="no B"):
        merge(base, file)


def test_gguf_models_are_no_adapters(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.randn(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="GGUF"):
        merge(llama(), tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------------ torchtune


def to_tune(weight: Tensor, heads: int) -> Tensor:
    """torchtune 0.6.1, models/convert_weights.py hf_to_tune, `_permute`."""
    hd = weight.shape[0] // heads
    return weight.view(heads, 2, hd // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def from_tune(weight: Tensor, heads: int) -> Tensor:
    """tune_to_hf, `_permute`."""
    hd = weight.shape[0] // heads
    return weight.view(heads, hd // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


TUNE_NAMES = {
    "attn.q_proj": ("self_attn.q_proj", HEADS),
    "attn.k_proj": ("self_attn.k_proj", KV_HEADS),
    "attn.v_proj": ("self_attn.v_proj", 0),
    "attn.output_proj": ("self_attn.o_proj", 0),
    "mlp.w1": ("mlp.gate_proj", 0),
    "mlp.w2": ("mlp.down_proj", 0),
    "mlp.w3": ("mlp.up_proj", 0),
}


def tune_forward(W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor | None) -> Callable[[Tensor], Tensor]:
    """modules/peft/lora.py LoRALinear.forward, modules/peft/dora.py DoRALinear.forward."""

    def forward(x: Tensor) -> Tensor:
        out, lora = F.linear(x, d(W)), s * F.linear(F.linear(x, d(A)), d(B))
        if m is None:
            return out + lora
        ratio = d(m) / (d(W) + s * d(B) @ d(A)).norm(dim=1)
        return (ratio - 1) * out + ratio * lora + out

    return forward


@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("r", [1, 3])
def test_torchtune(model_type: str, dora: bool, r: int, tmp_path: Path) -> None:
    base, tensors, expected = llama(), {}, {}
    for ours, (theirs, heads) in TUNE_NAMES.items():
        heads = 0 if model_type == "qwen2" else heads  # models/qwen2/_convert_weights.py permutes nothing
        (out, width), name = SHAPES[theirs], f"model.layers.1.{theirs}.weight"
        A, B = factors(out, width, r)
        m = torch.rand(out) + 1 if dora else None
        tensors |= {f"layers.1.{ours}.lora_a.weight": A, f"layers.1.{ours}.lora_b.weight": B}
        if m is not None:
            tensors[f"layers.1.{ours}.magnitude"] = m
        held = to_tune(base[name], heads) if heads else base[name]
        trained = weight_of(tune_forward(held, A, B, 8 / r, m), width)
        expected[name] = from_tune(trained, heads) if heads else trained
    torch.save(tensors, tmp_path / "adapter_model.pt")
    config = {"r": r, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check(merge(base, tmp_path, LLAMA | {"model_type": model_type}), base, expected)


def test_torchtune_without_config_needs_alpha(tmp_path: Path) -> None:
    base, (A, B) = llama(), factors(VOCAB, HIDDEN, 2)
    torch.save({"output.lora_a.weight": A, "output.lora_b.weight": B}, tmp_path / "adapter_0.pt")
    with pytest.raises(InputError) as error:
        merge(base, tmp_path)
    assert error.value.code == "adapter.alpha"
    check(merge(base, tmp_path, alpha=5.0), base, plus(base, {"lm_head": (A, B)}, 2.5))


def test_torchtune_on_a_fused_base(tmp_path: Path) -> None:
    """models/phi3/_convert_weights.py splits qkv_proj and gate_up_proj and permutes nothing."""
    base = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(HIDDEN + 2 * KV, HIDDEN),
        "model.layers.0.mlp.gate_up_proj.weight": torch.randn(2 * INNER, HIDDEN),
    }
    k, up = factors(KV, HIDDEN, 2), factors(INNER, HIDDEN, 2)
    tensors = {"layers.0.attn.k_proj.lora_a.weight": k[0], "layers.0.attn.k_proj.lora_b.weight": k[1]}
    tensors |= {"layers.0.mlp.w3.lora_a.weight": up[0], "layers.0.mlp.w3.lora_b.weight": up[1]}
    torch.save(tensors, tmp_path / "adapter_model.pt")
    expected = {n: d(W).clone() for n, W in base.items()}
    expected["model.layers.0.self_attn.qkv_proj.weight"][HIDDEN : HIDDEN + KV] += 2 * d(k[1]) @ d(k[0])
    expected["model.layers.0.mlp.gate_up_proj.weight"][INNER:] += 2 * d(up[1]) @ d(up[0])
    check(merge(base, tmp_path, LLAMA | {"model_type": "phi3"}, alpha=4.0), base, expected)


# ------------------------------------------------------------------------------------------------ litgpt


def litgpt_qkv(A: Tensor, B: Tensor, enabled: tuple[bool, ...], heights: tuple[int, ...], s: float) -> Tensor:
    """litgpt 0.5.13, lora.py LoRAQKVLinear: `conv1d` of each part, `zero_pad`, on the identity."""
    shapes = [h for h, on in zip(heights, enabled, strict=True) if on]
    after = F.linear(torch.eye(A.shape[1], dtype=torch.float64), d(A)).T  # (g r, in)
    parts = [b @ a for a, b in zip(after.chunk(len(shapes)), d(B).split(shapes), strict=True)]
    result = torch.zeros(sum(heights), A.shape[1], dtype=torch.float64)
    rows = torch.arange(sum(heights)).split(heights)
    result[torch.cat([r for r, on in zip(rows, enabled, strict=True) if on])] = torch.cat(parts)
    return s * result


def write_litgpt(path: Path, tensors: Mapping[str, Tensor], enabled: tuple[bool, ...] | None, r: int) -> Path:
    torch.save({"model": dict(tensors)}, path / "lit_model.pth.lora")
    names = ("lora_query", "lora_key", "lora_value")
    flags = {} if enabled is None else dict(zip(names, enabled, strict=True))
    config = {"checkpoint_dir": "x", "lora_r": r, "lora_alpha": 6, "lora_mlp": True, "train": {"min_lr": 6e-5}, **flags}
    (path / "hyperparameters.yaml").write_text(yaml.safe_dump(config))
    return path


ENABLED = [e for e in itertools.product((True, False), repeat=3) if any(e)]


@pytest.mark.parametrize("layout", ["own", "split", "grouped"])
@pytest.mark.parametrize("enabled", ENABLED, ids=lambda e: "".join("-x"[on] for on in e))
@pytest.mark.parametrize("kv_heads", [KV_HEADS, HEADS], ids=["gqa", "mha"])
def test_litgpt_qkv(layout: str, enabled: tuple[bool, ...], kv_heads: int, tmp_path: Path) -> None:
    r, kv = 2, kv_heads * HIDDEN // HEADS
    heights = (HIDDEN, kv, kv)
    A = torch.randn(r * sum(enabled), HIDDEN)
    B = torch.randn(sum(h for h, on in zip(heights, enabled, strict=True) if on), r)
    tensors = {"transformer.h.1.attn.qkv.lora_A": A, "transformer.h.1.attn.qkv.lora_B": B}
    folder = write_litgpt(tmp_path, tensors, enabled, r)
    delta = litgpt_qkv(A, B, enabled, heights, 3.0)
    config = LLAMA | {"num_key_value_heads": kv_heads}
    if layout == "own":
        base = {"transformer.h.1.attn.qkv.weight": torch.randn(sum(heights), HIDDEN)}
        expected = {n: d(W) + delta for n, W in base.items()}
    elif layout == "split":
        names = [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
        base = {n: torch.randn(h, HIDDEN) for n, h in zip(names, heights, strict=True)}
        changed = zip(names, delta.split(heights), enabled, strict=True)
        expected = {n: d(base[n]) + part for n, part, on in changed if on}
    else:
        # Falcon's new decoder stores q.. k v of each group; convert_hf_checkpoint.py qkv_reassemble
        base = {"transformer.h.1.self_attention.query_key_value.weight": torch.randn(sum(heights), HIDDEN)}
        config |= {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": kv_heads}
        size, per = HIDDEN // HEADS, HEADS // kv_heads
        rows = torch.arange(sum(heights)).chunk(kv_heads)
        split = [chunk.split([size * per, size, size]) for chunk in rows]
        order = torch.cat([part[i] for i in range(3) for part in split])  # litgpt's row i is the base's row order[i]
        ((name, W),) = base.items()
        expected = {name: d(W).index_add(0, order, delta)}
    check(merge(base, folder, config), base, expected)


@pytest.mark.parametrize("r", [1, 3])
def test_litgpt_other_linears(r: int, tmp_path: Path) -> None:
    base, names = llama(), {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
    names |= {"mlp.proj": "mlp.down_proj"}
    pairs = {f"model.layers.0.{hf}": factors(*SHAPES[hf], r) for hf in names.values()}
    tensors = {}
    for ours, hf in names.items():
        A, B = pairs[f"model.layers.0.{hf}"]
        tensors |= {f"transformer.h.0.{ours}.lora_A": A, f"transformer.h.0.{ours}.lora_B": B}
    pairs["lm_head"] = factors(VOCAB, HIDDEN, r)
    tensors |= {"lm_head.lora_A": pairs["lm_head"][0], "lm_head.lora_B": pairs["lm_head"][1]}
    check(merge(base, write_litgpt(tmp_path, tensors, (False,) * 3, r)), base, plus(base, pairs, 6 / r))


def test_litgpt_on_gpt_neox(tmp_path: Path) -> None:
    stem, lit = "gpt_neox.layers.0", "transformer.h.0"
    base = {
        f"{stem}.attention.query_key_value.weight": torch.randn(3 * HIDDEN, HIDDEN),
        f"{stem}.attention.dense.weight": torch.randn(HIDDEN, HIDDEN),
        f"{stem}.mlp.dense_h_to_4h.weight": torch.randn(INNER, HIDDEN),
        f"{stem}.mlp.dense_4h_to_h.weight": torch.randn(HIDDEN, INNER),
    }
    A, B, enabled = torch.randn(4, HIDDEN), torch.randn(2 * HIDDEN, 2), (True, False, True)
    tensors = {f"{lit}.attn.qkv.lora_A": A, f"{lit}.attn.qkv.lora_B": B}
    pairs = {}
    for ours, hf in {
        "attn.proj": "attention.dense",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    }.items():
        out, width = base[f"{stem}.{hf}.weight"].shape
        pairs[f"{stem}.{hf}"] = factors(out, width, 2)
        tensors |= {f"{lit}.{ours}.lora_A": pairs[f"{stem}.{hf}"][0], f"{lit}.{ours}.lora_B": pairs[f"{stem}.{hf}"][1]}
    delta = litgpt_qkv(A, B, enabled, (HIDDEN,) * 3, 3.0)
    size = HIDDEN // HEADS
    order = torch.cat(
        [torch.arange(h * 3 * size + i * size, h * 3 * size + (i + 1) * size) for i in range(3) for h in range(HEADS)]
    )
    name = f"{stem}.attention.query_key_value.weight"
    expected = plus(base, pairs, 3.0) | {name: d(base[name]).index_add(0, order, delta)}
    config = {"model_type": "gpt_neox", "num_attention_heads": HEADS, "hidden_size": HIDDEN}
    check(merge(base, write_litgpt(tmp_path, tensors, enabled, 2), config), base, expected)


def test_litgpt_slots_that_nothing_tells(tmp_path: Path) -> None:
    base, r = {"transformer.h.0.attn.qkv.weight": torch.randn(HIDDEN + 2 * KV, HIDDEN)}, 2
    A, B = torch.randn(2 * r, HIDDEN), torch.randn(HIDDEN + KV, r)
    tensors = {"transformer.h.0.attn.qkv.lora_A": A, "transformer.h.0.attn.qkv.lora_B": B}
    folder = write_litgpt(tmp_path, tensors, None, r)
    with pytest.raises(MismatchError) as error:  # q and k, or q and v?
        merge(base, folder)
    assert error.value.code == "adapter.slots" and "--enable-lora" in error.value.fix
    delta = litgpt_qkv(A, B, (True, False, True), (HIDDEN, KV, KV), 3.0)
    merged = merge(base, folder, enable_lora=[True, False, True])
    check(merged, base, {n: d(W) + delta for n, W in base.items()})
    with pytest.raises(MismatchError, match="no choice fits"):
        merge(base, folder, enable_lora=[True, True, True])
    whole = {k: torch.randn(3 * r, HIDDEN) if k.endswith("A") else torch.randn(HIDDEN + 2 * KV, r) for k in tensors}
    folder = write_litgpt(tmp_path, whole, None, r)  # all three: shapes tell
    delta = litgpt_qkv(*whole.values(), (True,) * 3, (HIDDEN, KV, KV), 3.0)
    check(merge(base, folder), base, {n: d(W) + delta for n, W in base.items()})


# ------------------------------------------------------------------------------------------------ Tinker


def write_peft(path: Path, tensors: Mapping[str, Tensor], r: int, **more: Any) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": "all-linear", **more}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("layout", ["apart", "stacked"])
@pytest.mark.parametrize("shared", ["A", "B", "none"])
def test_tinker_experts(layout: str, shared: str, tmp_path: Path) -> None:
    """tinker_cookbook/weights/_merge.py merge_adapter_weights: a factor with one layer is shared by all experts."""
    experts, r = 3, 2
    base, place = moe_base(layout, experts)
    tensors, deltas = {}, {}
    words = {"w1": ("gate_proj", INNER, HIDDEN), "w3": ("up_proj", INNER, HIDDEN), "w2": ("down_proj", HIDDEN, INNER)}
    for word, (projection, out, width) in words.items():
        a = torch.randn(1 if shared == "A" else experts, r, width)
        b = torch.randn(1 if shared == "B" else experts, out, r)
        stem = f"base_model.model.model.layers.0.mlp.experts.{word}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged = torch.bmm(d(b).expand(experts, -1, -1), d(a).expand(experts, -1, -1)) * 8 / r
        deltas |= {(e, projection): merged[e] for e in range(experts)}
    check(
        merge(base, write_peft(tmp_path, tensors, r), {"model_type": "qwen3_moe"}),
        base,
        moe_expected(base, place, deltas),
    )


def test_tinker_head_and_placeholders(tmp_path: Path) -> None:
    base, r = llama(), 2
    pairs = {"model.layers.1.self_attn.q_proj": factors(HIDDEN, HIDDEN, r), "lm_head": factors(VOCAB, HIDDEN, r)}
    stem = "base_model.model.model."
    tensors = {
        f"{stem}layers.1.self_attn.q_proj.lora_A.weight": pairs["model.layers.1.self_attn.q_proj"][0],
        f"{stem}layers.1.self_attn.q_proj.lora_B.weight": pairs["model.layers.1.self_attn.q_proj"][1],
        f"{stem}unembed_tokens.lora_A.weight": pairs["lm_head"][0],
        f"{stem}unembed_tokens.lora_B.weight": pairs["lm_head"][1],
        f"{stem}layers.1.mlp.experts.w3.lora_A.weight": torch.zeros(0),
        f"{stem}layers.1.mlp.experts.w3.lora_B.weight": torch.zeros(0),
    }
    check(merge(base, write_peft(tmp_path, tensors, r)), base, plus(base, pairs, 4.0))


def test_tinker_of_gpt_oss_alternates_gate_and_up(tmp_path: Path) -> None:
    """_merge_gpt_oss.py: `.attn` is `.self_attn`; gate_up_proj is (expert, in, out) with gate and up taking turns."""
    experts, r = 2, 2
    base = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(HIDDEN, HIDDEN),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(experts, HIDDEN, 2 * HIDDEN),
        "model.layers.0.mlp.experts.down_proj": torch.randn(experts, HIDDEN, HIDDEN),
    }
    q = factors(HIDDEN, HIDDEN, r)
    stem = "base_model.model.model.layers.0"
    tensors = {f"{stem}.attn.q_proj.lora_A.weight": q[0], f"{stem}.attn.q_proj.lora_B.weight": q[1]}
    expected = {n: d(W).clone() for n, W in base.items()}
    expected["model.layers.0.self_attn.q_proj.weight"] += 4 * d(q[1]) @ d(q[0])
    for word, name, columns in (
        ("w1", "gate_up_proj", slice(0, None, 2)),
        ("w3", "gate_up_proj", slice(1, None, 2)),
        ("w2", "down_proj", slice(None)),
    ):
        a, b = torch.randn(experts, r, HIDDEN), torch.randn(experts, HIDDEN, r)
        tensors |= {f"{stem}.mlp.experts.{word}.lora_A.weight": a, f"{stem}.mlp.experts.{word}.lora_B.weight": b}
        delta = torch.bmm(d(a).transpose(1, 2), d(b).transpose(1, 2)) * 4  # (expert, in, out)
        expected[f"model.layers.0.mlp.experts.{name}"][:, :, columns] += delta
    check(merge(base, write_peft(tmp_path, tensors, r), {"model_type": "gpt_oss"}), base, expected)


def test_an_empty_tensor_in_a_peft_file_is_still_an_error(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(0), f"{name}.lora_B.weight": torch.zeros(0)}
    with pytest.raises(InputError) as error:
        merge(llama(), write_peft(tmp_path, tensors, 2))
    assert error.value.code == "adapter.empty-tensor"


# ------------------------------------------------------------------------------------------------ Megatron, NeMo


def grouped_rows() -> Tensor:
    """Row i of linear_qkv is this row of q, k and v one after the other: the queries of a group, its k, its v."""
    size, per = HIDDEN // HEADS, HEADS // KV_HEADS
    q, k, v = torch.arange(HIDDEN + 2 * KV).split([HIDDEN, KV, KV])
    return torch.cat(
        [
            part
            for g in range(KV_HEADS)
            for part in (
                q[g * per * size : (g + 1) * per * size],
                k[g * size : (g + 1) * size],
                v[g * size : (g + 1) * size],
            )
        ]
    )


def split_qkv(base: Mapping[str, Tensor], delta: Tensor, layer: int) -> dict[str, Tensor]:
    """The q, k and v of Hugging Face with a change of linear_qkv added."""
    rows = torch.empty_like(delta)
    rows[grouped_rows()] = delta
    parts = zip("qkv", rows.split([HIDDEN, KV, KV]), strict=True)
    names = {f"model.layers.{layer}.self_attn.{p}_proj.weight": part for p, part in parts}
    return {n: d(base[n]) + part for n, part in names.items()}


def write_megatron(path: Path, tensors: Mapping[str, Tensor], parallel: int = 1) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter.safetensors")
    target = "megatron.bridge.peft.lora.LoRA"
    config = {"peft": {"_target_": target, "dim": 2, "alpha": 6}, "model": {"tensor_model_parallel_size": parallel}}
    (path / "run_config.yaml").write_text(yaml.safe_dump(config))
    return path / "adapter.safetensors"


def test_megatron_fused_linears(tmp_path: Path) -> None:
    base, stem = llama(), "decoder.layers.1"
    qkv, fc1 = factors(HIDDEN + 2 * KV, HIDDEN, 2), factors(2 * INNER, HIDDEN, 2)
    pairs = {f"model.layers.1.{p}": factors(*SHAPES[p], 2) for p in ("self_attn.o_proj", "mlp.down_proj")}
    tensors = {}
    for name, (A, B) in {
        "self_attention.linear_qkv": qkv,
        "mlp.linear_fc1": fc1,
        "self_attention.linear_proj": pairs["model.layers.1.self_attn.o_proj"],
        "mlp.linear_fc2": pairs["model.layers.1.mlp.down_proj"],
    }.items():
        tensors |= {f"{stem}.{name}.adapter.linear_in.weight": A, f"{stem}.{name}.adapter.linear_out.weight": B}
    gate, up = (3 * d(fc1[1]) @ d(fc1[0])).chunk(2)
    expected = plus(base, pairs, 3.0) | split_qkv(base, 3 * d(qkv[1]) @ d(qkv[0]), 1)
    for name, part in (("gate_proj", gate), ("up_proj", up)):
        expected[f"model.layers.1.mlp.{name}.weight"] = d(base[f"model.layers.1.mlp.{name}.weight"]) + part
    check(merge(base, write_megatron(tmp_path, tensors)), base, expected)


def test_megatron_canonical_linears(tmp_path: Path) -> None:
    base, stem = llama(), "decoder.layers.0"
    names = {
        "self_attention.linear_qkv.adapter.adapter_q": "self_attn.q_proj",
        "self_attention.linear_qkv.adapter.adapter_k": "self_attn.k_proj",
        "mlp.linear_fc1.adapter.adapter_up": "mlp.up_proj",
    }
    pairs, tensors = {}, {}
    for name, hf in names.items():
        A, B = pairs[f"model.layers.0.{hf}"] = factors(*SHAPES[hf], 2)
        tensors |= {f"{stem}.{name}.linear_in.weight": A, f"{stem}.{name}.linear_out.weight": B}
    check(merge(base, write_megatron(tmp_path, tensors)), base, plus(base, pairs, 3.0))


def test_megatron_dora(tmp_path: Path) -> None:
    """megatron/bridge/peft/dora_layers.py: magnitude over the norm of each row of W + s B A."""
    base, name = llama(), "decoder.layers.0.self_attention.linear_proj.adapter"
    (A, B), m = factors(HIDDEN, HIDDEN, 2), torch.rand(HIDDEN) + 1
    tensors = {f"{name}.linear_in.weight": A, f"{name}.linear_out.weight": B, f"{name}.weight_magnitude": m}
    V = plus(base, {"model.layers.0.self_attn.o_proj": (A, B)}, 3.0)
    expected = {n: (d(m) / W.norm(dim=1))[:, None] * W for n, W in V.items()}
    check(merge(base, write_megatron(tmp_path, tensors)), base, expected)


def test_megatron_shards_are_refused(tmp_path: Path) -> None:
    name, (A, B) = "decoder.layers.0.self_attention.linear_proj.adapter", factors(HIDDEN, HIDDEN, 2)
    tensors = {f"{name}.linear_in.weight": A, f"{name}.linear_out.weight": B}
    with pytest.raises(UnsupportedError, match=r"tensor-parallel is '2'.*shards"):
        merge(llama(), write_megatron(tmp_path, tensors, parallel=2))
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"x")
    for path in (folder, tmp_path):
        (path / "adapter.safetensors").unlink(missing_ok=True)
        with pytest.raises(UnsupportedError, match="distributed checkpoint"):
            merge(llama(), path)


@pytest.mark.parametrize("mcore", [True, False])
def test_nemo_1(mcore: bool, tmp_path: Path) -> None:
    base, stem = llama(), "model.decoder.layers.1" if mcore else "model.language_model.encoder.layers.1"
    A, B = factors(HIDDEN + 2 * KV, HIDDEN, 2)
    name = f"{stem}.self_attention.adapter_layer.lora_kqv_adapter"
    torch.save({f"{name}.linear_in.weight": A, f"{name}.linear_out.weight": B}, tmp_path / "model_weights.ckpt")
    for alpha, scale in ((6, 3.0), (None, 1.0)):  # alpha is the rank where none is given
        tuning = {"adapter_dim": 2, "alpha": alpha}
        config = {"peft": {"peft_scheme": "lora", "lora_tuning": tuning}, "tensor_model_parallel_size": 1}
        (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config))
        expected = split_qkv(base, scale * d(B) @ d(A), 1)
        check(merge(base, tmp_path / "model_weights.ckpt"), base, expected)


@pytest.mark.parametrize("name", ["lora.nemo", "model.lora_weights.npy"])
def test_forms_that_are_not_read_are_refused_by_name(name: str, tmp_path: Path) -> None:
    if name.endswith("nemo"):
        with tarfile.open(tmp_path / name, "w"):
            pass
    else:
        import numpy

        numpy.save(tmp_path / name, numpy.zeros((1, 2, 3), dtype="float16"))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedError) as error:
            merge(llama(), path)
        assert error.value.code == "adapter.refused" and name in error.value.message and error.value.fix


# ------------------------------------------------------------------------------------------------ unsloth


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_of_unsloth_grouped_by_expert(grouped: bool, tmp_path: Path) -> None:
    """PEFT's key and shape; B is (out, r, expert) in PEFT, (out, expert, r) in older unsloth. Nothing on disk tells."""
    experts, r, out, width = 3, 2, 2 * INNER, HIDDEN
    base = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(experts, out, width)}
    A, B = torch.randn(experts * r, width), torch.randn(out, experts * r)
    stem = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    more = {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.19.1", "target_modules": None}
    folder = write_peft(tmp_path, tensors, r, **more)
    a = d(A).view(experts, r, width)
    b = d(B).view(out, experts, r).permute(1, 0, 2) if grouped else d(B).view(out, r, experts).permute(2, 0, 1)
    expected = {n: d(W) + 4 * torch.bmm(b, a) for n, W in base.items()}
    check(merge(base, folder, {"model_type": "qwen3_moe"}, grouped_experts=grouped), base, expected)


def test_every_error_here_says_what_to_do(tmp_path: Path) -> None:
    for name in ("a.nemo", "model.lora_config.npy", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"0123456789")
        with pytest.raises(LoramergeError) as error:
            merge(llama(), tmp_path / name)
        assert error.value.fix
