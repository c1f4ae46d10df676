"""Ranges of a file on the Hub over HTTP: redirects without the token, retries, and every answer checked."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from loramerge.errors import LoramergeError, RemoteError
from loramerge.hub import crew, problems
from loramerge.hub.reference import RemoteFile, Resolved
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

ATTEMPTS = 6
"""How often a request is made, or a broken stream taken up again without a byte in between, before giving up."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 20.0
MAX_REDIRECTS = 5
RETRIED = (408, 425, 429, 500, 502, 503, 504)

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Stopped(Exception):
    """The stream was cancelled from another thread."""


class Broken(Exception):
    """A connection ended too early, or an answer was not the range that was asked for: take it up again."""


@dataclass
class Body:
    """An answer that is being read: bytes of a file from `begin` on."""

    begin: int
    response: Any
    skip: int = 0
    whole: bool = False
    """The server does not know ranges and sends the whole file: what came before is read and left."""

    def pieces(self) -> Iterator[bytes]:
        """The bytes from `begin` on, in pieces as they come."""
        from huggingface_hub.utils import httpx

        skip = self.skip
        try:
            for piece in self.response.iter_raw():
                if skip:
                    skip, piece = max(0, skip - len(piece)), piece[skip:]
                if piece:
                    yield piece
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise Broken(type(error).__name__) from error

    def abort(self) -> None:
        """Ends the connection, while another thread waits for bytes of it."""
        with contextlib.suppress(Exception):
            stream = self.response.extensions.get("network_stream")
            raw = None if stream is None else stream.get_extra_info("socket")
            if raw is not None:
                raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the connection back, or ends it where it was not read to the end."""
        with contextlib.suppress(Exception):
            self.response.close()


class RemoteReader:
    """Reads ranges of one file of a commit. Thread safe.

    The Hub answers with a link to another host, signed for a time. It is kept, and asked for again when it has
    expired. The token goes to the Hub's own host only.

    Args:
        resolved: the repository and its commit.
        file: which of its files.
        token: as for `resolve`.
        name: what messages call the file.
    """

    def __init__(self, resolved: Resolved, file: RemoteFile, token: str | None, name: str) -> None:
        self.resolved, self.file, self.name = resolved, file, name
        self._token = token
        self._link: str | None = None
        self._current: Body | None = None
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def open(self, begin: int, end: int | None = None) -> Body:
        """An answer with the bytes from `begin` to `end` (None: to the end), after as many attempts as it takes.

        Raises:
            RemoteError: ``hub.*``; Stopped: the reader was stopped.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._open(begin, end)
            except _Later as later:
                if attempt + 1 == ATTEMPTS:
                    raise later.error from None
                self.pause(attempt, later.after)
        raise AssertionError

    def read(self, begin: int, end: int) -> bytearray:
        """The bytes from `begin` to `end`, taken up again where the connection broke.

        Raises:
            RemoteError: as `open`; ``hub.broken``.
        """
        out = bytearray()
        failures = 0
        while len(out) < end - begin:
            body = self.open(begin + len(out), end)
            before = len(out)
            try:
                for piece in body.pieces():
                    out += piece[: end - begin - len(out)]
                    if body.whole and len(out) == end - begin:
                        break
            except Broken:
                pass
            finally:
                body.close()
            failures = 0 if len(out) > before else failures + 1
            if len(out) < end - begin:
                self.broke(failures)
        return out

    def all(self, begin: int = 0) -> Iterator[bytes]:
        """The bytes from `begin` to the end of the file, in pieces as they come: one stream, taken up again where it
        broke.

        Raises:
            RemoteError: as `open`; ``hub.broken``. Stopped.
        """
        position, failures = begin, 0
        while position < self.file.size:
            body = self.open(position)
            self._current = body
            before = position
            try:
                for piece in body.pieces():
                    if self.stop.is_set():
                        raise Stopped
                    piece = piece[: self.file.size - position]
                    position += len(piece)
                    yield piece
                    if position == self.file.size:
                        break
            except Broken:
                if self.stop.is_set():
                    raise Stopped from None
            finally:
                self._current = None
                body.close()
            failures = 0 if position > before else failures + 1
            if position < self.file.size:
                self.broke(failures)

    def cancel(self) -> None:
        """Ends the stream of `all`, also while another thread waits for bytes of it."""
        self.stop.set()
        body = self._current
        if body is not None:
            body.abort()

    def broke(self, failures: int) -> None:
        """Waits before a broken stream is taken up again; `failures`: how often that gave no byte.

        Raises:
            RemoteError: ``hub.broken``: too often. Stopped.
        """
        if failures >= ATTEMPTS:
            message = f"the connection broke {ATTEMPTS} times without a byte in between"
            raise RemoteError("hub.broken", message, fix="run it again when the network is better", file=self.name)
        self.pause(failures, None)

    def pause(self, attempt: int, after: float | None) -> None:
        """Sleeps, longer every time, or as long as the server wishes; wakes up when the reader is stopped."""
        seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (0.75 + random.random() / 2)
        if self.stop.wait(max(seconds, min(after or 0.0, 60.0))):
            raise Stopped

    # ----------------------------------------------------------------------------------------------- one attempt

    def _open(self, begin: int, end: int | None) -> Body:
        if self.stop.is_set():
            raise Stopped
        with self._lock:
            link = self._link
        if link is not None:
            response = self._get(link, begin, end, with_token=False)
            if response.status_code not in (400, 401, 403, 404, 410):
                return self._checked(response, begin, end)
            response.close()  # the signature has expired
            with self._lock:
                self._link = None if self._link == link else self._link
        return self._resolve(begin, end)

    def _resolve(self, begin: int, end: int | None) -> Body:
        """Asks the Hub, follows where it points to."""
        from huggingface_hub import constants

        home = constants.ENDPOINT.rstrip("/")
        url = f"{home}/{self.resolved.repo}/resolve/{self.resolved.commit}/{quote(self.file.name)}"
        trusted = True
        for _ in range(MAX_REDIRECTS):
            response = self._get(url, begin, end, with_token=trusted)
            if trusted:
                self._check_promises(response)
            if response.status_code not in (301, 302, 303, 307, 308):
                break
            target = _joined(url, response.headers.get("Location", ""))
            response.close()
            if url.startswith("https://") and not target.startswith("https://"):
                message = "the Hub redirects to an address that is not encrypted"
                raise RemoteError("hub.redirect", message, fix="check HF_ENDPOINT and the proxy", file=self.name)
            trusted = trusted and _origin(target) == _origin(home)
            url = target
        else:
            raise RemoteError("hub.redirect", f"more than {MAX_REDIRECTS} redirects", file=self.name)
        body = self._checked(response, begin, end, trusted)
        if not trusted:
            with self._lock:
                self._link = url
        return body

    def _get(self, url: str, begin: int, end: int | None, *, with_token: bool) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        token: str | bool | None = self._token if with_token else False
        headers = build_hf_headers(token=token, library_name="loramerge")
        headers["Accept-Encoding"] = "identity"
        headers["Range"] = f"bytes={begin}-" if end is None else f"bytes={begin}-{end - 1}"
        client = get_session()
        wait = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request = client.build_request("GET", url, headers=headers, timeout=wait)
        try:
            # In a thread of its own: nothing else ends the wait for an answer when a user wishes to stop.
            response = crew.waited_for(
                lambda: client.send(request, stream=True, follow_redirects=False), self.stop, lambda late: late.close()
            )
        except Exception as error:
            if problems.is_network(error):
                raise _Later(problems.unreachable(error, self.name)) from error
            raise problems.problem(error, self.name, repo=self.resolved.repo) or error from None
        if response is None:
            raise Stopped
        return response

    def _check_promises(self, response: Any) -> None:
        """What the Hub says of the file is what it said when the reference was resolved."""
        commit = response.headers.get("X-Repo-Commit")
        etag = (response.headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"')
        size = response.headers.get("X-Linked-Size")
        wrong = ""
        if commit is not None and commit != self.resolved.commit:
            wrong = f"comes from commit {quoted(commit)}, not {self.resolved.commit}"
        elif etag and self.file.sha256 is not None and etag != self.file.sha256:
            wrong = f"has SHA-256 {quoted(etag)}, not {self.file.sha256}"
        elif size is not None and size != str(self.file.size):
            wrong = f"has {quoted(size)} bytes, not {self.file.size}"
        if wrong:
            response.close()
            message = f"{wrong}, as the list of files says"
            raise RemoteError("hub.changed", message, fix="run it again", file=self.name)

    def _checked(self, response: Any, begin: int, end: int | None, trusted: bool = False) -> Body:
        """The answer as a body; an error, or another attempt, where it is none."""
        status = response.status_code
        if status in (200, 206):
            return self._body(response, begin, end)
        try:
            if trusted:
                with contextlib.suppress(Exception):
                    response.read()
                error = self._refused(response)
            else:
                error = problems.answered(status, "", self.name)
        finally:
            response.close()
        if status == 416:
            message = f"has no byte {begin} on the Hub, where it should have {self.file.size}"
            raise RemoteError("hub.short", message, fix="it is damaged there: tell its owner", file=self.name)
        if status in RETRIED:
            raise _Later(error, _seconds(response.headers.get("Retry-After")))
        raise error

    def _refused(self, response: Any) -> LoramergeError:
        from huggingface_hub.utils import hf_raise_for_status

        try:
            hf_raise_for_status(response)
        except Exception as raised:
            found = problems.problem(raised, self.name, repo=self.resolved.repo, revision=self.resolved.commit)
            if found is not None:
                return found
        return problems.answered(response.status_code, problems.said(response), self.name)

    def _body(self, response: Any, begin: int, end: int | None) -> Body:
        headers: Mapping[str, str] = response.headers
        if headers.get("Content-Encoding", "identity") not in ("identity", ""):
            response.close()
            message = "the server compresses what it was asked to send as it is"
            raise RemoteError("hub.answer", message, fix="check the proxy", file=self.name)
        if response.status_code == 200:
            length = headers.get("Content-Length")
            if length is not None and length.isdigit() and int(length) > self.file.size:
                response.close()
                raise self._wrong_size(int(length))
            return Body(begin, response, skip=begin, whole=True)
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if match is None or int(match[1]) != begin or int(match[2]) >= (self.file.size if end is None else end):
            response.close()
            given = quoted(headers.get("Content-Range", ""))
            raise _Later(RemoteError("hub.answer", f"the server sends another range: {given}", file=self.name))
        if int(match[3]) != self.file.size:
            response.close()
            raise self._wrong_size(int(match[3]))
        return Body(begin, response)

    def _wrong_size(self, size: int) -> RemoteError:
        message = f"has {size} bytes, not {self.file.size}, as the list of files says"
        return RemoteError("hub.changed", message, fix="run it again", file=self.name)


class _Later(Exception):
    """A request that may go well in a while."""

    def __init__(self, error: LoramergeError, after: float | None = None) -> None:
        self.error, self.after = error, after


def _joined(url: str, location: str) -> str:
    return urljoin(url, location)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None
