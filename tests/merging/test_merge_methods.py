"""Methods on the way into a base, against dense float64 definitions; there and back; whatever the cut and the order."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples as dialects
import test_lycoris_merge as lycoris_methods
import test_peft_merge as zoo
import torch
from algebra import algebra_dense as dense
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramerge as lm
from loramerge.adapters.updates import LowRank, Pick, to_data
from loramerge.adapters.views import Part, Place, Take
from loramerge.algebra import content_key
from loramerge.merging import lanes, mixing, stream
from loramerge.merging.methods import from_data
from loramerge.merging.sites import sites_of
from loramerge.merging.undo import open_undo
from loramerge.methods import METHODS
from loramerge.tensors import hashing

torch.set_num_threads(1)

SHAPES: dict[str, tuple[int, ...]] = {
    "a.square": (24, 24),
    "a.tall": (37, 11),
    "a.wide": (9, 30),
    "a.conv": (8, 4, 3, 3),
}
TARGETS = {"one": ("a.square", "a.tall", "a.conv"), "two": ("a.square", "a.tall", "a.wide"), "three": ("a.square",)}
RANKS = {"one": 3, "two": 4, "three": 1}
WEIGHTS = {"one": 0.7, "two": -0.5, "three": 1.0}
ALPHA = 6.0


def random(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def lora(
    folder: Path, shapes: Mapping[str, Sequence[int]], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes a PEFT adapter; returns its factors (B, A), flattened, float64, the scale in neither."""
    tensors, pairs = {}, {}
    for i, (name, (out, *rest)) in enumerate(sorted(shapes.items())):
        ones = [1] * (len(rest) - 1)
        A = random((rank, *rest), 1000 * seed + 2 * i, 0.3).to(dtype)
        B = random((out, rank, *ones), 1000 * seed + 2 * i + 1, 0.3).to(dtype)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        pairs[name] = (B.double().flatten(1), A.double().flatten(1))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return pairs


class Case:
    """A base of a few matrices and three adapters that share some of them."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, names: Sequence[str] = tuple(TARGETS)) -> None:
        self.folder, self.names = folder, names
        folder.mkdir(exist_ok=True)
        self.tensors = {f"{n}.weight": random(s, i).to(dtype) for i, (n, s) in enumerate(SHAPES.items())}
        self.tensors["a.norm.weight"] = random((24,), 77).to(dtype)
        self.base = folder / "base.safetensors"
        save_file(self.tensors, self.base)
        self.pairs = {}
        for i, name in enumerate(names):
            wanted = {module: SHAPES[module] for module in TARGETS[name]}
            self.pairs[name] = lora(folder / name, wanted, RANKS[name], i + 1)
        self.adapters = {folder / name: WEIGHTS[name] for name in names}

    def folded(self, module: str) -> list[np.ndarray]:
        """`weight scale B A` of each adapter, zero where it has nothing."""
        out, *rest = SHAPES[module]
        zero = np.zeros((out, math.prod(rest)))
        found = []
        for name in self.names:
            pair = self.pairs[name].get(module)
            scale = WEIGHTS[name] * ALPHA / RANKS[name]
            found.append(zero if pair is None else scale * (pair[0] @ pair[1]).numpy())
        return found

    def keys(self, module: str) -> list[bytes]:
        return [content_key(*self.pairs[n][module]) if module in self.pairs[n] else b"" for n in self.names]

    def ranks(self, module: str) -> list[int]:
        return [RANKS[n] if module in self.pairs[n] else 0 for n in self.names]

    def merge(self, out: str = "out.safetensors", order: int = 1, **options: Any) -> dict[str, Tensor]:
        adapters = dict(list(self.adapters.items())[::order])
        lm.merge(self.base, adapters, self.folder / out, **options)
        return load_file(self.folder / out)


def wanted(method: str, ds: list[np.ndarray], keys: list[bytes], ranks: list[int], module: str, o: Any) -> np.ndarray:
    """The dense definition of a method."""
    size = max(float(np.linalg.norm(d)) for d in ds)

    def dropped(p: float) -> list[np.ndarray]:
        return [
            dense.dropped(d, p, dense.uniform(d.shape, o["seed"], k, module)) for d, k in zip(ds, keys, strict=True)
        ]

    def della() -> list[np.ndarray]:
        us = [dense.uniform(d.shape, o["seed"], k, module) for d, k in zip(ds, keys, strict=True)]
        rows = [
            [dense.della_row(d[i], o["density"], o["eps"], u[i]) for i in range(len(d))]
            for d, u in zip(ds, us, strict=True)
        ]
        return [np.stack(r) for r in rows]

    match method:
        case "linear":
            return sum(ds)
        case "ties":
            return dense.elected([dense.trimmed(d, o["density"]) for d in ds])
        case "magnitude":
            return sum(dense.trimmed(d, o["density"]) for d in ds)
        case "breadcrumbs":
            return sum(dense.without_largest(d, o["density"], o["gamma"]) for d in ds)
        case "dare":
            return sum(dropped(o["p"]))
        case "dare_ties":
            return dense.elected(dropped(o["p"]))
        case "della":
            return dense.elected(della())
        case "slerp":
            return dense.slerp(ds[0], ds[1], o["t"])
        case "karcher":
            return dense.karcher(ds, [1.0] * len(ds))
        case "model_stock":
            return dense.model_stock(ds)
        case "knots":
            space = dense.space(ds, "knots", size)
            return space.back(dense.elected([dense.trimmed(x, o["density"]) for x in space.xs]))
        case "tsv":
            return dense.tsv(ds, ranks, size)
        case "iso_c":
            return dense.iso_c(ds, size)
        case "iso_cts":
            return dense.iso_cts(ds, o["common"], sum(ranks), size)
        case "svc":
            return dense.svc(sum(ds), ds, o["svc_alpha"], size)
        case "wudi":
            return dense.wudi(ds, o["ridge"])
    raise AssertionError(method)


GIVEN: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4},
    "dare": {"p": 0.3, "seed": 5},
    "dare_ties": {"p": 0.3, "seed": 6},
    "della": {"density": 0.5, "eps": 0.2, "seed": 7},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "magnitude": {"density": 0.3},
    "slerp": {"t": 0.3},
    "knots": {"density": 0.7},
    "wudi": {"ridge": 1e-3},
}
ON_UPDATES = [name for name, method in METHODS.items() if not method.factors]
FULL = [name for name in ON_UPDATES if METHODS[name].space]
FACTORED = [name for name in ON_UPDATES if not METHODS[name].space and name != "linear"]


def options_of(method: str) -> dict[str, Any]:
    return {"method": method, "method_options": GIVEN.get(method, {})}


def case_for(method: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    return Case(folder, dtype, ("one", "two") if method == "slerp" else tuple(TARGETS))


def all_options(method: str) -> dict[str, Any]:
    return {**METHODS[method].options, **GIVEN.get(method, {})}


def close(got: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Rounded once: within half a unit in the last place of its dtype, and float32's error of the sum."""
    half = torch.finfo(got.dtype).eps * truth.abs() / 2 if got.dtype != torch.float32 else 0
    off = (got.double() - truth).abs() - half - 2.0**-21 * bound - 1e-12
    assert (off <= 0).all(), f"off by {float((got.double() - truth).abs().max()):.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ON_UPDATES)
