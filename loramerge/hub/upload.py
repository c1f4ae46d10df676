"""Uploads: large files before the commit, one by one, and then one commit that shows them all or nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from loramerge.errors import InputError, RemoteError
from loramerge.hub import cache, client, crew, problems
from loramerge.hub.known import Known, git_id
from loramerge.hub.local import LocalFile, stamp_of
from loramerge.hub.meters import Counted, here, is_xet, reported
from loramerge.tensors.text import quoted, some

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")

PASSING = ("hub.server", "hub.unreachable", "hub.limit")
ATTEMPTS = 3
"""How often a request is made here; the client itself repeats those that carry data."""

SIDE_BY_SIDE = 2
LARGE = 4_000_000
"""Files of so many bytes are uploaded each by itself, so that what is done is done when a push is interrupted."""


@dataclass(frozen=True)
class Place:
    """Where to push: a branch of a repository, and the commit that it is at (None: there is none yet).

    `base`: the branch that large files are uploaded for, which is there already.
    """

    api: HfApi
    repo: str
    branch: str
    base: str
    parent: str | None
    create_pr: bool = False

    @property
    def shown(self) -> str:
        return f"hf://{self.repo}" + ("" if self.branch == "main" else f"@{self.branch}")


@dataclass
class Upload:
    """Files on their way into one commit."""

    place: Place
    known: Known
    files: Sequence[LocalFile]
    deleted: Sequence[str] = ()
    progress: cache.Progress | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _done: dict[str, int] = field(default_factory=dict)
    _operations: dict[str, CommitOperationAdd] = field(default_factory=dict)

    def send(self) -> None:
        """Uploads what is stored beside git (LFS, Xet). What was uploaded before is not sent again.

        Raises:
            RemoteError: ``hub.*``; InputError: ``input.changed``: a file was written to meanwhile.
        """
        for file in self.files:
            self._operations[file.name] = self._operation(file)
        on_disk = sorted((f for f in self.files if f.content is None), key=lambda f: -f.size)
        small = [f for f in on_disk if f.size < LARGE]
        tasks = [partial(self._send_some, [file]) for file in on_disk if file.size >= LARGE]
        tasks += [partial(self._send_some, small)] if small else []
        with reported():
            crew.run_all(tasks, SIDE_BY_SIDE, self._tick, self._stop)
        check_untouched(self.files)
        self._tick()

    def commit(self, message: str, description: str = "") -> Any:
        """Makes the commit, if the branch is still where it was.

        Returns:
            what the client says of it: `oid`, `pr_url`.

        Raises:
            RemoteError: ``hub.stale``: somebody else has pushed; others of ``hub.*``.
        """
        from huggingface_hub import CommitOperationDelete

        deletions = [CommitOperationDelete(name, is_folder=False) for name in self.deleted]
        operations: list[Any] = [*self._operations.values(), *deletions]
        place = self.place

        def make() -> Any:
            return place.api.create_commit(
                place.repo,
                operations,
                commit_message=message,
                commit_description=description,
                revision=None if place.create_pr else place.branch,
                parent_commit=place.parent,
                create_pr=place.create_pr or None,
            )

        for attempt in range(ATTEMPTS):
            try:
                with translated(place):
                    return make()
            except RemoteError as error:
                if error.code not in PASSING or place.create_pr or attempt + 1 == ATTEMPTS:
                    raise
                pause(attempt)
                if (made := self._made_after_all()) is not None:
                    return made
        raise AssertionError

    def digests(self, file: LocalFile) -> tuple[str | None, str]:
        """SHA-256 and id in git of a file that was sent; the first where it is stored beside git."""
        operation = self._operations[file.name]
        if operation._upload_mode == "lfs":
            return operation.upload_info.sha256.hex(), ""
        return None, git_id(file)

    # ----------------------------------------------------------------------------------------------- inside

    def _operation(self, file: LocalFile) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        done = self._done

        class Adding(CommitOperationAdd):
            """Counts what is read of it, instead of drawing a bar."""

            @contextlib.contextmanager
            def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
                if not with_tqdm or not isinstance(self.path_or_fileobj, str):
                    with super().as_file() as plain:
                        yield plain
                    return
                with Counted(self.path_or_fileobj, file.name, done) as counted:
                    yield counted

        content = file.content if file.content is not None else str(file.path)
        operation = Adding(path_in_repo=file.name, path_or_fileobj=content)
        known = self.known.sha256(file)
        if file.content is None and known is not None and hasattr(operation.upload_info, "sha256"):
            operation.upload_info.sha256 = bytes.fromhex(known)
        return operation

    def _send_some(self, files: Sequence[LocalFile]) -> None:
        """Uploads a large file, or all small ones together: those that the Hub wants in LFS or Xet."""
        operations = [self._operations[file.name] for file in files]
        here.report = partial(self._done.__setitem__, files[0].name) if len(files) == 1 else lambda _: None
        if not is_xet():
            # LFS is asked by digest; noted, so that a push that is taken up again need not read the files once more.
            for file, operation in zip(files, operations, strict=True):
                if (digest := self.known.compute(file, self._stop)) is None:
                    return
                operation.upload_info.sha256 = bytes.fromhex(digest)
        place = self.place

        def upload() -> None:
            place.api.preupload_lfs_files(
                place.repo,
                operations,
                revision=place.base,
                create_pr=place.create_pr or None,
                num_threads=1,
                free_memory=False,
            )

        patiently(place, upload, files[0].name if len(files) == 1 else "")
        for file, operation in zip(files, operations, strict=True):
            if getattr(operation, "_should_ignore", False):
                message = f"a .gitignore in the repository excludes {quoted(file.name)}"
                raise RemoteError(
                    "hub.ignored", message, fix="change it there, or --exclude the file", file=place.shown
                )
            if operation._upload_mode == "lfs":
                self.known.note(file, operation.upload_info.sha256.hex())
            self._done[file.name] = file.size

    def _tick(self) -> None:
        if self.progress is not None:
            sizes = {f.name: f.size for f in self.files}
            done = sum(min(n, sizes[name]) for name, n in self._done.copy().items())
            self.progress(done, sum(f.size for f in self.files if f.content is None))

    def _made_after_all(self) -> Any:
        """Whether a commit whose answer was lost has been made: the branch moved on, and has all that was sent."""
        place = self.place
        head, there = head_of(place, place.branch)
        if head == place.parent:
            return None
        for file in self.files:
            remote = there.get(file.name)
            sha256, git = self.digests(file)
            if remote is None or (remote[0] != sha256 if sha256 else remote[1] != git):
                raise stale(place)
        if any(name in there for name in self.deleted):
            raise stale(place)
        return _Made(str(head))


@dataclass(frozen=True)
class _Made:
    oid: str
    pr_url: str | None = None


def head_of(place: Place, branch: str) -> tuple[str | None, dict[str, tuple[str | None, str | None]]]:
    """The commit that a branch is at, and name -> (SHA-256, id in git) of its files."""
    info = patiently(place, lambda: place.api.model_info(place.repo, revision=branch, files_metadata=True, timeout=30))
    rows = {s.rfilename: (None if s.lfs is None else str(s.lfs.sha256), s.blob_id) for s in info.siblings or []}
    return info.sha, rows


def check_untouched(files: Sequence[LocalFile]) -> None:
    """Raises unless all files are those that were looked at.

    Raises:
        InputError: ``input.changed``.
    """
    touched = []
    for file in files:
        if file.content is not None:
            continue
        try:
            same = stamp_of(file.path.stat()) == file.stamp
        except OSError:
            same = False
        if not same:
            touched.append(file.name)
    if touched:
        message = f"changed while it was pushed: {some(touched)}; nothing of it can be seen in the repository"
        raise InputError("input.changed", message, fix="run the same command again when nothing writes there")


def patiently(place: Place, work: Callable[[], T], name: str = "") -> T:
    """What `work` returns, tried again after failures that pass.

    Raises:
        RemoteError: ``hub.*``.
    """
    for attempt in range(ATTEMPTS):
        try:
            with translated(place, name):
                return work()
        except RemoteError as error:
            if error.code not in PASSING or attempt + 1 == ATTEMPTS:
                raise
            pause(attempt)
    raise AssertionError


def pause(attempt: int) -> None:
    """Waits before another try."""
    time.sleep(min(client.LONGEST_PAUSE, client.FIRST_PAUSE * 2**attempt))


@contextlib.contextmanager
def translated(place: Place, name: str = "") -> Iterator[None]:
    """Turns what the client raises into errors of ours; those that pushes alone meet have their own words."""
    from huggingface_hub import errors

    try:
        with problems.translated(place.shown, repo=place.repo, revision=place.branch):
            try:
                yield
            except (RuntimeError, ValueError) as error:  # the client wraps what ended an upload in one of these
                cause = error.__cause__ or error.__context__
                if isinstance(cause, errors.HfHubHTTPError) or (cause is not None and problems.is_network(cause)):
                    raise cause from None
                if isinstance(error, errors.HfHubHTTPError):
                    raise
                raise refused(error, place, name) from None
            except errors.HfHubHTTPError as error:
                if (own := _answered(error, place)) is not None:
                    raise own from None
                raise
    except RemoteError as error:
        if error.code not in PASSING:
            raise
        message = error.message if not name else f"{error.message} ({quoted(name)})"
        fix = error.fix if error.code == "hub.limit" else AGAIN
        raise RemoteError(error.code, message, fix=fix, file=error.file) from None


AGAIN = "run the same command again in a while: what was uploaded is not sent twice"


def _answered(error: Any, place: Place) -> RemoteError | None:
    status, said = error.response.status_code, problems.said(error.response)
    tail = f": {said}" if said else ""
    if status == 412:
        return stale(place)
    if status == 402:
        fix = "make room there, or push to another namespace"
        return RemoteError("hub.quota", f"the Hub has no room for this{tail}", fix=fix, file=place.shown)
    if status == 409:
        return RemoteError("hub.conflict", f"there is a conflict{tail}", fix=AGAIN, file=place.shown)
    if status == 413:
        fix = "files that are no weights are too large: leave some out with --exclude"
        return RemoteError("hub.large", f"the commit is too large{tail}", fix=fix, file=place.shown)
    if status == 403 and not place.create_pr:
        fix = f"log in with a token that may write to {place.repo}, or propose it: --create-pr"
        return RemoteError("hub.forbidden", f"the Hub forbids this{tail}", fix=fix, file=place.shown)
    return None


def refused(error: Exception, place: Place, name: str) -> RemoteError:
    """The error for what the client itself objects to."""
    words = " ".join(str(error).split())[:300]
    what = f"{quoted(name)} cannot be uploaded" if name else "the client refuses this"
    return RemoteError("hub.refused", f"{what}: {words}", fix="see what it says", file=place.shown)


def stale(place: Place) -> RemoteError:
    """The error for a branch that somebody else has pushed to."""
    message = f"somebody has pushed to {quoted(place.branch)} since this push began, so it was not made"
    fix = "look at what changed there, then run the same command again: what was uploaded is not sent twice"
    return RemoteError("hub.stale", message, fix=fix, file=place.shown)
