"""Which updates belong together: by name across dialects, through a base, of every kind; and what is left out, why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_zoo import Array, phi, retention, svd
from safetensors.torch import save_file
from torch import Tensor

import loramerge as lm
from loramerge.errors import LoramergeError, UnsupportedError, UsageError

CLOSE = {"rel": 1e-8, "abs": 1e-12}
SHAPES = {"model.layers.0.self_attn.q_proj": (12, 12), "model.layers.1.mlp.up_proj": (20, 12)}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peft(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """PEFT's layout; names are those after `base_model.model.`."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def pair(module: str, m: int, n: int, r: int, seed: int) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": noise(r, n, seed=seed),
        f"{module}.lora_B.weight": noise(m, r, seed=seed + 1),
    }


def delta(tensors: Mapping[str, Tensor], module: str, scale: float) -> Array:
    B, A = (tensors[f"{module}.lora_{x}.weight"].double().numpy() for x in "BA")
    made: Array = scale * (B @ A)
    return made


def only(data: dict[str, Any]) -> dict[str, Any]:
    (row,) = data["modules"]
    found: dict[str, Any] = row
    return found


def same_spectrum(said: Mapping[str, Any], D: Array) -> None:
    assert said["singular_values"] == pytest.approx(list(svd(D)[1]), **CLOSE)
    assert said["norm"] == pytest.approx(np.linalg.norm(D), **CLOSE)


# ------------------------------------------------------------------------------------------------ by name


