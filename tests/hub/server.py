"""A Hub on loopback: speaks the protocol of the genuine client, for pulls and pushes, over LFS and over Xet.

    with Hub(tmp_path) as hub:
        commit = hub.add("me/model", {"config.json": b"{}", "model.safetensors": raw})
        subprocess.run([...], env=hub.env(tmp_path / "home"))
        hub.fault("GET", r"/blob/", "drop", value=1000, times=2)
        assert hub.requests("GET", r"/resolve/")

What it serves lies in a folder: `blobs/<sha256>` and `blobs/<git sha1>`, and with Xet what the client's own Xet code
put into `cas/`. LFS files are answered by a redirect to another host name (`localhost` for `127.0.0.1`), as the Hub's
are.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

TOKEN = "hf_test_token_of_the_owner"
OTHER_TOKEN = "hf_test_token_of_another_user"
FOREVER = -1


@dataclass(frozen=True)
class Entry:
    """A file of a commit: the name of its blob, its size, whether it is stored by LFS (or Xet)."""

    oid: str
    size: int
    lfs: bool
    git: str
    """Id as git has it: of the content, or of the pointer to it."""


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: Mapping[str, Entry]
    title: str
    description: str = ""


@dataclass
class Repo:
    """A repository. `refs`: `main`, other branches, `refs/pr/N` -> commit."""

    id: str
    kind: str = "models"
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]


@dataclass
class Fault:
    """What goes wrong with requests that match: `times` of them, after `skip` that go well.

    action   value
    status   the status code of the answer (5xx, 403, 429)
    drop     bytes of the body that are sent before the connection is closed
    short    bytes by which body and Content-Length are shorter than they should be
    flip     offset in the file of a byte that is sent with one bit turned over
    whole    ranges are ignored: 200 and the whole file
    sleep    seconds before the answer
    call     a function that is called before the answer (to move a branch meanwhile)
    """

    method: str
    pattern: str
    action: str
    value: Any = None
    times: int = 1
    skip: int = 0


@dataclass(frozen=True)
class Request:
    """A line of the log. `authorization` is the header as it came, or None."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None
    status: int


