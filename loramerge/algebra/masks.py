"""Elementwise methods: which elements of every update count, and how those that do are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from loramerge.algebra.core import Factors, RankRule, Stack, Update
from loramerge.algebra.randomness import stream, uniform
from loramerge.algebra.spaces import KNOTS_CUT, coordinates
from loramerge.algebra.thresholds import Array, kth_largest, magnitudes, spans

Trim = Callable[[Tensor, int], Tensor]
"""From a block of rows and the number of its first row to the block with some elements zeroed or scaled."""


class Elementwise:
    """A merge of arrays element by element, computed by blocks of rows: with space `full` an `Update` of full rank."""

    def __init__(
        self, arrays: Sequence[Array], trims: Sequence[Trim], *, elect: bool = False, scale: float = 1.0
    ) -> None:
        self.arrays, self.trims, self.elect, self.scale = arrays, trims, elect, scale

    @property
    def shape(self) -> tuple[int, int]:
        """Of the arrays and the result."""
        return self.arrays[0].shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the result."""
        blocks = self._trimmed(start, stop)
        total = blocks.sum(0)
        if not self.elect:
            return total * self.scale
        sign = total.sign()
        undecided = (sign == 0) & (blocks != 0).any(0)
        if undecided.any():
            sign = torch.where(undecided, self._majority, sign)
        agree = (blocks.sign() == sign) & (blocks != 0)
        return self.scale * (blocks * agree).sum(0) / agree.sum(0).clamp(min=1)

    def dense(self) -> Tensor:
        """The whole result."""
        blocks = [self.rows(start, stop) for start, stop in spans(self.shape)]
        return torch.cat(blocks) if blocks else self.arrays[0].rows(0, 0)

    def factors(self, rule: RankRule | None = None) -> Factors:
        """The best factors of a rank, from the whole result: forms it, and the Gram matrix of its smaller side."""
        return truncated(self.dense(), rule)

    def _trimmed(self, start: int, stop: int) -> Tensor:
        """(T, rows, columns)."""
        return torch.stack(
            [trim(array.rows(start, stop), start) for array, trim in zip(self.arrays, self.trims, strict=True)]
        )

    @cached_property
    def _majority(self) -> float:
        """The sign that most elements elect: it decides where positive and negative sums are equal."""
        votes = sum(int(self._trimmed(i, j).sum(0).sign().sum()) for i, j in spans(self.shape))
        return float((votes > 0) - (votes < 0))


def truncated(matrix: Tensor, rule: RankRule | None = None) -> Factors:
    """Factors of a dense matrix (m, n) at its numerical rank or that of a rule, by eigenvectors of the smaller side.

    The Gram matrix (float64) squares the condition: directions below 1e-8 of the largest singular value are noise. The
    returned product is the projection of the matrix on the others, so its error is optimal all the same.
    """
    m, n = matrix.shape
    if m < n:
        return truncated(matrix.T, rule).transposed()
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    largest = float(values[-1]) if n else 0.0
    kept = vectors[:, values > torch.finfo(torch.float64).eps * max(m, n) * largest].flip(1)
    return Factors(matrix @ kept, kept.T).factors(rule)


def magnitude(
    stack: Stack,
    density: float,
    *,
    elect: bool = False,
    thresholds: Sequence[float] | None = None,
    space: str = "full",
    cut: float = KNOTS_CUT,
) -> Update:
    """The sum (or with `elect` the elected mean, see `ties`) of what every update has of largest magnitude."""
    return ties(stack, density, thresholds=thresholds, space=space, cut=cut, elect=elect)


def ties(
    stack: Stack,
    density: float,
    *,
    scale: float = 1.0,
    thresholds: Sequence[float] | None = None,
    space: str = "full",
    cut: float = KNOTS_CUT,
    elect: bool = True,
) -> Update:
    """TIES (arXiv 2306.01708): trim, elect a sign for every element, mean of those that agree.

    Trim keeps the elements whose float32 magnitude is at least the k-th largest, `k = max(1, int(density N))`, all of
    them where several are equal. `g = sgn(sum_i D_i)`, where that is 0 the sign that most elements elect;
    `M = scale * sum_{i: sgn D_i = g} D_i / count`. Weights are folded into D_i, so negative ones vote with their sign
    and counts, not weights, divide.

    Args:
        density: share of elements to keep, in (0, 1].
        thresholds: smallest magnitudes to keep, for the adapters as given, where they are known for the whole adapter
            (`adapter_threshold`) instead of this module alone.
        space: see `loramerge.algebra.spaces`.
    """
    _check_density(density)
    known = None if thresholds is None else stack.given(thresholds)

    def trims(arrays: Sequence[Array]) -> list[Trim]:
        return [_at_least(known[i] if known else _smallest_kept(array, density)) for i, array in enumerate(arrays)]

    return _merge(stack, space, cut, trims, elect, scale)


def adapter_threshold(updates: Sequence[Array], density: float) -> float:
    """The k-th largest magnitude over all modules of an adapter, `k = max(1, int(density N))`: how the paper trims."""
    _check_density(density)
    total = sum(rows * columns for rows, columns in (u.shape for u in updates))
    return kth_largest(updates, [max(1, int(density * total))])[0] if total else 0.0


