"""Small ONNX graphs, adapters for them, and what they must compute: numpy in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

Array = NDArray[Any]
RNG = np.random.default_rng


def numbers(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
    """Random numbers that are exact in float16 and bfloat16 too where `dtype` asks for it."""
    return (RNG(seed).standard_normal(shape) * scale).astype(dtype)


def tensor(name: str, values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(values, name)


def model(
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str] = ("y",),
    *,
    dtype: int = TensorProto.FLOAT,
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 20,
    rank: int = 2,
) -> onnx.ModelProto:
    """A model of one graph; whole numbers go in where an input's name begins with `ids`."""
    kinds = {name: TensorProto.INT64 if name.startswith(("ids", "flag")) else dtype for name in inputs}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [
            helper.make_tensor_value_info(n, TensorProto.BOOL if n.startswith("flag") else kinds[n], list(shape))
            for n, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, dtype, [f"{name}{i}" for i in range(rank)]) for name in outputs],
        list(weights),
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def save(made: onnx.ModelProto, path: Path, data: str | None = None) -> Path:
    """Writes a model; `data`: the file for its weights, all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        onnx.save_model(made, str(path))
    else:
        (path.parent / data).parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(made, str(path), save_as_external_data=True, location=data, size_threshold=0)
    return path


def linear(node: str, x: str, w: str, y: str, **attributes: Any) -> onnx.NodeProto:
    """`y = x w` in the module whose path is in the node's name."""
    return helper.make_node("MatMul", [x, w], [y], name=node, **attributes)


def lora(
    folder: Path,
    factors: Mapping[str, tuple[Array, Array]],
    *,
    alpha: float = 6.0,
    more: Mapping[str, Array] | None = None,
    **config: Any,
) -> Path:
    """An adapter as PEFT writes it: module path -> (A (r, in), B (out, r))."""
    tensors = {}
    for path, (A, B) in factors.items():
        kind = "embedding_" if config.get("embedding") else ""
        suffix = "" if kind else ".weight"
        tensors[f"base_model.model.{path}.lora_{kind}A{suffix}"] = np.ascontiguousarray(A)
        tensors[f"base_model.model.{path}.lora_{kind}B{suffix}"] = np.ascontiguousarray(B)
    config.pop("embedding", None)
    ranks = sorted({A.shape[0] for A, _ in factors.values()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **(more or {})}, folder / "adapter_model.safetensors")
    data = {
        "peft_type": "LORA",
        "r": ranks[0] if ranks else 1,
        "lora_alpha": alpha,
        "rank_pattern": {p: A.shape[0] for p, (A, _) in factors.items() if A.shape[0] != ranks[0]},
        "target_modules": sorted({p.rpartition(".")[2] for p in factors}),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


def factors(seed: int, out: int, inside: int, rank: int, dtype: str = "float32") -> tuple[Array, Array]:
    """A (r, in), B (out, r), neither of them zero."""
    return numbers(seed, rank, inside, scale=0.3).astype(dtype), numbers(seed + 1, out, rank, scale=0.3).astype(dtype)


def delta(pair: tuple[Array, Array], alpha: float = 6.0) -> Array:
    """`(alpha / r) B A` in float64."""
    A, B = (f.astype(np.float64) for f in pair)
    return alpha / A.shape[0] * (B @ A)


def run(path: Path, inputs: Mapping[str, Array]) -> Array:
    """The first output of a model in onnxruntime; `onnx.checker` looks at it before."""
    import onnxruntime as ort

    onnx.checker.check_model(str(path))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    first: Array = session.run(None, dict(inputs))[0]
    return first


def weight(path: Path, name: str) -> Array:
    """An initializer, read by onnx itself."""
    loaded = onnx.load(str(path))
    return numpy_helper.to_array(next(t for t in loaded.graph.initializer if t.name == name))


def checkpoint(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None) -> Path:
    """A base of safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder
