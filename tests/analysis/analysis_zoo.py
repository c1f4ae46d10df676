"""Small models and adapters for the analysis, and its dense oracle: numpy in float64, every formula written out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

Array = NDArray[np.float64]

WEIGHTS = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.self_attn.k_proj": (7, 24),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.0.mlp.down_proj": (24, 40),
    "model.layers.1.self_attn.q_proj": (24, 24),
    "model.layers.1.self_attn.k_proj": (7, 24),
}


def base_weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights with a few large directions, as trained ones have, and one that no adapter changes."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, (m, n) in WEIGHTS.items():
        strong = torch.randn(m, 3, generator=g) @ torch.randn(3, n, generator=g)
        made[f"{name}.weight"] = (torch.randn(m, n, generator=g) + strong).mul(0.05).to(dtype)
    made["model.norm.weight"] = torch.ones(24, dtype=dtype)
    return made


def write_base(folder: Path, shards: int = 2, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A checkpoint in several files."""
    folder.mkdir()
    weights = base_weights(**kwargs)
    names = list(weights)
    index = {}
    for s in range(shards):
        part = {n: weights[n] for n in names[s::shards]}
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return weights


def factors(
    seed: int, ranks: Mapping[str, int], dtype: torch.dtype = torch.float32, size: float = 0.05
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """module -> (B, A) with falling singular values; half of A is shared by all seeds."""
    made = {}
    for at, (name, r) in enumerate(ranks.items()):
        m, n = WEIGHTS[name]
        g = torch.Generator().manual_seed(100 * seed + at)
        common = torch.Generator().manual_seed(9000 + at)
        A = torch.randn(r, n, generator=g)
        A[: (r + 1) // 2] += 2 * torch.randn((r + 1) // 2, n, generator=common)
        B = torch.randn(m, r, generator=g) * torch.tensor([0.6**k for k in range(r)]) * size
        made[name] = B.to(dtype), A.to(dtype)
    return made


def write_adapter(
    folder: Path, held: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float = 8.0, rslora: bool = False
) -> None:
    """In PEFT's layout; ranks that differ go into rank_pattern."""
    folder.mkdir()
    tensors = {}
    for name, (B, A) in held.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {name: A.shape[0] for name, (_, A) in held.items()}
    first = next(iter(ranks.values()))
    config = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in held}),
        "rank_pattern": {name: r for name, r in ranks.items() if r != first},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def dense(B: torch.Tensor, A: torch.Tensor, scale: float) -> Array:
    """scale B A in float64."""
    made: Array = scale * (B.double().numpy() @ A.double().numpy())
    return made


# ------------------------------------------------------------------------------------------------ the oracle


def svd(D: Array, rank: int | None = None) -> tuple[Array, Array, Array]:
    """U (m, k), S (k,), V (n, k), numerically zero values left out."""
    U, S, Vt = np.linalg.svd(D, full_matrices=False)
    k = int((S[0] * 1e-10 < S).sum()) if rank is None else rank
    return U[:, :k], S[:k], Vt[:k].T


def phi(U1: Array, U2: Array, i: int, j: int) -> float:
    """Equation 4 of the paper, as it stands there."""
    return float(np.linalg.norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j))


def rounded(x: Array, dtype: str) -> Array:
    """To nearest, ties to even, for numbers in the normal range: multiples of 2^(e - p) with 2^e <= |x| < 2^(e + 1)."""
    bits, least = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}[dtype]
    exponent = np.floor(np.log2(np.abs(np.where(x == 0, 1, x))))
    step = 2.0 ** (np.maximum(exponent, least) - bits)
    made: Array = np.round(x / step) * step
    return made


def retention(W: Array, D: Array, dtype: str) -> float:
    return float(((rounded(W + D, dtype) - W) * D).sum() / (D * D).sum())


def spectrum(D: Array) -> dict[str, float]:
    _, S, _ = svd(D)
    p = S / S.sum()
    energy = np.cumsum(S**2) / np.sum(S**2)
    return {
        "rank": len(S),
        "rank_90": 1 + int(np.argmax(energy >= 0.9)),
        "rank_99": 1 + int(np.argmax(energy >= 0.99)),
        "entropy_rank": math.exp(-np.sum(p * np.log(p))),
        "stable_rank": np.linalg.norm(D) ** 2 / np.linalg.norm(D, 2) ** 2,
        "norm": np.linalg.norm(D),
        "spectral_norm": np.linalg.norm(D, 2),
    }
