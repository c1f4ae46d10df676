"""Adapters converted from one dialect to another change a base as they did before, and load where they belong."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import loramerge as lm
from loramerge.errors import MismatchError, UnsupportedError, UsageError

CLOSE = 1e-6


class Net(nn.Module):
    """Linears, a square one, convolutions; under names that a UNet may have."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleDict(
            {
                "wide": nn.Linear(6, 10),
                "square": nn.Linear(6, 6),
                "tall_one": nn.Linear(6, 5),
                "conv": nn.Conv2d(3, 4, 3, padding=1),
                "point": nn.Conv2d(3, 6, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        b = self.down_blocks
        h = b["conv"](x).mean(dim=(1, 2)) + b["point"](x).flatten(1)[:, :6]
        return torch.cat([b["wide"](h), b["square"](h), b["tall_one"](h)], dim=1)


RANKS = {"wide": 3, "square": 2, "tall_one": 1, "conv": 2, "point": 2}
ALPHAS: dict[str, float | None] = {"wide": 1.5, "square": None, "tall_one": 4.0, "conv": 0.0, "point": 3.0}
"""Missing is scale 1 in kohya's files, and so is 0."""


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().float()


def kohya_tensors(dora: bool = False) -> dict[str, Tensor]:
    """A file as sd-scripts writes it, the pointwise convolution with the axes of a linear."""
    generator = torch.Generator().manual_seed(5)
    made: dict[str, Tensor] = {}
    for name, module in Net().down_blocks.items():
        key, weight, r = f"lora_unet_down_blocks_{name}", module.weight, RANKS[name]
        kernel = weight.shape[2:] if name == "conv" else ()
        made[f"{key}.lora_down.weight"] = torch.randn(r, weight.shape[1], *kernel, generator=generator)
        ones = [1] * len(kernel)
        made[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], r, *ones, generator=generator)
        alpha = ALPHAS[name]
        if alpha is not None:
            made[f"{key}.alpha"] = torch.tensor(alpha)
        if dora and name in ("wide", "square", "conv"):
            shape = (weight.shape[0], *[1] * (weight.dim() - 1))
            made[f"{key}.dora_scale"] = torch.rand(shape, generator=generator) + 0.5
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(net().state_dict(), path)
    return path


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    path = tmp_path / "kohya.safetensors"
    save_file(kohya_tensors(), path)
    return path


def changes(adapter: Path, **options: Any) -> dict[str, Tensor]:
    """What an adapter does to the net, in float64."""
    state = {name: tensor.double() for name, tensor in net().state_dict().items()}
    merged = lm.merge_tensors(state, adapter, compute_dtype="float64", allow_pickle=True, **options)
    return {name: merged[name] - state[name] for name in state}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], limit: float = CLOSE) -> None:
    assert a.keys() == b.keys() and any(bool(t.any()) for t in a.values())
    for name in a:
        assert float((a[name] - b[name]).norm()) <= limit * max(float(a[name].norm()), 1e-12), name


OUTPUTS = [
    ("kohya", "out.safetensors"),
    ("comfyui", "out.safetensors"),
    ("diffusers", "out.safetensors"),
    ("diffusers", "out"),
    ("peft", "out"),
]


@pytest.mark.parametrize(("target", "out"), OUTPUTS)
def test_there_and_back_changes_nothing(base: Path, kohya: Path, tmp_path: Path, target: str, out: str) -> None:
    wanted = changes(kohya)
    for name in RANKS:
        assert wanted[f"down_blocks.{name}.weight"].any()
    report = lm.convert(kohya, tmp_path / "peft", "peft", base=base)
    assert (report["modules"], report["exact"], report["approximated"]) == (5, 5, 0)
    same(changes(tmp_path / "peft"), wanted)
    lm.convert(tmp_path / "peft", tmp_path / f"there-{out}", target)
    same(changes(tmp_path / f"there-{out}"), wanted)
    lm.convert(tmp_path / f"there-{out}", tmp_path / "back", "peft", base=base)
    same(changes(tmp_path / "back"), wanted)


