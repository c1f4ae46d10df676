"""What an undo file costs: its bytes beside the tensors that it brings back, and the time to write and to use it.

    python tests/benchmarks/undo_size.py --directory DIR             sizes: bf16, fp16, fp32 at four sizes of the update
    python tests/benchmarks/undo_size.py --directory DIR --gb 1      times as well, on a model of so many gigabytes

See the README beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RANK = 16
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DELTAS = (0.001, 0.01, 0.03, 0.1)
TARGETS = {0.001: 0.05, 0.01: 0.25, 0.03: 0.6, 0.1: 1.5}
"""Percent of the changed tensors' bytes, for bfloat16."""

SMALL = {"hidden": 1536, "intermediate": 4096, "layers": 1}
"""For the sizes, which do not depend on how large the model is."""

RUN = """
import sys, time
import loramerge as lm
what, source, adapter, out, jobs = sys.argv[1:]
from loramerge.merging import stream  # torch and all that is loaded but once
begin, used = time.perf_counter(), time.process_time()
if what == "unmerge":
    lm.unmerge(source, out, jobs=int(jobs))
elif what == "switch":
    lm.switch(source, adapter, out, jobs=int(jobs))
else:
    lm.merge(source, adapter, out, jobs=int(jobs), reversible=what == "reversible")
print(time.perf_counter() - begin, time.process_time() - used)
"""


def linears(hidden: int, intermediate: int, layers: int) -> dict[str, tuple[int, int]]:
    """Names and shapes (out, in) of all linear layers of a Llama with a quarter as many keys as queries."""
    small = hidden // 4
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (small, hidden),
        "self_attn.v_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def weights(shape: tuple[int, int], random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Normal numbers, the scale of each row log-normal, one in a thousand an outlier."""
    W = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    W *= np.exp(0.3 * random.standard_normal((shape[0], 1), dtype=np.float32))
    W[random.random(shape, dtype=np.float32) < 0.001] *= 10
    return W


def stored(W: np.ndarray[Any, Any], dtype: str) -> bytes:
    """The bytes of a tensor in a weight file."""
    if dtype == "bfloat16":
        bits = W.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return W.astype({"float16": "<f2", "float32": "<f4"}[dtype]).tobytes()


