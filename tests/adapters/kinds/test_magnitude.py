"""DoRA over additive kinds, both axes, against LyCORIS, PEFT and the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import applied
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from loramerge.adapters.kinds.base import Context, Dense, Form, Product, RowDelta, Unfit, WholeMap
from loramerge.adapters.kinds.hadamard import Hadamard
from loramerge.adapters.kinds.kronecker import Kronecker
from loramerge.adapters.kinds.lowrank import LowRankPair
from loramerge.adapters.kinds.magnitude import dora, inside, magnitude_axis
from loramerge.adapters.kinds.tucker import Tucker

torch.set_num_threads(1)

EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS takes the epsilon of the magnitude's dtype, float32 in training; so here, though in float64."""
    monkeypatch.setattr(torch, "finfo", lambda dtype: type("finfo", (), {"eps": EPSILON}))


def trained(module_class: type, layer: Any, strength: float, on_output: bool, **config: Any) -> Any:
    module = module_class("x", layer, strength, 2, 1.75, weight_decompose=True, wd_on_out=on_output, **config).double()
    scale = module.dora_scale.detach().double()
    randomise(module)
    module.dora_scale.data = scale * (0.5 + torch.rand_like(scale))
    return module


KINDS: list[tuple[type, Any, dict[str, Any]]] = [
    (LoConModule, LowRankPair, {}),
    (LoConModule, Tucker, {"use_tucker": True}),
    (LohaModule, Hadamard, {}),
    (LokrModule, Kronecker, {"factor": 2}),
]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("on_output", [True, False], ids=["output", "input"])
@pytest.mark.parametrize("module_class, kind, config", KINDS, ids=["locon", "tucker", "loha", "lokr"])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv1d"])
def test_dora_is_what_lycoris_trains(
    name: str, module_class: type, kind: Any, config: dict[str, Any], on_output: bool, strength: float
) -> None:
    if kind is Tucker and name not in ("conv3x3", "conv1d"):
        pytest.skip("no kernel, no core")
    layer = base(name)
    module = trained(module_class, layer, strength, on_output, **config)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(kind, factors_of(module), layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-2


def test_lycoris_as_it_is_in_float32() -> None:
    layer = base("conv3x3", torch.float32)
    module = LoConModule("x", layer, 0.6, 2, 1.75, weight_decompose=True)
    randomise(module)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(LowRankPair, factors_of(module), layer.weight, strength=0.6), truth) < 1e-5


def formula(W: Tensor, delta: Tensor, m: Tensor, strength: float, axis: int) -> Tensor:
    """adapters.md 4.6, on tensors of the weight's own shape; `axis` keeps its length."""
    V = W + delta
    norm = V.pow(2).sum(dim=[d for d in range(V.ndim) if d != axis], keepdim=True).sqrt()
    return V * (strength * (m / (norm + EPSILON) - 1) + 1)


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (6, 4, 3, 3), (6, 4, 3), (5, 1), (1, 5)], ids=str)
def test_the_formula_in_float64(shape: tuple[int, ...], axis: str, strength: float) -> None:
    """OneTrainer writes the input axis by default."""
    W, delta = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    at = 0 if axis == "output" else 1
    stored = [1] * len(shape)
    stored[at] = shape[at]
    m = torch.rand(stored, dtype=torch.float64) + 0.5
    truth = formula(W, delta, m, strength, at).flatten(1)
    form = dora(Dense(delta.flatten(1)), m, Context(shape, weight=strength), axis, "interpolated")
    assert distance(applied(form, W.flatten(1)), truth) < 1e-10


def test_every_form_that_adds_gives_the_same() -> None:
    W, L, R = (torch.randn(s, dtype=torch.float64) for s in ((9, 6), (9, 2), (2, 6)))
    forms: list[Form] = [Product(L, R), Dense(L @ R), RowDelta(lambda r0, r1: L[r0:r1] @ R)]
    for axis, count in (("output", 9), ("input", 6)):
        m = torch.rand(count, dtype=torch.float64)
        for style in ("plain", "interpolated"):
            made = [applied(dora(f, m, Context((9, 6), weight=0.5), axis, style), W) for f in forms]
            assert all(distance(other, made[0]) < 1e-12 for other in made)
            assert distance(made[0], W + L @ R) > 0.1
    with pytest.raises(Unfit):
        dora(WholeMap(lambda W: W), torch.rand(9), Context((9, 6)), "output", "plain")


