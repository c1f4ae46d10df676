"""What is a reference, what is a path, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramerge.errors import UsageError
from loramerge.hub.reference import parse, with_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("hf://a/b", "a/b", None, ""),
        ("hf://models/a/b", "a/b", None, ""),
        ("hf://a/b@v1.0", "a/b", "v1.0", ""),
        (f"hf://a/b@{COMMIT}/x/y.safetensors", "a/b", COMMIT, "x/y.safetensors"),
        ("hf://a/b/folder/", "a/b", None, "folder"),
        ("hf://a/b@refs/pr/12", "a/b", "refs/pr/12", ""),
        ("hf://a/b@refs/pr/12/sub/file.json", "a/b", "refs/pr/12", "sub/file.json"),
        ("a/b", "a/b", None, ""),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None, ""),
        ("a/b@main", "a/b", "main", ""),
        ("a/b@feature/x", "a/b", "feature/x", ""),
    ],
)
def test_references(
    text: str, repo: str, revision: str | None, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse(text)
    assert found is not None
    assert (found.repo, found.revision, found.path) == (repo, revision, path)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "/a/b",
        "./a/b",
        "../a/b",
        "a/b/c",
        "a\\b",
        "~/a",
        "a/b.safetensors",
        "a/lora.bin",
        "a/..",
        "a b/c",
        "",
        "-/-x/",
    ],
)
def test_paths(text: str) -> None:
    assert parse(text) is None


def test_a_path_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert parse("a/b") is None
    assert parse("hf://a/b") is not None
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    assert parse("a/gone") is None


@pytest.mark.parametrize(
    "text",
    [
        "hf://gpt2",
        "hf://",
        "hf:///b",
        "hf://a/",
        "hf://datasets/a/b",
        "hf://a/b@",
        "hf://a/b/../c",
        "hf://a/b//c",
        "hf://a/b--c",
        "hf://../b",
        "https://huggingface.co/a/b",
    ],
)
def test_what_is_neither(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert raised.value.code == "hub.reference" and "hf://NAMESPACE/NAME" in raised.value.fix


def test_a_revision_is_given_once() -> None:
    plain, pinned = parse("hf://a/b"), parse("hf://a/b@x")
    assert plain is not None and pinned is not None
    assert with_revision(plain, "v1").revision == "v1"
    with pytest.raises(UsageError):
        with_revision(pinned, "v1")
