"""From the shapes of factors of any kind and a weight to updates of the tensors that the weight lies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Context, Kind, Refused, Shapes, Unfit, takes
from loramerge.adapters.kinds.magnitude import MAGNITUDES, magnitude_axis
from loramerge.adapters.updates import ByKind, Magnitude
from loramerge.adapters.views import View, whole_view
from loramerge.binding.namespace import Namespace, Target
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.text import quoted

Bound = list[tuple[str, ByKind]]
"""(stored tensor, update) pairs."""


def by_kind(
    adapter: Adapter,
    index: int,
    weight: float,
    module: Module,
    target: Target,
    names: Namespace,
    *,
    scale: float | None = None,
) -> Bound:
    """The updates of one module of any kind: one for each part of the view that it sees, and those of its bias.

    Args:
        scale: of the module, where the caller knows more than alpha and rank say.

    Raises:
        MismatchError: `adapter.shape` where factors and weight do not fit.
        UnsupportedError: `adapter.refused` where no weight can hold them, with the reason.
    """
    kind = KINDS[module.kind]
    known = (*kind.required, *kind.optional)
    factors = {name: f for name, f in module.factors.items() if takes(kind, name)}
    shapes = {name: f.shape for name, f in factors.items()}
    view = oriented(adapter, module, kind, shapes, target, names)
    settings = _settings(adapter, module, view, names)
    try:
        options = kind.options(shapes, settings, view.shape)
        bias = hasattr(kind, "bias") and kind.bias(shapes, settings, view.shape)
        rank = kind.rank(shapes) if kind.scaled else None
    except Unfit as error:
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: {error}",
            file=adapter.name,
            tensors=[part.tensor for part in view.parts],
        ) from None
    except Refused as error:
        raise UnsupportedError(
            "adapter.refused",
            f"{quoted(module.path)} ({module.kind}): {error}",
            file=adapter.name,
            tensors=[f.key for f in factors.values()],
        ) from None
    if scale is None:
        scale = 1.0
        if kind.scaled and rank is None:  # factors that are stored whole have none; what was trained may have
            rank = adapter.claimed_rank(module.path)
        if kind.scaled and rank is not None:
            own = adapter.alpha(module) if "alpha" not in known else None
            scale = adapter.scale(module.path, rank, own=own)
    context = Context(view.shape, scale, weight, options)
    keys = tuple((name, f.key) for name, f in factors.items())
    magnitude = _magnitude(adapter, module, view)
    bound: Bound = [
        (part.tensor, ByKind(module.kind, index, module.path, keys, context, view, i, magnitude))
        for i, part in enumerate(view.parts)
    ]
    if bias and (beside := names.target(f"{module.path}.bias", adapter.dialect.flat)) is not None:
        column = _column(beside.view)
        bound += [
            (part.tensor, ByKind(module.kind, index, module.path, keys, context, column, i, None, view))
            for i, part in enumerate(column.parts)
        ]
    return bound


def _column(view: View) -> View:
    """A bias (out,) as a matrix (out, 1)."""
    return View((view.rows, 1), view.parts)


def _magnitude(adapter: Adapter, module: Module, view: View) -> Magnitude | None:
    name = next((name for name in MAGNITUDES if name in module.factors), None)
    if name is None:
        return None
    factor = module.factors[name]
    kind = KINDS[module.kind]
    if not kind.additive:
        raise UnsupportedError(
            "adapter.refused",
            f"{quoted(module.path)}: a magnitude beside factors that do not add ({module.kind})",
            file=adapter.name,
        )
    axis = magnitude_axis(factor.shape, view.shape)
    if MAGNITUDES[name] == "plain":  # always the output axis, whatever its shape
        axis = "output" if factor.info.numel == view.rows else None
    if axis is None:
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: a magnitude {factor.shape} for a weight {view.shape}",
            file=adapter.name,
            tensors=[factor.key],
        )
    return Magnitude(factor.key, axis, MAGNITUDES[name])


def _settings(adapter: Adapter, module: Module, view: View, names: Namespace) -> Mapping[str, Any]:
    """The adapter's settings, where among the modules of its kind this one stands, and the dtype of its weight."""
    at, count = adapter.positions[module.path]
    own: dict[str, Any] = {"module": module.path, "module-index": at, "module-count": count}
    own["stored"] = names[view.parts[0].tensor].dtype
    if getattr(KINDS[module.kind], "needs_widest", False):
        own["widest"] = _widest(adapter, module.kind, names)
    return {**adapter.section(module.path).settings, **own}


_WIDEST: WeakKeyDictionary[Namespace, dict[tuple[int, str], tuple[int, int] | None]] = WeakKeyDictionary()


def _widest(adapter: Adapter, kind: str, names: Namespace) -> tuple[int, int] | None:
    """(out, in), each the largest of all modules of a kind; None where one of them is not in the base."""
    known, key = _WIDEST.setdefault(names, {}), (id(adapter), kind)
    if key not in known:
        views = []
        for module in (m for m in adapter.modules if m.kind == kind):
            target = names.target(f"{module.path}.{module.leaf or adapter.dialect.leaves[0]}", adapter.dialect.flat)
            if target is None:
                known[key] = None
                return None
            views.append(oriented(adapter, module, KINDS[kind], module.shapes(), target, names))
        known[key] = max(v.rows for v in views), max(v.cols for v in views)
    return known[key]


def oriented(
    adapter: Adapter, module: Module, kind: type[Kind], shapes: Shapes, target: Target, names: Namespace
) -> View:
    """The view as the module sees it: (out, in), turned where the base stores a linear as (in, out)."""
    view = target.view
    if target.stored is None or len(view.shape) != 2:
        return view
    rows, cols = view.shape
    wanted = kind.out_in(shapes) or getattr(kind, "sides", _no_sides)(shapes)
    if wanted is None or rows == cols or (_fit(wanted, (rows, cols)) and _fit(wanted, (cols, rows))):
        own = target.stored.rpartition(".")[0]  # the adapter's name may be flattened
        flipped = names.is_flipped(adapter.settings.get("fan-in-fan-out"), own)
    else:
        flipped = _fit(wanted, (cols, rows))
    return whole_view(target.stored, (rows, cols), flipped=True) if flipped else view


def _no_sides(shapes: Shapes) -> None:
    return None


def _fit(wanted: tuple[int | None, int | None], shape: tuple[int, int]) -> bool:
    """Whether a weight's sides are those that the factors tell; None where they do not tell one."""
    return all(w is None or w == side for w, side in zip(wanted, shape, strict=True))
