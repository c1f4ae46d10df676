"""PEFT adapters merged into tiny models of many architectures, every tensor against the float64 truth."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft_oracle import (
    check,
    copy_adapter,
    expected,
    load_model,
    lora_formula,
    renamed,
    round_to,
    same_bits,
    save_adapter,
    saved_tensors,
    train_like,
    trained_outputs,
    with_adapter,
    write_adapter,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo import ZOO, build, inputs_for, outputs, read_json, read_tensors, save

import loramerge as lm


class Lab:
    """Bases and adapters, each made once per session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def _new(self, *parts: Any) -> tuple[str, Path]:
        return repr(parts), self.root / str(len(self.made))

    def base(
        self,
        arch: str,
        *,
        model: str = "",
        dtype: torch.dtype = torch.float32,
        shard: str = "",
        **sizes: Any,
    ) -> Path:
        key, folder = self._new("base", arch, model, dtype, shard, sizes)
        if key not in self.made:
            net = build(arch, **sizes)
            if model:  # the same weights under another class: with or without head and prefix
                whole = save(net, self.root / f"{len(self.made)}-whole")
                net = load_model(whole, model, torch.float32)
            self.made[key] = save(net, folder, dtype=dtype, shard=shard)
        return self.made[key]

    def adapter(
        self,
        base: Path,
        cls: str,
        options: Mapping[str, Any],
        *,
        seed: int = 0,
        size: float = 0.1,
        saving: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        key, folder = self._new("adapter", base, cls, options, seed, size, saving, changes)
        if key not in self.made:
            net = load_model(base, cls, torch.float32, **changes)
            config = LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
            self.made[key] = save_adapter(train_like(net, config, seed=seed, size=size), folder, **(saving or {}))
        return self.made[key]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@dataclass(frozen=True)
class Case:
    """One adapter on one base, where PEFT's merge in float64 is the truth."""

    id: str
    arch: str
    options: dict[str, Any]
    sizes: dict[str, Any] = field(default_factory=dict)
    saving: dict[str, Any] = field(default_factory=dict)
    untie: bool = False
    """The trained function needs two tensors where the base has one tied one."""

    @property
    def cls(self) -> str:
        return ZOO[self.arch].model


def few(arch: str) -> list[str]:
    return list(ZOO[arch].few)


def every(arch: str) -> Any:
    targets = ZOO[arch].targets
    return targets if isinstance(targets, str) else list(targets)


ALL = {"target_modules": "all-linear"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS = [3, 11, 96]

CASES = [
    *(Case(f"{arch}-all", arch, {"target_modules": every(arch)}) for arch in ZOO),
    # rank and scale
    Case("llama-rank1", "llama", {**ALL, "r": 1}),
    Case("llama-rank5", "llama", {**ALL, "r": 5, "lora_alpha": 16}),
    Case("llama-rank-above-dims", "llama", {**ALL, "r": 40}),
    Case("llama-alpha-fractional", "llama", {**ALL, "lora_alpha": 2.7}),
    Case("llama-rslora", "llama", {**ALL, "r": 6, "use_rslora": True}),
    Case(
        "llama-patterns",
        "llama",
        {
            **ALL,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 2.5, r"^model\.layers\.1\.self_attn\..*": 9},
        },
    ),
    Case(
        "llama-patterns-rslora",
        "llama",
        {**ALL, "use_rslora": True, "rank_pattern": {"down_proj": 9}, "alpha_pattern": {"up_proj": 1}},
    ),
    Case("gpt2-patterns", "gpt2", {"target_modules": few("gpt2"), "rank_pattern": {"attn.c_proj": 2}}),
    # which modules
    Case("llama-exclude", "llama", {**ALL, "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}),
    Case(
        "llama-layers",
        "llama",
        {"target_modules": few("llama"), "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    Case("llama-regex-target", "llama", {"target_modules": r".*\.0\.(self_attn\.[qv]|mlp\.gate)_proj"}),
    # biases
    Case("llama_bias-bias-all", "llama_bias", {"target_modules": few("llama_bias"), "bias": "all"}),
    Case("llama_bias-bias-lora_only", "llama_bias", {"target_modules": few("llama_bias"), "bias": "lora_only"}),
    Case("bert_model-bias-all", "bert_model", {"target_modules": few("bert_model"), "bias": "all"}),
    Case("roberta-bias-lora_only", "roberta", {"target_modules": few("roberta"), "bias": "lora_only"}),
    Case("gpt2-bias-all", "gpt2", {"target_modules": few("gpt2"), "bias": "all"}),
    Case("qwen2-bias-lora_only", "qwen2", {"target_modules": few("qwen2"), "bias": "lora_only"}),
    Case("llama_bias-lora_bias", "llama_bias", {**ALL, "lora_bias": True}),
    Case("bert_model-lora_bias", "bert_model", {"target_modules": few("bert_model"), "lora_bias": True}),
    Case("gpt2-lora_bias", "gpt2", {"target_modules": few("gpt2"), "lora_bias": True}),
    # DoRA
    Case("llama-dora", "llama", {**ALL, "use_dora": True}),
    Case("llama-dora-rslora", "llama", {**ALL, "use_dora": True, "use_rslora": True, "r": 3}),
    Case("qwen2-dora", "qwen2", {"target_modules": few("qwen2"), "use_dora": True}),
    Case("gpt2-dora", "gpt2", {"target_modules": every("gpt2"), "use_dora": True}),
    Case("resnet-dora", "resnet", {"target_modules": few("resnet"), "use_dora": True}),
    Case("llama-dora-embedding", "llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    Case("vit-dora", "vit", {"target_modules": few("vit"), "use_dora": True}),
    # nn.MultiheadAttention: PEFT adds the delta of out_proj twice, in training as in the merge
    Case("siglip-attention", "siglip", {"target_modules": ["head.attention", "fc1"]}),
    # embeddings and heads, two tensors in the base
    Case("llama-embedding", "llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    Case(
        "llama-embedding-without-its-copy",
        "llama",
        {"target_modules": ["embed_tokens", "v_proj"]},
        saving={"save_embedding_layers": False},
    ),
    Case("llama-lm_head", "llama", {"target_modules": ["lm_head", "v_proj"]}),
    Case("llama-embedding-lm_head", "llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    Case("gpt2-position-embedding", "gpt2", {"target_modules": ["wpe", "c_fc"]}),
    Case("gpt_neox-embed_out", "gpt_neox", {"target_modules": ["lm_head", "embed_in", "dense"]}),
    Case("llama-save-both", "llama", {**ALL, "modules_to_save": ["embed_tokens", "lm_head"]}),
    Case("llama-save-norm", "llama", {**ALL, "modules_to_save": ["norm", "input_layernorm"]}),
    Case("resnet-save-norm", "resnet", {"target_modules": few("resnet"), "modules_to_save": ["normalization"]}),
    Case("llama-tokens", "llama", {**ALL, "trainable_token_indices": ROWS}),
    Case(
        "llama-tokens-dict",
        "llama",
        {**ALL, "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [0, 7]}},
    ),
    # embeddings and heads, tied
    *(
        Case(f"{arch}-embedding", arch, {"target_modules": [name, *few(arch)]}, saving=saving, untie=True)
        for arch, name, saving in (
            ("llama_tied", "embed_tokens", {}),
            ("gemma3", "embed_tokens", {"save_embedding_layers": False}),
            ("gpt2", "wte", {}),
            ("opt", "embed_tokens", {"save_embedding_layers": False}),
            ("bloom", "word_embeddings", {}),
        )
    ),
    Case("llama_tied-lm_head", "llama_tied", {"target_modules": ["lm_head", "q_proj"]}, untie=True),
    Case(
        "llama_tied-lm_head-without-its-copy",
        "llama_tied",
        {"target_modules": ["lm_head", "q_proj"]},
        saving={"save_embedding_layers": False},
        untie=True,
    ),
    Case("gpt2-lm_head", "gpt2", {"target_modules": ["lm_head", "c_attn"]}, untie=True),
    Case(
        "llama_tied-both",
        "llama_tied",
        {"target_modules": ["lm_head", "embed_tokens"]},
        saving={"save_embedding_layers": False},
        untie=True,
    ),
    Case("llama_tied-save-lm_head", "llama_tied", {**ALL, "modules_to_save": ["lm_head"]}, untie=True),
    Case("llama_tied-save-embedding", "llama_tied", {**ALL, "modules_to_save": ["embed_tokens"]}, untie=True),
    Case("llama_tied-tokens", "llama_tied", {**ALL, "trainable_token_indices": ROWS}),
    Case(
        "gemma2-tokens",
        "gemma2",
        {"target_modules": few("gemma2"), "trainable_token_indices": {"embed_tokens": ROWS}},
    ),
    # expert parameters: the files of Mixtral and Qwen hold one tensor per expert, gpt-oss stacks them
    Case("mixtral-experts", "mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    Case("qwen3_moe-experts", "qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    Case("gpt_oss-experts", "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    Case(
        "gpt_oss-experts-not-square",
        "gpt_oss",
        {"target_modules": [], "target_parameters": EXPERTS},
        sizes={"intermediate_size": 20},
    ),
    *(
        Case(f"{arch}-{part}", arch, {"target_modules": [], "target_parameters": [f"mlp.experts.{part}"]})
        for arch in ("mixtral", "qwen3_moe", "gpt_oss")
        for part in ("gate_up_proj", "down_proj")
    ),
    Case(
        "qwen3_moe-experts-rslora",
        "qwen3_moe",
        {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True, "r": 3},
    ),
    Case(
        "qwen3_moe-experts-patterns",
        "qwen3_moe",
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"layers.0.mlp.experts.gate_up_proj": 3.5},
        },
    ),
    *(
        Case(f"{arch}-router", arch, {"target_modules": ["q_proj"], "target_parameters": [name]})
        for arch, name in (
            ("mixtral", "mlp.gate.weight"),
            ("qwen3_moe", "mlp.gate.weight"),
            ("gpt_oss", "mlp.router.weight"),
        )
    ),
    Case(
        "mixtral-router-experts",
        "mixtral",
        {"target_modules": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
]
BY_ID = {case.id: case for case in CASES}
assert len(BY_ID) == len(CASES)
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])


def prepare(lab: Lab, case: Case) -> tuple[Path, Path, dict[str, Tensor]]:
    base = lab.base(case.arch, **case.sizes)
    adapter = lab.adapter(base, case.cls, case.options, saving=case.saving)
    return base, adapter, expected(base, {adapter: 1.0}, case.cls, untie=case.untie)


def assert_outputs(
    out: Path, base: Path, adapter: Path, cls: str, inputs: Mapping[str, Tensor], limit: float = 1e-5
) -> None:
    """Plain transformers on ``out`` in float32 does what the unmerged model does in float64."""
    trained = trained_outputs(base, adapter, cls, dict(inputs))
    narrow = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    got = outputs(load_model(out, cls, torch.float32), narrow)
    assert torch.allclose(got, trained, rtol=limit, atol=limit), (got - trained).abs().max()


# --- the oracle itself ----------------------------------------------------------------------------


@each_case
def test_oracle_is_the_trained_function(case: Case, lab: Lab, tmp_path: Path) -> None:
    """The expected tensors, loaded by plain transformers, give the outputs of the unmerged model."""
    base, adapter, truth = prepare(lab, case)
    save_file({key: value.contiguous() for key, value in truth.items()}, tmp_path / "model.safetensors")
    config = read_json(base)
    config.update({"tie_word_embeddings": False} if case.untie else {})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    inputs = inputs_for(case.arch)
    trained = trained_outputs(base, adapter, case.cls, inputs)
    got = outputs(load_model(tmp_path, case.cls), inputs)
    start = outputs(load_model(base, case.cls), inputs)
    # norms and rotations of some models run in float32 whatever the weights are
    assert torch.allclose(got, trained, rtol=1e-6, atol=2e-6), (got - trained).abs().max()
    assert (start - trained).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_oracle_is_the_formula(options: dict[str, Any], lab: Lab) -> None:
    base = lab.base("llama")
    adapter = lab.adapter(base, "LlamaForCausalLM", {**ALL, **options})
    formula = lora_formula(base, adapter, lambda module: module)
    truth = expected(base, {adapter: 1.0}, "LlamaForCausalLM")
    assert formula.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.allclose(value, formula[name], rtol=0, atol=1e-15), name


def test_rounding_of_the_oracle_is_once_and_to_even() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    tie = one + 2**-8
    assert round_to(tie, torch.bfloat16) == 1.0
    assert round_to(tie + 2**-40, torch.bfloat16) == 1 + 2**-7  # through float32 this becomes the tie: 1.0
    assert round_to(one + 3 * 2**-8, torch.bfloat16) == 1 + 2**-6
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)).double() * 1e-5
    assert torch.equal(round_to(values, torch.float16), values.to(torch.float16).double())
    assert torch.equal(round_to(values.float().double(), torch.bfloat16), values.to(torch.bfloat16).double())


# --- merge ----------------------------------------------------------------------------------------


@each_case
def test_merge_gives_the_truth(case: Case, lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, case)
    out = tmp_path / "out"
    lm.merge(base, adapter, out)
    check(out, truth, base)
    config, before = read_json(out), read_json(base)
    if case.untie:
        assert config["tie_word_embeddings"] is False
        before["tie_word_embeddings"] = False
    assert config == before
    if not case.untie:
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "llama-all",
        "gpt2-all",
        "t5-all",
        "vit-all",
        "phi3-all",
        "whisper-all",
        "llama-dora",
        "resnet-dora",
        "llama_bias-bias-all",
        "llama_bias-lora_bias",
        "llama_tied-embedding",
        "llama_tied-lm_head",
        "gpt2-lm_head",
        "bloom-embedding",
        "llama_tied-tokens",
        "mixtral-experts",
        "qwen3_moe-experts",
        "gpt_oss-experts",
        "llama-save-both",
    ],
)
def test_merged_model_runs_as_the_trained_one(name: str, lab: Lab, tmp_path: Path) -> None:
    case = BY_ID[name]
    base, adapter, _ = prepare(lab, case)
    out = tmp_path / "out"
    lm.merge(base, {adapter: 1.0}, out)
    assert_outputs(out, base, adapter, case.cls, inputs_for(case.arch))


@pytest.mark.parametrize(
    "name", ["llama-rslora", "gpt2-all", "gpt2-dora", "llama-dora", "mixtral-experts", "llama-embedding"]
)
def test_weight_multiplies_the_scale(name: str, lab: Lab, tmp_path: Path) -> None:
    case = BY_ID[name]
    base, adapter, full = prepare(lab, case)
    truth = expected(base, {adapter: -0.35}, case.cls)
    assert any(not torch.equal(truth[key], full[key]) for key in truth)
    lm.merge(base, {adapter: -0.35}, tmp_path / "out")
    check(tmp_path / "out", truth, base)


def test_float64_compute_is_within_one_float32_rounding(lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, BY_ID["llama-all"])
    lm.merge(base, adapter, tmp_path / "out", compute_dtype="float64")
    check(tmp_path / "out", truth, base, exact=True)


def test_float64_base_keeps_its_digits(lab: Lab, tmp_path: Path) -> None:
    base = lab.base("llama", dtype=torch.float64)
    adapter = lab.adapter(lab.base("llama"), "LlamaForCausalLM", ALL)
    truth = expected(base, {adapter: 1.0}, "LlamaForCausalLM")
    lm.merge(base, adapter, tmp_path / "out", compute_dtype="float64")
    check(tmp_path / "out", truth, base)


def test_alpha_zero_leaves_every_byte(lab: Lab, tmp_path: Path) -> None:
    base = lab.base("llama")
    adapter = lab.adapter(base, "LlamaForCausalLM", {**ALL, "lora_alpha": 0})
    lm.merge(base, adapter, tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(value, after[name]) for name, value in before.items())


# --- several adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "first", "second"),
    [
        ("llama", {**ALL, "r": 3}, {"target_modules": ["q_proj", "up_proj"], "r": 8, "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj", "wpe"]}),
        ("resnet", {"target_modules": ["convolution"]}, {"target_modules": ["convolution"], "r": 2}),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
        ),
    ],
    ids=["llama", "gpt2", "resnet", "mixtral"],
)
def test_weighted_sum_of_two_adapters(
    arch: str, first: dict[str, Any], second: dict[str, Any], lab: Lab, tmp_path: Path
) -> None:
    base, cls = lab.base(arch), ZOO[arch].model
    one, two = lab.adapter(base, cls, first, seed=1), lab.adapter(base, cls, second, seed=2)
    truth = expected(base, {one: 0.7, two: -0.3}, cls)
    lm.merge(base, {one: 0.7, two: -0.3}, tmp_path / "out")
    check(tmp_path / "out", truth, base)
    lm.merge(base, {two: -0.3, one: 0.7}, tmp_path / "other-order")
    check(tmp_path / "other-order", truth, base)


