"""Text from files as Markdown that shows it and obeys none of it."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """One line, without what a terminal or a page might obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*{}\[\]<>#|~&])", r"\\\1", printable(text))


def code(text: str) -> str:
    """A name as code, in a table too."""
    return "`" + printable(text).replace("`", "'").replace("|", "/") + "`"


def block(line: str) -> list[str]:
    """A command, to be copied."""
    return ["```sh", printable(line).replace("```", "'''"), "```", ""]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """A table."""
    marks = ["--:" if a == "r" else ":--" for a in align.ljust(len(head), "l")]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