def test_every_method_is_its_dense_definition(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = case_for(method, tmp_path, dtype)
    got = case.merge(**options_of(method))
    assert torch.equal(got["a.norm.weight"], case.tensors["a.norm.weight"])
    for module in SHAPES:
        name, ds = f"{module}.weight", case.folded(module)
        if not any(case.ranks(module)):
            assert torch.equal(got[name], case.tensors[name])
            continue
        M = wanted(method, ds, case.keys(module), case.ranks(module), module, all_options(method))
        W = case.tensors[name].double()
        change = torch.from_numpy(M).view(W.shape)
        close(got[name], W + change, W.abs() + sum(float(np.abs(d).max()) for d in ds))
        if method == "model_stock" and len([r for r in case.ranks(module) if r]) == 1:
            assert torch.equal(got[name], case.tensors[name])  # no two agree about anything
        else:
            assert (change.abs().max() > 1e-3) and not torch.equal(got[name], case.tensors[name])


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.factors])
def test_methods_on_factors_take_pairs_of_one_rank(method: str, tmp_path: Path) -> None:
    shapes = {"a.square": (24, 24)}
    pairs = [lora(tmp_path / n, shapes, 2, i)["a.square"] for i, n in enumerate(("one", "two"))]
    base = {"a.square.weight": random((24, 24), 0)}
    save_file(base, tmp_path / "base.safetensors")
    given = {"density": 0.5} if "density" in METHODS[method].options else {}
    adapters = {tmp_path / "one": 0.7, tmp_path / "two": 0.4}
    receipt = lm.merge(
        tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors", method=method, method_options=given
    )
    got = load_file(tmp_path / "out.safetensors")["a.square.weight"].double() - base["a.square.weight"].double()
    if method == "peft-linear":
        roots = [math.sqrt(w * ALPHA / 2) for w in (0.7, 0.4)]
        B = sum(r * b for r, (b, _) in zip(roots, pairs, strict=True))
        A = sum(r * a for r, (_, a) in zip(roots, pairs, strict=True))
        assert torch.allclose(got, B @ A, atol=1e-5)
    true = sum(w * ALPHA / 2 * (b @ a) for w, (b, a) in zip((0.7, 0.4), pairs, strict=True))
    distance = float((got - true).norm() / true.norm())
    assert distance > 0.05
    said = receipt.data["distance"]
    assert said == {"a.square": pytest.approx(distance, rel=1e-3)}
    assert any(f"{distance:.2f}"[:3] in note and method in note for note in receipt.notes)


