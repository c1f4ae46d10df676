"""Extraction of low-rank factors: as good as Eckart-Young, and its certificate never says more than is true.

The oracle is the dense singular value decomposition in fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from loramerge.algebra import krylov, noise
from loramerge.algebra.extract import Extraction, extract

SHAPES = ((448, 448), (360, 901), (811, 333), (129, 700))
SPECTRA = ("noise", "power", "exponential", "low rank", "low rank and noise")


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


@cache
def matrix(kind: str, m: int, n: int) -> Tensor:
    """A fp32 matrix with one of the SPECTRA."""
    g = generator(SPECTRA.index(kind), m, n)
    if kind == "noise":
        return torch.randn(m, n, generator=g)
    if kind.startswith("low rank"):
        low = torch.randn(m, 16, generator=g) @ torch.randn(16, n, generator=g)
        return low + (0.01 * torch.randn(m, n, generator=g) if "noise" in kind else 0)
    k = min(m, n)
    i = torch.arange(1, k + 1, dtype=torch.float64)
    s = i**-0.7 if kind == "power" else torch.exp(-i / 40)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    return ((u * s) @ v.T).float()


@cache
def spectrum(kind: str, m: int, n: int) -> Tensor:
    return torch.linalg.svdvals(matrix(kind, m, n).double())


def true_error(d: Tensor, found: Extraction) -> float:
    """|D - BA|, from the stored factors in fp64."""
    return float(torch.linalg.matrix_norm(d.double() - found.B.double() @ found.A.double()))


class Blocks:
    """A delta in row blocks of a given height, which counts how often it is read."""

    def __init__(self, d: Tensor, height: int) -> None:
        self.d, self.height, self.reads = d, height, 0
        self.shape = (d.shape[0], d.shape[1])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        self.reads += 1
        for first in range(0, len(self.d), self.height):
            yield first, self.d[first : first + self.height].clone()


def same(x: Extraction, y: Extraction) -> bool:
    return torch.equal(x.B, y.B) and torch.equal(x.A, y.A) and torch.equal(x.singular_values, y.singular_values)


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_error_is_the_optimum_within_a_thousandth_and_the_certificate_says_so(
    kind: str, shape: tuple[int, int], rank: int
) -> None:
    d, s = matrix(kind, *shape), spectrum(kind, *shape)
    found = extract(d, rank, module=kind)
    norm = float(torch.linalg.vector_norm(s))
    optimum = float(torch.linalg.vector_norm(s[rank:]))
    error = true_error(d, found)
    assert found.B.shape == (shape[0], found.rank) and found.A.shape == (found.rank, shape[1])
    assert found.certificate <= 1.001
    assert error <= 1.001 * optimum + 1e-6 * norm
    assert error <= found.certificate * optimum * (1 + 1e-5) + 1e-6 * norm
    assert found.error * norm == pytest.approx(error, rel=2e-3, abs=2e-7 * norm)
    assert found.energy == pytest.approx(1 - (error / norm) ** 2, abs=1e-6)
    assert found.norm == pytest.approx(norm, rel=1e-6)
    reference = s[: found.rank]
    assert torch.allclose(found.singular_values, reference, rtol=1e-2 if kind == "noise" else 5e-3)
    assert bool((found.singular_values.diff() <= 0).all())


def test_the_iteration_is_what_is_tested() -> None:
    """On the tests' shapes most of the work is done without the Gram matrix, which would be right anyway."""
    methods = {(kind, rank): extract(matrix(kind, 448, 448), rank).method for kind in SPECTRA for rank in (4, 16)}
    assert [pair for pair, method in methods.items() if method != "krylov"] == []


