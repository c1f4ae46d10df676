"""Binds adapters to a base: every adapter tensor ends applied, known harmless, left out on request, or an error."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramerge.adapters.adapter import FACTOR_DTYPES, Adapter, Factor, Module
from loramerge.adapters.updates import Difference, DoRA, LowRank, TokenRows
from loramerge.binding import tie
from loramerge.binding.binding import Binding, Matches
from loramerge.binding.families import families
from loramerge.binding.namespace import Namespace, Slot
from loramerge.binding.parameters import bind_plain, check_saved
from loramerge.binding.shapes import low_rank, stacked_low_rank
from loramerge.errors import InputError, LoramergeError, MismatchError, UnsupportedError
from loramerge.tensors.dtypes import display
from loramerge.tensors.text import plural, quoted, some

Selected = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Base:
    """What messages say of the base."""

    name: str
    quantisation: str


def selector(include: Sequence[str], exclude: Sequence[str]) -> Selected:
    """A test of module paths: one of `include` (if any) and none of `exclude`, globs over the whole path."""

    def selected(path: str) -> bool:
        if include and not any(fnmatch.fnmatchcase(path, glob) for glob in include):
            return False
        return not any(fnmatch.fnmatchcase(path, glob) for glob in exclude)

    return selected


def bind(
    slots: Sequence[Slot],
    config: Mapping[str, Any] | None,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    base_name: str = "",
) -> Binding:
    """Decides what each adapter, times its weight, does to each tensor of a base.

    Args:
        slots: the base's tensors.
        config: its config.json, if there is one.
        adapters: (adapter, weight), in the order to apply them.
        include, exclude: globs over module paths; what is left out is counted, not forgotten.
        allow_unmatched: factors without a home are a note, not an error (unless nothing matches at all).
        base_name: the base as the user typed it, for messages.

    Raises:
        MismatchError: `adapter.unmatched`, `adapter.shape`, `binding.ambiguous`, ...: they do not belong together.
        InputError, UnsupportedError: see `loramerge.adapters` and `loramerge.binding.shapes`.
    """
    try:
        return _bind(slots, config or {}, adapters, selector(include, exclude), allow_unmatched, base_name)
    except LoramergeError as error:
        error.file = error.file or base_name
        raise


def _bind(
    slots: Sequence[Slot],
    config: Mapping[str, Any],
    adapters: Sequence[tuple[Adapter, float]],
    selected: Selected,
    allow_unmatched: bool,
    base_name: str,
) -> Binding:
    names = Namespace(slots, families(), config.get("model_type"))
    binding = Binding(names)
    _note_base(binding, config, adapters, base_name)
    _replicate(binding, adapters, config)
    pairs = tie.tied_pairs(names, config)
    base = _Base(base_name, _quantisation(config))
    for index, (adapter, weight) in enumerate(adapters):
        matches = Matches(modules=len(adapter.modules), harmless=set(adapter.harmless))
        binding.matches.append(matches)
        # A stored weight comes before updates: it is what they were trained on, and may have another size.
        for plain in adapter.plain:
            if selected(plain.path.rpartition(".")[0]):
                bind_plain(binding, adapter, index, weight, plain, matches)
            else:
                matches.excluded.add(plain.factor.key)
        for module in adapter.modules:
            keys = {factor.key for factor in module.factors.values()}
            if not selected(module.path):
                matches.excluded |= keys
            elif why := _bind_module(binding, adapter, index, weight, module, base):
                matches.unmatched |= dict.fromkeys(sorted(keys), why)
            else:
                matches.matched += 1
                matches.applied |= keys
        _check_matches(binding, adapter, matches, allow_unmatched, base_name)
        check_saved(adapter, matches)
        _note_patterns(binding, adapter)
    tie.settle(binding, pairs, adapters, config)
    tie.patch_config(binding, adapters, config)
    return binding


def _replicate(binding: Binding, adapters: Sequence[tuple[Adapter, float]], config: Mapping[str, Any] | None) -> None:
    """Layer replication: the names of the output become those of the new list of layers."""
    wanted = [adapter.settings.get("layer-replication") for adapter, _ in adapters]
    ranges = next((w for w in wanted if w), None)
    if not ranges:
        return
    where = next(a.name for a, _ in adapters if a.settings.get("layer-replication"))
    if any(w != ranges for w in wanted):
        raise MismatchError("adapter.layers", "only some adapters replicate layers, or not the same ones", file=where)
    good = isinstance(ranges, list) and all(
        isinstance(r, list) and len(r) == 2 and all(type(i) is int and 0 <= i <= 100_000 for i in r) and r[0] < r[1]
        for r in ranges
    )
    if not good or sum(r[1] - r[0] for r in ranges) > 100_000:
        raise InputError("adapter.config", f"layer_replication is {quoted(ranges)}, not a list of ranges", file=where)
    layers = binding.names.families.layers
    _, count, order = binding.names.replicate([(r[0], r[1]) for r in ranges], layers["containers"])
    for name in layers["count"]:
        if config and name in config:
            binding.config[name] = count
    for name in layers["lists"]:
        value = (config or {}).get(name)
        if isinstance(value, list) and len(value) > max(order):
            binding.config[name] = [value[i] for i in order]


def _bind_module(
    binding: Binding, adapter: Adapter, index: int, weight: float, module: Module, base: _Base
) -> str | None:
    """Binds the factors of one module. Returns None, or why it has no home."""
    names = binding.names
    if module.kind == "token-rows":
        return _bind_token_rows(binding, adapter, index, weight, module)
    parameters = _stacked_parameters(adapter, module, names)
    if module.depth < len(parameters):
        # The last parameter is wrapped outermost and has the short name (reference: dialect's [experts] table).
        parameter = parameters[len(parameters) - 1 - module.depth]
        stack = names.find_stack(f"{module.path}.{parameter}")
        if stack is not None:
            for stored, update in stacked_low_rank(adapter, index, weight, module, parameter, stack, names):
                _check_weight(names[stored], base)
                binding.update(stored, update)
            return None
    for leaf in adapter.dialect.leaves:
        name = names.find(f"{module.path}.{leaf}")
        if name is not None:
            break
    else:
        packed = names.find(f"{module.path}.qweight") or names.find(f"{module.path}.weight_packed")
        if packed is not None:
            raise _quantised(packed, "packed codes", base)
        return names.hint(f"{module.path}.weight")
    slot = _current(binding, name)
    _check_weight(slot, base)
    lows = low_rank(adapter, index, weight, module, slot, names)
    magnitude = module.factors.get("magnitude")
    if magnitude is not None:
        _bind_dora(binding, adapter, module, slot, lows, magnitude)
    else:
        for low in lows:
            binding.update(name, low)
    bias = module.factors.get("bias")
    if bias is not None:
        _bind_lora_bias(binding, adapter, module, bias, lows[0].scale)
    return None


def _current(binding: Binding, name: str) -> Slot:
    """The slot as updates see it: with the shape of a tensor that replaces it."""
    slot, new = binding.names[name], binding.replaced.get(name)
    return slot if new is None else Slot(slot.name, slot.source, slot.dtype, new.factor.shape)


def _bind_dora(
    binding: Binding, adapter: Adapter, module: Module, slot: Slot, lows: list[LowRank], magnitude: Factor
) -> None:
    low = lows[0]
    channels = low.place.cols if low.flipped else low.place.rows
    numel = magnitude.info.numel
    if len(lows) != 1 or numel != channels or low.place.rows * low.place.cols != _numel(slot.shape):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: a magnitude of {numel} for {channels} output channels",
            file=adapter.name,
            tensors=[magnitude.key],
        )
    binding.update(slot.name, DoRA(low.adapter, module.path, low, magnitude.key, low.flipped))


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _bind_lora_bias(binding: Binding, adapter: Adapter, module: Module, bias: Factor, scale: float) -> None:
    """`bias += s b` (peft 0.21.2, `lora_bias`)."""
    name = binding.names.find(f"{module.path}.bias")
    if name is None:
        raise UnsupportedError(
            "adapter.no-bias",
            f"{quoted(module.path)} trains a bias, the base has none there, and its architecture cannot hold one",
            fix="convert the base to an architecture with biases, or train without lora_bias",
            file=adapter.name,
            tensors=[bias.key],
        )
    if bias.info.numel != _numel(binding.names[name].shape):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(bias.key)} {bias.shape} does not fit {binding.names[name].shape}",
            file=adapter.name,
        )
    binding.update(name, Difference(_index(binding), module.path, bias.key, scale))


def _index(binding: Binding) -> int:
    return len(binding.matches) - 1


def _stacked_parameters(adapter: Adapter, module: Module, names: Namespace) -> list[str]:
    """The stacked parameters of this module that the adapter trained, in the order of the module."""
    targets = adapter.settings.get("target-parameters") or []
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InputError("adapter.config", "target_parameters is not a list of names", file=adapter.name)
    found = set()
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if owner == module.path or module.path.endswith(f".{owner}") or not owner:
            found.add(parameter)
    found.discard("weight")  # an ordinary 2-D parameter
    order = list(adapter.dialect.experts.get("order", ()))
    unknown = sorted(p for p in found if p not in order)
    if len(unknown) > 1:
        raise UnsupportedError(
            "adapter.parameters",
            f"{quoted(module.path)} trains {some(unknown)}, and their order in the module is not known",
            file=adapter.name,
        )
    return [p for p in order if p in found] + unknown


def _bind_token_rows(binding: Binding, adapter: Adapter, index: int, weight: float, module: Module) -> str | None:
    names = binding.names
    name = names.find(f"{module.path}.weight")
    if name is None:
        return names.hint(f"{module.path}.weight")
    factor = module.factors["rows"]
    wanted = adapter.settings.get("token-rows")
    if isinstance(wanted, dict):
        fits = [v for k, v in wanted.items() if module.path == k or module.path.endswith(f".{k}")]
        wanted = fits[0] if fits else None
    slot = _current(binding, name)
    if not isinstance(wanted, list) or any(type(i) is not int for i in wanted):
        raise InputError("adapter.config", f"nothing says which rows {quoted(factor.key)} replaces", file=adapter.name)
    if factor.shape != (len(wanted), slot.shape[-1]):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(factor.key)} {factor.shape} is not {len(wanted)} rows of {slot.shape[-1]}",
            file=adapter.name,
            tensors=[factor.key],
        )
    if beyond := [i for i in wanted if not 0 <= i < slot.shape[0]]:
        raise MismatchError(
            "adapter.vocabulary",
            f"token {beyond[0]} is beyond the {slot.shape[0]} rows of {quoted(name)}",
            fix="resize the base to the adapter's tokenizer first",
            file=adapter.name,
        )
    binding.update(name, TokenRows(index, module.path, factor.key, tuple(wanted), weight, slot.shape[-1]))
    return None


def _check_weight(slot: Slot, base: _Base) -> None:
    if slot.dtype not in FACTOR_DTYPES:
        raise _quantised(slot.name, display(slot.dtype), base)


def _quantised(name: str, what: str, base: _Base) -> UnsupportedError:
    how = f" ({quoted(base.quantisation)})" if base.quantisation else ""
    return UnsupportedError(
        "base.quantised",
        f"the base is quantised{how}: {quoted(name)} is {what}",
        fix="merge into the 16-bit model that it was made from",
        file=base.name,
        tensors=[name],
    )


def _quantisation(config: Mapping[str, Any]) -> str:
    """The name of the base's quantisation, as its config says."""
    how = config.get("quantization_config")
    return str(how.get("quant_method", "")) if isinstance(how, dict) else ""


