"""Lines of keys in a recipe, against what the standard library parses."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loramerge.building.lines import Path, line_of, lines_of

DOCUMENT = '''\
# a comment with [brackets] and "quotes"
base = "b#not a comment" # a comment
"quoted key" . inner = 'literal \\'
list = [
  "one", # [
  { k6 = "two", k6b = [1, 2] },
]
text = """
[not.a.table]
not_a_key = 1 \\"""
""""
raw = \'\'\'
key = "no"\'\'\'
when = 1979-05-27 07:32:00
[numbers]
float = 1e3
[[output]]
path = "x"
[output.push]
repo="r"
[[output]]
push = { repo = "q",  many = [1,
2] }
[ a . "b.c" ]
d.e = true
'''


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Every path in what was parsed."""
    if isinstance(value, dict):
        rows: Any = value.items()
    elif isinstance(value, list):
        rows = enumerate(value)
    else:
        return
    for key, content in rows:
        yield (*at, key)
        yield from paths(content, (*at, key))


def test_every_key_of_a_document_has_the_line_that_it_stands_on() -> None:
    found = lines_of(DOCUMENT)
    assert set(found) == set(paths(tomllib.loads(DOCUMENT)))
    lines = {
        ("base",): 2,
        ("quoted key", "inner"): 3,
        ("list", 0): 5,
        ("list", 1, "k6"): 6,
        ("list", 1, "k6b", 1): 6,
        ("raw",): 12,
        ("numbers", "float"): 16,
        ("output", 0): 17,
        ("output", 0, "push", "repo"): 20,
        ("output", 1): 21,
        ("output", 1, "push", "many", 1): 23,
        ("a", "b.c", "d", "e"): 25,
    }
    assert {path: found[path] for path in lines} == lines
    assert line_of(found, ("output", 1, "push", "absent")) == 22
    assert line_of(found, ("absent",)) == 1


KEYS = st.text("ab.\"'é #=[]\\", min_size=1, max_size=4)
VALUES = st.recursive(
    st.integers(0, 9) | st.text("a\"'\\#\n]},", max_size=6) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def quoted(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "é": "\\u00e9"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def written(value: Any, between: str = ", \n# ]\n") -> str:
    """In TOML; `between` the elements of an array, which in an inline table must stay on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"""\n{quoted(value)[1:-1]}"""' if "\n" in value else quoted(value)
    if isinstance(value, list):
        return "[" + between.join(written(v, between) for v in value) + "]"
    return "{" + ", ".join(f"{quoted(k)} = {written(v, ', ')}" for k, v in value.items()) + "}"


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES, max_size=2), max_size=3))
def test_any_document_is_walked_to_its_end(top: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    top = {f"k{key}": value for key, value in top.items()}
    text = "".join(f"{quoted(k)} = {written(v)}\n" for k, v in top.items())
    text += "".join("[[rows]]\n" + "".join(f"{quoted(k)} = {written(v)}\n" for k, v in row.items()) for row in rows)
    found = lines_of(text)
    assert set(found) == set(paths(tomllib.loads(text)))
    lines = text.splitlines()
    for path, line in found.items():
        if len(path) == 1 and path != ("rows",):
            assert lines[line - 1].startswith(f"{quoted(str(path[0]))} =")