class Hub:
    """The server. Start it with `with`; every knob is an attribute that may be turned while it runs.

    xet: files over LFS are offered and taken by Xet, too. redirect: LFS files lie on another host name. link_uses,
    link_seconds: how often, how long a signed link is good. multipart: bytes of a part, above which uploads are cut.
    lfs_over: larger files, and those with `lfs_suffixes`, go to LFS. tokens: who is who. readers: who may read private
    and gated repositories beside their owners.
    """

    def __init__(self, folder: Path, *, xet: bool = False, port: int = 0) -> None:
        self.folder = Path(folder)
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        (self.folder / "cas").mkdir(exist_ok=True)
        self.xet = xet
        self.redirect = True
        self.link_uses = FOREVER
        self.link_seconds = 3600.0
        self.multipart: int | None = None
        self.lfs_over = 1_000_000
        self.lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin", ".onnx", ".onnx_data", ".gguf", ".undo")
        self.tokens = {TOKEN: "me", OTHER_TOKEN: "other"}
        self.readers: set[tuple[str, str]] = set()
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.sent_bytes = 0
        self.on_commit: Callable[[Repo, Commit], None] | None = None
        self.lock = threading.RLock()
        self.links: dict[str, tuple[str, float, list[int]]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.xet_hashes: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.port = int(self._server.server_address[1])

    # ------------------------------------------------------------------------------------------- for tests

    def __enter__(self) -> Hub:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.port}"

    def env(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a client of this Hub, with a cache of its own and no Xet unless the server has it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
        env = kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_XET_CACHE": str(Path(home) / "xet"),
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        if not self.xet:
            env["HF_HUB_DISABLE_XET"] = "1"
        if token is not None:
            env["HF_TOKEN"] = token
        return env | more

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        kind: str = "models",
        **flags: Any,
    ) -> str:
        """Makes a repository if need be, and a commit with these files beside those it has. Returns the commit."""
        with self.lock:
            repo = self.repos.setdefault(f"{kind}/{repo_id}", Repo(repo_id, kind))
            for name, value in flags.items():
                setattr(repo, name, value)
            parent = repo.commits[repo.refs[branch]] if branch in repo.refs else None
            entries = dict(parent.files) if parent else {}
            for name, content in files.items():
                entries[name] = self._store(name, content)
            return self._commit(repo, branch, entries, "added by the test").sha

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        return self.repos[f"{kind}/{repo_id}"]

    def content(self, repo_id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """What a file holds there."""
        repo = self.repo(repo_id, kind)
        commit = self.find(repo, revision)
        assert commit is not None
        return self.blob(commit.files[path].oid).read_bytes()

    def fault(
        self, method: str, pattern: str, action: str, value: Any = None, *, times: int = 1, skip: int = 0
    ) -> Fault:
        """Lets something go wrong, see `Fault`. `pattern` is searched in path and query."""
        made = Fault(method, pattern, action, value, times, skip)
        with self.lock:
            self.faults.append(made)
        return made

    def requests(self, method: str = "", pattern: str = "") -> list[Request]:
        """The requests that match, in order."""
        with self.lock:
            return [r for r in self.log if r.method.startswith(method) and re.search(pattern, r.path)]

    def leaked(self) -> list[Request]:
        """Requests that brought an Authorization header to the other host name."""
        with self.lock:
            return [r for r in self.log if r.authorization and r.host.startswith("localhost")]

    # ------------------------------------------------------------------------------------------- inside

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def is_lfs(self, name: str, size: int) -> bool:
        return size > self.lfs_over or name.endswith(self.lfs_suffixes)

    def _store(self, name: str, content: bytes | Path) -> Entry:
        if isinstance(content, Path):
            size = content.stat().st_size
            if self.is_lfs(name, size):
                oid = _sha256(content)
                if not self.blob(oid).exists():
                    os.symlink(content.resolve(), self.blob(oid))
                return self.lfs_entry(oid, size)
            content = content.read_bytes()
        if self.is_lfs(name, len(content)):
            oid = hashlib.sha256(content).hexdigest()
            self.blob(oid).write_bytes(content)
            return self.lfs_entry(oid, len(content))
        return self.store_regular(content)

    def lfs_entry(self, oid: str, size: int) -> Entry:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        if self.xet and oid not in self.xet_hashes:
            self._to_cas(oid)
        return Entry(oid, size, True, git_id(pointer))

    def store_regular(self, content: bytes) -> Entry:
        oid = git_id(content)
        self.blob(oid).write_bytes(content)
        return Entry(oid, len(content), False, oid)

    def _commit(self, repo: Repo, branch: str, files: Mapping[str, Entry], title: str, description: str = "") -> Commit:
        parent = repo.refs.get(branch)
        state = json.dumps([parent, sorted((n, e.oid) for n, e in files.items()), title, len(repo.commits)])
        commit = Commit(hashlib.sha1(state.encode()).hexdigest(), parent, dict(files), title, description)
        repo.commits[commit.sha] = commit
        repo.refs[branch] = commit.sha
        return commit

    def find(self, repo: Repo, revision: str) -> Commit | None:
        sha = repo.refs.get(revision) or repo.tags.get(revision) or revision
        return repo.commits.get(sha)

    def sign(self, oid: str, name: str) -> str:
        with self.lock:
            key = secrets.token_hex(8)
            self.links[key] = (oid, time.monotonic() + self.link_seconds, [self.link_uses])
        host = self.cdn if self.redirect is True else self.endpoint
        return f"{host}/blob/{oid}?name={quote(name, safe='')}&signature={key}"

    def link_is_good(self, oid: str, key: str) -> bool:
        with self.lock:
            found = self.links.get(key)
            if found is None or found[0] != oid or time.monotonic() > found[1] or found[2][0] == 0:
                return False
            found[2][0] -= 1 if found[2][0] > 0 else 0
            return True

    # Xet: the client's own code puts files into `cas`, known there by the Xet hash; commits name the sha256 alone.

    @property
    def cas_url(self) -> str:
        return f"local://{self.folder / 'cas'}"

    def _to_cas(self, oid: str) -> None:
        import hf_xet

        with hf_xet.XetSession().new_upload_commit(
            endpoint=self.cas_url, token="t", token_expiry_unix_secs=int(time.time()) + 3600
        ) as upload:
            handle = upload.start_upload_file(str(self.blob(oid)), sha256=oid)
        self.xet_hashes[oid] = handle.result().xet_info.hash

    def from_cas(self, oid: str, size: int) -> bool:
        """Fetches a file that was uploaded by Xet into the blobs. False if it never was."""
        import hf_xet

        for shard in (self.folder / "cas").rglob("xorbs/shards/*.mdb"):
            self.xet_hashes |= read_shard(shard.read_bytes())
        if oid not in self.xet_hashes:
            return False
        if not self.blob(oid).exists():
            # The client that uploads has the store locked as long as it runs: read a copy.
            with tempfile.TemporaryDirectory(dir=self.folder) as copy:
                shutil.copytree(self.folder / "cas", copy, dirs_exist_ok=True)
                with hf_xet.XetSession().new_file_download_group(
                    endpoint=f"local://{copy}", token="t", token_expiry_unix_secs=int(time.time()) + 3600
                ) as group:
                    info = hf_xet.XetFileInfo(self.xet_hashes[oid], size)
                    group.start_download_file(info, str(self.blob(oid)))
        return True


def _sha256(path: Path) -> str:
    """SHA-256 of a file, once for all servers of a process."""
    found = path.stat()
    key = (str(path), found.st_size, found.st_mtime_ns)
    if key not in _known:
        with open(path, "rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


_known: dict[tuple[str, int, int], str] = {}


def git_id(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_shard(raw: bytes) -> dict[str, str]:
    """sha256 -> Xet hash of files in a shard of the Xet store: records of 48 bytes, hashes as little-endian words."""

    def text(at: int) -> str:
        return b"".join(raw[at + k : at + k + 8][::-1] for k in range(0, 32, 8)).hex()

    found, at = {}, 48
    while at + 48 <= len(raw) and raw[at : at + 32] != b"\xff" * 32:
        flags, entries = (int.from_bytes(raw[at + k : at + k + 4], "little") for k in (32, 36))
        name, after = text(at), at + 48 + 48 * entries * (2 if flags >> 31 else 1)
        if flags >> 30 & 1:
            found[text(after)] = name
            after += 48
        at = after
    return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what some tests are about; anything else is a mistake of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class _Stop(Exception):
    """An answer other than the usual one."""

    def __init__(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


_ID = r"(?P<id>[^/]+/[^/]+)"
_KIND = r"(?P<kind>models|datasets|spaces)"
_ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    (method, re.compile(f"{pattern}$"), name)
    for method, pattern, name in [
        ("GET", "/api/whoami-v2", "whoami"),
        ("GET", "/api/agent-harnesses", "harnesses"),
        ("POST", "/api/repos/create", "create"),
        ("DELETE", "/api/repos/delete", "delete"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", f"/api/{_KIND}/{_ID}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", f"/api/{_KIND}/{_ID}/commit/(?P<rev>[^/]+)", "commit"),
        ("GET", f"/api/{_KIND}/{_ID}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", f"/api/{_KIND}/{_ID}/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", f"/api/{_KIND}/{_ID}/revision/(?P<rev>[^/]+)", "info"),
        ("GET", f"/api/{_KIND}/{_ID}/refs", "refs"),
        ("GET", f"/api/{_KIND}/{_ID}/commits/(?P<rev>[^/]+)", "commits"),
        ("GET", f"/api/{_KIND}/{_ID}/xet-(?P<how>read|write)-token/(?P<rev>[^/]+)", "xet_token"),
        ("POST", f"/api/{_KIND}/{_ID}/branch/(?P<rev>[^/]+)", "branch"),
        ("POST", f"/api/{_KIND}/{_ID}/tag/(?P<rev>[^/]+)", "tag"),
        ("POST", f"/api/{_KIND}/{_ID}/discussions", "discussion"),
        ("GET", f"/api/{_KIND}/{_ID}/discussions/(?P<num>[0-9]+)", "one_discussion"),
        ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", "batch"),
        ("GET", f"/api/{_KIND}/{_ID}", "info"),
        ("HEAD", f"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", f"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", "/blob/(?P<oid>[0-9a-f]+)", "blob"),
        ("GET", "/blob/(?P<oid>[0-9a-f]+)", "blob"),
        ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", "upload"),
        ("PUT", "/upload/(?P<oid>[0-9a-f]{64})/(?P<part>[0-9]+)", "upload"),
        ("POST", "/upload/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", "/upload/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ]
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        """The log is a list, not lines on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ------------------------------------------------------------------------------------------- the frame

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _answer(self) -> None:
        raw, _, query = self.path.partition("?")
        self.query = {k: v[0] for k, v in parse_qs(query, keep_blank_values=True).items()}
        self.fault = self._pick_fault()
        self.body = b""
        if (length := self.headers.get("Content-Length")) is not None:
            self.body = self.rfile.read(int(length))
        elif self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunked()
        try:
            if self.fault is not None and self.fault.action == "sleep":
                time.sleep(self.fault.value)
            if self.fault is not None and self.fault.action == "call":
                self.fault.value()
            if self.fault is not None and self.fault.action == "status":
                raise _Stop(self.fault.value, "", "as the test asked")
            for method, pattern, name in _ROUTES:
                if method == self.command and (match := pattern.match(raw)) is not None:
                    found = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    getattr(self, f"do_{name}")(**found)
                    return
            raise _Stop(404, "", f"no such page: {self.command} {raw}")
        except _Stop as stop:
            headers = dict(stop.headers)
            if stop.code:
                headers["X-Error-Code"] = stop.code
            if stop.message:
                headers["X-Error-Message"] = stop.message
            self._json({"error": stop.message or stop.code}, stop.status, headers)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pick_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and self.command.startswith(fault.method) and re.search(fault.pattern, self.path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1 if fault.times > 0 else 0
                    return fault
        return None

    def _log(self, status: int) -> None:
        line = Request(
            self.command,
            self.path,
            self.headers.get("Host", ""),
            self.headers.get("Authorization"),
            self.headers.get("Range"),
            status,
        )
        with self.hub.lock:
            self.hub.log.append(line)

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, raw: bytes, status: int, headers: Mapping[str, str]) -> None:
        self._log(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
        self.wfile.flush()

    # ------------------------------------------------------------------------------------------- who may what

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise _Stop(401, "", "Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_id: str, kind: str = "models", write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        owner = repo_id.split("/")[0]
        allowed = user == owner or (user is not None and (user, repo_id) in self.hub.readers)
        if repo is None or (repo.private and not allowed):
            raise _Stop(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise _Stop(403 if user else 401, "", "You have read access but not the required permissions")
        return repo

    def _files(self, repo: Repo, revision: str) -> Commit:
        commit = self.hub.find(repo, revision)
        if commit is None:
            raise _Stop(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ------------------------------------------------------------------------------------------- the account

    def do_whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Stop(401, "", "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"role": "write", "displayName": "test"}}
        self._json({"type": "user", "name": user, "orgs": [{"name": "org"}], "auth": token})

    def do_harnesses(self) -> None:
        self._json({"standardEnvVars": [], "harnesses": {}})

    def do_create(self) -> None:
        user = self._user()
        if user is None:
            raise _Stop(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        kind = {"model": "models", "dataset": "datasets", "space": "spaces"}[asked.get("type") or "model"]
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if repo_id.split("/")[0] not in (user, "org"):
            raise _Stop(403, "", "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if f"{kind}/{repo_id}" in self.hub.repos:
                self._json({**url, "error": "You already created this model repo"}, 409)
                return
            private = asked.get("private", False) or asked.get("visibility") == "private"
            repo = self.hub.repos[f"{kind}/{repo_id}"] = Repo(repo_id, kind, private=bool(private))
            attributes = self.hub.store_regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self.hub._commit(repo, "main", {".gitattributes": attributes}, "initial commit")
        self._json(url)

    def do_delete(self) -> None:
        user, asked = self._user(), json.loads(self.body)
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self._repo(repo_id, write=True)
        del self.hub.repos[f"models/{repo_id}"]
        self._json({})

    def do_validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    # ------------------------------------------------------------------------------------------- reading

    def do_info(self, kind: str, id: str, rev: str = "main") -> None:
        repo = self._repo(id, kind)
        commit = self._files(repo, rev)
        siblings = [self._sibling(name, entry) for name, entry in sorted(commit.files.items())]
        self._json(
            {
                "_id": "1",
                "id": id,
                "modelId": id,
                "sha": commit.sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    def _sibling(self, name: str, entry: Entry) -> dict[str, Any]:
        if "blobs" not in self.query:
            return {"rfilename": name}
        row: dict[str, Any] = {"rfilename": name, "size": entry.size, "blobId": entry.git}
        if entry.lfs:
            row["lfs"] = {"sha256": entry.oid, "size": entry.size, "pointerSize": 134}
        return row

    def _row(self, name: str, entry: Entry) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": name, "size": entry.size, "oid": entry.git}
        if entry.lfs:
            row["lfs"] = {"oid": entry.oid, "size": entry.size, "pointerSize": 134}
            if self.hub.xet and entry.oid in self.hub.xet_hashes:
                row["xetHash"] = self.hub.xet_hashes[entry.oid]
        return row

    def do_tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        commit = self._files(self._repo(id, kind), rev)
        inside = f"{path}/" if path else ""
        rows: dict[str, dict[str, Any]] = {}
        for name, entry in sorted(commit.files.items()):
            if not name.startswith(inside):
                continue
            parts = name[len(inside) :].split("/")
            deep = self.query.get("recursive", "").lower() in ("true", "1")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                folder = inside + "/".join(parts[:depth])
                rows[folder] = {"type": "directory", "path": folder, "oid": git_id(folder.encode()), "size": 0}
            if deep or len(parts) == 1:
                rows[name] = self._row(name, entry)
        if path and not rows:
            raise _Stop(404, "EntryNotFound", f"{path} does not exist on {rev!r}")
        self._json(list(rows.values()))

    def do_paths_info(self, kind: str, id: str, rev: str) -> None:
        commit = self._files(self._repo(id, kind), rev)
        asked = parse_qs(self.body.decode()).get("paths", [])
        self._json([self._row(name, commit.files[name]) for name in asked if name in commit.files])

    def do_refs(self, kind: str, id: str) -> None:
        repo = self._repo(id, kind)
        branches = [(n, s) for n, s in repo.refs.items() if not n.startswith("refs/")]
        prs = [(n, s) for n, s in repo.refs.items() if n.startswith("refs/pr/")]
        self._json(
            {
                "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in branches],
                "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in repo.tags.items()],
                "converts": [],
                "pullRequests": [{"name": n.split("/")[-1], "ref": n, "targetCommit": s} for n, s in prs],
            }
        )

    def do_commits(self, kind: str, id: str, rev: str) -> None:
        repo = self._repo(id, kind)
        commit: Commit | None = self._files(repo, rev)
        rows = []
        while commit is not None:
            rows.append(
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.description,
                    "date": "2026-01-01T00:00:00.000Z",
                    "authors": [{"user": id.split("/")[0]}],
                }
            )
            commit = repo.commits[commit.parent] if commit.parent else None
        self._json(rows)

    def do_resolve(self, id: str, rev: str, path: str) -> None:
        repo = self._repo(id)
        commit = self._files(repo, rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        user = self._user()
        if repo.gated and user != id.split("/")[0] and (user, id) not in self.hub.readers:
            message = f"Access to model {id} is restricted. You must have access to it and be authenticated."
            raise _Stop(403 if user else 401, "GatedRepo", message, headers)
        entry = commit.files.get(path)
        if entry is None:
            raise _Stop(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{entry.oid}"'
        if not entry.lfs:
            self._file(self.hub.blob(entry.oid), headers)
            return
        headers |= {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(entry.size)}
        if self.hub.xet and entry.oid in self.hub.xet_hashes:
            headers["X-Xet-Hash"] = self.hub.xet_hashes[entry.oid]
            token = f"{self.hub.endpoint}/api/models/{id}/xet-read-token/{commit.sha}"
            headers["Link"] = f'<{token}>; rel="xet-auth"'
        if self.hub.redirect is False:
            self._file(self.hub.blob(entry.oid), headers)
            return
        headers["Location"] = self.hub.sign(entry.oid, path)
        self._send(b"Found. Redirecting", 302, headers)

    def do_blob(self, oid: str) -> None:
        if not self.hub.link_is_good(oid, self.query.get("signature", "")):
            self._send(b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", 403, {})
            return
        self._file(self.hub.blob(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _file(self, path: Path, headers: Mapping[str, str]) -> None:
        """Sends a file, or a range of it, with whatever is to go wrong."""
        fault, size = self.fault, path.stat().st_size
        action = None if fault is None else fault.action
        begin, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and action != "whole":
            begin, end = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
            if begin >= size:
                raise _Stop(416, "", "out of range", {"Content-Range": f"bytes */{size}"})
            status = 206
        length = end - begin - (fault.value if fault is not None and action == "short" else 0)
        self._log(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Content-Length", str(max(0, length)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        stop = begin + length if action != "drop" or fault is None else min(begin + length, begin + fault.value)
        flip = fault.value if fault is not None and action == "flip" else None
        with open(path, "rb") as file:
            for lo, hi in _cuts(begin, stop, flip):
                if flip is not None and lo == flip:
                    self.connection.sendall(bytes([os.pread(file.fileno(), 1, lo)[0] ^ 0x10]))
                else:
                    self.connection.sendfile(file, lo, hi - lo)
        with self.hub.lock:
            self.hub.sent_bytes += stop - begin
        if action == "drop":
            self.close_connection = True

    # ------------------------------------------------------------------------------------------- writing

    def do_preupload(self, kind: str, id: str, rev: str) -> None:
        repo = self._repo(id, kind, write="create_pr" not in self.query)
        commit, rows = self._files(repo, rev), []
        for row in json.loads(self.body)["files"]:
            there = commit.files.get(row["path"])
            mode = "lfs" if self.hub.is_lfs(row["path"], row["size"]) else "regular"
            oid = None if there is None else there.oid
            rows.append({"path": row["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": rows})

    def do_batch(self, id: str) -> None:
        self._repo(id)
        asked, objects = json.loads(self.body), []
        for row in asked["objects"]:
            oid, size = row["oid"], row["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not self.hub.blob(oid).exists():
                href, header = f"{self.hub.cdn}/upload/{oid}", {}
                if self.hub.multipart is not None and size > self.hub.multipart:
                    count = -(-size // self.hub.multipart)
                    header = {str(i): f"{href}/{i}" for i in range(1, count + 1)}
                    header["chunk_size"] = str(self.hub.multipart)
                    href = f"{self.hub.endpoint}/upload/{oid}/complete"
                verify = {"href": f"{self.hub.endpoint}/upload/{oid}/verify"}
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(answer)
        many = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
        self._json({"transfer": "multipart" if many else "basic", "objects": objects})

    def do_upload(self, oid: str, part: str = "") -> None:
        if part:
            with self.hub.lock:
                self.hub.uploads.setdefault(oid, {})[int(part)] = self.body
            self._send(b"", 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
            return
        self._keep(oid, self.body)
        self._send(b"", 200, {})

    def do_complete(self, oid: str) -> None:
        parts = self.hub.uploads.pop(oid, {})
        numbers = [row["partNumber"] for row in json.loads(self.body)["parts"]]
        self._keep(oid, b"".join(parts[n] for n in numbers))
        self._json({})

    def _keep(self, oid: str, raw: bytes) -> None:
        if hashlib.sha256(raw).hexdigest() != oid:
            raise _Stop(400, "", "the content is not what its sha256 says")
        self.hub.blob(oid).write_bytes(raw)

    def do_verify(self, oid: str) -> None:
        if not self.hub.blob(oid).exists():
            raise _Stop(404, "", "it was not uploaded")
        self._json({})

    def do_commit(self, kind: str, id: str, rev: str) -> None:
        pr = "create_pr" in self.query
        repo = self._repo(id, kind, write=not pr)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            base = self._files(repo, rev)
            parent = header.get("parentCommit")
            if parent is not None and parent != base.sha:
                raise _Stop(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            branch, more = rev, {}
            if pr:
                number = len(repo.discussions) + 1
                repo.discussions.append({"num": number, "title": header["summary"], "isPullRequest": True})
                branch = f"refs/pr/{number}"
                repo.refs[branch] = base.sha
                more["pullRequestUrl"] = f"{self.hub.endpoint}/{id}/discussions/{number}"
            made = self.hub._commit(repo, branch, files, header["summary"], header.get("description", ""))
        if self.hub.on_commit is not None:
            self.hub.on_commit(repo, made)
        url = f"{self.hub.endpoint}/{id}/commit/{made.sha}"
        self._json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": "", **more})

    def _apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = self.hub.store_regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            oid, size = value["oid"], value["size"]
            if not self.hub.blob(oid).exists() and not (self.hub.xet and self.hub.from_cas(oid, size)):
                raise _Stop(422, "", f"{value['path']}: LFS object {oid} was not uploaded")
            if self.hub.blob(oid).stat().st_size != size:
                raise _Stop(422, "", f"{value['path']}: has another size")
            files[value["path"]] = self.hub.lfs_entry(oid, size)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise _Stop(422, "", f"{value['path']} does not exist")
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            for name in [n for n in files if n.startswith(folder)]:
                del files[name]
        elif key != "header":
            raise _Stop(422, "", f"unknown operation {key}")

    def do_xet_token(self, kind: str, id: str, how: str, rev: str) -> None:
        self._repo(id, kind, write=how == "write" and "create_pr" not in self.query)
        if not self.hub.xet:
            raise _Stop(404, "", "no Xet here")
        until = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.cas_url,
            "X-Xet-Access-Token": "xet-token",
            "X-Xet-Token-Expiration": str(until),
        }
        self._json({"casUrl": self.hub.cas_url, "accessToken": "xet-token", "exp": until}, 200, headers)

    def do_branch(self, kind: str, id: str, rev: str) -> None:
        repo = self._repo(id, kind, write=True)
        if rev in repo.refs:
            raise _Stop(409, "", f"Reference already exists: {rev}")
        asked = json.loads(self.body or b"{}")
        repo.refs[rev] = self._files(repo, asked.get("startingPoint") or "main").sha
        self._json({})

    def do_tag(self, kind: str, id: str, rev: str) -> None:
        repo = self._repo(id, kind, write=True)
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise _Stop(409, "", f"Reference already exists: {name}")
        repo.tags[name] = self._files(repo, rev).sha
        self._json({})

    def do_discussion(self, kind: str, id: str) -> None:
        repo, asked = self._repo(id, kind), json.loads(self.body)
        with self.hub.lock:
            number = len(repo.discussions) + 1
            repo.discussions.append({"num": number, "title": asked.get("title", ""), "isPullRequest": True})
            repo.refs[f"refs/pr/{number}"] = repo.refs["main"]
        self._json({"num": number, "url": f"{self.hub.endpoint}/{id}/discussions/{number}"})

    def do_one_discussion(self, kind: str, id: str, num: str) -> None:
        repo = self._repo(id, kind)
        row = repo.discussions[int(num) - 1]
        events: list[Any] = []
        about = {"author": {"name": "me"}, "status": "open", "createdAt": "2026-01-01T00:00:00.000Z", "events": events}
        changes = {"base": "refs/heads/main", "mergeCommitId": None}
        self._json(
            {**row, **about, "changes": changes, "filesWithConflicts": [], "repo": {"name": id, "type": "model"}}
        )


def _cuts(begin: int, end: int, at: int | None) -> Iterator[tuple[int, int]]:
    """A range, cut around one byte of it."""
    if at is None or not begin <= at < end:
        yield begin, end
        return
    if begin < at:
        yield begin, at
    yield at, at + 1
    if at + 1 < end:
        yield at + 1, end


@contextlib.contextmanager
def serving(folder: Path, repos: Mapping[str, Path], *, xet: bool = False) -> Iterator[Hub]:
    """A Hub with these folders as repositories; for scripts."""
    with Hub(folder, xet=xet) as hub:
        for repo_id, source in repos.items():
            files = sorted(p for p in Path(source).rglob("*") if p.is_file())
            hub.add(repo_id, {p.relative_to(source).as_posix(): p for p in files})
        yield hub


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves folders as repositories until stdin ends; prints the endpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("repos", nargs="+", metavar="NS/NAME=FOLDER")
    parser.add_argument("--xet", action="store_true")
    chosen = parser.parse_args(arguments)
    pairs = (text.split("=", 1) for text in chosen.repos)
    with serving(chosen.store, {repo: Path(folder) for repo, folder in pairs}, xet=chosen.xet) as hub:
        print(hub.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt, EOFError):
            while input():
                pass


if __name__ == "__main__":
    main()
