"""Neutral items: what an adapter does to each module, its factors in our orientation and its scale settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter, Factor, Module
from loramerge.adapters.dialect import holds
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Refused, Unfit
from loramerge.adapters.kinds.magnitude import MAGNITUDES, magnitude_axis
from loramerge.binding.shapes import quirk_scale
from loramerge.errors import InputError, MismatchError, UnsupportedError
from loramerge.tensors.checkpoint import Located
from loramerge.tensors.text import quoted

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes on disk that an adapter or the weights that it changes may have."""

PAIR = "low-rank"
PRODUCT = "tucker"


@dataclass(frozen=True)
class Magnitude:
    """A DoRA magnitude: one number for each output row or input channel, and its formula (`MAGNITUDES`)."""

    vector: Tensor
    axis: str
    style: str


@dataclass(frozen=True)
class Item:
    """One update of one module.

    `module`: the path that the adapter gives it. `role` and `path`: its component and its path in there, set by
    naming; `flat`: the path has `_` for `.`. `leaf`: the parameter that it changes where that is not the weight.
    `scale`: s, which is not in the factors. `shape`: of the weight (out, in, *kernel), as far as it is known;
    `exact_shape`: whether a base told it. `weight`: reads that weight, (out, in * prod(kernel)), float64.
    `how`: what was done to it, in a word; `error`: what that changed, relative to `norm`, the norm of the update.
    """

    module: str
    kind: str
    factors: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Magnitude | None = None
    leaf: str = ""
    role: str = ""
    path: str = ""
    flat: bool = False
    shape: tuple[int, ...] | None = None
    exact_shape: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: Callable[[], Tensor] | None = None
    how: str = "exact"
    error: float | None = None
    norm: float | None = None
    claimed: int | None = None
    """The rank that a config must claim for it, where that is not its own."""
    parameter: str = ""
    """The stacked parameter that it changes, by its whole path, where a config lists it beside the modules."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(f.shape) for name, f in self.factors.items()}

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None for kinds without a rank."""
        if "embedding-A" in self.factors:
            return int(self.factors["embedding-A"].shape[0])
        kind = KINDS.get(self.kind)
        if kind is None or not kind.scaled:
            return None
        rank: int | None = kind.rank(self.shapes)
        return rank

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that new factors of it get: the widest of those it has."""
        dtypes = [f.dtype for f in self.factors.values() if f.is_floating_point()]
        widest = dtypes[0] if dtypes else torch.float32
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest


def read_tensor(located: Located, where: str) -> Tensor:
    """A stored tensor as it is, dtype and shape its own.

    Raises:
        InputError: `adapter.dtype` for a dtype that has no arithmetic here.
    """
    info = located.info
    if info.dtype not in DTYPES:
        raise InputError("adapter.dtype", f"{quoted(info.name)} is {info.dtype}", file=where, tensors=[info.name])
    raw = bytearray(info.nbytes)
    located.file.source.read_into(info.begin, memoryview(raw))
    if not raw:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).view(info.shape)


def read_factor(adapter: Adapter, factor: Factor) -> Tensor:
    """A factor in our orientation, checked to be finite.

    Raises:
        InputError: `adapter.non-finite`.
    """
    tensor = read_tensor(Located(factor.file, factor.info), adapter.name)
    if factor.transposed:
        tensor = tensor.mT.contiguous()
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            "adapter.non-finite",
            f"{quoted(factor.key)} holds {count} values that are not finite numbers",
            fix="the training diverged or the file is damaged: use an earlier save",
            file=adapter.name,
            tensors=[factor.key],
        )
    return tensor


def weight_shape(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The weight's shape from factors alone: with its kernel where they show it, else (out, in * prod(kernel))."""
    if kind == PAIR and "A" in shapes:
        return shapes["B"][0], *shapes["A"][1:]
    if "mid" in shapes:
        return shapes["B"][0], shapes["A"][1], *shapes["mid"][2:]
    if "t1" in shapes:
        return shapes["w1_a"][1], shapes["w1_b"][1], *shapes["t1"][2:]
    if "diff" in shapes:
        return shapes["diff"]
    known = KINDS.get(kind)
    out_in: tuple[int, int] | None = None if known is None else known.out_in(shapes)
    if out_in is None:
        return None
    kernel = shapes["w2"][2:] if "w2" in shapes else shapes["t2"][2:] if "t2" in shapes else ()
    if kernel:
        return out_in[0], out_in[1] // prod(kernel), *kernel
    return out_in


