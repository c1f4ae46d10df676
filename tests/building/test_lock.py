"""Locks: what they pin, and what a locked build refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loramerge as lm
from loramerge.building import build as builder
from loramerge.building import numerics
from loramerge.errors import InputError, MismatchError
from tests.building.conftest import Workshop, content, write_adapter

RECIPE = """\
base = "base"
adapters = [{ source = "style", weight = 0.7 }, "tone"]
[[output]]
path = "dist/model"
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(recipe: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(recipe.with_suffix(".lock").read_text())
    return data


def edit(recipe: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = read(recipe)
    change(data)
    recipe.with_suffix(".lock").write_text(json.dumps(data))


def test_a_lock_has_the_digest_of_every_file_that_is_read(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    here = recipe.parent
    (here / "base/README.md").write_text("of another model")  # neither read nor carried
    (here / "base/LICENSE").write_text("carried")
    (here / "style/optimizer.pt").write_bytes(b"of no use")
    data = lm.lock(recipe)
    assert data["written"] and data["new"]
    for row in read(recipe)["inputs"]:
        names = {f["name"] for f in row["files"]}
        files = ["adapter_config.json", "adapter_model.safetensors"]
        if row["role"] == "base":
            files = ["LICENSE", "config.json", "tokenizer.json", "model.safetensors.index.json"]
            files += [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        assert names == set(files)
        for file in row["files"]:
            path = here / row["source"] / file["name"]
            assert (file["sha256"], file["size"]) == (sha256(path), path.stat().st_size)


def test_a_build_adds_the_digests_of_all_files_of_the_outputs(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.lock(recipe)
    assert "files" not in read(recipe)["outputs"][0]
    lm.build(recipe)
    (row,) = read(recipe)["outputs"]
    out = recipe.parent / "dist/model"
    assert {f["name"]: f["sha256"] for f in row["files"]} == {name: sha256(out / name) for name in content(out)}


def test_the_same_recipe_gives_the_same_lock(workshop: Workshop) -> None:
    first, second = workshop(RECIPE, "a"), workshop(RECIPE, "b")
    lm.lock(first)
    lm.lock(second)
    assert first.with_suffix(".lock").read_bytes() == second.with_suffix(".lock").read_bytes()
    assert not lm.lock(first)["written"]


def test_without_a_lock_a_locked_build_tells_to_lock(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    with pytest.raises(InputError) as told:
        lm.build(recipe, locked=True)
    assert told.value.code == "lock.missing" and told.value.fix == f"loramerge lock {recipe}"


def test_a_locked_build_completes_a_lock_that_has_no_digests_of_outputs(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.lock(recipe)
    assert lm.build(recipe, locked=True)["built"] == 1
    assert lm.build(recipe, locked=True)["built"] == 0


def another_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "tone")
    write_adapter(folder / "tone", 1, seed=99)


def one_more_file(folder: Path) -> None:
    (folder / "tone/tokenizer.json").write_text("{}")


def one_file_less(folder: Path) -> None:
    (folder / "base/tokenizer.json").unlink()


def other_config(folder: Path) -> None:
    config = folder / "style/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))


def other_weight(folder: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("0.7", "0.8"))


def other_method(folder: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text('method = { name = "ties", density = 0.5 }\n' + recipe.read_text())


def one_more_output(folder: Path) -> None:
    with open(folder / "recipe.toml", "a") as file:
        file.write('[[output]]\npath = "more"\n')


def other_source(folder: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('"tone"', '"other"'))


CHANGES = [
    (another_adapter, "lock.input", "the adapter 'tone': 'adapter_model.safetensors' is not the file that is locked"),
    (one_more_file, "lock.input", "'tokenizer.json' is new"),
    (one_file_less, "lock.input", "'tokenizer.json' is locked and gone"),
    (other_config, "lock.input", "the adapter 'style': 'adapter_config.json' is not"),
    (other_weight, "lock.recipe", "adapters of the output 'dist/model'"),
    (other_method, "lock.recipe", "method of the output 'dist/model': linear is locked, the recipe says ties"),
    (one_more_output, "lock.recipe", "the output 'more' is not locked"),
    (other_source, "lock.recipe", "adapters of the output"),
]


@pytest.mark.parametrize(("change", "code", "text"), CHANGES, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("built", [False, True])
def test_a_locked_build_names_what_differs_and_makes_nothing(
    change: Callable[[Path], None], code: str, text: str, built: bool, workshop: Workshop
) -> None:
    recipe = workshop(RECIPE)
    if built:
        lm.build(recipe)
    else:
        lm.lock(recipe)
    change(recipe.parent)
    before = content(recipe.parent)
    with pytest.raises(MismatchError) as told:
        lm.build(recipe, locked=True)
    assert told.value.exit_code == 3
    assert told.value.code == code and text in told.value.message, told.value.message
    assert content(recipe.parent) == before
    assert any(text in line for line in lm.lock(recipe, dry_run=True)["changes"])
    lm.build(recipe)  # without it the same is built, and locked
    assert lm.build(recipe, locked=True)["built"] == 0


def test_another_version_makes_nothing_but_leaves_what_is_right(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = workshop(RECIPE)
    with monkeypatch.context() as older:
        older.setattr(numerics, "_version", lambda package: "2.0.0")
        builder.build(recipe, builder.Settings(), "0.0.1")
    assert lm.build(recipe, locked=True)["built"] == 0
    shutil.rmtree(recipe.parent / "dist")
    with pytest.raises(MismatchError, match=r"loramerge 0\.0\.1 is locked, this is") as told:
        lm.build(recipe, locked=True)
    assert told.value.code == "lock.version" and "pip install loramerge==0.0.1 torch==2.0.0" in told.value.fix
    assert not (recipe.parent / "dist").exists()
    assert lm.build(recipe)["built"] == 1


def test_a_lock_that_does_not_hold_together_vouches_for_no_output(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.build(recipe)
    edit(recipe, lambda data: data["numerics"].update(torch="2.0.0"))  # as after a merge of two branches
    with pytest.raises(MismatchError, match=r"torch 2\.0\.0 is locked"):
        lm.build(recipe, locked=True)


def test_what_comes_out_otherwise_than_locked_does_not_appear(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.build(recipe)
    shutil.rmtree(recipe.parent / "dist")

    def other(data: dict[str, Any]) -> None:
        data["numerics"]["cpu"] = "another processor"
        for file in data["outputs"][0]["files"]:
            if file["name"] == "model-00002-of-00002.safetensors":
                file["sha256"] = "0" * 64

    edit(recipe, other)
    before = content(recipe.parent)
    with pytest.raises(MismatchError) as told:
        lm.build(recipe, locked=True)
    assert told.value.code == "lock.output"
    assert told.value.tensors == ("model-00002-of-00002.safetensors",)
    assert f"made on another processor, this is {numerics.cpu()}" in told.value.message
    assert content(recipe.parent) == before and not (recipe.parent / "dist").exists()


def test_another_processor_is_no_difference_where_the_bytes_are_the_same(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.build(recipe)
    edit(recipe, lambda data: data["numerics"].update(cpu="another processor"))
    assert lm.build(recipe, locked=True)["built"] == 0
    shutil.rmtree(recipe.parent / "dist")
    assert lm.build(recipe, locked=True)["built"] == 1


def test_locking_again_keeps_the_digests_of_outputs_that_still_hold(workshop: Workshop) -> None:
    recipe = workshop(RECIPE + '[[output]]\npath = "dist/other"\nadapters = ["other"]\n')
    lm.build(recipe)
    another_adapter(recipe.parent)
    data = lm.lock(recipe)
    assert data["outputs"] == [{"path": "dist/model", "locked": False}, {"path": "dist/other", "locked": True}]
    assert data["changes"] == ["the adapter 'tone': 'adapter_model.safetensors' is not the file that is locked"]


def test_an_output_that_a_new_lock_says_no_more_is_replaced(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    lm.build(recipe)
    another_adapter(recipe.parent)
    lm.lock(recipe)
    assert lm.build(recipe, locked=True)["built"] == 1
    assert {p.name for p in recipe.parent.iterdir() if "lock" in p.name} == {"recipe.lock"}


DAMAGED = [
    "{",
    "[]",
    '{"tool": "loramerge", "schema": 2}',
    '{"tool": "loramerge", "schema": 1, "inputs": [3]}',
    '{"tool": "loramerge", "schema": 1, "outputs": [{"path": 3}]}',
    '{"tool": "loramerge", "schema": 1, "inputs": [{"source": "base", "role": "base", "files": [], "commit": "main"}]}',
    '{"tool": "loramerge", "schema": 1, "outputs": [{"path": "a", "make": {}, "identity": "", "pushed": []}]}',
    '{"tool": "loramerge", "schema": 1, "outputs": [{"path": "a", "make": {}, "identity": "", "files": [{}]}]}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_lock_is_an_error_and_can_be_written_again(text: str, workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    recipe.with_suffix(".lock").write_text(text)
    with pytest.raises(InputError, match=r"lock|JSON|schema") as told:
        lm.build(recipe)
    assert told.value.code.startswith("lock.")
    assert lm.lock(recipe)["written"]
    assert lm.build(recipe)["built"] == 1
