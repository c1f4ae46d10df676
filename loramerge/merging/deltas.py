"""The updates of tensors as numbers, for the undo codec: in float64, or in float32 with float64 where that matters."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.adapters.operators import AddProduct
from loramerge.adapters.updates import LowRank, Update
from loramerge.merging.fixed import CHUNK as FIXED_CHUNK
from loramerge.merging.fixed import fixed
from loramerge.merging.sums import HALF_ULP, Made, addends

if TYPE_CHECKING:
    from loramerge.adapters.operators import Operator
    from loramerge.merging.stream import FactorFile

Array = NDArray[Any]

CHUNK = 1 << 17
"""Elements worked on at once, of what is in float32: half a MB, so that all that is made of it stays in a core's own
cache. Fewer make calls that take a few microseconds, and the workers then wait for one another, for Python's lock."""

DOUBLE_CHUNK = 1 << 16
"""Elements worked on at once, of what is in float64, which has more temporaries."""

KEPT = 12
"""Tensors whose operators are kept."""

FEW = 1 << 14
"""Elements up to which float32 saves nothing."""


class Delta(Protocol):
    """The update d of n elements.

    `largest`: at least the largest |d|. In float64, d is off by less than 2**-45 of that or 2**-37 of |d|, whoever
    computes it. `relative` and `error`: what `back` may be off by; 0 where d is in float64.
    """

    @property
    def size(self) -> int: ...

    @property
    def largest(self) -> float: ...

    @property
    def relative(self) -> float: ...

    @property
    def error(self) -> float: ...

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """(index of the first, some elements in float64) in order. They may lie in a buffer that the next overwrite."""

    def back(self, M: Tensor) -> Iterator[tuple[int, Array]]:
        """(index of the first, some elements of M - d in float32) in order, in a buffer that the next overwrite.

        M (n,) is of 16 bits. Off by at most `relative` |M| and `error`; where both are 0, by float32's rounding of d
        and of the difference.
        """

    @property
    def moved(self) -> Callable[[Tensor], Iterator[tuple[int, Array]]] | None:
        """As `back`, but the same numbers bit for bit, whoever computes them (`fixed.py`); None where there is no such
        update."""

    def exact(self, index: Array) -> Array:
        """The elements `index` (k,) in float64."""

    def double(self) -> Delta:
        """The same with all elements in float64."""


class Given:
    """An update that is in memory, as (n,) float64."""

    relative = error = 0.0
    moved = None

    def __init__(self, d: Tensor) -> None:
        if d.dtype != torch.float64:
            raise ValueError(f"the update is {d.dtype}, not float64")
        self._d = d.detach().cpu().contiguous().view(-1).numpy()
        self.size = self._d.size
        self.largest = _largest(self._d)

    def chunks(self) -> Iterator[tuple[int, Array]]:
        for at in range(0, self.size, DOUBLE_CHUNK):
            yield at, self._d[at : at + DOUBLE_CHUNK]

    def back(self, M: Tensor) -> Iterator[tuple[int, Array]]:
        return _back(self, M)

    def exact(self, index: Array) -> Array:
        return np.asarray(self._d[index])

    def double(self) -> Delta:
        return self


def _back(delta: Delta, M: Tensor) -> Iterator[tuple[int, Array]]:
    """`Delta.back` from float64."""
    for at, d in delta.chunks():
        x = M[at : at + d.size].float().numpy()
        x -= d.astype(np.float32)
        yield at, x


def _largest(d: Array) -> float:
    """The largest finite |d|."""
    if not d.size:
        return 0.0
    low, high = torch.aminmax(torch.from_numpy(d))
    largest = max(float(high), -float(low))
    if not math.isfinite(largest):
        fine = np.abs(d[np.isfinite(d)])
        largest = float(fine.max()) if fine.size else 0.0
    return largest


class NoWeights:
    """Updates that only add look at no weight."""

    def blocks(self) -> Any:
        raise AssertionError("an update that only adds looked at the weight")

    def before(self, tensor: str, update: Update) -> Tensor:
        raise AssertionError("an update that only adds looked at the weight")


