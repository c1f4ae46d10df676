"""An extracted adapter and its base are the fine-tune: loaded by PEFT, merged by us, on real architectures.

Oracles: `PeftModel.from_pretrained` and the outputs of the fine-tuned model itself; the fine-tuned tensors; the dense
SVD in fp64 (Eckart and Young).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tuned import CONFIGS, EXPERTS, dense, load, low_rank, make, outputs, tensors_of, tune, with_peft

import loramerge as lm

FULL = 64
"""More than any side of the tiny models."""


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(name)
    return make(name, folder / "base"), tune(make(name, folder / "again"), folder / "tuned")


def test_at_full_rank_peft_gives_the_fine_tune(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    data = lm.extract(base, tuned, tmp_path / "lora", rank=FULL)
    assert data["model_error"] < 1e-6 and data["modules"] > 0
    wanted = outputs(load(tuned), name)
    got = outputs(with_peft(base, tmp_path / "lora"), name)
    assert (outputs(load(base), name) - wanted).abs().max() > 0.1
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


def test_at_full_rank_merging_gives_every_tensor_of_the_fine_tune(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair
    lm.extract(base, tuned, tmp_path / "lora", rank=FULL)
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    got, wanted = tensors_of(tmp_path / "merged"), tensors_of(tuned)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype
        assert torch.allclose(got[key].float(), value.float(), rtol=1e-5, atol=1e-6), key


def test_every_pair_is_the_best_of_its_rank(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    data = lm.extract(base, tuned, tmp_path / "lora", rank=3)
    before, after = tensors_of(base), tensors_of(tuned)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert data["certificate"] <= 1.001
    lost = whole = 0.0
    for row in data["rows"]:
        delta = (after[f"{row['module']}.weight"].double() - before[f"{row['module']}.weight"].double()).flatten(1)
        values = torch.linalg.svdvals(delta)
        A = factors[f"base_model.model.{row['path']}.lora_A.weight"].double().flatten(1)
        B = factors[f"base_model.model.{row['path']}.lora_B.weight"].double().flatten(1)
        made = B @ A if delta.shape == (B.shape[0], A.shape[1]) and name != "gpt2" else (B @ A).T
        error = float(torch.linalg.norm(delta - made))
        assert error <= 1.001 * float(values[3:].norm()) + 1e-6 * float(values.norm())
        assert row["error"] == pytest.approx(error / float(values.norm()), rel=1e-3, abs=1e-6)
        assert row["energy"] == pytest.approx(1 - row["error"] ** 2, abs=1e-5)
        lost, whole = lost + error**2, whole + float(values.norm()) ** 2
    assert data["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    others = sum(
        float((after[key].double() - before[key].double()).norm()) ** 2
        for key in after
        if key.rpartition(".")[0] not in {row["module"] for row in data["rows"]} or not key.endswith("weight")
    )
    assert data["model_error"] == pytest.approx((lost / (whole + others)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("model", ["llama", "gpt2", "resnet"])
def test_a_low_rank_change_comes_back_whole(model: str, tmp_path: Path) -> None:
    base = make(model, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(2), only=lambda n: "proj" in n or "c_" in n or "convolution" in n)
    data = lm.extract(base, tuned, tmp_path / "lora", energy=1.0)
    assert {row["rank"] for row in data["rows"]} == {2}
    assert data["model_error"] < 1e-5 and not data["whole"]
    assert torch.allclose(outputs(with_peft(base, tmp_path / "lora"), model), outputs(load(tuned), model), atol=1e-5)


@pytest.mark.parametrize("model", EXPERTS)
def test_experts_become_pairs_of_their_stacks(model: str, tmp_path: Path) -> None:
    base = make(model, tmp_path / "base")
    skip = ["*.sinks", "*_bias"] if model == "gpt-oss" else []
    tuned = tune(base, tmp_path / "tuned", only=lambda n: "sinks" not in n and not n.endswith("_bias"))
    data = lm.extract(base, tuned, tmp_path / "lora", rank=FULL, exclude=skip)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("down_proj", "gate_up_proj")
    ]
    assert data["model_error"] < 1e-6 and sum("experts" in row["module"] for row in data["rows"]) == 12
    wanted = outputs(load(tuned), model)
    assert torch.allclose(outputs(with_peft(base, tmp_path / "lora"), model), wanted, atol=1e-5)
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    for key, value in tensors_of(tuned).items():
        assert torch.allclose(tensors_of(tmp_path / "merged")[key], value, atol=1e-6), key


def test_experts_share_one_rank_within_a_budget(tmp_path: Path) -> None:
    base = make("mixtral", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only=lambda n: "experts" in n)
    data = lm.extract(base, tuned, tmp_path / "lora", budget=50_000)
    assert data["files"]["adapter_model.safetensors"] <= 50_000
    ranks = {row["module"]: row["rank"] for row in data["rows"]}
    assert len({ranks[f"model.layers.0.mlp.experts.down_proj[{e}]"] for e in range(3)}) == 1
    assert all(row["rank"] for row in data["rows"])
    with_peft(base, tmp_path / "lora")


def test_config_says_all_that_a_reader_needs(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only=lambda n: "layers.1.mlp" in n or "q_proj" in n)
    lm.extract(base, tuned, tmp_path / "lora", rank=4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == "CAUSAL_LM" and config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(
        [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        + [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    )
    assert config["r"] == config["lora_alpha"] == 4 and not config.get("modules_to_save")


def test_a_file_without_the_prefix_of_its_class_is_named_as_the_class_names_it(tmp_path: Path) -> None:
    """The files of the first GPT-2 have `h.0`, its class with a head has `transformer.h.0`."""
    whole = make("gpt2", tmp_path / "whole")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((whole / "config.json").read_bytes())
    short = {key.removeprefix("transformer."): value for key, value in tensors_of(whole).items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})
    tuned = tune(base, tmp_path / "tuned")
    lm.extract(base, tuned, tmp_path / "lora", rank=FULL)
    got = outputs(with_peft(base, tmp_path / "lora"), "gpt2")
    assert torch.allclose(got, outputs(load(tuned), "gpt2"), atol=1e-5)
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    for key, value in tensors_of(tuned).items():
        assert torch.allclose(tensors_of(tmp_path / "merged")[key], value, atol=1e-6), key


@pytest.mark.parametrize("model", ["llama", "tied"])
def test_a_larger_vocabulary_goes_whole_and_loads_after_a_resize(model: str, tmp_path: Path) -> None:
    base = make(model, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    tensors = tensors_of(tuned)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key] = torch.cat([tensors[key], torch.randn(4, 32) * 0.02])
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    config = json.loads((tuned / "config.json").read_text()) | {"vocab_size": 52}
    (tuned / "config.json").write_text(json.dumps(config))
    data = lm.extract(base, tuned, tmp_path / "lora", rank=FULL)
    assert any("from 48 to 52" in note for note in data["notes"])
    plain = load(base)
    plain.resize_token_embeddings(52)
    got = outputs(with_peft(plain, tmp_path / "lora"), model, 52)
    assert torch.allclose(got, outputs(load(tuned), model, 52), atol=1e-5)
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert torch.allclose(outputs(load(tmp_path / "merged"), model, 52), got, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "tied"])
def test_embeddings_and_heads_can_be_pairs(model: str, tmp_path: Path) -> None:
    base = make(model, tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(3), only=lambda n: "embed" in n or "head" in n)
    data = lm.extract(base, tuned, tmp_path / "lora", rank=3, embeddings="low-rank")
    assert not data["whole"] and data["model_error"] < 1e-5
    assert {row["rank"] for row in data["rows"]} == {3}
    wanted = outputs(load(tuned), model)
    assert torch.allclose(outputs(with_peft(base, tmp_path / "lora"), model), wanted, atol=1e-5)
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert torch.allclose(outputs(load(tmp_path / "merged"), model), wanted, atol=1e-5)


def test_only_linear_leaves_out_and_counts_the_rest(tmp_path: Path) -> None:
    base = make("qwen2", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned")
    data = lm.extract(base, tuned, tmp_path / "lora", rank=FULL, only_linear=True)
    left = {n for n in tensors_of(base) if not n.endswith("proj.weight")}
    assert set(data["left_out"]) == left and not data["whole"]
    before, after = tensors_of(base), tensors_of(tuned)
    lost, whole = (
        sum(float((after[n].double() - before[n].double()).norm()) ** 2 for n in names) for names in (left, after)
    )
    assert data["model_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    loaded = with_peft(base, tmp_path / "lora")
    assert (outputs(loaded, "qwen2") - outputs(load(base), "qwen2")).abs().max() > 0.05


def test_shards_and_halves_change_nothing_but_precision(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base", dtype=torch.bfloat16)
    model = load(base).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dense("", parameter.float()).to(torch.bfloat16))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").exists()
    data = lm.extract(base, tmp_path / "tuned", tmp_path / "lora", rank=FULL, noise_floor=False)
    assert data["model_error"] < 1e-6
    lm.merge(base, tmp_path / "lora", tmp_path / "merged")
    wanted = tensors_of(tmp_path / "tuned")
    for key, value in tensors_of(tmp_path / "merged").items():
        # Both are bf16 numbers: they agree but where the weight is so near zero that factors in fp32 do not reach it.
        assert (value.float() - wanted[key].float()).abs().max() < 1e-6, key
        assert (value == wanted[key]).float().mean() > 0.99, key


class Attending(nn.Module):
    """PyTorch's own attention, whose forward pass reads the weight of its output projection past any wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.attn(x, x, x)[0])
        return found


