"""One adapter of several: what PEFT loads of it is the weighted sum, or what the papers' formulas say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from combining_zoo import LINEARS, deltas, loaded, lora, net, same, total, write_base
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import InputError, LoramergeError, MismatchError, UnsupportedError, UsageError

EVERYWHERE = [*LINEARS, "tokens", "conv", "score"]


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Different ranks, scales and targets; rank 1 and rank patterns among them."""
    a = lora(tmp_path / "a", 1, targets=EVERYWHERE)
    b = lora(tmp_path / "b", 2, r=1, lora_alpha=3, use_rslora=True, targets=EVERYWHERE[:4])
    pattern = {"blocks.0.square": 5, "blocks.1.wide": 2}
    c = lora(tmp_path / "c", 3, r=4, rank_pattern=pattern, alpha_pattern={"blocks.0.wide": 16}, targets=EVERYWHERE)
    return [a, b, c]


def test_the_sum_is_what_peft_adds_up(three: list[Path], tmp_path: Path) -> None:
    a, b, c = three
    weights = {a: 0.7, b: -0.5, c: 1.0}
    report = lm.combine(weights, tmp_path / "out")
    same(deltas(tmp_path / "out"), total(weights))
    ranks = {row["module"]: row["rank"] for row in report["rows"]}
    assert ranks["blocks.0.wide"] == 8 and ranks["blocks.1.wide"] == 6 and ranks["score"] == 2 and ranks["conv"] == 5
    assert report["error"] < 1e-6 and not report["left_out"] and report["modules"] == 7


def test_the_loaded_model_computes_the_sum(three: list[Path], tmp_path: Path) -> None:
    lm.combine(three, tmp_path / "out")
    x = torch.arange(11)[None]
    base = net().double()
    wanted = {k: v.clone() for k, v in base.state_dict().items()}
    for name, delta in total(dict.fromkeys(three, 1.0)).items():
        wanted[f"{name}.weight"] += delta
    got = loaded(tmp_path / "out")(x)
    before = base(x).clone()
    base.load_state_dict(wanted)
    torch.testing.assert_close(got, base(x), rtol=1e-6, atol=1e-6)
    assert (got - before).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "kept", "limit"), [("keep", "BF16", 6e-3), ("float32", "F32", 1e-6)])
def test_the_dtype_is_told_apart_from_the_exactness(tmp_path: Path, dtype: str, kept: str, limit: float) -> None:
    a, b = (lora(tmp_path / str(i), i, dtype=torch.bfloat16) for i in (1, 2))
    report = lm.combine({a: 0.7, b: 0.3}, tmp_path / "out", dtype=dtype)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in made.values()} == {"torch.bfloat16" if kept == "BF16" else "torch.float32"}
    wanted = total({a: 0.7, b: 0.3})
    same(deltas(tmp_path / "out"), wanted, limit)
    got = deltas(tmp_path / "out")
    error = sum(float((got[n] - wanted[n]).square().sum()) for n in wanted) ** 0.5
    assert report["error"] == pytest.approx(
        error / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5, rel=0.02
    )


def test_factors_in_float64_are_exact_to_ten_digits(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1, dtype=torch.float64, targets=EVERYWHERE)
    b = lora(tmp_path / "b", 2, dtype=torch.float64, r=1)
    wanted = total({a: 0.7, b: -0.3})
    report = lm.combine({a: 0.7, b: -0.3}, tmp_path / "out", dtype="keep")
    same(deltas(tmp_path / "out"), wanted, 1e-12)
    assert report["error"] < 1e-12
    lm.combine({a: 0.7, b: -0.3}, tmp_path / "cut", dtype="keep", rank=2)
    for name, got in deltas(tmp_path / "cut").items():
        u, s, v = torch.linalg.svd(wanted[name].flatten(1), full_matrices=False)
        best = (u[:, :2] * s[:2] @ v[:2]).reshape(got.shape)
        assert float((got - best).norm()) <= 1e-10 * float(best.norm()), name


def test_a_rank_gives_the_best_of_that_rank(three: list[Path], tmp_path: Path) -> None:
    report = lm.combine(three, tmp_path / "out", rank=2)
    got, lost, whole = deltas(tmp_path / "out"), 0.0, 0.0
    for name, wanted in total(dict.fromkeys(three, 1.0)).items():
        s = torch.linalg.svdvals(wanted.flatten(1))
        error = float((got[name] - wanted).norm())
        assert error == pytest.approx(float(s[2:].norm()), rel=1e-4, abs=1e-5)
        lost, whole = lost + error**2, whole + float(s.norm()) ** 2
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report["ranks"] == {"least": 2, "most": 2}


