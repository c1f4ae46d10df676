"""The methods that combine adapters, as data: names, sources, the options that each takes, and their defaults."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loramerge.errors import UsageError

REQUIRED = None
"""The default of an option that has none: no value suits all adapters, and none is published."""


@dataclass(frozen=True)
class Option:
    """One option of a method. `range`: what values may be, in words; `fits` checks it. `choices`: for words."""

    name: str
    type: type
    help: str
    range: str = ""
    fits: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Other flags of it."""

    @property
    def flag(self) -> str:
        """As it is written at a shell."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Method:
    """One method: what it does in a line, where it comes from, its options with their defaults.

    `space`: it acts element by element, so its result has full rank in space `full`. `factors`: it acts on factors, as
    PEFT does, not on updates. `least`, `most`: how many adapters it takes.
    """

    name: str
    what: str
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    space: bool = False
    factors: bool = False
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A method and the value of each of its options: plain data, for plans and receipts."""

    method: Method
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the method."""
        return self.method.name

    @property
    def full_rank(self) -> bool:
        """Whether results have full rank, so that factors of them must be cut."""
        if "after" in self.options:
            return False
        return self.method.space and self.options["space"] == "full"

    @property
    def random(self) -> bool:
        """Whether the seed enters."""
        return "seed" in self.options

    def to_data(self) -> dict[str, Any]:
        """`{"name": ..., "options": {...}}`, JSON."""
        return {"name": self.name, "options": dict(self.options)}


def _between(low: float, high: float, *, low_in: bool = True, high_in: bool = True) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        above = value >= low if low_in else value > low
        below = value <= high if high_in else value < high
        return bool(above and below)

    return fits


SPACES = ("full", "knots", "core")
"""Where elementwise methods act: on the updates, or on coordinates that keep the result low-rank."""

OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in (
        Option("density", float, "Share of elements to keep.", "above 0, at most 1", _between(0, 1, low_in=False)),
        Option(
            "p",
            float,
            "Share of elements to drop at random.",
            "0 or more, below 1",
            _between(0, 1, high_in=False),
            also=("--drop-rate",),
        ),
        Option(
            "gamma", float, "Share of largest elements to drop.", "0 or more, below 1", _between(0, 1, high_in=False)
        ),
        Option("eps", float, "How far the chance to keep is from density at either end.", "0 to 0.5", _between(0, 0.5)),
        Option("elect", bool, "Take the mean of those that have the elected sign, as ties does, in place of the sum."),
        Option("space", str, "Where elements are compared.", choices=SPACES),
        Option("trim", str, "Over what density is counted.", choices=("tensor", "adapter")),
        Option("seed", int, "Seed of random choices.", "0 or more", _between(0, math.inf)),
        Option("t", float, "Where between the two adapters.", "0 to 1", _between(0, 1)),
        Option("ranks", str, "Directions of each adapter: all, or its share.", choices=("own", "share")),
        Option("common", float, "Share of common directions.", "0 to 1", _between(0, 1)),
        Option("ridge", float, "Weight of staying near the sum.", "0 or more", _between(0, math.inf, high_in=False)),
        Option(
            "svc_alpha",
            float,
            "Gain below which a direction is left alone.",
            "above 0",
            _between(0, math.inf, low_in=False),
        ),
        Option("after", str, "The method whose result is corrected."),
        Option("majority", str, "Signs by sums, or by how many.", choices=("total", "frequency")),
    )
}

_ELEMENTWISE = {"space": "full"}

_ALL = (
    Method("linear", "the weighted sum, exact: ranks add up", "arXiv 2212.04089"),
    Method(
        "ties",
        "trims, elects a sign for every element, averages those that agree",
        "arXiv 2306.01708",
        {"density": 0.2, "trim": "tensor", **_ELEMENTWISE},
        space=True,
    ),
    Method(
        "dare",
        "drops elements at random, rescales the others, sums",
        "arXiv 2311.03099",
        {"p": 0.9, "elect": False, "seed": 0, **_ELEMENTWISE},
        space=True,
    ),
    Method(
        "dare_ties",
        "dare, with the elected mean of ties in place of the sum",
        "arXiv 2311.03099",
        {"p": 0.9, "seed": 0, **_ELEMENTWISE},
        space=True,
    ),
    Method(
        "della",
        "drops at random, small elements of a row likelier, elects signs",
        "arXiv 2406.11617",
        {"density": REQUIRED, "eps": 0.1, "elect": True, "seed": 0, **_ELEMENTWISE},
        space=True,
    ),
    Method(
        "breadcrumbs",
        "drops the largest and the smallest elements, sums",
        "arXiv 2312.06795",
        {"density": REQUIRED, "gamma": 0.01, "elect": False, **_ELEMENTWISE},
        space=True,
    ),
    Method(
        "magnitude",
        "keeps the largest elements, sums",
        "",
        {"density": REQUIRED, "trim": "tensor", "elect": False, **_ELEMENTWISE},
        space=True,
    ),
    Method("slerp", "a point of the arc between two", "", {"t": 0.5}, least=2, most=2),
    Method("karcher", "the mean direction on the sphere, the mean length"),
    Method("model_stock", "the mean, shortened by how little the adapters agree", "arXiv 2403.19522"),
    Method(
        "knots",
        "ties (with --p: dare_ties) in common singular coordinates",
        "arXiv 2410.19735",
        {"density": 1.0, "p": None, "seed": 0},
    ),
    Method("tsv", "singular vectors of all made orthogonal", "arXiv 2412.00081", {"ranks": "own"}),
    Method("iso_c", "the sum with all its singular values made equal", "arXiv 2502.04959"),
    Method("iso_cts", "iso_c, with directions of each adapter's own", "arXiv 2502.04959", {"common": 0.8}),
    Method(
        "svc",
        "shrinks directions in which adapters add up, after another method",
        "arXiv 2602.05536",
        {"svc_alpha": 1.0, "after": "linear"},
    ),
    Method("wudi", "what least disturbs what every adapter reads", "arXiv 2503.08099", {"ridge": 1e-6}),
    Method("peft-linear", "sums of factors, as PEFT's linear", "peft 0.21.2", factors=True),
    Method(
        "peft-ties",
        "ties on factors, as PEFT's ties",
        "peft 0.21.2",
        {"density": 0.2, "majority": "total"},
        factors=True,
    ),
    Method(
        "peft-dare-linear",
        "dare on factors, as PEFT's dare_linear",
        "peft 0.21.2",
        {"density": REQUIRED, "seed": 0},
        factors=True,
    ),
    Method(
        "peft-dare-ties",
        "dare and ties on factors, as PEFT's dare_ties",
        "peft 0.21.2",
        {"density": REQUIRED, "majority": "total", "seed": 0},
        factors=True,
    ),
    Method(
        "peft-magnitude-prune",
        "sums of trimmed factors, as PEFT's magnitude_prune",
        "peft 0.21.2",
        {"density": REQUIRED},
        factors=True,
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}

ALSO: Mapping[str, str] = {
    "cat": "linear",
    "task_arithmetic": "linear",
    "iso": "iso_c",
    "dare_linear": "dare",
    "magnitude_prune": "magnitude",
}
"""Other names of methods."""

OPTIONAL = frozenset({("knots", "p")})
"""Options whose absence means something."""


def method_named(name: str) -> Method:
    """The method of this name; `-` and `_` are one.

    Raises:
        UsageError: `usage.method` with the nearest name.
    """
    plain = name.strip().lower().replace("-", "_")
    plain = ALSO.get(plain, plain)
    found = next((m for m in _ALL if m.name.replace("-", "_") == plain), None)
    if found is None:
        near = difflib.get_close_matches(plain, [*METHODS, *ALSO], n=1)
        fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(METHODS)}"
        raise UsageError("usage.method", f"there is no method {name!r}", fix=fix)
    return found


def chosen(name: str, given: Mapping[str, Any] | None = None, *, count: int | None = None) -> Chosen:
    """A method with its options: those given (None counts as not given), and defaults for the others.

    Args:
        count: how many adapters there are, where it is known.

    Raises:
        UsageError: `usage.method`; `usage.method-option` for an option that the method does not take, one that it
            needs, or a value out of range; `usage.method-adapters` for a number of adapters that it does not take.
    """
    method = method_named(name)
    values = {key: value for key, value in (given or {}).items() if value is not None}
    takes = dict(method.options)
    inner: Method | None = None
    if "after" in takes:
        inner = method_named(str(values.get("after", takes["after"])))
        values["after"] = inner.name
        if inner.factors or "after" in inner.options:
            raise UsageError(
                "usage.method-option",
                f"{method.name} comes after no {inner.name}",
                fix="--after linear, ties, tsv, ...",
            )
        takes = {**inner.options, **takes}
        if inner.space:
            takes["space"] = "core"  # the correction is defined on singular values
    for key in values:
        if key not in takes:
            others = [m.name for m in _ALL if key in m.options]
            flag = OPTIONS[key].flag if key in OPTIONS else key
            fix = f"{flag} belongs to {', '.join(others)}" if others else f"it takes {_flags(takes) or 'no options'}"
            raise UsageError("usage.method-option", f"{method.name} takes no {flag}", fix=fix)
    settled: dict[str, Any] = {}
    for key, default in takes.items():
        value = values.get(key, default)
        if (
            value is None
            and (method.name, key) not in OPTIONAL
            and (inner is None or (inner.name, key) not in OPTIONAL)
        ):
            raise UsageError(
                "usage.method-option", f"{method.name} needs {OPTIONS[key].flag}", fix=f"give it: {OPTIONS[key].range}"
            )
        settled[key] = None if value is None else _checked(OPTIONS[key], value)
    _check_together(method, settled)
    if method.name == "svc" and settled.get("space") == "full":
        raise UsageError(
            "usage.method-option",
            "svc corrects singular values, which the space full has too many of",
            fix="--space core",
        )
    if count is not None and (count < method.least or (method.most is not None and count > method.most)):
        raise UsageError(
            "usage.method-adapters", f"{method.name} takes {method.least} adapters, not {count}", fix="see --help"
        )
    return Chosen(method, settled)


def _checked(option: Option, value: Any) -> Any:
    if option.choices:
        if value not in option.choices:
            raise UsageError(
                "usage.method-option", f"{option.flag} is {value!r}", fix=f"one of {', '.join(option.choices)}"
            )
        return value
    if option.type is str:
        return str(value)
    number = isinstance(value, int | float) and (option.type is not bool or isinstance(value, bool))
    if not number or (option.type is int and int(value) != value) or not math.isfinite(value) or not option.fits(value):
        raise UsageError("usage.method-option", f"{option.flag} is {value!r}", fix=f"give {option.range or 'a flag'}")
    return option.type(value)


def _check_together(method: Method, settled: Mapping[str, Any]) -> None:
    density = settled.get("density")
    if density is not None and settled.get("eps", 0) > min(density, 1 - density) + 1e-12:
        most = min(density, 1 - density)
        raise UsageError(
            "usage.method-option",
            f"--eps {settled['eps']:g} is too much at --density {density:g}",
            fix=f"--eps {most:g}",
        )
    if density is not None and density + settled.get("gamma", 0) > 1 + 1e-12:
        raise UsageError(
            "usage.method-option",
            f"--gamma {settled['gamma']:g} and --density {density:g} are more than all",
            fix=f"--gamma {1 - density:.4g}",
        )
    if settled.get("trim") == "adapter" and settled.get("space") != "full":
        raise UsageError(
            "usage.method-option", "--trim adapter compares the updates themselves", fix="--space full or --trim tensor"
        )


def _flags(options: Mapping[str, Any]) -> str:
    return ", ".join(OPTIONS[key].flag for key in options)
