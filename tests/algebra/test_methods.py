"""Every method in the core equals its dense definition, over shapes, ranks, scales and weights."""

from __future__ import annotations

from collections.abc import Callable

import algebra_dense as dense
import numpy as np
import pytest
import torch
from algebra_dense import Array, Case, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loramerge import algebra

shares = st.sampled_from([0.1, 0.35, 0.5, 0.8, 1.0])
spaces = st.sampled_from(["full", "knots", "core"])
many = settings(max_examples=60, deadline=None)


def same(got: algebra.Update, wanted: Array, case: Case, tolerance: float = 1e-10) -> None:
    assert got.shape == wanted.shape
    size = max(case.size(), float(np.linalg.norm(wanted)))
    assert np.linalg.norm(got.dense().numpy() - wanted) <= tolerance * size


def elementwise(case: Case, name: str, mask: Callable[[Array, int], Array], elect: bool, scale: float = 1.0) -> Array:
    """A mask in a space, then the sum or the elected mean, and back."""
    canonical = [case.dense()[i] for i in case.stack().order]
    where = dense.space(canonical, name, case.size())
    masked = [mask(x, case.stack().order[i]) for i, x in enumerate(where.xs)]
    return where.back(dense.elected(masked, scale) if elect else sum(masked))


@many
@given(cases())
def test_linear_is_the_weighted_sum(case: Case) -> None:
    same(algebra.linear(case.stack()), sum(case.dense()), case)
    same(algebra.cat(case.stack()), sum(case.dense()), case)
    assert algebra.cat(case.stack()).rank == sum(case.ranks)
    assert algebra.linear(case.stack()).rank == np.linalg.matrix_rank(sum(case.dense()), tol=1e-11 * case.size())


@many
@given(cases(), st.integers(0, 6))
def test_a_truncation_is_the_best_and_says_its_error(case: Case, k: int) -> None:
    total = sum(case.dense())
    s = np.linalg.svd(total, compute_uv=False)
    cut = algebra.linear(case.stack(), algebra.fixed(k))
    assert cut.rank <= k
    error = np.linalg.norm(cut.dense().numpy() - total)
    assert error == pytest.approx(np.sqrt((s[k:] ** 2).sum()), rel=1e-9, abs=1e-11 * case.size())
    assert algebra.linear(case.stack()).svd().tail(k) == pytest.approx(error, rel=1e-9, abs=1e-11 * case.size())


@many
@given(cases())
def test_inner_products_are_those_of_the_updates(case: Case) -> None:
    ds = [case.dense()[i] for i in case.stack().order]
    wanted = np.array([[(x * y).sum() for y in ds] for x in ds])
    assert np.abs(case.stack().gram().numpy() - wanted).max() <= 1e-10 * case.size() ** 2


@many
@given(cases(least=2, most=2), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_slerp(case: Case, t: float) -> None:
    same(algebra.slerp(case.stack(), t), dense.slerp(*case.dense(), t), case, 1e-9)


@pytest.mark.parametrize("nearness", [1e-9, 1e-3, 1e-1])
def test_slerp_of_nearly_parallel_updates(nearness: float) -> None:
    torch.manual_seed(0)
    b, a = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    first, second = algebra.fold(b, a), algebra.fold(b + nearness * torch.randn_like(b), a, weight=2.0)
    wanted = dense.slerp(first.dense().numpy(), second.dense().numpy(), 0.3)
    got = algebra.slerp(algebra.Stack([first, second]), 0.3).dense().numpy()
    assert np.linalg.norm(got - wanted) < 1e-10 * np.linalg.norm(wanted)


@many
@given(cases(), st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=4, max_size=4))
def test_karcher(case: Case, shares: list[float]) -> None:
    ds, given_shares = case.dense(), shares[: len(case.ranks)]
    units = [d / np.linalg.norm(d) for d in ds if np.linalg.norm(d) > 0]
    # Directions that nearly cancel have no stable mean.
    assume(units and min((x * y).sum() for x in units for y in units) > -0.5)
    same(algebra.karcher(case.stack(), given_shares), dense.karcher(ds, given_shares), case, 1e-9)


def test_karcher_of_opposite_updates_is_zero() -> None:
    torch.manual_seed(1)
    b, a = torch.randn(6, 2), torch.randn(2, 6)
    assert algebra.karcher(algebra.Stack([algebra.fold(b, a), algebra.fold(b, a, weight=-1.0)])).rank == 0


@many
@given(cases(least=2))
def test_model_stock(case: Case) -> None:
    units = [d / np.linalg.norm(d) for d in case.dense() if np.linalg.norm(d) > 0]
    count = len(case.ranks)
    total = sum(float((x * y).sum()) for x in units for y in units) - len(units)
    # Below is the divisor of the formula: it vanishes where all directions cancel.
    assume(1 + total / count > 1e-3)
    same(algebra.model_stock(case.stack()), dense.model_stock(case.dense()), case, 1e-9)


@many
@given(cases(), shares, spaces, st.sampled_from([1.0, 0.6]))
def test_ties(case: Case, density: float, space: str, scale: float) -> None:
    wanted = elementwise(case, space, lambda x, _: dense.trimmed(x, density), True, scale)
    same(algebra.ties(case.stack(), density, space=space, scale=scale), wanted, case)


