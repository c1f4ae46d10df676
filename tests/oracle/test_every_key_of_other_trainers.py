"""Deleting or renaming any one key of other trainers' files, and of the image dialects that need a family, is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_other_trainers as trainers
import torch
from safetensors.torch import save_file
from torch import Tensor

from loramerge import pickled
from loramerge.adapters.opening import open_adapter
from loramerge.binding.bind import bind
from loramerge.binding.namespace import slots_of
from loramerge.errors import LoramergeError

LAYERS = 4
Write = Callable[[Path, Mapping[str, Tensor]], Path]


@dataclass(frozen=True)
class Case:
    """A file: how it is written, its tensors, the base and its config."""

    dialect: str
    write: Write
    tensors: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    config: Mapping[str, object]


def pairs(stem: str, names: Mapping[str, str], a: str, b: str, turned: bool = False) -> dict[str, Tensor]:
    """A pair for each projection of each layer; `turned`: A (in, r), B (r, out)."""
    made = {}
    for layer in range(LAYERS):
        for theirs, ours in names.items():
            A, B = trainers.factors(*trainers.SHAPES[ours], 2)
            module = f"{stem.format(layer)}.{theirs}"
            made |= {f"{module}{a}": A.T if turned else A, f"{module}{b}": B.T if turned else B}
    return made


def safetensors(name: str) -> Write:
    def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
        return folder / name

    return write


def flux() -> dict[str, Tensor]:
    """A tiny Flux in its original layout."""
    torch.manual_seed(0)
    base = {name: torch.randn(12, 12) for name in ("img_in.weight", "txt_in.weight")}
    for n in range(LAYERS):
        for side in ("img", "txt"):
            base[f"double_blocks.{n}.{side}_attn.qkv.weight"] = torch.randn(36, 12)
            base[f"double_blocks.{n}.{side}_attn.proj.weight"] = torch.randn(12, 12)
            base[f"double_blocks.{n}.{side}_attn.norm.query_norm.scale"] = torch.randn(4)
        base[f"single_blocks.{n}.linear1.weight"] = torch.randn(60, 12)
        base[f"single_blocks.{n}.linear2.weight"] = torch.randn(12, 36)
    return base


def xlabs() -> dict[str, Tensor]:
    tensors = {}
    for n in range(LAYERS):
        for name, rows, cols in (("qkv_lora1", 36, 12), ("proj_lora2", 12, 12)):
            stem = f"double_blocks.{n}.processor.{name}"
            tensors |= {f"{stem}.down.weight": torch.randn(2, cols), f"{stem}.up.weight": torch.randn(rows, 2)}
        stem = f"single_blocks.{n}.processor.proj_lora"
        tensors |= {f"{stem}.down.weight": torch.randn(2, 36), f"{stem}.up.weight": torch.randn(12, 2)}
    return tensors


def bfl() -> dict[str, Tensor]:
    tensors = {}
    for n in range(LAYERS):
        stem = f"double_blocks.{n}.img_attn"
        tensors |= {f"{stem}.qkv.lora_A.weight": torch.randn(2, 12), f"{stem}.qkv.lora_B.weight": torch.randn(36, 2)}
        tensors[f"{stem}.norm.query_norm.scale"] = torch.randn(4)
    return tensors


def processors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Attention processors and the folder of the network that they are of."""
    base, tensors = {}, {}
    for n in range(LAYERS):
        stem = f"down_blocks.0.attentions.{n}.transformer_blocks.0.attn1"
        for theirs, ours in (("to_q_lora", "to_q"), ("to_out_lora", "to_out.0")):
            base[f"unet/{stem}.{ours}.weight"] = torch.randn(12, 12)
            tensors[f"unet.{stem}.processor.{theirs}.down.weight"] = torch.randn(2, 12)
            tensors[f"unet.{stem}.processor.{theirs}.up.weight"] = torch.randn(12, 2)
    return base, tensors


def cases() -> dict[str, Case]:
    torch.manual_seed(1)
    base = trainers.llama(LAYERS)
    qv = {"self_attn.q_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.v_proj"}
    made = {}

    def add(name: str, dialect: str, write: Write, tensors: Mapping[str, Tensor]) -> None:
        made[name] = Case(dialect, write, tensors, base, trainers.LLAMA)

    mlx = pairs("model.layers.{}", qv, ".lora_a", ".lora_b", turned=True)
    add("mlx", "mlx", trainers.mlx_folder, mlx)
    gguf = pairs("blk.{}", {"attn_q": "self_attn.q_proj", "ffn_up": "mlp.up_proj"}, ".weight.lora_a", ".weight.lora_b")
    add("gguf", "llama.cpp", lambda folder, t: trainers.write_gguf(folder / "lora.gguf", t), gguf)

    def torchtune(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        torch.save(dict(tensors), folder / "adapter_0.pt")
        (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "peft_type": "LORA"}')
        return folder / "adapter_0.pt"

    names = {"attn.q_proj": "self_attn.q_proj", "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj"}
    add("torchtune", "torchtune", torchtune, pairs("layers.{}", names, ".lora_a.weight", ".lora_b.weight"))

    litgpt = pairs("transformer.h.{}", {"attn.proj": "self_attn.o_proj"}, ".lora_A", ".lora_B")
    add("litgpt", "litgpt", lambda folder, t: trainers.write_litgpt(folder, t, None, 2), litgpt)

    ends = (".adapter.linear_in.weight", ".adapter.linear_out.weight")
    names = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
    add("megatron", "megatron", trainers.write_megatron, pairs("decoder.layers.{}", names, *ends))

    made["xlabs"] = Case("xlabs", safetensors("x.safetensors"), xlabs(), flux(), {})
    made["bfl"] = Case("bfl", safetensors("x.safetensors"), bfl(), flux(), {})
    unet, attention = processors()
    made["attention processors"] = Case("attention-processors", safetensors("x.safetensors"), attention, unet, {})
    return made


CASES = cases()


def told(case: Case, folder: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    adapter = open_adapter(case.write(folder, tensors), read_pickle=pickled.read_header)
    try:
        assert adapter.dialect.name == case.dialect
        slots = slots_of({name: ("F32", tuple(t.shape)) for name, t in case.base.items()})
        binding = bind(slots, case.config, [(adapter, 1.0)])
        assert binding.matches[0].applied == set(adapter.checkpoint.tensors)
        return {*adapter.notes, *binding.notes}
    finally:
        adapter.checkpoint.close()


@pytest.mark.parametrize("name", CASES)
def test_losing_or_renaming_any_key_is_told(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    whole = told(case, tmp_path / "x", case.tensors)
    silent = []
    for key in case.tensors:
        changes = {"deleted": {k: v for k, v in case.tensors.items() if k != key}}
        for new in (f"{key}x", key[1:], key.replace(".3.", ".9."), key.replace("attn", "atn", 1)):
            if new != key:
                changes[new] = {new if k == key else k: v for k, v in case.tensors.items()}
        for what, tensors in changes.items():
            try:
                notes = told(case, tmp_path / "x", tensors)
            except LoramergeError as error:
                assert error.code and error.message
            else:
                silent += [] if notes - whole else [(key, what)]
    assert not silent