def test_a_list_of_adapters_has_weights_of_one(lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    one, two = lab.adapter(base, cls, ALL, seed=1), lab.adapter(base, cls, ALL, seed=2)
    lm.merge(base, [one, two], tmp_path / "out")
    check(tmp_path / "out", expected(base, {one: 1.0, two: 1.0}, cls), base)


def test_dora_adapters_in_turn_take_their_norms_from_the_base(lab: Lab, tmp_path: Path) -> None:
    """``W_i = m_i / |W_0 + D_i| * (W_(i-1) + D_i)``, per output row."""
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    options = {"target_modules": few("llama"), "use_dora": True}
    adapters = [lab.adapter(base, cls, options, seed=seed) for seed in (1, 2)]
    start = {key: value.double() for key, value in read_tensors(base).items()}
    truth = dict(start)
    for adapter in adapters:
        factors = {k: v.double() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
        for key in [key for key in factors if key.endswith(".lora_A.weight")]:
            stem = key.removesuffix(".lora_A.weight")
            name = stem.removeprefix("base_model.model.") + ".weight"
            delta = 6 / 4 * factors[stem + ".lora_B.weight"] @ factors[key]
            norm = torch.linalg.vector_norm(start[name] + delta, dim=1)
            gain = factors[stem + ".lora_magnitude_vector"] / norm
            truth[name] = gain[:, None] * (truth[name] + delta)
    lm.merge(base, adapters, tmp_path / "out")
    check(tmp_path / "out", truth, base)


# --- 16 bit ---------------------------------------------------------------------------------------

WIDE = {"hidden_size": 192, "intermediate_size": 320}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", ALL),
        ("llama", {**ALL, "use_dora": True}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ],
    ids=["linear", "dora", "experts", "embeddings"],
)
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_base_is_rounded_once(
    arch: str, options: dict[str, Any], dtype: torch.dtype, compute: str, lab: Lab, tmp_path: Path
) -> None:
    """Deltas of some percent of the weights, as trained ones are; float32 sums of larger ones miss ties."""
    cls = ZOO[arch].model
    base = lab.base(arch, dtype=dtype, **WIDE)
    adapter = lab.adapter(lab.base(arch, **WIDE), cls, options, size=0.01, saving={"save_embedding_layers": False})
    truth = expected(base, {adapter: 1.0}, cls)
    lm.merge(base, adapter, tmp_path / "out", compute_dtype=compute)
    check(tmp_path / "out", truth, base, exact=compute == "float64")


def test_two_adapters_on_a_bfloat16_base_are_rounded_once(lab: Lab, tmp_path: Path) -> None:
    cls = "LlamaForCausalLM"
    base, plain = lab.base("llama", dtype=torch.bfloat16, **WIDE), lab.base("llama", **WIDE)
    weights = {lab.adapter(plain, cls, ALL, seed=seed): 0.5 * seed for seed in (1, 2, 3)}
    lm.merge(base, weights, tmp_path / "out")
    check(tmp_path / "out", expected(base, weights, cls), base)


def test_16_bit_adapter_is_read_as_it_is(lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    adapter = copy_adapter(lab.adapter(base, cls, ALL), tmp_path / "adapter", lambda key: key)
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, {"format": "pt"})
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", expected(base, {adapter: 1.0}, cls), base)


def test_dtype_option_changes_every_floating_tensor(lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, BY_ID["llama-all"])
    lm.merge(base, adapter, tmp_path / "out", dtype="bfloat16", compute_dtype="float64")
    got = read_tensors(tmp_path / "out")
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == torch.bfloat16, name
        assert torch.equal(got[name].double(), round_to(value, torch.bfloat16)), name


# --- shards, names, files -------------------------------------------------------------------------


def layout(folder: Path) -> dict[str, list[str]]:
    """Tensor names by file of a checkpoint folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: sorted(read_tensors(file)) for file in files}


@pytest.mark.parametrize("name", ["llama-all", "qwen3_moe-experts", "mixtral-experts"])
def test_shards_stay_where_they_are(name: str, lab: Lab, tmp_path: Path) -> None:
    case = BY_ID[name]
    base = lab.base(case.arch, shard="20KB")
    assert len(layout(base)) > 3
    adapter = lab.adapter(lab.base(case.arch), case.cls, case.options)
    truth = expected(base, {adapter: 1.0}, case.cls)
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)
    assert layout(tmp_path / "out") == layout(base)
    index = "model.safetensors.index.json"
    assert read_json(tmp_path / "out", index)["weight_map"] == read_json(base, index)["weight_map"]


def test_untied_head_of_a_sharded_base_is_in_the_index(lab: Lab, tmp_path: Path) -> None:
    case = BY_ID["llama_tied-lm_head"]
    base = lab.base("llama_tied", shard="20KB")
    adapter = lab.adapter(lab.base("llama_tied"), case.cls, case.options)
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", expected(base, {adapter: 1.0}, case.cls, untie=True), base)
    index = read_json(tmp_path / "out", "model.safetensors.index.json")
    placed = {name: file for file, names in layout(tmp_path / "out").items() for name in names}
    assert index["weight_map"] == placed
    tensors = read_tensors(tmp_path / "out").values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert_outputs(tmp_path / "out", base, adapter, case.cls, inputs_for("llama_tied"))


def test_side_files_travel(lab: Lab, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(lab.base("llama"), base)
    (base / "tokenizer.json").write_text("{}\n", encoding="utf-8")
    (base / "LICENSE").write_text("terms\n", encoding="utf-8")
    adapter = lab.adapter(lab.base("llama"), "LlamaForCausalLM", ALL)
    lm.merge(base, adapter, tmp_path / "out")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes(), file


RENAMES = {
    "module": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "module-first": lambda key: "module." + key,
    "orig_mod": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "orig_mod-inside": lambda key: key.replace(".self_attn.", ".self_attn._orig_mod."),
    "fsdp": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module.", key),
    "checkpoint": lambda key: re.sub(r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module.", key),
    "doubled": lambda key: "base_model.model." + key,
    "no-prefix": lambda key: key.removeprefix("base_model.model."),
    "adapter-name": lambda key: re.sub(r"lora_([AB])\.weight", r"lora_\1.default.weight", key),
    "other-adapter-name": lambda key: re.sub(r"lora_([AB])\.weight", r"lora_\1.my-run_2.weight", key),
    "no-model": lambda key: key.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("rename", RENAMES)
def test_wrapped_keys_give_the_same_bytes(rename: str, lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    adapter = lab.adapter(base, cls, {**ALL, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}})
    other = copy_adapter(adapter, tmp_path / "adapter", RENAMES[rename])
    lm.merge(base, other, tmp_path / "out")
    check(tmp_path / "out", expected(base, {adapter: 1.0}, cls), base)
    lm.merge(base, adapter, tmp_path / "plain")
    got, plain = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    assert all(same_bits(value, plain[name]) for name, value in got.items())


@pytest.mark.parametrize("name", ["llama-dora", "llama_bias-bias-all", "llama-save-both", "llama-tokens-dict"])
def test_raw_dump_of_the_training_model(name: str, lab: Lab, tmp_path: Path) -> None:
    """Keys as ``PeftModel.state_dict`` has them: adapter names, ``modules_to_save``, ``original_module``."""
    case = BY_ID[name]
    base, adapter, truth = prepare(lab, case)
    model = with_adapter(load_model(base, case.cls, torch.float32), adapter).float()
    wanted = ("lora_", ".modules_to_save.", ".original_module.", "trainable_tokens_delta")
    dump = {
        key: value.contiguous().clone()
        for key, value in model.state_dict().items()
        if any(part in key for part in wanted) or (key.endswith(".bias") and case.options.get("bias") == "all")
    }
    assert any(".default" in key for key in dump)
    raw = copy_adapter(adapter, tmp_path / "adapter", lambda key: key)
    save_file(dump, raw / "adapter_model.safetensors", {"format": "pt"})
    lm.merge(base, raw, tmp_path / "out")
    check(tmp_path / "out", truth, base)


def test_pickled_adapter_needs_permission(lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    adapter = lab.adapter(base, cls, ALL)
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    shutil.copy(adapter / "adapter_config.json", legacy)
    torch.save(load_file(adapter / "adapter_model.safetensors"), legacy / "adapter_model.bin")
    with pytest.raises(lm.errors.UnsafeError):
        lm.merge(base, legacy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lm.merge(base, legacy, tmp_path / "out", allow_pickle=True)
    check(tmp_path / "out", expected(base, {adapter: 1.0}, cls), base)


def test_base_given_as_one_file(lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, BY_ID["llama-all"])
    lm.merge(base / "model.safetensors", adapter, tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", truth, base / "model.safetensors")


# --- classes that differ between base file and training -------------------------------------------

CROSS = {
    "llama-without-prefix": ("llama", "LlamaModel", "LlamaForCausalLM", "model."),
    "llama-with-prefix": ("llama", "", "LlamaModel", "model."),
    "gpt2-without-prefix": ("gpt2", "GPT2Model", "GPT2LMHeadModel", "transformer."),
    "gpt2-with-prefix": ("gpt2", "", "GPT2Model", "transformer."),
    "bert-without-prefix": ("bert", "BertModel", "BertForMaskedLM", "bert."),
    "bert-with-prefix": ("bert", "", "BertModel", "bert."),
    "vit-with-prefix": ("vit", "ViTForImageClassification", "ViTModel", "vit."),
    "vit-without-prefix": ("vit", "", "ViTForImageClassification", "vit."),
    "mixtral-without-prefix": ("mixtral", "MixtralModel", "MixtralForCausalLM", "model."),
}


@pytest.mark.parametrize("name", CROSS)
def test_prefix_of_the_base_differs_from_the_adapters(name: str, lab: Lab, tmp_path: Path) -> None:
    arch, saved_as, trained_as, prefix = CROSS[name]
    base = lab.base(arch, model=saved_as)
    options = {"target_modules": few(arch)}
    if arch == "mixtral":
        options["target_parameters"] = EXPERTS
    adapter = lab.adapter(base, trained_as, options)
    truth = {key: value for key, value in read_tensors(base).items()}
    truth = {key: value.double() if value.is_floating_point() else value for key, value in truth.items()}
    for key, value in expected(base, {adapter: 1.0}, trained_as).items():
        known = [k for k in (key, prefix + key, key.removeprefix(prefix)) if k in truth]
        if known:
            truth[known[0]] = value
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)


# architecture, class the base is saved as, class it is trained as, task, modules that only the adapter has
HEADS = {
    "llama": ("llama", "", "LlamaForSequenceClassification", "SEQ_CLS", ["score"]),
    "llama-from-encoder": ("llama", "LlamaModel", "LlamaForSequenceClassification", "SEQ_CLS", ["score"]),
    "qwen2": ("qwen2", "", "Qwen2ForSequenceClassification", "SEQ_CLS", ["score"]),
    "gpt2": ("gpt2", "", "GPT2ForSequenceClassification", "SEQ_CLS", ["score"]),
    "roberta": ("roberta", "", "RobertaForSequenceClassification", "SEQ_CLS", ["classifier"]),
    "bert-from-encoder": ("bert_model", "", "BertForSequenceClassification", "SEQ_CLS", ["classifier"]),
    "bert-tokens": ("bert", "", "BertForTokenClassification", "TOKEN_CLS", ["classifier"]),
    "distilbert": (
        "distilbert",
        "",
        "DistilBertForSequenceClassification",
        "SEQ_CLS",
        ["pre_classifier", "classifier"],
    ),
    "deberta-from-encoder": (
        "deberta_v2",
        "",
        "DebertaV2ForSequenceClassification",
        "SEQ_CLS",
        ["pooler", "classifier"],
    ),
    "vit-from-encoder": ("vit", "", "ViTForImageClassification", "", ["classifier"]),
}
AUTO = {
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "ImageClassification": "AutoModelForImageClassification",
}


@pytest.mark.parametrize("name", HEADS)
def test_head_of_the_adapter_is_added(name: str, lab: Lab, tmp_path: Path) -> None:
    """The base has no such head; the output loads with its Auto class and gives the trained logits."""
    arch, saved_as, cls, task, heads = HEADS[name]
    base = lab.base(arch, model=saved_as)
    options: dict[str, Any] = {"target_modules": few(arch), "modules_to_save": heads}
    if task:
        options["task_type"] = task
    adapter = lab.adapter(base, cls, options, num_labels=3)
    inputs = inputs_for(arch)
    trained = trained_outputs(base, adapter, cls, inputs, num_labels=3)
    out = tmp_path / "out"
    lm.merge(base, adapter, out)
    auto = next(value for key, value in AUTO.items() if cls.endswith(key))
    model = getattr(transformers, auto).from_pretrained(out, attn_implementation="eager").eval()
    assert type(model).__name__ == cls
    assert model.config.num_labels == 3
    narrow = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    got = outputs(model, narrow)
    assert torch.allclose(got, trained, rtol=1e-5, atol=1e-5), (got - trained).abs().max()
    # and every tensor of the trained class is in the file, under the base's names where the base has it
    truth = expected(base, {adapter: 1.0}, cls, num_labels=3)
    before, after = read_tensors(base), read_tensors(out)
    prefix = getattr(transformers, cls).base_model_prefix + "."
    seen = set()
    for key, value in truth.items():
        where = [k for k in (key, prefix + key, key.removeprefix(prefix)) if k in after]
        assert where, f"{key} is missing"
        seen.add(where[0])
        assert after[where[0]].shape == value.shape
        assert (after[where[0]].double() - value).abs().max() <= 1e-6 * value.abs().max(), key
    for key in after.keys() - seen:
        assert same_bits(after[key], before[key]), key


# --- tied weights and layers that PEFT cannot merge -----------------------------------------------


def test_ensured_tying_applies_one_delta_once(lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama_tied"), "LlamaForCausalLM"
    options = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    adapter = lab.adapter(base, cls, options, saving={"save_embedding_layers": False})
    factors = load_file(adapter / "adapter_model.safetensors")
    a = factors["base_model.model.model.embed_tokens.lora_embedding_A"].double()
    b = factors["base_model.model.model.embed_tokens.lora_embedding_B"].double()
    truth = {key: value.double() for key, value in read_tensors(base).items()}
    name = "model.embed_tokens.weight"
    truth[name] = truth[name] + 6 / 4 * (b @ a).T
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert_outputs(tmp_path / "out", base, adapter, cls, inputs_for("llama_tied"))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_both_tied_tensors_saved_by_the_adapter(equal: bool, lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama_tied"), "LlamaForCausalLM"
    source = lab.adapter(base, cls, {**ALL, "modules_to_save": ["embed_tokens"]})
    tensors = load_file(source / "adapter_model.safetensors")
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    head = embedding.clone() if equal else embedding * 1.5
    adapter = copy_adapter(source, tmp_path / "adapter", lambda key: key)
    save_file(
        {**tensors, "base_model.model.lm_head.weight": head},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = read_json(adapter, "adapter_config.json")
    config["modules_to_save"] = ["embed_tokens", "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    truth = expected(base, {source: 1.0}, cls, untie=True)
    if equal:
        del truth["lm_head.weight"]
    else:
        truth["lm_head.weight"] = head.double()
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)
    assert read_json(tmp_path / "out").get("tie_word_embeddings", True) is equal


def test_replicated_layers_are_copies_with_their_own_deltas(lab: Lab, tmp_path: Path) -> None:
    base, cls = lab.base("llama"), "LlamaForCausalLM"
    ranges = [[0, 2], [0, 1], [1, 2], [0, 2]]
    sources = [layer for first, last in ranges for layer in range(first, last)]
    adapter = lab.adapter(base, cls, {**ALL, "layer_replication": ranges})
    before = {key: value.double() for key, value in read_tensors(base).items()}
    truth = {key: value for key, value in before.items() if ".layers." not in key}
    for new, old in enumerate(sources):
        prefix = f"model.layers.{old}."
        for key, value in before.items():
            if key.startswith(prefix):
                truth[f"model.layers.{new}.{key.removeprefix(prefix)}"] = value
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        delta = 6 / 4 * factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
        truth[name] = truth[name] + delta
    assert {int(key.split(".")[2]) for key in truth if ".layers." in key} == set(range(len(sources)))
    lm.merge(base, adapter, tmp_path / "out")
    config = read_json(tmp_path / "out")
    assert config["num_hidden_layers"] == len(sources)
    got = read_tensors(tmp_path / "out")
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == torch.float32 and got[name].shape == value.shape, name
        assert (got[name].double() - value).abs().max() <= 1e-6 * value.abs().max(), name
    assert_outputs(tmp_path / "out", base, adapter, cls, inputs_for("llama"))


# --- adapters of transformers 4: names as on disk -------------------------------------------------


def by_hand(base: Path, modules: list[str], folder: Path, r: int = 3) -> tuple[Path, dict[str, Tensor]]:
    """An adapter whose module paths are tensor names of the file, and its truth by the formula."""
    generator = torch.Generator().manual_seed(9)
    truth = {key: value.double() for key, value in read_tensors(base).items()}
    tensors: dict[str, Tensor] = {}
    for module in modules:
        out, width = truth[f"{module}.weight"].shape
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((r, width), (out, r)))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        truth[f"{module}.weight"] += 7 / r * b.double() @ a.double()
    leaves = sorted({module.rsplit(".", 1)[-1] for module in modules})
    return write_adapter(folder, tensors, r=r, lora_alpha=7, target_modules=leaves), truth


@pytest.mark.parametrize(
    ("arch", "pattern"),
    [
        ("mixtral", r"block_sparse_moe\.(experts\.\d+\.w[123]|gate)$"),
        ("qwen3_moe", r"mlp\.(experts\.\d+\.(gate|up|down)_proj|gate)$"),
        ("vit", r"encoder\.layer\.\d+\.(attention\.attention\.(query|value)|intermediate\.dense)$"),
        ("gpt_neox", r"embed_out$|dense_h_to_4h$"),
    ],
)
def test_names_of_transformers_4(arch: str, pattern: str, lab: Lab, tmp_path: Path) -> None:
    base = lab.base(arch)
    names = [name.removesuffix(".weight") for name in read_tensors(base) if name.endswith(".weight")]
    modules = [name for name in names if re.search(pattern, name)]
    assert modules
    adapter, truth = by_hand(base, modules, tmp_path / "adapter")
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)


def test_wrong_fan_in_fan_out_of_the_config_is_no_matter(lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, BY_ID["gpt2-all"])
    for value in (True, False):
        other = copy_adapter(adapter, tmp_path / f"adapter-{value}", lambda key: key)
        config = {**read_json(adapter, "adapter_config.json"), "fan_in_fan_out": value}
        (other / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        lm.merge(base, other, tmp_path / f"out-{value}")
        check(tmp_path / f"out-{value}", truth, base)


def test_old_bert_names_of_norms_are_copied(lab: Lab, tmp_path: Path) -> None:
    """Files of 2018 call norms ``gamma`` and ``beta``; a LoRA beside them changes nothing about that."""
    base = tmp_path / "base"
    shutil.copytree(lab.base("bert_model"), base)
    adapter = lab.adapter(lab.base("bert_model"), "BertModel", {"target_modules": few("bert_model")})

    def old(key: str) -> str:
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    save_file(renamed(read_tensors(base), old), base / "model.safetensors", {"format": "pt"})
    truth = renamed(expected(lab.base("bert_model"), {adapter: 1.0}, "BertModel"), old)
    lm.merge(base, adapter, tmp_path / "out")
    check(tmp_path / "out", truth, base)


def exchanged_factors(key: str, value: Tensor, other: Tensor, experts: int) -> Tensor:
    """The factor ``key`` of the transposed delta: A gets B's transpose and the reverse, per expert.

    A is (experts * r, in) with the expert slowest, B is (out, r * experts) with the expert fastest.
    """
    if key.endswith(".lora_A.weight"):
        return other.reshape(other.shape[0], -1, experts).permute(2, 1, 0).reshape(value.shape[0], -1)
    return other.reshape(experts, -1, other.shape[1]).permute(2, 1, 0).reshape(other.shape[1], -1)


@pytest.mark.parametrize(
    ("arch", "intermediate", "version"),
    [
        ("mixtral", 52, ""),
        ("mixtral", 52, "0.18.1"),
        ("mixtral", 32, "0.18.1"),
        ("mixtral", 32, "0.19.0"),
        ("qwen3_moe", 32, ""),
        ("gpt_oss", 32, "0.19.0"),
    ],
)
def test_expert_factors_of_older_peft(arch: str, intermediate: int, version: str, lab: Lab, tmp_path: Path) -> None:
    """Before 0.19.1 A and B of an expert lay the other way round, those of gpt-oss in 0.19.0 alone.

    A square parameter shows it by ``peft_version`` alone.
    """
    size = "moe_intermediate_size" if arch == "qwen3_moe" else "intermediate_size"
    base = lab.base(arch, **{size: intermediate})
    options = {"target_modules": [], "target_parameters": EXPERTS}
    adapter = lab.adapter(base, ZOO[arch].model, options)
    truth = expected(base, {adapter: 1.0}, ZOO[arch].model)
    factors = load_file(adapter / "adapter_model.safetensors")
    old = {}
    for key, value in factors.items():
        partner = key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
        old[key] = exchanged_factors(key, value, factors[partner], experts=3).contiguous()
    folder = copy_adapter(adapter, tmp_path / "adapter", lambda key: key)
    save_file(old, folder / "adapter_model.safetensors", {"format": "pt"})
    config = read_json(adapter, "adapter_config.json")
    config["peft_version"] = version
    if not version:
        del config["peft_version"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    lm.merge(base, folder, tmp_path / "out")
    check(tmp_path / "out", truth, base)


@pytest.mark.parametrize("name", ["llama_bias-bias-all", "llama_bias-bias-lora_only"])
def test_bias_keys_of_older_peft(name: str, lab: Lab, tmp_path: Path) -> None:
    base, adapter, truth = prepare(lab, BY_ID[name])
    old = copy_adapter(adapter, tmp_path / "adapter", lambda key: key.replace(".base_layer.bias", ".bias"))
    keys = [set(load_file(folder / "adapter_model.safetensors")) for folder in (old, adapter)]
    assert keys[0] != keys[1]
    lm.merge(base, old, tmp_path / "out")
    check(tmp_path / "out", truth, base)


# --- inputs that must not pass --------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused(lab: Lab, tmp_path: Path) -> None:
    adapter = lab.adapter(lab.base("gpt2"), "GPT2LMHeadModel", {"target_modules": few("gpt2")})
    with pytest.raises(lm.errors.LoramergeError) as caught:
        lm.merge(lab.base("llama"), adapter, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_wrong_shape_is_refused(lab: Lab, tmp_path: Path) -> None:
    adapter = lab.adapter(lab.base("llama", hidden_size=40, head_dim=8), "LlamaForCausalLM", ALL)
    with pytest.raises(lm.errors.LoramergeError) as caught:
        lm.merge(lab.base("llama"), adapter, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_half_a_pair_is_refused(lab: Lab, tmp_path: Path) -> None:
    adapter = copy_adapter(
        lab.adapter(lab.base("llama"), "LlamaForCausalLM", ALL), tmp_path / "adapter", lambda key: key
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(lm.errors.LoramergeError) as caught:
        lm.merge(lab.base("llama"), adapter, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_the_inputs_are_left_alone(lab: Lab, tmp_path: Path) -> None:
    base, adapter, _ = prepare(lab, BY_ID["llama-all"])
    files = [file for folder in (base, adapter) for file in folder.iterdir()]
    before = {file: file.read_bytes() for file in files}
    lm.merge(base, adapter, tmp_path / "out")
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(path for folder in (base, adapter) for path in folder.iterdir()) == sorted(files)


def test_saving_a_model_round_trips_its_names(lab: Lab) -> None:
    """The truth is read back under the names of the base file, for every architecture."""
    for arch in ZOO:
        base = lab.base(arch)
        assert saved_tensors(load_model(base, ZOO[arch].model)).keys() == read_tensors(base).keys(), arch
