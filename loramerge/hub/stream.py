"""A file on the Hub as a source of bytes that lets nothing pass unchecked: one stream in order, ranges beside it."""

from __future__ import annotations

import threading
from collections import deque

import xxhash

from loramerge.errors import InputError, LoramergeError, RemoteError
from loramerge.hub.client import RemoteReader, Stopped
from loramerge.hub.convoy import CHUNK, Convoy
from loramerge.hub.digest import Digest
from loramerge.hub.reference import RemoteFile, Resolved

HEAD = 256 << 10
"""Bytes that are fetched first: most headers are shorter."""

AHEAD = 24 << 20
"""How far a stream runs ahead of what was asked for."""

AT_ONCE = 16 << 20
"""Bytes of a range that is fetched beside the stream, at most."""

FAR = 96 << 20
"""Who reads further ahead than this gets the range by itself, at first."""


class RemoteSource:
    """A file of a commit on the Hub. Thread safe.

    What is read near the beginning comes from a first range. The first read beyond it begins one stream through the
    whole file, in order; a window of it stays in memory, and readers wait for their bytes. What the window does not
    hold any more, or lies far ahead, is fetched as a range of its own. Every piece of the stream is digested (XXH3),
    and every range is made of whole pieces, whose digests must be those of the stream. At the end the SHA-256 of the
    stream (for files in git: their id) must be what the Hub says: `check_unchanged` waits for that. So no byte that
    anybody read is other than the Hub's.

    Args:
        resolved, file: which file.
        token: as for `resolve`.
        name: what messages call it.
        convoy: the streams of the same checkpoint.
    """

    def __init__(self, resolved: Resolved, file: RemoteFile, token: str | None, name: str, convoy: Convoy) -> None:
        self.name, self.size = name, file.size
        self.window_bytes = convoy.window
        self.abreast = convoy.abreast
        self._reader = RemoteReader(resolved, file, token, name)
        self._file = file
        self._convoy = convoy
        self._head = b""
        self._changed = threading.Condition()
        self.begun = False
        self._head_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._position = 0  # of the stream: all before it has been digested
        self._wanted = 0  # up to here somebody has asked
        self._chunks: deque[tuple[int, bytearray, int]] = deque()  # begin, bytes, length
        self._digests: dict[int, bytes] = {}  # of whole pieces, by number: of the stream
        self._claims: dict[int, bytes] = {}  # of ranges that the stream has not come to yet
        self._far = 0
        self._drain = False
        self._ended = False
        self._error: BaseException | None = None
        convoy.add(self)

    # ----------------------------------------------------------------------------------------------- reading

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        if (head := self.read_head(offset, length)) is not None:
            return head
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_head(self, offset: int, length: int) -> bytes | None:
        """Bytes of the header, or of what was fetched with it; None where the stream would have to begin.

        What begins there is taken for a header: it is fetched as long as it says it is.
        """
        self._check_range(offset, length)
        if not self.begun and offset < max(HEAD, len(self._head)):
            self._head_to(offset + length)
        return self._head[offset : offset + length] if offset + length <= len(self._head) else None

    @property
    def head(self) -> bytes:
        """What was fetched of the beginning."""
        return self._head

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole of `buffer` from `offset` on, waiting until the bytes are there.

        Raises:
            InputError: ``input.truncated`` beyond the end; RemoteError: ``hub.*``.
        """
        target = buffer.cast("B")
        end = offset + len(target)
        self._check_range(offset, len(target))
        if end <= len(self._head):
            target[:] = self._head[offset:end]
            return
        if not self.begun:
            self._head_to(HEAD)
            if end <= len(self._head):
                target[:] = self._head[offset:end]
                return
            self._convoy.start(self)
        while offset < end:
            got = self._from_window(offset, target)
            if not got:
                begin = offset // CHUNK * CHUNK
                pieces = self._pieces(begin, min(self.size, -(-end // CHUNK) * CHUNK, begin + AT_ONCE))
                part = memoryview(pieces)[offset - begin : end - begin]
                got = len(part)
                target[:got] = part
            target = target[got:]
            offset += got

    def check_unchanged(self) -> None:
        """Waits for the end of the stream, and raises unless its SHA-256 is the one that the Hub has for the file.

        Raises:
            RemoteError: ``hub.digest``, or what ended the stream.
        """
        if not self.begun:
            if len(self._head) == self.size:
                self._check_head()
            return  # nothing but its header was read
        with self._changed:
            self._drain = True
            self._changed.notify_all()
            while not self._ended:
                self._changed.wait(1.0)
        self._raise()

    def cancel(self) -> None:
        """Ends the stream and everybody's waiting for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.cancel()

    def close(self) -> None:
        """Ends the stream. Safe to call twice."""
        self.cancel()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(0.2)  # it may wait for an answer; it ends by itself, and does nothing any more
        self._chunks.clear()

    def __repr__(self) -> str:
        return f"RemoteSource({self.name!r}, size={self.size})"

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            message = f"bytes {offset} to {offset + max(length, 0)} are asked for, the file has {self.size}"
            raise InputError("input.truncated", message, fix="it is damaged on the Hub: tell its owner", file=self.name)

    def fetch_head(self) -> None:
        """Fetches the beginning of the file, which holds its header."""
        self._head_to(HEAD)

    def _head_to(self, end: int) -> None:
        """Fetches the first bytes of the file, at least up to `end`, unless the stream has begun."""
        end = min(self.size, max(end, HEAD))
        with self._head_lock:
            if not self.begun and len(self._head) < end:
                more = bytes(self._unstopped(len(self._head), end))
                with self._changed:
                    if not self.begun:
                        self._head += more

    def _check_head(self) -> None:
        digest = Digest(self._file)
        digest.update(memoryview(self._head))
        if (wrong := digest.differs()) is not None:
            raise self._wrong(wrong)

    def _unstopped(self, begin: int, end: int) -> bytearray:
        try:
            return self._reader.read(begin, end)
        except Stopped:
            raise self._stopped() from None

    def _from_window(self, offset: int, target: memoryview) -> int:
        """Copies what the window has from `offset` on, and waits where it will have it. 0: it never will."""
        end = offset + len(target)
        with self._changed:
            if offset >= self._position + FAR and not self._ended:
                self._far += 1
                if self._far < 3:
                    return 0
            else:
                self._far = 0
            if end > self._wanted:
                self._wanted = end
                self._changed.notify_all()
            while True:
                if self._closed:
                    raise self._stopped()
                if offset < len(self._head):
                    got = min(end, len(self._head)) - offset
                    target[:got] = self._head[offset : offset + got]
                    return got
                for begin, chunk, length in self._chunks:
                    if begin <= offset < begin + length:
                        got = min(end, begin + length) - offset
                        target[:got] = memoryview(chunk)[offset - begin : offset - begin + got]
                        return got
                if offset < self._position or self._ended:
                    self._raise()
                    return 0
                self._changed.wait(1.0)

    def _pieces(self, begin: int, end: int) -> bytearray:
        """Whole pieces, fetched as a range of their own, and checked against the stream as soon as that can be."""
        pieces = self._unstopped(begin, end)
        view = memoryview(pieces)
        for at in range(0, len(view), CHUNK):
            digest = xxhash.xxh3_128(view[at : at + CHUNK]).digest()
            number = (begin + at) // CHUNK
            with self._changed:
                known = self._digests.get(number) or self._claims.setdefault(number, digest)
            if known != digest:
                raise self._wrong("two readings of the same bytes differ")
        return pieces

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _stopped(self) -> LoramergeError:
        return LoramergeError("interrupted", "the stream was stopped", file=self.name)

    def _wrong(self, why: str) -> RemoteError:
        fix = "run it again; if that does not help, the file is damaged on the Hub"
        return RemoteError("hub.digest", f"is not the file that the Hub lists: {why}", fix=fix, file=self.name)

    # ----------------------------------------------------------------------------------------------- the stream

    @property
    def busy(self) -> bool:
        """Whether its stream runs, or holds bytes that nobody has asked for yet."""
        return self.begun and not (self._ended and self._wanted >= self._position)

    @property
    def kept(self) -> int:
        """Bytes in memory."""
        return CHUNK * len(self._chunks)

    def begin_stream(self) -> bool:
        """Marks the stream as begun; False if it was already. Called under the convoy's lock."""
        with self._changed:
            if self.begun or self._closed:
                return False
            self.begun = True
            return True

    def let_go(self, nbytes: int) -> list[bytearray]:
        """Gives up pieces that were asked for, the first ones first, until `nbytes` are free."""
        gone: list[bytearray] = []
        with self._changed:
            passed = self._position if self._drain else self._wanted
            while self._chunks and len(gone) * CHUNK < nbytes:
                begin, _, length = self._chunks[0]
                if begin + length > passed:
                    break
                gone.append(self._chunks.popleft()[1])
        return gone

    def run_stream(self) -> None:
        """Starts the thread that reads the stream."""
        self._thread = threading.Thread(target=self._stream, name=f"stream {self._file.name}", daemon=True)
        self._thread.start()

    def _stream(self) -> None:
        try:
            self._read_all()
        except Stopped:
            self._fail(self._stopped())
        except BaseException as error:  # handed to whoever reads
            self._fail(error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._convoy.go_on()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error

    def _read_all(self) -> None:
        digest = Digest(self._file)
        filling = _Filling(self, digest)
        filling.add(self._head)
        for piece in self._reader.all(len(self._head)):
            filling.add(piece)
        filling.finish()
        if (wrong := digest.differs()) is not None:
            raise self._wrong(wrong)

    def keep(self, begin: int, chunk: bytearray, length: int, digest: bytes) -> None:
        """A piece of the stream is complete. Waits until there is room for the next one."""
        number = begin // CHUNK
        with self._changed:
            self._digests[number] = digest
            claimed = self._claims.pop(number, digest)
            self._chunks.append((begin, chunk, length))
            self._position = begin + length
            self._changed.notify_all()
        if claimed != digest:
            raise self._wrong("two readings of the same bytes differ")
        self._convoy.trim()
        with self._changed:
            while not (self._closed or self._drain or self._position < self._wanted + AHEAD):
                self._changed.wait(1.0)
            if self._closed:
                raise Stopped

    def buffer(self) -> bytearray:
        """Memory for the next piece."""
        return self._convoy.buffer()


class _Filling:
    """Cuts a stream into pieces of one size."""

    def __init__(self, source: RemoteSource, digest: Digest) -> None:
        self._source, self._digest = source, digest
        self._begin = self._length = 0
        self._chunk = source.buffer()

    def add(self, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            count = min(len(rest), CHUNK - self._length)
            self._chunk[self._length : self._length + count] = rest[:count]
            self._length += count
            rest = rest[count:]
            if self._length == CHUNK:
                self._pass_on()

    def finish(self) -> None:
        """The last piece, which may be shorter."""
        if self._length:
            self._pass_on()

    def _pass_on(self) -> None:
        view = memoryview(self._chunk)[: self._length]
        self._digest.update(view)
        begin, self._begin = self._begin, self._begin + self._length
        chunk, length = self._chunk, self._length
        self._source.keep(begin, chunk, length, xxhash.xxh3_128(view).digest())
        self._chunk, self._length = self._source.buffer(), 0
