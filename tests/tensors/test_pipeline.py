"""Pipelines as checkpoints: which folders are opened, under which names, and names that lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.errors import InputError, LoramergeError, UnsafeError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.pipeline import input_folders

PLAIN = "diffusion_pytorch_model.safetensors"
VARIANT = "diffusion_pytorch_model.fp16.safetensors"


def weights(path: Path, *names: str, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full(4, value + i, np.float32) for i, name in enumerate(names)}, path)
    return path


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_index(root: Path, **components: Any) -> None:
    write_json(root / "model_index.json", {"_class_name": "SomePipeline", "_diffusers_version": "0.42.1", **components})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model of two shards, a model of one file with a tensor of the same name, a scheduler, a tokenizer."""
    root = tmp_path / "pipeline"
    one, two = (
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    )
    weights(root / "unet" / one, "conv_in.weight", "shared")
    weights(root / "unet" / two, "conv_out.weight", value=5)
    write_json(
        root / "unet" / f"{PLAIN}.index.json",
        {"metadata": {"total_size": 48}, "weight_map": {"conv_in.weight": one, "shared": one, "conv_out.weight": two}},
    )
    write_json(root / "unet" / "config.json", {"_class_name": "SomeUNet", "sample_size": 8})
    weights(root / "text_encoder" / "model.safetensors", "shared", value=9)
    write_json(root / "text_encoder" / "config.json", {"model_type": "clip_text_model"})
    write_json(root / "scheduler" / "scheduler_config.json", {})
    write_json(root / "tokenizer" / "tokenizer_config.json", {})
    write_index(
        root,
        unet=["diffusers", "SomeUNet"],
        text_encoder=["transformers", "CLIPTextModel"],
        scheduler=["diffusers", "SomeScheduler"],
        tokenizer=["transformers", "CLIPTokenizer"],
        safety_checker=[None, None],
        requires_safety_checker=False,
        sizes=[1, 2],
    )
    return root


def refused(path: Path, kind: type[LoramergeError], code: str, *words: str) -> LoramergeError:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.code == code, error.message
    assert error.fix and error.file is not None
    for word in words:
        assert word in error.message, error.message
    if before:
        assert len(os.listdir("/proc/self/fd")) == before, "a file was left open"
    return error


def read(checkpoint: Checkpoint, name: str) -> list[float]:
    located = checkpoint.tensors[name]
    raw = located.file.source.read(located.info.begin, located.info.nbytes)
    return list(np.frombuffer(raw, np.float32))


