"""A checkpoint on disk: which files hold its weights, and which tensor lies where. Reads headers only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramerge.errors import InputError, MismatchError, UnsafeError, UnsupportedError
from loramerge.tensors import magic, safetensors, shards, strictjson
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource, FileSource, stat_file, unreadable
from loramerge.tensors.text import quoted, some

PickleReader = Callable[[FileSource], Header]
"""Reads the header of a PyTorch file: `loramerge.pickled.read_header`, or None where that is not allowed."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 16_000_000

# Weights of an adapter, and what trainers leave beside weights under a weight file's suffix.
_ADAPTERS = ("adapter_model.", "adapter_model-", "adapters.", "pytorch_lora_weights.")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_COMPONENTS = ("transformer", "unet", "prior", "decoder")


@dataclass(frozen=True)
class WeightFile:
    """One file of weights. `name`: relative to the checkpoint's directory (posix); `kind`: how it is kept."""

    name: str
    source: ByteSource
    header: Header
    kind: str  # "safetensors" or "pickle"


@dataclass(frozen=True)
class Located:
    """A tensor and the file that it lies in."""

    file: WeightFile
    info: TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name in one or more files, from headers alone.

    `directory` is None for a single file. `index` is the index's metadata and `index_name` its file name,
    both None without an index. `tensors` goes file by file (sorted by name), in each by offset.
    """

    name: str
    path: Path
    directory: Path | None
    files: tuple[WeightFile, ...]
    tensors: dict[str, Located]
    index: dict[str, Any] | None
    index_name: str | None
    config: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(located.info.nbytes for located in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raise InputError ``input.changed`` if any weight file is not what it was when it was opened."""
        for file in self.files:
            file.source.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.source.close()


