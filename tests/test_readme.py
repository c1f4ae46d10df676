"""Every command of the README runs as it stands there, and the wheel that its first command installs is complete."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from loramerge import demo
from tests.hub.server import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\w+=\S+ )*loramerge ", line)]


def words(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables set for a command, and its words after `loramerge`."""
    split = shlex.split(command)
    at = split.index("loramerge")
    return dict(word.split("=", 1) for word in split[:at]), split[at + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's paths mean something."""
    here = tmp_path_factory.mktemp("readme")
    demo.run(here / "made")
    (here / "base").symlink_to(here / "made" / "base")
    for name, adapter in (
        ("lora", "style"),
        ("style", "style"),
        ("tone", "tone"),
        ("lora-a", "style"),
        ("lora-b", "tone"),
    ):
        (here / name).symlink_to(here / "made" / adapter)
    roberta = here / "roberta-base"
    roberta.mkdir()
    names = ["query", "value"]
    base = {f"roberta.encoder.layer.0.attention.self.{n}.weight": torch.randn(8, 8) for n in names}
    save_file(base, roberta / "model.safetensors")
    factors = {}
    for n in names:
        path = f"roberta.encoder.layer.0.attention.self.{n}"
        factors |= {f"{path}.lora_A": torch.randn(2, 8), f"{path}.lora_B": torch.randn(8, 2)}
    torch.save(factors, here / "roberta_base_lora_mnli.bin")
    (here / "examples").symlink_to(ROOT / "examples")
    for out, flags in (
        ("merged", []),
        ("hot", ["--reversible"]),
        ("cold", ["--reversible"]),
        ("served", ["--reversible"]),
    ):
        # Commands that read what others write run without those too; the tests may be split over processes.
        make = [sys.executable, "-m", "loramerge", "merge", "base", "lora", "-o", out, "-q", *flags]
        subprocess.run(make, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    example = runpy.run_path(str(ROOT / "examples" / "own_dialect.py"))
    example["write_acme"](str(here / "base"), str(here / "acme.safetensors"))
    write_onnx(here / "base", here / "deployed.onnx")
    (here / "recipe.toml").write_text(*blocks("toml"))
    return here


def write_onnx(base: Path, path: Path) -> None:
    """A graph with all the base's linear weights under their names, each used by a node of its own."""
    nodes, weights, inputs, outputs = [], [], [], []
    for file in sorted(base.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if weight.dim() == 2 and "proj" in name:
                out, width = weight.shape
                weights.append(numpy_helper.from_array(weight.float().numpy(), name))
                nodes.append(helper.make_node("Gemm", [f"{name}.x", name], [f"{name}.y"], transB=1))
                inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, [1, width]))
                outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [1, out]))
    graph = helper.make_graph(nodes, "linears", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Hub that has what the README names."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        for repo, source in (("meta-llama/Llama-3.2-1B", "base"), ("acme/style-lora", "style")):
            files = {path.name: path for path in sorted((folder / source).iterdir())}
            commit = hub.add(repo, files)
            hub.repo(repo).tags["v2"] = commit
        hub.tokens = {TOKEN: "you"}
        yield hub.env(tmp_path_factory.mktemp("home"), TOKEN)


def test_the_readme_has_commands() -> None:
    verbs = {words(c)[1][0] for c in commands()}
    assert verbs == {
        "merge", "unmerge", "switch", "recover", "convert", "verify", "inspect", "diff", "doctor", "demo",
        "combine", "resize", "extract", "analyze", "export", "pull", "push", "build", "lock",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands())
def test_command_of_the_readme(command: str, folder: Path, hub: dict[str, str]) -> None:
    variables, arguments = words(command)
    if "-o" in arguments and (folder / arguments[1 + arguments.index("-o")]).exists():
        arguments.append("--force")
    if arguments[0] == "build" and "--locked" in arguments:
        make = [sys.executable, "-m", "loramerge", "build", "recipe.toml", "-q"]
        subprocess.run(make, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    environment = {**hub, "PYTHONPATH": str(ROOT), **variables}  # the Hub's has none of the variables of others
    program = [sys.executable, "-m", "loramerge", *arguments]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    expected = 1 if arguments[0] == "diff" else 0  # a merged model differs from its base
    assert done.returncode == expected, done.stdout + done.stderr


def test_python_of_the_readme(folder: Path) -> None:
    (code,) = blocks("python")
    program = "from safetensors.torch import load_file\nfrom pathlib import Path\nstate_dict = {}\n"
    program += "for f in Path('base').glob('*.safetensors'): state_dict |= load_file(f)\n" + code
    program += "\nassert report['ok'] and merged.keys() == state_dict.keys()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program.replace('"merged"', '"merged-py"')],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("merge_two_adapters.py", ["base", "style", "tone", "example-out"]),
        ("merge_state_dict.py", ["one.safetensors", "style"]),
        ("own_dialect.py", ["base", "acme-out"]),
    ],
)
def test_example_runs(example: str, arguments: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if "one.safetensors" in arguments and not (folder / "one.safetensors").exists():
        make = [sys.executable, "-m", "loramerge", "merge", "base", "tone", "-o", "one.safetensors", "-q"]
        subprocess.run(make, cwd=folder, env=environment, check=True)
    program = [sys.executable, str(ROOT / "examples" / example), *arguments]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed" in done.stdout


def test_the_wheel_holds_the_formats(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    formats = {p.relative_to(ROOT / "formats").as_posix() for p in (ROOT / "formats").rglob("*.toml")}
    held = tmp_path / "installed" / "loramerge" / "_formats"
    assert formats and formats == {p.relative_to(held).as_posix() for p in held.rglob("*.toml")}
    program = "from loramerge.adapters.dialect import dialects; print(len(dialects()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0 and int(found.stdout) > 0, found.stderr
