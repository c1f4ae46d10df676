"""LoHa against LyCORIS's and PEFT's training forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight
from peft import LoHaConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from loramerge.adapters.kinds.base import Context, Unfit
from loramerge.adapters.kinds.hadamard import Hadamard

torch.set_num_threads(1)


def trained(layer: Any, **config: Any) -> LohaModule:
    module = LohaModule("x", layer, **config).double()
    randomise(module)
    return module


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv3x5", "conv1d", "conv3d"])
def test_loha_is_what_lycoris_trains(name: str, tucker: bool, rank: int, strength: float) -> None:
    layer = base(name)
    module = trained(layer, lora_dim=rank, alpha=1.75, use_tucker=tucker, multiplier=strength)
    truth = seen_weight(module.forward, layer.weight)
    found = merged(Hadamard, factors_of(module), layer.weight, strength=strength)
    assert distance(found, truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


def test_rslora_of_lycoris_is_in_its_alpha() -> None:
    layer = base("wide")
    module = trained(layer, lora_dim=4, alpha=3, rs_lora=True)
    assert distance(merged(Hadamard, factors_of(module), layer.weight), seen_weight(module, layer.weight)) < 1e-7


def test_a_scalar_is_saved_inside_the_factors() -> None:
    layer = base("odd")
    module = trained(layer, lora_dim=2, alpha=1, use_scalar=True)
    assert "scalar" not in factors_of(module)
    assert distance(merged(Hadamard, factors_of(module), layer.weight), seen_weight(module, layer.weight)) < 1e-10


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square, self.conv, self.point = (
            base("wide"), base("square"), base("conv3x3"), base("conv1x1"),
        )  # fmt: skip
        self.line = base("conv1d")


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("effective", [False, True])
def test_loha_is_what_peft_trains(effective: bool, rank: int) -> None:
    names = ["linear", "square", "conv", "point", "line"]
    plain = Layers()
    # alpha / r must be exact in float32: PEFT rounds it to that before it multiplies.
    config = LoHaConfig(
        r=rank, alpha=0.75 * rank, target_modules=names, use_effective_conv2d=effective, init_weights=False
    )
    model = get_peft_model(Layers(), config).double()
    randomise_adapter(model)
    saved = get_peft_model_state_dict(model)
    for name in names:
        stem = f"base_model.model.{name}.hada_"
        factors = {k.removeprefix(stem): v for k, v in saved.items() if k.startswith(stem)}
        weight = getattr(plain, name).weight
        truth = seen_weight(getattr(model.base_model.model, name), weight)
        assert ("t1" in factors) == (effective and name in ("conv", "line"))
        assert distance(merged(Hadamard, factors, weight, alpha=0.75 * rank), truth) < 1e-10


def randomise_adapter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name:
                parameter.normal_(0, 0.5)


def test_rows_of_zero_change_nothing() -> None:
    factors = {name: torch.randn(4, 4) for name in Hadamard.required} | {"w2_b": torch.zeros(4, 4)}
    assert Hadamard.form(factors, Context((4, 4))) is None
    assert Hadamard.form({n: torch.randn(4, 4) for n in Hadamard.required}, Context((4, 4), scale=0.0)) is None


@pytest.mark.parametrize(
    "change",
    [{"t1": (2, 2, 3, 3)}, {"w1_a": (5, 2)}, {"w2_b": (3, 36)}, {"w2_b": (2, 35)}, {"w1_a": (8,)}, {"w1_b": ()}],
    ids=str,
)
def test_factors_that_do_not_fit_are_told(change: dict[str, tuple[int, ...]]) -> None:
    shapes = {"w1_a": (8, 2), "w1_b": (2, 36), "w2_a": (8, 2), "w2_b": (2, 36)}
    assert Hadamard.options(shapes, {}, (8, 4, 3, 3)) == {}
    with pytest.raises(Unfit):
        Hadamard.options(shapes | change, {}, (8, 4, 3, 3))
    Hadamard.out_in(shapes | change)


def test_factors_tell_the_weight() -> None:
    assert Hadamard.out_in({"w1_a": (8, 2), "w1_b": (2, 36)}) == (8, 36)
    assert Hadamard.out_in({"w1_a": (2, 8), "w1_b": (2, 4), "t1": (2, 2, 3, 3)}) == (8, 36)
