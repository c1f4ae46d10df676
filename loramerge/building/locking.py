"""From a recipe and its old lock to the lock to be: inputs resolved and digested, outputs that still hold kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramerge.building import lock as locks
from loramerge.building import numerics
from loramerge.building.inputs import Inputs, Progress
from loramerge.building.lock import Difference, Lock, Row
from loramerge.building.recipe import Recipe, Source, read_recipe
from loramerge.errors import InputError, LoramergeError, MismatchError
from loramerge.tensors.text import quoted

SCHEMA = 1


def lock(
    path: str | os.PathLike[str],
    version: str,
    *,
    dry_run: bool = False,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Locks a recipe anew. See `loramerge.lock`."""
    recipe = read_recipe(path)
    try:
        old = locks.read_lock(recipe.lock_path, recipe.lock_name)
    except InputError:
        old = None  # it is written anew
    look = Inputs(token, offline, progress)
    rows = [_row(recipe, look, role, source) for role, source in recipe.inputs()]
    new = _arranged(recipe, rows, numerics.identity(version, _exports(recipe)), old)
    changes = [] if old is None else _changes(recipe, old, new)
    if not dry_run and old is not None:
        lost = [row for row in old.outputs if not (new.output(row["path"]) or {}).get("files")]
        note(recipe, old.numerics, [row for row in lost if os.path.lexists(recipe.folder / row["path"])])
    written = False if dry_run else locks.write_lock(recipe.lock_path, new)
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "lock": recipe.lock_name,
        "written": written,
        "dry_run": dry_run,
        "new": old is None,
        "changes": [change.text for change in changes],
        "numerics": dict(new.numerics),
        "inputs": told(new),
        "outputs": [{"path": r["path"], "locked": bool(r.get("files"))} for r in new.outputs],
    }


def prepared(
    recipe: Recipe,
    no_lock: bool,
    locked: bool,
    token: str | None,
    offline: bool,
    version: str,
    told: Callable[[str, str], Progress | None],
) -> tuple[Lock | None, Lock]:
    """The old lock of a recipe, and the one that a build is to end with.

    What is on the Hub stays at the commit that is locked. With `locked` all must be as it is locked.

    Raises:
        InputError: `lock.missing`, `lock.invalid`. MismatchError: `lock.recipe`, `lock.input`.
    """
    old = None if no_lock else locks.read_lock(recipe.lock_path, recipe.lock_name)
    if locked and old is None:
        message = f"there is no {recipe.lock_name}"
        raise InputError("lock.missing", message, fix=f"loramerge lock {recipe.name}", file=recipe.name)
    fix = f"loramerge lock {recipe.name} locks what is there now"
    if locked and old is not None and (found := locks.recipe_differences(recipe, old)):
        raise differences(recipe, found, fix)
    rows, found = [], []
    for role, source in recipe.inputs():
        known = None if old is None else old.input(role, source.text)
        if known is not None and source.path is None and "commit" in known:
            rows.append(known)
            continue
        rows.append(_row(recipe, Inputs(token, offline, told(source.text, "check")), role, source))
        if known is not None:
            found += locks.input_differences(known, rows[-1])
    if locked and found:
        raise differences(recipe, found, fix)
    computing = old.numerics if locked and old is not None else numerics.identity(version, _exports(recipe))
    return old, _arranged(recipe, rows, computing, old, trusted=locked)


def unfinished(recipe: Recipe) -> Path:
    """Where a build notes what it has made, until the lock is written."""
    return recipe.lock_path.with_name(recipe.lock_path.name + ".unfinished")


def earlier(recipe: Recipe, old: Lock | None, path: str) -> list[Row]:
    """What earlier builds made at a path, whatever they made it of, with its files."""
    rows = [row for known in (_noted(recipe), old) if known is not None for row in known.outputs]
    return [row for row in rows if row["path"] == path and row.get("files")]


def note(recipe: Recipe, computing: dict[str, Any], rows: list[Row]) -> None:
    """Notes beside the lock what builds have made, until the lock says it: what a killed build has made need not be
    made again, and what the lock says no more may be replaced.

    Raises:
        OutputError: `output.*`.
    """
    before = _noted(recipe)
    new = [row for row in rows if row.get("files")]
    kept = [] if before is None else [row for row in before.outputs if row not in new]
    if new:
        locks.write_lock(unfinished(recipe), Lock(dict(computing), [], new + kept))


def differences(recipe: Recipe, found: list[Difference], fix: str) -> MismatchError:
    """The error for what is not as locked: the first difference, and how many more there are."""
    first, others = found[0], [d.text for d in found[1:]]
    message = f"{first.text}; and {len(others)} more" if others else first.text
    return MismatchError(first.code, message, fix=fix, file=recipe.lock_name, tensors=others)


def told(lock: Lock) -> list[dict[str, Any]]:
    """The inputs of a lock, for a summary."""
    return [
        {
            **{key: row[key] for key in ("source", "role", "repo", "commit") if key in row},
            "files": len(row["files"]),
            "bytes": sum(f["size"] for f in row["files"]),
        }
        for row in lock.inputs
    ]


# ------------------------------------------------------------------------------------------------ inside


def _exports(recipe: Recipe) -> bool:
    return any(step.to == "onnx" for step in recipe.steps)


def _row(recipe: Recipe, look: Inputs, role: str, source: Source) -> Row:
    allow = any(step.options.allow_pickle for step in recipe.steps for r in step.inputs if r == (role, source))
    try:
        return look.row(role, source, allow)
    except LoramergeError as error:
        if source.path is None and source.text != source.reference:
            error.message += f"; nor is there a path {quoted(source.text)}"
        recipe.document.passed_on(source.at, error)


def _noted(recipe: Recipe) -> Lock | None:
    """What a build that was killed has left."""
    try:
        return locks.read_lock(unfinished(recipe), recipe.lock_name)
    except InputError:
        return None


def _arranged(
    recipe: Recipe, rows: list[Row], computing: dict[str, Any], old: Lock | None, trusted: bool = False
) -> Lock:
    """A lock of these inputs. Outputs of the same identity, made on the same kind of processor, keep their digests.

    `trusted`: those of the old lock keep them in any case.
    """
    identities = locks.identities(recipe.steps, rows, computing)
    known: list[Row] = []
    for before in (old, _noted(recipe)):
        alike = before is not None and before.numerics.get(numerics.CPU) == computing.get(numerics.CPU)
        if before is not None and (alike or trusted):
            known += [row for row in before.outputs if row.get("files")]
    outputs = []
    for step in recipe.steps:
        row: Row = {"path": step.text, "make": step.settled(), "identity": identities[step.text]}
        same = (r for r in known if r["path"] == step.text and r["identity"] == row["identity"])
        if (found := next(same, None)) is not None:
            row |= {key: found[key] for key in ("files", "pushed") if key in found}
        outputs.append(row)
    return Lock(dict(computing), rows, outputs)


def _changes(recipe: Recipe, old: Lock, new: Lock) -> list[Difference]:
    """What a new lock says otherwise."""
    found = locks.recipe_differences(recipe, old) + locks.version_differences(old.numerics, new.numerics)
    for row in new.inputs:
        if (before := old.input(row["role"], row["source"])) is not None:
            found += locks.input_differences(before, row)
    return found
