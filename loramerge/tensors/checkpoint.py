"""A checkpoint on disk: which files hold its weights, and which tensor lies where. Reads headers only."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loramerge.errors import InputError, MismatchError, UnsafeError, UnsupportedError
from loramerge.tensors import gguf, magic, mounts, onnx_file, pipeline, safetensors, shards, strictjson
from loramerge.tensors.interrupted import refuse_interrupted
from loramerge.tensors.onnx_graph import Model
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import ByteSource, FileSource, stat_file, unreadable
from loramerge.tensors.text import quoted, some

PickleReader = Callable[[ByteSource], Header]
"""Reads the header of a PyTorch file: `loramerge.pickled.read_header`, or None where that is not allowed."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 16_000_000

# Weights of an adapter, and what trainers leave beside weights under a weight file's suffix.
_ADAPTERS = ("adapter_model.", "adapter_model-", "adapters.", "pytorch_lora_weights.")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_COMPONENTS = ("transformer", "unet", "prior", "decoder")

# Where a directory holds several files of weights, the first of these is the one that loaders take.
_USUAL = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_USUAL_ONNX = ("model.onnx",)
_USUAL_PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")

# `model.safetensors.index.json`, or `model.safetensors.index.fp16.json` for the variant fp16.
_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")


@dataclass(frozen=True)
class WeightFile:
    """One file of weights. `name`: relative to the checkpoint's directory (posix); `kind`: how it is kept.

    `component`: the folder of a pipeline that it is of. The names in `header` then begin with it: `unet/conv_in.weight`
    is `conv_in.weight` in the file.
    """

    name: str
    source: ByteSource
    header: Header
    kind: str  # "safetensors", "pickle", "gguf", "onnx" (a graph, with what weights it holds) or "onnx-data"
    component: str = ""
    sha256: str | None = None
    """Of the whole file, where that is known before it is read."""

    @property
    def frame(self) -> bytes:
        """The bytes that are no tensor's: the header, or those of all gaps."""
        if self.header.gaps is None:
            return self.source.read(0, self.header.data_start)
        return b"".join(self.source.read(begin, end - begin) for begin, end in self.header.gaps)


