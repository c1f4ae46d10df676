"""Diag-OFT and BOFT against LyCORIS's training forward pass, kohya's OFT against its published formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris_forms import base, distance, factors_of, merged, randomise, seen_weight
from torch import Tensor

from loramerge.adapters.kinds.base import Context, Unfit
from loramerge.adapters.kinds.rotations import OutputRotation

torch.set_num_threads(1)

KOHYA = {"zero-limit": "none"}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS inverts in float32, by `.float()`; here it does so in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def trained(module_class: type, layer: Any, dim: int, strength: float = 1.0, **config: Any) -> Any:
    module = module_class("x", layer, strength, dim, **config).double()
    randomise(module, 0.2)
    return module


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("strength", [1.0, 0.625])
@pytest.mark.parametrize("constraint", [0, 0.03125, 100.0], ids=["unlimited", "limited", "loose"])
@pytest.mark.parametrize("rescaled", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("name", ["square", "wide", "odd", "conv1x1", "conv3x3", "conv1d", "conv3d"])
def test_diag_oft_is_what_lycoris_trains(
    name: str, dim: int, rescaled: bool, constraint: float, strength: float
) -> None:
    layer = base(name)
    module = trained(DiagOFTModule, layer, dim, strength, constraint=constraint, rescaled=rescaled)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(OutputRotation, factors_of(module), layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("strength", [1.0, 0.625])
@pytest.mark.parametrize("constraint", [0, 0.03125], ids=["unlimited", "limited"])
@pytest.mark.parametrize("rescaled", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("square", 6),
        ("wide", 6),
        ("odd", 14),
        ("conv1x1", 4),
        ("conv3x3", 2),
        ("conv3x3", 4),
        ("conv1d", 2),
        ("conv3d", 6),
    ],
)
def test_boft_is_what_lycoris_trains(name: str, dim: int, rescaled: bool, constraint: float, strength: float) -> None:
    layer = base(name)
    module = trained(ButterflyOFTModule, layer, dim, strength, constraint=constraint, rescaled=rescaled)
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(OutputRotation, factors_of(module), layer.weight, strength=strength), truth) < 1e-10
    assert distance(truth, layer.weight.flatten(1)) > 1e-3


def test_butterflies_of_several_levels_are_met() -> None:
    sizes = (("square", 6), ("odd", 14), ("conv3x3", 2))
    shapes = {tuple(trained(ButterflyOFTModule, base(n), dim).oft_blocks.shape) for n, dim in sizes}
    assert shapes == {(2, 2, 6, 6), (1, 1, 14, 14), (3, 4, 2, 2)}


def test_lycoris_as_it_is_differs_by_no_more_than_its_float32_inverse() -> None:
    layer = base("wide", torch.float32)
    module = trained(DiagOFTModule, layer, 4).float()
    truth = seen_weight(module.forward, layer.weight)
    assert distance(merged(OutputRotation, factors_of(module), layer.weight), truth) < 1e-6


def kohya(W: Tensor, runs: list[Tensor], alpha: float, multiplier: float) -> Tensor:
    """sd-scripts 48d368f, networks/oft.py and oft_flux.py: every run of rows has its own norm and its own limit."""
    turned = []
    for P, rows in zip(runs, W.split([P.shape[0] * P.shape[1] for P in runs]), strict=True):
        Q = P - P.transpose(1, 2)
        norm = Q.pow(2).sum().sqrt()
        Q = Q * (min(norm, norm.new_tensor(alpha * len(rows))) + 1e-8) / (norm + 1e-8)
        eye = torch.eye(P.shape[-1], dtype=W.dtype)
        M = multiplier * ((eye + Q) @ torch.linalg.inv(eye - Q) - eye) + eye
        turned.append(torch.einsum("knm,knp->kmp", M, rows.reshape(*P.shape[:2], -1)).reshape(rows.shape))
    return torch.cat(turned)


@pytest.mark.parametrize("strength", [1.0, 0.625])
@pytest.mark.parametrize("alpha", [1e-3, 0.02, 50.0])
def test_oft_of_kohya(alpha: float, strength: float) -> None:
    W = base("conv3x3").weight
    blocks = torch.randn(4, 2, 2, dtype=torch.float64)
    factors = {"blocks": blocks, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    truth = kohya(W.flatten(1), [blocks], alpha, strength)
    assert distance(merged(OutputRotation, factors, W, strength=strength, settings=KOHYA), truth) < 1e-10


@pytest.mark.usefixtures("exact")
def test_kohya_and_lycoris_are_one_formula_where_nothing_is_limited() -> None:
    layer = base("wide")
    module = trained(DiagOFTModule, layer, 4, constraint=100.0)
    truth = kohya(layer.weight, [module.oft_blocks.detach()], 100.0, 1.0)
    assert distance(seen_weight(module.forward, layer.weight), truth) < 1e-10


@pytest.mark.parametrize("strength", [1.0, 0.625])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 2, 2, 5)], ids=str)
def test_every_run_of_a_fused_projection_has_its_own_rotation(sizes: tuple[int, ...], strength: float) -> None:
    runs = [torch.randn(3, b, b, dtype=torch.float64) for b in sizes]
    W = torch.randn(3 * sum(sizes), 7, dtype=torch.float64)
    factors = {f"blocks.{i}": P for i, P in enumerate(runs)} | {"alpha": torch.tensor(0.05, dtype=torch.float64)}
    truth = kohya(W, runs, 0.05, strength)
    assert distance(merged(OutputRotation, factors, W, strength=strength, settings=KOHYA), truth) < 1e-10


def test_a_limit_of_zero_is_none_in_one_dialect_and_nothing_in_the_other() -> None:
    factors = {"blocks": torch.randn(4, 3, 3, dtype=torch.float64), "alpha": torch.tensor(0.0)}
    W = torch.randn(12, 5, dtype=torch.float64)
    assert torch.equal(merged(OutputRotation, factors, W, settings=KOHYA), W)
    assert distance(kohya(W, [factors["blocks"]], 0.0, 1.0), W) < 1e-6
    free = merged(OutputRotation, {"blocks": factors["blocks"]}, W)
    assert torch.equal(merged(OutputRotation, factors, W), free) and distance(free, W) > 0.1


def test_rotations_keep_the_norms_of_columns() -> None:
    factors = {"blocks": torch.randn(2, 4, 6, 6, dtype=torch.float64)}
    W = torch.randn(24, 5, dtype=torch.float64)
    torch.testing.assert_close(merged(OutputRotation, factors, W).norm(dim=0), W.norm(dim=0), rtol=1e-12, atol=0)


def test_blocks_without_skew_part_change_nothing() -> None:
    blocks = torch.randn(2, 3, 3)
    context = Context((6, 4), options={"zero-limit": "unlimited"})
    assert OutputRotation.form({"blocks": blocks + blocks.mT}, context) is None
    assert OutputRotation.form({"blocks": blocks}, Context((6, 4), weight=0.0, options=context.options)) is None


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"rescale": (12, 1)},
        {"blocks": (4, 3, 2)},
        {"blocks": (3, 3)},
        {"blocks": (5, 3, 3)},
        {"blocks": (2, 4, 3, 3)},
        {"blocks": (3, 6, 2, 2)},
        {"blocks": (4, 3, 3), "rescale": (11, 1)},
        {"blocks": (4, 3, 3), "blocks.0": (4, 3, 3)},
        {"blocks.0": (2, 3, 3), "blocks.2": (2, 3, 3)},
        {"blocks.1": (4, 3, 3)},
        {"blocks.0": (2, 3, 3)},
    ],
    ids=str,
)
def test_factors_that_do_not_fit_are_told(shapes: dict[str, tuple[int, ...]]) -> None:
    assert OutputRotation.options({"blocks": (4, 3, 3)}, {}, (12, 5)) == {"zero-limit": "unlimited"}
    with pytest.raises(Unfit):
        OutputRotation.options(shapes, {}, (12, 5))
