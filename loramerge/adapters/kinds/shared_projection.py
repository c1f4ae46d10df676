"""Low-rank updates through random matrices that all modules share: only two vectors of scales are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Refused, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class SharedProjection:
    """`W' = W + λ (b ∘ B[:out]) (d ∘ A[:, :in])`: b (out,), d (r,), A (r, IN), B (OUT, r) (Kopiczko et al. 2024, VeRA).

    IN and OUT are the largest of all modules. Where A has 2r rows and d 2r numbers, the second half is a variance that
    only training samples from (PVeRA): the first r count. peft 0.21.2, tuners/vera and tuners/pvera, layer.py.

    A and B that are not in the file are drawn again as PEFT does: a CPU generator with the setting `seed`, A first,
    both uniform within ±√6/√columns. Settings: `seed`, `projection-saved`, `rank` (r), `widest` (OUT, IN).
    """

    name: ClassVar[str] = "shared-projection"
    required: ClassVar[tuple[str, ...]] = ("lambda-b", "lambda-d")
    optional: ClassVar[tuple[str, ...]] = ("A", "B")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    needs_widest: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def sides(shapes: Shapes) -> tuple[int | None, int | None]:
        return prod(shapes["lambda-b"]), None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        scales, out = prod(shapes["lambda-d"]), prod(shapes["lambda-b"])
        if len(shape) != 2 or out != shape[0]:
            raise Unfit(f"lambda-b {shapes['lambda-b']} does not fit the weight {shape}")
        if ("A" in shapes) != ("B" in shapes):
            raise Unfit("it has only one of the shared projections A and B")
        if "A" in shapes:
            A, B = shapes["A"], shapes["B"]
            if len(A) != 2 or len(B) != 2 or A[0] != scales or scales not in (B[1], 2 * B[1]):
                raise Unfit(f"the projections A {A} and B {B} do not fit lambda-d {shapes['lambda-d']}")
            if A[1] < shape[1] or B[0] < shape[0]:
                raise Unfit(f"the projections A {A} and B {B} are too small for the weight {shape}")
            return {"rank": B[1]}
        if settings.get("projection-saved"):
            raise Unfit("the config says that its projections are saved, and they are not in the file")
        seed, rank, widest = settings.get("seed"), settings.get("rank"), settings.get("widest")
        if type(seed) is not int or not rank or scales not in (rank, 2 * rank):
            raise Refused("its projections are not in the file, and the config does not say how they were drawn")
        if widest is None:
            raise Refused(
                "its projections are not in the file, and some of its modules, which tell their size, are "
                "not in the base"
            )
        return {"rank": int(rank), "seed": seed, "widest": list(widest)}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        b, d = factors["lambda-b"].reshape(-1, 1), factors["lambda-d"].reshape(-1, 1)
        rank = context.options["rank"]
        d, rows = d[:rank], len(d)
        if context.weight == 0 or not (b.any() and d.any()):
            return None
        if "A" in factors:
            A, B = factors["A"], factors["B"]
        else:
            drawn = _drawn(context.options["seed"], rows, rank, *context.options["widest"])
            A, B = (t.to(device=d.device, dtype=d.dtype) for t in drawn)
        out, cols = context.shape
        return Product(B[:out] * (b * context.weight), A[:rank, :cols] * d)


@lru_cache(maxsize=1)
def _drawn(seed: int, rows: int, rank: int, out: int, cols: int) -> tuple[Tensor, Tensor]:
    """A (rows, cols) and B (out, rank) as they were drawn before training."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in ((rows, cols), (out, rank)):
        # The bound in the order of operations that PEFT has, so that every bit is the same.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


class RandomBases:
    """A sum of products of fixed random bases, `W' = W + λ s U_B U_A` or its transpose (Albert et al. 2025, RandLoRA).

    `lambda` (r, n), `gamma` (n, m), A (r, 1, M), B (N, n or more, r) with m = min(out, in), N >= max(out, in):
    `U_A = lambda[:, :, None] A[:, :, :m] gamma` flattened to (r n, m), `U_B = B[:max, :n]` flattened to (max, n r).
    The two flatten in different orders, which is what is trained. The update is `U_B U_A` where in is the smaller side
    (or equal), else `(U_B U_A)ᵀ`. s = alpha / r. peft 0.21.2, tuners/randlora/layer.py.
    """

    name: ClassVar[str] = "random-bases"
    required: ClassVar[tuple[str, ...]] = ("lambda", "gamma", "A", "B")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        scales, gamma, A, B = (shapes[name] for name in RandomBases.required)
        if len(scales) != 2 or len(gamma) != 2 or len(A) != 3 or len(B) != 3 or A[1] != 1:
            raise Unfit(f"lambda {scales}, gamma {gamma}, A {A} and B {B} are not what this kind has")
        r, n = scales
        if gamma[0] != n or A[0] != r or B[2] != r or B[1] < n:
            raise Unfit(f"lambda {scales}, gamma {gamma}, A {A} and B {B} do not fit one another")
        if len(shape) != 2 or gamma[1] != min(shape) or A[2] < min(shape) or B[0] < max(shape):
            raise Unfit(f"gamma {gamma}, A {A} and B {B} do not fit the weight {shape}")
        if settings.get("alpha") is None:
            raise Unfit("the config does not say alpha")
        return {"scale": float(settings["alpha"]) / r}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        scales, gamma, A, B = (factors[name] for name in RandomBases.required)
        factor = context.options["scale"] * context.weight
        if factor == 0 or not (scales.any() and gamma.any()):
            return None
        small, large = min(context.shape), max(context.shape)
        right = (scales[:, :, None] * A[:, :, :small] * gamma).flatten(0, 1)
        left = B[:large, : scales.shape[1]].flatten(1) * factor
        return Product(left, right) if context.shape[1] == small else Product(right.T, left.T)
