"""Rank rules by their definitions, the byte budget against all choices, re-ranking against a dense SVD."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from algebra_dense import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from loramerge import algebra

spectra = st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0, 2.0, 3.5]), max_size=8).map(
    lambda x: torch.tensor(sorted(x, reverse=True), dtype=torch.float64)
)
shares = st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999])
many = settings(max_examples=100, deadline=None)


def smallest(values: list[float], wanted: float) -> int:
    return next(k for k in range(len(values) + 1) if sum(values[:k]) >= wanted)


@many
@given(spectra, shares)
def test_rules_of_shares_take_the_smallest_rank_that_reaches_them(s: torch.Tensor, share: float) -> None:
    squares, plain = [x * x for x in s.tolist()], s.tolist()
    assert algebra.energy(share)(s) == smallest(squares, share * sum(squares))
    assert algebra.frobenius(share)(s) == smallest(squares, share**2 * sum(squares))
    assert algebra.cumulative(share)(s) == smallest(plain, share * sum(plain))


@many
@given(spectra, st.sampled_from([0.0, 0.1, 0.2, 1.0, 9.0]), st.sampled_from([1.5, 2.0, 10.0, 1e12]))
def test_rules_of_sizes_count(s: torch.Tensor, size: float, ratio: float) -> None:
    assert algebra.threshold(size)(s) == sum(x > size for x in s.tolist())
    assert algebra.ratio(ratio)(s) == sum(x > s.tolist()[0] / ratio for x in s.tolist())
    assert algebra.fixed(3)(s) == min(3, len(s))


def test_all_of_the_energy_is_all_of_the_rank() -> None:
    s = torch.tensor([3.0, 2.0, 1.0])
    assert algebra.energy(1.0)(s) == algebra.cumulative(1.0)(s) == algebra.frobenius(1.0)(s) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: algebra.fixed(-1),
        lambda: algebra.energy(0.0),
        lambda: algebra.energy(1.1),
        lambda: algebra.energy(float("nan")),
        lambda: algebra.cumulative(-0.5),
        lambda: algebra.frobenius(2.0),
        lambda: algebra.frobenius(-0.5),
        lambda: algebra.ratio(1.0),
        lambda: algebra.threshold(-1.0),
        lambda: algebra.budget({}, {}, -1),
    ],
)
def test_settings_out_of_range_are_refused(call: object) -> None:
    with pytest.raises(ValueError):
        call()  # type: ignore[operator]


modules = st.lists(spectra, min_size=1, max_size=3)


def left_out(s: list[torch.Tensor], ranks: tuple[int, ...]) -> float:
    return sum(float(x[k:].square().sum()) for x, k in zip(s, ranks, strict=True))


@many
@given(modules, st.integers(0, 12))
def test_a_budget_over_modules_of_one_size_is_the_best_of_all_choices(s: list[torch.Tensor], rank: int) -> None:
    named = {f"m{i}": x for i, x in enumerate(s)}
    shapes = dict.fromkeys(named, (5, 3))
    got = algebra.budget(named, shapes, rank * 8 * 2 + 7, bytes_per_element=2)
    assert sum(got.values()) <= rank
    choices = [c for c in product(*(range(len(x) + 1) for x in s)) if sum(c) <= rank]
    best = min(left_out(s, c) for c in choices)
    assert left_out(s, tuple(got[n] for n in named)) == pytest.approx(best, abs=1e-12)


@many
@given(modules, st.integers(0, 400))
def test_a_budget_is_kept_and_used_up_and_near_the_best(s: list[torch.Tensor], limit: int) -> None:
    named = {f"m{i}": x for i, x in enumerate(s)}
    sizes = [8, 14, 5]
    shapes = {n: (sizes[i] - 2, 2) for i, n in enumerate(named)}
    got = algebra.budget(named, shapes, limit, bytes_per_element=4)
    spent = sum(got[n] * sum(shapes[n]) * 4 for n in named)
    assert spent <= limit
    refused = [
        float(x[got[n]]) ** 2
        for n, x in named.items()
        if got[n] < len(x) and x[got[n]] > 0 and spent + 4 * sum(shapes[n]) > limit
    ]
    more = [n for n, x in named.items() if got[n] < len(x) and x[got[n]] > 0]
    assert all(spent + 4 * sum(shapes[n]) > limit for n in more)
    choices = [
        c for c in product(*(range(len(x) + 1) for x in s)) if sum(k * sizes[i] * 4 for i, k in enumerate(c)) <= limit
    ]
    best = min(left_out(s, c) for c in choices)
    got_out = left_out(s, tuple(got[n] for n in named))
    assert best - 1e-12 <= got_out <= best + max(refused, default=0.0) + 1e-12


def test_a_budget_prefers_what_costs_less() -> None:
    s = {"wide": torch.tensor([2.0]), "small": torch.tensor([1.9])}
    assert algebra.budget(s, {"wide": (100, 100), "small": (5, 5)}, 200 * 4) == {"wide": 0, "small": 1}


@settings(max_examples=60, deadline=None)
@given(cases(most=1), st.integers(0, 6))
def test_resize_is_the_best_of_its_rank(case: Case, k: int) -> None:
    [update], [d] = case.folded(), case.dense()
    s = np.linalg.svd(d, compute_uv=False)
    got = algebra.resize(update, algebra.fixed(k))
    assert got.rank == min(k, np.linalg.matrix_rank(d, tol=1e-11 * case.size()))
    assert np.allclose(got.singular_values, s[: len(got.singular_values)], atol=1e-11 * case.size())
    wanted = np.sqrt((s[k:] ** 2).sum())
    assert np.linalg.norm(got.factors.dense().numpy() - d) == pytest.approx(wanted, abs=1e-11 * case.size())
    assert got.error == pytest.approx(wanted / np.linalg.norm(d) if d.any() else 0.0, abs=1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-12), (torch.bfloat16, 1e-12)]
)
def test_resize_of_stored_factors(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(18)
    b, a = torch.randn(20, 8).to(dtype), torch.randn(8, 15).to(dtype)
    d = b.double() @ a.double()
    got = algebra.resize(algebra.Factors(b, a), algebra.energy(0.9))
    s = torch.linalg.svdvals(d)
    assert got.rank == algebra.energy(0.9)(s)
    error = torch.linalg.vector_norm(got.factors.dense().double() - d) / torch.linalg.vector_norm(d)
    assert float(error) == pytest.approx(got.error, abs=tolerance)


def test_pad_changes_the_rank_only() -> None:
    [update] = Case(19, 6, 5, (2,), (1.0,), (1.0,)).folded()
    padded = algebra.pad(update, 7)
    assert padded.rank == 7 and torch.equal(padded.dense(), update.dense())
    assert algebra.pad(update, 2).rank == 2
    with pytest.raises(ValueError, match="padded"):
        algebra.pad(update, 1)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float16, 5e-5, 1e-3), (torch.bfloat16, 5e-4, 8e-3)])
def test_the_error_of_storage_is_that_of_the_rounded_product(dtype: torch.dtype, least: float, most: float) -> None:
    [update] = Case(20, 30, 25, (5,), (1.0,), (1.0,)).folded()
    stored, error = algebra.store(update, dtype)
    assert stored.b.dtype == stored.a.dtype == dtype
    d = update.dense()
    wanted = torch.linalg.vector_norm(stored.b.double() @ stored.a.double() - d) / torch.linalg.vector_norm(d)
    assert error == pytest.approx(float(wanted), rel=1e-9)
    assert least < error < most
    with pytest.raises(ValueError, match="range"):
        algebra.store(update.scaled(1e6), torch.float16)


@settings(max_examples=40, deadline=None)
@given(cases(least=2, most=2))
def test_a_relative_error_is_that_of_the_products(case: Case) -> None:
    one, two = case.folded()
    x, y = case.dense()
    if y.any():
        wanted = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert algebra.relative_error(one, two) == pytest.approx(wanted, rel=1e-9)
        assert algebra.relative_error(two, two) < 1e-13
    else:
        assert algebra.relative_error(one, two) == (float("inf") if x.any() else 0.0)
    assert algebra.norm(one) == pytest.approx(np.linalg.norm(x), rel=1e-12)
