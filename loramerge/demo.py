"""The demo: a small model and two adapters made up on the spot, merged, verified, and checked by hand."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loramerge as lm
from loramerge.errors import OutputError
from loramerge.tensors.output import Output, check_destination
from loramerge.tensors.writer import output_errors, write_small_file

if TYPE_CHECKING:
    from torch import Generator, Tensor

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS, VOCABULARY = 256, 704, 4, 2, 8, 8192
SEED = 2106_09685  # arXiv number of the LoRA paper

BASE, STYLE, TONE, MERGED = "base", "style", "tone", "merged"
WEIGHTS = {STYLE: 0.7, TONE: 0.3}
CONFIGS: dict[str, dict[str, Any]] = {
    STYLE: {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    TONE: {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "alpha_pattern": {"down_proj": 12},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
}
# One that both adapters change, one that only the second does, by its pattern.
CHECKED = ("model.layers.0.self_attn.q_proj", f"model.layers.{LAYERS - 1}.mlp.down_proj")


def run(
    directory: str | Path, *, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Make a Llama-shaped checkpoint (bfloat16, about 20 MB, two shards) and two PEFT adapters, merge them with
    weights 0.7 and 0.3, verify the output, and compare two of its weights with `W + sum of weight * s * B A`
    worked out in float64.

    Args:
        directory: where everything goes: ``base``, ``style``, ``tone``, ``merged``. The same bytes every time.
        force: replace what an earlier demo left there.
        progress: told (bytes done, bytes in all) of the merge.

    Returns:
        Plain data: ``ok`` of all checks, ``paths``, ``bytes``, ``seconds`` of the merge, ``retention``,
        ``tensors_changed``, ``tensors_copied``, ``verified`` and ``replayed`` (bool), and ``checked``: name,
        ``exact`` (share of the weights that are the nearest bfloat16 to the float64 result) and ``worst`` (the
        largest error in units in the last place; 0.5 is what rounding alone does).

    Raises:
        OutputError: `directory` exists and `force` is not given, or cannot be written.
    """
    root = Path(directory)
    with _room(root, force):
        base = _write_base(root / BASE, force)
        adapters = {name: _write_adapter(root / name, base, number, force) for number, name in enumerate(CONFIGS, 1)}
        weighted: dict[str, float] = {str(root / name): weight for name, weight in WEIGHTS.items()}
        out = root / MERGED
        receipt = lm.merge(str(root / BASE), weighted, str(out), force=force, progress=progress)
        verified = lm.verify(str(out))
        replayed = lm.verify(str(out), base=str(root / BASE), adapters=weighted)
        checked = [_check(name, base, adapters, out) for name in CHECKED]
    good = all(row["exact"] >= 0.9999 and row["worst"] <= 1 for row in checked)
    return {
        "ok": bool(verified["ok"] and replayed["ok"] and good),
        "directory": str(directory),
        "paths": {name: os.path.join(str(directory), name) for name in (BASE, STYLE, TONE, MERGED)},
        "weights": dict(WEIGHTS),
        "bytes": receipt.bytes_written,
        "seconds": receipt.seconds,
        "retention": receipt.retention,
        "tensors_changed": receipt.counts["changed"],
        "tensors_copied": receipt.counts["copied"],
        "verified": bool(verified["ok"]),
        "replayed": bool(replayed["ok"]),
        "checked": checked,
    }


@contextlib.contextmanager
def _room(root: Path, force: bool) -> Iterator[None]:
    """A directory to work in. One made here goes again if the work fails."""
    parts = [root / name for name in (BASE, STYLE, TONE, MERGED)]
    if not os.path.lexists(root):
        check_destination(root, inputs=[], force=False, what="directory")
        with output_errors(root):
            root.mkdir()
        try:
            yield
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        return
    if not force:
        fix = "give --force to make the demo again, or choose another place with -o"
        raise OutputError("output.exists", "the demo's directory exists already", fix=fix, file=root)
    for part in parts:  # before any is replaced
        check_destination(part, inputs=[], force=True, what="directory")
    yield


