"""From the shapes of factors and weight to low-rank updates: orientation, convolutions, slots, experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.updates import LowRank, Pick
from loramerge.adapters.views import Part, Place, Take, View
from loramerge.binding.namespace import Namespace, Slot, Stack
from loramerge.errors import InputError, MismatchError, UnsupportedError
from loramerge.tensors.text import quoted


def low_rank_view(
    adapter: Adapter, index: int, weight: float, module: Module, view: View, pick: Pick | None = None
) -> list[LowRank]:
    """The low-rank updates of one module on a view: one for each of its parts.

    `pick`: which of several stacked factors, A (n, r, in) and B (n, out, r), belong to it.

    Raises:
        MismatchError: `adapter.shape`.
    """
    A, B = module.factors["A"], module.factors["B"]
    a, b = (A.shape, B.shape) if pick is None else (A.shape[-2:], B.shape[1:])
    if pick is not None and len(A.shape) == 2 and a[0] % pick.of == 0:  # (n*r, in)
        a = (a[0] // pick.of, a[1])
    if (b[0], prod(a[1:])) != (view.rows, view.cols) or a[0] != prod(b[1:]):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: A {A.shape} and B {B.shape} do not fit {view.shape} of the base",
            file=adapter.name,
            tensors=[part.tensor for part in view.parts],
        )
    scale = adapter.scale(module.path, a[0], own=adapter.alpha(module)) * weight
    return [LowRank(index, module.path, A.key, B.key, scale, a[0], pick or Pick(), part) for part in view.parts]


def _module_of(slot: Slot) -> str:
    """The module of a stored weight: its own name, where the adapter's may be flattened."""
    return slot.name.rpartition(".")[0]


