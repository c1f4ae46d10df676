"""How long a merge takes beside a durable copy of the same files, and beside other tools.

    python tests/benchmarks/merge_speed.py --gb 3.5 --runs 3 --directory DIR

Needs numpy to make the inputs, and whichever of the tools are installed. See the README beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TOOLS = ("cp", "loramerge", "peft", "mergekit")
RANK, ALPHA = 16, 32
SHARD_BYTES = 2_000_000_000
BLOCK = 4_000_000
"""Elements made at a time, so that the inputs take no more memory than this to make."""

PEFT_IMPORTS = "import torch, peft; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
PEFT_MERGE = f"""{PEFT_IMPORTS}
import sys
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="2GB")
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 32000

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one block."""
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (self.intermediate, h),
            "mlp.up_proj": (self.intermediate, h),
            "mlp.down_proj": (h, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the whole checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, shape in self.linears().items():
                yield f"model.layers.{layer}.{name}.weight", shape
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def factors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the adapter."""
        for layer in range(self.layers):
            for name, (rows, cols) in self.linears().items():
                module = f"base_model.model.model.layers.{layer}.{name}"
                yield f"{module}.lora_A.weight", (RANK, cols)
                yield f"{module}.lora_B.weight", (rows, RANK)


def shape_for(gigabytes: float) -> Shape:
    """A Llama whose bf16 weights take about so many gigabytes (10^9 bytes)."""
    if gigabytes < 1:
        shape = Shape(512, 1408, 8, 4, 1)
    elif gigabytes < 7:
        shape = Shape(2048, 5632, 32, 4, 1)
    else:
        shape = Shape(4096, 11008, 32, 32, 1)
    block = sum(rows * cols for rows, cols in shape.linears().values()) + 2 * shape.hidden
    rest = 2 * shape.vocabulary * shape.hidden + shape.hidden
    layers = max(1, round((gigabytes * 1e9 / 2 - rest) / block))
    return Shape(shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, layers)


# ---------------------------------------------------------------------------------------------------- inputs


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor."""
    total = 1
    for n in shape:
        total *= n
    return total


def write_safetensors(path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str, seed: int) -> None:
    """One safetensors file of normal noise, written piece by piece."""
    import numpy as np

    width = {"BF16": 2, "F32": 4}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors:
        end = position + count(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            numel = count(shape)
            for first in range(0, numel, BLOCK):
                values = random.standard_normal(min(BLOCK, numel - first), dtype=np.float32)
                values = values * np.float32(0.02) + np.float32(1 if "norm" in name else 0)
                # bf16 is the upper half of an fp32; cut, not rounded: it is noise.
                file.write(((values.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else values).tobytes())


def make_base(directory: Path, shape: Shape) -> None:
    """A sharded checkpoint with the config that transformers needs to load it."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = total = 0
    for name, dims in shape.tensors():
        nbytes = 2 * count(dims)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += nbytes
        total += nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, tensors, "BF16", number)
        weight_map |= dict.fromkeys((name for name, _ in tensors), file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def make_adapter(directory: Path, shape: Shape) -> None:
    """A PEFT adapter, fp32, on every linear layer."""
    write_safetensors(directory / "adapter_model.safetensors", list(shape.factors()), "F32", 0)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.linears()}),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def make_inputs(directory: Path, gigabytes: float) -> tuple[Path, Path]:
    """The checkpoint and its adapter; made once, and found again by the next call."""
    shape = shape_for(gigabytes)
    tag = f"{gigabytes:g}gb-{shape.hidden}x{shape.layers}"
    made = []
    for kind, make in (("base", make_base), ("adapter", make_adapter)):
        path = directory / f"{kind}-{tag}"
        if not path.exists():
            unfinished = directory / f"{kind}-{tag}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            make(unfinished, shape)
            unfinished.rename(path)
        made.append(path)
    return made[0], made[1]


# -------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock, seconds of CPU (user and system, its children too), peak memory."""

    wall: float
    cpu: float
    peak_bytes: int


def measure(command: Sequence[str], log: Path) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"exit code {process.returncode} from {' '.join(command)}\n{tail}")
    # Linux counts kilobytes, macOS bytes. The child starts with this process's peak, so this one stays small:
    # the inputs are made in another.
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


