"""How long it takes to bind an adapter of 1,000 modules to a checkpoint of 20,000 tensors, and in what memory.

python tests/benchmarks/binding_speed.py

Headers only: shapes are tiny, names are those of real layouts. Each case runs in a process of its own; "peak" is its
peak resident size with the interpreter and all imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MODULES = 1_000
TENSORS = 20_000
RANK = 2


def llm() -> tuple[list[str], list[str], str, str]:
    """An expert model with v4 names; PEFT pairs on its attention and shared experts."""
    base, targets = [], []
    for layer in range(250):
        stem = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            base.append(f"{stem}.self_attn.{name}.weight")
            targets.append(f"{stem}.self_attn.{name}")
        for expert in range(25):
            base += [f"{stem}.mlp.experts.{expert}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        base.append(f"{stem}.input_layernorm.weight")
    return base[:TENSORS], targets[:MODULES], "base_model.model.", "lora_A.weight lora_B.weight"


def image(split: bool) -> tuple[list[str], list[str], str, str]:
    """Double and single blocks in the original layout; pairs on it, or on the split names of the other one."""
    base = ["img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "final_layer.linear.weight"]
    double = (
        "img_mod.lin",
        "txt_mod.lin",
        "img_attn.qkv",
        "img_attn.proj",
        "txt_attn.qkv",
        "txt_attn.proj",
        "img_mlp.0",
    )
    targets = []
    for block in range(64):
        stem = f"double_blocks.{block}"
        base += [f"{stem}.{name}.{leaf}" for name in double for leaf in ("weight", "bias")]
        for side in ("img", "txt"):
            base += [f"{stem}.{side}_attn.norm.{name}.scale" for name in ("query_norm", "key_norm")]
        if split:
            targets += [f"transformer.transformer_blocks.{block}.attn.to_{x}" for x in "qkv"]
            targets += [f"transformer.transformer_blocks.{block}.attn.add_{x}_proj" for x in "qkv"]
        else:
            targets += [f"{stem}.{name}" for name in double]
    for block in range(64):
        stem = f"single_blocks.{block}"
        base += [
            f"{stem}.{name}.{leaf}" for name in ("linear1", "linear2", "modulation.lin") for leaf in ("weight", "bias")
        ]
        if split:
            targets += [f"transformer.single_transformer_blocks.{block}.attn.to_{x}" for x in "qkv"]
            targets.append(f"transformer.single_transformer_blocks.{block}.proj_mlp")
        else:
            targets += [f"{stem}.{name}" for name in ("linear1", "linear2")]
    base += [
        f"text_encoders.t5xxl.transformer.encoder.block.{i}.layer.{j}.w.weight" for i in range(3000) for j in range(6)
    ]
    if split:
        return base[:TENSORS], targets[:MODULES], "", "lora_A.weight lora_B.weight"
    flat = [t.replace(".", "_") for t in targets]
    return base[:TENSORS], flat[:MODULES], "lora_unet_", "lora_down.weight lora_up.weight"


CASES = {"language model, PEFT": llm, "image, flat": lambda: image(False), "image, split on fused": lambda: image(True)}


def write(case: str, folder: Path) -> None:
    """The two files of a case."""
    import torch
    from safetensors.torch import save_file

    base, targets, prefix, suffixes = CASES[case]()
    fused = {"linear1": 16, "qkv": 12}
    small = torch.zeros(4, 4)

    def weight(name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        rows = next((n for end, n in fused.items() if module.endswith(end)), 4)
        return torch.zeros(rows, 4) if leaf == "weight" else torch.zeros(rows)

    save_file({name: weight(name) for name in base}, folder / "base.safetensors")
    down, up = suffixes.split()
    factors = {}
    for target in targets:
        rows = next((n for end, n in fused.items() if target.endswith(end)), 4)
        factors[f"{prefix}{target}.{down}"] = small[:RANK].clone()
        factors[f"{prefix}{target}.{up}"] = torch.zeros(rows, RANK)
    save_file(factors, folder / "adapter_model.safetensors")
    if prefix.startswith("base_model"):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 4}))


def bind_once(folder: Path) -> dict[str, float]:
    """Opens both files, binds, and tells the seconds, the megabytes and how many modules matched."""
    from loramerge.adapters.opening import open_adapter
    from loramerge.binding.bind import bind
    from loramerge.binding.namespace import slots_of
    from loramerge.tensors.checkpoint import open_checkpoint

    begin = time.perf_counter()
    checkpoint = open_checkpoint(folder / "base.safetensors")
    adapter = open_adapter(folder / "adapter_model.safetensors")
    opened = time.perf_counter()
    slots = slots_of({n: (located.info.dtype, located.info.shape) for n, located in checkpoint.tensors.items()})
    binding = bind(slots, {}, [(adapter, 1.0)])
    end = time.perf_counter()
    status = Path("/proc/self/status").read_text()  # not getrusage: its peak is the parent's where that was higher
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "tensors": len(checkpoint.tensors),
        "modules": binding.matches[0].matched,
        "open s": opened - begin,
        "bind s": end - opened,
        "peak MB": peak / 1024,
    }


def results() -> Iterator[tuple[str, dict[str, float]]]:
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write(case, Path(folder))
            words = [sys.executable, __file__, "--bind", folder]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            yield case, json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--bind"]:
        print(json.dumps(bind_once(Path(sys.argv[2]))))
        return
    print("| case | tensors | modules | open s | bind s | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, row in results():
        print(f"| {case} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