def low_rank(
    adapter: Adapter, index: int, weight: float, module: Module, slot: Slot, names: Namespace
) -> list[LowRank]:
    """The low-rank updates of one module on one stored tensor (one, or one for each trained slot).

    Raises:
        MismatchError: `adapter.shape`, with both shapes and what is probably wrong.
        UnsupportedError: grouped convolutions.
        InputError: ranks that disagree, or slots that nothing names.
    """
    embedding = "embedding-A" in module.factors
    A = module.factors["embedding-A" if embedding else "A"]
    B = module.factors["embedding-B" if embedding else "B"]
    r, width = A.shape[0], prod(A.shape[1:])
    out, b_rank = B.shape[0], prod(B.shape[1:])
    rows, cols = slot.shape[0], prod(slot.shape[1:])

    def make(rank: int, scale_rank: int, flipped: bool, place: Place, pick: Pick | None = None) -> LowRank:
        scale = (
            adapter.scale(module.path, scale_rank, own=adapter.alpha(module)) * quirk_scale(adapter, module) * weight
        )
        part = Part(slot.name, place, flipped, (Take(0, place.width if flipped else place.rows),))
        return LowRank(index, module.path, A.key, B.key, scale, rank, pick or Pick(), part)

    whole = Place(0, rows, cols, 0, cols)
    matrix = len(slot.shape) == 2
    kernel = slot.shape[2:]
    if r == b_rank:
        straight = (out, width) == (rows, cols) and _same_kernel(A.shape, slot.shape)
        turned = matrix and (out, width) == (cols, rows)
        if embedding:
            if turned:
                return [make(r, r, True, whole)]
        elif straight and turned:
            return [make(r, r, names.is_flipped(adapter.settings.get("fan-in-fan-out"), _module_of(slot)), whole)]
        elif straight or turned:
            return [make(r, r, turned, whole)]
        if len(A.shape) == 2 and len(slot.shape) == 4 and kernel[0] == kernel[1] and r % kernel[0] == 0:
            # loralib 0.1.2, ConvLoRA: A (r*k, in*k), B (out/groups*k, r*k), B A viewed as (out, in/groups, k, k)
            k = kernel[0]
            if out * width == rows * cols and out % k == 0 and width % (slot.shape[1] * k) == 0:
                return [make(r, r // k, False, Place(0, out, width, 0, width))]
    if not embedding and r % b_rank == 0 and len(slot.shape) >= 2:
        slots = _slots(adapter, module, slot, r // b_rank, out, width)
        if slots is not None:
            g, enabled, flipped = slots
            block = out // g
            updates = []
            for j, at in enumerate(enabled):
                if flipped:
                    place = Place(0, rows, cols, at * block, (at + 1) * block)
                else:
                    place = Place(at * block * cols, block, cols, 0, cols)
                updates.append(make(b_rank, b_rank, flipped, place, Pick("slot", j, g)))
            return updates
    raise _mismatch(adapter, module, slot, r, b_rank, (out, width), names)


def _same_kernel(a: Sequence[int], w: Sequence[int]) -> bool:
    """A convolution's A has the weight's kernel; a flat A may stand for a kernel of ones, and the reverse."""
    return tuple(a[1:]) == tuple(w[1:]) or (len(a) != len(w) and (len(w) == 2 or prod(w[2:]) == 1))


def _slots(
    adapter: Adapter, module: Module, slot: Slot, g: int, out: int, width: int
) -> tuple[int, list[int], bool] | None:
    """Slots of a grouped linear: (how many are trained, which, flipped), or None where shapes do not fit.

    `A (r*g, in)`, `B (out/n*g, r)` for g of n slots (loralib 0.1.2, layers.py MergedLinear).
    """
    rows, cols = slot.shape[0], prod(slot.shape[1:])
    if out % g:
        return None
    block = out // g
    if width == cols and rows % block == 0 and rows >= out:
        total, flipped = rows, False
    elif width == rows and cols % block == 0 and cols >= out:
        total, flipped = cols, True
    else:
        return None
    n = total // block
    enabled: Any = adapter.settings.get("enable-lora")
    if enabled is None:
        if g == n:
            return g, list(range(n)), flipped
        raise InputError(
            "adapter.slots",
            f"{quoted(module.path)} trains {g} of {n} slots of a fused weight, and nothing says which",
            fix=f"give them, for example --enable-lora {','.join('1' if i % 2 == 0 else '0' for i in range(n))}",
            file=adapter.name,
            tensors=[module.path],
        )
    if not isinstance(enabled, list) or len(enabled) != n or sum(map(bool, enabled)) != g:
        raise MismatchError(
            "adapter.slots",
            f"{quoted(module.path)} trains {g} of {n} slots, but enable_lora is {enabled}",
            file=adapter.name,
            tensors=[module.path],
        )
    return g, [i for i, on in enumerate(enabled) if on], flipped


def stacked_low_rank(
    adapter: Adapter,
    index: int,
    weight: float,
    module: Module,
    parameter: str,
    stack: Stack,
    names: Namespace,
) -> list[tuple[str, LowRank]]:
    """Updates of a stacked parameter, one for each expert and piece: (stored tensor, update).

    `delta[e] = s B[:, :, e] A[e]`, (b, a), added to the (d1, d2) matrix of expert e as it is or transposed;
    the shapes decide, and where d1 = d2 the version that wrote it (peft 0.21.2, tuners/lora/layer.py ParamWrapper).
    """
    A, B = module.factors["A"], module.factors["B"]
    experts, d1, d2 = stack.shape
    a, b = A.shape[1], B.shape[0]
    if A.shape[0] % experts or B.shape[1] != A.shape[0] or (a, b) not in ((d1, d2), (d2, d1)):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: A {A.shape} and B {B.shape} do not fit {parameter} {stack.shape} of the base",
            file=adapter.name,
            tensors=[module.path],
        )
    flipped = (a, b) == (d1, d2)
    if d1 == d2:
        flipped = _square_experts_flipped(adapter, names)
    rank = A.shape[0] // experts
    grouped = adapter.settings.get("grouped-experts", False)
    scale = adapter.scale(f"{module.path}.{parameter}", A.shape[0], stacked=experts) * weight
    updates = []
    for e in range(experts):
        for name, first, rows in stack.pieces[e] if stack.pieces else ((stack.name, 0, d1),):
            begin = 0 if stack.pieces else e * d1 * d2
            place = Place(begin, rows, d2, 0, d2)
            how = f"{'turned-' if flipped else ''}{'grouped-' if grouped else ''}expert"
            pick = Pick(how, e, experts)
            part = Part(name, place, False, (Take(first, first + rows),))
            updates.append((name, LowRank(index, module.path, A.key, B.key, scale, rank, pick, part)))
    return updates


def _square_experts_flipped(adapter: Adapter, names: Namespace) -> bool:
    """Square experts: by the version that wrote them (0.19.0 had the two cases exchanged, peft #3165)."""
    transposed = names.model_type in names.families.experts_transposed
    version = version_of(adapter)
    if version is None or version <= version_tuple(adapter.dialect.experts["stored-transposed-until"]):
        return True
    return not transposed if version == (0, 19, 0) else transposed


def quirk_scale(adapter: Adapter, module: Module) -> float:
    """A factor that a version of the trainer put on some modules, from the dialect's `[[quirk]]` rows.

    Raises:
        UnsupportedError: `adapter.version` where nothing says which version trained it.
    """
    scale = 1.0
    for quirk in adapter.dialect.quirks:
        if not module.inner or module.inner != quirk["inner"]:
            continue
        version = version_of(adapter)
        if version is None:
            field = adapter.dialect.config["version"]
            raise UnsupportedError(
                "adapter.version",
                f"{quoted(module.path)}: {quirk['why']}; nothing says which version trained this",
                fix=f'write it into the config: "{field}": "0.17.0"',
                file=adapter.name,
                tensors=[module.path],
            )
        if version_tuple(quirk["from"]) <= version <= version_tuple(quirk["until"]):
            scale *= quirk["scale"]
    return scale


def version_of(adapter: Adapter) -> tuple[int, ...] | None:
    """The version that wrote the adapter; None where its config does not say."""
    text = adapter.settings.get("version")
    return version_tuple(text) if isinstance(text, str) else None


def version_tuple(text: str) -> tuple[int, ...]:
    """`"0.19.1.dev0"` -> (0, 19, 1)."""
    numbers = []
    for part in text.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _mismatch(
    adapter: Adapter,
    module: Module,
    slot: Slot,
    r: int,
    b_rank: int,
    delta: tuple[int, int],
    names: Namespace,
) -> Exception:
    """The error for factors that do not fit, with what is probably wrong."""
    embedding = "embedding-A" in module.factors
    A = module.factors["embedding-A" if embedding else "A"].shape
    B = module.factors["embedding-B" if embedding else "B"].shape
    rows, cols = slot.shape[0], prod(slot.shape[1:])
    why, fix = "", "is this the base that the adapter was trained on?"
    if len(A) == 2 and len(B) == 2:
        if (A[1], B[0]) != (cols, rows) and (A[0], B[1]) == (cols, rows) and A[1] == B[0]:
            why, fix = "; both factors are transposed", "is this an MLX or hand-made file?"
        elif (A[0], B[1]) == (rows, cols) and A[1] == B[0]:
            why, fix = "; A and B are exchanged", "save the adapter with A (rank, in) and B (out, rank)"
    if r != b_rank and not why:
        return InputError(
            "adapter.rank",
            f"{quoted(module.path)}: A {A} has rank {r}, B {B} has rank {b_rank}",
            fix="the file is damaged or was edited: save the adapter again",
            file=adapter.name,
            tensors=[module.path],
        )
    if len(slot.shape) > 2 and len(A) == len(slot.shape) and A[1] > slot.shape[1] and A[1] % slot.shape[1] == 0:
        return UnsupportedError(
            "adapter.grouped-conv",
            f"{quoted(module.path)} is a grouped convolution: A spans all channels, the weight only "
            f"{slot.shape[1]} of {A[1]}, so no weight can hold the update",
            file=adapter.name,
            tensors=[module.path],
        )
    if embedding or names.families.is_vocabulary(module.path):
        # delta = (dim, vocabulary) for embeddings, (vocabulary, dim) for heads
        have = delta[1] if embedding else delta[0]
        if have > rows and cols == (delta[0] if embedding else delta[1]):
            why = f"; the adapter's tokenizer adds {have - rows} tokens"
            fix = "save the adapter with its embedding (save_embedding_layers=True), or resize the base"
    return MismatchError(
        "adapter.shape",
        f"{quoted(module.path)}: A {A} and B {B} do not fit the weight {slot.shape}{why}",
        fix=fix,
        file=adapter.name,
        tensors=[slot.name],
    )
