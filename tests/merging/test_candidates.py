"""The undo codec: W bit for bit from M and the update, at the stated size, and nothing but W or an error."""

from __future__ import annotations

import itertools
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loramerge.adapters.operators import Add, AddProduct, Operator
from loramerge.adapters.views import Place
from loramerge.merging import candidates, filters, grids, guarded
from loramerge.merging.candidates import GUARDED, HEADER, decode, encode
from loramerge.merging.deltas import Delta, Deltas, Given
from loramerge.merging.differences import decode_xor, encode_xor
from loramerge.merging.digits import from_varints, pack, unpack, varints
from loramerge.merging.filters import Found, scale_of
from loramerge.merging.grids import GRIDS, Grid
from loramerge.merging.kernels import change_block, round_into

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, F16, F32]
INTEGERS = {BF16: torch.int16, F16: torch.int16, F32: torch.int32}


def bits(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.dtype])


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def rounded(W: Tensor, d: Tensor) -> Tensor:
    M = torch.empty_like(W)
    round_into(M, W.double() + d)
    return M


def escapes(coded: bytes) -> int:
    return int(HEADER.unpack_from(coded)[6])


def layer(
    dtype: torch.dtype, relative: float, rows: int, cols: int, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """W, M as a merge makes it, and d: rows of log-normal scale, 0.1 % outliers, rank 16 of that relative norm."""
    g = torch.Generator().manual_seed(1)
    W = torch.randn(rows, cols, generator=g) * 0.02 * torch.exp(0.3 * torch.randn(rows, 1, generator=g))
    W[torch.rand(rows, cols, generator=g) < 0.001] *= 10
    B, A = torch.randn(rows, 16, generator=g), torch.randn(16, cols, generator=g)
    B *= relative * W.norm() / (B @ A).norm()
    d = (B.double() @ A.double()).view(-1)
    W = W.to(dtype).view(-1)
    M = torch.empty_like(W)
    if exact:
        round_into(M, W.double() + d)
    else:
        add = AddProduct(B, A, Place(0, rows, cols, 0, cols))
        change_block(W, M, 0, cols, [add], torch.empty(1 << 18), False, False)
    return W, M, d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 30.0])