def test_the_scale_is_that_of_each_module(base: Path, kohya: Path, tmp_path: Path) -> None:
    lm.convert(kohya, tmp_path / "peft", "peft", base=base)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(f"down_blocks.{name}" for name in RANKS)
    tensors = load_file(kohya)
    for name, module in changes(tmp_path / "peft").items():
        stem = name.removeprefix("down_blocks.").removesuffix(".weight")
        if stem not in RANKS:
            continue
        down = tensors[f"lora_unet_down_blocks_{stem}.lora_down.weight"].double().flatten(1)
        up = tensors[f"lora_unet_down_blocks_{stem}.lora_up.weight"].double().flatten(1)
        scale = (ALPHAS[stem] or RANKS[stem]) / RANKS[stem]
        same({name: module.flatten(1)}, {name: scale * up @ down})


def test_peft_computes_the_same(base: Path, kohya: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm.convert(kohya, tmp_path / "peft", "peft", base=base)
    merged = net()
    merged.load_state_dict(lm.merge_tensors(net().state_dict(), kohya))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing keys are a warning there
        model = peft.PeftModel.from_pretrained(net(), str(tmp_path / "peft"))
    x = torch.randn(4, 3, 1, 1)
    assert (merged(x) - net()(x)).abs().max() > 0.1
    torch.testing.assert_close(model(x), merged(x), rtol=1e-5, atol=1e-5)


def test_magnitudes_move_between_their_forms(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    kohya = tmp_path / "dora.safetensors"
    tensors = kohya_tensors(dora=True)
    tensors = {k: t for k, t in tensors.items() if any(f"blocks_{n}." in k for n in ("wide", "square", "conv"))}
    save_file(tensors, kohya)
    wanted = changes(kohya)
    lm.convert(kohya, tmp_path / "peft", "peft", base=base)
    same(changes(tmp_path / "peft"), wanted, 3e-6)  # kohya's form has an epsilon
    model = peft.PeftModel.from_pretrained(net(), str(tmp_path / "peft")).eval()
    merged = net()
    merged.load_state_dict(lm.merge_tensors(net().state_dict(), kohya))
    x = torch.randn(4, 3, 1, 1)
    torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-4)
    lm.convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    assert load_file(tmp_path / "back.safetensors")["lora_unet_down_blocks_conv.dora_scale"].shape == (4, 1, 1, 1)
    same(changes(tmp_path / "back.safetensors"), wanted, 3e-6)


def test_a_server_without_dora_gets_the_nearest_pair(base: Path, tmp_path: Path) -> None:
    kohya = tmp_path / "dora.safetensors"
    save_file({k: t for k, t in kohya_tensors(dora=True).items() if "wide" in k or "square" in k}, kohya)
    with pytest.raises(UnsupportedError, match="vLLM serves no DoRA") as caught:
        lm.convert(kohya, tmp_path / "out", "vllm", base=base)
    assert "--rank" in caught.value.fix
    report = lm.convert(kohya, tmp_path / "out", "vllm", base=base, rank=2)
    wanted, got = changes(kohya), changes(tmp_path / "out")
    whole = sum(float(t.norm()) ** 2 for t in wanted.values())
    rest = sum(float((wanted[n] - got[n]).norm()) ** 2 for n in wanted)
    assert report["approximated"] == 2 and 0.01 < report["error"] < 1
    assert report["error"] == pytest.approx((rest / whole) ** 0.5, rel=1e-3)
    for name in ("wide", "square"):  # the best there is: the tail of the singular values
        sigma = torch.linalg.svdvals(wanted[f"down_blocks.{name}.weight"])
        row = next(r for r in report["rows"] if name in r["module"])
        assert row["error"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-3)
    full = lm.convert(kohya, tmp_path / "full", "vllm", base=base, rank=6)
    assert full["error"] is None or full["error"] < 1e-6
    same(changes(tmp_path / "full"), wanted, 2e-6)


def test_vllm_gets_one_allowed_rank_and_no_scale(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, r in (("wide", 3), ("square", 2), ("tall_one", 1)):
        weight = Net().down_blocks[name].weight
        head = f"base_model.model.down_blocks.{name}"
        tensors[f"{head}.lora_A.weight"] = torch.randn(r, weight.shape[1], generator=generator)
        tensors[f"{head}.lora_B.weight"] = torch.randn(weight.shape[0], r, generator=generator)
    save_file(tensors, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}
    config |= {"rank_pattern": {"square": 2, "tall_one": 1}, "alpha_pattern": {"square": 0}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    lm.convert(source, tmp_path / "out", "vllm")
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"], made["use_rslora"]) == (8, 8, False)
    assert made["rank_pattern"] == made["alpha_pattern"] == {}
    assert made["target_modules"] == ["square", "tall_one", "wide"]
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "lora_A" in name else 1] == 8
    same(changes(tmp_path / "out"), changes(source))


def test_loralib_is_given_the_alpha(base: Path, tmp_path: Path) -> None:
    kohya = tmp_path / "linear.safetensors"
    save_file({k: t for k, t in kohya_tensors().items() if "conv" not in k and "point" not in k}, kohya)
    report = lm.convert(kohya, tmp_path / "out.bin", "loralib", base=base)
    assert f"--alpha {report['alpha']:g}" in report["notes"][-1]
    same(changes(tmp_path / "out.bin", alpha=report["alpha"]), changes(kohya))
    with pytest.raises(UnsupportedError, match="another form for convolutions"):
        conv = tmp_path / "conv.safetensors"
        save_file({k: t for k, t in kohya_tensors().items() if "conv" in k}, conv)
        lm.convert(conv, tmp_path / "conv.bin", "loralib", base=base)


def independent_hashes(path: Path) -> tuple[str, str]:
    """As sd-scripts takes them: of a serialisation with the `ss_` entries alone, made by the safetensors library."""
    with safe_open(path, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k.startswith("ss_")}
    data = save(load_file(path), metadata)
    start = int.from_bytes(data[:8], "little") + 8
    return hashlib.sha256(data[start:]).hexdigest(), hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("width", [6, 300_000])
def test_kohya_hashes_are_those_of_sd_scripts(tmp_path: Path, width: int) -> None:
    source = tmp_path / "source.safetensors"
    head = "lora_unet_down_blocks_0"
    down, up = torch.randn(2, width), torch.randn(3, 2).half()
    save_file({f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}, source, {"sshs_model_hash": "stale"})
    out = tmp_path / "out.safetensors"
    lm.convert(source, out, "kohya")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == independent_hashes(out)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2")
    if width > 6:
        assert metadata["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]


def loha_tensors(name: str, r: int) -> dict[str, Tensor]:
    weight = Net().down_blocks[name].weight
    key, (out, width) = f"lora_unet_down_blocks_{name}", (weight.shape[0], weight[0].numel())
    return {f"{key}.hada_{w}_a": torch.randn(out, r) for w in ("w1", "w2")} | {
        f"{key}.hada_{w}_b": torch.randn(r, width) for w in ("w1", "w2")
    }


def test_hadamard_products_become_pairs_of_the_square_of_their_rank(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = tmp_path / "loha.safetensors"
    save_file(loha_tensors("wide", 2) | loha_tensors("conv", 2), source)
    with pytest.raises(UnsupportedError) as caught:
        lm.convert(source, tmp_path / "out.safetensors", "diffusers", base=base)
    assert "rank 4 is exact" in caught.value.fix
    report = lm.convert(source, tmp_path / "out.safetensors", "diffusers", base=base, rank=4)
    assert report["approximated"] == 0
    assert load_file(tmp_path / "out.safetensors")["unet.down_blocks.conv.lora_A.weight"].shape == (4, 3, 3, 3)
    same(changes(tmp_path / "out.safetensors"), changes(source), 2e-6)
    worse = lm.convert(source, tmp_path / "worse.safetensors", "diffusers", base=base, rank=2)
    assert worse["approximated"] == 2 and worse["error"] > 0.01
    lm.convert(source, tmp_path / "kept.safetensors", "comfyui", base=base)  # it has the kind itself
    same(changes(tmp_path / "kept.safetensors"), changes(source))


def test_kronecker_products_become_pairs(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    source, key = tmp_path / "lokr.safetensors", "lora_unet_down_blocks_wide"
    factors = {"w1": torch.randn(2, 2), "w2_a": torch.randn(5, 2), "w2_b": torch.randn(2, 3)}
    save_file({f"{key}.lokr_{n}": t for n, t in factors.items()} | {f"{key}.alpha": torch.tensor(1.0)}, source)
    lm.convert(source, tmp_path / "out.safetensors", "diffusers", base=base, rank=4)
    same(changes(tmp_path / "out.safetensors"), changes(source), 2e-6)
    assert load_file(tmp_path / "out.safetensors")["unet.down_blocks.wide.lora_A.weight"].shape == (4, 6)


def test_a_tucker_product_is_multiplied_out(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    source, key = tmp_path / "tucker.safetensors", "lora_unet_down_blocks_conv"
    factors = {"down": torch.randn(2, 3, 1, 1), "up": torch.randn(4, 2, 1, 1), "mid": torch.randn(2, 2, 3, 3)}
    save_file({f"{key}.lora_{n}.weight": t for n, t in factors.items()} | {f"{key}.alpha": torch.tensor(1.0)}, source)
    lm.convert(source, tmp_path / "out", "peft", base=base)
    same(changes(tmp_path / "out"), changes(source), 2e-6)


def test_flattened_names_need_a_base(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        lm.convert(kohya, tmp_path / "out", "peft")
    assert caught.value.code == "convert.needs-base" and "--base" in caught.value.fix
    lm.convert(kohya, tmp_path / "same.safetensors", "kohya")  # the names stay flattened
    same(changes(tmp_path / "same.safetensors"), changes(kohya))


def test_two_components_do_not_fit_one_model(tmp_path: Path) -> None:
    source = tmp_path / "two.safetensors"
    tensors = {}
    for path in ("unet.down_blocks.wide", "text_encoder.text_model.encoder.layers.0.fc1"):
        tensors |= {f"{path}.lora_A.weight": torch.randn(2, 6), f"{path}.lora_B.weight": torch.randn(10, 2)}
    save_file(tensors, source)
    with pytest.raises(UnsupportedError, match="changes 2: clip-l, main"):
        lm.convert(source, tmp_path / "out", "peft")
    lm.convert(source, tmp_path / "out", "peft", include=["unet.*"])
    lm.convert(source, tmp_path / "both.safetensors", "kohya")
    assert {k.partition(".")[0] for k in load_file(tmp_path / "both.safetensors")} == {
        "lora_unet_down_blocks_wide",
        "lora_te_text_model_encoder_layers_0_fc1",
    }
    lm.convert(source, tmp_path / "comfy.safetensors", "comfyui")
    assert {k.rpartition(".lora")[0] for k in load_file(tmp_path / "comfy.safetensors") if "lora" in k} == {
        "diffusion_model.down_blocks.wide",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.fc1",
    }


def test_whole_modules_are_dropped_only_on_request(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    head = "base_model.model"
    tensors = {f"{head}.wide.lora_A.weight": torch.randn(2, 6), f"{head}.wide.lora_B.weight": torch.randn(10, 2)}
    save_file({**tensors, f"{head}.score2.weight": torch.randn(2, 6)}, source / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["wide"], "modules_to_save": ["score2"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    lm.convert(source, tmp_path / "kept", "peft")
    kept = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert kept["modules_to_save"] == ["score2"]
    assert "base_model.model.score2.weight" in load_file(tmp_path / "kept" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="whole modules"):
        lm.convert(source, tmp_path / "out", "vllm")
    report = lm.convert(source, tmp_path / "out", "vllm", drop=True)
    assert report["dropped"] == ["score2.weight"]
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors)


def test_unknown_targets_name_the_nearest(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        lm.convert(kohya, tmp_path / "out", "difusers")
    assert caught.value.fix == "did you mean diffusers?"
    with pytest.raises(UsageError, match=r"one \.safetensors file"):
        lm.convert(kohya, tmp_path / "out", "comfyui")


@pytest.mark.parametrize("kind", ["loha", "loha-core", "lokr", "lokr-whole", "lokr-both"])
def test_products_travel_as_such_between_lycoris_and_peft(base: Path, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    tensors: dict[str, Tensor] = {}
    if kind == "loha":
        tensors = loha_tensors("wide", 2) | loha_tensors("square", 3) | loha_tensors("tall_one", 1)
    elif kind == "loha-core":
        factors = {n: torch.randn(2, 2, 3, 3) for n in ("t1", "t2")}
        factors |= {f"{w}_a": torch.randn(2, 4) for w in ("w1", "w2")}
        factors |= {f"{w}_b": torch.randn(2, 3) for w in ("w1", "w2")}
        tensors = {f"lora_unet_down_blocks_conv.hada_{n}": t for n, t in factors.items()}
    else:
        for name, (o1, o2), (i1, i2) in (("wide", (2, 5), (2, 3)), ("square", (2, 3), (2, 3))):
            key = f"lora_unet_down_blocks_{name}"
            if kind == "lokr-both":
                tensors |= {f"{key}.lokr_w1": torch.randn(o1, i1)}
                tensors |= {f"{key}.lokr_w2_a": torch.randn(o2, 1), f"{key}.lokr_w2_b": torch.randn(1, i2)}
            else:
                whole = kind == "lokr-whole" or name == "square"
                tensors |= {f"{key}.lokr_w1": torch.randn(o1, i1)}
                if whole:
                    tensors[f"{key}.lokr_w2"] = torch.randn(o2, i2)
                else:
                    tensors |= {f"{key}.lokr_w2_a": torch.randn(o2, 2), f"{key}.lokr_w2_b": torch.randn(2, i2)}
    for key in {k.partition(".")[0] for k in tensors}:
        tensors[f"{key}.alpha"] = torch.tensor(1.25)
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    report = lm.convert(source, tmp_path / "peft", "peft", base=base)
    assert report["exact"] == report["modules"] and {row["how"] for row in report["rows"]} == {"exact"}
    wanted = changes(source)
    same(changes(tmp_path / "peft"), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Found missing adapter keys.*dropout")
        model = peft.PeftModel.from_pretrained(net(), str(tmp_path / "peft")).eval()
    merged = net()
    merged.load_state_dict(lm.merge_tensors(net().state_dict(), source))
    x = torch.randn(4, 3, 1, 1)
    assert (merged(x) - net()(x)).abs().max() > 0.05
    torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-4)
    lm.convert(tmp_path / "peft", tmp_path / "back.safetensors", "kohya")
    same(changes(tmp_path / "back.safetensors"), wanted)


def test_uneven_products_have_no_common_config(base: Path, tmp_path: Path) -> None:
    source, key = tmp_path / "lokr.safetensors", "lora_unet_down_blocks_wide"
    tensors = {f"{key}.lokr_w1": torch.randn(1, 3), f"{key}.lokr_w2_a": torch.randn(10, 1)}
    save_file({**tensors, f"{key}.lokr_w2_b": torch.randn(1, 2)}, source)
    with pytest.raises(UnsupportedError, match="no one config gives these"):
        lm.convert(source, tmp_path / "out", "peft", base=base)


def peft_source(folder: Path, extra: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """One square linear of rank 2 as PEFT writes it."""
    folder.mkdir()
    head = "base_model.model.down_blocks.square"
    torch.manual_seed(7)
    tensors = {f"{head}.lora_A.weight": torch.randn(2, 6), f"{head}.lora_B.weight": torch.randn(6, 2)}
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["square"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_alpha_zero_stays_nothing_where_zero_means_one(tmp_path: Path) -> None:
    source = peft_source(tmp_path / "source", lora_alpha=0)
    for target in ("kohya", "comfyui", "diffusers"):
        out = tmp_path / f"{target}.safetensors"
        lm.convert(source, out, target)
        assert not any(bool(t.any()) for t in changes(out).values())


@pytest.mark.parametrize("target", ["kohya", "sglang", "peft"])
def test_a_trained_bias_is_a_difference_elsewhere(tmp_path: Path, target: str) -> None:
    bias = {"base_model.model.down_blocks.square.lora_B.bias": torch.randn(6)}
    source = peft_source(tmp_path / "source", bias, lora_bias=True)
    wanted = changes(source)
    assert wanted["down_blocks.square.bias"].any()
    out = tmp_path / ("out.safetensors" if target == "kohya" else "out")
    if target == "sglang":
        with pytest.raises(UnsupportedError, match="SGLang serves no trained biases"):
            lm.convert(source, out, target)
        return
    lm.convert(source, out, target)
    same(changes(out), wanted, 1e-6)


def test_sixteen_bit_factors_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "half.safetensors"
    tensors = {k: t.bfloat16() if "lora" in k.partition(".")[2] else t for k, t in kohya_tensors().items()}
    save_file(tensors, source)
    lm.convert(source, tmp_path / "out", "peft", base=base)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wide = tensors["lora_unet_down_blocks_wide.lora_up.weight"]
    assert torch.equal(made["base_model.model.down_blocks.wide.lora_B.weight"], wide)
    assert all(t.dtype == torch.bfloat16 for t in made.values())
    same(changes(tmp_path / "out"), changes(source))


def test_the_same_conversion_writes_the_same_bytes(base: Path, kohya: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lm.convert(kohya, tmp_path / name, "diffusers", base=base)
    a, b = ((tmp_path / n / "pytorch_lora_weights.safetensors").read_bytes() for n in "ab")
    assert a == b


def test_a_dry_run_and_a_failure_leave_nothing(base: Path, kohya: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    report = lm.convert(kohya, tmp_path / "out", "peft", base=base, dry_run=True)
    assert report["modules"] == 5
    with pytest.raises(MismatchError):
        lm.convert(kohya, tmp_path / "out", "peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_whole_differences_become_pairs_where_asked(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "full.safetensors"
    torch.manual_seed(1)
    shapes = {name: Net().down_blocks[name].weight.shape for name in ("wide", "conv")}
    save_file({f"lora_unet_down_blocks_{n}.diff": torch.randn(s) for n, s in shapes.items()}, source)
    with pytest.raises(UnsupportedError, match="no such kind"):
        lm.convert(source, tmp_path / "out", "peft", base=base)
    lm.convert(source, tmp_path / "out", "peft", base=base, rank=10)
    same(changes(tmp_path / "out"), changes(source), 2e-6)
    lm.convert(source, tmp_path / "kept.safetensors", "comfyui", base=base)
    same(changes(tmp_path / "kept.safetensors"), changes(source))


@pytest.mark.parametrize("method", ["ADALORA", "VERA", "HRA"])
def test_other_methods_of_peft_become_pairs(tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["down_blocks.square"]
    config = {
        "ADALORA": lambda: peft.AdaLoraConfig(target_modules=targets, init_r=3, total_step=10),
        "VERA": lambda: peft.VeraConfig(target_modules=targets, r=3, save_projection=True),
        "HRA": lambda: peft.HRAConfig(target_modules=targets, r=2),
    }[method]()
    torch.manual_seed(2)
    base = tmp_path / "base.safetensors"
    save_file(net().state_dict(), base)
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    wanted = changes(tmp_path / "source")
    if method == "HRA":  # a rotation of the weight: no pair of its own
        with pytest.raises(UnsupportedError) as caught:
            lm.convert(tmp_path / "source", tmp_path / "out", "vllm", base=base)
        assert "--rank" in caught.value.fix
        with pytest.raises(UnsupportedError) as caught:
            lm.convert(tmp_path / "source", tmp_path / "out", "vllm", rank=6)
        assert "--base" in caught.value.fix
        lm.convert(tmp_path / "source", tmp_path / "out", "vllm", base=base, rank=6)
    else:
        report = lm.convert(tmp_path / "source", tmp_path / "out", "vllm", base=base)
        assert report["approximated"] == 0
    same(changes(tmp_path / "out"), wanted, 5e-6)