def test_modules_are_paired_across_dialects_and_prefixes(tmp_path: Path) -> None:
    one = {k: v for at, (n, (m, k_)) in enumerate(SHAPES.items()) for k, v in pair(n, m, k_, 2, at).items()}
    first = peft(tmp_path / "peft", one)
    # The same model without its head, as a trainer of the body alone names it.
    shorter = peft(tmp_path / "short", {k.removeprefix("model."): 2 * v for k, v in one.items()})
    flat = {}
    for key, tensor in one.items():
        module, _, factor = key.rpartition(".lora_")
        name = {"A": "lora_down", "B": "lora_up"}[factor[0]]
        flat[f"lora_unet_{module.replace('.', '_')}.{name}.weight"] = tensor
        flat[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(4.0)
    save_file(flat, tmp_path / "flat.safetensors")
    data = lm.analyze([first, shorter, tmp_path / "flat.safetensors"])
    assert [row["module"] for row in data["modules"]] == list(SHAPES)
    for row in data["modules"]:
        D = delta(one, row["module"], 1.0)
        for update, scale in zip(row["updates"], (3, 3 * 4, 2), strict=True):
            same_spectrum(update, scale * D)
        assert [p["cosine"] for p in row["pairs"]] == pytest.approx([1, 1, 1], abs=1e-12)
        # The sum is (3 + 12 + 2) D.
        kept = [u["survival"]["kept"] for u in row["updates"]]
        assert kept == pytest.approx([17 / 3, 17 / 12, 17 / 2], **CLOSE)


def test_what_has_no_partner_stands_alone(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", pair("layers.0.q", 6, 8, 2, 1))
    b = peft(tmp_path / "b", pair("layers.1.q", 6, 8, 2, 3))
    data = lm.analyze([a, b])
    assert [[u is not None for u in row["updates"]] for row in data["modules"]] == [[True, False], [False, True]]
    (between,) = data["pairs"]
    assert (between["modules"], between["cosine"], between["phi"]) == (0, 0.0, {})
    assert "change no module in common" in data["summary"][-1]


def test_another_shape_under_one_name_is_told(tmp_path: Path) -> None:
    a = peft(tmp_path / "a", pair("layers.0.q", 6, 8, 2, 1))
    b = peft(tmp_path / "b", {**pair("layers.0.q", 6, 9, 2, 3), **pair("layers.1.q", 6, 8, 2, 3)})
    data = lm.analyze([a, b])
    assert [(s["adapter"], s["module"]) for s in data["skipped"]] == [(1, "layers.0.q")]
    assert "6x9" in data["skipped"][0]["reason"] and "6x8" in data["skipped"][0]["reason"]


def test_layers_come_in_their_order(tmp_path: Path) -> None:
    tensors = {k: v for n in (10, 2, 1) for k, v in pair(f"layers.{n}.q", 4, 4, 1, n).items()}
    data = lm.analyze(peft(tmp_path / "a", tensors, r=1))
    assert [row["module"] for row in data["modules"]] == ["layers.1.q", "layers.2.q", "layers.10.q"]


def test_include_and_exclude(tmp_path: Path) -> None:
    tensors = {k: v for n in range(3) for k, v in pair(f"layers.{n}.q", 4, 4, 2, n).items()}
    where = peft(tmp_path / "a", tensors)
    data = lm.analyze(where, include=["layers.*"], exclude=["*.1.*"])
    assert [row["module"] for row in data["modules"]] == ["layers.0.q", "layers.2.q"]
    assert data["adapters"][0]["parameters"] == data["adapters"][0]["theta"] == 2 * 2 * (4 + 4)
    with pytest.raises(UsageError, match="no module"):
        lm.analyze(where, include=["nothing"])


# ------------------------------------------------------------------------------------------------ kinds


def test_hadamard_and_kronecker_products_are_exact(tmp_path: Path) -> None:
    loha = {
        "hada_w1_a": noise(10, 2, seed=1),
        "hada_w1_b": noise(2, 14, seed=2),
        "hada_w2_a": noise(10, 2, seed=3),
        "hada_w2_b": noise(2, 14, seed=4),
    }
    lokr = {"lokr_w1": noise(2, 3, seed=5), "lokr_w2_a": noise(5, 2, seed=6), "lokr_w2_b": noise(2, 4, seed=7)}
    tensors = {f"lycoris_layer_a.{k}": v for k, v in loha.items()} | {
        f"lycoris_layer_b.{k}": v for k, v in lokr.items()
    }
    tensors |= {"lycoris_layer_a.alpha": torch.tensor(1.0), "lycoris_layer_b.alpha": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "lycoris.safetensors")
    data = lm.analyze(tmp_path / "lycoris.safetensors")
    n = {k: v.double().numpy() for k, v in (loha | lokr).items()}
    want = {
        "a": 0.5 * (n["hada_w1_a"] @ n["hada_w1_b"]) * (n["hada_w2_a"] @ n["hada_w2_b"]),
        "b": 1.5 * np.kron(n["lokr_w1"], n["lokr_w2_a"] @ n["lokr_w2_b"]),
    }
    assert [row["module"][-1] for row in data["modules"]] == ["a", "b"]
    for row in data["modules"]:
        (said,) = row["updates"]
        same_spectrum(said, want[row["module"][-1]])
        assert said["by_factors"] is False
    assert data["adapters"][0]["free"] is None
    # Beside low-rank pairs, and against weights.
    held = pair("layer.a", 10, 14, 2, 20) | pair("layer.b", 10, 12, 2, 30)
    other = peft(tmp_path / "other", held, lora_alpha=2)
    W = {"a": noise(10, 14, seed=40), "b": noise(10, 12, seed=41)}
    save_file({f"layer.{name}.weight": w for name, w in W.items()}, tmp_path / "base.safetensors")
    for base in (None, tmp_path / "base.safetensors"):
        data = lm.analyze({tmp_path / "lycoris.safetensors": -2.0, other: 1.0}, base=base, points=0)
        assert [row["module"][-1] for row in data["modules"]] == ["a", "b"]
        for row in data["modules"]:
            name = row["module"][-1]
            D1, D2 = -2 * want[name], delta(held, f"layer.{name}", 1.0)
            between = row["pairs"][0]
            assert between["inner"] == pytest.approx((D1 * D2).sum(), rel=1e-8)
            U1, U2 = svd(D1)[0], svd(D2)[0]
            last = between["phi"]["left"]["phi"][-1][-1]
            assert last == pytest.approx(phi(U1, U2, U1.shape[1], U2.shape[1]), rel=1e-8)
            assert set(between["phi"]) == {"left", "right"}
            lost = 1 - np.abs(D1 + D2).sum() / (np.abs(D1) + np.abs(D2)).sum()
            assert between["cancelled"] == pytest.approx(lost, rel=1e-8)
            if base is not None:
                against_dense(row, 0, D1, W[name].double().numpy())


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    tensors = {
        "conv.lora_A.weight": noise(2, 3, 3, 3, seed=1),
        "conv.lora_B.weight": noise(7, 2, 1, 1, seed=2),
        "embed_tokens.lora_embedding_A": noise(2, 11, seed=3),
        "embed_tokens.lora_embedding_B": noise(6, 2, seed=4),
    }
    data = lm.analyze(peft(tmp_path / "a", tensors))
    rows = {row["module"]: row for row in data["modules"]}
    f = {k: v.double().numpy() for k, v in tensors.items()}
    conv = 3 * f["conv.lora_B.weight"].reshape(7, 2) @ f["conv.lora_A.weight"].reshape(2, 27)
    same_spectrum(rows["conv"]["updates"][0], conv)
    assert rows["conv"]["shape"] == [7, 27]
    embedding = 3 * f["embed_tokens.lora_embedding_B"] @ f["embed_tokens.lora_embedding_A"]
    same_spectrum(rows["embed_tokens"]["updates"][0], embedding)


def test_what_depends_on_the_weight_is_named_and_skipped(tmp_path: Path) -> None:
    dora = pair("layers.0.q", 6, 8, 2, 1) | {"layers.0.q.lora_magnitude_vector": noise(6, seed=5).abs()}
    a = peft(tmp_path / "dora", dora, use_dora=True)
    b = peft(tmp_path / "plain", pair("layers.0.q", 6, 8, 2, 3))
    save_file({"layers.0.q.weight": noise(6, 8, seed=9)}, tmp_path / "base.safetensors")
    for base in (None, tmp_path / "base.safetensors"):
        data = lm.analyze([a, b], base=base)
        assert [u is not None for u in only(data)["updates"]] == [False, True]
        assert [(s["adapter"], s["module"], s["reason"]) for s in data["skipped"]] == [
            (0, "layers.0.q", "its change depends on the weight, so that it has no factors of its own")
        ]
    with pytest.raises(UnsupportedError, match="depends on the weight") as caught:
        lm.analyze(a)
    assert (caught.value.code, caught.value.exit_code) == ("analyze.unsupported", 3)


def test_ill_conditioned_factors_keep_their_digits(tmp_path: Path) -> None:
    """Columns that nearly agree: beyond what a Gram matrix could tell."""
    r = 4
    A = noise(r, 30, seed=1).double()
    B = noise(20, r, seed=2).double()
    B[:, 1] = B[:, 0] + 1e-7 * B[:, 1]
    A[3] = A[2] + 1e-6 * A[3]
    tensors = {"layers.0.q.lora_A.weight": A, "layers.0.q.lora_B.weight": B}
    said = only(lm.analyze(peft(tmp_path / "a", tensors, r=r, lora_alpha=r)))["updates"][0]
    want = np.linalg.svd(B.numpy() @ A.numpy())[1][:r]
    assert want[-1] / want[0] < 1e-6
    # Both have the errors of float64 relative to the largest value.
    assert said["singular_values"] == pytest.approx(list(want), rel=1e-8, abs=1e-14 * want[0])


def test_a_rank_that_nothing_uses_is_free(tmp_path: Path) -> None:
    """Rank 6 stored, 2 used; in bfloat16 what is below its roundoff is free too."""
    B, A = noise(16, 6, seed=1), noise(6, 12, seed=2)
    B[:, 2:] = 0
    B[:, 2] = 1e-4 * noise(16, seed=3)
    exact = peft(tmp_path / "f32", {"l.lora_A.weight": A, "l.lora_B.weight": B}, r=6, lora_alpha=6)
    rough = {"l.lora_A.weight": A.bfloat16(), "l.lora_B.weight": B.bfloat16()}
    coarse = peft(tmp_path / "bf16", rough, r=6, lora_alpha=6)
    data = lm.analyze(exact)
    said = only(data)["updates"][0]
    assert (said["stored_rank"], said["rank"], said["free_rank"], said["dtype"]) == (6, 3, 3, "F32")
    assert data["adapters"][0]["free"] == {"modules": 1, "parameters": 3 * 28, "share": 0.5}
    assert "a lower rank would cost nothing in 1 module and save 50 %" in " ".join(data["summary"])
    assert only(lm.analyze(coarse))["updates"][0]["free_rank"] == 2


@pytest.mark.parametrize("zero", ["weight", "factor"])
def test_an_update_of_nothing_has_no_numbers_that_json_has_not(tmp_path: Path, zero: str) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj", 6, 8, 2, 1)
    other = pair("model.layers.0.self_attn.q_proj", 6, 8, 2, 5)
    if zero == "factor":
        tensors = {k: t if "lora_A" in k else torch.zeros_like(t) for k, t in tensors.items()}
    a, b = peft(tmp_path / "a", tensors), peft(tmp_path / "b", other)
    save_file({"model.layers.0.self_attn.q_proj.weight": noise(6, 8, seed=9)}, tmp_path / "base.safetensors")
    weights = {a: 0.0 if zero == "weight" else 1.0, b: 1.0}
    data = lm.analyze(weights, base=tmp_path / "base.safetensors", html=tmp_path / "page.html")
    row = only(data)
    nothing, something = row["updates"]
    assert (nothing["rank"], nothing["norm"], nothing["singular_values"], nothing["free_rank"]) == (0, 0, [], 0)
    assert nothing["amplification"]["factor"] is None and nothing["retention"]["keep"] is None
    assert row["pairs"][0]["cosine"] is None and data["pairs"][0]["cosine"] is None
    assert something["survival"]["kept"] == pytest.approx(1)
    json.dumps(data, allow_nan=False)


# ------------------------------------------------------------------------------------------------ through a base


def against_dense(row: dict[str, Any], at: int, D: Array, W: Array) -> None:
    """What a base adds, for one update."""
    said = row["updates"][at]
    same_spectrum(said, D)
    U, _, V = svd(D)
    projection = np.linalg.norm(U.T @ W @ V)
    assert said["relative_norm"] == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), **CLOSE)
    assert said["amplification"]["projection"] == pytest.approx(projection, **CLOSE)
    assert row["base"]["norm"] == pytest.approx(np.linalg.norm(W), **CLOSE)
    assert said["retention"]["float32"] == pytest.approx(1, abs=1e-4)
    held = len(row["base"]["singular_values"])
    UW, SW, VW = svd(W, held)
    assert row["base"]["singular_values"] == pytest.approx(list(SW[:held]), **CLOSE)
    table = said["base_directions"]
    left = [[phi(UW, U, i, j) for j in table["j"]] for i in table["i"]]
    right = [[phi(VW, V, i, j) for j in table["j"]] for i in table["i"]]
    assert np.allclose(table["left"], left, rtol=1e-8, atol=1e-12)
    assert np.allclose(table["right"], right, rtol=1e-8, atol=1e-12)


