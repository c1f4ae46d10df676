"""Methods by name: the one place that knows which function computes a method, and how its options are called there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramerge.algebra import combine, masks, peft_compat, subspace
from loramerge.algebra.core import Factors, Stack, Update, fold
from loramerge.algebra.peft_compat import Weighted

Options = Mapping[str, Any]
"""The options of a method by name, all of them; see `loramerge.methods` for their defaults."""


@dataclass(frozen=True, eq=False)
class Combined:
    """The update that a method makes of one module.

    `update`: `Factors`, or for elementwise methods in space `full` an update of full rank that is read by rows.
    `distance`: for methods on factors, how far it is from the weighted sum, relative to that.
    """

    update: Update
    distance: float | None = None


def combined(
    name: str,
    adapters: Sequence[Weighted],
    options: Options,
    *,
    module: str = "",
    thresholds: Sequence[float] | None = None,
) -> Combined:
    """What a method makes of the updates of one module.

    Args:
        name: of `loramerge.methods.METHODS`.
        adapters: in the order given by the user; b (m, r), a (r, n), r may be 0 where an adapter has nothing there.
        options: all options of the method.
        module: its name, for masks of its own.
        thresholds: of each adapter, where magnitudes are compared over all of its modules (`masks.adapter_threshold`).

    Raises:
        ValueError: options out of range, shapes that do not fit, values that are not finite.
    """
    if name in FACTOR_WISE:
        present = [x for x in adapters if x.a.shape[0]] or adapters[:1]  # PEFT, too, passes over the others
        made = FACTOR_WISE[name](present, options, module)
        return Combined(made.factors, made.error)
    stack = Stack([fold(x.b, x.a, scale=x.scale, weight=x.weight, key=x.key) for x in adapters])
    return Combined(of_stack(name, stack, options, module=module, thresholds=thresholds))


def of_stack(
    name: str, stack: Stack, options: Options, *, module: str = "", thresholds: Sequence[float] | None = None
) -> Update:
    """`combined` for methods that act on updates, which are given folded."""
    if name == "svc":
        inner = {key: value for key, value in options.items() if key not in ("after", "svc_alpha")}
        whole = of_stack(options["after"], stack, inner, module=module)
        return subspace.svc(whole.factors(), stack, options["svc_alpha"])
    if name in THRESHOLDED:
        return THRESHOLDED[name](stack, options, thresholds)
    return ON_UPDATES[name](stack, options, module)


def _ties(stack: Stack, o: Options, thresholds: Sequence[float] | None) -> Update:
    return masks.ties(stack, o["density"], thresholds=thresholds, space=o["space"])


def _magnitude(stack: Stack, o: Options, thresholds: Sequence[float] | None) -> Update:
    return masks.magnitude(stack, o["density"], elect=o["elect"], thresholds=thresholds, space=o["space"])


def _dare(stack: Stack, o: Options, module: str) -> Update:
    elect = o.get("elect", True)
    return masks.dare(stack, o["p"], seed=o["seed"], module=module, elect=elect, space=o["space"])


def _della(stack: Stack, o: Options, module: str) -> Update:
    return masks.della(stack, o["density"], o["eps"], seed=o["seed"], module=module, elect=o["elect"], space=o["space"])


THRESHOLDED: Mapping[str, Callable[[Stack, Options, Sequence[float] | None], Update]] = {
    "ties": _ties,
    "magnitude": _magnitude,
}
"""Methods whose thresholds may be those of the whole adapter."""

ON_UPDATES: Mapping[str, Callable[[Stack, Options, str], Update]] = {
    "linear": lambda stack, o, module: combine.linear(stack),
    "dare": _dare,
    "dare_ties": _dare,
    "della": _della,
    "breadcrumbs": lambda stack, o, module: masks.breadcrumbs(
        stack, o["density"], o["gamma"], elect=o["elect"], space=o["space"]
    ),
    "slerp": lambda stack, o, module: combine.slerp(stack, o["t"]),
    "karcher": lambda stack, o, module: combine.karcher(stack),
    "model_stock": lambda stack, o, module: combine.model_stock(stack),
    "knots": lambda stack, o, module: subspace.knots(stack, o["density"], p=o["p"], seed=o["seed"], module=module),
    "tsv": lambda stack, o, module: subspace.tsv(stack, o["ranks"]),
    "iso_c": lambda stack, o, module: subspace.iso_c(stack),
    "iso_cts": lambda stack, o, module: subspace.iso_cts(stack, o["common"]),
    "wudi": lambda stack, o, module: subspace.wudi(stack, o["ridge"]),
}
"""Methods on updates."""

FACTOR_WISE: Mapping[str, Callable[[Sequence[Weighted], Options, str], peft_compat.FactorWise]] = {
    "peft-linear": lambda given, o, module: peft_compat.factor_linear(given),
    "peft-ties": lambda given, o, module: peft_compat.factor_ties(given, o["density"], majority=o["majority"]),
    "peft-dare-linear": lambda given, o, module: peft_compat.factor_dare(
        given, o["density"], seed=o["seed"], module=module
    ),
    "peft-dare-ties": lambda given, o, module: peft_compat.factor_dare(
        given, o["density"], elect=True, majority=o["majority"], seed=o["seed"], module=module
    ),
    "peft-magnitude-prune": lambda given, o, module: peft_compat.factor_magnitude(given, o["density"]),
}
"""Methods on factors, as PEFT has them."""


def absent(shape: tuple[int, int], like: Factors | Weighted) -> Weighted:
    """The update of an adapter that has nothing for a module of this shape (m, n): zero, of rank 0."""
    return Weighted(like.b.new_zeros(shape[0], 0), like.a.new_zeros(0, shape[1]))
