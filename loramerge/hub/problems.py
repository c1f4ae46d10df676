"""What the Hub and the network answer, as errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loramerge.errors import LoramergeError, RemoteError
from loramerge.tensors.text import quoted

LOGIN = "hf auth login, or set HF_TOKEN, or --token TOKEN"


@contextmanager
def translated(what: str, *, repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns whatever the client raises inside into one of our errors, without a word that could hold a token.

    Args:
        what: the reference as it was typed.
        repo: the repository.
        revision: what was asked of it.

    Raises:
        RemoteError: ``hub.*``.
    """
    try:
        yield
    except LoramergeError:
        raise
    except Exception as error:
        found = problem(error, what, repo=repo, revision=revision)
        if found is None:
            raise
        raise found from None


def problem(error: BaseException, what: str, *, repo: str, revision: str | None = None) -> RemoteError | None:
    """The error of ours for one of the client; None for what is no matter of the Hub."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    for _ in range(4):  # with force_download the client hides the reason
        if isinstance(cause, errors.HfHubHTTPError | errors.OfflineModeIsEnabled) or cause is None:
            break
        cause = cause.__cause__
    if cause is not None:
        error = cause
    endpoint = page(repo)
    if isinstance(error, errors.GatedRepoError):
        return RemoteError(
            "hub.gated",
            "is gated: its files are for those who accepted its conditions",
            fix=f"accept them at {endpoint}, then {LOGIN}",
            file=what,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return RemoteError(
            "hub.missing",
            f"there is no repository {quoted(repo)}, or it is private and you are not logged in",
            fix=near_repo(repo) or f"check the name; for a private one: {LOGIN}",
            file=what,
        )
    if isinstance(error, errors.RevisionNotFoundError):
        fix = f"{endpoint}/tree/main lists its branches and tags"
        return RemoteError("hub.revision", f"{quoted(repo)} has no revision {quoted(revision)}", fix=fix, file=what)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(what)
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return RemoteError("hub.path", "a file of it is not there any more", fix="run it again", file=what)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return RemoteError("hub.token", "a token is needed and there is none", fix=LOGIN, file=what)
    if isinstance(error, errors.HfHubHTTPError):
        return answered(error.response.status_code, said(error.response), what)
    if isinstance(error, errors.LocalEntryNotFoundError) or is_network(error):
        return unreachable(error, what)
    return None


def answered(status: int, message: str, what: str) -> RemoteError:
    """The error for an answer that is none of the well-known ones."""
    tail = f": {message}" if message else ""
    if status == 401:
        return RemoteError("hub.token", f"the Hub does not accept the token{tail}", fix=LOGIN, file=what)
    if status == 403:
        fix = "use a token that may do this, or ask the owner"
        return RemoteError("hub.forbidden", f"the Hub forbids this{tail}", fix=fix, file=what)
    if status == 429:
        fix = f"wait a few minutes; logged in the limits are higher: {LOGIN}"
        return RemoteError("hub.limit", "the Hub has had too many requests from here", fix=fix, file=what)
    if status >= 500:
        fix = "run the same command again in a while"
        return RemoteError("hub.server", f"the Hub is in trouble (HTTP {status}{tail})", fix=fix, file=what)
    return RemoteError("hub.answer", f"the Hub refuses (HTTP {status}{tail})", fix="check the reference", file=what)


def unreachable(error: BaseException, what: str) -> RemoteError:
    """The error for a network that is down or a server that does not answer."""
    from huggingface_hub import constants

    kind = type(error).__name__
    message = f"cannot reach {without_secrets(constants.ENDPOINT)} ({kind})"
    fix = "check the network; --offline takes what is in the cache"
    return RemoteError("hub.unreachable", message, fix=fix, file=what)


def offline(what: str, detail: str = "is not in the cache, and this is offline") -> RemoteError:
    """The error for what an offline run would need."""
    fix = f"run it once with a network, or: loramerge pull {without_secrets(what)}"
    return RemoteError("hub.offline", detail, fix=fix, file=what)


def is_network(error: BaseException) -> bool:
    """Whether an exception is one of the HTTP library's (connection, time-out, broken protocol)."""
    from huggingface_hub.utils import httpx

    return isinstance(error, httpx.TransportError | ConnectionError | TimeoutError)


def said(response: Any) -> str:
    """The Hub's own words in an answer, one line."""
    text = response.headers.get("X-Error-Message", "") or ""
    return " ".join(text.split())[:200].rstrip(".")


def page(repo: str) -> str:
    """Where people read about a repository."""
    from huggingface_hub import constants

    return f"{without_secrets(constants.ENDPOINT)}/{repo}"


def without_secrets(url: str) -> str:
    """A URL without a password in it."""
    return re.sub(r"(://)[^/@\s]*@", r"\1", url)


def near_repo(repo: str) -> str:
    """A repository in the cache whose name is like this one, as a fix; empty where there is none."""
    import difflib
    import os

    from huggingface_hub import constants

    try:
        folders = os.listdir(constants.HF_HUB_CACHE)
    except OSError:
        return ""
    names = [f.removeprefix("models--").replace("--", "/") for f in folders if f.startswith("models--")]
    near = difflib.get_close_matches(repo, [n for n in names if n != repo], n=1, cutoff=0.8)
    return f"did you mean {near[0]}, which is in the cache?" if near else ""
