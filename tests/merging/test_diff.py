"""`diff` against norms worked out by hand in float64, for every dtype, layout and way to differ."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loramerge import pickled
from loramerge.errors import InputError, UnsafeError, UsageError
from loramerge.merging import diff as differ
from loramerge.merging.diff import diff
from loramerge.tensors import hashing

ROOT = Path(__file__).resolve().parents[2]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def model(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint directory; with several shards, tensors are dealt out in turn."""
    path.mkdir()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # no two may share memory
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(a: Tensor, b: Tensor) -> dict[str, float]:
    """Norms of two equal-shaped tensors of finite numbers, by numpy in float64."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    norm, change = math.sqrt(math.fsum(x * x)), math.sqrt(math.fsum((y - x) ** 2))
    return {
        "norm": norm,
        "norm_change": change,
        "relative": change / norm,
        "max_change": float(np.abs(y - x).max()),
        "share": float((x != y).mean()),
    }


def close(row: dict[str, Any], expected: dict[str, float]) -> None:
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    tensors = {f"t{i}": random(5, 7, seed=i).float() for i in range(4)}
    return model(tmp_path / "a", tensors), model(tmp_path / "b", tensors)


def test_equal_models_are_equal(pair: tuple[Path, Path]) -> None:
    result = diff(*pair)
    assert result["same"] is True
    assert result["counts"] == {"equal": 4, "changed": 0, "dtype": 0, "shape": 0, "only_a": 0, "only_b": 0}
    assert (result["a"], result["b"], result["tensors"]) == (str(pair[0]), str(pair[1]), 4)


@pytest.mark.parametrize("shards", [2, 3])
def test_how_a_model_is_cut_does_not_matter(tmp_path: Path, shards: int) -> None:
    tensors = {f"t{i}": random(3, 4, seed=i).bfloat16() for i in range(7)}
    whole, cut = model(tmp_path / "whole", tensors), model(tmp_path / "cut", tensors, shards)
    assert diff(whole, cut)["same"] and diff(cut, whole / "model.safetensors")["same"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_change_is_measured_in_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    a = random(30, 50).to(dtype)
    b = a.clone()
    b[3:9] = (b[3:9].double() * 1.01 + 0.003).to(dtype)
    result = diff(model(tmp_path / "a", {"w": a, "x": a}), model(tmp_path / "b", {"w": b, "x": a}))
    assert result["same"] is False
    assert (result["counts"]["equal"], result["counts"]["changed"]) == (1, 1)
    (row,) = result["changed"]
    assert (row["name"], row["shape"], row["non_finite"]) == ("w", [30, 50], 0)
    close(row, by_hand(a, b))


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_other_dtypes_are_told_and_measured(tmp_path: Path, dtype: torch.dtype, to: torch.dtype) -> None:
    if dtype == to:
        pytest.skip("the same dtype")
    a = random(40, 11).to(dtype)
    b = a.to(to)
    result = diff(model(tmp_path / "a", {"w": a}), model(tmp_path / "b", {"w": b}))
    (row,) = result["dtype"]
    assert (result["same"], result["counts"]["equal"], result["changed"]) == (False, 0, [])
    assert (row["a"], row["b"]) == (str(dtype).removeprefix("torch."), str(to).removeprefix("torch."))
    close(row, by_hand(a, b))


def test_other_dtypes_without_numbers_are_only_told(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", {"w": torch.ones(4)}), model(tmp_path / "b", {"w": torch.ones(4, dtype=torch.int32)})
    assert diff(a, b)["dtype"] == [{"name": "w", "a": "float32", "b": "int32", "shape": [4]}]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_without_norms_have_the_share_changed(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.zeros(10, 2).to(dtype)
    b = a.clone()
    b.view(-1)[[3, 5, 19]] = torch.ones(3).to(dtype)
    (row,) = diff(model(tmp_path / "a", {"w": a}), model(tmp_path / "b", {"w": b}))["changed"]
    assert row["share"] == 3 / 20
    assert "norm" not in row


def test_missing_and_reshaped_tensors_are_listed(tmp_path: Path) -> None:
    one = torch.ones(2, 3)
    a = model(tmp_path / "a", {"both": one, "left": one, "reshaped": one})
    b = model(tmp_path / "b", {"both": one, "right": one, "reshaped": one.reshape(3, 2).clone()})
    result = diff(a, b)
    assert (result["only_a"], result["only_b"]) == (["left"], ["right"])
    assert result["shape"] == [{"name": "reshaped", "a": [2, 3], "b": [3, 2]}]
    assert (result["same"], result["tensors"], result["counts"]["equal"]) == (False, 4, 1)


def test_one_more_tensor_is_a_difference(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", {"w": torch.ones(2)}), model(tmp_path / "b", {"w": torch.ones(2), "x": torch.ones(2)})
    assert not diff(a, b)["same"] and not diff(b, a)["same"]


def test_changes_come_sorted_the_largest_first(tmp_path: Path) -> None:
    tensors = {name: torch.ones(8) for name in ("small", "large", "zero", "middle")}
    tensors["zero"] = torch.zeros(8)
    factors = {"small": 0.01, "large": 1.0, "zero": 1.0, "middle": 0.1}
    changed = {name: tensor + factors[name] for name, tensor in tensors.items()}
    rows = diff(model(tmp_path / "a", tensors), model(tmp_path / "b", changed))["changed"]
    assert [row["name"] for row in rows] == ["zero", "large", "middle", "small"]
    assert rows[0]["relative"] is None and rows[0]["norm"] == 0.0
    assert rows[1]["relative"] == 1.0


def test_what_is_not_finite_is_counted_and_left_out_of_the_norms(tmp_path: Path) -> None:
    a = torch.tensor([1.0, math.nan, math.inf, 2.0, 3.0])
    b = torch.tensor([1.5, math.nan, -math.inf, 2.0, math.nan])
    result = diff(model(tmp_path / "a", {"w": a}), model(tmp_path / "b", {"w": b}))
    (row,) = result["changed"]
    assert (row["non_finite"], row["share"]) == (3, 3 / 5)
    assert (row["norm"], row["norm_change"], row["max_change"]) == (math.sqrt(5), 0.5, 0.5)
    json.dumps(result, allow_nan=False)


def test_squares_that_overflow_are_no_number(tmp_path: Path) -> None:
    a = torch.full((3,), 1e300, dtype=torch.float64)
    result = diff(model(tmp_path / "a", {"w": a}), model(tmp_path / "b", {"w": a * 2}))
    assert result["changed"][0]["norm"] is None
    json.dumps(result, allow_nan=False)


def test_the_sign_of_zero_is_a_change_without_size(tmp_path: Path) -> None:
    a, b = torch.zeros(4), torch.tensor([0.0, -0.0, 0.0, 0.0])
    (row,) = diff(model(tmp_path / "a", {"w": a}), model(tmp_path / "b", {"w": b}))["changed"]
    assert (row["share"], row["norm_change"], row["relative"]) == (0.25, 0.0, 0.0)


def test_empty_tensors_and_scalars_are_compared(tmp_path: Path) -> None:
    a = model(tmp_path / "a", {"empty": torch.ones(0, 3), "scalar": torch.tensor(1.0)})
    b = model(tmp_path / "b", {"empty": torch.ones(0, 3), "scalar": torch.tensor(3.0)})
    result = diff(a, b)
    assert result["counts"]["equal"] == 1
    assert (result["changed"][0]["shape"], result["changed"][0]["relative"]) == ([], 2.0)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("where", [0, 100, 299])
def test_many_blocks_give_what_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, where: int
) -> None:
    a = random(300, 17).bfloat16()
    b = a.clone()
    b[where, 5] += 1
    paths = model(tmp_path / "a", {"w": a, "v": a}), model(tmp_path / "b", {"w": b, "v": a.float()})
    for module in (hashing, differ):
        monkeypatch.setattr(module, "BLOCK_BYTES", 340)
    monkeypatch.setattr(differ, "_PIECE", 7)
    seen: list[tuple[int, int]] = []
    result = diff(*paths, jobs=jobs, progress=lambda done, total: seen.append((done, total)))
    close(result["changed"][0], by_hand(a, b))
    assert result["dtype"][0]["share"] == 0.0
    assert seen[-1] == (2 * a.numel() * 2, 2 * a.numel() * 2)
    assert seen == sorted(seen)


def test_rows_longer_than_a_block_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hashing, differ):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    a = random(2, 100).float()
    b = a.clone()
    b[1, 99] += 1
    result = diff(model(tmp_path / "a", {"w": a, "v": a}), model(tmp_path / "b", {"w": b, "v": a.half()}))
    close(result["changed"][0], by_hand(a, b))
    close(result["dtype"][0], by_hand(a, a.half()))


def test_globs_choose_whole_names(tmp_path: Path) -> None:
    names = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "lm_head.weight")
    a = model(tmp_path / "a", {name: torch.ones(2) for name in names})
    b = model(tmp_path / "b", {name: torch.zeros(2) for name in names})
    assert diff(a, b, include=["*q_proj*"])["counts"]["changed"] == 2
    assert [row["name"] for row in diff(a, b, include=["*q_proj*"], exclude=["*.1.*"])["changed"]] == [names[0]]
    assert [row["name"] for row in diff(a, b, exclude=["model.*"])["changed"]] == [names[2]]
    with pytest.raises(UsageError) as caught:
        diff(a, b, include=["q_proj"])
    assert caught.value.code == "diff.nothing"


def test_adapters_and_pickles_compare_too(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(3, 2)}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "lora.bin")
    with pytest.raises(UnsafeError):
        diff(tmp_path / "lora", tmp_path / "lora.bin")
    assert diff(tmp_path / "lora", tmp_path / "lora.bin", read_pickle=pickled.read_header)["same"]


def test_a_missing_side_is_an_error_that_names_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for sides in ((pair[0], tmp_path / "nowhere"), (tmp_path / "nowhere", pair[0])):
        with pytest.raises(InputError) as caught:
            diff(*sides)
        assert (caught.value.code, caught.value.file) == ("input.missing", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_file_that_shrinks_meanwhile_is_an_error(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    opened = differ.open_weights

    def shrink(path: Path, **options: Any) -> Any:
        checkpoint = opened(path, **options)
        with open(Path(path) / "model.safetensors", "r+b") as file:
            file.truncate(checkpoint.files[0].source.size - 8)
        return checkpoint

    monkeypatch.setattr(differ, "open_weights", shrink)
    with pytest.raises(InputError) as caught:
        diff(*pair, jobs=jobs)
    assert caught.value.code == "input.changed"


def test_an_interrupt_ends_the_work(pair: tuple[Path, Path]) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diff(*pair, progress=interrupt)


def test_torch_keeps_its_number_of_threads(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a", {"w": torch.ones(2)}), model(tmp_path / "b", {"w": torch.zeros(2)})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        diff(a, b)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_equal_models_are_compared_without_torch(pair: tuple[Path, Path]) -> None:
    code = (
        f"import sys, loramerge as lm\nassert lm.diff({str(pair[0])!r}, {str(pair[1])!r})['same']\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
