"""Deleting or renaming any one key of what PEFT saves, of any method, is told: an error, or a note of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import test_peft_methods_a as half_a
import test_peft_methods_b as half_b
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loramerge.adapters.opening import open_adapter
from loramerge.binding.bind import bind
from loramerge.binding.namespace import Slot, slots_of
from loramerge.errors import LoramergeError

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def saved_a(name: str) -> Callable[[Path], nn.Module]:
    def save(folder: Path) -> nn.Module:
        case = next(c for c in half_a.FIRST if c.name == name)
        half_a.trained(case).save_pretrained(folder)
        return half_a.base(case.dtype)

    return save


def saved_b(name: str) -> Callable[[Path], nn.Module]:
    def save(folder: Path) -> nn.Module:
        base = half_b.seeded()
        half_b.trained(base, half_b.CONFIGS[name]()).save_pretrained(folder)
        return base

    return save


ALONE = "ln"
"""A method whose only module here has parts that may be missing: nothing in the file could tell."""

FIRST_B = {name.split()[0]: name for name in reversed(half_b.CONFIGS)}
SAVED = {c.name: saved_a(c.name) for c in half_a.FIRST if c.name != ALONE} | {n: saved_b(n) for n in FIRST_B.values()}


def slots(base: nn.Module) -> list[Slot]:
    kinds = {torch.float64: "F64", torch.float32: "F32"}
    return slots_of({name: (kinds[t.dtype], tuple(t.shape)) for name, t in base.state_dict().items()})


def told(folder: Path, tensors: Mapping[str, Tensor], base: list[Slot]) -> set[str]:
    """The notes of opening and binding."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    adapter = open_adapter(folder)
    try:
        return {*adapter.notes, *bind(base, half_a.GPT2, [(adapter, 1.0)]).notes}
    finally:
        adapter.checkpoint.close()


@pytest.mark.parametrize("method", SAVED)
def test_losing_or_renaming_any_key_is_told(method: str, tmp_path: Path) -> None:
    base = slots(SAVED[method](tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    whole = told(tmp_path, tensors, base)
    assert not any("cut short" in note or "have no" in note for note in whole)
    adapter = open_adapter(tmp_path)
    harmless = set(adapter.harmless)  # copies of what is stored elsewhere, sizes: without effect on a merge
    adapter.checkpoint.close()
    silent = []
    for key in tensors.keys() - harmless:
        changes: dict[str, dict[str, Tensor]] = {"deleted": {k: v for k, v in tensors.items() if k != key}}
        for new in (f"{key}x", key[1:], key.replace("base_model.model.", "base_model.model.other.", 1)):
            if new not in tensors:
                changes[new] = {new if k == key else k: v for k, v in tensors.items()}
        for what, left in changes.items():
            try:
                notes = told(tmp_path, left, base)
            except LoramergeError as error:
                assert error.code and error.message
            else:
                silent += [] if notes - whole else [(key, what)]
    assert not silent
