"""The safetensors container: a strict reader and a writer of headers.

Format: safetensors/src/tensor.rs of huggingface/safetensors 0.8. Everything that the library refuses is
refused here; stricter than the library are duplicate keys, entries that are not objects, and the
limits below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loramerge.errors import InputError
from loramerge.tensors import dtypes, magic, strictjson
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import plural, quoted

MAX_HEADER_BYTES = magic.MAX_HEADER_BYTES
MAX_TENSORS = 2_000_000
MAX_DIMENSIONS = 64
METADATA_KEY = "__metadata__"

_U64 = 2**64
_DAMAGED = "download the file again; if that does not help, it was written wrongly: save it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: row-major elements in the bytes `begin` to `end`, counted from the file start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a weight file says about itself.

    `tensors` goes by offset, then name; `data_start` is where tensor data begins, `size` the file's size. `gaps`: the
    ranges of bytes that are no tensor's, where they are not just those before `data_start`.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int
    gaps: tuple[tuple[int, int], ...] | None = None


def read_header(source: ByteSource) -> Header:
    """Read and check the header of a safetensors file. No tensor data is read.

    Raises:
        InputError: ``input.empty``, ``input.format`` (it is something else), ``safetensors.length``,
            ``safetensors.truncated``, ``safetensors.trailing``, ``safetensors.json``,
            ``safetensors.metadata``, ``safetensors.entry``, ``safetensors.dtype``, ``safetensors.size``,
            ``safetensors.offsets``, ``safetensors.limit``.
    """
    size = source.size
    prefix = source.read(0, min(size, magic.PREFIX_BYTES))
    kind = magic.identify(prefix, size)
    if kind not in ("safetensors", "unknown"):
        what, fix = magic.describe(kind)
        code = "input.empty" if kind == "empty" else "input.format"
        tail = "" if kind == "empty" else ", not a safetensors file"
        raise InputError(code, f"is {what}{tail}", fix=fix, file=source.name)
    length = _header_length(prefix, size, kind, source.name)
    document = strictjson.loads(
        source.read(8, length),
        where=source.name,
        code="safetensors.json",
        max_bytes=MAX_HEADER_BYTES,
        allow_bom=False,
    )
    if not isinstance(document, dict):
        raise InputError("safetensors.json", "header is not a JSON object", fix=_DAMAGED, file=source.name)
    metadata = _metadata(document.pop(METADATA_KEY, None), source.name)
    if len(document) > MAX_TENSORS:
        message = f"header lists {len(document)} tensors, more than the {MAX_TENSORS} that are accepted"
        raise InputError("safetensors.limit", message, fix=_DAMAGED, file=source.name)
    start = 8 + length
    infos = [_entry(name, entry, start, source.name) for name, entry in document.items()]
    # An empty tensor comes before the one that begins where it does.
    infos.sort(key=lambda info: (info.begin, info.end, info.name))
    _check_coverage(infos, start, size, source.name)
    return Header({info.name: info for info in infos}, metadata, start, size)


class _Held:
    """The bytes of a header alone, as the source of the file that it is of."""

    def __init__(self, raw: bytes, name: str, size: int) -> None:
        self.name, self.size, self._raw = name, size, raw

    def read(self, offset: int, length: int) -> bytes:
        return self._raw[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def check_unchanged(self) -> None:
        """It is in memory."""

    def close(self) -> None:
        """Nothing is open."""


def parse_header(raw: bytes, where: str = "") -> dict[str, TensorInfo]:
    """The tensors that a header's bytes list, by name, as `read_header` checks them in a file.

    Raises:
        InputError: as `read_header`.
    """
    document = strictjson.loads(
        raw[8:], where=where, code="safetensors.json", max_bytes=MAX_HEADER_BYTES, allow_bom=False
    )
    rows = [row for name, row in document.items() if name != METADATA_KEY] if isinstance(document, dict) else []
    ends = [row["data_offsets"][1] for row in rows if isinstance(row, dict) and _is_range(row.get("data_offsets"))]
    return read_header(_Held(raw, where, len(raw) + max(ends, default=0))).tensors


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[1]) is int


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    align: int = 8,
) -> tuple[bytes, list[TensorInfo]]:
    """Make the header of a file whose tensors (name, dtype, shape) follow one another in the order given.

    The bytes are the 8-byte length, the JSON (metadata first, then tensors in their order) and as many spaces
    as put the tensor data at a multiple of `align`. The same arguments give the same bytes. The infos have
    absolute offsets.

    Raises:
        InputError: ``safetensors.entry`` (duplicate or reserved name, bad shape), ``safetensors.dtype``,
            ``safetensors.size`` (not whole bytes, beyond 2**64), ``safetensors.metadata``,
            ``safetensors.limit`` (longer than the 100,000,000 bytes that the safetensors library reads).
    """
    document: dict[str, Any] = {METADATA_KEY: _metadata(dict(metadata), None)} if metadata else {}
    relative: list[tuple[str, str, tuple[int, ...], int, int]] = []
    position = 0
    for name, dtype, shape in tensors:
        if name == METADATA_KEY or name in document:
            raise _error("entry", name, "two tensors of one file have this name, or it is reserved", None)
        end = position + _nbytes(name, dtype, list(shape), None)
        if end >= _U64:
            raise _error("size", name, "its data would lie beyond 2**64 bytes", None)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        relative.append((name, dtype, tuple(shape), position, end))
        position = end
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("safetensors.entry", "a name or metadata holds a lone surrogate", fix="rename it") from None
    start = -(-(8 + len(text)) // align) * align
    if start - 8 > MAX_HEADER_BYTES:
        message = f"header of {start - 8} bytes, more than the {MAX_HEADER_BYTES} that a safetensors file may have"
        raise InputError("safetensors.limit", message, fix="split it into several files (--shard-size)")
    head = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    return head, [TensorInfo(n, d, s, start + begin, start + end) for n, d, s, begin, end in relative]


def _header_length(prefix: bytes, size: int, kind: str, where: str) -> int:
    def refuse(code: str, message: str) -> InputError:
        return InputError(f"safetensors.{code}", message, fix=_DAMAGED, file=where)

    if size < 8:
        raise refuse("length", f"too short for a safetensors file: {plural(size, 'byte')}, at least 8 are needed")
    length = int.from_bytes(prefix[:8], "little")
    if length == 0:
        raise refuse("length", "header length is zero")
    if length > MAX_HEADER_BYTES:
        raise refuse("length", f"not a safetensors file: header length {length} is beyond {MAX_HEADER_BYTES}")
    if length > size - 8:
        code = "truncated" if kind == "safetensors" else "length"
        raise refuse(code, f"truncated: header promises {length} bytes, file has {size - 8} after its length")
    return length


def _metadata(value: object, where: str | None) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        message = f"{METADATA_KEY} is not a JSON object"
        raise InputError("safetensors.metadata", message, fix=_DAMAGED, file=where)
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, str):
            message = f"metadata {quoted(key)} is not a string"
            raise InputError("safetensors.metadata", message, fix=_DAMAGED, file=where)
    return value


def _entry(name: str, entry: object, start: int, where: str) -> TensorInfo:
    if type(entry) is not dict:
        raise _error("entry", name, "its entry is not a JSON object", where)
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as missing:
        raise _error("entry", name, f"its entry has no {missing.args[0]}", where) from None
    nbytes = _nbytes(name, dtype, shape, where)
    if type(offsets) is not list or len(offsets) != 2 or not _unsigned(offsets):
        raise _error("offsets", name, f"data_offsets are not two unsigned integers: {_show(offsets)}", where)
    begin, end = offsets
    if end < begin:
        raise _error("offsets", name, f"data_offsets are reversed: begin {begin}, end {end}", where)
    if end - begin != nbytes:
        message = f"shape {shape} of {dtype} takes {nbytes} bytes, data_offsets give {end - begin}"
        raise _error("size", name, message, where)
    return TensorInfo(name, dtype, tuple(shape), start + begin, start + end)


def _nbytes(name: str, dtype: object, shape: object, where: str | None) -> int:
    if type(dtype) is not str or dtype not in dtypes.BITS:
        raise _error("dtype", name, f"unknown dtype {_show(dtype)}", where)
    if type(shape) is not list or not _unsigned(shape):
        raise _error("entry", name, f"shape is not a list of unsigned integers: {_show(shape)}", where)
    if len(shape) > MAX_DIMENSIONS:
        raise _error("limit", name, f"{len(shape)} dimensions, more than {MAX_DIMENSIONS}", where)
    # The product is taken from the left, as the library does: a zero after an overflow does not help.
    nbits = 1
    for count in (*shape, dtypes.BITS[dtype]):
        nbits *= count
        if nbits >= _U64:
            raise _error("size", name, f"shape {shape} of {dtype} overflows 2**64", where)
    if nbits % 8:
        raise _error("size", name, f"{nbits} bits of {dtype} are not whole bytes", where)
    return nbits // 8


def _unsigned(values: list[object]) -> bool:
    # Not all(): this runs twice for every tensor, and a generator doubles its time.
    return not [value for value in values if type(value) is not int or not 0 <= value < _U64]


def _check_coverage(infos: list[TensorInfo], start: int, size: int, where: str) -> None:
    position = start
    for info in infos:
        if info.begin != position:
            kind = "a gap before it" if info.begin > position else "it overlaps the one before"
            message = f"data begins at {info.begin - start}, expected at {position - start}: {kind}"
            raise _error("offsets", info.name, message, where)
        position = info.end
    if position > size:
        message = f"truncated: header promises {position} bytes, file has {size}"
        raise InputError("safetensors.truncated", message, fix="download the file again", file=where)
    if position < size:
        message = f"{plural(size - position, 'trailing byte')}: header promises {position} bytes, file has {size}"
        raise InputError("safetensors.trailing", message, fix=_DAMAGED, file=where)


def _show(value: object) -> str:
    # Never the whole of a hostile value: it may be as long as the header.
    if isinstance(value, list):
        return quoted(value[:8])
    return quoted(value) if not isinstance(value, dict) else "an object"


def _error(code: str, name: str, message: str, where: str | None) -> InputError:
    return InputError(
        f"safetensors.{code}", f"tensor {quoted(name)}: {message}", fix=_DAMAGED, file=where, tensors=[name]
    )
