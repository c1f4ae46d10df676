"""What no method may depend on: the order, the factoring, how a weight is written; what methods leave alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from algebra_dense import Case, cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from loramerge import algebra
from loramerge.algebra import Factors, Stack, Update

Method = Callable[[Stack], Update]

ELEMENTWISE: dict[str, Method] = {
    f"{name} {space}": method
    for space in algebra.SPACES
    for name, method in {
        "ties": lambda s, space=space: algebra.ties(s, 0.4, space=space),
        "magnitude": lambda s, space=space: algebra.magnitude(s, 0.4, space=space),
        "breadcrumbs": lambda s, space=space: algebra.breadcrumbs(s, 0.4, 0.2, space=space),
        "dare": lambda s, space=space: algebra.dare(s, 0.4, seed=1, module="m", space=space),
        "dare_ties": lambda s, space=space: algebra.dare_ties(s, 0.4, seed=1, module="m", space=space),
        "della": lambda s, space=space: algebra.della(s, 0.5, 0.3, seed=1, module="m", space=space),
    }.items()
}
BASIS_FREE: dict[str, Method] = {
    "cat": algebra.cat,
    "linear": algebra.linear,
    "linear, rank 2": lambda s: algebra.linear(s, algebra.fixed(2)),
    "karcher": algebra.karcher,
    "model_stock": algebra.model_stock,
    "tsv": algebra.tsv,
    "tsv share": lambda s: algebra.tsv(s, "share"),
    "iso_c": algebra.iso_c,
    "iso_cts": algebra.iso_cts,
    "svc": lambda s: algebra.svc(algebra.linear(s), s),
    "wudi": algebra.wudi,
    "knots": lambda s: algebra.knots(s, 0.4),
}
METHODS = ELEMENTWISE | BASIS_FREE
UNTOUCHED: dict[str, Method] = {
    f"{name} {space}": method
    for space in algebra.SPACES
    for name, method in {
        "ties": lambda s, space=space: algebra.ties(s, 1.0, space=space),
        "magnitude": lambda s, space=space: algebra.magnitude(s, 1.0, space=space),
        "breadcrumbs": lambda s, space=space: algebra.breadcrumbs(s, 1.0, 0.0, space=space),
        "dare": lambda s, space=space: algebra.dare(s, 0.0, space=space),
        "dare_ties": lambda s, space=space: algebra.dare_ties(s, 0.0, space=space),
        "della": lambda s, space=space: algebra.della(s, 1.0, 0.0, space=space),
    }.items()
}
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def stable(case: Case) -> None:
    """Leaves out inputs at a jump of the method: opposite or nearly equal directions, nearly equal singular values."""
    units = [d / np.linalg.norm(d) for d in case.dense() if np.linalg.norm(d) > 0]
    assume(case.m > 2 and case.n > 2 and sum(case.ranks) <= min(case.m, case.n))
    assume(all(abs((x * y).sum()) < 0.8 for i, x in enumerate(units) for y in units[:i]))
    s = np.linalg.svd(sum(case.dense()), compute_uv=False)
    s = s[s > 1e-12 * case.size()]
    assume(len(s) < 2 or (1 - s[1:] / s[:-1]).min() > 1e-3)
    assume(not len(s) or s[-1] > 1e-4 * case.size())


def distance(x: Update, y: Update) -> float:
    size = float(torch.linalg.vector_norm(x.dense()))
    return float(torch.linalg.vector_norm(x.dense() - y.dense())) / (size or 1.0)


@pytest.mark.parametrize("name", METHODS)
@few
@given(cases(least=2), st.randoms(use_true_random=False))
def test_the_order_of_adapters_changes_no_bit(name: str, case: Case, random: st.randoms) -> None:
    shuffled = case.folded()
    random.shuffle(shuffled)
    assert torch.equal(METHODS[name](case.stack()).dense(), METHODS[name](Stack(shuffled)).dense())


def test_the_order_of_one_adapter_with_two_weights_changes_no_bit() -> None:
    torch.manual_seed(3)
    b, a = torch.randn(5, 2), torch.randn(2, 6)
    one, two = algebra.fold(b, a), algebra.fold(b, a, weight=-0.4)
    assert Stack([one, two]).order != Stack([two, one]).order
    assert torch.equal(algebra.linear(Stack([one, two])).dense(), algebra.linear(Stack([two, one])).dense())
    assert Stack([one, two]).given([1, 2]) == Stack([two, one]).given([2, 1])


def test_slerp_and_shares_follow_the_adapter_not_its_place() -> None:
    case = Case(5, 6, 7, (2, 3), (1.0, 1.0), (1.0, 0.5))
    one, two = case.folded()
    assert torch.equal(algebra.slerp(Stack([one, two]), 0.25).dense(), algebra.slerp(Stack([two, one]), 0.75).dense())
    left, right = algebra.karcher(Stack([one, two]), [1, 3]), algebra.karcher(Stack([two, one]), [3, 1])
    assert torch.equal(left.dense(), right.dense())
    assert distance(left, algebra.karcher(Stack([one, two]), [3, 1])) > 1e-2


@pytest.mark.parametrize("name", METHODS)
@few
@given(cases(zeros=False))
def test_another_factoring_of_the_same_update_changes_nothing(name: str, case: Case) -> None:
    stable(case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    changed = []
    for f in case.folded():
        u, _, v = torch.linalg.svd(torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64))
        basis = u @ torch.diag(torch.linspace(0.5, 2, f.rank, dtype=torch.float64)) @ v
        changed.append(Factors(f.b @ basis, torch.linalg.solve(basis, f.a), f.key))
    assert distance(METHODS[name](case.stack()), METHODS[name](Stack(changed))) < 1e-8


@pytest.mark.parametrize("name", METHODS)
@few
@given(cases(zeros=False), st.sampled_from([3.0, 0.1, -7.0]))
def test_scaling_an_adapter_against_its_weight_changes_nothing(name: str, case: Case, c: float) -> None:
    stable(case)
    changed = [
        algebra.fold(b * c, a, scale=s, weight=w / c, key=bytes([i + 1]))
        for i, ((b, a), s, w) in enumerate(zip(case.pairs(), case.scales, case.weights, strict=True))
    ]
    assert distance(METHODS[name](case.stack()), METHODS[name](Stack(changed))) < 1e-8


@pytest.mark.parametrize(
    "name", [*UNTOUCHED, *(m for m in BASIS_FREE if "rank" not in m and m not in ("iso_c", "iso_cts"))]
)
@few
@given(cases(most=1))
def test_one_adapter_alone_is_itself(name: str, case: Case) -> None:
    method = (UNTOUCHED | BASIS_FREE | {"knots": algebra.knots})[name]
    wanted = torch.from_numpy(case.dense()[0])
    got = method(case.stack())
    assert float(torch.linalg.vector_norm(got.dense() - wanted)) <= 1e-9 * case.size()


@pytest.mark.parametrize(
    "method",
    [
        algebra.linear,
        algebra.wudi,
        lambda s: algebra.ties(s, 0.4),
        lambda s: algebra.ties(s, 0.4, space="knots"),
        lambda s: algebra.ties(s, 0.4, space="core"),
        lambda s: algebra.dare(s, 0.3, module="m"),
        lambda s: algebra.dare_ties(s, 0.3, module="m"),
        algebra.tsv,
    ],
    ids=["linear", "wudi", "ties", "ties knots", "ties core", "dare", "dare_ties", "tsv"],
)
@few
@given(cases(zeros=False))
def test_a_zero_adapter_is_neutral(method: Method, case: Case) -> None:
    stable(case)
    torch.manual_seed(case.seed)
    zero = algebra.fold(torch.zeros(case.m, 2), torch.randn(2, case.n), key=b"zero")
    empty = algebra.fold(torch.zeros(case.m, 0), torch.zeros(0, case.n), key=b"empty")
    assert distance(method(case.stack()), method(Stack([*case.folded(), zero, empty]))) < 1e-9


def test_a_zero_adapter_lowers_means() -> None:
    case = Case(6, 6, 7, (2, 3), (1.0, 1.0), (1.0, 0.5))
    zero = algebra.fold(torch.zeros(6, 2), torch.randn(2, 7))
    more = Stack([*case.folded(), zero])
    assert algebra.norm(algebra.karcher(more)) == pytest.approx(algebra.norm(algebra.karcher(case.stack())) * 2 / 3)
    assert distance(algebra.model_stock(case.stack()), algebra.model_stock(more)) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_zeros_gives_zero(name: str) -> None:
    zeros = [algebra.fold(torch.zeros(4, r), torch.ones(r, 5)) for r in (0, 1, 3)]
    for stack in (Stack(zeros), Stack(zeros[:1]), Stack(zeros[1:2])):
        got = METHODS[name](stack)
        assert got.shape == (4, 5)
        assert not got.dense().any()
        assert name == "cat" or got.factors().rank == 0


@settings(max_examples=40, deadline=None)
@given(cases())
def test_an_update_less_itself_has_rank_zero(case: Case) -> None:
    once = case.folded()
    less = [f.scaled(-1.0) for f in once]
    assert algebra.linear(Stack([*once, *less])).rank == 0
    doubled = algebra.linear(Stack([*once, *once]))
    assert doubled.rank == algebra.linear(Stack(once)).rank


def test_weights_add() -> None:
    torch.manual_seed(7)
    b, a = torch.randn(8, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    got = algebra.linear(Stack([algebra.fold(b, a, weight=0.5), algebra.fold(b, a, weight=1.5)]))
    assert got.rank == 3
    assert torch.allclose(got.dense(), 2 * b @ a, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "tsv", "iso_c", "iso_cts", "wudi", "karcher", "svc", "knots"])
def test_factors_come_balanced_with_orthogonal_columns_and_signs_fixed(name: str) -> None:
    got = METHODS[name](Case(8, 9, 7, (2, 3), (1.0, 1.0), (1.0, -0.5)).stack())
    assert isinstance(got, Factors)
    assert torch.allclose(got.b.T @ got.b, got.a @ got.a.T, atol=1e-10 * algebra.norm(got))
    assert (got.b.gather(0, got.b.abs().argmax(0, keepdim=True)) > 0).all()
    s = got.svd().s
    assert torch.allclose((got.b.T @ got.b).diagonal(), s) and (s.diff() <= 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_float32_stays_near(name: str) -> None:
    case = Case(9, 9, 7, (2, 3), (1.0, 2.0), (1.0, -0.5))
    single = METHODS[name](Stack(case.folded(), dtype=torch.float32))
    assert single.dense().dtype == torch.float32
    assert distance(METHODS[name](case.stack()), single) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_of_any_dtype_fold_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(10)
    b, a = torch.randn(4, 2, 1, 1).to(dtype), torch.randn(2, 3, 3, 3).to(dtype)
    got = algebra.fold(b, a, scale=0.5, weight=-2.0)
    assert got.shape == (4, 27)
    assert torch.equal(got.dense(), -(b.double().flatten(1) @ a.double().flatten(1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    good, bad = torch.ones(3, 2), torch.full((2, 3), value)
    with pytest.raises(ValueError, match="finite"):
        algebra.fold(good, bad)
    with pytest.raises(ValueError, match="finite"):
        algebra.fold(good, good.T, weight=value)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no product"):
        algebra.fold(torch.ones(3, 2), torch.ones(3, 3))
    with pytest.raises(ValueError, match="different shapes"):
        Stack([algebra.fold(torch.ones(3, 2), torch.ones(2, 4)), algebra.fold(torch.ones(3, 2), torch.ones(2, 3))])
    with pytest.raises(ValueError, match="at least one"):
        Stack([])
