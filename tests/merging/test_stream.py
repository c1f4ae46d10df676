"""The stream: any cut into blocks, any lane, any layout of the file give the same, correctly rounded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.merging import kernels, lanes, stream
from loramerge.tensors import hashing

SCALE = 2.0


def write(folder: Path, base: dict[str, Tensor], factors: dict[str, tuple[Tensor, Tensor]], **config: object) -> Path:
    """`base.safetensors` and `lora/` in a folder; factors by module are (A, B)."""
    (folder / "lora").mkdir(parents=True)
    save_file(base, folder / "base.safetensors")
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[0].shape[0]
    text = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, **config})
    (folder / "lora" / "adapter_config.json").write_text(text)
    return folder


def merge(folder: Path, name: str = "out.safetensors", **options: object) -> dict[str, Tensor]:
    lm.merge(folder / "base.safetensors", folder / "lora", folder / name, **options)
    return load_file(folder / name)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 rounded once: of the two neighbours of torch's result and itself, the nearest, ties to even."""
    guess = values.to(dtype)
    bits = guess.view(torch.int16)
    best, distance = guess.clone(), (guess.double() - values).abs()
    for step in (-1, 1):
        other = (bits + step).view(dtype)
        far = (other.double() - values).abs()
        better = (far < distance) | ((far == distance) & ((bits + step) % 2 == 0))
        best = torch.where(better, other, best)
        distance = torch.minimum(far, distance)
    return best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_large_weights_are_correctly_rounded(dtype: torch.dtype, compute: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2049, 1536) * torch.randn(2049, 1).mul(0.5).exp() * 0.02).to(dtype)
    a, b = torch.randn(16, 1536) * 0.02, torch.randn(2049, 16) * 0.01
    folder = write(tmp_path / "x", {"m.weight": weight}, {"m": (a, b)})
    truth = weight.double() + SCALE * (b.double() @ a.double())
    got = merge(folder, compute_dtype=compute)["m.weight"]
    wrong = got != nearest(truth, dtype)
    assert wrong.double().mean() <= (0 if compute == "float64" else 1e-4)
    # Where W and the update cancel, one error of a float32 sum is many units of the tiny result.
    whole = truth.abs() > 2.0**-12 * (weight.double().abs() + SCALE * (b.double().abs() @ a.double().abs()))
    apart = (got.view(torch.int16).int() - nearest(truth, dtype).view(torch.int16).int()).abs()
    assert whole.double().mean() > 0.99 and (apart[whole] <= 1).all()
    assert (got != weight).double().mean() > 0.5


