"""Other kinds than LoRA, other dialects than PEFT's, and what adapters bring whole: joined, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from combining_zoo import LINEARS, Net, deltas, loaded, lora, net, same, total, trained, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import MismatchError, UnsupportedError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.safetensors")


def other(path: Path, config: Any, seed: int) -> Path:
    trained(config, seed).save_pretrained(path)
    return path


def merged(adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own merge changes in the net, float64."""
    model = peft.PeftModel.from_pretrained(net().double(), str(adapter), autocast_adapter_dtype=False).double()
    state, before = model.merge_and_unload().state_dict(), net().double().state_dict()
    found = {n.removesuffix(".weight"): state[n] - before[n] for n in before if n.endswith("weight")}
    return {n: d for n, d in found.items() if bool(d.any())}


def kohya(path: Path, seed: int, *, mid: bool = False, base_prefix: str = "lora_unet_") -> Path:
    """A file as sd-scripts or LyCORIS writes it: flattened names, alpha tensors, perhaps a Tucker convolution."""
    g, model, tensors = torch.Generator().manual_seed(seed), Net(), {}
    for name in (*LINEARS, "conv"):
        key, weight, r = base_prefix + name.replace(".", "_"), model.get_parameter(f"{name}.weight"), 2
        kernel = weight.shape[2:]
        down = (r, weight.shape[1], *((1, 1) if mid else kernel)) if kernel else (r, weight.shape[1])
        tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=g)
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], r, *[1] * len(kernel), generator=g)
        if kernel and mid:
            tensors[f"{key}.lora_mid.weight"] = torch.randn(r, r, *kernel, generator=g)
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def kohya_deltas(path: Path) -> dict[str, Tensor]:
    """By the formula: alpha / r times up, mid and down."""
    tensors, found = load_file(path), {}
    for name in (*LINEARS, "conv"):
        key = "lora_unet_" + name.replace(".", "_")
        down, up = (tensors[f"{key}.lora_{x}.weight"].double() for x in ("down", "up"))
        scale = float(tensors[f"{key}.alpha"]) / down.shape[0]
        if f"{key}.lora_mid.weight" in tensors:
            mid = tensors[f"{key}.lora_mid.weight"].double()
            found[name] = scale * torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
        else:
            found[name] = scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return found


# ------------------------------------------------------------------------------------------------------ other kinds


def test_hadamard_and_kronecker_products_join_exactly(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1)
    loha = other(tmp_path / "loha", peft.LoHaConfig(r=2, alpha=3, target_modules=list(LINEARS)), 2)
    lokr = other(tmp_path / "lokr", peft.LoKrConfig(r=2, alpha=3, target_modules=list(LINEARS)), 3)
    report = lm.combine({a: 1.0, loha: 0.5, lokr: -1.0}, tmp_path / "out")
    wanted = {n: d + 0.5 * merged(loha)[n] - merged(lokr)[n] for n, d in merged(a).items()}
    same(deltas(tmp_path / "out"), wanted, 2e-6)
    assert {row["how"] for row in report["rows"]} == {"multiplied"} and report["converted"] == 0