@many
@given(cases(), shares, spaces, st.booleans())
def test_magnitude(case: Case, density: float, space: str, elect: bool) -> None:
    wanted = elementwise(case, space, lambda x, _: dense.trimmed(x, density), elect)
    same(algebra.magnitude(case.stack(), density, space=space, elect=elect), wanted, case)


@many
@given(cases(), st.sampled_from([(0.3, 0.1), (0.5, 0.5), (0.9, 0.0), (0.2, 0.35)]), spaces, st.booleans())
def test_breadcrumbs(case: Case, values: tuple[float, float], space: str, elect: bool) -> None:
    density, gamma = values
    wanted = elementwise(case, space, lambda x, _: dense.without_largest(x, density, gamma), elect)
    same(algebra.breadcrumbs(case.stack(), density, gamma, space=space, elect=elect), wanted, case)


@many
@given(cases(), st.sampled_from([0.0, 0.3, 0.9]), spaces, st.booleans(), st.integers(0, 9))
def test_dare(case: Case, p: float, space: str, elect: bool, seed: int) -> None:
    def mask(x: Array, i: int) -> Array:
        return dense.dropped(x, p, dense.uniform(x.shape, seed, bytes([i + 1]), "layer.0"))

    wanted = elementwise(case, space, mask, elect)
    if elect:
        got = algebra.dare_ties(case.stack(), p, seed=seed, module="layer.0", space=space)
    else:
        got = algebra.dare(case.stack(), p, seed=seed, module="layer.0", space=space)
    same(got, wanted, case)


@many
@given(cases(), st.sampled_from([(0.5, 0.3), (0.7, 0.0), (0.2, 0.2), (1.0, 0.0)]), spaces, st.booleans())
def test_della(case: Case, values: tuple[float, float], space: str, elect: bool) -> None:
    density, eps = values

    def mask(x: Array, i: int) -> Array:
        u = dense.uniform(x.shape, 3, bytes([i + 1]), "x")
        return np.array([dense.della_row(row, density, eps, z) for row, z in zip(x, u, strict=True)]).reshape(x.shape)

    wanted = elementwise(case, space, mask, elect)
    same(algebra.della(case.stack(), density, eps, seed=3, module="x", space=space, elect=elect), wanted, case)


@many
@given(cases(), shares)
def test_knots_is_ties_in_its_space_at_the_rank_of_the_stack(case: Case, density: float) -> None:
    wanted = elementwise(case, "knots", lambda x, _: dense.trimmed(x, density), True)
    got = algebra.knots(case.stack(), density)
    same(got, wanted, case)
    assert got.rank <= min(sum(case.ranks), case.m, case.n)
    wanted = elementwise(
        case, "knots", lambda x, i: dense.dropped(x, 0.4, dense.uniform(x.shape, 5, bytes([i + 1]), "")), True
    )
    same(algebra.knots(case.stack(), p=0.4, seed=5), wanted, case)


@many
@given(cases())
def test_tsv(case: Case) -> None:
    same(algebra.tsv(case.stack()), dense.tsv(case.dense(), list(case.ranks), case.size()), case, 1e-9)
    share = sum(case.ranks) // len(case.ranks)
    wanted = dense.tsv(case.dense(), [min(r, share) for r in case.ranks], case.size())
    same(algebra.tsv(case.stack(), "share"), wanted, case, 1e-9)
    own = [(i * 7 + 1) % 4 for i in range(len(case.ranks))]
    same(algebra.tsv(case.stack(), own), dense.tsv(case.dense(), own, case.size()), case, 1e-9)


def test_tsv_of_one_adapter_twice_has_its_directions() -> None:
    torch.manual_seed(2)
    one = algebra.fold(torch.randn(9, 3), torch.randn(3, 6))
    got = algebra.tsv(algebra.Stack([one, one]))
    wanted = dense.tsv([one.dense().numpy()] * 2, [3, 3], 1.0)
    assert got.rank == 3
    assert np.linalg.norm(got.dense().numpy() - wanted) < 1e-9 * np.linalg.norm(wanted)


@many
@given(cases(), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_iso(case: Case, common: float) -> None:
    same(algebra.iso_c(case.stack()), dense.iso_c(case.dense(), case.size()), case, 1e-9)
    wanted = dense.iso_cts(case.dense(), common, sum(case.ranks), case.size())
    same(algebra.iso_cts(case.stack(), common), wanted, case, 1e-9)


@many
@given(cases(), st.sampled_from([0.3, 1.0]))
def test_svc(case: Case, alpha: float) -> None:
    wanted = dense.svc(sum(case.dense()), case.dense(), alpha, case.size())
    same(algebra.svc(algebra.linear(case.stack()), case.stack(), alpha), wanted, case, 1e-9)


@many
@given(cases(), st.sampled_from([0.0, 1e-6, 0.1]))
def test_wudi(case: Case, ridge: float) -> None:
    same(algebra.wudi(case.stack(), ridge), dense.wudi(case.dense(), ridge), case, 1e-8)


def test_wudi_reaches_an_objective_of_zero_where_row_spaces_are_apart() -> None:
    case = Case(4, 20, 18, (3, 4, 2), (1.0, 1.0, 1.0), (1.0, 0.5, 2.0))
    ds = case.dense()
    plain = dense.wudi_objective(sum(ds), ds)
    assert dense.wudi_objective(algebra.wudi(case.stack(), 0.0).dense().numpy(), ds) < 1e-20 * plain
    assert dense.wudi_objective(algebra.wudi(case.stack()).dense().numpy(), ds) < 1e-6 * plain
