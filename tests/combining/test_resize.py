"""An adapter of other ranks: the best products of these ranks, written so that its own readers load them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from combining_zoo import LINEARS, deltas, loaded, lora, same, write_base
from safetensors.torch import load_file, save_file
from test_kinds_and_wholes import kohya, kohya_deltas, merged

import loramerge as lm
from loramerge.errors import MismatchError, UnsupportedError, UsageError

EVERYWHERE = [*LINEARS, "tokens", "conv"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Rank 6, but where a pattern says otherwise; one module of rank 1."""
    pattern = {"blocks.1.wide": 1}
    return lora(tmp_path / "lora", 1, r=6, rank_pattern=pattern, targets=EVERYWHERE, use_rslora=True)


def test_a_lower_rank_is_the_best_of_that_rank(adapter: Path, tmp_path: Path) -> None:
    report = lm.resize(adapter, tmp_path / "out", rank=3)
    got, whole = deltas(tmp_path / "out"), deltas(adapter)
    rows = {row["module"]: row for row in report["rows"]}
    for name, wanted in whole.items():
        s = torch.linalg.svdvals(wanted.flatten(1))
        lost = float(s[3:].norm())
        assert float((got[name] - wanted).norm()) == pytest.approx(lost, rel=1e-5, abs=1e-5)
        assert rows[name]["error"] == pytest.approx(lost / float(s.norm()), rel=1e-4, abs=1e-6)
        assert torch.linalg.matrix_rank(got[name].flatten(1), rtol=1e-6) == min(3, int((s > 1e-6 * s[0]).sum()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (3, 3, {}, False)


def test_a_higher_rank_is_filled_with_zeros(adapter: Path, tmp_path: Path) -> None:
    report = lm.resize(adapter, tmp_path / "out", rank=9)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in made.items() if "lora_A" in k} == {9}
    same(deltas(tmp_path / "out"), deltas(adapter))
    assert {row["stored_rank"] for row in report["rows"]} == {9}


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_an_energy_keeps_the_smallest_rank_that_has_it(adapter: Path, tmp_path: Path, share: float) -> None:
    report = lm.resize(adapter, tmp_path / "out", energy=share)
    ranks = {row["module"]: row["rank"] for row in report["rows"]}
    for name, wanted in deltas(adapter).items():
        squares = torch.linalg.svdvals(wanted.flatten(1)).square().cumsum(0)
        least = 1 + int((squares < share * (1 - 1e-10) * squares[-1]).sum())
        assert ranks[name] == least, name
    loaded(tmp_path / "out")


def test_a_ratio_keeps_what_is_near_the_largest(adapter: Path, tmp_path: Path) -> None:
    report = lm.resize(adapter, tmp_path / "out", ratio=2.0)
    ranks = {row["module"]: row["rank"] for row in report["rows"]}
    for name, wanted in deltas(adapter).items():
        s = torch.linalg.svdvals(wanted.flatten(1))
        assert ranks[name] == int((s > s[0] / 2).sum()), name


def test_a_budget_goes_where_it_keeps_most(adapter: Path, tmp_path: Path) -> None:
    report = lm.resize(adapter, tmp_path / "out", budget=3200)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= 3200
    last, following = [], []
    for row in report["rows"]:
        whole = deltas(adapter)[row["module"]].flatten(1)
        s, cost = torch.linalg.svdvals(whole), sum(whole.shape)
        last += [(float(x) ** 2 / cost, cost) for x in s[: row["rank"]][-1:]]
        following += [(float(x) ** 2 / cost, cost) for x in s[row["rank"] :][:1] if x > 1e-5]
    assert last and following
    # What was left out is worth less than what was kept, but for what is too large to take its place.
    assert all(gain <= other for gain, cost in following for other, size in last if cost <= size)
    uniform = min(r for r in range(7) if r * sum(c for _, c in last) * 4 > 3200 - 1400)
    assert report["error"] < lm.resize(adapter, tmp_path / "flat", rank=uniform - 1)["error"]
    with pytest.raises(MismatchError) as caught:
        lm.resize(adapter, tmp_path / "none", budget=100)
    assert caught.value.code == "combine.budget" and not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = lora(tmp_path / "lora", 1, r=6, dtype=dtype)
    report = lm.resize(adapter, tmp_path / "out", rank=2)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in made.values()} == {dtype}
    got, lost, norm = deltas(tmp_path / "out"), 0.0, 0.0
    for name, wanted in deltas(adapter).items():
        lost, norm = lost + float((got[name] - wanted).norm()) ** 2, norm + float(wanted.norm()) ** 2
    assert report["error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-5)  # rounding is in it


def test_a_tucker_convolution_is_multiplied_out(tmp_path: Path) -> None:
    source = kohya(tmp_path / "in.safetensors", 1, mid=True)
    lm.resize(source, tmp_path / "out.safetensors", rank=2)
    made = load_file(tmp_path / "out.safetensors")
    assert not [k for k in made if "mid" in k] and float(made["lora_unet_conv.alpha"]) == 2
    same(kohya_deltas(tmp_path / "out.safetensors"), kohya_deltas(source))
    lm.resize(source, tmp_path / "one.safetensors", rank=1)
    wanted = kohya_deltas(source)["conv"].flatten(1)
    error = float((kohya_deltas(tmp_path / "one.safetensors")["conv"].flatten(1) - wanted).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(wanted)[1:].norm()), rel=1e-5)


