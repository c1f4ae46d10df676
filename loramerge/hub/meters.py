"""How far uploads are: the client's own bars replaced by numbers."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Counted(io.BufferedReader):
    """A file that tells how far it was read; the client may seek in it."""

    def __init__(self, path: str, name: str, done: dict[str, int]) -> None:
        super().__init__(io.FileIO(path, "rb"), 1 << 20)
        self._name, self._counts = name, done

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._counts[self._name] = self.tell()
        return data


class _Here(threading.local):
    report: Callable[[int], None] | None = None


here = _Here()
"""Whom an upload by Xet in this thread reports to."""

_patching = threading.Lock()


def is_xet() -> bool:
    """Whether the client uploads by Xet, and computes digests on the way."""
    try:
        from huggingface_hub.utils._runtime import is_xet_available
    except ImportError:
        return False
    return bool(is_xet_available())


class _Reporter:
    """Stands where the client would draw its bars for an upload by Xet."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report

    def update_progress(self, group: Any, *_: Any) -> None:
        self._report(int(getattr(group, "total_bytes_completed", 0) or 0))

    def close(self, *_: Any) -> None:
        """Nothing is drawn."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Lets uploads in our threads report to us, and has no bars drawn.

    By LFS the files tell themselves how far they are read. By Xet the client's own reporter does, which ours stands in
    for; a client that is made otherwise tells only of whole files.
    """
    from huggingface_hub import utils

    original: Any = None
    if is_xet():
        try:
            from huggingface_hub.utils import _xet_progress_reporting as module

            original = module.XetUploadProgressReporter
        except (ImportError, AttributeError):
            original = None

    def made(*args: Any, **kwargs: Any) -> Any:
        report = here.report
        return _Reporter(report) if report is not None else original(*args, **kwargs)

    with _patching:
        if original is None:
            drawn = not utils.are_progress_bars_disabled()
            utils.disable_progress_bars()
            try:
                yield
            finally:
                if drawn:
                    utils.enable_progress_bars()
            return
        module.XetUploadProgressReporter = made  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            module.XetUploadProgressReporter = original  # type: ignore[misc]
