"""Making one output: inputs under the names of the recipe, a merge or an export, and what came out, digested."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loramerge.building import inputs
from loramerge.building.inputs import Progress
from loramerge.building.lock import Row
from loramerge.building.recipe import Source, Step
from loramerge.errors import InputError, MismatchError
from loramerge.merging import receipt, run, undo
from loramerge.merging.plan import Plan
from loramerge.tensors import mounts
from loramerge.tensors.output import Output, check_destination
from loramerge.tensors.text import quoted, some
from loramerge.tensors.writer import output_errors

INNER = ".loramerge-made"
"""Where an output is made inside its own partial, before its files are moved up."""


@dataclass(frozen=True)
class Made:
    """What became of a step."""

    files: list[Row]
    notes: tuple[str, ...] = ()
    retention: float | None = None
    bytes_written: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Maker:
    """Makes outputs.

    Args:
        rows: rows of all inputs, by role and source: the Hub is asked for those commits, files on disk have those
            digests.
        version: of this package.
    """

    rows: Mapping[tuple[str, str], Row]
    version: str
    jobs: int | None = None
    max_memory: int | None = None
    force: bool = False
    token: str | None = field(default=None, repr=False)
    offline: bool = False

    def check(self, step: Step, replaceable: bool) -> None:
        """Refuses what cannot be made, from headers: destination, inputs, and whether they fit each other.

        Outputs of other steps need not be there yet; what reads them is checked when they are.
        """
        self._check_place(step, replaceable)
        if any(source.output is not None for _, source in step.inputs):
            return
        with self._sources(step) as (base, pairs, options):
            plan = run.plan_tensors(base, pairs, options, single_file=step.place.name if step.single else None)
            _close(plan)

    def plan(self, step: Step) -> dict[str, Any] | None:
        """What a merge would do; None where that is not known before another output is there."""
        if any(source.output is not None and not os.path.lexists(source.path or "") for _, source in step.inputs):
            return None
        with self._sources(step) as (base, pairs, options):
            plan = run.plan_tensors(base, pairs, options, single_file=step.place.name if step.single else None)
            _close(plan)
            data: dict[str, Any] = plan.to_data()
            return data

    def make(
        self,
        step: Step,
        replaceable: bool,
        progress: Progress | None,
        before: Callable[[Made], None],
    ) -> Made:
        """Makes an output, which appears complete or not at all.

        Args:
            replaceable: an output that is there may go.
            before: told what was made right before it appears; what it raises keeps it from appearing.
        """
        output = Output(step.place, "file" if step.single else "directory", replaceable)
        try:
            with _folder(step.place), output:
                inner = output.directory / (step.place.name if step.single else INNER)
                with self._sources(step) as (base, pairs, options):
                    made = self._made(step, base, pairs, options, inner, progress)
                if not step.single:
                    for entry in sorted(os.listdir(inner)):
                        os.rename(inner / entry, output.directory / entry)
                    inner.rmdir()
                found = inputs.output_files(output.directory, False)
                made = replace(made, files=inputs.file_digests(found, step.text))
                if step.single:
                    usual = (receipt.receipt_path(step.place, True).name, undo.undo_path(step.place, True).name)
                    output.companions = tuple({*usual, *(n for n, _ in found)} - {step.place.name})
                before(made)
                output.commit()
        finally:
            output.close()
        return made

    # ------------------------------------------------------------------------------------------------ inside

    def _made(
        self, step: Step, base: str, pairs: Sequence[Any], options: run.Options, inner: Path, progress: Progress | None
    ) -> Made:
        if step.to == "onnx" or not pairs:
            from loramerge.exporting import export
            from loramerge.exporting.plan import Settings

            if step.to == "onnx":
                given = {key.replace("-", "_"): value for key, value in step.onnx.items()}
                settings = Settings(dtype=None if options.dtype == "keep" else options.dtype, **given)
                options = replace(options, dtype="keep")
                data = export.export(base, list(pairs), inner, options, settings, self.version, progress=progress)
            else:
                data = export.export_safetensors(base, [], inner, options, self.version, progress)
            return Made([], tuple(data["notes"]), bytes_written=data["bytes_written"])
        plan = run.plan_merge(base, list(pairs), inner, options)
        if step.checkpoint is not None:  # under the name that it has in the recipe
            plan = replace(plan, options={**plan.options, "checkpoint": step.checkpoint.text})
        try:
            done = run.carry_out(plan, inner, options, self.version, progress)
        finally:
            _close(plan)
        return Made([], done.notes, done.retention, done.bytes_written)

    def _check_place(self, step: Step, replaceable: bool) -> None:
        """The destination, where folders around it may have to be made first."""
        place = step.place
        local = [source.path for _, source in step.inputs if source.path is not None]
        if place.parent.is_dir():
            what = "file" if step.single else "directory"
            check_destination(place, inputs=local, force=replaceable, what="file" if what == "file" else "directory")
            return
        around = next(p for p in place.parents if os.path.lexists(p))
        if not around.is_dir():
            raise InputError("recipe.output", f"{quoted(around)} is no folder", fix="give the output another path")
        # A folder that is not there has nothing in it; an input may lie around it all the same.
        check_destination(around / f".{place.name}", inputs=local, force=True, what="directory")

    @contextlib.contextmanager
    def _sources(self, step: Step) -> Iterator[tuple[str, list[tuple[str, float]], run.Options]]:
        """What a merge takes: base, adapters, options. Inputs on disk are called what the recipe calls them."""
        with contextlib.ExitStack() as stack:
            base = self._placed("base", step.base, stack, stream=step.to != "onnx")
            pairs = [(self._placed("adapter", source, stack), weight) for source, weight in step.adapters]
            options = replace(step.options, jobs=self.jobs, max_memory=self.max_memory, force=self.force)
            if step.checkpoint is not None:
                options = replace(options, checkpoint=self._placed("base", step.checkpoint, stack))
            yield base, pairs, options

    def _placed(self, role: str, source: Source, stack: contextlib.ExitStack, stream: bool = False) -> str:
        if source.path is None:
            return self._from_hub(role, source, stream)
        row = self.rows.get((role, source.text), {"files": []})
        root = source.path if source.path.is_dir() else source.path.parent
        digests = {root / str(f["name"]): str(f["sha256"]) for f in row["files"]}
        made = mounts.Mount(source.path, source.text, digests=digests)
        stack.callback(mounts.unmount, source.path)
        return mounts.mount(made)

    def _from_hub(self, role: str, source: Source, stream: bool) -> str:
        """A source at its locked commit, which must hold the files that are locked."""
        from loramerge.hub import finding

        row = self.rows[role, source.text]
        finder = finding.Finder(self.token, self.offline)
        pinned = inputs.pinned_reference(row)
        found = finder.resolved(pinned)
        assert found is not None
        there = {f.name: f.sha256 for f in found.files}
        locked = {str(f["name"]): f["sha256"] for f in row["files"]}
        wrong = [n for n, digest in locked.items() if n not in there or there[n] not in (None, digest)]
        if wrong:
            message = f"{some(wrong)} of {quoted(pinned)} is not the file that is locked"
            raise MismatchError("lock.input", message, fix="do not trust that server; or lock again", tensors=wrong)
        return finder.adapter(pinned) if role == "adapter" else finder.base(pinned, stream=stream)


@contextlib.contextmanager
def _folder(place: Path) -> Iterator[None]:
    """Makes the folders around an output; those made here go again where it fails."""
    missing = [p for p in place.parents if not os.path.lexists(p)]
    with output_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
        raise


def _close(plan: Plan) -> None:
    plan.base.close()
    for adapter, _ in plan.adapters:
        adapter.checkpoint.close()
