"""`loramerge analyze` at a shell."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loramerge.cli import main

MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Commands in this process (a process of its own spends its time on imports), where the files lie."""
    monkeypatch.chdir(tmp_path)
    for variable in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str) -> SimpleNamespace:
        code = main.run(arguments)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def second(make: SimpleNamespace, folder: Path) -> Path:
    """Another adapter of the same modules, and one module less."""
    tensors = make.adapter_tensors(seed=5)
    written: Path = make.adapter(folder, {k: v for k, v in tensors.items() if "layers.1" not in k or "v_proj" not in k})
    return written


def table(stdout: str) -> list[list[str]]:
    """The cells of the table of modules, header first."""
    lines = stdout.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("module "))
    rows = [line.split("  ") for line in lines[at:] if line]
    return [[cell.strip() for cell in row if cell.strip()] for row in rows]


def test_one_adapter(cli: Any, adapter: Path) -> None:
    done = cli("analyze", "lora", "--no-progress")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("adapter     lora   PEFT   4 modules   ")
    assert lines[1].startswith("  rank      2 stored   ")
    assert any(line.startswith("in short    rank 2 in 4 modules, where ") for line in lines)
    header, *rows = table(done.stdout)
    assert header == ["module", "shape", "rank", "enough", "90 %", "effective", "norm"]
    norms = [float(row[-1]) for row in rows]
    assert len(rows) == 4 and norms == sorted(norms, reverse=True)


def test_two_adapters_and_a_base(cli: Any, base: Path, adapter: Path, make: SimpleNamespace, tmp_path: Path) -> None:
    second(make, tmp_path / "other")
    done = cli("analyze", "lora=0.5", "other", "--base", "base", "--sort", "order")
    assert done.returncode == 0, done.stderr
    assert "lora=0.5" in done.stdout and "together    lora and other   3 modules in common" in done.stdout
    assert "  phi       inputs of B A" in done.stdout and "  kept      of the change when merged: keep " in done.stdout
    header, *rows = table(done.stdout)
    assert header[-6:] == ["of base", "amplifies", "x chance", "kept", "cosine", "cancels"]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    alone = next(row for row in rows if row[0] == "model.layers.1.self_attn.v_proj")
    assert alone[-2:] == ["-", "-"] and alone[2] == "2 -"


def test_json_is_one_document_with_tables_on_request(
    cli: Any, base: Path, adapter: Path, make: SimpleNamespace, tmp_path: Path
) -> None:
    second(make, tmp_path / "other")
    arguments = ("analyze", "lora", "other", "--base", "base", "--json")
    data = json.loads(cli(*arguments).stdout)
    assert (data["schema"], data["ok"], len(data["modules"]), len(data["pairs"])) == (1, True, 4, 1)
    assert "singular_values" not in data["modules"][0]["updates"][0] and "phi" not in data["modules"][0]["pairs"][0]
    assert data["pairs"][0]["phi"]["left"]["i"] == [1, 2]
    full = json.loads(cli(*arguments, "-v").stdout)
    assert len(full["modules"][0]["updates"][0]["singular_values"]) == 2
    assert np.array(full["modules"][0]["pairs"][0]["phi"]["A"]["phi"]).shape == (2, 2)
    assert len(full["modules"][0]["updates"][0]["amplification"]["table"]) == 2


def test_quiet_is_one_value(cli: Any, adapter: Path, make: SimpleNamespace, tmp_path: Path) -> None:
    second(make, tmp_path / "other")
    assert -1 <= float(cli("analyze", "lora", "other", "-q").stdout) <= 1
    assert 1 <= float(cli("analyze", "lora", "-q").stdout) <= 2
    assert cli("analyze", "lora", "-q", "--html", "page.html").stdout == "page.html\n"


def test_a_page_is_complete_and_kept(cli: Any, adapter: Path, tmp_path: Path) -> None:
    done = cli("analyze", "lora", "--html", "page.html")
    assert done.returncode == 0 and "wrote       page.html" in done.stdout
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    (tmp_path / "page.html").write_text("mine")
    again = cli("analyze", "lora", "--html", "page.html")
    assert again.returncode == 4 and "--force" in again.stderr
    assert (tmp_path / "page.html").read_text() == "mine"
    assert cli("analyze", "lora", "--html", "page.html", "--force").returncode == 0
    assert (tmp_path / "page.html").read_text() == text
    assert cli("analyze", "lora", "--html", "lora/adapter_model.safetensors", "--force").returncode == 4


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "ADAPTER"),
        (("lora", "--sort", "lost"), 2, "--base BASE"),
        (("lora", "--sort", "collision"), 2, "two adapters"),
        (("lora", "--include", "nothing"), 2, "globs"),
        (("missing",), 3, "missing"),
        (("base",), 3, "not an adapter"),
        (("lora", "--html", "no/page.html"), 4, "mkdir"),
        (("lora", "--points", "1"), 2, "points"),
    ],
)
def test_mistakes_cost_nothing(
    cli: Any, base: Path, adapter: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = cli("analyze", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and "fix:" in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_top_and_all(cli: Any, adapter: Path) -> None:
    few = cli("analyze", "lora", "--top", "1").stdout
    assert len(table(few)) == 3 and "and 3 more (-v lists them all" in few
    assert len(table(cli("analyze", "lora", "--top", "1", "-v").stdout)) == 5
    assert "module " not in cli("analyze", "lora", "--top", "0").stdout.partition("skipped")[0].replace("4 modules", "")


@pytest.mark.skipif(MATPLOTLIB, reason="matplotlib is installed")
def test_pictures_without_the_extra_are_refused_with_the_fix(cli: Any, adapter: Path, tmp_path: Path) -> None:
    done = cli("analyze", "lora", "--png", "pictures")
    assert done.returncode == 2 and "loramerge[plot]" in done.stderr
    assert not (tmp_path / "pictures").exists()


@pytest.mark.skipif(not MATPLOTLIB, reason="needs matplotlib")
def test_pictures(cli: Any, base: Path, adapter: Path, make: SimpleNamespace, tmp_path: Path) -> None:
    second(make, tmp_path / "other")
    done = cli("analyze", "lora", "other", "--base", "base", "--png", "pictures")
    assert done.returncode == 0, done.stderr
    names = {"spectra-1.png", "spectra-2.png", "similarity-1-2.png", "base-1.png", "base-2.png"}
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "pictures").iterdir())


def test_inspect_names_it(cli: Any, adapter: Path) -> None:
    assert "loramerge analyze lora" in cli("inspect", "lora").stdout