# ---------------------------------------------------------------------------------- methods, by their dense formulas


def trimmed(d: np.ndarray, density: float) -> np.ndarray:
    k = max(1, int(density * d.size))
    return np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-k], d, 0)


def elected(ds: list[np.ndarray]) -> np.ndarray:
    sign = np.sign(sum(ds))
    agree = [(np.sign(d) == sign) & (d != 0) for d in ds]
    count = np.maximum(1, sum(a.astype(int) for a in agree))
    return sum(d * a for d, a in zip(ds, agree, strict=True)) / count


def slerped(ds: list[np.ndarray]) -> np.ndarray:
    x, y = ds
    if not np.linalg.norm(x) * np.linalg.norm(y):
        return 0.75 * x + 0.25 * y
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    return (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)


def stocked(ds: list[np.ndarray]) -> np.ndarray:
    x, y = ds
    size = np.linalg.norm(x) * np.linalg.norm(y)
    c = (x * y).sum() / size if size else 0.0
    return 2 * c / (1 + c) / 2 * (x + y)


def flattened(ds: list[np.ndarray]) -> np.ndarray:
    u, s, v = np.linalg.svd(sum(ds), full_matrices=False)
    k = int((s > 1e-9 * s[0]).sum())
    return s[:k].mean() * u[:, :k] @ v[:k]


FORMULAS: dict[str, tuple[dict[str, Any], Any]] = {
    "ties": ({"density": 0.35}, lambda ds: elected([trimmed(d, 0.35) for d in ds])),
    "magnitude": ({"density": 0.5}, lambda ds: sum(trimmed(d, 0.5) for d in ds)),
    "breadcrumbs": (
        {"density": 0.5, "gamma": 0.1},
        lambda ds: sum(
            trimmed(d, (int(0.1 * d.size) + int(0.5 * d.size)) / d.size + 1e-9)
            - trimmed(d, int(0.1 * d.size) / d.size + 1e-9)
            for d in ds
        ),
    ),
    "slerp": ({"t": 0.25}, slerped),
    "model_stock": ({}, stocked),
    "iso_c": ({}, flattened),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_methods_are_their_dense_formulas(tmp_path: Path, method: str) -> None:
    a = lora(tmp_path / "a", 1, r=2)
    b = lora(tmp_path / "b", 2, r=5, targets=LINEARS[:3])
    options, formula = FORMULAS[method]
    lm.combine({a: 0.8, b: -0.6}, tmp_path / "out", method=method, method_options=options, energy=1.0)
    got, da, db = deltas(tmp_path / "out"), deltas(a), deltas(b)
    for name in LINEARS:
        x, y = 0.8 * da[name].numpy(), -0.6 * db.get(name, torch.zeros_like(da[name])).numpy()
        wanted = formula([x, y])
        if not wanted.any():
            assert name not in got and method == "model_stock"
            continue
        assert np.linalg.norm(got[name].numpy() - wanted) <= 2e-6 * np.linalg.norm(wanted), name


def test_peft_linear_is_what_peft_computes(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2, lora_alpha=2)
    report = lm.combine({a: 0.7, b: 0.4}, tmp_path / "out", method="peft-linear")
    model = loaded(a)
    model.load_adapter(str(b), "b", autocast_adapter_dtype=False)
    model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "both", combination_type="linear")
    got, wanted, lost, whole = deltas(tmp_path / "out"), {}, 0.0, 0.0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            wanted[name] = module.get_delta_weight("both").detach()
            true = total({a: 0.7, b: 0.4})[name]
            lost, whole = lost + float((wanted[name] - true).norm()) ** 2, whole + float(true.norm()) ** 2
    same(got, wanted)
    assert report["distance"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6) and report["distance"] > 0.3


def test_the_trim_of_ties_may_be_that_of_the_whole_adapter(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1, rank_pattern={"blocks.0.square": 1})
    options = {"density": 0.3, "trim": "adapter"}
    lm.combine([a], tmp_path / "out", method="ties", method_options=options, energy=1.0)
    da = deltas(a)
    every = torch.cat([d.flatten() for d in da.values()]).abs()
    least = every.sort(descending=True).values[int(0.3 * len(every)) - 1]
    same(deltas(tmp_path / "out"), {n: torch.where(d.abs() >= least * (1 - 1e-7), d, 0.0) for n, d in da.items()}, 2e-6)


