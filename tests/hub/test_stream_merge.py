"""Merges straight from the Hub: one stream a shard, checked to its end, and whatever may go wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Run, content, write_dora
from tests.hub.server import FOREVER, OTHER_TOKEN, TOKEN, Hub

BASE, ONE, LORA = "hf://me/base", "hf://me/one", "hf://me/lora"
SHARD = "model-00001"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "work" / "out"


@pytest.fixture
def lora(hub: Hub, made: dict[str, Path]) -> str:
    """The adapter on disk, so that all requests are for the base."""
    return str(made["lora"])


def weights_in(home: Path) -> list[Path]:
    """Files of the cache that are as large as weights."""
    return [p for p in home.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size > 500_000]


def refused(run: Run, out: Path, *arguments: str, **more: Any) -> str:
    """Runs a merge that must fail as a matter of the Hub, and leave nothing. Returns the code of the error."""
    done = run("merge", *arguments, "-o", "out", "--json", code=5, **more)
    assert not out.exists() and not list(out.parent.iterdir())
    assert done.err.count("error:") == 1 and "Traceback" not in done.err
    code: str = done.json["error"]["code"]
    assert done.json["error"]["hint"]
    return code


def test_a_merge_from_the_hub_is_the_merge_from_disk_and_leaves_no_base_behind(
    hub: Hub, run: Run, tmp_path: Path, out: Path, made: dict[str, Path]
) -> None:
    done = run("merge", BASE, LORA, "-o", "out", "-v")
    assert content(out) == content(made["base-merged"])
    assert not weights_in(tmp_path / "home")
    commit = hub.repo("me/base").refs["main"]
    assert f"{BASE}@{commit}" in done.err
    receipt = json.loads((out / "loramerge.json").read_text())
    assert receipt["base"]["source"] == f"{BASE}@{commit}"
    assert (receipt["base"]["repo"], receipt["base"]["commit"]) == ("me/base", commit)
    listed = {n: e.oid for n, e in hub.repo("me/base").head.files.items() if e.lfs}
    assert {row["name"]: row["sha256"] for row in receipt["base"]["files"]} == listed
    adapter = receipt["adapters"][0]
    assert (adapter["repo"], adapter["commit"]) == ("me/lora", hub.repo("me/lora").refs["main"])
    assert adapter["files"][0]["sha256"] == hub.repo("me/lora").head.files["adapter_model.safetensors"].oid
    assert not hub.leaked()


def test_every_shard_is_one_stream_after_its_header(hub: Hub, run: Run, lora: str) -> None:
    run("merge", BASE, lora, "-o", "out")
    for number in (1, 2, 3):
        asked = [r.range for r in hub.requests("GET", f"/blob/.*model-0000{number}") if r.status == 206]
        assert asked == ["bytes=0-262143", "bytes=262144-"]
    weights = sum(e.size for n, e in hub.repo("me/base").head.files.items() if n.endswith(".safetensors"))
    assert hub.sent_bytes < weights + 1_000_000  # no byte twice


def test_one_file_and_a_reference_to_it(hub: Hub, run: Run, out: Path, made: dict[str, Path]) -> None:
    run("merge", f"{ONE}/model.safetensors", LORA, "-o", "out")
    assert content(out).items() <= content(made["one-merged"]).items()
    assert {"model.safetensors", "config.json"} <= set(content(out))


@pytest.mark.parametrize("cut", [("--shard-size", "2MB"), ()], ids=["cut", "joined"])
def test_an_output_that_is_cut_otherwise_reads_each_stream_once(
    hub: Hub, run: Run, out: Path, made: dict[str, Path], cut: tuple[str, ...]
) -> None:
    name = "out" if cut else "out.safetensors"
    run("merge", made["base"], made["lora"], "-o", f"disk-{name}", *cut)
    run("merge", BASE, made["lora"], "-o", name, *cut)
    places = [out.parent / f"{prefix}{name}" for prefix in ("disk-", "")]
    contents = [content(p) if cut else {"": p.read_bytes()} for p in places]
    assert contents[0] == contents[1] and len(contents[0]) > (8 if cut else 0)
    for number in (1, 2, 3):
        assert len([r for r in hub.requests("GET", f"/blob/.*model-0000{number}") if r.status == 206]) == 2


def test_the_short_form_and_a_revision(hub: Hub, run: Run, out: Path, made: dict[str, Path]) -> None:
    hub.repo("me/base").tags["v1"] = first = hub.repo("me/base").refs["main"]
    hub.add("me/base", {"config.json": b'{"model_type": "other"}'})
    run("merge", "me/base@v1", "me/lora", "-o", "out")
    assert content(out) == content(made["base-merged"])
    assert json.loads((out / "loramerge.json").read_text())["base"]["commit"] == first


def test_a_path_goes_before_a_repository_of_its_name(
    hub: Hub, run: Run, out: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    run("inspect", ONE)
    (out.parent / "me").mkdir()
    (out.parent / "me" / "one").symlink_to(made["base"])
    done = run("merge", "me/one", made["lora"], "-o", "out")
    assert "me/one' is the path here" in done.err
    assert content(out) == content(made["base-merged"])


def test_a_dry_run_reads_headers_only(hub: Hub, run: Run, out: Path) -> None:
    plan = run("merge", BASE, LORA, "-o", "out", "--dry-run", "--json").json["plan"]
    assert plan["base"].startswith(BASE + "@") and plan["tensors_changed"] == 8
    assert not out.exists() and hub.sent_bytes < 4 * 262144 + 1_000_000
    assert not [r for r in hub.requests("GET", "/blob/.*model-0") if r.range != "bytes=0-262143"]


def test_a_mistake_is_found_before_a_weight_is_downloaded(hub: Hub, run: Run, made: dict[str, Path], out: Path) -> None:
    hub.add("me/twice", {**hub_files(hub, "me/base"), "loramerge.json": (made["base-merged"] / "loramerge.json")})
    done = run("merge", "hf://me/twice", made["lora"], "-o", "out", "--json", code=3)
    assert done.json["error"]["code"] == "base.already-merged"
    assert not [r for r in hub.requests("GET", "/blob/.*model-0") if r.range != "bytes=0-262143"]


def hub_files(hub: Hub, repo: str) -> dict[str, Path]:
    """The files of a repository, as they lie in the store."""
    return {name: hub.blob(entry.oid).resolve() for name, entry in hub.repo(repo).head.files.items()}


def test_updates_that_look_at_the_whole_weight_first(
    hub: Hub, run: Run, out: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    dora = write_dora(tmp_path / "dora", made["base"])
    run("merge", made["base"], dora, "-o", "disk")
    pieces = {f"loramerge.hub.{module}.CHUNK": 1 << 18 for module in ("stream", "convoy")}
    small = {"loramerge.hub.convoy.WINDOW": 1 << 21, **pieces}
    run("merge", BASE, dora, "-o", "out", "--jobs", "2", patched=small)
    assert content(out) == content(out.parent / "disk")
    assert (
        content(out)["model-00001-of-00003.safetensors"]
        != content(made["base-merged"])[f"{SHARD}-of-00003.safetensors"]
    )


# ------------------------------------------------------------------------------------------------ what is recovered


@pytest.mark.parametrize(
    ("pattern", "action", "value", "times", "skip"),
    [
        (r"/blob/.*model-00001", "drop", 300_000, 2, 1),
        (r"/blob/.*model-0000", "short", 777_777, 3, 3),
        (r"/blob/.*model-0000", "whole", None, FOREVER, 0),
        (r"/blob/.*model-00001", "status", 503, 3, 0),
        (r"/resolve/.*model-00002", "status", 502, 3, 0),
        (r"/blob/.*model-00003", "status", 403, 1, 1),
        (r"/blob/.*model-00001", "drop", 0, 3, 1),
        (r"/resolve/.*json", "status", 500, 2, 0),
        (r"/api/models", "sleep", 0.2, 1, 0),
    ],
    ids=["drop", "short", "no-ranges", "503", "502-hub", "expired", "empty", "500-config", "slow"],
)
def test_trouble_on_the_way_is_overcome(
    hub: Hub,
    run: Run,
    out: Path,
    lora: str,
    made: dict[str, Path],
    pattern: str,
    action: str,
    value: Any,
    times: int,
    skip: int,
) -> None:
    fault = hub.fault("GET", pattern, action, value, times=times, skip=skip)
    run("merge", BASE, lora, "-o", "out")
    assert fault.times in (0, FOREVER), "the fault was not met"
    assert content(out) == content(made["base-merged"])


def test_links_that_are_good_once_are_asked_for_again(
    hub: Hub, run: Run, out: Path, lora: str, made: dict[str, Path]
) -> None:
    hub.link_uses = 1
    run("merge", BASE, lora, "-o", "out")
    assert content(out) == content(made["base-merged"])
    assert [r.status for r in hub.requests("GET", "/blob/")].count(403) == 3


def test_files_that_the_hub_sends_itself(hub: Hub, run: Run, out: Path, lora: str, made: dict[str, Path]) -> None:
    hub.redirect = False
    run("merge", BASE, lora, "-o", "out")
    assert content(out) == content(made["base-merged"])


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: Hub, run: Run, out: Path, lora: str, made: dict[str, Path]
) -> None:
    first = hub.repo("me/base").refs["main"]

    def move() -> None:
        hub.add("me/base", {f"{SHARD}-of-00003.safetensors": b"something else", "config.json": b"{}"})

    hub.fault("GET", "/resolve/.*model-00001", "call", move)
    run("merge", BASE, lora, "-o", "out")
    assert hub.repo("me/base").refs["main"] != first
    assert content(out) == content(made["base-merged"])
    assert json.loads((out / "loramerge.json").read_text())["base"]["commit"] == first


def test_a_reversible_merge_from_the_hub_comes_back(hub: Hub, run: Run, out: Path, lora: str) -> None:
    run("merge", BASE, lora, "-o", "out", "--reversible")
    run("unmerge", "out", "-o", "back")
    back = content(out.parent / "back")
    for name, entry in hub.repo("me/base").head.files.items():
        if entry.lfs:
            assert back[name] == entry.oid


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("shard", "at"), [(1, 9), (1, 300_000), (3, 900_000)], ids=["header", "changed", "untouched"])
def test_a_flipped_byte_is_never_merged(hub: Hub, run: Run, out: Path, lora: str, at: int, shard: int) -> None:
    size = hub.repo("me/base").head.files[f"model-0000{shard}-of-00003.safetensors"].size
    hub.fault("GET", f"/blob/.*model-0000{shard}", "flip", min(at, size - 5), times=FOREVER)
    if at == 9:  # the header is not JSON any more, which is an error of its own
        run("merge", BASE, lora, "-o", "out", code=3)
        assert not list(out.parent.iterdir())
    else:
        assert refused(run, out, BASE, lora) == "hub.digest"


def test_a_byte_that_flips_in_the_header_alone_is_never_merged(
    hub: Hub, run: Run, out: Path, made: dict[str, Path]
) -> None:
    raw = (made["one"] / "model.safetensors").read_bytes()
    at = raw.index(b'"model.layers.1.self_attn.k_proj.weight"') + len('"model.layers.')
    hub.fault("GET", "/blob/.*model.safetensors", "flip", at, times=1)  # 1 becomes !, which is as good a name
    assert refused(run, out, ONE, str(made["lora"])) == "hub.digest"


def test_a_file_that_is_shorter_than_it_should_be(hub: Hub, run: Run, out: Path, lora: str) -> None:
    entry = hub.repo("me/base").head.files[f"{SHARD}-of-00003.safetensors"]
    blob = hub.blob(entry.oid)
    raw = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(raw[:-100])
    assert refused(run, out, BASE, lora) == "hub.changed"


def test_a_server_that_stays_in_trouble(hub: Hub, run: Run, out: Path, lora: str) -> None:
    hub.fault("GET", "/blob/.*model-00002", "status", 503, times=FOREVER)
    assert refused(run, out, BASE, lora) == "hub.server"


def test_a_connection_that_always_breaks(hub: Hub, run: Run, out: Path, lora: str) -> None:
    hub.fault("GET", "/blob/.*model-00002", "drop", 0, times=FOREVER, skip=1)
    assert refused(run, out, BASE, lora) == "hub.broken"


def test_a_private_repository(hub: Hub, run: Run, out: Path, lora: str, made: dict[str, Path]) -> None:
    hub.repo("me/base").private = True
    assert refused(run, out, BASE, lora) == "hub.missing"
    assert refused(run, out, BASE, lora, token="hf_test_nonsense") == "hub.token"
    run("merge", BASE, lora, "-o", "out", "--token", TOKEN)
    assert content(out) == content(made["base-merged"])
    assert not hub.leaked()
    everything = "".join(p.read_text(errors="replace") for p in out.parent.rglob("*.json"))
    assert TOKEN not in everything


def test_a_gated_repository(hub: Hub, run: Run, out: Path, lora: str, made: dict[str, Path]) -> None:
    hub.repo("me/base").gated = True
    assert refused(run, out, BASE, lora, token=OTHER_TOKEN) == "hub.gated"
    assert "accept them at" in run("merge", BASE, lora, "-o", "out", token=OTHER_TOKEN, code=5).err
    hub.readers.add(("other", "me/base"))
    run("merge", BASE, lora, "-o", "out", token=OTHER_TOKEN)
    assert content(out) == content(made["base-merged"])
    assert not hub.leaked()


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("hf://me/nothing", "hub.missing"),
        ("me/nothing", "hub.missing"),
        ("hf://me/base@v9", "hub.revision"),
        ("hf://me/base/modell.safetensors", "hub.path"),
        (f"hf://me/base@{'0' * 40}", "hub.revision"),
    ],
)
def test_what_is_not_there(hub: Hub, run: Run, out: Path, lora: str, reference: str, code: str) -> None:
    assert refused(run, out, reference, lora) == code


def test_a_path_that_was_mistyped_is_found_again(run: Run, out: Path, lora: str) -> None:
    (out.parent / "models" / "base-a").mkdir(parents=True)
    for offline in ((), ("--offline",)):
        done = run("merge", "models/base-b", lora, "-o", "out", "--json", *offline, code=5)
        assert done.json["error"]["code"] == ("hub.offline" if offline else "hub.missing")
        assert "is no path here" in done.err and "did you mean 'base-a'" in done.err


@pytest.mark.parametrize("reference", ["hf://gpt2", "hf://a/b/../c"])
def test_what_is_no_reference(run: Run, lora: str, reference: str) -> None:
    assert run("merge", reference, lora, "-o", "out", "--json", code=2).json["error"]["code"] == "hub.reference"


def test_nobody_there(hub: Hub, run: Run, out: Path, lora: str) -> None:
    assert refused(run, out, BASE, lora, HF_ENDPOINT="http://127.0.0.1:9") == "hub.unreachable"


def test_nothing_on_the_hub_is_changed_in_place(run: Run, lora: str) -> None:
    done = run("merge", BASE, lora, "--in-place", "--reversible", "--json", code=2)
    assert done.json["error"]["code"] == "usage.in-place"
