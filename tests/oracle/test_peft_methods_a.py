"""PEFT methods of linear algebra on one weight, merged and held against PEFT's own unmerged forward pass."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loramerge as lm
from loramerge.errors import LoramergeError, MismatchError, UnsupportedError

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

LINEARS = ("linear", "square", "down")


class Net(nn.Module):
    """One module of every sort, side by side; `square` and `c_attn` do not tell their orientation by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.square = nn.Linear(12, 12)
        self.down = nn.Linear(18, 6, bias=False)
        self.c_proj = Conv1D(8, 12)
        self.c_attn = Conv1D(12, 12)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.conv1d = nn.Conv1d(16, 18, 3)
        self.conv3d = nn.Conv3d(4, 6, 2)
        self.embed = nn.Embedding(10, 12)
        self.norm = nn.LayerNorm(12)
        with torch.no_grad():
            self.norm.weight.copy_(torch.randn(12))
            self.norm.bias.copy_(torch.randn(12))
            for name in ("c_proj", "c_attn"):
                getattr(self, name).bias.copy_(torch.randn_like(getattr(self, name).bias))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


def inputs(net: Net, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"conv": (2, 4, 9, 9), "pointwise": (2, 4, 5, 5), "conv1d": (2, 16, 9), "conv3d": (2, 4, 4, 4, 4)}
    made = {}
    for name in names:
        module = getattr(net, name)
        if name == "embed":
            made[name] = torch.arange(10)
        elif name in sizes:
            made[name] = torch.randn(sizes[name], dtype=dtype)
        else:
            width = module.weight.shape[0 if isinstance(module, Conv1D) else -1]
            made[name] = torch.randn(5, width, dtype=dtype)
    return made


@dataclass(frozen=True)
class Case:
    """One method with its options on some modules.

    `noise`: how far parameters are moved from their start. `rounds`: PEFT itself takes a number in float32 on the way.
    """

    name: str
    config: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = LINEARS
    noise: float = 0.3
    dtype: torch.dtype = torch.float64
    rounds: bool = False

    @property
    def limit(self) -> float:
        if self.dtype == torch.float32:
            return 2e-6
        return 1e-7 if self.rounds else 1e-12


OFT = ("linear", "square", "down", "pointwise", "embed")
BOFT = ("linear", "square", "down", "conv", "pointwise")
IA3 = ("linear", "square", "down", "c_proj", "c_attn", "conv", "pointwise", "conv3d")
HIRA = ("linear", "square", "down", "c_proj", "c_attn", "conv", "pointwise", "conv1d", "conv3d", "embed")
LYCORIS = ("linear", "square", "down", "conv", "pointwise", "conv1d")
BD = BdLoraConfig(target_modules_bd_a=["linear"], target_modules_bd_b=["square"], nblocks=2, match_strict=False)
GPT2 = {"model_type": "gpt2"}  # its c_attn and c_proj are Conv1D, which PEFT tells by the class of the module
SINGLE = torch.float32  # what builds its own float32 tensors in the forward pass

