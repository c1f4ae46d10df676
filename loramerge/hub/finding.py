"""From what a user typed to what can be opened: paths as they are, references as paths that stand for them."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loramerge.adapters.dialect import dialects, weight_names
from loramerge.errors import InputError, LoramergeError, OutputError
from loramerge.hub import cache, crew, notices
from loramerge.hub.convoy import Convoy
from loramerge.hub.problems import offline as offline_error
from loramerge.hub.reference import Reference, RemoteFile, Resolved, folder_of, is_offline, parse, resolve, snapshot_of
from loramerge.hub.stream import RemoteSource
from loramerge.merging import sidefiles
from loramerge.tensors import mounts
from loramerge.tensors.source import ByteSource, FileSource
from loramerge.tensors.text import plural, quoted, some

T = TypeVar("T")

_PART = re.compile(r"\d+(-of-\d+\.\w+)$")

RECEIPTS = ("loramerge.json", "*.loramerge.json")
CARD = "README.md"
LARGE = 500_000_000
"""A file of more bytes takes so long to check that it is told."""

HEADERS_AT_ONCE = 6
SMALL = 16_000_000
"""Files of an adapter's folder that are no weights are taken up to this size: configs of whatever kind."""


@dataclass
class Finder:
    """Looks references up and makes what they mean available; each once.

    Args:
        token: a token; by default the one that the user is logged in with.
        offline: ask nobody; take what is in the cache.
        progress: told of the download of whole models into the cache.
    """

    token: str | None = field(default=None, repr=False)
    offline: bool = False
    progress: cache.Progress | None = None
    _known: dict[str, Resolved] = field(default_factory=dict, repr=False)

    def base(self, source: T, *, stream: bool = False) -> T | str:
        """A checkpoint: its configs in the cache, its weights where they are.

        With `stream` weights are read from the Hub in one pass, and stay nowhere. Else a file is downloaded into the
        cache when a weight of it is first needed; headers alone cost no download.
        """
        found = self._resolved(source)
        if found is None:
            return source
        scope = found.inside if not found.is_file else _beside(found)
        weights = [f for f in scope if _matches(f, sidefiles.WEIGHTS)]
        self.fetch(found, carried(found))
        return self._mounted(found, weights, stream)

    def adapter(self, source: T) -> T | str:
        """An adapter, in the cache, with the tokenizer that it may bring."""
        found = self._resolved(source)
        if found is None:
            return source
        path, files = adapter_files(found)
        self.fetch(found, files)
        resolved = found if path == found.path else Resolved(**{**found.__dict__, "path": path})
        return self._mounted(resolved, [f for f in files if _matches(f, sidefiles.WEIGHTS)], False)

    def adapters(self, adapters: Any) -> Any:
        """Adapters as `merge` takes them: one, a mapping to weights, a sequence of either or of pairs."""
        if isinstance(adapters, Mapping):
            return [(self.adapter(a), w) for a, w in adapters.items()]
        if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Iterable):
            return self.adapter(adapters)
        return [(self.adapter(a[0]), *a[1:]) if isinstance(a, tuple) else self.adapter(a) for a in adapters]

    def whole(self, source: T) -> T | str:
        """A model with all that lies beside it, receipt and undo file too, in the cache."""
        found = self._resolved(source)
        if found is None:
            return source
        scope = found.inside if not found.is_file else _beside(found)
        files = [f for f in scope if not f.name.split("/")[-1].startswith(".git")]
        self.fetch(found, files, self.progress)
        return self._mounted(found, [f for f in files if _matches(f, sidefiles.WEIGHTS)], False)

    def model(self, source: T) -> T | str:
        """A base or an adapter, whichever it is: for commands that take either."""
        found = self._resolved(source)
        if found is None:
            return source
        return self.adapter(source) if looks_like_adapter(found) else self.base(source)

    def know(self, reference: Reference, found: Resolved) -> None:
        """Takes what a reference was resolved to already."""
        self._known[reference.text] = found

    def resolved(self, source: object) -> Resolved | None:
        """What a source was resolved to; None for a path."""
        return self._resolved(source)

    # ----------------------------------------------------------------------------------------------- inside

    def _resolved(self, source: object) -> Resolved | None:
        if not isinstance(source, str):
            return None
        if source in self._known:
            return self._known[source]
        reference = parse(source)
        if reference is None:
            _note_local(source)
            return None
        found = resolve(reference, self.token, self.offline)
        if is_offline(self.offline):
            notices.say(f"offline: {reference.text} is {found.commit}, as the cache has it")
        self._known[source] = found
        return found

    def fetch(self, found: Resolved, files: Sequence[RemoteFile], progress: cache.Progress | None = None) -> None:
        """Gets files into the cache, each checked."""
        cache.fetch(found, files, token=self.token, offline=self.offline, progress=progress)

    def _mounted(self, found: Resolved, weights: Sequence[RemoteFile], stream: bool) -> str:
        snapshot = snapshot_of(found)
        shelf = _Shelf(self, found, weights, stream)
        openers: dict[Path, mounts.Opener] = {}
        for file in weights:
            where = Path(os.path.abspath(snapshot / file.name))
            _make_folder(where.parent, found.name)
            openers[where] = partial(shelf.open, file)
        digests = {Path(os.path.abspath(snapshot / f.name)): f.sha256 for f in weights if f.sha256 is not None}
        origin = {"repo": found.repo, "commit": found.commit}
        at = snapshot / found.path if found.path else snapshot
        return mounts.mount(mounts.Mount(at, found.name, openers, origin, digests))