@pytest.mark.parametrize("kind", ["noise", "power"])
def test_a_loose_tolerance_stops_earlier_and_its_certificate_is_still_true(kind: str) -> None:
    d, s = matrix(kind, 448, 448), spectrum(kind, 448, 448)
    optimum = float(torch.linalg.vector_norm(s[16:]))
    tight, loose = extract(d, 16), extract(d, 16, tolerance=1.2)
    assert loose.method == tight.method == "krylov"
    assert loose.depth < tight.depth or (kind == "power" and loose.depth == tight.depth)
    for found in (tight, loose):
        assert 1 < true_error(d, found) / optimum * (1 + 1e-6) <= found.certificate
    assert loose.certificate <= 1.2


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_bound_on_the_excess_holds_even_for_spaces_that_are_far_from_converged(kind: str, depth: int) -> None:
    """Whatever norm outside the space the proof allows for, true or not needed: the sums of the true values obey it."""
    d, s = matrix(kind, 360, 901), spectrum(kind, 360, 901)
    operator = krylov.Operator(d)
    space = krylov.Krylov(operator, 20, 1, "m")
    for _ in range(depth):
        space.deepen()
    ritz = space.ritz()
    true = (s * operator.scale) ** 2
    outside = d.double() * operator.scale
    q = torch.linalg.qr(space.q.double())[0]
    outside = outside - q @ (q.T @ outside)
    mu = float(torch.linalg.matrix_norm(outside, 2)) ** 2
    gained = (true[:16].cumsum(0) - ritz.theta[:16].cumsum(0)).clamp(min=0)
    assert float(torch.linalg.matrix_norm(outside)) ** 2 <= ritz.missed2
    tried = 0
    for enough in (1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0):
        proof = ritz.proof(16, enough, mu)
        if proof is not None:
            tried += 1
            assert proof[0] >= mu * (1 - 1e-9) and float(proof[1][-1]) <= enough * (1 + 1e-9)
            assert bool((gained <= proof[1][1:] + 1e-6).all())
    assert tried
    if depth == 0 and kind == "noise":
        assert float(gained[-1]) > 1e-3  # the bound had something to say


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_probes_bound_the_norm_outside_the_space_from_above(kind: str) -> None:
    d = matrix(kind, 360, 901)
    operator = krylov.Operator(d)
    for seed in range(8):
        space = krylov.Krylov(operator, 20, seed, "m")
        q = torch.linalg.qr(space.q.double())[0]
        outside = d.double() - q @ (q.T @ d.double())
        mu = (float(torch.linalg.matrix_norm(outside, 2)) * operator.scale) ** 2
        probes = krylov.Probes(space)
        bounds = [probes.step() for _ in range(8)]
        assert all(bound >= mu * (1 - 1e-5) for bound in bounds)
        assert bounds == sorted(bounds, reverse=True)
        assert probes.reached <= mu * (1 + 1e-5) + 1e-12
        assert bounds[-1] <= 1.3 * mu + 1e-11


def test_more_rank_than_the_matrix_has_gives_back_the_matrix() -> None:
    d = torch.randn(23, 41, generator=generator(1))
    for x in (d, d.T):
        found = extract(x, 500)
        assert found.rank == 23 and found.method == "gram" and found.certificate == 1
        assert true_error(x, found) <= 2e-6 * found.norm


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (2, 3), (500, 1000)], ids=str)
def test_exact_low_rank_comes_back_at_its_rank(shape: tuple[int, int]) -> None:
    g = generator(2, *shape)
    true = min(3, *shape)
    d = torch.randn(shape[0], true, generator=g) @ torch.randn(true, shape[1], generator=g)
    found = extract(d, 16)
    assert found.rank == true
    assert true_error(d, found) <= 1e-6 * found.norm


def test_nothing_changed_gives_rank_zero() -> None:
    for rule in ({"rank": 8}, {"energy": 0.9}, {"floor": 1e-3}):
        found = extract(torch.zeros(300, 200), **rule)  # type: ignore[arg-type]
        assert (found.rank, found.method, found.error, found.energy) == (0, "zero", 0.0, 1.0)
        assert found.B.shape == (300, 0) and found.A.shape == (0, 200)
    asked = extract(matrix("power", 448, 448), 0)
    assert asked.rank == 0 and asked.error == 1.0 and asked.norm > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_refused(value: float) -> None:
    d = torch.ones(40, 30)
    d[17, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        extract(d, 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        extract(Blocks(d, 7), 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rank": -1},
        {"energy": 0.0},
        {"energy": 1.1},
        {"rank": 1, "floor": -1.0},
        {"rank": 1, "floor": math.nan},
        {"rank": 1, "tolerance": 1.0},
    ],
    ids=str,
)
def test_senseless_requests_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        extract(torch.ones(4, 4), **arguments)  # type: ignore[arg-type]


def test_only_matrices_are_taken_and_blocks_must_cover_them() -> None:
    with pytest.raises(ValueError, match="matrix"):
        extract(torch.ones(2, 3, 4), 1)
    with pytest.raises(ValueError, match="matrix"):
        extract(torch.ones(0, 4), 1)
    short = Blocks(torch.ones(9, 4), 3)
    short.shape = (10, 4)
    with pytest.raises(ValueError, match="9 rows"):
        extract(short, 1)
    narrow = Blocks(torch.ones(9, 4), 3)
    narrow.shape = (9, 5)
    with pytest.raises(ValueError, match="not the next"):
        extract(narrow, 1)


@pytest.mark.parametrize("kind", ["power", "exponential", "noise"])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99, 1.0])
def test_energy_keeps_the_fewest_triplets_that_hold_the_share(kind: str, share: float) -> None:
    d, s = matrix(kind, 360, 901), spectrum(kind, 360, 901)
    sums = (s**2).cumsum(0) / (s**2).sum()
    fewest = int((sums < share).sum()) + 1
    found = extract(d, energy=share)
    assert found.energy >= share - 1e-6
    # Where the share is everything, what fp32 cannot hold is no part of it.
    assert found.rank == fewest or (share == 1.0 and found.rank <= fewest and found.error < 1e-6)
    assert found.certificate <= 1.001


