"""Names that come from files, made safe to print."""

from __future__ import annotations

from collections.abc import Sequence


def quoted(name: object, limit: int = 120) -> str:
    """`name` in quotes, shortened, with every character escaped that a terminal might obey.

    Control characters, bidirectional overrides and lone surrogates become ``\\x1b``, ``\\u202e`` and so on.
    """
    text = str(name)
    if len(text) > limit:
        text = f"{text[: limit - 20]}...{text[-17:]}"
    return repr(text)


def some(names: Sequence[str], limit: int = 5) -> str:
    """Up to `limit` quoted names in one line, and how many more there are."""
    line = ", ".join(quoted(name) for name in names[:limit])
    return f"{line} and {len(names) - limit} more" if len(names) > limit else line


def plural(count: int, noun: str) -> str:
    """``plural(1, "tensor")`` -> ``"1 tensor"``, ``plural(2, "tensor")`` -> ``"2 tensors"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