class _Shelf:
    """The weight files of one checkpoint: in the cache, or on the Hub."""

    def __init__(self, finder: Finder, found: Resolved, weights: Sequence[RemoteFile], stream: bool) -> None:
        self._finder, self._found, self._weights, self._stream = finder, found, weights, stream
        self._convoy = Convoy()
        self._fetched: dict[str, RemoteSource] = {}

    def open(self, file: RemoteFile, name: str) -> ByteSource:
        """Opens a weight file: from the cache if it is there, else from the Hub."""
        found, offline = self._found, is_offline(self._finder.offline)
        if cache.is_cached(found, file):
            if file.size > LARGE and not cache.was_checked(found, file):
                notices.say(f"checking the digest of {file.name} in the cache, which is done once")
            if not cache.check(found, file):
                if offline:
                    raise cache.damaged(found, file)
                self._finder.fetch(found, [file])
            return FileSource(snapshot_of(found) / file.name, name)
        if offline:
            raise offline_error(f"hf://{found.repo}@{found.commit}/{file.name}")
        remote = self._remote(file, name)
        return remote if self._stream else LazySource(self._finder, found, file, remote)

    def _remote(self, file: RemoteFile, name: str) -> RemoteSource:
        """A file on the Hub. With the first part of a checkpoint the headers of all parts are fetched at once."""
        if (known := self._fetched.pop(file.name, None)) is not None:
            return known
        parts = [file]
        if (match := _PART.search(file.name)) is not None:
            stem, total = file.name[: match.start()], match[1]
            alike = [f for f in self._weights if f.name.startswith(stem) and f.name.endswith(total)]
            parts = [f for f in alike if f is file or not cache.is_cached(self._found, f)]
        folder = name.removesuffix(_name(file))
        made = {
            p.name: RemoteSource(self._found, p, self._finder.token, folder + _name(p), self._convoy) for p in parts
        }
        if len(made) > 1:
            tasks = [source.fetch_head for source in made.values()]
            crew.run_all(tasks, HEADERS_AT_ONCE, lambda: None, threading.Event())
        self._fetched |= made
        return self._fetched.pop(file.name)


