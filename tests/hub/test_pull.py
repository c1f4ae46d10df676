"""Pulls: what is taken, that every byte of it is right, and what happens when the Hub or the network is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Run, content, files_of
from tests.hub.server import FOREVER, OTHER_TOKEN, TOKEN, Hub

NEEDED = {
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "LICENSE",
    "README.md",
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def crowded(hub: Hub) -> Hub:
    """`me/base` with much beside it that a merge does not need."""
    more = {
        "pytorch_model.bin": b"P" * 100_000,
        "model.fp16.safetensors": b"other weights",
        "onnx/model.onnx": b"stale",
        "original/consolidated.00.pth": b"original",
        "model.gguf": b"GGUF",
        "optimizer.pt": b"state",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
    hub.add("me/base", more)
    return hub


def cached(tmp_path: Path, repo: str, commit: str) -> Path:
    return tmp_path / "home" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def test_a_base_into_the_cache_only_what_a_merge_needs(
    crowded: Hub, run: Run, tmp_path: Path, made: dict[str, Path]
) -> None:
    data = run("pull", "me/base", "--json").json
    commit = crowded.repo("me/base").refs["main"]
    assert (data["kind"], data["repo"], data["commit"]) == ("base", "me/base", commit)
    assert {row["name"] for row in data["files"]} == NEEDED
    assert not any(row["cached"] for row in data["files"]) and data["downloaded"] == data["bytes"]
    place = cached(tmp_path, "me/base", commit)
    assert data["out"] == str(place)
    assert content(place) == content(made["base"])
    assert not crowded.leaked()
    # A second time costs one request, and none with the commit.
    for reference, requests in (("me/base", 1), (f"me/base@{commit}", 0)):
        before = len(crowded.log)
        again = run("pull", reference, "--json").json
        assert again["downloaded"] == 0 and all(row["cached"] for row in again["files"])
        assert len(crowded.log) - before == requests


def test_a_base_into_a_directory(crowded: Hub, run: Run, work: Path, made: dict[str, Path], tmp_path: Path) -> None:
    done = run("pull", "hf://me/base", "-o", "base")
    assert content(work / "base") == content(made["base"])
    assert crowded.repo("me/base").refs["main"] in done.out
    weights = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.stat().st_size > 500_000]
    assert not weights, "weights went into the cache as well"
    assert run("pull", "me/base", "-o", "base", "--json", code=4).json["error"]["code"] == "output.exists"
    run("pull", "me/base", "-o", "base", "--force", "-q")
    assert content(work / "base") == content(made["base"])


def test_what_is_cached_is_not_downloaded_again_into_a_directory(
    hub: Hub, run: Run, work: Path, made: dict[str, Path]
) -> None:
    run("pull", "me/base")
    before = hub.sent_bytes
    run("pull", "me/base", "-o", "base")
    assert hub.sent_bytes == before and content(work / "base") == content(made["base"])


def test_an_adapter(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    hub.add("me/lora", {"checkpoint-10/adapter_model.safetensors": b"older", "optimizer.bin": b"x" * 50_000})
    data = run("pull", "me/lora", "-o", "lora", "--json").json
    assert data["kind"] == "adapter"
    assert content(work / "lora") == content(made["lora"])


def test_an_adapter_under_a_name_of_its_own(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    raw, config = (made["lora"] / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    hub.add("me/style", {"style_v2.safetensors": raw, "adapter_config.json": config, "sample.png": b"p"})
    done = run("merge", made["base"], "hf://me/style", "-o", "out")
    assert "style_v2.safetensors" in done.err
    assert content(work / "out") == content(made["base-merged"])
    hub.add("me/style", {"style_v1.safetensors": raw})
    error = run("merge", made["base"], "hf://me/style", "-o", "two", "--json", code=3).json["error"]
    assert error["code"] == "hub.ambiguous" and "style_v1.safetensors" in error["hint"]
    run("merge", made["base"], "hf://me/style/style_v2.safetensors", "-o", "two")
    assert content(work / "two") == content(made["base-merged"])


def test_a_folder_of_a_repository(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    nested = {f"sub/lora/{name}": path for name, path in files_of(made["lora"]).items()}
    nested |= {f"sub/base/{name}": path for name, path in files_of(made["base"]).items()}
    hub.add("me/nested", nested)
    run("pull", "hf://me/nested/sub/base", "-o", "base")
    assert content(work / "base") == content(made["base"])
    run("merge", "hf://me/nested/sub/base", "hf://me/nested/sub/lora=1.0", "-o", "out")
    assert content(work / "out") == content(made["base-merged"])


def test_globs_a_dry_run_and_a_revision(crowded: Hub, run: Run, work: Path) -> None:
    crowded.repo("me/base").tags["v1"] = next(iter(crowded.repo("me/base").commits))
    data = run("pull", "me/base", "--include", "*.gguf", "--include", "onnx/", "-o", "some", "--dry-run", "--json").json
    assert [row["name"] for row in data["files"]] == ["model.gguf", "onnx/model.onnx"]
    assert not (work / "some").exists() and not crowded.requests("GET", "/resolve/.*gguf")
    data = run("pull", "me/base", "--exclude", "*.md", "--exclude", "LICENSE", "--revision", "v1", "--json").json
    assert {row["name"] for row in data["files"]} == NEEDED - {"README.md", "LICENSE"}
    assert data["commit"] == crowded.repo("me/base").tags["v1"]
    assert run("pull", "me/base@v1", "--revision", "v1", "--json", code=2).json["error"]["code"] == "usage.revision"
    assert run("pull", "me/base", "--include", "*.h5", "--json", code=3).json["error"]["code"] == "hub.nothing"


def test_offline_takes_what_the_cache_has(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    done = run("merge", "me/base", "me/lora", "-o", "out", "--offline", "--json", code=5)
    assert done.json["error"]["code"] == "hub.offline"
    run("pull", "me/base")
    run("pull", "me/lora")
    before = len(hub.log)
    done = run("merge", "me/base", "me/lora", "-o", "out", "--offline")
    assert f"offline: me/base is {hub.repo('me/base').refs['main']}" in done.err
    assert content(work / "out") == content(made["base-merged"])
    run("merge", "hf://me/base", "hf://me/lora", "-o", "again", HF_HUB_OFFLINE="1")
    assert content(work / "again") == content(made["base-merged"])
    assert run("pull", "me/base", "--offline", "--json").json["downloaded"] == 0
    assert len(hub.log) == before
    error = run("pull", "me/one", "--offline", "--json", code=5).json["error"]
    assert error["code"] == "hub.offline" and "loramerge pull hf://me/one" in error["hint"]


def test_a_cached_base_is_not_streamed(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    run("pull", "me/base")
    before = hub.sent_bytes
    run("merge", "me/base", made["lora"], "-o", "out")
    assert hub.sent_bytes == before and content(work / "out") == content(made["base-merged"])
    receipt = json.loads((work / "out" / "loramerge.json").read_text())
    assert all(len(row["sha256"]) == 64 for row in receipt["base"]["files"])


@pytest.mark.parametrize("offline", [False, True])
def test_a_cache_that_was_damaged_is_noticed(
    hub: Hub, run: Run, work: Path, made: dict[str, Path], tmp_path: Path, offline: bool
) -> None:
    place = Path(run("pull", "me/base", "-q").out.strip())
    blob = (place / "model-00002-of-00003.safetensors").resolve()
    raw = bytearray(blob.read_bytes())
    raw[-3] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(raw)
    if offline:
        error = run("merge", "me/base", made["lora"], "-o", "out", "--offline", "--json", code=5).json["error"]
        assert error["code"] == "hub.digest" and not (work / "out").exists()
    else:
        run("merge", "me/base", made["lora"], "-o", "out")
        assert content(work / "out") == content(made["base-merged"])


SHARD = r"/blob/.*model-00002"
TROUBLE: list[Any] = [
    pytest.param("cache", "GET", SHARD, "drop", 100_000, 2, id="cache-drop"),
    pytest.param("cache", "GET", SHARD, "flip", 400_000, 1, id="cache-flip"),
    pytest.param("cache", "GET", SHARD, "short", 1000, 1, id="cache-short"),
    pytest.param("cache", "GET", SHARD, "status", 503, 3, id="cache-503"),
    pytest.param("cache", "HEAD", r"/resolve/.*model-00001", "status", 500, 2, id="cache-500-head"),
    pytest.param("cache", "GET", r"/resolve/.*config.json", "status", 502, 2, id="cache-502-small"),
    pytest.param("directory", "GET", SHARD, "drop", 100_000, 2, id="directory-drop"),
    pytest.param("directory", "GET", SHARD, "flip", 400_000, 1, id="directory-flip"),
    pytest.param("directory", "GET", r"/blob/", "whole", None, FOREVER, id="directory-no-ranges"),
    pytest.param("directory", "GET", SHARD, "status", 503, 3, id="directory-503"),
]


@pytest.mark.parametrize(("to", "method", "pattern", "action", "value", "times"), TROUBLE)
def test_trouble_on_the_way_is_overcome(
    hub: Hub,
    run: Run,
    work: Path,
    made: dict[str, Path],
    to: str,
    method: str,
    pattern: str,
    action: str,
    value: Any,
    times: int,
) -> None:
    hub.fault(method, pattern, action, value, times=times)
    where = ["-o", "base"] if to == "directory" else []
    data = run("pull", "me/base", *where, "--json").json
    place = work / "base" if to == "directory" else Path(data["out"])
    assert content(place) == content(made["base"])


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("cache", "model-00002-of-00003.safetensors"),
        ("directory", "model-00002-of-00003.safetensors"),
        ("cache", "tokenizer.json"),
    ],
    ids=["cache", "directory", "in git"],
)
def test_a_byte_that_is_always_wrong_is_refused(
    hub: Hub, run: Run, work: Path, tmp_path: Path, to: str, name: str
) -> None:
    hub.fault("GET", f"/(blob|resolve)/.*{name}", "flip", 3 if name.endswith("json") else 500_000, times=FOREVER)
    where = ["-o", "base"] if to == "directory" else []
    error = run("pull", "me/base", *where, "--json", code=5).json["error"]
    assert error["code"] == "hub.digest" and name in error["file"]
    assert not list(work.iterdir())
    commit = hub.repo("me/base").refs["main"]
    assert not (cached(tmp_path, "me/base", commit) / name).exists(), "the damaged file stays in the cache"


@pytest.mark.parametrize("to", ["cache", "directory"])
def test_private_and_gated(hub: Hub, run: Run, work: Path, made: dict[str, Path], to: str) -> None:
    where = ["-o", "base"] if to == "directory" else []
    hub.repo("me/base").private = True
    assert run("pull", "me/base", *where, "--json", code=5).json["error"]["code"] == "hub.missing"
    hub.repo("me/base").private, hub.repo("me/base").gated = False, True
    error = run("pull", "me/base", *where, "--json", code=5, token=OTHER_TOKEN).json["error"]
    assert error["code"] == "hub.gated" and f"{hub.endpoint}/me/base" in error["hint"]
    data = run("pull", "me/base", *where, "--token", TOKEN, "--json").json
    assert content(work / "base" if to == "directory" else Path(data["out"])) == content(made["base"])
    assert not hub.leaked()


def test_a_list_of_files_that_leads_outside_is_refused(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.add("me/base", {"../../../../evil.json": b"{}"})
    error = run("pull", "me/base", "--json", code=5).json["error"]
    assert error["code"] == "hub.answer" and "evil" in error["message"]
    assert not list(tmp_path.rglob("evil.json"))


def test_pickled_weights_need_permission(hub: Hub, run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(made["one"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    files = {**files_of(made["one"]), "pytorch_model.bin": tmp_path / "pytorch_model.bin"}
    del files["model.safetensors"]
    hub.add("me/pickled", files)
    assert run("merge", "hf://me/pickled", made["lora"], "-o", "out", "--json", code=3).json["error"]["code"] == (
        "pickle.refused"
    )
    assert hub.sent_bytes < 400_000
    run("merge", "hf://me/pickled", made["lora"], "-o", "out", "--allow-pickle")
    from_disk = load_file(made["one-merged"] / "model.safetensors")
    from_hub = load_file(tmp_path / "work" / "out" / "model.safetensors")
    assert from_disk.keys() == from_hub.keys()
    assert all(torch.equal(from_disk[name], from_hub[name]) for name in from_disk)
    names = {row["name"] for row in run("pull", "me/pickled", "--allow-pickle", "--json").json["files"]}
    assert "pytorch_model.bin" in names


def test_other_commands_take_references(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    commit = hub.repo("me/base").refs["main"]
    told = run("inspect", "hf://me/base", "--json").json
    assert (told["kind"], told["source"], told["tensors"]) == ("checkpoint", f"hf://me/base@{commit}", 27)
    assert not [r for r in hub.requests("GET", "/blob/.*model-0") if r.range != "bytes=0-262143"]
    told = run("inspect", "hf://me/lora", "--json").json
    assert told["kind"] == "adapter" and told["mergeable"]
    run("merge", "hf://me/base", "hf://me/lora", "-o", "out", "-q")
    assert run("verify", "out", "--base", "hf://me/base", "--json").json["ok"]
    run("unmerge", "out", "-o", "back", "--base", "hf://me/base")
    weights = {n: d for n, d in content(made["base"]).items() if n.endswith(".safetensors")}
    assert content(work / "back").items() >= weights.items()
    assert run("diff", "hf://me/base", "back", "-q").out.strip() == "equal"
    hub.add("me/merged", files_of(work / "out"))
    run("unmerge", "hf://me/merged", "-o", "inexact", "--inexact")
    told = run("extract", "hf://me/base", "hf://me/merged", "-o", "extracted", "--rank", "8", "--json").json
    assert told["base"] == f"hf://me/base@{commit}"
    config = json.loads((work / "extracted" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    run("convert", "hf://me/lora", "-o", "kohya.safetensors", "--to", "kohya", "--base", "hf://me/base")
    assert (work / "kohya.safetensors").stat().st_size > 1000
    assert not hub.leaked()


def test_a_cache_that_the_client_made_is_used(
    hub: Hub, run: Run, work: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """As `hf download` leaves it: without the list of files that a pull notes there."""
    run("pull", "me/base")
    run("pull", "me/lora")
    for note in (tmp_path / "home" / "hub").glob("models--*/.loramerge"):
        shutil.rmtree(note)
    run("merge", "me/base", "me/lora", "-o", "out", "--offline")
    assert content(work / "out") == content(made["base-merged"])


def test_over_xet(run: Run, hub: Hub, work: Path, made: dict[str, Path]) -> None:
    """The default of the real Hub. In the cache a file is then a link to a link, whose name is another hash."""
    pytest.importorskip("hf_xet")
    hub.xet = True
    for name in ("base", "lora"):
        hub.add(f"me/{name}", files_of(made[name]))
    data = run("pull", "me/base", "--json").json
    assert hub.requests("GET", "xet-read-token")
    assert {r.range for r in hub.requests("GET", "/blob/")} == {"bytes=0-262143"}  # headers, which tell what is needed
    assert content(Path(data["out"])) == content(made["base"])
    run("merge", "me/base", "me/lora", "-o", "out", "--offline", code=5)
    run("merge", "me/base", "me/lora", "-o", "out")
    assert content(work / "out") == content(made["base-merged"])
    run("merge", "me/base", "me/lora", "-o", "again", "--offline")
    assert content(work / "again") == content(made["base-merged"])
    run("merge", "hf://me/one", "me/lora", "-o", "one")
    assert content(work / "one") == content(made["one-merged"])
    assert not hub.leaked()


def test_a_cache_that_cannot_be_written_to_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file where a folder should be")
    error = run("pull", "me/base", "--json", code=4).json["error"]
    assert error["code"] == "output.cache" and "HF_HOME" in error["hint"]
