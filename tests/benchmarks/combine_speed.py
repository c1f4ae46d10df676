"""`resize` and `combine` from file to file, beside the SVD of a dense product in memory. CPU seconds a module, one run.

    python tests/benchmarks/combine_speed.py [--modules 8] [--quick]

Reading, the check of the error, writing and reading back are in our numbers, and not in those of the dense way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import loramerge as lm


def adapter(folder: Path, size: int, rank: int, modules: int, seed: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(modules):
        head = f"base_model.model.layers.{i}.proj"
        tensors[f"{head}.lora_A.weight"] = torch.randn(rank, size, generator=generator)
        tensors[f"{head}.lora_B.weight"] = torch.randn(size, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def cpu(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def product(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.layers.0.proj.lora_"
    return tensors[f"{head}B.weight"] @ tensors[f"{head}A.weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--modules", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    n, scale = arguments.modules, 2 if arguments.quick else 1
    torch.set_num_threads(1)
    torch.linalg.svd(torch.randn(64, 64))
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        large = adapter(at / "large", 3072 // scale, 128, n, 1)
        one, other = (adapter(at / str(seed), 2048 // scale, 16, n, seed) for seed in (2, 3))
        lm.resize(one, at / "warm", rank=4)
        ours = cpu(lambda: lm.resize(large, at / "resized", rank=32)) / n
        dense = cpu(lambda: torch.linalg.svd(product(large), full_matrices=False))
        print(f"resize  rank 128 -> 32, {3072 // scale}: {ours:.4f} s, dense SVD {dense:.2f} s, {dense / ours:.0f} x")
        ours = cpu(lambda: lm.combine([one, other], at / "both", rank=16)) / n
        total = product(one) + product(other)
        dense = cpu(lambda: torch.linalg.svd(total, full_matrices=True))  # as PEFT calls it
        print(f"combine two of rank 16, {2048 // scale}: {ours:.4f} s, dense SVD {dense:.2f} s, {dense / ours:.0f} x")
        options = {"density": 0.5}
        ours = cpu(lambda: lm.combine([one, other], at / "ties", method="ties", method_options=options, rank=16)) / n
        print(f"combine by ties in space full, {2048 // scale}: {ours:.4f} s")


if __name__ == "__main__":
    main()
