"""Recipes that are wrong: each names the line, what is wrong, and the fix; and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import loramerge as lm
from loramerge.building.recipe import read_recipe
from loramerge.errors import InputError
from tests.building.conftest import Workshop, content, shell

GOOD = """\
base = "base"
adapters = ["style"]
[[output]]
path = "dist/model"
"""

BAD = {
    "unknown key": ('base = "base"\nadaptors = []\n', 2, "recipe.unknown-key", "did you mean adapters?"),
    "unknown key of an output": (GOOD + 'formt = "x"\n', 5, "recipe.unknown-key", "one of path, to,"),
    "unknown key of an adapter": (
        'base = "base"\nadapters = [\n "style",\n { source = "tone", wieght = 2 },\n]\n[output]\npath = "o"\n',
        4,
        "recipe.unknown-key",
        "did you mean weight?",
    ),
    "unknown numerics": (GOOD + '[numerics]\ndtyp = "keep"\n', 6, "recipe.unknown-key", "did you mean dtype?"),
    "wrong type": ("base = 3\n[output]\npath = 'o'\n", 1, "recipe.type", 'write base = "base"'),
    "wrong type of a weight": (
        GOOD.replace('"style"', '{ source = "style", weight = "0.7" }'),
        2,
        "recipe.type",
        "write weight = 0.7",
    ),
    "boolean for a number": (GOOD + "[options]\nalpha = true\n", 6, "recipe.type", "write alpha = 16"),
    "wrong word": (GOOD + '[numerics]\ndtype = "bf16"\n', 6, "recipe.value", "did you mean bfloat16?"),
    "wrong device": (GOOD + '[numerics]\ndevice = "gpu"\n', 6, "recipe.value", "cuda"),
    "wrong target": (GOOD + 'to = "onxx"\n', 5, "recipe.value", "did you mean onnx?"),
    "wrong size": (GOOD + '[options]\nshard-size = "5XB"\n', 6, "recipe.size", "2GB"),
    "infinite weight": (GOOD.replace('"style"', '{ source = "style", weight = inf }'), 2, "recipe.value", "finite"),
    "missing base": ('[[output]]\npath = "o"\n', 1, "recipe.missing-key", 'add base = "base"'),
    "missing path": ('base = "base"\n[[output]]\nto = "onnx"\n', 2, "recipe.missing-key", 'add path = "dist/model"'),
    "no output": ('base = "base"\n', 1, "recipe.missing-key", "[[output]]"),
    "missing file": ('base = "bass"\n[output]\npath = "o"\n', 1, "recipe.missing-file", 'did you mean "base"?'),
    "missing adapter": (GOOD.replace('"style"', '"styel"'), 2, "recipe.missing-file", 'did you mean "style"?'),
    "missing file in a folder": (GOOD.replace('"style"', '"style/x"'), 2, "recipe.missing-file", "folder"),
    "bad reference": ('base = "hf://gpt2"\n[output]\npath = "o"\n', 1, "hub.reference", "hf://NAMESPACE/NAME"),
    "output that reads itself": (
        'base = "base"\nadapters = ["style"]\n[output]\npath = "base"\n',
        1,
        "recipe.cycle",
        "another base",
    ),
    "cycle": (
        '[[output]]\npath = "a"\nbase = "b"\n[[output]]\npath = "b"\nbase = "./a"\n',
        6,
        "recipe.cycle",
        "another base",
    ),
    "duplicate output": (GOOD + '[[output]]\npath = "dist/../dist/model"\n', 6, "recipe.duplicate-output", "own"),
    "output in an output": (GOOD + '[[output]]\npath = "dist/model/x"\n', 6, "recipe.duplicate-output", "side"),
    "output that is the folder": ('base = "base"\n[output]\npath = "."\n', 3, "recipe.output", "dist"),
    "output on the hub": ('base = "base"\n[output]\npath = "hf://a/b"\n', 3, "recipe.output", 'repo = "a/b"'),
    "input in an output": (GOOD + '[[output]]\npath="q"\nbase = "dist/model/x"\n', 7, "recipe.output", "dist/model"),
    "export to a file": (GOOD.replace("dist/model", "m.onnx") + 'to = "onnx"\n', 4, "recipe.output", '"m"'),
    "onnx without export": (GOOD + 'onnx = { task = "x" }\n', 5, "recipe.value", 'to = "onnx"'),
    "unknown method": ('method = "tise"\n' + GOOD, 1, "recipe.method", "did you mean ties?"),
    "unknown option of a method": (
        '[method]\nname = "ties"\ndensty = 0.5\n' + "[[output]]\npath='o'\nbase='base'\nadapters=['style']\n",
        3,
        "recipe.unknown-key",
        "did you mean density?",
    ),
    "option of another method": ('method = { name = "linear", density = 0.5 }\n' + GOOD, 1, "recipe.method", "ties"),
    "method that needs an option": ('method = "della"\n' + GOOD, 1, "recipe.method", "give it"),
    "method for two": ('method = "slerp"\n' + GOOD, 1, "recipe.method", ""),
    "a flag that does not go": (
        GOOD + '[options]\nreversible = true\n[numerics]\ndtype = "float16"\n',
        3,
        "recipe.",
        "reversible",
    ),
    "key twice": (GOOD + "[numerics]\ncompute-dtype='float64'\ncompute_dtype='float64'\n", 7, "recipe.", "leave one"),
    "push without a repository": (GOOD + "push = { public = true }\n", 5, "recipe.missing-key", "me/model"),
    "push to a revision": (GOOD + 'push = { repo = "me/model@v1" }\n', 5, "recipe.value", "namespace/name"),
    "no TOML": ('base = "base\n', 1, "recipe.toml", "repair"),
    "key without a value": ('base = "base"\n\nadapters =\n', 3, "recipe.toml", "repair"),
    "newer schema": ("schema = 2\n" + GOOD, 1, "recipe.", "schema = 1"),
    "an empty path": (GOOD.replace("dist/model", ""), 4, "recipe.", "dist/model"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "-"))
def test_a_wrong_recipe_names_the_line_and_the_fix(case: str, workshop: Workshop) -> None:
    text, line, code, fix = BAD[case]
    recipe = workshop(text)
    before = content(recipe.parent)
    with pytest.raises(InputError) as told:
        lm.build(recipe)
    assert told.value.exit_code == 3
    assert told.value.message.startswith(f"line {line}: "), told.value.message
    assert told.value.code.startswith(code), told.value.code
    assert fix in told.value.fix, told.value.fix
    assert told.value.file == str(recipe)
    assert content(recipe.parent) == before


def test_the_shell_tells_it_on_two_lines(workshop: Workshop) -> None:
    recipe = workshop(GOOD.replace("path", "paht"))
    done = shell("build", "recipe.toml", cwd=recipe.parent)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "error: line 4: there is no key 'paht' in an output (recipe.toml)",
        "fix:   did you mean path?",
    ]


def test_bytes_that_are_no_text_are_refused_with_their_line(workshop: Workshop) -> None:
    recipe = workshop(GOOD)
    recipe.write_bytes(GOOD.encode() + b'x = "\xff"\n')
    with pytest.raises(InputError, match="line 5: is not UTF-8"):
        read_recipe(recipe)


def test_an_output_takes_what_the_recipe_says_and_replaces_it_key_by_key(workshop: Workshop) -> None:
    recipe = workshop(
        """
