"""Adapters in different layouts of one model: fused and split projections, row orders, stacked experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import image_zoo
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import LoramergeError, UnsupportedError

State = dict[str, Tensor]
PIXELS = "model.diffusion_model."


def changes(state: State, adapters: Any, **options: Any) -> State:
    """What a merge in float64 changes: each adapter's own layout is bound there, without combining."""
    doubled = {name: tensor.double() for name, tensor in state.items()}
    merged = lm.merge_tensors(doubled, adapters, compute_dtype="float64", allow_pickle=True, **options)
    return {n: t - doubled[n] for n, t in merged.items() if not torch.equal(t, doubled[n])}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], limit: float = 2e-6) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert float((a[name] - b[name]).norm()) <= limit * float(b[name].norm()), name


def pairs(shapes: Mapping[str, tuple[int, ...]], seed: int) -> State:
    generator, made = torch.Generator().manual_seed(seed), {}
    for i, (path, shape) in enumerate(shapes.items()):
        r = (i + seed) % 3 + 1
        made[f"{path}.lora_A.weight"] = torch.randn(r, *shape[1:], generator=generator)
        made[f"{path}.lora_B.weight"] = torch.randn(shape[0], r, *[1] * (len(shape) - 2), generator=generator)
    return made


def shapes_of(state: State, *words: str) -> dict[str, tuple[int, ...]]:
    names = [n for n, t in state.items() if n.endswith(".weight") and t.dim() > 1 and any(w in n for w in words)]
    return {n.removesuffix(".weight"): tuple(state[n].shape) for n in names}


# ----------------------------------------------------------------------------------------------------- image models


@pytest.fixture(scope="module")
def flux() -> tuple[State, State]:
    """The same tiny Flux in both layouts."""
    hf = image_zoo.randomised(image_zoo.flux1())
    return hf, {f"{PIXELS}{n}": t for n, t in image_zoo.single_file(hf, {"transformer": ""}).items()}


@pytest.fixture
def split_and_fused(flux: tuple[State, State], tmp_path: Path) -> tuple[Path, Path]:
    hf, ldm = flux
    split, fused = tmp_path / "split.safetensors", tmp_path / "fused.safetensors"
    shapes = shapes_of(hf, "attn.to_q", "attn.to_v", "ff.net.2", "proj_mlp")
    save_file({f"transformer.{k}": t for k, t in pairs(shapes, 1).items()}, split)
    shapes = {n.removeprefix(PIXELS): s for n, s in shapes_of(ldm, "img_attn.qkv", "linear1", "img_mlp.2").items()}
    save_file({f"diffusion_model.{k}": t for k, t in pairs(shapes, 2).items()}, fused)
    return split, fused


@pytest.mark.parametrize("layout", ["hf", "ldm"])
def test_fused_and_split_projections_are_one(
    flux: tuple[State, State], split_and_fused: tuple[Path, Path], tmp_path: Path, layout: str
) -> None:
    state, base = flux[layout == "ldm"], tmp_path / "base.safetensors"
    save_file(state, base)
    split, fused = split_and_fused
    wanted = changes(state, {split: 0.5, fused: -1.0})
    report = lm.combine({split: 0.5, fused: -1.0}, tmp_path / "out", base=base)
    assert report["to"] == "diffusers"
    assert {row["adapters"] for row in report["rows"]} == {1, 2}
    same(changes(state, tmp_path / "out"), wanted)
    lm.combine({split: 0.5, fused: -1.0}, tmp_path / "out.safetensors", base=base, to="kohya")
    same(changes(state, tmp_path / "out.safetensors"), wanted)


def test_without_a_base_different_layouts_are_refused(split_and_fused: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LoramergeError) as caught:
        lm.combine(list(split_and_fused), tmp_path / "out")
    assert caught.value.code in ("combine.architecture", "combine.needs-base") and "--base" in caught.value.fix


# --------------------------------------------------------------------------------------------------- language models

HEADS, KV_HEADS, SIZE = 4, 2, 4
WIDTH = HEADS * SIZE
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
}


