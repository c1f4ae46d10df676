"""Work on many tensors side by side: results in order, progress from the caller's thread, one failure ends all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]

_TICK, PAUSE = 0.1, 1.0


class Meter:
    """Counts bytes for all workers."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._start = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def tell(self) -> None:
        # Work that is over at once has no progress to show.
        if self._progress is not None and time.monotonic() - self._start > PAUSE:
            self._progress(min(self._done, self.total), self.total)


def work(
    tasks: Sequence[T],
    do: Callable[[T], R],
    *,
    jobs: int,
    cost: Callable[[T], int],
    meter: Meter,
) -> list[R]:
    """`do` for every task, `jobs` at a time, costly ones first; results in the order of the tasks.

    Each worker has one torch thread. The first failure, or an interruption, ends it after the tasks that run.
    """
    order = sorted(range(len(tasks)), key=lambda i: (-cost(tasks[i]), i))
    stop = threading.Event()

    def one(index: int) -> R:
        if stop.is_set():
            raise _Stopped
        with torch.inference_mode():
            result = do(tasks[index])
        meter.add(cost(tasks[index]))
        return result

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            futures = {index: pool.submit(one, index) for index in order}
            waiting = set(futures.values())
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=_TICK, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    meter.tell()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            return [futures[index].result() for index in range(len(tasks))]
    finally:
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """Raised in a worker when another has failed or the user has interrupted."""
