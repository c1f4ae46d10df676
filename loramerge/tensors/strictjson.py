"""JSON from files that are not trusted: the standard and nothing more, every failure one InputError."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from loramerge.errors import InputError
from loramerge.tensors.text import quoted

MAX_BYTES = 16 * 1024 * 1024
MAX_DIGITS = 64  # configs do hold integers beyond 2**64 (model_max_length is 10**30), but none of these

_SHORT = 1_000_000
_BOM = b"\xef\xbb\xbf"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Raised inside the parser's hooks; never leaves this module."""


def loads(
    data: bytes,
    *,
    where: str,
    code: str,
    max_depth: int = 64,
    max_bytes: int = MAX_BYTES,
    allow_bom: bool = True,
) -> Any:
    """Parse UTF-8 JSON strictly.

    Beyond the standard library's parser it refuses duplicate keys, NaN and Infinity (also as ``1e999``),
    lone surrogates, integers of more than 64 digits and nesting below `max_depth`. ``-0`` is a float here,
    as it is for other JSON parsers, so that it is never taken for an integer.

    Args:
        data: the bytes of the document.
        where: the file, as the user typed it.
        code: the code of the error raised for anything wrong.
        max_depth: deepest nesting of arrays and objects allowed.
        max_bytes: longest document allowed.
        allow_bom: whether a UTF-8 byte-order mark may come first.

    Raises:
        InputError: with `code`, the reason, and line and column where the parser knows them.
    """

    def refuse(reason: str) -> InputError:
        return InputError(code, f"is not valid JSON: {reason}", fix="repair or download the file again", file=where)

    if len(data) > max_bytes:
        raise refuse(f"{len(data)} bytes, more than the {max_bytes} allowed here")
    if allow_bom and data.startswith(_BOM):
        data = data[len(_BOM) :]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise refuse(f"not UTF-8 at line {line}, byte {column}") from None
    try:
        # A Python call for each integer is dear in the header of a huge checkpoint. Without it the parser's
        # own limit on digits holds, and the header's reader has a tighter one.
        parse_int = _integer if len(text) <= _SHORT or "-0" in text else None
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=parse_int,
        )
        if _depth_exceeds(value, max_depth):
            raise _Refused(f"nested more than {max_depth} deep")
        if "\\u" in text and _SURROGATE_ESCAPE.search(text):
            _check_surrogates(value)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise refuse(reason[:1].lower() + reason[1:]) from None
    except _Refused as error:
        raise refuse(str(error)) from None
    except RecursionError:
        raise refuse(f"nested more than {max_depth} deep") from None
    except MemoryError:
        raise refuse("too large for this machine's memory") from None
    except ValueError as error:
        raise refuse(quoted(error)) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"duplicate key {quoted(key)}")
            seen.add(key)
    return result


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"number out of range: {quoted(text, 40)}")
    return value


def _integer(text: str) -> int | float:
    if len(text) > MAX_DIGITS + 1:
        raise _Refused(f"integer of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        if not level:
            return False
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
    return bool(level)


def _check_surrogates(value: Any) -> None:
    todo = [value]
    while todo:
        item = todo.pop()
        if type(item) is str:
            if any("\ud800" <= char <= "\udfff" for char in item):
                raise _Refused(f"lone surrogate in {quoted(item)}")
        elif type(item) is dict:
            todo.extend(item)
            todo.extend(item.values())
        elif type(item) is list:
            todo.extend(item)
