"""What is held of tensors that adapters changed where they are, so that they come back: codes by block, and factors."""

from __future__ import annotations

import struct
import threading
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import Update, only_adds, uses
from loramerge.errors import MismatchError
from loramerge.merging.bring_back import decode_block, encode_block
from loramerge.merging.deltas import Deltas
from loramerge.merging.grids import GRIDS
from loramerge.merging.live import Rows
from loramerge.merging.stream import FactorFile
from loramerge.merging.undo import CANDIDATES, WHOLE, XOR
from loramerge.tensors.checkpoint import Located, WeightFile
from loramerge.tensors.hashing import block_digest
from loramerge.tensors.safetensors import Header, TensorInfo
from loramerge.tensors.source import MemorySource
from loramerge.tensors.text import quoted


class Block(NamedTuple):
    """One changed block: what gives its original back (None: it did not change), digests before and after."""

    code: bytes | None
    before: bytes
    after: bytes


@dataclass
class Held:
    """One changed tensor: how it comes back, rows of a block, and what is held of each block that is changed now."""

    name: str
    how: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    step: int
    updates: tuple[Update, ...]
    blocks: dict[int, Block] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and digests."""
        return sum(len(b.code or b"") + len(b.before) + len(b.after) for b in list(self.blocks.values()))

    def rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        """The tensor as it is now, in these blocks.

        Raises:
            MismatchError: `switcher.edited` where it is gone or became another one.
        """
        tensor = tensors.get(self.name)
        if tensor is None or tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise edited([self.name])
        return Rows(tensor, self.step)

    def encode(self, W: Tensor, M: Tensor, index: int, rows: Rows, deltas: Deltas) -> Block:
        """What gives W (n,) back from M (n,), both on the CPU."""
        before, after = digest(W), digest(M)
        if before == after:
            return Block(None, before, after)
        if self.how == WHOLE:
            return Block(_bytes(W).tobytes(), before, after)
        first, _ = rows.span(index)
        return Block(encode_block(self.how, self.updates, W, M, first, rows.cols, deltas), before, after)

    def decode(self, block: Block, M: Tensor, index: int, rows: Rows, deltas: Deltas) -> Tensor:
        """The original (n,) of M (n,) on the CPU.

        Raises:
            MismatchError: `switcher.edited` where M is not what the merge wrote, as far as that can be told from it.
        """
        if block.code is None:
            return M
        if self.how == WHOLE:
            return torch.frombuffer(bytearray(block.code), dtype=self.dtype)
        first, _ = rows.span(index)
        try:
            return decode_block(self.how, self.updates, block.code, M, first, rows.cols, deltas)
        except (ValueError, struct.error):
            raise edited([self.name]) from None


def how_to_hold(updates: Sequence[Update], replaced: bool, dtype: torch.dtype) -> str:
    """How a tensor that is changed so comes back."""
    if replaced:
        return WHOLE
    return CANDIDATES if dtype in GRIDS and all(map(only_adds, updates)) else XOR


def digest(tensor: Tensor) -> bytes:
    """The digest of a block (n,) on the CPU."""
    return block_digest(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def edited(names: Sequence[str]) -> MismatchError:
    """The error for tensors that somebody else changed."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return MismatchError(
        "switcher.edited",
        f"{quoted(names[0])}{others} changed since the adapter was applied, so that its original does not come back",
        fix="undo that change first; or load the base again and make a new Switcher",
        tensors=names,
    )


@dataclass(frozen=True)
class _Tensors:
    tensors: Mapping[str, Located]


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter, some of whose factors are in memory: its files may change without harm to the way back."""

    name: str
    transposed: frozenset[str]
    checkpoint: _Tensors
    nbytes: int


def hold_adapters(adapters: Sequence[Adapter], updates: Iterable[Update]) -> list[FactorFile]:
    """The adapters, with the factors of these updates in memory."""
    wanted: list[set[str]] = [set() for _ in adapters]
    for update in updates:
        for number, key in uses(update):
            wanted[number].add(key)
    return [_held(adapter, sorted(keys)) for adapter, keys in zip(adapters, wanted, strict=True)]


def _held(adapter: Adapter, keys: Sequence[str]) -> HeldAdapter:
    held: dict[str, Located] = {}
    for key in keys:
        located = adapter.checkpoint.tensors[key]
        info = located.info
        data = located.file.source.read(info.begin, info.nbytes)
        file = WeightFile("", MemorySource(data, adapter.name), Header({}, {}, 0, len(data)), "memory")
        held[key] = Located(file, TensorInfo(info.name, info.dtype, info.shape, 0, len(data)))
    nbytes = sum(located.info.nbytes for located in held.values())
    tensors = ChainMap(held, adapter.checkpoint.tensors)
    return HeldAdapter(adapter.name, adapter.transposed, _Tensors(tensors), nbytes)
