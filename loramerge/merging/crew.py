"""Workers for tasks that lie in memory: all of the tasks, or none any more when the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch

Task = Callable[[], None]


def work(tasks: Iterable[Task], jobs: int, devices: Sequence[torch.device] = ()) -> None:
    """Runs tasks on a few threads, each with one torch thread; returns or raises only when none runs any more.

    An interruption ends it after the tasks that run. Devices are used on the caller's current streams.

    Raises:
        BaseException: what a task raised, or what interrupted the caller.
    """
    streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
    left, lock, stop = iter(tasks), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def worker(gone: threading.Event) -> None:
        try:
            with torch.inference_mode(), ExitStack() as stack:
                for stream in streams:
                    stack.enter_context(torch.cuda.stream(stream))
                while not stop.is_set():
                    with lock:
                        task = next(left, None)
                    if task is None:
                        return
                    task()
        except BaseException as error:  # handed to the caller's thread, which raises it
            errors.append(error)
            stop.set()
        finally:
            gone.set()

    gone = [threading.Event() for _ in range(jobs)]
    # Waited for by events, not by Thread.join: see `stream.py`.
    threads = [threading.Thread(target=worker, args=(event,)) for event in gone]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # workers run over blocks; threads inside an operation would only wait for one another
    try:
        for thread in threads:
            thread.start()
        _wait(threads, gone)
    except BaseException as error:
        stop.set()
        errors.insert(0, error)
        while True:  # whatever else comes: what runs must have ended before anybody looks at its work
            try:
                _wait(threads, gone)
                break
            except BaseException as another:
                errors.append(another)
    finally:
        torch.set_num_threads(before)
    for stream in streams:
        stream.synchronize()
    if errors:
        raise errors[0]


def _wait(threads: Sequence[threading.Thread], gone: Sequence[threading.Event]) -> None:
    for thread, event in zip(threads, gone, strict=True):
        while thread.ident is not None and not event.wait(0.1):  # without: it never ran, or sees `stop` before all else
            pass
