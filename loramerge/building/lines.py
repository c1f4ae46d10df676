"""On which line of a TOML document each key stands: what the parser of the standard library does not tell."""

from __future__ import annotations

import re
from collections.abc import Iterator

Path = tuple[str | int, ...]
"""Keys from the outside in; the elements of an array by their numbers."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\", "e": "\x1b"}
_SCALAR_ENDS = ",]}#\n"


def lines_of(text: str) -> dict[Path, int]:
    """The line (from 1) of every key, table header and array element of a document that `tomllib` has accepted."""
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.document()
    return scanner.found


def line_of(found: dict[Path, int], path: Path) -> int:
    """The line of a key; where it has none, that of the nearest thing around it."""
    while path and path not in found:
        path = path[:-1]
    return found.get(path, 1)


class _Scanner:
    """Walks once over the text. The text is valid, so that nothing is checked."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}  # of arrays of tables
        self._seen, self._line = 0, 1

    def document(self) -> None:
        """All statements."""
        table: Path = ()
        while self._skip():
            if self._take("[["):
                table = self._header("]]", many=True)
            elif self._take("["):
                table = self._header("]", many=False)
            else:
                self._statement(table)

    # ------------------------------------------------------------------------------------------------ inside

    def _here(self) -> int:
        self._line += self.text.count("\n", self._seen, self.at)
        self._seen = self.at
        return self._line

    def _skip(self) -> bool:
        """Over blanks, line ends and comments; whether anything is left."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text[self.at].isspace():
                self.at += 1
            else:
                return True
        return False

    def _take(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def _header(self, close: str, many: bool) -> Path:
        line, keys = self._here(), list(self._keys())
        self._take(close)
        path: Path = ()
        for number, key in enumerate(keys):
            path = (*path, key)
            last = number == len(keys) - 1
            if last and many:
                self._counts[path] = self._counts.get(path, 0) + 1
            self.found.setdefault(path, line)
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
                self.found.setdefault(path, line)
        return path

    def _statement(self, table: Path) -> None:
        line, path = self._here(), table
        for key in self._keys():
            path = (*path, key)
            self.found.setdefault(path, line)
        self._skip()
        self._take("=")
        self._skip()
        self._value(path)

    def _keys(self) -> Iterator[str]:
        """A dotted key."""
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                yield self._string()
            else:
                match = _BARE.match(self.text, self.at)
                if match is None:
                    self.at += 1  # not reached in a valid document
                    return
                self.at = match.end()
                yield match[0]
            self._skip()
            if not self._take("."):
                return

    def _value(self, path: Path) -> None:
        if self._take("["):
            number = 0
            while self._skip() and not self._take("]"):
                self.found.setdefault((*path, number), self._here())
                self._value((*path, number))
                number += 1
                self._skip()
                self._take(",")
        elif self._take("{"):
            while self._skip() and not self._take("}"):
                self._statement(path)
                self._skip()
                self._take(",")
        elif self.text[self.at] in "\"'":
            self._string()
        else:
            while self.at < len(self.text) and self.text[self.at] not in _SCALAR_ENDS:
                self.at += 1

    def _string(self) -> str:
        quote = self.text[self.at]
        if self._take(quote * 3):
            body = self._until(quote * 3, escapes=quote == '"')
            while self._take(quote):  # up to two quotes may stand right before the end
                body += quote
            return body
        self.at += 1
        body = self._until(quote, escapes=quote == '"')
        return _ESCAPE.sub(_unescaped, body) if quote == '"' else body

    def _until(self, close: str, escapes: bool) -> str:
        start = self.at
        while self.at < len(self.text) and not self.text.startswith(close, self.at):
            self.at += 2 if escapes and self.text[self.at] == "\\" else 1
        body = self.text[start : self.at]
        self.at += len(close)
        return body


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else _ESCAPES.get(match[3], match[3])
