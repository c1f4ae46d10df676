"""Weights without names: found by their values, whole, turned, packed, split and copied, and again once merged."""

from __future__ import annotations

import json
from pathlib import Path

import graphs as g
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from test_sites import close, refused

import loramerge as lm

Q, K, V = (g.numbers(seed, 6, 5) for seed in (1, 2, 3))
NAMES = ["h.0.q", "h.0.k", "h.0.v"]
BASE = {f"{name}.weight": W for name, W in zip(NAMES, (Q, K, V), strict=True)}


def packed(way: str) -> list[tuple[str, g.Array]]:
    """Stored tensors, and whether `x @ tensor` or its transpose is meant by the name (`T`)."""
    whole = np.concatenate([Q, K, V])
    return {
        "apart": [("a", Q.T), ("b", K.T), ("c", V.T)],
        "apart as they are": [("aT", Q), ("bT", K), ("cT", V)],
        "packed columns": [("a", whole.T)],
        "packed rows": [("aT", whole)],
        "split": [("a", Q[:2].T), ("b", Q[2:].T), ("c", K.T), ("d", np.concatenate([V[:5]]).T), ("e", V[5:].T)],
        "split rows": [("aT", Q[:1]), ("bT", Q[1:]), ("cT", np.concatenate([K, V]))],
    }[way]


def build(path: Path, stored: list[tuple[str, g.Array]]) -> Path:
    nodes, outs = [], []
    for name, _ in stored:
        operand = name
        if name.endswith("T"):
            nodes.append(helper.make_node("Transpose", [name], [f"{name}_t"], perm=[1, 0]))
            operand = f"{name}_t"
        nodes.append(g.linear("", "x", operand, f"y_{name}"))
        outs.append(f"y_{name}")
    nodes.append(helper.make_node("Concat", outs, ["y"], axis=1))
    return g.save(g.model(nodes, [g.tensor(n, v) for n, v in stored], {"x": [4, 5]}), path)


WAYS = ["apart", "apart as they are", "packed columns", "packed rows", "split", "split rows"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True])
def test_weights_are_found_wherever_they_lie(tmp_path: Path, way: str, dora: bool) -> None:
    base = build(tmp_path / "base" / "m.onnx", packed(way))
    checkpoint = g.checkpoint(tmp_path / "ckpt", BASE)
    pairs = {name: g.factors(10 + i, 6, 5, 1 + i) for i, name in enumerate(NAMES)}
    magnitudes = {n: np.abs(g.numbers(20 + i, 6)) + 0.5 for i, n in enumerate(NAMES)} if dora else {}
    more = {f"base_model.model.{n}.lora_magnitude_vector": m for n, m in magnitudes.items()}
    adapter = g.lora(tmp_path / "lora", pairs, more=more, use_dora=dora)
    refused("adapter.no-match", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    lm.merge(base, adapter, tmp_path / "out.onnx", checkpoint=checkpoint, reversible=True)
    merged = []
    for name, W in zip(NAMES, (Q, K, V), strict=True):
        new = W + g.delta(pairs[name])
        if dora:
            new = magnitudes[name][:, None] / np.linalg.norm(new, axis=1, keepdims=True) * new
        merged.append(new)
    x = g.numbers(9, 4, 5)
    close(g.run(base, {"x": x}), x.astype(float) @ np.concatenate([Q, K, V]).T)
    close(g.run(tmp_path / "out.onnx", {"x": x}), x.astype(float) @ np.concatenate(merged).T)
    # What is merged cannot be found by values any more: the receipt remembers.
    (tmp_path / "s").mkdir()
    other = g.lora(tmp_path / "other", {NAMES[1]: g.factors(30, 6, 5, 2)})
    lm.switch(tmp_path / "out.onnx", other, tmp_path / "s" / "m.onnx")
    close(
        g.run(tmp_path / "s" / "m.onnx", {"x": x}),
        x.astype(float) @ np.concatenate([Q, K + g.delta(g.factors(30, 6, 5, 2)), V]).T,
    )
    (tmp_path / "u").mkdir()
    lm.unmerge(tmp_path / "out.onnx", tmp_path / "u" / "m.onnx")
    assert (tmp_path / "u" / "m.onnx").read_bytes() == base.read_bytes()
    assert lm.verify(tmp_path / "out.onnx", base=base)["ok"]


def test_a_linear_stored_as_in_out_that_is_split_by_its_outputs(tmp_path: Path) -> None:
    """GPT-2's c_attn, (in, out) in the checkpoint, as three tensors."""
    W = g.numbers(1, 4, 12)
    stored = [("a", W[:, :4]), ("bT", W[:, 4:8].T), ("c", W[:, 8:])]
    nodes_base = build_wide(tmp_path / "base" / "m.onnx", stored, 4)
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"h.0.attn.c_attn.weight": W}, {"model_type": "gpt2"})
    pair = g.factors(5, 12, 4, 2)
    adapter = g.lora(tmp_path / "lora", {"transformer.h.0.attn.c_attn": pair}, fan_in_fan_out=True)
    lm.merge(nodes_base, adapter, tmp_path / "out.onnx", checkpoint=checkpoint)
    x = g.numbers(9, 3, 4)
    close(g.run(tmp_path / "out.onnx", {"x": x}), x.astype(float) @ (W + g.delta(pair).T))