@dataclass(frozen=True)
class Tool:
    """What to run: the merge (or copy), and the same tool's start-up without any work, if that is worth telling."""

    name: str
    shown: str
    command: Callable[[Path, Path, Path], list[str]]
    start_up: list[str] | None = None


def copy_command(base: Path, adapter: Path, out: Path) -> list[str]:
    """`cp`, then `sync` of what it wrote: a copy that a power cut does not take back, which a merge is too."""
    return ["sh", "-c", 'mkdir "$2" && cp "$1"/* "$2" && sync "$2"/* "$2"', "sh", str(base), str(out)]


def mergekit_command(base: Path, adapter: Path, out: Path) -> list[str]:
    """mergekit applies an adapter as `base+adapter` in a passthrough merge."""
    recipe = out.with_name("mergekit.yaml")
    model = json.dumps(f"{base}+{adapter}")
    recipe.write_text(f"models:\n  - model: {model}\nmerge_method: passthrough\ndtype: bfloat16\n")
    cache = out.with_name("mergekit-cache")
    return [mergekit() or "", str(recipe), str(out), "--lora-merge-cache", str(cache)]


def mergekit() -> str | None:
    """The program of mergekit, beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name("mergekit-yaml")
    return str(beside) if beside.exists() else shutil.which("mergekit-yaml")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(checkout)"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def tools(names: Sequence[str]) -> list[Tool]:
    """The tools of these names that are here; the others are named on stderr."""
    python = sys.executable
    found = []
    for name in names:
        if name == "cp":
            found.append(Tool("cp", "`cp` and `sync`", copy_command))
        elif name == "loramerge" and installed("loramerge"):
            found.append(
                Tool(
                    "loramerge",
                    f"loramerge {version('loramerge')}",
                    lambda b, a, o: [python, "-m", "loramerge", "merge", str(b), str(a), "-o", str(o), "--quiet"],
                    [python, "-c", "import torch, loramerge.cli.main"],
                )
            )
        elif name == "peft" and installed("peft") and installed("transformers"):
            found.append(
                Tool(
                    "peft",
                    f"PEFT {version('peft')}, transformers {version('transformers')} (no sync)",
                    lambda b, a, o: [python, "-c", PEFT_MERGE, str(b), str(a), str(o)],
                    [python, "-c", PEFT_IMPORTS],
                )
            )
        elif name == "mergekit" and mergekit():
            found.append(
                Tool(
                    "mergekit",
                    f"mergekit {version('mergekit')} (no sync)",
                    mergekit_command,
                    [mergekit() or "", "--help"],
                )
            )
        else:
            print(f"skipped: {name} is not installed", file=sys.stderr)
    return found


def warm(paths: Sequence[Path]) -> None:
    """Read the inputs once, so that every tool finds them in the page cache."""
    buffer = bytearray(1 << 22)
    for path in paths:
        for file in sorted(path.iterdir()):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def touch_memory(nbytes: int) -> None:
    """Make a process use and free as much memory as the outputs have, where so much is free.

    On a virtual machine the first use of a page costs a fault of the host; it is the copy, which fills the page cache,
    that would pay for it, by several times its own cost.
    """
    program = f"b = bytearray({nbytes})\nfor i in range(0, len(b), 4096): b[i] = 1"
    subprocess.run([sys.executable, "-c", program], check=False)


def run_all(chosen: Sequence[Tool], runs: int, base: Path, adapter: Path, work: Path) -> dict[str, Any]:
    """All tools in turn, `runs` times: name -> {"merge": [Run, ...], "start_up": [Run, ...]}."""
    results: dict[str, Any] = {tool.name: {"merge": [], "start_up": []} for tool in chosen}
    out, log = work / "out", work / "log"
    for number in range(1, runs + 1):
        for tool in chosen:
            if tool.start_up is not None:
                results[tool.name]["start_up"].append(measure(tool.start_up, log))
            command = tool.command(base, adapter, out)
            touch_memory(sum(f.stat().st_size for f in base.iterdir()) * 5 // 4)
            warm([base, adapter])
            os.sync()  # nobody pays for what the tool before has left to be written
            done = measure(command, log)
            results[tool.name]["merge"].append(done)
            print(f"run {number}: {tool.name} {done.wall:.2f} s, CPU {done.cpu:.2f} s", file=sys.stderr)
            shutil.rmtree(out)
            shutil.rmtree(work / "mergekit-cache", ignore_errors=True)
    return results


# -------------------------------------------------------------------------------------------------- reporting


def machine(directory: Path) -> dict[str, str]:
    """Where and when this was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": file_system(directory),
        "python": f"Python {platform.python_version()}, torch {version('torch')}",
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    real = directory.resolve()
    holding = [(len(m[1]), m[2]) for m in mounts if real.is_relative_to(m[1].replace("\\040", " "))]
    return max(holding)[1] if holding else "unknown"


