"""Two checkpoints compared tensor by tensor: equal, changed (and by how much), of other dtype or shape, missing."""

from __future__ import annotations

import fnmatch
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramerge.adapters.describe import open_weights
from loramerge.errors import UsageError
from loramerge.tensors.checkpoint import Located, PickleReader
from loramerge.tensors.dtypes import bits, display
from loramerge.tensors.hashing import BLOCK_BYTES, row_blocks, row_layout

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]

NUMBERS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes whose differences are measured, and what torch calls them."""

_PIECE = 1 << 18  # elements in float64 at once: a few MB, whatever the block
_TICK = 0.1


@dataclass
class _Pair:
    """One tensor in both: where it lies in A and B, and the first byte block that differs (None: none does)."""

    name: str
    a: Located
    b: Located
    differs_at: int | None = None

    @property
    def same_dtype(self) -> bool:
        return self.a.info.dtype == self.b.info.dtype

    @property
    def measurable(self) -> bool:
        return self.a.info.dtype in NUMBERS and self.b.info.dtype in NUMBERS


class _Meter:
    """Counts bytes for all workers, and tells them to stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done = 0
        self.stop = False

    def add(self, count: int) -> None:
        if self.stop:
            raise _Stopped
        with self._lock:
            self.done += count


class _Stopped(Exception):
    """Raised in a worker when another has failed or the user has interrupted."""