def test_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    """GPT-2 keeps (in, out)."""
    name, n, m = "h.0.mlp.c_fc", 10, 14
    W = noise(n, m, seed=1)
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": W, "wte.weight": noise(7, n, seed=2)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tensors = pair(f"transformer.{name}", m, n, 3, 5)
    where = peft(tmp_path / "a", tensors, r=3, lora_alpha=3, fan_in_fan_out=True)
    row = only(lm.analyze(where, base=tmp_path / "base"))
    assert row["shape"] == [m, n]
    against_dense(row, 0, delta(tensors, f"transformer.{name}", 1.0), W.T.double().numpy())


HEADS, KV, HD, IN = 4, 2, 3, 10
ROWS = {"q_proj": HEADS * HD, "k_proj": KV * HD, "v_proj": KV * HD}


def test_a_fused_weight_and_its_parts_meet_in_the_base(tmp_path: Path) -> None:
    """One adapter trained the fused weight, another its parts: the base says which rows are which."""
    fused = "model.layers.0.self_attn.qkv_proj"
    W = noise(sum(ROWS.values()), IN, seed=1)
    (tmp_path / "base").mkdir()
    save_file({f"{fused}.weight": W}, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "phi3", "num_attention_heads": HEADS, "num_key_value_heads": KV}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    whole = pair(fused, W.shape[0], IN, 3, 10)
    parts = {
        k: v
        for at, (p, m) in enumerate(ROWS.items())
        for k, v in pair(fused.replace("qkv_proj", p), m, IN, 2, 20 + at).items()
    }
    a = peft(tmp_path / "whole", whole, r=3, lora_alpha=3)
    b = peft(tmp_path / "parts", parts, r=2, lora_alpha=2)
    D1 = delta(whole, fused, 1.0)
    D2 = np.concatenate([delta(parts, fused.replace("qkv_proj", p), 1.0) for p in ROWS])
    row = only(lm.analyze([a, b], base=tmp_path / "base", points=0))
    assert (row["module"], row["shape"]) == (fused, list(W.shape))
    for at, D in enumerate((D1, D2)):
        against_dense(row, at, D, W.double().numpy())
    assert row["pairs"][0]["inner"] == pytest.approx(float((D1 * D2).sum()), rel=1e-8)
    # Alone, the parts are units of their own.
    alone = lm.analyze(b, base=tmp_path / "base")["modules"]
    assert [tuple(r["shape"]) for r in alone] == [(ROWS[p], IN) for p in ("k_proj", "q_proj", "v_proj")]
    at = 0
    for p, m in ROWS.items():
        one = next(r for r in alone if r["module"].endswith(p))
        against_dense(one, 0, D2[at : at + m], W[at : at + m].double().numpy())
        at += m