def summary(chosen: Sequence[Tool], results: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians over the runs, and ratios to the copy."""

    def median(runs: Sequence[Run], what: str) -> float:
        return float(statistics.median(getattr(run, what) for run in runs))

    copy = median(results["cp"]["merge"], "wall") if "cp" in results else None
    rows = []
    for tool in chosen:
        runs, start_ups = results[tool.name]["merge"], results[tool.name]["start_up"]
        wall = median(runs, "wall")
        work = wall - median(start_ups, "wall") if start_ups else wall
        rows.append(
            {
                "tool": tool.shown,
                "wall_s": wall,
                "ratio": wall / copy if copy else None,
                "work_s": work,
                "work_ratio": work / copy if copy else None,
                "cpu_s": median(runs, "cpu"),
                "peak_bytes": median(runs, "peak_bytes"),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The summary as a Markdown table."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = [
        "| | wall s | ratio to the copy | wall minus start-up s | ratio to the copy | CPU s | peak RSS GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            row["tool"],
            f"{row['wall_s']:.2f}",
            ratio(row["ratio"]),
            f"{row['work_s']:.2f}",
            ratio(row["work_ratio"]),
            f"{row['cpu_s']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.5, help="size of the checkpoint in 10^9 bytes (3.5)")
    parser.add_argument("--runs", type=int, default=3, help="how often each tool runs (3)")
    parser.add_argument("--directory", type=Path, required=True, help="where inputs are kept and outputs written")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"which, in this order ({','.join(TOOLS)})")
    parser.add_argument("--json", type=Path, help="write every single measurement to this file")
    parser.add_argument("--prepare-only", action="store_true", help="make the inputs and measure nothing")
    options = parser.parse_args(arguments)
    options.tools = options.tools.split(",")
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"unknown tools {', '.join(sorted(unknown))}: choose from {', '.join(TOOLS)}")
    if options.gb <= 0 or options.runs < 1:
        parser.error("--gb and --runs must be positive")
    return options


def find_checkout() -> None:
    """Where loramerge is not installed, the checkout that this file lies in is measured."""
    root = str(Path(__file__).resolve().parents[2])
    if not installed("loramerge"):
        sys.path.append(root)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def main() -> None:
    options = parse()
    find_checkout()
    options.directory = options.directory.resolve()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.prepare_only:
        make_inputs(options.directory, options.gb)
        return
    prepare = ["--prepare-only", "--gb", str(options.gb), "--directory", str(options.directory)]
    subprocess.run([sys.executable, __file__, *prepare], check=True)
    base, adapter = make_inputs(options.directory, options.gb)
    work = options.directory / f"work-{os.getpid()}"
    work.mkdir()
    try:
        chosen = tools(options.tools)
        results = run_all(chosen, options.runs, base, adapter, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    where, rows = machine(options.directory), summary(chosen, results)
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"{size / 1e9:.2f} GB bf16, r={RANK} on all linear layers, warm inputs, median of {options.runs} runs.  ")
    print("; ".join(where.values()) + ".\n")
    print("\n".join(table(rows)))
    if options.json:
        raw = {name: {k: [asdict(r) for r in v] for k, v in kinds.items()} for name, kinds in results.items()}
        document = {"bytes": size, "runs": options.runs, "machine": where, "summary": rows, "measurements": raw}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
