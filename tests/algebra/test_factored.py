"""Factors of other forms equal what the libraries that train them build."""

from __future__ import annotations

import pytest
import torch
from algebra_dense import Case
from lycoris.functional import locon, loha, lokr

from loramerge import algebra
from loramerge.algebra import Factors


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("m,n,r,q", [(6, 6, 2, 2), (5, 9, 1, 1), (7, 3, 4, 2)])
def test_hadamard(m: int, n: int, r: int, q: int) -> None:
    torch.manual_seed(0)
    b1, a1, b2, a2 = normal(m, r), normal(r, n), normal(m, q), normal(q, n)
    got = algebra.hadamard(Factors(b1, a1), Factors(b2, a2))
    assert got.rank == r * q
    assert torch.allclose(got.dense(), (b1 @ a1) * (b2 @ a2), atol=1e-12)
    if r == q:
        assert torch.allclose(got.dense(), loha.diff_weight(a1, b1, a2, b2, None, None, gamma=1.0), atol=1e-12)


def test_hadamard_of_tucker_products_of_a_convolution() -> None:
    torch.manual_seed(1)
    m, n, r = 6, 5, 3
    t1, t2 = normal(r, r, 3, 2), normal(r, r, 3, 2)
    w1d, w1u, w2d, w2u = normal(r, n), normal(r, m), normal(r, n), normal(r, m)
    got = algebra.hadamard(algebra.tucker(w1u.T, t1, w1d), algebra.tucker(w2u.T, t2, w2d))
    wanted = loha.diff_weight(w1d, w1u, w2d, w2u, t1, t2, gamma=1.0)
    assert wanted.shape == (m, n, 3, 2) and got.rank == r * r
    assert torch.allclose(got.dense(), wanted.flatten(1), atol=1e-12)


def test_a_convolution_with_a_core() -> None:
    torch.manual_seed(2)
    down, up, mid = normal(2, 5, 1, 1), normal(7, 3, 1, 1), normal(3, 2, 3, 3)
    got = algebra.tucker(up, mid, down)
    x = normal(1, 5, 6, 6)
    wanted = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    assert got.rank == 3
    assert torch.allclose(torch.conv2d(x, got.dense().view(7, 5, 3, 3)), wanted, atol=1e-12)
    square = normal(3, 3, 3, 3)
    left, right = normal(7, 3, 1, 1), normal(3, 5, 1, 1)
    stored = locon.diff_weight(right, left, square, gamma=1.0)
    assert torch.allclose(algebra.tucker(left, square, right).dense(), stored.flatten(1), atol=1e-12)


@pytest.mark.parametrize("low1", [False, True])
@pytest.mark.parametrize("low2", [False, True])
@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((3, 3), (3, 3)), ((1, 4), (5, 2)), ((4, 1), (2, 5))])
def test_kronecker(low1: bool, low2: bool, shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    torch.manual_seed(3)
    (p1, q1), (p2, q2) = shapes
    first = (normal(p1, 1), normal(1, q1)) if low1 else normal(p1, q1)
    second = (normal(p2, 2), normal(2, q2)) if low2 else normal(p2, q2)
    got = algebra.kronecker(first, second)
    whole = [x[0] @ x[1] if isinstance(x, tuple) else x for x in (first, second)]
    assert torch.allclose(got.dense(), lokr.make_kron(*whole, 1), atol=1e-12)
    assert got.rank == (1 if low1 else min(p1, q1)) * (2 if low2 else min(p2, q2))


def test_kronecker_of_a_convolution() -> None:
    torch.manual_seed(4)
    w1, w2 = normal(2, 3), normal(4, 5, 3, 3)
    wanted = lokr.make_kron(w1, w2, 1)
    assert wanted.shape == (8, 15, 3, 3)
    assert torch.allclose(algebra.kronecker(w1, w2).dense(), wanted.flatten(1), atol=1e-12)


def test_fused_modules_split_and_join() -> None:
    q, k, v = (Case(5 + i, m, 6, (2,), (1.0,), (1.0,)).folded()[0] for i, m in enumerate((4, 2, 3)))
    fused = algebra.fuse_rows([q, k, v])
    assert fused.rank == 6
    assert torch.allclose(fused.dense(), torch.cat([x.dense() for x in (q, k, v)]), atol=1e-14)
    parts = algebra.split_rows(fused, [4, 2, 3])
    for part, wanted in zip(parts, (q, k, v), strict=True):
        assert torch.allclose(part.dense(), wanted.dense(), atol=1e-14)
        assert part.factors().rank == 2
    shared = algebra.split_rows(q, [1, 3])
    assert algebra.fuse_rows(shared).rank == 2
    assert torch.equal(algebra.fuse_rows(shared).dense(), q.dense())


def test_a_transpose_is_that_of_the_product() -> None:
    [f] = Case(9, 6, 4, (2,), (1.0,), (0.5,)).folded()
    assert torch.allclose(f.transposed().dense(), f.dense().T, atol=1e-14)


def test_forms_that_do_not_fit_are_refused() -> None:
    f, g = Case(9, 6, 4, (2,), (1.0,), (1.0,)).folded()[0], Case(9, 5, 3, (2,), (1.0,), (1.0,)).folded()[0]
    for call in (
        lambda: algebra.hadamard(f, g),
        lambda: algebra.fuse_rows([f, g]),
        lambda: algebra.split_rows(f, [1, 2]),
        lambda: algebra.tucker(normal(4, 2), normal(3, 3, 1, 1), normal(3, 5)),
    ):
        with pytest.raises(ValueError):
            call()


def test_other_kinds_join_in_sums() -> None:
    torch.manual_seed(6)
    product = algebra.hadamard(Factors(normal(6, 2), normal(2, 6)), Factors(normal(6, 2), normal(2, 6)))
    blocks = algebra.kronecker(normal(2, 3), (normal(3, 1), normal(1, 2)))
    plain = Factors(normal(6, 2), normal(2, 6))
    total = algebra.linear(algebra.Stack([product, blocks.scaled(-0.5), plain]))
    assert torch.allclose(total.dense(), product.dense() - 0.5 * blocks.dense() + plain.dense(), atol=1e-12)
