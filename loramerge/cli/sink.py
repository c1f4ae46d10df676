"""The one output sink: results to stdout, everything else to stderr, each in the mode that was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from loramerge.errors import LoramergeError, OutputError

SCHEMA = 1
LABEL = 10
"""Width of the labels of human lines."""

REDRAW_SECONDS = 0.1
LINE_SECONDS, LINE_SHARE, LINE_PAUSE = 10.0, 0.1, 1.0

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_STYLES = {"red": "31", "yellow": "33", "green": "32", "bold": "1"}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(text: object) -> str:
    """`text` as it is, but with every character escaped that a terminal might obey."""
    out = str(text)
    if out.isprintable():
        return out
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in out)


def size(nbytes: float) -> str:
    """Bytes for people, decimal as disks count: ``2_470_000_000`` -> ``"2.47 GB"``."""
    value, unit = _scaled(nbytes, nbytes)
    return f"{nbytes:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: ``"0.04 s"``, ``"2.1 s"``, ``"3 min 5 s"``, ``"2 h 4 min"``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(nbytes: float, largest: float) -> tuple[float, str]:
    """`nbytes` in the unit that suits `largest` once it is rounded to three digits (999 999 B are 1 MB)."""
    step = 0
    while step < len(_UNITS) - 1 and largest >= (999.5 if step else 1000):
        largest /= 1000
        step += 1
    return nbytes / 1000**step, _UNITS[step]


@dataclass
class Sink:
    """Where a command's output goes.

    Args:
        json: the result is one JSON document.
        quiet: the result is one value, and there are no warnings.
        verbose: how many `-v`.
        progress: whether progress may be shown.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    progress: bool = True
    _drawn: bool = field(default=False, init=False, repr=False)

    def say(self, label: str, text: str) -> None:
        """A line of the plan phase, for people."""
        if not (self.quiet or self.json):
            self._line(f"{label:<{LABEL}}{text}")

    def warn(self, text: str) -> None:
        """A warning; it names its remedy."""
        if not self.quiet:
            self._line(text, prefix=("warning:", "yellow"))

    def result(self, data: Mapping[str, Any], lines: Sequence[str], quiet: str) -> None:
        """The one result of a command.

        Args:
            data: what programs get (`--json`), beside `schema` and `ok`.
            lines: what people get.
            quiet: what `-q` gets.

        Raises:
            OutputError: ``output.stdout``: stdout cannot be written. A closed pipe stays a `BrokenPipeError`.
        """
        self._erase()
        if self.json:
            write_json({"schema": SCHEMA, "ok": True, **data})
        elif self.quiet:
            # A program reads it: the very bytes of the path. On a terminal they could do harm.
            _write_out((printable(quiet) if _is_tty(sys.stdout) else quiet) + "\n")
        else:
            _write_out("".join(f"{printable(line)}\n" for line in lines))

    def error(self, error: LoramergeError) -> None:
        """An error on two lines: what and where; the fix. Between them up to five names."""
        names = [name for name in error.tensors if not _mentions(error.message, name)]
        where = "" if error.file is None or _mentions(error.message, error.file) else error.file
        if len(names) == 1:
            where, names = f"{where}: {names[0]}" if where else names[0], []
        self._line(error.message + (f" ({where})" if where else ""), prefix=("error:", "red"))
        for name in names[:5]:
            self._line(f"       {name}")
        if len(names) > 5:
            self._line(f"       and {len(names) - 5} more")
        if error.fix:
            self._line(error.fix, prefix=("fix:  ", "bold"))

    def style(self, text: str, style: str) -> str:
        """`text` for stderr in a style (red, yellow, green, bold), where there are colours."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colour(sys.stderr) else text

    @contextlib.contextmanager
    def progress_bar(self, what: str) -> Iterator[Progress]:
        """Shows how far one long job is: a bar on a terminal, now and then a line elsewhere."""
        if self.progress and interactive(sys.stderr):
            bar = _Bar(self, what)
            try:
                yield bar.update
            finally:
                self._erase()
        elif self.progress and not (self.quiet or self.json):
            yield _Lines(self, what).update
        else:
            yield lambda done, total: None

    def table(
        self, rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, align: str | None = None
    ) -> list[str]:
        """Aligned lines of text, columns two spaces apart, nothing cut off.

        Args:
            rows: cells, every row of the same length.
            header: a first row.
            align: `l` or `r` by column; without it the first column is left-aligned, the others right.
        """
        cells = [[printable(c) for c in row] for row in ([header] if header else []) + list(rows)]
        if not cells:
            return []
        align = align or "l" + "r" * (len(cells[0]) - 1)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return [
            "  ".join(
                c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True)
            ).rstrip()
            for row in cells
        ]

    def _line(self, text: str, prefix: tuple[str, str] | None = None) -> None:
        self._erase()
        text = printable(text)
        _write_err(f"{self.style(*prefix)} {text}\n" if prefix else f"{text}\n")

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = False
            _write_err("\r\x1b[K")

    def _draw(self, text: str) -> None:
        self._drawn = True
        _write_err(f"\r{text}\x1b[K")


class _Rate:
    """How fast bytes go by, from the first call on: what came before it was planning."""

    def __init__(self) -> None:
        self.start = 0.0
        self.first: int | None = None

    def text(self, done: int, total: int) -> str:
        """``1.0/2.5 GB  1.2 GB/s  1 s left``."""
        if self.first is None:
            self.first, self.start = done, time.monotonic()
        unit = _scaled(total, total)[1]
        digits = ".0f" if unit == "B" else ".1f"
        text = f"{_scaled(done, total)[0]:{digits}}/{_scaled(total, total)[0]:{digits}} {unit}"
        passed = time.monotonic() - self.start
        if passed > 0.2 and done > self.first:
            rate = (done - self.first) / passed
            left = max(1, round((total - done) / rate)) if done < total else 0
            text += f"  {size(rate)}/s  {duration(left) if left > 9 else f'{left} s'} left"
        return text


class _Bar:
    """One line on a terminal, redrawn at most ten times a second."""

    def __init__(self, sink: Sink, what: str) -> None:
        self.sink, self.what = sink, what
        self.rate, self.next = _Rate(), 0.0

    def update(self, done: int, total: int) -> None:
        text = self.rate.text(done, total)
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + REDRAW_SECONDS
        share = min(1.0, done / total) if total else 1.0
        head, tail = f"{self.what} {int(share * 100):3d} % ", f" {text}"
        columns = _columns()
        room = min(30, columns - 1 - len(head) - len(tail))
        full, empty = ("█", "░") if unicode_ok(sys.stderr) else ("#", "-")
        bar = full * round(share * room) + empty * (room - round(share * room)) if room >= 5 else ""
        self.sink._draw((head + bar + tail)[: columns - 1])


class _Lines:
    """A plain line every ten seconds or ten percent, but at most one a second and none at the end."""

    def __init__(self, sink: Sink, what: str) -> None:
        self.sink, self.what = sink, what
        self.rate, self.last, self.share = _Rate(), time.monotonic(), 0.0

    def update(self, done: int, total: int) -> None:
        text = self.rate.text(done, total)
        share = min(1.0, done / total) if total else 1.0
        passed = time.monotonic() - self.last
        if done >= total or passed < LINE_PAUSE or (passed < LINE_SECONDS and share - self.share < LINE_SHARE):
            return
        self.last, self.share = time.monotonic(), share
        self.sink._line(f"{self.what} {int(share * 100)} %  {text}")


def interactive(stream: TextIO | None) -> bool:
    """Whether a line on the stream can be drawn over."""
    return _is_tty(stream) and os.environ.get("TERM") != "dumb" and not _set("CI")


def colour(stream: TextIO | None) -> bool:
    """Whether to write colours: `NO_COLOR` first, then `FORCE_COLOR`, then what the stream is."""
    if os.environ.get("NO_COLOR"):
        return False
    return _set("FORCE_COLOR") or interactive(stream)


def unicode_ok(stream: TextIO | None) -> bool:
    """Whether the stream takes more than ASCII."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def write_json(document: Mapping[str, Any]) -> None:
    """Writes a JSON document to stdout. ASCII only: nothing in it can be taken for a command to a terminal."""
    _write_out(json.dumps(document, indent=2 if _is_tty(sys.stdout) else None) + "\n")


def _mentions(message: str, name: str) -> bool:
    """Whether a message has a name in it already, as it is or quoted; as a whole, not as a part of a longer one."""
    return any(re.search(rf"(?<![\w./-]){re.escape(n)}(?![\w/-]|\.\w)", message) for n in (name, repr(name)) if name)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false")


def _is_tty(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _columns() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _write_out(text: str) -> None:
    # Flushed here, so that a full disk or a closed pipe is noticed while it can still be told.
    if sys.stdout is None:
        raise OutputError("output.stdout", "standard output is closed", fix="open it, or send it to /dev/null")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        message = f"standard output cannot be written: {error.strerror}"
        raise OutputError("output.stdout", message, fix="send it somewhere else") from None


def _write_err(text: str) -> None:
    # Nobody can be told that stderr is closed or full; a closed pipe ends the run as it ends any other program.
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass
