"""GLoRA against LyCORIS's training forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight
from torch import Tensor

from loramerge.adapters.kinds.base import Refused, Unfit
from loramerge.adapters.kinds.glora import WeightMap

torch.set_num_threads(1)


def trained(layer: Any, rank: int, strength: float = 1.0) -> GLoRAModule:
    module = GLoRAModule("x", layer, strength, rank, 1.75).double()
    randomise(module)
    return module


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv3x5", "conv1d", "conv3d"])
def test_glora_is_what_lycoris_trains(name: str, rank: int, strength: float) -> None:
    layer = base(name)
    module = trained(layer, rank, strength)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(WeightMap, factors_of(module), layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


def test_a_linear_is_what_the_bypass_trains() -> None:
    """`W(x + A x) + B x`, the other forward pass of LyCORIS, is the same function of a linear."""
    layer = base("wide")
    module = trained(layer, 3)
    truth = seen_weight(lambda x: module.bypass_forward(x), layer.weight)
    assert distance(merged(WeightMap, factors_of(module), layer.weight), truth) < 1e-10


def test_a_core_makes_the_addition_a_tucker_product() -> None:
    """LyCORIS has the formula (`_glora_weight`) but never trains it: its two conditions for `bm` exclude each other."""
    layer = base("conv3x3")
    f = {
        "a1": torch.randn(6, 2, 1, 1), "a2": torch.randn(2, 6, 1, 1), "b1": torch.randn(8, 2, 1, 1),
        "b2": torch.randn(2, 6, 1, 1), "bm": torch.randn(2, 2, 3, 3),
    }  # fmt: skip
    f = {name: factor.double() for name, factor in f.items()}
    from lycoris.modules.glora import _glora_weight

    W = layer.weight
    truth = W + _glora_weight(W, f["a1"], f["a2"], f["b1"], f["b2"], f["bm"], 1.0)
    assert distance(merged(WeightMap, f, W), truth.flatten(1)) < 1e-10


def old(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of early releases."""
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {swap.get(name, name): factor for name, factor in factors.items()}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1"])
def test_the_old_names_are_told_by_their_shapes(name: str, rank: int) -> None:
    layer = base(name)
    module = trained(layer, rank)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(WeightMap, old(factors_of(module)), layer.weight), truth) < 1e-10


def test_all_square_factors_are_refused_unless_the_order_is_said() -> None:
    layer = base("square")
    module = trained(layer, 12)
    factors, truth = factors_of(module), seen_weight(module.forward, layer.weight)
    with pytest.raises(Refused):
        merged(WeightMap, factors, layer.weight)
    assert distance(merged(WeightMap, factors, layer.weight, settings={"factor-order": "new"}), truth) < 1e-10
    assert distance(merged(WeightMap, old(factors), layer.weight, settings={"factor-order": "old"}), truth) < 1e-10


def test_a_rank_larger_than_a_square_weight_is_refused() -> None:
    """Read the old way the same shapes are rank 12 on a 15 x 15 weight, and alpha is divided by another number."""
    layer = base("square")
    with pytest.raises(Refused):
        merged(WeightMap, factors_of(trained(layer, 15)), layer.weight)


@pytest.mark.parametrize("part", ["a", "b"])
def test_half_of_it_may_be_zero(part: str) -> None:
    layer = base("wide")
    module = trained(layer, 2)
    with torch.no_grad():
        getattr(module, f"{part}2").weight.zero_()
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(WeightMap, factors_of(module), layer.weight), truth) < 1e-10


@pytest.mark.parametrize("change", [{"a1": (5, 2)}, {"a2": (3, 6)}, {"b1": (9, 2)}, {"b2": (2, 5)}, {"a1": ()}])
def test_factors_that_do_not_fit_are_told(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}
    assert WeightMap.options(shapes, {}, (8, 6)) == {"old": False}
    with pytest.raises(Unfit):
        WeightMap.options(shapes | change, {}, (8, 6))