def test_rows_of_a_part_that_lie_among_others(tmp_path: Path) -> None:
    """Bloom's fused weight has q, k and v of a head side by side; the part keeps its rank, and its place."""
    fused = "h.0.self_attention.query_key_value"
    W = noise(3 * HEADS * HD, IN, seed=1)
    (tmp_path / "base").mkdir()
    save_file({f"transformer.{fused}.weight": W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "bloom", "n_head": HEADS}))
    module = f"transformer.{fused.replace('query_key_value', 'q_proj')}"
    tensors = pair(module, HEADS * HD, IN, 2, 3)
    row = only(lm.analyze(peft(tmp_path / "a", tensors, lora_alpha=2), base=tmp_path / "base"))
    part = delta(tensors, module, 1.0).reshape(HEADS, 1, HD, IN)
    D = np.concatenate([part, np.zeros((HEADS, 2, HD, IN))], axis=1).reshape(-1, IN)
    last = (HEADS - 1) * 3 * HD + HD
    assert row["shape"] == [last, IN] and row["updates"][0]["stored_rank"] == 2
    against_dense(row, 0, D[:last], W[:last].double().numpy())


def test_stacked_experts_need_the_base_that_tells_them_apart(tmp_path: Path) -> None:
    name, experts, m, n, r = "model.layers.0.mlp.experts", 3, 8, 6, 2
    A, B = noise(r * experts, n, seed=1), noise(m, r * experts, seed=2)
    W = noise(experts, m, n, seed=3)
    (tmp_path / "base").mkdir()
    save_file({f"{name}.gate_up_proj": W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    where = peft(
        tmp_path / "a",
        {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B},
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj"],
        lora_alpha=4,
    )
    with pytest.raises(LoramergeError, match="--base"):
        lm.analyze(where)
    data = lm.analyze(where, base=tmp_path / "base")
    assert len(data["modules"]) == experts
    assert len({row["module"] for row in data["modules"]}) == experts
    a, b = A.double().numpy().reshape(experts, r, n), B.double().numpy().reshape(m, r, experts)
    for e, row in enumerate(data["modules"]):
        against_dense(row, 0, 2 * b[:, :, e] @ a[e], W[e].double().numpy())


def test_a_base_that_the_adapter_does_not_fit_is_an_error(tmp_path: Path) -> None:
    save_file({"other.weight": noise(4, 4, seed=1)}, tmp_path / "base.safetensors")
    where = peft(tmp_path / "a", pair("layers.0.q", 6, 8, 2, 1))
    with pytest.raises(LoramergeError) as caught:
        lm.analyze(where, base=tmp_path / "base.safetensors")
    assert caught.value.exit_code == 3


def test_a_large_weight_is_read_by_row_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, however the weight is cut; above the exact limit its directions come from block Krylov."""
    from loramerge.analysis import against

    name, m, n = "model.layers.0.self_attn.q_proj", 96, 160
    strong = noise(m, 4, seed=1) @ noise(4, n, seed=2)
    W = (noise(m, n, seed=3) + 3 * strong).bfloat16()
    save_file({f"{name}.weight": W}, tmp_path / "base.safetensors")
    tensors = pair(name, m, n, 3, 5)
    where = peft(tmp_path / "a", tensors, r=3, lora_alpha=3)
    whole = only(lm.analyze(where, base=tmp_path / "base.safetensors"))
    against_dense(whole, 0, delta(tensors, name, 1.0), W.double().numpy())
    monkeypatch.setattr(against, "BLOCK", 5 * n)
    monkeypatch.setattr(against, "GRAM_SIDE", 10)
    cut = only(lm.analyze(where, base=tmp_path / "base.safetensors"))
    said, held = cut["updates"][0], whole["updates"][0]
    assert said["amplification"]["projection"] == pytest.approx(held["amplification"]["projection"], rel=1e-12)
    assert said["retention"] == held["retention"]
    assert (cut["base"]["exact"], whole["base"]["exact"]) == (False, True)
    assert cut["base"]["singular_values"] == pytest.approx(whole["base"]["singular_values"], rel=1e-5)
    assert np.allclose(said["base_directions"]["left"], held["base_directions"]["left"], atol=1e-4)


def test_large_weights_are_sampled_evenly(tmp_path: Path) -> None:
    """Numbers about single elements are then estimates; all others stay exact."""
    from loramerge.analysis.collisions import sampled_rows

    for m, n in ((1, 5), (2000, 300), (70_000, 10), (3, 10**6)):
        rows = sampled_rows(m, n).tolist()
        assert rows == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < m
        assert len(rows) == m or len(rows) * n >= 1 << 17
        assert max(np.diff(rows), default=0) <= 2 * m / len(rows)
    name, m, n = "model.layers.0.self_attn.q_proj", 1200, 300
    tensors = pair(name, m, n, 3, 5)
    W = (0.2 * noise(m, n, seed=1)).bfloat16()
    save_file({f"{name}.weight": W}, tmp_path / "base.safetensors")
    one, two = (
        peft(tmp_path / "a", tensors, r=3, lora_alpha=3e-4),
        peft(tmp_path / "b", pair(name, m, n, 3, 7), r=3, lora_alpha=6e-4),
    )
    row = only(lm.analyze([one, two], base=tmp_path / "base.safetensors", leading=0))
    D = delta(tensors, name, 1e-4)
    said = row["updates"][0]["retention"]
    w = W.double().numpy()
    assert said["keep"] == pytest.approx(retention(w, D, "bfloat16"), abs=0.02)
    assert said["keep"] < 0.97 and row["base"]["singular_values"] is None
    assert row["pairs"][0]["elements"] < m * n / 2
    same_spectrum(row["updates"][0], D)


def test_the_count_of_the_paper() -> None:
    """|Theta| = 2 L d r: GPT-3 with r = 4 on q and v of 96 layers, 18.9 M beside 175 G: its 10,000 times."""
    from loramerge.analysis.report import times_fewer

    theta = 2 * (2 * 96) * 12288 * 4
    assert theta == 18_874_368
    assert 9_000 < 175e9 / theta < 10_000 and times_fewer(175e9 / theta) == "9,272"
    assert math.isclose(theta * 2, 37.7e6, rel_tol=0.01)  # bytes in float16: "35MB" of 350 GB
