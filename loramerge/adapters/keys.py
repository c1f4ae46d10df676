"""The keys of an adapter file, sorted: factors of modules, whole parameters, known harmless; complete or an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramerge.adapters.adapter import FACTOR_DTYPES, Adapter, Factor, Module, Plain
from loramerge.adapters.dialect import ANY_KIND, Dialect
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import takes
from loramerge.adapters.kinds.block_diagonal import compact_sides
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.errors import InputError, UnsupportedError
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.dtypes import display, is_float
from loramerge.tensors.text import plural, quoted, some

BESIDE = ("difference", "replacement", "token-rows")
"""Kinds that stand beside another kind of the same module."""

LOOSE = ("alpha", "shape")
"""Factors that a module of any kind may have: its alpha, the shape that its weight is padded to first."""

_Place = tuple[str, int, str]


@dataclass(frozen=True)
class SortedKeys:
    """What every key of a file is."""

    modules: tuple[Module, ...]
    plain: tuple[Plain, ...]
    harmless: tuple[str, ...]
    transposed: frozenset[str]
    notes: tuple[str, ...]


def sort_keys(dialect: Dialect, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> SortedKeys:
    """Sorts every key of a file.

    Raises:
        InputError: two keys for one factor, several adapters in one file, a factor without its module's others.
        UnsupportedError: a kind of factor that no static weight can hold.
    """
    method = dialect.methods.get(str(settings.get("type")), {})
    shared, keys = _shared(method, checkpoint)
    grouped: dict[_Place, dict[tuple[str, str], dict[str, Factor]]] = {}
    plain: list[Plain] = []
    harmless: list[str] = []
    names: Counter[str] = Counter()
    transposed: set[str] = set()
    carried: Counter[str] = Counter()
    for key in keys:
        located = checkpoint.tensors[key]
        if prefix := next((p for p in dialect.carried if key.startswith(p)), ""):
            carried[prefix] += 1
            harmless.append(key)
            continue
        parsed = dialect.parse(key, checkpoint.tensors)
        if parsed.adapter_name:
            names[parsed.adapter_name] += 1
        axes = len(located.info.shape)
        turned = parsed.transposed and axes > 1 and parsed.axes in (0, axes)
        factor = Factor(key, located.info, located.file, turned)
        if factor.transposed:
            transposed.add(key)
        if parsed.kind == "harmless" or (dialect.placeholders and 0 in located.info.shape):
            harmless.append(key)
        elif parsed.kind == "refused":
            raise UnsupportedError("adapter.refused", f"{quoted(key)}: {parsed.factor}", file=checkpoint.name)
        elif parsed.kind == "plain":
            plain.append(Plain(parsed.path, factor, parsed.depth, parsed.saved))
        else:
            group = grouped.setdefault((parsed.path, parsed.depth, parsed.inner), {})
            factors = group.setdefault((parsed.kind, parsed.leaf), {})
            if parsed.factor in factors:
                raise InputError(
                    "adapter.duplicate",
                    f"two keys are factor {parsed.factor} of one module",
                    file=checkpoint.name,
                    tensors=[factors[parsed.factor].key, key],
                )
            factors[parsed.factor] = factor
    _straighten(grouped, transposed)
    if len(names) > 1:
        raise InputError(
            "adapter.names",
            f"the file holds several adapters: {some(sorted(names))}",
            fix="save each adapter to its own file",
            file=checkpoint.name,
        )
    modules: list[Module] = []
    for place, group in grouped.items():
        role = _role(place[0], method.get("roles", {}))
        common = {name: factor for name, of, factor in shared if of in ("", role)}
        modules += _modules(place, group, common, harmless, checkpoint.name)
    if compact := settings.get("block-diagonal"):
        modules = [_compact(module, compact) for module in modules]
    notes = tuple(f"{plural(n, 'tensor')} under {quoted(p)} left out: {dialect.carried[p]}" for p, n in carried.items())
    return SortedKeys(tuple(modules), tuple(plain), tuple(harmless), frozenset(transposed), notes)


def _straighten(grouped: Mapping[_Place, Mapping[tuple[str, str], dict[str, Factor]]], transposed: set[str]) -> None:
    """An A of two axes beside a B with an axis for experts is (experts * r, in), and never lies transposed.

    Older releases of mlx-lm wrote LoRASwitchLinear so; its `fuse` still reads both.
    """
    for group in grouped.values():
        for factors in group.values():
            A, B = factors.get("A"), factors.get("B")
            if A is not None and B is not None and A.transposed and len(A.shape) == 2 and len(B.shape) == 3:
                factors["A"] = replace(A, transposed=False)
                transposed.discard(A.key)


def _shared(method: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[list[tuple[str, str, Factor]], list[str]]:
    """Tensors that modules share, and the keys that remain: (factor name, role or "", tensor).

    `[method.X.shared]` says which key is which factor: `"v.{n}"` where the key's last segment is a number that belongs
    to the factor's name, `"V {role}"` where it is the role of the modules that share the tensor.
    """
    table = method.get("shared", {})
    shared: list[tuple[str, str, Factor]] = []
    rest: list[str] = []
    for key, located in checkpoint.tensors.items():
        stem = next((s for s in table if key == s or (key.startswith(f"{s}.") and "." not in key[len(s) + 1 :])), None)
        if stem is None:
            rest.append(key)
        else:
            name, _, kept = table[stem].partition(" ")
            tail = key[len(stem) + 1 :]
            factor = Factor(key, located.info, located.file)
            shared.append((name.replace("{n}", tail), tail if kept else "", factor))
    return shared, rest


def _role(path: str, roles: Mapping[str, str]) -> str:
    """What a module does in its layer, by its path: as `roles` says, else its last two segments, without numbers.

    peft 0.21.2, tuners/frod/model.py, names shared tensors so: `layers.3.attn.q` is `attn_q`, `layers.3.q` is `q`.
    """
    for ending, role in roles.items():
        if path.endswith(f".{ending}") or path == ending:
            return role
    last = path.split(".")[-2:]
    return last[-1] if last[0].isdigit() else "_".join(last)


def _modules(
    place: _Place,
    group: Mapping[tuple[str, str], Mapping[str, Factor]],
    shared: Mapping[str, Factor],
    harmless: list[str],
    where: str,
) -> list[Module]:
    """The modules that the factors under one path are: one of a kind of its own, and what may stand beside it."""
    path, depth, inner = place
    loose = {name: f for (kind, _), factors in group.items() if kind == ANY_KIND for name, f in factors.items()}
    kinds = {kind: dict(factors) for (kind, _), factors in group.items() if kind not in (ANY_KIND, *BESIDE)}
    leaf = next((leaf for (kind, leaf) in group if kind not in (ANY_KIND, *BESIDE) and leaf), "")
    made = [
        Module(path, kind, depth, inner, factors, leaf) for (kind, leaf), factors in group.items() if kind in BESIDE
    ]
    if len(kinds) > 1:
        keys = [next(iter(factors.values())).key for factors in kinds.values()]
        raise InputError(
            "adapter.duplicate",
            f"{quoted(path)} has two kinds of factors: {some(sorted(kinds))}",
            file=where,
            tensors=keys,
        )
    for kind, factors in kinds.items():
        if kind == "low-rank" and "mid" in factors:
            kind = "tucker"
        if kind == "low-rank" and "diag" in factors:
            kind = "truncated-pair"
        if kind in KINDS:
            factors |= {name: f for name, f in shared.items() if takes(KINDS[kind], name)}
        made.insert(0, Module(path, kind, depth, inner, factors | loose, leaf))
    if loose and not kinds:
        if not made:
            raise InputError(
                "adapter.half-pair",
                f"{quoted(path)} has {some(sorted(loose))} but no factors",
                fix="the file is incomplete: save or download it again",
                file=where,
                tensors=[f.key for f in loose.values()],
            )
        harmless += [f.key for f in loose.values()]  # a difference has no scale
    return made


def _compact(module: Module, wanted: Any) -> Module:
    """A low-rank pair that the config says to be stored as the blocks of a block diagonal."""
    if module.kind == "low-rank" and isinstance(wanted, Mapping) and compact_sides(module.path, wanted):
        return replace(module, kind="block-diagonal")
    return module


def check_factors(adapter: Adapter) -> None:
    """What can be told from the adapter alone: pairs complete, shapes sane, DoRA as the config says."""
    where = adapter.name
    if not adapter.checkpoint.tensors:
        raise InputError("adapter.empty", "holds no tensors", fix="the save was interrupted? save it again", file=where)
    whole = {p.factor.key for p in adapter.plain}  # parameters taken as they are may have any dtype
    empty: set[str] = set()
    for module in adapter.modules:
        whole |= {f.key for name, f in module.factors.items() if name in (*LOOSE, *integers(module.kind))}
        sparse = getattr(KINDS.get(module.kind), "may_be_empty", ())
        empty |= {f.key for name, f in module.factors.items() if name in sparse}
    harmless = set(adapter.harmless)
    for key, factor in adapter.factors().items():
        if key in harmless:
            continue
        if 0 in factor.shape and key not in empty:
            raise InputError(
                "adapter.empty-tensor",
                f"{quoted(key)} is empty: a ZeRO-3 or FSDP shard saved without gathering?",
                fix="save it again with the full parameters gathered (for example zero_to_fp32.py)",
                file=where,
                tensors=[key],
            )
        if factor.info.dtype not in FACTOR_DTYPES and key not in whole:
            what = display(factor.info.dtype)
            if not is_float(factor.info.dtype):
                what += ", not a floating-point type"
            raise InputError("adapter.dtype", f"{quoted(key)} is {what}", file=where, tensors=[key])
    dora = adapter.settings.get("dora")
    for module in adapter.modules:
        if module.kind != "low-rank":
            _check_complete(adapter, module)
        else:
            _check_pair(adapter, module)
            if "dora" in adapter.dialect.config and bool(dora) != ("magnitude" in module.factors):
                wrong = (
                    "says DoRA but there is no magnitude"
                    if dora
                    else "has a DoRA magnitude but the config says no DoRA"
                )
                raise InputError(
                    "adapter.dora",
                    f"{quoted(module.path)} {wrong}",
                    fix=f"correct {adapter.dialect.config['dora']} in the config, or save the adapter again",
                    file=where,
                    tensors=[module.path],
                )


def integers(kind: str) -> tuple[str, ...]:
    """The factors of a kind that hold whole numbers: flags, indices, sizes."""
    return getattr(KINDS.get(kind), "integers", ())


def _check_pair(adapter: Adapter, module: Module) -> None:
    present = set(module.factors)
    for a, b in (("A", "B"), ("embedding-A", "embedding-B")):
        if (a in present) != (b in present):
            have, lack = (a, b) if a in present else (b, a)
            raise InputError(
                "adapter.half-pair",
                f"{quoted(module.path)} has factor {have} but no {lack}",
                fix="the file is incomplete: save or download it again",
                file=adapter.name,
                tensors=[module.factors[have].key],
            )
    if not present & {"A", "embedding-A"}:
        raise InputError(
            "adapter.half-pair",
            f"{quoted(module.path)} has {some(sorted(present))} but no A and B",
            file=adapter.name,
            tensors=[f.key for f in module.factors.values()],
        )
    if {"A", "embedding-A"} <= present:
        raise InputError("adapter.duplicate", f"{quoted(module.path)} has two kinds of factors", file=adapter.name)
    down = module.factors.get("A") or module.factors["embedding-A"]
    up = module.factors.get("B") or module.factors["embedding-B"]
    if len(down.shape) < 2 or len(up.shape) < 2:
        raise InputError(
            "adapter.flat",
            f"the factors of {quoted(module.path)} are flat {down.shape}, {up.shape}: a shard saved without gathering?",
            fix="save it again with the full parameters gathered (for example zero_to_fp32.py)",
            file=adapter.name,
            tensors=[down.key, up.key],
        )


def _check_complete(adapter: Adapter, module: Module) -> None:
    """Every factor that a kind must have, and none that it does not know."""
    kind = KINDS.get(module.kind)
    if kind is None:
        return
    missing = [name for name in kind.required if name not in module.factors]
    strange = [name for name in module.factors if not takes(kind, name) and name not in (*LOOSE, *MAGNITUDES)]
    if missing or strange:
        what = f"lacks {some(missing)}" if missing else f"has {some(strange)}, which does not belong there"
        raise InputError(
            "adapter.half-pair",
            f"{quoted(module.path)} ({module.kind}) {what}",
            fix="the file is incomplete: save or download it again",
            file=adapter.name,
            tensors=[f.key for f in module.factors.values()],
        )
