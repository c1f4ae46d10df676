"""Records what a merge does to every block, and brings blocks back: the undo file's segments, one for each block.

A segment is made of pieces of whole rows: the length of each as u32, then its code (`candidates.py`).
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramerge.adapters.updates import Update, only_adds, to_data
from loramerge.errors import InputError, LoramergeError
from loramerge.merging.candidates import decode, encode
from loramerge.merging.deltas import Deltas
from loramerge.merging.differences import decode_xor, encode_xor
from loramerge.merging.plan import Step
from loramerge.merging.undo import CANDIDATES, XOR, Segment, UndoFile, UndoWriter, damaged
from loramerge.tensors.hashing import tensor_digest
from loramerge.tensors.padded import PaddedSource
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from loramerge.merging.stream import FactorFile

PIECE = 1 << 21
"""Elements of a piece: its update in float64 takes 16 MB, where it is not computed in chunks."""

LENGTH = struct.Struct("<I")

CODED = ("BF16", "F16", "F32")
"""Dtypes of which `candidates.py` knows the numbers."""


def how_to_record(step: Step) -> str | None:
    """How a changed tensor is recorded; None where what it starts from is not the base's tensor of that name."""
    source = step.source
    own = source.input == 0 and source.name == step.tensor and source.info.dtype == step.dtype
    if not own or isinstance(source.file.source, PaddedSource):
        return None
    return CANDIDATES if step.dtype in CODED and all(map(only_adds, step.updates)) else XOR


class Recorder:
    """Writes down every changed block while it is merged.

    Blocks are announced in the order of the plan, become ready in any, and are written in the order of the plan: the
    same merge writes the same file.
    """

    def __init__(self, writer: UndoWriter, adapters: Sequence[FactorFile]) -> None:
        self._writer = writer
        self._deltas = Deltas(adapters)
        self._segments: dict[str, dict[int, Segment]] = {}
        self._announced: deque[tuple[str, int]] = deque()
        self._ready: dict[tuple[str, int], bytes | None] = {}
        self._lock = threading.Lock()

    def announce(self, step: Step, block: int) -> None:
        """A block that will be recorded or skipped. Called in the order of the plan."""
        with self._lock:
            self._announced.append((step.tensor, block))

    def skip(self, step: Step, block: int) -> None:
        """A block that turned out to be the base's."""
        self._finish(step, block, None)

    def record(self, step: Step, block: int, W: Tensor, M: Tensor, first: int, cols: int) -> None:
        """One block: W (n,) before and M (n,) after, whole rows of `cols` elements from element `first` on."""
        how = how_to_record(step)
        if how is None:
            self.skip(step, block)  # the original is kept whole
            return
        self._finish(step, block, encode_block(how, step.updates, W, M, first, cols, self._deltas))

    def _finish(self, step: Step, block: int, code: bytes | None) -> None:
        with self._lock:
            self._ready[step.tensor, block] = code
            while self._announced and self._announced[0] in self._ready:
                tensor, index = key = self._announced.popleft()
                ready = self._ready.pop(key)
                if ready is not None:
                    self._segments.setdefault(tensor, {})[index] = self._writer.put(ready)

    def rows(self, steps: Sequence[Step], digests: Mapping[str, tuple[str | None, str | None]]) -> dict[str, Any]:
        """The `tensors` of the undo file's index. `digests`: tensor -> (before, after)."""
        rows = {}
        for step in steps:
            segments = self._segments.get(step.tensor)
            if segments is None:
                continue
            how = how_to_record(step)
            before, after = digests[step.tensor]
            rows[step.tensor] = {
                "how": how,
                "segments": [segments[i] for i in range(len(segments))],
                "dtype": step.dtype,
                "shape": list(step.shape),
                "base": before,
                "merged": after,
                **({"updates": [to_data(u) for u in step.updates]} if how == CANDIDATES else {}),
            }
        return rows


