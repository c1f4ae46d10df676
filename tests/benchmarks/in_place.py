"""How long a switch in place takes beside a durable copy of the model.

    python tests/benchmarks/in_place.py --gb 3.5 --runs 3 --directory DIR

The adapters are on q_proj and v_proj only. Needs what merge_speed.py needs. See the README beside it.
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
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import merge_speed
from merge_speed import RANK, Shape, make_base, write_safetensors

TARGETS = ("self_attn.q_proj", "self_attn.v_proj")


def factors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an adapter on q and v."""
    for name, size in shape.factors():
        if any(target in name for target in TARGETS):
            yield name, size


def make_adapter(directory: Path, shape: Shape, seed: int) -> None:
    """A PEFT adapter of random factors."""
    directory.mkdir(parents=True)
    write_safetensors(directory / "adapter_model.safetensors", list(factors(shape)), "F32", seed)
    # With these factors and weights a change of about 1 % of the weights, as training gives.
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "target_modules": [t[10:] for t in TARGETS]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def timed_copy(model: Path, to: Path) -> float:
    """Seconds of `cp` and the sync of the copies."""
    files = [str(path) for path in model.iterdir() if path.is_file()]
    to.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *files, str(to)], check=True)
    subprocess.run(["sync", *(str(path) for path in to.iterdir())], check=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(to)
    return seconds


def timed_switch(model: Path, adapter: Path) -> tuple[float, float]:
    """Seconds of the command, the start of Python and its imports included: on the wall, and of CPU."""
    begin, before = time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", "loramerge", "switch", str(model), str(adapter), "--in-place", "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin, cpu_seconds() - before


def cpu_seconds() -> float:
    """User and system time of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.5, help="size of the model in 10^9 bytes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, required=True, help="a place on the disk to measure")
    parser.add_argument("--json", type=Path, help="every measurement")
    arguments = parser.parse_args()

    shape = merge_speed.shape_for(arguments.gb)
    place = arguments.directory / f"in-place-{arguments.gb:g}"
    model, adapters = place / "model", [place / "a", place / "b"]
    if not (place / "made").exists():
        shutil.rmtree(place, ignore_errors=True)
        model.mkdir(parents=True)
        make_base(model, shape)
        for seed, adapter in enumerate(adapters):
            make_adapter(adapter, shape, seed)
        command = [sys.executable, "-m", "loramerge", "merge", str(model), str(adapters[0])]
        subprocess.run([*command, "--in-place", "--reversible", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        (place / "made").touch()

    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    linears = shape.linears()
    changed = 2 * shape.layers * sum(linears[t][0] * linears[t][1] for t in TARGETS)
    copies, switches, work = [], [], []
    for number in range(arguments.runs):
        os.sync()
        copies.append(timed_copy(model, place / "copy"))
        os.sync()
        seconds, cpu = timed_switch(model, adapters[(number + 1) % 2])
        switches.append(seconds)
        work.append(cpu)
        print(f"run {number + 1}: copy {copies[-1]:.2f} s, switch {switches[-1]:.2f} s", file=sys.stderr)
    copy, switch = statistics.median(copies), statistics.median(switches)
    print(f"model {size / 1e9:.2f} GB, changed {changed / 1e9:.3f} GB ({changed / size:.1%})")
    print(f"durable copy {copy:.2f} s, switch in place {switch:.2f} s, ratio {switch / copy:.2f}")
    print(f"CPU of the switch {statistics.median(work):.2f} s on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.json:
        data = {"bytes": size, "changed": changed, "copies": copies, "switches": switches, "cpu": work}
        arguments.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
