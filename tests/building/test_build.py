"""Builds: the bytes of a merge, the same every time, made once, and never in part."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loramerge as lm
from loramerge.building import build as builder
from loramerge.cli import main
from loramerge.errors import LoramergeError, MismatchError, OutputError
from loramerge.tensors.output import Output
from tests.building.conftest import ALPHA, RANKS, ROOT, Workshop, content, shell, write_adapter

TWO = """\
base = "base"
adapters = [{ source = "style", weight = 0.7 }, { source = "tone", weight = -0.4 }]

[[output]]
path = "dist/model"

[[output]]
path = "dist/one.safetensors"
method = { name = "ties", density = 0.5 }
numerics = { dtype = "float32" }
options = { reversible = false, include = ["*.q_proj", "*.up_proj"] }
"""


def statuses(data: Mapping[str, Any]) -> dict[str, str]:
    return {output["path"]: output["status"] for output in data["outputs"]}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_an_output_is_the_dense_formula_and_the_merge_of_the_same_flags(workshop: Workshop) -> None:
    recipe = workshop(TWO)
    data = lm.build(recipe)
    assert statuses(data) == {"dist/model": "built", "dist/one.safetensors": "built"}
    here = recipe.parent
    base, out = tensors(here / "base"), tensors(here / "dist/model")
    expected = {name: tensor.double() for name, tensor in base.items()}
    for name, weight in (("style", 0.7), ("tone", -0.4)):
        factors = load_file(here / name / "adapter_model.safetensors")
        for key, b in factors.items():
            if key.endswith("lora_B.weight"):
                a = factors[key.replace("lora_B", "lora_A")]
                target = key.removeprefix("base_model.model.").replace("lora_B.", "")
                expected[target] += weight * ALPHA / RANKS[name] * (b.double() @ a.double())
    assert out.keys() == expected.keys()
    for name, tensor in out.items():
        want = expected[name].to(tensor.dtype)
        assert tensor.dtype == base[name].dtype
        assert (tensor == want).double().mean() > 0.999 or torch.allclose(tensor, want, rtol=1e-6, atol=1e-6)
    lm.merge(
        here / "base",
        [(here / "style", 0.7), (here / "tone", -0.4)],
        here / "alone.safetensors",
        method="ties",
        method_options={"density": 0.5},
        dtype="float32",
    )
    assert (here / "dist/one.safetensors").read_bytes() == (here / "alone.safetensors").read_bytes()
    assert lm.verify(here / "dist/model")["ok"] and lm.verify(here / "dist/one.safetensors")["ok"]


def test_other_threads_another_folder_and_another_process_give_the_same_bytes(workshop: Workshop) -> None:
    first, second = workshop(TWO, "here"), workshop(TWO, "elsewhere/deeper".replace("/", "-"))
    lm.build(first, jobs=1)
    done = shell("build", second, "--jobs", 3, cwd=second.parent.parent, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    built = content(first.parent / "dist")
    assert built == content(second.parent / "dist")
    assert {"model/loramerge.json", "one.loramerge.json"} <= built.keys()  # receipts too, which name the inputs
    assert first.with_suffix(".lock").read_bytes() == second.with_suffix(".lock").read_bytes()
    assert not any(str(first.parent).encode() in raw for raw in built.values())


def test_what_is_there_is_left_alone_without_loading_torch(workshop: Workshop) -> None:
    recipe = workshop(TWO)
    lm.build(recipe)
    before = {p: p.stat().st_mtime_ns for p in recipe.parent.rglob("*")}
    code = (
        "import sys\nfrom loramerge.cli.main import run\n"
        "code = run(['build', 'recipe.toml', '--locked', '--json'])\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys()\nsys.exit(code)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=recipe.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] and data["built"] == 0 and not data["lock_written"]
    assert set(statuses(data).values()) == {"current"}
    assert {p: p.stat().st_mtime_ns for p in recipe.parent.rglob("*")} == before


def test_only_what_an_input_changes_is_made_again(workshop: Workshop) -> None:
    recipe = workshop(TWO + '[[output]]\npath = "dist/other"\nadapters = ["other"]\n')
    lm.build(recipe)
    shutil.rmtree(recipe.parent / "tone")
    write_adapter(recipe.parent / "tone", 1, seed=77)
    data = lm.build(recipe)
    assert statuses(data) == {"dist/model": "built", "dist/one.safetensors": "built", "dist/other": "current"}
    adapters = [(recipe.parent / "style", 0.7), (recipe.parent / "tone", -0.4)]
    assert lm.verify(recipe.parent / "dist/model", base=recipe.parent / "base", adapters=adapters)["ok"]
    assert set(statuses(lm.build(recipe, locked=True)).values()) == {"current"}


def test_an_output_that_was_changed_by_hand_is_not_replaced_unless_forced(workshop: Workshop) -> None:
    recipe = workshop(TWO)
    lm.build(recipe)
    (recipe.parent / "dist/model/notes.txt").write_text("mine")
    for flags in ({}, {"locked": True}):
        with pytest.raises(OutputError) as told:
            lm.build(recipe, **flags)  # type: ignore[arg-type]
        assert told.value.code == "output.exists" and "--force" in told.value.fix
    assert (recipe.parent / "dist/model/notes.txt").exists()
    assert statuses(lm.build(recipe, locked=True, force=True))["dist/model"] == "built"
    assert not (recipe.parent / "dist/model/notes.txt").exists()


def test_a_mistake_in_the_last_output_costs_no_byte_of_the_first(workshop: Workshop) -> None:
    recipe = workshop(TWO + '[[output]]\npath = "dist/wrong"\nadapters = ["wrong"]\n')
    before = content(recipe.parent)
    with pytest.raises(MismatchError, match=r"^line 14: wrong: ") as told:
        lm.build(recipe)
    assert told.value.exit_code == 3
    assert content(recipe.parent) == before and not (recipe.parent / "dist").exists()


def test_a_dry_run_plans_and_writes_nothing(workshop: Workshop) -> None:
    recipe = workshop(TWO + '[[output]]\npath = "dist/again"\nbase = "dist/model"\nadapters = ["other"]\n')
    before = content(recipe.parent)
    data = lm.build(recipe, dry_run=True)
    assert content(recipe.parent) == before and not (recipe.parent / "dist").exists()
    assert set(statuses(data).values()) == {"absent"}
    plans = {output["path"]: output["plan"] for output in data["outputs"]}
    assert plans["dist/model"]["tensors_changed"] == 4 and plans["dist/again"] is None


def test_an_output_can_be_the_base_of_another(workshop: Workshop) -> None:
    recipe = workshop(
        """\
