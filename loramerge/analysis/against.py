"""Updates against the weight that they change: relative norm, amplification (the paper's table 7), retention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loramerge.algebra.krylov import HOLD, Krylov, Operator
from loramerge.analysis.collisions import sampled_rows
from loramerge.analysis.similarity import axis, chance, phi, table
from loramerge.analysis.spectra import Decomposed
from loramerge.analysis.units import Spot
from loramerge.merging.kernels import TORCH_DTYPES, round_into
from loramerge.tensors.dtypes import display

BLOCK = 1 << 19
"""Elements of a row block in float64 (4 MB): it stays in a core's cache."""

GRAM_SIDE = 1024
"""Short sides up to this are decomposed exactly; longer ones by block Krylov."""

OVERSAMPLING, DEPTH = 8, 4

OUTPUTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def blocks(spot: Spot) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the place, (rows, width) in the dtype that they are stored in, each element read once."""
    located, p = spot.located, spot.place
    assert located is not None
    dtype = TORCH_DTYPES[located.info.dtype]
    step = max(1, BLOCK // max(p.cols, 1))
    for first in range(0, p.rows, step):
        rows = min(step, p.rows - first)
        raw = bytearray(rows * p.cols * dtype.itemsize)
        located.file.source.read_into(located.info.begin + (p.begin + first * p.cols) * dtype.itemsize, memoryview(raw))
        stored = torch.frombuffer(raw, dtype=dtype).view(rows, p.cols)
        yield first, stored[:, p.c0 : p.c1 : p.step]


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading singular triplets of a weight: U (m, k), S (k,) falling, V (n, k). `exact`: not by iteration."""

    U: Tensor
    S: Tensor
    V: Tensor
    exact: bool


@dataclass(eq=False)
class Weight:
    """What one pass over a weight W tells; everything in the orientation of the module, (out, in).

    `projections`: `U^T W V` (k, k) of each update. `sample`: rows `index` of the stored matrix.
    """

    norm2: float
    dtype: str
    flipped: bool
    projections: dict[int, Tensor]
    index: Tensor
    sample: Tensor
    leading: Leading | None = None
    bad: int = 0
    _held: Tensor | None = field(default=None, repr=False)

    @cached_property
    def norm(self) -> float:
        """‖W‖."""
        return math.sqrt(self.norm2)


def read_weight(spot: Spot, updates: Mapping[int, Decomposed], leading: int, module: str) -> Weight:
    """One pass over a weight by row blocks, in float64.

    Args:
        spot: where it lies.
        updates: adapter -> its update of this weight.
        leading: how many of W's own leading singular triplets to find; for these W is held in its own dtype.
        module: names the random start of the iteration.
    """
    p = spot.place
    assert spot.located is not None
    vectors = {i: d.vectors for i, d in updates.items()}
    # As stored: W, or its transpose, for which left and right change places.
    sides = {i: (v, u) if spot.flipped else (u, v) for i, (u, v) in vectors.items()}
    right = torch.cat([r for _, r in sides.values()], 1) if sides else torch.empty(p.width, 0, dtype=torch.float64)
    ends = [0]
    for _, r in sides.values():
        ends.append(ends[-1] + r.shape[1])
    projections = {i: torch.zeros(r.shape[1], r.shape[1], dtype=torch.float64) for i, (_, r) in sides.items()}
    index = sampled_rows(p.rows, p.width)
    sample = torch.empty(len(index), p.width, dtype=TORCH_DTYPES[spot.located.info.dtype])
    keep = leading > 0 and p.rows * p.width <= HOLD
    held = torch.empty(p.rows, p.width, dtype=sample.dtype) if keep else None
    norm2, bad = 0.0, 0
    for first, stored in blocks(spot):
        last = first + len(stored)
        wide = stored.double()
        square = float(wide.square().sum())
        if not math.isfinite(square):
            bad += int((~wide.isfinite()).sum())
            wide = wide.nan_to_num(0.0, 0.0, 0.0)
            square = float(wide.square().sum())
        norm2 += square
        if held is not None:
            held[first:last] = wide if bad else stored
        inside = (index >= first) & (index < last)
        if bool(inside.any()):
            sample[inside] = stored[index[inside] - first]
        product = wide @ right
        for (i, (left, _)), a, b in zip(sides.items(), ends, ends[1:], strict=False):
            projections[i].addmm_(left[first:last].T, product[:, a:b])
    if spot.flipped:
        projections = {i: x.T for i, x in projections.items()}
    made = Weight(norm2, spot.located.info.dtype, spot.flipped, projections, index, sample, bad=bad)
    if held is not None and norm2 > 0:
        found = leading_triplets(held, leading, module)
        made.leading = Leading(found.V, found.S, found.U, found.exact) if spot.flipped else found
    return made


