"""The truth about LyCORIS modules: their training forward pass on inputs that show the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from forms import applied
from torch import Tensor, nn

from loramerge.adapters.dialect import dialect_named
from loramerge.adapters.kinds.base import Context, Kind
from loramerge.adapters.kinds.magnitude import dora, inside, magnitude_axis

BASES: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Linear(12, 12),
    "wide": lambda: nn.Linear(20, 12),
    "odd": lambda: nn.Linear(9, 14),
    "conv1x1": lambda: nn.Conv2d(6, 8, 1),
    "conv3x3": lambda: nn.Conv2d(6, 8, 3),
    "conv3x5": lambda: nn.Conv2d(6, 8, (3, 5)),
    "large": lambda: nn.Linear(16, 30),
    "large-conv": lambda: nn.Conv2d(9, 30, 3),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv3d": lambda: nn.Conv3d(4, 6, (3, 1, 3)),
}


def randomise(module: nn.Module, std: float = 0.5) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std)


def base(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A base layer with random weights and a bias."""
    torch.manual_seed(sum(map(ord, name)))
    layer = BASES[name]().to(dtype)
    randomise(layer)
    return layer.requires_grad_(False)


def seen_weight(forward: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """The matrix (out, in * prod(kernel)) of a layer, unpadded and with stride 1, from what it does to unit inputs."""
    cols = prod(weight.shape[1:])
    unit = torch.eye(cols, dtype=weight.dtype).reshape(cols, *weight.shape[1:])
    with torch.no_grad():
        constant = forward(torch.zeros_like(unit[:1]))
        return (forward(unit) - constant).reshape(cols, -1).T


def factors_of(module: nn.Module) -> dict[str, Tensor]:
    """What a LyCORIS module saves, under our names for its factors."""
    dialect = dialect_named("lycoris")
    assert dialect is not None
    saved = {f"x.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    parsed = {key: dialect.parse(key, saved) for key in saved}
    assert all(p.path == "x" and p.kind not in ("plain", "refused") for p in parsed.values()), parsed
    return {p.factor: saved[key] for key, p in parsed.items()}


def merged(
    kind: type[Kind],
    factors: Mapping[str, Tensor],
    weight: Tensor,
    *,
    strength: float = 1.0,
    settings: Mapping[str, Any] | None = None,
    alpha: float | None = None,
) -> Tensor:
    """Our own W' (out, cols), the scale and the DoRA axis found as a merge finds them."""
    known = {name: f for name, f in factors.items() if name in (*kind.required, *kind.optional)}
    shapes = {name: tuple(f.shape) for name, f in known.items()}
    assert set(kind.required) <= known.keys()
    shape = tuple(weight.shape)
    options = kind.options(shapes, settings or {}, shape)
    rank = kind.rank(shapes) if kind.scaled else None
    if alpha is None and "alpha" in factors:
        alpha = float(factors["alpha"])
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    context = Context(shape, scale, strength, options)
    W = weight.detach().flatten(1)
    if "dora-scale" not in factors:
        return applied(kind.form(known, context), W)
    form = kind.form(known, inside(context, "interpolated"))
    axis = magnitude_axis(tuple(factors["dora-scale"].shape), shape)
    assert axis is not None
    return applied(dora(form, factors["dora-scale"], context, axis, "interpolated"), W)


def distance(found: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest element of the truth."""
    assert found.shape == truth.shape
    return float((found - truth).abs().max() / truth.abs().max())
