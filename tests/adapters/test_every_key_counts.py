"""Deleting or renaming any one key of any file is told: an error, or a note that the whole file does not have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from samples import Sample, base, samples
from torch import Tensor

from loramerge import pickled
from loramerge.adapters.opening import open_adapter
from loramerge.binding.bind import bind
from loramerge.binding.namespace import slots_of
from loramerge.errors import LoramergeError

SAMPLES = samples()
SLOTS = slots_of({name: ("F32", tuple(tensor.shape)) for name, tensor in base().items()})


def told(sample: Sample, directory: Path, tensors: Mapping[str, Tensor] | None = None) -> set[str]:
    """The notes that opening and binding make, without the names of files in them."""
    path = sample.write(directory, tensors)
    alpha = 1.0 if sample.dialect == "loralib" else None
    adapter = open_adapter(path, read_pickle=pickled.read_header, alpha=alpha)
    try:
        assert adapter.dialect.name == sample.dialect
        binding = bind(SLOTS, {}, [(adapter, 1.0)])
        assert binding.matches[0].applied | binding.matches[0].harmless == set(adapter.checkpoint.tensors)
        return {*adapter.notes, *binding.notes}
    finally:
        adapter.checkpoint.close()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_a_whole_file_is_applied_whole_and_has_nothing_odd(sample: Sample, tmp_path: Path) -> None:
    assert told(sample, tmp_path) == set()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_deleting_any_key_is_told(sample: Sample, tmp_path: Path) -> None:
    silent = []
    for key in sample.tensors:
        rest = {k: v for k, v in sample.tensors.items() if k != key}
        try:
            notes = told(sample, tmp_path, rest)
        except LoramergeError as error:
            assert error.code and error.message
        else:
            silent += [] if notes else [key]
    assert not silent


def renamed(key: str) -> list[str]:
    """A letter more at the end, one less at the beginning, another layer, an underscore for a dot."""
    names = [f"{key}x", key[1:], key.replace("transformer_blocks", "transformer_block", 1)]
    names += [key.replace(f"{c}3{c}", f"{c}9{c}", 1) for c in "._"]
    names.append(key.replace("to_q", "to_qq").replace("to_k", "tok").replace("conv", "conw"))
    return sorted({name for name in names if name != key})


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_renaming_any_key_is_told(sample: Sample, tmp_path: Path) -> None:
    silent = []
    for key in list(sample.tensors)[-12:]:  # the last layer and what is beside it; the others are named alike
        for name in renamed(key):
            tensors = {name if k == key else k: v for k, v in sample.tensors.items()}
            try:
                notes = told(sample, tmp_path, tensors)
            except LoramergeError as error:
                assert error.code and error.message
            except AssertionError:
                raise AssertionError(f"{key} -> {name} is another dialect") from None
            else:
                silent += [] if notes else [(key, name)]
    assert not silent
