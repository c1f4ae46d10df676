"""Streams of the files of one checkpoint: which run at a time, and how much of them is kept in memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loramerge.hub.stream import RemoteSource

CHUNK = 2 << 20
"""Bytes of one piece of the window, and of one digest."""

WINDOW = 160 << 20
"""Bytes that the streams of one checkpoint keep in memory together."""

ABREAST = 3
"""Streams of one checkpoint at a time."""


class Convoy:
    """The streams of the files of one checkpoint: a few at a time, within one amount of memory.

    Files are read one after the other, or a few side by side. The stream of the next file is begun when one before it
    has been read to its end, so that its first bytes are there when they are asked for.
    """

    def __init__(self, window: int | None = None, abreast: int | None = None) -> None:
        self.window = WINDOW if window is None else window
        self.abreast = ABREAST if abreast is None else abreast
        self._lock = threading.Lock()
        self._sources: list[RemoteSource] = []
        self._free: list[bytearray] = []

    def add(self, source: RemoteSource) -> None:
        """A file of the checkpoint, in the order in which they are read."""
        with self._lock:
            self._sources.append(source)

    def start(self, source: RemoteSource) -> None:
        """Begins the stream of a file that is read now."""
        self._begin([source])
        self.go_on()

    def go_on(self) -> None:
        """Begins the streams of the next files, as many as may run side by side."""
        with self._lock:
            sources = list(self._sources)
        begun = [i for i, s in enumerate(sources) if s.begun]
        room = self.abreast - sum(1 for i in begun if sources[i].busy)
        if begun and room > 0:
            self._begin([s for s in sources[begun[-1] + 1 :]][:room])

    def _begin(self, sources: list[RemoteSource]) -> None:
        with self._lock:
            fresh = [s for s in sources if s.begin_stream()]
        for source in fresh:
            source.run_stream()

    def trim(self) -> None:
        """Lets go of what was read longest ago, where all streams together keep more than they may."""
        with self._lock:
            sources = list(self._sources)
            over = sum(s.kept for s in sources) - self.window
            for source in sources:
                if over <= 0:
                    break
                gone = source.let_go(over)
                over -= CHUNK * len(gone)
                self._free += gone[: 4 - len(self._free)]

    def buffer(self) -> bytearray:
        """Memory for one piece."""
        with self._lock:
            return self._free.pop() if self._free else bytearray(CHUNK)
