"""The statement of where outputs come from: an in-toto Statement v1 with SLSA Provenance v1."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import loramerge as lm
from loramerge.building import attest
from loramerge.building.lock import Lock
from loramerge.building.recipe import read_recipe
from loramerge.cli import main
from loramerge.errors import OutputError, UsageError
from tests.building.conftest import Workshop

RECIPE = """\
base = "base"
adapters = [{ source = "style", weight = 0.7 }, "tone/adapter_model.safetensors"]
[[output]]
path = "dist/model"
[[output]]
path = "dist/one.safetensors"
"""

# Every field of the two published schemas (in_toto_attestation/v1/{statement,resource_descriptor}.proto and
# slsa/provenance/v1/provenance.proto) by its JSON name; a nested message as a mapping, a list of them as one in a list.
DESCRIPTOR: Any = {
    "name": str,
    "uri": str,
    "digest": dict,
    "content": str,
    "downloadLocation": str,
    "mediaType": str,
    "annotations": dict,
}
PROVENANCE: Any = {
    "buildDefinition": {
        "buildType": str,
        "externalParameters": dict,
        "internalParameters": dict,
        "resolvedDependencies": [DESCRIPTOR],
    },
    "runDetails": {
        "builder": {"id": str, "version": dict, "builderDependencies": [DESCRIPTOR]},
        "metadata": {"invocationId": str, "startedOn": str, "finishedOn": str},
        "byproducts": [DESCRIPTOR],
    },
}
STATEMENT: Any = {"_type": str, "subject": [DESCRIPTOR], "predicateType": str, "predicate": PROVENANCE}


def check(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), where
        for key, content in value.items():
            check(content, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for number, row in enumerate(value):
            check(row, schema[0], f"{where}[{number}]")
    else:
        assert isinstance(value, schema), where


@pytest.fixture
def built(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    recipe = workshop(RECIPE)
    place = recipe.parent / "provenance.json"
    lm.build(recipe, attest=place, builder_id="https://ci.test/workflow@main")
    return recipe, json.loads(place.read_text())


def test_it_has_the_fields_of_the_published_schemas_and_no_others(built: tuple[Path, dict[str, Any]]) -> None:
    _, made = built
    check(made, STATEMENT)
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    definition, details = made["predicate"]["buildDefinition"], made["predicate"]["runDetails"]
    assert definition["buildType"].startswith("https://") and definition["externalParameters"]
    assert details["builder"]["id"] == "https://ci.test/workflow@main"
    assert "metadata" not in details  # when it was built is nobody's business but the builder's
    assert all(s["name"] and len(s["digest"]["sha256"]) == 64 for s in made["subject"])
    assert all(d.get("uri") or d.get("digest") for d in definition["resolvedDependencies"])


def test_subjects_are_the_files_of_the_outputs_and_dependencies_those_of_the_inputs(
    built: tuple[Path, dict[str, Any]],
) -> None:
    recipe, made = built
    here = recipe.parent
    rows = [*made["subject"], *made["predicate"]["buildDefinition"]["resolvedDependencies"]]
    for row in rows:
        assert row["digest"] == {"sha256": hashlib.sha256((here / row["name"]).read_bytes()).hexdigest()}
    files = {p.relative_to(here).as_posix() for p in (here / "dist").rglob("*") if p.is_file()}
    assert {row["name"] for row in made["subject"]} == files
    inputs = {row["name"] for row in rows} - files
    assert {"recipe.toml", "base/config.json", "style/adapter_model.safetensors"} <= inputs
    assert {"tone/adapter_model.safetensors", "tone/adapter_config.json"} <= inputs


def test_it_is_the_same_every_time_and_its_only_time_is_the_one_that_is_given(
    built: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, made = built
    place = recipe.parent / "provenance.json"
    raw = place.read_bytes()
    lm.build(recipe, locked=True, attest=place, builder_id="https://ci.test/workflow@main")
    assert place.read_bytes() == raw
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    lm.build(recipe, attest=place, builder_id="https://ci.test/workflow@main")
    dated = json.loads(place.read_text())
    when = {"startedOn": "2023-11-14T22:13:20Z", "finishedOn": "2023-11-14T22:13:20Z"}
    assert dated["predicate"]["runDetails"].pop("metadata") == when
    check(dated, STATEMENT)
    assert dated == made


def test_something_else_in_its_place_is_not_replaced(workshop: Workshop) -> None:
    recipe = workshop(RECIPE)
    place = recipe.parent / "notes.json"
    place.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="something else"):
        lm.build(recipe, attest=place)
    assert place.read_text() == '{"mine": 1}' and not (recipe.parent / "dist").exists()
    lm.build(recipe, attest=place, force=True)
    assert json.loads(place.read_text())["_type"] == attest.STATEMENT


@pytest.mark.parametrize(("name", "epoch"), [("builder", ""), ("a b:c", ""), ("https://b.test", "yesterday")])
def test_what_is_no_uri_and_no_time_is_refused(
    name: str, epoch: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(UsageError):
        lm.build(workshop(RECIPE), attest=workshop(RECIPE).parent / "a.json", builder_id=name)


def test_an_input_on_the_hub_is_named_by_its_commit(workshop: Workshop) -> None:
    file = {"name": "model.safetensors", "size": 1, "sha256": "a" * 64}
    row = {
        "source": "me/base",
        "role": "base",
        "repo": "me/base",
        "revision": "main",
        "commit": "c" * 40,
        "files": [file],
    }
    made = attest.statement(read_recipe(workshop(RECIPE)), Lock({}, [row], []), "0")
    check(made, STATEMENT)
    assert made["predicate"]["buildDefinition"]["resolvedDependencies"][1:] == [
        {
            "name": f"hf://me/base@{'c' * 40}",
            "uri": f"pkg:huggingface/me/base@{'c' * 40}",
            "digest": {"gitCommit": "c" * 40},
        },
        {"uri": f"hf://me/base@{'c' * 40}/model.safetensors", "digest": {"sha256": "a" * 64}},
    ]


@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
def test_a_single_merge_has_a_statement_too(out: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.chdir(workshop(RECIPE).parent)
    given = ["merge", "base", "style=0.5", "tone/adapter_model.safetensors", "-o", out, "--reversible", "-q"]
    assert main.run([*given, "--attest", "a.json"]) == 0
    made = json.loads(Path("a.json").read_text())
    check(made, STATEMENT)
    definition = made["predicate"]["buildDefinition"]
    for row in (*made["subject"], *definition["resolvedDependencies"]):
        assert row["digest"] == {"sha256": hashlib.sha256(Path(row["name"]).read_bytes()).hexdigest()}
    assert {row["name"] for row in made["subject"]} == {
        p.as_posix() for p in Path().rglob("merged*") if p.is_file()
    } | {p.as_posix() for p in Path("merged").rglob("*") if p.is_file()}
    weights = [(row["source"], row["weight"]) for row in definition["externalParameters"]["adapters"]]
    assert weights == [("style", 0.5), ("tone/adapter_model.safetensors", 1.0)]
    inputs = {row["name"] for row in definition["resolvedDependencies"]}
    assert {"base/config.json", "base/model-00001-of-00002.safetensors", "style/adapter_config.json"} <= inputs


@pytest.mark.parametrize("flags", [["--in-place", "--no-undo"], ["-o", "x", "--dry-run"]])
def test_what_leaves_nothing_to_attest_is_refused(
    flags: list[str], workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop(RECIPE).parent)
    assert main.run(["merge", "base", "style", "--attest", "a.json", *flags]) == 2
    assert "attest" in capsys.readouterr().err and not Path("a.json").exists()