# ------------------------------------------------------------------------------------------------- making


def _shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes (out, in) of a Llama model."""
    keys = KEY_HEADS * HIDDEN // HEADS
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.weight": (keys, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (keys, HIDDEN),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _generator(number: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(SEED + number)


def _write_base(path: Path, force: bool) -> dict[str, Tensor]:
    """The checkpoint: linear weights of the size that training starts from, norms near one."""
    import torch

    random = _generator(0)
    tensors = {}
    for name, shape in _shapes().items():
        values = torch.randn(shape, generator=random)
        values = values / math.sqrt(shape[-1]) if len(shape) == 2 else 1 + 0.1 * values
        tensors[name] = values.to(torch.bfloat16)
    middle = len(tensors) // 2
    names = list(tensors)
    shards = {
        f"model-{number:05d}-of-00002.safetensors": {name: tensors[name] for name in part}
        for number, part in enumerate((names[:middle], names[middle:]), 1)
    }
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: shard for shard, part in shards.items() for name in sorted(part)},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    _write(path, shards, {"config.json": config, "model.safetensors.index.json": index}, force)
    return tensors


def _write_adapter(path: Path, base: Mapping[str, Tensor], number: int, force: bool) -> dict[str, Tensor]:
    """An adapter as after training: A as it is initialised, B of the size that a few hundred steps give."""
    import torch

    config = CONFIGS[path.name]
    random = _generator(number)
    tensors = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in config["target_modules"]:
            continue
        rank = config["r"]
        A = (torch.rand(rank, weight.shape[1], generator=random) * 2 - 1) / math.sqrt(weight.shape[1])
        B = torch.randn(weight.shape[0], rank, generator=random) * 0.02
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    data = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "bias": "none", **config}
    _write(path, {"adapter_model.safetensors": tensors}, {"adapter_config.json": data}, force)
    return tensors


def _write(
    path: Path, weights: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Mapping[str, Any]], force: bool
) -> None:
    """A directory of weight files and JSON documents: complete or not at all."""
    from safetensors.torch import save

    with Output(path, "directory", force) as output:
        for name, tensors in weights.items():
            write_small_file(output.directory / name, save(dict(tensors), metadata={"format": "pt"}))
        for name, document in documents.items():
            write_small_file(output.directory / name, (json.dumps(document, indent=2) + "\n").encode())
        output.commit()


# ----------------------------------------------------------------------------------------------- checking


def _check(
    module: str, base: Mapping[str, Tensor], adapters: Mapping[str, Mapping[str, Tensor]], out: Path
) -> dict[str, Any]:
    """One weight of the output against the formula, from the tensors in memory and nothing of the merge's code."""
    import torch
    from safetensors import safe_open

    name = f"{module}.weight"
    expected = base[name].double()
    for adapter, factors in adapters.items():
        config = CONFIGS[adapter]
        A = factors.get(f"base_model.model.{module}.lora_A.weight")
        B = factors.get(f"base_model.model.{module}.lora_B.weight")
        if A is None or B is None:
            continue
        leaf = module.rpartition(".")[2]
        alpha = config.get("alpha_pattern", {}).get(leaf, config["lora_alpha"])
        s = alpha / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        expected += WEIGHTS[adapter] * s * (B.double() @ A.double())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with safe_open(out / index["weight_map"][name], framework="pt") as file:
        merged = file.get_tensor(name)
    # Eight bits of significand: the unit of a number m * 2**e with m in [0.5, 1) is 2**(e - 8). Where W and its
    # update all but cancel, what float32 lost before the rounding is measured against W instead.
    size = torch.maximum(expected.abs(), base[name].double().abs() / 256)
    error = (merged.double() - expected).abs() / torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 8)
    return {"name": name, "exact": float((error <= 0.5).double().mean()), "worst": float(error.max())}
