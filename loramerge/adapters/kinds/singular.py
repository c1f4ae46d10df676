"""A low-rank pair with singular values between, pruned in training (AdaLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from loramerge.adapters.kinds.base import Context, Form, Product, Shapes, Unfit

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-5  # the trainer adds it to the rank


class SingularPair:
    """`W' = W + λ c / (r₀ + 1e-5) B diag(E) A`: A (r, in * prod(kernel)), E (r, 1), B (out, r).

    r₀ is the rank that training began with (setting `initial-rank`), however much of it was pruned; c the alpha, or r₀
    where that is 0. r = 0 changes nothing. The setting `kept` lists for each module, by the name of its E, which of the
    r₀ components are left. Zhang et al. 2023; peft 0.21.2, tuners/adalora/{layer,model}.py.
    """

    name: ClassVar[str] = "singular-pair"
    required: ClassVar[tuple[str, ...]] = ("A", "E", "B")
    optional: ClassVar[tuple[str, ...]] = ()
    scaled: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    may_be_empty: ClassVar[tuple[str, ...]] = ("A", "E", "B")

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return None

    @staticmethod
    def out_in(shapes: Shapes) -> tuple[int, int] | None:
        A, B = shapes["A"], shapes["B"]
        return (B[0], prod(A[1:])) if len(A) > 1 and len(B) > 1 else None

    @staticmethod
    def options(shapes: Shapes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        A, E, B = shapes["A"], shapes["E"], shapes["B"]
        if len(A) < 2 or len(B) != 2 or A[0] != B[1] or prod(E) != A[0]:
            raise Unfit(f"A {A}, E {E} and B {B} have no rank in common")
        if (B[0], prod(A[1:])) != (shape[0], prod(shape[1:])):
            raise Unfit(f"A {A} and B {B} do not fit the weight {shape}")
        start, alpha = settings.get("initial-rank"), settings.get("alpha")
        if isinstance(start, bool) or not isinstance(start, int | float) or start < max(1, A[0]):
            raise Unfit(f"it has rank {A[0]}, the config says that it began with {start!r}")
        kept = _kept(settings.get("kept"), str(settings.get("module", "")))
        if kept is not None and kept != A[0]:
            raise Unfit(f"it has rank {A[0]}, the config says that {kept} components are left")
        if alpha is None:
            raise Unfit("nothing says its alpha")
        return {"scale": (alpha if alpha > 0 else start) / (start + _TINY)}

    @staticmethod
    def form(factors: Mapping[str, Tensor], context: Context) -> Form | None:
        A, E, B = factors["A"].flatten(1), factors["E"].flatten(), factors["B"]
        factor = context.options["scale"] * context.weight
        if factor == 0 or not (A.any() and E.any() and B.any()):
            return None
        return Product(B * (E * factor), A)


def _kept(pattern: Any, module: str) -> int | None:
    """How many components of a module are left, as the config says; None where it says nothing."""
    if not isinstance(pattern, Mapping):
        return None
    for name, flags in pattern.items():
        path = str(name).rpartition(".")[0]
        if isinstance(flags, list) and (path == module or path.endswith(f".{module}")):
            return sum(flag is True for flag in flags)
    return None
