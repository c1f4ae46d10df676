"""`loramerge inspect` at the shell: lines, JSON, one word, exit codes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def fields(text: str) -> dict[str, str]:
    """The aligned lines as label -> text (of several with one label, the last)."""
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


def test_an_adapter_in_lines(cli: Run, adapter: Path) -> None:
    done = cli("inspect", "lora")
    assert (done.returncode, done.stderr) == (0, "")
    lines = fields(done.stdout)
    assert lines["adapter"] == "lora"
    assert lines["update"] == "rank 2   alpha 4   scale 2"
    assert lines["targets"] == "q_proj (2), v_proj (2)"
    assert lines["merge"] == "yes"
    assert "PEFT" in lines["dialect"] and "8" in lines["tensors"]


def test_a_checkpoint_in_lines(cli: Run, base: Path) -> None:
    lines = fields(cli("inspect", "base").stdout)
    assert lines["checkpoint"] == "base"
    assert lines["model"] == "LlamaForCausalLM   (llama)"
    assert lines["embedding"] == "not tied to the head"
    assert "float32" in lines["tensors"] and "safetensors" in lines["files"]


def test_a_merged_checkpoint_says_what_is_in_it(cli: Run, base: Path, adapter: Path) -> None:
    assert cli("merge", "base", "lora=0.5", "-o", "out", "-q").returncode == 0
    assert fields(cli("inspect", "out").stdout)["merged"] == "lora=0.5   into base"
    receipt = json.loads(cli("inspect", "out", "--json").stdout)["receipt"]
    assert (receipt["base"], receipt["adapters"]) == ("base", [{"source": "lora", "weight": 0.5}])


def test_the_path_is_printed_as_it_was_typed(cli: Run, adapter: Path) -> None:
    assert fields(cli("inspect", "./lora/").stdout)["adapter"] == "./lora/"


@pytest.mark.parametrize("what", ["base", "lora"])
def test_json_is_one_document_that_lists_everything_with_v(cli: Run, base: Path, adapter: Path, what: str) -> None:
    done = cli("inspect", what, "--json")
    short, long = json.loads(done.stdout), json.loads(cli("inspect", what, "--json", "-v").stdout)
    assert (done.stderr, short["schema"], short["ok"]) == ("", 1, True)
    assert "contents" not in short and "module_list" not in short
    assert len(long["contents"]) == long["tensors"] == short["tensors"]
    assert {name: value for name, value in long.items() if name in short} == short


def test_v_lists_every_tensor_and_module(cli: Run, base: Path, adapter: Path) -> None:
    text = cli("inspect", "lora", "-v").stdout
    assert "model.layers.1.self_attn.v_proj  low-rank     2      4      2" in text
    assert sum("lora_A.weight" in line for line in text.splitlines()) == 4
    assert "model.layers.0.mlp.up_proj.weight" in cli("inspect", "base", "-v").stdout


@pytest.mark.parametrize(("what", "word"), [("base", "checkpoint"), ("lora", "adapter")])
def test_q_is_one_word(cli: Run, base: Path, adapter: Path, what: str, word: str) -> None:
    assert cli("inspect", what, "-q").stdout == f"{word}\n"


def test_what_cannot_be_merged_is_no_failure(cli: Run, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}))
    done = cli("inspect", "lora")
    assert done.returncode == 0
    assert fields(done.stdout)["merge"].startswith("no: use_qalora: ")
    (adapter / "adapter_config.json").unlink()
    lines = fields(cli("inspect", "lora").stdout)
    assert "adapter_config.json" in lines["merge"] and "--alpha" in lines["fix"]


def test_names_from_files_cannot_command_the_terminal(cli: Run, tmp_path: Path) -> None:
    save_file({"evil\x1b[2J\n\u202e": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    done = cli("inspect", "x.safetensors", "-v")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "evil\\x1b[2J\\n\\u202e" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ("does not exist",)), (b"", ("empty",)), (b"GGUF" + bytes(40), ("GGUF", "fix:"))],
)
def test_bad_inputs_are_exit_3(cli: Run, tmp_path: Path, content: bytes | None, words: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "x.safetensors").write_bytes(content)
    done = cli("inspect", "x.safetensors")
    assert (done.returncode, done.stdout) == (3, "")
    assert all(word in done.stderr for word in words)
    document = json.loads(cli("inspect", "x.safetensors", "--json").stdout)
    assert (document["ok"], document["exit_code"]) == (False, 3)


def test_no_source_is_usage(cli: Run) -> None:
    assert cli("inspect").returncode == 2