def test_a_tucker_convolution_joins_a_plain_one(base: Path, tmp_path: Path) -> None:
    a, b = kohya(tmp_path / "a.safetensors", 1), kohya(tmp_path / "b.safetensors", 2, mid=True)
    lm.combine({a: 0.5, b: 1.0}, tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert not [k for k in made if "mid" in k]
    assert made["lora_unet_conv.lora_down.weight"].shape == (4, 3, 3, 3)
    da, db = kohya_deltas(a), kohya_deltas(b)
    same(kohya_deltas(tmp_path / "out.safetensors"), {n: 0.5 * da[n] + db[n] for n in da})


def test_dialects_are_mixed_with_a_base(base: Path, tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), kohya(tmp_path / "b.safetensors", 2)
    with pytest.raises(MismatchError) as caught:
        lm.combine([a, b], tmp_path / "out")
    assert caught.value.code == "combine.needs-base" and "--base" in caught.value.fix
    wanted = kohya_deltas(b)
    for name, delta in deltas(a).items():
        wanted[name] = wanted[name] * -0.5 + delta
    wanted["conv"] = wanted["conv"] * -0.5
    report = lm.combine({a: 1.0, b: -0.5}, tmp_path / "out", base=base)
    same(deltas(tmp_path / "out"), wanted)
    assert report["to"] == "peft" and all(row["adapters"] == 2 for row in report["rows"] if row["module"] != "conv")
    lm.combine({b: -0.5, a: 1.0}, tmp_path / "out.safetensors", base=base)
    same(kohya_deltas(tmp_path / "out.safetensors"), wanted)
    lm.combine({a: 1.0, b: -0.5}, tmp_path / "to.safetensors", base=base, to="kohya")
    same(kohya_deltas(tmp_path / "to.safetensors"), wanted)


def test_dora_needs_the_base_and_a_rank(base: Path, tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1)
    dora = lora(tmp_path / "dora", 2, use_dora=True)
    with pytest.raises(UnsupportedError) as caught:
        lm.combine([a, dora], tmp_path / "out", rank=4)
    assert caught.value.code == "combine.weight" and "--base" in caught.value.fix
    with pytest.raises(UnsupportedError) as caught:
        lm.combine([a, dora], tmp_path / "out", base=base)
    assert caught.value.code == "combine.rank" and "--rank" in caught.value.fix
    wanted = {n: d + merged(dora)[n] for n, d in merged(a).items()}
    report = lm.combine([a, dora], tmp_path / "out", base=base, rank=8)
    same(deltas(tmp_path / "out"), wanted, 1e-5)
    assert report["converted"] == 4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config.get("use_dora")
    report = lm.combine([a, dora], tmp_path / "cut", base=base, rank=3)
    got = deltas(tmp_path / "cut")
    for name, delta in wanted.items():
        best = float(torch.linalg.svdvals(delta)[3:].norm())
        assert float((got[name] - delta).norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("based", [False, True])
def test_what_scales_and_rotates_is_refused_or_cut(base: Path, tmp_path: Path, based: bool) -> None:
    a = lora(tmp_path / "a", 1, targets=LINEARS[:1])
    oft = other(tmp_path / "oft", peft.OFTConfig(r=0, oft_block_size=4, target_modules=[LINEARS[0]]), 2)
    if not based:
        with pytest.raises(UnsupportedError) as caught:
            lm.combine([a, oft], tmp_path / "out", rank=4)
        assert caught.value.code == "combine.weight"
        return
    lm.combine([a, oft], tmp_path / "out", base=base, rank=8)
    same(deltas(tmp_path / "out"), {n: d + merged(oft)[n] for n, d in merged(a).items()}, 1e-5)


def test_differences_stay_whole_or_become_products(tmp_path: Path) -> None:
    g, made = torch.Generator().manual_seed(1), []
    for n in range(2):
        tensors = {}
        for name in LINEARS:
            weight = Net().get_parameter(f"{name}.weight")
            tensors[f"lora_unet_{name.replace('.', '_')}.diff"] = torch.randn(weight.shape, generator=g)
            tensors[f"lora_unet_{name.replace('.', '_')}.diff_b"] = torch.randn(weight.shape[0], generator=g)
        made.append(tmp_path / f"{n}.safetensors")
        save_file(tensors, made[-1])
    a, b = (load_file(path) for path in made)
    report = lm.combine({made[0]: 0.5, made[1]: -1.0}, tmp_path / "out.safetensors", to="kohya")
    got = load_file(tmp_path / "out.safetensors")
    differences = {k: v for k, v in got.items() if "diff" in k}
    assert len(differences) == 8 and report["ranks"] is None
    for key in a:
        same({key: got[key].double()}, {key: 0.5 * a[key].double() - b[key].double()})
    lm.combine({made[0]: 0.5, made[1]: -1.0}, tmp_path / "low.safetensors", to="kohya", rank=2)
    low = load_file(tmp_path / "low.safetensors")
    assert any("lora_down" in k for k in low) and sum(k.endswith(".diff_b") for k in low) == 4


# ---------------------------------------------------------------------------------------------------------- biases


def test_trained_biases_of_pairs_are_summed(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1, lora_bias=True, targets=LINEARS[:3])
    b = lora(tmp_path / "b", 2, lora_bias=True, targets=LINEARS[1:], lora_alpha=2)
    c = lora(tmp_path / "c", 3, targets=LINEARS)
    lm.combine({a: 1.0, b: -0.5, c: 1.0}, tmp_path / "out")
    wanted = total({a: 1.0, b: -0.5, c: 1.0})
    assert sum(n.endswith(".bias") for n in wanted) == 4
    same(deltas(tmp_path / "out"), wanted)


def test_a_bias_without_a_matrix_is_not_lost(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1, lora_bias=True)
    b = lora(tmp_path / "b", 1, targets=LINEARS)
    tensors = load_file(a / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "bias" not in k}, b / "adapter_model.safetensors", {"format": "pt"})
    lm.combine({a: 1.0, b: -1.0}, tmp_path / "out")
    wanted = {n: d if n.endswith("bias") else torch.zeros_like(d) for n, d in deltas(a).items()}
    got = deltas(tmp_path / "out")
    for name, delta in wanted.items():
        assert float((got[name] - delta).norm()) <= 1e-6 * max(1.0, float(delta.norm())), name


# --------------------------------------------------------------------------------------------------- whole modules


def heads(tmp_path: Path, *seeds: int, **config: Any) -> list[Path]:
    return [lora(tmp_path / f"h{s}", s, modules_to_save=["score"], **config) for s in seeds]


def head_of(adapter: Path) -> Tensor:
    return load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"].double()


def test_equal_heads_are_kept_and_told(tmp_path: Path) -> None:
    a, b = heads(tmp_path, 1, 2)
    file = b / "adapter_model.safetensors"
    own = load_file(file)
    own |= {k: t for k, t in load_file(a / "adapter_model.safetensors").items() if "score" in k}
    save_file(own, file, {"format": "pt"})
    report = lm.combine({a: 1.0, b: 1.0}, tmp_path / "out")
    assert torch.equal(head_of(tmp_path / "out"), head_of(a))
    assert {w["how"] for w in report["whole"]} == {"kept"} and any("kept as it is" in note for note in report["notes"])
    model = loaded(tmp_path / "out")
    assert torch.equal(model.base_model.model.score.weight.double(), head_of(a))


def test_different_heads_are_averaged_or_need_the_base(base: Path, tmp_path: Path) -> None:
    a, b = heads(tmp_path, 1, 2)
    lm.combine({a: 0.25, b: 0.75}, tmp_path / "mean")
    torch.testing.assert_close(head_of(tmp_path / "mean"), 0.25 * head_of(a) + 0.75 * head_of(b), rtol=1e-6, atol=1e-7)
    with pytest.raises(MismatchError) as caught:
        lm.combine({a: 1.0, b: 1.0}, tmp_path / "out")
    assert caught.value.code == "combine.needs-base" and "score" in caught.value.message
    report = lm.combine({a: 1.0, b: 1.0}, tmp_path / "out", base=base)
    before = net().score.weight.double()
    wanted = before + (head_of(a) - before) + (head_of(b) - before)
    torch.testing.assert_close(head_of(tmp_path / "out"), wanted.detach(), rtol=1e-6, atol=1e-7)
    assert {w["how"] for w in report["whole"]} == {"summed"}


def test_a_head_that_one_adapter_brings_is_kept(tmp_path: Path) -> None:
    (a,) = heads(tmp_path, 1)
    b = lora(tmp_path / "b", 2)
    lm.combine([a, b], tmp_path / "out")
    assert torch.equal(head_of(tmp_path / "out"), head_of(a))
    same(
        {n: d for n, d in deltas(tmp_path / "out").items() if "score" not in n},
        {n: d for n, d in total({a: 1.0, b: 1.0}).items() if "score" not in n},
    )


def test_one_replaces_what_another_adds_to(tmp_path: Path) -> None:
    (a,) = heads(tmp_path, 1)
    b = lora(tmp_path / "b", 2, targets=[*LINEARS, "score"])
    with pytest.raises(UnsupportedError) as caught:
        lm.combine([a, b], tmp_path / "out")
    assert caught.value.code == "combine.collision" and "score" in caught.value.message


def test_rows_of_tokens_are_kept_averaged_or_refused(tmp_path: Path) -> None:
    def rows(name: str, seed: int, tokens: list[int]) -> Path:
        return lora(tmp_path / name, seed, trainable_token_indices={"tokens": tokens})

    def of(path: Path) -> Tensor:
        found = load_file(path / "adapter_model.safetensors")
        return next(t for k, t in found.items() if "token" in k).double()

    a, b, c = rows("a", 1, [2, 5]), rows("b", 2, [2, 5]), rows("c", 3, [2, 6])
    lm.combine({a: 0.5, b: 0.5}, tmp_path / "mean")
    torch.testing.assert_close(of(tmp_path / "mean"), 0.5 * of(a) + 0.5 * of(b), rtol=1e-6, atol=1e-7)
    loaded(tmp_path / "mean")
    with pytest.raises(UnsupportedError) as caught:
        lm.combine({a: 0.5, c: 0.5}, tmp_path / "out")
    assert caught.value.code == "combine.tokens"


def test_disagreeing_configs_are_told(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    for path, name in ((a, "one/model"), (b, "other/model")):
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    report = lm.combine([a, b], tmp_path / "out")
    assert any("one/model" in note and "other/model" in note for note in report["notes"])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "one/model"


def test_metadata_that_still_holds_is_kept(tmp_path: Path) -> None:
    paths = []
    for seed, extra in ((1, {"ss_epoch": "3"}), (2, {"ss_epoch": "4", "ss_sd_model_name": "two"})):
        path = kohya(tmp_path / f"{seed}.safetensors", seed)
        told = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "2", "ss_sd_model_name": "one", **extra}
        save_file(load_file(path), path, told)
        paths.append(path)
    report = lm.combine(paths, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_network_dim"] == "4"
    assert "ss_epoch" not in metadata and "ss_sd_model_name" not in metadata
    assert report["metadata"]["kept"] == ["ss_base_model_version"]
    assert {"ss_epoch", "ss_sd_model_name"} <= set(report["metadata"]["left_out"])


def test_components_stay_apart(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        path = kohya(tmp_path / f"{seed}.safetensors", seed)
        both = load_file(path) | load_file(kohya(tmp_path / "te.safetensors", seed + 5, base_prefix="lora_te1_"))
        save_file(both, path)
        paths.append(path)
    report = lm.combine(paths, tmp_path / "out.safetensors")
    assert report["modules"] == 10 and all(row["adapters"] == 2 for row in report["rows"])
    da, db = kohya_deltas(paths[0]), kohya_deltas(paths[1])
    same(kohya_deltas(tmp_path / "out.safetensors"), {n: da[n] + db[n] for n in da})
    assert sum(k.startswith("lora_te1_") for k in load_file(tmp_path / "out.safetensors")) == 15


def test_what_is_selected_is_combined_and_the_base_is_asked(base: Path, tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    report = lm.combine([lm.open_adapter(a), b], tmp_path / "out", include=["blocks.1.*"], exclude=["*.wide"])
    assert [row["module"] for row in report["rows"]] == ["blocks.1.square"]
    with pytest.raises(MismatchError) as caught:
        lm.combine([a, b], tmp_path / "none", include=["nothing.*"])
    assert caught.value.code == "combine.none"
    save_file({"other.weight": torch.zeros(8, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError):
        lm.combine([a, b], tmp_path / "none", base=tmp_path / "other.safetensors")
    assert not (tmp_path / "none").exists()


def test_what_the_target_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1, modules_to_save=["score"])
    with pytest.raises(UnsupportedError) as caught:
        lm.combine([a], tmp_path / "out.safetensors", to="kohya")
    assert "--exclude" in caught.value.fix and "--drop" not in caught.value.fix
    assert not (tmp_path / "out.safetensors").exists()