def breadcrumbs(
    stack: Stack, density: float, gamma: float, *, elect: bool = False, space: str = "full", cut: float = KNOTS_CUT
) -> Update:
    """Model Breadcrumbs (arXiv 2312.06795): drops the share gamma of largest magnitude, keeps the next `density`.

    With N elements, `t = int(gamma N)` and `k = max(1, int(density N))`: the t largest and their equals go, then
    what is at least the (t + k)-th largest stays; the sum of it, or with `elect` the mean as in `ties`.
    """
    _check_density(density)
    if not 0 <= gamma < 1 or density + gamma > 1 + 1e-12:
        raise ValueError(f"gamma must be from 0 to 1 - density, not {gamma} with density {density}")

    def trims(arrays: Sequence[Array]) -> list[Trim]:
        return [_between(array, density, gamma) for array in arrays]

    return _merge(stack, space, cut, trims, elect, 1.0)


def dare(
    stack: Stack,
    p: float,
    *,
    seed: int = 0,
    module: str = "",
    elect: bool = False,
    scale: float = 1.0,
    space: str = "full",
    cut: float = KNOTS_CUT,
) -> Update:
    """DARE (arXiv 2311.03099): drops elements with probability p and divides the others by 1 - p, then sums.

    With `elect` the elected mean of what is left, as in `ties`. The mask of an element comes from a counter-based
    generator keyed by (seed, adapter, module name), the counter being its place `row n + column`: order, blocks,
    threads and device change nothing, and one adapter given twice has one mask.

    Args:
        p: in [0, 1).
        module: name of the module, so that modules have masks of their own.
    """
    if not 0 <= p < 1:
        raise ValueError(f"the share to drop must be at least 0 and below 1, not {p}")

    def trims(arrays: Sequence[Array]) -> list[Trim]:
        return [_dropped(p, stream(seed, f.identity, module)) for f in stack.adapters]

    return _merge(stack, space, cut, trims, elect, scale)


def dare_ties(
    stack: Stack,
    p: float,
    *,
    seed: int = 0,
    module: str = "",
    scale: float = 1.0,
    space: str = "full",
    cut: float = KNOTS_CUT,
) -> Update:
    """`dare` with the elected mean of `ties` in place of the sum."""
    return dare(stack, p, seed=seed, module=module, elect=True, scale=scale, space=space, cut=cut)


def della(
    stack: Stack,
    density: float,
    eps: float,
    *,
    seed: int = 0,
    module: str = "",
    elect: bool = False,
    space: str = "full",
    cut: float = KNOTS_CUT,
) -> Update:
    """DELLA (arXiv 2406.11617): elements of larger magnitude in their row are likelier to stay.

    With the place 0 .. n - 1 of an element by magnitude in its row (equal ones by column), the probability to keep it
    is `q = density - eps + 2 eps place / (n - 1)`; what is kept is divided by its q; then the sum, or with `elect` the
    mean as in `ties`. Random as in `dare`.

    Args:
        density: mean share to keep, in (0, 1].
        eps: from 0 to min(density, 1 - density).
    """
    _check_density(density)
    if not 0 <= eps <= min(density, 1 - density) + 1e-12:
        raise ValueError(f"eps must be from 0 to {min(density, 1 - density):g}, not {eps}")

    def trims(arrays: Sequence[Array]) -> list[Trim]:
        return [_ranked_drop(density, eps, stream(seed, f.identity, module)) for f in stack.adapters]

    return _merge(stack, space, cut, trims, elect, 1.0)


def _merge(
    stack: Stack,
    space: str,
    cut: float,
    trims: Callable[[Sequence[Array]], list[Trim]],
    elect: bool,
    scale: float,
) -> Update:
    arrays, back = coordinates(stack, space, cut)
    merged = Elementwise(arrays, trims(arrays), elect=elect, scale=scale)
    return merged if back is None else back(merged.dense())


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, not {density}")


def _smallest_kept(array: Array, density: float) -> float:
    count = array.shape[0] * array.shape[1]
    if density == 1 or not count:
        return 0.0
    return kth_largest([array], [max(1, int(density * count))])[0]


def _at_least(smallest: float) -> Trim:
    return lambda block, row: block * (magnitudes(block) >= smallest)


def _between(array: Array, density: float, gamma: float) -> Trim:
    count = array.shape[0] * array.shape[1]
    if not count:
        return lambda block, row: block
    top = int(gamma * count)
    last = min(top + max(1, int(density * count)), count)
    if not top:
        return _at_least(kth_largest([array], [last])[0])
    largest, smallest = kth_largest([array], [top, last])
    return lambda block, row: block * ((magnitudes(block) >= smallest) & (magnitudes(block) < largest))


def _dropped(p: float, key: int) -> Trim:
    def trim(block: Tensor, row: int) -> Tensor:
        return block * (_numbers(key, block, row) < 1 - p) / (1 - p)

    return trim if p else lambda block, row: block


def _ranked_drop(density: float, eps: float, key: int) -> Trim:
    def trim(block: Tensor, row: int) -> Tensor:
        places = block.abs().argsort(dim=1, stable=True).argsort(dim=1).to(block.dtype)
        spread = 2 * eps / (block.shape[1] - 1) if block.shape[1] > 1 else 0.0
        low = density - eps if block.shape[1] > 1 else density
        q = (low + spread * places).clamp(0, 1)
        kept = _numbers(key, block, row) < q
        return torch.where(kept, block / q, torch.zeros_like(block))

    return trim


def _numbers(key: int, block: Tensor, row: int) -> Tensor:
    """The random number of every element of a block of rows."""
    columns = block.shape[1]
    return uniform(key, row * columns, block.numel()).view(block.shape).to(block.device)
