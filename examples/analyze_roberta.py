"""What the LoRA paper finds about GPT-3 (sections 7.2 and 7.3), looked for in its authors' adapter of RoBERTa.

python examples/analyze_roberta.py roberta_base_lora_mnli.bin [BASE]

The file is the one of github.com/microsoft/LoRA (examples/NLU; alpha 16). BASE: a checkpoint of RoBERTa-base, for the
part that looks at the weights themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import loramerge as lm

ALPHA = 16


def write(folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> Path:
    """An adapter in PEFT's layout."""
    folder.mkdir()
    held = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": ["projection"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def parts(source: str, folder: Path) -> dict[str, Path]:
    """The query and the value of all layers as adapters of their own, and random ones of the same shapes."""
    stored = torch.load(source, weights_only=True, map_location="cpu")
    made = {}
    for name in ("query", "value"):
        layers = {k: t for k, t in stored.items() if f".{name}.lora_" in k}
        tensors = {
            f"layer.{key.split('.')[3]}.projection.lora_{key[-1]}.weight": tensor for key, tensor in layers.items()
        }
        made[name] = write(folder / name, tensors, rank=8)
    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    made["random"] = write(folder / "random", noise, rank=8)
    return made


def spectra(data: dict[str, Any]) -> list[tuple[int, float]]:
    """For each layer: directions with 90 % of the change, and the share of the first one."""
    updates = [row["updates"][0] for row in data["modules"]]
    return [(u["rank_90"], (u["spectral_norm"] / u["norm"]) ** 2) for u in updates]


def similarity(first: Path, second: Path) -> list[tuple[int, float, float]]:
    """(i, phi(i, i) of A, chance), mean over the layers."""
    table = lm.analyze([first, second], points=0)["pairs"][0]["phi"]["A"]
    return [(i, table["mean"][i - 1][i - 1], table["chance"][i - 1][i - 1]) for i in (1, 2, 4, 8)]


def main(source: str, base: str | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        adapters = parts(source, Path(name))
        found: dict[str, Any] = {"spectra": {n: spectra(lm.analyze(path)) for n, path in adapters.items()}}
        found["similarity"] = {n: similarity(adapters["query"], adapters[n]) for n in ("value", "random")}

    print("A few directions do most (7.2): directions with 90 % of the change, and the share of the first")
    print(f"{'layer':>5}" + "".join(f"{n:>14}" for n in found["spectra"]))
    for layer, line in enumerate(zip(*found["spectra"].values(), strict=True)):
        print(f"{layer:>5}" + "".join(f"{k:>6} {share:>6.0%} " for k, share in line))

    print("\nTrained subspaces meet, random ones do not (figure 4): phi(i, i) of A, mean over layers, beside chance")
    for other, line in found["similarity"].items():
        print(f"query and {other:<8}" + "".join(f"  {i}: {phi:.4f} ({chance:.4f})" for i, phi, chance in line))

    if base is not None:
        data = lm.analyze(source, base=base, alpha=ALPHA, allow_pickle=True)
        found["base"] = data["adapters"][0]
        print("\nThe weight on the adapter's directions, on its own, on random ones (table 7, r = 8)")
        for row in data["modules"]:
            told, line = row["updates"][0]["amplification"], row["updates"][0]["amplification"]["table"][-1]
            sizes = "".join(f"{line[key] or float('nan'):9.3f}" for key in ("update", "base", "random"))
            print(f"{row['module']:<52}{sizes}   amplified {told['factor']:.1f} times")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