class LazySource:
    """A file of the Hub whose header is read there; for anything more it is downloaded into the cache, and checked."""

    def __init__(self, finder: Finder, found: Resolved, file: RemoteFile, remote: RemoteSource) -> None:
        self.name, self.size = remote.name, remote.size
        self._finder, self._found, self._file = finder, found, file
        self._remote = remote
        self._local: FileSource | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        if self._local is None and (head := self._remote.read_head(offset, length)) is not None:
            return head
        return self._here().read(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the whole of `buffer` from `offset` on."""
        self._here().read_into(offset, buffer)

    def check_unchanged(self) -> None:
        """Raises InputError if the file in the cache is not what it was."""
        if self._local is not None:
            self._local.check_unchanged()

    def close(self) -> None:
        """Closes the file."""
        self._remote.close()
        if self._local is not None:
            self._local.close()

    def _here(self) -> FileSource:
        with self._lock:
            if self._local is None:
                notices.say(f"downloading {self._file.name} of {self._found.repo} into the cache")
                self._finder.fetch(self._found, [self._file])
                local = FileSource(snapshot_of(self._found) / self._file.name, self.name)
                head = self._remote.head
                if local.read(0, len(head)) != head:
                    local.close()
                    raise cache.damaged(self._found, self._file)
                self._local = local
            return self._local


def adapter_files(found: Resolved) -> tuple[str, list[RemoteFile]]:
    """What an adapter is made of: its path in the repository, and the files to get.

    In a folder that holds none under a known name, its only file of weights is meant.

    Raises:
        InputError: ``hub.ambiguous``: several files, and none says which is meant.
    """
    if found.is_file:
        main = found.file(found.path)
        assert main is not None
        return found.path, [main, *(f for f in _beside(found) if _name(f) in _configs())]
    folder = f"{found.path}/" if found.path else ""
    here = [f for f in found.inside if "/" not in f.name[len(folder) :]]
    names = {_name(f): f for f in here}
    known = [names[n] for n in weight_names() if n in names][:1]
    weights = [f for f in here if _matches(f, sidefiles.WEIGHTS)]
    small = [f for f in here if f not in weights and f.size <= SMALL and not _name(f).startswith(".")]
    if not known and weights and not _is_model(names):
        readable = [f for f in weights if f.name.endswith(".safetensors")] or weights
        if len(readable) > 1:
            example = f"hf://{found.repo}@{found.commit}/{readable[0].name}"
            message = f"holds {plural(len(readable), 'file')} of weights: {some([_name(f) for f in readable])}"
            raise InputError("hub.ambiguous", message, fix=f"name one, for example {example}", file=found.name)
        notices.say(f"{found.name}: the adapter is {readable[0].name}")
        return readable[0].name, [*readable, *(f for f in small if _name(f) in _configs())]
    return found.path, [*known, *small]


def looks_like_adapter(found: Resolved) -> bool:
    """Whether a reference leads to an adapter, by the names of its files. A single file is taken for a checkpoint."""
    if found.is_file:
        return False
    folder = f"{found.path}/" if found.path else ""
    names = {f.name[len(folder) :]: f for f in found.inside}
    return not _is_model(names) and any(n in names for n in (*weight_names(), "adapter_config.json"))


def carried(found: Resolved) -> list[RemoteFile]:
    """The files of a checkpoint that a merge reads or carries beside the weights, and its card."""
    scope = _beside(found) if found.is_file else found.inside
    root = found.path.rpartition("/")[0] if found.is_file else found.path
    return [f for f in scope if _is_carried(f, root)]


def _make_folder(folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the cache cannot be written to: {error.strerror or error}"
        raise OutputError("output.cache", message, fix="set HF_HOME to another place", file=name) from None


def _configs() -> set[str]:
    return {d.detect["config"] for d in dialects() if "config" in d.detect}


def _name(file: RemoteFile) -> str:
    return file.name.rsplit("/", 1)[-1]


def _is_model(names: Mapping[str, RemoteFile]) -> bool:
    """Whether files beside one another are a model's, of one part or several."""
    usual = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "model_index.json")
    return any(n in names for n in usual) or any(n.endswith(".index.json") for n in names)


def _matches(file: RemoteFile, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(_name(file), glob) for glob in globs)


def _is_carried(file: RemoteFile, root: str) -> bool:
    """Whether a file is one that a merge reads or carries beside the weights: as `sidefiles` chooses on disk."""
    inside = file.name[len(root) :].lstrip("/") if root else file.name
    folders = inside.split("/")[:-1]
    if any(fnmatchcase(folder, glob) for folder in folders for glob in sidefiles.STALE_FOLDERS):
        return False
    if _matches(file, (*RECEIPTS, CARD)) or (_name(file).endswith(".json") and ".index." in _name(file)):
        return True
    return not _matches(file, sidefiles.STALE)


def _beside(found: Resolved) -> tuple[RemoteFile, ...]:
    """A file and those in its folder."""
    folder = found.path.rpartition("/")[0]
    return tuple(f for f in found.files if f.name.rpartition("/")[0] == folder)


def _note_local(source: str) -> None:
    """A path that is also the name of a repository in the cache: the path was taken."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or not os.path.lexists(source):
        return
    try:
        known = folder_of(source).is_dir()
    except (OSError, ValueError, LoramergeError):
        return
    if known:
        notices.say(f"{quoted(source)} is the path here; hf://{source} is the repository of that name")