CASES = [
    Case("adalora", peft.AdaLoraConfig, {"init_r": 4, "total_step": 9}, (*LINEARS, "c_proj", "c_attn", "conv")),
    Case("adalora alpha", peft.AdaLoraConfig, {"init_r": 3, "total_step": 9, "lora_alpha": 16, "r": 5}),
    Case("adalora alpha 0", peft.AdaLoraConfig, {"init_r": 3, "total_step": 9, "lora_alpha": 0}),
    Case("adalora rank 1", peft.AdaLoraConfig, {"init_r": 1, "total_step": 9}),
    Case("oft", peft.OFTConfig, {"oft_block_size": 3}, ("linear", "square", "down", "embed")),
    Case("oft size 2", peft.OFTConfig, {"oft_block_size": 2}, OFT),
    Case("oft by number", peft.OFTConfig, {"r": 2, "oft_block_size": 0}, OFT),
    Case("oft whole", peft.OFTConfig, {"r": 1, "oft_block_size": 0}, OFT),
    Case("oft shared", peft.OFTConfig, {"oft_block_size": 2, "block_share": True}, OFT),
    Case("oft exact", peft.OFTConfig, {"oft_block_size": 2, "use_cayley_neumann": False}, OFT, 0.5, SINGLE),
    Case("oft coft", peft.OFTConfig, {"oft_block_size": 2, "coft": True, "eps": 0.5}, OFT, 0.5, rounds=True),
    Case("oft coft loose", peft.OFTConfig, {"oft_block_size": 2, "coft": True, "eps": 50.0}, OFT, 0.5),
    Case(
        "oft coft shared",
        peft.OFTConfig,
        {"oft_block_size": 2, "coft": True, "eps": 0.1, "block_share": True, "use_cayley_neumann": False},
        OFT,
        0.5,
        SINGLE,
    ),
    *[
        Case(f"oft {n} terms", peft.OFTConfig, {"oft_block_size": 3, "num_cayley_neumann_terms": n}, LINEARS)
        for n in (2, 3, 4, 5, 6, 9)
    ],
    Case("boft", peft.BOFTConfig, {"boft_block_size": 2}, BOFT, 0.5, SINGLE),
    Case("boft size 3", peft.BOFTConfig, {"boft_block_size": 3}, (*LINEARS, "conv"), 0.5, SINGLE),
    Case("boft by number", peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 2}, BOFT, 0.5, SINGLE),
    Case("hra", peft.HRAConfig, {"r": 4}, (*LINEARS, "conv", "pointwise")),
    Case("hra odd", peft.HRAConfig, {"r": 3}, (*LINEARS, "conv", "pointwise")),
    Case("hra rank 1", peft.HRAConfig, {"r": 1}, (*LINEARS, "conv", "pointwise")),
    Case("hra gram-schmidt", peft.HRAConfig, {"r": 3, "apply_GS": True}, (*LINEARS, "conv", "pointwise")),
    Case("ia3", peft.IA3Config, {"feedforward_modules": []}, IA3),
    Case("ia3 feedforward", peft.IA3Config, {"feedforward_modules": list(IA3)}, IA3),
    Case("ia3 mixed", peft.IA3Config, {"feedforward_modules": ["square", "pointwise", "conv3d"]}, IA3),
    Case("ia3 pattern", peft.IA3Config, {"feedforward_modules": ".*(point|c_at|squ).*"}, IA3),
    *[
        Case(f"{variant} in {g}", peft.RoadConfig, {"variant": variant, "group_size": g}, modules)
        for variant in ("road_1", "road_2", "road_4")
        for g, modules in ((2, LINEARS), (4, ("linear", "square")))
    ],
    Case("delora", peft.DeloraConfig, {"r": 4}),
    Case("delora rank 1", peft.DeloraConfig, {"r": 1, "delora_lambda": 3}),
    Case("delora patterns", peft.DeloraConfig, {"r": 4, "rank_pattern": {"square": 2}, "lambda_pattern": {"down": 4}}),
    Case("hira", peft.HiraConfig, {"r": 3}, HIRA),
    Case("hira rank 1", peft.HiraConfig, {"r": 1, "init_weights": "gaussian"}, LINEARS),
    Case("hira patterns", peft.HiraConfig, {"r": 4, "rank_pattern": {"square": 2}}),
    Case("miss", peft.MissConfig, {"r": 4}),
    Case("miss odd", peft.MissConfig, {"r": 5}),
    Case("miss rank 1", peft.MissConfig, {"r": 1}),
    Case("miss mini", peft.MissConfig, {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    Case("miss mini whole", peft.MissConfig, {"r": 4, "mini_r": 6, "init_weights": "mini"}, ("square", "down")),
    Case("miss bat", peft.MissConfig, {"r": 2, "init_weights": "bat"}),
    Case("miss bat of 6", peft.MissConfig, {"r": 6, "init_weights": "bat"}, ("square", "down")),
    Case("psoft", peft.PsoftConfig, {"r": 4}, LINEARS, 0.3, SINGLE),
    Case("psoft rank 1", peft.PsoftConfig, {"r": 1, "psoft_alpha": 3}, LINEARS, 0.3, SINGLE),
    Case("psoft full rank", peft.PsoftConfig, {"r": 6}, LINEARS, 0.3, SINGLE),
    Case("psoft even", peft.PsoftConfig, {"r": 3, "ab_svd_init": "pissa_init"}, LINEARS, 0.3, SINGLE),
    Case("psoft series", peft.PsoftConfig, {"r": 4, "use_cayley_neumann": True}, LINEARS, 0.3, SINGLE),
    Case(
        "psoft limited series",
        peft.PsoftConfig,
        {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7, "cayley_neumann_eps": 0.4},
        LINEARS,
        0.3,
        SINGLE,
    ),
    Case(
        "psoft bare",
        peft.PsoftConfig,
        {"r": 4, "psoft_mag_a": False, "psoft_mag_b": False},
        LINEARS,
        0.3,
        SINGLE,
    ),
    Case("psoft free", peft.PsoftConfig, {"r": 4, "psoft_orth": False, "psoft_mag_a": False}, LINEARS, 0.3, SINGLE),
    Case("loha", peft.LoHaConfig, {"r": 3, "alpha": 5}, LYCORIS, rounds=True),
    Case("loha rank 1", peft.LoHaConfig, {"r": 1, "alpha": 5}, LYCORIS, rounds=True),
    Case("loha effective", peft.LoHaConfig, {"r": 3, "alpha": 5, "use_effective_conv2d": True}, LYCORIS, rounds=True),
    Case(
        "loha patterns",
        peft.LoHaConfig,
        {"r": 3, "alpha": 5, "rank_pattern": {"square": 2}, "alpha_pattern": {"down": 7}},
        LYCORIS,
        rounds=True,
    ),
    Case("lokr", peft.LoKrConfig, {"r": 2, "alpha": 5}, LYCORIS),
    Case("lokr rank 1", peft.LoKrConfig, {"r": 1, "alpha": 5}, LYCORIS),
    Case("lokr whole", peft.LoKrConfig, {"r": 8, "alpha": 5}, LYCORIS),
    Case("lokr whole patterns", peft.LoKrConfig, {"r": 8, "alpha": 5, "rank_pattern": {"square": 16}}, LYCORIS),
    Case("lokr factor", peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_factor": 2}, LYCORIS),
    Case("lokr both", peft.LoKrConfig, {"r": 1, "alpha": 5, "decompose_both": True}, LYCORIS),
    # torch.kron cannot do the 1-D convolution of rank 1 that PEFT gives it
    Case("lokr effective", peft.LoKrConfig, {"r": 2, "alpha": 5, "use_effective_conv2d": True}, LYCORIS),
    Case("lokr effective rank 1", peft.LoKrConfig, {"r": 1, "alpha": 5, "use_effective_conv2d": True}, LYCORIS[:-1]),
    Case("lokr lycoris", peft.LoKrConfig, {"r": 2, "alpha": 5, "init_weights": "lycoris"}, LYCORIS),
    Case("beft", peft.BeftConfig, {}, ("linear", "square")),
    Case("ln", peft.LNTuningConfig, {}, ("norm",)),
    Case("bd-lora", peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_bdlora": BD}),
    Case("bd-lora rslora", peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_bdlora": BD, "use_rslora": True}),
]


def base(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def trained(case: Case) -> peft.PeftModel:
    """The adapted network in its training state, every parameter of the adapter off its start."""
    config = case.config(target_modules=list(case.modules), **case.options)
    model = peft.get_peft_model(base(case.dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(case.noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
                assert parameter.dtype == case.dtype, name
    return model.eval()


def distances(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def check(model: nn.Module, folder: Path, case: Case) -> None:
    """Merges `folder` into the base and compares outputs with those of the unmerged model."""
    bare = base(case.dtype)
    x = inputs(bare, case.modules, case.dtype)
    with torch.no_grad():
        before, wanted = bare(x), model(x)
        compute = "float64" if case.dtype == torch.float64 else "float32"
        merged = lm.merge_tensors(bare.state_dict(), folder, config=GPT2, compute_dtype=compute)
        assert {name: t.dtype for name, t in merged.items()} == {n: t.dtype for n, t in bare.state_dict().items()}
        bare.load_state_dict(merged)
        got = bare(x)
    assert all(d > 1e-3 for d in distances(before, wanted).values()), "this changes too little to prove anything"
    worst = distances(got, wanted)
    assert max(worst.values()) <= case.limit, worst


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_merged_weights_compute_what_was_trained(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path)
    check(model, tmp_path, case)


@pytest.mark.parametrize("name", ["adalora", "ia3", "ia3 feedforward", "hira"])
def test_shapes_tell_a_transposed_linear_where_the_model_type_is_not_known(name: str, tmp_path: Path) -> None:
    case = replace(next(case for case in CASES if case.name == name), modules=("c_proj",))
    if case.options.get("feedforward_modules"):
        case = replace(case, options={"feedforward_modules": ["c_proj"]})
    model = trained(case)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, str, fan_in_fan_out=False)
    bare = base(case.dtype)
    x = inputs(bare, case.modules, case.dtype)
    bare.load_state_dict(lm.merge_tensors(bare.state_dict(), tmp_path, compute_dtype="float64"))
    assert max(distances(bare(x), model(x)).values()) < case.limit


FIRST = list({case.config: case for case in CASES}.values())
"""One case of each method: its last, which has the most options."""


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_in_float32_as_well(case: Case, tmp_path: Path) -> None:
    single = replace(case, dtype=torch.float32)
    model = trained(single)
    model.save_pretrained(tmp_path)
    check(model, tmp_path, single)


def rewrite(folder: Path, rename: Callable[[str], str], **config: Any) -> None:
    """The same adapter with other names of its keys and other values of its config; None removes one."""
    tensors = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    fields = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_keys_with_the_name_of_the_adapter_are_known(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    dump = {key: t for key, t in model.state_dict().items() if key.replace(".default", "") in saved}
    assert len(dump) == len(saved) and any(".default" in key for key in dump)
    save_file({k: t.contiguous() for k, t in dump.items()}, tmp_path / "adapter_model.safetensors")
    check(model, tmp_path, case)


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
@pytest.mark.parametrize("weight", [0.5, -1.5, 0.0])
def test_a_weight_goes_a_part_of_the_way(case: Case, weight: float, tmp_path: Path) -> None:
    model = trained(case)
    model.save_pretrained(tmp_path)
    before = base(case.dtype).state_dict()
    options: dict[str, Any] = {"config": GPT2, "compute_dtype": "float64"}
    full = lm.merge_tensors(before, tmp_path, **options)
    part = lm.merge_tensors(before, {tmp_path: weight}, **options)
    for name, W in before.items():
        torch.testing.assert_close(part[name], W + weight * (full[name] - W), rtol=1e-5, atol=1e-5)
        if weight == 0:
            assert torch.equal(part[name], W)


BIASED = [
    ("oft", "all"),
    ("oft", "oft_only"),
    ("boft", "boft_only"),
    ("hra", "hra_only"),
    ("delora", "delora_only"),
    ("miss", "MiSS_only"),
]


@pytest.mark.parametrize(("name", "bias"), BIASED)
def test_trained_biases_of_the_base_replace_it(name: str, bias: str, tmp_path: Path) -> None:
    plain = next(case for case in CASES if case.name == name)
    case = replace(plain, options={**plain.options, "bias": bias}, modules=("linear", "square"))
    model = trained(case)
    model.save_pretrained(tmp_path)
    assert any(key.endswith(".bias") for key in load_file(tmp_path / "adapter_model.safetensors"))
    check(model, tmp_path, case)


def pruned(left: Mapping[str, list[bool]], folder: Path) -> tuple[Case, nn.Module]:
    """An AdaLoRA model at the end of its training: components masked in it, and left out of the file."""
    case = Case("adalora", peft.AdaLoraConfig, {"init_r": 4, "total_step": 9, "lora_alpha": 7})
    model = trained(case)
    config = model.peft_config["default"]
    config.rank_pattern = {f"{name}.lora_E.default": flags for name, flags in left.items()}
    with torch.no_grad():
        for name, flags in left.items():
            model.get_submodule(f"base_model.model.{name}").lora_E["default"][[not f for f in flags]] = 0
    model.save_pretrained(folder)
    return case, model


def test_pruned_components_are_left_out_and_the_first_rank_divides(tmp_path: Path) -> None:
    left = {"linear": [True, False, True, True], "square": [False] * 3 + [True], "down": [True] * 4}
    case, model = pruned(left, tmp_path)
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.linear.lora_A"] == (3, 12) and shapes["base_model.model.square.lora_E"] == (1, 1)
    check(model, tmp_path, case)


def test_a_module_pruned_to_nothing_changes_nothing(tmp_path: Path) -> None:
    pruned({"linear": [True] * 4, "square": [False] * 4, "down": [True] * 4}, tmp_path)
    before = base(torch.float64).state_dict()
    merged = lm.merge_tensors(before, tmp_path, compute_dtype="float64")
    assert torch.equal(merged["square.weight"], before["square.weight"])
    assert not torch.equal(merged["linear.weight"], before["linear.weight"])


def test_a_rank_that_the_rank_pattern_does_not_say_is_told(tmp_path: Path) -> None:
    pruned({"linear": [True, False, True, True], "square": [True] * 4, "down": [True] * 4}, tmp_path)
    rewrite(tmp_path, str, rank_pattern={"linear.lora_E": [True] * 4})
    with pytest.raises(MismatchError, match="4 components"):
        lm.merge_tensors(base(torch.float64).state_dict(), tmp_path)


class BlockDiagonalExtension:
    """What PEFT's CUDA extension computes: the block diagonal of each level."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*level) for level in blocks])]


@pytest.mark.parametrize(("levels", "size"), [(2, 2), (2, 4), (3, 2)])
def test_butterflies_of_several_levels(levels: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: BlockDiagonalExtension)
    options = {"boft_block_size": size, "boft_n_butterfly_factor": levels}
    case = Case("boft", peft.BOFTConfig, options, ("embed_out", "wide"), 0.5, SINGLE)

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed_out = nn.Linear(16, 10)
            self.wide = nn.Conv2d(4, 6, 2)

    torch.manual_seed(0)
    bare, net = Wide().eval(), Wide().eval()
    net.load_state_dict(bare.state_dict())
    model = peft.get_peft_model(net, case.config(target_modules=list(case.modules), **options)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.5 * torch.randn_like(parameter))
    assert model.base_model.model.wide.boft_R["default"].shape[0] == levels
    model.save_pretrained(tmp_path)
    x = {"embed_out": torch.randn(5, 16), "wide": torch.randn(2, 4, 5, 5)}
    with torch.no_grad():
        before, wanted = bare(x), model(x)
        bare.load_state_dict(lm.merge_tensors(bare.state_dict(), tmp_path))
        assert max(distances(bare(x), wanted).values()) < 2e-6
    assert min(distances(before, wanted).values()) > 1e-3


def test_a_grouped_convolution_scaled_on_its_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare, net = (nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4)) for _ in range(2))
    net.load_state_dict(bare.state_dict())
    config = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["0", "1"])
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        x = torch.randn(2, 6, 9, 9)
        wanted = model.eval()(x)
        bare.load_state_dict(lm.merge_tensors(bare.state_dict(), tmp_path))
        assert float((bare(x) - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("name", ["oft", "hira"])
def test_an_embedding_that_is_saved_with_its_adapter(name: str, tmp_path: Path) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(10, 12)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed_tokens

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, x: Tensor) -> Tensor:
            return self.embed_tokens(x)

    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    bare, net = Embedded().double(), Embedded().double()
    net.load_state_dict(bare.state_dict())
    config = case.config(target_modules=["embed_tokens"], **case.options)
    model = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
    x = torch.arange(10)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        assert any(".base_layer." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        wanted = model(x)
        assert float((bare(x) - wanted).norm() / wanted.norm()) > 1e-3
        bare.load_state_dict(lm.merge_tensors(bare.state_dict(), tmp_path, compute_dtype="float64"))
        assert float((bare(x) - wanted).norm() / wanted.norm()) < 1e-12


# ---------------------------------------------------------------------- other releases, other trainers
# The formulas below were held against peft 0.14.0, 0.15.2, 0.16.0 and 0.17.1 themselves when they were written.


def series(upper: Tensor, b: int, terms: int) -> Tensor:
    """R of one block as peft 0.16 and 0.17 sum it: every power twice."""
    Q = torch.zeros(b, b, dtype=upper.dtype)
    rows, cols = torch.triu_indices(b, b, 1)
    Q[rows, cols] = upper
    Q = Q - Q.T
    return torch.eye(b, dtype=Q.dtype) + sum(2 * torch.linalg.matrix_power(Q, k) for k in range(1, terms))


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 8])
def test_the_series_of_oft_ended_otherwise_before_0_18(terms: int, tmp_path: Path) -> None:
    options = {"oft_block_size": 3, "num_cayley_neumann_terms": terms}
    trained(Case("oft", peft.OFTConfig, options)).save_pretrained(tmp_path)
    before = base(torch.float64).state_dict()
    new = lm.merge_tensors(before, tmp_path, compute_dtype="float64")
    rewrite(tmp_path, str, peft_version=None)
    old = lm.merge_tensors(before, tmp_path, compute_dtype="float64")
    factors = load_file(tmp_path / "adapter_model.safetensors")
    for name in LINEARS:
        blocks = [series(v, 3, terms) for v in factors[f"base_model.model.{name}.oft_R.weight"]]
        wanted = before[f"{name}.weight"] @ torch.block_diag(*blocks).T
        torch.testing.assert_close(old[f"{name}.weight"], wanted, rtol=1e-10, atol=1e-12)
        assert torch.equal(old[f"{name}.weight"], new[f"{name}.weight"]) == (terms < 3)


def first_oft(W: Tensor, P: Tensor, s: Tensor, limit: float | None) -> Tensor:
    """W (out, cols) as OFT of peft 0.14 and 0.15 changes it."""
    if limit is not None:
        P = torch.stack([p if p.norm() <= limit else p * limit / p.norm() for p in P])
    K = (P - P.mT) / 2
    eye = torch.eye(P.shape[-1], dtype=W.dtype)
    R = (eye - K) @ torch.linalg.inv(eye + K)
    blocks = list(R) * (W.shape[1] // P.shape[-1] // len(R))
    return W @ torch.block_diag(*blocks).T * s


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("coft", [False, True])
def test_oft_of_the_first_releases(shared: bool, coft: bool, tmp_path: Path) -> None:
    before = base(torch.float64).state_dict()
    torch.manual_seed(5)
    tensors, wanted, b, eps = {}, {}, 3, 0.02
    for name in ("linear", "square", "conv"):
        W = before[f"{name}.weight"].flatten(1)
        n = W.shape[1] // b
        P = torch.randn(1 if shared else n, b, b, dtype=torch.float64)
        s = 1 + 0.3 * torch.randn(len(W), 1, dtype=torch.float64)
        tensors |= {f"base_model.model.{name}.oft_r": P, f"base_model.model.{name}.oft_s": s}
        limit = eps * (-(-len(W) // n)) ** 2 / len(P) ** 0.5 if coft else None
        wanted[name] = first_oft(W, P, s, limit)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": b, "coft": coft, "eps": eps, "block_share": shared}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    merged = lm.merge_tensors(before, tmp_path, compute_dtype="float64")
    for name, W in wanted.items():
        torch.testing.assert_close(merged[f"{name}.weight"].flatten(1), W, rtol=1e-10, atol=1e-12)
        assert torch.equal(merged[f"{name}.bias"], before[f"{name}.bias"])
    del config["oft_block_size"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="older parametrisation"):
        lm.merge_tensors(before, tmp_path)


@pytest.mark.parametrize("name", ["miss", "miss odd", "miss bat"])
def test_miss_under_its_first_name(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    model = trained(case)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda k: k.replace("miss_", "bone_"), peft_type="BONE", miss_dropout=None, mini_r=None)
    check(model, tmp_path, case)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_oft_of_onetrainer(scaled: bool, shared: bool, tmp_path: Path) -> None:
    """OneTrainer 23df383, modules/module/LoRAModule.py OFTModule: x R on linears, W R on convolutions."""
    before = base(torch.float64).state_dict()
    torch.manual_seed(5)
    tensors, wanted, b = {}, {}, 4
    for name in ("linear", "square", "conv"):
        W = before[f"{name}.weight"].flatten(1)
        n = W.shape[1] // b
        upper = 0.3 * torch.randn(1 if shared else n, b * (b - 1) // 2, dtype=torch.float64)
        tensors[f"lora_unet_{name}.oft_R.weight"] = upper
        if scaled:
            tensors[f"lora_unet_{name}.oft_R.scaled_oft"] = torch.tensor(True)
        blocks = []
        for v in upper:
            v = v / (2 * (b - 1) ** 0.5) if scaled else v
            whole, fourth = series(v, b, 4), series(v, b, 5) - series(v, b, 4)
            blocks.append(whole + fourth / 2)
        R = torch.block_diag(*blocks * (n if shared else 1))
        wanted[name] = W @ (R if name == "conv" else R.T)
    save_file(tensors, tmp_path / "lora.safetensors", {"ot_branch": "master"})
    merged = lm.merge_tensors(before, tmp_path / "lora.safetensors", compute_dtype="float64")
    for name, W in wanted.items():
        torch.testing.assert_close(merged[f"{name}.weight"].flatten(1), W, rtol=1e-10, atol=1e-12)
        assert float((W - before[f"{name}.weight"].flatten(1)).norm() / W.norm()) > 1e-2


# ----------------------------------------------------------------------------- what is refused or told


def test_rotated_patches_of_a_convolution_are_no_weight(tmp_path: Path) -> None:
    case = Case("oft", peft.OFTConfig, {"oft_block_size": 2}, ("conv",), 0.0)
    model = trained(case)  # no rotation yet, and the model is another already
    bare = base(case.dtype)
    x = inputs(bare, case.modules, case.dtype)
    with torch.no_grad():
        assert distances(model(x), bare(x))["conv"] > 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="overlap"):
        lm.merge_tensors(bare.state_dict(), tmp_path)


def test_a_random_projection_is_refused(tmp_path: Path) -> None:
    trained(Case("psoft", peft.PsoftConfig, {"r": 4, "psoft_svd": "lowrank"}, dtype=SINGLE)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="random projection"):
        lm.merge_tensors(base(SINGLE).state_dict(), tmp_path)


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_a_missing_factor_is_told(case: Case, tmp_path: Path) -> None:
    if case.name in ("lokr lycoris", "psoft free", "ln", "beft"):
        pytest.skip("its factors may be there or not")
    trained(case).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    module = f"base_model.model.{case.modules[0]}."
    own = [key for key in saved if key.startswith(module)]
    others = {key: t for key, t in saved.items() if key not in own}
    for key in own if len(own) > 1 else []:
        save_file(others | {k: saved[k] for k in own if k != key}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LoramergeError):
            lm.merge_tensors(base(case.dtype).state_dict(), tmp_path, config=GPT2)


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_factors_of_another_base_are_told(case: Case, tmp_path: Path) -> None:
    if case.config is peft.PsoftConfig:
        pytest.skip("its factors have the rank's size alone")
    trained(case).save_pretrained(tmp_path)
    before = base(case.dtype).state_dict()
    name = f"{case.modules[0]}.{'bias' if case.name == 'beft' else 'weight'}"
    before[name] = torch.randn([n + 7 for n in before[name].shape], dtype=case.dtype)
    with pytest.raises(MismatchError):
        lm.merge_tensors(before, tmp_path, config=GPT2)


@pytest.mark.parametrize("case", FIRST, ids=lambda c: c.name)
def test_a_field_that_is_not_known_is_refused(case: Case, tmp_path: Path) -> None:
    trained(case).save_pretrained(tmp_path)
    rewrite(tmp_path, str, twist=0.5)
    with pytest.raises(UnsupportedError, match="twist"):
        lm.merge_tensors(base(case.dtype).state_dict(), tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("miss", {"init_weights": "bat"}, "initialisation"),
        ("miss bat", {"init_weights": True}, "initialisation"),
        ("road_2 in 2", {"variant": "road_1"}, "variant"),
        ("road_2 in 2", {"group_size": 5}, "groups of 5"),
        ("oft", {"num_cayley_neumann_terms": 0}, "terms"),
        ("psoft", {"r": 5}, "rank"),
        ("psoft", {"ab_svd_init": "other"}, "split"),
        ("adalora", {"init_r": 2}, "rank"),
        ("ia3 pattern", {"feedforward_modules": "("}, "pattern"),
        ("bd-lora", {"use_bdlora": {"target_modules_bd_a": ["linear"], "nblocks": 3}}, "blocks"),
        ("bd-lora", {"use_bdlora": {f"target_modules_bd_{s}": ["linear"] for s in "ab"} | {"nblocks": 2}}, "both"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_told(
    name: str, config: dict[str, Any], word: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == name)
    trained(case).save_pretrained(tmp_path)
    rewrite(tmp_path, str, **config)
    with pytest.raises(MismatchError, match=word):
        lm.merge_tensors(base(case.dtype).state_dict(), tmp_path, config=GPT2)


def notes(case: Case, folder: Path, **config: Any) -> str:
    trained(case).save_pretrained(folder)
    rewrite(folder, str, **config)
    return " ".join(lm.open_adapter(folder).notes)


def test_what_a_file_leaves_open_is_noted(tmp_path: Path) -> None:
    psoft, lokr = (next(case for case in CASES if case.name == name) for name in ("psoft", "lokr"))
    assert "signs" in notes(psoft, tmp_path)
    assert "0.14" in notes(lokr, tmp_path, peft_version=None)
    assert not notes(lokr, tmp_path)
    assert not notes(lokr, tmp_path, peft_version=None, alpha=2)
