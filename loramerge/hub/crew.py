"""Work on several files at a time, that an interruption need not wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

GRACE = 2.0
"""Seconds that are left to workers to notice that they are to stop."""


def run_all(tasks: Iterable[Callable[[], None]], workers: int, tick: Callable[[], None], stop: threading.Event) -> None:
    """Runs tasks on a few threads, `tick` now and then on this one, until all are done.

    Where one fails, or this thread is interrupted, `stop` is set, and workers that do not notice soon are left behind:
    they are daemons, and whatever they wait for on the network must not keep a user waiting.

    Raises:
        BaseException: what the first failing task raised, or what interrupted this thread.
    """
    left, lock, errors = iter(tasks), threading.Lock(), list[BaseException]()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                task = next(left, None)
            if task is None:
                return
            try:
                task()
            except BaseException as error:  # handed to the caller's thread, which raises it
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            tick()
            time.sleep(0.02)
    finally:
        if errors or any(thread.is_alive() for thread in threads):
            stop.set()
            until = time.monotonic() + GRACE
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, until - time.monotonic()))
    if errors:
        raise errors[0]


def waited_for(work: Callable[[], T], stop: threading.Event, late: Callable[[T], None]) -> T | None:
    """What `work` returns or raises; None as soon as `stop` is set. What comes after that is given to `late`."""
    done = threading.Event()
    result: list[T] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    gone = False

    def run() -> None:
        try:
            found = work()
            with lock:
                if not gone:
                    result.append(found)
                    return
            late(found)
        except BaseException as error:  # handed to the caller's thread, which raises it
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(0.02):
        if stop.is_set():
            with lock:
                gone = not result
            if gone:
                return None
    if errors:
        raise errors[0]
    return result[0]
