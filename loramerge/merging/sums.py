"""What is known of the updates of a tensor beforehand: how large they may be, and how far a float32 sum may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from loramerge.adapters.operators import Add, AddProduct

if TYPE_CHECKING:
    from loramerge.adapters.operators import Operator

Array = NDArray[Any]

MANY = 200
"""Products to a sum, up to which float64's own error lies within the codec's guard; more widen it."""

MOST = 1 << 14
"""Products to a sum, up to which it is done in float32."""

HALF_ULP = 2.0**-24 * 1.01
"""What rounding a float32 number costs at most, relative to it, and a little."""


class Made:
    """The operators of one tensor, in float64.

    `largest` is at least the largest |d|, by |L R| <= |row of L| |column of R|: a bound for the error of a sum as well,
    which is off by at most r 2**-53 of it for r products. None where it takes all elements to tell.

    `minus` are the same with the other sign and rounded to float32, None where some are of another sort. A sum of r
    products and a number is off by at most (r + 1) 2**-24 of their magnitudes in whatever order, with all operators by
    `roundings` times as much, beside what the factors are off by; products that are too small for float32 by less than
    `tiny`. `sparse` are the same in float64, for few elements.
    """

    def __init__(self, operators: Sequence[Operator], in_chunks: bool) -> None:
        self.operators = operators
        self.largest: float | None = 0.0 if in_chunks else None
        self.minus: list[Operator] | None = []
        self.sparse: list[Operator] = []
        self.rows: list[tuple[AddProduct, Array, float]] = []
        self.flat = self.tiny = 0.0
        self.products = 0
        self.roundings = 1
        if not in_chunks:
            return
        for operator in operators:
            if isinstance(operator, AddProduct):
                self._product(operator)
            elif isinstance(operator, Add):
                self._difference(operator)
            else:
                self.largest = self.minus = None
                return
        assert self.largest is not None
        if not math.isfinite(self.largest):
            self.largest = self.minus = None
        elif self.products > MOST or not math.isfinite(self.tiny):
            self.minus = None

    def _product(self, operator: AddProduct) -> None:
        assert self.largest is not None and self.minus is not None
        r = operator.R.shape[0]
        rows = operator.L.square().sum(dim=1).sqrt().numpy()
        columns = operator.R.square().sum(dim=0)
        if not r or not rows.size or not columns.numel():
            return
        column = math.sqrt(float(columns.max()))
        self.rows.append((operator, rows, column))
        self.largest += float(rows.max()) * column * max(1.0, r / MANY)
        self.products = max(self.products, r)
        self.roundings += r + 1
        L, R = operator.L.float(), operator.R.float()
        if bool(torch.isfinite(L).all() and torch.isfinite(R).all()):
            self.tiny += r * 2.0**-125 * (1.0 + float(rows.max()) + column)
        else:
            self.tiny = math.inf
        self.minus.append(AddProduct(L.neg_(), R, operator.place))
        self.sparse.append(AddProduct(operator.L, operator.R.T.contiguous().T, operator.place))

    def _difference(self, operator: Add) -> None:
        assert self.largest is not None and self.minus is not None
        most = float(operator.difference.abs().max()) if operator.difference.numel() else 0.0
        self.largest += most
        self.flat += most
        self.roundings += 2
        self.tiny += 2.0**-125 if most < 2.0**127 else math.inf
        self.minus.append(Add(operator.difference.float().neg_()))
        self.sparse.append(operator)

    def bound(self, first: int, count: int) -> float:
        """At least the sum of the products' magnitudes, for elements `first, first + 1, ...`."""
        bound = self.flat
        for operator, rows, column in self.rows:
            place = operator.place
            r0, r1 = (first - place.begin) // place.cols, -((place.begin - first - count) // place.cols)
            here = rows[max(0, r0) : max(0, r1)]
            bound += float(here.max()) * column if here.size else 0.0
        return bound * 1.01


def addends(operator: Operator, index: Array) -> Array:
    """`operator.addends`, with fewer calls for a product that covers whole rows."""
    if isinstance(operator, AddProduct):
        p = operator.place
        if not p.begin and (p.c0, p.c1, p.step) == (0, p.cols, 1) and (not index.size or index[-1] < p.rows * p.cols):
            row = index // p.cols
            col = index - row * p.cols
            L, R = operator.L.numpy().take(row, axis=0), operator.R.numpy().T.take(col, axis=0)
            return np.asarray(np.einsum("ik,ik->i", L, R))
    added = operator.addends(torch.from_numpy(index))
    assert added is not None
    return np.asarray(added.numpy())
