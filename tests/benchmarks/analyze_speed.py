"""How long the analysis of a large adapter takes: spectra of one, similarity of two, and with a base in bf16.

    python tests/benchmarks/analyze_speed.py [--layers 32] [--rank 64] [--base-layers 0] [--directory DIR] [--jobs N]

makes adapters (fp32 factors) on all seven linear layers of a Llama of 7B shapes (4096, 11008) and times
`loramerge.analyze`; with `--base-layers N` also against a bf16 base of the first N layers (404 MB each).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def values(rng: np.random.Generator, shape: tuple[int, int], size: float) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(size))


def make_adapter(folder: Path, layers: int, rank: int, seed: int) -> Path:
    """In PEFT's layout, alpha twice the rank."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(layers):
        for name, (m, n) in SHAPES.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = values(rng, (rank, n), 0.02)
            tensors[f"{at}.lora_B.weight"] = values(rng, (m, rank), 0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_base(folder: Path, layers: int) -> Path:
    """One bf16 file a layer."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for layer in range(layers):
        held = {f"model.layers.{layer}.{n}.weight": values(rng, s, 0.02).bfloat16() for n, s in SHAPES.items()}
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(held, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def timed(what: str, call: Callable[[], Any]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    data = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    modules = len(data["modules"])
    print(f"| {what} | {modules} | {wall:.2f} | {cpu:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--base-layers", type=int, default=0)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args()
    import loramerge as lm

    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        one, two = (make_adapter(folder / f"lora-{s}", args.layers, args.rank, s) for s in (1, 2))
        torch.linalg.svd(torch.eye(8, dtype=torch.float64))  # libraries are loaded
        print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
        print("| what | modules | wall s | CPU s |\n|---|---|---|---|")
        timed("spectra of one adapter", lambda: lm.analyze(one, jobs=args.jobs))
        timed("spectra and similarity of two", lambda: lm.analyze([one, two], jobs=args.jobs))
        if args.base_layers:
            base = make_base(folder / "base", args.base_layers)
            small = make_adapter(folder / "small", args.base_layers, args.rank, 3)
            timed(
                "with a base, no leading directions",
                lambda: lm.analyze(small, base=base, leading=0, jobs=args.jobs),
            )
            timed("with a base", lambda: lm.analyze(small, base=base, jobs=args.jobs))


if __name__ == "__main__":
    main()
