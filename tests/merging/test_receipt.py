"""Receipts are input when they are read back, and they know what was merged before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loramerge as lm
from loramerge import demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("receipt") / "demo"
    demo.run(folder)
    return folder


def spoil(merged: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = merged / "loramerge.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(tool="other"),
        lambda d: d.update(schema=2),
        lambda d: d.update(tensors=[]),
        lambda d: d["tensors"].update(x=[]),
        lambda d: d["files"].append("x"),
        lambda d: d["files"][0].update(name="../x.safetensors"),
        lambda d: d["side_files"][0].update(name="/etc/passwd"),
        lambda d: d["options"].update(force=True),
        lambda d: d["options"].update(dtype=[]),
        lambda d: d["adapters"][0].update(weight="1"),
    ],
    ids=range(10),
)
def test_spoiled_receipt_is_refused(change: Callable[[dict[str, Any]], Any], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lm.merge(made / "base", made / "style", out)
    assert lm.verify(out, base=made / "base")["ok"]
    spoil(out, change)
    with pytest.raises(lm.LoramergeError) as caught:
        lm.verify(out, base=made / "base")
    assert caught.value.exit_code == 3


def test_every_flipped_byte_of_a_tensor_is_found(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = lm.merge(made / "base", made / "style", out)
    name = receipt.data["files"][0]["name"]
    size = (out / name).stat().st_size
    for at in (8, 4096, size // 2, size - 1):
        with open(out / name, "r+b") as file:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
            report = lm.verify(out)
            os.pwrite(file.fileno(), byte, at)
        assert not report["ok"], at
    assert lm.verify(out)["ok"]


@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_an_adapter_is_not_merged_twice(out: str, made: Path, tmp_path: Path) -> None:
    once = tmp_path / out
    lm.merge(made / "base", made / "style", once)
    with pytest.raises(lm.LoramergeError) as caught:
        lm.merge(once, made / "style", tmp_path / "twice")
    assert caught.value.code == "base.already-merged"
    lm.merge(once, made / "tone", tmp_path / "other")
    lm.merge(once, made / "style", tmp_path / "twice", force=True)


def test_the_same_merge_writes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    """Whatever the number of workers; and the order of adapters matters only within float32's rounding."""
    outs = []
    for jobs in (1, 2, 4):
        out = tmp_path / f"jobs{jobs}"
        lm.merge(made / "base", {made / "style": 0.7, made / "tone": 0.3}, out, jobs=jobs)
        outs.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert outs[0] == outs[1] == outs[2]
    lm.merge(made / "base", {made / "tone": 0.3, made / "style": 0.7}, tmp_path / "turned")
    changed = lm.diff(tmp_path / "jobs1", tmp_path / "turned")
    for row in changed["changed"]:
        assert row["relative"] < 1e-3
    digests = [json.loads((tmp_path / n / "loramerge.json").read_text())["tensors"] for n in ("jobs1", "turned")]
    same = sum(digests[0][n]["digest"] == digests[1][n]["digest"] for n in digests[0])
    assert same >= len(digests[0]) // 2


def test_link_gives_hard_links_of_untouched_files(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    receipt = lm.merge(made / "base", made / "tone", out, include=["model.layers.0.*"], link=True)
    whole = [row for row in receipt.data["files"] if row.get("linked")]
    assert len(whole) == 1
    assert os.path.samefile(out / whole[0]["name"], made / "base" / whole[0]["name"])
    assert lm.verify(out)["ok"]


def test_shard_size_cuts_the_output_anew(made: Path, tmp_path: Path) -> None:
    lm.merge(made / "base", made / "style", tmp_path / "a")
    lm.merge(made / "base", made / "style", tmp_path / "b", shard_size=3_000_000)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 5 and all(f.stat().st_size < 5_000_000 for f in files)
    assert lm.diff(tmp_path / "a", tmp_path / "b")["same"]
    assert lm.verify(tmp_path / "b", base=made / "base")["ok"]


def test_memory_limit_is_kept_or_refused(made: Path, tmp_path: Path) -> None:
    plan = lm.plan_merge(made / "base", made / "style", tmp_path / "o", max_memory=10**9)
    assert plan.memory(plan.jobs) <= 10**9
    with pytest.raises(lm.LoramergeError) as caught:
        lm.plan_merge(made / "base", made / "style", tmp_path / "o", max_memory=10**8)
    assert caught.value.code == "plan.memory" and caught.value.exit_code == 3
