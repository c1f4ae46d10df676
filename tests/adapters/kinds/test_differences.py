"""Whole differences and replacements, against LyCORIS's training forward pass."""

from __future__ import annotations

import pytest
import torch
from forms import applied
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from lycoris_forms import base, distance, merged, randomise, seen_weight
from torch import nn

from loramerge.adapters.dialect import dialect_named
from loramerge.adapters.kinds.base import Context, Unfit
from loramerge.adapters.kinds.differences import Difference, Replacement

torch.set_num_threads(1)


@pytest.mark.parametrize("strength", [1.0, 0.6, -1.0])
@pytest.mark.parametrize("name", ["square", "odd", "conv3x3", "conv1d"])
def test_full_is_what_lycoris_trains(name: str, strength: float) -> None:
    layer = base(name)
    W, bias = layer.weight.clone(), layer.bias.clone()
    module = FullModule("x", layer, strength).double()
    module.apply_to()
    randomise(module)
    saved = {key: tensor.detach() for key, tensor in module.state_dict().items()}
    assert saved.keys() == {"diff", "diff_b"}
    with torch.no_grad():
        nothing = torch.zeros(1, *W.shape[1:], dtype=W.dtype)
        at_zero = module.forward(nothing).flatten()
    assert distance(merged(Difference, saved, W, strength=strength), seen_weight(module.forward, W)) < 1e-10
    form = Difference.form({"diff": saved["diff_b"]}, Context(tuple(bias.shape), weight=strength))
    assert distance(applied(form, bias[:, None])[:, 0], at_zero) < 1e-10


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_norms_are_what_lycoris_trains(strength: float) -> None:
    torch.manual_seed(3)
    norm = nn.LayerNorm(7).double()
    randomise(norm)
    W, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    module = NormModule("x", norm, strength).double()
    randomise(module)
    context = Context((7,), weight=strength)
    new = [
        applied(Difference.form({"diff": diff.detach()}, context), old[:, None])[:, 0]
        for diff, old in ((module.w_norm, W), (module.b_norm, bias))
    ]
    x = torch.randn(5, 7, dtype=torch.float64)
    assert distance(nn.functional.layer_norm(x, (7,), *new), module.forward(x).detach()) < 1e-10


def test_the_table_sends_every_difference_to_its_parameter() -> None:
    dialect = dialect_named("lycoris")
    assert dialect is not None
    found = {s: dialect.parse(f"x.{s}") for s in ("diff", "diff_b", "w_norm", "b_norm", "diff_m")}
    assert {p.kind for p in found.values()} == {"difference"} and {p.factor for p in found.values()} == {"diff"}
    assert {s: p.leaf for s, p in found.items()} == {
        "diff": "", "diff_b": "bias", "w_norm": "", "b_norm": "bias", "diff_m": "modulation",
    }  # fmt: skip


def test_a_replacement_is_the_value_bit_for_bit() -> None:
    W, value = torch.randn(4, 6), torch.randn(4, 6) * 1e-6
    options = Replacement.options({"value": (4, 6)}, {}, (4, 6))
    assert torch.equal(applied(Replacement.form({"value": value}, Context((4, 6), options=options)), W), value)
    half = applied(Replacement.form({"value": value}, Context((4, 6), weight=0.5)), W)
    torch.testing.assert_close(half, (W + value) / 2)
    assert Replacement.form({"value": value}, Context((4, 6), weight=0.0)) is None


@pytest.mark.parametrize("kind, factor", [(Difference, "diff"), (Replacement, "value")])
def test_shapes_may_differ_in_axes_of_one_only(kind: type[Difference | Replacement], factor: str) -> None:
    for fits, shape in (
        ((4, 6), (4, 6, 1, 1)),
        ((4, 6, 1), (4, 6)),
        ((1, 6), (6,)),
        ((1,), ()),
        ((2, 3, 5), (2, 3, 5)),
    ):
        kind.options({factor: fits}, {}, shape)
    for wrong, shape in (((6, 4), (4, 6)), ((24,), (4, 6)), ((4, 6), (4, 6, 3)), ((6,), (5,))):
        with pytest.raises(Unfit):
            kind.options({factor: wrong}, {}, shape)


def test_a_zero_difference_changes_nothing() -> None:
    assert Difference.form({"diff": torch.zeros(3)}, Context((3,))) is None
    assert Difference.form({"diff": torch.ones(3)}, Context((3,), weight=0.0)) is None
