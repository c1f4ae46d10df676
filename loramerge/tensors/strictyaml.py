"""YAML from files that are not trusted: plain mappings, lists and scalars, every failure one InputError."""

from __future__ import annotations

import re
from typing import Any

from loramerge.errors import InputError
from loramerge.tensors.strictjson import MAX_DIGITS
from loramerge.tensors.text import quoted

MAX_BYTES = 1024 * 1024
MAX_VALUES = 100_000
"""Most values of a document, those of an alias counted wherever it stands: what a bomb of aliases runs into."""

_PREFIX = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a string for YAML 1.1, which wants a dot and a sign


class _Refused(ValueError):
    """Raised while the document is built; never leaves this module."""


def loads(raw: bytes, *, where: str, code: str, max_depth: int = 64, max_bytes: int = MAX_BYTES) -> Any:
    """Parse one UTF-8 YAML document of plain data.

    Scalars are what PyYAML's safe loader makes of them (YAML 1.1), except that dates stay text and that `1e-5` is a
    number. Refused are tags, merge keys, duplicate keys, keys that are no scalars, a second document, nesting below
    `max_depth` and more than `MAX_VALUES` values.

    Args:
        raw: the bytes of the document.
        where: the file, as the user typed it.
        code: the code of the error raised for anything wrong.

    Raises:
        InputError: with `code`, the reason, and line and column where the parser knows them.
    """
    import yaml  # type: ignore[import-untyped]

    def refuse(reason: str) -> InputError:
        return InputError(code, f"is not YAML that can be read: {reason}", fix="repair the file", file=where)

    if len(raw) > max_bytes:
        raise refuse(f"{len(raw)} bytes, more than the {max_bytes} allowed here")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"not UTF-8 at byte {error.start}") from None
    try:
        _check_events(yaml, text, max_depth)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Builder(yaml, max_depth).value(node, 0)
    except _Refused as error:
        raise refuse(str(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise refuse(f"{quoted(error.problem)}{place}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise refuse(quoted(str(error).splitlines()[0] if str(error) else type(error).__name__)) from None
    except (RecursionError, MemoryError):
        raise refuse("nested too deep or too large") from None


def _check_events(yaml: Any, text: str, max_depth: int) -> None:
    """Depth and tags, before anything is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"a tag {quoted(event.tag)} at line {event.start_mark.line + 1}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > max_depth:
            raise _Refused(f"nested more than {max_depth} deep")
        if count > 2 * MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values")


class _Builder:
    """Makes values of nodes. An alias is the node that it names, and is built again wherever it stands."""

    def __init__(self, yaml: Any, max_depth: int) -> None:
        self._constructor = yaml.SafeLoader("")
        self._yaml = yaml
        self._max_depth = max_depth
        self._left = MAX_VALUES

    def value(self, node: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Refused(f"more than {MAX_VALUES} values, its aliases counted")
        if depth > self._max_depth:
            raise _Refused(f"nested more than {self._max_depth} deep")
        if isinstance(node, self._yaml.SequenceNode):
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, self._yaml.MappingNode):
            return self._mapping(node, depth)
        return self._scalar(node)

    def _mapping(self, node: Any, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, self._yaml.ScalarNode):
                raise _Refused(f"a key that is no scalar at line {line}")
            if key.tag == f"{_PREFIX}merge":
                raise _Refused(f"a merge key at line {line}")
            name = str(key.value)
            if name in found:
                raise _Refused(f"duplicate key {quoted(name)} at line {line}")
            found[_text(name)] = self.value(value, depth + 1)
        return found

    def _scalar(self, node: Any) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        if kind == "int":
            if len(text) > MAX_DIGITS:
                raise _Refused(f"an integer of {len(text)} characters")
            return self._constructor.construct_yaml_int(node)
        if kind == "float":
            return self._constructor.construct_yaml_float(node)
        if kind == "bool":
            return self._constructor.construct_yaml_bool(node)
        if kind == "null":
            return None
        if node.style is None and _NUMBER.fullmatch(text):
            return float(text)
        return _text(text)


def _text(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise _Refused(f"lone surrogate in {quoted(text)}")
    return text
