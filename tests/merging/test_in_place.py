"""Merges, switches and un-merges where the model lies: the same weights, only what changes written, never mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loramerge as lm
from loramerge.cli.main import run as command
from loramerge.errors import InputError, LoramergeError, OutputError, UsageError
from loramerge.tensors import journal
from loramerge.tensors.interrupted import NAME

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HIDDEN, OUT = 3, 48, 64
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
ADAPTERS = ("a", "b", "c", "d", "e")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, locks")


def linear(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}_proj"


def make_base(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    """Two shards; adapters change tensors of the first only, and not all of those."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{"model.embed_tokens.weight": torch.randn(40, HIDDEN)}, {}]
    for layer in range(LAYERS):
        for name in "qkv":
            shards[layer // 2][f"{linear(layer, name)}.weight"] = torch.randn(OUT, HIDDEN)
    shards[1]["model.norm.weight"] = torch.ones(HIDDEN)
    weight_map = {}
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / name, metadata or {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 40}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("the base's alone")
    (folder / "README.md").write_text("a card")
    return folder


def make_adapter(folder: Path, name: str, **config: Any) -> Path:
    torch.manual_seed(ADAPTERS.index(name) + 1)
    path = folder / name
    path.mkdir(parents=True)
    tensors = {}
    for layer in range(2):
        for target in "qv" if name in "ace" else "v":
            module = f"base_model.model.{linear(layer, target)}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, HIDDEN)
            tensors[f"{module}.lora_B.weight"] = torch.randn(OUT, 4) * 0.02
            if name == "c":
                tensors[f"{module}.lora_magnitude_vector"] = torch.rand(OUT) + 6
    save_file(tensors, path / "adapter_model.safetensors")
    dora = {"use_dora": True} if name == "c" else {}
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **dora}))
    if name == "e":
        (path / "tokenizer.json").write_text('{"e": 1}')
        (path / "special_tokens_map.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base")
    for name in ADAPTERS:
        make_adapter(folder, name)
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy whose files are its own (the suite may run where copies are links)."""
    to.mkdir()
    for path in folder.rglob("*"):
        target = to / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    return to


def tree(folder: Path, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: raw for name, raw in files.items() if name not in but}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        found |= load_file(path)
    return found


def same_weights(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k].view(torch.int16), right[k].view(torch.int16))] == []


def same_receipts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, row in theirs["tensors"].items():
        mine = ours["tensors"][name]
        assert mine["do"] == row["do"] and mine.get("base_digest") == row.get("base_digest")
        if row["do"] != "copy":
            assert mine["digest"] == row["digest"]
        else:
            assert mine["digest"] in (None, row["digest"])


# --- the same results -----------------------------------------------------------------------------------


def test_merge_switch_and_unmerge_give_what_they_give_elsewhere(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = tree(model)

    here = lm.merge(model, {made / "a": 0.7, made / "b": -0.4}, None, in_place=True, reversible=True)
    there = lm.merge(made / "base", {made / "a": 0.7, made / "b": -0.4}, tmp_path / "m", reversible=True)
    same_weights(model, tmp_path / "m")
    same_receipts(dict(here.data), dict(there.data))
    assert here.out == model and here.path == model / "loramerge.json" and here.data["in_place"] is True
    assert here.counts == there.counts
    assert here.bytes_written == 2 * 2 * 2 * OUT * HIDDEN

    here = lm.switch(model, [made / "e"], None, in_place=True)
    there = lm.switch(tmp_path / "m", [made / "e"], tmp_path / "s")
    same_weights(model, tmp_path / "s")
    same_receipts(dict(here.data), dict(there.data))
    ours, theirs = ({n for n in tree(f) if not n.endswith(".safetensors")} for f in (model, tmp_path / "s"))
    assert ours == theirs | {"README.md"}  # what is not carried elsewhere stays where it is
    assert "merges.txt" not in ours and (model / "tokenizer.json").read_text() == '{"e": 1}'
    for folder in (model, tmp_path / "s"):
        assert lm.verify(folder)["ok"] and lm.verify(folder, undo=True)["ok"]

    receipt = lm.unmerge(model, None, in_place=True)
    assert receipt.data["command"] == "unmerge" and lm.verify(model)["ok"]
    assert tree(model, but=("loramerge.json",)) == before


def test_twenty_switches_and_back(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = tree(model)
    lm.merge(model, made / "a", None, in_place=True, reversible=True)
    for number in range(20):
        name = ADAPTERS[(number * 3 + 1) % 5]
        lm.switch(model, {made / name: 1 - number / 7}, None, in_place=True)
        if number % 5 == 4:
            lm.merge(made / "base", {made / name: 1 - number / 7}, tmp_path / str(number))
            same_weights(model, tmp_path / str(number))
    lm.unmerge(model, None, in_place=True)
    assert tree(model, but=("loramerge.json",)) == before


def test_what_was_merged_elsewhere_comes_back_in_place(made: Path, tmp_path: Path) -> None:
    """Its files have headers of their own length; those stay."""
    model = tmp_path / "model"
    lm.merge(made / "base", made / "c", model, reversible=True)
    lm.switch(model, made / "a", None, in_place=True)
    lm.unmerge(model, None, in_place=True)
    same_weights(model, made / "base")
    assert lm.verify(model)["ok"]


def test_unmerge_with_the_base_and_by_subtraction(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    lm.merge(model, made / "a", None, in_place=True, no_undo=True)
    again = copied(model, tmp_path / "again")
    assert not (model / "loramerge.undo").exists()
    lm.unmerge(model, None, base=made / "base", in_place=True)
    same_weights(model, made / "base")
    receipt = lm.unmerge(again, None, [made / "a"], inexact=True, in_place=True)
    assert receipt.data["way"] == "subtraction" and not (again / NAME).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "some.name.safetensors"])
def test_a_single_file(made: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes((made / "base" / SHARDS[0]).read_bytes())
    before = file.read_bytes()
    inode = file.stat().st_ino
    lm.merge(file, made / "a", None, in_place=True, reversible=True)
    lm.merge(made / "base" / SHARDS[0], made / "a", tmp_path / "m.safetensors")
    same_weights(file, tmp_path / "m.safetensors")
    lm.switch(file, made / "b", None, in_place=True)
    assert {p.name for p in tmp_path.iterdir()} == {
        name, f"{file.stem}.loramerge.json", f"{file.stem}.loramerge.undo", "m.safetensors", "m.loramerge.json",
    }  # fmt: skip
    lm.unmerge(file, None, in_place=True)
    assert file.read_bytes() == before and file.stat().st_ino == inode
    assert not file.with_name(f"{file.stem}.loramerge.undo").exists()


def test_a_pipeline(made: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    for part, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (pipe / part).mkdir(parents=True)
        (pipe / part / f"{name}.safetensors").write_bytes((made / "base" / SHARDS[0]).read_bytes())
        (pipe / part / "config.json").write_text(json.dumps({"_class_name": "X"}))
    (pipe / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "transformer": ["diffusers", "X"], "text_encoder": ["transformers", "Y"]})
    )
    adapter = tmp_path / "adapter.safetensors"
    loaded = load_file(made / "a" / "adapter_model.safetensors")
    save_file({k.replace("base_model.model", "transformer"): v for k, v in loaded.items()}, adapter)
    before = tree(pipe)
    lm.merge(pipe, adapter, None, in_place=True, reversible=True, alpha=8)
    lm.merge(made / "base" / SHARDS[0], made / "a", tmp_path / "m.safetensors")
    assert tree(pipe)["text_encoder/model.safetensors"] == before["text_encoder/model.safetensors"]
    same_weights(pipe / "transformer", tmp_path / "m.safetensors")
    assert lm.verify(pipe)["ok"]
    lm.unmerge(pipe, None, in_place=True)
    assert tree(pipe, but=("loramerge.json",)) == before


def test_hashes_of_the_old_weights_leave_the_header_and_come_back(made: Path, tmp_path: Path) -> None:
    model = make_base(tmp_path / "model", {"format": "pt", "sshs_model_hash": "1234", "title": "\u00e4 name"})
    before = tree(model)
    lm.merge(model, made / "a", None, in_place=True, reversible=True)
    with safe_open(model / SHARDS[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "\u00e4 name"}
    assert lm.verify(model)["ok"]
    lm.unmerge(model, None, in_place=True)
    assert tree(model, but=("loramerge.json",)) == before


# --- only what changes -------------------------------------------------------------------------------------


def test_only_the_bytes_of_changed_tensors_are_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = {p.name: p.stat() for p in model.iterdir()}
    changed = {f"{linear(layer, name)}.weight" for layer in range(2) for name in "qv"}
    places = lm.open_checkpoint(model).tensors
    written: list[tuple[int, int]] = []
    real = journal.write_all

    def write_all(fd: int, data: memoryview, offset: int) -> None:
        assert os.readlink(f"/proc/self/fd/{fd}").endswith(SHARDS[0])
        written.append((offset, offset + len(data)))
        real(fd, data, offset)

    monkeypatch.setattr(journal, "write_all", write_all)
    lm.merge(model, made / "a", None, in_place=True, reversible=True)
    allowed = [(places[name].info.begin, places[name].info.end) for name in changed]
    assert sum(end - begin for begin, end in written) == sum(e - b for b, e in allowed)
    covered = {at for begin, end in written for at in range(begin, end)}
    assert covered == {at for begin, end in allowed for at in range(begin, end)}
    for name, then in before.items():
        now = (model / name).stat()
        assert now.st_ino == then.st_ino
        assert (now.st_mtime_ns == then.st_mtime_ns) == (name != SHARDS[0])


def test_untouched_tensors_keep_the_digests_that_an_old_receipt_has(made: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    lm.merge(made / "base", made / "a", model, reversible=True)
    digests = {n: r["digest"] for n, r in lm.switch(model, made / "b", None, in_place=True).data["tensors"].items()}
    assert None not in digests.values()
    raw = bytearray((model / SHARDS[1]).read_bytes())
    raw[-1] ^= 1
    (model / SHARDS[1]).write_bytes(raw)
    report = lm.verify(model)
    assert not report["ok"] and len(report["differ"]) == 1


# --- kills ----------------------------------------------------------------------------------------------------

DRIVER = """
import os, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from test_journal import killed_at
import test_in_place as here
import loramerge as lm
from loramerge.errors import InputError
from loramerge.tensors.interrupted import journals

