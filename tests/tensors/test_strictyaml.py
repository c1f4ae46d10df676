"""YAML of trainers' configs: read as PyYAML's safe loader reads it, refused where it is more than plain data."""

from __future__ import annotations

import math
import time

import pytest
import yaml

from loramerge.errors import InputError
from loramerge.tensors import strictyaml


def loads(text: str | bytes):
    raw = text.encode() if isinstance(text, str) else text
    return strictyaml.loads(raw, where="run.yaml", code="adapter.config")


def refused(text: str | bytes) -> str:
    with pytest.raises(InputError) as error:
        loads(text)
    assert error.value.code == "adapter.config" and error.value.file == "run.yaml"
    return error.value.message


HYPERPARAMETERS = """\
checkpoint_dir: checkpoints/EleutherAI/pythia-14m
out_dir: out/lora
precision: null
devices: 1
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_query: true
lora_key: false
data:
  class_path: litgpt.data.Alpaca
  init_args:
    mask_prompt: false
    val_split_fraction: 0.03865
    ignore_index: -100
train:
  save_interval: 1000
  min_lr: 6.0e-05
  betas: [0.9, 0.95]
eval: {interval: 100, max_iters: 100}
seed: 1337
when: 2024-05-01
"""


def test_a_config_of_a_trainer_reads_as_with_pyyaml() -> None:
    wanted = yaml.safe_load(HYPERPARAMETERS)
    wanted["when"] = "2024-05-01"  # dates stay text
    assert loads(HYPERPARAMETERS) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-7",
        "0x1F",
        "0o7",
        "010",
        "1_000",
        "1.5",
        "-2.5e+3",
        "yes",
        "Off",
        "~",
        "null",
        "''",
        "a b",
        "'1'",
        '"1e3"',
    ],
)
def test_scalars_read_as_with_pyyaml(text: str) -> None:
    assert loads(f"x: {text}") == yaml.safe_load(f"x: {text}")


def test_numbers_with_an_exponent_are_numbers_unless_quoted() -> None:
    assert loads("x: 1e-5\ny: '1e-5'\nz: 1e400\nw: .inf") == {"x": 1e-5, "y": "1e-5", "z": math.inf, "w": math.inf}


def test_what_pyyaml_dumps_comes_back() -> None:
    shared = ["q", "v"]
    value = {"a": shared, "b": shared, "c": {"d": [1, 2.5, None, True, "é", "x: y", "12"]}}
    assert loads(yaml.safe_dump(value)) == value  # with an anchor and an alias for the shared list


def test_a_byte_order_mark_is_allowed_and_an_empty_document_is_nothing() -> None:
    assert loads("﻿a: 1") == {"a": 1}
    assert loads("") is None and loads("# nothing\n") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2", "duplicate key 'a' at line 2"),
        ("x: !!python/object/apply:os.system ['true']", "a tag"),
        ("x: !!binary aGk=", "a tag"),
        ("x: !custom 1", "a tag"),
        ("a: &a {x: 1}\nb:\n  <<: *a", "a merge key at line 3"),
        ("? [1, 2]\n: 3", "no scalar"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: [1, 2", "line"),
        ("a: *nowhere", "undefined alias"),
        ("x: " + "9" * 65, "an integer of 65"),
        ('x: "\\ud800"', "lone surrogate"),
        ("x: " + "[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("a: &a [*a]", "deep"),
        (b"a: \xff", "not UTF-8 at byte 3"),
        (b"a: \x00", ""),
        ("a: '" + "x" * (1024 * 1024) + "'", "bytes, more than"),
    ],
)
def test_more_than_plain_data_is_refused(text: str | bytes, reason: str) -> None:
    assert reason in refused(text)


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    begin = time.monotonic()
    assert "aliases counted" in refused("\n".join(lines))
    assert time.monotonic() - begin < 5


def test_deep_nesting_is_refused_at_once() -> None:
    begin = time.monotonic()
    assert "deep" in refused("[" * 200_000)
    assert time.monotonic() - begin < 5