@dataclass(frozen=True)
class Located:
    """A tensor and the file that it lies in."""

    file: WeightFile
    info: TensorInfo


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its folder, its class as the pipeline calls it, its tensors by their own names."""

    folder: str
    class_name: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name in one or more files, from headers alone.

    `directory` is None for a single file. `index` is the index's metadata and `index_name` its file name,
    both None without an index. `tensors` goes file by file (sorted by name), in each by offset.

    A pipeline has `components`; its files and tensors are theirs, named `folder/file` and `folder/tensor`, and it has
    neither index nor config of its own.
    """

    name: str
    path: Path
    directory: Path | None
    files: tuple[WeightFile, ...]
    tensors: dict[str, Located]
    index: dict[str, Any] | None
    index_name: str | None
    config: dict[str, Any] | None
    components: tuple[Component, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from, where that is not only a path: `repo`, `commit`."""
    onnx: Model | None = None
    """The graph, where it is an ONNX model."""

    @property
    def models(self) -> tuple[Component, ...]:
        """The components; of a checkpoint of one model, that model, in no folder."""
        return self.components or (Component("", "", self),)

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
    onnx: bool = False,
) -> Checkpoint:
    """Open a checkpoint, a directory or a single file, and read its headers.

    Args:
        path: what the user typed.
        read_pickle: reader for PyTorch files; None refuses them.
        weight_names: look for these file names only, the first that exists (for adapter directories).
        onnx: an ONNX model will do, whose tensors have the names and shapes of the graph and not of modules.

    Raises:
        InputError: ``input.*`` (``input.interrupted``: it is being rewritten in place, or such a run was
            interrupted), ``safetensors.*``, ``index.*``, ``config.invalid``,
            ``checkpoint.no-weights``, ``checkpoint.ambiguous``, ``pipeline.*``; UnsafeError: ``pickle.refused``,
            ``index.unsafe-name``, ``pipeline.unsafe-name``; MismatchError: ``base.is-adapter``; UnsupportedError:
            ``base.pipeline``: a pipeline whose index names no weights; ``base.onnx``.
    """
    if not str(path):
        raise InputError("input.missing", "the path is empty", fix="give a file or a directory", file="''")
    name, path = mounts.shown(path), Path(path)
    if not mounts.exists(path) or mounts.mounted(path) is None:
        stat_file(path, name)
    if weight_names is None and path.is_dir() and pipeline.is_pipeline(path):
        refuse_interrupted(path, name)
        return _open_pipeline(path, name, read_pickle)
    opened = _open_model(path, name, read_pickle, weight_names)
    if opened.onnx is not None and not onnx:
        opened.close()
        raise UnsupportedError(
            "base.onnx",
            "is an ONNX model, whose tensors have the names and shapes of its graph, not those of modules",
            fix="give the checkpoint that it was exported from",
            file=name,
        )
    return opened


def _open_pipeline(path: Path, name: str, read_pickle: PickleReader | None) -> Checkpoint:
    """Opens every component that holds weights, each as the checkpoint that it is."""
    components: list[Component] = []
    with contextlib.ExitStack() as on_failure:
        for listed in pipeline.read_model_index(path, name):
            folder, where = path / listed.folder, os.path.join(name, listed.folder)
            if not _holds_weights(folder, where):
                continue
            opened = _open_model(folder, where, read_pickle, None)
            on_failure.callback(opened.close)
            components.append(Component(listed.folder, listed.class_name, opened))
        if not components:
            names = _listdir(path, name)
            example = next((n for n in _COMPONENTS if n in names), "transformer")
            message = f"is a pipeline whose {pipeline.INDEX} lists no component that holds weights"
            fix = f"give one component folder, for example {os.path.join(name, example)}"
            raise UnsupportedError("base.pipeline", message, fix=fix, file=name)
        on_failure.pop_all()
    files = tuple(_in_component(file, c.folder) for c in components for file in c.checkpoint.files)
    return Checkpoint(
        name=name,
        path=path,
        directory=path,
        files=files,
        tensors={info.name: Located(file, info) for file in files for info in file.header.tensors.values()},
        index=None,
        index_name=None,
        config=None,
        components=tuple(components),
        origin=_origin(path),
    )


def _holds_weights(folder: Path, where: str) -> bool:
    """Whether a component is a model; schedulers, tokenizers and the like are none.

    Raises:
        InputError: `pipeline.missing-weights` for a model whose weights are not there.
    """
    try:
        if _choose(folder, where, None)[0].endswith(".onnx"):  # no pipeline of these is merged
            raise _no_weights(_listdir(folder, where), where, "holds no weights")
    except InputError as error:
        if error.code != "checkpoint.no-weights":
            raise
        if pipeline.is_model_without_weights(_listdir(folder, where)):
            fix = "download its weights as well, in safetensors format"
            raise InputError("pipeline.missing-weights", error.message, fix=fix, file=where) from None
        return False
    return True


def is_index(name: str) -> bool:
    """Whether a file name is that of an index of weight files."""
    return _INDEX.search(name) is not None


def _in_component(file: WeightFile, folder: str) -> WeightFile:
    """A file of a component under the names that the pipeline has for it and its tensors."""
    tensors = {f"{folder}/{key}": replace(info, name=f"{folder}/{key}") for key, info in file.header.tensors.items()}
    header = replace(file.header, tensors=tensors)
    return replace(file, name=f"{folder}/{file.name}", header=header, component=folder)


def _open_model(
    path: Path, name: str, read_pickle: PickleReader | None, weight_names: Sequence[str] | None
) -> Checkpoint:
    """Opens the checkpoint of one model."""
    refuse_interrupted(path, name)
    directory = path if path.is_dir() else None
    config_directory = path.parent if path.name == "model.safetensors" else directory
    index: shards.Index | None = None
    graph: Model | None = None
    with contextlib.ExitStack() as on_failure:
        if directory is None and path.suffix == ".onnx":
            config_directory = path.parent
            graph, files = _open_onnx(path, path.name, name, on_failure)
        elif directory is None:
            files = [_open_file(path, path.name, name, read_pickle, on_failure)]
        else:
            choice, single = _choose(directory, name, weight_names)
            if (named := _INDEX.search(choice)) is not None:
                stem = choice[: named.start()]
                suffixes = (".safetensors",) if stem.endswith(".safetensors") else PICKLE_SUFFIXES
                if suffixes is PICKLE_SUFFIXES and read_pickle is None:
                    raise _pickle_refused(os.path.join(name, choice))
                index = shards.read_index(directory / choice, os.path.join(name, choice), suffixes)
                files = _open_shards(directory, name, index, read_pickle, on_failure)
                if single is not None and single not in index.files:
                    _check_same(directory, name, index, single, read_pickle)
            elif choice.endswith(".onnx"):
                where = os.path.join(name, choice)
                graph, files = _open_onnx(directory / choice, choice, where, on_failure)
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
        origin=_origin(path),
        onnx=graph,
    )


def _open_onnx(path: Path, name: str, where: str, on_failure: contextlib.ExitStack) -> tuple[Model, list[WeightFile]]:
    """An ONNX model: its graph, and the files that its weights lie in, the graph's own first."""

    def opener(path: Path, where: str) -> ByteSource:
        source, _ = _source(path, where)
        on_failure.callback(source.close)
        return source

    source = opener(path, where)
    kind = magic.identify(source.read(0, min(source.size, magic.PREFIX_BYTES)), source.size)
    if kind not in ("onnx", "unknown"):
        what, fix = magic.describe(kind)
        raise InputError("input.format", f"is {what}, not an ONNX model", fix=fix, file=where)
    graph, parts = onnx_file.open_parts(path, where, source, opener)
    folder = name.rpartition("/")[0]
    inside = f"{folder}/" if folder else ""
    return graph, [
        WeightFile(inside + location if location else name, opened, header, "onnx-data" if location else "onnx")
        for location, (opened, header) in parts.items()
    ]


def _origin(path: Path) -> Mapping[str, str]:
    found = mounts.mounted(path)
    return {} if found is None else found.origin


def _open_file(
    path: Path, name: str, where: str, read_pickle: PickleReader | None, on_failure: contextlib.ExitStack
) -> WeightFile:
    source, sha256 = _source(path, where)
    on_failure.callback(source.close)
    kind = magic.identify(source.read(0, min(source.size, magic.PREFIX_BYTES)), source.size)
    lower = name.lower()
    if kind in ("zip", "pickle") and not lower.endswith(".safetensors"):
        if read_pickle is None:
            raise _pickle_refused(where)
        return WeightFile(name, source, read_pickle(source), "pickle", sha256=sha256)
    if kind == "safetensors" and lower.endswith(PICKLE_SUFFIXES):
        what, fix = magic.describe(kind)
        raise InputError("input.format", f"is {what} under the name of a PyTorch file", fix=fix, file=where)
    if kind == "gguf":
        header, decoded = gguf.read_header(source)
        if header.metadata.get("general.type") == "adapter":
            return WeightFile(name, decoded, header, "gguf", sha256=sha256)
    return WeightFile(name, source, safetensors.read_header(source), "safetensors", sha256=sha256)


def _source(path: Path, where: str) -> tuple[ByteSource, str | None]:
    """A file as a source of bytes, and its SHA-256 where that is known."""
    found = mounts.mounted(path)
    if found is None:
        return FileSource(path, where), None
    at = Path(os.path.abspath(path))
    opener = found.openers.get(at)
    return (FileSource(path, where) if opener is None else opener(where)), found.digests.get(at)


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
    """The weight file or index to open, and the single file that lies beside an index.

    Safetensors go before pickles, an index before files, plain files before those of a variant (`model.fp16.`).
    """
    names = _listdir(directory, where)
    if weight_names is not None:
        for name in weight_names:
            if name in names:
                return name, None
        raise _no_weights(names, where, f"holds no {' or '.join(weight_names)}")
    weights = [name for name in names if not name.startswith((*_ADAPTERS, *_NOT_WEIGHTS, "."))]
    for suffixes, usual in (((".safetensors",), _USUAL), (PICKLE_SUFFIXES, _USUAL_PICKLED)):
        indexes = [n for n in weights if (m := _INDEX.search(n)) and n[: m.start()].endswith(suffixes)]
        plain = [n for n in indexes if n.endswith(".index.json")]
        chosen = _one(plain, [f"{u}.index.json" for u in usual], where)
        if chosen is not None:
            single = chosen.removesuffix(".index.json")
            return chosen, single if single in names else None
        files = [name for name in weights if name.endswith(suffixes)]
        chosen = next((u for u in usual if u in files), None) or _one(indexes, [], where) or _one(files, usual, where)
        if chosen is not None:
            return chosen, None
    if (model := _onnx_model(directory, names, where)) is not None:
        return model, None
    adapters = [name for name in names if name.startswith(_ADAPTERS) and not name.endswith(".json")]
    if adapters or "adapter_config.json" in names:
        message = "is an adapter, not a base checkpoint; are the arguments swapped?"
        raise MismatchError("base.is-adapter", message, fix="give the base first, then the adapters", file=where)
    raise _no_weights(names, where, "holds no weights")


def _onnx_model(directory: Path, names: Sequence[str], where: str) -> str | None:
    """The ONNX model of a directory that holds no other weights: its own, or that in a folder of the usual name."""
    if (chosen := _one([n for n in names if n.endswith(".onnx")], _USUAL_ONNX, where)) is not None:
        return chosen
    if "onnx" not in names or not (directory / "onnx").is_dir():
        return None
    inside = os.path.join(where, "onnx")
    chosen = _one([n for n in _listdir(directory / "onnx", inside) if n.endswith(".onnx")], _USUAL_ONNX, inside)
    return None if chosen is None else f"onnx/{chosen}"


def _listdir(directory: Path, where: str) -> list[str]:
    found = mounts.mounted(directory)
    elsewhere = [] if found is None else found.names_in(Path(os.path.abspath(directory)))
    try:
        return sorted({*os.listdir(directory), *elsewhere})
    except OSError as error:
        raise unreadable(error, where) from None


def _one(names: list[str], usual: Sequence[str], where: str) -> str | None:
    """The first of `usual` that is there, else the only name, else None; several are an error."""
    if len(names) < 2:
        return next(iter(names), None)
    if (chosen := next((u for u in usual if u in names), None)) is not None:
        return chosen
    message = f"holds several weight files, and none says which is meant: {some(names)}"
    fix = f"give one of the files, for example {os.path.join(where, names[0])}"
    if all("-of-" in name for name in names):
        message = f"holds the parts of a sharded checkpoint without its index: {some(names)}"
        fix = f"download {usual[0]}.index.json into the directory" if usual else fix
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