def test_without_a_delta_the_magnitude_still_acts() -> None:
    W, m = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    found = applied(dora(None, m, Context((4, 6)), "output", "plain"), W)
    torch.testing.assert_close(found.norm(dim=1), m)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square, self.conv, self.line = (base(n) for n in ("wide", "square", "conv3x3", "conv1d"))


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_dora_is_what_peft_trains(scale: float) -> None:
    names = ["linear", "square", "conv", "line"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=names, use_dora=True, init_lora_weights=False)
    model = get_peft_model(Layers(), config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    plain = Layers()
    saved = get_peft_model_state_dict(model)
    for name in names:
        layer = getattr(model.base_model.model, name)
        layer.set_scale("default", scale)
        weight = getattr(plain, name).weight
        A, B = (saved[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        m = saved[f"base_model.model.{name}.lora_magnitude_vector"]
        context = Context(tuple(weight.shape), weight=scale)
        form = LowRankPair.form({"A": A, "B": B}, inside(context, "plain"))
        found = applied(dora(form, m, context, "output", "plain"), weight.flatten(1))
        assert distance(found, seen_weight(layer, weight)) < 1e-10


def test_peft_embeddings_have_their_norms_over_the_vocabulary() -> None:
    torch.manual_seed(5)
    embedding = nn.Embedding(11, 6).double()
    W = embedding.weight.detach().clone()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = embedding

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["e"], use_dora=True)).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.uniform_(0.2, 1.5)
        truth = model.base_model.model.e(torch.arange(11))
    saved = get_peft_model_state_dict(model)
    A, B = (saved[f"base_model.model.e.lora_embedding_{x}"] for x in "AB")
    m = saved["base_model.model.e.lora_magnitude_vector"]
    form = Product(A.T * (8 / 2), B.T)
    found = applied(dora(form, m, Context((11, 6)), "input", "plain"), W)
    assert distance(found, truth) < 1e-10


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("style", ["plain", "interpolated"])
def test_channels_of_zero_stay_zero(axis: str, style: str) -> None:
    W = torch.randn(4, 6)
    W[1], W[:, 2] = 0, 0
    m = torch.rand(4 if axis == "output" else 6) + 0.5
    found = applied(dora(None, m, Context((4, 6)), axis, style), W)
    assert found.isfinite().all() and not found[1].any() and not found[:, 2].any()


def test_a_strength_of_zero_changes_nothing() -> None:
    assert dora(None, torch.rand(4), Context((4, 6), weight=0.0), "output", "interpolated") is None


AXES: list[tuple[tuple[int, ...], tuple[int, ...], str | None]] = [
    ((8, 1), (8, 8), "output"), ((1, 8), (8, 8), "input"), ((8,), (8, 8), "output"), ((8,), (8, 4), "output"),
    ((1, 4, 1, 1), (8, 4, 3, 3), "input"), ((8, 1, 1, 1), (8, 4, 3, 3), "output"), ((1, 4), (1, 4), "input"),
    ((1, 1), (1, 4), "output"), ((1, 1), (4, 1), "input"), ((4, 1), (4, 1), "output"), ((1, 4), (4, 4, 3, 3), "input"),
    ((4,), (8, 4), None), ((8, 4), (8, 4), None), ((1, 8), (8, 4), None), ((3, 1), (8, 4), None), ((), (8, 4), None),
]  # fmt: skip


@pytest.mark.parametrize("magnitude, shape, axis", AXES, ids=str)
def test_shapes_tell_the_axis(magnitude: tuple[int, ...], shape: tuple[int, ...], axis: str | None) -> None:
    assert magnitude_axis(magnitude, shape) == axis


def test_a_magnitude_of_another_length_is_told() -> None:
    apply: Callable[..., Any] = dora
    with pytest.raises(Unfit):
        apply(None, torch.rand(5), Context((4, 6)), "output", "plain")
    with pytest.raises(ValueError):
        apply(None, torch.rand(4), Context((4, 6)), "rows", "plain")
