"""How long a merge into an ONNX model takes beside a durable copy of its files, and how much memory.

    python tests/benchmarks/onnx_merge_speed.py --gb 2.8 --runs 3 --directory DIR [--by-value]

The model is the linear layers of a Llama in one file of external data, turned as exporters store them, fp32, with the
nodes that read them; the adapter has r = 16 on all of them. `cp` and `sync` copy the same files in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, RANK, ALIGN = 2048, 5504, 16, 65536
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def modules(layers: int) -> Iterator[tuple[str, int, int]]:
    for layer in range(layers):
        for name, (out, inside) in LINEARS.items():
            yield f"model.layers.{layer}.{name}", out, inside


def make(folder: Path, gb: float, checkpoint: bool) -> None:
    """The model, its adapter, and for `--by-value` the checkpoint that it could have been exported from."""
    per_layer = sum(4 * out * inside for out, inside in LINEARS.values())
    layers = max(1, round(gb * 1e9 / per_layer))
    random = np.random.default_rng(1)
    nodes, weights, factors = [], [], {}
    (folder / "base").mkdir(parents=True)
    with open(folder / "base" / "model.onnx_data", "wb") as data:
        for n, (path, out, inside) in enumerate(modules(layers)):
            data.write(bytes(-data.tell() % ALIGN))
            tensor = TensorProto(name=f"onnx::MatMul_{n}", data_type=TensorProto.FLOAT, dims=[inside, out])
            for key, value in (("location", "model.onnx_data"), ("offset", data.tell()), ("length", 4 * inside * out)):
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_location = TensorProto.EXTERNAL
            W = random.standard_normal((inside, out), dtype=np.float32) * np.float32(0.02)
            data.write(W.tobytes())
            if checkpoint:
                save_file({f"{path}.weight": np.ascontiguousarray(W.T)}, folder / f"{path}.safetensors")
            weights.append(tensor)
            name = f"node_{n}" if checkpoint else f"/{path.replace('.', '/').replace('layers/', 'layers.')}/MatMul"
            nodes.append(helper.make_node("MatMul", [f"x{inside}", tensor.name], [f"y{n}"], name=name))
            key = f"base_model.model.{path}"
            factors[f"{key}.lora_A.weight"] = random.standard_normal((RANK, inside), dtype=np.float32) * np.float32(
                0.02
            )
            factors[f"{key}.lora_B.weight"] = random.standard_normal((out, RANK), dtype=np.float32) * np.float32(0.02)
    given = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, [1, n]) for n in (HIDDEN, INTERMEDIATE)]
    results = [helper.make_tensor_value_info(f"y{n}", TensorProto.FLOAT, [1, None]) for n in range(len(nodes))]
    graph = helper.make_graph(nodes, "g", given, results, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "base" / "model.onnx").write_bytes(made.SerializeToString())
    onnx.checker.check_model(str(folder / "base" / "model.onnx"))
    (folder / "lora").mkdir()
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    if checkpoint:
        (folder / "ckpt").mkdir()
        index = {}
        for path, _, _ in modules(layers):
            name = f"{path}.safetensors"
            os.rename(folder / name, folder / "ckpt" / name)
            index[f"{path}.weight"] = name
        (folder / "ckpt" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def timed(command: Sequence[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak RSS in GB) of a command."""
    started = time.monotonic()
    pid = os.posix_spawnp(command[0], list(command), os.environ)
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=2.8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--by-value", action="store_true")
    asked = parser.parse_args()
    folder = asked.directory / "onnx_merge_speed"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(folder, asked.gb, asked.by_value)
        size = (folder / "base" / "model.onnx_data").stat().st_size
        merge = [sys.executable, "-m", "loramerge", "merge", str(folder / "base" / "model.onnx"), str(folder / "lora")]
        merge += ["-o", str(folder / "out"), "-q"] + (["--base", str(folder / "ckpt")] if asked.by_value else [])
        copy = ["sh", "-c", f"cp -r {folder / 'base'} {folder / 'copy'} && sync {folder / 'copy'}/*"]
        imports = [sys.executable, "-c", "import torch"]
        subprocess.run(["cat", str(folder / "base" / "model.onnx_data")], stdout=subprocess.DEVNULL, check=True)
        rows: dict[str, list[tuple[float, float, float]]] = {"cp and sync": [], "loramerge": [], "import torch": []}
        for _ in range(asked.runs):
            for name, command in (("cp and sync", copy), ("loramerge", merge), ("import torch", imports)):
                rows[name].append(timed(command))
                shutil.rmtree(folder / "copy", ignore_errors=True)
                shutil.rmtree(folder / "out", ignore_errors=True)
        print(
            f"{size / 1e9:.2f} GB, {asked.runs} runs, load {os.getloadavg()[0]:.1f}, {resource.getpagesize()} B pages"
        )
        first = statistics.median(wall for wall, _, _ in rows["cp and sync"])
        start = statistics.median(wall for wall, _, _ in rows["import torch"])
        print(
            "| median | wall s | ratio | less start-up | CPU s | peak RSS GB |\n| --- | --- | --- | --- | --- | --- |"
        )
        for name, found in rows.items():
            wall, cpu, rss = (statistics.median(values) for values in zip(*found, strict=True))
            less = (wall - start) / first if name == "loramerge" else wall / first
            print(f"| {name} | {wall:.2f} | {wall / first:.2f} | {less:.2f} | {cpu:.2f} | {rss:.2f} |")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
