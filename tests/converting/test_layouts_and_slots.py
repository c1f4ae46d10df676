"""Conversions across layouts: fused and split projections, exchanged halves, slots, embeddings; and into diffusers."""

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

image_zoo = pytest.importorskip("image_zoo")

State = dict[str, Tensor]
PIXELS = "model.diffusion_model."


def changes(state: State, adapter: Path, **options: Any) -> State:
    doubled = {name: tensor.double() for name, tensor in state.items()}
    merged = lm.merge_tensors(doubled, adapter, compute_dtype="float64", allow_pickle=True, **options)
    return {n: t - doubled[n] for n, t in merged.items() if not torch.equal(t, doubled[n])}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], limit: float = 1e-6) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert float((a[name] - b[name]).norm()) <= limit * float(a[name].norm()), name


def pairs(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, down: str = "lora_A", up: str = "lora_B") -> State:
    """Factors of rank 1 to 3 for weights of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, (path, shape) in enumerate(shapes.items()):
        r = i % 3 + 1
        made[f"{path}.{down}.weight"] = torch.randn(r, *shape[1:], generator=generator)
        made[f"{path}.{up}.weight"] = torch.randn(shape[0], r, *[1] * (len(shape) - 2), generator=generator)
    return made


def linears(state: State, *words: str) -> dict[str, tuple[int, ...]]:
    """Modules with weights of two or more axes whose name has one of these words."""
    return {
        name.removesuffix(".weight"): tuple(t.shape)
        for name, t in state.items()
        if name.endswith(".weight") and t.dim() > 1 and any(word in name for word in words)
    }


@pytest.fixture(scope="module")
def flux() -> tuple[State, State]:
    """The same tiny Flux in both layouts."""
    hf = image_zoo.randomised(image_zoo.flux1())
    return hf, {f"{PIXELS}{n}": t for n, t in image_zoo.single_file(hf, {"transformer": ""}).items()}


def test_split_projections_become_fused_ones_and_back(flux: tuple[State, State], tmp_path: Path) -> None:
    hf, ldm = flux
    source, base = tmp_path / "split.safetensors", tmp_path / "hf.safetensors"
    shapes = linears(hf, "attn.to_q", "attn.to_v", "proj_mlp", "norm_out.linear", "ff.net.2")
    save_file({f"transformer.{k}": t for k, t in pairs(shapes).items()}, source)
    save_file(hf, base)
    report = lm.convert(source, tmp_path / "kohya.safetensors", "kohya", base=base)
    assert report["joined"] and report["approximated"] == 0
    made = load_file(tmp_path / "kohya.safetensors")
    assert any("double_blocks_0_img_attn_qkv.lora_up" in key for key in made)
    assert any("final_layer_adaLN_modulation_1" in key for key in made)
    same(changes(hf, tmp_path / "kohya.safetensors"), changes(hf, source))
    same(
        {n.removeprefix(PIXELS): t for n, t in changes(ldm, tmp_path / "kohya.safetensors").items()},
        {n.removeprefix(PIXELS): t for n, t in changes(ldm, source).items()},
    )
    report = lm.convert(tmp_path / "kohya.safetensors", tmp_path / "back", "diffusers", base=base)
    back, first = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors"), load_file(source)
    same(changes(hf, tmp_path / "back"), changes(hf, source))
    ranks = {k: t.shape[0] for k, t in first.items() if "lora_A" in k}
    assert {k: t.shape[0] for k, t in back.items() if "lora_A" in k and t.shape[0] != ranks.get(k)} == {}


def test_the_base_may_have_either_layout(flux: tuple[State, State], tmp_path: Path) -> None:
    hf, ldm = flux
    source = tmp_path / "fused.safetensors"
    shapes = {n.removeprefix(PIXELS): s for n, s in linears(ldm, "img_attn.qkv", "linear1", "linear2").items()}
    save_file({f"diffusion_model.{k}": t for k, t in pairs(shapes).items()}, source)
    for name, state in (("hf", hf), ("ldm", ldm)):
        base = tmp_path / f"{name}.safetensors"
        save_file(state, base)
        lm.convert(source, tmp_path / f"{name}-out", "diffusers", base=base)
        same(changes(state, tmp_path / f"{name}-out"), changes(state, source))
        lm.convert(source, tmp_path / f"{name}-comfy.safetensors", "comfyui", base=base)
        kept, first = load_file(tmp_path / f"{name}-comfy.safetensors"), load_file(source)
        for key, tensor in first.items():
            old = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            assert torch.equal(kept[old], tensor)
    both = [load_file(tmp_path / f"{n}-out" / "pytorch_lora_weights.safetensors") for n in ("hf", "ldm")]
    assert both[0].keys() == both[1].keys()
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in both[0]
    # q, k, v of one fused pair keep its A
    head = "transformer.transformer_blocks.0.attn"
    assert torch.equal(both[0][f"{head}.to_q.lora_A.weight"], both[0][f"{head}.to_k.lora_A.weight"])


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_what_is_written_for_it(tmp_path: Path, dora: bool) -> None:
    unet = image_zoo.unet15()
    state = image_zoo.randomised(unet)
    unet.load_state_dict({n: t * 0.1 for n, t in state.items()})
    state = {n: t.clone() for n, t in unet.state_dict().items()}
    base, kohya = tmp_path / "unet.safetensors", tmp_path / "kohya.safetensors"
    save_file(state, base)
    shapes = linears(state, "attn1.to_q", "attn1.to_v", "proj_in", "conv1", "time_embedding.linear_1")
    flat = {f"lora_unet_{path.replace('.', '_')}": shape for path, shape in shapes.items()}
    tensors = pairs(flat, down="lora_down", up="lora_up")
    for i, key in enumerate(sorted(flat)):
        if i % 3:
            tensors[f"{key}.alpha"] = torch.tensor(float(i % 5) + 0.5)
        if dora:
            shape = flat[key]
            tensors[f"{key}.dora_scale"] = torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5
    save_file(tensors, kohya)
    out = tmp_path / "out"
    report = lm.convert(kohya, out, "diffusers", base=base)
    assert report["modules"] == len(flat) and report["exact"] == len(flat)
    same(changes(state, out), changes(state, kohya), 1e-5 if dora else 1e-6)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, unet.config.cross_attention_dim))
    with torch.no_grad():
        before = unet(*inputs).sample
        merged = image_zoo.unet15()
        merged.load_state_dict(lm.merge_tensors(state, kohya))
        wanted = merged(*inputs).sample
        unet.load_lora_adapter(str(out), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        got = unet(*inputs).sample
    assert (wanted - before).abs().max() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert sum(hasattr(module, "lora_A") for module in unet.modules()) == len(flat)


def test_sdxl_is_named_as_its_trainers_do(tmp_path: Path) -> None:
    folders, single = image_zoo.sdxl_pipeline(True)
    base, source = tmp_path / "single.safetensors", tmp_path / "source.safetensors"
    save_file(single, base)
    shapes = {
        n.replace("/", ".", 1): s for n, s in linears(folders, "attn1.to_k", "self_attn.v_proj", "mlp.fc1").items()
    }
    save_file(pairs(shapes), source)
    lm.convert(source, tmp_path / "kohya.safetensors", "kohya", base=base)
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "kohya.safetensors")}
    assert {stem.split("_")[1] for stem in stems} == {"unet", "te1", "te2"}
    assert any(stem.startswith("lora_unet_input_blocks_") for stem in stems)
    assert "lora_te2_text_model_encoder_layers_0_self_attn_v_proj" in stems
    same(changes(single, tmp_path / "kohya.safetensors"), changes(single, source))
    lm.convert(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "diffusers", base=base)
    back = load_file(tmp_path / "back.safetensors")
    first = load_file(source)
    assert back.keys() == first.keys() and all(torch.equal(back[k], first[k]) for k in first)


def test_slots_of_a_grouped_linear_become_one_pair(tmp_path: Path) -> None:
    state = {
        "transformer.h.0.attn.c_attn.weight": torch.randn(8, 24),
        "transformer.h.0.mlp.c_fc.weight": torch.randn(8, 8),
    }
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    source = tmp_path / "source"
    source.mkdir()
    head = "base_model.model.transformer.h.0.attn.c_attn"
    factors = {f"{head}.lora_A.weight": torch.randn(4, 8), f"{head}.lora_B.weight": torch.randn(16, 2, 1)}
    save_file(factors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["c_attn"]}
    config |= {"enable_lora": [True, False, True], "fan_in_fan_out": True}
    (source / "adapter_config.json").write_text(json.dumps(config))
    report = lm.convert(source, tmp_path / "out", "peft", base=base)
    assert report["joined"] == 1
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert made[f"{head}.lora_A.weight"].shape == (4, 8) and made[f"{head}.lora_B.weight"].shape == (24, 4)
    assert not made[f"{head}.lora_B.weight"][8:16].any()
    config = {"model_type": "gpt2"}
    same(changes(state, tmp_path / "out", config=config), changes(state, source, config=config))


def test_embeddings_keep_their_own_factors(tmp_path: Path) -> None:
    state = {
        "model.embed_tokens.weight": torch.randn(9, 4),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4),
    }
    base = tmp_path / "base.safetensors"
    save_file(state, base)
    source = tmp_path / "source"
    source.mkdir()
    head = "base_model.model.model"
    factors = {
        f"{head}.embed_tokens.lora_embedding_A": torch.randn(2, 9),
        f"{head}.embed_tokens.lora_embedding_B": torch.randn(4, 2),
        f"{head}.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 4),
        f"{head}.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(4, 2),
    }
    save_file(factors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    wanted = changes(state, source)
    assert len(wanted) == 2
    for base_given in (None, base):
        out = tmp_path / f"out-{base_given is None}"
        lm.convert(source, out, "peft", base=base_given)
        made = load_file(out / "adapter_model.safetensors")
        assert made.keys() == factors.keys() and all(torch.equal(made[k], factors[k]) for k in factors)
    report = lm.convert(source, tmp_path / "out.bin", "loralib")
    assert report["alpha"] == 3
    same(changes(state, tmp_path / "out.bin", alpha=3), wanted)
    for base_given in (None, base):  # loralib has one name for both kinds of pairs
        out = tmp_path / f"back-{base_given is None}"
        lm.convert(tmp_path / "out.bin", out, "peft", alpha=3, allow_pickle=True, base=base_given)
        assert load_file(out / "adapter_model.safetensors").keys() == factors.keys()
        same(changes(state, out), wanted)


def test_a_pipeline_is_a_base(tmp_path: Path) -> None:
    folders, _ = image_zoo.sdxl_pipeline(True)
    base, index = tmp_path / "pipeline", {"_class_name": "StableDiffusionXLPipeline"}
    for folder in ("unet", "text_encoder", "text_encoder_2"):
        (base / folder).mkdir(parents=True)
        own = {n.partition("/")[2]: t for n, t in folders.items() if n.startswith(f"{folder}/")}
        name = "diffusion_pytorch_model" if folder == "unet" else "model"
        save_file(own, base / folder / f"{name}.safetensors")
        (base / folder / "config.json").write_text("{}")
        index[folder] = ["library", "Class"]  # type: ignore[assignment]
    (base / "model_index.json").write_text(json.dumps(index))
    source = tmp_path / "source.safetensors"
    shapes = {n.replace("/", ".", 1): s for n, s in linears(folders, "attn1.to_k", "mlp.fc1").items()}
    save_file(pairs(shapes), source)
    lm.convert(source, tmp_path / "kohya.safetensors", "kohya", base=base)
    lm.convert(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "diffusers", base=base)
    back, first = load_file(tmp_path / "back.safetensors"), load_file(source)
    assert back.keys() == first.keys() and all(torch.equal(back[k], first[k]) for k in first)
