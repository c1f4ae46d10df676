"""Updates whose every element comes out the same, bit for bit, on any machine: factors in fixed-point numbers.

A float64 product of two matrices depends in its last bits on the order in which it is summed, and libraries differ.
Not so where all numbers are whole multiples of one unit and none of the sums exceeds 2**53 of them: then no sum is
rounded at all. So L is rounded to 24 bits below the largest number of its row and R to as many below that of its
column, for rank 16; the more products, the fewer bits. That moves the update by 2**-24 of its largest terms, about what
float32 loses, and nothing else here depends on who computes it.

What rests is elementwise: `x = float32(M) - float32(d)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loramerge.adapters.operators import AddProduct
from loramerge.adapters.views import Place

CHUNK = 1 << 18
"""Elements worked on at once. Fewer would stay in a core's own cache and save a little of its time, but calls that take
a few microseconds make the workers wait for one another, for Python's lock."""

MOST = 1 << 10
"""Products to a sum, up to which at least 21 bits are left for each factor."""

LARGEST_EXPONENT = 400
"""Of the largest numbers of rows and columns, and of their opposites: far from where float64 ends."""


def fixed(operators: Sequence[AddProduct]) -> list[AddProduct] | None:
    """The same updates in fixed-point numbers, float64, those of one place as one.

    None where they cannot be: products that are too many, too large or too small, or places that overlap in part.
    """
    places: dict[Place, list[AddProduct]] = {}
    for operator in operators:
        places.setdefault(operator.place, []).append(operator)
    if any(_overlap(a, b) for a in places for b in places if a is not b):
        return None
    made = []
    for place, here in places.items():
        L, R = torch.cat([o.L for o in here], dim=1), torch.cat([o.R for o in here])
        r = L.shape[1]
        if r > MOST:
            return None
        if not r or not L.numel() or not R.numel():
            continue
        if not (torch.isfinite(L).all() and torch.isfinite(R).all()):
            return None
        bits = (53 - math.ceil(math.log2(r))) // 2
        rows, columns = _exponents(L, 1), _exponents(R, 0)
        if any(int(e.abs().max()) > LARGEST_EXPONENT for e in (rows, columns)):
            return None
        made.append(AddProduct(_rounded(L, rows - bits), _rounded(R, columns - bits), place))
    return made


def _overlap(a: Place, b: Place) -> bool:
    """Whether two places may share elements."""
    if a.begin + a.rows * a.cols <= b.begin or b.begin + b.rows * b.cols <= a.begin:
        return False
    apart = a.c1 <= b.c0 or b.c1 <= a.c0 or (a.step == b.step and (a.c0 - b.c0) % a.step != 0)
    return not (apart and a.cols == b.cols and (a.begin - b.begin) % a.cols == 0)


def _exponents(factor: Tensor, dim: int) -> Tensor:
    """Exponents of powers of two above all numbers along a dimension, int32; 0 where all are zero."""
    return torch.frexp(factor.abs().amax(dim=dim, keepdim=True))[1]


def _rounded(factor: Tensor, exponent: Tensor) -> Tensor:
    """To multiples of 2**exponent: dividing by powers of two is exact."""
    unit = torch.from_numpy(np.ldexp(1.0, exponent.numpy()))
    return factor.div(unit).round_().mul_(unit).contiguous()
