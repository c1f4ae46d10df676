"""PEFT's `add_weighted_adapter` as the oracle, where its conventions are ours, and for its factor-wise variants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loramerge import algebra
from loramerge.algebra import Stack, Weighted

NAMES = ("first", "second", "third")
LAYERS: dict[str, Any] = {
    "square": lambda: torch.nn.Linear(10, 10, bias=False),
    "wide": lambda: torch.nn.Linear(9, 14, bias=False),
    "conv": lambda: torch.nn.Conv2d(3, 8, 3, bias=False),
}


def model_of(kind: str, ranks: tuple[int, ...], rslora: bool = False) -> PeftModel:
    """A layer with trained-like adapters in float64."""
    torch.manual_seed(21)
    model = None
    for name, rank in zip(NAMES, ranks, strict=False):
        config = LoraConfig(r=rank, lora_alpha=3 * rank + 1, target_modules=["0"], use_rslora=rslora)
        if model is None:
            model = get_peft_model(torch.nn.Sequential(LAYERS[kind]()), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model = model.double()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    return model


def layer(model: PeftModel) -> Any:
    return model.base_model.model[0]


def adapters(model: PeftModel, weights: list[float]) -> list[Weighted]:
    lora = layer(model)
    return [
        Weighted(lora.lora_B[n].weight.data.clone(), lora.lora_A[n].weight.data.clone(), lora.scaling[n], w)
        for n, w in zip(NAMES, weights, strict=False)
    ]


def stack_of(parts: list[Weighted]) -> Stack:
    return Stack([algebra.fold(x.b, x.a, scale=x.scale, weight=x.weight) for x in parts])


def combined(model: PeftModel, weights: list[float], kind: str, **settings: Any) -> torch.Tensor:
    model.add_weighted_adapter(list(NAMES[: len(weights)]), weights, "out", combination_type=kind, **settings)
    # The result inherits use_rslora with alpha = rank: peft 0.21.2 scales it by sqrt(rank) and not by 1.
    return layer(model).get_delta_weight("out").detach().flatten(1) / layer(model).scaling["out"]


def near(got: algebra.Update, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    """PEFT keeps weights in float32."""
    error = torch.linalg.vector_norm(got.dense() - wanted) / torch.linalg.vector_norm(wanted)
    assert float(error) < tolerance


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rslora", [False, True])
def test_linear_is_their_cat(kind: str, rslora: bool) -> None:
    model = model_of(kind, (4, 2, 1), rslora)
    weights = [0.7, -0.5, 2.0]
    stack = stack_of(adapters(model, weights))
    wanted = combined(model, weights, "cat")
    near(algebra.linear(stack), wanted)
    near(algebra.cat(stack), wanted)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_linear_cut_to_a_rank_is_their_svd(kind: str, rank: int) -> None:
    model = model_of(kind, (4, 2))
    weights = [0.7, -0.5]
    stack = stack_of(adapters(model, weights))
    near(algebra.linear(stack, algebra.fixed(rank)), combined(model, weights, "svd", svd_rank=rank))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_is_theirs_on_products_where_no_weight_is_given(density: float) -> None:
    model = model_of("wide", (4, 2, 3))
    stack = stack_of(adapters(model, [1.0, 1.0, 1.0]))
    wanted = combined(model, [1.0, 1.0, 1.0], "ties_svd", density=density, svd_rank=9)
    near(algebra.ties(stack, density), wanted)
    near(algebra.ties(stack, density).factors(algebra.fixed(9)), wanted)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_magnitude_is_theirs_on_products(density: float) -> None:
    model = model_of("square", (4, 2))
    stack = stack_of(adapters(model, [0.7, -0.5]))
    near(
        algebra.magnitude(stack, density),
        combined(model, [0.7, -0.5], "magnitude_prune_svd", density=density, svd_rank=10),
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_one_by_one(kind: str) -> None:
    weights = [0.7, -0.5, 1.2]
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "linear": (algebra.factor_linear, {}),
        "magnitude_prune": (lambda x: algebra.factor_magnitude(x, 0.4), {"density": 0.4}),
        "ties": (lambda x: algebra.factor_ties(x, 0.4), {"density": 0.4}),
        "ties by count": (
            lambda x: algebra.factor_ties(x, 0.4, majority="frequency"),
            {"density": 0.4, "majority_sign_method": "frequency"},
        ),
    }
    for name, (method, settings) in calls.items():
        model = model_of(kind, (3, 3, 3))
        parts = adapters(model, weights)
        true = algebra.linear(stack_of(parts)).dense()
        wanted = combined(model, weights, name.split()[0], **settings)
        got = method(parts)
        near(got.factors, wanted)
        error = float(torch.linalg.vector_norm(wanted - true) / torch.linalg.vector_norm(true))
        assert got.error == pytest.approx(error, rel=1e-5)
        assert got.error > 0.3


@pytest.mark.parametrize("elect", [False, True])
def test_random_factors_one_by_one_without_dropping(elect: bool) -> None:
    """With density 1 nothing is random on either side."""
    weights = [0.7, -0.5]
    model = model_of("wide", (3, 3))
    parts = adapters(model, weights)
    wanted = combined(model, weights, "dare_ties" if elect else "dare_linear", density=1.0)
    near(algebra.factor_dare(parts, 1.0, elect=elect).factors, wanted)


def test_random_factors_keep_about_their_share_and_their_seed() -> None:
    torch.manual_seed(22)
    part = Weighted(torch.randn(200, 4), torch.randn(4, 300))
    got = algebra.factor_dare([part], 0.3, seed=1).factors
    kept = got.a != 0
    assert 0.25 < float(kept.double().mean()) < 0.35
    assert torch.allclose(got.a[kept], part.a[kept].double() / 0.3)
    assert torch.equal(got.a, algebra.factor_dare([part], 0.3, seed=1).factors.a)
    assert not torch.equal(got.a, algebra.factor_dare([part], 0.3, seed=2).factors.a)
    assert not torch.equal(got.b[:200, 0] != 0, got.a[0, :200] != 0)


def test_factors_one_by_one_depend_on_how_an_update_is_factored() -> None:
    torch.manual_seed(23)
    one = Weighted(torch.randn(8, 2, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64))
    two = Weighted(torch.randn(8, 2, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64), weight=0.5)
    turned = Weighted(one.b * 3, one.a / 3)
    assert torch.allclose(one.b @ one.a, turned.b @ turned.a)
    before, after = algebra.factor_linear([one, two]), algebra.factor_linear([turned, two])
    assert algebra.relative_error(after.factors, before.factors) > 0.1
    assert algebra.factor_linear([one]).error < 1e-12


def test_factors_of_unequal_ranks_or_impossible_settings_are_refused() -> None:
    one, two = Weighted(torch.ones(4, 2), torch.ones(2, 3)), Weighted(torch.ones(4, 1), torch.ones(1, 3))
    for call in (
        lambda: algebra.factor_linear([one, two]),
        lambda: algebra.factor_linear([]),
        lambda: algebra.factor_ties([one], 0.0),
        lambda: algebra.factor_dare([one], 0.0),
        lambda: algebra.factor_magnitude([one], 1.1),
        lambda: algebra.factor_ties([one], 0.5, majority="all"),
    ):
        with pytest.raises(ValueError):
            call()
