"""Masks: random numbers that belong to elements, thresholds without sorting, blocks that change no bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import algebra_dense as dense
import numpy as np
import pytest
import torch
from algebra_dense import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from loramerge import algebra
from loramerge.algebra import Stack, thresholds
from loramerge.algebra.randomness import stream, uniform

CASE = Case(11, 150, 37, (3, 2, 4), (1.0, 0.5, 2.0), (1.0, -0.7, 0.4))
METHODS: dict[str, Callable[[Stack], algebra.Update]] = {
    "ties": lambda s: algebra.ties(s, 0.3),
    "breadcrumbs": lambda s: algebra.breadcrumbs(s, 0.3, 0.1, elect=True),
    "dare": lambda s: algebra.dare(s, 0.3, seed=4, module="layer"),
    "della": lambda s: algebra.della(s, 0.5, 0.2, seed=4, module="layer", elect=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_blocks_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = METHODS[name](CASE.stack()).dense()
    monkeypatch.setattr(thresholds, "BLOCK_ELEMENTS", 1)
    other = METHODS[name](CASE.stack())
    assert len(list(thresholds.spans(other.shape))) == 3
    assert torch.equal(whole, other.dense())
    cuts = [0, 1, 2, 63, 64, 70, 149, 150]
    assert torch.equal(whole, torch.cat([other.rows(i, j) for i, j in pairwise(cuts)]))
    assert other.rows(5, 5).shape == (0, 37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 61])
def test_rows_of_a_product_have_the_same_bits_however_it_is_cut(dtype: torch.dtype, columns: int) -> None:
    """A product with one row alone takes another path through the library than a block of rows."""
    torch.manual_seed(25)
    update = algebra.Factors(torch.randn(150, 60, dtype=dtype), torch.randn(60, columns, dtype=dtype))
    whole = update.dense()
    assert torch.allclose(whole, update.b @ update.a, atol=1e-4)
    for i, j in ((0, 1), (1, 2), (2, 63), (70, 149), (149, 150)):
        assert torch.equal(update.rows(i, j), whole[i:j])


@pytest.mark.parametrize("name", METHODS)
def test_threads_change_no_bit(name: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = METHODS[name](CASE.stack()).dense()
        torch.set_num_threads(2)
        assert torch.equal(one, METHODS[name](CASE.stack()).dense())
    finally:
        torch.set_num_threads(before)


def test_the_same_bytes_in_another_process() -> None:
    code = (
        "import torch, hashlib; from loramerge import algebra; g = torch.Generator().manual_seed(5)\n"
        "f = [algebra.fold(torch.randn(9, 2, generator=g), torch.randn(2, 8, generator=g)) for _ in range(2)]\n"
        "d = algebra.dare(algebra.Stack(f), 0.5, seed=6, module='q').dense()\n"
        "print(algebra.content_key(d).hex())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_masks_differ_by_seed_module_and_adapter_but_not_by_weight() -> None:
    torch.manual_seed(12)
    b, a = torch.randn(9, 2), torch.randn(2, 8)

    def kept(weight: float = 1.0, seed: int = 0, module: str = "q", nudge: float = 0.0) -> torch.Tensor:
        stack = Stack([algebra.fold(b + nudge, a, weight=weight)])
        return algebra.dare(stack, 0.5, seed=seed, module=module).dense() != 0

    assert torch.equal(kept(), kept()) and torch.equal(kept(), kept(weight=-0.3))
    for other in (kept(seed=1), kept(module="k"), kept(nudge=1e-3)):
        assert not torch.equal(kept(), other)


def test_an_adapter_keeps_its_mask_whatever_it_is_merged_with() -> None:
    one, two, three = CASE.folded()
    alone = [algebra.dare(Stack([f]), 0.3, module="m").dense() for f in (one, two, three)]
    together = algebra.dare(Stack([three, one, two]), 0.3, module="m").dense()
    assert torch.allclose(together, sum(alone), atol=1e-13)


def test_the_mean_of_dare_over_seeds_is_the_update() -> None:
    stack = Case(13, 6, 5, (2, 1), (1.0, 1.0), (1.0, 0.5)).stack()
    p, count = 0.6, 3000
    mean = sum(algebra.dare(stack, p, seed=i).dense() for i in range(count)) / count
    spread = (sum(f.dense().square() for f in stack.adapters) * p / (1 - p) / count).sqrt()
    z = (mean - algebra.linear(stack).dense()) / spread
    # 30 standard normals, which the test would leave once in a million times if they were.
    assert 0.4 < float(z.square().mean().sqrt()) < 1.7
    assert float(z.abs().max()) < 5.5


def test_the_mean_of_della_over_seeds_is_the_update() -> None:
    stack = Case(14, 5, 6, (2,), (1.0,), (1.0,)).stack()
    count = 3000
    mean = sum(algebra.della(stack, 0.5, 0.3, seed=i).dense() for i in range(count)) / count
    x = stack.adapters[0].dense()
    q = 0.2 + 0.6 * x.abs().argsort(dim=1).argsort(dim=1) / 5
    z = (mean - x) / (x.square() * (1 - q) / q / count).sqrt()
    assert 0.4 < float(z.square().mean().sqrt()) < 1.7
    assert float(z.abs().max()) < 5.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**128 - 1), st.integers(0, 1000), st.integers(0, 50))
def test_a_number_of_a_stream_does_not_depend_on_where_one_starts(key: int, first: int, count: int) -> None:
    whole = np.random.Generator(np.random.Philox(key=key)).random(first + count)
    assert np.array_equal(uniform(key, first, count).numpy(), whole[first:])


def test_names_do_not_run_into_one_another() -> None:
    assert len({stream(1, b"ab", "c"), stream(1, b"a", "bc"), stream(11, b"ab", "c"), stream(1, b"abc", "")}) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2**-149]), max_size=10),
)
def test_a_threshold_is_the_value_a_sort_finds(first: list[float], second: list[float]) -> None:
    arrays = [thresholds.Whole(torch.tensor([x], dtype=torch.float32).view(-1, 1)) for x in (first, second)]
    ordered = sorted((abs(x) for x in [*first, *second]), reverse=True)
    ks = list(range(1, len(ordered) + 1))
    assert algebra.kth_largest(arrays, ks) == ordered


def test_a_threshold_outside_of_the_elements_or_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="among 4"):
        algebra.kth_largest([thresholds.Whole(torch.ones(2, 2))], [5])
    with pytest.raises(ValueError, match="finite"):
        algebra.kth_largest([thresholds.Whole(torch.tensor([[1.0, float("nan")]]))], [1])
    with pytest.raises(ValueError, match="finite"):
        algebra.kth_largest([thresholds.Whole(torch.tensor([[1e300]], dtype=torch.float64))], [1])


def test_equal_values_at_the_threshold_all_stay() -> None:
    ones = algebra.fold(torch.ones(3, 1), torch.ones(1, 4))
    assert torch.equal(algebra.ties(Stack([ones]), 0.25).dense(), torch.ones(3, 4, dtype=torch.float64))
    assert not algebra.breadcrumbs(Stack([ones]), 0.25, 0.25).dense().any()


def test_a_sum_of_zero_takes_the_sign_that_most_elements_elect() -> None:
    def update(row: list[float]) -> algebra.Factors:
        return algebra.fold(torch.ones(1, 1), torch.tensor([row]))

    up = Stack([update([1, 2, 3, 0]), update([-1, 1, 1, 0])])
    assert algebra.ties(up, 1.0).dense().tolist() == [[1.0, 1.5, 2.0, 0.0]]
    down = Stack([update([1, -2, -3, 0]), update([-1, -1, -1, 0])])
    assert algebra.ties(down, 1.0).dense().tolist() == [[-1.0, -1.5, -2.0, 0.0]]


def test_one_threshold_over_all_modules_of_an_adapter() -> None:
    cases = [Case(15, 9, 7, (2, 3), (1.0, 5.0), (1.0, 0.3)), Case(16, 6, 11, (2, 1), (0.2, 1.0), (1.0, 0.3))]
    modules = [case.folded() for case in cases]
    limits = [algebra.adapter_threshold([module[i] for module in modules], 0.3) for i in range(2)]
    for i in range(2):
        every = np.concatenate([case.dense()[i].flatten() for case in cases])
        assert limits[i] == dense.kth(every, int(0.3 * len(every)))
    for case in cases:
        wanted = dense.elected(
            [np.where(np.abs(d).astype(np.float32) >= t, d, 0) for d, t in zip(case.dense(), limits, strict=True)]
        )
        for order in (1, -1):
            stack = Stack(case.folded()[::order])
            got = algebra.ties(stack, 0.3, thresholds=limits[::order]).dense()
            assert np.allclose(got.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("name", ["ties", "dare"])
def test_the_low_rank_spaces_keep_the_rank_of_the_stack(space: str, name: str) -> None:
    stack = CASE.stack()
    merged = (
        algebra.ties(stack, 0.3, space=space) if name == "ties" else algebra.dare_ties(stack, 0.3, space=space)
    ).factors()
    assert merged.rank <= 9
    full = (algebra.ties(stack, 0.3) if name == "ties" else algebra.dare_ties(stack, 0.3)).factors()
    assert full.rank == 37


@pytest.mark.parametrize("space", ["knots", "core"])
def test_adapters_of_orthogonal_rows_and_columns_do_not_vote_on_one_another(space: str) -> None:
    torch.manual_seed(17)
    left = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    one = algebra.fold(left[:, :2] * torch.tensor([4.0, 2.0]), right[:2])
    two = algebra.fold(left[:, 2:4] * torch.tensor([3.0, 1.0]), right[2:4])
    stack = Stack([one, two])
    assert torch.allclose(algebra.ties(stack, 1.0, space=space).dense(), algebra.linear(stack).dense(), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 13), st.integers(0, 99))
def test_the_truncation_of_a_dense_matrix_is_the_best(m: int, n: int, k: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(m, n))
    s = np.linalg.svd(x, compute_uv=False)
    got = algebra.truncated(torch.from_numpy(x), algebra.fixed(k))
    assert got.rank == min(k, m, n)
    assert np.linalg.norm(got.dense().numpy() - x) == pytest.approx(np.sqrt((s[k:] ** 2).sum()), abs=1e-7)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: algebra.ties(s, 0.0),
        lambda s: algebra.ties(s, 1.5),
        lambda s: algebra.ties(s, float("nan")),
        lambda s: algebra.magnitude(s, 0.0),
        lambda s: algebra.breadcrumbs(s, 0.0, 0.1),
        lambda s: algebra.breadcrumbs(s, 0.8, 0.3),
        lambda s: algebra.dare(s, 1.0),
        lambda s: algebra.dare(s, -0.1),
        lambda s: algebra.dare_ties(s, 1.0),
        lambda s: algebra.della(s, 0.0, 0.0),
        lambda s: algebra.della(s, 0.7, 0.4),
        lambda s: algebra.ties(s, 0.5, space="nowhere"),
        lambda s: algebra.ties(s, 0.5, thresholds=[1.0]),
        lambda s: algebra.slerp(s, 0.5),
        lambda s: algebra.karcher(s, [0, 0, 0]),
        lambda s: algebra.karcher(s, [1, 1]),
        lambda s: algebra.iso_cts(s, 1.1),
        lambda s: algebra.svc(algebra.linear(s), s, 0.0),
        lambda s: algebra.wudi(s, -1.0),
        lambda s: algebra.tsv(s, [1, 2, -1]),
    ],
)
def test_settings_out_of_range_are_refused(call: Callable[[Stack], object]) -> None:
    with pytest.raises(ValueError):
        call(CASE.stack())