verb, made, tmp, _, stride = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
start = made / "base"
if verb != "merge":
    lm.merge(start, made / "a", tmp / "start", reversible=True)
    start = tmp / "start"

def work(model):
    if verb == "merge":
        return lm.merge(model, made / "e", None, in_place=True, reversible=True)
    if verb == "switch":
        return lm.switch(model, made / "e", None, in_place=True)
    return lm.unmerge(model, None, in_place=True)

OWN = ("loramerge.json", "loramerge.undo")
model = here.copied(start, tmp / "done" )
work(model)
model.rename(tmp / "model-done")
old, new = here.tree(start), here.tree(tmp / "model-done", but=OWN)
seen = dict.fromkeys(("old", "new", "waiting", "refused"), 0)
number = 1
while True:
    model = here.copied(start, tmp / "model")
    if not killed_at(number, lambda: work(model), bool(number % 2)):
        break
    if journals(model):
        seen["waiting"] += 1
        for read in (lambda: lm.open_checkpoint(model), lambda: lm.verify(model), lambda: lm.inspect(model),
                     lambda: lm.open_checkpoint(model / here.SHARDS[0]), lambda: lm.diff(model, start),
                     lambda: lm.merge(model, made / "b", tmp / "other")):
            try:
                read()
            except InputError as error:
                assert error.code == "input.interrupted", error.code
                seen["refused"] += 1
            else:
                raise AssertionError("an interrupted model was read")
        if number % 2:
            lm.recover(model)
            assert here.tree(model, but=OWN) == new, number
        receipt = work(model) if not number % 2 else None
        if receipt is not None:  # the same command again: it is done
            assert any("interrupted" in note for note in receipt.notes), receipt.notes
    else:
        files = here.tree(model)
        weights = {n: raw for n, raw in files.items() if n.endswith(".safetensors")}
        if all(old[n] == raw for n, raw in weights.items()):
            seen["old"] += 1
            assert {n: r for n, r in files.items() if ".journal" not in n} == old, number
            work(model)
        else:
            seen["new"] += 1
            lm.recover(model)
    assert here.tree(model, but=OWN) == new, number
    assert not [p for p in model.rglob("*") if "journal" in p.name], number
    assert lm.verify(model)["ok"]
    shutil.rmtree(model)
    number += stride
