"""Recipes whose inputs are on the Hub: pinned by their locks, built without the network, and pushed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Run, content, files_of, write_adapter
from tests.hub.server import TOKEN, Hub

RECIPE = """\
base = "hf://me/base"
adapters = ["me/lora@main"]
[[output]]
path = "out"
"""


@pytest.fixture
def work(tmp_path: Path, run: Run) -> Path:
    """The folder that commands run in, with the recipe."""
    (tmp_path / "work" / "recipe.toml").write_text(RECIPE)
    return tmp_path / "work"


def locked(work: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((work / "recipe.lock").read_text())
    return data


def move(hub: Hub, repo: str, tmp_path: Path) -> None:
    """Another adapter on the same branch."""
    hub.add(repo, files_of(write_adapter(tmp_path / "newer", seed=8)))


def test_a_lock_has_commits_and_digests_without_downloading_the_base(
    hub: Hub, run: Run, work: Path, tmp_path: Path
) -> None:
    told = run("lock", "recipe.toml", "--json").json
    large = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.stat().st_size > 500_000]
    assert not large
    for row in locked(work)["inputs"]:
        repo = "me/base" if row["role"] == "base" else "me/lora"
        assert (row["repo"], row["commit"]) == (repo, hub.repo(repo).refs["main"])
        for file in row["files"]:
            assert file["sha256"] == hashlib.sha256(hub.content(repo, file["name"])).hexdigest()
        names = {f["name"] for f in row["files"]}
        assert names >= ({"config.json", "tokenizer.json"} if row["role"] == "base" else {"adapter_config.json"})
    assert [row["commit"] for row in told["inputs"]] == [hub.repo(r).refs["main"] for r in ("me/base", "me/lora")]


def test_a_locked_build_stays_at_its_commits_when_branches_move(
    hub: Hub, run: Run, work: Path, tmp_path: Path, made: dict[str, Path]
) -> None:
    run("lock", "recipe.toml")
    before = hub.repo("me/lora").refs["main"]
    move(hub, "me/lora", tmp_path)
    run("build", "recipe.toml", "--locked")
    assert content(work / "out") == content(made["base-merged"])
    receipt = json.loads((work / "out" / "loramerge.json").read_text())
    assert receipt["adapters"][0]["commit"] == before
    done = run("lock", "recipe.toml")
    assert f"commit {before} is locked, it is {hub.repo('me/lora').refs['main']}" in done.out
    assert run("build", "recipe.toml", "--json").json["built"] == 1
    assert content(work / "out") != content(made["base-merged"])


def test_what_is_there_asks_nobody(hub: Hub, run: Run, work: Path) -> None:
    run("build", "recipe.toml")
    asked = len(hub.log)
    data = run("build", "recipe.toml", "--locked", "--json").json
    assert data["built"] == 0 and len(hub.log) == asked


def test_a_locked_build_needs_no_network_when_all_is_in_the_cache(
    hub: Hub, run: Run, work: Path, tmp_path: Path, made: dict[str, Path]
) -> None:
    run("lock", "recipe.toml")
    done = run("build", "recipe.toml", "--locked", "--offline", "--json", code=5)
    assert done.json["error"]["code"] == "hub.offline" and not (work / "out").exists()
    run("pull", "me/base")
    run("pull", "me/lora")
    hub.add("me/base", {"NEWS.txt": b"moved"})
    asked = len(hub.log)
    run("build", "recipe.toml", "--locked", "--offline")
    assert len(hub.log) == asked
    assert content(work / "out") == content(made["base-merged"])


def test_a_server_with_other_files_at_the_locked_commit_is_not_believed(run: Run, work: Path) -> None:
    run("lock", "recipe.toml")
    text = (work / "recipe.lock").read_text()
    data = json.loads(text)
    for row in data["inputs"]:
        for file in row["files"]:
            if file["name"] == "model-00001-of-00003.safetensors":
                text = text.replace(file["sha256"], "0" * 64)
    (work / "recipe.lock").write_text(text)
    done = run("build", "recipe.toml", "--locked", "--json", code=3)
    assert not (work / "out").exists()
    run("build", "recipe.toml", "--json", code=3)
    assert done.json["error"]["code"] == "lock.input"


def test_a_repository_that_is_not_there_names_the_line(run: Run, work: Path) -> None:
    (work / "recipe.toml").write_text(RECIPE.replace("me/lora@main", "me/nothing"))
    error = run("lock", "recipe.toml", "--json", code=5).json["error"]
    assert error["message"].startswith("line 2: ") and "me/nothing" in error["message"]
    assert "nor is there a path" in error["message"]
    assert not (work / "recipe.lock").exists()


def test_an_output_is_pushed_once_and_comes_back_the_same(hub: Hub, run: Run, work: Path) -> None:
    (work / "recipe.toml").write_text(RECIPE + 'push = { repo = "me/merged", tag = "v1" }\n')
    done = run("build", "recipe.toml", "--no-push", "--json").json
    assert done["outputs"][0]["pushed"] is None and "models/me/merged" not in hub.repos
    first = run("build", "recipe.toml", "--locked", "--json", token=TOKEN).json
    commit = hub.repo("me/merged").refs["main"]
    assert first["outputs"][0]["pushed"] == {"repo": "me/merged", "revision": None, "tag": "v1", "commit": commit}
    asked = len(hub.log)
    run("build", "recipe.toml", "--locked", token=TOKEN)
    assert len(hub.log) == asked
    run("pull", "me/merged@v1", "-o", "back", token=TOKEN)
    back, out = content(work / "back"), content(work / "out")
    back.pop("README.md", None)
    assert back == out


def test_the_statement_of_a_merge_names_commits(hub: Hub, run: Run, work: Path) -> None:
    run("merge", "hf://me/base", "hf://me/lora", "-o", "merged", "--attest", "a.json")
    made = json.loads((work / "a.json").read_text())
    found = {row.get("uri"): row["digest"] for row in made["predicate"]["buildDefinition"]["resolvedDependencies"]}
    for repo, weights in (("me/base", "model-00001-of-00003.safetensors"), ("me/lora", "adapter_model.safetensors")):
        commit = hub.repo(repo).refs["main"]
        assert found[f"pkg:huggingface/{repo}@{commit}"] == {"gitCommit": commit}
        digest = hashlib.sha256(hub.content(repo, weights)).hexdigest()
        assert found[f"hf://{repo}@{commit}/{weights}"] == {"sha256": digest}
