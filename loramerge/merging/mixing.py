"""What methods make of the updates of one site, in float64: factors where they keep to those, else rows as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramerge.adapters import operators as ops
from loramerge.adapters.operators import Operator
from loramerge.adapters.updates import ReadFactor, Weights
from loramerge.adapters.views import Part
from loramerge.algebra import masks
from loramerge.algebra import methods as algebra
from loramerge.algebra.core import Factors, Stack, content_key
from loramerge.algebra.threads import one_thread
from loramerge.algebra.thresholds import Array, spans
from loramerge.errors import UnsupportedError
from loramerge.merging.kernels import TORCH_DTYPES
from loramerge.merging.members import Exact, Look, array_of, sum_of, weighted_of
from loramerge.merging.sites import Site
from loramerge.merging.tiles import AddRows, Taken, Tiles
from loramerge.tensors.text import quoted

if TYPE_CHECKING:
    from loramerge.merging.methods import Combined
    from loramerge.methods import Chosen

LINALG_ERROR: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def operator(update: Combined, read: ReadFactor, weights: Weights) -> Operator | None:
    """The operator of one part of a site whose result is read by rows; None where the method makes nothing of it.

    Raises:
        UnsupportedError: `method.failed`: the updates are such that the method has no result.
    """
    site, how = update.site, update.how
    exact = Exact(read, update)

    def made() -> Any:
        arrays = _arrays(site, exact, Look(weights, update))
        if arrays is None:
            return None
        thresholds = None
        if how.options.get("trim") == "adapter":
            thresholds = update.all.once("thresholds", lambda: _thresholds(update, exact, weights))
        return algebra.of_stack(how.name, _stack(arrays), how.options, module=site.name, thresholds=thresholds)

    with _failing(site, how):
        found = update.all.made(site, exact.dtype, made)
        if found is None:
            return None
        part = site.view.parts[update.part]
        rows = _held(found, part, exact) if part.flipped else Taken(Tiles(found.rows, found.shape[0]), part).rows
        return AddRows(part.place, rows)


def product(site: Site, how: Chosen, read: ReadFactor) -> tuple[Tensor, Tensor, float | None]:
    """What a method that keeps to factors makes of a site: b (m, r), a (r, n), r >= 1, in float64 on the CPU.

    Args:
        read: gives factors in float64 on the CPU.

    Returns:
        b, a, and for methods on factors how far the result is from the sum of updates, relative to that.

    Raises:
        UnsupportedError: `method.failed`.
    """
    exact = Exact(read, None)
    distance = None
    with _failing(site, how), one_thread(), torch.inference_mode():
        made: Any = None
        if how.method.factors:
            given = [weighted_of(of[0], exact) for of in site.members if of]
            result = algebra.combined(how.name, given, how.options, module=site.name)
            made, distance = result.update, result.distance
        elif (arrays := _arrays(site, exact, None)) is not None:
            made = algebra.of_stack(how.name, _stack(arrays), how.options, module=site.name)
        if made is None or not made.rank:
            return exact.zeros(site.view.rows, 1), exact.zeros(1, site.view.cols), distance
        return made.b, made.a, distance


def raw(tensor: Tensor, dtype: str) -> bytes:
    """A tensor's bytes in a dtype (`F32`, `F64`)."""
    return bytes(tensor.to(TORCH_DTYPES[dtype]).contiguous().view(-1).view(torch.uint8).numpy().data)


@contextmanager
def _failing(site: Site, how: Chosen) -> Iterator[None]:
    """Says of which site the mathematics had no result."""
    try:
        yield
    except (ValueError, LINALG_ERROR) as error:
        raise UnsupportedError(
            "method.failed",
            f"{how.name} has no result for {quoted(site.name)}: {error}",
            fix="another method, or --exclude this module",
            tensors=[part.tensor for part in site.view.parts],
        ) from None


def _arrays(site: Site, exact: Exact, look: Look | None) -> list[Any] | None:
    """What each adapter does to a site, as factors or, where `look` is given, arrays of rows; None for nothing at all.

    `look`: how to see the base's weights; without, all have to be factors.
    """
    arrays = [sum_of([array_of(m, site, exact, look) for m in of]) for of in site.members]
    if all(array is None for array in arrays):
        return None
    nothing = Factors(exact.zeros(site.view.rows, 0), exact.zeros(0, site.view.cols))
    return [nothing if array is None else array for array in arrays]


def _stack(arrays: Sequence[Any]) -> Stack:
    """The adapters of a site, in an order that does not depend on theirs."""
    if all(isinstance(array, Factors) for array in arrays):
        return Stack(arrays)
    return _Mixed(arrays)


class _Mixed(Stack):
    """A stack in which some are arrays without factors: enough for methods that read rows."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        first = [array.rows(0, 1).flatten()[:64] for array in arrays]  # tells weights apart
        keys = [(array.identity, content_key(row)) for array, row in zip(arrays, first, strict=True)]
        self.order = tuple(sorted(range(len(arrays)), key=keys.__getitem__))
        self.adapters = tuple(arrays[i] for i in self.order)


def _thresholds(update: Combined, exact: Exact, weights: Weights) -> list[float]:
    """Of each adapter, the smallest magnitude to keep over all that it changes."""
    found: list[float] = []
    look = Look(weights, update)
    for i in range(len(update.site.members)):
        arrays: list[Array] = [_Lazy(site, i, exact, look) for site in update.all.each if site.members[i]]
        found.append(masks.adapter_threshold(arrays, update.how.options["density"]))
    return found


class _Lazy:
    """What one adapter does to a site, made anew for each block: a whole adapter does not lie in memory."""

    def __init__(self, site: Site, adapter: int, exact: Exact, look: Look) -> None:
        self._members, self._about = site.members[adapter], (site, exact, look)
        self._exact = exact
        self.shape = (site.view.rows, site.view.cols)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop."""
        array = sum_of([array_of(member, *self._about) for member in self._members])
        found: Tensor = self._exact.zeros(stop - start, self.shape[1]) if array is None else array.rows(start, stop)
        return found


def _held(made: Any, part: Part, exact: Exact) -> Callable[[int, int], Tensor]:
    """The rows of a place that stores the site's rows as columns: of the whole matrix, which is held for them."""
    rows, cols = made.shape
    matrix = torch.empty(rows, cols, dtype=exact.dtype, device=exact.at)
    for start, stop in spans((rows, cols)):
        matrix[start:stop] = made.rows(start, stop)
    turned = ops.taken(matrix, part).T
    return lambda start, stop: turned[start:stop]