def test_energy_widens_the_space_it_has() -> None:
    d, s = matrix("exponential", 448, 448), spectrum("exponential", 448, 448)
    found = extract(d, energy=0.75)
    assert found.method == "krylov" and found.depth > krylov_depth(d)
    assert found.rank == int(((s**2).cumsum(0) / (s**2).sum() < 0.75).sum()) + 1 > 24


def krylov_depth(d: Tensor) -> int:
    return extract(d, 4).depth


def test_energy_and_rank_together_take_the_smaller() -> None:
    d = matrix("exponential", 448, 448)
    assert extract(d, 5, energy=0.75).rank == 5
    assert extract(d, 100, energy=0.05).rank == extract(d, energy=0.05).rank < 5


@pytest.mark.parametrize("kind", SPECTRA)
def test_cutting_later_is_as_good_as_asking_for_less(kind: str) -> None:
    """What a budget over many modules needs: the leading triplets first, the ranks afterwards."""
    d, s = matrix(kind, 360, 901), spectrum(kind, 360, 901)
    whole = extract(d, 32)
    norm = float(torch.linalg.vector_norm(s))
    for rank in (0, 1, 7, 15, 31, 32, 40):
        cut = whole.cut(rank)
        assert cut.rank == min(rank, whole.rank)
        assert cut.B.shape == (360, cut.rank) and torch.equal(cut.singular_values, whole.singular_values[:rank])
        optimum = float(torch.linalg.vector_norm(s[cut.rank :]))
        error = true_error(d, cut)
        assert error == pytest.approx(cut.error * norm, rel=2e-3, abs=1e-6 * norm)
        assert error <= cut.certificate * optimum * (1 + 1e-5) + 1e-6 * norm
        assert cut.certificate <= 1.01
    with pytest.raises(ValueError):
        whole.cut(-1)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 2.9e-4), (torch.bfloat16, 2.4e-3)], ids=str)
def test_what_storage_rounds_off_is_part_of_the_error(dtype: torch.dtype, expected: float) -> None:
    d, s = matrix("low rank", 448, 448), spectrum("low rank", 448, 448)
    found = extract(d, 16, dtype=dtype)
    norm = float(torch.linalg.vector_norm(s))
    assert found.B.dtype == found.A.dtype == dtype
    assert found.truncation < 1e-6
    assert found.rounding == pytest.approx(expected, rel=0.2)
    assert found.error == pytest.approx(true_error(d, found) / norm, rel=1e-3)
    noisy = extract(matrix("power", 448, 448), 16, dtype=dtype)
    assert noisy.error == pytest.approx(true_error(matrix("power", 448, 448), noisy) / noisy.norm, rel=1e-5)
    assert extract(d, 16).rounding < 1e-7


def test_both_factors_carry_the_root_of_the_singular_values() -> None:
    found = extract(matrix("power", 360, 901), 16)
    root = found.singular_values.sqrt().float()
    assert torch.allclose(torch.linalg.vector_norm(found.B, dim=0), root, rtol=1e-5)
    assert torch.allclose(torch.linalg.vector_norm(found.A, dim=1), root, rtol=1e-5)


def test_values_too_large_for_the_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        extract(torch.full((8, 8), 1e12), 1, dtype=torch.float16)


@pytest.mark.parametrize("shape", [(448, 448), (811, 333)], ids=str)
def test_the_largest_entry_of_each_column_is_positive(shape: tuple[int, int]) -> None:
    for rank in (4, 128):
        b = extract(matrix("power", *shape), rank).B
        assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_changes_nothing_but_the_scale(scale: float) -> None:
    d = matrix("power", 360, 901)
    one, other = extract(d, 16), extract(d * scale, 16)
    assert other.certificate == pytest.approx(one.certificate, abs=1e-3)
    assert other.truncation == pytest.approx(one.truncation, rel=1e-3)
    assert torch.allclose(other.singular_values / scale, one.singular_values, rtol=1e-3)


