"""Differences of two stored tensors in row blocks: compared byte for byte, subtracted in fp32, never held whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from loramerge.adapters import operators
from loramerge.adapters.views import View
from loramerge.converting.items import DTYPES, read_tensor
from loramerge.errors import InputError, UnsupportedError
from loramerge.extracting.pairing import Match
from loramerge.tensors.checkpoint import Located
from loramerge.tensors.dtypes import display
from loramerge.tensors.text import plural, quoted

FIRST_STEP, STEP = 1 << 16, 1 << 23
"""Bytes compared at once: most tensors that differ do so from the beginning."""

BLOCK = 1 << 20
"""Elements subtracted at once."""

NARROW = {torch.bfloat16, torch.float16}
"""Dtypes whose rounding is large enough to stand out in a difference."""


def rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: its first axis, and all others; a vector is one column."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def is_equal(match: Match) -> bool:
    """Whether both are the same bytes. False where shapes, dtypes or layouts differ: numbers decide then."""
    if match.tuned is None:
        return False
    a, b = match.base, match.tuned
    if (a.info.dtype, a.info.shape) != (b.info.dtype, b.info.shape):
        return False
    at, step = 0, FIRST_STEP
    while at < a.info.nbytes:
        length = min(step, a.info.nbytes - at)
        if a.file.source.read(a.info.begin + at, length) != b.file.source.read(b.info.begin + at, length):
            return False
        at, step = at + length, STEP
    return True


def dtype_of(located: Located, where: str) -> torch.dtype:
    """The dtype of a tensor that is to be subtracted.

    Raises:
        UnsupportedError: `extract.dtype` for codes, integers and narrow floats: they changed and are no weights.
    """
    dtype = DTYPES.get(located.info.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise UnsupportedError(
            "extract.dtype",
            f"{quoted(located.info.name)} is {display(located.info.dtype)} and changed: differences are taken of "
            "float64, float32, float16 and bfloat16",
            fix=f"dequantise the checkpoint first, or --exclude '{located.info.name}'",
            file=where,
            tensors=[located.info.name],
        )
    return dtype


def read_rows(located: Located, first: int, last: int, cols: int) -> Tensor:
    """Rows `first` to `last` of a tensor seen as a matrix of `cols` columns, in its own dtype."""
    dtype = DTYPES[located.info.dtype]
    held = torch.empty((last - first) * cols * dtype.itemsize, dtype=torch.uint8)
    if held.numel():
        located.file.source.read_into(located.info.begin + first * cols * dtype.itemsize, held.numpy().data)
    return held.view(dtype).view(last - first, cols)


def whole_value(match: Match, where: str) -> Tensor:
    """The value of a stored tensor of the base after training, in its own shape."""
    if match.tuned is not None:
        return read_tensor(match.tuned, where)
    return _gathered(match).reshape(match.shape)


def _gathered(match: Match) -> Tensor:
    """The tuned value (rows, cols) of a tensor that the fine-tune keeps in another layout."""
    assert match.view is not None
    return gathered(match.view, dict(match.parts))


def gathered(view: View, tensors: dict[str, Located]) -> Tensor:
    """A view's matrix, from the stored tensors that it lies in."""
    return operators.gather(view, {name: read_tensor(t, "").flatten() for name, t in tensors.items()})