class Deltas:
    """The updates of tensors, for both sides alike. `device`: where they are made, one that has float64."""

    def __init__(self, adapters: Sequence[FactorFile], device: torch.device | None = None) -> None:
        from loramerge.merging.stream import Factors

        self._device = device or torch.device("cpu")
        self._factors = Factors(adapters, torch.float64, self._device)
        # As many as workers may be at: their blocks of one tensor come one after the other.
        self._kept: deque[tuple[tuple[Update, ...], _Held]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._buffers = threading.local()

    def of(self, updates: tuple[Update, ...], first: int, count: int, cols: int) -> Delta:
        """What they add to the elements `first, first + 1, ...` of their tensor, whole rows of `cols` elements.

        It lies in a buffer of the calling thread, until that asks again.
        """
        held = self._held(updates)
        if held.fixed is not None:
            return _Fixed(self, held, first, count, cols)
        return self.guarded(held, first, count, cols)

    def guarded(self, held: _Held, first: int, count: int, cols: int) -> Delta:
        """As `of`, in floating-point numbers."""
        with self._lock:
            if held.made is None:
                held.made = Made(held.operators, self._device.type == "cpu")
        if held.made.largest is None:
            return Given(self.sum(held.operators, first, count, torch.float64))
        return _InChunks(self, held.made, first, count, cols, held.made.largest)

    def _held(self, updates: tuple[Update, ...]) -> _Held:
        with self._lock:
            held = next((held for known, held in self._kept if known is updates), None)
            if held is None:
                built = [update.operator(self._factors.read, NoWeights()) for update in updates]
                held = _Held([operator for operator in built if operator is not None])
                if self._device.type == "cpu" and all(isinstance(update, LowRank) for update in updates):
                    held.fixed = fixed([operator for operator in held.operators if isinstance(operator, AddProduct)])
                self._kept.append((updates, held))
        return held

    def sum(self, operators: Sequence[Operator], first: int, count: int, dtype: torch.dtype) -> Tensor:
        """What operators of this dtype add."""
        delta = self.buffer(count, dtype, "sum")
        if operators and (product := _whole(operators[0], first, count)) is not None:
            torch.mm(*product, out=delta.view(len(product[0]), -1))  # saves a pass
            operators = operators[1:]
        else:
            delta.zero_()
        for operator in operators:
            operator.apply(delta, first, delta)
        return delta

    def buffer(self, count: int, dtype: torch.dtype, name: str) -> Tensor:
        """Room for elements, of the calling thread."""
        held: Tensor | None = getattr(self._buffers, name, None)
        nbytes = count * dtype.itemsize
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            setattr(self._buffers, name, held)
        room: Tensor = held[:nbytes].view(dtype)
        return room


def _whole(operator: Operator, first: int, count: int) -> tuple[Tensor, Tensor] | None:
    """`(L, R)` with `L R` what a product adds, where that are whole rows and nothing beside them."""
    if not isinstance(operator, AddProduct):
        return None
    place = operator.place
    row, rest = divmod(first - place.begin, place.cols)
    rows = count // place.cols
    alone = (place.c0, place.c1, place.step) == (0, place.cols, 1) and not rest and count == rows * place.cols
    if not (alone and rows and row >= 0 and row + rows <= len(operator.L)):
        return None
    return operator.L[row : row + rows], operator.R


@dataclass(slots=True)
class _Held:
    """The operators of one tensor in float64: as they are, in fixed-point numbers, and what is known of them."""

    operators: Sequence[Operator]
    fixed: list[AddProduct] | None = None
    made: Made | None = None


@dataclass(frozen=True)
class _InChunks:
    """An update that is computed chunk by chunk: each is used while it is in the cache."""

    deltas: Deltas
    made: Made
    first: int
    size: int
    cols: int
    largest: float
    doubled: bool = False
    moved = None

    @property
    def single(self) -> bool:
        return not (self.doubled or self.made.minus is None or self.size <= FEW)

    @property
    def relative(self) -> float:
        return (self.made.roundings + 2) * HALF_ULP if self.single else 0.0

    @property
    def error(self) -> float:
        if not self.single:
            return 0.0
        return (self.made.roundings + 2) * HALF_ULP * self.made.bound(self.first, self.size) + self.made.tiny

    def chunks(self) -> Iterator[tuple[int, Array]]:
        step = max(1, DOUBLE_CHUNK // self.cols) * self.cols
        for at in range(0, self.size, step):
            count = min(step, self.size - at)
            yield at, self.deltas.sum(self.made.operators, self.first + at, count, torch.float64).numpy()

    def back(self, M: Tensor) -> Iterator[tuple[int, Array]]:
        if not self.single or self.made.minus is None:
            yield from _back(self, M)
            return
        step = max(1, CHUNK // self.cols) * self.cols
        for at in range(0, self.size, step):
            count = min(step, self.size - at)
            x = self.deltas.buffer(count, torch.float32, "back")
            x.copy_(M[at : at + count])
            for operator in self.made.minus:
                operator.apply(x, self.first + at, x)
            yield at, x.numpy()

    def exact(self, index: Array) -> Array:
        total = np.zeros(index.size)
        step = max(1, DOUBLE_CHUNK // max(1, self.made.products))
        for at in range(0, index.size, step):
            part = index[at : at + step] + self.first
            for operator in self.made.sparse:
                total[at : at + step] += addends(operator, part)
        return total

    def double(self) -> Delta:
        return _InChunks(self.deltas, self.made, self.first, self.size, self.cols, self.largest, doubled=True)


@dataclass(frozen=True)
class _Fixed:
    """An update in fixed-point numbers, chunk by chunk; and in others, for what needs those."""

    deltas: Deltas
    held: _Held
    first: int
    size: int
    cols: int

    @cached_property
    def guarded(self) -> Delta:
        return self.deltas.guarded(self.held, self.first, self.size, self.cols)

    @property
    def largest(self) -> float:
        return self.guarded.largest

    @property
    def relative(self) -> float:
        return self.guarded.relative

    @property
    def error(self) -> float:
        return self.guarded.error

    def chunks(self) -> Iterator[tuple[int, Array]]:
        return self.guarded.chunks()

    def back(self, M: Tensor) -> Iterator[tuple[int, Array]]:
        return self.guarded.back(M)

    def exact(self, index: Array) -> Array:
        return self.guarded.exact(index)

    def double(self) -> Delta:
        return self.guarded.double()

    def moved(self, M: Tensor) -> Iterator[tuple[int, Array]]:
        assert self.held.fixed is not None
        step = max(1, FIXED_CHUNK // self.cols) * self.cols
        rooms = [self.deltas.buffer(min(step, self.size), torch.float32, name) for name in ("back", "rounded")]
        for at in range(0, self.size, step):
            count = min(step, self.size - at)
            x, rounded = (room[:count] for room in rooms)
            rounded.copy_(self.deltas.sum(self.held.fixed, self.first + at, count, torch.float64))
            x.copy_(M[at : at + count])
            yield at, x.sub_(rounded).numpy()
