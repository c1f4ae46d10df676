"""The Kronecker product of two matrices, each whole or low-rank (LoKr)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, RowDelta, Shapes, Unfit
from loramerge.adapters.kinds.tucker import same_kernel, through_core
from loramerge.adapters.kinds.versions import older

if TYPE_CHECKING:
    from torch import Tensor


class Kronecker:
    """`W' = W + λ s (w1 ⊗ w2)`: w1 (o1, i1), w2 (o2, i2, *kernel), o1 o2 = out, i1 i2 = in (Yeh et al. 2023).

    w1 = w1_a w1_b where it is not stored whole; w2 = w2_a w2_b with w2_b (r, i2 * prod(kernel)), or a Tucker product of
    t2 (r, r, *kernel), w2_a (r, o2), w2_b (r, i2). LyCORIS 4.1.3, functional/lokr.py; peft 0.21.2,
    tuners/lokr/layer.py.

    Settings: `full-scale-one`: s is 1 where both factors are whole, whatever alpha says (LyCORIS, sd-scripts).
    `version` with `unscaled-before`: releases before that one trained with s = 1 (peft < 0.14: `"0.14.0"`).
    `kron-trailing-axes`: a whole w2 with three axes meets w1 at its *last* two axes, and the result is reshaped to
    the weight (peft on 1-D convolutions; that is what it trains).
    """

    name: ClassVar[str] = "kronecker"
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    scaled: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        low = next((shapes[name] for name in ("w2_b", "w1_b") if name in shapes), None)
        return None if low is None else low[0]

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        try:
            first, second = _first(shapes), _second(shapes)
        except Unfit:
            return None
        return first[0] * second[0], first[1] * prod(second[1:])

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        first, second = _first(shapes), _second(shapes)
        rows, cols = first[0] * second[0], first[1] * prod(second[1:])
        if (rows, cols) != (shape[0], prod(shape[1:])):
            raise Unfit(f"the Kronecker product of {first} and {second} does not fit the weight {shape}")
        if len(second) > 2 and not same_kernel(second[2:], shape[2:]):
            raise Unfit(f"w2 {second} has not the kernel of the weight {shape}")
        whole = "w1" in shapes and "w2" in shapes
        unscaled = (whole and settings.get("full-scale-one", False)) or _is_old(settings)
        trailing = "w2" in shapes and len(second) == 3 and settings.get("kron-trailing-axes", False)
        return {"scaled": not unscaled, "trailing": bool(trailing)}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        factor = context.weight * (context.scale if context.options.get("scaled", True) else 1.0)
        if factor == 0 or not all(f.any() for f in factors.values()):
            return None
        first = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
        first = first * factor
        second = _second_tensor(factors)
        if context.options.get("trailing"):
            return RowDelta(lambda r0, r1: _trailing_rows(first, second, r0, r1))
        second = second.flatten(1)
        return RowDelta(lambda r0, r1: _kron_rows(first, second, r0, r1))


def _first(shapes: Shapes) -> tuple[int, ...]:
    """The shape (o1, i1) of w1."""
    if "w1" in shapes:
        if "w1_a" in shapes or "w1_b" in shapes:
            raise Unfit("it has both w1 and its factors")
        w1 = shapes["w1"]
        if len(w1) != 2:
            raise Unfit(f"w1 {w1} is no matrix")
        return w1
    return _pair(shapes, "w1_a", "w1_b")


def _second(shapes: Shapes) -> tuple[int, ...]:
    """The shape (o2, i2, *kernel) of w2; (o2, i2 * prod(kernel)) where its factors are flat."""
    if "w2" in shapes:
        if "w2_a" in shapes or "w2_b" in shapes or "t2" in shapes:
            raise Unfit("it has both w2 and its factors")
        if len(shapes["w2"]) < 2:
            raise Unfit(f"w2 {shapes['w2']} is no matrix")
        return shapes["w2"]
    if "t2" not in shapes:
        return _pair(shapes, "w2_a", "w2_b")
    a, b, core = shapes.get("w2_a", ()), shapes.get("w2_b", ()), shapes["t2"]
    if len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]):
        raise Unfit(f"t2 {core} does not fit between w2_a {a} and w2_b {b}")
    return a[1], b[1], *core[2:]


def _pair(shapes: Shapes, left: str, right: str) -> tuple[int, int]:
    if left not in shapes or right not in shapes:
        stem = left.removesuffix("_a")
        raise Unfit(f"it has neither {stem} nor both {left} and {right}")
    a, b = shapes[left], shapes[right]
    if len(a) < 2 or len(b) < 2 or prod(a[1:]) != b[0]:
        raise Unfit(f"{left} {a} and {right} {b} have no rank in common")
    return a[0], prod(b[1:])


def _is_old(settings: Mapping[str, Any]) -> bool:
    first_scaled = settings.get("unscaled-before")
    return bool(first_scaled) and older(settings.get("version"), str(first_scaled))


def _second_tensor(factors: Mapping[str, Tensor]) -> Tensor:
    if "w2" in factors:
        return factors["w2"]
    a, b = factors["w2_a"], factors["w2_b"]
    if "t2" in factors:
        return a.T @ through_core(factors["t2"], b)
    return a.flatten(1) @ b.flatten(1)


def _kron_rows(first: Tensor, second: Tensor, r0: int, r1: int) -> Tensor:
    """Rows of `first ⊗ second`, matrices: row i joins row i // o2 of the first and row i % o2 of the second."""
    import torch

    i = torch.arange(r0, r1, device=first.device)
    a, b = first[i // second.shape[0]], second[i % second.shape[0]]
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def _trailing_rows(first: Tensor, second: Tensor, r0: int, r1: int) -> Tensor:
    """Rows of `(1, o1, i1) ⊗ (o2, i2, k)`, which is (o2, o1 i2, i1 k), after its reshape to (out, in * k).

    Its row i joins row i % o1 of the first and row i // o1 of the second, the axes in the order i2, i1, k.
    """
    import torch

    i = torch.arange(r0, r1, device=first.device)
    a, b = first[i % first.shape[0]], second[i // first.shape[0]]
    return (a[:, None, :, None] * b[:, :, None, :]).flatten(1)
