"""Low-rank pairs that are put together from a bank of trained vectors or numbers which all modules share."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit
from loramerge.adapters.kinds.sparse import check_range

if TYPE_CHECKING:
    from torch import Tensor


class VectorBank:
    """`W' = W + λ B A`, both made of mixtures of vectors of a bank (n, b) (Li et al. 2024, VB-LoRA).

    `A-logits` (r, in / b, n) and `B-logits` (out / b, r, n): of each last axis the softmax over its `top` largest,
    times those vectors. A is (r, in / b, b) reshaped to (r, in); B is (out / b, r, b), its last axes exchanged,
    reshaped to (out, r). Instead of logits a file may have `indices` (..., top) and `weights` (..., top - 1), the last
    weight being what is missing to 1. Setting `top`. peft 0.21.2, tuners/vblora/layer.py and model.py.
    """

    name: ClassVar[str] = "vector-bank"
    required: ClassVar[tuple[str, ...]] = ("bank",)
    optional: ClassVar[tuple[str, ...]] = (
        "A-logits", "B-logits", "A-indices", "A-weights", "B-indices", "B-weights",
    )  # fmt: skip
    integers: ClassVar[tuple[str, ...]] = ("A-indices", "B-indices")
    may_be_empty: ClassVar[tuple[str, ...]] = ("A-weights", "B-weights")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        try:
            A, B = _tiles(shapes, "A"), _tiles(shapes, "B")
        except Unfit:
            return None
        return B[0] * shapes["bank"][-1], A[1] * shapes["bank"][-1]

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        bank = shapes["bank"]
        if len(bank) != 2:
            raise Unfit(f"the bank {bank} is no matrix")
        A, B = _tiles(shapes, "A"), _tiles(shapes, "B")
        if A[0] != B[1]:
            raise Unfit(f"A has rank {A[0]}, B has rank {B[1]}")
        if (B[0] * bank[1], A[1] * bank[1]) != (shape[0], prod(shape[1:])):
            raise Unfit(f"{B[0]} and {A[1]} vectors of {bank[1]} do not fit the weight {shape}")
        top = settings.get("top")
        if "A-logits" in shapes and (type(top) is not int or not 0 < top <= bank[0]):
            raise Unfit(f"of how many of the {bank[0]} vectors it mixes is not known ({top})")
        return {"top": top}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        if context.weight == 0 or not factors["bank"].any():
            return None
        A, B = (_mixed(factors, side, context.options["top"]) for side in "AB")
        A, B = A.flatten(1), B.mT.reshape(-1, B.shape[1])
        return Product(B * context.weight, A)


def _tiles(shapes: Shapes, side: str) -> tuple[int, int]:
    """The first two axes of one side's logits or indices."""
    logits, indices, weights = (shapes.get(f"{side}-{name}") for name in ("logits", "indices", "weights"))
    if logits is not None:
        if indices is not None or weights is not None:
            raise Unfit(f"it has both logits and weights of {side}")
        if len(logits) != 3 or logits[2] != shapes["bank"][0]:
            raise Unfit(f"{side}-logits {logits} do not fit the bank {shapes['bank']}")
        return logits[0], logits[1]
    if indices is None or weights is None:
        raise Unfit(f"it has neither logits nor indices and weights of {side}")
    if len(indices) != 3 or weights != (*indices[:2], indices[2] - 1):
        raise Unfit(f"{side}-indices {indices} and {side}-weights {weights} do not fit one another")
    return indices[0], indices[1]


def _mixed(factors: Mapping[str, Tensor], side: str, top: int | None) -> Tensor:
    """The mixtures of one side, (first, second, b)."""
    import torch

    bank = factors["bank"]
    if f"{side}-logits" in factors:
        assert top is not None
        best = factors[f"{side}-logits"].topk(top, dim=-1)
        weights, indices = best.values.softmax(-1), best.indices
    else:
        indices, weights = check_range(factors[f"{side}-indices"], len(bank)), factors[f"{side}-weights"]
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    mixed = torch.zeros((*indices.shape[:2], bank.shape[1]), dtype=bank.dtype, device=bank.device)
    for k in range(indices.shape[2]):  # one at a time: all at once is `top` times as large
        mixed += weights[..., k, None] * bank[indices[..., k]]
    return mixed


class IndexedPair:
    """`W' = W + λ B A` with `A = θ[i] ∘ a`, `B = θ[j] ∘ b`: every entry is one of the numbers θ (d,), scaled.

    i, a (r, in); j, b (out, r); θ is shared by all modules. peft 0.21.2, tuners/unilora/layer.py.
    """

    name: ClassVar[str] = "indexed-pair"
    required: ClassVar[tuple[str, ...]] = ("theta", "A-indices", "A-scales", "B-indices", "B-scales")
    optional: ClassVar[tuple[str, ...]] = ()
    integers: ClassVar[tuple[str, ...]] = ("A-indices", "B-indices")
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        return shapes["B-indices"][0], prod(shapes["A-indices"][1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, B = shapes["A-indices"], shapes["B-indices"]
        if shapes["A-scales"] != A or shapes["B-scales"] != B or len(shapes["theta"]) != 1:
            raise Unfit("its indices and scales have not the same shapes")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (B[0], A[1]) != shape:
            raise Unfit(f"indices {A} and {B} do not fit the weight {shape}")
        return {}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        theta = factors["theta"]
        if context.weight == 0 or not theta.any():
            return None
        A, B = (theta[check_range(factors[f"{s}-indices"], len(theta))] * factors[f"{s}-scales"] for s in "AB")
        return Product(B * context.weight, A)
