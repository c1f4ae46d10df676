"""What an adapter costs at inference: Table 1 of the LoRA paper (arXiv 2106.09685) again, in torch and onnxruntime.

    python tests/benchmarks/latency.py [--layers 24] [--loads 2] [--runs 3] [--device cuda] [--json FILE]

A GPT-2 of medium shape with random weights, batch 1: the base; a LoRA merged into it; LoRAs beside it (PEFT in torch,
two more MatMuls a layer in the ONNX graph); and bottleneck adapters of two kinds. Each is timed beside its own base,
in turn, run by run; models are loaded in both orders, since where a model lies in memory moves its time by percents.
`base again` is a second copy of the base: what it shows is the noise of the method.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from latency_models import LOAD, VARIANTS, Run, make, quiet

import loramerge as lm


@dataclass(frozen=True)
class Pair:
    """One run of the base and one of the variant, directly after one another; seconds."""

    runtime: str
    variant: str
    sequence: int
    base_loaded_first: bool
    load: int
    base: float
    time: float
    base_cpu: float
    time_cpu: float


def timed(run: Run, sequence: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run(sequence)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    work: Path, runtime: str, variant: str, base_first: bool, load: int, args: argparse.Namespace
) -> tuple[list[Pair], Any]:
    """Pairs of runs, base and variant in turn, the first of a pair alternating; and the variant's last logits."""
    loaded = {}
    for name in ("base", variant) if base_first else (variant, "base"):
        loaded[name] = LOAD[runtime](work, name, args)
    base, other = loaded["base"][0], loaded[variant][0]
    pairs = []
    logits = loaded[variant][1](args.sequences[0])
    for sequence in args.sequences:
        for run in (base, other):
            for _ in range(args.warm):
                run(sequence)
        # Short runs are cheap and noisy, so there are more of them.
        for i in range(args.runs * (1 if sequence == max(args.sequences) else 4)):
            if i % 2:
                second, first = timed(other, sequence), timed(base, sequence)
                pairs.append(
                    Pair(runtime, variant, sequence, base_first, load, first[0], second[0], first[1], second[1])
                )
            else:
                first, second = timed(base, sequence), timed(other, sequence)
                pairs.append(
                    Pair(runtime, variant, sequence, base_first, load, first[0], second[0], first[1], second[1])
                )
    return pairs, logits


def summary(pairs: Sequence[Pair], cpu: bool) -> dict[str, float]:
    """Ratio to the base: the median over pairs, of the two load orders the geometric mean; quartiles of all pairs."""

    def ratios(some: Sequence[Pair]) -> list[float]:
        return [p.time_cpu / p.base_cpu if cpu else p.time / p.base for p in some]

    orders = [
        statistics.median(ratios(o))
        for first in (True, False)
        if (o := [p for p in pairs if p.base_loaded_first is first])
    ]
    low, high = (float(np.quantile(ratios(pairs), q)) for q in (0.25, 0.75))
    times = [p.time_cpu if cpu else p.time for p in pairs]
    quarters = [1000 * float(np.quantile(times, q)) for q in (0.25, 0.5, 0.75)]
    return {
        "ratio": math.prod(orders) ** (1 / len(orders)), "low": low, "high": high,
        "base_first": orders[0], "variant_first": orders[-1], "pairs": len(pairs),
        "ms": quarters[1], "ms_low": quarters[0], "ms_high": quarters[2],
    }  # fmt: skip


