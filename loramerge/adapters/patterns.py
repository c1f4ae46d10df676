"""Rank and alpha patterns: regular expressions from a file, matched against module names, safely."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loramerge.errors import InputError, UnsafeError

# Where CPython keeps the parser of `re` since 3.11; it describes a pattern without running it.
_parse = re._parser.parse  # type: ignore[attr-defined]

MAX_PATTERN = 1000
MAX_NAME = 1000
MAX_REPEATS = 3


class Patterns:
    """An ordered table of patterns, as PEFT keeps them in `rank_pattern` and `alpha_pattern`.

    A name takes the value of the *first* key, in file order, with `re.match(r"(.*\\.)?(KEY)$", name)`
    (peft 0.21.2, utils/other.py, get_pattern_key).

    Raises:
        InputError: `adapter.config` for a key that is no regular expression.
        UnsafeError: `adapter.pattern` for one that could backtrack without end.
    """

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._rows = [(key, _compile(key, where), value) for key, value in table.items()]
        self.used: set[str] = set()
        self.overlaps: dict[str, tuple[str, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def lookup(self, name: str) -> Any | None:
        """The value for a module name, or None. Remembers which keys were used and which overlapped."""
        if not self._rows:
            return None
        if len(name) > MAX_NAME:
            raise UnsafeError("adapter.pattern", f"a module name of {len(name)} characters", file=self.where)
        hits = [(key, value) for key, regex, value in self._rows if regex.match(name)]
        self.used.update(key for key, _ in hits)
        if len({value for _, value in hits}) > 1:
            self.overlaps[name] = tuple(key for key, _ in hits)
        return hits[0][1] if hits else None

    def unused(self) -> list[str]:
        """Keys that have matched no name so far."""
        return [key for key, _, _ in self._rows if key not in self.used]


def _compile(key: str, where: str) -> re.Pattern[str]:
    if len(key) > MAX_PATTERN:
        raise UnsafeError("adapter.pattern", f"a pattern of {len(key)} characters", file=where)
    try:
        repeats = _count_repeats(_parse(key))
        regex = re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError("adapter.config", f"{key!r} is no regular expression: {error}", file=where) from None
    if repeats > MAX_REPEATS:
        raise UnsafeError(
            "adapter.pattern",
            f"the pattern {key!r} could take unbounded time to match",
            fix="write it without nested or repeated `*` and `+`",
            file=where,
        )
    return regex


def _count_repeats(parsed: Any, inside: bool = False) -> int:
    """How many unbounded repeats a pattern holds; a repeat within a repeat counts as too many."""
    total = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            unbounded = most > 20
            if unbounded and (inside or any(str(op) in ("BRANCH", "SUBPATTERN") for op, _ in body)):
                return MAX_REPEATS + 1
            total += unbounded + _count_repeats(body, inside or most > 1)
        elif name == "SUBPATTERN":
            total += _count_repeats(argument[-1], inside)
        elif name == "BRANCH":
            total += sum(_count_repeats(branch, inside) for branch in argument[1])
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ASSERT", "ASSERT_NOT"):
            return MAX_REPEATS + 1
    return total
