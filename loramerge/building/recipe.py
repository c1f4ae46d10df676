"""A recipe, read and settled: what every output is made of and how, in the order in which they are made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramerge import methods
from loramerge.building import schema
from loramerge.building.schema import Document
from loramerge.errors import InputError, LoramergeError
from loramerge.hub.reference import SCHEME, parse
from loramerge.merging.run import Options
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import quoted

At = tuple[str | int, ...]

_DEVICE = re.compile(r"auto|cpu|mps|cuda(?::\d+)?")


@dataclass(frozen=True)
class Source:
    """Where an input comes from: a path, a reference to the Hub, or what another output is.

    `text`: as the recipe has it. `path`: on disk, for paths and outputs; None for a reference. `output`: the path of
    the output, as the recipe has it. `at`: where in the recipe it stands.
    """

    text: str
    path: Path | None
    reference: str | None = None
    output: str | None = None
    at: At = field(default=(), compare=False)


@dataclass(frozen=True)
class Push:
    """Where an output is to be published."""

    repo: str
    revision: str | None = None
    public: bool = False
    create_pr: bool = False
    tag: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Step:
    """One output. `text`: its path as the recipe has it; `place`: the same, absolute."""

    text: str
    place: Path
    to: str
    base: Source
    adapters: tuple[tuple[Source, float], ...]
    options: Options
    onnx: Mapping[str, Any]
    checkpoint: Source | None = None
    push: Push | None = None
    at: At = field(default=(), compare=False)

    @property
    def single(self) -> bool:
        """Whether it is one file."""
        return self.place.suffix in (".safetensors", ".onnx")

    @property
    def inputs(self) -> tuple[tuple[str, Source], ...]:
        """Every source with its role, `base` or `adapter`, each once."""
        rows = [("base", self.base), *(("adapter", s) for s, _ in self.adapters)]
        if self.checkpoint is not None:
            rows.append(("base", self.checkpoint))
        return tuple(dict.fromkeys(rows))

    def settled(self) -> dict[str, Any]:
        """How it is made, with all defaults, as the lock has it: plain data of the recipe alone."""
        recorded = self.options.recorded()
        recorded["reversible"] = self.options.reversible
        return {
            "to": self.to,
            "base": self.base.text,
            "adapters": [{"source": source.text, "weight": weight} for source, weight in self.adapters],
            **recorded,
            **({"onnx": dict(self.onnx)} if self.to == "onnx" else {}),
        }


@dataclass(frozen=True)
class Recipe:
    """A recipe. `steps` are in the order in which they are made: what is read is made first."""

    name: str
    path: Path
    folder: Path
    document: Document
    steps: tuple[Step, ...]

    @property
    def lock_path(self) -> Path:
        """Where its lock lies: `recipe.lock` beside `recipe.toml`."""
        return self.path.with_suffix(".lock")

    @property
    def lock_name(self) -> str:
        """The lock, in the user's own words."""
        return os.path.splitext(self.name)[0] + ".lock"

    def inputs(self) -> list[tuple[str, Source]]:
        """Every input that no step makes, with its role, each once."""
        found = {(role, source.text): (role, source) for step in self.steps for role, source in step.inputs}
        return [row for row in found.values() if row[1].output is None]


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe, and checks all that can be checked without opening an input.

    Raises:
        InputError: `input.*` where it cannot be read; `recipe.toml`, `recipe.unknown-key`, `recipe.missing-key`,
            `recipe.type`, `recipe.value`, `recipe.method`, `recipe.missing-file`, `recipe.cycle`,
            `recipe.duplicate-output`, `recipe.output`: each names the line and the fix.
    """
    name, where = os.fspath(path), Path(path)
    source = FileSource(where, name)
    try:
        raw = source.read(0, source.size)
    finally:
        source.close()
    folder = Path(os.path.abspath(where)).parent
    if where.suffix == ".lock":
        raise InputError("recipe.invalid", "is a lock", fix=f"give {where.with_suffix('.toml')}", file=name)
    document = Document(raw, name)
    steps = _Reader(document, folder).steps()
    return Recipe(name, Path(os.path.abspath(where)), folder, document, tuple(_ordered(steps, document)))


class _Reader:
    """From tables to steps."""

    def __init__(self, document: Document, folder: Path) -> None:
        self.document, self.folder = document, folder
        self.places: dict[Path, str] = {}

    def steps(self) -> list[Step]:
        document = self.document
        top = document.table(document.data, schema.TOP, (), "a recipe")
        if top.get("schema", schema.SCHEMA) != schema.SCHEMA:
            document.error(("schema",), f"schema is {top['schema']}, this is {schema.SCHEMA}", "schema = 1")
        given = document.need(top, "output", schema.TOP, (), "the recipe")
        rows: list[tuple[Any, At]] = [(given, ("output",))]
        if isinstance(given, list):
            rows = [(row, ("output", number)) for number, row in enumerate(given)]
        if not rows:
            document.error(("output",), "there is no output", 'add path = "dist/model" below [[output]]')
        tables = [(document.table(row, schema.OUTPUT, at, "an output"), at) for row, at in rows]
        for table, at in tables:
            self._place(table, at)
        return [self._step(top, table, at) for table, at in tables]

    def _place(self, table: Mapping[str, Any], at: At) -> None:
        """Notes where an output goes."""
        document = self.document
        text = document.need(table, "path", schema.OUTPUT, at, "an output")
        where = (*at, "path")
        if "://" in text:
            fix = f'path = "dist/model", and push = {{ repo = "{text.partition("://")[2]}" }}'
            document.error(where, f"path is {quoted(text)}, which is no path", fix, "recipe.output")
        place = Path(os.path.abspath(self.folder / text))
        for other, shown in self.places.items():
            if other == place:
                message = f"the output {quoted(text)} is there twice"
                document.error(where, message, "give each output a path of its own", "recipe.duplicate-output")
            if other in place.parents or place in other.parents:
                message = f"the outputs {quoted(shown)} and {quoted(text)} lie one in the other"
                document.error(where, message, "give them paths side by side", "recipe.duplicate-output")
        if place == self.folder or place in self.folder.parents:
            document.error(where, "the output would replace the recipe's own folder", 'path = "dist"', "recipe.output")
        self.places[place] = text

    def _step(self, top: Mapping[str, Any], table: Mapping[str, Any], at: At) -> Step:
        document = self.document
        own_base = "base" in table
        if not own_base and "base" not in top:
            document.need(top, "base", schema.TOP, (), "the recipe")
        base_at: At = (*at, "base") if own_base else ("base",)
        base = self._source(table["base"] if own_base else top["base"], base_at)
        # A base of its own is another model, perhaps one with these adapters in it already.
        mine = "adapters" in table or own_base
        adapters = self._adapters((table if mine else top).get("adapters", []), (*at,) if mine else ())
        to = table.get("to", "safetensors")
        place = Path(os.path.abspath(self.folder / table["path"]))
        self._check_target(table, to, place, len(adapters), at)
        options, checkpoint = self._options(top, table, at, len(adapters))
        onnx = document.table(table.get("onnx", {}), schema.ONNX, (*at, "onnx"), "onnx")
        return Step(
            text=table["path"],
            place=place,
            to=to,
            base=base,
            adapters=adapters,
            options=options,
            onnx=onnx,
            checkpoint=checkpoint,
            push=self._push(table, at),
            at=at,
        )

    def _check_target(self, table: Mapping[str, Any], to: str, place: Path, count: int, at: At) -> None:
        if to != "onnx" and not count and place.suffix in (".onnx", ".safetensors"):
            message = "without adapters it is a copy of its base, which is no single file"
            self.document.error((*at, "path"), message, 'add adapters = [{ source = "lora" }]', "recipe.output")
        if to == "onnx" and place.suffix in (".onnx", ".safetensors"):
            fix = f'path = "{os.path.splitext(table["path"])[0]}"'
            self.document.error((*at, "path"), "an ONNX export is a directory", fix, "recipe.output")
        if to != "onnx" and "onnx" in table:
            self.document.error((*at, "onnx"), "onnx is for outputs to ONNX", 'add to = "onnx"', "recipe.value")

    def _push(self, table: Mapping[str, Any], at: At) -> Push | None:
        if "push" not in table:
            return None
        document, where = self.document, (*at, "push")
        given = document.table(table["push"], schema.PUSH, where, "push")
        repo = document.need(given, "repo", schema.PUSH, where, "push")
        try:
            reference = parse(repo if "://" in repo else SCHEME + repo)
        except LoramergeError:
            reference = None
        if reference is None or reference.revision is not None or reference.path:
            document.error((*where, "repo"), f"repo is {quoted(repo)}", 'repo = "namespace/name"', "recipe.value")
        return Push(**{key.replace("-", "_"): value for key, value in (given | {"repo": reference.repo}).items()})

    # ------------------------------------------------------------------------------------------------ inputs

    def _adapters(self, given: Sequence[Any], at: At) -> tuple[tuple[Source, float], ...]:
        found: list[tuple[Source, float]] = []
        for number, row in enumerate(given):
            where: At = (*at, "adapters", number)
            if isinstance(row, str):
                row = {"source": row}
            table = self.document.table(row, schema.ADAPTER, where, "an adapter")
            text = self.document.need(table, "source", schema.ADAPTER, where, "an adapter")
            at_source = (*where, "source") if "source" in row else where
            found.append((self._source(text, at_source), float(table.get("weight", 1.0))))
        return tuple(found)

    def _source(self, text: str, at: At) -> Source:
        """An output of the recipe, else a path that is there, else a reference to the Hub."""
        document = self.document
        if not text:
            document.error(at, "the source is empty", 'write "base", or "hf://namespace/name"')
        if text.startswith(SCHEME):
            try:
                parse(text)
            except LoramergeError as error:
                document.passed_on(at, error)
            return Source(text, None, text, at=at)
        place = Path(os.path.abspath(self.folder / text))
        if place in self.places:
            return Source(text, place, output=self.places[place], at=at)
        for made, shown in self.places.items():
            if made in place.parents:
                message = f"{quoted(text)} lies inside the output {quoted(shown)}"
                document.error(at, message, f'give the output itself: "{shown}"', "recipe.output")
        if os.path.lexists(place):
            return Source(text, place, at=at)
        first = text.partition("/")[0]
        if not os.path.lexists(self.folder / first) and not text.startswith((".", "~", "/")) and "://" not in text:
            try:
                if parse(SCHEME + text) is not None and text.count("/") == 1 and not _like_a_file(text):
                    return Source(text, None, SCHEME + text, at=at)
            except LoramergeError:
                pass
        near = self._near(place)
        fix = f'did you mean "{near}"?' if near else "paths are taken from the folder that the recipe lies in"
        document.error(at, f"there is no {quoted(text)}", fix, "recipe.missing-file")

    def _near(self, place: Path) -> str | None:
        try:
            names = os.listdir(place.parent)
        except OSError:
            return None
        near = schema.nearest(place.name, names)
        known = schema.nearest(os.path.relpath(place, self.folder), self.places.values())
        return os.path.relpath(place.parent / near, self.folder) if near else known

    # ------------------------------------------------------------------------------------------------ options

    def _options(
        self, top: Mapping[str, Any], table: Mapping[str, Any], at: At, count: int
    ) -> tuple[Options, Source | None]:
        """How to compute: the recipe's tables, key by key replaced by the output's own."""
        document = self.document
        values: dict[str, Any] = {}
        for level, where in ((top, ()), (table, at)):
            for part, keys in (("numerics", schema.NUMERICS), ("options", schema.OPTIONS)):
                given_here = document.table(level.get(part, {}), keys, (*where, part), part)
                if not _DEVICE.fullmatch(device := given_here.get("device", "auto")):
                    fix = "auto, cpu, cuda, cuda:N or mps"
                    document.error(
                        (*where, part, "device"), f"there is no device {quoted(device)}", fix, "recipe.value"
                    )
                values |= given_here
        mine = "method" in table
        method_at: At = (*at, "method") if mine else ("method",)
        name, given = self._method((table if mine else top).get("method", methods.METHODS["linear"].name), method_at)
        checkpoint: Source | None = None
        if "checkpoint" in values:
            own = "checkpoint" in table.get("options", {})
            checkpoint = self._source(values["checkpoint"], (*at, "options", "checkpoint") if own else ("options",))
        fields: dict[str, Any] = {
            key.replace("-", "_"): tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        try:
            methods.chosen(name, given, count=count or None)
            options = Options(**fields, method=name, method_options=given)
            options.check()
        except LoramergeError as error:
            told = method_at if error.code.startswith("usage.method") else at
            document.passed_on(told, error)
        return options, checkpoint

    def _method(self, given: Any, at: At) -> tuple[str, dict[str, Any]]:
        document = self.document
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given.get("name"), str):
            document.error(at, "method has no name", 'add name = "ties"', "recipe.missing-key")
        values = {key.replace("-", "_"): value for key, value in given.items() if key != "name"}
        for key, shown in zip(values, (k for k in given if k != "name"), strict=True):
            if key not in methods.OPTIONS:
                near = schema.nearest(key, methods.OPTIONS)
                fix = f"did you mean {near}?" if near else f"one of {', '.join(methods.OPTIONS)}"
                document.error((*at, shown), f"there is no option {quoted(shown)}", fix, "recipe.unknown-key")
        return given["name"], values


def _like_a_file(text: str) -> bool:
    return text.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".json", ".toml"))


def _ordered(steps: Sequence[Step], document: Document) -> list[Step]:
    """The steps, each after those whose outputs it reads, else as they stand.

    Raises:
        InputError: `recipe.cycle`.
    """
    by_text = {step.text: step for step in steps}
    done: dict[str, Step] = {}
    open_: list[str] = []

    def visit(step: Step, at: At) -> None:
        if step.text in done:
            return
        if step.text in open_:
            circle = [*open_[open_.index(step.text) :], step.text]
            how = " from ".join(quoted(text) for text in circle)
            fix = "give an output another base, or another path"
            document.error(at, f"a cycle: {how}" if len(circle) > 2 else f"{how}: it reads itself", fix, "recipe.cycle")
        open_.append(step.text)
        for _, source in step.inputs:
            if source.output is not None:
                visit(by_text[source.output], source.at)
        open_.pop()
        done[step.text] = step

    for step in steps:
        visit(step, step.at)
    return list(done.values())