def open_checkpoint(
    path: str | Path,
    *,
    read_pickle: PickleReader | None = None,
    weight_names: Sequence[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint, a directory or a single file, and read its headers.

    Args:
        path: what the user typed.
        read_pickle: reader for PyTorch files; None refuses them.
        weight_names: look for these file names only, the first that exists (for adapter directories).

    Raises:
        InputError: ``input.*``, ``safetensors.*``, ``index.*``, ``config.invalid``,
            ``checkpoint.no-weights``, ``checkpoint.ambiguous``; UnsafeError: ``pickle.refused``,
            ``index.unsafe-name``; MismatchError: ``base.is-adapter``; UnsupportedError: ``base.pipeline``.
    """
    name = str(path)
    if not name:
        raise InputError("input.missing", "the path is empty", fix="give a file or a directory", file="''")
    path = Path(path)
    stat_file(path, name)
    directory = path if path.is_dir() else None
    config_directory = path.parent if path.name == "model.safetensors" else directory
    index: shards.Index | None = None
    with contextlib.ExitStack() as on_failure:
        if directory is None:
            files = [_open_file(path, path.name, name, read_pickle, on_failure)]
        else:
            choice, single = _choose(directory, name, weight_names)
            if choice.endswith(".index.json"):
                suffixes = (".safetensors",) if choice.endswith(".safetensors.index.json") else PICKLE_SUFFIXES
                if suffixes is PICKLE_SUFFIXES and read_pickle is None:
                    raise _pickle_refused(os.path.join(name, choice))
                index = shards.read_index(directory / choice, os.path.join(name, choice), suffixes)
                files = _open_shards(directory, name, index, read_pickle, on_failure)
                if single is not None and single not in index.files:
                    _check_same(directory, name, index, single, read_pickle)
            else:
                where = os.path.join(name, choice)
                files = [_open_file(directory / choice, choice, where, read_pickle, on_failure)]
        config = _read_config(config_directory, name if directory else os.path.dirname(name))
        on_failure.pop_all()
    return Checkpoint(
        name=name,
        path=path,
        directory=directory,
        files=tuple(files),
        tensors={info.name: Located(file, info) for file in files for info in file.header.tensors.values()},
        index=None if index is None else index.metadata,
        index_name=None if index is None else index.name,
        config=config,
    )


def _open_file(
    path: Path, name: str, where: str, read_pickle: PickleReader | None, on_failure: contextlib.ExitStack
) -> WeightFile:
    source = FileSource(path, where)
    on_failure.callback(source.close)
    kind = magic.identify(source.read(0, min(source.size, magic.PREFIX_BYTES)), source.size)
    lower = name.lower()
    if kind in ("zip", "pickle") and not lower.endswith(".safetensors"):
        if read_pickle is None:
            raise _pickle_refused(where)
        return WeightFile(name, source, read_pickle(source), "pickle")
    if kind == "safetensors" and lower.endswith(PICKLE_SUFFIXES):
        what, fix = magic.describe(kind)
        raise InputError("input.format", f"is {what} under the name of a PyTorch file", fix=fix, file=where)
    return WeightFile(name, source, safetensors.read_header(source), "safetensors")


def _open_shards(
    directory: Path,
    name: str,
    index: shards.Index,
    read_pickle: PickleReader | None,
    on_failure: contextlib.ExitStack,
) -> list[WeightFile]:
    files = []
    for file in index.files:
        try:
            files.append(_open_file(directory / file, file, os.path.join(name, file), read_pickle, on_failure))
        except InputError as error:
            if error.code == "input.missing":
                raise shards.missing_shard(index, file) from None
            raise
    shards.check_shards(index, {file.name: file.header for file in files})
    return files


def _check_same(directory: Path, name: str, index: shards.Index, single: str, read_pickle: PickleReader | None) -> None:
    """An index and a single file side by side are one checkpoint twice, or nobody knows which is meant."""
    with contextlib.ExitStack() as stack:
        other = _open_file(directory / single, single, os.path.join(name, single), read_pickle, stack)
        if other.header.tensors.keys() == index.weight_map.keys():
            return
    message = f"holds both {quoted(index.name)} and {quoted(single)}, with different tensors"
    fix = f"remove one of them, or give {os.path.join(name, single)} itself"
    raise InputError("checkpoint.ambiguous", message, fix=fix, file=name)


def _choose(directory: Path, where: str, weight_names: Sequence[str] | None) -> tuple[str, str | None]:
    """The weight file or index to open, and the single file that lies beside an index."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise unreadable(error, where) from None
    if weight_names is not None:
        for name in weight_names:
            if name in names:
                return name, None
        raise _no_weights(names, where, f"holds no {' or '.join(weight_names)}")
    if "model_index.json" in names:
        component = next((name for name in _COMPONENTS if name in names), "transformer")
        message = "is a diffusers pipeline of several models, not one checkpoint"
        fix = f"give one component folder, for example {os.path.join(where, component)}"
        raise UnsupportedError("base.pipeline", message, fix=fix, file=where)
    weights = [name for name in names if not name.startswith((*_ADAPTERS, *_NOT_WEIGHTS, "."))]
    groups = (((".safetensors",), "model.safetensors"), (PICKLE_SUFFIXES, "pytorch_model.bin"))
    for suffixes, usual in groups:
        indexes = [name for name in weights if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        chosen = _one(indexes, f"{usual}.index.json", where)
        if chosen is not None:
            single = chosen.removesuffix(".index.json")
            return chosen, single if single in names else None
        chosen = _one([name for name in weights if name.endswith(suffixes)], usual, where)
        if chosen is not None:
            return chosen, None
    adapters = [name for name in names if name.startswith(_ADAPTERS) and not name.endswith(".json")]
    if adapters or "adapter_config.json" in names:
        message = "is an adapter, not a base checkpoint; are the arguments swapped?"
        raise MismatchError("base.is-adapter", message, fix="give the base first, then the adapters", file=where)
    raise _no_weights(names, where, "holds no weights")


def _one(names: list[str], usual: str, where: str) -> str | None:
    """`usual` if it is there, else the only name, else None; several are an error."""
    if usual in names or len(names) < 2:
        return usual if usual in names else next(iter(names), None)
    message = f"holds several weight files, and none says which is meant: {some(names)}"
    fix = f"give one of the files, for example {os.path.join(where, names[0])}"
    if all("-of-" in name for name in names):
        message = f"holds the parts of a sharded checkpoint without its index: {some(names)}"
        fix = f"download {usual}.index.json into the directory"
    raise InputError("checkpoint.ambiguous", message, fix=fix, file=where)


def _no_weights(names: list[str], where: str, reason: str) -> InputError:
    found = f"it holds {some(names, 10)}" if names else "it is empty"
    fix = "give the directory or the file that holds the weights"
    return InputError("checkpoint.no-weights", f"{reason}; {found}", fix=fix, file=where)


def _pickle_refused(where: str) -> UnsafeError:
    message = "is a PyTorch pickle file, which can hold code"
    fix = "pass --allow-pickle to read its tensors only, or convert it to safetensors"
    return UnsafeError("pickle.refused", message, fix=fix, file=where)


def _read_config(directory: Path | None, where: str) -> dict[str, Any] | None:
    if directory is None or not os.path.lexists(directory / "config.json"):
        return None
    where = os.path.join(where, "config.json")
    source = FileSource(directory / "config.json", where)
    try:
        if source.size > MAX_CONFIG_BYTES:
            message = f"has {source.size} bytes, more than the {MAX_CONFIG_BYTES} that are accepted"
            raise InputError("config.invalid", message, fix="check the file", file=where)
        data = source.read(0, source.size)
    finally:
        source.close()
    config = strictjson.loads(data, where=where, code="config.invalid")
    if not isinstance(config, dict):
        raise InputError("config.invalid", "is not a JSON object", fix="check the file", file=where)
    return config