@dataclass(frozen=True)
class Change:
    """`tuned - base` of one stored tensor as a matrix, (rows, cols), in row blocks of fp32 (see `krylov.Delta`)."""

    match: Match
    base_name: str
    tuned_name: str

    @property
    def matches(self) -> tuple[Match, ...]:
        return (self.match,)

    @property
    def shape(self) -> tuple[int, int]:
        return rows_and_cols(self.match.shape)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the base and of the fine-tune."""
        tuned = {dtype_of(t, self.tuned_name) for t in self.match.sources}
        dtype = tuned.pop()
        for other in tuned:
            dtype = torch.promote_types(dtype, other)
        return dtype_of(self.match.base, self.base_name), dtype

    def sides(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, rows of the base, rows of the fine-tune), in their own dtypes."""
        rows, cols = self.shape
        whole = _gathered(self.match) if self.match.tuned is None else None
        height = max(1, BLOCK // max(1, cols))
        for first in range(0, rows, height):
            last = min(rows, first + height)
            old = read_rows(self.match.base, first, last, cols)
            if whole is not None:
                yield first, old, whole[first:last]
            else:
                assert self.match.tuned is not None
                yield first, old, read_rows(self.match.tuned, first, last, cols)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first, old, new in self.sides():
            yield first, subtract(new, old)

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        """Every `step`th row of the base and of the fine-tune."""
        if self.match.tuned is None:
            return _sampled(self, step)
        rows, cols = self.shape
        old, new = (
            torch.cat([read_rows(side, row, row + 1, cols) for row in range(0, rows, step)])
            for side in (self.match.base, self.match.tuned)
        )
        return old, new

    def check_finite(self) -> None:
        """Says which side holds what is not finite.

        Raises:
            InputError: `extract.non-finite`.
        """
        for _, old, new in self.sides():
            for side, where in ((old, self.base_name), (new, self.tuned_name)):
                if count := int((~torch.isfinite(side)).sum()):
                    raise InputError(
                        "extract.non-finite",
                        f"{quoted(self.match.name)} holds {plural(count, 'value')} that are not finite numbers",
                        fix="the training diverged or the file is damaged: use an earlier save, or leave it out with "
                        f"--exclude '{self.match.name}'",
                        file=where,
                        tensors=[self.match.name],
                    )
        raise InputError(
            "extract.non-finite",
            f"{quoted(self.match.name)}: the difference does not fit into float32",
            fix=f"leave the tensor out with --exclude '{self.match.name}'",
            file=self.tuned_name,
            tensors=[self.match.name],
        )


@dataclass(frozen=True)
class ViewChange:
    """`tuned - base` of a module whose weight lies in parts of stored tensors, (rows, cols)."""

    view: View
    changes: tuple[Change, ...]

    @property
    def matches(self) -> tuple[Match, ...]:
        return tuple(change.match for change in self.changes)

    @property
    def shape(self) -> tuple[int, int]:
        return self.view.rows, self.view.cols

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        old, new = zip(*(change.dtypes for change in self.changes), strict=True)
        return _widest(old), _widest(new)

    def sides(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        old = gathered(self.view, {c.match.name: c.match.base for c in self.changes})
        new = operators.gather(self.view, {c.match.name: whole_value(c.match, "").flatten() for c in self.changes})
        height = max(1, BLOCK // max(1, self.view.cols))
        for first in range(0, self.view.rows, height):
            yield first, old[first : first + height], new[first : first + height]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first, old, new in self.sides():
            yield first, subtract(new, old)

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        return _sampled(self, step)

    def check_finite(self) -> None:
        for change in self.changes:
            change.check_finite()


def _widest(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


@dataclass(frozen=True)
class SliceChange:
    """One matrix of a stacked parameter (expert, rows, columns)."""

    change: Change
    index: int

    @property
    def matches(self) -> tuple[Match, ...]:
        return (self.change.match,)

    @property
    def shape(self) -> tuple[int, int]:
        _, rows, cols = self.change.match.shape
        return rows, cols

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.change.dtypes

    def sides(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        rows, cols = self.shape
        match = self.change.match
        assert match.tuned is not None
        height = max(1, BLOCK // max(1, cols))
        for first in range(0, rows, height):
            begin, end = self.index * rows + first, self.index * rows + min(rows, first + height)
            yield first, read_rows(match.base, begin, end, cols), read_rows(match.tuned, begin, end, cols)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first, old, new in self.sides():
            yield first, subtract(new, old)

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        return _sampled(self, step)

    def check_finite(self) -> None:
        self.change.check_finite()


AnyChange = Change | ViewChange | SliceChange


def _sampled(change: AnyChange, step: int) -> tuple[Tensor, Tensor]:
    """Every `step`th row of both sides, of all that is read."""
    kept = [(old[-first % step :: step], new[-first % step :: step]) for first, old, new in change.sides()]
    old, new = zip(*kept, strict=True)
    return torch.cat(old), torch.cat(new)


def subtract(new: Tensor, old: Tensor) -> Tensor:
    """new - old as fp32: exact for two halves but at extreme gaps, rounded once for doubles."""
    if torch.float64 in (new.dtype, old.dtype):
        return (new.double() - old.double()).float()
    return new.float() - old.float()


def norm_of(change: AnyChange) -> float:
    """Frobenius norm of a change, summed in fp64; NaN and infinity are an error naming the side."""
    total = 0.0
    for _, rows in change.blocks():
        total += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    if not math.isfinite(total):
        change.check_finite()
    return math.sqrt(total)
