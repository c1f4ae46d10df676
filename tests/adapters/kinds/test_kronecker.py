"""LoKr against LyCORIS's and PEFT's training forward passes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from lycoris.modules.lokr import LokrModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight
from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from loramerge.adapters.kinds.base import Context, Unfit
from loramerge.adapters.kinds.kronecker import Kronecker

torch.set_num_threads(1)

LYCORIS = {"full-scale-one": True}
PEFT = {"kron-trailing-axes": True}


def trained(layer: Any, **config: Any) -> LokrModule:
    module = LokrModule("x", layer, **config).double()
    randomise(module)
    return module


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("both", [False, True], ids=["w1", "w1_a w1_b"])
@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize(
    "name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv3x5", "conv1d", "conv3d", "large", "large-conv"]
)
def test_lokr_is_what_lycoris_trains(name: str, tucker: bool, both: bool, rank: int, strength: float) -> None:
    layer = base(name)
    module = trained(
        layer, lora_dim=rank, alpha=1.75, use_tucker=tucker, decompose_both=both, multiplier=strength, factor=-1
    )
    truth = seen_weight(module.forward, layer.weight)
    found = merged(Kronecker, factors_of(module), layer.weight, strength=strength, settings=LYCORIS)
    assert distance(found, truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-4


def test_all_ways_to_store_the_factors_are_met() -> None:
    met = set()
    for both, rank, tucker in product([False, True], [2, 99], [False, True]):
        module = trained(base("large-conv"), lora_dim=rank, use_tucker=tucker, decompose_both=both)
        met.add(" ".join(sorted(factors_of(module).keys() - {"alpha"})))
    assert met == {"w1 w2", "w1 w2_a w2_b", "t2 w1 w2_a w2_b", "w1_a w1_b w2_a w2_b", "t2 w1_a w1_b w2_a w2_b"}


@pytest.mark.parametrize("name", ["square", "wide", "conv3x3", "conv1d", "conv3d"])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_two_whole_factors_have_no_scale_in_lycoris(name: str, unbalanced: bool) -> None:
    layer = base(name)
    module = trained(layer, lora_dim=3, alpha=7, full_matrix=True, unbalanced_factorization=unbalanced)
    factors = factors_of(module)
    assert factors.keys() == {"w1", "w2", "alpha"}
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(Kronecker, factors, layer.weight, settings=LYCORIS), truth) < 1e-10


def test_w1_whole_and_w2_low_rank_is_scaled() -> None:
    shapes = {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)}
    assert Kronecker.options(shapes, LYCORIS, (8, 15)) == {"scaled": True, "trailing": False}
    assert Kronecker.options({"w1": (2, 3), "w2": (4, 5)}, {}, (8, 15))["scaled"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square, self.odd = base("wide"), base("square"), base("odd")
        self.conv, self.point, self.line = base("conv3x3"), base("conv1x1"), base("conv1d")
        self.large, self.large_conv = base("large"), base("large-conv")


# Rank 1 with cores is left out: PEFT 0.21.2 itself fails on it, in torch.kron.
@pytest.mark.parametrize("rank, effective", [(1, False), (2, False), (9, False), (2, True), (9, True)])
@pytest.mark.parametrize("both", [False, True])
def test_lokr_is_what_peft_trains(effective: bool, both: bool, rank: int) -> None:
    names = ["linear", "square", "odd", "conv", "point", "large", "large_conv", "line"]
    plain = Layers()
    config = LoKrConfig(
        r=rank, alpha=0.75 * rank, target_modules=names, init_weights=False, decompose_factor=-1,
        use_effective_conv2d=effective, decompose_both=both,
    )  # fmt: skip
    model = get_peft_model(Layers(), config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.normal_(0, 0.5)
    saved = get_peft_model_state_dict(model)
    for name in names:
        stem = f"base_model.model.{name}.lokr_"
        factors = {k.removeprefix(stem): v for k, v in saved.items() if k.startswith(stem)}
        weight = getattr(plain, name).weight
        truth = seen_weight(getattr(model.base_model.model, name), weight)
        shapes = {k: tuple(v.shape) for k, v in factors.items()}
        options = Kronecker.options(shapes, PEFT, tuple(weight.shape))
        form = Kronecker.form(factors, Context(tuple(weight.shape), 0.75, 1.0, options))
        assert form is not None
        # The scale is alpha over the config's r, also where no factor has a rank.
        assert distance(weight.flatten(1) + form.rows(0, len(weight)), truth) < 1e-10
        assert Kronecker.rank(shapes) in (rank, None)
    if rank == 9:
        assert {"w1", "w2"} == factors.keys() and factors["w2"].ndim == 3 and options["trailing"]


def test_releases_that_ignored_alpha() -> None:
    shapes = {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 5)}
    old = {"unscaled-before": "0.14.0"}
    scaled = {v: Kronecker.options(shapes, {**old, "version": v}, (8, 15))["scaled"] for v in
              ("0.13.2", "0.9.0", "0.14.0", "0.14.1.dev0", "1.0", "0.18.0")}  # fmt: skip
    assert scaled == {
        "0.13.2": False, "0.9.0": False, "0.14.0": True, "0.14.1.dev0": True, "1.0": True, "0.18.0": True,
    }  # fmt: skip
    assert Kronecker.options(shapes, old, (8, 15))["scaled"]


GOOD = {"w1": (2, 2), "w2_a": (4, 2), "w2_b": (2, 18)}


@pytest.mark.parametrize(
    "shapes",
    [
        {"w1": (2, 2)},
        {"w2": (4, 18)},
        {"w1": (2, 2), "w2_a": (4, 2)},
        {**GOOD, "w2": (4, 18)},
        {**GOOD, "w1_a": (2, 1)},
        {**GOOD, "w1": (2, 3)},
        {**GOOD, "w1": (4,)},
        {**GOOD, "w2_b": (3, 18)},
        {**GOOD, "w2_b": ()},
        {"w1": (2, 2), "w2": (4, 2, 9, 1)},
        {"w1": (2, 2), "w2": (4,)},
        {"w1": (2, 2), "t2": (2, 2, 3, 3), "w2_a": (3, 4), "w2_b": (2, 2)},
        {"w1": (2, 2), "t2": (2, 2, 3, 3), "w2_a": (2,), "w2_b": (2, 2)},
        {"w1_a": (2, 1), "w2": (4, 18)},
    ],
    ids=str,
)
def test_factors_that_do_not_fit_are_told(shapes: dict[str, tuple[int, ...]]) -> None:
    Kronecker.options(GOOD, {}, (8, 4, 3, 3))
    Kronecker.out_in(shapes)
    with pytest.raises(Unfit):
        Kronecker.options(shapes, {}, (8, 4, 3, 3))


def test_nothing_where_a_factor_is_zero() -> None:
    factors = {"w1": torch.randn(2, 2), "w2": torch.zeros(3, 3)}
    assert Kronecker.form(factors, Context((6, 6), options={"scaled": True, "trailing": False})) is None
