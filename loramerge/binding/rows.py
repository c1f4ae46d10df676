"""Rows of views: selecting some, joining several views, and how parts lie in a fused weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loramerge.adapters.views import Part, Place, Take, View

Runs = tuple[Take, ...]
"""Rows in their order, as runs."""


def arranged(heights: Sequence[int], groups: int) -> list[Runs]:
    """Which rows of a fused weight each part has, where every one of `groups` groups holds an equal share of each part.

    `groups = 1`: one part after the other; the number of heads: q, k, v of each head in turn; the height of the
    parts: rows that alternate.
    """
    chunks = [height // groups for height in heights]
    stride = sum(chunks)
    runs: list[Runs] = []
    offset = 0
    for chunk in chunks:
        if not chunk:
            runs.append(())
        elif chunk == 1:
            runs.append((Take(offset, offset + (groups - 1) * stride + 1, stride),))
        else:
            runs.append(tuple(Take(offset + g * stride, offset + g * stride + chunk) for g in range(groups)))
        offset += chunk
    return runs


def halves_of_pairs(rows: int, heads: int, first: int = 0) -> Runs:
    """Rows of a rotary projection stored as pairs (2j, 2j + 1), in the order of two halves of each head.

    `view(heads, hd / 2, 2).transpose(1, 2)` of the stored rows (transformers 5.23, core_model_loading.py
    PermuteForRope).
    """
    size = rows // heads
    starts = [first + h * size for h in range(heads)]
    return tuple(Take(start + half, start + size, 2) for start in starts for half in (0, 1))


def select(view: View, runs: Runs) -> View:
    """The view of these rows of a view, in this order."""
    parts: list[Part] = []
    at = 0
    for run in runs:
        for part in view.parts:
            parts += _cut(part, run, at)
        at += len(run)
    return View((at, *view.shape[1:]), tuple(_merged(parts)))


def join(views: Sequence[View], rows: Sequence[Runs]) -> View:
    """One view of several: row i of `views[k]` is the i-th row of `rows[k]` of the result."""
    parts = [
        replace(part, take=tuple(_through(part.take, runs)))
        for view, runs in zip(views, rows, strict=True)
        for part in view.parts
    ]
    return View((sum(view.rows for view in views), *views[0].shape[1:]), tuple(parts))


def transposed(view: View) -> View:
    """The view of one stored matrix, seen as its transpose."""
    (part,) = view.parts
    rows, cols = view.shape
    return View((cols, rows), (Part(part.tensor, part.place, not part.flipped, (Take(0, cols),)),))


def _cut(part: Part, run: Take, at: int) -> Iterator[Part]:
    """What a part holds of the rows of a run; the run's first row is row `at` of the new view."""
    held = 0  # rows of the part before this take
    for take in part.take:
        hits = _common(take, run)
        for place_from, place_step, run_from, run_step, count in hits:
            for i, place, n in _pieces(part, held + place_from, place_step, count):
                first = at + run_from + i * run_step
                yield Part(part.tensor, place, part.flipped, (_take(first, n, run_step),))
        held += len(take)


def _common(take: Take, run: Take) -> list[tuple[int, int, int, int, int]]:
    """Rows in both: (index in `take`, its step, index in `run`, its step, how many) for runs of them."""
    if take.step == 1:
        low = max(0, -((run.start - take.start) // run.step))
        high = min(len(run), (take.stop - 1 - run.start) // run.step + 1)
        if low >= high:
            return []
        return [(run.start + low * run.step - take.start, run.step, low, 1, high - low)]
    rows = range(take.start, take.stop, take.step)
    return [(rows.index(row), 1, i, 1, 1) for i, row in enumerate(range(*run)) if row in rows]


def _pieces(part: Part, first: int, step: int, count: int) -> Iterator[tuple[int, Place, int]]:
    """Rows `first`, `first + step`, ... of a part as places: (index of its first row, place, rows)."""
    p = part.place
    if part.flipped:
        c0, stride = p.c0 + first * p.step, p.step * step
        yield 0, Place(p.begin, p.rows, p.cols, c0, c0 + (count - 1) * stride + 1, stride), count
    elif step == 1:
        yield 0, replace(p, begin=p.begin + first * p.cols, rows=count), count
    else:
        for i in range(count):
            yield i, replace(p, begin=p.begin + (first + i * step) * p.cols, rows=1), 1


def _take(first: int, count: int, step: int) -> Take:
    return Take(first, first + (count - 1) * step + 1, step)


def _merged(parts: list[Part]) -> list[Part]:
    """Joins parts whose places follow one another in the stored tensor: the rows of all lie in one place."""
    merged: list[Part] = []
    for part in sorted(parts, key=lambda p: (p.tensor, p.place.begin, p.place.c0)):
        last = merged[-1] if merged else None
        if last is not None and _follows(last, part):
            place = replace(last.place, rows=last.place.rows + part.place.rows)
            merged[-1] = Part(last.tensor, place, False, (*last.take, *part.take))
        else:
            merged.append(part)
    return merged


def _follows(a: Part, b: Part) -> bool:
    p, q = a.place, b.place
    same = (a.tensor, p.cols, p.c0, p.c1, p.step) == (b.tensor, q.cols, q.c0, q.c1, q.step)
    return same and not a.flipped and not b.flipped and q.begin == p.begin + p.rows * p.cols


def _through(takes: Runs, runs: Runs) -> Iterator[Take]:
    """Where rows of a part end up: row i becomes the i-th row of `runs`."""
    for take in takes:
        offset = 0
        for run in runs:
            low = max(0, -((take.start - offset) // take.step))
            high = min(len(take), (offset + len(run) - 1 - take.start) // take.step + 1)
            if low < high:
                first = run.start + (take.start + low * take.step - offset) * run.step
                yield _take(first, high - low, take.step * run.step)
            offset += len(run)
