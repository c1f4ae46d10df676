"""Tucker LoCon against LyCORIS's training forward pass."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight

from loramerge.adapters.kinds.base import Context, Product, Unfit
from loramerge.adapters.kinds.tucker import Tucker

torch.set_num_threads(1)


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["conv3x3", "conv3x5", "conv1d", "conv3d"])
def test_tucker_is_what_lycoris_trains(name: str, rank: int, strength: float) -> None:
    layer = base(name)
    module = LoConModule("x", layer, strength, rank, 1.75, use_tucker=True).double()
    randomise(module)
    factors = factors_of(module)
    assert Tucker.out_in({k: tuple(f.shape) for k, f in factors.items()}) == tuple(layer.weight.flatten(1).shape)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(Tucker, factors, layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


def test_it_is_a_product_of_its_rank() -> None:
    factors = {"A": torch.randn(2, 6, 1, 1), "B": torch.randn(8, 2, 1, 1), "mid": torch.randn(2, 2, 3, 3)}
    form = Tucker.form(factors, Context((8, 6, 3, 3)))
    assert isinstance(form, Product) and form.L.shape == (8, 2) and form.R.shape == (2, 54)


@pytest.mark.parametrize(
    "change", [{"mid": (2, 3, 3, 3)}, {"mid": (2, 2, 3)}, {"A": (2, 5, 1, 1)}, {"B": (8,)}, {"mid": (2,)}, {"A": ()}]
)
def test_factors_that_do_not_fit_are_told(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"A": (2, 6, 1, 1), "B": (8, 2, 1, 1), "mid": (2, 2, 3, 3)}
    assert Tucker.options(shapes, {}, (8, 6, 3, 3)) == {}
    Tucker.out_in(shapes | change)
    with pytest.raises(Unfit):
        Tucker.options(shapes | change, {}, (8, 6, 3, 3))
