"""What may stand in a recipe: its tables, the type of every key, and errors that name the line and the fix."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from loramerge.building.lines import Path, line_of, lines_of
from loramerge.errors import InputError, LoramergeError
from loramerge.tensors.sizes import parse_size
from loramerge.tensors.text import quoted

SCHEMA = 1
TARGETS = ("safetensors", "onnx")
DTYPES = ("keep", "float32", "float16", "bfloat16")
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Key:
    """One key: the type of its value in words, the words it may be, an example for the fix."""

    kind: str
    choices: tuple[str, ...] = ()
    example: str = ""


Table = Mapping[str, Key]

NUMERICS: Table = {
    "dtype": Key("a string", DTYPES),
    "compute-dtype": Key("a string", ("float32", "float64")),
    "device": Key("a string", example='"cpu"'),
}
OPTIONS: Table = {
    "include": Key("an array of strings", example='["*.q_proj"]'),
    "exclude": Key("an array of strings", example='["*.lm_head"]'),
    "allow-unmatched": Key("a boolean"),
    "tokenizer": Key("a string", ("auto", "base", "adapter")),
    "shard-size": Key("a size", example='"5GB"'),
    "allow-pickle": Key("a boolean"),
    "alpha": Key("a number", example="16"),
    "enable-lora": Key("an array of booleans", example="[true, false, true]"),
    "residual-base": Key("a boolean"),
    "original-base": Key("a boolean"),
    "grouped-experts": Key("a boolean"),
    "reversible": Key("a boolean"),
    "checkpoint": Key("a string", example='"base"'),
}
ONNX: Table = {
    "task": Key("a string", example='"text-generation"'),
    "opset": Key("an integer", example="20"),
    "layout": Key("a string", ("optimum", "transformersjs", "genai")),
    "verify": Key("a boolean"),
    "link-weights": Key("a boolean"),
    "adapter-ready": Key("a boolean"),
}
PUSH: Table = {
    "repo": Key("a string", example='"me/model"'),
    "revision": Key("a string", example='"main"'),
    "public": Key("a boolean"),
    "create-pr": Key("a boolean"),
    "tag": Key("a string", example='"v1"'),
    "message": Key("a string", example='"Merged with loramerge"'),
}
ADAPTER: Table = {"source": Key("a string", example='"lora"'), "weight": Key("a number", example="0.7")}
MAKING: Table = {
    "base": Key("a string", example='"base"'),
    "adapters": Key("an array", example='[{ source = "lora", weight = 0.7 }]'),
    "method": Key("a string or a table", example='"ties"'),
    "numerics": Key("a table", example='{ dtype = "bfloat16" }'),
    "options": Key("a table", example='{ tokenizer = "base" }'),
}
OUTPUT: Table = {
    "path": Key("a string", example='"dist/model"'),
    "to": Key("a string", TARGETS),
    **MAKING,
    "onnx": Key("a table", example='{ task = "text-generation" }'),
    "push": Key("a table", example='{ repo = "me/model" }'),
}
TOP: Table = {
    "schema": Key("an integer", example="1"),
    **MAKING,
    "output": Key("a table or an array of tables", example='[[output]] with path = "dist/model"'),
}


class Document:
    """A recipe as it stands in its file: the data, and for errors the lines."""

    def __init__(self, raw: bytes, name: str) -> None:
        self.name = name
        if len(raw) > MAX_BYTES:
            fix = "give a recipe in TOML"
            raise InputError("recipe.invalid", f"has {len(raw)} bytes, more than a recipe", fix=fix, file=name)
        try:
            text = raw.decode("utf-8-sig")
            self.data: dict[str, Any] = tomllib.loads(text)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            message = f"line {line}: is not UTF-8"
            raise InputError("recipe.invalid", message, fix="save the recipe as UTF-8", file=name) from None
        except tomllib.TOMLDecodeError as error:
            raise _not_toml(str(error), text, name) from None
        except RecursionError:
            raise InputError("recipe.invalid", "is nested too deep", fix="give a recipe in TOML", file=name) from None
        self._lines = lines_of(text)

    def line(self, path: Path) -> int:
        """Where a key stands."""
        return line_of(self._lines, path)

    def error(self, path: Path, message: str, fix: str, code: str = "recipe.invalid") -> NoReturn:
        """Raises the error for a key."""
        raise InputError(code, f"line {self.line(path)}: {message}", fix=fix, file=self.name)

    def passed_on(self, path: Path, error: LoramergeError) -> NoReturn:
        """Raises an error that was found elsewhere, with the line that caused it."""
        message = error.message if error.file is None else f"{error.file}: {error.message}"
        told = f"line {self.line(path)}: {message}"
        kind = InputError if error.exit_code == 2 else type(error)
        code = error.code.replace("usage.", "recipe.", 1) if error.exit_code == 2 else error.code
        fix = re.sub(r"--([a-z])", r"\1", error.fix) if error.exit_code == 2 else error.fix
        if error.exit_code == 2:
            told = re.sub(r"--([a-z])", r"\1", told)
        raise kind(code, told, fix=fix, file=self.name, tensors=error.tensors) from None

    def table(self, value: Any, keys: Table, path: Path, what: str) -> dict[str, Any]:
        """A table with these keys and no others, each of its type. `_` in a key is `-`."""
        if not isinstance(value, dict):
            self.error(path, f"{what} is {_kind(value)}, not a table", f"write [{_dotted(path)}] and its keys below it")
        found: dict[str, Any] = {}
        for given, content in value.items():
            key, at = given.replace("_", "-"), (*path, given)
            if key not in keys:
                near = nearest(key, keys)
                fix = f"did you mean {near}?" if near else f"one of {', '.join(keys)}"
                self.error(at, f"there is no key {quoted(given)} in {what}", fix, "recipe.unknown-key")
            if key in found:
                self.error(at, f"{key} is given twice, with - and with _", "leave one of them away")
            found[key] = self._checked(content, keys[key], key, at)
        return found

    def need(self, table: Mapping[str, Any], key: str, keys: Table, path: Path, what: str) -> Any:
        """The value of a key that must be there."""
        if key not in table:
            near = next((given for given in table if nearest(key, [given])), None)
            fix = f"{key} = {keys[key].example}" + (f" (did you mean it by {near}?)" if near else "")
            self.error(path, f"{what} has no {key}", f"add {fix}", "recipe.missing-key")
        return table[key]

    def _checked(self, value: Any, key: Key, name: str, path: Path) -> Any:
        if key.kind == "a size":
            return self._size(value, key, name, path)
        if not _FITS[key.kind](value):
            example = key.example or (f'"{key.choices[0]}"' if key.choices else "true")
            fix = f"write {name} = {example}" if name != "output" else f"write {example}"
            self.error(path, f"{name} is {_kind(value)}, not {key.kind}", fix, "recipe.type")
        if key.choices and value not in key.choices:
            near = nearest(value, key.choices)
            fix = f"did you mean {near}?" if near else f"one of {', '.join(key.choices)}"
            self.error(path, f"{name} is {quoted(value)}", fix, "recipe.value")
        if isinstance(value, str) and ("\0" in value or not value):
            self.error(path, f"{name} is {'empty' if not value else quoted(value)}", f"write {name} = {key.example}")
        if isinstance(value, float) and not math.isfinite(value):
            self.error(path, f"{name} is {value}", "give a finite number", "recipe.value")
        return value

    def _size(self, value: Any, key: Key, name: str, path: Path) -> int:
        if not isinstance(value, str | int) or isinstance(value, bool):
            self.error(path, f"{name} is {_kind(value)}, not a size", f"write {name} = {key.example}", "recipe.type")
        try:
            return parse_size(str(value))
        except LoramergeError as error:
            self.passed_on(path, error)


def nearest(word: str, known: Any) -> str | None:
    """The known word that is most like this one, if any is."""
    return next(iter(difflib.get_close_matches(str(word), list(known), 1)), None)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "a string": lambda v: isinstance(v, str),
    "an integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "a number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "a boolean": lambda v: isinstance(v, bool),
    "an array": lambda v: isinstance(v, list),
    "an array of strings": _strings,
    "an array of booleans": lambda v: isinstance(v, list) and all(isinstance(b, bool) for b in v),
    "a table": lambda v: isinstance(v, dict),
    "a string or a table": lambda v: isinstance(v, str | dict),
    "a table or an array of tables": lambda v: isinstance(v, dict | list),
}

_KINDS: Sequence[tuple[type, str]] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "an array"),
    (dict, "a table"),
)


def _kind(value: Any) -> str:
    return next((word for kind, word in _KINDS if isinstance(value, kind)), "a date or time")


def _dotted(path: Path) -> str:
    return ".".join(str(key) for key in path if isinstance(key, str))


def _not_toml(reason: str, text: str, name: str) -> InputError:
    """The parser's complaint, with the line first."""
    match = re.search(r"\s*\(at line (\d+), column (\d+)\)$", reason)
    if match is not None:
        line, reason = int(match[1]), f"{reason[: match.start()]}, column {match[2]}"
    else:
        line = text.count("\n") + 1
        reason = re.sub(r"\s*\(at end of document\)$", ", at the end of the document", reason)
    reason = reason[:1].lower() + reason[1:]
    message = f"line {line}: is not valid TOML: {reason}"
    return InputError("recipe.toml", message, fix="repair that line; strings stand in quotes", file=name)
