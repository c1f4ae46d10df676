"""References: `hf://ns/name[@revision][/path]` and `ns/name[@revision]`, resolved once to a commit."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loramerge.errors import InputError, RemoteError, UsageError
from loramerge.hub import ledger
from loramerge.hub.problems import offline as offline_error
from loramerge.hub.problems import translated
from loramerge.tensors.source import stat_file
from loramerge.tensors.text import quoted, some

SCHEME = "hf://"
MAIN = "main"
FORM = "write hf://NAMESPACE/NAME, hf://NAMESPACE/NAME@REVISION or hf://NAMESPACE/NAME@REVISION/PATH"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.+))?", re.DOTALL)
_PULL_REQUEST = re.compile(r"(refs/pr/[0-9]+)(?:/(.*))?", re.DOTALL)
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_FILE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".toml", ".onnx", ".undo", ".npz")


@dataclass(frozen=True)
class Reference:
    """What a user typed: a repository of models, what revision of it (None: `main`), what file or folder in it."""

    text: str
    repo: str
    revision: str | None = None
    path: str = ""

    @property
    def explicit(self) -> bool:
        """Whether it says itself that it is one; `ns/name` might have been a path."""
        return self.text.startswith(SCHEME)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit. `sha256` of what lies in LFS or Xet, `git`: id as git has it, of all others."""

    name: str
    size: int
    sha256: str | None = None
    git: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A reference, resolved: `commit` is 40 hexadecimal digits, and what there is of it never changes.

    `files`: all files of the repository at that commit (offline: those in the cache). `path`: the file or folder that
    was asked for, "" for all.
    """

    repo: str
    commit: str
    path: str
    revision: str
    files: tuple[RemoteFile, ...]
    private: bool = False
    gated: bool = False

    @property
    def name(self) -> str:
        """The pinned reference: it means the same for ever."""
        return SCHEME + f"{self.repo}@{self.commit}" + (f"/{self.path}" if self.path else "")

    @property
    def is_file(self) -> bool:
        """Whether it is one file."""
        return bool(self.path) and any(file.name == self.path for file in self.files)

    @property
    def inside(self) -> tuple[RemoteFile, ...]:
        """The files at or below `path`."""
        folder = f"{self.path}/" if self.path else ""
        return tuple(f for f in self.files if f.name == self.path or f.name.startswith(folder))

    def file(self, name: str) -> RemoteFile | None:
        """A file by its name in the repository."""
        return next((f for f in self.files if f.name == name), None)


def parse(text: str) -> Reference | None:
    """A source as a reference to the Hub; None where it is a path.

    A path that exists goes before a repository of the same name.

    Raises:
        UsageError: ``hub.reference``: it says that it is a reference, and is none.
    """
    if text.startswith(SCHEME):
        return _explicit(text)
    if _PAGE.match(text):
        raise UsageError("hub.reference", f"{quoted(text)} is the address of a page", fix=FORM)
    match = _SHORT.fullmatch(text)
    if match is None or text.endswith(_FILE) or not _is_repo(match["repo"]) or os.path.lexists(text):
        return None
    return Reference(text, match["repo"], match["revision"])


def _explicit(text: str) -> Reference:
    rest = text[len(SCHEME) :]
    parts = rest.split("/")
    if parts[0] in ("datasets", "spaces", "buckets") and len(parts) > 2:
        raise UsageError("hub.reference", f"{quoted(text)} is no repository of a model", fix=FORM)
    if parts[0] == "models" and len(parts) > 2:
        parts = parts[1:]
    if len(parts) < 2 or not parts[1]:
        raise UsageError("hub.reference", f"{quoted(text)} has no namespace", fix=FORM)
    name, at, revision = parts[1].partition("@")
    path = "/".join(parts[2:])
    if at and (pull := _PULL_REQUEST.fullmatch("/".join([revision, *parts[2:]]))):
        revision, path = pull[1], pull[2] or ""
    repo = f"{parts[0]}/{name}"
    path = path.rstrip("/")
    if not _is_repo(repo):
        raise UsageError("hub.reference", f"{quoted(repo)} cannot be the name of a repository", fix=FORM)
    if at and not revision:
        raise UsageError("hub.reference", f"{quoted(text)} has an empty revision", fix=FORM)
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise UsageError("hub.reference", f"{quoted(path)} is no path in a repository", fix=FORM)
    return Reference(text, repo, revision or None, path)


def _is_repo(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(_NAME.fullmatch(p) and ".." not in p and "--" not in p for p in parts)


def with_revision(reference: Reference, revision: str | None) -> Reference:
    """The reference with the revision of `--revision`.

    Raises:
        UsageError: ``usage.revision``: both say one.
    """
    if revision is None:
        return reference
    if reference.revision is not None:
        raise UsageError("usage.revision", "@ and --revision both say a revision", fix="give one of them")
    return replace(reference, revision=revision)


def resolve(text: str | Reference, token: str | None = None, offline: bool = False) -> Resolved:
    """Finds out which commit a reference means now, and what files it has. One request; none where the cache knows.

    Args:
        text: `hf://ns/name[@revision][/path]` or `ns/name[@revision]`; or what `parse` made of it.
        token: a token; by default the one that the user is logged in with (`HF_TOKEN`, `hf auth login`).
        offline: ask nobody, as with `HF_HUB_OFFLINE=1`.

    Raises:
        UsageError: ``hub.reference``; RemoteError: ``hub.missing``, ``hub.gated``, ``hub.revision``, ``hub.path``,
            ``hub.token``, ``hub.offline``, ``hub.unreachable``, ``hub.server`` ...
    """
    reference = parse(text) if isinstance(text, str) else text
    if reference is None:
        raise UsageError("hub.reference", f"{quoted(text)} is a path, not a reference to the Hub", fix=FORM)
    try:
        if is_offline(offline):
            found = _from_cache(reference)
        else:
            found = (_COMMIT.fullmatch(reference.revision or "") and _listed(reference)) or _ask(reference, token)
    except RemoteError as error:
        raise (error if reference.explicit else _or_a_path(error, reference)) from None
    if found.path and not found.inside:
        names = [f.name for f in found.files]
        raise RemoteError("hub.path", f"has no {quoted(found.path)}", fix=_near(found.path, names), file=reference.text)
    return found


def is_offline(asked: bool = False) -> bool:
    """Whether nobody is to be asked: by the flag or by `HF_HUB_OFFLINE`."""
    from huggingface_hub import constants

    return asked or bool(constants.HF_HUB_OFFLINE)


def _ask(reference: Reference, token: str | None) -> Resolved:
    from huggingface_hub import HfApi

    revision = reference.revision or MAIN
    with translated(reference.text, repo=reference.repo, revision=revision):
        info = HfApi(token=token, library_name="loramerge").model_info(
            reference.repo, revision=revision, files_metadata=True, timeout=30
        )
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise RemoteError("hub.answer", "the Hub does not say which commit this is", file=reference.text)
    if _COMMIT.fullmatch(revision) and info.sha != revision:
        message = f"commit {revision} was asked for, the Hub answers with {info.sha}"
        raise RemoteError("hub.answer", message, fix="check HF_ENDPOINT", file=reference.text)
    files = []
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        sha256 = None if lfs is None else str(lfs.sha256)
        _check_name(sibling.rfilename, reference.text)
        files.append(RemoteFile(sibling.rfilename, int(sibling.size or 0), sha256, sibling.blob_id))
    resolved = Resolved(
        repo=reference.repo,
        commit=info.sha,
        path=reference.path,
        revision=revision,
        files=tuple(sorted(files, key=lambda f: f.name)),
        private=bool(info.private),
        gated=bool(info.gated),
    )
    _remember(resolved)
    return resolved


def _or_a_path(error: RemoteError, reference: Reference) -> RemoteError:
    """The error for what may have been meant as a path: that it is none, and whether one like it is there."""
    fix = error.fix
    try:
        stat_file(Path(reference.text), reference.text)
    except InputError as missing:
        fix = missing.fix if "did you mean" in missing.fix else fix
    message = f"is no path here; as a repository of the Hub: {error.message}"
    return RemoteError(error.code, message, fix=fix, file=reference.text)


def _check_name(name: str, what: str) -> None:
    """Names from a server become paths in the cache: they must not lead anywhere else."""
    parts = name.split("/")
    if any(p in ("", ".", "..") for p in parts) or "\\" in name or "\0" in name or ":" in name:
        message = f"lists a file {quoted(name)}, which is no name of a file in a repository"
        raise RemoteError("hub.answer", message, fix="do not use this repository", file=what)


def folder_of(repo: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def snapshot_of(resolved: Resolved) -> Path:
    """Where the cache has, or will have, the files of a commit."""
    return folder_of(resolved.repo) / "snapshots" / resolved.commit


def _remember(resolved: Resolved) -> None:
    """Notes in the cache what files a commit has, and which commit a branch was, as the client does: for offline."""
    rows = [[f.name, f.size, f.sha256, f.git] for f in resolved.files]
    about = {"files": rows, "private": resolved.private, "gated": resolved.gated}
    ledger.write_note(folder_of(resolved.repo), resolved.commit, about)
    if _COMMIT.fullmatch(resolved.revision):
        return
    note = folder_of(resolved.repo) / "refs" / resolved.revision
    try:
        if not note.is_file() or note.read_text() != resolved.commit:
            note.parent.mkdir(parents=True, exist_ok=True)
            part = note.with_name(f"{note.name}.{os.getpid()}.incomplete")
            part.write_text(resolved.commit)
            os.replace(part, note)
    except OSError:
        return  # a cache that cannot be written to is of use all the same


def _from_cache(reference: Reference) -> Resolved:
    revision = reference.revision or MAIN
    folder = folder_of(reference.repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            commit = ""
    if _COMMIT.fullmatch(commit) and (listed := _listed(reference, commit)) is not None:
        return listed
    snapshot = folder / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise offline_error(reference.text)
    files = [_cached_file(path, snapshot) for path in sorted(snapshot.rglob("*")) if path.is_file()]
    return Resolved(reference.repo, commit, reference.path, revision, tuple(files))


def _listed(reference: Reference, commit: str = "") -> Resolved | None:
    """A commit whose list of files was noted. It never changes."""
    commit = commit or reference.revision or ""
    note = ledger.read_note(folder_of(reference.repo), commit)
    rows, files = note.get("files"), []
    if not isinstance(rows, list):
        return None
    for row in rows:
        if not isinstance(row, list) or [type(v) for v in row[:2]] != [str, int] or len(row) != 4:
            return None
        _check_name(row[0], reference.text)
        files.append(RemoteFile(row[0], row[1], *(None if v is None else str(v) for v in row[2:])))
    revision = reference.revision or MAIN
    about = {name: bool(note.get(name)) for name in ("private", "gated")}
    return Resolved(reference.repo, commit, reference.path, revision, tuple(files), **about)


def _cached_file(path: Path, snapshot: Path) -> RemoteFile:
    """A file of the cache. The name of the blob that it links to is its sha256, or its id in git.

    One link is followed, not more: with Xet the blob may itself be a link, to a name that is another hash.
    """
    name = path.relative_to(snapshot).as_posix()
    blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    size = path.stat().st_size
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return RemoteFile(name, size, sha256=blob)
    return RemoteFile(name, size, git=blob if _COMMIT.fullmatch(blob) else None)


def _near(path: str, names: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    return f"did you mean {quoted(near[0])}?" if near else f"it holds {some(list(names), 8)}"
