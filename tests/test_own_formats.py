"""A user's own dialects and families, from the folders that `LORAMERGE_FORMATS` names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loramerge as lm
from loramerge.adapters.dialect import dialects
from loramerge.binding.tables import layout_families
from loramerge.errors import InputError
from loramerge.formats import VARIABLE

DIALECT = """
name = "acme"
title = "Acme"
[detect]
suffixes = [".acme_a"]
[[key]]
suffix = ".acme_a"
kind = "low-rank"
factor = "A"
[[key]]
suffix = ".acme_b"
kind = "low-rank"
factor = "B"
[scale]
rule = "one"
"""

FAMILY = """
name = "acme-net"
[component.network]
role = "main"
detect.hf = ["blocks.0.attention.query.weight"]
detect.ldm = ["stage.0.qk.weight"]
rows = [{ hf = "blocks.{n}", ldm = "stage.{n}", leaf = "block" }]
[leaf.block]
"attention.query|attention.key" = "qk"
"""


@pytest.fixture
def formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "formats"
    for name in ("adapters", "families"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def adapter(path: Path, module: str) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(0)
    A, B = torch.randn(2, 6), torch.randn(4, 2)
    save_file({f"{module}.acme_a": A, f"{module}.acme_b": B}, path)
    return path, B @ A


def test_a_dialect_of_the_user(formats: Path, tmp_path: Path) -> None:
    (formats / "adapters" / "acme.toml").write_text(DIALECT)
    path, delta = adapter(tmp_path / "x.safetensors", "layer")
    merged = lm.merge_tensors({"layer.weight": torch.zeros(4, 6)}, path)
    torch.testing.assert_close(merged["layer.weight"], delta)
    assert lm.inspect(path)["dialect"] == "acme"


def test_a_family_of_the_user(formats: Path, tmp_path: Path) -> None:
    (formats / "adapters" / "acme.toml").write_text(DIALECT)
    (formats / "families" / "net.toml").write_text(FAMILY)
    path, delta = adapter(tmp_path / "x.safetensors", "blocks.0.attention.key")
    merged = lm.merge_tensors({"stage.0.qk.weight": torch.zeros(8, 6)}, path)
    torch.testing.assert_close(merged["stage.0.qk.weight"], torch.cat([torch.zeros(4, 6), delta]))


def test_a_table_of_the_user_takes_the_place_of_ours(formats: Path) -> None:
    (formats / "adapters" / "mine.toml").write_text(DIALECT.replace('"acme"', '"loralib"'))
    assert [d.title for d in dialects() if d.name == "loralib"] == ["Acme"]


def test_several_folders_are_joined(formats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    (other / "adapters").mkdir(parents=True)
    (formats / "adapters" / "acme.toml").write_text(DIALECT)
    (other / "adapters" / "b.toml").write_text(DIALECT.replace("acme", "acme2"))
    monkeypatch.setenv(VARIABLE, f"{formats}:{other}")
    assert {"acme", "acme2", "peft"} <= {d.name for d in dialects()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", ("TOML",)),
        ('title = "x"', ("no name",)),
        ('name = "x"\n[detect]\n', ("title",)),
        (DIALECT.replace('"low-rank"', '"low-rnak"', 1), ("low-rnak", "did you mean low-rank?")),
        (DIALECT.replace('factor = "A"', 'factor = "a"'), ("low-rank has no factor a", "one of A")),
        (DIALECT.replace('suffix = ".acme_b"\n', ""), ("a suffix and a kind",)),
        (f'include = ["nothing"]\n{DIALECT}', ("there is no dialect nothing",)),
    ],
)
def test_what_a_person_may_get_wrong_is_told(formats: Path, text: str, words: tuple[str, ...]) -> None:
    (formats / "adapters" / "mine.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        dialects()
    said = f"{caught.value.message} {caught.value.fix}"
    assert all(word in said for word in words), said
    assert "mine.toml" in str(caught.value.file) or "acme.toml" in str(caught.value.file)


def test_a_family_that_refers_to_nothing_is_told(formats: Path) -> None:
    (formats / "families" / "net.toml").write_text(FAMILY.replace('leaf = "block"', 'leaf = "blok"'))
    with pytest.raises(InputError) as caught:
        layout_families()
    assert caught.value.code == "formats.invalid"


def test_a_folder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/at/all")
    with pytest.raises(InputError) as caught:
        dialects()
    assert caught.value.code == "formats.missing"
