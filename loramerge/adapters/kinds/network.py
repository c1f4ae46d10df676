"""A small network that reads the weight and writes its update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Refused, Shapes, Unfit, WholeMap

if TYPE_CHECKING:
    from torch import Tensor

_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
_ACTIVATIONS = (
    "relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_python", "gelu_10", *_TANH_GELUS, "quick_gelu", "silu",
    "swish", "mish", "hardswish", "sigmoid", "tanh", "laplace", "sqrtsoftplus", "linear",
)  # fmt: skip


class WeightNetwork:
    """`W' = W + λ s B x`, x a residual network of `x₀ = φ(A W)`: A (r, out), B (out, r) (PEANuT of peft 0.21.2).

    With `encoder.i` Eᵢ and `decoder.i` Dᵢ (r, r), i = 0..n-1: `xᵢ₊₁ = φ(Eᵢ xᵢ)`, then from y₀ = xₙ on
    `yᵢ₊₁ = φ(Dᵢ yᵢ) + xₙ₋₁₋ᵢ`; x is yₙ. Settings `activation` (φ, a name of transformers' ACT2FN) and `scale` (s).
    tuners/peanut/layer.py.
    """

    name: ClassVar[str] = "weight-network"
    required: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ()
    numbered: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None]:
        return shapes["B"][0], None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B = shapes["A"], shapes["B"]
        if len(shape) != 2 or len(A) != 2 or A[1] != shape[0] or A[::-1] != B:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        depth = (len(shapes) - 2) // 2
        inner = [f"{name}.{i}" for name in WeightNetwork.numbered for i in range(depth)]
        if shapes.keys() != {"A", "B", *inner} or any(shapes[name] != (A[0], A[0]) for name in inner):
            raise Unfit(f"its encoders and decoders are not as many ({A[0]}, {A[0]}) matrices each")
        activation = settings.get("activation")
        if activation not in _ACTIVATIONS:
            raise Refused(f"its activation {activation} is not known")
        if settings.get("scale") is None:
            raise Unfit("the config does not say its scaling")
        return {"activation": activation, "scale": float(settings["scale"]), "depth": depth}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        factor = context.options["scale"] * context.weight
        if factor == 0 or not factors["B"].any():
            return None
        act, depth = _activation(context.options["activation"]), context.options["depth"]

        def apply(W: Tensor) -> Tensor:
            x = act(factors["A"] @ W)
            passed = []
            for i in range(depth):
                passed.append(x)
                x = act(factors[f"encoder.{i}"] @ x)
            for i in range(depth):
                x = act(factors[f"decoder.{i}"] @ x) + passed.pop()
            return W.addmm_(factors["B"], x, alpha=factor)

        return WholeMap(apply)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name: transformers 5, activations.py."""
    import torch
    from torch.nn import functional as F

    if name in _TANH_GELUS:
        return lambda x: F.gelu(x, approximate="tanh")
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,
        "gelu": F.gelu,
        "gelu_python": F.gelu,
        "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": F.silu,
        "swish": F.silu,
        "mish": F.mish,
        "hardswish": F.hardswish,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
        "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
        "linear": lambda x: x,
    }
    return table[name]
