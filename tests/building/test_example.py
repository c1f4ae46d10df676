"""The example of a pipeline: its recipe builds, and every command that its files name is one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import yaml

from loramerge.cli import main
from tests.building.conftest import ROOT

EXAMPLE = ROOT / "examples" / "pipeline"


def commands(name: str) -> list[list[str]]:
    """The words after `loramerge` of every command in a file."""
    text = re.sub(r"\\\n\s*", " ", (EXAMPLE / name).read_text())
    lines = re.findall(r"^(?:[ -]*(?:RUN|run:)?.*?\s)?(?<![/\w])loramerge ([a-z]+ .*)$", text, re.M)
    return [shlex.split(line.split("`")[0]) for line in lines if line.split()[0] in main.COMMANDS]


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(EXAMPLE, tmp_path / "pipeline")
    (tmp_path / "pipeline/models").mkdir()
    for name in ("base", "style", "tone"):
        shutil.copytree(made / name, tmp_path / "pipeline/models" / name)
    monkeypatch.chdir(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_the_recipe_builds_and_the_commands_of_the_readme_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.findall(r"```bash\n(.*?)```", (here / "README.md").read_text(), re.S)[0]
    lines = [shlex.split(line)[1:] for line in block.splitlines()]
    assert lines[0] == ["demo", "-o", "models"]  # small inputs stand in for those
    for words in lines[1:]:
        assert main.run(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count("unchanged") == 3  # two outputs and the lock
    assert (here / "dist/model/loramerge.json").exists() and (here / "provenance.json").exists()


@pytest.mark.parametrize("name", ["Dockerfile", "workflow.yml", "README.md"])
def test_every_command_has_the_flags_that_it_is_given(name: str) -> None:
    found = commands(name)
    assert found
    for words in found:
        command = main.cli.get_command(click.Context(main.cli), words[0])
        assert command is not None
        command.make_context(words[0], [w for w in words[1:] if w != "..."]).close()


def test_the_commands_of_the_image_and_the_workflow_build(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["lock", "recipe.toml"]) == 0
    for name in ("Dockerfile", "workflow.yml"):
        for words in commands(name):
            given = [re.sub(r"\$\{\{ [\w.]+ \}\}", "https://ci.test", w) for w in words]
            assert main.run(given) == 0, capsys.readouterr().err
    assert os.path.isdir("dist/model")


def test_the_workflow_is_one() -> None:
    flow = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())
    assert set(flow["jobs"]) == {"build", "publish"}
    for job in flow["jobs"].values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_image_copies_what_is_there_or_comes_out() -> None:
    lines = (EXAMPLE / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY")]
    assert ["recipe.toml", "recipe.lock", "./"] in copied
    outputs = re.findall(r'path = "([^"]+)"', (EXAMPLE / "recipe.toml").read_text())
    assert any(words[1] == f"/model-build/{outputs[0]}" for words in copied if words[0] == "--from=build")
