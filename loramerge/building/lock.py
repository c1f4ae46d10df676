"""The lock of a recipe: `recipe.lock`, which pins every input, what computes, and what came out."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramerge.building import numerics
from loramerge.building.recipe import Recipe, Step
from loramerge.errors import InputError
from loramerge.tensors import strictjson
from loramerge.tensors.output import partial_path, sweep_partials
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import quoted
from loramerge.tensors.writer import fsync_path, output_errors, write_small_file

SCHEMA = 1
MAX_BYTES = 256 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Lock:
    """What a lock holds: plain data.

    `inputs`: `{"source", "role", "files"}`, for the Hub `repo`, `revision`, `commit`, `path` too. `outputs`: `{"path",
    "make", "identity"}`, and once it is built `files`, once it is published `pushed`.
    """

    numerics: dict[str, Any]
    inputs: list[Row] = field(default_factory=list)
    outputs: list[Row] = field(default_factory=list)

    def input(self, role: str, source: str) -> Row | None:
        """The row of an input."""
        return next((r for r in self.inputs if r["role"] == role and r["source"] == source), None)

    def output(self, path: str) -> Row | None:
        """The row of an output."""
        return next((r for r in self.outputs if r["path"] == path), None)

    def encode(self) -> bytes:
        """The bytes of the file: the same for the same content."""
        data = {
            "schema": SCHEMA,
            "tool": "loramerge",
            "numerics": self.numerics,
            "inputs": sorted(self.inputs, key=lambda r: (r["role"], r["source"])),
            "outputs": sorted(self.outputs, key=lambda r: str(r["path"])),
        }
        return (json.dumps(data, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def read_lock(path: Path, name: str) -> Lock | None:
    """Reads a lock; None where there is none.

    Raises:
        InputError: `lock.invalid`, `lock.schema`.
    """
    if not os.path.lexists(path):
        return None
    source = FileSource(path, name)
    try:
        raw = source.read(0, source.size)
    finally:
        source.close()
    data = strictjson.loads(raw, where=name, code="lock.invalid", max_bytes=MAX_BYTES)
    fix = "write it again: loramerge lock RECIPE.toml"
    if not isinstance(data, dict) or data.get("tool") != "loramerge":
        raise InputError("lock.invalid", "is not a lock of loramerge", fix=fix, file=name)
    if data.get("schema") != SCHEMA:
        raise InputError("lock.schema", f"has schema {data.get('schema')}, this is {SCHEMA}", fix=fix, file=name)
    lock = Lock(data.get("numerics") or {}, data.get("inputs") or [], data.get("outputs") or [])
    if not _sound(lock):
        raise InputError("lock.invalid", "is not a lock of loramerge", fix=fix, file=name)
    return lock


def _sound(lock: Lock) -> bool:
    """Whether everything is of the type that it is read as."""
    if not isinstance(lock.numerics, dict) or not isinstance(lock.inputs, list) or not isinstance(lock.outputs, list):
        return False
    for row in (*lock.inputs, *lock.outputs):
        if not isinstance(row, dict) or not all(isinstance(f, dict) for f in row.get("files") or ()):
            return False
        if any(not isinstance(f.get(k), t) for f in row.get("files") or () for k, t in _FILE.items()):
            return False
    texts = ("repo", "revision", "commit", "path")
    for row in lock.inputs:
        if not isinstance(row.get("source"), str) or row.get("role") not in ("base", "adapter"):
            return False
        if "commit" in row and not (_COMMIT.fullmatch(str(row["commit"])) and row.get("repo")):
            return False
        if not isinstance(row.get("files"), list) or any(not isinstance(row.get(k, ""), str) for k in texts):
            return False
    types = {"path": str, "make": dict, "identity": str}
    return all(
        all(isinstance(row.get(key), kind) for key, kind in types.items())
        and isinstance(row.get("files", []), list)
        and isinstance(row.get("pushed", {}), dict)
        for row in lock.outputs
    )


_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = {"name": str, "size": int, "sha256": str}


def write_lock(path: Path, lock: Lock) -> bool:
    """Writes a lock in one step, if it is not there already in these very bytes; whether it was written.

    Raises:
        OutputError: `output.*`.
    """
    raw = lock.encode()
    if path.is_file() and path.read_bytes() == raw:
        return False
    with output_errors(path):
        sweep_partials(path)
        part = partial_path(path)
        try:
            write_small_file(part, raw)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
    return True


# ------------------------------------------------------------------------------------------------ identities


def identities(steps: Sequence[Step], inputs: Sequence[Row], computing: Mapping[str, Any]) -> dict[str, str]:
    """By the path of every output: a digest of all that its bytes are made of, the processor aside.

    Args:
        steps: in the order in which they are made.
        inputs: rows of all inputs.
        computing: the numerics.
    """
    rows = {(row["role"], row["source"]): row for row in inputs}
    found: dict[str, str] = {}
    for step in steps:
        parts = []
        for role, source in step.inputs:
            if source.output is not None:
                parts.append({"output": source.output, "identity": found[source.output]})
            else:
                row = rows[role, source.text]
                parts.append({key: row[key] for key in ("source", "role", "commit", "files") if key in row})
        content = {"make": step.settled(), "inputs": parts, "numerics": numerics.lasting(dict(computing))}
        raw = json.dumps(content, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
        found[step.text] = hashlib.sha256(raw).hexdigest()
    return found


# ------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True)
class Difference:
    """One thing that is not as locked: the code of its error, and a sentence."""

    code: str
    text: str


def recipe_differences(recipe: Recipe, lock: Lock) -> list[Difference]:
    """How a recipe asks for something else than what is locked."""
    found = []
    made = {step.text: step for step in recipe.steps}
    for path in [r["path"] for r in lock.outputs if r["path"] not in made]:
        found.append(Difference("lock.recipe", f"the output {quoted(path)} is locked, the recipe has it no more"))
    for step in recipe.steps:
        row = lock.output(step.text)
        if row is None:
            found.append(Difference("lock.recipe", f"the output {quoted(step.text)} is not locked"))
            continue
        mine = json.loads(json.dumps(step.settled()))
        for key in sorted({*mine, *row["make"]}):
            if mine.get(key) != row["make"].get(key):
                what = f"{key} of the output {quoted(step.text)}"
                told = f"{_short(row['make'].get(key))} is locked, the recipe says {_short(mine.get(key))}"
                found.append(Difference("lock.recipe", f"{what}: {told}"))
    wanted = {(role, source.text) for role, source in recipe.inputs()}
    there = {(r["role"], r["source"]) for r in lock.inputs}
    found += [Difference("lock.input", f"the {role} {quoted(text)} is not locked") for role, text in wanted - there]
    return found


def input_differences(before: Row, now: Row) -> list[Difference]:
    """How an input is not the one that is locked."""
    what = f"the {now['role']} {quoted(now['source'])}"
    if before.get("commit") != now.get("commit"):
        told = f"commit {_short(before.get('commit'))} is locked, it is {_short(now.get('commit'))}"
        return [Difference("lock.commit", f"{what}: {told}")]
    old, new = ({str(f["name"]): f for f in row["files"]} for row in (before, now))
    found = []
    for name in sorted({*old, *new}):
        if name not in new:
            found.append(Difference("lock.input", f"{what}: {quoted(name)} is locked and gone"))
        elif name not in old:
            found.append(Difference("lock.input", f"{what}: {quoted(name)} is new"))
        elif old[name] != new[name]:
            found.append(Difference("lock.input", f"{what}: {quoted(name)} is not the file that is locked"))
    return found


def version_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Versions that are not those that are locked."""
    old, new = numerics.lasting(dict(before)), numerics.lasting(dict(now))
    return [
        Difference("lock.version", f"{name} {old.get(name, 'none')} is locked, this is {new.get(name, 'none')}")
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