base = "base"
adapters = ["style"]
[[output]]
path = "dist/both"
base = "dist/first"
adapters = ["tone"]
[[output]]
path = "dist/first"
"""
    )
    lm.build(recipe)
    here = recipe.parent
    lm.merge(here / "base", here / "style", here / "one")
    lm.merge(here / "one", here / "tone", here / "two")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (here / "dist/both" / file).read_bytes() == (here / "two" / file).read_bytes()
    shutil.rmtree(here / "dist/both")
    assert statuses(lm.build(recipe, locked=True)) == {"dist/first": "current", "dist/both": "built"}


def test_an_adapter_is_not_merged_twice_unless_forced(workshop: Workshop) -> None:
    recipe = workshop(
        'base = "base"\nadapters = ["style"]\n[[output]]\npath = "one"\n'
        '[[output]]\npath = "two"\nbase = "one"\nadapters = ["style"]\n'
    )
    with pytest.raises(MismatchError, match=r"^line 7: one: the base's own receipt says") as told:
        lm.build(recipe)
    assert told.value.code == "base.already-merged"
    assert statuses(lm.build(recipe, force=True)) == {"one": "current", "two": "built"}


def test_pickled_weights_are_read_where_the_recipe_allows_it(workshop: Workshop) -> None:
    recipe = workshop('base = "pickled"\nadapters = ["style"]\n[output]\npath = "out"\n')
    base = tensors(recipe.parent / "base")
    (recipe.parent / "pickled").mkdir()
    torch.save(base, recipe.parent / "pickled/pytorch_model.bin")
    with pytest.raises(LoramergeError, match=r"^line 1: pickled/pytorch_model.bin: is a PyTorch pickle") as told:
        lm.build(recipe)
    assert told.value.code == "pickle.refused"
    recipe.write_text(recipe.read_text() + "[options]\nallow-pickle = true\n")
    lm.build(recipe)
    lm.merge(recipe.parent / "base", recipe.parent / "style", recipe.parent / "same")
    built, same = tensors(recipe.parent / "out"), tensors(recipe.parent / "same")
    assert built.keys() == same.keys() and all(torch.equal(built[n], same[n]) for n in same)
    assert lm.build(recipe, locked=True)["built"] == 0


def build_and_be_killed(recipe: Path, commits: int) -> int:
    """Builds in a child that kills itself before one more output would be put in place. Gives its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = [commits]
    commit = Output.commit

    def killed(self: Output) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        commit(self)

    try:
        Output.commit = killed  # type: ignore[method-assign]
        lm.build(recipe)
    finally:
        os._exit(1)