def test_the_tensors_of_all_components_are_named_by_their_folder(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    assert set(checkpoint.tensors) == {
        "unet/conv_in.weight",
        "unet/shared",
        "unet/conv_out.weight",
        "text_encoder/shared",
    }
    assert [(f.name, f.component) for f in checkpoint.files] == [
        ("text_encoder/model.safetensors", "text_encoder"),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet"),
        ("unet/diffusion_pytorch_model-00002-of-00002.safetensors", "unet"),
    ]
    assert (checkpoint.directory, checkpoint.config, checkpoint.index, checkpoint.index_name) == (
        root,
        None,
        None,
        None,
    )
    for name, folder, key in (("unet/shared", "unet", "shared"), ("text_encoder/shared", "text_encoder", "shared")):
        stored = {k: v for file in (root / folder).glob("*.safetensors") for k, v in load_file(file).items()}
        assert read(checkpoint, name) == list(stored[key])
        assert checkpoint.tensors[name].info.name == name
    assert checkpoint.nbytes == 4 * 4 * 4
    checkpoint.close()


def test_each_component_keeps_its_own_config_index_and_class(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    text_encoder, unet = checkpoint.components
    assert (text_encoder.folder, text_encoder.class_name) == ("text_encoder", "CLIPTextModel")
    assert text_encoder.checkpoint.config == {"model_type": "clip_text_model"}
    assert text_encoder.checkpoint.index_name is None
    assert (unet.checkpoint.index_name, unet.checkpoint.index) == (f"{PLAIN}.index.json", {"total_size": 48})
    assert list(unet.checkpoint.tensors) == ["conv_in.weight", "shared", "conv_out.weight"]
    assert checkpoint.models == checkpoint.components
    checkpoint.close()
    with pytest.raises(ValueError, match="close"):
        unet.checkpoint.files[0].source.read(0, 8)


def test_a_model_of_no_pipeline_is_its_own_only_model(root: Path) -> None:
    checkpoint = open_checkpoint(root / "unet")
    assert (checkpoint.components, [m.checkpoint for m in checkpoint.models]) == ((), [checkpoint])
    assert checkpoint.models[0].folder == checkpoint.files[0].component == ""
    checkpoint.close()


def test_a_changed_weight_file_of_a_component_is_noticed(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    checkpoint.check_unchanged()
    weights(root / "text_encoder" / "model.safetensors", "shared", "more")
    with pytest.raises(InputError) as caught:
        checkpoint.check_unchanged()
    assert caught.value.code == "input.changed"
    checkpoint.close()


# --- which file of a folder -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "used"),
    [
        ([PLAIN, VARIANT, "diffusion_pytorch_model.non_ema.safetensors"], PLAIN),
        ([VARIANT], VARIANT),
        ([PLAIN, "diffusion_pytorch_model.bin"], PLAIN),
        ([VARIANT, "diffusion_pytorch_model.bin"], VARIANT),
        ([PLAIN, "other.safetensors"], PLAIN),
    ],
)
def test_plain_files_go_before_variants_and_a_lone_variant_is_used(
    tmp_path: Path, present: list[str], used: str
) -> None:
    for name in present:
        if name.endswith(".bin"):
            (tmp_path / "unet").mkdir(exist_ok=True)
            (tmp_path / "unet" / name).write_bytes(b"")
        else:
            weights(tmp_path / "unet" / name, "x")
    write_index(tmp_path, unet=["diffusers", "SomeUNet"])
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == [f"unet/{used}"]
    checkpoint.close()


def test_the_index_of_a_variant_is_used_where_there_is_no_other(tmp_path: Path) -> None:
    shard = "model.fp16-00001-of-00001.safetensors"
    weights(tmp_path / "te" / shard, "x")
    write_json(tmp_path / "te" / "model.safetensors.index.fp16.json", {"weight_map": {"x": shard}})
    write_index(tmp_path, te=["transformers", "T5EncoderModel"])
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.components[0].checkpoint.index_name == "model.safetensors.index.fp16.json"
    assert [file.name for file in checkpoint.files] == [f"te/{shard}"]
    checkpoint.close()
    weights(tmp_path / "te" / "model-00001-of-00001.safetensors", "x")
    write_json(
        tmp_path / "te" / "model.safetensors.index.json", {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    )
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["te/model-00001-of-00001.safetensors"]
    checkpoint.close()


def test_several_variants_and_nothing_plain_are_ambiguous(tmp_path: Path) -> None:
    weights(tmp_path / "unet" / VARIANT, "x")
    weights(tmp_path / "unet" / "diffusion_pytorch_model.bf16.safetensors", "x")
    write_index(tmp_path, unet=["diffusers", "SomeUNet"])
    refused(tmp_path, InputError, "checkpoint.ambiguous", "bf16", "fp16")


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": NaN}', '{"unet": ["a", "b"], "unet": ["a", "b"]}', ""])
def test_a_broken_model_index_is_an_error(root: Path, text: str) -> None:
    (root / "model_index.json").write_text(text)
    assert str(refused(root, InputError, "pipeline.invalid").file).endswith("model_index.json")


def test_a_listed_folder_that_is_not_there_is_named(root: Path) -> None:
    write_index(root, unet=["diffusers", "SomeUNet"], image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    assert "null" in refused(root, InputError, "pipeline.missing-component", "image_encoder").fix


def test_a_component_that_the_index_goes_without_need_not_be_there(root: Path) -> None:
    write_index(root, unet=["diffusers", "SomeUNet"], image_encoder=[None, None])
    checkpoint = open_checkpoint(root)
    assert [c.folder for c in checkpoint.components] == ["unet"]
    checkpoint.close()


@pytest.mark.parametrize("left", ["config.json", "diffusion_flax_model.msgpack", "model.onnx"])
def test_a_model_without_weights_that_can_be_read_is_not_skipped(root: Path, left: str) -> None:
    (root / "vae").mkdir()
    (root / "vae" / left).write_text("{}")
    write_index(root, unet=["diffusers", "SomeUNet"], vae=["diffusers", "AutoencoderKL"])
    error = refused(root, InputError, "pipeline.missing-weights", "no weights")
    assert str(error.file).endswith("vae")


def test_a_tokenizer_with_a_copy_of_its_models_config_holds_no_weights(root: Path) -> None:
    (root / "tokenizer" / "config.json").write_text("{}")
    checkpoint = open_checkpoint(root)
    assert [c.folder for c in checkpoint.components] == ["text_encoder", "unet"]
    checkpoint.close()


def test_a_missing_shard_is_named_by_its_folder(root: Path) -> None:
    (root / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert os.path.join("unet", PLAIN) in str(refused(root, InputError, "index.missing-file", "00002-of-00002").file)


def test_pickles_in_a_component_need_permission(root: Path) -> None:
    (root / "vae").mkdir()
    (root / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    write_index(root, unet=["diffusers", "SomeUNet"], vae=["diffusers", "AutoencoderKL"])
    assert "vae" in str(refused(root, UnsafeError, "pickle.refused").file)


def test_an_index_of_no_weights_is_no_base(root: Path) -> None:
    write_index(root, scheduler=["diffusers", "SomeScheduler"])
    assert str(root / "unet") in refused(root, UnsupportedError, "base.pipeline", "pipeline", "component").fix


@pytest.mark.parametrize("name", ["../unet", "..", ".", "", "a/b", "/etc", "a\\b", "C:", "nul\0", "../../etc"])
def test_names_that_are_no_folder_of_the_pipeline_are_refused(root: Path, name: str) -> None:
    weights(root.parent / "unet" / "model.safetensors", "stolen")
    write_index(root, **{name: ["diffusers", "SomeUNet"]})
    refused(root, UnsafeError, "pipeline.unsafe-name", "component")


def test_a_link_in_place_of_a_component_is_refused(root: Path) -> None:
    elsewhere = root.parent / "elsewhere"
    (root / "unet").rename(elsewhere)
    (root / "unet").symlink_to(elsewhere, target_is_directory=True)
    refused(root, UnsafeError, "pipeline.unsafe-name", "link", "unet")


def test_links_to_files_inside_a_component_are_followed(root: Path) -> None:
    """The Hub's cache is made of them."""
    blob = root.parent / "blob"
    (root / "text_encoder" / "model.safetensors").rename(blob)
    (root / "text_encoder" / "model.safetensors").symlink_to(blob)
    checkpoint = open_checkpoint(root)
    assert "text_encoder/shared" in checkpoint.tensors
    checkpoint.close()


def test_the_folders_of_a_pipeline_are_inputs_and_nothing_else_is(root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path, target_is_directory=True)
    assert [p.name for p in input_folders(root)] == ["scheduler", "text_encoder", "tokenizer", "unet"]
    assert input_folders(root / "unet") == input_folders(root / "model_index.json") == []
