"""Lines for people that come up while references are looked up; a command line listens, a library need not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str, str], None]
"""Takes a kind (`note`, `warning`) and a text."""

_listener: ContextVar[Listener | None] = ContextVar("loramerge_hub_listener", default=None)


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Passes what comes up inside to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def say(text: str) -> None:
    """Something decided for the user."""
    if (listener := _listener.get()) is not None:
        listener("note", text)


def warn(text: str) -> None:
    """Something the user should know; names its remedy."""
    if (listener := _listener.get()) is not None:
        listener("warning", text)
