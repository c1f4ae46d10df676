"""Writes GGUF files: metadata and unquantised tensors (ggml-org/ggml, docs/gguf.md, version 3)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from loramerge.errors import UnsupportedError
from loramerge.tensors.gguf import MAGIC
from loramerge.tensors.text import quoted

TYPES = {"F32": 0, "F16": 1, "F64": 28, "BF16": 30}
"""Dtypes that a tensor may have: name on disk -> number."""

ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8


def encode_gguf(
    metadata: Mapping[str, str | int | float], tensors: Sequence[tuple[str, str, tuple[int, ...], bytes]]
) -> bytes:
    """A whole file: metadata (text, uint32 or float32), then tensors (name, dtype, shape, bytes), slowest axis first.

    Raises:
        UnsupportedError: `gguf.dtype` for a dtype that it has no plain type for.
    """
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key)
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _string(value)
        elif isinstance(value, int):
            head += struct.pack("<II", _UINT32, value)
        else:
            head += struct.pack("<If", _FLOAT32, value)
    data: list[bytes] = []
    at = 0
    for name, dtype, shape, raw in tensors:
        if dtype not in TYPES:
            raise UnsupportedError("gguf.dtype", f"{quoted(name)} is {dtype}, which GGUF does not hold as it is")
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", TYPES[dtype], at)
        padding = -len(raw) % ALIGNMENT
        data += [raw, bytes(padding)]
        at += len(raw) + padding
    return b"".join([head, bytes(-len(head) % ALIGNMENT), *data])


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