def item_of(adapter: Adapter, module: Module, *, has_base: bool = False, written: bool = False) -> Item:
    """One module of an adapter as an item, by its own name.

    `has_base`: a base will tell what the factors alone do not: the scale of stacked factors, the parameter that they
    change. `written`: it is read back, and its rows need not be told.

    Raises:
        InputError: `adapter.rank`, `adapter.alpha`: see `Adapter.scale`.
        UnsupportedError: `convert.wrapped` for parameters that several modules wrap.
    """
    if adapter.settings.get("enable-lora") and not has_base:
        raise MismatchError(
            "convert.needs-base",
            "the adapter trains slots of grouped linears, whose heights only the weights tell",
            fix="give the model it was trained on: --base BASE",
            file=adapter.name,
        )
    if not (has_base or written) and _has_other_order(adapter, module):
        raise MismatchError(
            "convert.needs-base",
            f"{adapter.dialect.title} keeps the rows of {quoted(module.path)} in another order, in each head",
            fix="give the model it was trained on, which tells how many heads there are: --base BASE",
            file=adapter.name,
            tensors=[module.path],
        )
    if (module.depth or module.inner) and not has_base and not _depth_is_harmless(adapter, module):
        raise UnsupportedError(
            "convert.wrapped",
            f"{quoted(module.path)}: stacked parameters (experts) that are wrapped one around the other cannot be "
            "converted",
            fix="merge the adapter instead, or leave them out with --exclude",
            file=adapter.name,
            tensors=[f.key for f in module.factors.values()],
        )
    kind = KINDS.get(module.kind)
    known = {*kind.required, *kind.optional} if kind is not None else set(module.factors)
    kept = {n: f for n, f in module.factors.items() if n not in MAGNITUDES and (n != "alpha" or "alpha" in known)}
    factors = {name: read_factor(adapter, f) for name, f in kept.items() if name != "shape"}
    if module.kind == PAIR and {"A", "B"} <= factors.keys() and _is_turned_embedding(adapter, module):
        factors["embedding-A"], factors["embedding-B"] = factors.pop("B").T, factors.pop("A").T
    shapes = {name: tuple(f.shape) for name, f in factors.items()}
    item = Item(module.path, module.kind, factors, leaf=module.leaf, path=module.path)
    scale, options = 1.0, {}
    if module.kind == PAIR and "embedding-A" in shapes:
        shape: tuple[int, ...] | None = (shapes["embedding-B"][0], shapes["embedding-A"][1])
    else:
        shape = weight_shape(module.kind, shapes)
    rank = item.rank
    if rank is None and kind is not None and kind.scaled:
        rank = adapter.claimed_rank(module.path)
    if rank is not None and not (has_base and module.kind == PAIR):
        own = adapter.alpha(module) if "alpha" not in known else None
        scale = adapter.scale(module.path, rank, own=own) * quirk_scale(adapter, module)
    if (
        kind is not None
        and shape is not None
        and "embedding-A" not in shapes
        and not (has_base and module.kind == PAIR)
    ):
        options = _options(adapter, module, kind, shapes, shape)
        if options.get("scaled") is False:
            scale = 1.0
    return Item(
        module.path,
        module.kind,
        factors,
        scale,
        _magnitude(adapter, module, shape),
        module.leaf,
        path=module.path,
        shape=shape,
        options=options,
    )


def _has_other_order(adapter: Adapter, module: Module) -> bool:
    path = f".{module.path}"
    return any(
        any(path.endswith(f".{end}") for end in rule["modules"]) and holds(rule.get("when", {}), adapter.settings)
        for rule in adapter.dialect.rows
    )


def _is_turned_embedding(adapter: Adapter, module: Module) -> bool:
    """Whether the dialect keeps this embedding's pair as if it were a linear (vocabulary, dim)."""
    for pattern in adapter.dialect.patterns:
        if pattern.kind == PAIR and pattern.modules:
            matches = [(f.key, pattern.regex.search(f.key)) for f in module.factors.values()]
            if any(m and key[: m.start()].rpartition(".")[2] in pattern.modules for key, m in matches):
                return True
    return False


def _depth_is_harmless(adapter: Adapter, module: Module) -> bool:
    """`X.base_layer` where nothing else wraps X: X itself."""
    others = any(m.path == module.path and m.depth != module.depth for m in adapter.modules)
    return not others and not module.inner and not adapter.settings.get("target-parameters")


def settings_of(adapter: Adapter, module: Module) -> dict[str, Any]:
    """The settings of a module, and where it stands among those of its kind."""
    at, count = adapter.positions[module.path]
    settings = adapter.section(module.path).settings
    return {**settings, "module": module.path, "module-index": at, "module-count": count}


def _options(
    adapter: Adapter, module: Module, kind: Any, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> dict[str, Any]:
    try:
        options: dict[str, Any] = kind.options(shapes, settings_of(adapter, module), shape)
    except Unfit as error:
        raise InputError(
            "adapter.shape",
            f"{quoted(module.path)}: {error}",
            file=adapter.name,
            tensors=[f.key for f in module.factors.values()],
        ) from None
    except Refused as error:
        raise UnsupportedError(
            "adapter.refused", f"{quoted(module.path)} ({module.kind}): {error}", file=adapter.name
        ) from None
    return options


def _magnitude(adapter: Adapter, module: Module, shape: tuple[int, ...] | None) -> Magnitude | None:
    name = next((name for name in MAGNITUDES if name in module.factors), None)
    if name is None or shape is None:
        return None
    factor = module.factors[name]
    if "embedding-A" in module.factors or _is_turned_embedding(adapter, module):
        return Magnitude(read_factor(adapter, factor).flatten(), "vocabulary", MAGNITUDES[name])
    axis = magnitude_axis(factor.shape, shape)
    if MAGNITUDES[name] == "plain":
        axis = "output" if factor.info.numel == shape[0] else None
    if axis is None:
        raise InputError(
            "adapter.shape",
            f"{quoted(module.path)}: a magnitude {factor.shape} for a weight {shape}",
            file=adapter.name,
            tensors=[factor.key],
        )
    return Magnitude(read_factor(adapter, factor).flatten(), axis, MAGNITUDES[name])


def plain_items(adapter: Adapter, selected: Callable[[str], bool]) -> Iterable[Item]:
    """Parameters that the adapter brings whole: kind `plain`, factor `value`, the leaf being their last name."""
    for plain in adapter.plain:
        module, _, leaf = plain.path.rpartition(".")
        if selected(module):
            yield Item(module, "plain", {"value": read_factor(adapter, plain.factor)}, leaf=leaf, path=module)