def pieces_of(count: int, cols: int) -> list[tuple[int, int]]:
    """(first element, how many) of the pieces of a block of whole rows. The same on both sides."""
    step = max(1, PIECE // cols) * cols
    return [(at, min(step, count - at)) for at in range(0, count, step)]


def encode_block(
    how: str, updates: tuple[Update, ...], W: Tensor, M: Tensor, first: int, cols: int, deltas: Deltas
) -> bytes:
    """What `decode_block` needs to get W (n,) back from M (n,), a block that begins with element `first`."""
    pieces = []
    for at, count in pieces_of(W.numel(), cols):
        w, m = W[at : at + count], M[at : at + count]
        code = encode(w, m, deltas.of(updates, first + at, count, cols)) if how == CANDIDATES else encode_xor(w, m)
        pieces += [LENGTH.pack(len(code)), code]
    return b"".join(pieces)


def decode_block(
    how: str,
    updates: tuple[Update, ...],
    code: bytes,
    M: Tensor,
    first: int,
    cols: int,
    deltas: Deltas,
    out: Tensor | None = None,
) -> Tensor:
    """W (n,), from what `encode_block` gave, in `out` where that is given.

    Raises:
        ValueError, struct.error: it is not what that gave for this M and these updates, as far as their counts tell.
    """
    W = torch.empty_like(M) if out is None else out
    begin = 0
    for at, count in pieces_of(M.numel(), cols):
        (length,) = LENGTH.unpack_from(code, begin)
        begin += LENGTH.size
        piece, m = code[begin : begin + length], M[at : at + count]
        begin += length
        if how == CANDIDATES:
            decode(m, deltas.of(updates, first + at, count, cols), piece, W[at : at + count])
        else:
            W[at : at + count] = decode_xor(m, piece)
    if begin != len(code):
        raise ValueError("something is left over")
    return W


def bring_back(
    undo: UndoFile,
    tensor: str,
    block: int,
    merged: Tensor,
    first: int,
    cols: int,
    deltas: Deltas,
    out: Tensor | None = None,
) -> Tensor:
    """The original (n,) of a merged block, which begins with element `first` of its tensor, in `out` if that is given.

    Raises:
        InputError: `undo.damaged`.
    """
    undone = undo.tensors[tensor]
    if undone.how not in (CANDIDATES, XOR) or block >= len(undone.segments):
        raise damaged(undo.name, f"{quoted(tensor)} cannot be brought back from what it holds", [tensor])
    code = undo.read(undone.segments[block], tensor)
    try:
        return decode_block(undone.how, undone.updates, code, merged, first, cols, deltas, out)
    except LoramergeError:
        raise
    except Exception as error:  # an update with numbers that somebody made up can fail in any way
        raise damaged(undo.name, f"{quoted(tensor)}: {error}", [tensor]) from None


def check_digests(
    undo: UndoFile, tensor: str, merged: Sequence[bytes] | None, originals: Sequence[bytes], model: str
) -> None:
    """Compares the digests of a tensor's blocks with those of its merge: what it wrote, and what was there before.

    Raises:
        InputError: `undo.edited` where the merged tensor is another one, `undo.mismatch` where its original is.
    """
    undone = undo.tensors[tensor]
    if merged is not None and undone.merged is not None and tensor_digest(merged) != undone.merged:
        raise edited(tensor, model)
    if tensor_digest(originals) != undone.base:
        raise InputError(
            "undo.mismatch",
            f"{quoted(tensor)} does not come back as it was",
            fix="give the base: --base BASE",
            file=undo.name,
            tensors=[tensor],
        )


def edited(tensor: str, model: str) -> InputError:
    """The error for a merged tensor that is not the one that the undo file is for."""
    return InputError(
        "undo.edited",
        f"{quoted(tensor)} is not what the merge wrote: the model was changed since, or the undo file is of "
        "another merge",
        fix="take the model and the undo file of one merge, or give the base: --base BASE",
        file=model,
        tensors=[tensor],
    )
