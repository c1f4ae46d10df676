"""Tiny checkpoints and adapters, made by hand, and a runner for the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
DIM, LAYERS, RANK, ALPHA, VOCABULARY = 8, 2, 2, 4, 16
MODULES = ("q_proj", "v_proj")

CLEAN = ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG", "PYTHONIOENCODING", "COLUMNS")
"""Variables of the caller that would change what is printed."""


def base_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama-like state dict, float32, (out, in)."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, DIM)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{m}.weight": (DIM, DIM) for m in ("q_proj", "k_proj", "v_proj", "o_proj")}
        shapes |= {f"{at}.mlp.up_proj.weight": (2 * DIM, DIM), f"{at}.input_layernorm.weight": (DIM,)}
    shapes["lm_head.weight"] = (VOCABULARY, DIM)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def adapter_tensors(seed: int = 1, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Factors of q_proj and v_proj in every layer under PEFT's names: A (r, in), B (out, r)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module in MODULES:
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = rng.standard_normal((RANK, DIM)).astype(np.float32)
            tensors[f"{at}.lora_B.weight"] = rng.standard_normal((DIM, RANK)).astype(np.float32)
    return tensors


def write_base(directory: Path, tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    directory.mkdir()
    save_file(dict(tensors or base_tensors()), directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_adapter(directory: Path, tensors: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    directory.mkdir()
    save_file(dict(tensors or adapter_tensors()), directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders above."""
    return SimpleNamespace(
        base=write_base, adapter=write_adapter, base_tensors=base_tensors, adapter_tensors=adapter_tensors
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def environment(**variables: str) -> dict[str, str]:
    """The caller's environment without what changes the output, and with `variables`."""
    kept = {k: v for k, v in os.environ.items() if k not in CLEAN}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "PYTHONPATH": path, "PYTHONUTF8": "1", **variables}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """`cli("merge", "base", ..., env={...})` in the temporary directory."""

    def start(*args: str, env: Mapping[str, str] | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
        command = [sys.executable, "-m", "loramerge", *args]
        return subprocess.run(command, cwd=tmp_path, env=environment(**(env or {})), timeout=120, **streams)

    return start
