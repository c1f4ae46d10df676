"""Updates made of blocks: circulant ones, and low-rank ones that exchange parts of their rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, RowDelta, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor


class CirculantBlocks:
    """`W' = W + λ Δ`, `Δ[m b + o, n b + j] = kernel[m, n, (j - o) mod b] / in`, kernel (out / b, in / b, b).

    Chen et al. 2024 (C³A); peft 0.21.2, tuners/c3a/layer.py and utils.py, which computes it by FFT.
    """

    name: ClassVar[str] = "circulant-blocks"
    required: ClassVar[tuple[str, ...]] = ("kernel",)
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        kernel = shapes["kernel"]
        return (kernel[0] * kernel[2], kernel[1] * kernel[2]) if len(kernel) == 3 else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        if CirculantBlocks.out_in(shapes) != shape:
            raise Unfit(f"kernel {shapes['kernel']} does not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        if context.weight == 0 or not factors["kernel"].any():
            return None
        kernel = factors["kernel"] * (context.weight / context.shape[1])
        size = kernel.shape[2]
        column = torch.arange(size, device=kernel.device)

        def delta(r0: int, r1: int) -> Tensor:
            i = torch.arange(r0, r1, device=kernel.device)
            turned = (column - i[:, None] % size) % size
            blocks = kernel[i // size]
            return blocks.gather(2, turned[:, None, :].expand(blocks.shape)).flatten(1)

        return RowDelta(delta)


class GranularPair:
    """Low-rank blocks: `Δ[out block j, in block n] = (A[n][:, part j] B[j][part n])ᵀ` (Jung et al. 2025, GraLoRA).

    A (k, in / k, r), B (k, r, out / k); the rank r falls into k parts. `general-A` (h, in), `general-B` (out, h) is a
    low-rank pair beside them. `W' = W + λ alpha / (r + h) (Δ + general-B general-A)`, setting `alpha`.
    peft 0.21.2, tuners/gralora/layer.py.
    """

    name: ClassVar[str] = "granular-pair"
    required: ClassVar[tuple[str, ...]] = ("A", "B")
    optional: ClassVar[tuple[str, ...]] = ("general-A", "general-B")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        A, B = shapes["A"], shapes["B"]
        return (B[0] * B[2], A[0] * A[1]) if len(A) == len(B) == 3 else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B = shapes["A"], shapes["B"]
        if GranularPair.out_in(shapes) != shape:
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        if A[0] != B[0] or A[2] != B[1] or A[2] % A[0]:
            raise Unfit(f"A {A} and B {B} do not fit one another")
        if ("general-A" in shapes) != ("general-B" in shapes):
            raise Unfit("it has only one of general-A and general-B")
        general = 0
        if "general-A" in shapes:
            right, left = shapes["general-A"], shapes["general-B"]
            if len(left) != 2 or left[::-1] != (right[0], shape[0]) or right[1:] != shape[1:]:
                raise Unfit(f"general-A {right} and general-B {left} do not fit the weight {shape}")
            general = right[0]
        if settings.get("alpha") is None:
            raise Unfit("the config does not say alpha")
        return {"scale": float(settings["alpha"]) / (A[2] + general)}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        import torch

        A, B = factors["A"], factors["B"]
        factor = context.options["scale"] * context.weight
        blocks = bool(A.any() and B.any())
        general = "general-A" in factors and bool(factors["general-A"].any() and factors["general-B"].any())
        if factor == 0 or not (blocks or general):
            return None
        left, right = [], []
        if blocks:
            k, inner, r = A.shape
            # All blocks as one product of rank k r, whose axis is (out block j, in block n, number within the part).
            R = A.new_zeros(k, k, r // k, k, inner)
            L = B.new_zeros(k, B.shape[2], k, r)
            n = torch.arange(k, device=A.device)
            R[:, n, :, n] = A.view(k, inner, k, r // k).permute(0, 2, 3, 1)
            L[n, :, n] = B.mT
            left.append(L.reshape(context.shape[0], -1))
            right.append(R.reshape(-1, context.shape[1]))
        if general:
            left.append(factors["general-B"])
            right.append(factors["general-A"])
        return Product(torch.cat(left, 1) * factor, torch.cat(right))
