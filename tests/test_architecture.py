"""The house keeps its shape: who may import whom, what start-up costs, names of layouts only in `formats/`."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "loramerge"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = (
    "merge",
    "unmerge",
    "switch",
    "recover",
    "combine",
    "resize",
    "convert",
    "extract",
    "export",
    "verify",
    "inspect",
    "analyze",
    "diff",
    "build",
    "lock",
    "pull",
    "push",
    "doctor",
    "demo",
)

# Imports point downwards: from a higher rank to a lower one, or within one part. Parts of one rank stay apart.
RANKS = {
    "errors": 0,
    "formats": 1,
    "methods": 1,
    "tensors": 1,
    "algebra": 1,
    "pickled": 2,
    "adapters": 2,
    "binding": 3,
    "merging": 4,
    "converting": 4,
    "hub": 5,
    "analysis": 5,
    "combining": 5,
    "exporting": 5,
    "extracting": 5,
    "building": 6,
    "api": 7,
    "__init__": 7,
    "demo": 8,
    "doctor": 8,
    "cli": 9,
    "__main__": 10,
}
HEAVY = {"torch", "numpy", "transformers", "huggingface_hub", "onnx", "peft", "safetensors"}

# Where the name of a dialect is no knowledge of its layout: text for people, versions of installed packages.
MAY_NAME_LAYOUTS = ("cli/", "building/numerics.py", "demo.py", "doctor.py", "pickled.py")


def part_of(module: Path) -> str:
    """`loramerge/merging/plan.py` -> `merging`, `loramerge/errors.py` -> `errors`."""
    first = module.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def parts_imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(part of the package, line) of every import in a module, those inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            segments = name.split(".")
            if segments[0] == "loramerge":
                known = len(segments) > 1 and segments[1] in RANKS
                yield (segments[1] if known else "__init__"), node.lineno


def packages_imported(tree: ast.AST) -> set[str]:
    """First segments of everything imported anywhere in a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def ids(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def test_every_part_has_a_rank() -> None:
    assert {part_of(m) for m in MODULES} <= RANKS.keys()


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_imports_point_downwards(module: Path) -> None:
    here = part_of(module)
    wrong = [
        f"line {line}: {here} -> {there}"
        for there, line in parts_imported(ast.parse(module.read_text()))
        # The package hands out the verbs of `api`, which knows the version from the package: one part in two files.
        if there != here and RANKS[there] >= RANKS[here] and {here, there} != {"api", "__init__"}
    ]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "tensors"], ids=ids)
def test_tensors_know_neither_torch_nor_the_command_line(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert not packages_imported(tree) & {"torch", "click"}
    assert {part for part, _ in parts_imported(tree)} <= {"tensors", "errors"}


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) != "cli"], ids=ids)
def test_only_the_command_line_knows_click(module: Path) -> None:
    assert "click" not in packages_imported(ast.parse(module.read_text()))


def layout_names() -> set[str]:
    """Dialect and family names, PEFT types and model types, as `formats/` has them."""
    names: set[str] = set()
    for path in (ROOT / "formats").rglob("*.toml"):
        table = tomllib.loads(path.read_text())
        names |= {table["name"], path.stem}
        names |= set(table.get("types", {}).get("merge", ())) | set(table.get("types", {}).get("refuse", ()))
        names |= set(table.get("experts", {}).get("transposed", ()))
        for rule in table.get("transposed", ()):
            names |= set(rule.get("model-types", ()))
    return names


def literals(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """String literals that are no docstrings."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value, node.lineno


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_no_python_names_a_layout(module: Path) -> None:
    if ids(module).startswith(MAY_NAME_LAYOUTS):
        pytest.skip("speaks to people")
    names = layout_names()
    assert {"peft", "loralib", "transformers", "gpt2", "LORA"} <= names
    assert not [f"line {line}: {text!r}" for text, line in literals(ast.parse(module.read_text())) if text in names]


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_every_module_says_what_lives_there(module: Path) -> None:
    doc = ast.get_docstring(ast.parse(module.read_text()))
    assert doc and len(doc.splitlines()[0]) <= 120


def imported_by(code: str) -> set[str]:
    """Top-level packages that are loaded after `code` has run in a fresh interpreter."""
    script = f"{code}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import loramerge") & {*HEAVY, "click"}


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    assert not imported_by("import loramerge.cli.main") & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from loramerge.cli.main import run\nassert run({arguments!r}) == 0"
    assert not imported_by(code) & HEAVY


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "loramerge", *arguments], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"]], ids=" ".join)
def test_help_is_cheap(arguments: list[str]) -> None:
    best = min(cpu_seconds(arguments) for _ in range(5))
    print(f"{' '.join(arguments)}: {best * 1000:.0f} ms of CPU (aim 150)")
    assert best < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_shared_modes(name: str) -> None:
    import click

    from loramerge.cli import main

    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None and command.help
    assert command.help.splitlines()[0] == main.COMMANDS[name][1]
    flags = {flag for p in command.params for flag in p.opts}
    assert {"--json", "-q", "-v", "--no-progress"} <= flags
    assert all(p.help for p in command.params if isinstance(p, click.Option))


def test_the_list_of_commands_is_complete() -> None:
    from loramerge.cli import main

    assert tuple(main.COMMANDS) == COMMANDS


def test_the_wheel_carries_the_formats() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["force-include"] == {"formats": "loramerge/_formats"}
    assert "formats" in build["sdist"]["include"]


def test_the_version_is_said_once() -> None:
    import loramerge

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", loramerge.__version__) == loramerge.__version__
    assert project["scripts"] == {"loramerge": "loramerge.cli.main:run"}