def write_file(path: Path, rows: Sequence[tuple[str, tuple[int, ...], str, int]], make: Any) -> None:
    """A safetensors file, tensor by tensor. `rows`: name, shape, dtype, bytes; `make`: name -> its bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, nbytes in rows:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, *_ in rows:
            file.write(make(name))


def make_model(folder: Path, shapes: dict[str, tuple[int, int]], dtype: str) -> dict[str, float]:
    """The base; returns the norm of each weight."""
    folder.mkdir()
    norms: dict[str, float] = {}
    width = 4 if dtype == "float32" else 2

    def make(name: str) -> bytes:
        module = name.removesuffix(".weight")
        W = weights(shapes[module], np.random.default_rng(zlib.crc32(name.encode())))
        norms[module] = float(np.linalg.norm(W))
        return stored(W, dtype)

    rows = [(f"{m}.weight", s, DTYPES[dtype], s[0] * s[1] * width) for m, s in shapes.items()]
    write_file(folder / "model.safetensors", rows, make)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return norms


def make_adapter(folder: Path, shapes: dict[str, tuple[int, int]], norms: dict[str, float], delta: float) -> None:
    """An adapter whose update of each weight has `delta` times its norm."""
    folder.mkdir()
    factors: dict[str, np.ndarray[Any, Any]] = {}
    for module, (rows, cols) in shapes.items():
        random = np.random.default_rng(zlib.crc32(module.encode()) + 1)
        A, B = random.standard_normal((RANK, cols)), random.standard_normal((rows, RANK))
        size = np.sqrt(np.sum((A @ A.T) * (B.T @ B)))  # of B A
        factors[f"base_model.model.{module}.lora_A.weight"] = A.astype("<f4")
        factors[f"base_model.model.{module}.lora_B.weight"] = (B * (delta * norms[module] / size)).astype("<f4")
    rows = [(name, f.shape, "F32", f.nbytes) for name, f in factors.items()]
    write_file(folder / "adapter_model.safetensors", rows, lambda name: factors[name].tobytes())
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def undo_bytes(merged: Path) -> tuple[int, int]:
    """(bytes of the undo file without factors, bytes of the tensors that it brings back)."""
    from loramerge.merging.undo import open_undo
    from loramerge.tensors.dtypes import bits

    path = merged / "loramerge.undo"
    undo = open_undo(path, str(path))
    factors = sum(located.info.nbytes for a in undo.adapters for located in a.checkpoint.tensors.values())
    changed = sum(int(np.prod(row.shape)) * bits(row.dtype) // 8 for row in undo.tensors.values())
    undo.close()
    return path.stat().st_size - factors, changed


def sizes(directory: Path) -> list[dict[str, Any]]:
    """The size of the undo file for every dtype and size of the update."""
    import loramerge as lm

    rows = []
    shapes = linears(**SMALL)
    for dtype in DTYPES:
        base = directory / f"base-{dtype}"
        norms = make_model(base, shapes, dtype)
        for delta in DELTAS:
            adapter, merged, back = (directory / f"{name}-{dtype}-{delta}" for name in ("adapter", "merged", "back"))
            make_adapter(adapter, shapes, norms, delta)
            lm.merge(base, adapter, merged, reversible=True)
            lm.unmerge(merged, back)
            assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
            undo, changed = undo_bytes(merged)
            rows.append({"dtype": dtype, "delta": delta, "undo": undo, "changed": changed})
            for path in (adapter, merged, back):
                shutil.rmtree(path)
        shutil.rmtree(base)
    return rows


def times(directory: Path, gigabytes: float, delta: float, jobs: int, runs: int) -> dict[str, list[list[float]]]:
    """(seconds, CPU seconds) of a plain and a reversible merge, an un-merge and a switch, in turn, without imports."""
    block = sum(rows * cols for rows, cols in linears(2048, 5632, 1).values())
    shapes = linears(2048, 5632, max(1, round(gigabytes * 1e9 / 2 / block)))
    base, adapter, other = directory / "base", directory / "adapter", directory / "other"
    norms = make_model(base, shapes, "bfloat16")
    make_adapter(adapter, shapes, norms, delta)
    make_adapter(other, shapes, norms, -delta)
    found: dict[str, list[list[float]]] = {"plain": [], "reversible": [], "unmerge": [], "switch": []}
    merged, out = directory / "merged", directory / "out"
    for _ in range(runs):
        for what in found:
            source = merged if what in ("unmerge", "switch") else base
            target = merged if what == "reversible" else out
            shutil.rmtree(target, ignore_errors=True)
            for file in source.iterdir():  # into the page cache
                with file.open("rb") as opened:
                    while opened.read(1 << 24):
                        pass
            os.sync()
            command = [sys.executable, "-c", RUN, what, source, other if what == "switch" else adapter, target, jobs]
            done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
            found[what].append([float(number) for number in done.stdout.split()])
            if what == "unmerge":
                same = subprocess.run(["cmp", str(out / "model.safetensors"), str(base / "model.safetensors")])
                assert same.returncode == 0, "it did not come back"
            shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where to put inputs and outputs for a while")
    parser.add_argument("--gb", type=float, help="measure times on a model of so many gigabytes")
    parser.add_argument("--delta", type=float, default=0.01, help="relative size of the update for the times")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-sizes", action="store_true")
    parser.add_argument("--json", type=Path, help="every single measurement")
    arguments = parser.parse_args()
    directory = arguments.directory / f"undo-size-{os.getpid()}"
    directory.mkdir(parents=True)
    result: dict[str, Any] = {"date": str(datetime.date.today()), "machine": platform.machine()}
    try:
        if not arguments.no_sizes:
            result["sizes"] = sizes(directory)
            print("| dtype | update | undo bytes, % of the changed tensors | target |\n| --- | --- | --- | --- |")
            for row in result["sizes"]:
                target = f"{TARGETS[row['delta']]} %" if row["dtype"] == "bfloat16" else ""
                share = 100 * row["undo"] / row["changed"]
                print(f"| {row['dtype']} | {100 * row['delta']:g} % | {share:.3f} % | {target} |")
        if arguments.gb:
            result["times"] = times(directory, arguments.gb, arguments.delta, arguments.jobs, arguments.runs)
            medians = {
                what: [statistics.median(column) for column in zip(*rows, strict=True)]
                for what, rows in result["times"].items()
            }
            print(f"\n| {arguments.gb:g} GB, {arguments.jobs} workers | s | beside the plain merge | CPU s |")
            print("| --- | --- | --- | --- |")
            for what, (seconds, used) in medians.items():
                print(f"| {what} | {seconds:.2f} | {seconds / medians['plain'][0]:.2f} | {used:.2f} |")
    finally:
        shutil.rmtree(directory)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
