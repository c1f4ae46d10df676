"""A core between two fixed factors that is a mixture of fixed random matrices, by a few trained numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit
from loramerge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_SAME = 0.02  # how far stored projections may be from those drawn again; 16 bits round by less


class ProjectedCore:
    """`W' = W + λ B (Σᵢ v[i] P[i]) A`: A (r, in), B (out, r), P (u, r, r), v (u,) (Morris et al. 2026, TinyLoRA).

    Of n modules, in the order in which the model has them, number i uses v number `min(i div (n div g), g - 1)`, with
    `g = max(1, round(n (1 - tying)))`. The file does not keep that order. Its P do: those of module i are drawn by a
    generator with the seed `seed + i`, so i is found by drawing them again.
    Settings: `tying`, `seed`, `module-count` (n). peft 0.21.2, tuners/tinylora/layer.py and model.py.
    """

    name: ClassVar[str] = "projected-core"
    required: ClassVar[tuple[str, ...]] = ("A", "B", "P")
    optional: ClassVar[tuple[str, ...]] = ()
    numbered: ClassVar[tuple[str, ...]] = ("v",)
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return shapes["B"][0], prod(shapes["A"][1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B, P = (shapes[name] for name in ProjectedCore.required)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (B[0], A[1]) != shape:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        count, tying, seed = (settings.get(name) for name in ("module-count", "tying", "seed"))
        if not count or tying is None or type(seed) is not int:
            raise Unfit("the config does not say which modules share their numbers")
        groups = max(1, round(count * (1.0 - float(tying))))
        vectors = {name: shapes[name] for name in shapes if name.startswith("v.")}
        if vectors.keys() != {f"v.{i}" for i in range(groups)}:
            raise Unfit(f"{count} modules share {groups} vectors v, and there are {len(vectors)}")
        if len(P) != 3 or P[1:] != (A[0], A[0]) or any(v != (P[0],) for v in vectors.values()):
            raise Unfit(f"P {P} does not fit A {A} and vectors {next(iter(vectors.values()))}")
        return {"count": count, "groups": groups, "seed": seed}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        A, B, P = (factors[name] for name in ProjectedCore.required)
        if context.weight == 0:
            return None
        count, groups = context.options["count"], context.options["groups"]
        at = _number(P, context.options["seed"], count) if groups > 1 else 0
        v = factors[f"v.{min(at // max(1, count // groups), groups - 1)}"]
        if not v.any():
            return None
        return Product(B @ torch.einsum("i,ijk->jk", v * context.weight, P), A)


def _number(P: Tensor, seed: int, count: int) -> int:
    """The number of the module whose projections these are.

    Raises:
        InputError: `adapter.projections` where they are of none.
    """
    stored = P.float().cpu()
    u, r, _ = stored.shape
    far = [float((_drawn(seed + i, u, r) - stored).norm()) for i in range(count)]
    at = min(range(count), key=far.__getitem__)
    if far[at] > _SAME * float(stored.norm()):
        raise InputError(
            "adapter.projections",
            "its projections were not drawn with the seed of the config, so which numbers belong to them is not known",
        )
    return at


@lru_cache(maxsize=4096)
def _drawn(seed: int, u: int, r: int) -> Tensor:
    import torch

    return torch.normal(mean=0.0, std=1.0 / (r**0.5), size=(u, r, r), generator=torch.Generator().manual_seed(seed))
