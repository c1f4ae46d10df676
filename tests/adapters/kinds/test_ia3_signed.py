"""IA3 of LyCORIS against its training forward pass."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight

from loramerge.adapters.kinds.base import Unfit
from loramerge.adapters.kinds.ia3_signed import SignedScaling

torch.set_num_threads(1)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv1d", "conv3d"])
def test_ia3_is_what_lycoris_trains(name: str, on_input: bool, strength: float) -> None:
    layer = base(name)
    module = IA3Module("x", layer, strength, train_on_input=on_input).double()
    randomise(module)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(SignedScaling, factors_of(module), layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


def test_the_bias_is_left_alone() -> None:
    layer = base("wide")
    module = IA3Module("x", layer, 1.0).double()
    randomise(module)
    zero = torch.zeros(1, 20, dtype=torch.float64)
    assert torch.equal(module.forward(zero), layer(zero)) and layer.bias.any()


def test_the_flag_must_agree_with_the_length() -> None:
    W = torch.randn(4, 6)
    with pytest.raises(Unfit):
        merged(SignedScaling, {"w": torch.randn(4), "on_input": torch.tensor(1)}, W)
    with pytest.raises(Unfit):
        merged(SignedScaling, {"w": torch.randn(5), "on_input": torch.tensor(0)}, W)
    with pytest.raises(Unfit):
        SignedScaling.options({"w": (4,), "on_input": (2,)}, {}, (4, 6))
