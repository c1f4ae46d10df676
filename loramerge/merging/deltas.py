"""The updates of tensors as numbers, for the undo codec: in float64, or in float32 with float64 where that matters."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramerge.adapters.operators import Add, AddProduct
from loramerge.adapters.updates import Update

if TYPE_CHECKING:
    from loramerge.adapters.operators import Operator
    from loramerge.merging.stream import FactorFile

Array = NDArray[Any]

CHUNK = 1 << 19
"""Elements worked on at once, of what is in float32. An eighth of it stays in a core's own cache and is a few percent
faster on one core; but calls that take a few microseconds make the workers wait for one another, for Python's lock."""

DOUBLE_CHUNK = 1 << 16
"""Elements worked on at once, of what is in float64, which has more temporaries."""

KEPT = 12
"""Tensors whose operators are kept."""

MANY = 200
"""Products to a sum, up to which float64's own error lies within the codec's guard; more widen it."""

MOST = 1 << 14
"""Products to a sum, up to which it is done in float32."""

FEW = 1 << 14
"""Elements up to which float32 saves nothing."""


class Delta(Protocol):
    """The update d of n elements.

    `largest`: at least the largest |d|. In float64, d is off by less than 2**-45 of that or 2**-37 of |d|, whoever
    computes it. `error`: what the elements of `chunks` may be off by; 0 where they are in float64.
    """

    @property
    def size(self) -> int: ...

    @property
    def largest(self) -> float: ...

    @property
    def error(self) -> float: ...

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """(index of the first, some elements) in order. They may lie in a buffer that the next ones overwrite."""

    def exact(self, index: Array) -> Array:
        """The elements `index` (k,) in float64."""

    def double(self) -> Delta:
        """The same with all elements in float64."""


