"""Kinds that work on rows give the same for any blocks of rows, and leave what they are given in peace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import applied
from torch import Tensor

from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Context, RowDelta, RowMap, Unfit
from loramerge.adapters.kinds.cayley import block_size, cayley, cayley_series, skew

torch.set_num_threads(1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: list[tuple[str, tuple[int, ...], dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ("input-rotation", (7, 12), {"skew": (4, 3)}, {"neumann": True}),
    ("input-rotation", (7, 12), {"skew": (1, 3)}, {}),
    ("input-rotation", (7, 4, 3), {"skew": (2, 15)}, {"turned-convolutions": True}),
    ("input-rotation", (7, 12), {"embedding-skew": (6, 1)}, {"coft": True, "coft-eps": 0.1}),
    ("input-butterfly", (7, 16), {"blocks": (3, 4, 4, 4), "rows": (7, 1)}, {}),
    ("input-butterfly", (7, 12), {"blocks": (1, 3, 3), "rows": (7, 1)}, {"block-size": 3}),
    ("reflections", (7, 4, 3), {"u": (12, 3)}, {}),
    ("reflections", (7, 12), {"u": (12, 3)}, {"gram-schmidt": True}),
    ("channel-scaling", (7, 12), {"l": (7, 1)}, {}),
    ("channel-scaling", (8, 3, 2), {"l": (1, 12, 1)}, {"feedforward": ["x"]}),
    ("modulation", (7, 4, 3), {"A": (2, 4, 3), "B": (7, 2, 1)}, {}),
    ("modulation", (7, 12), {"embedding-A": (2, 7), "embedding-B": (12, 2)}, {}),
    ("repeated-block", (7, 12), {"block": (5, 7)}, {}),
    ("repeated-block", (8, 12), {"block": (5, 4)}, {"init": "mini"}),
    ("repeated-block", (8, 12), {"block": (2, 4, 4)}, {"init": "bat"}),
]


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(("name", "shape", "factors", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_blocks_of_rows_make_no_difference(
    name: str, shape: tuple[int, ...], factors: dict[str, tuple[int, ...]], settings: dict[str, Any], weight: float
) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    options = kind.options(factors, {**settings, "module": "x"}, shape)
    held = {factor: random(*size) for factor, size in factors.items()}
    kept = {factor: t.clone() for factor, t in held.items()}
    W = random(*shape).flatten(1)
    form = kind.form(held, Context(shape, weight=weight, options=options))
    assert isinstance(form, RowMap | RowDelta)
    changed = applied(form, W)
    assert float((changed - W).norm() / W.norm()) > 1e-2
    assert all(torch.equal(held[factor], kept[factor]) for factor in held)
    full = applied(kind.form(held, Context(shape, options=options)), W)
    torch.testing.assert_close(changed, W + weight * (full - W), rtol=1e-10, atol=1e-12)
    assert kind.form(held, Context(shape, weight=0.0, options=options)) is None


@pytest.mark.parametrize("b", [2, 3, 5])
def test_cayley_turns_and_its_series_comes_near(b: int) -> None:
    Q = skew(0.02 * random(4, b * (b - 1) // 2), b)
    R = cayley(Q)
    torch.testing.assert_close(R @ R.mT, torch.eye(b, dtype=R.dtype).expand_as(R), rtol=0, atol=1e-12)
    errors = [float((cayley_series(Q, terms) - R).norm()) for terms in (2, 4, 6, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-7 * errors[0]


def test_numbers_that_are_no_triangle_are_told() -> None:
    assert [block_size(n) for n in (0, 1, 3, 6, 10)] == [1, 2, 3, 4, 5]
    with pytest.raises(Unfit):
        block_size(4)
