"""An adapter as its trainer saved it: opened from headers, every key named, every claim of its config checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramerge.adapters.dialect import Dialect, ParsedKey, detect, dialects, weight_names
from loramerge.adapters.patterns import Patterns
from loramerge.errors import InputError, MismatchError, UnsupportedError
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import Checkpoint, PickleReader, WeightFile, open_checkpoint
from loramerge.tensors.dtypes import display, is_float
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.source import FileSource
from loramerge.tensors.text import plural, quoted, some

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Factor:
    """One tensor of an adapter file."""

    key: str
    info: TensorInfo
    file: WeightFile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape


@dataclass(frozen=True)
class Module:
    """The factors that an adapter holds for one module, by factor name.

    `depth` and `inner` tell wrapped parameters of one module apart (see `ParsedKey`).
    """

    path: str
    kind: str
    depth: int
    inner: str
    factors: Mapping[str, Factor]


@dataclass(frozen=True)
class Plain:
    """A parameter that the adapter brings whole: `path` is its full name, `X.weight`."""

    path: str
    factor: Factor
    depth: int
    saved: bool


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, headers only. Made by `open_adapter`; nothing of its weights has been read.

    `settings` are the values of its config under the names that the dialect's table gives them
    (`alpha`, `rank`, `rslora`, ...).
    """

    name: str
    path: Path
    dialect: Dialect
    checkpoint: Checkpoint
    modules: tuple[Module, ...]
    plain: tuple[Plain, ...]
    harmless: tuple[str, ...]
    settings: Mapping[str, Any]
    rank_pattern: Patterns
    alpha_pattern: Patterns
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.checkpoint.nbytes

    def factors(self) -> dict[str, Factor]:
        """Every tensor of the adapter by key."""
        return {k: Factor(k, located.info, located.file) for k, located in self.checkpoint.tensors.items()}

    def scale(self, name: str, rank: int, *, stacked: int = 1) -> float:
        """`alpha / rank` (or `alpha / sqrt(rank)` for rsLoRA) of the module with this name.

        Args:
            name: module path, as patterns see it.
            rank: rows of A; with `stacked` experts in one factor, rows of A over all of them.
            stacked: how many experts share the factor.

        Raises:
            InputError: `adapter.rank` where config and tensors disagree, `adapter.alpha` where alpha is missing.
        """
        where = self.name
        if rank % stacked:
            raise InputError(
                "adapter.rank",
                f"{rank} rows do not divide into {stacked} experts",
                file=where,
                tensors=[name],
            )
        rank //= stacked
        claimed = self.rank_pattern.lookup(name)
        if claimed is None:
            claimed = self.settings.get("rank")
        alpha = self.alpha_pattern.lookup(name)
        if alpha is None:
            alpha = self.settings.get("alpha")
        if alpha is None:
            raise InputError(
                "adapter.alpha",
                f"nothing in this {self.dialect.title} adapter says alpha",
                fix=f"give it: --alpha N (its tensors have rank {rank})",
                file=where,
            )
        root = math.sqrt if self.settings.get("rslora") else float
        if claimed is not None and claimed != rank:
            raise InputError(
                "adapter.rank",
                f"the config says rank {claimed}, the tensors have rank {rank}: "
                f"scale {alpha / root(claimed):.4g} or {alpha / root(rank):.4g}?",
                fix="correct r or rank_pattern in the config to what was trained",
                file=where,
                tensors=[name],
            )
        return float(alpha) / root(rank)


def open_adapter(
    path: str | Path,
    *,
    read_pickle: PickleReader | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
) -> Adapter:
    """Opens an adapter from its headers and its config.

    Args:
        path: the weight file or the directory that holds it.
        read_pickle: how to read `.bin`/`.pt` headers (`loramerge.pickled.read_header`); None refuses them.
        alpha: the alpha to use where nothing on disk says it (loralib).
        enable_lora: which slots of a grouped linear (loralib `MergedLinear`) were trained.
        residual_base: the base that will be given *is* the residual that an initialisation such as PiSSA left.

    Raises:
        InputError: the file is broken, half a pair is missing, config and tensors disagree.
        UnsupportedError: what it holds is not a static change of weights, by name and with the reason.
        MismatchError: it is not an adapter at all.
        UnsafeError: a pickle without permission.
    """
    checkpoint = _open_weights(Path(path), str(path), read_pickle)
    try:
        return _interpret(checkpoint, Path(path), alpha, enable_lora, residual_base)
    except BaseException:
        checkpoint.close()
        raise