class Given:
    """An update that is in memory, as (n,) float64."""

    error = 0.0

    def __init__(self, d: Tensor) -> None:
        if d.dtype != torch.float64:
            raise ValueError(f"the update is {d.dtype}, not float64")
        self._d = d.detach().cpu().contiguous().view(-1).numpy()
        self.size = self._d.size
        self.largest = _largest(self._d)

    def chunks(self) -> Iterator[tuple[int, Array]]:
        for at in range(0, self.size, DOUBLE_CHUNK):
            yield at, self._d[at : at + DOUBLE_CHUNK]

    def exact(self, index: Array) -> Array:
        return np.asarray(self._d[index])

    def double(self) -> Delta:
        return self


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
        self._kept: deque[tuple[tuple[Update, ...], _Made]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._buffers = threading.local()

    def of(self, updates: tuple[Update, ...], first: int, count: int, cols: int) -> Delta:
        """What they add to the elements `first, first + 1, ...` of their tensor, whole rows of `cols` elements.

        It lies in a buffer of the calling thread, until that asks again.
        """
        with self._lock:
            made = next((made for known, made in self._kept if known is updates), None)
            if made is None:
                built = [update.operator(self._factors.read, NoWeights()) for update in updates]
                made = _Made([operator for operator in built if operator is not None], self._device.type == "cpu")
                self._kept.append((updates, made))
        if made.largest is None:
            return Given(self.sum(made.operators, first, count, torch.float64))
        return _InChunks(self, made, first, count, cols, made.largest)

    def sum(self, operators: Sequence[Operator], first: int, count: int, dtype: torch.dtype) -> Tensor:
        """What operators of this dtype add."""
        buffer = getattr(self._buffers, "held", None)
        nbytes = count * dtype.itemsize
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers.held = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        delta: Tensor = buffer[:nbytes].view(dtype)
        if operators and (product := _whole(operators[0], first, count)) is not None:
            torch.mm(*product, out=delta.view(len(product[0]), -1))  # saves a pass
            operators = operators[1:]
        else:
            delta.zero_()
        for operator in operators:
            operator.apply(delta, first, delta)
        return delta


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


class _Made:
    """The operators of one tensor, in float64.

    `largest` is at least the largest |d|, by |L R| <= |row of L| |column of R|: a bound for the error of a sum as well,
    which is off by at most r 2**-53 of it for r products. None where it takes all elements to tell.

    `singles` are the same rounded to float32, None where some are of another sort. A sum of r products is then off by
    at most (r + 2) 2**-24 of the bound in whatever order, and `count` of them by so much more; products that are too
    small for float32 by less than `tiny`. `sparse` are the same in float64, for few elements: columns lie in one piece.
    """

    def __init__(self, operators: Sequence[Operator], in_chunks: bool) -> None:
        self.operators = operators
        self.largest: float | None = 0.0 if in_chunks else None
        self.singles: list[Operator] | None = []
        self.sparse: list[Operator] = []
        self.rows: list[tuple[AddProduct, Array, float]] = []
        self.flat = self.tiny = 0.0
        self.products = 0
        if not in_chunks:
            return
        for operator in operators:
            if isinstance(operator, AddProduct):
                self._product(operator)
            elif isinstance(operator, Add):
                self._difference(operator)
            else:
                self.largest = self.singles = None
                return
        assert self.largest is not None
        if not math.isfinite(self.largest):
            self.largest = self.singles = None
        elif self.products > MOST or not math.isfinite(self.tiny):
            self.singles = None

    def _product(self, operator: AddProduct) -> None:
        assert self.largest is not None and self.singles is not None
        r = operator.R.shape[0]
        rows = operator.L.square().sum(dim=1).sqrt().numpy()
        columns = operator.R.square().sum(dim=0)
        if not r or not rows.size or not columns.numel():
            return
        column = math.sqrt(float(columns.max()))
        self.rows.append((operator, rows, column))
        self.largest += float(rows.max()) * column * max(1.0, r / MANY)
        self.products = max(self.products, r)
        L, R = operator.L.float(), operator.R.float()
        if bool(torch.isfinite(L).all() and torch.isfinite(R).all()):
            self.tiny += r * 2.0**-125 * (1.0 + float(rows.max()) + column)
        else:
            self.tiny = math.inf
        self.singles.append(AddProduct(L, R, operator.place))
        self.sparse.append(AddProduct(operator.L, operator.R.T.contiguous().T, operator.place))

    def _difference(self, operator: Add) -> None:
        assert self.largest is not None and self.singles is not None
        most = float(operator.difference.abs().max()) if operator.difference.numel() else 0.0
        self.largest += most
        self.flat += most
        self.tiny += 2.0**-125 if most < 2.0**127 else math.inf
        self.singles.append(Add(operator.difference.float()))
        self.sparse.append(operator)

    def error(self, first: int, count: int) -> float:
        """What the sum of `singles` may be off by, for elements `first, first + 1, ...`."""
        bound = self.flat
        for operator, rows, column in self.rows:
            place = operator.place
            r0, r1 = (first - place.begin) // place.cols, -((place.begin - first - count) // place.cols)
            here = rows[max(0, r0) : max(0, r1)]
            bound += float(here.max()) * column if here.size else 0.0
        return (self.products + len(self.operators) + 4) * 2.0**-24 * bound * 1.01 + self.tiny


@dataclass(frozen=True)
class _InChunks:
    """An update that is computed chunk by chunk: each is used while it is in the cache."""

    deltas: Deltas
    made: _Made
    first: int
    size: int
    cols: int
    largest: float
    doubled: bool = False

    @property
    def single(self) -> bool:
        return not (self.doubled or self.made.singles is None or self.size <= FEW)

    @property
    def error(self) -> float:
        return self.made.error(self.first, self.size) if self.single else 0.0

    def chunks(self) -> Iterator[tuple[int, Array]]:
        operators, dtype, elements = self.made.operators, torch.float64, DOUBLE_CHUNK
        if self.single and self.made.singles is not None:
            operators, dtype, elements = self.made.singles, torch.float32, CHUNK
        step = max(1, elements // self.cols) * self.cols
        for at in range(0, self.size, step):
            yield at, self.deltas.sum(operators, self.first + at, min(step, self.size - at), dtype).numpy()

    def exact(self, index: Array) -> Array:
        total = np.zeros(index.size)
        step = max(1, DOUBLE_CHUNK // max(1, self.made.products))
        for at in range(0, index.size, step):
            part = torch.from_numpy(index[at : at + step] + self.first)
            for operator in self.made.sparse:
                added = operator.addends(part)
                assert added is not None
                total[at : at + step] += added.numpy()
        return total

    def double(self) -> Delta:
        return _InChunks(self.deltas, self.made, self.first, self.size, self.cols, self.largest, doubled=True)