def build_wide(path: Path, stored: list[tuple[str, g.Array]], inside: int) -> Path:
    nodes, outs = [], []
    for name, _ in stored:
        operand = f"{name}_t" if name.endswith("T") else name
        if name.endswith("T"):
            nodes.append(helper.make_node("Transpose", [name], [operand], perm=[1, 0]))
        nodes.append(g.linear("", "x", operand, f"y_{name}"))
        outs.append(f"y_{name}")
    nodes.append(helper.make_node("Concat", outs, ["y"], axis=1))
    return g.save(g.model(nodes, [g.tensor(n, v) for n, v in stored], {"x": [3, inside]}), path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_checkpoint_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    """bfloat16 to float32 is exact, float32 to float16 the rounding that the exporter did."""
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    kept = W.bfloat16() if dtype == "float32" else W
    (tmp_path / "ckpt").mkdir()
    save_file({"fc.weight": kept}, tmp_path / "ckpt" / "model.safetensors")
    values = kept.to(getattr(torch, dtype)).numpy().T
    made = g.model(
        [g.linear("", "x", "w", "y")], [g.tensor("w", values)], {"x": [3, 5]},
        dtype=TensorProto.FLOAT if dtype == "float32" else TensorProto.FLOAT16,
    )  # fmt: skip
    base = g.save(made, tmp_path / "base" / "m.onnx")
    pair = g.factors(3, 6, 5, 2)
    lm.merge(base, g.lora(tmp_path / "lora", {"fc": pair}), tmp_path / "out.onnx", checkpoint=tmp_path / "ckpt")
    want = values.T.astype(np.float64) + g.delta(pair)
    close(g.weight(tmp_path / "out.onnx", "w").T, want, 2e-6 if dtype == "float32" else 6e-4)


def test_every_copy_and_a_symmetric_weight_once(tmp_path: Path) -> None:
    S = Q[:5] + Q[:5].T
    base = build(tmp_path / "base" / "m.onnx", [("a", K.T), ("bT", K), ("c", S)])
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"k.weight": K, "s.weight": S})
    k, s = g.factors(5, 6, 5, 2), g.factors(7, 5, 5, 1)
    lm.merge(base, g.lora(tmp_path / "lora", {"k": k, "s": s}), tmp_path / "out.onnx", checkpoint=checkpoint)
    new_k, new_s = K + g.delta(k), S + g.delta(s)
    close(g.weight(tmp_path / "out.onnx", "a"), new_k.T)
    close(g.weight(tmp_path / "out.onnx", "bT"), new_k)
    close(g.weight(tmp_path / "out.onnx", "c"), new_s.T)


def test_weights_that_are_equal_or_not_there_are_refused(tmp_path: Path) -> None:
    base = build(tmp_path / "base" / "m.onnx", [("a", Q.T), ("b", Q.T)])
    adapter = g.lora(tmp_path / "lora", {"h.0.q": g.factors(5, 6, 5, 2)})
    twins = g.checkpoint(tmp_path / "twins", {"h.0.q.weight": Q, "h.1.q.weight": Q})
    error = refused("onnx.ambiguous", lm.merge, base, adapter, out=tmp_path / "out.onnx", checkpoint=twins)
    assert "h.1.q.weight" in error.message
    other = g.checkpoint(tmp_path / "other", {"h.0.q.weight": K})
    error = refused("onnx.no-site", lm.merge, base, adapter, out=tmp_path / "out.onnx", checkpoint=other)
    assert "h.0.q.weight" in error.message


def test_one_weight_off_by_one_bit_is_not_found(tmp_path: Path) -> None:
    changed = Q.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], 10)
    base = build(tmp_path / "base" / "m.onnx", [("a", changed.T)])
    adapter = g.lora(tmp_path / "lora", {"h.0.q": g.factors(5, 6, 5, 2)})
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"h.0.q.weight": Q})
    refused("onnx.no-site", lm.merge, base, adapter, out=tmp_path / "out.onnx", checkpoint=checkpoint)


def test_places_in_a_receipt_are_checked(tmp_path: Path) -> None:
    base = build(tmp_path / "base" / "m.onnx", packed("packed columns"))
    checkpoint = g.checkpoint(tmp_path / "ckpt", BASE)
    adapter = g.lora(tmp_path / "lora", {NAMES[0]: g.factors(5, 6, 5, 2)})
    lm.merge(base, adapter, tmp_path / "out.onnx", checkpoint=checkpoint, reversible=True)
    at = tmp_path / "out.onnx.loramerge.json"
    data = json.loads(at.read_text())
    (name,) = data["sites"]
    for wrong in (-1, 10**9, "x", None):
        data["sites"][name]["sites"][0][0][6] = wrong
        at.write_text(json.dumps(data))
        refused("receipt.invalid", lm.switch, tmp_path / "out.onnx", adapter, out=tmp_path / "s.onnx")


def test_a_constant_that_may_be_folded_from_weights_is_told_where_no_scope_says_whose_it_is(tmp_path: Path) -> None:
    """An optimising exporter multiplies weights with one another; vectors of frequencies are no such thing."""
    table, vectors = g.numbers(2, 2, 6, 4), g.numbers(3, 2, 6, 1)
    nodes = [
        g.linear("", "x", "a", "q"),
        helper.make_node("MatMul", ["q", "folded"], ["scores"]),
        helper.make_node("MatMul", ["q", "inv_freq"], ["angles"]),
        helper.make_node("Add", ["scores", "angles"], ["y"]),
    ]
    stored = [g.tensor("a", Q.T), g.tensor("folded", table), g.tensor("inv_freq", vectors)]
    base = g.save(g.model(nodes, stored, {"x": [4, 5]}, rank=3), tmp_path / "base" / "m.onnx")
    checkpoint = g.checkpoint(tmp_path / "ckpt", {"h.0.q.weight": Q})
    adapter = g.lora(tmp_path / "lora", {"h.0.q": g.factors(4, 6, 5, 2)})
    receipt = lm.merge(base, adapter, tmp_path / "out.onnx", checkpoint=checkpoint)
    told = [note for note in receipt.notes if "may have been computed from weights" in note]
    assert len(told) == 1 and "folded" in told[0] and "inv_freq" not in told[0]