def test_gives_the_weights_back_from_any_size_of_update(dtype: torch.dtype, relative: float) -> None:
    W, M, d = layer(dtype, relative, 173, 291)
    coded = encode(W, M, d)
    assert same(decode(M, d, coded), W)
    assert same(decode(rounded(W, -d), -d, encode(W, rounded(W, -d), -d)), W)
    assert encode(W, M, d) == coded


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_one_element_and_of_none(dtype: torch.dtype) -> None:
    for n in (0, 1):
        W = torch.full((n,), 0.3).to(dtype)
        d = torch.full((n,), -0.29, dtype=torch.float64)
        assert same(decode(rounded(W, d), d, encode(W, rounded(W, d), d)), W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_exact_sum_needs_few_escapes(dtype: torch.dtype) -> None:
    """All of them are doubtful ones; of float32, whose numbers lie 2**-24 apart, more than of 16 bits."""
    W, M, d = layer(dtype, 0.01, 256, 256, exact=True)
    assert escapes(encode(W, M, d, slack=0)) <= (20 if dtype == F32 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_in_the_weights_and_in_the_merged_ones(dtype: torch.dtype) -> None:
    """Every pair of zeros, subnormals, ends of binades, infinities, NaNs with payloads, under several updates."""
    grid = GRIDS[dtype]
    one = 1 << grid.mantissa
    sizes = [0, 1, 2, 3, one // 2, one - 1, one, one + 1, 2 * one, 2 * one - 1, 30 * one, 30 * one + 1, grid.top - 2]
    sizes += [grid.top - 1, grid.top, grid.top + 1, grid.top + one // 2, grid.sign - 1]
    each = torch.tensor(sizes + [size - grid.sign for size in sizes], dtype=torch.int64).to(INTEGERS[dtype]).view(dtype)
    W, M = (x.reshape(-1) for x in torch.meshgrid(each, each, indexing="ij"))
    tiny = 2.0 ** (1 - grid.bias - grid.mantissa)
    for add in (0.0, -0.0, tiny / 2, -tiny / 2, tiny, 1.0, -1.5, 1e4, 1e300, 5e-324, float("inf"), float("nan")):
        d = torch.full((W.numel(),), add, dtype=torch.float64)
        assert same(decode(M, d, encode(W, M, d)), W), add
    d = M.double() - W.double()
    assert same(decode(M, d, encode(W, M, d)), W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_weights_and_updates(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    least = 2.0 ** (1 - GRIDS[dtype].bias - GRIDS[dtype].mantissa)
    W = (torch.randn(5000, generator=g).double() * 40 * least).to(dtype)
    d = torch.randn(5000, generator=g).double() * 3.3 * least
    M = rounded(W, d)
    assert same(decode(M, d, encode(W, M, d, slack=0)), W)
    assert escapes(encode(W, M, d, slack=0)) == int((bits(W) == bits(-torch.zeros(1, dtype=dtype))).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slack", [0, 24])
def test_exact_ties_survive_an_update_that_is_off_in_its_last_bits(dtype: torch.dtype, slack: int) -> None:
    """d is a small multiple of a quarter of W's unit in the last place: sums fall on rounding boundaries."""
    g = torch.Generator().manual_seed(3)
    W = torch.randn(20000, generator=g).to(dtype)
    unit = torch.ldexp(torch.ones_like(W.float()), torch.frexp(W.float())[1] - GRIDS[dtype].mantissa - 1).double()
    d = unit / 4 * torch.randint(-40, 41, W.shape, generator=g)
    M = rounded(W, d)
    coded = encode(W, M, d, slack)
    assert escapes(coded) == 0
    for off in (-1e-13, 0.0, 1e-13):
        assert same(decode(M, d * (1 + off), coded), W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [1e-3, 0.03, 1.0])
def test_an_update_that_is_off_in_its_last_bits_gives_the_same_weights(dtype: torch.dtype, relative: float) -> None:
    W, M, d = layer(dtype, relative, 200, 210)
    coded = encode(W, M, d)
    g = torch.Generator().manual_seed(4)
    for size in (1e-13, 1e-11):
        off = torch.rand(d.shape, generator=g, dtype=torch.float64) * 2 - 1
        assert same(decode(M, d * (1 + size * off), coded), W)
        assert same(decode(M, d * (1 + size * off.sign()), coded), W)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_weights_at_a_widened_end_are_escapes(dtype: torch.dtype) -> None:
    """Without the guard, an update that is off by 1e-11 would gain or lose a candidate here."""
    w, m = torch.tensor([0.3, 0.8]).to(dtype)
    above = torch.nextafter(m, torch.tensor(9.0, dtype=dtype))
    edge = (m.double() + above.double()) / 2 - w.double()  # w + edge is a tie
    d = (edge * (1 + 4 * 2.0**-36 + torch.linspace(-1e-10, 1e-10, 401, dtype=torch.float64))).clone()
    W, M = w.repeat(401), m.repeat(401)
    coded = encode(W, M, d, slack=0)
    assert escapes(coded) > 20
    for off in (-1e-11, 1e-11):
        assert same(decode(M, d * (1 + off), coded), W)


def test_updates_that_cancelled_may_be_off_by_last_bits_of_the_largest() -> None:
    g = torch.Generator().manual_seed(12)
    W = torch.randn(20000, generator=g) * 1e-7
    d = torch.randn(20000, generator=g).double() * 1e-7
    d[0] = 1.0
    M = rounded(W, d)
    coded = encode(W, M, d, slack=0)
    for off in (-(2.0**-45), 2.0**-45):
        assert same(decode(M, d + off, coded), W)


def test_several_adapters_in_another_order_of_summation() -> None:
    g = torch.Generator().manual_seed(5)
    W = (torch.randn(96, 80, generator=g) * 0.02).bfloat16()
    factors = [
        (torch.randn(96, r, generator=g).double() * 1e-3, torch.randn(r, 80, generator=g).double()) for r in (1, 8, 33)
    ]
    d = sum((B @ A for B, A in factors), torch.zeros(96, 80).double())
    other = torch.zeros(96, 80).double()
    for B, A in reversed(factors):
        for k in reversed(range(B.shape[1])):
            other += B[:, k, None] * A[k]
    assert not torch.equal(d, other)
    M = rounded(W, d)
    back = decode(M.view(-1), other.view(-1), encode(W.view(-1), M.view(-1), d.view(-1)))
    assert same(back, W.view(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_that_are_off_cost_escapes_and_nothing_else(dtype: torch.dtype) -> None:
    W, M, d = layer(dtype, 0.01, 64, 65)
    off = M.clone()
    bits(off)[::7] += 1
    off[::11] = 0.0
    coded = encode(W, off, d)
    assert escapes(coded) > M.numel() // 15
    assert same(decode(off, d, coded), W)


def test_pruned_weights_cost_about_a_bit_each() -> None:
    """Under the update, 0 is one of some 30000 candidates."""
    W, _, d = layer(BF16, 0.01, 128, 128)
    W[::2] = 0.0
    M = rounded(W, d)
    coded = encode(W, M, d)
    assert len(coded) < 1.1 * W.numel() / 2 / 8 + 0.003 * 2 * W.numel()
    assert same(decode(M, d, coded), W)


def test_does_not_depend_on_the_number_of_threads() -> None:
    W, M, d = layer(BF16, 0.03, 300, 301)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        coded = encode(W, M, d)
        torch.set_num_threads(4)
        assert encode(W, M, d) == coded
        assert same(decode(M, d, coded), W)
    finally:
        torch.set_num_threads(before)


class Numbers:
    """Every finite number of a 16 bit format, by key, as an exact int: its value times 2**1100."""

    def __init__(self, dtype: torch.dtype) -> None:
        grid = GRIDS[dtype]
        self.top = grid.top
        positive = torch.arange(grid.top, dtype=torch.int32).to(torch.int16).view(dtype).double().tolist()
        values = [exact(v) for v in positive]
        self.keys = list(range(1 - grid.top, grid.top))
        self.values = [-v for v in values[:0:-1]] + values
        self.beyond = 2 * values[-1] - values[-2]

    def __call__(self, key: int) -> int:
        if abs(key) == self.top:
            return self.beyond if key > 0 else -self.beyond
        return self.values[key + self.top - 1]

    def candidates(self, key: int, d: int) -> list[int]:
        """Keys of all w with round(w + d) = M, by trying every w. Ties go to the even key, as in IEEE 754."""
        low, high = self(key - 1) + self(key), self(key) + self(key + 1)  # twice the boundaries
        even = key % 2 == 0
        tried = [2 * (v + d) for v in self.values]
        return [k for k, t in zip(self.keys, tried, strict=True) if low < t < high or (even and t in (low, high))]

    def round(self, value: int) -> int:
        at = bisect_left(self.values, value)
        near = [k for k in (at - 1, at) if 0 <= k < len(self.values)]
        return min((abs(self.values[k] - value), self.keys[k] % 2, self.keys[k]) for k in near)[2]


def exact(value: float) -> int:
    scaled = Fraction(value) * 2**1100
    assert scaled.denominator == 1
    return int(scaled)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_candidates_are_all_numbers_that_the_update_rounds_to_the_merged_one(dtype: torch.dtype) -> None:
    """By exhaustion over the format, in exact arithmetic: no number is missing, and only exact ties come on top."""
    numbers = Numbers(dtype)
    grid = GRIDS[dtype]
    rng = np.random.default_rng(6)
    keys, updates, exact_ties = [], [], 0
    for i in range(120):
        key = int(rng.integers(1 - grid.top, grid.top))
        if i % 3 == 0:
            key = int(rng.integers(-3, 4)) + (int(rng.integers(0, 4)) << grid.mantissa)
        w = numbers(key)
        step = abs(numbers(min(key + 1, grid.top - 1)) - w) or abs(w - numbers(key - 1))
        if i % 2:
            d = step * int(rng.integers(-3000, 3001)) // 4  # many sums on rounding boundaries
        else:
            d = int(float(rng.normal()) * 2.0 ** float(rng.integers(2, 13)) * 2**40) * step >> 40
        update = float(Fraction(d, 2**1100))
        merged = numbers.round(w + exact(update))
        merged += int(rng.integers(-1, 2)) if i % 4 == 1 else 0  # off by one: no numbers, or odd ones with ties
        keys.append(max(1 - grid.top, min(merged, grid.top - 1)))
        updates.append(update)
    M = torch.tensor([k if k >= 0 else -grid.sign - k for k in keys]).to(torch.int16).view(dtype)
    many = 0
    for i, (key, update) in enumerate(zip(keys, updates, strict=True)):
        truth = numbers.candidates(key, exact(update))
        given = Given(torch.tensor([update], dtype=torch.float64))
        W = torch.empty(1, dtype=dtype)
        found = find(M[i : i + 1], given, grid, scale_of(given.largest), W)
        if found.places.size:
            mine = list(range(int(found.first[0]), int(found.first[0] + found.counts[0])))
            many += len(mine) > 1
        else:
            mine = [int(grids.keys(bits(W).numpy(), grid)[0])]
            if not truth:
                continue
        assert set(truth) <= set(mine), i
        for extra in sorted(set(mine) - set(truth)):
            twice = 2 * (numbers(extra) + exact(update))
            assert twice in (numbers(key - 1) + numbers(key), numbers(key) + numbers(key + 1)), i
            exact_ties += 1
    assert many >= 20
    assert exact_ties >= 10


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounds_down_to_the_format_over_its_whole_range(dtype: torch.dtype) -> None:
    numbers, grid = Numbers(dtype), GRIDS[dtype]
    rng = np.random.default_rng(10)
    least = 2.0 ** (1 - grid.bias - grid.mantissa)
    x = np.concatenate(
        (
            rng.normal(size=2000) * 2.0 ** rng.integers(-grid.bias - 20, grid.bias + 3, 2000),
            [least * k / 4 for k in range(-70, 71)],
            [sign * torch.finfo(dtype).max * (1 + e) for sign in (1, -1) for e in (-1e-9, 0, 1e-9, 9)],
            grids.values(rng.integers(-(2**15), 2**15, 2000).astype(np.int16) & np.int16(~0x400), grid),
            [0.0, -0.0, 5e-324, -5e-324, 1e308, -1e308],
        )
    )
    x = x[np.isfinite(x)]
    with np.errstate(all="ignore"):
        keys = grids.floor_keys(x, grid).tolist()
    for value, key in zip(x.tolist(), keys, strict=True):
        below = bisect_right(numbers.values, exact(value)) - 1
        assert key == (numbers.keys[below] if below >= 0 else -grid.top), value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-1074, -20, 0, 10, 200])
def test_the_fast_path_finds_what_the_slow_one_does(
    dtype: torch.dtype, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all magnitudes of M and d and of the largest d, where M is a rounded sum and where it is not."""
    grid = GRIDS[dtype]
    rng = np.random.default_rng(11)
    n = 60000
    W = torch.from_numpy(rng.normal(size=n) * 2.0 ** rng.integers(-grid.bias - 5, grid.bias - 4, n)).to(dtype)
    d = W.double() * torch.from_numpy(rng.normal(size=n) * 2.0 ** rng.integers(-12, 4, n))
    d[::17] = torch.from_numpy(rng.integers(-9, 9, d[::17].shape) / 4) * 2.0 ** (1 - grid.bias - grid.mantissa)
    M = rounded(W, d)
    bits(M)[::5] += 1
    M[torch.isnan(M)] = 0.0

    def look() -> tuple[Found, np.ndarray]:
        """What is found, and for each element the only candidate, or any number."""
        W = torch.empty(n, dtype=dtype)
        found = find(M, Given(d), grid, scale, W)
        out = W.view(INTEGERS[dtype]).numpy()
        out[found.places] = grids.bits_of(found.first, grid)
        return found, out

    fast, only = look()
    without_fast_path(monkeypatch)
    slow, only_slow = look()
    assert slow.places.size == n
    assert fast.places.size < 0.8 * n or scale > -1074
    for column in ("places", "first", "counts"):
        assert np.array_equal(getattr(fast, column)[fast.counts > 1], getattr(slow, column)[slow.counts > 1])
    assert np.array_equal(only[slow.counts == 1], only_slow[slow.counts == 1])


def find(M: Tensor, d: Delta, grid: Grid, scale: int, W: Tensor) -> Found:
    """All that is found, in one."""
    parts = list(candidates._find(M, d, grid, 0, scale, GUARDED, nearest=W))
    return Found(*map(np.concatenate, zip(*parts, strict=True)))


def without_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(x: Any, *rest: object) -> np.ndarray:
        return np.ones(len(x), np.bool_)

    monkeypatch.setattr(guarded, "not_alone", nothing)
    monkeypatch.setattr(guarded, "_not_alone32", nothing)


class Changing:
    """An update whose operators are at hand."""

    def __init__(self, *operators: Operator) -> None:
        self.operators = operators

    def operator(self, read: object, weights: object) -> Operator:
        """One that does what all do, which is only a sum where there is one."""
        (operator,) = self.operators
        return operator


def delta(operators: Sequence[Operator], first: int, count: int, cols: int) -> Delta:
    """The update of a block, as a merge records it."""
    updates: Any = tuple(Changing(operator) for operator in operators)
    return Deltas([]).of(updates, first, count, cols)


def summed(operators: Sequence[Operator], first: int, count: int) -> Tensor:
    d = torch.zeros(count, dtype=torch.float64)
    for operator in operators:
        operator.apply(d, first, d)
    return d


ROWS, COLS = 96, 260


def factors(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """L and R in float64, some of them hard for float32."""
    g = torch.Generator().manual_seed(seed)
    r = {"one": 1, "many": 300}.get(kind, 16)
    L, R = torch.randn(ROWS, r, generator=g).double() * 1e-4, torch.randn(r, COLS, generator=g).double()
    if kind == "outliers":
        L[::7] *= 100
        R[:, ::31] *= 100
    elif kind == "cancelling":  # the sum is 1e-7 of its terms
        L[:, 8:], R[8:] = L[:, :8] * 1e3, -R[:8] * (1 + 1e-7)
        L[:, :8] *= 1e3
    elif kind == "zeros":
        L[::3], R[:, 5:90] = 0, 0
    elif kind == "tiny":
        L *= 1e-35
    elif kind == "huge":
        L *= 1e36
    elif kind == "too small":
        L *= 1e-42
    elif kind == "too large":
        L *= 1e45
    elif kind == "bare bits":  # exact in float32: sums fall on rounding boundaries
        L = torch.randint(-2, 3, L.shape, generator=g).double() * 2.0**-16
        R = torch.randint(-2, 3, R.shape, generator=g).double()
    return L, R


KINDS = [
    "plain",
    "one",
    "many",
    "outliers",
    "cancelling",
    "zeros",
    "tiny",
    "huge",
    "too small",
    "too large",
    "bare bits",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_float32_update_the_code_is_that_of_the_float64_one(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, and that of a coder without a fast path; and each gives the weights back from the others'."""
    L, R = factors(kind)
    add: list[Operator] = [AddProduct(L, R, Place(0, ROWS, COLS, 0, COLS))]
    n = ROWS * COLS
    d = summed(add, 0, n)
    g = torch.Generator().manual_seed(1)
    size = float(d.abs().max())
    for relative, off in itertools.product((3e-3, 0.3, 30.0), (False, True)):
        W = (torch.randn(n, generator=g).double() * size / relative).to(dtype)
        W[::50] = 0.0
        W[1::99] = -0.0
        M = rounded(W, d)
        if off:  # numbers that no weight gives: whether those are escapes may differ
            bits(M)[::3] += torch.randint(-1, 2, M[::3].shape, generator=g, dtype=INTEGERS[dtype])
        M[~torch.isfinite(M)] = 0.0
        update = delta(add, 0, n, COLS)
        assert (update.error > 0) == (kind != "too large")
        codes = [encode(W, M, update), encode(W, M, update.double()), encode(W, M, d)]
        assert off or codes[0] == codes[1]
        with monkeypatch.context() as patched:
            without_fast_path(patched)
            codes += [encode(W, M, update), encode(W, M, update.double())]
            assert codes[3] == codes[4]
            assert off or codes[0] == codes[3]
            for coded in codes:
                assert same(decode(M, update, coded), W)
        for coded in codes:
            assert same(decode(M, update, coded), W)
            assert same(decode(M, update.double(), coded), W)
            assert same(decode(M, d, coded), W)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 7])
def test_a_float32_update_is_off_by_no_more_than_it_says(kind: str, first: int) -> None:
    """And float64's bound holds for the largest."""
    (L, R), (L2, R2) = factors(kind), factors("plain", 1)
    operators: list[Operator] = [
        AddProduct(L, R, Place(0, ROWS, COLS, 0, COLS)),
        AddProduct(L2[:40], R2[:, :50], Place(20 * COLS, 40, COLS, 3, 103, 2)),
        Add(torch.linspace(-1e-4, 1e-4, ROWS * COLS, dtype=torch.float64)),
    ]
    n = (ROWS - 7) * COLS
    update, truth = delta(operators, first * COLS, n, COLS), summed(operators, first * COLS, n).numpy()
    assert update.size == n
    if kind == "too large":
        assert update.error == 0
    for size in (0.0, 1e-5, 0.02, 3.0):
        M = (torch.randn(n, generator=torch.Generator().manual_seed(2)) * size).bfloat16()
        m = M.double().numpy()
        with np.errstate(over="ignore"):
            x = np.concatenate([x.astype(np.float64) for _, x in update.back(M)])
        if update.error:
            most = update.relative * np.abs(m) + update.error
        else:  # float32's own rounding of d and of the difference, and its range
            most = np.where(np.abs(truth) < 1e38, 1e-6 * (np.abs(m) + np.abs(truth)), np.inf)
        with np.errstate(invalid="ignore"):
            assert not (np.abs(x - (m - truth)) > most).any()
    doubled = np.concatenate([d.copy() for _, d in update.double().chunks()])
    guard = update.largest * 2.0**-45
    assert np.abs(doubled - truth).max() <= guard
    index = np.arange(0, n, 3)
    assert np.abs(update.exact(index) - truth[index]).max() <= guard
    assert np.abs(truth).max() <= update.largest


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_float32_product_that_is_not_one_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices multiply fewer bits, or are told to."""
    L, R = factors("plain")
    add: list[Operator] = [AddProduct(L, R, Place(0, ROWS, COLS, 0, COLS))]
    n = ROWS * COLS
    W = (torch.randn(n, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    M = rounded(W, summed(add, 0, n))
    coded = encode(W, M, delta(add, 0, n, COLS))
    right, rough = AddProduct.apply, []

    def reduced(self: AddProduct, block: Tensor, first: int, original: Tensor) -> None:
        if self.L.dtype == torch.float32:
            rough.append(1)
            self = AddProduct(self.L.bfloat16().float(), self.R.bfloat16().float(), self.place)
        right(self, block, first, original)

    monkeypatch.setattr(AddProduct, "apply", reduced)
    assert encode(W, M, delta(add, 0, n, COLS)) == coded
    assert same(decode(M, delta(add, 0, n, COLS), coded), W)
    assert len(rough) == 2


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.03, 0.099, 0.3, 1.0])
@pytest.mark.parametrize("n", [0, 5, 8, 4099])
def test_finds_flags(share: float, n: int) -> None:
    flags = np.random.default_rng(n).random(n) < share
    assert np.array_equal(filters.where(flags), np.flatnonzero(flags))


@pytest.mark.parametrize(("relative", "percent"), [(1e-3, 0.05), (1e-2, 0.25), (0.03, 0.6), (0.1, 1.5)])
def test_size_of_the_undo_data_of_a_bfloat16_layer(relative: float, percent: float) -> None:
    W, M, d = layer(BF16, relative, 512, 1024)
    coded = encode(W, M, d)
    assert same(decode(M, d, coded), W)
    assert len(coded) / (2 * W.numel()) * 100 <= percent


@pytest.mark.parametrize(
    ("dtype", "exact", "percent"), [(F16, False, 0.25), (F32, False, 1.2), (F32, True, 1.2), (F32, None, 0.2)]
)
def test_size_of_the_undo_data_of_other_layers(dtype: torch.dtype, exact: bool | None, percent: float) -> None:
    """Float32 with a float32 update costs what its error leaves open; without slack and exact, as little as others."""
    W, M, d = layer(dtype, 0.01, 512, 1024, exact is not False)
    coded = encode(W, M, d, 0 if exact is None else None)
    assert len(coded) / (W.element_size() * W.numel()) * 100 <= percent


def test_a_checksum_finds_every_truncation_and_every_flipped_bit() -> None:
    W, M, d = layer(BF16, 0.03, 20, 30)
    W[3] = -0.0
    coded = encode(W, M, d)
    for end in range(len(coded)):
        with pytest.raises(ValueError):
            decode(M, d, coded[:end])
    for at in range(8 * len(coded)):
        with pytest.raises(ValueError):
            decode(M, d, flipped(coded, at))
    with pytest.raises(ValueError):
        decode(M, d, coded + b"\0")


def flipped(coded: bytes, at: int) -> bytes:
    changed = bytearray(coded)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


@pytest.mark.parametrize("relative", [0.03, 1.0])
def test_forged_undo_data_raises_or_gives_as_many_weights(relative: float) -> None:
    """With a checksum that fits: no other error, no other size."""
    W, M, d = layer(BF16, relative, 12, 13)
    W[3], W[77], M[150] = -0.0, float("nan"), 5.0
    body = encode(W, M, d)[:-4]
    outcomes = {"raised": 0, "other": 0}
    forged = [flipped(body, at) for at in range(8 * len(body))] + [body[:end] for end in range(len(body))]
    forged += [body[:i] + b"\xff" * 4 + body[i + 4 :] for i in range(len(body) - 4)]
    for coded in forged:
        try:
            back = decode(M, d, coded + struct.pack("<I", zlib.crc32(coded)))
        except ValueError:
            outcomes["raised"] += 1
        else:
            assert back.shape == W.shape
            outcomes["other"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_undo_data_of_another_update_or_merged_tensor_is_refused(dtype: torch.dtype) -> None:
    W, M, d = layer(dtype, 0.03, 64, 64)
    coded = encode(W, M, d)
    with pytest.raises(ValueError, match="counts"):
        decode(M, d * 1.01, coded)
    with pytest.raises(ValueError, match="counts"):
        decode(M.flip(0), d, coded)
    with pytest.raises(ValueError, match="elements"):
        decode(M[1:], d[1:], coded)
    with pytest.raises(ValueError, match="float64"):
        decode(M, d.float(), coded)
    with pytest.raises(ValueError, match="not that of"):
        decode(M.to(F16 if dtype != F16 else BF16), d, coded)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    W, M, d = layer(BF16, 0.03, 4, 4)
    with pytest.raises(ValueError):
        encode(W, M.float(), d)
    with pytest.raises(ValueError):
        encode(W, M[1:], d[1:])
    with pytest.raises(ValueError):
        encode(W.double(), M.double(), d)
    with pytest.raises(ValueError):
        encode(W, M, d, slack=61)
    with pytest.raises(ValueError):
        encode_xor(W, M.float())


@given(st.lists(st.tuples(st.integers(2, 2**32 - 1), st.integers(0)), max_size=40), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_ranks_come_back(pairs: list[tuple[int, int]], times: int) -> None:
    counts = np.array([c for c, _ in pairs] * times, np.int64)
    digits = np.array([x % c for c, x in pairs] * times, np.int64)
    assert np.array_equal(unpack(pack(digits, counts), counts), digits)


@pytest.mark.parametrize("base", [2, 3, 5, 6, 7, 11, 31, 32, 1 << 15, 1 << 32])
def test_ranks_take_little_more_than_their_information(base: int) -> None:
    counts = np.full(20000, base)
    digits = np.random.default_rng(7).integers(0, base, 20000)
    coded = pack(digits, counts)
    assert np.array_equal(unpack(coded, counts), digits)
    assert len(coded) <= (1.035 if base <= 32 else 1.07) * 20000 * np.log2(base) / 8 + 8


@given(st.lists(st.integers(0, 2**35 - 1), max_size=30))
@settings(max_examples=100, deadline=None)
def test_varints_come_back(values: list[int]) -> None:
    coded = varints(np.array(values, np.int64))
    assert from_varints(coded, len(values)).tolist() == values


ALL_DTYPES = [*DTYPES, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n", [0, 1, 1001])
def test_differences_give_any_weights_back(dtype: torch.dtype, n: int) -> None:
    """Of any bits: NaNs, both zeros and the ends of the integers among them."""
    g = torch.Generator().manual_seed(8)
    size = torch.empty(0, dtype=dtype).element_size()
    most = 2 if dtype == torch.bool else 256
    raw = [torch.randint(0, most, (n * size,), generator=g, dtype=torch.uint8) for _ in range(2)]
    W, M = (x.view(dtype) for x in raw)
    back = decode_xor(M, encode_xor(W, M))
    assert back.dtype == dtype
    assert back.shape == W.shape
    assert n == 0 or torch.equal(back.view(torch.uint8), raw[0])


def test_differences_after_a_small_change_are_small() -> None:
    """Scaled rows (IA3), and rows scaled to a magnitude after a rank 16 update (DoRA), both of 1 %."""
    W, _, d = layer(BF16, 0.01, 512, 512)
    rows = 1 + 0.01 * torch.randn(512, 1, generator=torch.Generator().manual_seed(9))
    w = W.view(512, 512).float()
    V = w + d.view(512, 512).float()
    dora = V / V.norm(dim=1, keepdim=True) * w.norm(dim=1, keepdim=True) * rows
    for changed, percent in ((w * rows, 17), (dora, 36)):
        M = changed.bfloat16().view(-1)
        coded = encode_xor(W, M)
        assert same(decode_xor(M, coded), W)
        assert len(coded) / (2 * W.numel()) * 100 <= percent


def test_damaged_differences_raise_or_give_as_many_weights() -> None:
    W, M, _ = layer(F32, 0.03, 9, 7)
    coded = encode_xor(W, M)
    for at in range(8 * len(coded)):
        with pytest.raises(ValueError):
            decode_xor(M, flipped(coded, at))
    for end in range(len(coded)):
        with pytest.raises(ValueError):
            decode_xor(M, coded[:end])
    raised = 0
    body = coded[:-4]
    for forged in [flipped(body, at) for at in range(8 * len(body))] + [body[:end] for end in range(len(body))]:
        try:
            assert decode_xor(M, forged + struct.pack("<I", zlib.crc32(forged))).shape == W.shape
        except ValueError:
            raised += 1
    assert raised > 8 * len(body) // 2
    with pytest.raises(ValueError):
        decode_xor(M[1:], coded)
    with pytest.raises(ValueError):
        decode_xor(M.bfloat16(), coded)
