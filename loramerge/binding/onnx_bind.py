"""Binds adapters to an ONNX model: to its parameters first, and those to the tensors that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.families import families
from loramerge.binding.namespace import Slot
from loramerge.binding.onnx_lowering import GIVE_BASE, MERGE_FIRST, Lowering
from loramerge.binding.onnx_params import Param, params_of
from loramerge.binding.onnx_uses import OTHER, Use, uses_of
from loramerge.binding.onnx_values import Recorded, Values
from loramerge.errors import LoramergeError, MismatchError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.dtypes import is_float
from loramerge.tensors.onnx_file import all_weights
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.text import some


def bind_onnx(
    model: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    base: Checkpoint | None = None,
    sites: Mapping[str, Any] | None = None,
    copies: bool = True,
) -> Binding:
    """Decides what each adapter does to each tensor of an ONNX model.

    A module is found by the name of its weight, or by the nodes that an exporter noted to be of it; where that finds
    not all of them and `base` is given, by the values that `base` has for its weight.

    Args:
        model: with its graph.
        base: the checkpoint that it was exported from, where the user gave it.
        sites: what an earlier merge found by values (`Binding.sites`).
        copies: whether a weight that the graph has more than once may change: each copy by itself.
        The others: as `loramerge.binding.bind.bind`.

    Raises:
        MismatchError: as `bind`; `onnx.no-site`, `onnx.ambiguous`, `onnx.shared`. UnsupportedError: `onnx.layout`,
            `onnx.quantised`, `onnx.encoded`, `onnx.shape`, `onnx.checksum`, `onnx.copies`.
    """
    assert model.onnx is not None
    config = model.config or (base.config if base is not None else None) or {}
    facts, model_type = families(), config.get("model_type")
    uses = uses_of(model.onnx)
    tensors = _weights(model, uses)
    known = model_type if isinstance(model_type, str) else None
    params, shared = params_of(tensors, uses, lambda module: known is not None and facts.is_transposed(known, module))
    slots = [Slot(p.name, p.name, p.dtype, p.shape) for p in params.values()]
    oriented = frozenset(p.module for p in params.values() if p.oriented)

    def turned(name: str, tensor: str) -> bool:
        flipped = any(use.flipped for use in uses.get(tensor, ()) if use.kind != OTHER)
        return flipped != bool(known is not None and facts.is_transposed(known, name.rpartition(".")[0]))

    def bound(more: Sequence[Slot], lenient: bool) -> Binding:
        return bind(
            [*slots, *more],
            config,
            adapters,
            include=include,
            exclude=exclude,
            allow_unmatched=lenient,
            base_name=model.name,
            oriented=oriented,
        )

    elsewhere: Values | Recorded | None = None if base is None else Values(model, base, turned)
    elsewhere = Recorded(model, sites) if sites else elsewhere
    try:
        made = bound((), allow_unmatched and elsewhere is None)
    except MismatchError as error:
        if elsewhere is None or error.code not in ("adapter.unmatched", "adapter.no-match"):
            raise _explained(error, params, base is not None) from None
        try:
            made = bound(_only_in(elsewhere.slots, params), allow_unmatched)
        except LoramergeError as error:
            raise _explained(error, params, True) from None
    except LoramergeError as error:
        raise _explained(error, params, base is not None) from None
    lowering = Lowering(model, params, shared, elsewhere, made)
    done = lowering.binding()
    several = [name for name, own in lowering.sites.items() if len(own) > 1]
    if several and not copies:
        raise UnsupportedError(
            "onnx.copies",
            f"the graph has copies of {some(several)}, and the method could give each of them another value",
            fix=f"--method linear, or {MERGE_FIRST}",
            file=model.name,
            tensors=several,
        )
    done.notes += _folded(model, uses, lowering.changed)
    return done


def _weights(model: Checkpoint, uses: Mapping[str, Sequence[Use]]) -> dict[str, TensorInfo]:
    """The tensors that could be weights of modules: numbers, and codes that an operator reads as such."""
    assert model.onnx is not None
    found = {
        key: located.info
        for key, located in model.tensors.items()
        if is_float(located.info.dtype) or any(use.quantised for use in uses.get(key, ()))
    }
    for weight in all_weights(model.onnx):
        if weight.encoded and is_float(weight.dtype):
            found.setdefault(weight.key, TensorInfo(weight.key, weight.dtype, weight.shape, 0, 0))
    return found


def _only_in(slots: Sequence[Slot], params: Mapping[str, Param]) -> list[Slot]:
    """The tensors of a checkpoint that no parameter is called like, perhaps with more before its name."""
    ends = {name[i + 1 :] for name in params for i, char in enumerate(name) if char == "."} | set(params)
    return [slot for slot in slots if slot.name not in ends]


def _folded(model: Checkpoint, uses: Mapping[str, Sequence[Use]], changed: Iterable[str]) -> list[str]:
    """Notes on constants that exporters computed when they folded: from weights that change now, for all one can see.

    A batch of matrices without a module's name, multiplied with in a module around one that changes, or where the graph
    does not say in which, as in models that project a table of positions.
    """
    around = {path.rpartition(".")[0] for path in changed} - {""}
    odd = sorted(
        key
        for key, own in uses.items()
        if key in model.tensors
        and len(model.tensors[key].info.shape) > 2
        and "." not in key
        and is_float(model.tensors[key].info.dtype)
        and min(model.tensors[key].info.shape[-2:]) > 1  # frequencies of positions are a batch of vectors
        and any(use.op == "MatMul" and (not use.path or use.path in around) for use in own)
    )
    if not odd:
        return []
    return [
        f"{some(odd)} may have been computed from weights that change, when the model was exported: compare its "
        "outputs, or export the merged checkpoint"
    ]


def _explained(error: LoramergeError, params: Mapping[str, Param], has_base: bool) -> LoramergeError:
    """An error of binding with the way out that there is for an ONNX model."""
    if error.code == "base.quantised":
        ops = sorted({params[name].quantised for name in error.tensors if name in params})
        by = f" (by {some(ops)})" if ops else ""
        return UnsupportedError(
            "onnx.quantised",
            f"{some(list(error.tensors))} is kept as codes{by}: adding to it would round it a second time",
            fix="merge into the float model, or the checkpoint, that it was quantised from, and quantise the result",
            file=error.file,
            tensors=error.tensors,
        )
    if error.code in ("adapter.unmatched", "adapter.no-match") and not has_base:
        error.fix = f"{GIVE_BASE}; or {error.fix}" if error.code == "adapter.unmatched" else GIVE_BASE
    return error
