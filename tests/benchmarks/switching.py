"""How long a switch between adapters takes on tensors in memory, what is held for it, and that nothing drifts.

    python tests/benchmarks/switching.py --mb 50 --switches 1000

See the README beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import loramerge as lm

RANK = 16
BITS = {2: torch.int16, 4: torch.int32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def weights(megabytes: float, hidden: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Square projections whose rows have log-normal sizes, with 0.1 % outliers."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(megabytes * 1e6 / (hidden * hidden * dtype.itemsize)))
    tensors = {}
    for i in range(count):
        weight = torch.randn(hidden, hidden, generator=generator)
        weight *= 0.02 * torch.exp(0.5 * torch.randn(hidden, 1, generator=generator))
        weight[torch.rand(hidden, hidden, generator=generator) < 1e-3] *= 10
        tensors[f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj.weight"] = weight.to(dtype).to(device)
    return tensors


def adapter(folder: Path, tensors: Mapping[str, Tensor], seed: int, relative: float) -> Path:
    """A PEFT adapter on all of them, whose change is `relative` of each weight's norm."""
    generator = torch.Generator().manual_seed(1 + seed)
    factors = {}
    for name, weight in tensors.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        A = torch.randn(RANK, weight.shape[1], generator=generator)
        B = torch.randn(weight.shape[0], RANK, generator=generator)
        B *= relative * float(weight.float().norm()) / float((B @ A).norm())
        factors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return folder


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Share of the elements whose bits differ."""
    kind = BITS[next(iter(a.values())).element_size()]
    off = sum(int((a[name].view(kind) != b[name].view(kind)).sum()) for name in a)
    return off / sum(t.numel() for t in a.values())


def copy_seconds(tensors: Mapping[str, Tensor]) -> float:
    """What copying all of them once within memory takes: the median of 5."""
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    times = []
    for _ in range(6):
        started = time.perf_counter()
        for name, tensor in tensors.items():
            into[name].copy_(tensor)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def subtracted(tensors: Mapping[str, Tensor], paths: list[Path], switches: int) -> float:
    """The share of weights that plain adding and subtracting in their dtype leaves wrong after so many switches."""
    from safetensors.torch import load_file

    held = {name: tensor.clone() for name, tensor in tensors.items()}
    for i in range(switches):
        factors = load_file(
            paths[i % len(paths)] / "adapter_model.safetensors", device=str(next(iter(held.values())).device)
        )
        for name, weight in held.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            delta = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
            weight += delta
            weight -= delta
    return differing(held, tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=50, help="size of the weights in MB (50)")
    parser.add_argument("--hidden", type=int, default=1024, help="rows and columns of each weight (1024)")
    parser.add_argument("--switches", type=int, default=1000, help="how many switches (1000)")
    parser.add_argument("--adapters", type=int, default=5, help="among how many adapters (5)")
    parser.add_argument("--relative", type=float, default=0.01, help="norm of a change, of the weight's (0.01)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tensors = weights(arguments.mb, arguments.hidden, DTYPES[arguments.dtype], arguments.device)
    original = {name: tensor.clone() for name, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        paths = [adapter(Path(folder) / str(i), tensors, i, arguments.relative) for i in range(arguments.adapters)]
        opened = [lm.open_adapter(path) for path in paths]
        wanted = {i: lm.merge_tensors(original, opened[i]) for i in (0, arguments.adapters - 1)}
        factors = sum(adapter.nbytes for adapter in opened) / len(opened)
        s = lm.Switcher(tensors)
        order = torch.randint(arguments.adapters, (arguments.switches,), generator=torch.Generator().manual_seed(0))
        times, held, wrong = [], 0, 0.0
        for n, i in enumerate(order.tolist()):
            started = time.perf_counter()
            s.switch(opened[i])
            times.append(time.perf_counter() - started)
            held = max(held, s.held_bytes)
            if i in wanted and n >= arguments.switches - 20:
                wrong = max(wrong, differing(tensors, wanted[i]))
            if sys.stderr.isatty():
                print(f"\r{n + 1} of {arguments.switches}", end="", file=sys.stderr)
        s.remove()
        drift = differing(tensors, original)
        naive = subtracted(original, paths, min(20, arguments.switches))
    copy = copy_seconds(tensors)
    switch = statistics.median(times[1:] or times)
    size = f"{arguments.hidden} x {arguments.hidden}"
    rows = {
        "weights": f"{len(tensors)} of {size}, {arguments.dtype}, {total / 1e6:.0f} MB, on {arguments.device}",
        "adapters": f"{arguments.adapters} of rank {RANK}, changes of {arguments.relative:.2%}",
        "switches": f"{arguments.switches}",
        "time of a switch": f"{switch * 1e3:.0f} ms ({total / switch / 1e6:.0f} MB/s)",
        "copying the weights": f"{copy * 1e3:.1f} ms; a switch is {switch / copy:.0f} x that",
        "held": f"{(held - factors) / total:.3%} of the weights, and the adapter's factors ({factors / total:.2%})",
        "weights unlike a fresh merge": f"{wrong:.2%} (the last 20 switches)",
        "weights that drifted": f"{drift:.2%} after the last removal",
        "by adding and subtracting": f"{naive:.2%} after {min(20, arguments.switches)} switches",
    }
    print("| | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    return 1 if drift or wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
