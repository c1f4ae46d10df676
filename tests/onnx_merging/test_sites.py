"""Every way in which a graph keeps a weight: the merged model computes what the adapter was trained to compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs as g
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loramerge as lm
from loramerge.errors import LoramergeError

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


def close(got: g.Array, want: g.Array, rtol: float = 2e-6) -> None:
    scale = float(np.abs(want).max())
    assert float(np.abs(got - want).max()) <= rtol * scale, float(np.abs(got - want).max()) / scale


def refused(code: str, function: Callable[..., Any], *args: Any, out: Path, **kwargs: Any) -> LoramergeError:
    before = {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")}
    with pytest.raises(LoramergeError) as caught:
        function(*args, out, **kwargs)
    error = caught.value
    assert error.code == code, (error.code, error.message)
    assert error.exit_code in (2, 3, 4)
    assert error.fix
    assert {p: p.stat().st_mtime_ns for p in out.parent.rglob("*")} == before, "something was written"
    return error


# ------------------------------------------------------------------------------------- one linear, many ways


def transposed(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    return [g.linear("/model/fc/MatMul", "x", "onnx::MatMul_1", "y")], [g.tensor("onnx::MatMul_1", W.T)]


def by_transpose(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    turn = helper.make_node("Transpose", ["model.fc.weight"], ["t"], perm=[1, 0])
    return [turn, g.linear("n", "x", "t", "y")], [g.tensor("model.fc.weight", W)]


def by_default_transpose_and_identity(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes = [
        helper.make_node("Identity", ["w"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["c"]),
        g.linear("/model/fc/MatMul", "x", "c", "y"),
    ]
    return nodes, [g.tensor("w", W)]


def twice_turned(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes = [
        helper.make_node("Transpose", ["w"], ["a"], perm=[1, 0]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[1, 0]),
        g.linear("/model/fc/MatMul", "x", "b", "y"),
    ]
    return nodes, [g.tensor("w", W.T)]


def gemm_b(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    node = helper.make_node("Gemm", ["x", "model.fc.weight"], ["y"], name="n", transB=1)
    return [node], [g.tensor("model.fc.weight", W)]


def gemm(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="/model/fc/Gemm")
    return [node], [g.tensor("w", W.T)]


def reshaped(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    shape = g.tensor("shape", np.array([1, -1, W.shape[0]], dtype="int64"))
    flat = g.tensor("flat", np.array([0, -1], dtype="int64"))
    nodes = [
        helper.make_node("Reshape", ["w", "flat"], ["same"]),
        g.linear("/model/fc/MatMul", "x", "same", "z"),
        helper.make_node("Reshape", ["z", "shape"], ["y3"]),
        helper.make_node("Squeeze", ["y3", "axis"], ["y"]),
    ]
    return nodes, [g.tensor("w", W.T), shape, flat, g.tensor("axis", np.array([0], dtype="int64"))]


def float_data(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    typed = helper.make_tensor("w", F32, W.T.shape, W.T.flatten().tolist())
    assert typed.float_data and not typed.raw_data
    return [g.linear("/model/fc/MatMul", "x", "w", "y")], [typed]


def left_operand(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
        g.linear("/model/fc/MatMul", "w", "xt", "yt"),
        helper.make_node("Transpose", ["yt"], ["y"], perm=[1, 0]),
    ]
    return nodes, [g.tensor("w", W)]


def scoped(W: g.Array) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    node = g.linear("node_linear_3", "x", "val_9", "y")
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", "x" * 5000
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'model', 'model.fc', 'linear_3']"
    return [node], [g.tensor("val_9", W.T)]


WAYS = [
    transposed, by_transpose, by_default_transpose_and_identity, twice_turned, gemm_b, gemm, reshaped, float_data,
    left_operand, scoped,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize(("out", "inside", "rank"), [(6, 6, 2), (7, 5, 1)])
def test_a_linear_is_merged_however_the_graph_keeps_it(
    tmp_path: Path, way: Callable[..., Any], out: int, inside: int, rank: int
) -> None:
    W, x = g.numbers(1, out, inside), g.numbers(2, 4, inside)
    pair = g.factors(3, out, inside, rank)
    base = g.save(g.model(*way(W), {"x": [4, inside]}), tmp_path / "base" / "m.onnx")
    adapter = g.lora(tmp_path / "lora", {"model.fc": pair})
    receipt = lm.merge(base, adapter, tmp_path / "out.onnx")
    assert receipt.counts["changed"] == 1
    close(g.run(base, {"x": x}), x.astype(np.float64) @ W.T.astype(np.float64))
    close(g.run(tmp_path / "out.onnx", {"x": x}), x.astype(np.float64) @ (W + g.delta(pair)).T)


def test_one_rounding_in_half_precision_turned_or_not(tmp_path: Path) -> None:
    W = g.numbers(1, 96, 64, dtype="float16")
    pair = g.factors(3, 96, 64, 8)
    adapter = g.lora(tmp_path / "lora", {"model.fc": pair})
    exact = (W.astype(np.float64) + g.delta(pair)).astype(np.float16)
    for name, way in (("a", transposed), ("b", by_transpose)):
        base = g.save(g.model(*way(W), {"x": [4, 64]}, dtype=F16), tmp_path / name / "m.onnx")
        lm.merge(base, adapter, tmp_path / f"{name}.onnx")
        key = "onnx::MatMul_1" if name == "a" else "model.fc.weight"
        got = g.weight(tmp_path / f"{name}.onnx", key)
        wrong = np.count_nonzero((got.T if name == "a" else got) != exact)
        assert wrong <= 1, wrong  # of 6144; what rounds halfway may go either way


def test_a_convolution_and_an_embedding(tmp_path: Path) -> None:
    W, E = g.numbers(1, 5, 3, 2, 2), g.numbers(2, 11, 4)
    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["cy"], name="/c/Conv", kernel_shape=[2, 2]),
        helper.make_node("Gather", ["e.weight", "ids"], ["ey"], name="/e/Gather"),
        helper.make_node("ReduceSum", ["cy"], ["cs"], keepdims=0),
        helper.make_node("Add", ["ey", "cs"], ["y"]),
    ]
    weights = [g.tensor("c.weight", W), g.tensor("e.weight", E)]
    base = g.save(g.model(nodes, weights, {"x": [1, 3, 4, 4], "ids": [3]}), tmp_path / "base" / "m.onnx")
    A, B = g.numbers(3, 2, 3, 2, 2), g.numbers(4, 5, 2, 1, 1)
    ea, eb = g.numbers(5, 2, 11), g.numbers(6, 4, 2)
    conv = g.lora(tmp_path / "conv", {"c": (A, B)})
    embedding = g.lora(tmp_path / "emb", {"e": (ea, eb)}, embedding=True)
    lm.merge(base, [conv, (embedding, 0.5)], tmp_path / "out.onnx")
    merged = tmp_path / "out.onnx"
    close(g.weight(merged, "c.weight"), W + 3.0 * np.einsum("or,rikl->oikl", B[:, :, 0, 0].astype(float), A))
    close(g.weight(merged, "e.weight"), E + 0.5 * 3.0 * (eb.astype(float) @ ea).T)
    assert g.run(merged, {"x": g.numbers(7, 1, 3, 4, 4), "ids": np.array([0, 10, 3])}).shape == (3, 4)


def test_dora_a_saved_head_a_bias_and_a_norm_of_turned_weights(tmp_path: Path) -> None:
    W, H, b, n = g.numbers(1, 6, 6), g.numbers(2, 3, 6), g.numbers(3, 6), g.numbers(4, 6)
    nodes = [
        g.linear("/fc/MatMul", "x", "w0", "h0"),
        helper.make_node("Add", ["h0", "fc.bias"], ["h1"], name="/fc/Add"),
        helper.make_node("Mul", ["h1", "norm.weight"], ["h2"], name="/norm/Mul"),
        g.linear("/head/MatMul", "h2", "w1", "y"),
    ]
    weights = [g.tensor("w0", W.T), g.tensor("fc.bias", b), g.tensor("norm.weight", n), g.tensor("w1", H.T)]
    base = g.save(g.model(nodes, weights, {"x": [4, 6]}), tmp_path / "base" / "m.onnx")
    pair, m = g.factors(5, 6, 6, 2), np.abs(g.numbers(7, 6)) + 0.5
    new_head, new_norm, lb = g.numbers(8, 3, 6), g.numbers(9, 6), g.numbers(10, 6)
    prefix = "base_model.model."
    more = {
        f"{prefix}fc.lora_magnitude_vector": m,
        f"{prefix}fc.lora_B.bias": lb,
        f"{prefix}head.weight": new_head,
        f"{prefix}norm.weight": new_norm,
    }
    adapter = g.lora(
        tmp_path / "lora", {"fc": pair}, more=more, use_dora=True, lora_bias=True, modules_to_save=["head", "norm"]
    )
    lm.merge(base, adapter, tmp_path / "out.onnx")
    x = g.numbers(11, 4, 6)
    V = W + g.delta(pair)
    V = m[:, None] / np.linalg.norm(V, axis=1, keepdims=True) * V
    h = (x.astype(float) @ V.T + b + 3.0 * lb) * new_norm
    close(g.run(tmp_path / "out.onnx", {"x": x}), h @ new_head.T.astype(float))
    assert np.array_equal(g.weight(tmp_path / "out.onnx", "w1"), new_head.T)


# ------------------------------------------------------------------------------------ copies and other uses


def two_calls(first: g.Array, second: g.Array, node: str) -> onnx.ModelProto:
    nodes = [
        g.linear("/model/q/MatMul", "x", "a", "y0"),
        g.linear(node, "x", "b", "y1"),
        helper.make_node("Sub", ["y0", "y1"], ["d"]),
        helper.make_node("Concat", ["y0", "y1"], ["y"], axis=1),
    ]
    return g.model(nodes, [g.tensor("a", first.T), g.tensor("b", second.T)], {"x": [4, 5]})


@pytest.mark.parametrize("node", ["/model/q/MatMul_1", "/model/q_1/MatMul"])
def test_every_copy_of_a_weight_changes(tmp_path: Path, node: str) -> None:
    W, pair, x = g.numbers(1, 7, 5), g.factors(3, 7, 5, 2), g.numbers(2, 4, 5)
    base = g.save(two_calls(W, W, node), tmp_path / "base" / "m.onnx")
    receipt = lm.merge(base, g.lora(tmp_path / "lora", {"model.q": pair}), tmp_path / "out.onnx")
    assert receipt.counts["changed"] == 2
    want = x.astype(float) @ (W + g.delta(pair)).T
    close(g.run(tmp_path / "out.onnx", {"x": x}), np.concatenate([want, want], axis=1))


def test_a_module_whose_name_ends_in_a_number_is_no_copy(tmp_path: Path) -> None:
    W, other, pair = g.numbers(1, 7, 5), g.numbers(9, 7, 5), g.factors(3, 7, 5, 2)
    base = g.save(two_calls(W, other, "/model/q_1/MatMul"), tmp_path / "base" / "m.onnx")
    receipt = lm.merge(base, g.lora(tmp_path / "lora", {"model.q": pair}), tmp_path / "out.onnx")
    assert receipt.counts["changed"] == 1
    assert np.array_equal(g.weight(tmp_path / "out.onnx", "b"), other.T)


def test_two_weights_of_one_module_are_refused(tmp_path: Path) -> None:
    base = g.save(two_calls(g.numbers(1, 7, 5), g.numbers(9, 7, 5), "/model/q/MatMul_1"), tmp_path / "b" / "m.onnx")
    adapter = g.lora(tmp_path / "lora", {"model.q": g.factors(3, 7, 5, 2)})
    error = refused("onnx.ambiguous", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    assert "--base" in error.fix


def tied(E: g.Array, turned: bool) -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["model.embed_tokens.weight", "ids"], ["h"], name="/model/embed_tokens/Gather")]
    if turned:
        nodes += [helper.make_node("Transpose", ["model.embed_tokens.weight"], ["t"], name="/lm_head/Transpose")]
        nodes += [g.linear("/lm_head/MatMul", "h", "t", "y")]
    else:
        nodes += [helper.make_node("Gemm", ["h", "model.embed_tokens.weight"], ["y"], name="/lm_head/Gemm", transB=1)]
    return g.model(nodes, [g.tensor("model.embed_tokens.weight", E)], {"ids": [3]})


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_one_side_of_a_tied_weight_is_refused(tmp_path: Path, turned: bool, module: str) -> None:
    base = g.save(tied(g.numbers(1, 11, 4), turned), tmp_path / "base" / "m.onnx")
    if module == "lm_head":
        adapter = g.lora(tmp_path / "lora", {module: g.factors(3, 11, 4, 2)})
    else:
        adapter = g.lora(tmp_path / "lora", {module: (g.numbers(3, 2, 11), g.numbers(4, 4, 2))}, embedding=True)
    error = refused("onnx.shared", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    assert "export" in error.fix


def test_a_weight_that_an_exporter_gave_to_two_modules_is_refused(tmp_path: Path) -> None:
    nodes = [g.linear("/a/MatMul", "x", "a.weight", "h"), g.linear("/b/MatMul", "h", "a.weight", "y")]
    base = g.save(
        g.model(nodes, [g.tensor("a.weight", np.eye(4, dtype="float32"))], {"x": [2, 4]}), tmp_path / "m.onnx"
    )
    (tmp_path / "o").mkdir()
    for module in ("a", "b"):
        adapter = g.lora(tmp_path / f"lora-{module}", {module: g.factors(3, 4, 4, 2)})
        refused("onnx.shared", lm.merge, base, adapter, out=tmp_path / "o" / "out.onnx")


def test_the_module_of_a_node_goes_before_the_name_of_a_weight(tmp_path: Path) -> None:
    # torch's exporter gives the embedding the head's name, and folds the head into a tensor of its own.
    E, x = g.numbers(1, 11, 4), np.array([1, 5, 10])
    nodes = [
        helper.make_node("Gather", ["lm_head.weight", "ids"], ["h"], name="/model/embed_tokens/Gather"),
        g.linear("/lm_head/MatMul", "h", "val_1", "y"),
    ]
    weights = [g.tensor("lm_head.weight", E), g.tensor("val_1", E.T)]
    base = g.save(g.model(nodes, weights, {"ids": [3]}), tmp_path / "base" / "m.onnx")
    pair = g.factors(3, 11, 4, 2)
    lm.merge(base, g.lora(tmp_path / "lora", {"lm_head": pair}), tmp_path / "out.onnx")
    close(g.run(tmp_path / "out.onnx", {"ids": x}), E[x].astype(float) @ (E + g.delta(pair)).T)


def test_what_folding_may_have_made_of_a_weight_is_told(tmp_path: Path) -> None:
    nodes = [
        g.linear("/attn/q/MatMul", "x", "w", "q"),
        helper.make_node("MatMul", ["q", "positions"], ["y"], name="/attn/MatMul"),
    ]
    weights = [g.tensor("w", g.numbers(1, 4, 6)), g.tensor("positions", g.numbers(2, 2, 6, 3))]
    base = g.save(g.model(nodes, weights, {"x": [2, 5, 4]}, rank=3), tmp_path / "base" / "m.onnx")
    receipt = lm.merge(base, g.lora(tmp_path / "lora", {"attn.q": g.factors(3, 6, 4, 2)}), tmp_path / "out.onnx")
    assert any("positions" in note for note in receipt.notes)


# ---------------------------------------------------------------------------------- subgraphs and functions


def test_weights_of_subgraphs_one_name_in_two_branches(tmp_path: Path) -> None:
    W, V, U = g.numbers(1, 6, 5), g.numbers(2, 6, 5), g.numbers(3, 5, 5)

    def branch(name: str, values: g.Array) -> onnx.GraphProto:
        node = g.linear(f"/{name}/MatMul", "h", "w", f"out_{name}")
        out = helper.make_tensor_value_info(f"out_{name}", F32, ["b0", "b1"])
        return helper.make_graph([node], name, [], [out], [g.tensor("w", values.T)])

    nodes = [
        g.linear("/outer/MatMul", "x", "u", "h"),
        helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch("a", W), else_branch=branch("b", V)),
    ]
    base = g.save(g.model(nodes, [g.tensor("u", U.T)], {"x": [4, 5], "flag": []}), tmp_path / "base" / "m.onnx")
    a, b, o = (g.factors(i, n, 5, 2) for i, n in ((3, 6), (5, 6), (7, 5)))
    lm.merge(base, g.lora(tmp_path / "lora", {"a": a, "b": b, "outer": o}), tmp_path / "out.onnx")
    x = g.numbers(9, 4, 5)
    h = x.astype(float) @ (U + g.delta(o)).T
    close(g.run(tmp_path / "out.onnx", {"x": x, "flag": np.array(True)}), h @ (W + g.delta(a)).T)
    close(g.run(tmp_path / "out.onnx", {"x": x, "flag": np.array(False)}), h @ (V + g.delta(b)).T)


def test_a_weight_of_the_outer_graph_read_in_a_branch(tmp_path: Path) -> None:
    W = g.numbers(1, 6, 5)
    out = helper.make_tensor_value_info("o", F32, ["b0", "b1"])
    inner = helper.make_graph([g.linear("/fc/MatMul", "x", "w", "o")], "t", [], [out])
    zero = helper.make_graph([helper.make_node("Identity", ["z"], ["o2"])], "e", [], [
        helper.make_tensor_value_info("o2", F32, ["b0", "b1"])
    ])  # fmt: skip
    node = helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=zero)
    weights = [g.tensor("w", W.T), g.tensor("z", g.numbers(4, 2, 6))]
    base = g.save(g.model([node], weights, {"x": [4, 5], "flag": []}), tmp_path / "base" / "m.onnx")
    pair, x = g.factors(3, 6, 5, 2), g.numbers(9, 4, 5)
    lm.merge(base, g.lora(tmp_path / "lora", {"fc": pair}), tmp_path / "out.onnx")
    want = x.astype(float) @ (W + g.delta(pair)).T
    close(g.run(tmp_path / "out.onnx", {"x": x, "flag": np.array(True)}), want)


def test_a_function_with_a_weight_of_its_own_and_one_that_is_handed_to_it(tmp_path: Path) -> None:
    W, V = g.numbers(1, 6, 5), g.numbers(2, 3, 6)
    imports = [helper.make_opsetid("", 20)]
    own = helper.make_node("Constant", [], ["k"], value=g.tensor("k", W.T))
    first = helper.make_function("own", "First", ["x"], ["o"], [own, g.linear("/fc/MatMul", "x", "k", "o")], imports)
    turn = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
    second = helper.make_function("own", "Second", ["x", "w"], ["o"], [turn, g.linear("n", "x", "t", "o")], imports)
    nodes = [
        helper.make_node("First", ["x"], ["h"], domain="own", name="call_1"),
        helper.make_node("Second", ["h", "head.weight"], ["y"], domain="own", name="/head/Second"),
    ]
    made = g.model(nodes, [g.tensor("head.weight", V)], {"x": [4, 5]}, functions=[first, second])
    base = g.save(made, tmp_path / "base" / "m.onnx")
    a, b, x = g.factors(3, 6, 5, 2), g.factors(5, 3, 6, 1), g.numbers(9, 4, 5)
    lm.merge(base, g.lora(tmp_path / "lora", {"fc": a, "head": b}), tmp_path / "out.onnx")
    want = x.astype(float) @ (W + g.delta(a)).T @ (V + g.delta(b)).T
    close(g.run(tmp_path / "out.onnx", {"x": x}), want)


# --------------------------------------------------------------------------------------------- refusals


def test_codes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    nbits = helper.make_node(
        "MatMulNBits", ["x", "B", "s"], ["y"], name="/model/fc/MatMul_Q4", domain="com.microsoft",
        K=32, N=8, bits=4, block_size=32,
    )  # fmt: skip
    weights = [g.tensor("B", np.zeros((8, 1, 16), dtype="uint8")), g.tensor("s", g.numbers(1, 8))]
    codes = g.save(g.model([nbits], weights, {"x": [4, 32]}), tmp_path / "n" / "m.onnx")
    dequantised = [
        helper.make_node("DequantizeLinear", ["W_q", "W_s"], ["w"], name="/model/fc/DequantizeLinear"),
        g.linear("/model/fc/MatMul", "x", "w", "y"),
    ]
    weights = [g.tensor("W_q", np.ones((32, 8), dtype="int8")), g.tensor("W_s", np.array(0.1, dtype="float32"))]
    qdq = g.save(g.model(dequantised, weights, {"x": [4, 32]}), tmp_path / "q" / "m.onnx")
    adapter = g.lora(tmp_path / "lora", {"model.fc": g.factors(3, 8, 32, 2)})
    for path, op in ((codes, "MatMulNBits"), (qdq, "MatMul")):
        error = refused("onnx.quantised", lm.merge, path, adapter, out=tmp_path / "out.onnx")
        assert "float" in error.fix and "quantise" in error.fix and op in error.message


def test_numbers_in_a_typed_field_of_another_kind_are_refused(tmp_path: Path) -> None:
    typed = helper.make_tensor("w", F16, (5, 6), g.numbers(1, 30).astype("float16").tolist())
    assert typed.int32_data
    base = g.save(
        g.model([g.linear("/fc/MatMul", "x", "w", "y")], [typed], {"x": [4, 5]}, dtype=F16), tmp_path / "m.onnx"
    )
    adapter = g.lora(tmp_path / "lora", {"fc": g.factors(3, 6, 5, 2)})
    (tmp_path / "o").mkdir()
    error = refused("onnx.encoded", lm.merge, base, adapter, out=tmp_path / "o" / "out.onnx")
    assert "int32_data" in error.message


def test_a_scaled_product_a_larger_vocabulary_and_a_new_head_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="/fc/Gemm", alpha=2.0)
    base = g.save(g.model([node], [g.tensor("w", g.numbers(1, 5, 6))], {"x": [4, 5]}), tmp_path / "a" / "m.onnx")
    adapter = g.lora(tmp_path / "lora", {"fc": g.factors(3, 6, 5, 2)})
    refused("onnx.layout", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    node = helper.make_node("Gather", ["model.embed_tokens.weight", "ids"], ["y"], name="/model/embed_tokens/Gather")
    weights = [g.tensor("model.embed_tokens.weight", g.numbers(1, 11, 4))]
    base = g.save(g.model([node], weights, {"ids": [3]}), tmp_path / "b" / "m.onnx")
    more = {"base_model.model.model.embed_tokens.weight": g.numbers(2, 13, 4)}
    larger = g.lora(tmp_path / "larger", {}, more=more, modules_to_save=["embed_tokens"], target_modules=[])
    refused("onnx.shape", lm.merge, base, larger, out=tmp_path / "out.onnx")


def test_an_adapter_of_another_model_is_named_with_the_nearest_module(tmp_path: Path) -> None:
    nodes, weights = transposed(g.numbers(1, 6, 5))
    base = g.save(g.model(nodes, weights, {"x": [4, 5]}), tmp_path / "base" / "m.onnx")
    pair = g.factors(3, 6, 5, 2)
    adapter = g.lora(tmp_path / "lora", {"model.fc": pair, "model.gc": pair})
    error = refused("adapter.unmatched", lm.merge, base, adapter, out=tmp_path / "out.onnx")
    assert "model.fc.weight" in error.message and any("model.gc" in t for t in error.tensors)
    assert "--base" in error.fix
    alone = g.lora(tmp_path / "alone", {"x.y.z": pair})
    error = refused("adapter.no-match", lm.merge, base, alone, out=tmp_path / "out.onnx")
    assert "--base" in error.fix


def test_names_that_resemble_nothing_are_no_match_in_any_format(tmp_path: Path) -> None:
    # Without a nearest name to tell, a module once counted as matched, and nothing was changed.
    base = g.checkpoint(tmp_path / "base", {"q": g.numbers(1, 6, 5)})
    adapter = g.lora(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": g.factors(3, 6, 5, 2)})
    refused("adapter.no-match", lm.merge, base, adapter, out=tmp_path / "out")
