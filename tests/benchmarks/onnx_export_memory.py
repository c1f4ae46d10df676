"""Memory and time of an export of a 2.8 GB float32 checkpoint to ONNX, an adapter merged on the way.

    python tests/benchmarks/onnx_export_memory.py [--gigabytes 2.8] [--verify] [--max-memory SIZE] [--place DIRECTORY]

Writes a synthetic Llama (random weights, no model is built for it) and a rank-16 adapter on all linear layers, runs the
export in a process of its own and prints its peak memory (`ru_maxrss`), CPU and wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HIDDEN, INNER, HEADS, KV, VOCAB = 2048, 5632, 32, 8, 32000
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write(path: Path, shapes: dict[str, tuple[int, ...]], scale: float) -> int:
    """A safetensors file of random float32 tensors, one after the other."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            if "norm" in name:
                np.ones(shape, np.float32).tofile(file)
            else:
                for _ in range(shape[0] // 32 or 1):
                    rows = (min(32, shape[0]), *shape[1:])
                    (random.standard_normal(rows, dtype=np.float32) * scale).tofile(file)
    return at


def make(place: Path, gigabytes: float) -> int:
    layer = 4 * (sum(a * b for a, b in SITES.values()) + 2 * HIDDEN)
    layers = max(1, round((gigabytes * 1e9 - 8 * VOCAB * HIDDEN) / layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    factors: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        for site, shape in SITES.items():
            shapes[f"model.layers.{i}.{site}.weight"] = shape
            key = f"base_model.model.model.layers.{i}.{site}"
            factors |= {f"{key}.lora_A.weight": (16, shape[1]), f"{key}.lora_B.weight": (shape[0], 16)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    (place / "base").mkdir()
    (place / "lora").mkdir()
    nbytes = write(place / "base" / "model.safetensors", shapes, 0.02)
    write(place / "lora" / "adapter_model.safetensors", factors, 0.01)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "num_hidden_layers": layers, "vocab_size": VOCAB, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "torch_dtype": "float32", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (place / "base" / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": [s.split(".")[1] for s in SITES]}
    (place / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    return nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.8)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--place")
    parser.add_argument("--max-memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        place = Path(folder)
        nbytes = make(place, options.gigabytes)
        command = [sys.executable, "-m", "loramerge", "export", str(place / "base"), "--adapter", str(place / "lora")]
        command += ["-o", str(place / "out"), "--no-progress", *([] if options.verify else ["--no-verify"])]
        command += ["--max-memory", options.max_memory] if options.max_memory else []
        started = time.monotonic()
        subprocess.run(command, check=True)
        wall = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{nbytes / 1e9:.2f} GB: peak {used.ru_maxrss / 1e6:.2f} GB, {used.ru_utime + used.ru_stime:.1f} CPU s, "
            f"{wall:.1f} s; model.onnx {(place / 'out' / 'model.onnx').stat().st_size / 1e3:.0f} kB"
        )


if __name__ == "__main__":
    main()