def _interpret(
    checkpoint: Checkpoint, path: Path, alpha: float | None, enable_lora: Sequence[bool] | None, residual_base: bool
) -> Adapter:
    """The adapter that an opened file and the config beside it are."""
    config, config_name = read_config(checkpoint)
    dialect = detect(checkpoint.tensors, config)
    if dialect is None:
        raise _not_an_adapter(checkpoint, config)
    where = config_name or checkpoint.name
    notes: list[str] = []
    settings = _settings(dialect, config or {}, where, residual_base, notes)
    if enable_lora is not None:
        settings["enable-lora"] = list(enable_lora)
    rank_pattern = Patterns(_numbers(settings.get("rank-pattern"), "rank-pattern", dialect, where), where)
    alpha_pattern = Patterns(_numbers(settings.get("alpha-pattern"), "alpha-pattern", dialect, where), where)
    if alpha is not None:
        if settings.get("alpha") not in (None, alpha):
            notes.append(f"alpha {alpha:g} as asked; the config says {settings['alpha']:g}")
        settings["alpha"] = alpha
    modules, plain, harmless = _sort_keys(dialect, checkpoint)
    adapter = Adapter(
        name=checkpoint.name,
        path=path,
        dialect=dialect,
        checkpoint=checkpoint,
        modules=modules,
        plain=plain,
        harmless=harmless,
        settings=settings,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        notes=tuple(notes),
        config=config or {},
    )
    _check_factors(adapter)
    if not config and dialect.config and alpha is None:
        raise InputError(
            "adapter.no-config",
            f"there is no {dialect.detect['config']} beside it, so nothing says alpha",
            fix="put the config beside the weights, or give --alpha N",
            file=checkpoint.name,
        )
    return adapter


def _open_weights(path: Path, name: str, read_pickle: PickleReader | None) -> Checkpoint:
    names = weight_names() if path.is_dir() else None
    if names is not None and not any((path / n).exists() for n in names):
        held = sorted(p.name for p in path.iterdir())
        if any(n.endswith((".safetensors.index.json", ".bin.index.json")) or n == "config.json" for n in held):
            raise MismatchError(
                "adapter.is-model",
                "is a model directory, not an adapter",
                fix="the order is BASE ADAPTER; were they swapped?",
                file=name,
            )
    return open_checkpoint(path, read_pickle=read_pickle, weight_names=names)


def read_config(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, str | None]:
    """The config beside an adapter's weights and its name; None where there is none.

    Raises:
        InputError: `adapter.config` for what is not a JSON object.
    """
    folder = checkpoint.directory or checkpoint.path.parent
    for name in sorted({d.detect["config"] for d in dialects() if "config" in d.detect}):
        file = folder / name
        if file.is_file():
            shown = str(Path(checkpoint.name) / name) if checkpoint.directory else str(file)
            source = FileSource(file, shown)
            try:
                value = strictjson.loads(source.read(0, source.size), where=shown, code="adapter.config")
            finally:
                source.close()
            if not isinstance(value, dict):
                raise InputError("adapter.config", "is not a JSON object", file=shown)
            return value, shown
    return None, None


