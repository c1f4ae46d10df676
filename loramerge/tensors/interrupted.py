"""Models that are being rewritten where they lie: how everybody else recognises one and refuses it.

A committed journal (`journal.py`) beside a model says that its files may be half old and half new.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from loramerge.errors import InputError
from loramerge.tensors import strictjson

NAME = "loramerge.journal"
INDEX = "index.json"
MAX_INDEX_BYTES = 1 << 30


def beside(model: Path, name: str) -> Path:
    """What lies beside a single file: `x.loramerge.json` for `x.safetensors`, `x.onnx.loramerge.json` for `x.onnx`.

    An ONNX model keeps its suffix there: the checkpoint that it was made from often has the same name.
    """
    return model.with_name(f"{model.name if model.suffix == '.onnx' else model.stem}.{name}")


def journal_path(model: Path, single_file: bool) -> Path:
    """Where the journal of a model lies: inside a directory, beside a single file."""
    return beside(model, NAME) if single_file else model / NAME


def model_of(journal: Path) -> Path:
    """The model whose journal this is."""
    if journal.name == NAME:
        return journal.parent
    stem = journal.name.removesuffix(f".{NAME}")
    return journal.with_name(stem if stem.endswith(".onnx") else f"{stem}.safetensors")


def journals(path: Path) -> list[Path]:
    """The committed journals that concern a model: its own, that of a directory or pipeline around it, and those of
    files in it."""
    found: dict[str, Path] = {}
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for journal in _around(place):
            found.setdefault(os.path.realpath(journal), journal)
    return list(found.values())


def _around(place: Path) -> Iterator[Path]:
    if os.path.isdir(place):
        yield from _inside(place)
        levels = [(place.parent, place.name)]
    else:
        own = journal_path(place, True)
        if os.path.isdir(own):
            yield own
        levels = [(place.parent, place.name), (place.parent.parent, f"{place.parent.name}/{place.name}")]
    for folder, relative in levels:
        journal = folder / NAME
        if os.path.isdir(journal) and _names(journal, relative):
            yield journal


def _inside(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (entry.name == NAME or entry.name.endswith(f".{NAME}")) and entry.is_dir(follow_symlinks=False):
                    yield folder / entry.name
    except OSError:
        return  # reported where the model is opened


def _names(journal: Path, relative: str) -> bool:
    """Whether a journal rewrites a file, or one in a folder; in doubt it does."""
    try:
        raw = (journal / INDEX).read_bytes()
        index = strictjson.loads(raw, where=str(journal), code="journal.damaged", max_bytes=MAX_INDEX_BYTES)
        names = [str(row["name"]) for row in (*index["files"], *index["replace"])] + [str(n) for n in index["remove"]]
    except (OSError, InputError, KeyError, TypeError):
        return True
    return any(name == relative or name.startswith(f"{relative}/") for name in names)


def refuse_interrupted(path: Path, name: str) -> None:
    """Refuses a model that is being rewritten in place, or was when that run was interrupted.

    Args:
        path: the model.
        name: as the user typed it.

    Raises:
        InputError: `input.interrupted`, with the command that finishes the rewriting.
    """
    for journal in journals(path):
        model = model_of(journal)
        own = os.path.realpath(model) == os.path.realpath(path)
        fix = f"loramerge recover {shlex.quote(name if own else str(model))}"
        message = "is being rewritten in place, or such a run was interrupted: its weights may be half old, half new"
        raise InputError("input.interrupted", message, fix=fix, file=name)