@pytest.mark.parametrize("commits", [0, 1, 2, 3])
def test_a_build_that_is_killed_goes_on_where_it_was(commits: int, workshop: Workshop) -> None:
    # Every output is committed twice: inside its partial, and then in place.
    recipe = workshop(TWO)
    assert build_and_be_killed(recipe, commits) == signal.SIGKILL
    assert not recipe.with_suffix(".lock").exists()
    complete = commits >= 2
    assert (recipe.parent / "dist/model").exists() == complete
    data = lm.build(recipe)
    assert statuses(data) == {"dist/model": "current" if complete else "built", "dist/one.safetensors": "built"}
    clean = workshop(TWO, "clean")
    lm.build(clean)
    assert content(recipe.parent) == content(clean.parent)  # and nothing is left lying about


def test_without_a_lock_nothing_is_written_but_outputs(workshop: Workshop) -> None:
    recipe = workshop(TWO)
    data = lm.build(recipe, no_lock=True)
    assert data["lock"] is None and not recipe.with_suffix(".lock").exists()
    with pytest.raises(OutputError, match="already"):
        lm.build(recipe, no_lock=True)


def test_an_output_without_adapters_is_a_copy_in_another_dtype(workshop: Workshop) -> None:
    recipe = workshop('base = "base"\nnumerics = { dtype = "float16" }\n[output]\npath = "copy"\n')
    lm.build(recipe)
    base = tensors(recipe.parent / "base")
    for name, tensor in tensors(recipe.parent / "copy").items():
        assert torch.equal(tensor, base[name].to(torch.float16))


def test_outputs_are_pushed_once(workshop: Workshop) -> None:
    recipe = workshop(TWO.replace('"dist/model"\n', '"dist/model"\npush = { repo = "me/model", tag = "v1" }\n'))
    calls: list[tuple[Any, ...]] = []

    def push(folder: Path, repo: str, **options: Any) -> dict[str, Any]:
        assert (folder / "loramerge.json").exists()
        calls.append((folder.name, repo, options["tag"], options["public"]))
        return {"commit": "c" * 40, "url": "https://hub.test/me/model"}

    settings = builder.Settings(no_push=True)
    data = builder.build(recipe, settings, lm.__version__, push=push)
    assert not calls and "was not pushed" in data["notes"][0]
    for _ in range(2):
        data = builder.build(recipe, builder.Settings(locked=True), lm.__version__, push=push)
    assert calls == [("model", "me/model", "v1", False)]
    assert data["outputs"][0]["pushed"]["commit"] == "c" * 40
    (recipe.parent / "tone/tokenizer.json").write_text("{}")  # another adapter, so another output
    builder.build(recipe, builder.Settings(), lm.__version__, push=push)
    assert len(calls) == 2


@pytest.mark.parametrize("flags", [{"locked": True, "no_lock": True}, {"attest": "a", "dry_run": True}])
def test_flags_that_ask_for_opposite_things(flags: dict[str, Any], workshop: Workshop) -> None:
    with pytest.raises(LoramergeError) as told:
        lm.build(workshop(TWO), **flags)
    assert told.value.exit_code == 2


def test_the_end_of_a_build_for_people(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = workshop(TWO)
    assert main.run(["build", str(recipe), "--no-progress"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = [line.split() for line in told.out.splitlines()]
    assert [line[0] for line in lines] == ["base", "adapter", "adapter", "output", "output", "lock"]
    assert lines[3][1:3] == ["dist/model", "built"] and lines[5][2] == "written"
    assert main.run(["build", str(recipe), "-q"]) == 0
    assert capsys.readouterr().out == f"{recipe.with_suffix('.lock')}\n"
