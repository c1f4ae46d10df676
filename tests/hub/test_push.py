"""Pushes: one commit with all of it or nothing, nothing sent twice, and what happens when the Hub is in trouble."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.hub.conftest import PYTHONPATH, ROOT, Run, content
from tests.hub.server import FOREVER, OTHER_TOKEN, TOKEN, Commit, Hub, Repo, _Stop

CHANGES = ("POST", "PUT", "DELETE")
GITATTRIBUTES = ".gitattributes"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def merged(tmp_path: Path, made: dict[str, Path]) -> Path:
    """A merged model of three shards, with its receipt; to be changed at will."""
    return Path(shutil.copytree(made["base-merged"], tmp_path / "merged"))


def changing(hub: Hub) -> list[str]:
    """Requests that could change something."""
    return [f"{r.method} {r.path}" for r in hub.log if r.method in CHANGES]


def puts(hub: Hub) -> int:
    return len([r for r in hub.requests("PUT", "/upload/") if r.status == 200])


def files_at(hub: Hub, repo: str, branch: str = "main") -> set[str]:
    found = hub.repo(repo)
    return set(found.commits[found.refs[branch]].files) - {GITATTRIBUTES}


def held(hub: Hub, repo: str, branch: str = "main") -> dict[str, bytes]:
    return {name: hub.content(repo, name, branch) for name in files_at(hub, repo, branch)}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def front(hub: Hub, repo: str) -> dict[str, Any]:
    text = hub.content(repo, "README.md").decode()
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


# ------------------------------------------------------------------------------------------------ round trips


def test_what_is_pushed_is_pulled_byte_for_byte(hub: Hub, run: Run, work: Path, merged: Path) -> None:
    seen: list[set[str]] = []
    hub.on_commit = lambda repo, commit: seen.append(set(commit.files))
    done = run("push", merged, "me/new", "--json", token=TOKEN).json
    repo = hub.repo("me/new")
    assert repo.private and done["created"] and done["private"]
    assert (done["commit"], done["branch"], done["repo"]) == (repo.refs["main"], "main", "me/new")
    # Weights, index, config, receipt and card came in one commit.
    everything = {*on_disk(merged), "README.md"}
    assert seen == [everything | {GITATTRIBUTES}] and len(repo.commits) == 2
    assert {row["name"] for row in done["files"]} == everything
    run("pull", "me/new", "-o", "back", token=TOKEN)
    got = content(work / "back", receipt=True)
    assert got.pop("README.md") and got == content(merged, receipt=True)
    assert run("verify", "hf://me/new", "--json", token=TOKEN).json["ok"]
    assert not hub.leaked()
    assert not any(TOKEN.encode() in raw for raw in held(hub, "me/new").values())


def test_a_second_push_sends_what_changed_and_nothing_else(hub: Hub, run: Run, merged: Path) -> None:
    run("push", merged, "me/new", token=TOKEN)
    first, before = hub.repo("me/new").refs["main"], puts(hub)
    again = run("push", merged, "me/new", "--json", token=TOKEN).json
    assert again["commit"] == first and again["uploaded"] == 0 and all(row["there"] for row in again["files"])
    assert puts(hub) == before and hub.repo("me/new").refs["main"] == first
    shard = merged / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    third = run("push", merged, "me/new", "--json", token=TOKEN).json
    assert [row["name"] for row in third["files"] if not row["there"]] == [shard.name]
    assert third["parent"] == first and puts(hub) == before + 1
    assert hub.content("me/new", shard.name) == bytes(raw)


def test_a_single_file_goes_with_its_receipt(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    run("merge", made["one"] / "model.safetensors", made["lora"], "-o", "m.safetensors", "--reversible", "-q")
    run("push", "m.safetensors", "me/file", token=TOKEN)
    assert files_at(hub, "me/file") == {"m.safetensors", "m.loramerge.json", "README.md"}
    run("push", "m.safetensors", "me/file", "--with-undo", token=TOKEN)
    assert files_at(hub, "me/file") == {"m.safetensors", "m.loramerge.json", "m.loramerge.undo", "README.md"}


def test_over_xet_one_changed_shard_moves_few_bytes(tmp_path: Path, run: Run, hub: Hub, merged: Path) -> None:
    hub.xet = True

    def stored() -> int:
        return sum(p.stat().st_size for p in (hub.folder / "cas").rglob("*") if p.is_file() and "xorbs" in str(p))

    run("push", merged, "me/x", token=TOKEN, HF_HUB_DISABLE_XET="0")
    assert hub.requests("GET", "xet-write-token") and not puts(hub)
    assert held(hub, "me/x").items() >= on_disk(merged).items()
    shard = merged / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5000] ^= 1
    shard.write_bytes(raw)
    before = stored()
    done = run("push", merged, "me/x", "--json", token=TOKEN, HF_HUB_DISABLE_XET="0").json
    assert [row["name"] for row in done["files"] if not row["there"]] == [shard.name]
    assert hub.content("me/x", shard.name) == bytes(raw)
    moved = stored() - before
    print(f"xet: {moved} bytes stored for a shard of {len(raw)} with one byte changed")
    assert 0 < moved < len(raw) // 4


# ------------------------------------------------------------------------------------------------ interruptions


def test_a_push_that_is_killed_shows_nothing_and_is_taken_up_again(
    hub: Hub, run: Run, merged: Path, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        until = time.monotonic() + 20
        while not puts(hub) and time.monotonic() < until:
            time.sleep(0.02)
        started[0].kill()
        raise _Stop(500, "", "killed")

    hub.fault("PUT", "/upload/", "call", kill, skip=1)
    env = hub.env(tmp_path / "home", TOKEN, PYTHONPATH=PYTHONPATH)
    command = [sys.executable, "-m", "loramerge", "push", str(merged), "me/new", "--no-progress"]
    started.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL))
    assert started[0].wait(60) == -signal.SIGKILL
    assert files_at(hub, "me/new") == set() and len(hub.repo("me/new").commits) == 1
    assert puts(hub) == 1
    done = run("push", merged, "me/new", "--json", token=TOKEN).json
    # Two shards are new to the Hub; the one that was stored before the kill is not sent again.
    assert puts(hub) == 2 and done["commit"] == hub.repo("me/new").refs["main"]
    assert held(hub, "me/new").items() >= on_disk(merged).items()
    assert len(hub.repo("me/new").commits) == 2


def test_an_interrupted_push_ends_at_once(hub: Hub, merged: Path, tmp_path: Path) -> None:
    hub.fault("PUT", "/upload/", "sleep", 15, times=FOREVER)
    env = hub.env(tmp_path / "home", TOKEN, PYTHONPATH=PYTHONPATH)
    command = [sys.executable, "-m", "loramerge", "push", str(merged), "me/new", "--json"]
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        until = time.monotonic() + 20
        while not hub.requests("POST", "/objects/batch") and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        begin = time.monotonic()
        started.send_signal(signal.SIGINT)
        out, _ = started.communicate(timeout=20)
    assert started.returncode == 130 and json.loads(out)["error"]["code"] == "interrupted"
    assert time.monotonic() - begin < 8 and files_at(hub, "me/new") == set()


@pytest.mark.parametrize(
    ("method", "pattern", "times"),
    [
        ("GET", "/revision/", 2),
        ("POST", "/api/repos/create", 2),
        ("POST", "/preupload/", 2),
        ("POST", "/objects/batch", 1),
        ("PUT", "/upload/", 1),
        ("POST", "/commit/", 2),
    ],
    ids=["look", "create", "preupload", "batch", "upload", "commit"],
)
def test_a_server_in_trouble_for_a_while(
    hub: Hub, run: Run, made: dict[str, Path], method: str, pattern: str, times: int
) -> None:
    hub.fault(method, pattern, "status", 503, times=times)
    run("push", made["lora"], "me/new", token=TOKEN)
    assert held(hub, "me/new").items() >= on_disk(made["lora"]).items()
    assert len(hub.repo("me/new").commits) == 2


def test_a_server_in_trouble_for_ever(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    hub.fault("POST", "/commit/", "status", 500, times=FOREVER)
    error = run("push", made["lora"], "me/new", "--json", token=TOKEN, code=5).json["error"]
    assert error["code"] == "hub.server" and files_at(hub, "me/new") == set()


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    def lose(repo: Repo, commit: Commit) -> None:
        hub.on_commit = None
        raise _Stop(502, "", "lost")

    hub.on_commit = lose
    done = run("push", made["lora"], "me/new", "--json", token=TOKEN).json
    assert done["commit"] == hub.repo("me/new").refs["main"]
    assert len(hub.repo("me/new").commits) == 2 and len(hub.requests("POST", "/commit/")) == 1


def test_a_branch_that_moves_meanwhile(hub: Hub, run: Run, merged: Path) -> None:
    hub.add("me/new", {"notes.txt": b"first"})
    hub.fault("PUT", "/upload/", "call", lambda: hub.add("me/new", {"notes.txt": b"somebody else's"}))
    error = run("push", merged, "me/new", "--json", token=TOKEN, code=5).json["error"]
    assert error["code"] == "hub.stale" and "again" in error["hint"]
    assert files_at(hub, "me/new") == {"notes.txt"}
    before = puts(hub)
    run("push", merged, "me/new", token=TOKEN)
    assert puts(hub) == before and held(hub, "me/new").items() >= on_disk(merged).items()
    assert hub.content("me/new", "notes.txt") == b"somebody else's"


def test_a_file_that_changes_meanwhile(hub: Hub, run: Run, merged: Path) -> None:
    config = merged / "config.json"
    hub.fault("PUT", "/upload/", "call", lambda: config.write_text('{"model_type": "other"}'))
    error = run("push", merged, "me/new", "--json", token=TOKEN, code=3).json["error"]
    assert error["code"] == "input.changed" and "config.json" in error["message"]
    assert files_at(hub, "me/new") == set()


def test_multipart_uploads(hub: Hub, run: Run, merged: Path) -> None:
    hub.multipart = 1_000_000
    run("push", merged, "me/new", token=TOKEN)
    assert held(hub, "me/new").items() >= on_disk(merged).items() and not hub.leaked()
    assert len(hub.requests("PUT", "/upload/")) == 10


# ------------------------------------------------------------------------------------------------ who may what


@pytest.mark.parametrize(
    ("repo", "token", "flags", "code", "words"),
    [
        ("me/new", None, (), "hub.token", "log"),
        ("me/new", "hf_test_token_of_nobody", (), "hub.token", "token"),
        ("other/new", TOKEN, (), "hub.forbidden", "namespace"),
        ("me/base", OTHER_TOKEN, (), "hub.forbidden", "--create-pr"),
        ("org/hidden", TOKEN, (), "hub.forbidden", "log"),
        ("me/nowhere", TOKEN, ("--create-pr",), "hub.missing", "--create-pr"),
    ],
    ids=["anonymous", "bad token", "foreign namespace", "foreign repository", "hidden", "pull request to nothing"],
)
def test_who_may_not_push(
    hub: Hub,
    run: Run,
    made: dict[str, Path],
    repo: str,
    token: str | None,
    flags: tuple[str, ...],
    code: str,
    words: str,
) -> None:
    hub.add("org/hidden", {"a.txt": b"a"}, private=True)
    before = {name: dict(r.refs) for name, r in hub.repos.items()}
    error = run("push", made["lora"], repo, *flags, "--json", token=token, code=5).json["error"]
    assert error["code"] == code and words in error["hint"]
    assert {name: dict(r.refs) for name, r in hub.repos.items()} == before
    assert not puts(hub)


def test_a_pull_request_leaves_main_alone(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    main = hub.repo("me/base").refs["main"]
    done = run("push", made["lora"], "me/base", "--create-pr", "--json", token=OTHER_TOKEN).json
    assert done["pull_request"].endswith("/discussions/1") and hub.repo("me/base").refs["main"] == main
    proposed = held(hub, "me/base", "refs/pr/1")
    assert proposed.items() >= on_disk(made["lora"]).items()
    assert hub.repo("me/base").commits[hub.repo("me/base").refs["refs/pr/1"]].parent == main


def test_branches_and_tags(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    run("push", made["lora"], "me/l@next", "--tag", "v1", "--public", "-m", "Two words", token=TOKEN)
    repo = hub.repo("me/l")
    assert not repo.private and repo.tags == {"v1": repo.refs["next"]}
    assert files_at(hub, "me/l") == set() and "adapter_model.safetensors" in files_at(hub, "me/l", "next")
    assert repo.commits[repo.refs["next"]].title == "Two words"
    # The same once more changes nothing, and may have the tag that it has already.
    commits = len(repo.commits)
    run("push", made["lora"], "me/l", "--revision", "next", "--tag", "v1", token=TOKEN)
    assert len(repo.commits) == commits
    log = len(hub.log)
    for flags, exit_code, code in (
        (("--tag", "v1"), 5, "hub.tag"),
        (("--revision", "v1"), 2, "push.revision"),
        (("--revision", repo.refs["next"]), 2, "push.revision"),
        (("--revision", "refs/pr/9"), 2, "push.revision"),
        (("--revision", "next", "--create-pr"), 2, "push.revision"),
        (("--tag", "v2", "--create-pr"), 2, "push.tag"),
    ):
        error = run("push", made["lora"], "me/l", *flags, "--json", token=TOKEN, code=exit_code).json["error"]
        assert error["code"] == code, flags
    assert not [r for r in hub.log[log:] if r.method in CHANGES]
    assert (
        run("push", made["lora"], "hf://me/l/sub", "--json", token=TOKEN, code=2).json["error"]["code"] == "push.path"
    )


def test_without_a_network(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    error = run("push", made["lora"], "me/l", "--json", token=TOKEN, code=5, HF_HUB_OFFLINE="1").json["error"]
    assert error["code"] == "hub.offline" and not hub.log
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    error = run("push", made["lora"], "me/l", "--json", token=TOKEN, code=5, **nobody).json["error"]
    assert error["code"] == "hub.unreachable" and "offline" not in error["hint"]


def test_a_dry_run_changes_nothing(hub: Hub, run: Run, merged: Path) -> None:
    data = run("push", merged, "me/new", "--dry-run", "--json", "--tag", "v1", token=TOKEN).json
    assert data["created"] and data["dry_run"] and data["commit"] is None and "base_model" not in data["card"]
    assert not changing(hub) and "models/me/new" not in hub.repos
    run("push", merged, "me/new", token=TOKEN)
    (merged / "tokenizer.json").write_text("{}")
    before = len(changing(hub))
    data = run("push", merged, "me/new", "--dry-run", "--json", token=TOKEN).json
    assert [r["name"] for r in data["files"] if not r["there"]] == ["tokenizer.json"] and len(changing(hub)) == before


# ------------------------------------------------------------------------------------------------ what is pushed


def test_what_stays_behind(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    run("merge", made["base"], made["lora"], "-o", "out", "--reversible", "-q")
    out = work / "out"
    for name in (".env", ".git/config", "x.partial-1/a", "notes.txt.incomplete", "keep/notes.txt", "secret/key.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    data = run("push", out, "me/new", "--exclude", "secret/", "--json", token=TOKEN).json
    assert {row["name"] for row in data["left"]} == {
        ".env",
        ".git/",
        "x.partial-1/",
        "notes.txt.incomplete",
        "loramerge.undo",
        "secret/key.txt",
    }
    files = files_at(hub, "me/new")
    assert "keep/notes.txt" in files and not files & {".env", "loramerge.undo", "secret/key.txt"}
    run("push", out, "me/new", "--with-undo", "--exclude", "secret/", token=TOKEN)
    assert hub.content("me/new", "loramerge.undo") == (out / "loramerge.undo").read_bytes()
    run("unmerge", "hf://me/new", "-o", "back", "-q", token=TOKEN)
    weights = {n: d for n, d in content(made["base"]).items() if n.endswith(".safetensors")}
    assert {n: d for n, d in content(work / "back").items() if n.endswith(".safetensors")} == weights


def interrupted(folder: Path) -> None:
    (folder / "loramerge.journal").mkdir()


def shard_missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "loramerge.json").unlink()


def cut_off(folder: Path) -> None:
    with open(folder / "model-00001-of-00003.safetensors", "r+b") as file:
        file.truncate(1_000_000)


def other_size(folder: Path) -> None:
    shutil.copy(folder / "model-00003-of-00003.safetensors", folder / "model-00001-of-00003.safetensors")


def pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4134400\n"
    (folder / "model-00001-of-00003.safetensors").write_text(text)


def link_outside(folder: Path) -> None:
    (folder.parent / "private.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(folder.parent / "private.txt")


def folder_outside(folder: Path) -> None:
    (folder.parent / "private").mkdir()
    (folder / "more").symlink_to(folder.parent / "private")


def pickled(folder: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2)}, folder / "optimizer.pt")


def strange_name(folder: Path) -> None:
    (folder / "a\nb.txt").write_text("x")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def bad_receipt(folder: Path) -> None:
    (folder / "loramerge.json").write_text("{}")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (interrupted, "input.interrupted"),
        (shard_missing, "push.incomplete"),
        (cut_off, "safetensors."),
        (other_size, "push.incomplete"),
        (pointer, "push.incomplete"),
        (link_outside, "push.link"),
        (folder_outside, "push.link"),
        (pickled, "push.pickle"),
        (strange_name, "push.name"),
        (fifo, "push.special"),
        (bad_receipt, "receipt.invalid"),
        (emptied, "push.empty"),
        (gone, "input.missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_refused_before_anything_is_asked(merged: Path, spoil: Callable[[Path], None], code: str) -> None:
    from loramerge.errors import LoramergeError
    from loramerge.hub.local import gather

    assert gather(merged).files
    spoil(merged)
    with pytest.raises(LoramergeError) as caught:
        gather(merged)
    assert caught.value.code.startswith(code) and caught.value.exit_code == 3 and caught.value.fix
    assert "'\n'" not in caught.value.message


def test_a_refusal_asks_the_hub_nothing(hub: Hub, run: Run, merged: Path) -> None:
    link_outside(merged)
    error = run("push", merged, "me/new", "--json", token=TOKEN, code=3).json["error"]
    assert error["code"] == "push.link" and not hub.log
    run("push", merged, "me/new", "--exclude", "notes.txt", token=TOKEN)
    assert "notes.txt" not in files_at(hub, "me/new")


def test_a_link_inside_is_followed(hub: Hub, run: Run, merged: Path) -> None:
    (merged / "data").mkdir()
    (merged / "model-00001-of-00003.safetensors").rename(merged / "data" / "one.safetensors")
    (merged / "model-00001-of-00003.safetensors").symlink_to("data/one.safetensors")
    run("push", merged, "me/new", "--exclude", "data/", token=TOKEN)
    name = "model-00001-of-00003.safetensors"
    assert hub.content("me/new", name) == (merged / name).read_bytes()


def test_weights_of_another_model_in_the_repository(hub: Hub, run: Run, merged: Path) -> None:
    older = {"model.safetensors": (merged / "model-00003-of-00003.safetensors").read_bytes(), "notes.txt": b"n"}
    hub.add("me/old", {**older, "loramerge.undo": b"of another"})
    error = run("push", merged, "me/old", "--json", token=TOKEN, code=5).json["error"]
    assert error["code"] == "push.two-models" and "--prune" in error["hint"] and not puts(hub)
    data = run("push", merged, "me/old", "--prune", "--json", token=TOKEN).json
    assert data["deleted"] == ["loramerge.undo", "model.safetensors"]
    assert files_at(hub, "me/old") == {*on_disk(merged), "README.md", "notes.txt"}
    hub.add("me/more", {"model-00004-of-00009.safetensors": b"x" * 100})
    done = run("push", merged, "me/more", token=TOKEN)
    assert "model-00004-of-00009.safetensors" in done.err and "--prune" in done.err


def test_digests_that_the_receipt_has_are_believed_only_where_nothing_was_touched(
    hub: Hub, run: Run, work: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from loramerge.hub.known import Known
    from loramerge.hub.local import gather

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "elsewhere"))
    run("merge", "me/base", made["lora"], "-o", "out", "-q")
    want = content(work / "out", receipt=True)

    def known() -> dict[str, str]:
        gathered = gather(work / "out")
        found = Known(gathered)
        return {f.name: digest for f in gathered.files if (digest := found.sha256(f)) is not None}

    first = known()
    # The shard that was copied whole is known from the Hub; the others are what their tensors became.
    assert "model-00003-of-00003.safetensors" in first and "config.json" in first
    assert "model-00001-of-00003.safetensors" not in first
    assert all(want[name] == digest for name, digest in first.items())
    shard = work / "out" / "model-00003-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    times = shard.stat()
    (work / "new").write_bytes(raw)
    os.utime(work / "new", ns=(times.st_atime_ns, times.st_mtime_ns))  # as old as the one that it takes the place of
    os.replace(work / "new", shard)
    assert shard.name not in known() and "config.json" in known()


# ------------------------------------------------------------------------------------------------ cards


def test_the_card_of_a_merge(hub: Hub, run: Run, work: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    fields = {"license": "apache-2.0", "license_link": "LICENSE", "language": ["en"], "pipeline_tag": "text-generation"}
    readme = f"---\n{yaml.safe_dump(fields)}evil: '{{{{x}}}}'\n---\n# base\n"
    commit = hub.add("me/base", {"README.md": readme.encode()})
    lora = hub.add("me/lora", {"README.md": b"---\nlicense: cc-by-nc-4.0\ndatasets: [a/b]\n---\n"})
    run("merge", "me/base", "me/lora=0.5", "-o", "out", "-q")
    shutil.rmtree(home)  # the cards of the inputs are fetched
    done = run("push", "out", "me/new", token=TOKEN)
    assert "README.md" not in done.err and "it/s" not in done.err, "the client draws bars"
    assert "licence" in done.err and "cc-by-nc-4.0" in done.err and "apache-2.0" in done.err
    assert front(hub, "me/new") == {
        "base_model": ["me/base", "me/lora"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "license_link": "LICENSE",
        "language": ["en"],
        "datasets": ["a/b"],
        "tags": ["merge", "lora", "loramerge"],
    }
    card = hub.content("me/new", "README.md").decode()
    assert f"loramerge merge hf://me/base@{commit} hf://me/lora@{lora}=0.5 -o OUT" in card
    assert "self_attn.q_proj" in card and "cc-by-nc-4.0" in card and "loramerge unmerge hf://me/new --base" in card
    # The same model gives the same card.
    run("push", "out", "me/new2", token=TOKEN)
    assert hub.content("me/new2", "README.md").decode().replace("new2", "new") == card


def test_the_card_of_a_merge_from_paths_names_none(hub: Hub, run: Run, merged: Path) -> None:
    run("push", merged, "me/new", token=TOKEN)
    card = hub.content("me/new", "README.md").decode()
    fields = front(hub, "me/new")
    assert "base_model" not in fields and fields["license"] == "mit" and fields["library_name"] == "transformers"
    assert str(ROOT.parent) not in card and "/tmp" not in card and "base_model" not in card


def test_paths_of_this_machine_are_told_of_before_they_are_public(hub: Hub, run: Run, made: dict[str, Path]) -> None:
    for flags, told in (((), False), (("--public",), True)):
        done = run("push", made["base-merged"], "me/new", "--dry-run", *flags, token=TOKEN)
        assert (str(made["base"]) in done.err) == told


def test_whose_card_stays(hub: Hub, run: Run, merged: Path) -> None:
    """A card of somebody's own is never replaced unless asked; one of ours is written anew."""
    hub.add("me/theirs", {"README.md": b"# theirs\n"})
    run("push", merged, "me/theirs", token=TOKEN)
    assert hub.content("me/theirs", "README.md") == b"# theirs\n"
    run("push", merged, "me/theirs", "--card", "new", token=TOKEN)
    ours = hub.content("me/theirs", "README.md")
    assert b"Changed weights" in ours
    (merged / "README.md").write_bytes(ours.replace(b"Changed weights", b"Stale"))
    run("push", merged, "me/theirs", token=TOKEN)
    assert hub.content("me/theirs", "README.md") == ours
    (merged / "README.md").write_bytes(b"# my own\n")
    run("push", merged, "me/theirs", token=TOKEN)
    assert hub.content("me/theirs", "README.md") == b"# my own\n"
    (merged / "README.md").unlink()
    run("push", merged, "me/none", "--card", "none", token=TOKEN)
    assert "README.md" not in files_at(hub, "me/none")


