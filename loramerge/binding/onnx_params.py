"""The parameters of an ONNX model as an adapter knows them: by the names of weights and by the modules of nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loramerge.binding.lowering import Site, whole_site
from loramerge.binding.onnx_uses import BIAS, CONV, EMBEDDING, LINEAR, OTHER, SCALE, Use
from loramerge.tensors.dtypes import is_float
from loramerge.tensors.safetensors import TensorInfo

_LEAVES = {LINEAR: "weight", EMBEDDING: "weight", CONV: "weight", SCALE: "weight", BIAS: "bias"}
_AGAIN = re.compile(r"_\d+$")

CODES = "U8"
"""The dtype that stands for a weight kept as codes: binding refuses it as quantised."""


@dataclass
class Param:
    """A parameter: what binding sees of it, and the tensors that hold it.

    `shape`: as a module has it, (out, in) for a linear, whichever way the graph keeps it. `tensors`: each stored tensor
    that may hold it, and whether turned around. `named`: the one of them that has its name. `oriented`: the graph tells
    that its rows are its outputs. `quantised`: the operator that reads it as codes. `twins`: paths that look like
    further calls of its module.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: dict[str, bool] = field(default_factory=dict)
    named: str = ""
    oriented: bool = False
    quantised: str = ""
    twins: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def site(self, tensor: str, info: TensorInfo) -> Site:
        """The parameter in one of its tensors."""
        return whole_site(tensor, info.shape, turned=self.tensors[tensor])


@dataclass(frozen=True)
class Shared:
    """Who uses a stored tensor: kinds of operators with their orientation, and paths of modules."""

    ways: frozenset[tuple[str, bool]]
    paths: frozenset[str]
    ops: tuple[str, ...]
    scaled: bool


def params_of(
    tensors: Mapping[str, TensorInfo], uses: Mapping[str, list[Use]], is_transposed: Callable[[str], bool | None]
) -> tuple[dict[str, Param], dict[str, Shared]]:
    """Parameters by name, and who uses each stored tensor.

    A parameter has the name of the weight, and that of the module of every node that reads it. Where both are known and
    differ, the module of the node is right: exporters give one name to weights that are equal.

    Args:
        tensors: the floating-point tensors and those of codes, by key.
        uses: what reads them.
        is_transposed: whether a module's own layout is (in, out); None where nobody knows.
    """
    calls = _calls(uses)
    params: dict[str, Param] = {}
    shared: dict[str, Shared] = {}
    for key, info in tensors.items():
        own = [use._replace(path=calls.get((key, use.path), use.path)) for use in uses.get(key, ())]
        shared[key] = _shared(own)
        for use in own:
            leaf = _LEAVES.get(use.kind)
            if leaf is not None and use.path:
                _add(params, f"{use.path}.{leaf}", key, info, use, is_transposed)
    scoped = set(params)
    for key, info in tensors.items():
        if not is_float(info.dtype) or "/" in key:  # a slash is of no module's path, and tells components elsewhere
            continue
        param = params.get(key)
        known = shared[key].paths - {""}
        module = key.rpartition(".")[0]
        if param is not None and key in param.tensors:
            param.named = key
        elif key in scoped and known:
            continue  # that module reads another tensor, other modules read this one
        elif key not in params or not known:
            use = next((u for u in uses.get(key, ()) if u.kind != OTHER), Use(OTHER, False, module, ""))
            _add(params, key, key, info, use, is_transposed)
            if key in params and key in params[key].tensors:
                params[key].named = key
    _pair_twins(params)
    return params, shared


def _shared(uses: list[Use]) -> Shared:
    matrices = {(use.kind, use.flipped) for use in uses if use.kind in (LINEAR, EMBEDDING, CONV)}
    lines = {(use.kind, False) for use in uses if use.kind in (SCALE, BIAS)}
    others = {(use.kind, False) for use in uses if use.kind == OTHER}
    return Shared(
        frozenset(matrices | lines | (others if not matrices else set())),
        frozenset(use.path for use in uses),
        tuple(sorted({use.op for use in uses})),
        any(use.scaled for use in uses),
    )


def _calls(uses: Mapping[str, list[Use]]) -> dict[tuple[str, str], str]:
    """(weight, path) -> the path without the number of the call, where the same weight is read without one too."""
    found = {}
    for key, own in uses.items():
        paths = {use.path for use in own}
        for path in paths:
            if (first := _AGAIN.sub("", path)) != path and first in paths:
                found[key, path] = first
    return found


def _add(
    params: dict[str, Param],
    name: str,
    key: str,
    info: TensorInfo,
    use: Use,
    is_transposed: Callable[[str], bool | None],
) -> None:
    """Adds a tensor to those that may hold a parameter."""
    matrix = len(info.shape) == 2
    turned = use.flipped and matrix and use.kind in (LINEAR, EMBEDDING)
    oriented = matrix and use.kind == LINEAR
    if turned and use.kind == LINEAR and is_transposed(name.rpartition(".")[0]):
        turned = oriented = False  # the module itself keeps (in, out): the checkpoint's layout, which binding knows
    shape = info.shape[::-1] if turned else info.shape
    param = params.setdefault(name, Param(name, CODES if use.quantised else info.dtype, shape, oriented=oriented))
    param.quantised = param.quantised or (use.op if use.quantised else "")
    if param.shape == shape:
        param.tensors.setdefault(key, turned)
    elif name == key and not use.quantised:  # its own name says more than a node
        params[name] = Param(name, info.dtype, shape, {key: turned}, oriented=oriented)


def _pair_twins(params: dict[str, Param]) -> None:
    """Notes paths `query_1` beside `query`: exporters number the calls of a module, and fold its weight for each."""
    for name, param in params.items():
        module, _, leaf = name.rpartition(".")
        first = _AGAIN.sub("", module)
        if first != module and (other := params.get(f"{first}.{leaf}")) is not None and other.shape == param.shape:
            other.twins.append(name)