@pytest.mark.parametrize(("kind", "rank"), [("power", 16), ("noise", 4), ("power", 128)])
def test_the_same_bytes_from_any_block_size_and_number_of_threads(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krylov, "CHUNK", 64 * 901)
    d = matrix(kind, 360, 901)
    whole = extract(d, rank, seed=3, module="a")
    assert same(whole, extract(d, rank, seed=3, module="a"))
    for height, hold in itertools.product((1, 50, 360), (krylov.HOLD, 0)):
        assert same(whole, extract(Blocks(d, height), rank, seed=3, module="a", hold=hold))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same(whole, extract(d, rank, seed=3, module="a"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_global_generators_are_neither_used_nor_moved() -> None:
    d = matrix("power", 360, 901)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    first = extract(d, 8)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, extract(d, 8))


def test_seed_and_module_choose_the_start() -> None:
    d = matrix("power", 360, 901)
    results = [extract(d, 8, seed=seed, module=module) for seed, module in ((0, "a"), (1, "a"), (0, "b"))]
    for x, y in itertools.combinations(results, 2):
        assert not torch.equal(x.B, y.B)
        assert torch.allclose(x.B, y.B, atol=1e-2)
    blocks = [krylov.gaussian(0, "a", stream, 30, 20) for stream in (1, 2)]
    assert not np.array_equal(*blocks)
    assert abs(float(np.stack(blocks).mean())) < 0.1 and abs(float(np.stack(blocks).std()) - 1) < 0.1


def test_a_delta_too_large_to_hold_is_read_again_and_again_others_once() -> None:
    held, streamed = Blocks(matrix("power", 360, 901), 100), Blocks(matrix("power", 360, 901), 100)
    extract(held, 8)
    extract(streamed, 8, hold=0)
    assert held.reads == 1 < streamed.reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dense_deltas_of_any_float_dtype(dtype: torch.dtype) -> None:
    d = matrix("power", 360, 901).to(dtype)
    assert same(extract(d, 8), extract(d.float(), 8))
    assert d.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("change", "within"), [(0.3, 0.03), (0.03, 0.03), (0.003, 0.05), (0.0015, 0.15)])
def test_the_noise_floor_is_the_largest_singular_value_of_the_rounding(
    dtype: torch.dtype, change: float, within: float
) -> None:
    change *= 1 if dtype == torch.bfloat16 else 1 / 8  # in steps of the format
    g = generator(5)
    base = (0.02 * torch.randn(700, 500, generator=g)).to(dtype)
    exact = base.double() + change * 0.02 * torch.randn(700, 500, generator=g, dtype=torch.float64)
    tuned = exact.float().to(dtype)
    true = float(torch.linalg.matrix_norm(tuned.double() - exact, 2))
    assert noise.floor(tuned, base=base) == pytest.approx(true, rel=within)
    assert noise.floor(tuned) == pytest.approx(true, rel=0.03 if within == 0.03 else 0.6)
    assert noise.floor(tuned) >= noise.floor(tuned, base=base)
    blocks, before = ([x[:300].float(), x[300:].float()] for x in (tuned, base))
    assert noise.floor(blocks, dtype) == pytest.approx(noise.floor(tuned))
    assert noise.floor(blocks, dtype, base=before) == pytest.approx(noise.floor(tuned, base=base))


def test_nothing_moved_has_no_noise_and_other_dtypes_have_no_floor() -> None:
    same_weights = torch.ones(4, 4, dtype=torch.bfloat16)
    assert noise.floor(same_weights, base=same_weights) == 0
    assert noise.floor(torch.zeros(0, 4, dtype=torch.bfloat16)) == 0
    with pytest.raises(ValueError):
        noise.floor(torch.ones(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError):
        noise.floor([same_weights], torch.bfloat16, base=[])


def test_steps_of_small_numbers_are_those_of_the_smallest_normal_one() -> None:
    tiny = torch.full((4, 4), 2.0**-20, dtype=torch.float16)
    zero = torch.zeros(4, 4, dtype=torch.float16)
    expected = 2.0**-24 / math.sqrt(12) * 4
    assert noise.floor(tiny) == pytest.approx(expected) == pytest.approx(noise.floor(zero))


def test_a_floor_leaves_the_change_and_cuts_the_rounding() -> None:
    g = generator(6)
    base = (0.02 * torch.randn(448, 448, generator=g)).bfloat16()
    change = 0.001 * torch.randn(448, 5, generator=g) @ torch.randn(5, 448, generator=g)
    tuned = (base.float() + change).bfloat16()
    delta = tuned.float() - base.float()
    level = noise.floor(tuned, base=base)
    found = extract(delta, 64, floor=1.1 * level)
    assert found.rank == 5 and extract(delta, 64).rank == 64
    assert extract(delta, floor=1.1 * level).rank == 5
    assert extract(delta, floor=1e6).rank == 0
