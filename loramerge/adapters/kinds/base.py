"""What an update kind is: the factors it needs, whether they fit a weight, and its formula as one of a few forms.

A kind is decided from shapes (no torch, no data), and computed later: `form` gets the factors as tensors and gives
a form, which is how the change of a weight can be had. All forms see the weight `W` as its module does, flattened
to a matrix (out, in * prod(kernel)), in the compute dtype. `s` is the adapter's own scale, `λ` the user's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Factor name -> shape."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a formula needs beside the factors. Plain data, part of the plan.

    `shape`: of the weight as the module sees it. `scale`: the adapter's own s (1 for kinds that are not scaled).
    `weight`: the user's λ. `options`: what `Kind.options` decided from the adapter's settings.
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ forms


@dataclass(frozen=True, slots=True)
class Product:
    """Adds `L R`: L (out, r), R (r, cols). λ and s are in it."""

    L: Tensor
    R: Tensor


@dataclass(frozen=True, slots=True)
class RowDelta:
    """Adds a matrix of which any rows can be computed alone: `rows(r0, r1)` -> (r1 - r0, cols). λ and s are in it."""

    rows: Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Dense:
    """Adds a matrix (out, cols) that can only be had whole. λ and s are in it."""

    delta: Tensor


@dataclass(frozen=True, slots=True)
class RowMap:
    """Changes each row by itself: `apply(W[r0:r1], r0)` -> the new rows, (r1 - r0, cols). May write into its input."""

    apply: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class WholeMap:
    """Changes the weight as a whole: `apply(W)` -> W', both (out, cols). May write into its input."""

    apply: Callable[[Tensor], Tensor]


Form = Product | RowDelta | Dense | RowMap | WholeMap


# ------------------------------------------------------------------------------------------------ kinds


class Unfit(Exception):
    """The factors do not fit the weight or one another. The message says how, in one line."""


class Refused(Exception):
    """The factors are well formed and no static weight can hold them, or not enough is in the file; with the reason."""


class Kind(Protocol):
    """One update kind. Classes without state; the docstring has the formula and its source.

    `required`, `optional`: factor names; a class attribute `integers` may name those that hold whole numbers, which
    are given as int64, `numbered` names of which there may be any number (`v` allows `v.0`, `v.1`, ...),
    `may_be_empty` those that may have no elements; `needs_widest` asks for the setting `widest`, the largest (out, in)
    of all modules of the kind. `scaled`: whether alpha / rank applies. `additive`: whether the form is one
    that adds (Product, RowDelta, Dense) and never looks at the weight.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    scaled: ClassVar[bool]
    additive: ClassVar[bool]

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        """The rank that alpha is divided by, from the factors; None where the kind has none."""

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        """(out, in * prod(kernel)) of the weight, where the factors alone tell; None where they do not."""

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """Checks the factors against a weight of this shape and settles what the formula needs, as JSON data.

        `settings` are the adapter's config values under our names (`formats/adapters/*.toml`, `[config]`).

        Raises:
            Unfit, Refused.
        """

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        """The formula with these factors; None where it changes nothing. λ and s are taken in here."""


def takes(kind: type[Any], name: str) -> bool:
    """Whether a factor of this name belongs to a kind."""
    stem, dot, number = name.rpartition(".")
    numbered = dot and number.isdecimal() and stem in getattr(kind, "numbered", ())
    return bool(numbered) or name in kind.required or name in kind.optional


class BiasKind(Protocol):
    """A kind that changes the module's bias as well."""

    @staticmethod
    def bias(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
        """Whether this module's bias changes too, if it has one. `shape` is the weight's."""

    @staticmethod
    def bias_form(factors: Mapping[str, Tensor], context: Context, weight: Callable[[], Tensor]) -> Form | None:
        """The change of the bias, seen as (out, 1). `weight()` gives W before this update, (out, cols)."""
