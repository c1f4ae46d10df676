"""The index of a sharded checkpoint: which tensor lies in which file, checked before any file is touched."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from loramerge.errors import InputError, UnsafeError
from loramerge.tensors import strictjson
from loramerge.tensors.safetensors import Header
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import plural, quoted, some

MAX_INDEX_BYTES = 10_000_000
_FIX = "download the index and its files again"


@dataclass(frozen=True)
class Index:
    """A parsed index. `weight_map`: tensor name -> file name; `metadata`: as written, ``{}`` when absent."""

    name: str
    where: str
    metadata: dict[str, Any]
    weight_map: dict[str, str]

    @property
    def files(self) -> list[str]:
        """The names of its files, sorted."""
        return sorted(set(self.weight_map.values()))


def read_index(path: Path, where: str, suffixes: Sequence[str]) -> Index:
    """Read an index and check every file name in it.

    Args:
        path: the index file.
        where: its name as the user would type it.
        suffixes: the suffixes its files may have.

    Raises:
        InputError: ``index.invalid``; UnsafeError: ``index.unsafe-name``.
    """
    source = FileSource(path, where)
    try:
        if source.size > MAX_INDEX_BYTES:
            message = f"index of {source.size} bytes, more than the {MAX_INDEX_BYTES} that are accepted"
            raise InputError("index.invalid", message, fix=_FIX, file=where)
        data = source.read(0, source.size)
    finally:
        source.close()
    document = strictjson.loads(data, where=where, code="index.invalid", max_bytes=MAX_INDEX_BYTES)
    if not isinstance(document, dict):
        raise InputError("index.invalid", "index is not a JSON object", fix=_FIX, file=where)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        message = "index has no weight_map" if weight_map is None else "weight_map is not a JSON object"
        raise InputError("index.invalid", message, fix=_FIX, file=where)
    if not weight_map:
        raise InputError("index.invalid", "weight_map is empty", fix=_FIX, file=where)
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            message = f"weight_map gives no file name for {quoted(tensor)}"
            raise InputError("index.invalid", message, fix=_FIX, file=where, tensors=[tensor])
    metadata = document.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise InputError("index.invalid", "metadata is not a JSON object", fix=_FIX, file=where)
    for file in sorted(set(weight_map.values())):
        check_name(file, suffixes, where)
        _check_links(path.parent, file, where)
    return Index(path.name, where, metadata or {}, weight_map)


def check_name(name: str, suffixes: Sequence[str], where: str) -> None:
    """Refuse a file name that could leave the directory of `where`, on any operating system.

    Raises:
        UnsafeError: ``index.unsafe-name``.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    reason = ""
    if not name:
        reason = "is empty"
    elif windows.drive or windows.root or posix.is_absolute():
        reason = "is not relative"
    elif ".." in windows.parts or ".." in posix.parts:
        reason = "leaves the directory"
    elif any(char in name for char in "\\\0:"):
        reason = "holds a backslash, a colon or a NUL"
    elif any(part in ("", ".") for part in name.split("/")):
        reason = "is not a plain relative path"
    elif not name.endswith(tuple(suffixes)):
        reason = f"does not end in {' or '.join(suffixes)}"
    if reason:
        fix = "do not use this checkpoint unless you know who made it"
        raise UnsafeError("index.unsafe-name", f"file name {quoted(name)} {reason}", fix=fix, file=where)


def check_shards(index: Index, headers: Mapping[str, Header]) -> None:
    """Check that every tensor is in the file that the index names, in no other, and that none is left out.

    Args:
        index: the index.
        headers: file name -> header, for every file of the index.

    Raises:
        InputError: ``index.duplicate``, ``index.misplaced``, ``index.missing-tensor``, ``index.unlisted``.
    """
    found: dict[str, str] = {}
    for file, header in headers.items():
        for tensor in header.tensors:
            if tensor in found:
                message = f"tensor {quoted(tensor)} is in both {quoted(found[tensor])} and {quoted(file)}"
                raise _error("duplicate", message, index, [tensor])
            found[tensor] = file
    for tensor, file in index.weight_map.items():
        if found.get(tensor, file) != file:
            message = f"tensor {quoted(tensor)} should be in {quoted(file)} and is in {quoted(found[tensor])}"
            raise _error("misplaced", message, index, [tensor])
    missing = [tensor for tensor in index.weight_map if tensor not in found]
    if missing:
        files = sorted({index.weight_map[tensor] for tensor in missing})
        message = f"{plural(len(missing), 'tensor')} of the index missing from {some(files)}: {some(missing)}"
        raise _error("missing-tensor", message, index, missing)
    unlisted = [tensor for tensor in found if tensor not in index.weight_map]
    if unlisted:
        files = sorted({found[tensor] for tensor in unlisted})
        message = f"{plural(len(unlisted), 'tensor')} in {some(files)} not listed in the index: {some(unlisted)}"
        raise _error("unlisted", message, index, unlisted)


def missing_shard(index: Index, file: str) -> InputError:
    """The error for a file of the index that is not there: ``index.missing-file``."""
    lost = [tensor for tensor, home in index.weight_map.items() if home == file]
    count = Counter(index.weight_map.values())[file]
    message = f"file {quoted(file)} of the index, with {plural(count, 'tensor')}, does not exist"
    return InputError("index.missing-file", message, fix="download the missing file", file=index.where, tensors=lost)


def _check_links(directory: Path, name: str, where: str) -> None:
    # Files may be links (the Hub cache is made of them); a directory on the way may not lead elsewhere.
    for parent in list(PurePosixPath(name).parents)[:-1]:
        if os.path.islink(directory / parent):
            message = f"file name {quoted(name)} goes through the link {quoted(parent)}"
            raise UnsafeError("index.unsafe-name", message, fix="put the files beside the index", file=where)


def _error(code: str, message: str, index: Index, tensors: list[str]) -> InputError:
    return InputError(f"index.{code}", message, fix=_FIX, file=index.where, tensors=tensors)