def leading_triplets(w: Tensor, count: int, module: str) -> Leading:
    """The `count` leading singular triplets of a matrix: exact (Gram matrix in float64) where the short side is at most
    GRAM_SIDE, else by block Krylov in float32, whose values are lower bounds."""
    m, n = w.shape
    count = min(count, m, n)
    if min(m, n) <= GRAM_SIDE:
        wide = w.double()
        short = wide if m <= n else wide.T
        squares, turn = torch.linalg.eigh(short @ short.T)
        S = squares.flip(0)[:count].clamp(min=0).sqrt()
        U = turn.flip(1)[:, :count]
        V = (short.T @ U) / S.clamp(min=1e-300)
        return Leading(U, S, V, True) if m <= n else Leading(V, S, U, True)
    operator = Operator(w)
    space = Krylov(operator, count + OVERSAMPLING, 0, module)
    while space.depth < DEPTH and space.deepen():
        pass
    ritz = space.ritz()
    count = min(count, space.size)
    S = ritz.theta[:count].sqrt()
    left, right = (x.double() for x in ritz.triplets(count))
    right = right / S.clamp(min=1e-300)
    U, V = (right, left) if operator.flipped else (left, right)
    return Leading(U, S / operator.scale, V, False)


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and `count`."""
    return sorted({count, *(1 << k for k in range(count.bit_length()))} - {0}) if count else []


def amplification(d: Decomposed, w: Weight, adapter: int) -> dict[str, Any]:
    """The paper's section 7.3 and H.4 for one update: how much it has of what W does in its directions.

    `projection`: `‖U^T W V‖` with all k singular directions of D; `factor`: `‖D‖ / projection`, how much D amplifies
    them; `chance`: `k ‖W‖ / sqrt(m n)`, the root mean square of the projection on random directions (exact for
    uniformly distributed subspaces), `over_chance`: projection over it. `table`: for r = 1, 2, 4, ... k the projections
    of W on the r leading directions of D, of W itself (None where they are not known), and on random ones.
    """
    m, n = d.shape
    squares = w.projections[adapter].square().cumsum(0).cumsum(1).diagonal()
    k = d.rank
    projection = math.sqrt(float(squares[-1])) if k else 0.0
    level = w.norm / math.sqrt(m * n)
    own = None if w.leading is None else w.leading.S.square().cumsum(0).sqrt().tolist()
    return {
        "projection": projection,
        "factor": d.norm / projection if projection else None,
        "chance": k * level,
        "over_chance": projection / (k * level) if k and level else None,
        "table": [
            {
                "rank": r,
                "update": math.sqrt(float(squares[r - 1])),
                "base": own[r - 1] if own is not None and r <= len(own) else None,
                "random": r * level,
            }
            for r in sizes(k)
        ],
    }


def shared_directions(d: Decomposed, leading: Leading, points: int) -> dict[str, Any]:
    """phi(i, j) between the i leading directions of W and the j leading ones of D, left and right (H.3, figure 8)."""
    U, V = d.vectors
    i, j = axis(len(leading.S), points), axis(d.rank, points)
    return {
        "i": i,
        "j": j,
        "left": table(phi(leading.U.T @ U), i, j),
        "right": table(phi(leading.V.T @ V), i, j),
        "chance_left": table(chance(len(leading.S), d.rank, d.shape[0]), i, j),
        "chance_right": table(chance(len(leading.S), d.rank, d.shape[1]), i, j),
    }


def stored_rows(d: Decomposed, w: Weight) -> Tensor:
    """The rows of D that lie where `w.sample` does."""
    return d.A.T[w.index] @ d.B.T if w.flipped else d.rows(w.index)


def retention(rows: Tensor, w: Weight) -> dict[str, float | None]:
    """`<M - W, D> / <D, D>` over the sampled rows, M = W + D rounded once to each output dtype: the share of the change
    that a merge keeps. `keep` is the dtype of W. None where D is zero or M does not fit."""
    wide = w.sample.double()
    whole = float(rows.square().sum())
    kept: dict[str, float | None] = {}
    for name, dtype in {"keep": w.sample.dtype, **OUTPUTS}.items():
        target = torch.empty_like(rows, dtype=dtype)
        round_into(target, wide + rows)
        value = float(((target.double() - wide) * rows).sum()) / whole if whole else math.nan
        kept[name] = value if math.isfinite(value) else None
    return kept


def base_facts(w: Weight, spot: Spot) -> dict[str, Any]:
    """What is said of the weight itself."""
    return {
        "tensor": spot.tensor,
        "dtype": display(w.dtype),
        "norm": w.norm,
        "non_finite": w.bad,
        "singular_values": None if w.leading is None else w.leading.S.tolist(),
        "exact": None if w.leading is None else w.leading.exact,
    }
