"""What a user asks of an extraction, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramerge.errors import UsageError

DTYPES = ("float32", "float16", "bfloat16")
"""Of the factors."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `loramerge.extract`."""

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    to: str | None = None
    dtype: str = "float32"
    noise_floor: bool = True
    embeddings: str = "whole"
    only_linear: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    device: str = "auto"
    jobs: int | None = None
    force: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Raises UsageError for what makes no sense."""
        if self.rank is None and self.energy is None and self.budget is None:
            raise UsageError(
                "usage.rank",
                "nothing says how large the adapter may be",
                fix="give --rank N, --energy E (a share of the change to keep) or --budget SIZE",
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError("usage.rank", f"a rank of {self.rank} keeps nothing", fix="--rank N with N at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(
                "usage.energy", f"{self.energy:g} is no share", fix="--energy E with E up to 1, such as 0.95"
            )
        if self.budget is not None and self.budget < 1:
            raise UsageError("usage.budget", f"a budget of {self.budget} bytes", fix="--budget 20MB")
        if self.dtype not in DTYPES:
            raise UsageError("usage.dtype", f"factors in {self.dtype!r}", fix=f"one of {', '.join(DTYPES)}")
        if self.embeddings not in ("whole", "low-rank"):
            raise UsageError("usage.embeddings", f"{self.embeddings!r}", fix="--embeddings whole or low-rank")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError("usage.jobs", f"{self.jobs} jobs", fix="--jobs N with N at least 1")