# ------------------------------------------------------------------------------------------------------- invariants


def test_the_order_the_threads_and_the_basis_change_nothing(three: list[Path], tmp_path: Path) -> None:
    a, b, c = three
    lm.combine([a, b, c], tmp_path / "abc", jobs=1)
    lm.combine([(a, 1.0), (c, 1.0), (b, 1.0)], tmp_path / "acb", jobs=3)
    assert (
        files_of(tmp_path / "abc")["adapter_model.safetensors"]
        == files_of(tmp_path / "acb")["adapter_model.safetensors"]
    )
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "adapter_config.json").write_bytes((a / "adapter_config.json").read_bytes())
    tensors, generator = load_file(a / "adapter_model.safetensors"), torch.Generator().manual_seed(3)
    for key in [k for k in tensors if "lora_A" in k or "embedding_A" in k]:
        r = tensors[key].shape[0]
        m = torch.eye(r).double() + 0.3 * torch.randn(r, r, generator=generator).double()
        other = key.replace("_A", "_B")
        tensors[key] = torch.einsum("pq,q...->p...", torch.linalg.inv(m), tensors[key].double()).float()
        tensors[other] = torch.einsum("oq...,qp->op...", tensors[other].double(), m).float()
    save_file(tensors, turned / "adapter_model.safetensors", {"format": "pt"})
    for method, options in (("linear", {}), ("tsv", {}), ("ties", {"density": 0.5, "space": "knots"})):
        lm.combine([a, c], tmp_path / f"{method}-1", method=method, method_options=options)
        lm.combine([turned, c], tmp_path / f"{method}-2", method=method, method_options=options)
        same(deltas(tmp_path / f"{method}-2"), deltas(tmp_path / f"{method}-1"), 5e-5)


def test_one_adapter_alone_is_itself(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1)
    for number, (method, options) in enumerate(
        [
            ("linear", {}),
            ("karcher", {}),
            ("model_stock", {}),
            ("knots", {}),
            ("tsv", {}),
            ("svc", {}),
            ("wudi", {}),
            ("dare", {"p": 0.0, "space": "core"}),
            ("peft-linear", {}),
        ]
    ):
        lm.combine([a], tmp_path / str(number), method=method, method_options=options)
        same(deltas(tmp_path / str(number)), deltas(a), 3e-6)


def test_scale_and_weight_are_one(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1, lora_alpha=6), lora(tmp_path / "b", 2)
    half = lora(tmp_path / "half", 1, lora_alpha=3)
    for method, options in (("linear", {}), ("ties", {"space": "core", "density": 0.4}), ("slerp", {})):
        lm.combine({a: 0.5, b: 1.0}, tmp_path / f"{method}-1", method=method, method_options=options)
        lm.combine({half: 1.0, b: 1.0}, tmp_path / f"{method}-2", method=method, method_options=options)
        same(deltas(tmp_path / f"{method}-1"), deltas(tmp_path / f"{method}-2"), 2e-6)


def test_random_methods_go_by_their_seed(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    seen = {}
    for name, adapters, seed, jobs in (("1", [a, b], 3, 1), ("2", [b, a], 3, 3), ("3", [a, b], 4, 1)):
        options = {"p": 0.5, "seed": seed}
        lm.combine(adapters, tmp_path / name, method="dare", method_options=options, rank=3, jobs=jobs)
        seen[name] = files_of(tmp_path / name)["adapter_model.safetensors"]
    assert seen["1"] == seen["2"] != seen["3"]


# -------------------------------------------------------------------------------------------------------- bad input


def test_an_adapter_minus_itself_is_no_adapter(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1)
    with pytest.raises(MismatchError, match="zero in all of 4 modules") as caught:
        lm.combine([(a, 1.0), (a, -1.0)], tmp_path / "out")
    assert caught.value.code == "combine.empty" and not (tmp_path / "out").exists()


def test_modules_of_rank_zero_are_left_out_and_named(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 1)
    b = lora(tmp_path / "b", 1, targets=LINEARS[:2], init_lora_weights=True)
    tensors = load_file(a / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "blocks.0" in k}, b / "adapter_model.safetensors", {"format": "pt"})
    report = lm.combine({a: 1.0, b: -1.0}, tmp_path / "out")
    assert sorted(report["left_out"]) == ["blocks.0.square", "blocks.0.wide"] and report["modules"] == 2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["blocks.1.square", "blocks.1.wide"]
    same(deltas(tmp_path / "out"), {n: d for n, d in deltas(a).items() if "blocks.1" in n})


