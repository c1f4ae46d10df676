"""Digests of our own files: XXH3 over row blocks for tensors, SHA-256 for small side files.

How anyone recomputes the digest of a tensor, from its bytes as they lie in the file:

1. See the tensor as a matrix: ``shape[0]`` rows, each the product of the other dimensions long; a tensor with
   no or one dimension has one element a row. While a row is longer than 8388608 bytes and made of more than one
   dimension, its first dimension joins the rows: ``(experts, out, in)`` may be ``experts * out`` rows. Where a
   row is not a whole number of bytes (4-bit dtypes), every byte of the tensor is a row.
2. Cut it into blocks of ``max(1, 8388608 // row_bytes)`` whole rows; the last block holds what is left.
3. Take XXH3 with 128 bits and seed 0 of every block, in its canonical (big-endian) form of 16 bytes.
4. The digest is ``"xxh3:"`` and the hexadecimal XXH3 (128 bits, seed 0) of those 16-byte digests in order.
   A tensor without bytes has no blocks: it is the digest of the empty string.

In Python, with ``data`` the bytes of the tensor::

    step = max(1, 8388608 // row_bytes) * row_bytes
    parts = [xxhash.xxh3_128(data[i : i + step]).digest() for i in range(0, len(data), step)]
    digest = "xxh3:" + xxhash.xxh3_128(b"".join(parts)).hexdigest()

The blocks are also the unit of streaming: a worker hashes a block while it is in the cache, and the digest
does not depend on which worker had which block. It finds damage; it is no protection against a forger.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from loramerge.tensors.source import ByteSource

BLOCK_BYTES = 8 << 20
"""Bytes of a row block at most, unless a single row is longer. Part of the definition of the digest."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as ``(rows, columns)`` of a matrix in storage order.

    ``(out, in, kh, kw)`` is ``(out, in * kh * kw)``; shapes with no or one dimension are ``(elements, 1)``.
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    return shape[0], math.prod(shape[1:])


def row_layout(bits: int, shape: Sequence[int]) -> tuple[int, int]:
    """``(rows, bytes per row)`` of a tensor whose elements have ``bits`` bits.

    Rows longer than a block are split along their dimensions, so that no block is much longer than
    :data:`BLOCK_BYTES`; rows that are not a whole number of bytes give one-byte rows.

    Raises:
        ValueError: the whole tensor is not a number of bytes.
    """
    rows, cols = matrix_shape(shape)
    for dimension in shape[1:-1]:
        if cols * bits <= 8 * BLOCK_BYTES or not dimension:
            break
        rows, cols = rows * dimension, cols // dimension
    row_bytes, odd = divmod(cols * bits, 8)
    if not odd:
        return rows, row_bytes
    total, odd = divmod(rows * cols * bits, 8)
    if odd:
        raise ValueError(f"a tensor of shape {tuple(shape)} and {bits} bits an element does not end on a byte")
    return total, 1


def row_blocks(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Row ranges ``[r0, r1)`` of the blocks: as many whole rows as fit :data:`BLOCK_BYTES`, at least one."""
    if not rows or not row_bytes:
        return []
    step = max(1, BLOCK_BYTES // row_bytes)
    return [(r0, min(r0 + step, rows)) for r0 in range(0, rows, step)]


def block_digest(buffer: bytes | bytearray | memoryview) -> bytes:
    """The 16 bytes of one block's digest."""
    return xxhash.xxh3_128(buffer).digest()


def tensor_digest(block_digests: Sequence[bytes]) -> str:
    """A tensor's digest, ``"xxh3:<32 hex digits>"``, from the digests of its blocks in row order."""
    return "xxh3:" + xxhash.xxh3_128(b"".join(block_digests)).hexdigest()


def digest_tensor(source: ByteSource, begin: int, bits: int, shape: Sequence[int]) -> str:
    """Digest of the tensor that starts at byte ``begin`` of ``source``; holds one block of memory at most.

    Args:
        source: what to read from.
        begin: offset of the tensor's first byte in the source.
        bits: bits of one element.
        shape: the tensor's shape.

    Raises:
        ValueError: the tensor is not a whole number of bytes.
        LoramergeError: whatever the source raises for a failed or short read.
    """
    rows, row_bytes = row_layout(bits, shape)
    memory = memoryview(bytearray(min(BLOCK_BYTES, rows * row_bytes)))
    digests = []
    for r0, r1 in row_blocks(rows, row_bytes):
        # A single row may be longer than the buffer: a block is then hashed in pieces.
        hasher = xxhash.xxh3_128()
        position, end = begin + r0 * row_bytes, begin + r1 * row_bytes
        while position < end:
            piece = memory[: min(len(memory), end - position)]
            source.read_into(position, piece)
            hasher.update(piece)
            position += len(piece)
        digests.append(hasher.digest())
    return tensor_digest(digests)


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal; for the small files that travel with the tensors.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