# --- the same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ON_UPDATES)
def test_neither_workers_nor_order_nor_blocks_change_a_byte(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "linear":
        pytest.skip("sums in the order given")
    case = case_for(method, tmp_path)
    usual = case.merge(jobs=1, **options_of(method))
    order = 1 if method == "slerp" else -1
    with monkeypatch.context() as m:
        m.setattr(hashing, "BLOCK_BYTES", 700)
        m.setattr(stream, "BLOCK_BYTES", 700)
        m.setattr(lanes, "CACHED_ELEMENTS", 50)
        cut = case.merge("cut.safetensors", jobs=3, order=order, **options_of(method))
    for name in usual:
        if METHODS[method].space:
            assert torch.equal(usual[name], cut[name]), name
        else:  # the product of factors is float32's, as in a linear merge: its blocks may differ in the last bit
            assert torch.allclose(usual[name], cut[name], rtol=1e-6, atol=2e-6), name
    again = case.merge("again.safetensors", jobs=3, order=order, **options_of(method))
    assert all(torch.equal(usual[name], again[name]) for name in usual)


def test_the_seed_counts(tmp_path: Path) -> None:
    case = Case(tmp_path)
    outs = [case.merge(f"{s}.safetensors", method="dare", method_options={"p": 0.5, "seed": s}) for s in (1, 2)]
    assert not torch.equal(outs[0]["a.square.weight"], outs[1]["a.square.weight"])


@pytest.mark.parametrize("method", ["ties", "dare", "della", "tsv", "knots"])
def test_one_adapter_alone_is_itself(method: str, tmp_path: Path) -> None:
    case = Case(tmp_path, names=("one",))
    given = {
        "ties": {"density": 1.0}, "dare": {"p": 0.0}, "della": {"density": 1.0, "eps": 0.0}, "tsv": {}, "knots": {}
    }  # fmt: skip
    linear = case.merge()
    got = case.merge("other.safetensors", method=method, method_options=given[method])
    for name in linear:
        assert torch.allclose(got[name], linear[name], atol=3e-6), name


def test_thresholds_over_the_whole_adapter(tmp_path: Path) -> None:
    """The k-th largest magnitude of all its matrices together, as the paper trims."""
    case = Case(tmp_path)
    got = case.merge(method="ties", method_options={"density": 0.3, "trim": "adapter"})
    all_of = [np.concatenate([case.folded(m)[i].ravel() for m in SHAPES if case.ranks(m)[i]]) for i in range(3)]
    cuts = [dense.kth(x, max(1, int(0.3 * x.size))) for x in all_of]
    for module in SHAPES:
        ds = [np.where(np.abs(d).astype(np.float32) >= c, d, 0) for d, c in zip(case.folded(module), cuts, strict=True)]
        W = case.tensors[f"{module}.weight"].double()
        close(got[f"{module}.weight"], W + torch.from_numpy(dense.elected(ds)).view(W.shape), W.abs() + 10)


# --- there and back ------------------------------------------------------------------------------------------


def folder_of(case: Case) -> Path:
    folder = case.folder / "model"
    folder.mkdir()
    save_file(case.tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", [name for name in ON_UPDATES if name != "linear"])
def test_there_and_back(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = case_for(method, tmp_path, dtype)
    base = folder_of(case)
    receipt = lm.merge(base, case.adapters, tmp_path / "out", reversible=True, **options_of(method))
    assert receipt.data["options"]["method"] == method
    assert receipt.data["options"]["method_options"] == all_options(method)
    assert lm.verify(tmp_path / "out", base=base, undo=True)["ok"]
    lm.unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    if method in ("ties", "tsv"):
        lm.unmerge(tmp_path / "out", tmp_path / "back2", base=base)
        assert (tmp_path / "back2" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_verify_replays_with_the_method_and_finds_another(tmp_path: Path) -> None:
    case = Case(tmp_path)
    base = folder_of(case)
    lm.merge(base, case.adapters, tmp_path / "out", method="dare", method_options={"seed": 3, "p": 0.5})
    assert lm.verify(tmp_path / "out", base=base)["ok"]
    path = tmp_path / "out" / "loramerge.json"
    data = json.loads(path.read_text())
    data["options"]["method_options"]["seed"] = 4
    path.write_text(json.dumps(data))
    found = lm.verify(tmp_path / "out", base=base)
    assert not found["ok"] and set(found["differ"]) == {f"{m}.weight" for m in SHAPES}


@pytest.mark.parametrize("method", ["ties", "karcher"])
def test_a_switch_gives_what_a_merge_into_the_base_gives(method: str, tmp_path: Path) -> None:
    case = case_for(method, tmp_path, torch.bfloat16)
    base = folder_of(case)
    lm.merge(base, tmp_path / "one", tmp_path / "first", reversible=True)
    lm.switch(tmp_path / "first", case.adapters, tmp_path / "second", **options_of(method))
    lm.merge(base, case.adapters, tmp_path / "straight", **options_of(method))
    straight = (tmp_path / "straight" / "model.safetensors").read_bytes()
    assert load_file(tmp_path / "second" / "model.safetensors").keys() == case.tensors.keys()
    second, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("second", "straight"))
    assert all(torch.equal(second[k], wanted[k]) for k in wanted)
    assert lm.verify(tmp_path / "second", base=base, undo=True)["ok"]
    lm.switch(tmp_path / "second", tmp_path / "two", tmp_path / "third", method="linear")
    lm.unmerge(tmp_path / "third", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert straight != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["ties", "iso_c"])
def test_in_place_and_back(method: str, tmp_path: Path) -> None:
    case = Case(tmp_path, torch.bfloat16)
    base = folder_of(case)
    before = (base / "model.safetensors").read_bytes()
    straight = case.merge(**options_of(method))
    lm.merge(base, case.adapters, None, in_place=True, reversible=True, **options_of(method))
    now = load_file(base / "model.safetensors")
    assert all(torch.equal(now[k], straight[k]) for k in straight)
    lm.unmerge(base, None, in_place=True)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["ties", "tsv"])
def test_subtraction_computes_the_same_again(method: str, tmp_path: Path) -> None:
    case = Case(tmp_path)
    base = folder_of(case)
    lm.merge(base, case.adapters, tmp_path / "out", **options_of(method))
    plan = lm.plan_unmerge(tmp_path / "out", tmp_path / "back", inexact=True)
    assert json.loads(json.dumps(plan.to_data()))["way"] == "subtraction"
    lm.unmerge(tmp_path / "out", tmp_path / "back", inexact=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in case.tensors.items():
        assert torch.allclose(back[name], tensor, atol=3e-6), name


@pytest.mark.parametrize("method", ["ties", "della", "slerp", "iso_cts"])
def test_a_state_dict_and_a_live_model(method: str, tmp_path: Path) -> None:
    case = case_for(method, tmp_path, torch.bfloat16)
    straight = case.merge(**options_of(method))
    merged = lm.merge_tensors(case.tensors, case.adapters, **options_of(method))
    assert all(torch.equal(merged[k], straight[k]) for k in straight)
    model = {name: tensor.clone() for name, tensor in case.tensors.items()}
    switcher = lm.Switcher(model)
    with switcher.applied(case.adapters, **options_of(method)):
        assert all(torch.equal(model[k], straight[k]) for k in straight)
        switcher.switch({tmp_path / "one": 1.0})
        assert not torch.equal(model["a.square.weight"], straight["a.square.weight"])
    assert all(torch.equal(model[k], case.tensors[k]) for k in straight)


def test_a_plan_is_plain_data(tmp_path: Path) -> None:
    case = Case(tmp_path)
    plan = lm.plan_merge(case.base, case.adapters, tmp_path / "x.safetensors", method="ties")
    data = json.loads(json.dumps(plan.to_data()))
    step = next(s for s in data["files"][0]["steps"] if s["tensor"] == "a.square.weight")
    assert [u["method"] for u in step["updates"]] == ["ties"]
    assert [u["adapter"] for u in step["updates"][0]["of"]] == [0, 1, 2]
    assert data["options"]["method_options"] == METHODS["ties"].options


# --- modules that lie elsewhere ------------------------------------------------------------------------------


HEADS, WIDTH = 4, 32
ROWS = {"q": (0, 32), "k": (32, 48), "v": (48, 64)}  # 4 heads of 8, 2 of them for k and v


def fused_model(folder: Path, fused: bool) -> dict[str, Tensor]:
    """One attention layer with q, k and v in one weight, or in three. Returns the whole weight."""
    whole = random((64, WIDTH), 9)
    at = "model.layers.0.self_attn"
    tensors = {f"{at}.o_proj.weight": random((WIDTH, WIDTH), 10)}
    if fused:
        tensors[f"{at}.qkv_proj.weight"] = whole
    else:
        tensors |= {f"{at}.{n}_proj.weight": whole[r0:r1].clone() for n, (r0, r1) in ROWS.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "phi3" if fused else "llama", "num_attention_heads": HEADS, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": WIDTH}))
    return {f"{at}.qkv_proj": whole}


def qkv_of(folder: Path) -> Tensor:
    held = load_file(folder / "model.safetensors")
    at = "model.layers.0.self_attn"
    if f"{at}.qkv_proj.weight" in held:
        return held[f"{at}.qkv_proj.weight"]
    return torch.cat([held[f"{at}.{n}_proj.weight"] for n in ROWS])


@pytest.mark.parametrize("fused_base", [True, False], ids=["fused base", "split base"])
@pytest.mark.parametrize("method", ["ties", "magnitude", "tsv", "karcher", "wudi"])
def test_fused_and_split_adapters_meet_on_the_finest_cut(method: str, fused_base: bool, tmp_path: Path) -> None:
    at = "model.layers.0.self_attn"
    (whole,) = fused_model(tmp_path / "base", fused_base).values()
    whole_pair = lora(tmp_path / "whole", {f"{at}.qkv_proj": (64, WIDTH)}, 3, 1)[f"{at}.qkv_proj"]
    shapes = {f"{at}.{n}_proj": (r1 - r0, WIDTH) for n, (r0, r1) in ROWS.items()}
    parts = lora(tmp_path / "split", shapes, 2, 2)
    adapters = {tmp_path / "whole": 0.7, tmp_path / "split": 0.9}
    lm.merge(tmp_path / "base", adapters, tmp_path / "out", reversible=True, **options_of(method))
    for name, (r0, r1) in ROWS.items():
        b, a = parts[f"{at}.{name}_proj"]
        ds = [
            0.7 * ALPHA / 3 * (whole_pair[0][r0:r1] @ whole_pair[1]).numpy(),
            0.9 * ALPHA / 2 * (b @ a).numpy(),
        ]
        M = wanted(method, ds, [b"", b""], [3, 2], "", all_options(method))
        close(qkv_of(tmp_path / "out")[r0:r1], whole[r0:r1].double() + torch.from_numpy(M), torch.full((1, 1), 20.0))
    assert lm.verify(tmp_path / "out", base=tmp_path / "base", undo=True)["ok"]


@pytest.mark.parametrize("method", ["ties", "dare", "iso_c"])
def test_a_module_in_several_tensors_is_one_matrix(method: str, tmp_path: Path) -> None:
    """Two fused adapters on a split base: thresholds, masks and singular values are of the whole module."""
    at = "model.layers.0.self_attn"
    whole = fused_model(tmp_path / "base", False)[f"{at}.qkv_proj"]
    pairs = [
        lora(tmp_path / n, {f"{at}.qkv_proj": (64, WIDTH)}, r, r)[f"{at}.qkv_proj"] for n, r in (("x", 3), ("y", 2))
    ]
    lm.merge(tmp_path / "base", [tmp_path / "x", tmp_path / "y"], tmp_path / "out", **options_of(method))
    ds = [ALPHA / r * (b @ a).numpy() for (b, a), r in zip(pairs, (3, 2), strict=True)]
    module = "+".join(f"{at}.{n}_proj" for n in ROWS)
    M = wanted(method, ds, [content_key(*p) for p in pairs], [3, 2], module, all_options(method))
    close(qkv_of(tmp_path / "out"), whole.double() + torch.from_numpy(M), torch.full((1, 1), 20.0))


@pytest.mark.parametrize("method", ["ties", "della", "tsv"])
def test_heads_that_take_turns(method: str, tmp_path: Path) -> None:
    """q, k and v of each head in turn: a split adapter's q is every third of them, and one matrix all the same."""
    at, heads, size = "gpt_neox.layers.0.attention", 2, 4
    base = random((3 * heads * size, 8), 5)
    (tmp_path / "base").mkdir()
    save_file({f"{at}.query_key_value.weight": base}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gpt_neox", "num_attention_heads": heads, "hidden_size": heads * size}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    whole = lora(tmp_path / "whole", {f"{at}.query_key_value": (3 * heads * size, 8)}, 3, 1)[f"{at}.query_key_value"]
    names = ("q_proj", "k_proj", "v_proj")
    split = lora(tmp_path / "split", {f"{at}.{n}": (heads * size, 8) for n in names}, 2, 2)
    lm.merge(tmp_path / "base", [tmp_path / "whole", tmp_path / "split"], tmp_path / "out", **options_of(method))
    got = load_file(tmp_path / "out" / "model.safetensors")[f"{at}.query_key_value.weight"].view(heads, 3, size, 8)
    for i, name in enumerate(names):
        D = (ALPHA / 3 * (whole[0] @ whole[1])).view(heads, 3, size, 8)[:, i].reshape(heads * size, 8)
        b, a = split[f"{at}.{name}"]
        ds = [D.numpy(), (ALPHA / 2 * (b @ a)).numpy()]
        pieces = [f"{at}.query_key_value[{(3 * h + i) * size * 8}+{size}x8,0:8:1]" for h in range(heads)]
        keys = [content_key(*whole), content_key(b, a)]
        M = torch.from_numpy(wanted(method, ds, keys, [3, 2], "+".join(pieces), all_options(method)))
        W = base.view(heads, 3, size, 8)[:, i].reshape(heads * size, 8).double()
        close(got[:, i].reshape(heads * size, 8), W + M, torch.full((1, 1), 20.0))


@pytest.mark.parametrize("method", ["ties", "della", "dare", "iso_c"])
def test_turned_weights(method: str, tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the method sees the module's own (out, in); q, k and v are columns."""
    at = "transformer.h.0.attn"
    base = random((8, 24), 5)
    (tmp_path / "base").mkdir()
    save_file({f"{at}.c_attn.weight": base}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gpt2", "n_head": 2, "n_embd": 8}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    pairs = [lora(tmp_path / f"x{r}", {f"{at}.c_attn": (24, 8)}, r, r)[f"{at}.c_attn"] for r in (3, 2)]
    lm.merge(tmp_path / "base", [tmp_path / "x3", tmp_path / "x2"], tmp_path / "out", **options_of(method))
    got = load_file(tmp_path / "out" / "model.safetensors")[f"{at}.c_attn.weight"]
    ds = [ALPHA / r * (b @ a).numpy() for (b, a), r in zip(pairs, (3, 2), strict=True)]
    M = wanted(method, ds, [content_key(*p) for p in pairs], [3, 2], f"{at}.c_attn", all_options(method))
    close(got, base.double() + torch.from_numpy(M).T, torch.full((1, 1), 20.0))
    (b, a) = lora(tmp_path / "q", {f"{at}.q_proj": (8, 8)}, 2, 7)[f"{at}.q_proj"]
    lm.merge(tmp_path / "base", [tmp_path / "x3", tmp_path / "q"], tmp_path / "out2", **options_of(method))
    got = load_file(tmp_path / "out2" / "model.safetensors")[f"{at}.c_attn.weight"]
    names = {"": (f"{at}.c_attn[0+8x24,0:8:1]", slice(0, 8)), "rest": (f"{at}.c_attn[0+8x24,8:24:1]", slice(8, 24))}
    for which, (module, taken) in names.items():
        two = ALPHA / 2 * (b @ a).numpy() if not which else np.zeros((16, 8))
        M = wanted(
            method, [ds[0][taken], two], [content_key(*pairs[0]), content_key(b, a)], [3, 0 if which else 2], module,
            all_options(method),
        )  # fmt: skip
        close(got[:, taken], base[:, taken].double() + torch.from_numpy(M).T, torch.full((1, 1), 20.0))


# --- every kind of update ------------------------------------------------------------------------------------


KINDS = [case for case in lycoris_methods.ALGORITHMS if case[0] != "lora" or case[1]]
LOW = ("body.linear", "body.square", "body.conv")


def two_kinds(algorithm: str, options: dict[str, Any], tmp: Path) -> tuple[dict[str, Tensor], dict[Path, float]]:
    """A small network in float64, an adapter of some kind and a plain one for it."""
    _, bare, saved = lycoris_methods.trained(algorithm, options)
    save_file(saved, tmp / "kind.safetensors")
    tensors = {name: tensor.double() for name, tensor in bare.state_dict().items()}
    lora(tmp / "plain", {name: tuple(tensors[f"{name}.weight"].shape) for name in LOW}, 2, 4)
    return tensors, {tmp / "kind.safetensors": 0.8, tmp / "plain": -0.6}


def changes(tensors: dict[str, Tensor], adapters: Mapping[Path, float]) -> list[dict[str, Tensor]]:
    """What each adapter alone does to each tensor, as a matrix of rows."""
    found = []
    for path, weight in adapters.items():
        merged = lm.merge_tensors(tensors, {path: weight}, compute_dtype="float64")
        found.append({n: (merged[n] - t).reshape(t.shape[0], -1) for n, t in tensors.items()})
    return found


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=str)
def test_elementwise_methods_take_every_kind(
    method: str, algorithm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tensors, adapters = two_kinds(algorithm, options, tmp_path)
    each = changes(tensors, adapters)
    got = lm.merge_tensors(tensors, adapters, compute_dtype="float64", **options_of(method))
    for name, tensor in tensors.items():
        ds = [own[name].numpy() for own in each]
        if not any(np.abs(d).max() > 1e-9 for d in ds):
            assert torch.equal(got[name], tensor)
            continue
        M = wanted(method, ds, [], [], "", all_options(method))
        off = np.abs((got[name] - tensor).reshape(len(tensor), -1).numpy() - M) > 1e-9
        assert off.sum() == 0
        assert np.abs(M).max() > 1e-3


@pytest.mark.parametrize("method", ["tsv", "karcher", "knots"])
@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=str)
def test_methods_in_the_core_take_every_kind_that_adds(
    method: str, algorithm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tensors, adapters = two_kinds(algorithm, options, tmp_path)
    if "dora_wd" in options or algorithm in ("diag-oft", "boft", "glora", "ia3"):
        with pytest.raises(lm.LoramergeError) as caught:
            lm.merge_tensors(tensors, adapters, **options_of(method))
        assert caught.value.code == "method.needs-factors" and "ties" in caught.value.fix
        return
    each = changes(tensors, adapters)
    got = lm.merge_tensors(tensors, adapters, compute_dtype="float64", **options_of(method))
    for name, tensor in tensors.items():
        ds = [own[name].numpy() for own in each]
        if not any(np.abs(d).max() > 1e-9 for d in ds):
            assert torch.equal(got[name], tensor)
            continue
        ranks = [int(np.linalg.matrix_rank(d, tol=1e-9)) for d in ds]
        M = wanted(method, ds, [b"", b""], ranks, "", all_options(method))
        assert np.abs((got[name] - tensor).reshape(len(tensor), -1).numpy() - M).max() < 1e-8, name


def test_kinds_that_look_at_the_weight_come_back_too(tmp_path: Path) -> None:
    tensors, adapters = two_kinds("lora", {"dora_wd": True}, tmp_path)
    base = tmp_path / "base.safetensors"
    save_file({n: t.bfloat16() for n, t in tensors.items()}, base)
    lm.merge(base, adapters, tmp_path / "out.safetensors", reversible=True, method="ties")
    again = lm.merge_tensors(load_file(base), adapters, method="ties")
    got = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(got[n], again[n]) for n in got)
    lm.unmerge(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    with pytest.raises(lm.LoramergeError) as caught:
        (tmp_path / "out.loramerge.undo").unlink()
        lm.unmerge(tmp_path / "out.safetensors", tmp_path / "back2.safetensors", inexact=True)
    assert caught.value.code == "unmerge.not-additive"


def test_what_is_brought_whole_is_taken_as_a_sum_takes_it(tmp_path: Path) -> None:
    case = Case(tmp_path, names=("one", "two"))
    path = tmp_path / "one"
    tensors = load_file(path / "adapter_model.safetensors")
    tensors["base_model.model.a.norm.weight"] = random((24,), 5)
    save_file(tensors, path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["norm"]}))
    receipt = lm.merge(case.base, case.adapters, tmp_path / "out.safetensors", method="ties")
    norm = load_file(tmp_path / "out.safetensors")["a.norm.weight"]
    was = case.tensors["a.norm.weight"]
    assert torch.allclose(norm, was + 0.7 * (tensors["base_model.model.a.norm.weight"] - was), atol=1e-6)
    assert any("a.norm.weight" in note and "ties" in note for note in receipt.notes)


# --- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "given", "code", "says"),
    [
        ("tiess", {}, "usage.method", "ties"),
        ("ties", {"density": 0}, "usage.method-option", "density"),
        ("ties", {"p": 0.5}, "usage.method-option", "dare"),
        ("dare", {"p": 1}, "usage.method-option", "below 1"),
        ("della", {}, "usage.method-option", "density"),
        ("slerp", {}, "usage.method-adapters", "2"),
    ],
    ids=str,
)
def test_a_method_that_makes_no_sense(method: str, given: dict[str, Any], code: str, says: str, tmp_path: Path) -> None:
    case = Case(tmp_path)
    for run in (
        lambda: lm.merge(case.base, case.adapters, tmp_path / "out.safetensors", method=method, method_options=given),
        lambda: lm.plan_merge(
            case.base, case.adapters, tmp_path / "x.safetensors", method=method, method_options=given
        ),
        lambda: lm.merge_tensors(case.tensors, case.adapters, method=method, method_options=given),
        lambda: lm.Switcher(dict(case.tensors)).apply(case.adapters, method=method, method_options=given),
    ):
        with pytest.raises(lm.LoramergeError) as caught:
            run()
        assert caught.value.code == code and caught.value.exit_code == 2
        assert says in f"{caught.value.message} {caught.value.fix}"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("method", ["ties", "tsv", "dare"])
def test_factors_that_are_not_finite(method: str, tmp_path: Path) -> None:
    case = Case(tmp_path)
    path = tmp_path / "two" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.a.tall.lora_A.weight"][1, 2] = math.nan
    save_file(tensors, path)
    with pytest.raises(lm.LoramergeError) as caught:
        case.merge(**options_of(method))
    assert caught.value.code == "adapter.non-finite" and not (tmp_path / "out.safetensors").exists()


def test_updates_too_large_for_a_threshold(tmp_path: Path) -> None:
    lora(tmp_path / "x", {"a.square": (24, 24)}, 2, 1)
    path = tmp_path / "x" / "adapter_model.safetensors"
    save_file({k: t * 1e30 for k, t in load_file(path).items()}, path)
    save_file({"a.square.weight": random((24, 24), 0)}, tmp_path / "base.safetensors")
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(tmp_path / "base.safetensors", tmp_path / "x", tmp_path / "out.safetensors", method="ties")
    assert caught.value.code == "method.failed" and "a.square" in caught.value.message


@pytest.mark.parametrize(("ranks", "code"), [((2, 3), "method.ranks"), ((2, 2), "")])
def test_methods_on_factors_need_equal_ranks(ranks: tuple[int, int], code: str, tmp_path: Path) -> None:
    for i, rank in enumerate(ranks):
        lora(tmp_path / str(i), {"a.square": (24, 24)}, rank, i)
    save_file({"a.square.weight": random((24, 24), 0)}, tmp_path / "base.safetensors")
    adapters = [tmp_path / "0", tmp_path / "1"]
    if not code:
        lm.merge(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors", method="peft-linear")
        return
    with pytest.raises(lm.LoramergeError) as caught:
        lm.plan_merge(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors", method="peft-linear")
    assert caught.value.code == code


def test_nothing_left_is_said_and_copies_the_bytes(tmp_path: Path) -> None:
    lora(tmp_path / "x", {"a.square": (24, 24)}, 2, 1)
    weight = random((24, 24), 0)
    weight[0] = -0.0
    save_file({"a.square.weight": weight}, tmp_path / "base.safetensors")
    adapters = [(tmp_path / "x", 1.0), (tmp_path / "x", -1.0)]
    for method in ("iso_c", "tsv", "svc", "wudi"):
        out = tmp_path / f"{method}.safetensors"
        receipt = lm.merge(tmp_path / "base.safetensors", adapters, out, method=method)
        got = load_file(out)["a.square.weight"]
        assert torch.equal(got.view(torch.int32), weight.view(torch.int32)), method
        assert any("zero" in note for note in receipt.notes)


# --- the way back does not hang on how numbers are summed ----------------------------------------------------


def otherwise(self: Any, start: int, stop: int) -> Tensor:
    """`Factors.rows` as another library may sum it: ranks in the other order, one row at a time."""
    b, a = self.b[start:stop].flip(1), self.a.flip(0)
    return torch.stack([(row[:, None] * a).sum(0) for row in b]) if len(b) else b @ a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "trim": "adapter"}),
        ("magnitude", {"density": 0.3}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
        ("dare", {"p": 0.5}),
        ("dare_ties", {"p": 0.5}),
        ("della", {"density": 0.5}),
    ],
    ids=str,
)
def test_other_sums_bring_the_same_back(
    method: str, given: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, dtype)
    base = folder_of(case)
    lm.merge(base, case.adapters, tmp_path / "out", reversible=True, method=method, method_options=given)
    data = open_undo(tmp_path / "out" / "loramerge.undo", "").tensors["a.square.weight"]
    assert data.how == ("xor" if method == "della" else "candidates")
    with monkeypatch.context() as m:
        m.setattr("loramerge.algebra.core.Factors.rows", otherwise)
        lm.unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [*FACTORED, "peft-linear"])
def test_the_undo_file_holds_what_decompositions_gave(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_for(method, tmp_path, torch.bfloat16)
    if method == "peft-linear":
        shutil.rmtree(tmp_path / "two")
        lora(tmp_path / "two", {"a.square": (24, 24)}, RANKS["one"], 9)
        case.adapters = {tmp_path / "one": 0.7, tmp_path / "two": 0.3}
    base = folder_of(case)
    lm.merge(base, case.adapters, tmp_path / "out", reversible=True, **options_of(method))

    def never(*_: Any) -> None:
        raise AssertionError("a decomposition was made again")

    monkeypatch.setattr("loramerge.merging.mixing.product", never)
    assert open_undo(tmp_path / "out" / "loramerge.undo", "").tensors["a.square.weight"].how == "candidates"
    lm.unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_same_merge_writes_the_same_undo_file(tmp_path: Path) -> None:
    case = Case(tmp_path, torch.bfloat16)
    base = folder_of(case)
    for method in ("tsv", "ties"):
        files = []
        for jobs in (1, 3):
            out = tmp_path / f"{method}{jobs}"
            lm.merge(base, case.adapters, out, reversible=True, jobs=jobs, **options_of(method))
            files.append([(out / name).read_bytes() for name in ("loramerge.undo", "loramerge.json")])
        assert files[0] == files[1]


def test_factors_that_came_out_otherwise_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that are not kept are made again for the undo file: were they others, it would bring back nonsense."""
    case = Case(tmp_path)
    calls = []

    def unsteady(*arguments: Any) -> Any:
        b, a, distance = product(*arguments)
        calls.append(1)
        return b * (1 + 1e-6 * len(calls)), a, distance

    product = mixing.product
    monkeypatch.setattr(mixing, "product", unsteady)
    monkeypatch.setattr("loramerge.merging.products.KEPT_BYTES", 1)
    with pytest.raises(lm.LoramergeError) as caught:
        case.merge(method="tsv", reversible=True, jobs=1)
    assert caught.value.code == "method.unsteady" and not (tmp_path / "out.safetensors").exists()
    monkeypatch.setattr(mixing, "product", product)
    case.merge(method="tsv", reversible=True, jobs=1)
    lm.unmerge(tmp_path / "out.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == case.base.read_bytes()


def test_an_update_that_somebody_made_up(tmp_path: Path) -> None:
    case = Case(tmp_path)
    plan = lm.plan_merge(case.base, case.adapters, tmp_path / "x.safetensors", method="ties")
    (update,) = next(s.updates for s in plan.steps if s.tensor == "a.square.weight")
    data = json.loads(json.dumps(to_data(update)))
    assert to_data(from_data(data)) == to_data(update)
    for wrong in (
        {"method": "tsv"}, {"options": {"density": 2}}, {"part": 7}, {"of": []}, {"adapters": 1}, {"view": None},
        {"of": [{"adapter": 0, "updates": []}]}, {"thresholds": ["x"]},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            from_data({**data, **wrong})


# --- every layout: methods whose result is known whatever the update is --------------------------------------


def weighted_sum(tensors: dict[str, Tensor], paths: Sequence[Path], weights: Sequence[float], **options: Any) -> Any:
    """`W + sum w_i (W'_i - W)` from merges of one adapter each, and the names that change."""
    total = {name: tensor.clone() for name, tensor in tensors.items()}
    for path, weight in zip(paths, weights, strict=True):
        merged = lm.merge_tensors(tensors, {path: weight}, compute_dtype="float64", **options)
        for name in total:
            total[name] += merged[name] - tensors[name]
    return total


@pytest.mark.parametrize("sample", dialects.samples(), ids=lambda s: s.name)
def test_files_of_every_dialect(sample: dialects.Sample, tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in dialects.base().items()}
    paths = [sample.write(tmp_path / n) for n in ("x", "y")]
    options: dict[str, Any] = {"allow_pickle": True, "alpha": 1.0 if sample.dialect == "loralib" else None}
    both = list(zip(paths, (0.8, -0.3), strict=True))

    def check(method: str, given: dict[str, Any], wanted: dict[str, Tensor], names: set[str]) -> None:
        got = lm.merge_tensors(tensors, both, compute_dtype="float64", method=method, method_options=given, **options)
        for name in names:
            assert torch.allclose(got[name], wanted[name], atol=1e-9), (method, name)

    whole = weighted_sum(tensors, paths, (0.8, -0.3), **options)
    changed = {n for n in tensors if not torch.equal(whole[n], tensors[n])}
    assert changed or sample.name == "kohya-oft"  # whose constraint is 0: it trains nothing
    check("magnitude", {"density": 1.0}, whole, set(tensors))
    adds = True
    try:
        # The second update is -0.375 of the first: on the straight line between them.
        line = weighted_sum(tensors, paths, (0.75 * 0.8, -0.25 * 0.3), **options)
        check("slerp", {"t": 0.25}, line, {n for n in tensors if tensors[n].squeeze().dim() > 1})
    except lm.LoramergeError as error:
        assert error.code == "method.needs-factors"
        adds = False
    if adds:
        alone = weighted_sum(tensors, paths[:1], (0.8,), **options)  # its sign is everywhere that of the sum
        check("ties", {"density": 1.0}, alone, changed)


MODELS = ("gpt2-all", "phi3-all", "gpt_oss-all", "falcon_new-all")


@pytest.mark.parametrize("case", [c for c in zoo.CASES if c.id in MODELS], ids=lambda c: c.id)
def test_adapters_of_models(case: zoo.Case, tmp_path: Path) -> None:
    """Turned and fused weights, embeddings, experts in one tensor."""
    lab = zoo.Lab(tmp_path)
    base = lab.base(case.arch, **case.sizes)
    adapter = lab.adapter(base, case.cls, case.options, saving=case.saving)
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    tensors = {k: t.double() for f in sorted(base.glob("*.safetensors")) for k, t in load_file(f).items()}
    config = json.loads((base / "config.json").read_text())
    both = [(adapter, 0.8), (copy, -0.3)]
    for method, given, weights in (
        ("magnitude", {"density": 1.0}, (0.8, -0.3)),
        ("slerp", {"t": 0.25}, (0.6, -0.075)),
        ("ties", {"density": 1.0}, (0.8, 0.0)),
    ):
        wanted = weighted_sum(tensors, (adapter, copy), weights, config=config)
        got = lm.merge_tensors(
            tensors, both, config=config, compute_dtype="float64", method=method, method_options=given
        )
        names = [n for n in tensors if tensors[n].squeeze().dim() > 1]
        assert any(not torch.equal(got[n], tensors[n]) for n in names)
        for name in names:
            assert torch.allclose(got[name], wanted[name], atol=1e-9), (method, name)


# --- memory --------------------------------------------------------------------------------------------------


def test_the_plan_counts_what_the_undo_file_and_thresholds_take(tmp_path: Path) -> None:
    case = Case(tmp_path)
    base = folder_of(case)

    def memory(name: str, jobs: int = 3, **options: Any) -> int:
        return lm.plan_merge(base, case.adapters, tmp_path / name, **options).memory(jobs)

    elements = 37 * 11
    assert memory("x", reversible=True) - memory("x") >= 3 * 32 * elements
    assert memory("x", method="ties") - memory("x") >= 3 * 40 * elements
    assert memory("x", method="ties", reversible=True) - memory("x", method="ties") >= 3 * 110 * elements
    assert memory("x", method="tsv") >= memory("x")
    lm.merge(base, case.adapters, tmp_path / "out", reversible=True)
    back = lm.plan_unmerge(tmp_path / "out", tmp_path / "back").memory(3)
    switch = lm.plan_switch(tmp_path / "out", tmp_path / "one", tmp_path / "back").memory(3)
    assert back - lm.plan_unmerge(tmp_path / "out", tmp_path / "back", base=base).memory(3) >= 3 * 32 * elements
    assert switch >= back


@pytest.mark.parametrize("method", [name for name in ON_UPDATES if name != "linear"])
def test_merging_is_combining_and_then_merging(method: str, tmp_path: Path) -> None:
    """`combine` writes an adapter of what `merge` adds, where its rank is that of the result."""
    case = case_for(method, tmp_path)
    straight = case.merge(compute_dtype="float64", **options_of(method))
    rank = {"rank": 32} if METHODS[method].space else {}
    lm.combine(case.adapters, tmp_path / "combined", **rank, **options_of(method))
    lm.merge(case.base, tmp_path / "combined", tmp_path / "two.safetensors", compute_dtype="float64")
    two = load_file(tmp_path / "two.safetensors")
    for name in straight:
        assert torch.allclose(straight[name], two[name], atol=2e-5), name
    assert any(not torch.equal(straight[name], case.tensors[name]) for name in straight)


@pytest.mark.parametrize("method", ["ties", "della", "tsv"])
def test_the_way_over_another_device(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, torch.float16)
    usual = case.merge(**options_of(method))
    used = []

    def lane(run: Any) -> lanes.Lane:
        used.append(1)
        return lanes.DeviceLane(hashing.BLOCK_BYTES, hashing.BLOCK_BYTES, run.dtype, torch.device("cpu"))

    monkeypatch.setattr(stream._Run, "_lane", lane)
    over = case.merge("over.safetensors", **options_of(method))
    assert used and all(torch.equal(usual[name], over[name]) for name in usual)


@pytest.mark.parametrize(
    ("method", "size", "share"), [("ties", 1.0, 0.99999), ("dare", 1.0, 0.99999), ("karcher", 0.1, 0.9999)], ids=str
)
def test_float16_is_rounded_from_float64(method: str, size: float, share: float, tmp_path: Path) -> None:
    """One sum in 8192 falls between two float16 numbers in float32: those are summed again, from factors in float32
    where a method keeps to factors (`size` is about that of the update beside the weight), else from float64."""
    torch.manual_seed(0)
    base = {"m.weight": torch.randn(300, 200).half()}
    pairs = [lora(tmp_path / n, {"m": (300, 200)}, r, r)["m"] for n, r in (("x", 3), ("y", 2))]
    save_file(base, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    adapters = {tmp_path / "x": size, tmp_path / "y": size}
    lm.merge(tmp_path / "base.safetensors", adapters, out, **options_of(method))
    ds = [size * ALPHA / r * (b @ a).numpy() for (b, a), r in zip(pairs, (3, 2), strict=True)]
    M = wanted(method, ds, [content_key(*p) for p in pairs], [3, 2], "m", all_options(method))
    truth = base["m.weight"].double() + torch.from_numpy(M)
    got = load_file(out)["m.weight"]
    near = torch.stack([truth.half(), torch.nextafter(truth.half(), got), torch.nextafter(truth.half(), -got)]).double()
    best = (near - truth).abs().min(0).values
    assert ((got.double() - truth).abs() <= best).double().mean() >= share


def test_places_without_common_parts_are_refused() -> None:
    """One adapter sees a square weight as it lies, another turned; or rows of different lengths."""

    def low(adapter: int, place: Place, flipped: bool) -> LowRank:
        part = Part("w.weight", place, flipped, (Take(0, place.width if flipped else place.rows),))
        return LowRank(adapter, f"m{adapter}", "A", "B", 1.0, 2, Pick(), part)

    whole, rows, grid = Place(0, 6, 6, 0, 6), Place(6, 2, 6, 0, 6), Place(0, 4, 9, 0, 9)
    for other, flipped in ((whole, True), (grid, False)):
        with pytest.raises(lm.LoramergeError) as caught:
            sites_of({"w.weight": [low(0, whole, False), low(1, other, flipped)]}, {"w.weight": (6, 6)}, 2)
        assert caught.value.code == "method.layout" and caught.value.exit_code == 3 and "linear" in caught.value.fix
    three = sites_of({"w.weight": [low(0, whole, False), low(1, rows, False)]}, {"w.weight": (6, 6)}, 2)
    assert [[len(of) for of in site.members] for site in three] == [[1, 0], [1, 1]]
    assert [[part.place.begin for part in site.view.parts] for site in three] == [[0, 18], [6]]