def table(pairs: Sequence[Pair], device: str) -> list[str]:
    clocks = [("wall", False)] + ([("CPU time", True)] if device == "cpu" else [])
    head = ["runtime", "sequence", "variant", "ms, CPU time" if device == "cpu" else "ms"]
    for name, _ in clocks:
        head += [f"ratio to base, {name} [quartiles]", "base / variant loaded first"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    groups: dict[tuple[str, int, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.runtime, pair.sequence, pair.variant), []).append(pair)
    order = {v: i for i, v in enumerate(VARIANTS)}
    for (runtime, sequence, variant), some in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1], order[g[0][2]])):
        cells = [runtime, str(sequence), variant]
        for i, (_, cpu) in enumerate(clocks):
            s = summary(some, cpu)
            if i == len(clocks) - 1:
                cells.insert(3, f"{s['ms']:.1f} [{s['ms_low']:.1f}, {s['ms_high']:.1f}]")
            cells += [
                f"**{s['ratio']:.3f}** [{s['low']:.3f}, {s['high']:.3f}]",
                f"{s['base_first']:.3f} / {s['variant_first']:.3f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sequences", type=lambda s: [int(n) for n in s.split(",")], default=[128, 1])
    parser.add_argument("--runtimes", type=lambda s: s.split(","), default=list(LOAD))
    parser.add_argument("--variants", type=lambda s: s.split(";"), default=VARIANTS, help="separated by ;")
    parser.add_argument("--loads", type=int, default=2, help="how often the two models are loaded in each order")
    parser.add_argument("--runs", type=int, help="pairs for each load; of shorter sequences four times as many")
    parser.add_argument("--warm", type=int, help="runs before the first that counts")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 0: as the runtimes choose")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--work", type=Path, help="keep models and graphs here and use them again (same --layers)")
    parser.add_argument("--json", type=Path, help="every single measurement")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    args.runs = args.runs or (3 if args.device == "cpu" else 100)
    args.warm = args.warm or (1 if args.device == "cpu" else 10)
    if unknown := [v for v in args.variants if v not in VARIANTS] + [r for r in args.runtimes if r not in LOAD]:
        parser.error(f"{', '.join(unknown)}: not one of {'; '.join([*VARIANTS, *LOAD])}")
    return args


def main() -> None:
    args = parse()
    quiet()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.threads:
        torch.set_num_threads(args.threads)
    pairs: list[Pair] = []
    logits: dict[tuple[str, str], np.ndarray] = {}
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{processor()}, {args.threads or os.cpu_count()} thread(s)"
    )
    about: dict[str, Any] = {
        "device": where, "layers": args.layers, "loads": args.loads, "runs": args.runs, "torch": torch.__version__,
        "transformers": transformers.__version__, "loramerge": lm.__version__, "load_before": os.getloadavg(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        make(work, args.layers, args.runtimes)
        print(f"made in {time.process_time():.0f} s of CPU", file=sys.stderr)
        try:
            # The orders are the outer loop, so that what is there after a break is complete as far as it goes.
            for load, base_first in enumerate([True, False] * args.loads):
                for runtime in args.runtimes:
                    for variant in args.variants:
                        new, logits[runtime, variant] = measure(work, runtime, variant, base_first, load, args)
                        pairs += new
                        gc.collect()
                        s = summary([p for p in new if p.sequence == max(args.sequences)], args.device == "cpu")
                        print(
                            f"{runtime}, {variant}: {s['ratio']:.3f} ({time.process_time():.0f} s of CPU)",
                            file=sys.stderr,
                        )
                        if args.json:
                            about |= {
                                "load_after": os.getloadavg(),
                                "peak_rss_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                            }
                            args.json.write_text(json.dumps(about | {"pairs": [asdict(p) for p in pairs]}))
        except KeyboardInterrupt:
            print("stopped; this is what was measured", file=sys.stderr)
    print(f"{where}; {args.layers} layers; torch {torch.__version__}", end="")
    if "onnxruntime" in args.runtimes:
        print(f", onnxruntime {__import__('onnxruntime').__version__}", end="")
    print(f"; load {about['load_before'][0]:.1f} to {os.getloadavg()[0]:.1f}\n")
    print("\n".join(table(pairs, args.device)))
    print("\nLargest difference of the last logits (the models are what they are said to be):\n")
    for variant in args.variants:
        parts = []
        for a, b, name in (
            (("torch", variant), ("onnxruntime", variant), "torch to onnxruntime"),
            (("torch", variant), ("torch", "base again"), "to the base"),
        ):
            if a in logits and b in logits:
                parts.append(f"{name} {np.abs(logits[a] - logits[b]).max():.1e}")
        if variant == "merged r=4" and ("torch", "unmerged r=4") in logits:
            parts.append(
                f"to unmerged r=4 {np.abs(logits['torch', variant] - logits['torch', 'unmerged r=4']).max():.1e}"
            )
        print(f"- {variant}: {', '.join(parts) or 'not compared'}")


if __name__ == "__main__":
    main()
