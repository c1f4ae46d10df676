"""Opening checkpoints: which files are chosen, the rules of the index, and directories that are none."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loramerge.errors import InputError, LoramergeError, MismatchError, UnsafeError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import FileSource

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full(4, i, np.float32) for i, name in enumerate(names)}, path)
    return path


def pickled(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", b"")
    return path


def fake_reader(source: FileSource) -> Header:
    name = source.path.stem
    return Header({name: TensorInfo(name, "U8", (1,), 30, 31)}, {}, 0, source.size)


def write_index(directory: Path, weight_map: Any, name: str = INDEX, **more: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "sharded"
    weights(directory / ONE, "a", "b")
    weights(directory / TWO, "c")
    write_index(directory, {"c": TWO, "b": ONE, "a": ONE}, metadata={"total_size": 48})
    return directory


def refused(path: Path, kind: type[LoramergeError], code: str, *words: str, **options: Any) -> LoramergeError:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(kind) as caught:
        open_checkpoint(path, **options)
    error = caught.value
    assert error.code == code, error.message
    assert error.fix
    assert error.file is not None
    for word in words:
        assert word in error.message, error.message
    if before:
        assert len(os.listdir("/proc/self/fd")) == before, "a file was left open"
    return error


def used(checkpoint: Checkpoint) -> list[str]:
    checkpoint.close()
    return [file.name for file in checkpoint.files]


# --- what is opened -------------------------------------------------------------------------------


def test_a_single_file(tmp_path: Path) -> None:
    path = weights(tmp_path / "some.safetensors", "x", "y")
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.name, checkpoint.path, checkpoint.directory) == (str(path), path, None)
    assert list(checkpoint.tensors) == ["x", "y"]
    assert checkpoint.tensors["y"].file is checkpoint.files[0]
    assert checkpoint.files[0].kind == "safetensors"
    assert (checkpoint.nbytes, checkpoint.index, checkpoint.index_name, checkpoint.config) == (
        32,
        None,
        None,
        None,
    )
    checkpoint.check_unchanged()
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        checkpoint.check_unchanged()
    assert caught.value.code == "input.changed"
    checkpoint.close()


def test_a_file_without_a_suffix_is_told_by_its_bytes(tmp_path: Path) -> None:
    assert used(open_checkpoint(weights(tmp_path / "0a1b2c", "x"))) == ["0a1b2c"]


def test_the_config_beside_a_model_file_or_in_the_directory_is_read(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "x")
    weights(tmp_path / "other" / "lora.safetensors", "x")
    for directory in (tmp_path, tmp_path / "other"):
        (directory / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).config == {"model_type": "llama"}
    assert open_checkpoint(tmp_path / "model.safetensors").config == {"model_type": "llama"}
    assert open_checkpoint(tmp_path / "other" / "lora.safetensors").config is None


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_a_broken_config_is_an_error(tmp_path: Path, text: str) -> None:
    weights(tmp_path / "model.safetensors", "x")
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in str(refused(tmp_path, InputError, "config.invalid").file)


def test_a_sharded_directory(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].file.name == TWO
    assert checkpoint.tensors["c"].file.source.name == os.path.join(str(sharded), TWO)
    assert (checkpoint.index, checkpoint.index_name) == ({"total_size": 48}, INDEX)
    assert checkpoint.directory == sharded
    assert checkpoint.nbytes == 48
    assert used(checkpoint) == [ONE, TWO]


@pytest.mark.parametrize("more", [{}, {"metadata": None}, {"metadata": {"total_size": 1}}, {"extra": 1}])
def test_an_index_without_metadata_or_with_a_wrong_size_is_accepted(sharded: Path, more: dict[str, Any]) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO}, **more)
    assert used(open_checkpoint(sharded)) == [ONE, TWO]


def test_order_of_preference(tmp_path: Path) -> None:
    pickled(tmp_path / "pytorch_model.bin")
    weights(tmp_path / "adapter_model.safetensors", "lora")
    pickled(tmp_path / "training_args.bin")
    (tmp_path / "optimizer.pt").write_bytes(b"not read")
    assert used(open_checkpoint(tmp_path, read_pickle=fake_reader)) == ["pytorch_model.bin"]
    weights(tmp_path / "only.safetensors", "x")
    assert used(open_checkpoint(tmp_path)) == ["only.safetensors"]
    weights(tmp_path / "model.safetensors", "x")
    assert used(open_checkpoint(tmp_path)) == ["model.safetensors"]
    weights(tmp_path / "diffusion-1.safetensors", "x")
    write_index(tmp_path, {"x": "diffusion-1.safetensors"}, "diffusion.safetensors.index.json")
    assert used(open_checkpoint(tmp_path)) == ["diffusion-1.safetensors"]
    weights(tmp_path / ONE, "x")
    write_index(tmp_path, {"x": ONE})
    assert used(open_checkpoint(tmp_path)) == [ONE]


def test_shards_may_be_links_and_lie_in_subdirectories(sharded: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0a1b"
    blob.parent.mkdir()
    (sharded / ONE).replace(blob)
    (sharded / ONE).symlink_to("../blobs/0a1b")
    weights(sharded / "sub" / "two.safetensors", "c")
    write_index(sharded, {"a": ONE, "b": ONE, "c": "sub/two.safetensors"})
    assert used(open_checkpoint(sharded)) == [ONE, "sub/two.safetensors"]


def test_given_weight_names_are_the_only_ones_looked_for(tmp_path: Path) -> None:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    weights(tmp_path / "model.safetensors", "x")
    error = refused(tmp_path, InputError, "checkpoint.no-weights", *names, "'model.safetensors'", weight_names=names)
    assert error.file == str(tmp_path)
    pickled(tmp_path / "adapter_model.bin")
    refused(tmp_path, UnsafeError, "pickle.refused", weight_names=names)
    opened = open_checkpoint(tmp_path, weight_names=names, read_pickle=fake_reader)
    assert opened.files[0].kind == "pickle"
    assert used(opened) == ["adapter_model.bin"]
    weights(tmp_path / "adapter_model.safetensors", "lora")
    assert used(open_checkpoint(tmp_path, weight_names=names)) == ["adapter_model.safetensors"]


# --- paths and directories that are no checkpoints ------------------------------------------------


def test_a_missing_path_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "llama-7b").mkdir()
    assert "'llama-7b'" in refused(tmp_path / "lama-7b", InputError, "input.missing").fix
    refused(tmp_path / ("x" * 5000), InputError, "input.missing")
    with pytest.raises(InputError, match="empty"):
        open_checkpoint("")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "gone", InputError, "input.dangling", "cache")
    refused(tmp_path / "loop", InputError, "input.loop")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", InputError, "input.not-regular")


def test_a_directory_without_weights_lists_what_it_holds(tmp_path: Path) -> None:
    refused(tmp_path, InputError, "checkpoint.no-weights", "empty")
    for i in range(12):
        (tmp_path / f"file{i:02}.txt").touch()
    refused(tmp_path, InputError, "checkpoint.no-weights", "'file00.txt'", "'file09.txt' and 2 more")


def test_several_files_without_an_index_are_named(tmp_path: Path) -> None:
    weights(tmp_path / "a.safetensors", "x")
    weights(tmp_path / "b.safetensors", "y")
    refused(tmp_path, InputError, "checkpoint.ambiguous", "'a.safetensors', 'b.safetensors'")


def test_shards_without_their_index_are_told(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert INDEX in refused(sharded, InputError, "checkpoint.ambiguous", "without its index", ONE).fix


def test_several_indexes_are_ambiguous(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "x.safetensors.index.json")
    write_index(sharded, {"a": ONE}, "y.safetensors.index.json")
    refused(sharded, InputError, "checkpoint.ambiguous", "x.safetensors.index.json")


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, MismatchError, "base.is-adapter", "adapter", "swapped")
    weights(tmp_path / "adapter_model.safetensors", "x")
    refused(tmp_path, MismatchError, "base.is-adapter")
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, MismatchError, "base.is-adapter")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapters.safetensors")
    refused(tmp_path, MismatchError, "base.is-adapter")


def test_a_pipeline_is_several_models(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    error = refused(tmp_path, UnsupportedError, "base.pipeline", "pipeline")
    assert os.path.join(str(tmp_path), "unet") in error.fix


def test_an_index_beside_a_single_file(sharded: Path) -> None:
    weights(sharded / "model.safetensors", "a", "b", "c")
    assert used(open_checkpoint(sharded)) == [ONE, TWO]
    weights(sharded / "model.safetensors", "a", "b")
    refused(sharded, InputError, "checkpoint.ambiguous", INDEX, "'model.safetensors'", "different")


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a")
    write_index(tmp_path, {"a": "model.safetensors"})
    assert used(open_checkpoint(tmp_path)) == ["model.safetensors"]


def test_an_index_given_as_a_file_is_told(sharded: Path) -> None:
    assert "directory" in refused(sharded / INDEX, InputError, "input.format", "JSON").fix


# --- the index ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "\\\\server\\share\\outside.safetensors",
        "\\outside.safetensors",
        "..\\outside.safetensors",
        "sub\\outside.safetensors",
        "file.safetensors:stream.safetensors",
        "nul\0.safetensors",
        "",
        ".",
        "./model.safetensors",
        "a//b.safetensors",
        "model.bin",
        "model.safetensors/",
        "~/model.safetensors.txt",
    ],
)
def test_names_that_could_leave_the_directory_are_refused(sharded: Path, name: str) -> None:
    weights(sharded.parent / "outside.safetensors", "c")
    write_index(sharded, {"a": ONE, "b": ONE, "c": name})
    error = refused(sharded, UnsafeError, "index.unsafe-name", repr(name))
    assert error.file == os.path.join(str(sharded), INDEX)


def test_a_linked_directory_on_the_way_is_refused(sharded: Path) -> None:
    weights(sharded.parent / "outside" / "c.safetensors", "c")
    (sharded / "sub").symlink_to("../outside")
    write_index(sharded, {"a": ONE, "b": ONE, "c": "sub/c.safetensors"})
    refused(sharded, UnsafeError, "index.unsafe-name", "link")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("line 1",)),
        ("[]", ("object",)),
        ("{}", ("no weight_map",)),
        ('{"weight_map": []}', ("weight_map",)),
        ('{"weight_map": {}}', ("empty",)),
        ('{"weight_map": {"a": 1}}', ("'a'",)),
        ('{"weight_map": {"a": null}}', ("'a'",)),
        ('{"weight_map": {"a": ["x"]}}', ("'a'",)),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', ("duplicate key 'a'",)),
        ('{"weight_map": {"a": "x.safetensors"}, "metadata": 3}', ("metadata",)),
        ('{"weight_map": ' + "[" * 2000, ("nested",)),
        ('{"weight_map": {"\\ud800": "x.safetensors"}}', ("surrogate",)),
        (" " * 10_000_001, ("10000001", "10000000")),
    ],
)
def test_broken_indexes(sharded: Path, text: str, words: tuple[str, ...]) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, InputError, "index.invalid", *words)


def test_a_missing_shard_is_named_with_its_tensors(sharded: Path) -> None:
    (sharded / ONE).unlink()
    error = refused(sharded, InputError, "index.missing-file", ONE, "2 tensors")
    assert sorted(error.tensors) == ["a", "b"]


def test_a_shard_that_is_no_file(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / ONE).symlink_to("gone")
    refused(sharded, InputError, "input.dangling", "cache")
    (sharded / ONE).unlink()
    (sharded / ONE).mkdir()
    refused(sharded, InputError, "input.directory")


def test_a_truncated_shard_names_the_shard(sharded: Path) -> None:
    data = (sharded / TWO).read_bytes()
    (sharded / TWO).write_bytes(data[:-1])
    assert TWO in str(refused(sharded, InputError, "safetensors.truncated").file)


def test_a_tensor_missing_from_its_shard(sharded: Path) -> None:
    weights(sharded / ONE, "a")
    error = refused(sharded, InputError, "index.missing-tensor", "1 tensor ", ONE, "'b'")
    assert error.tensors == ("b",)


def test_a_tensor_in_another_shard(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": TWO, "c": TWO})
    refused(sharded, InputError, "index.misplaced", "'b'", ONE, TWO)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    weights(sharded / TWO, "c", "a")
    refused(sharded, InputError, "index.duplicate", "'a'", ONE, TWO)


def test_a_tensor_that_the_index_leaves_out(sharded: Path) -> None:
    weights(sharded / TWO, "c", "d\x1b")
    error = refused(sharded, InputError, "index.unlisted", "'d\\x1b'", TWO)
    assert error.tensors == ("d\x1b",)


# --- pickles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "no_suffix"])
def test_pickles_are_refused_without_permission(tmp_path: Path, name: str) -> None:
    assert "--allow-pickle" in refused(pickled(tmp_path / name), UnsafeError, "pickle.refused", "pickle").fix
    (tmp_path / name).write_bytes(b"\x80\x02}.")
    refused(tmp_path / name, UnsafeError, "pickle.refused")


def test_a_pickle_is_told_by_its_bytes_under_any_name(tmp_path: Path) -> None:
    path = pickled(tmp_path / "model.safetensors")
    refused(path, InputError, "input.format", "zip")
    refused(path, InputError, "input.format", "zip", read_pickle=fake_reader)
    path = weights(tmp_path / "model.bin", "x")
    refused(path, InputError, "input.format", "safetensors", read_pickle=fake_reader)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, InputError, "input.format", "LFS", read_pickle=fake_reader)


def test_sharded_pickles(tmp_path: Path) -> None:
    pickled(tmp_path / "one.bin")
    pickled(tmp_path / "two.bin")
    write_index(tmp_path, {"one": "one.bin", "two": "two.bin"}, PICKLE_INDEX)
    refused(tmp_path, UnsafeError, "pickle.refused")
    checkpoint = open_checkpoint(tmp_path, read_pickle=fake_reader)
    assert [file.kind for file in checkpoint.files] == ["pickle", "pickle"]
    assert checkpoint.index_name == PICKLE_INDEX
    assert used(checkpoint) == ["one.bin", "two.bin"]
    write_index(tmp_path, {"one": "../one.bin"}, PICKLE_INDEX)
    refused(tmp_path, UnsafeError, "index.unsafe-name", read_pickle=fake_reader)


def test_a_directory_of_pickles_only_is_refused_by_default(tmp_path: Path) -> None:
    pickled(tmp_path / "pytorch_model.bin")
    refused(tmp_path, UnsafeError, "pickle.refused")
    assert used(open_checkpoint(tmp_path, read_pickle=fake_reader)) == ["pytorch_model.bin"]
