"""Weight-decomposed updates (DoRA): a magnitude over any kind that adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from loramerge.adapters.kinds.base import Context, Dense, Form, Product, RowDelta, RowMap, Unfit, WholeMap

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("output", "input")
STYLES = ("plain", "interpolated")
MAGNITUDES = {"magnitude": "plain", "dora-scale": "interpolated"}
"""Factor name in `formats/adapters/*.toml` -> style."""

EPSILON = 2.0**-23
"""What `interpolated` adds to norms: the epsilon of float32, whatever dtype is computed in."""


def magnitude_axis(magnitude: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """Along which axis of a weight (out, in, *kernel) a `dora_scale` lies: (out, 1...) or (out,), else (1, in, 1...);
    None where it is neither.

    Where out = in the place of the long axis tells. Not for dialects that always write the output axis, whatever shape
    they give it (PEFT: (1, out, 1...) on convolutions).
    """
    count = prod(magnitude)
    if magnitude and shape and magnitude[0] == shape[0] == count:
        return "output"
    if len(magnitude) > 1 and len(shape) > 1 and magnitude[1] == shape[1] == count:
        return "input"
    return None


def inside(context: Context, style: str) -> Context:
    """The context that the form inside a magnitude is made with: λ belongs to ΔW (`plain`) or to the whole."""
    return context if style == "plain" else replace(context, weight=1.0)


def dora(form: Form | None, magnitude: Tensor, context: Context, axis: str, style: str) -> Form | None:
    """`V = W + ΔW` brought to the magnitudes m along one axis (Liu et al. 2024, equation 5).

    Args:
        form: ΔW as a form that adds, made with the context that `inside` gives; None for ΔW = 0.
        magnitude: m, one number for each row (`output`) or input channel (`input`), in any shape.
        context: the weight's shape, and λ.
        axis: `output`: norms of rows. `input`: norms of input channels over rows and kernel.
        style: `plain`: `W' = m / ‖V‖ V`, ΔW with s and λ (peft 0.21.2, tuners/lora/dora.py; diffusers; MLX; torchtune).
            `interpolated`: `W' = V (λ (m / (‖V‖ + ε) - 1) + 1)`, ΔW with s alone, ε that of float32 (LyCORIS 4.1.3,
            functional/general.py weight_decompose; OneTrainer).

    A row or channel of V that is zero stays zero. With λ = 0 `interpolated` would give V, not W: None instead.

    Raises:
        Unfit: the magnitude has another length, or the form does more than add.
    """
    if style not in STYLES or axis not in AXES:
        raise ValueError(f"unknown magnitude: {axis}, {style}")
    m = magnitude.flatten()
    wanted = context.shape[0] if axis == "output" else context.shape[1]
    if len(m) != wanted:
        raise Unfit(f"the magnitude has {len(m)} numbers, the weight {context.shape} needs {wanted}")
    add = _adder(form)
    if style == "interpolated" and context.weight == 0:
        return None

    def ratios(squares: Tensor, m: Tensor) -> Tensor:
        norms = squares.sqrt()
        if style == "plain":
            return m.double().div(norms).where(norms != 0, 0.0).to(m.dtype)
        return (context.weight * (m.double() / (norms + EPSILON) - 1) + 1).to(m.dtype)

    def by_rows(rows: Tensor, r0: int) -> Tensor:
        V = add(rows, r0)
        return V.mul_(ratios(V.double().square().sum(dim=1), m[r0 : r0 + rows.shape[0]])[:, None])

    def by_columns(W: Tensor) -> Tensor:
        V = add(W, 0)
        by_channel = V.reshape(V.shape[0], wanted, -1)
        squares = m.new_zeros(wanted).double()
        step = max(1, 2**22 // V.shape[1])  # a float64 copy of some rows only
        for r0 in range(0, V.shape[0], step):
            squares += by_channel[r0 : r0 + step].double().square().sum(dim=(0, 2))
        return by_channel.mul_(ratios(squares, m)[:, None]).reshape(V.shape)

    return RowMap(by_rows) if axis == "output" else WholeMap(by_columns)


def _adder(form: Form | None) -> Callable[[Tensor, int], Tensor]:
    """Adds rows of ΔW to rows of W, in place: (rows, first row) -> rows."""
    match form:
        case None:
            return lambda rows, r0: rows
        case Product(L, R):
            return lambda rows, r0: rows.addmm_(L[r0 : r0 + rows.shape[0]], R)
        case RowDelta(of_rows):
            return lambda rows, r0: rows.add_(of_rows(r0, r0 + rows.shape[0]))
        case Dense(delta):
            return lambda rows, r0: rows.add_(delta[r0 : r0 + rows.shape[0]])
    raise Unfit("a magnitude needs an update that adds")
