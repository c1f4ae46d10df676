"""There and back: what was merged with an undo file comes out again byte for byte, whatever was merged."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import samples as dialects
import test_grown as grown
import test_lycoris_merge as lycoris_methods
import test_peft_merge as zoo
import test_peft_methods_a as methods_a
import test_peft_methods_b as methods_b
import test_vocabulary as vocabulary
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pipeline_merge import Trained, lora, sdxl  # noqa: F401
from torch import Tensor

import loramerge as lm
from loramerge.errors import LoramergeError
from loramerge.merging.undo import FOOTER, MAGIC

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OURS = {"loramerge.json", "loramerge.undo"}
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", NAMES.values(), ids=NAMES)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those of loramerge itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in OURS]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def same(a: Path, b: Path, but: Sequence[str] = ()) -> None:
    """Both folders hold the same files, byte for byte."""
    left, right = tree(a), tree(b)
    assert left.keys() - set(but) == right.keys() - set(but)
    assert [name for name in left if name in right and left[name] != right[name]] == []


def there_and_back(base: Path, adapters: Any, tmp: Path, but: Sequence[str] = (), **options: Any) -> lm.Receipt:
    """Merges with an undo file and without: the same weights. Takes it out again: the same files."""
    receipt = lm.merge(base, adapters, tmp / "merged", reversible=True, **options)
    lm.merge(base, adapters, tmp / "plain", **options)
    same(tmp / "merged", tmp / "plain")
    lm.unmerge(tmp / "merged", tmp / "back")
    same(tmp / "back", base, but)
    assert not (tmp / "back" / "loramerge.undo").exists()
    assert lm.verify(tmp / "back")["ok"]
    return receipt


def written(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """A model folder; floating tensors in `dtype`."""
    folder.mkdir(parents=True)
    held = {k: v.detach().to(dtype or v.dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in held.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "some", **config}))
    return folder


# --- every kind of update -----------------------------------------------------------------------------


BF16 = [(case, torch.bfloat16) for case in methods_a.CASES]
OTHERS = [(case, dtype) for case in methods_a.FIRST for dtype in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), BF16 + OTHERS, ids=lambda x: getattr(x, "name", str(x)))
def test_methods_of_peft_on_one_weight(case: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    single = replace(case, dtype=torch.float32)
    methods_a.trained(single).save_pretrained(tmp_path / "adapter")
    base = written(methods_a.base(torch.float32).state_dict(), tmp_path / "base", dtype, model_type="gpt2")
    receipt = there_and_back(base, tmp_path / "adapter", tmp_path)
    assert receipt.counts["changed"] >= len(case.modules) or case.name == "adalora alpha 0"


@pytest.mark.parametrize("name", methods_b.CONFIGS)
def test_methods_of_peft_with_shared_factors(name: str, tmp_path: Path) -> None:
    methods_b.trained(methods_b.seeded(), methods_b.CONFIGS[name]()).save_pretrained(tmp_path / "adapter")
    base = written(methods_b.seeded().state_dict(), tmp_path / "base", torch.bfloat16)
    there_and_back(base, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(("algorithm", "options"), lycoris_methods.ALGORITHMS, ids=str)
def test_algorithms_of_lycoris(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    _, bare, saved = lycoris_methods.trained(algorithm, options)
    save_file(saved, tmp_path / "adapter.safetensors")
    base = written(bare.state_dict(), tmp_path / "base", torch.bfloat16)
    there_and_back(base, tmp_path / "adapter.safetensors", tmp_path)


@pytest.mark.parametrize("sample", dialects.samples(), ids=lambda s: s.name)
@each_dtype
def test_files_of_every_dialect(sample: dialects.Sample, dtype: torch.dtype, tmp_path: Path) -> None:
    path = sample.write(tmp_path / "adapter")
    base = written(dialects.base(), tmp_path / "base", dtype)
    alpha = 1.0 if sample.dialect == "loralib" else None
    there_and_back(base, {path: -0.7}, tmp_path, alpha=alpha, allow_pickle=True)


# --- whole models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> zoo.Lab:
    return zoo.Lab(tmp_path_factory.mktemp("lab"))


SKIPPED = {f"{arch}-all" for arch in zoo.ZOO} - {"gpt2-all", "phi3-all", "gpt_oss-all", "falcon_new-all", "resnet-all"}


@pytest.mark.parametrize("case", [c for c in zoo.CASES if c.id not in SKIPPED], ids=lambda c: c.id)
def test_adapters_of_models(case: zoo.Case, lab: zoo.Lab, tmp_path: Path) -> None:
    """Embeddings, heads, tied weights that are untied, token rows, biases, experts stacked and apart, DoRA."""
    whole = lab.base(case.arch, **case.sizes)
    adapter = lab.adapter(whole, case.cls, case.options, saving=case.saving)
    base = lab.base(case.arch, dtype=torch.bfloat16, **case.sizes)
    there_and_back(base, adapter, tmp_path)


@pytest.mark.parametrize("name", zoo.HEADS)
def test_heads_that_only_the_adapter_has(name: str, lab: zoo.Lab, tmp_path: Path) -> None:
    arch, saved_as, cls, task, heads = zoo.HEADS[name]
    base = lab.base(arch, model=saved_as)
    options: dict[str, Any] = {"target_modules": zoo.few(arch), "modules_to_save": heads}
    adapter = lab.adapter(base, cls, options | ({"task_type": task} if task else {}), num_labels=3)
    receipt = there_and_back(base, adapter, tmp_path)
    assert receipt.counts["added"]
    assert tree(tmp_path / "merged")["config.json"] != tree(base)["config.json"]


@pytest.mark.parametrize("ranges", [[[0, 2], [0, 1], [1, 2], [0, 2]], [[1, 2], [0, 2]], [[1, 2], [0, 1]]], ids=str)
def test_replicated_layers(ranges: list[list[int]], lab: zoo.Lab, tmp_path: Path) -> None:
    base = lab.base("llama", dtype=torch.bfloat16)
    options = {**zoo.ALL, "layer_replication": ranges}
    there_and_back(base, lab.adapter(lab.base("llama"), "LlamaForCausalLM", options), tmp_path)


@pytest.mark.parametrize("case", ["llama-dora", "llama_tied-lm_head", "qwen3_moe-experts", "llama-save-both"])
def test_shards_and_their_index(case: str, lab: zoo.Lab, tmp_path: Path) -> None:
    made = zoo.BY_ID[case]
    adapter = lab.adapter(lab.base(made.arch), made.cls, made.options, saving=made.saving)
    base = lab.base(made.arch, dtype=torch.bfloat16, shard="20KB")
    assert (base / "model.safetensors.index.json").is_file()
    there_and_back(base, adapter, tmp_path)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(zoo.read_tensors(base))


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
def test_an_output_cut_otherwise_comes_back_as_it_was(shards: str, lab: zoo.Lab, tmp_path: Path) -> None:
    base = lab.base("llama", dtype=torch.bfloat16, shard="" if shards == "20KB" else "20KB")
    adapter = lab.adapter(lab.base("llama"), "LlamaForCausalLM", zoo.ALL)
    size = 20_000 if shards == "20KB" else 10**9
    there_and_back(base, adapter, tmp_path, shard_size=size)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=["saved", "both"])
def test_another_vocabulary_and_tokenizer(targets: list[str], tied: bool, tmp_path: Path) -> None:
    model = vocabulary.model(tied)
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (base / name).write_text("of the base")
    model.resize_token_embeddings(vocabulary.MORE)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]} if len(targets) == 1 else {}
    vocabulary.adapter(model, tmp_path / "lora", target_modules=targets, **saved)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "lora" / name).write_text("of the adapter")
    there_and_back(base, tmp_path / "lora", tmp_path)
    assert (tmp_path / "merged" / "added_tokens.json").is_file()
    assert not (tmp_path / "merged" / "merges.txt").exists()


@pytest.mark.parametrize("width", [4, 8])
def test_layers_that_grew_shrink_again(width: int, tmp_path: Path) -> None:
    base = written(grown.base() | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4)}, tmp_path / "base")
    save_file(grown.control(width), tmp_path / "control.safetensors")
    there_and_back(base, tmp_path / "control.safetensors", tmp_path)


def test_a_pipeline(sdxl: Path, lora: Trained, tmp_path: Path) -> None:  # noqa: F811
    """Two text encoders whose tensors have the same names."""
    there_and_back(sdxl, lora.file, tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_of_pytorch_files_comes_back_as_safetensors(shards: int, tmp_path: Path) -> None:
    base, adapter = small(tmp_path, torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = [f"pytorch_model-{i}-of-2.bin" for i in (1, 2)] if shards == 2 else ["pytorch_model.bin"]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, base / file)
    if shards == 2:
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    other = small_adapter(tmp_path / "other", 7, ["o_proj"])
    lm.merge(base, adapter, tmp_path / "merged", reversible=True, allow_pickle=True)
    lm.switch(tmp_path / "merged", other, tmp_path / "switched")
    lm.merge(base, other, tmp_path / "fresh", allow_pickle=True)
    assert tree(tmp_path / "switched").keys() == tree(tmp_path / "fresh").keys()
    for merged in ("merged", "switched"):
        back = tmp_path / f"back-{merged}"
        lm.unmerge(tmp_path / merged, back)
        held: dict[str, Tensor] = {}
        for file in back.glob("*.safetensors"):
            held |= load_file(file)
        save_file(held, tmp_path / "held.safetensors")
        equal(tmp_path / "held.safetensors", tensors)
        lm.merge(back, other, tmp_path / f"again-{merged}")  # its index fits its files
        assert tree(back)["config.json"] == tree(base)["config.json"]


# --- numbers ------------------------------------------------------------------------------------------------


def pair(module: str, rows: int, cols: int, rank: int, seed: int, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) * size for shape in ((rank, cols), (rows, rank)))
    return {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}


def peft_adapter(folder: Path, tensors: Mapping[str, Tensor], rank: int = 4, alpha: float = 8, **more: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


SIZES = {"q_proj": (24, 17), "v_proj": (8, 17), "o_proj": (17, 24)}


def small_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.norm.weight": torch.ones(17, dtype=dtype), "model.empty.weight": torch.zeros(0, 5, dtype=dtype)}
    for i in range(2):
        for name, shape in SIZES.items():
            w = torch.randn(shape, generator=generator)
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = w.to(dtype)
    return tensors


def small_adapter(folder: Path, seed: int, names: Sequence[str] = tuple(SIZES), **options: Any) -> Path:
    tensors: dict[str, Tensor] = {}
    rank = options.get("rank", 4)
    for i in range(2):
        for name in names:
            tensors |= pair(f"model.layers.{i}.self_attn.{name}", *SIZES[name], rank, seed + i)
    return peft_adapter(folder, tensors, **options)


def small(tmp: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A base and an adapter of three of its six layers' modules."""
    return written(small_tensors(dtype), tmp / "base"), small_adapter(tmp / "adapter", 1)


