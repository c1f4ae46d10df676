"""Subspace similarity phi(i, j) of the LoRA paper (equation 4), its chance level, and averages over modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FIXED = 1 << 40
"""Averages are sums of whole numbers of 1/FIXED, so that no order of the modules changes a bit of them."""


def phi(overlap: Tensor) -> Tensor:
    """`phi(i, j) = ‖U_1[:, :i]^T U_2[:, :j]‖² / min(i, j)` for all i, j at once, in [0, 1] (Hu et al. 2021, eq. 4).

    Args:
        overlap: `U_1^T U_2` (p, q), U with orthonormal columns, the most important first.

    Returns:
        (p, q) float64, phi(i, j) at [i - 1, j - 1]: 1 where one span contains the other, 0 where they are orthogonal.
    """
    p, q = overlap.shape
    sums = overlap.double().square().cumsum(0).cumsum(1)
    i = torch.arange(1, p + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, q + 1, dtype=torch.float64)[None, :]
    return (sums / torch.minimum(i, j)).clamp(0, 1)


def chance(p: int, q: int, dimension: int) -> Tensor:
    """What phi is on average for random subspaces of this many dimensions: `max(i, j) / dimension`, (p, q)."""
    i = torch.arange(1, p + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, q + 1, dtype=torch.float64)[None, :]
    return (torch.maximum(i, j) / dimension).clamp(max=1)


def axis(count: int, points: int) -> list[int]:
    """At most `points` of the numbers 1 to `count`: the first ones all, the rest evenly, the last among them."""
    if points <= 0 or count <= points:
        return list(range(1, count + 1))
    near = min(8, points // 2)
    rest = points - near
    return [*range(1, near + 1), *(near + round((count - near) * k / rest) for k in range(1, rest + 1))]


def table(values: Tensor, i: list[int], j: list[int]) -> list[list[float]]:
    """Rows of `values` at the numbers i and j, as plain data."""
    rows: list[list[float]] = values[[a - 1 for a in i]][:, [b - 1 for b in j]].tolist() if i and j else []
    return rows


@dataclass
class Mean:
    """Means of tables (p, q) over modules, and of their chance levels; where sizes differ, over those that have it."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    chances: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    def add(self, values: Tensor, dimension: int) -> None:
        """One module's phi, whose vectors have this many entries."""
        p, q = values.shape
        self._grow(p, q)
        self.sums[:p, :q] += (values * FIXED).round().long()
        self.chances[:p, :q] += (chance(p, q, dimension) * FIXED).round().long()
        self.counts[:p, :q] += 1

    def _grow(self, p: int, q: int) -> None:
        have_p, have_q = self.sums.shape
        if p <= have_p and q <= have_q:
            return
        p, q = max(p, have_p), max(q, have_q)
        for name in ("sums", "chances", "counts"):
            old = getattr(self, name)
            new = old.new_zeros(p, q)
            new[:have_p, :have_q] = old
            setattr(self, name, new)

    def data(self, points: int) -> dict[str, Any] | None:
        """`{"i", "j", "mean", "chance", "modules"}`; None where nothing was added."""
        if not self.sums.numel():
            return None
        i, j = axis(self.sums.shape[0], points), axis(self.sums.shape[1], points)
        count = self.counts.clamp(min=1).double() * FIXED
        return {
            "i": i,
            "j": j,
            "mean": table(self.sums / count, i, j),
            "chance": table(self.chances / count, i, j),
            "modules": int(self.counts.max()),
        }