def llama() -> State:
    generator, state = torch.Generator().manual_seed(0), {}
    for n in range(2):
        for module, rows in (("q_proj", WIDTH), ("k_proj", KV_HEADS * SIZE), ("v_proj", KV_HEADS * SIZE)):
            name = f"model.layers.{n}.self_attn.{module}.weight"
            state[name] = torch.randn(rows, WIDTH, generator=generator)
        state[f"model.layers.{n}.mlp.down_proj.weight"] = torch.randn(WIDTH, 24, generator=generator)
    return {"model.embed_tokens.weight": torch.randn(11, WIDTH, generator=generator), **state}


def llama_base(folder: Path) -> Path:
    folder.mkdir()
    # Several shards.
    names = list(llama())
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: llama()[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def peft_adapter(folder: Path, seed: int, **config: Any) -> Path:
    folder.mkdir()
    shapes = shapes_of(llama(), "proj")
    tensors = pairs({f"base_model.model.{k}": s for k, s in shapes.items()}, seed)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    ranks = {k: tensors[f"base_model.model.{k}.lora_A.weight"].shape[0] for k in shapes}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "rank_pattern": ranks}))
    return folder


@pytest.mark.parametrize(("dialect", "out"), [("mlx", "o"), ("torchtune", "o"), ("llama.cpp", "o.gguf")])
def test_other_tools_join_peft(tmp_path: Path, dialect: str, out: str) -> None:
    base = llama_base(tmp_path / "base")
    a, b = (
        peft_adapter(tmp_path / x, n, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
        for n, x in ((1, "a"), (2, "b"))
    )
    theirs, two = tmp_path / f"theirs-{out}", tmp_path / f"two-{out}"
    lm.convert(b, theirs, dialect, base=base)
    wanted = changes(llama(), {a: 1.0, b: -0.5}, config=CONFIG)
    lm.combine({a: 1.0, theirs: -0.5}, tmp_path / "both", base=base, allow_pickle=True)
    same(changes(llama(), tmp_path / "both", config=CONFIG), wanted, 5e-6)
    lm.combine({theirs: -0.5, a: 1.0}, two, base=base, allow_pickle=True)
    same(changes(llama(), two, config=CONFIG), wanted, 5e-6)


@pytest.mark.parametrize("named", ["mlp.experts.down_proj", "down_proj"])
def test_stacked_experts_are_refused_by_name(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "moe"
    folder.mkdir()
    head = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{head}.lora_A.weight": torch.randn(4 * 2, 8), f"{head}.lora_B.weight": torch.randn(6, 2 * 4)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": [named]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": []}))
    with pytest.raises(UnsupportedError) as caught:
        lm.combine({folder: 0.5}, tmp_path / "out")
    assert caught.value.code == "combine.stacked" and "merge --method" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_experts_are_written_one_by_one_where_that_is_asked_for(tmp_path: Path) -> None:
    """A Mixtral whose checkpoint has a matrix for each expert, and adapters of the stack that transformers makes."""
    generator, state = torch.Generator().manual_seed(1), {}
    head = "model.layers.0.block_sparse_moe.experts"
    for e in range(3):
        for name, shape in (("w1", (6, 8)), ("w2", (8, 6)), ("w3", (6, 8))):
            state[f"{head}.{e}.{name}.weight"] = torch.randn(shape, generator=generator)
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    config = {"model_type": "mixtral", "num_local_experts": 3, "hidden_size": 8, "intermediate_size": 6}
    (base / "config.json").write_text(json.dumps(config))
    adapters = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = "base_model.model.model.layers.0.mlp.experts"
        tensors = {
            f"{path}.lora_A.weight": torch.randn(3 * 2, 6, generator=generator),
            f"{path}.lora_B.weight": torch.randn(8, 2 * 3, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": ["mlp.experts.down_proj"]}
        fields |= {"target_modules": [], "peft_version": "0.19.1"}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        adapters.append(folder)
    wanted = changes(state, {adapters[0]: 1.0, adapters[1]: -0.5}, config=config)
    report = lm.combine({adapters[0]: 1.0, adapters[1]: -0.5}, tmp_path / "out", base=base, to="peft")
    assert len(wanted) == report["modules"] == 3
    same(changes(state, tmp_path / "out", config=config), wanted)