def equal(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file holds these tensors, bit for bit."""
    held = load_file(path)
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        kind = BITS[tensor.element_size()]
        assert held[name].dtype == tensor.dtype and torch.equal(held[name].view(kind), tensor.view(kind)), name


@each_dtype
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_updates_of_every_size(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    W = torch.randn(96, 80) * torch.exp(torch.randn(96, 1))
    W[torch.rand(96, 80) < 0.001] *= 30
    tensors = pair("model.layers.0.mlp.up_proj", 96, 80, 16, 1)
    A, B = tensors.values()
    B *= size * W.norm() / (B @ A).norm()
    base = written({"model.layers.0.mlp.up_proj.weight": W}, tmp_path / "base", dtype)
    there_and_back(base, peft_adapter(tmp_path / "adapter", tensors, 16, 16), tmp_path)


@each_dtype
def test_several_adapters_with_negative_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    base = written(small_tensors(dtype), tmp_path / "base")
    given = {
        small_adapter(tmp_path / f"a{i}", 10 * i, rank=r): w for i, (r, w) in enumerate([(1, 0.7), (4, -1.3), (3, 2)])
    }
    there_and_back(base, given, tmp_path)


@pytest.mark.parametrize("what", ["zero B", "alpha 0", "weight 0"])
def test_an_adapter_that_changes_nothing(what: str, tmp_path: Path) -> None:
    base = written(small_tensors(torch.bfloat16), tmp_path / "base")
    adapter = small_adapter(tmp_path / "adapter", 1, alpha=0 if what == "alpha 0" else 8)
    if what == "zero B":
        path = adapter / "adapter_model.safetensors"
        save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    there_and_back(base, {adapter: 0 if what == "weight 0" else 1}, tmp_path)
    equal(tmp_path / "merged" / "model.safetensors", load_file(base / "model.safetensors"))
    assert (tmp_path / "merged" / "loramerge.undo").stat().st_size < 3000


@each_dtype
def test_one_module_of_two_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    base = written(small_tensors(dtype), tmp_path / "base")
    adapter = small_adapter(tmp_path / "adapter", 1)
    path = adapter / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "v_proj.lora_B" in k else v for k, v in load_file(path).items()}, path)
    there_and_back(base, adapter, tmp_path)


@each_dtype
def test_signed_zeros_and_subnormals(dtype: torch.dtype, tmp_path: Path) -> None:
    kind = BITS[dtype.itemsize]
    tensors = small_tensors(dtype)
    top = torch.finfo(dtype).smallest_normal
    for name, tensor in tensors.items():
        if tensor.numel() > 60 and tensor.dim() == 2:
            flat = tensor.view(-1)
            flat[::5] = 0.0
            flat[1::7] = -0.0
            flat[2::9] = torch.arange(1, len(flat[2::9]) + 1).to(kind).view(dtype)
            flat[3::9] = -torch.arange(1, len(flat[3::9]) + 1).to(kind).view(dtype)
            flat[4::11] = top
            tensors[name] = tensor
    base = written(tensors, tmp_path / "base")
    assert bool((load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"] == 0).any())
    adapter = small_adapter(tmp_path / "adapter", 1)
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    for key, factor in factors.items():
        if "lora_B" in key:
            factor[::2] = 0  # rows without an update, beside others
            factor[1::4] *= 1e-20
    save_file(factors, path)
    there_and_back(base, adapter, tmp_path)


def test_float64_which_has_no_candidates(tmp_path: Path) -> None:
    there_and_back(*small(tmp_path, torch.float64), tmp_path)


@each_dtype
def test_a_float64_merge(dtype: torch.dtype, tmp_path: Path) -> None:
    there_and_back(*small(tmp_path, dtype), tmp_path, compute_dtype="float64")


def test_several_blocks_pieces_of_rows_and_rows_longer_than_a_block(tmp_path: Path) -> None:
    """Blocks of 8 MiB, pieces of 1 MiB, and one row of 9 MiB."""
    torch.manual_seed(0)
    names = {"q_proj": (3001, 2111), "v_proj": (2, 4_800_001), "o_proj": (700_001, 9)}
    tensors = {f"model.layers.0.self_attn.{n}.weight": torch.randn(shape).bfloat16() for n, shape in names.items()}
    base = written(tensors, tmp_path / "base")
    factors: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(names.items()):
        factors |= pair(f"model.layers.0.self_attn.{name}", *shape, 2, i)
    lm.merge(base, peft_adapter(tmp_path / "adapter", factors, 2), tmp_path / "merged", reversible=True, jobs=3)
    lm.unmerge(tmp_path / "merged", tmp_path / "back", jobs=2)
    same(tmp_path / "back", base)


def test_tensors_at_odd_offsets(tmp_path: Path) -> None:
    """A tensor of bytes leaves what follows it where no kernel works."""
    tensors = small_tensors(torch.bfloat16)
    held = {"model.a.mask": torch.ones(3, dtype=torch.uint8)} | tensors
    base = written(held, tmp_path / "base")
    header = json.dumps(
        {
            name: {
                "dtype": "U8" if name.endswith("mask") else "BF16",
                "shape": list(t.shape),
                "data_offsets": [
                    sum(v.nbytes for v in list(held.values())[:i]),
                    sum(v.nbytes for v in list(held.values())[: i + 1]),
                ],
            }
            for i, (name, t) in enumerate(held.items())
        }
    ).encode()
    data = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in held.values())
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    there_and_back(base, small_adapter(tmp_path / "adapter", 1), tmp_path)


def test_a_single_file(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, torch.float16)
    one = base / "model.safetensors"
    lm.merge(one, adapter, tmp_path / "merged.safetensors", reversible=True)
    assert sorted(p.name for p in tmp_path.glob("merged*")) == [
        "merged.loramerge.json", "merged.loramerge.undo", "merged.safetensors",
    ]  # fmt: skip
    lm.unmerge(tmp_path / "merged.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == one.read_bytes()
    assert not (tmp_path / "back.loramerge.undo").exists()
    assert lm.verify(tmp_path / "back.safetensors")["ok"]


def test_the_header_of_the_base_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Metadata that a merge drops, the order of names, spaces."""
    base, adapter = small(tmp_path, torch.bfloat16)
    save_file(small_tensors(torch.bfloat16), base / "model.safetensors", {"sshs_model_hash": "x", "b": "2", "a": "é"})
    there_and_back(base, adapter, tmp_path)
    assert b"sshs_model_hash" in tree(tmp_path / "back")["model.safetensors"][:4096]


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-100, max_value=100)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_model(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp = tmp_path_factory.mktemp("any")
    dtype = data.draw(st.sampled_from(list(NAMES.values())))
    tensors: dict[str, Tensor] = {}
    factors: list[dict[str, Tensor]] = [{} for _ in range(data.draw(st.integers(1, 3)))]
    ranks = [data.draw(st.integers(1, 3)) for _ in factors]
    for i in range(data.draw(st.integers(1, 3))):
        rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
        drawn = [data.draw(st.lists(NUMBERS, min_size=rows * cols, max_size=rows * cols))]
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = torch.tensor(drawn[0]).view(rows, cols).to(dtype)
        for number, rank in enumerate(ranks):
            if number == 0 or data.draw(st.booleans()):
                scale = 10.0 ** data.draw(st.integers(-6, 0))
                seed = data.draw(st.integers(0, 99))
                factors[number] |= pair(f"model.layers.{i}.mlp.up_proj", rows, cols, rank, seed, scale)
    adapters = {
        peft_adapter(tmp / f"a{i}", f, ranks[i]): data.draw(st.sampled_from([1.0, -0.5, 0.0, 3.0]))
        for i, f in enumerate(factors)
        if f
    }
    there_and_back(written(tensors, tmp / "base"), adapters, tmp)


# --- the same bytes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tensors of several blocks of 8 MiB, and two adapters, one of them DoRA, for two of them each."""
    tmp = tmp_path_factory.mktemp("blocks")
    torch.manual_seed(0)
    names = {"q_proj": (2500, 4096), "k_proj": (1024, 512), "v_proj": (3000, 3000), "o_proj": (400, 2500)}
    tensors = {f"model.layers.0.self_attn.{n}.weight": torch.randn(shape).bfloat16() for n, shape in names.items()}
    factors: list[dict[str, Tensor]] = [{}, {}]
    for i, (name, shape) in enumerate(names.items()):
        module = f"model.layers.0.self_attn.{name}"
        factors[i % 2] |= pair(module, *shape, 4, i, 0.01)
        if i % 2:
            magnitude = (torch.rand(shape[0]) * 0.1 + 1) * shape[1] ** 0.5
            factors[1][f"base_model.model.{module}.lora_magnitude_vector"] = magnitude
    for i in (0, 1):
        peft_adapter(tmp / "adapters" / str(i), factors[i], use_dora=bool(i))
    return written(tensors, tmp / "base"), tmp / "adapters"


def test_the_same_command_writes_the_same_bytes_whatever_its_workers(blocks: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapters = blocks
    for i, jobs in enumerate((1, 2, 5, 5)):
        lm.merge(base, [adapters / "0", adapters / "1"], tmp_path / str(i), reversible=True, jobs=jobs)
        for name in ("loramerge.undo", "loramerge.json", "model.safetensors"):
            assert (tmp_path / str(i) / name).read_bytes() == (tmp_path / "0" / name).read_bytes(), (name, jobs)


UNMERGE = """
import sys
import torch
import loramerge as lm
from loramerge.merging import stream

before = stream._Run._tasks

def backwards(self):
    return iter([task for task in before(self)][::-1])

if sys.argv[4] == "backwards":
    stream._Run._tasks = backwards
kept = torch.set_num_threads
kept(int(sys.argv[5]))
torch.set_num_threads = lambda n: None  # as many as were asked for, in the workers too
lm.unmerge(sys.argv[1], sys.argv[2], jobs=int(sys.argv[3]))
"""


@pytest.mark.parametrize(("jobs", "order", "threads"), [(1, "forwards", 2), (5, "backwards", 1), (2, "backwards", 3)])
def test_a_model_comes_back_on_another_machine(
    jobs: int, order: str, threads: int, blocks: tuple[Path, Path], tmp_path: Path
) -> None:
    """Other threads, other workers, blocks in another order; the adapter and the base are gone."""
    base, adapters = blocks
    shutil.copytree(adapters, tmp_path / "adapters")
    given = [tmp_path / "adapters" / name for name in "01"]
    lm.merge(base, given, tmp_path / "merged", reversible=True, jobs=3)
    shutil.rmtree(tmp_path / "adapters")
    (tmp_path / "merged").rename(tmp_path / "elsewhere")
    places = [str(tmp_path / "elsewhere"), str(tmp_path / "back")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [sys.executable, "-c", UNMERGE, *places, str(jobs), order, str(threads)], env=environment, check=True
    )
    same(tmp_path / "back", base)


# --- switching ----------------------------------------------------------------------------------------------


def adapters_of_five_sorts(folder: Path, dtype: torch.dtype) -> tuple[Path, list[Any]]:
    """A base, and for it: two of PEFT, DoRA, LyCORIS kinds that look at the weight, replaced tensors."""
    by_name = {sample.name: sample for sample in dialects.samples()}
    base = written(dialects.base(), folder / "base", dtype)
    names = ("peft", "peft-dora", "lycoris-glora", "kohya-oft", "lycoris-lokr")
    made: list[Any] = [by_name[name].write(folder / name) for name in names]
    made = [path.parent if path.name == "adapter_model.safetensors" else path for path in made]
    made[2] = (made[2], 0.5)
    module = "transformer_blocks.1.norm"
    saved = {f"base_model.model.{module}.{part}": torch.randn(12) for part in ("weight", "bias")}
    both = load_file(made[0] / "adapter_model.safetensors")
    half = peft_adapter(folder / "half", {k: v for k, v in both.items() if ".1." in k or ".2." in k} | saved, 2)
    config = json.loads((half / "adapter_config.json").read_text()) | {"modules_to_save": ["norm"]}
    (half / "adapter_config.json").write_text(json.dumps(config))
    return base, [*made, half]


@each_dtype
def test_twenty_switches_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapters = adapters_of_five_sorts(tmp_path, dtype)
    fresh = []
    for i, adapter in enumerate(adapters):
        lm.merge(base, [adapter], tmp_path / f"fresh{i}")
        fresh.append(tree(tmp_path / f"fresh{i}"))
    lm.merge(base, [adapters[0]], tmp_path / "0", reversible=True)
    chance = random.Random(1)
    order = [chance.randrange(len(adapters)) for _ in range(20 - len(adapters))] + list(range(len(adapters)))
    for i, which in enumerate(order):
        lm.switch(tmp_path / str(i), [adapters[which]], tmp_path / str(i + 1))
        assert tree(tmp_path / str(i + 1)).keys() == fresh[which].keys()
        merged = load_file(tmp_path / f"fresh{which}" / "model.safetensors")
        equal(tmp_path / str(i + 1) / "model.safetensors", merged)
        assert lm.verify(tmp_path / str(i + 1))["ok"]
        if i % 5 == 0:
            lm.unmerge(tmp_path / str(i + 1), tmp_path / f"back{i}")
            same(tmp_path / f"back{i}", base)
    sizes = [(tmp_path / str(i) / "loramerge.undo").stat().st_size for i in range(1, 21)]
    assert max(sizes) < 2 * max(sizes[:7])  # nothing is carried along from switch to switch
    lm.unmerge(tmp_path / "20", tmp_path / "back")
    same(tmp_path / "back", base)


@pytest.mark.parametrize("by", methods_a.FIRST, ids=lambda c: c.name)
def test_a_switch_to_any_method_equals_its_merge(by: Any, tmp_path: Path) -> None:
    """What looks at the weight must see the base's, not the merged one."""
    single = replace(by, dtype=torch.float32)
    methods_a.trained(single).save_pretrained(tmp_path / "new")
    first = replace(next(c for c in methods_a.CASES if c.name == "adalora"), dtype=torch.float32, modules=by.modules)
    if set(by.modules) - {*methods_a.LINEARS, "c_proj", "c_attn", "conv"}:
        first = single
        torch.manual_seed(99)
    old = methods_a.trained(first)
    if first is single:
        with torch.no_grad():
            for parameter in old.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.7)
    old.save_pretrained(tmp_path / "old")
    state = methods_a.base(torch.float32).state_dict()
    base = written(state, tmp_path / "base", torch.bfloat16, model_type="gpt2")
    lm.merge(base, tmp_path / "old", tmp_path / "a", reversible=True)
    lm.switch(tmp_path / "a", tmp_path / "new", tmp_path / "b")
    lm.merge(base, tmp_path / "new", tmp_path / "fresh")
    equal(tmp_path / "b" / "model.safetensors", load_file(tmp_path / "fresh" / "model.safetensors"))
    lm.unmerge(tmp_path / "b", tmp_path / "back")
    same(tmp_path / "back", base)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llama_tied-lm_head", "llama_tied-save-embedding"),
        ("llama_tied-save-embedding", "llama_tied-tokens"),
        ("llama_tied-tokens", "llama_tied-both"),
        ("llama-save-both", "llama-dora-embedding"),
        ("llama-dora-embedding", "llama-tokens-dict"),
        ("gpt_oss-experts", "gpt_oss-router"),
        ("mixtral-router-experts", "mixtral-experts"),
    ],
)
@pytest.mark.parametrize("shard", ["", "20KB"], ids=["one file", "shards"])
def test_a_switch_between_adapters_of_other_shapes(
    one: str, other: str, shard: str, lab: zoo.Lab, tmp_path: Path
) -> None:
    """Untied and tied, replaced and changed, with the config and the index that each needs."""
    cases = [zoo.BY_ID[name] for name in (one, other)]
    whole = lab.base(cases[0].arch)
    paths = [lab.adapter(whole, case.cls, case.options, saving=case.saving) for case in cases]
    base = lab.base(cases[0].arch, dtype=torch.bfloat16, shard=shard)
    lm.merge(base, paths[0], tmp_path / "a", reversible=True)
    lm.switch(tmp_path / "a", paths[1], tmp_path / "b")
    lm.merge(base, paths[1], tmp_path / "fresh")
    fresh, switched = zoo.read_tensors(tmp_path / "fresh"), zoo.read_tensors(tmp_path / "b")
    assert fresh.keys() == switched.keys()
    assert all(zoo.same_bits(fresh[name], switched[name]) for name in fresh)
    assert tree(tmp_path / "b").keys() == tree(tmp_path / "fresh").keys()
    for name in ("config.json", "model.safetensors.index.json"):
        assert tree(tmp_path / "b").get(name) == tree(tmp_path / "fresh").get(name)
    assert lm.verify(tmp_path / "b")["ok"]
    lm.switch(tmp_path / "b", paths[0], tmp_path / "c")
    assert zoo.read_tensors(tmp_path / "c").keys() == zoo.read_tensors(tmp_path / "a").keys()
    lm.unmerge(tmp_path / "c", tmp_path / "back")
    same(tmp_path / "back", base)


