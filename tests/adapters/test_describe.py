"""What `inspect` says of adapters, checkpoints and what is neither, against files written by hand."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from loramerge import pickled
from loramerge.adapters.describe import inspect, open_weights
from loramerge.errors import InputError, LoramergeError, UnsafeError, UnsupportedError

Shapes = dict[str, tuple[int, ...]]
PREFIX = "base_model.model."


def pair(module: str, rank: int = 4, rows: int = 6, columns: int = 8) -> Shapes:
    return {
        f"{PREFIX}{module}.lora_A.weight": (rank, columns),
        f"{PREFIX}{module}.lora_B.weight": (rows, rank),
    }


def weights(path: Path, shapes: Shapes, dtype: Any = np.float32, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ones(shape, dtype) for name, shape in shapes.items()}, path, metadata=metadata)
    return path


def adapter(directory: Path, shapes: Shapes, **config: Any) -> Path:
    weights(directory / "adapter_model.safetensors", shapes, metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def model(directory: Path, shapes: Shapes | None = None, **config: Any) -> Path:
    weights(directory / "model.safetensors", shapes or {"lm_head.weight": (3, 2), "model.norm.weight": (2,)})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def refused(data: dict[str, Any], code: str, *words: str) -> None:
    assert data["kind"] == "adapter"
    assert data["mergeable"] is False
    assert data["code"] == code
    for word in words:
        assert word in data["why"]


# ------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_is_told_in_full(tmp_path: Path) -> None:
    shapes = pair("model.layers.0.self_attn.q_proj") | pair("model.layers.0.mlp.down_proj", rank=2, columns=10)
    path = adapter(
        tmp_path / "lora",
        shapes,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 6},
        base_model_name_or_path="meta/base",
        task_type="CAUSAL_LM",
        peft_version="0.18.0",
    )
    data = inspect(path)
    floats = 4 * 8 + 6 * 4 + 2 * 10 + 6 * 2
    assert (data["kind"], data["source"], data["mergeable"]) == ("adapter", str(path), True)
    assert (data["dialect"], data["type"], data["version"]) == ("peft", "LORA", "0.18.0")
    assert (data["base"], data["task"]) == ("meta/base", "CAUSAL_LM")
    assert (data["rank"], data["alpha"], data["scale"]) == ([2, 4], [6, 8], [2.0, 3.0])
    assert (data["modules"], data["kinds"]) == (2, {"low-rank": 2})
    assert data["targets"] == {"q_proj": 1, "down_proj": 1}
    assert (data["tensors"], data["parameters"], data["bytes"]) == (4, floats, 4 * floats)
    assert data["dtypes"] == {"float32": {"tensors": 4, "bytes": 4 * floats}}
    assert data["metadata"] == {"format": "pt"}
    assert data["files"] == [
        {
            "name": "adapter_model.safetensors",
            "bytes": (path / "adapter_model.safetensors").stat().st_size,
            "format": "safetensors",
            "tensors": 4,
        }
    ]
    by_name = {row["path"]: row for row in data["module_list"]}
    assert by_name["model.layers.0.mlp.down_proj"] == {
        "path": "model.layers.0.mlp.down_proj",
        "kind": "low-rank",
        "factors": {"A": [2, 10], "B": [6, 2]},
        "rank": 2,
        "alpha": 6,
        "scale": 3.0,
    }
    assert {row["name"] for row in data["contents"]} == set(shapes)
    json.dumps(data, allow_nan=False)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    data = inspect(adapter(tmp_path / "lora", pair("a.q_proj"), use_rslora=True))
    assert data["rslora"] is True
    assert data["scale"] == [4.0, 4.0]  # 8 / sqrt(4)


def test_dora_bias_and_what_the_adapter_brings_whole_are_named(tmp_path: Path) -> None:
    shapes = pair("a.q_proj") | {
        f"{PREFIX}a.q_proj.lora_magnitude_vector": (6,),
        f"{PREFIX}a.q_proj.lora_B.bias": (6,),
        f"{PREFIX}score.weight": (2, 8),
    }
    path = adapter(tmp_path / "lora", shapes, use_dora=True, lora_bias=True, modules_to_save=["score"])
    data = inspect(path)
    assert (data["dora"], data["lora_bias"], data["modules_to_save"]) == (True, True, ["score"])
    assert data["kinds"] == {"low-rank with DoRA": 1}
    assert data["plain"] == [f"{PREFIX}score.weight"]


def test_an_embedding_has_its_rank_from_its_own_factors(tmp_path: Path) -> None:
    shapes: Shapes = {f"{PREFIX}embed.lora_embedding_A": (4, 32), f"{PREFIX}embed.lora_embedding_B": (8, 4)}
    data = inspect(adapter(tmp_path / "lora", shapes))
    assert (data["kinds"], data["rank"], data["scale"]) == ({"low-rank embedding": 1}, [4, 4], [2.0, 2.0])


def test_stacked_experts_do_not_multiply_the_rank(tmp_path: Path) -> None:
    shapes = pair("layers.0.mlp.experts", rank=4 * 3)
    data = inspect(adapter(tmp_path / "lora", shapes, target_parameters=["mlp.experts.down_proj"]))
    assert (data["rank"], data["scale"]) == ([4, 4], [2.0, 2.0])
    assert data["module_list"][0]["experts"] == 3


def test_patterns_that_match_nothing_or_disagree_are_notes(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", pair("a.q_proj"), alpha_pattern={"q_proj": 4, "a.q_proj": 6, "up_proj": 2})
    notes = "\n".join(inspect(path)["notes"])
    assert "alpha_pattern has keys that match no module: 'up_proj'" in notes
    assert "disagree on 'a.q_proj'" in notes


def test_alpha_zero_and_harmless_tensors_are_notes(tmp_path: Path) -> None:
    shapes = pair("a.q_proj") | {f"{PREFIX}a.q_proj.ranknum": (1,)}
    data = inspect(adapter(tmp_path / "lora", shapes, lora_alpha=0))
    assert data["mergeable"] and data["harmless"] == [f"{PREFIX}a.q_proj.ranknum"]
    assert any("alpha is 0" in note for note in data["notes"])
    assert any("1 tensor without effect" in note for note in data["notes"])


def test_a_file_is_told_by_its_keys_whatever_its_name(tmp_path: Path) -> None:
    path = weights(tmp_path / "anything.safetensors", pair("a.q_proj"))
    refused(inspect(path), "adapter.no-config", "adapter_config.json")


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"r": 16}, "adapter.rank", ("rank 16", "rank 4")),
        ({"peft_type": "PROMPT_TUNING"}, "adapter.type", ("PROMPT_TUNING",)),
        ({"lora_alpha": "8"}, "adapter.config", ("lora_alpha",)),
        ({"use_dora": True}, "adapter.dora", ("DoRA",)),
        ({"alora_invocation_tokens": [1]}, "adapter.refused", ("aLoRA",)),
        ({"init_lora_weights": "pissa"}, "adapter.init", ("pissa",)),
        ({"from_the_future": 3}, "adapter.field", ("from_the_future",)),
        ({"lora_alpha": None}, "adapter.alpha", ("alpha",)),
    ],
)
def test_what_merge_would_refuse_is_told_and_no_error(
    tmp_path: Path, config: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    data = inspect(adapter(tmp_path / "lora", pair("a.q_proj"), **config))
    refused(data, code, *words)
    assert data["tensors"] == 2 and data["type"] == config.get("peft_type", "LORA")


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 1, "r": 2}', "\xff"])
def test_a_broken_config_is_told_and_no_error(tmp_path: Path, text: str) -> None:
    path = adapter(tmp_path / "lora", pair("a.q_proj"))
    (path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(inspect(path), "adapter.config")


def test_half_a_pair_is_told(tmp_path: Path) -> None:
    shapes = pair("a.q_proj")
    shapes.pop(f"{PREFIX}a.q_proj.lora_B.weight")
    data = inspect(adapter(tmp_path / "lora", shapes))
    refused(data, "adapter.half-pair", "a.q_proj")
    assert data["about"] == [f"{PREFIX}a.q_proj.lora_A.weight"]


@pytest.mark.parametrize(
    ("name", "keys", "dialect", "kind"),
    [
        (
            "pytorch_lora_weights.safetensors",
            {"unet.down.to_q.lora.down.weight": (2, 4), "unet.down.to_q.lora.up.weight": (4, 2)},
            "diffusers",
            "low-rank",
        ),
        (
            "style.safetensors",
            {
                "lora_unet_down_blocks_0_to_q.lora_down.weight": (2, 4),
                "lora_unet_down_blocks_0_to_q.lora_up.weight": (4, 2),
            },
            "kohya",
            "low-rank",
        ),
        (
            "style.safetensors",
            {f"lora_te_layers_0.hada_{name}": (2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
            "lycoris",
            "hadamard",
        ),
    ],
)
def test_a_dialect_without_config_is_told_by_its_names(
    tmp_path: Path, name: str, keys: Shapes, dialect: str, kind: str
) -> None:
    path = weights(tmp_path / "lora" / name, keys)
    for source in (path, path.parent):
        data = inspect(source)
        assert (data["kind"], data["mergeable"], data["dialect"]) == ("adapter", True, dialect)
        assert data["kinds"] == {kind: 1} and data["rank"] == [2, 2] and data["scale"] == [1.0, 1.0]


def test_an_adapter_of_a_dialect_that_is_not_known_is_an_adapter_all_the_same(tmp_path: Path) -> None:
    path = weights(tmp_path / "lora" / "adapters.safetensors", {"blocks.0.lora_A.magic": (2, 4)})
    for source in (path, path.parent):
        data = inspect(source)
        assert (data["kind"], data["mergeable"], data["dialect"]) == ("adapter", False, None)
        assert data["why"]


def test_a_pickled_adapter_needs_permission(tmp_path: Path) -> None:
    path = tmp_path / "lora.bin"
    state = {"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.ones(3, 2)}
    torch.save(state, path)
    with pytest.raises(UnsafeError) as caught:
        inspect(path)
    assert caught.value.code == "pickle.refused"
    for source in (path, tmp_path):
        data = inspect(source, read_pickle=pickled.read_header)
        refused(data, "adapter.alpha", "alpha")
        assert "--alpha" in data["fix"]
        assert (data["dialect"], data["files"][0]["format"]) == ("loralib", "pickle")


# ---------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_told_in_full(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weights(directory / one, {"model.embed_tokens.weight": (10, 4)}, np.float16)
    weights(directory / two, {"model.norm.weight": (4,)})
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": one, "model.norm.weight": two}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (directory / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True, "torch_dtype": "float16"})
    )
    data = inspect(directory)
    assert data["kind"] == "checkpoint" and "mergeable" not in data
    assert (data["model_type"], data["architectures"], data["layers"]) == ("llama", ["LlamaForCausalLM"], 2)
    assert (data["tied_embeddings"], data["quantised"], data["receipt"]) == (True, None, None)
    assert (data["index"], data["config_dtype"]) == ("model.safetensors.index.json", "float16")
    assert [file["name"] for file in data["files"]] == [one, two]
    assert (data["tensors"], data["parameters"], data["bytes"]) == (2, 44, 96)
    assert list(data["dtypes"].items()) == [
        ("float16", {"tensors": 1, "bytes": 80}),
        ("float32", {"tensors": 1, "bytes": 16}),
    ]
    assert data["contents"][0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "float16",
        "shape": [10, 4],
        "bytes": 80,
        "file": one,
    }
    json.dumps(data, allow_nan=False)


def test_a_file_without_a_config_is_a_checkpoint_with_a_note(tmp_path: Path) -> None:
    data = inspect(weights(tmp_path / "x.safetensors", {"a": (2,)}))
    assert data["kind"] == "checkpoint"
    assert any("no config.json" in note for note in data["notes"])


@pytest.mark.parametrize(
    ("shapes", "config", "what"),
    [
        ({"q.qweight": (2, 2), "q.scales": (2,)}, {}, "GPTQ or AWQ"),
        ({"q.weight": (2, 2), "q.weight.absmax": (2,)}, {}, "bitsandbytes 4-bit"),
        ({"q.weight": (2, 2)}, {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"q.weight": (2, 2)}, {}, None),
    ],
)
def test_quantised_checkpoints_are_named(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], what: str | None
) -> None:
    assert inspect(model(tmp_path / "model", shapes, **config))["quantised"] == what


def test_the_receipt_says_what_was_merged(tmp_path: Path) -> None:
    path = model(tmp_path / "merged")
    receipt = {
        "tool": "loramerge",
        "version": "0.1.0",
        "base": {"source": "base"},
        "adapters": [{"source": "style", "weight": 0.7}, {"source": "tone", "weight": 1}],
        "retention": {"total": 0.99},
    }
    (path / "loramerge.json").write_text(json.dumps(receipt))
    expected = {
        "name": "loramerge.json",
        "version": "0.1.0",
        "base": "base",
        "adapters": [{"source": "style", "weight": 0.7}, {"source": "tone", "weight": 1}],
        "retention": 0.99,
    }
    assert inspect(path)["receipt"] == expected
    (path / "loramerge.json").rename(path / "model.loramerge.json")
    assert inspect(path / "model.safetensors")["receipt"] == {**expected, "name": "model.loramerge.json"}


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_receipt_is_a_note(tmp_path: Path, text: str) -> None:
    path = model(tmp_path / "merged")
    (path / "loramerge.json").write_text(text)
    data = inspect(path)
    assert data["receipt"] is None
    assert any("receipt" in note for note in data["notes"])


@pytest.mark.parametrize("receipt", [{}, {"base": 3, "adapters": [1, {"weight": "x"}], "retention": []}])
def test_a_receipt_with_other_types_says_less(tmp_path: Path, receipt: dict[str, Any]) -> None:
    path = model(tmp_path / "merged")
    (path / "loramerge.json").write_text(json.dumps(receipt))
    data = inspect(path)["receipt"]
    assert (data["base"], data["retention"]) == (None, None)
    assert all(row == {"source": None, "weight": None} for row in data["adapters"])


def test_a_model_beside_an_adapter_goes_first(tmp_path: Path) -> None:
    path = model(adapter(tmp_path / "both", pair("a.q_proj")))
    data = inspect(path)
    assert data["kind"] == "checkpoint"
    assert any("adapter_model.safetensors" in note for note in data["notes"])
    assert inspect(path / "adapter_model.safetensors")["mergeable"] is True
    assert inspect(path / "model.safetensors")["kind"] == "checkpoint"


def test_a_model_with_factors_of_its_own_is_a_checkpoint(tmp_path: Path) -> None:
    data = inspect(model(tmp_path / "model", {"q.base_layer.weight": (2, 2), "q.lora_A.speech.weight": (1, 2)}))
    assert data["kind"] == "checkpoint"
    assert any("look like LoRA factors" in note for note in data["notes"])


# ----------------------------------------------------------------------------------------------- neither


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (b"GGUF\x03\0\0\0" + bytes(64), "input.format", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "input.format", "LFS"),
        (b"<!DOCTYPE html><html></html>", "input.format", "web page"),
        (b"", "input.empty", "empty"),
        (b"\x00" * 100, "safetensors.length", "zero"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, code: str, word: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        inspect(path)
    assert caught.value.code == code
    assert word in caught.value.message


def test_places_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    for source, code in (
        (tmp_path / "nowhere", "input.missing"),
        ("", "input.missing"),
        (tmp_path, "checkpoint.no-weights"),
    ):
        with pytest.raises(InputError) as caught:
            inspect(source)
        assert caught.value.code == code
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        inspect(tmp_path)
    assert caught.value.code == "adapter.no_weights"
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UnsupportedError) as other:
        inspect(tmp_path)
    assert other.value.code == "base.pipeline"


def test_weights_open_by_the_name_that_was_typed(tmp_path: Path) -> None:
    path = adapter(tmp_path / "lora", pair("a.q_proj"))
    checkpoint = open_weights(f"{path}/")
    assert checkpoint.name == f"{path}/"
    checkpoint.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_nothing_stays_open(tmp_path: Path) -> None:
    good, base = adapter(tmp_path / "lora", pair("a.q_proj")), model(tmp_path / "model")
    before = len(os.listdir("/proc/self/fd"))
    for source in (good, base, tmp_path):
        with contextlib.suppress(LoramergeError):
            inspect(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_torch_is_not_imported(tmp_path: Path) -> None:
    paths = [str(adapter(tmp_path / "lora", pair("a.q_proj"))), str(model(tmp_path / "model"))]
    code = (
        f"import sys, loramerge as lm\nfor path in {paths!r}: lm.inspect(path)\n"
        "assert not {'torch', 'numpy', 'transformers', 'huggingface_hub', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