def _note_base(
    binding: Binding, config: Mapping[str, Any], adapters: Sequence[tuple[Adapter, float]], base_name: str
) -> None:
    """Notes where names or sizes say that these may not belong together."""
    own = str(config.get("_name_or_path") or base_name)
    for adapter, _ in adapters:
        trained = adapter.settings.get("base")
        if isinstance(trained, str) and trained and _last(trained) not in (_last(own), _last(base_name)):
            binding.notes.append(
                f"{adapter.name} was trained on {quoted(trained)}, the base given is {quoted(own)}; their shapes fit"
            )
    rows = config.get("vocab_size")
    for pair in binding.names.families.tied:
        slot = binding.names.slots.get(pair.input)
        if slot is not None and isinstance(rows, int) and slot.shape[0] != rows:
            binding.notes.append(
                f"the base's config says vocab_size {rows}, {quoted(slot.name)} has {slot.shape[0]} rows"
            )
            break


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _check_matches(binding: Binding, adapter: Adapter, matches: Matches, allow_unmatched: bool, base_name: str) -> None:
    total = len(adapter.checkpoint.tensors)
    lost = list(matches.unmatched)
    hints = [f"{quoted(k)}: {why}" for k, why in matches.unmatched.items() if why]
    if not matches.applied:
        if matches.excluded and not lost:
            raise MismatchError(
                "adapter.excluded", "--include and --exclude leave nothing of the adapter", file=adapter.name
            )
        said = quoted(adapter.modules[0].path if adapter.modules else next(iter(adapter.checkpoint.tensors)))
        ours = quoted(next((n for n in binding.names.slots if n.count(".") > 2), next(iter(binding.names.slots), "")))
        raise MismatchError(
            "adapter.no-match",
            f"none of its {plural(total, 'tensor')} matches the base: the adapter says {said}, the base {ours}",
            fix=_base_hint(adapter, base_name),
            file=adapter.name,
            tensors=lost,
        )
    if lost and not allow_unmatched:
        because = f"; {matches.unmatched[lost[0]]}" if matches.unmatched[lost[0]] else ""
        raise MismatchError(
            "adapter.unmatched",
            f"{len(lost)} of {plural(total, 'adapter tensor')} match nothing in the base{because}",
            fix=f"{_base_hint(adapter, base_name)} (or --allow-unmatched to leave them out)",
            file=adapter.name,
            tensors=lost,
        )
    if lost:
        binding.notes.append(
            f"{adapter.name}: {plural(len(lost), 'tensor')} without a home left out; {some(hints or lost, 3)}"
        )


def _base_hint(adapter: Adapter, base_name: str) -> str:
    trained = adapter.settings.get("base")
    if trained and str(trained) != base_name:
        return f"the adapter was trained on {quoted(trained)}; give that base"
    return "give the base that it was trained on"


def _note_patterns(binding: Binding, adapter: Adapter) -> None:
    for field_name, patterns in (
        ("rank_pattern", adapter.rank_pattern),
        ("alpha_pattern", adapter.alpha_pattern),
    ):
        if unused := patterns.unused():
            binding.notes.append(
                f"{adapter.name}: {field_name} matches nothing with {some([quoted(k) for k in unused])}"
            )
        for module, keys in list(patterns.overlaps.items())[:1]:
            binding.notes.append(
                f"{adapter.name}: {field_name} has several values for {quoted(module)} ({some(list(keys))}); "
                "the first is used, which may not be the one trained (PEFT sorts them on saving)"
            )
