"""What PEFT computes when it combines factors one by one, and how far that is from the weighted sum of updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from loramerge.algebra.combine import cat
from loramerge.algebra.core import Factors, Stack, fold, relative_error
from loramerge.algebra.randomness import stream, uniform


@dataclass(frozen=True, eq=False)
class Weighted:
    """One adapter's module before anything is folded: b (m, r), a (r, n), its scale, the user's weight; `key` as in
    `fold`."""

    b: Tensor
    a: Tensor
    scale: float = 1.0
    weight: float = 1.0
    key: bytes = b""


@dataclass(frozen=True, eq=False)
class FactorWise:
    """The result, and its relative distance from `sum D_i`."""

    factors: Factors
    error: float


def factor_linear(adapters: Sequence[Weighted]) -> FactorWise:
    """PEFT's `linear`: `A = sum sgn(c_i) sqrt|c_i| A_i`, `B = sum sqrt|c_i| B_i`, `c_i = weight scale`.

    The product has cross terms B_i A_j, and changes when an adapter's factors become (B M, M^-1 A). peft 0.21.2,
    `LoraModel.add_weighted_adapter`. All ranks must be equal.
    """
    return _factor_wise(adapters, lambda x, _: x, elect=False)


def factor_magnitude(adapters: Sequence[Weighted], density: float) -> FactorWise:
    """PEFT's `magnitude_prune`: `factor_linear` of factors that keep their `int(density N)` largest entries each."""
    _check(density)
    return _factor_wise(adapters, lambda x, _: _largest(x, density), elect=False)


def factor_ties(adapters: Sequence[Weighted], density: float, *, majority: str = "total") -> FactorWise:
    """PEFT's `ties` on A's and B's separately: trim, elect signs of unweighted entries, mean of those that agree.

    majority: `"total"`, the sign of the sum, or `"frequency"`, of the sum of signs; 0 counts as positive.
    """
    _check(density)
    return _factor_wise(adapters, lambda x, _: _largest(x, density), elect=True, majority=majority)


def factor_dare(
    adapters: Sequence[Weighted],
    density: float,
    *,
    elect: bool = False,
    majority: str = "total",
    seed: int = 0,
    module: str = "",
) -> FactorWise:
    """PEFT's `dare_linear`, with `elect` its `dare_ties`: entries of factors stay with probability `density`.

    What stays is divided by it. PEFT draws from the global generator; here the mask depends on (seed, factor, module),
    see `masks.dare`.
    """
    _check(density)

    def prune(x: Tensor, key: bytes) -> Tensor:
        numbers = uniform(stream(seed, key, module), 0, x.numel()).view(x.shape).to(x.device)
        return x * (numbers < density) / density

    return _factor_wise(adapters, prune, elect=elect, majority=majority)


def _factor_wise(
    adapters: Sequence[Weighted], prune: Callable[[Tensor, bytes], Tensor], *, elect: bool, majority: str = "total"
) -> FactorWise:
    if not adapters or len({x.a.shape[0] for x in adapters}) > 1:
        raise ValueError("factors can be combined one by one only where all ranks are equal")
    folded = [fold(x.b, x.a, scale=x.scale, weight=x.weight, key=x.key) for x in adapters]
    coefficients = [x.scale * x.weight for x in adapters]
    join = _elected(majority) if elect else _summed
    keys = [f.identity for f in folded]
    a = join(
        [prune(x.a.flatten(1).double(), key + b"a") for x, key in zip(adapters, keys, strict=True)],
        [sqrt(abs(c)) * (1 if c >= 0 else -1) for c in coefficients],
    )
    b = join(
        [prune(x.b.flatten(1).double(), key + b"b") for x, key in zip(adapters, keys, strict=True)],
        [sqrt(abs(c)) for c in coefficients],
    )
    result = Factors(b, a)
    return FactorWise(result, relative_error(result, cat(Stack(folded))))


def _summed(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _elected(majority: str) -> Callable[[list[Tensor], list[float]], Tensor]:
    if majority not in ("total", "frequency"):
        raise ValueError(f"no majority {majority!r}: it is total or frequency")

    def join(tensors: list[Tensor], weights: list[float]) -> Tensor:
        stacked = torch.stack(tensors)
        votes = (stacked if majority == "total" else stacked.sign()).sum(0)
        agree = stacked.sign() == torch.where(votes >= 0, 1.0, -1.0)
        scaled = torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)])
        return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)

    return join


def _largest(x: Tensor, density: float) -> Tensor:
    if density == 1:
        return x
    flat = x.flatten()
    places = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view(x.shape)


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, not {density}")
