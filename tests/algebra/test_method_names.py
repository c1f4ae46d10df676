"""Every method of the table is computed by one function that takes just the options of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from loramerge.algebra import methods as calls
from loramerge.algebra.masks import ties
from loramerge.algebra.peft_compat import Weighted
from loramerge.algebra.subspace import svc
from loramerge.errors import UsageError
from loramerge.methods import ALSO, METHODS, OPTIONS, SPACES, chosen, method_named


class Seen(Mapping[str, Any]):
    """Options that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        value = self.values_[key]
        self.asked.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def two() -> list[Weighted]:
    generator = torch.Generator().manual_seed(1)
    return [
        Weighted(torch.randn(7, 2, generator=generator), torch.randn(2, 9, generator=generator), 0.5, weight)
        for weight in (1.0, -0.5)
    ]


def given(name: str) -> dict[str, Any]:
    return {key: 0.5 for key, default in METHODS[name].options.items() if default is None and key != "p"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_all_its_options_and_no_others(name: str) -> None:
    picked = chosen(name, given(name), count=2)
    options = Seen(picked.options)
    made = calls.combined(name, two(), options, module="m")
    assert made.update.shape == (7, 9) and made.update.dense().isfinite().all() and made.update.dense().any()
    assert (made.distance is not None) == METHODS[name].factors
    unused = {"trim"} if "trim" in picked.options else set()  # it decides which thresholds are given
    assert options.asked | unused >= picked.options.keys() - ({"seed"} if name == "knots" else set())
    assert set(calls.ON_UPDATES) | set(calls.THRESHOLDED) | set(calls.FACTOR_WISE) | {"svc"} == METHODS.keys()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.factors])
def test_absent_updates_are_zero(name: str) -> None:
    one = two()[0]
    zero = Weighted(torch.zeros(7, 1), torch.zeros(1, 9))
    options = chosen(name, given(name), count=2).options
    with_none = calls.combined(name, [one, calls.absent((7, 9), one)], options, module="m").update.dense()
    with_zero = calls.combined(name, [one, zero], options, module="m").update.dense()
    limit = 1e-9 * max(float(with_zero.norm()), 1.0)
    if name not in ("iso_cts",):  # whose shares go by ranks
        assert float((with_none - with_zero).norm()) <= limit


def test_a_correction_comes_after_its_method() -> None:
    options = chosen("svc", {"after": "ties", "density": 0.5}, count=2).options
    assert options["space"] == "core"
    made = calls.combined("svc", two(), options).update.dense()
    stack = calls.Stack([calls.fold(w.b, w.a, scale=w.scale, weight=w.weight) for w in two()])
    wanted = svc(ties(stack, 0.5, space="core").factors(), stack, 1.0).dense()
    torch.testing.assert_close(made, wanted)
    for after in ("peft-linear", "svc", "nothing"):
        with pytest.raises(UsageError):
            chosen("svc", {"after": after})


def test_names_are_forgiving_and_options_are_not() -> None:
    for name, wanted in {
        "DARE-TIES": "dare_ties",
        "iso": "iso_c",
        "cat": "linear",
        "model-stock": "model_stock",
    }.items():
        assert method_named(name).name == wanted
    assert set(ALSO.values()) <= METHODS.keys()
    assert set(SPACES) == set(OPTIONS["space"].choices)
    assert all(option in OPTIONS for method in METHODS.values() for option in method.options)
    for name, options in (
        ("ties", {"density": 0}),
        ("ties", {"density": 1.1}),
        ("ties", {"p": 0.5}),
        ("dare", {"p": 1}),
        ("dare", {"seed": 1.5}),
        ("della", {}),
        ("della", {"density": 0.9, "eps": 0.2}),
        ("breadcrumbs", {"density": 0.995}),
        ("slerp", {"t": 2}),
        ("ties", {"trim": "adapter", "space": "core"}),
        ("ties", {"space": "other"}),
        ("linear", {"density": 0.5}),
        ("ties", {"density": float("nan")}),
        ("magnitude", {"density": 0.5, "elect": 3}),
    ):
        with pytest.raises(UsageError):
            chosen(name, options)
    for count in (1, 3):
        with pytest.raises(UsageError):
            chosen("slerp", count=count)