def test_attention_that_wrappers_cannot_change_goes_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = Attending(), Attending()
    x = torch.randn(2, 5, 16)
    for model, name in ((base, "base"), (tuned, "tuned")):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    data = lm.extract(*files, tmp_path / "lora", rank=FULL)
    assert [row["module"] for row in data["rows"]] == ["out"]
    with torch.no_grad():
        wanted = tuned(x)
        assert (base(x) - wanted).abs().max() > 0.1
        assert torch.allclose(with_peft(base, tmp_path / "lora")(x), wanted, atol=1e-5)
    data = lm.extract(*files, tmp_path / "linear", rank=FULL, only_linear=True)
    assert {"attn.in_proj_weight", "attn.out_proj.weight"} <= set(data["left_out"])
    assert [row["module"] for row in data["rows"]] == ["out"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_factors_tell_what_they_cost(dtype: str, tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", low_rank(2), only=lambda n: "q_proj" in n)
    data = lm.extract(base, tuned, tmp_path / "lora", rank=2, dtype=dtype)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {f.dtype for f in factors.values()} == {getattr(torch, dtype)}
    for row in data["rows"]:
        stem = f"base_model.model.{row['path']}"
        made = factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
        key = f"{row['module']}.weight"
        delta = tensors_of(tuned)[key].double() - tensors_of(base)[key].double()
        assert row["error"] == pytest.approx(float((delta - made).norm() / delta.norm()), rel=0.05)
        assert row["rounding"] > 1e-4