def test_a_switch_between_tokenizers(tmp_path: Path) -> None:
    base, one = small(tmp_path, torch.bfloat16)
    other = small_adapter(tmp_path / "other", 5, ["q_proj"])
    for folder, names in {base: "abc", one: "ad", other: ""}.items():
        for name in names:
            (
                folder / {"a": "tokenizer.json", "b": "merges.txt", "c": "vocab.json", "d": "chat_template.jinja"}[name]
            ).write_text(folder.name)
    lm.merge(base, one, tmp_path / "1", reversible=True)
    lm.switch(tmp_path / "1", other, tmp_path / "2")
    lm.merge(base, other, tmp_path / "fresh")
    side = [{name: raw for name, raw in tree(tmp_path / at).items() if ".safe" not in name} for at in ("2", "fresh")]
    assert side[0] == side[1] and len(side[0]) > 1
    lm.switch(tmp_path / "2", one, tmp_path / "3")
    lm.switch(tmp_path / "3", [(one, -1), (other, 2)], tmp_path / "4")
    lm.unmerge(tmp_path / "4", tmp_path / "back")
    same(tmp_path / "back", base)


def test_a_switch_of_a_single_file(tmp_path: Path) -> None:
    base, one = small(tmp_path, torch.float16)
    other = small_adapter(tmp_path / "other", 5, ["q_proj"])
    lm.merge(base / "model.safetensors", one, tmp_path / "1.safetensors", reversible=True)
    lm.switch(tmp_path / "1.safetensors", other, tmp_path / "2.safetensors")
    lm.merge(base / "model.safetensors", other, tmp_path / "fresh.safetensors")
    equal(tmp_path / "2.safetensors", load_file(tmp_path / "fresh.safetensors"))
    lm.unmerge(tmp_path / "2.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


# --- what must not pass ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A merged model with a tensor of each sort, its base, and the bytes of its undo file."""

    merged: Path
    base: Path
    adapters: list[Any]
    undo: bytes

    @property
    def index(self) -> dict[str, Any]:
        at, length, _ = FOOTER.unpack(self.undo[-FOOTER.size :])
        found: dict[str, Any] = json.loads(zlib.decompress(self.undo[at : at + length]))
        return found

    def with_index(self, index: Mapping[str, Any], segments: bytes = b"") -> bytes:
        """The undo file with another index, and more before it, its checksums right."""
        at, _, _ = FOOTER.unpack(self.undo[-FOOTER.size :])
        raw = zlib.compress(json.dumps(index).encode())
        end = FOOTER.pack(at + len(segments), len(raw), hashlib.sha256(raw).digest())
        return self.undo[:at] + segments + raw + end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    tmp = tmp_path_factory.mktemp("whole")
    base, made = adapters_of_five_sorts(tmp, torch.bfloat16)
    (made[-1] / "tokenizer.json").write_text("of the adapter")
    for name in ("tokenizer.json", "merges.txt"):
        (base / name).write_text("of the base")
    tensors = {k: v for k, v in load_file(made[1] / "adapter_model.safetensors").items() if ".0." in k}
    save_file(tensors, made[1] / "adapter_model.safetensors")
    adapters = [made[0], made[1], made[-1]]
    lm.merge(base, adapters, tmp / "merged", reversible=True)
    found = Whole(tmp / "merged", base, adapters, (tmp / "merged" / "loramerge.undo").read_bytes())
    rows = found.index["tensors"]
    assert {row["how"] for row in rows.values()} == {"candidates", "xor", "whole"}
    return found


def copied(whole: Whole, tmp: Path, undo: bytes | None = None) -> Path:
    """The merged model again, with another undo file."""
    if not (tmp / "merged").exists():
        shutil.copytree(whole.merged, tmp / "merged")
    (tmp / "merged" / "loramerge.undo").write_bytes(whole.undo if undo is None else undo)
    return tmp / "merged"


def refused(merged: Path, tmp: Path, *codes: str, **options: Any) -> LoramergeError:
    """Neither comes out nor is switched, with exit code 3, and nothing is left."""
    before = sorted(path.name for path in tmp.iterdir())
    with pytest.raises(LoramergeError) as caught:
        lm.unmerge(merged, tmp / "out", **options)
    error = caught.value
    assert error.exit_code == 3, error
    assert not codes or error.code in codes, (error.code, error)
    assert error.message and error.file
    assert sorted(path.name for path in tmp.iterdir()) == before
    return error


def regions(whole: Whole) -> dict[str, tuple[int, int]]:
    """What lies where in the undo file."""
    found = {"magic": (0, 8)}
    index = whole.index
    for name, row in index["tensors"].items():
        for i, at in enumerate(row["segments"]):
            found[f"{row['how']} of {name} {i}"] = (at[0], at[1])
    for number, factors in index["factors"].items():
        found |= {f"factor {number} {key}": tuple(row["at"][:2]) for key, row in factors.items()}
    found |= {f"header of {row['name']}": tuple(row["header"][:2]) for row in index["files"]}
    found |= {f"side file {name}": tuple(at[:2]) for name, at in index["side_files"].items() if at}
    at, length, _ = FOOTER.unpack(whole.undo[-FOOTER.size :])
    found |= {"index": (at, length), "footer": (at + length, FOOTER.size)}
    assert sum(length for _, length in found.values()) == len(whole.undo)  # nothing else is in it
    return found


def test_one_bit_changed_anywhere_is_told(whole: Whole, tmp_path: Path) -> None:
    chance = random.Random(3)
    sorts: dict[str, set[str]] = {}
    for name, (begin, length) in regions(whole).items():
        for at in {begin, begin + length - 1, chance.randrange(begin, begin + length)}:
            changed = bytearray(whole.undo)
            changed[at] ^= 1 << chance.randrange(8)
            error = refused(copied(whole, tmp_path, bytes(changed)), tmp_path)
            assert error.code.startswith("undo."), (name, error)
            sorts.setdefault(name.split()[0], set()).add(error.code)
            if name.split()[0] in ("candidates", "xor", "whole"):
                assert list(error.tensors) == [name.split()[2]], (name, error.tensors)
    assert sorts.keys() == {"magic", "candidates", "xor", "whole", "factor", "header", "side", "index", "footer"}
    assert all(codes <= {"undo.damaged", "undo.version"} for codes in sorts.values()), sorts


def test_a_file_that_is_cut_short_anywhere_is_told(whole: Whole, tmp_path: Path) -> None:
    ends = {begin for begin, _ in regions(whole).values()} | set(range(len(whole.undo) - 60, len(whole.undo)))
    for end in sorted(ends | {0, 1, 7, 8, 9, 56}):
        refused(copied(whole, tmp_path, whole.undo[:end]), tmp_path, "undo.damaged", "undo.version")
    refused(copied(whole, tmp_path, whole.undo + b"\0"), tmp_path, "undo.damaged")
    refused(copied(whole, tmp_path, whole.undo[:-50] + whole.undo[-48:]), tmp_path, "undo.damaged")


def test_a_newer_format_is_told(whole: Whole, tmp_path: Path) -> None:
    newer = MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + whole.undo[len(MAGIC) :]
    assert "format 3" in refused(copied(whole, tmp_path, newer), tmp_path, "undo.version").message
    refused(copied(whole, tmp_path, whole.with_index(whole.index | {"format": 3})), tmp_path, "undo.damaged")


def test_undo_files_of_other_merges_are_told(whole: Whole, tmp_path: Path) -> None:
    """Of the same base with another weight, of another base of the same shapes, of another model."""
    other = written({k: v + 1 for k, v in load_file(whole.base / "model.safetensors").items()}, tmp_path / "other")
    lm.merge(whole.base, [(whole.adapters[0], 0.5), *whole.adapters[1:]], tmp_path / "a", reversible=True)
    lm.merge(other, whole.adapters, tmp_path / "b", reversible=True)
    lm.merge(*small(tmp_path, torch.bfloat16), tmp_path / "c", reversible=True)
    for name in "abc":
        foreign = (tmp_path / name / "loramerge.undo").read_bytes()
        error = refused(copied(whole, tmp_path, foreign), tmp_path)
        assert error.tensors, name


def test_a_model_that_was_edited_is_told(whole: Whole, tmp_path: Path) -> None:
    """One bit of a tensor of each sort, and of one that the merge left alone, which only the receipt knows."""
    rows = whole.index["tensors"]
    merged = copied(whole, tmp_path)
    path = merged / "model.safetensors"
    raw = path.read_bytes()
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little")
    seen = set()
    for name in names:
        how = rows[name]["how"] if name in rows else "untouched"
        if how == "whole":  # what the merge put there goes
            continue
        seen.add(how)
        begin, end = header[name]["data_offsets"]
        for at in (start + begin, start + end - 1):
            changed = bytearray(raw)
            changed[at] ^= 1
            path.write_bytes(changed)
            error = refused(merged, tmp_path, "undo.edited", "undo.damaged", "undo.mismatch", "unmerge.edited")
            assert list(error.tensors) == [name]
    assert seen == {"candidates", "xor", "untouched"}


def test_adapters_that_were_not_merged_are_told(whole: Whole, tmp_path: Path) -> None:
    other = whole.merged.parent / "lycoris-lokr" / "adapter.safetensors"
    refused(copied(whole, tmp_path), tmp_path, "unmerge.adapter", adapters=[other])
    refused(copied(whole, tmp_path), tmp_path, "unmerge.adapter", adapters=whole.adapters[:1])
    lm.unmerge(tmp_path / "merged", tmp_path / "back", whole.adapters)
    same(tmp_path / "back", whole.base)


def edits(whole: Whole) -> dict[str, Callable[[dict[str, Any]], object]]:
    """Changes of the index that somebody with bad intentions might make."""
    by_how = {row["how"]: name for name, row in whole.index["tensors"].items()}
    coded, xored, kept = (by_how[how] for how in ("candidates", "xor", "whole"))
    key = next(iter(whole.index["factors"]["0"]))
    far = len(whole.undo)

    def tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["tensors"][name].update(fields)

    def update(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["tensors"][coded]["updates"][0].update(fields)

    def place(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["tensors"][coded]["updates"][0]["part"]["place"].update(fields)

    def factor(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["factors"]["0"][key].update(fields)

    def side(name: str) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["side_files"].update({name: index["side_files"]["tokenizer.json"]})

    made: dict[str, Callable[[dict[str, Any]], object]] = {}
    for at in ([far, 4, ""], [8, far, ""], [-1, 4, ""], [8, -4, ""], [8.0, 4, ""], [True, 1, ""], [8, 4], [8, 4, 5], 7):
        made[f"segment {at}"] = tensor(coded, segments=[at])
        made[f"whole {at}"] = tensor(kept, segments=[at])
        made[f"factor {at}"] = factor(at=at)
        made[f"header {at}"] = lambda index, at=at: index["files"][0].update(header=at)
        made[f"side file {at}"] = lambda index, at=at: index["side_files"].update({"merges.txt": at})
    for shape in ([-1, 5], [2**40, 2**40], [2**70], ["x"], "ab", None, [1.5], [0], []):
        for name in (coded, xored, kept):
            made[f"{name} shape {shape}"] = tensor(name, shape=shape)
        made[f"factor shape {shape}"] = factor(shape=shape)
    for dtype in ("F32", "F4", "X", 7, None):
        for name in (coded, xored, kept):
            made[f"{name} dtype {dtype}"] = tensor(name, dtype=dtype)
    made["factor dtype"] = factor(dtype="F64")
    for how in ("xor", "whole", "?", None, []):
        made[f"how {how}"] = tensor(coded, how=how)
    made["xor as candidates"] = tensor(xored, how="candidates")
    made["no segments"] = tensor(coded, segments=[])
    made["too many segments"] = lambda i: i["tensors"][coded]["segments"].append(i["tensors"][coded]["segments"][0])
    made["no updates"] = tensor(coded, updates=[])
    for updates in ("x", [7], [{}], [{"kind": "difference"}], [{"kind": "os.system", "factors": []}], None):
        made[f"updates {updates}"] = tensor(coded, updates=updates)
    for number in (-1, 99, "0", True, 2**70):
        made[f"update of adapter {number}"] = update(adapter=number)
    made |= {
        "scale": update(scale=3.0),
        "scale of text": update(scale="1"),
        "key": update(A="nothing"),
        "B for A": lambda i: update(A=i["tensors"][coded]["updates"][0]["B"])(i),
        "pick": update(pick=["expert", 2**40, 2**41]),
        "pick of 0": update(pick=["layer", 0, 0]),
        "pick of nothing": update(pick=["whole"]),
        "no columns": place(cols=0),
        "other columns": place(cols=7),
        "begin": place(begin=5),
        "negative begin": place(begin=-5),
        "step": place(step=0),
        "part": update(part=[]),
        "take backwards": lambda i: i["tensors"][coded]["updates"][0]["part"].update(take=[[5, 0, 1]]),
        "transposed": factor(transposed=True),
        "no factors": lambda i: i.update(factors={}),
        "adapters in disorder": lambda i: i.update(factors={"7": i["factors"]["0"]}),
        "adapter of text": lambda i: i.update(factors={"x": {}}),
        "added": lambda i: i.update(added=[[]]),
        "added no list": lambda i: i.update(added="x"),
        "adapters": lambda i: i.update(adapters=[7]),
        "base digest": tensor(coded, base="xxh3:" + "0" * 32),
        "whole digest": tensor(kept, base=None),
        "merged digest": tensor(coded, merged="x"),
        "tensors a list": lambda i: i.update(tensors=[]),
        "no files": lambda i: i.pop("files"),
        "file of no name": lambda i: i["files"][0].update(name=7),
        "file twice": lambda i: i["files"].append(i["files"][0]),
        "header of something else": lambda i: i["files"][0].update(header=i["side_files"]["tokenizer.json"]),
        "a tensor that is not there": lambda i: i["tensors"].update(other=i["tensors"][coded]),
        "side file over weights": side("model.safetensors"),
        "side file over the receipt": side("loramerge.json"),
        "side file over the undo file": side("sub/loramerge.undo"),
        "config of text": lambda i: i["side_files"].update({"config.json": 7}),
    }
    for name in ("../x", "/etc/x", "a/../../x", "", "a//b", "a\\b", "C:x", "a\0b", "./x"):
        made[f"side file {name!r}"] = side(name)
        made[f"file {name!r}"] = lambda i, name=name: i["files"][0].update(name=f"{name}.safetensors" if name else "")
    for name in ("..", "."):
        made[f"side file {name!r}"] = side(name)
    return made


def test_an_index_that_somebody_made_up_is_refused(whole: Whole, tmp_path: Path) -> None:
    passed = []
    for name, edit in edits(whole).items():
        index = whole.index
        edit(index)
        merged = copied(whole, tmp_path, whole.with_index(index))
        around = sorted(tmp_path.parent.iterdir())
        try:
            refused(merged, tmp_path)
        except pytest.fail.Exception:
            same(tmp_path / "out", whole.base)
            shutil.rmtree(tmp_path / "out")
            passed.append(name)
        except Exception as error:
            raise AssertionError(name) from error
        assert sorted(tmp_path.parent.iterdir()) == around, name
    assert not passed


@pytest.mark.parametrize("text", [b"", b"[]", b"7", b"{", b'{"format":1}', b'{"format":1,"format":1}', b"[" * 10**5])
def test_an_index_that_is_none_is_refused(text: bytes, whole: Whole, tmp_path: Path) -> None:
    at, _, _ = FOOTER.unpack(whole.undo[-FOOTER.size :])
    for raw in (text, zlib.compress(text), zlib.compress(text) + b"more", zlib.compress(text)[:-3]):
        end = FOOTER.pack(at, len(raw), hashlib.sha256(raw).digest())
        refused(copied(whole, tmp_path, whole.undo[:at] + raw + end), tmp_path, "undo.damaged")


def test_an_index_that_unpacks_without_end_is_refused(whole: Whole, tmp_path: Path) -> None:
    packer = zlib.compressobj(9)
    raw = b"".join(packer.compress(b" " * (1 << 24)) for _ in range(17)) + packer.flush()
    at, _, _ = FOOTER.unpack(whole.undo[-FOOTER.size :])
    end = FOOTER.pack(at, len(raw), hashlib.sha256(raw).digest())
    error = refused(copied(whole, tmp_path, whole.undo[:at] + raw + end), tmp_path, "undo.damaged")
    assert "too large" in error.message


def test_a_switch_is_refused_as_well(whole: Whole, tmp_path: Path) -> None:
    changed = bytearray(whole.undo)
    name, row = next((name, row) for name, row in whole.index["tensors"].items() if row["how"] == "whole")
    changed[row["segments"][0][0]] ^= 1
    merged = copied(whole, tmp_path, bytes(changed))
    for adapter in (whole.adapters[-1], whole.adapters[0]):  # one replaces it again, one leaves it alone
        with pytest.raises(LoramergeError) as caught:
            lm.switch(merged, adapter, tmp_path / "out")
        assert (caught.value.exit_code, list(caught.value.tensors)) == (3, [name])
        assert [path.name for path in tmp_path.iterdir()] == ["merged"]


# --- all or nothing -------------------------------------------------------------------------------------------

RUN = """
import sys
import loramerge as lm
what, source, adapter, out = sys.argv[1:]
if what == "merge":
    lm.merge(source, adapter, out, reversible=True, jobs=2)
elif what == "switch":
    lm.switch(source, adapter, out, jobs=2)
else:
    lm.unmerge(source, out, jobs=2)
"""


def started(*arguments: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, arguments)], env=environment)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("what", ["merge", "switch", "unmerge"])
def test_killed_at_any_moment_all_is_there_or_nothing(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = {f"model.layers.{i}.mlp.up_proj": (1024, 2048) for i in range(8)}
    base = written(
        {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in names.items()}, tmp_path / "base"
    )
    adapters = []
    for number in (1, 2):
        factors = {k: v for i, (n, s) in enumerate(names.items()) for k, v in pair(n, *s, 4, i + 20 * number).items()}
        adapters.append(peft_adapter(tmp_path / f"adapter{number}", factors))
    lm.merge(base, adapters[0], tmp_path / "merged", reversible=True)
    source = base if what == "merge" else tmp_path / "merged"
    out = tmp_path / "out"
    begin = time.perf_counter()
    assert started(what, source, adapters[1], out).wait() == 0
    seconds = time.perf_counter() - begin
    complete = {path.name: path.read_bytes() for path in out.iterdir()}
    inputs = tree(base) | {f"merged/{name}": raw for name, raw in tree(tmp_path / "merged").items()}
    seen = {"killed": 0, "partial": 0}
    for i in range(int(os.environ.get("LORAMERGE_KILLS", "3"))):
        shutil.rmtree(out, ignore_errors=True)
        process = started(what, source, adapters[1], out)
        if i % 3:
            while process.poll() is None and not list(tmp_path.glob("out.partial-*")):
                time.sleep(0.001)
            if i % 3 == 2:  # the other one at once, while the partial output is certainly there
                time.sleep(random.uniform(0, 0.15 * seconds))
        else:
            time.sleep(random.uniform(0.5, 1.0) * seconds)
        process.kill()
        seen["killed"] += process.wait() != 0
        seen["partial"] += bool(list(tmp_path.glob("out.partial-*")))
        assert not out.exists() or {path.name: path.read_bytes() for path in out.iterdir()} == complete
        assert inputs == tree(base) | {f"merged/{name}": raw for name, raw in tree(tmp_path / "merged").items()}
    assert seen["killed"] and seen["partial"]
    shutil.rmtree(out, ignore_errors=True)
    assert started(what, source, adapters[1], out).wait() == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == complete
    assert not list(tmp_path.glob("out.*"))
