"""Digests: the documented recipe, done again from scratch, gives what the module says."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from loramerge.tensors import hashing
from loramerge.tensors.hashing import (
    BLOCK_BYTES,
    block_digest,
    digest_tensor,
    matrix_shape,
    row_blocks,
    row_layout,
    sha256_file,
    tensor_digest,
)


class Bytes:
    """A byte source in memory that keeps count of the largest read."""

    name = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.largest = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= self.size
        self.largest = max(self.largest, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]


def recomputed(data: bytes, row_bytes: int) -> str:
    """The recipe in the module's documentation, word for word."""
    step = max(1, 8388608 // row_bytes) * row_bytes
    parts = [xxhash.xxh3_128(data[i : i + step]).digest() for i in range(0, len(data), step)]
    return "xxh3:" + xxhash.xxh3_128(b"".join(parts)).hexdigest()


def pattern(length: int) -> bytes:
    return hashlib.shake_128(b"weights").digest(length)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((7,), (7, 1)),
        ((0,), (0, 1)),
        ((3, 4), (3, 4)),
        ((3, 4, 5, 6), (3, 120)),
        ((3, 0), (3, 0)),
    ],
)
def test_a_tensor_is_a_matrix_in_storage_order(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_shape(shape) == expected


@given(st.integers(0, 3000), st.integers(1, 3 * BLOCK_BYTES))
def test_blocks_are_whole_rows_in_order_as_large_as_fit(rows: int, row_bytes: int) -> None:
    blocks = row_blocks(rows, row_bytes)
    assert [r for r0, r1 in blocks for r in range(r0, r1)] == list(range(rows))
    for r0, r1 in blocks[:-1]:
        assert r1 - r0 == 1 or (r1 - r0) * row_bytes <= BLOCK_BYTES < (r1 - r0 + 1) * row_bytes


@pytest.mark.parametrize(
    ("shape", "bits"),
    [
        ((3, 1000), 16),
        ((), 32),
        ((5_000_000,), 32),
        ((3, 3_000_000), 8),
        ((2, 9_000_000), 8),
        ((1300, 3, 1111), 32),
        ((10, 7), 4),
        ((4_000_000, 5), 4),
        ((0, 5), 16),
        ((5, 0), 16),
    ],
)
def test_digest_is_the_documented_one_wherever_the_tensor_lies(shape: tuple[int, ...], bits: int) -> None:
    length = math.prod(shape) * bits // 8
    data = pattern(length)
    source = Bytes(b"header!" + data + b"rest")
    rows, row_bytes = row_layout(bits, shape)
    assert rows * row_bytes == length
    assert digest_tensor(source, 7, bits, shape) == recomputed(data, row_bytes or 1)  # type: ignore[arg-type]
    assert source.largest <= BLOCK_BYTES


def test_digest_can_be_put_together_from_blocks_by_anyone() -> None:
    data = pattern(20_000_000)
    blocks = [data[a * 4000 : b * 4000] for a, b in row_blocks(5000, 4000)]
    digests = {i: block_digest(memoryview(blocks[i])) for i in reversed(range(len(blocks)))}
    whole = digest_tensor(Bytes(data), 0, 32, (5000, 1000))  # type: ignore[arg-type]
    assert tensor_digest([digests[i] for i in range(len(blocks))]) == whole
    assert all(len(digest) == 16 for digest in digests.values())


def test_known_values() -> None:
    """Canonical test vectors of XXH3: a change of the library or of the recipe shows here."""
    assert block_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert tensor_digest([]) == "xxh3:99aa06d3014798d86001c324468d497f"
    assert tensor_digest([block_digest(b"loramerge")]) == recomputed(b"loramerge", 9)


def test_half_a_byte_is_no_tensor() -> None:
    with pytest.raises(ValueError, match="byte"):
        row_layout(4, (3, 5))


def test_a_changed_bit_changes_the_digest() -> None:
    data = bytearray(pattern(9 << 20))
    before = digest_tensor(Bytes(bytes(data)), 0, 16, (9, 1 << 19))  # type: ignore[arg-type]
    data[-1] ^= 1
    assert digest_tensor(Bytes(bytes(data)), 0, 16, (9, 1 << 19)) != before  # type: ignore[arg-type]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = pattern(3_000_001)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    with pytest.raises(OSError, match="missing"):
        sha256_file(tmp_path / "missing")


def test_the_block_size_is_part_of_the_format() -> None:
    assert hashing.BLOCK_BYTES == 8388608
