"""A file on the Hub as a source of bytes: read in any order by many threads, in bounded memory, never a wrong byte."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramerge.errors import InputError, LoramergeError, RemoteError
from loramerge.hub import client, stream
from loramerge.hub.convoy import CHUNK, Convoy
from loramerge.hub.reference import RemoteFile, Resolved
from loramerge.hub.stream import RemoteSource
from tests.hub.server import FOREVER, Hub

SIZE = 14 * CHUNK + 12_345


@pytest.fixture(scope="module")
def raw() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def hub(tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    with Hub(tmp_path) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.add("me/m", {f"{n}.safetensors": raw for n in "abcd"} | {"small.json": b'{"a": 1}'})
        yield server


def source(hub: Hub, name: str = "a.safetensors", convoy: Convoy | None = None) -> RemoteSource:
    head = hub.repo("me/m").head
    files = tuple(
        RemoteFile(n, e.size, e.oid if e.lfs else None, None if e.lfs else e.oid) for n, e in sorted(head.files.items())
    )
    resolved = Resolved("me/m", head.sha, "", "main", files)
    file = resolved.file(name)
    assert file is not None
    return RemoteSource(resolved, file, None, name, convoy or Convoy())


def read(remote: RemoteSource, begin: int, length: int) -> bytes:
    buffer = bytearray(length)
    remote.read_into(begin, memoryview(buffer))
    return bytes(buffer)


def test_in_order_by_several_threads_it_is_one_stream(hub: Hub, raw: bytes) -> None:
    remote = source(hub)
    assert remote.read(0, 100) == raw[:100]
    step = 700_001
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda at: read(remote, at, min(step, SIZE - at)), range(0, SIZE, step)))
    assert b"".join(parts) == raw
    remote.check_unchanged()
    remote.close()
    assert [r.range for r in hub.requests("GET", "/blob/")] == [f"bytes=0-{stream.HEAD - 1}", f"bytes={stream.HEAD}-"]


def test_in_any_order_in_a_small_window_every_byte_is_right(hub: Hub, raw: bytes) -> None:
    remote = source(hub, convoy=Convoy(window=2 * CHUNK))
    draw = random.Random(1)
    spans = [(at := draw.randrange(SIZE - 1), draw.randrange(1, min(3 * CHUNK, SIZE - at) + 1)) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for (at, length), got in zip(spans, pool.map(lambda s: read(remote, *s), spans), strict=True):
            assert got == raw[at : at + length]
    remote.check_unchanged()
    remote.close()


def test_what_is_kept_in_memory_is_bounded(hub: Hub, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "AHEAD", 2 * CHUNK)
    convoy = Convoy(window=6 * CHUNK, abreast=2)
    remotes = [source(hub, f"{n}.safetensors", convoy) for n in "abcd"]
    most = 0
    for remote in remotes:
        remote.read(0, 10)
    for remote in remotes:
        for at in range(0, SIZE, CHUNK // 2):
            assert read(remote, at, min(CHUNK // 2, SIZE - at)) == raw[at : at + CHUNK // 2]
            most = max(most, sum(r.kept for r in remotes))
    for remote in remotes:
        remote.check_unchanged()
        remote.close()
    assert most <= 6 * CHUNK + 2 * CHUNK  # a piece of each stream may come before room is made for it
    assert len(hub.requests("GET", "/blob/")) == 8  # a header and a stream each: nothing was fetched twice


def test_the_next_stream_begins_before_it_is_asked_for(hub: Hub) -> None:
    convoy = Convoy(abreast=2)
    first, second, third = (source(hub, f"{n}.safetensors", convoy) for n in "abc")
    for remote in (first, second, third):
        remote.read(0, 10)
    read(first, CHUNK, 10)
    assert (first.begun, second.begun, third.begun) == (True, True, False)
    for remote in (first, second, third):
        remote.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_range_that_differs_from_the_stream_is_noticed(
    hub: Hub, raw: bytes, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A byte that is wrong in one answer only, in a range that the stream comes to later, or has left behind."""
    monkeypatch.setattr(stream, "FAR", 6 * CHUNK)
    monkeypatch.setattr(stream, "AHEAD", CHUNK)
    remote = source(hub, convoy=Convoy(window=2 * CHUNK))
    at = 10 * CHUNK + 5
    remote.read(0, 10)
    if when == "after":
        for begin in range(0, 13 * CHUNK, CHUNK):
            read(remote, begin, CHUNK)
        hub.fault("GET", "/blob/", "flip", at)
        with pytest.raises(RemoteError) as raised:
            read(remote, at - 100, 200)
    else:
        read(remote, CHUNK, 10)
        hub.fault("GET", "/blob/", "flip", at)
        assert read(remote, at - 100, 200) != raw[at - 100 : at + 100]
        with pytest.raises(RemoteError) as raised:
            remote.check_unchanged()
    assert raised.value.code == "hub.digest"
    remote.close()


def test_a_stream_that_nobody_reads_to_the_end_is_still_checked(hub: Hub) -> None:
    hub.fault("GET", "/blob/", "flip", SIZE - 7, times=FOREVER)
    remote = source(hub)
    read(remote, stream.HEAD, 10)
    with pytest.raises(RemoteError, match="SHA-256"):
        remote.check_unchanged()
    remote.close()


def test_small_files_are_checked_by_their_id_in_git(hub: Hub) -> None:
    good = source(hub, "small.json")
    assert good.read(0, good.size) == b'{"a": 1}'
    good.check_unchanged()
    hub.fault("GET", "small.json", "flip", 2)
    bad = source(hub, "small.json")
    bad.read(0, 4)
    with pytest.raises(RemoteError, match="git id"):
        bad.check_unchanged()


def test_beyond_the_end_is_an_error(hub: Hub) -> None:
    with pytest.raises(InputError, match="the file has"):
        source(hub).read(SIZE - 1, 2)


def test_who_waits_is_freed_when_the_stream_is_cancelled(hub: Hub) -> None:
    remote = source(hub)
    remote.read(0, 10)
    hub.fault("GET", "/blob/", "sleep", 3.0)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            read(remote, CHUNK, 10)
        except LoramergeError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    remote.cancel()
    thread.join(2.0)
    assert not thread.is_alive() and time.monotonic() - begin < 1.0
    assert isinstance(raised[0], LoramergeError) and raised[0].code == "interrupted"
