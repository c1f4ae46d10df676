"""PEFT methods with shared banks, spectra or decompositions: merged weights against the forward pass that was trained.

Every adapted module is called by itself on its own input, so no activation hides a difference.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.variants import KasaLinearVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import loramerge as lm
from loramerge.adapters.kinds.network import _ACTIVATIONS
from loramerge.adapters.kinds.wavelets import FILTERS
from loramerge.errors import InputError, MismatchError, UnsupportedError

TOLERANCE = 1e-5
LINEAR = ("c_attn", "c_proj", "c_fc")
"""Names under which some architectures store linear layers transposed, and others do not: the config tells."""


class Block(nn.Module):
    """Linear layers that are tall, square and wide, with and without bias."""

    def __init__(self, conv1d: bool = False, sizes: tuple[int, int] = (8, 12)) -> None:
        super().__init__()
        small, large = sizes
        self.c_fc = Conv1D(large, small) if conv1d else nn.Linear(small, large)
        self.c_proj = Conv1D(large, large) if conv1d else nn.Linear(large, large, bias=False)
        self.c_attn = Conv1D(small, large) if conv1d else nn.Linear(large, small)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(inputs[name]) for name in inputs if hasattr(self, name)}


class Stack(nn.Module):
    """Blocks in a list, so that modules have roles and numbers, beside an embedding."""

    def __init__(self, depth: int = 11, embedding: bool = False, **options: Any) -> None:
        super().__init__()
        if embedding:
            self.table = nn.Embedding(12, 12)
        self.layers = nn.ModuleList(nn.ModuleDict({"part": Block(**options)}) for _ in range(depth))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        if hasattr(self, "table"):
            out["table"] = self.table(torch.arange(12))
        for i, layer in enumerate(self.layers):
            out |= {f"{i}.{name}": y for name, y in layer["part"](inputs).items()}
        return out


def inputs(sizes: tuple[int, int] = (8, 12), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    widths = {"c_fc": sizes[0], "c_proj": sizes[1], "c_attn": sizes[1]}
    return {name: torch.randn(5, n, generator=generator).to(dtype) for name, n in widths.items()}


def trained(base: nn.Module, config: peft.PeftConfig, size: float = 0.3) -> PeftModel:
    """The adapter on a copy of the base, every trained number moved away from its start."""
    generator = torch.Generator().manual_seed(11)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def changed(base: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(base)
    model.load_state_dict(weights)
    return model.eval()


def distance(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference of the outputs of a module."""
    assert got.keys() == wanted.keys()
    return max(float((got[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


@torch.no_grad()
def check(
    base: nn.Module,
    config: peft.PeftConfig,
    folder: Path,
    *,
    tolerance: float = TOLERANCE,
    size: float = 0.3,
    given: Mapping[str, Tensor] | None = None,
    data: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Trains, saves, merges and compares; the change must be far larger than the tolerance in every module."""
    data = inputs() if data is None else data
    model = trained(base, config, size)
    wanted = model(data)
    model.save_pretrained(folder)
    merged = lm.merge_tensors(given or base.state_dict(), folder, **options)
    assert distance(changed(base, merged)(data), wanted) <= tolerance
    plain = changed(base, base.state_dict())(data)
    adapted = [k for k in wanted if float((plain[k] - wanted[k]).norm() / wanted[k].norm()) > 20 * tolerance]
    assert len(adapted) == len([m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)])
    return merged


def seeded(cls: Callable[..., nn.Module] = Block, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = cls(**options)
    for module in model.modules():
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=0.3)
            nn.init.normal_(module.bias)
    return model.eval()


def on(cls: Callable[..., Any], **options: Any) -> peft.PeftConfig:
    config = cls(**{"target_modules": list(LINEAR), **options})
    assert isinstance(config, peft.PeftConfig)
    return config


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "vera": lambda: on(peft.VeraConfig, r=3),
    "vera of rank 1": lambda: on(peft.VeraConfig, r=1),
    "vera drawn again": lambda: on(peft.VeraConfig, r=3, save_projection=False, projection_prng_key=5),
    "pvera": lambda: on(peft.PveraConfig, r=3),
    "pvera drawn again": lambda: on(peft.PveraConfig, r=2, save_projection=False),
    "randlora": lambda: on(peft.RandLoraConfig, r=3, randlora_alpha=5),
    "randlora of rank 1": lambda: on(peft.RandLoraConfig, r=1, randlora_alpha=2, sparse=True),
    "randlora of a rank that does not divide": lambda: on(peft.RandLoraConfig, r=5, randlora_alpha=4, very_sparse=True),
    "vblora": lambda: on(peft.VBLoRAConfig, r=2, num_vectors=9, vector_length=4, topk=3, init_vector_bank_bound=1.0),
    "vblora of one vector": lambda: on(peft.VBLoRAConfig, r=1, num_vectors=5, vector_length=2, topk=1),
    "vblora with weights": lambda: on(
        peft.VBLoRAConfig, r=2, num_vectors=9, vector_length=4, topk=3, save_only_topk_weights=True
    ),
    "vblora with one weight": lambda: on(
        peft.VBLoRAConfig, r=2, num_vectors=9, vector_length=4, topk=1, save_only_topk_weights=True
    ),
    "vblora with many vectors": lambda: on(
        peft.VBLoRAConfig, r=2, num_vectors=300, vector_length=4, topk=2, save_only_topk_weights=True
    ),
    "fourierft": lambda: on(peft.FourierFTConfig, n_frequency=20, scaling=30.0),
    "fourierft of several sizes": lambda: on(
        peft.FourierFTConfig, n_frequency=96, random_loc_seed=4, n_frequency_pattern={"c_proj": 144}
    ),
    "waveft": lambda: on(peft.WaveFTConfig, n_frequency=20),
    "waveft in proportion": lambda: on(peft.WaveFTConfig, n_frequency=20, proportional_parameters=True),
    "waveft without transform": lambda: on(peft.WaveFTConfig, n_frequency=20, use_idwt=False, random_loc_seed=1),
    "shira": lambda: on(peft.ShiraConfig, r=1),
    "c3a": lambda: on(peft.C3AConfig, block_size=4),
    "c3a of one number": lambda: on(peft.C3AConfig, block_size=1, block_size_pattern={"c_proj": 6}),
    "gralora": lambda: on(peft.GraloraConfig, r=4, gralora_k=2, alpha=6),
    "gralora and a pair": lambda: on(peft.GraloraConfig, r=8, gralora_k=4, hybrid_r=3, alpha=7),
    "gralora of one block": lambda: on(peft.GraloraConfig, r=1, gralora_k=1, hybrid_r=1, alpha=3),
    "glora": lambda: on(peft.GloraConfig, r=2),
    "deft": lambda: on(peft.DeftConfig, r=2),
    "deft with alpha": lambda: on(peft.DeftConfig, r=3, alpha=7),
    "deft by qr": lambda: on(peft.DeftConfig, r=2, decomposition_method="qr"),
    "deft of rank 1 by qr": lambda: on(peft.DeftConfig, r=1, decomposition_method="qr", alpha=3),
    "deft of a rank beyond the output": lambda: on(peft.DeftConfig, r=10, decomposition_method="qr"),
    "deft that removes by relu": lambda: on(peft.DeftConfig, r=2, para=True),
    "deft that removes by qr": lambda: on(peft.DeftConfig, r=2, para=True, decomposition_method="qr"),
    "osf": lambda: on(peft.OSFConfig, effective_rank=3),
    "osf of fractions": lambda: on(peft.OSFConfig, effective_rank=0.25, rank_pattern={"c_proj": 0.5, "c_attn": 7}),
    "osf by itself": lambda: on(peft.OSFConfig),
    "frod": lambda: on(peft.FrodConfig, progressbar=False, sparse_rate=0.2),
    "frod of one number": lambda: on(peft.FrodConfig, progressbar=False),
    "frod without a sparse part": lambda: on(peft.FrodConfig, progressbar=False, sparse_rate=0.0),
    "peanut": lambda: on(peft.PeanutConfig, r=3),
    "peanut with layers": lambda: on(peft.PeanutConfig, r=2, depth=2, scaling=0.7, act_fn="gelu"),
    "tinylora": lambda: on(peft.TinyLoraConfig, r=2, u=5),
    "tinylora of one vector": lambda: on(peft.TinyLoraConfig, r=2, u=3, weight_tying=1.0),
    "supertuning": lambda: on(peft.SupertuningConfig, sparsity=0.8),
    "supertuning and a pair": lambda: on(
        peft.SupertuningConfig, sparsity=0.8, r=2, lora_alpha=7, select_top=False, init_weights=False
    ),
    "unilora": lambda: on(peft.UniLoraConfig, r=2, theta_d_length=20, save_indices=True),
}
CONV1D = [
    name
    for name in CONFIGS
    if name.split()[0] not in ("shira", "c3a", "glora", "osf", "peanut", "supertuning") and "very" not in name
]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merged_weights_compute_what_was_trained(name: str, tmp_path: Path) -> None:
    check(seeded(), CONFIGS[name](), tmp_path)


@pytest.mark.parametrize("name", CONV1D)
def test_a_transposed_linear_is_merged_as_it_is_stored(name: str, tmp_path: Path) -> None:
    check(seeded(conv1d=True), CONFIGS[name](), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_merged_as_tensors_in_memory_are(name: str, tmp_path: Path) -> None:
    base = seeded().state_dict()
    trained(seeded(), CONFIGS[name]()).save_pretrained(tmp_path / "adapter")
    save_file(base, tmp_path / "base.safetensors")
    lm.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", jobs=2)
    merged = load_file(tmp_path / "out.safetensors")
    for key, wanted in lm.merge_tensors(base, tmp_path / "adapter").items():
        torch.testing.assert_close(merged[key], wanted, rtol=1e-6, atol=1e-6)
    assert lm.verify(tmp_path / "out.safetensors", base=tmp_path / "base.safetensors")["ok"]


def test_kasa_is_verified_with_what_was_said_of_the_base(tmp_path: Path) -> None:
    base = seeded().state_dict()
    trained(seeded(), _kasa()).save_pretrained(tmp_path / "adapter")
    save_file(base, tmp_path / "base.safetensors")
    lm.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", original_base=True)
    found = lm.verify(tmp_path / "out.safetensors", base=tmp_path / "base.safetensors", adapters=tmp_path / "adapter")
    assert found["ok"]
    assert found["replayed"]


@pytest.mark.parametrize("name", ["fourierft", "vera drawn again", "tinylora", "frod"])
@torch.no_grad()
def test_a_model_with_transposed_linears_is_merged_by_its_architecture(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    base = GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **sizes)).eval()
    model = trained(base, CONFIGS[name](), size=0.1)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    merged = lm.merge_tensors(base.state_dict(), tmp_path, config=base.config.to_dict())
    before, wanted, got = base(tokens).logits, model(tokens).logits, changed(base, merged)(tokens).logits
    assert float((before - wanted).norm() / wanted.norm()) > 1e-3
    assert float((got - wanted).norm() / wanted.norm()) <= TOLERANCE


@pytest.mark.parametrize("name", ["vera", "osf", "frod", "waveft", "deft by qr", "tinylora"])
def test_in_float64_the_merge_is_as_exact_as_the_training(name: str, tmp_path: Path) -> None:
    check(seeded(), CONFIGS[name](), tmp_path, compute_dtype="float64", tolerance=2e-6)


@pytest.mark.parametrize("cls", [peft.VeraConfig, peft.PveraConfig])
@pytest.mark.parametrize("targets", [["c_fc"], ["c_attn"], ["c_fc", "c_attn"]])
def test_projections_are_drawn_at_the_size_of_the_largest_modules(cls: Any, targets: list[str], tmp_path: Path) -> None:
    check(seeded(), on(cls, r=2, save_projection=False, target_modules=targets), tmp_path)


def test_projections_that_were_drawn_are_those_that_are_saved(tmp_path: Path) -> None:
    base = seeded()
    saved = check(base, on(peft.VeraConfig, r=4), tmp_path / "saved")
    drawn = check(base, on(peft.VeraConfig, r=4, save_projection=False), tmp_path / "drawn")
    assert "base_model.vera_A" not in load_file(tmp_path / "drawn" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], drawn[name]) for name in saved)


def test_a_module_left_out_still_counts_for_the_size_of_the_projections(tmp_path: Path) -> None:
    base, config = seeded(), on(peft.VeraConfig, r=2, save_projection=False)
    whole = check(base, config, tmp_path)
    part = lm.merge_tensors(base.state_dict(), tmp_path, exclude=["c_proj"])
    assert torch.equal(part["c_attn.weight"], whole["c_attn.weight"])
    assert torch.equal(part["c_proj.weight"], base.state_dict()["c_proj.weight"])


@pytest.mark.parametrize("wavelet", FILTERS)
def test_every_wavelet_is_the_one_that_was_trained(wavelet: str, tmp_path: Path) -> None:
    # Odd sizes: the padded matrix is then one larger than the filter needs.
    sizes = (7, 11)
    config = on(peft.WaveFTConfig, n_frequency=60, wavelet_family=wavelet)
    check(seeded(sizes=sizes), config, tmp_path, data=inputs(sizes))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (3, 7)])
@pytest.mark.parametrize("name", ["fourierft", "waveft"])
def test_a_spectrum_may_fill_the_smallest_weight(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    cls = {"fourierft": peft.FourierFTConfig, "waveft": peft.WaveFTConfig}[name]
    check(seeded(sizes=sizes), on(cls, n_frequency=sizes[0] * sizes[0]), tmp_path, data=inputs(sizes), size=3)


@pytest.mark.parametrize("A_B", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("C", ["lora", "vector", "none"])
@pytest.mark.parametrize("D_E", ["vector", "constant", "none"])
def test_every_part_of_a_glora_changes_weight_and_bias(A_B: str, C: str, D_E: str, tmp_path: Path) -> None:
    if (A_B, C, D_E) == ("none", "none", "none"):
        pytest.skip("nothing is trained")
    base = seeded()
    base.c_proj = nn.Linear(12, 12)
    config = on(peft.GloraConfig, r=2, config_A_B=A_B, config_C=C, config_D_E=D_E)
    merged = check(base, config, tmp_path)
    assert torch.equal(merged["c_fc.weight"], base.state_dict()["c_fc.weight"]) == (A_B == "none")
    assert torch.equal(merged["c_fc.bias"], base.state_dict()["c_fc.bias"]) == (C == D_E == "none")


@pytest.mark.parametrize("activation", sorted(_ACTIVATIONS))
def test_every_activation_is_the_one_of_transformers(activation: str, tmp_path: Path) -> None:
    check(seeded(), on(peft.PeanutConfig, r=3, depth=1, act_fn=activation), tmp_path)


def test_an_activation_with_numbers_of_its_own_is_refused(tmp_path: Path) -> None:
    assert set(ACT2FN) - set(_ACTIVATIONS) == {"prelu", "xielu"}
    trained(seeded(), on(peft.PeanutConfig, act_fn="prelu")).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="activation prelu"):
        lm.merge_tensors(seeded().state_dict(), tmp_path)


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_modules_find_the_vector_that_they_share_whatever_the_order_of_the_file(tying: float, tmp_path: Path) -> None:
    # 33 modules: the order of names differs from that of the model in layers (10 before 2) and within them.
    check(seeded(Stack), on(peft.TinyLoraConfig, r=2, u=4, weight_tying=tying), tmp_path)


def test_an_embedding_is_merged_beside_linear_layers(tmp_path: Path) -> None:
    base = seeded(Stack, depth=2, embedding=True)
    check(base, on(peft.TinyLoraConfig, r=3, u=4, target_modules=["table", *LINEAR]), tmp_path)


def test_projections_of_another_seed_are_told(tmp_path: Path) -> None:
    base = seeded()
    trained(base, on(peft.TinyLoraConfig, r=2, u=4)).save_pretrained(tmp_path)
    _edit(tmp_path, projection_seed=43 * 1000)
    with pytest.raises(InputError, match="not drawn with the seed"):
        lm.merge_tensors(base.state_dict(), tmp_path)


def test_modules_of_one_role_share_their_decomposition(tmp_path: Path) -> None:
    base = seeded(Stack, depth=3)
    check(base, on(peft.FrodConfig, progressbar=False, sparse_rate=0.1), tmp_path)
    shared = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "frod_V" in key]
    assert sorted(shared) == [f"base_model.frod_V.part_{name}" for name in sorted(LINEAR)]


@torch.no_grad()
def test_a_role_named_by_its_own_rule_is_found(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.ModuleDict({"dense": nn.Linear(6, 6)})
            self.attention = nn.ModuleDict({"output": inner})
            self.output = nn.ModuleDict({"dense": nn.Linear(6, 4)})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.attention["output"]["dense"](x), "b": self.output["dense"](x)}

    base = seeded(Named)
    config = peft.FrodConfig(progressbar=False, sparse_rate=0.3, target_modules=["dense"])
    check(base, config, tmp_path, data=torch.randn(3, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["osf", "frod", "kasa"])
@torch.no_grad()
def test_a_decomposition_of_a_16_bit_base_is_rounded_as_it_was_in_training(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The exact update of a base of 16 bits is that with the rounded parts; only the sum is rounded once more."""
    base = seeded(sizes=(16, 24)).to(dtype)
    kasa = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(LINEAR), kasa_config=peft.tuners.lora.KasaConfig())
    model = trained(base, kasa if name == "kasa" else CONFIGS[name](), size=0.01 if name == "kasa" else 0.0)
    model.save_pretrained(tmp_path)
    merged = lm.merge_tensors(base.state_dict(), tmp_path, original_base=name == "kasa")
    for module in LINEAR:
        layer = model.base_model.model.get_submodule(module)
        delta = KasaLinearVariant._get_delta_weight if name == "kasa" else type(layer).get_delta_weight
        # PEFT's KaSA has changed its own base; the others add to the given one.
        exact = layer.get_base_layer().weight.float() + delta(layer, "default").float()
        got = merged[f"{module}.weight"].float()
        if name == "frod":  # PEFT computes the product in 16 bits
            assert float((got - exact).norm() / exact.norm()) < 2e-2
        else:
            assert float((got - exact.to(dtype).float()).norm()) <= 1e-3 * float(exact.norm())
    if name == "osf":  # untrained: not one bit may differ
        assert all(torch.equal(merged[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("name", ["vera", "glora", "deft", "osf", "frod", "peanut", "waveft", "supertuning and a pair"])
@torch.no_grad()
def test_a_weight_scales_the_whole_change(name: str, tmp_path: Path) -> None:
    base = seeded()
    whole = check(base, CONFIGS[name](), tmp_path)
    half = lm.merge_tensors(base.state_dict(), [(tmp_path, 0.5)])
    none = lm.merge_tensors(base.state_dict(), [(tmp_path, 0.0)])
    for key, before in base.state_dict().items():
        torch.testing.assert_close(half[key], before + 0.5 * (whole[key] - before), rtol=1e-5, atol=1e-5)
        assert torch.equal(none[key], before)


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_are_carried(bias: str, tmp_path: Path) -> None:
    base = seeded()
    merged = check(base, on(peft.VeraConfig, r=2, bias=bias), tmp_path)
    assert not torch.equal(merged["c_fc.bias"], base.state_dict()["c_fc.bias"])


def test_a_bias_of_a_transposed_linear_is_carried(tmp_path: Path) -> None:
    merged = check(seeded(conv1d=True), on(peft.RandLoraConfig, r=2, randlora_alpha=2, bias="all"), tmp_path)
    assert not torch.equal(merged["c_fc.bias"], seeded(conv1d=True).state_dict()["c_fc.bias"])


@torch.no_grad()
def test_values_at_one_place_add_up(tmp_path: Path) -> None:
    base = seeded()
    trained(base, on(peft.ShiraConfig, r=1)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.c_attn.shira_indices"] = torch.ones_like(tensors["base_model.model.c_attn.shira_indices"])
    save_file(tensors, file)
    moved = lm.merge_tensors(base.state_dict(), tmp_path)["c_attn.weight"] - base.state_dict()["c_attn.weight"]
    total = tensors["base_model.model.c_attn.shira_weight"].sum()
    torch.testing.assert_close(moved[1, 1], total)
    assert int(moved.count_nonzero()) == 1


def test_indices_that_a_system_wrote_as_floats_are_whole_numbers(tmp_path: Path) -> None:
    base = seeded()
    merged = check(base, on(peft.ShiraConfig, r=1), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.float() for k, v in load_file(file).items()}, file)
    assert all(torch.equal(v, merged[k]) for k, v in lm.merge_tensors(base.state_dict(), tmp_path).items())


@pytest.mark.parametrize("name", ["shira", "supertuning", "unilora", "vblora with weights", "frod"])
def test_an_index_beyond_its_range_is_told(name: str, tmp_path: Path) -> None:
    base = seeded()
    trained(base, CONFIGS[name]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, tensor in tensors.items():
        if "indices" in key:
            tensor.view(-1)[-1] = 200
    save_file(tensors, file)
    with pytest.raises(InputError, match="index") as error:
        lm.merge_tensors(base.state_dict(), tmp_path)
    assert error.value.code == "adapter.indices"


# ------------------------------------------------------------------------------------------------ KaSA


def _kasa(**options: Any) -> peft.LoraConfig:
    kasa = peft.tuners.lora.KasaConfig()
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(LINEAR), kasa_config=kasa, **options)


@pytest.mark.parametrize("rslora", [False, True])
def test_kasa_on_the_original_base_truncates_it_again(rslora: bool, tmp_path: Path) -> None:
    check(seeded(), _kasa(use_rslora=rslora), tmp_path, original_base=True)


@torch.no_grad()
def test_kasa_on_the_changed_base_adds_only(tmp_path: Path) -> None:
    base, data = seeded(), inputs()
    model = trained(base, _kasa())
    model.save_pretrained(tmp_path)
    truncated = base.state_dict()
    for name in LINEAR:
        truncated[f"{name}.weight"] = model.base_model.model.get_submodule(name).get_base_layer().weight.clone()
    wanted = model(data)
    for said in ("residual_base", "original_base"):  # dropping what is gone already changes nothing
        merged = lm.merge_tensors(truncated, tmp_path, **{said: True})
        assert distance(changed(base, merged)(data), wanted) <= TOLERANCE


def test_kasa_is_refused_until_the_base_is_named(tmp_path: Path) -> None:
    base = seeded()
    trained(base, _kasa()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="KaSA") as error:
        lm.merge_tensors(base.state_dict(), tmp_path)
    assert "--original-base" in error.value.fix


# ------------------------------------------------------------------------------------------------ refusals


REFUSED: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "randlora": (lambda: on(peft.RandLoraConfig, r=3, save_projection=False), "random bases are not in the file"),
    "unilora": (lambda: on(peft.UniLoraConfig, r=2, theta_d_length=20), "indices are not in the file"),
    "frod": (lambda: on(peft.FrodConfig, progressbar=False, save_projection=False), "projections are not in the file"),
    "tinylora": (lambda: on(peft.TinyLoraConfig, save_projection=False), "projections are not in the file"),
    "supertuning": (
        lambda: on(peft.SupertuningConfig, sparsity=0.5, save_precomputed_indices=False),
        "places of Super-Tuning's values are not in the file",
    ),
    "pvera": (lambda: on(peft.PveraConfig, r=2, sample_at_inference=True), "samples its update anew"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_file_does_not_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    trained(seeded(), config()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=reason) as error:
        lm.merge_tensors(seeded().state_dict(), tmp_path)
    assert error.value.code == "adapter.refused"


def test_clusters_that_are_not_saved_are_refused_by_name(tmp_path: Path) -> None:
    trained(seeded(), CONFIGS["vera"]()).save_pretrained(tmp_path)
    _edit(tmp_path, peft_type="ADAMSS")
    with pytest.raises(UnsupportedError, match=r"ADAMSS cannot be merged: .*clustering"):
        lm.merge_tensors(seeded().state_dict(), tmp_path)


def test_projections_lost_from_a_file_that_should_have_them_are_told(tmp_path: Path) -> None:
    trained(seeded(), CONFIGS["vera"]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".vera_A" not in k and ".vera_B" not in k}, file)
    with pytest.raises(MismatchError, match="they are not in the file"):
        lm.merge_tensors(seeded().state_dict(), tmp_path)


def test_projections_are_not_drawn_for_a_base_that_lacks_a_module(tmp_path: Path) -> None:
    trained(seeded(), CONFIGS["vera drawn again"]()).save_pretrained(tmp_path)
    base = {k: v for k, v in seeded().state_dict().items() if not k.startswith("c_proj")}
    with pytest.raises(UnsupportedError, match="which tell their size"):
        lm.merge_tensors(base, tmp_path, allow_unmatched=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_field_is_refused(name: str, tmp_path: Path) -> None:
    trained(seeded(), CONFIGS[name]()).save_pretrained(tmp_path)
    _edit(tmp_path, new_and_strange=1)
    with pytest.raises(UnsupportedError, match="new_and_strange"):
        lm.merge_tensors(seeded().state_dict(), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_of_another_size_is_told(name: str, tmp_path: Path) -> None:
    trained(seeded(), CONFIGS[name]()).save_pretrained(tmp_path)
    other = seeded(sizes=(3, 5)).state_dict()
    if "glora" in name:
        other["c_proj.bias"] = torch.zeros(5)
    with pytest.raises(MismatchError) as error:
        lm.merge_tensors(other, tmp_path)
    assert error.value.code == "adapter.shape"


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