print(number, seen)
assert number > 30 and seen["old"] and seen["waiting"] and seen["new"], (number, seen)
"""


@pytest.mark.parametrize(("verb", "stride"), [("merge", 3), ("switch", 2), ("unmerge", 3)])
def test_a_kill_at_any_call_leaves_old_new_or_refused_and_the_next_command_recovers(
    made: Path, tmp_path: Path, verb: str, stride: int
) -> None:
    """In a process of its own, which has started no threads before it forks."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "tensors"), str(ROOT / "tests" / "merging")])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, verb, str(made), str(tmp_path), str(Path(__file__).parent), str(stride)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.fixture
def interrupted(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model whose switch from a to b was stopped after its journal was binding."""
    model = tmp_path / "model"
    lm.merge(made / "base", made / "a", model, reversible=True)

    def stopped(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Staging, "apply", stopped)
        with pytest.raises(KeyboardInterrupt):
            lm.switch(model, made / "b", None, in_place=True)
    assert (model / NAME).is_dir()
    return model


def test_another_command_in_place_recovers_first(made: Path, tmp_path: Path, interrupted: Path) -> None:
    receipt = lm.switch(interrupted, made / "c", None, in_place=True)
    assert receipt.data["adapters"][0]["source"] == str(made / "c")
    lm.merge(made / "base", made / "c", tmp_path / "c")
    same_weights(interrupted, tmp_path / "c")
    lm.unmerge(interrupted, None, in_place=True)
    same_weights(interrupted, made / "base")


def test_the_commands_say_what_to_do(
    made: Path, tmp_path: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["verify"],
        ["inspect"],
        ["unmerge", "-o", str(tmp_path / "u")],
        ["unmerge", "--in-place", "--dry-run"],
    ):
        assert command([arguments[0], str(interrupted), *arguments[1:]]) == 3
        assert f"fix:   loramerge recover {interrupted}" in capsys.readouterr().err
    assert command(["merge", str(made / "base"), str(made / "b"), "-o", str(interrupted), "--force"]) == 3
    capsys.readouterr()
    assert command(["recover", str(interrupted), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["recovered"] == [{"model": str(interrupted), "command": "switch"}]
    assert command(["recover", str(interrupted)]) == 0
    assert "nothing waits" in capsys.readouterr().out
    lm.merge(made / "base", made / "b", tmp_path / "b")
    same_weights(interrupted, tmp_path / "b")
    assert command(["recover", str(tmp_path / "no such")]) == 3


def test_an_error_while_staging_leaves_the_model_as_it_was(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = tree(model)
    bad = tmp_path / "bad"
    copied(made / "a", bad)
    held = load_file(bad / "adapter_model.safetensors")
    list(held.values())[-1][0, 0] = float("nan")
    save_file(held, bad / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        lm.merge(model, bad, None, in_place=True, reversible=True)
    assert caught.value.code == "adapter.non-finite"
    assert tree(model) == before


def test_an_edited_model_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    lm.merge(made / "base", made / "a", model, reversible=True)
    info = lm.open_checkpoint(model).tensors[f"{linear(1, 'q')}.weight"].info
    raw = bytearray((model / SHARDS[0]).read_bytes())
    raw[info.begin] ^= 1
    (model / SHARDS[0]).write_bytes(raw)
    before = tree(model)
    for work in (
        lambda: lm.unmerge(model, None, in_place=True),
        lambda: lm.switch(model, made / "b", None, in_place=True),
    ):
        with pytest.raises(LoramergeError) as caught:
            work()
        assert caught.value.exit_code == 3 and caught.value.tensors == (f"{linear(1, 'q')}.weight",)
        assert tree(model) == before


def test_a_model_that_changes_meanwhile_is_left_alone(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = tree(model)
    with pytest.raises(InputError) as caught:
        lm.merge(
            model, made / "a", None, in_place=True, reversible=True, on_plan=lambda plan: os.utime(model / SHARDS[1])
        )
    assert caught.value.code == "input.changed"
    assert tree(model) == before


def test_two_runs_at_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied(made / "base", tmp_path / "model")
    inside, go = threading.Event(), threading.Event()
    real = journal.Staging.commit

    def commit(self: Any) -> None:
        inside.set()
        assert go.wait(60)
        real(self)

    monkeypatch.setattr(journal.Staging, "commit", commit)
    first = threading.Thread(target=lm.merge, args=(model, made / "a", None), kwargs=dict(in_place=True, no_undo=True))
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(OutputError) as caught:
            lm.merge(model, made / "b", None, in_place=True, no_undo=True)
        assert caught.value.code == "output.busy" and caught.value.exit_code == 4
    finally:
        go.set()
        first.join()
    lm.merge(made / "base", made / "a", tmp_path / "a")
    same_weights(model, tmp_path / "a")


# --- full disks -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    from test_full_disk import mounted

    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, 24 << 20):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a refused plan closes its files when it is collected


@pytest.mark.parametrize("leave", [0, 8192, 40_000])
def test_a_disk_that_fills_up_while_staging_leaves_the_model_as_it_was(
    made: Path, small_disk: Path, leave: int
) -> None:
    from test_full_disk import fill

    model = copied(made / "base", small_disk / "model")
    before = tree(model)
    with pytest.raises(OutputError) as caught:
        lm.merge(model, made / "a", None, in_place=True, reversible=True, on_plan=lambda plan: fill(small_disk, leave))
    assert caught.value.code == "output.no-space" and caught.value.exit_code == 4
    assert tree(model) == before
    (small_disk / "filler").unlink()
    lm.merge(model, made / "a", None, in_place=True, reversible=True)
    lm.unmerge(model, None, in_place=True)
    same_weights(model, made / "base")


def test_a_disk_without_room_for_the_journal_is_noticed_before(made: Path, small_disk: Path) -> None:
    from test_full_disk import fill

    model = copied(made / "base", small_disk / "model")
    fill(small_disk, 1 << 20)
    with pytest.raises(OutputError) as caught:
        lm.plan_merge(model, made / "a", None, in_place=True, reversible=True)
    assert caught.value.code == "output.no-space"


# --- refusals ---------------------------------------------------------------------------------------------------


def refused(model: Path, work: Any) -> LoramergeError:
    before = tree(model)
    with pytest.raises(LoramergeError) as caught:
        work()
    assert tree(model) == before
    return caught.value


def test_without_an_undo_file_only_on_demand(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    error = refused(model, lambda: lm.merge(model, made / "a", None, in_place=True))
    assert error.code == "usage.in-place" and "--no-undo" in error.fix and isinstance(error, UsageError)
    both = refused(model, lambda: lm.merge(model, made / "a", None, in_place=True, reversible=True, no_undo=True))
    assert both.code == "usage.in-place"


def test_a_merge_into_a_merged_model_would_lose_the_base(made: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    lm.merge(made / "base", made / "a", model, reversible=True)
    for options in ({"reversible": True}, {"no_undo": True}):
        error = refused(model, lambda options=options: lm.merge(model, made / "b", None, in_place=True, **options))
        assert error.code == "in-place.merged" and "switch" in error.fix
    lm.merge(model, made / "b", None, in_place=True, no_undo=True, force=True)
    assert not (model / "loramerge.undo").exists()


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"shard_size": 1000}, {"link": True}], ids=str)
def test_options_that_ask_for_other_files(made: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = copied(made / "base", tmp_path / "model")
    error = refused(model, lambda: lm.merge(model, made / "a", None, in_place=True, no_undo=True, **options))
    assert error.code == "usage.in-place" and error.exit_code == 2


def test_both_or_no_place(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    for out, flag in ((None, False), (tmp_path / "x", True)):
        with pytest.raises(UsageError) as caught:
            lm.merge(model, made / "a", out, in_place=flag, no_undo=flag)
        assert caught.value.code == "usage.output"
    assert command(["merge", str(model), str(made / "a"), "--in-place", "-o", str(tmp_path / "x")]) == 2
    assert command(["merge", str(model), str(made / "a")]) == 2
    with pytest.raises(UsageError):
        lm.merge(model, made / "a", tmp_path / "x", no_undo=True)


def test_linked_weights(made: Path, tmp_path: Path) -> None:
    """A download cache keeps the files elsewhere and links to them; copies may share them by hard links."""
    for link in (os.symlink, os.link):
        model = copied(made / "base", tmp_path / link.__name__)
        (model / SHARDS[0]).rename(tmp_path / f"blob-{link.__name__}")
        link(tmp_path / f"blob-{link.__name__}", model / SHARDS[0])
        error = refused(model, lambda model=model: lm.merge(model, made / "a", None, in_place=True, reversible=True))
        assert error.code == "in-place.link" and "-o OUT" in error.fix
    file = tmp_path / "link.safetensors"
    file.symlink_to(model / SHARDS[1])
    torch.manual_seed(0)
    other = tmp_path / "other"
    other.mkdir()
    save_file(
        {f"base_model.model.{linear(2, 'q')}.lora_{x}.weight": torch.randn(4, HIDDEN if x == "A" else 4) if x == "A"
         else torch.randn(OUT, 4) for x in "AB"},
        other / "adapter_model.safetensors",
    )  # fmt: skip
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(OutputError) as caught:
        lm.merge(file, other, None, in_place=True, reversible=True)
    assert caught.value.code == "in-place.link"


def test_results_that_do_not_fit_where_the_model_lies(made: Path, tmp_path: Path) -> None:
    model = copied(made / "base", tmp_path / "model")
    head = copied(made / "a", tmp_path / "head")
    held = load_file(head / "adapter_model.safetensors")
    save_file(held | {"base_model.model.score.weight": torch.randn(3, HIDDEN)}, head / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    (head / "adapter_config.json").write_text(json.dumps(settings))
    error = refused(model, lambda: lm.merge(model, head, None, in_place=True, reversible=True))
    assert error.code == "in-place.layout" and "score.weight" in error.tensors and "-o OUT" in error.fix
    grown = copied(made / "a", tmp_path / "grown")
    save_file(
        held | {"base_model.model.model.embed_tokens.weight": torch.randn(44, HIDDEN)},
        grown / "adapter_model.safetensors",
    )
    error = refused(model, lambda: lm.merge(model, grown, None, in_place=True, reversible=True))
    assert error.code == "in-place.layout" and "[44, 48]" in error.message

    # And one that was added elsewhere cannot be taken out in place.
    lm.merge(made / "base", head, tmp_path / "m", reversible=True)
    error = refused(tmp_path / "m", lambda: lm.unmerge(tmp_path / "m", None, in_place=True))
    assert error.code == "in-place.layout"


def test_pickled_weights(made: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    torch.save(tensors(made / "base"), model / "pytorch_model.bin")
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    error = refused(model, lambda: lm.merge(model, made / "a", None, in_place=True, reversible=True, allow_pickle=True))
    assert error.code == "in-place.format"


def test_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copied(made / "base", tmp_path / "model")
    before = tree(model)
    base, a, b = str(model), str(made / "a"), str(made / "b")
    assert command(["merge", base, a, "--in-place", "--reversible", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["in_place"] and plan["bytes_written"] == 4 * 2 * OUT * HIDDEN and tree(model) == before
    assert command(["merge", base, a, "--in-place"]) == 2
    assert "--no-undo" in capsys.readouterr().err
    assert command(["merge", base, a, "--in-place", "--reversible", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == base
    assert command(["switch", base, b, "--in-place", "--dry-run"]) == 0
    assert command(["switch", base, b, "--in-place"]) == 0
    assert f"receipt {base}/loramerge.json" in capsys.readouterr().out
    assert command(["verify", base]) == 0
    assert command(["unmerge", base, "--in-place", "-q"]) == 0
    assert tree(model, but=("loramerge.json",)) == before