def test_a_magnitude_is_never_left_stale(tmp_path: Path) -> None:
    adapter, base = lora(tmp_path / "dora", 1, use_dora=True), write_base(tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedError) as caught:
        lm.resize(adapter, tmp_path / "out", rank=2)
    assert caught.value.code == "combine.weight" and "--base" in caught.value.fix
    lm.resize(adapter, tmp_path / "out", rank=2, base=base)
    assert not [k for k in load_file(tmp_path / "out" / "adapter_model.safetensors") if "magnitude" in k]
    got = deltas(tmp_path / "out")
    for name, wanted in merged(adapter).items():
        best = float(torch.linalg.svdvals(wanted)[2:].norm())
        assert float((got[name] - wanted).norm()) == pytest.approx(best, rel=1e-4), name


def test_modules_without_a_change_are_left_out(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", 1)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t * ("blocks.0" not in k) for k, t in tensors.items()}, file, {"format": "pt"})
    report = lm.resize(adapter, tmp_path / "out", rank=2)
    assert sorted(report["left_out"]) == ["blocks.0.square", "blocks.0.wide"]
    assert set(deltas(tmp_path / "out")) == {"blocks.1.square", "blocks.1.wide"}
    save_file({k: t * 0 for k, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        lm.resize(adapter, tmp_path / "none", rank=2)
    assert caught.value.code == "combine.empty" and not (tmp_path / "none").exists()


def test_what_is_no_factor_travels_along(tmp_path: Path) -> None:
    adapter = lora(tmp_path / "lora", 1, r=6, modules_to_save=["score"], lora_bias=True, lora_alpha=9)
    lm.resize(adapter, tmp_path / "out", rank=2)
    before, after = (load_file(p / "adapter_model.safetensors") for p in (adapter, tmp_path / "out"))
    assert all(torch.equal(after[k], before[k]) for k in before if "score" in k)
    biases = {n: d for n, d in deltas(adapter).items() if n.endswith(".bias")}
    assert len(biases) == 4
    same({n: d for n, d in deltas(tmp_path / "out").items() if n.endswith(".bias")}, biases)


def test_a_rank_must_be_stated(adapter: Path, tmp_path: Path) -> None:
    for arguments in ({}, {"rank": 2, "ratio": 3.0}, {"rank": 0}, {"ratio": 1.0}, {"energy": 0.0}):
        with pytest.raises(UsageError) as caught:
            lm.resize(adapter, tmp_path / "out", **arguments)
        assert caught.value.code == "usage.rank"
