"""Push: a directory, or a file, into a repository, in one commit that shows all of it or nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from loramerge.errors import RemoteError, UsageError
from loramerge.hub import cache, crew, notices, problems
from loramerge.hub import card as cards
from loramerge.hub.known import Known
from loramerge.hub.local import CARD, Gathered, LocalFile, gather
from loramerge.hub.pull import as_reference
from loramerge.hub.reference import MAIN, Reference, RemoteFile, is_offline
from loramerge.hub.upload import Place, Upload, head_of, patiently, translated
from loramerge.merging import receipt, sidefiles, undo
from loramerge.tensors.checkpoint import is_index
from loramerge.tensors.text import plural, quoted, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEMA = 1
OWN = (receipt.NAME, undo.NAME)
"""Files of ours that tell of one model: those of an earlier one must not lie beside another."""

MESSAGE = "Upload with loramerge"
_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$|/$|\.$))[\w][\w./-]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")


@dataclass(frozen=True)
class There:
    """What a repository has already. `files`: of the branch, or of the one that it would begin at."""

    exists: bool = False
    private: bool = True
    commit: str | None = None
    has_branch: bool = True
    tags: Mapping[str, str] | None = None
    files: Mapping[str, RemoteFile] | None = None

    def file(self, name: str) -> RemoteFile | None:
        return (self.files or {}).get(name)


def push(
    source: Path,
    repo: str,
    *,
    revision: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    card: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    with_undo: bool = False,
    prune: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    version: str = "",
    progress: cache.Progress | None = None,
) -> dict[str, Any]:
    """See `loramerge.push`. `version`: of this tool, for the card."""
    reference = _asked(repo, revision, create_pr, tag, card)
    branch = reference.revision or MAIN
    if is_offline():
        fix = "unset HF_HUB_OFFLINE"
        raise RemoteError("hub.offline", "a push needs a network, and this is offline", fix=fix, file=reference.text)
    gathered = gather(source, include=include, exclude=exclude, with_undo=with_undo, allow_pickle=allow_pickle)
    api = _client(token, reference, dry_run)
    there = look(api, reference, branch, create_pr, tag)
    remote = there.file(CARD)
    known_card = None if remote is None or there.commit is None else (there.commit, remote)
    written = cards.choose(gathered, known_card, card, reference.repo, branch, token, version)
    if written is not None:
        gathered = _with_card(gathered, written)
    known = Known(gathered)
    same = _compare(gathered, there, known)
    sent = [f for f in gathered.files if f.name not in same]
    deleted = _stale(gathered, there, prune, [f.name for f in sent])
    _check_one_model(gathered, there, deleted, reference)
    _check_tag(tag, there, bool(sent or deleted), reference)
    data = _data(reference, branch, gathered, there, known, same, sent, deleted)
    data |= {"public_asked": public, "tag": tag, "dry_run": dry_run}
    data["card"] = None if written is None else written.text
    if not (there.private if there.exists else not public):
        _warn_of_paths(gathered)
    if dry_run:
        data["created"] = not there.exists
        data["private"] = there.private if there.exists else not public
        return data
    if there.exists and public and there.private:
        notices.warn(f"{reference.repo} is private and stays so: --public is for new repositories; change it there")
    if not there.exists:
        there = _create(api, reference, branch, public)
        data |= {"created": True, "private": not public}
    place = Place(api, reference.repo, branch, branch if there.has_branch else MAIN, there.commit, create_pr)
    if sent or deleted:
        data |= _carry_out(place, there, known, sent, deleted, message or MESSAGE, written, progress)
    else:
        data |= {"commit": there.commit}
    if tag is not None:
        _tag(place, tag, data["commit"], there)
    return data


def _asked(repo: str, revision: str | None, create_pr: bool, tag: str | None, card: str) -> Reference:
    """The reference, and that what was asked makes sense together."""
    reference = as_reference(repo, revision)
    if reference.path:
        fix = f"push it to a repository of its own: hf://{reference.repo}"
        raise UsageError("push.path", f"{quoted(repo)} names a place inside a repository", fix=fix)
    branch = reference.revision
    if branch is not None and _COMMIT.fullmatch(branch):
        raise UsageError("push.revision", f"{branch} is a commit, which never changes", fix="name a branch")
    if branch is not None and not _BRANCH.fullmatch(branch):
        raise UsageError("push.revision", f"{quoted(branch)} cannot be the name of a branch", fix="name a branch")
    if create_pr and branch not in (None, MAIN):
        fix = "give one of them: a pull request is against main"
        raise UsageError("push.revision", "--create-pr and a revision ask for different things", fix=fix)
    if create_pr and tag is not None:
        fix = "tag it when it has been accepted"
        raise UsageError("push.tag", "what a pull request proposes cannot be tagged yet", fix=fix)
    if tag is not None and not _BRANCH.fullmatch(tag):
        raise UsageError("push.tag", f"{quoted(tag)} cannot be the name of a tag", fix="use letters, digits, . - _")
    if card not in cards.MODES:
        raise UsageError("push.card", f"there is no card mode {quoted(card)}", fix=f"one of {', '.join(cards.MODES)}")
    return reference


def _client(token: str | None, reference: Reference, dry_run: bool) -> HfApi:
    from huggingface_hub import HfApi, get_token

    if token is None and get_token() is None and not dry_run:
        raise RemoteError("hub.token", "to push you must be logged in", fix=problems.LOGIN, file=reference.text)
    return HfApi(token=token, library_name="loramerge")


def look(api: HfApi, reference: Reference, branch: str, create_pr: bool, tag: str | None) -> There:
    """What is there already. Two or three requests, none of which changes anything.

    Raises:
        RemoteError: ``hub.*``; UsageError: ``push.revision``, ``push.tag``.
    """
    from huggingface_hub import errors

    place = Place(api, reference.repo, branch, branch, None)
    has_branch, tags = True, None

    def info(revision: str) -> Any:
        try:
            return api.model_info(reference.repo, revision=revision, files_metadata=True, timeout=30)
        except errors.RepositoryNotFoundError as error:
            if isinstance(error, errors.GatedRepoError):
                raise
            return None

    if branch != MAIN or tag is not None:
        try:
            refs = patiently(place, lambda: api.list_repo_refs(reference.repo, include_pull_requests=True))
        except RemoteError as error:
            if error.code != "hub.missing":
                raise
            has_branch = branch == MAIN
        else:
            tags = {t.name: t.target_commit for t in refs.tags}
            known = {b.name for b in refs.branches} | {p.ref for p in refs.pull_requests or []}
            has_branch = branch in known
            if branch in tags and not has_branch:
                raise UsageError("push.revision", f"{quoted(branch)} is a tag, not a branch", fix="name a branch")
            if not has_branch and _PULL_REQUEST.fullmatch(branch):
                fix = "--create-pr opens a new one"
                raise UsageError("push.revision", f"there is no pull request {quoted(branch)}", fix=fix)
    found = patiently(place, lambda: info(branch if has_branch else MAIN))
    if found is None:
        if create_pr:
            fix = "without --create-pr it is created, if it is yours"
            message = f"there is no repository {quoted(reference.repo)} that could be sent a pull request"
            raise RemoteError("hub.missing", message, fix=fix, file=reference.text)
        return There(has_branch=branch == MAIN)
    files = {}
    for sibling in found.siblings or []:
        sha256 = None if sibling.lfs is None else str(sibling.lfs.sha256)
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, int(sibling.size or 0), sha256, sibling.blob_id)
    return There(True, bool(found.private), found.sha, has_branch, tags, files)


def _with_card(gathered: Gathered, written: cards.Card) -> Gathered:
    raw = written.text.encode()
    made = LocalFile(CARD, Path(CARD), len(raw), content=raw)
    files = sorted([f for f in gathered.files if f.name != CARD] + [made], key=lambda f: f.name)
    return Gathered(gathered.source, tuple(files), gathered.left, gathered.receipt, gathered.receipt_file)


def _compare(gathered: Gathered, there: There, known: Known) -> set[str]:
    """The files that the branch has already, byte for byte."""
    alike = [f for f in gathered.files if (r := there.file(f.name)) is not None and r.size == f.size]
    unread = [f for f in alike if (r := there.file(f.name)) and r.sha256 and known.sha256(f) is None]
    if (nbytes := sum(f.size for f in unread)) > 500_000_000:
        notices.say(f"computing the digests of {plural(len(unread), 'file')}, {nbytes / 1e9:.1f} GB, to compare them")
    same: set[str] = set()
    stop = threading.Event()

    def compare(file: LocalFile) -> None:
        if known.is_there(file, there.file(file.name), stop):
            same.add(file.name)

    crew.run_all([partial(compare, file) for file in alike], 2, lambda: None, stop)
    return same


def _stale(gathered: Gathered, there: There, prune: bool, sent: Sequence[str]) -> list[str]:
    """What the commit deletes: receipts of the model before, and with `prune` weights that are not of this one."""
    others = [n for n in there.files or {} if n not in gathered.names]
    weights = [n for n in sent if _is_weight(n)]
    gone = [n for n in others if n in OWN and weights]
    if prune:
        ours = ("*.loramerge.json", "*.loramerge.undo")
        gone += [n for n in others if _is_weight(n) or any(fnmatchcase(n, glob) for glob in (*OWN, *ours))]
    elif left := [n for n in others if _is_weight(n)]:
        what = "weights that are not of this model stay in the repository"
        notices.warn(f"{what}: {some(left)}; --prune deletes them in the same commit")
    return sorted(set(gone))


def _is_weight(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return is_index(last) or any(fnmatchcase(last, glob) for glob in sidefiles.WEIGHTS)


def _check_one_model(gathered: Gathered, there: There, deleted: Sequence[str], reference: Reference) -> None:
    """Refuses a result with one file of weights and an index beside it, of which loaders would take either."""
    after = ({*(there.files or {})} - set(deleted)) | gathered.names
    for name in after:
        index = f"{name}.index.json"
        if index not in after or (name in gathered.names) == (index in gathered.names):
            continue
        old, new = (index, name) if name in gathered.names else (name, index)
        message = (
            f"the repository has {quoted(old)} of another model, and loaders may take that instead of {quoted(new)}"
        )
        fix = "--prune deletes in the same commit what is not of this model"
        raise RemoteError("push.two-models", message, fix=fix, file=reference.text)


def _warn_of_paths(gathered: Gathered) -> None:
    """What becomes public should not tell of the machine that it was made on."""
    receipt = gathered.receipt or {}
    rows = [receipt.get("base"), *receipt.get("adapters", ())]
    sources = [str(row.get("source")) for row in rows if isinstance(row, dict)]
    told = sorted({s for s in sources if s.startswith(("/", "~")) or PureWindowsPath(s).is_absolute()})
    if told and gathered.receipt_file is not None:
        name = gathered.receipt_file.name
        notices.warn(f"{name} names paths of this machine, and will be public: {some(told, 3)}; --exclude {name}")


def _check_tag(tag: str | None, there: There, changes: bool, reference: Reference) -> None:
    at = None if tag is None else (there.tags or {}).get(tag)
    if at is not None and (changes or at != there.commit):
        message = f"there is a tag {quoted(tag)} already, at commit {at}"
        raise RemoteError("hub.tag", message, fix="choose another with --tag; tags are not moved", file=reference.text)


def _data(
    reference: Reference,
    branch: str,
    gathered: Gathered,
    there: There,
    known: Known,
    same: set[str],
    sent: Sequence[LocalFile],
    deleted: Sequence[str],
) -> dict[str, Any]:
    rows = [
        {"name": f.name, "size": f.size, "there": f.name in same, "made": f.content is not None} for f in gathered.files
    ]
    return {
        "schema": SCHEMA,
        "source": gathered.source,
        "repo": reference.repo,
        "branch": branch,
        "url": problems.page(reference.repo),
        "parent": there.commit,
        "commit": None,
        "pull_request": None,
        "created": False,
        "private": there.private,
        "files": rows,
        "deleted": list(deleted),
        "left": [{"name": name, "why": why} for name, why in gathered.left],
        "bytes": sum(f.size for f in gathered.files),
        "uploaded": sum(f.size for f in sent),
        "notes": [],
    }


def _create(api: HfApi, reference: Reference, branch: str, public: bool) -> There:
    """Creates the repository, private unless asked otherwise."""
    place = Place(api, reference.repo, MAIN, MAIN, None)

    def create() -> Any:
        return api.create_repo(reference.repo, private=not public, exist_ok=False)

    try:
        patiently(place, create)
    except RemoteError as error:
        if error.code == "hub.conflict":
            message = f"{quoted(reference.repo)} exists already, and this token cannot see it"
            raise RemoteError("hub.forbidden", message, fix=problems.LOGIN, file=reference.text) from None
        if error.code == "hub.forbidden":
            namespace = reference.repo.split("/")[0]
            fix = f"use a token that may write to {namespace}, or another namespace"
            raise RemoteError(error.code, error.message, fix=fix, file=reference.text) from None
        raise
    head, _ = head_of(place, MAIN)
    return There(True, not public, head, branch == MAIN)


def _carry_out(
    place: Place,
    there: There,
    known: Known,
    sent: Sequence[LocalFile],
    deleted: Sequence[str],
    message: str,
    written: cards.Card | None,
    progress: cache.Progress | None,
) -> dict[str, Any]:
    if written is not None:
        _check_card(place, written)
    upload = Upload(place, known, sent, deleted, progress)
    upload.send()
    if not there.has_branch:
        _branch(place)
    made = upload.commit(message)
    rows = _check_made(place, made.oid, upload, sent)
    return {"commit": made.oid, "pull_request": made.pr_url, "digests": rows}


def _check_card(place: Place, written: cards.Card) -> None:
    """Has the Hub look at a card before anything is uploaded; it would refuse the commit at the end."""
    validate = getattr(place.api, "_validate_yaml", None)
    if validate is not None:
        patiently(place, lambda: validate(written.text, repo_type="model"), CARD)


def _branch(place: Place) -> None:
    def create() -> None:
        place.api.create_branch(place.repo, branch=place.branch, revision=place.parent, exist_ok=True)

    patiently(place, create)


def _check_made(place: Place, commit: str, upload: Upload, sent: Sequence[LocalFile]) -> dict[str, str | None]:
    """Asks what the commit holds: every file that was sent must be there as it is here."""
    _, there = head_of(place, commit)
    rows: dict[str, str | None] = {}
    for file in sent:
        sha256, git = upload.digests(file)
        found = there.get(file.name, (None, None))
        if (found[0] != sha256) if sha256 else (found[1] != git):
            message = f"{quoted(file.name)} in commit {commit} is not the file that was sent"
            raise RemoteError("hub.digest", message, fix="run the same command again", file=place.shown)
        rows[file.name] = sha256
    return rows


def _tag(place: Place, tag: str, commit: str, there: There) -> None:
    if (there.tags or {}).get(tag) == commit:
        return
    with translated(place):
        place.api.create_tag(place.repo, tag=tag, revision=commit, exist_ok=False)
