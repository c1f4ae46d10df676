"""What an extraction makes of a fine-tune: modules that become pairs, parameters that go whole."""

from __future__ import annotations

from dataclasses import dataclass

from loramerge.adapters.views import View
from loramerge.extracting.pairing import Match
from loramerge.extracting.reading import AnyChange


@dataclass(frozen=True)
class Stacked:
    """A stacked parameter (expert, rows, columns), all of whose matrices get one rank.

    `parameter`: its path in memory. `inner`: how many parameters of its module are wrapped outside of it. `flipped`:
    its matrices are (in, out).
    """

    parameter: str
    experts: int
    flipped: bool
    inner: int = 0


@dataclass(frozen=True)
class Unit:
    """A module whose change becomes a pair.

    `module`: as the base names it; `role`, `path`: as the target does, without prefixes. `shape`: of the weight as the
    module sees it, (out, in, *kernel). `flipped`: the change is stored (in, out). `also`: modules with the same weight.
    """

    module: str
    path: str
    change: AnyChange
    shape: tuple[int, ...]
    flipped: bool = False
    role: str = ""
    embedding: bool = False
    also: tuple[str, ...] = ()
    stacked: Stacked | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(match.nbytes for match in self.change.matches)

    @property
    def side(self) -> int:
        """Elements of both factors for each rank."""
        return sum(self.change.shape) * (1 + len(self.also))


@dataclass(frozen=True)
class Whole:
    """A parameter that goes whole: as it is after training, or what training added (`difference`).

    `same`: it did not change, and goes along with its module. `tied`: it is another one again.
    """

    name: str
    path: str
    leaf: str
    matches: tuple[Match, ...]
    view: View | None = None
    role: str = ""
    difference: bool = False
    same: bool = False
    tied: bool = False

    @property
    def nbytes(self) -> int:
        return sum(t.info.nbytes for match in self.matches for t in match.sources)


@dataclass(frozen=True)
class Sorted:
    """All that is to be done. `left_out`: changed, not wanted. `saved`: modules that a config must list as whole."""

    units: tuple[Unit, ...]
    wholes: tuple[Whole, ...]
    left_out: tuple[Match, ...]
    saved: tuple[str, ...] = ()
    task: str | None = None
    biases: bool = False
    notes: tuple[str, ...] = ()
