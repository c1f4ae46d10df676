"""The files that travel with the weights: which are carried, from where, and what the config must say."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.errors import InputError
from loramerge.tensors import mounts
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.source import FileSource

TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The tokenizer's files. They are carried as one set: half of one tokenizer and half of another is neither."""

VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""A directory has a tokenizer of its own if it has one of these."""

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data*", "*.onnx.data",
    "*.h5", "*.msgpack", "*.ot", "*.npz", "*.tflite", "*.mlmodel",
)  # fmt: skip
"""Weights in any format."""

STALE = (
    *WEIGHTS, "*.index.json", "*.index.*.json", "*.partial-*", "*.incomplete", "*.lock",
    "adapter_config.json", "trainer_state.json", "optimizer*", "rng_state*", "README.md", ".git*",
    "loramerge.json", "loramerge.undo", "*loramerge.journal*", ".DS_Store",
)  # fmt: skip
"""Never carried: weights in other formats, indices, training state, and the card, which tells of another model."""

STALE_FOLDERS = (
    ".git",
    ".cache",
    ".huggingface",
    "original",
    "onnx",
    "openvino",
    "coreml",
    "runs",
    "checkpoint-*",
    "*loramerge.journal*",
)

DTYPE_FIELDS = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to carry: `name` in the output (posix), `path` on disk, `origin` as the user typed it.

    `content`: its bytes, where they are known already.
    """

    name: str
    path: Path
    origin: str
    content: bytes | None = None


def collect(base: Checkpoint, adapters: Sequence[Adapter], tokenizer: str = "auto") -> tuple[list[SideFile], str]:
    """The files to carry into a directory of weights, and who the tokenizer comes from (for the summary).

    Args:
        base: its directory's files travel, or for a single file nothing.
        adapters: where one brings a tokenizer, its set replaces the base's whole set.
        tokenizer: `auto`, `base` or `adapter`.

    Raises:
        InputError: `adapter.tokenizer` where two adapters bring different tokenizers, or none does though asked.
    """
    if base.directory is None:
        files = {}
        if base.config is not None:
            path = base.path.parent / "config.json"
            files["config.json"] = SideFile("config.json", path, os.path.join(os.path.dirname(base.name), path.name))
    else:
        files = {f.name: f for f in _walk(base.directory, base.name, [c.folder for c in base.components])}
    for file in base.files:  # whatever it is called
        files.pop(file.name, None)
    if base.components:
        if tokenizer == "adapter":
            message = "a pipeline has its tokenizers in folders of their own, and nothing says which the adapter's is"
            raise InputError("adapter.tokenizer", message, fix="--tokenizer base", file=base.name)
        return [files[name] for name in sorted(files)], "base"
    return _tokenized(files, adapters, tokenizer)


def with_tokenizer(own: Sequence[SideFile], adapters: Sequence[Adapter], tokenizer: str) -> list[SideFile]:
    """The base's side files, with the tokenizer of an adapter instead of its own where that is asked."""
    return _tokenized({file.name: file for file in own}, adapters, tokenizer)[0]


def _tokenized(files: dict[str, SideFile], adapters: Sequence[Adapter], tokenizer: str) -> tuple[list[SideFile], str]:
    whose = "base" if any(_matches(name, TOKENIZER) for name in files) else ""
    bringers = [] if tokenizer == "base" else [a for a in adapters if _brings_tokenizer(a)]
    if tokenizer == "adapter" and not bringers:
        raise InputError("adapter.tokenizer", "no adapter brings a tokenizer", fix="--tokenizer base")
    if bringers:
        first = bringers[0]
        if any(not _same_tokenizer(first, other) for other in bringers[1:]):
            names = ", ".join(a.name for a in bringers)
            raise InputError(
                "adapter.tokenizer",
                f"the adapters bring different tokenizers ({names})",
                fix="--tokenizer base",
            )
        files = {n: f for n, f in files.items() if not _matches(n, TOKENIZER)}
        folder = first.path
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and (_matches(entry.name, TOKENIZER) or entry.name == "generation_config.json"):
                files[entry.name] = SideFile(entry.name, entry, os.path.join(first.name, entry.name))
        whose = first.name
    return [files[name] for name in sorted(files)], whose


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _walk(root: Path, shown: str, components: Sequence[str] = ()) -> list[SideFile]:
    """Regular files below a directory, stale ones left out. Links to files are followed, links to folders not.

    Beside the components of a pipeline, folders with weights are left out too: without those the rest is of no use.
    """
    found = []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = sorted(f for f in folders if not _matches(f, STALE_FOLDERS))
        if components and not inside.parts:
            folders[:] = [f for f in folders if f in components or not _has_weights(root / f)]
        for name in sorted(names):
            path = Path(folder) / name
            if _matches(name, STALE) or not path.is_file():
                continue
            relative = (inside / name).as_posix()
            found.append(SideFile(relative, path, os.path.join(shown, relative)))
    return found


def _has_weights(folder: Path) -> bool:
    found = mounts.mounted(folder)
    elsewhere = [] if found is None else found.names_in(Path(os.path.abspath(folder)))
    try:
        return any(_matches(name, WEIGHTS) for name in (*os.listdir(folder), *elsewhere))
    except OSError:
        return False  # nor will there be anything to carry


def _brings_tokenizer(adapter: Adapter) -> bool:
    return adapter.path.is_dir() and any((adapter.path / name).is_file() for name in VOCABULARY)


def _same_tokenizer(a: Adapter, b: Adapter) -> bool:
    def content(adapter: Adapter) -> dict[str, bytes]:
        return {n: (adapter.path / n).read_bytes() for n in VOCABULARY if (adapter.path / n).is_file()}

    return content(a) == content(b)


def read_side_file(file: SideFile) -> bytes:
    """The bytes of a side file.

    Raises:
        InputError: it cannot be read.
    """
    if file.content is not None:
        return file.content
    source = FileSource(file.path, file.origin)
    try:
        return source.read(0, source.size)
    finally:
        source.close()


def patched_config(raw: bytes, patch: Mapping[str, Any], dtype: str | None) -> bytes:
    """config.json with the fields of `patch` set (nested objects merged) and, where given, another dtype.

    Without a change the bytes stay what they are.
    """
    config = json.loads(raw.decode("utf-8-sig"))
    wanted = {k: v for k, v in patch.items() if config.get(k) != v}
    if dtype is not None:
        wanted |= {f: dtype for f in DTYPE_FIELDS if f in config and config[f] != dtype}
    if not wanted:
        return raw
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict) and key not in ("id2label", "label2id"):
            config[key] |= value
        else:
            config[key] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
