"""Merges a file of a trainer that loramerge has never heard of: its layout is described in one TOML file.

python examples/own_dialect.py BASE OUT

The description is own_dialect/adapters/acme.toml. At the shell the same is:

LORAMERGE_FORMATS=examples/own_dialect loramerge merge BASE acme.safetensors -o OUT
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import loramerge as lm


def write_acme(base: str, path: str, rank: int = 4) -> None:
    """A file such as that trainer would write, for two projections of the first layer."""
    checkpoint = lm.open_checkpoint(base)
    factors = {}
    for name in ("q_proj", "v_proj"):
        rows, columns = checkpoint.tensors[f"model.layers.0.self_attn.{name}.weight"].info.shape
        stem = f"net.model.layers.0.attention.{name}"
        factors[f"{stem}.acme_down"] = torch.randn(columns, rank) * 0.1
        factors[f"{stem}.acme_up"] = torch.randn(rank, rows) * 0.1
        factors[f"{stem}.acme_alpha"] = torch.tensor(8.0)
    checkpoint.close()
    save_file(factors, path)


def main(base: str, out: str) -> None:
    # A folder (or several, separated like PATH) that is laid out as formats/ is.
    os.environ["LORAMERGE_FORMATS"] = str(Path(__file__).parent / "own_dialect")
    write_acme(base, "acme.safetensors")
    seen = lm.inspect("acme.safetensors")
    print(f"{seen['title']}: {seen['modules']} modules, rank {seen['rank'][0]}, scale {seen['scale'][0]:g}")
    receipt = lm.merge(base, "acme.safetensors", out)
    print(f"{receipt.counts['changed']} tensors changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