base = "base"
adapters = [{ source = "style", weight = 0.5 }, "tone"]
method = { name = "ties", density = 0.4 }
numerics = { compute_dtype = "float64", dtype = "float16" }
options = { exclude = ["*.up_proj"], shard-size = "1MB" }

[[output]]
path = "a"

[[output]]
path = "b"
method = "linear"
numerics = { dtype = "keep" }
options = { exclude = [] }

[[output]]
path = "c"
base = "a"
"""
    )
    a, b, c = (step.settled() for step in read_recipe(recipe).steps)
    assert a["adapters"] == [{"source": "style", "weight": 0.5}, {"source": "tone", "weight": 1.0}]
    assert (a["method"], a["method_options"]["density"]) == ("ties", 0.4)
    assert (a["dtype"], a["compute_dtype"], a["exclude"], a["shard_size"]) == (
        "float16",
        "float64",
        ["*.up_proj"],
        1_000_000,
    )
    changed = {"method", "method_options", "dtype", "exclude"}
    assert {k: v for k, v in b.items() if k not in changed} == {k: v for k, v in a.items() if k not in changed}
    assert (b["method"], b["dtype"], b["exclude"]) == ("linear", "keep", [])
    assert c["adapters"] == []  # a base of its own may have them in it already


def test_what_is_read_is_made_first_wherever_it_stands(workshop: Workshop) -> None:
    recipe = workshop(
        'base = "base"\n[[output]]\npath = "c"\nbase = "b"\n'
        '[[output]]\npath = "b"\nbase = "a/"\n[[output]]\npath = "a"\n'
    )
    assert [step.text for step in read_recipe(recipe).steps] == ["a", "b", "c"]


def test_names_of_repositories_are_references_unless_something_of_that_name_is_there(workshop: Workshop) -> None:
    recipe = workshop('base = "acme/model@v2"\n[output]\npath = "o"\n')
    (step,) = read_recipe(recipe).steps
    assert (step.base.reference, step.base.path) == ("hf://acme/model@v2", None)
    (recipe.parent / "acme").mkdir()
    with pytest.raises(InputError, match=r"line 1: there is no 'acme/model@v2'"):
        read_recipe(recipe)


def test_a_lock_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.lock").write_text("{}")
    with pytest.raises(InputError) as told:
        read_recipe(tmp_path / "recipe.lock")
    assert told.value.fix == f"give {tmp_path / 'recipe.toml'}"