def diff(
    a: str | Path,
    b: str | Path,
    *,
    read_pickle: PickleReader | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the tensors of two checkpoints or adapters by name, however each is cut into files.

    Bytes are compared block by block, two blocks of 8 MiB in memory for each job. Only tensors that differ are
    measured, in float64, and only then is torch imported.

    Args:
        a, b: files or directories; changes are told as from `a` to `b`.
        read_pickle: reader for PyTorch files; None refuses them.
        include, exclude: globs over whole tensor names: at least one of `include` (if any), none of `exclude`.
        jobs: tensors compared at the same time.
        progress: called about ten times a second with the bytes compared and the bytes in all (of `a`).

    Returns:
        Plain data: ``a``, ``b``, ``same`` (bool), ``tensors`` (names in either), ``counts``, and lists:
        ``changed`` (same dtype and shape) and ``dtype`` (another dtype, same shape) with ``name``, ``share`` of
        elements changed and, for float16 to float64 and bfloat16, ``norm`` of a, ``norm_change`` of b - a
        (Frobenius), ``relative`` (their ratio, None where a is zero), ``max_change``, and ``non_finite``: how many
        elements are NaN or infinite on either side (they count as changed or not by their bits, and are left out
        of the norms); ``shape`` with both shapes; ``only_a``, ``only_b``: names. ``changed`` is sorted by relative
        change, largest first. The ``share`` of dtypes narrower than a byte counts bytes.

    Raises:
        LoramergeError: as `open_weights`; ``input.*`` while reading; UsageError ``diff.nothing``: the globs
            leave nothing to compare.
    """
    left = open_weights(a, read_pickle=read_pickle)
    try:
        right = open_weights(b, read_pickle=read_pickle)
        try:
            selected = partial(_selected, include=include, exclude=exclude)
            names_a = {name: found for name, found in left.tensors.items() if selected(name)}
            names_b = {name: found for name, found in right.tensors.items() if selected(name)}
            if (include or exclude) and not names_a and not names_b:
                message = "--include and --exclude leave no tensor to compare"
                raise UsageError("diff.nothing", message, fix="a glob matches whole tensor names: '*q_proj*'")
            result = _compare(names_a, names_b, jobs, progress)
            left.check_unchanged()
            right.check_unchanged()
        finally:
            right.close()
    finally:
        left.close()
    return {"a": left.name, "b": right.name} | result


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatch.fnmatchcase(name, glob) for glob in include):
        return False
    return not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)


def _compare(a: dict[str, Located], b: dict[str, Located], jobs: int, progress: Progress | None) -> dict[str, Any]:
    both = [_Pair(name, located, b[name]) for name, located in a.items() if name in b]
    shape = [pair for pair in both if pair.a.info.shape != pair.b.info.shape]
    comparable = [pair for pair in both if pair.a.info.shape == pair.b.info.shape]
    same = [pair for pair in comparable if pair.same_dtype]
    other = [pair for pair in comparable if not pair.same_dtype]
    total = sum(pair.a.info.nbytes for pair in same) + sum(p.a.info.nbytes for p in other if p.measurable)
    meter = _Meter()
    _run(same, partial(_find_difference, meter=meter), jobs, meter, total, progress)
    changed = [pair for pair in same if pair.differs_at is not None]
    measured = _measure(changed + [pair for pair in other if pair.measurable], jobs, meter, total, progress)
    changes: list[dict[str, Any]] = [
        {"name": p.name, "dtype": display(p.a.info.dtype), "shape": list(p.a.info.shape)} | measured[p.name]
        for p in changed
    ]
    changes.sort(key=lambda row: -_relative(row))
    only_a = [name for name in a if name not in b]
    only_b = [name for name in b if name not in a]
    counts = {
        "equal": len(same) - len(changed),
        "changed": len(changed),
        "dtype": len(other),
        "shape": len(shape),
        "only_a": len(only_a),
        "only_b": len(only_b),
    }
    return {
        "same": counts["equal"] == len(a) == len(b),
        "tensors": len(both) + len(only_a) + len(only_b),
        "counts": counts,
        "changed": changes,
        "dtype": [
            {
                "name": pair.name,
                "a": display(pair.a.info.dtype),
                "b": display(pair.b.info.dtype),
                "shape": list(pair.a.info.shape),
            }
            | measured.get(pair.name, {})
            for pair in other
        ],
        "shape": [{"name": pair.name, "a": list(pair.a.info.shape), "b": list(pair.b.info.shape)} for pair in shape],
        "only_a": only_a,
        "only_b": only_b,
    }


def _relative(row: dict[str, Any]) -> float:
    """How much a tensor changed, for sorting: what has no ratio (from zero, or no numbers) comes first."""
    value = row.get("relative")
    return math.inf if value is None else float(value)


def _run(
    pairs: Iterable[_Pair],
    work: Callable[[_Pair], Any],
    jobs: int,
    meter: _Meter,
    total: int,
    progress: Progress | None,
) -> list[Any]:
    """`work` on every pair, `jobs` at a time; reports from this thread. The first failure ends it all."""
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = [pool.submit(work, pair) for pair in pairs]
        try:
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=_TICK, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if progress is not None:
                    progress(meter.done, total)
        except BaseException:
            meter.stop = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


# -------------------------------------------------------------------------------------------------- bytes


def _find_difference(pair: _Pair, meter: _Meter) -> None:
    """Sets `differs_at` to the first block whose bytes differ."""
    for index, (offset, length) in enumerate(_blocks(pair)):
        left, right = bytearray(length), bytearray(length)
        pair.a.file.source.read_into(pair.a.info.begin + offset, memoryview(left))
        pair.b.file.source.read_into(pair.b.info.begin + offset, memoryview(right))
        if left != right:
            pair.differs_at = index
            return
        meter.add(length)


def _blocks(pair: _Pair) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the blocks of A's tensor; a row longer than a block is cut."""
    rows, row_bytes = row_layout(bits(pair.a.info.dtype), pair.a.info.shape)
    for r0, r1 in row_blocks(rows, row_bytes):
        begin, end = r0 * row_bytes, r1 * row_bytes
        for offset in range(begin, end, BLOCK_BYTES):
            yield offset, min(BLOCK_BYTES, end - offset)


# ------------------------------------------------------------------------------------------------ numbers


def _measure(
    pairs: list[_Pair], jobs: int, meter: _Meter, total: int, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """By how much each pair differs. Imports torch, which works in one thread a job meanwhile."""
    if not pairs:
        return {}
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = _run(pairs, partial(_measure_one, meter=meter), jobs, meter, total, progress)
    finally:
        torch.set_num_threads(threads)
    return {pair.name: row for pair, row in zip(pairs, rows, strict=True)}


def _measure_one(pair: _Pair, meter: _Meter) -> dict[str, Any]:
    sums = _Sums()
    size_a, size_b = bits(pair.a.info.dtype), bits(pair.b.info.dtype)
    for index, (offset, length) in enumerate(_blocks(pair)):
        # The same elements of both: with another dtype they are other bytes. Blocks hold whole elements where
        # dtypes differ, since then both are numbers of two to eight bytes.
        offset_b, length_b = offset * size_b // size_a, length * size_b // size_a
        left, right = bytearray(length), bytearray(length_b)
        pair.a.file.source.read_into(pair.a.info.begin + offset, memoryview(left))
        pair.b.file.source.read_into(pair.b.info.begin + offset_b, memoryview(right))
        if pair.measurable:
            sums.add_numbers(left, right, pair.a.info.dtype, pair.b.info.dtype)
        else:
            sums.add_bytes(left, right, max(1, size_a // 8))
        if pair.differs_at is None or index >= pair.differs_at:
            meter.add(length)  # what came before was counted when it was found equal
    return sums.result(pair.measurable)


class _Sums:
    """Running sums over the elements of one pair of tensors."""

    def __init__(self) -> None:
        self.elements = self.changed = self.non_finite = 0
        self.squares = self.change_squares = self.largest = 0.0

    def add_numbers(self, left: bytearray, right: bytearray, dtype_a: str, dtype_b: str) -> None:
        import torch

        a = torch.frombuffer(left, dtype=getattr(torch, NUMBERS[dtype_a]))
        b = torch.frombuffer(right, dtype=getattr(torch, NUMBERS[dtype_b]))
        for start in range(0, a.numel(), _PIECE):
            self._add_piece(a[start : start + _PIECE], b[start : start + _PIECE])

    def _add_piece(self, a: Tensor, b: Tensor) -> None:
        import torch

        wide_a, wide_b = a.double(), b.double()
        if a.dtype == b.dtype:
            word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            self.changed += int(torch.count_nonzero(a.view(word) != b.view(word)))
        else:
            unequal = (wide_a != wide_b) & ~(wide_a.isnan() & wide_b.isnan())
            self.changed += int(torch.count_nonzero(unequal))
        change = wide_b - wide_a
        least, most = (float(value) for value in torch.aminmax(change))
        if not (math.isfinite(least) and math.isfinite(most)):  # what is not finite on a side makes it so here
            finite = wide_a.isfinite() & wide_b.isfinite()
            self.non_finite += a.numel() - int(torch.count_nonzero(finite))
            wide_a, change = wide_a[finite], change[finite]
            least, most = (float(value) for value in torch.aminmax(change)) if change.numel() else (0.0, 0.0)
        self.elements += a.numel()
        self.squares += float(wide_a.dot(wide_a))
        self.change_squares += float(change.dot(change))
        self.largest = max(self.largest, -least, most)

    def add_bytes(self, left: bytearray, right: bytearray, size: int) -> None:
        """Elements of `size` bytes of a dtype that is not measured."""
        import torch

        a = torch.frombuffer(left, dtype=torch.uint8).view(-1, size)
        b = torch.frombuffer(right, dtype=torch.uint8).view(-1, size)
        self.elements += a.shape[0]
        self.changed += int(torch.count_nonzero((a != b).any(dim=1)))

    def result(self, numbers: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"share": self.changed / self.elements if self.elements else 0.0}
        if numbers:
            norm, change = math.sqrt(self.squares), math.sqrt(self.change_squares)
            ratio = change / norm if norm else (None if change else 0.0)
            row |= {
                "norm": _finite(norm),
                "norm_change": _finite(change),
                "relative": None if ratio is None else _finite(ratio),
                "max_change": _finite(self.largest),
                "non_finite": self.non_finite,
            }
        return row


def _finite(value: float) -> float | None:
    """A number that JSON has: squares of huge float64 values overflow."""
    return value if math.isfinite(value) else None
