"""Extraction of an adapter beside mergekit's: wall and CPU seconds, and the error of what each wrote.

    python tests/benchmarks/extract_vs_mergekit.py --mergekit VENV/bin/mergekit-extract-lora --directory DIR [--rank 16]

Makes a Llama-shaped bf16 checkpoint (222 MB) and a fine-tune of it (every linear changed by a matrix with a falling
spectrum, norms changed, embeddings and head changed), and extracts from it with both tools, in turn, on the same cores.
mergekit's dependencies exclude ours, so it lives in an environment of its own; without it this says so and ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 1024, 2816, 16, 8, 8, 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (kv, HIDDEN)),
            ("self_attn.v_proj", (kv, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(directory: Path) -> tuple[Path, Path]:
    """The two checkpoints; those of an earlier run are used again."""
    import torch
    from safetensors.torch import save_file

    base, tuned = directory / "base", directory / "tuned"
    if (tuned / "model.safetensors").exists():
        return base, tuned
    generator = torch.Generator().manual_seed(0)
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    for name, shape in shapes():
        weight = 0.02 * torch.randn(shape, generator=generator) + (1 if "norm" in name else 0)
        change = (0.02 if "norm" in name else 0.0004) * torch.randn(shape, generator=generator)
        if len(shape) == 2:
            rank = min(256, *shape)
            left = torch.randn(shape[0], rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
            change += 0.0008 * left @ torch.randn(rank, shape[1], generator=generator)
        before[name] = weight.bfloat16()
        after[name] = (before[name].float() + change).bfloat16()
    for folder, tensors in ((base, before), (tuned, after)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return base, tuned


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds (user and system, children too), largest resident set in GB."""

    wall: float
    cpu: float
    rss: float


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')[-2000:]}")
    # A child's peak starts at that of its parent, which made the checkpoints: below it nothing is known.
    known = usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9 if known else math.nan)


def middle(runs: Sequence[Run]) -> Run:
    return Run(*(statistics.median(getattr(run, field) for run in runs) for field in ("wall", "cpu", "rss")))


def error(base: Path, tuned: Path, adapter: Path) -> float:
    """|tuned - base - scale B A| over all adapted linears, relative to their changes, in fp64."""
    import torch
    from safetensors import safe_open

    config = json.loads((adapter / "adapter_config.json").read_text())
    lost = whole = 0.0
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(tuned / "model.safetensors", "pt") as new,
        safe_open(adapter / "adapter_model.safetensors", "pt") as file,
    ):
        keys = set(file.keys())
        for name, shape in shapes():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
            if len(shape) != 2 or key not in keys:
                continue
            A, B = file.get_tensor(key).double(), file.get_tensor(key.replace("lora_A", "lora_B")).double()
            change = new.get_tensor(name).double() - old.get_tensor(name).double()
            module = name.removesuffix(".weight")
            rank = dict(config.get("rank_pattern") or {}).get(module, config["r"])
            alpha = dict(config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            if A.shape[0] != rank:  # patterns are regular expressions; all our scales are 1
                rank = alpha = A.shape[0]
            lost += float(torch.linalg.vector_norm(change - alpha / rank * (B @ A))) ** 2
            whole += float(torch.linalg.vector_norm(change)) ** 2
    return math.sqrt(lost / whole)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-extract-lora"), help="its executable")
    parser.add_argument("--directory", type=Path, required=True, help="where inputs and outputs go")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="of loramerge; mergekit runs once")
    parser.add_argument("--json", type=Path, help="write every number there")
    options = parser.parse_args(arguments)
    if options.mergekit is None or not Path(options.mergekit).exists():
        print(
            "skipped: mergekit-extract-lora is not installed. Make an environment of its own for it\n"
            "  python3 -m venv mk && mk/bin/pip install mergekit\n"
            "and give --mergekit mk/bin/mergekit-extract-lora",
            file=sys.stderr,
        )
        return None
    base, tuned = make(options.directory)
    out, theirs = options.directory / "ours", options.directory / "mergekit"
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours_command = [sys.executable, "-m", "loramerge", "extract", str(base), str(tuned), "-o", str(out), "--force"]
    ours_command += ["--rank", str(options.rank), "--no-progress"]
    their_command = [options.mergekit, "--model", str(tuned), "--base-model", str(base), "--out-path", str(theirs)]
    their_command += ["--max-rank", str(options.rank), "--quiet"]
    for path in (base, tuned):
        (path / "model.safetensors").read_bytes()  # into the page cache
    ours = middle([timed(ours_command, environment) for _ in range(options.runs)])
    start = middle([timed([sys.executable, "-c", "import torch"], environment) for _ in range(options.runs)])
    shutil.rmtree(theirs, ignore_errors=True)
    mergekit = timed(their_command, environment)
    their_start = timed([options.mergekit, "--help"], environment)
    rows = {
        "loramerge extract": (ours, start, error(base, tuned, out), size(out)),
        "mergekit-extract-lora": (mergekit, their_start, error(base, tuned, theirs), size(theirs)),
    }
    print(
        f"rank {options.rank}, {sum(p.stat().st_size for p in base.iterdir()) / 1e6:.0f} MB, {os.cpu_count()} cores\n"
    )
    print("| tool | wall s | CPU s | CPU minus start-up s | peak RSS GB | error | MB |")
    print("|---|---|---|---|---|---|---|")
    for name, (run, begin, wrong, megabytes) in rows.items():
        print(
            f"| {name} | {run.wall:.2f} | {run.cpu:.2f} | {run.cpu - begin.cpu:.2f} | {run.rss:.2f} | {wrong:.6f} "
            f"| {megabytes:.1f} |"
        )
    ratios = {
        "wall": mergekit.wall / ours.wall,
        "cpu": mergekit.cpu / ours.cpu,
        "cpu minus start-up": (mergekit.cpu - their_start.cpu) / (ours.cpu - start.cpu),
    }
    print("\n" + ", ".join(f"{name} {ratio:.1f} x" for name, ratio in ratios.items()))
    result = {
        "rank": options.rank,
        "ratios": ratios,
        "tools": {
            name: {"wall": run.wall, "cpu": run.cpu, "rss": run.rss, "start_cpu": begin.cpu, "error": wrong, "mb": mb}
            for name, (run, begin, wrong, mb) in rows.items()
        },
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))
    return result


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