def _not_an_adapter(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Exception:
    if not checkpoint.tensors:
        return InputError(
            "adapter.empty", "holds no tensors", fix="the save was interrupted? save it again", file=checkpoint.name
        )
    if config:
        known = some(sorted(config), 8)
        return UnsupportedError(
            "adapter.unknown",
            f"its config names no dialect that is known (fields {known})",
            file=checkpoint.name,
        )
    return MismatchError(
        "adapter.is-model",
        f"none of its {plural(len(checkpoint.tensors), 'tensor')} is a LoRA factor: a whole model?",
        fix="the order is BASE ADAPTER; were they swapped?",
        file=checkpoint.name,
        tensors=list(checkpoint.tensors)[:5],
    )


def _settings(
    dialect: Dialect, config: Mapping[str, Any], where: str, residual_base: bool, notes: list[str]
) -> dict[str, Any]:
    """The values of the config under the dialect's own names, each checked for its type."""
    names = {k: v for k, v in dialect.config.items() if k != "harmless"}
    settings = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    kind = settings.get("type")
    if kind is not None and kind not in dialect.types.get("merge", ()):
        reason = dialect.types.get("refuse", {}).get(kind, "this kind of adapter is not known")
        raise UnsupportedError(
            "adapter.type",
            f"{kind} cannot be merged: {reason}",
            fix="load it beside its model with the library that trained it",
            file=where,
        )
    for fieldname, reason in dialect.refuse.items():
        if config.get(fieldname):
            raise UnsupportedError(
                "adapter.refused",
                f"{fieldname}: {reason}",
                fix="load it beside its model with the library that trained it",
                file=where,
            )
    init_field = dialect.init.get("field", "")
    init = config.get(init_field)
    if isinstance(init, str) and init not in dialect.init["plain"] and not residual_base:
        raise UnsupportedError(
            "adapter.init",
            f"{init_field} = {quoted(init)} trains on a changed base, and nothing on disk tells which base this is",
            fix="if BASE is the residual model saved with it: --residual-base; else convert it with PEFT first",
            file=where,
        )
    known = {*names.values(), *dialect.config.get("harmless", ()), *dialect.refuse, init_field}
    unknown = sorted(k for k, v in config.items() if k not in known and v not in (None, False, "", [], {}))
    if unknown and dialect.config:
        raise UnsupportedError(
            "adapter.field",
            f"the config has {plural(len(unknown), 'field')} whose meaning is not known: {some(unknown)}",
            fix="a newer loramerge may know it; if it changes nothing, remove it from the config",
            file=where,
        )
    for ours, low in (("rank", 1), ("alpha", 0)):
        if ours in settings:
            settings[ours] = _number(settings[ours], names[ours], low, where)
    for ours in ("rslora", "dora", "lora-bias", "fan-in-fan-out", "tied"):
        if ours in settings and not isinstance(settings[ours], bool):
            raise InputError("adapter.config", f"{names[ours]} is not true or false", file=where)
    if settings.get("alpha") == 0:
        notes.append("alpha is 0: the adapter changes nothing")
    return settings


def _number(value: Any, name: str, low: float, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError("adapter.config", f"{name} is {quoted(value)}, not a number", file=where)
    if value < low:
        raise InputError("adapter.config", f"{name} is {value}, less than {low}", file=where)
    return value


def _numbers(value: Any, ours: str, dialect: Dialect, where: str) -> dict[str, float]:
    if value is None:
        return {}
    name = dialect.config.get(ours, ours)
    if not isinstance(value, dict):
        raise InputError("adapter.config", f"{name} is not an object", file=where)
    low = 1 if ours == "rank-pattern" else 0
    return {k: _number(v, f"{name}[{quoted(k)}]", low, where) for k, v in value.items()}


def _sort_keys(
    dialect: Dialect, checkpoint: Checkpoint
) -> tuple[tuple[Module, ...], tuple[Plain, ...], tuple[str, ...]]:
    """Every key of the file as a factor of a module, a plain parameter, or known harmless."""
    grouped: dict[tuple[str, str, int, str], dict[str, Factor]] = {}
    plain: list[Plain] = []
    harmless: list[str] = []
    names: Counter[str] = Counter()
    for key, located in checkpoint.tensors.items():
        parsed: ParsedKey = dialect.parse(key)
        if parsed.adapter_name:
            names[parsed.adapter_name] += 1
        factor = Factor(key, located.info, located.file)
        if parsed.kind == "harmless":
            harmless.append(key)
        elif parsed.kind == "plain":
            plain.append(Plain(parsed.path, factor, parsed.depth, parsed.saved))
        else:
            group = grouped.setdefault((parsed.path, parsed.kind, parsed.depth, parsed.inner), {})
            if parsed.factor in group:
                raise InputError(
                    "adapter.duplicate",
                    f"two keys are factor {parsed.factor} of one module",
                    file=checkpoint.name,
                    tensors=[group[parsed.factor].key, key],
                )
            group[parsed.factor] = factor
    if len(names) > 1:
        raise InputError(
            "adapter.names",
            f"the file holds several adapters: {some(sorted(names))}",
            fix="save each adapter to its own file",
            file=checkpoint.name,
        )
    modules = tuple(Module(path, kind, depth, inner, fs) for (path, kind, depth, inner), fs in grouped.items())
    return modules, tuple(plain), tuple(harmless)


def _check_factors(adapter: Adapter) -> None:
    """What can be told from the adapter alone: pairs complete, shapes sane, DoRA as the config says."""
    where = adapter.name
    if not adapter.checkpoint.tensors:
        raise InputError("adapter.empty", "holds no tensors", fix="the save was interrupted? save it again", file=where)
    whole = {p.factor.key for p in adapter.plain}  # parameters taken as they are may have any dtype
    harmless = set(adapter.harmless)
    for key, factor in adapter.factors().items():
        if key in harmless:
            continue
        if 0 in factor.shape:
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
        if module.kind == "low-rank":
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