@given(st.lists(st.floats(width=64, allow_nan=False, min_value=-60000, max_value=60000), min_size=1))
@settings(max_examples=300, deadline=None)
def test_float64_is_rounded_to_16_bits_once(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    exact = torch.cat([exact, exact.bfloat16().double() * (1 + 2.0**-8), exact.half().double() * (1 + 2.0**-11)])
    exact = torch.cat([exact, exact * (1 + 2.0**-40), exact * (1 - 2.0**-40)])
    for dtype in (torch.bfloat16, torch.float16):
        fits = exact[exact.abs() < 65000]
        target = torch.empty(fits.shape, dtype=dtype)
        kernels.round_into(target, fits)
        # Subnormal and zero neighbours of other sign are not neighbours in bits: compare distances there.
        assert ((target.double() - fits).abs() <= (nearest(fits, dtype).double() - fits).abs()).all()


@pytest.mark.parametrize("block", [4096, 65536, 1 << 20])
def test_the_cut_into_blocks_does_not_matter(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    shapes = {"linear": (517, 384), "tall": (3000, 24), "conv": (48, 16, 3, 3)}
    base = {f"{n}.weight": torch.randn(s).bfloat16() for n, s in shapes.items()}
    factors = {
        n: (torch.randn(3, *s[1:]) * 0.1, torch.randn(s[0], 3, *[1] * (len(s) - 2)) * 0.1) for n, s in shapes.items()
    }
    folder = write(tmp_path / "x", base, factors)
    usual = merge(folder)
    monkeypatch.setattr(hashing, "BLOCK_BYTES", block)
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(lanes, "CACHED_ELEMENTS", 1000)
    cut = merge(folder, "cut.safetensors")
    assert lm.verify(folder / "cut.safetensors", base=folder / "base.safetensors")["ok"]
    for name in usual:
        assert (usual[name] == cut[name]).double().mean() >= 0.9999, name


def test_a_device_lane_gives_what_the_cpu_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way over another device, with the CPU in its place: copies there and back, whole blocks at once."""
    torch.manual_seed(2)
    base = {"m.weight": torch.randn(700, 333).bfloat16(), "n.weight": torch.randn(64, 64)}
    factors = {"m": (torch.randn(4, 333), torch.randn(700, 4)), "n": (torch.randn(4, 64), torch.randn(64, 4))}
    folder = write(tmp_path / "x", base, factors)
    usual = merge(folder)
    used = []

    def lane(run: stream._Run) -> lanes.Lane:
        used.append(1)
        return lanes.DeviceLane(hashing.BLOCK_BYTES, hashing.BLOCK_BYTES, run.dtype, torch.device("cpu"))

    monkeypatch.setattr(stream._Run, "_lane", lane)
    over = merge(folder, "over.safetensors")
    assert used
    for name in usual:
        assert (usual[name] == over[name]).double().mean() >= 0.9999, name


def test_tensors_at_odd_offsets(tmp_path: Path) -> None:
    """Three bytes before it leave a weight at an odd address of the file, where no kernel could work in place."""
    torch.manual_seed(3)
    weight = torch.randn(40, 30).bfloat16()
    folder = write(tmp_path / "x", {"m.weight": weight}, {"m": (torch.randn(2, 30), torch.randn(40, 2))})
    entries = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    entries["m.weight"] = {"dtype": "BF16", "shape": [40, 30], "data_offsets": [3, 2403]}
    header = json.dumps(entries).encode()
    data = bytes([1, 2, 3]) + weight.view(torch.uint8).numpy().tobytes()
    straight = merge(folder)["m.weight"]
    (folder / "base.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    odd = merge(folder, "odd.safetensors")
    assert torch.equal(odd["m.weight"], straight) and odd["odd"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_output_dtype(dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    base = {"m.weight": torch.randn(64, 48), "norm.weight": torch.randn(48), "ids": torch.arange(5)}
    a, b = torch.randn(2, 48) * 0.1, torch.randn(64, 2) * 0.1
    folder = write(tmp_path / "x", base, {"m": (a, b)})
    got = merge(folder, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert torch.equal(got["norm.weight"], base["norm.weight"].to(wanted)) and torch.equal(got["ids"], base["ids"])
    truth = base["m.weight"].double() + SCALE * (b.double() @ a.double())
    assert got["m.weight"].dtype == wanted
    assert torch.allclose(got["m.weight"].double(), truth, rtol=2 * torch.finfo(wanted).eps, atol=1e-6)


def test_zero_updates_copy_the_bytes(tmp_path: Path) -> None:
    """-0.0 + 0.0 would be +0.0: where nothing is added, nothing may change."""
    weight = torch.randn(16, 16).bfloat16()
    weight[0] = -0.0
    factors = {"zero": (torch.randn(2, 16), torch.zeros(16, 2)), "m": (torch.randn(2, 16), torch.randn(16, 2))}
    folder = write(tmp_path / "x", {"zero.weight": weight, "m.weight": weight.clone()}, factors)
    got = merge(folder)
    assert torch.equal(got["zero.weight"].view(torch.int16), weight.view(torch.int16))
    assert not torch.equal(got["m.weight"], weight)
    none = lm.merge(folder / "base.safetensors", {folder / "lora": 0.0}, folder / "none.safetensors")
    assert torch.equal(load_file(folder / "none.safetensors")["m.weight"].view(torch.int16), weight.view(torch.int16))
    assert any("zero" in note for note in none.notes)


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False)])
def test_overflow_is_found_where_rounding_makes_infinity(value: float, fits: bool, tmp_path: Path) -> None:
    base = torch.zeros(4, 4).half()
    a, b = torch.zeros(1, 4), torch.zeros(4, 1)
    a[0, 0], b[0, 0] = 1.0, value / SCALE
    folder = write(tmp_path / "x", {"m.weight": base}, {"m": (a, b)})
    if fits:
        assert merge(folder)["m.weight"][0, 0].item() == 65504.0
        return
    with pytest.raises(lm.LoramergeError) as caught:
        merge(folder)
    assert caught.value.code == "merge.overflow" and "bfloat16" in caught.value.fix
    assert not (folder / "out.safetensors").exists()


def test_retention_is_that_of_the_dense_formula(tmp_path: Path) -> None:
    torch.manual_seed(5)
    weight = (torch.randn(200, 300) * 0.02).bfloat16()  # small enough to be measured whole
    a, b = torch.randn(4, 300) * 0.002, torch.randn(200, 4) * 0.002
    folder = write(tmp_path / "x", {"m.weight": weight}, {"m": (a, b)})
    receipt = lm.merge(folder / "base.safetensors", folder / "lora", folder / "out.safetensors")
    merged = load_file(folder / "out.safetensors")["m.weight"].double()
    delta = SCALE * (b.double() @ a.double())
    dense = ((merged - weight.double()) * delta).sum() / (delta * delta).sum()
    assert receipt.retention is not None and dense < 0.95
    assert abs(receipt.retention - dense.item()) < 1e-3 * dense.item() + 1e-6
