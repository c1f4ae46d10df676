"""Updates in fixed-point numbers: the same bits in any order of summation, and weights that come back with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loramerge.adapters.operators import AddProduct, Operator
from loramerge.adapters.updates import LowRank, Pick
from loramerge.adapters.views import Part, Place, Take
from loramerge.merging import candidates, deltas
from loramerge.merging.candidates import FIXED, GUARDED, HEADER, decode, encode
from loramerge.merging.deltas import Delta, Deltas
from loramerge.merging.filters import Left
from loramerge.merging.fixed import fixed
from loramerge.merging.grids import grid_of
from loramerge.merging.grids import keys as keys_of
from loramerge.merging.kernels import change_block, round_into

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROWS, COLS = 61, 331


def place(rows: int = ROWS, cols: int = COLS, begin: int = 0) -> Place:
    return Place(begin, rows, cols, 0, cols)


def factors(kind: str = "plain", rank: int = 16, rows: int = ROWS, cols: int = COLS) -> tuple[Tensor, Tensor]:
    """L (rows, r) and R (r, cols) in float64."""
    g = torch.Generator().manual_seed(rank)
    L, R = torch.randn(rows, rank, generator=g).double() * 2e-4, torch.randn(rank, cols, generator=g).double()
    if kind == "outliers":
        L[::7] *= 30
        R[:, ::31] *= 30
    elif kind == "zeros":
        L[::3], R[:, 5:90] = 0, 0
    elif kind == "cancelling" and rank > 1:
        half = rank // 2
        L[:, half : 2 * half], R[half : 2 * half] = L[:, :half] * 1e3, -R[:half] * (1 + 1e-7)
        L[:, :half] *= 1e3
    elif kind == "tiny":
        L *= 1e-36
    elif kind == "ties":
        L = torch.randint(-2, 3, L.shape, generator=g).double() * 2.0**-16
        R = torch.randint(-2, 3, R.shape, generator=g).double()
    return L, R


KINDS = ["plain", "outliers", "zeros", "cancelling", "tiny", "ties"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 17, 130])
def test_the_sum_is_exact_and_so_the_same_in_any_order(kind: str, rank: int) -> None:
    """Against sums of fractions, and products added one by one from the last to the first."""
    L, R = factors(kind, rank, 9, 23)
    (made,) = fixed([AddProduct(L, R, place(9, 23))]) or [None]
    assert made is not None
    d = made.L @ made.R
    backwards = torch.zeros_like(d)
    for k in reversed(range(rank)):
        backwards += made.L[:, k, None] * made.R[k]
    assert torch.equal(d, backwards)
    for i, j in ((0, 0), (3, 11), (8, 22)):
        terms = zip(made.L[i].tolist(), made.R[:, j].tolist(), strict=True)
        assert Fraction(d[i, j].item()) == sum(Fraction(a) * Fraction(b) for a, b in terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 16, 200])
def test_the_sum_is_near_the_update(kind: str, rank: int) -> None:
    """As near as the bits that are left say, of the largest number of the row and that of the column."""
    L, R = factors(kind, rank)
    (made,) = fixed([AddProduct(L, R, place())]) or [None]
    assert made is not None
    bits = (53 - math.ceil(math.log2(rank))) // 2
    most = 2 * rank * 2.0**-bits * L.abs().amax(dim=1, keepdim=True) * R.abs().amax(dim=0)
    assert ((made.L @ made.R - L @ R).abs() <= most).all()


def test_adapters_of_one_place_are_one_product() -> None:
    (L, R), (L2, R2) = factors(), factors("outliers", 5)
    made = fixed([AddProduct(L, R, place()), AddProduct(L2, R2, place())])
    assert made is not None and len(made) == 1
    assert made[0].L.shape == (ROWS, 21)
    assert torch.allclose(made[0].L @ made[0].R, L @ R + L2 @ R2, rtol=1e-3, atol=1e-7)


def test_what_cannot_be_in_fixed_point_numbers() -> None:
    L, R = factors()
    overlapping = [AddProduct(L, R, place()), AddProduct(L[:5], R[:, :9], Place(COLS, 5, COLS, 3, 12))]
    assert fixed(overlapping) is None
    apart = [
        AddProduct(L[:5], R[:, :9], Place(0, 5, COLS, 3, 12)),
        AddProduct(L[:5], R[:, :9], Place(0, 5, COLS, 12, 21)),
    ]
    assert fixed(apart) is not None
    assert fixed([AddProduct(L * 1e200, R, place())]) is None
    assert fixed([AddProduct(L * 1e-200, R, place())]) is None
    assert fixed([AddProduct(L * math.inf, R, place())]) is None
    assert fixed([AddProduct(torch.ones(2, 1025).double(), torch.ones(1025, 3).double(), place(2, 3))]) is None


def low_rank(number: int, at: Place) -> LowRank:
    part = Part("w", at, False, (Take(0, at.rows, 1),))
    return LowRank(number, "m", f"A{number}", f"B{number}", 1.0, 0, Pick(), part)


def update(
    operators: list[tuple[Tensor, Tensor, Place]],
    monkeypatch: pytest.MonkeyPatch,
    first: int = 0,
    count: int = ROWS * COLS,
) -> Delta:
    """The update of a block, as a merge records it: of low-rank updates with these factors."""
    held: dict[str, Tensor] = {}
    for i, (L, R, _) in enumerate(operators):
        held |= {f"A{i}": R, f"B{i}": L}
    made = Deltas([])
    monkeypatch.setattr(made, "_factors", SimpleNamespace(read=lambda adapter, key: held[key]))
    return made.of(tuple(low_rank(i, at) for i, (_, _, at) in enumerate(operators)), first, count, COLS)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def way(coded: bytes) -> int:
    return int(HEADER.unpack_from(coded)[3])


@pytest.fixture(params=["as it is", "small chunks", "another order"])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the side that decodes another one than that which encoded."""

    def change() -> None:
        if request.param == "small chunks":
            monkeypatch.setattr(deltas, "FIXED_CHUNK", 700)
        elif request.param == "another order":

            def backwards(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
                out.zero_()
                for k in reversed(range(a.shape[1])):
                    out += a[:, k, None] * b[k]
                return out

            monkeypatch.setattr(torch, "mm", backwards)

    yield change


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_elsewhere(
    dtype: torch.dtype, kind: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of merged weights as a merge makes them, and of others; zeros, infinities and NaNs among them."""
    L, R = factors(kind)
    d = (L @ R).view(-1)
    g = torch.Generator().manual_seed(1)
    cases = []
    for relative in (3e-3, 0.3, 30.0):
        W = (torch.randn(d.numel(), generator=g).double() * float(d.abs().max()) / relative).to(dtype)
        W[::50], W[1::99] = 0.0, -0.0
        M = torch.empty_like(W)
        change_block(W, M, 0, COLS, [AddProduct(L.float(), R.float(), place())], torch.empty(1 << 15), False, False)
        odd = M.clone()
        odd.view(torch.int16)[::3] += torch.randint(-1, 2, odd[::3].shape, generator=g, dtype=torch.int16)
        odd[5], odd[77], W[78] = math.nan, math.inf, math.nan
        for merged in (M, odd):
            coded = encode(W, merged, update([(L, R, place())], monkeypatch))
            assert way(coded) == FIXED
            cases.append((W, merged, coded))
    elsewhere()
    for W, merged, coded in cases:
        assert same(decode(merged, update([(L, R, place())], monkeypatch), coded), W)
        out = torch.empty_like(W)
        assert decode(merged, update([(L, R, place())], monkeypatch), coded, out) is out
        assert same(out, W)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_several_places_and_a_block_from_the_middle(
    dtype: torch.dtype, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (L, R), (L2, R2), (L3, R3) = factors(), factors("outliers", 5), factors("plain", 3)
    whole = place(ROWS - 20, COLS, 0)
    rest = Place((ROWS - 20) * COLS, 20, COLS, 3, COLS, 2)
    width = rest.width
    operators = [
        (L[: ROWS - 20], R, whole),
        (L2[:20], R2[:, :width], rest),
        (L3[: ROWS - 20], R3, whole),
    ]
    d = torch.zeros(ROWS * COLS, dtype=torch.float64)
    for left, right, at in operators:
        AddProduct(left, right, at).apply(d, 0, d)
    W = (torch.randn(ROWS * COLS, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    M = torch.empty_like(W)
    round_into(M, W.double() + d)
    block = slice(10 * COLS, (ROWS - 7) * COLS)

    def here() -> Delta:
        return update(operators, monkeypatch, block.start, block.stop - block.start)

    coded = encode(W[block], M[block], here())
    assert way(coded) == FIXED
    elsewhere()
    assert same(decode(M[block], here(), coded), W[block])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_candidates_are_the_numbers_between_the_boundaries(dtype: torch.dtype) -> None:
    """By looking at every number of the format, in exact arithmetic on the rounded ends."""
    grid = grid_of(dtype)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every) & (every.view(torch.int16) != grid.negative_zero)].double().numpy()
    every = np.unique(every)
    rng = np.random.default_rng(5)
    m = torch.from_numpy(rng.normal(size=300) * 2.0 ** rng.integers(-9, 3, 300)).to(dtype)
    m[::7] = torch.from_numpy(2.0 ** rng.integers(-6, 2, m[::7].shape)).to(dtype)
    x = (m.double().numpy() * (1 + rng.normal(size=300) * 2.0 ** rng.integers(-8, 3, 300))).astype(np.float32)
    bits = m.view(torch.int16).numpy()
    part = Left(np.arange(300), bits, bits[:0], x)
    found = candidates._by_fixed(part, grid)
    steps = torch.nextafter(m, torch.full_like(m, math.inf)), torch.nextafter(m, torch.full_like(m, -math.inf))
    above, below = ((step.double() - m.double()).abs().numpy() / 2 for step in steps)
    low = (x - below.astype(np.float32)).astype(np.float64)
    high = (x + above.astype(np.float32)).astype(np.float64)
    many = 0
    for i in range(300):
        inside = every[(every >= low[i]) & (every <= high[i])]
        assert found.counts[i] == len(inside)
        if len(inside):
            keys = keys_of(torch.tensor(inside[:1]).to(dtype).view(torch.int16).numpy(), grid)
            assert found.first[i] == keys[0]
            many += len(inside) > 1
    assert many > 25


@pytest.mark.parametrize(("relative", "percent"), [(1e-3, 0.05), (1e-2, 0.25), (0.03, 0.6), (0.1, 1.5)])
def test_size_of_the_undo_data_of_a_bfloat16_layer(
    relative: float, percent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 400
    g = torch.Generator().manual_seed(1)
    W = torch.randn(rows, COLS, generator=g) * 0.02 * torch.exp(0.3 * torch.randn(rows, 1, generator=g))
    L, R = factors("plain", 16, rows)
    L *= relative * float(W.norm()) / float((L @ R).norm())
    add: list[Operator] = [AddProduct(L.float(), R.float(), place(rows))]
    W = W.to(BF16).view(-1)
    M = torch.empty_like(W)
    change_block(W, M, 0, COLS, add, torch.empty(1 << 16), False, False)
    d = update([(L, R, place(rows))], monkeypatch, 0, rows * COLS)
    coded = encode(W, M, d)
    assert same(decode(M, d, coded), W)
    assert len(coded) / (2 * W.numel()) * 100 <= percent
    assert HEADER.unpack_from(coded)[6] <= 100e-6 * W.numel()  # escapes


def test_float32_weights_and_other_updates_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    L, R = factors()
    W = torch.randn(ROWS * COLS, generator=torch.Generator().manual_seed(2))
    M = torch.empty_like(W)
    round_into(M, W.double() + (L @ R).view(-1))
    d = update([(L, R, place())], monkeypatch)
    coded = encode(W, M, d)
    assert way(coded) == GUARDED
    assert torch.equal(decode(M, d, coded), W)
    W, M = W.to(BF16), M.to(BF16)
    given = (L @ R).view(-1)
    assert way(encode(W, M, given)) == GUARDED
    with pytest.raises(ValueError, match="another sort"):
        decode(M, given, encode(W, M, d))


def test_another_update_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    L, R = factors()
    W = torch.randn(ROWS * COLS, generator=torch.Generator().manual_seed(2)).to(BF16) * 0.02
    M = torch.empty_like(W)
    round_into(M, W.double() + (L @ R).view(-1))
    coded = encode(W, M, update([(L, R, place())], monkeypatch))
    with pytest.raises(ValueError, match="counts"):
        decode(M, update([(L * 1.01, R, place())], monkeypatch), coded)