def break_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = sorted(tensors)[0]
    return {**tensors, key: tensors[key].clone().index_fill_(0, torch.tensor(0), float("nan"))}


def break_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([t, t], 1) if "square.lora_A" in k else t for k, t in tensors.items()}


def break_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("blocks.", "transformer.h."): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [(break_nan, "adapter.non-finite"), (break_shape, "combine.shape"), (break_model, "combine.architecture")],
)
def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path, spoil: Any, code: str) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    file = b / "adapter_model.safetensors"
    save_file({k: t.contiguous() for k, t in spoil(load_file(file)).items()}, file, {"format": "pt"})
    with pytest.raises((InputError, MismatchError)) as caught:
        lm.combine([a, b], tmp_path / "out")
    assert caught.value.code == code and caught.value.fix and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"method": "ties", "method_options": {"density": 0.0}, "rank": 2}, "usage.method-option"),
        ({"method": "dare", "method_options": {"p": 1.0}, "rank": 2}, "usage.method-option"),
        ({"method": "della", "rank": 2}, "usage.method-option"),
        ({"method": "linear", "method_options": {"density": 0.5}}, "usage.method-option"),
        ({"method": "tise"}, "usage.method"),
        ({"rank": 2, "energy": 0.5}, "usage.rank"),
        ({"energy": 1.5}, "usage.rank"),
        ({"dtype": "int8"}, "usage.value"),
        ({"to": "xlabs"}, "usage.target"),
    ],
)
def test_requests_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], code: str) -> None:
    a, b = lora(tmp_path / "a", 1, targets=LINEARS[:1]), lora(tmp_path / "b", 2, targets=LINEARS[:1])
    with pytest.raises(UsageError) as caught:
        lm.combine([a, b], tmp_path / "out", **arguments)
    assert caught.value.code == code and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="takes 2"):
        lm.combine([a, b, a], tmp_path / "out", method="slerp")
    with pytest.raises(UsageError):
        lm.combine({a: float("nan")}, tmp_path / "out")


def test_full_rank_needs_a_place_to_cut(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1), lora(tmp_path / "b", 2)
    with pytest.raises(UnsupportedError) as caught:
        lm.combine([a, b], tmp_path / "out", method="ties")
    assert caught.value.code == "combine.rank" and "--space" in caught.value.fix and "--rank" in caught.value.fix


# ----------------------------------------------------------------------------------------------------------- budget


def test_a_budget_is_kept_and_spent(three: list[Path], tmp_path: Path) -> None:
    errors = []
    for budget in (2600, 3400, 4400):
        report = lm.combine(three, tmp_path / str(budget), budget=budget)
        size = (tmp_path / str(budget) / "adapter_model.safetensors").stat().st_size
        assert budget - 600 < size <= budget
        errors.append(report["error"])
        loaded(tmp_path / str(budget))
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_budget_that_holds_nothing_is_refused(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        lm.combine(three, tmp_path / "out", budget=200)
    assert caught.value.code == "combine.budget" and not (tmp_path / "out").exists()


def test_servers_get_one_rank(tmp_path: Path) -> None:
    a, b = lora(tmp_path / "a", 1, r=4), lora(tmp_path / "b", 2, r=2, targets=LINEARS[:2])
    lm.combine([a, b], tmp_path / "out", to="vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8 and not config.get("rank_pattern")
    same(deltas(tmp_path / "out"), total({a: 1.0, b: 1.0}))
    report = lm.combine([a, b], tmp_path / "small", to="vllm", budget=20000)
    assert max(r["stored_rank"] for r in report["rows"]) <= 8


def test_the_base_of_every_error_is_ours(tmp_path: Path) -> None:
    with pytest.raises(LoramergeError):
        lm.combine([tmp_path / "missing"], tmp_path / "out")
    write_base(tmp_path / "base.safetensors")
    with pytest.raises(LoramergeError):
        lm.combine([tmp_path / "base.safetensors"], tmp_path / "out")