def test_the_card_of_an_adapter(hub: Hub, run: Run, work: Path, made: dict[str, Path]) -> None:
    run("extract", "me/base", made["base-merged"], "-o", "ext", "--rank", "4", "-q")
    run("push", "ext", "me/ext", token=TOKEN)
    fields = front(hub, "me/ext")
    assert fields["base_model"] == "me/base" and fields["base_model_relation"] == "adapter"
    assert fields["library_name"] == "peft" and fields["license"] == "mit" and "lora" in fields["tags"]
    lora = shutil.copytree(made["lora"], work / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    for named, known in (("me/nowhere", False), ("/home/somebody/base", False), ("me/one", True)):
        (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        card = run("push", lora, "me/l", "--dry-run", "--json", token=TOKEN).json["card"]
        assert ("base_model: me/one" in card) == known and ("base_model" in card) == known
        assert "/home/somebody" not in card


def test_hostile_names_in_a_card() -> None:
    from loramerge.hub.frontmatter import copied, parse, render
    from loramerge.hub.markdown import code, plain

    assert "\n" not in code("a\n# b`|c") and code("a|b`c") == "`a/b'c`"
    assert "\\<" in plain("<script>") and "\x1b" not in plain("\x1b[2J")
    card = {"license": "x\n---\nevil: 1", "language": ["en", 3, "a\nb"], "datasets": {"a": 1}}
    assert copied(card, ("license", "language", "datasets")) == {"language": ["en"]}
    fields = {"license": "a: b #c", "language": ["no", "yes"], "tags": []}
    assert parse(render(fields).encode(), "x") == {"license": "a: b #c", "language": ["no", "yes"]}
