"""A pipeline: a directory of several models, whose `model_index.json` lists the folder of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramerge.errors import InputError, UnsafeError
from loramerge.tensors import strictjson
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import quoted, some

INDEX = "model_index.json"
MAX_INDEX_BYTES = 16_000_000

_OTHER_FORMATS = (".onnx", ".gguf", ".msgpack", ".h5", ".ot", ".npz", ".tflite")

_FIX = "download the pipeline again"


@dataclass(frozen=True, slots=True)
class Listed:
    """A component that the index lists and whose folder is there: its folder, its class."""

    folder: str
    class_name: str


def is_pipeline(directory: Path) -> bool:
    """Whether a directory says that it is a pipeline."""
    return os.path.lexists(directory / INDEX)


def read_model_index(directory: Path, where: str) -> list[Listed]:
    """The components of a pipeline, sorted by folder.

    An entry `"unet": ["library", "Class"]` is a component, `[null, null]` one that the pipeline goes without; what
    begins with `_` and every other value are settings (diffusers 0.42, pipelines/pipeline_utils.py).

    Args:
        directory: the pipeline.
        where: its name as the user would type it.

    Raises:
        InputError: `pipeline.invalid` (the index), `pipeline.missing-component`; UnsafeError: `pipeline.unsafe-name`.
    """
    shown = os.path.join(where, INDEX)
    source = FileSource(directory / INDEX, shown)
    try:
        if source.size > MAX_INDEX_BYTES:
            message = f"has {source.size} bytes, more than the {MAX_INDEX_BYTES} that are accepted"
            raise InputError("pipeline.invalid", message, fix=_FIX, file=shown)
        raw = source.read(0, source.size)
    finally:
        source.close()
    document = strictjson.loads(raw, where=shown, code="pipeline.invalid", max_bytes=MAX_INDEX_BYTES)
    if not isinstance(document, dict):
        raise InputError("pipeline.invalid", "is not a JSON object", fix=_FIX, file=shown)
    components = []
    for name, value in document.items():
        if name.startswith("_") or not _is_entry(value):
            continue
        _check_folder(directory, name, shown)
        if value[0] is not None:
            components.append(Listed(name, value[1] or ""))
    missing = sorted(c.folder for c in components if not (directory / c.folder).is_dir())
    if missing:
        message = f"lists {some(missing)}, and no such folder is there"
        fix = "download the missing folder; [null, null] in the index says that the pipeline goes without it"
        raise InputError("pipeline.missing-component", message, fix=fix, file=shown)
    return sorted(components, key=lambda c: c.folder)


def _is_entry(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)


def _check_folder(directory: Path, name: str, where: str) -> None:
    """Refuses a name that is anything but a folder of the directory itself, on any operating system."""
    reason = ""
    if name in ("", ".", "..") or any(char in name for char in "/\\:\0"):
        reason = "is not the name of a folder in it"
    elif os.path.islink(directory / name):
        reason = "is a link to another place"
    if reason:
        fix = "do not use this pipeline unless you know who made it; a folder of its own may replace a link"
        raise UnsafeError("pipeline.unsafe-name", f"component {quoted(name)} {reason}", fix=fix, file=where)


def is_model_without_weights(names: Sequence[str]) -> bool:
    """Whether a folder without weights that can be read, of which these are the files, should hold some.

    It does if it has weights of another format, or a model's config and none of what goes without weights.

    Schedulers, tokenizers and processors have a config named after what they are; some tokenizers come with a copy of
    their model's `config.json`.
    """
    if any(name.endswith(_OTHER_FORMATS) for name in names):
        return True
    other = [n for n in names if n.endswith("_config.json") and n != "generation_config.json"]
    return "config.json" in names and not other


def input_folders(path: Path) -> list[Path]:
    """The folders of a pipeline, all of them inputs when it is; none of anything else."""
    if not (path.is_dir() and is_pipeline(path)):
        return []
    try:
        with os.scandir(path) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []  # reported where inputs are opened
