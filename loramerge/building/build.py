"""A build: what is there already, what must be made, and the lock of all of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramerge.building import attest, inputs, locking, numerics
from loramerge.building import lock as locks
from loramerge.building.inputs import Progress
from loramerge.building.lock import Lock, Row
from loramerge.building.make import Made, Maker
from loramerge.building.recipe import At, Recipe, Step, read_recipe
from loramerge.errors import LoramergeError, MismatchError, OutputError, UsageError
from loramerge.tensors.text import plural, quoted

SCHEMA = 1

OnStep = Callable[[str, str], Progress | None]
"""Told an input or output and what is about to happen to it (`check`, `build`, `push`); gives a progress for it."""

Pusher = Callable[..., Mapping[str, Any]]
"""`loramerge.push`."""


@dataclass(frozen=True)
class Settings:
    """How to build; the flags of the command line under the same names."""

    locked: bool = False
    no_lock: bool = False
    dry_run: bool = False
    force: bool = False
    jobs: int | None = None
    max_memory: int | None = None
    attest: str | None = None
    builder_id: str | None = None
    no_push: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False

    def check(self) -> None:
        """Raises UsageError for flags that do not go together."""
        if self.locked and self.no_lock:
            raise UsageError("usage.lock", "--locked and --no-lock ask for opposite things", fix="give one of them")
        if self.attest is not None and self.dry_run:
            raise UsageError("usage.attest", "a dry run makes nothing to attest", fix="leave --attest away")
        if self.builder_id is not None and self.attest is None:
            raise UsageError("usage.attest", "--builder-id is for --attest", fix="give --attest FILE too")


@dataclass
class _State:
    """Where a build stands: for every output its row in the lock to be, and whether it must be made."""

    recipe: Recipe
    settings: Settings
    version: str
    old: Lock | None
    new: Lock
    notes: list[str] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    replaceable: set[str] = field(default_factory=set)

    def row(self, step: Step) -> Row:
        """The row of an output in the lock to be."""
        row = self.new.output(step.text)
        assert row is not None
        return row

    @property
    def waiting(self) -> list[Step]:
        """The outputs that are not there yet."""
        return [step for step in self.recipe.steps if self.status[step.text] != "current"]


def build(
    path: str | os.PathLike[str],
    settings: Settings,
    version: str,
    *,
    on_step: OnStep | None = None,
    push: Pusher | None = None,
) -> dict[str, Any]:
    """Builds the outputs of a recipe. See `loramerge.build`."""
    settings.check()
    recipe = read_recipe(path)
    told = on_step or (lambda output, what: None)
    state = locking.prepared(recipe, settings.no_lock, settings.locked, settings.token, settings.offline, version, told)
    work = _State(recipe, settings, version, *state)
    for step in recipe.steps:
        work.status[step.text] = _status(step, work, told(step.text, "check"))
    _check_outputs(work)
    if settings.attest is not None:
        attest.check(Path(settings.attest), settings.force, settings.builder_id)
    maker = _maker(work)
    if work.waiting:
        _check_versions(work)
        for step in work.waiting:
            with _lines(recipe, step):
                maker.check(step, step.text in work.replaceable)
    if settings.dry_run:
        return _result(work, plans={s.text: maker.plan(s) for s in work.waiting if s.to != "onnx"})
    for step in work.waiting:
        progress = told(step.text, "build")
        with _lines(recipe, step):
            _make(step, work, maker, progress)
    _push(work, push, told)
    written = _write_lock(work)
    if settings.attest is not None:
        statement = attest.statement(recipe, work.new, version, settings.builder_id)
        attest.write(Path(settings.attest), statement)
    return _result(work, lock_written=written)


# ------------------------------------------------------------------------------------------------ what is there


def _status(step: Step, work: _State, progress: Progress | None) -> str:
    """`current`: there, and what it should be; `absent`; `stale`: of an earlier build; `foreign`: anything else."""
    if not os.path.lexists(step.place):
        return "absent"
    if work.settings.no_lock:
        return "foreign"
    mine = work.new.output(step.text) or {}
    if mine.get("files") and inputs.same_files(step.place, step.single, mine["files"], progress):
        return "current"
    for row in locking.earlier(work.recipe, work.old, step.text):
        if row["files"] != mine.get("files") and inputs.same_files(step.place, step.single, row["files"], progress):
            return "stale"
    return "foreign"


def _check_outputs(work: _State) -> None:
    """What is in the way must be ours, or may go by `force`.

    Raises:
        OutputError: `output.exists`.
    """
    for step in work.waiting:
        if work.status[step.text] == "foreign" and not work.settings.force:
            known = work.new.output(step.text) or {}
            message = f"the output {quoted(step.text)} is there already, and not what the lock says"
            if work.settings.no_lock:
                message = f"the output {quoted(step.text)} is there already"
            elif not known.get("files"):
                message = f"the output {quoted(step.text)} is there already, and no lock says where it is from"
            raise OutputError("output.exists", message, fix="--force replaces it", file=step.place)
        if work.status[step.text] != "absent":
            work.replaceable.add(step.text)


def _check_versions(work: _State) -> None:
    """With `locked` nothing is made by anything but what made the outputs that are locked.

    Raises:
        MismatchError: `lock.version`.
    """
    if not work.settings.locked or work.old is None:
        return
    now = numerics.identity(work.version, any(step.to == "onnx" for step in work.recipe.steps))
    found = locks.version_differences(work.old.numerics, now)
    if found:
        wanted = " ".join(f"{name}=={work.old.numerics[name]}" for name in now if _differs(name, work.old, now))
        raise locking.differences(work.recipe, found, f"pip install {wanted}, or loramerge lock {work.recipe.name}")


def _differs(name: str, old: Lock, now: Mapping[str, str]) -> bool:
    return name != numerics.CPU and name in old.numerics and old.numerics[name] != now[name]


# ------------------------------------------------------------------------------------------------ making


def _maker(work: _State) -> Maker:
    settings = work.settings
    rows = {(str(row["role"]), str(row["source"])): row for row in work.new.inputs}
    return Maker(
        rows, work.version, settings.jobs, settings.max_memory, settings.force, settings.token, settings.offline
    )


def _make(step: Step, work: _State, maker: Maker, progress: Progress | None) -> None:
    row = work.row(step)
    locked = row.get("files") if work.settings.locked else None

    def before(made: Made) -> None:
        if locked is not None and made.files != sorted(locked, key=lambda r: str(r["name"])):
            raise _other_bytes(work, step, locked, made.files)
        if row.get("files") != made.files:
            if row.get("files"):
                work.notes.append(f"{step.text} came out otherwise than before, though all that went in is the same")
            row["files"] = made.files
            row.pop("pushed", None)
            _remember(work)

    work.made[step.text] = maker.make(step, step.text in work.replaceable, progress, before)
    work.status[step.text] = "built"


def _other_bytes(work: _State, step: Step, locked: list[Row], made: list[Row]) -> MismatchError:
    """What came out is not what is locked, though everything that went in is."""
    assert work.old is not None
    old, new = ({str(r["name"]): r for r in rows} for rows in (locked, made))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    was, here = str(work.old.numerics.get(numerics.CPU)), numerics.cpu()
    message = f"the output {quoted(step.text)} came out otherwise than locked, and was not written"
    fix = f"loramerge build {work.recipe.name} without --locked locks what comes out here"
    if was != here:
        message += f"; the lock was made on {was}, this is {here}"
        fix = 'compute-dtype = "float64" depends least on the processor; or build on the same kind'
    return MismatchError("lock.output", message, fix=fix, file=work.recipe.lock_name, tensors=names)


def _remember(work: _State) -> None:
    """Notes what has been made so far, so that a build that is killed need not be done again."""
    if work.settings.no_lock:
        return
    try:
        locking.note(work.recipe, work.new.numerics, work.new.outputs)
    except OutputError:
        if not work.settings.locked:
            raise


def _write_lock(work: _State) -> bool:
    """Writes the lock, last of all. With `locked` only what it lacked is added: digests of outputs, and pushes."""
    if work.settings.no_lock:
        return False
    try:
        written = locks.write_lock(work.recipe.lock_path, work.new)
    except OutputError as error:
        if not work.settings.locked:
            raise
        work.notes.append(f"the digests of outputs could not be added to the lock: {error.message}")
        return False
    with contextlib.suppress(OSError):
        locking.unfinished(work.recipe).unlink(missing_ok=True)
    return written


def _push(work: _State, push: Pusher | None, told: OnStep) -> None:
    """Publishes outputs, each once: what the lock says was published as it is now is not published again.

    Raises:
        UsageError: `usage.push`. RemoteError: `hub.*`.
    """
    for step in work.recipe.steps:
        if step.push is None:
            continue
        row, target = work.row(step), step.push
        wanted = {"repo": target.repo, "revision": target.revision, "tag": target.tag}
        known = row.get("pushed") or {}
        if all(known.get(key) == value for key, value in wanted.items()) and known:
            continue
        if work.settings.no_push:
            work.notes.append(f"{step.text} was not pushed to {target.repo}, as asked")
            continue
        if push is None:
            message = f"{quoted(step.text)} is to be pushed, which this version cannot do"
            raise UsageError("usage.push", message, fix="--no-push")
        progress = told(step.text, "push")
        done = push(
            step.place,
            target.repo,
            revision=target.revision,
            public=target.public,
            create_pr=target.create_pr,
            tag=target.tag,
            message=target.message,
            token=work.settings.token,
            progress=progress,
        )
        row["pushed"] = {**wanted, "commit": done.get("commit")}
        _remember(work)


# ------------------------------------------------------------------------------------------------ the end


@contextlib.contextmanager
def _lines(recipe: Recipe, step: Step) -> Iterator[None]:
    """Adds to what inputs and options are blamed for where in the recipe they stand."""
    try:
        yield
    except LoramergeError as error:
        if isinstance(error, OutputError) or error.exit_code == 1 or error.code.startswith("lock."):
            raise
        recipe.document.passed_on(_blamed(step, error.file), error)


def _blamed(step: Step, file: str | None) -> At:
    """Where in the recipe the input stands that an error is about; else the output."""
    for _, source in step.inputs:
        if file is not None and (file == source.text or file.startswith(source.text + os.sep)):
            return source.at
    return step.at


def _result(work: _State, lock_written: bool = False, plans: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a build tells."""
    recipe, settings = work.recipe, work.settings
    outputs = []
    for step in recipe.steps:
        row, made = work.row(step), work.made.get(step.text)
        files = row.get("files") or []
        outputs.append(
            {
                "path": step.text,
                "to": step.to,
                "status": work.status[step.text],
                "files": files,
                "bytes": sum(f["size"] for f in files),
                "retention": None if made is None else made.retention,
                "notes": [] if made is None else list(made.notes),
                "pushed": row.get("pushed"),
                **({"plan": (plans or {}).get(step.text)} if settings.dry_run else {}),
            }
        )
    return {
        "schema": SCHEMA,
        "recipe": recipe.name,
        "lock": None if settings.no_lock else recipe.lock_name,
        "lock_written": lock_written,
        "locked": settings.locked,
        "dry_run": settings.dry_run,
        "numerics": dict(work.new.numerics),
        "inputs": locking.told(work.new),
        "outputs": outputs,
        "built": sum(o["status"] == "built" for o in outputs),
        "attestation": settings.attest,
        "notes": work.notes,
        "summary": plural(len(outputs), "output"),
    }
