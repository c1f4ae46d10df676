"""Which rank each place gets: a rule for every one by itself, or a budget over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loramerge.algebra import RankRule, budget, energy, fixed, ratio
from loramerge.converting.target import Target
from loramerge.errors import MismatchError, UsageError


@dataclass(frozen=True)
class Ranks:
    """How ranks are chosen: by at most one of these, by none at the numerical rank.

    `rank`: at most so many; `energy`: the share of the sum of squares to keep; `ratio`: of the largest to the smallest
    singular value; `budget`: bytes of the weight file.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    budget: int | None = None

    def check(self) -> None:
        """Raises UsageError: `usage.rank` for more than one, or a value out of range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            flags = " and ".join(f"--{name}" for name in given)
            raise UsageError("usage.rank", f"{flags} are two ways to choose ranks", fix="give one of them")
        usual: dict[str, tuple[bool, str]] = {
            "rank": (self.rank is None or self.rank >= 1, "--rank N with N at least 1"),
            "energy": (0 < (1.0 if self.energy is None else self.energy) <= 1, "--energy SHARE, such as 0.95"),
            "ratio": ((2.0 if self.ratio is None else self.ratio) > 1, "--ratio X above 1"),
            "budget": (self.budget is None or self.budget >= 1, "--budget SIZE, such as 50MB"),
        }
        for name, (fits, fix) in usual.items():
            if not fits:
                raise UsageError("usage.rank", f"a {name} of {given[name]:g}", fix=fix)

    @property
    def stated(self) -> bool:
        """Whether there is a way."""
        return any(value is not None for value in vars(self).values())

    def rule(self) -> RankRule | None:
        """The rule for one place by itself; None for the numerical rank."""
        if self.rank is not None:
            return fixed(self.rank)
        if self.energy is not None:
            return energy(self.energy)
        if self.ratio is not None:
            return ratio(self.ratio)
        return None


def of_budget(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], limit: int, target: Target
) -> dict[str, int]:
    """Ranks of all places within a limit of bytes.

    Args:
        spectra: singular values of each place, falling.
        shapes: (m, n) of each place, times the bytes of an element.
        limit: bytes of all factors together.
        target: where it takes one rank for all, the largest that fits.

    Raises:
        MismatchError: `combine.budget` where it holds no rank at all.
    """
    if target.one_rank:
        cost = sum(sum(shapes[name]) for name, s in spectra.items() if len(s))
        rank = max(limit, 0) // cost if cost else 0
        allowed = [r for r in target.ranks if r <= rank]
        rank = rank if not target.ranks else max(allowed, default=0)
        ranks = {name: min(rank, len(s)) for name, s in spectra.items()}
    else:
        ranks = budget(spectra, shapes, max(limit, 0), 1)
    if not any(ranks.values()) and any(len(s) for s in spectra.values()):
        least = min(sum(shapes[name]) for name, s in spectra.items() if len(s))
        raise MismatchError(
            "combine.budget",
            f"the budget leaves {max(limit, 0)} bytes for factors, and the smallest of rank 1 take {least}",
            fix="give a larger --budget, or --exclude modules",
        )
    return ranks
