"""How much faster the core is than the dense way: re-ranking one layer, combining two adapters. Ratios in one run.

    python tests/benchmarks/algebra_speed.py [--threads 1] [--runs 3] [--quick]

Needs peft for its `svd`; `--quick` halves the sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from loramerge import algebra

AIMS = {"resize": 100, "combine": 500}


def seconds(call: Callable[[], object], runs: int) -> float:
    """Median wall time; the first call of the fast ones warms up."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def factors(m: int, n: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)


def report(name: str, dense: float, ours: float, distance: float) -> None:
    ratio, aim = dense / ours, AIMS[name.split()[0]]
    verdict = "reached" if ratio >= aim else "MISSED"
    print(
        f"{name:52s} {dense:9.3f} s {ours * 1000:9.2f} ms {ratio:8.0f} x (aim {aim}: {verdict}), apart {distance:.1e}"
    )


def resize(size: int, runs: int) -> None:
    """Rank 128 to 32, against the SVD of the product in float32."""
    b, a = factors(size, size, 128, 0)
    kept: list[torch.Tensor] = []

    def dense() -> None:
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        kept[:] = [u[:, :32] * s[:32] @ v[:32]]

    slow = seconds(dense, 3)
    for dtype in (torch.float32, torch.float64):
        update = algebra.Factors(b.to(dtype), a.to(dtype))
        fast = seconds(partial(algebra.resize, update, algebra.fixed(32)), max(runs, 5))
        got = algebra.resize(update, algebra.fixed(32))
        product = got.factors.dense().float()
        apart = float(torch.linalg.vector_norm(product - kept[0]) / torch.linalg.vector_norm(kept[0]))
        report(f"resize {size} x {size}, rank 128 -> 32, {str(dtype)[6:]}", slow, fast, apart)


def combine(size: int, runs: int) -> None:
    """Two adapters of rank 16 into one of rank 16, against PEFT's `svd`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, size, bias=False)), config, adapter_name="one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    pairs = [factors(size, size, 16, seed) for seed in (1, 2)]
    for name, (b, a) in zip(("one", "two"), pairs, strict=True):
        layer.lora_B[name].weight.data.copy_(b)
        layer.lora_A[name].weight.data.copy_(a)

    def ours(dtype: torch.dtype) -> algebra.Factors:
        (b1, a1), (b2, a2) = pairs
        one, two = algebra.fold(b1, a1, weight=0.7, dtype=dtype), algebra.fold(b2, a2, weight=0.4, dtype=dtype)
        return algebra.linear(algebra.Stack([one, two], dtype), algebra.fixed(16))

    names = iter(f"out{i}" for i in range(3))  # a name that exists returns at once, without a word

    def peft() -> None:
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], next(names), combination_type="svd", svd_rank=16)

    slow = seconds(peft, 3)
    wanted = layer.get_delta_weight("out0").detach()
    for dtype in (torch.float32, torch.float64):
        got = ours(dtype).dense().float()
        fast = seconds(partial(ours, dtype), 20)
        apart = float(torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted))
        report(f"combine two of rank 16, {size} x {size}, {str(dtype)[6:]}", slow, fast, apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    resize(1536 if arguments.quick else 3072, arguments.runs)
    combine(1024 if arguments.quick else 2048, arguments.runs)


if __name__ == "__main__":
    main()
