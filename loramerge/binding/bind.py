"""Binds adapters to a base: every adapter tensor ends applied, known harmless, left out on request, or an error."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramerge.adapters.adapter import FACTOR_DTYPES, Adapter, Factor, Module
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.base import Context
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.adapters.updates import ByKind, Difference, DoRA, LowRank, Pick, TokenRows
from loramerge.adapters.views import whole_view
from loramerge.binding import tie
from loramerge.binding.arrangement import arranged_target, rule_of, slot_updates
from loramerge.binding.binding import Binding, Matches
from loramerge.binding.families import families
from loramerge.binding.kinds import by_kind
from loramerge.binding.leads import uneven_leads
from loramerge.binding.namespace import Namespace, Slot, Target
from loramerge.binding.parameters import bind_difference, bind_plain, bind_replacement, check_saved
from loramerge.binding.shapes import low_rank, low_rank_view, stacked_low_rank
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
    oriented: frozenset[str] = frozenset(),
) -> Binding:
    """Decides what each adapter, times its weight, does to each tensor of a base.

    Args:
        slots: the base's tensors.
        config: its config.json, if there is one.
        adapters: (adapter, weight), in the order to apply them.
        include, exclude: globs over module paths; what is left out is counted, not forgotten.
        allow_unmatched: factors without a home are a note, not an error (unless nothing matches at all).
        base_name: the base as the user typed it, for messages.
        oriented: modules whose weights are known to be (out, in) in `slots`.

    Raises:
        MismatchError: `adapter.unmatched`, `adapter.shape`, `binding.ambiguous`, ...: they do not belong together.
        InputError, UnsupportedError: see `loramerge.adapters` and `loramerge.binding.shapes`.
    """
    try:
        return _bind(slots, config or {}, adapters, selector(include, exclude), allow_unmatched, base_name, oriented)
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
    oriented: frozenset[str],
) -> Binding:
    names = Namespace(slots, families(), config, oriented)
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
            elif (why := _bind_module(binding, adapter, index, weight, module, base, matches)) is not None:
                matches.unmatched |= dict.fromkeys(sorted(keys), why)
            else:
                matches.matched += 1
                matches.applied |= keys
        _check_matches(binding, adapter, matches, allow_unmatched, base_name)
        check_saved(adapter, matches)
        _note_patterns(binding, adapter)
        notes = uneven_leads(names, (f"{m.path}.{m.leaf or adapter.dialect.leaves[0]}" for m in adapter.modules))
        binding.notes += [f"{adapter.name}: {note}" for note in notes]
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
    binding: Binding,
    adapter: Adapter,
    index: int,
    weight: float,
    module: Module,
    base: _Base,
    matches: Matches,
) -> str | None:
    """Binds the factors of one module. Returns None, or why it has no home."""
    names = binding.names
    if module.kind == "token-rows":
        return _bind_token_rows(binding, adapter, index, weight, module)
    if module.kind == "difference":
        return bind_difference(binding, adapter, index, weight, module)
    if module.kind == "replacement":
        return bind_replacement(binding, adapter, index, weight, module, matches)
    if module.kind not in KINDS:
        raise UnsupportedError(
            "adapter.kind",
            f"{quoted(module.path)} is of the kind {module.kind}, which no weight can hold or which is not known",
            file=adapter.name,
        )
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
    if (layers := _layers(adapter, module)) is not None:
        return _bind_layers(binding, adapter, index, weight, module, layers, base)
    rule = rule_of(adapter, module, names)
    if rule is not None and "slots" in rule and module.kind == "low-rank":
        return _bind_slots(binding, adapter, index, weight, module, rule, base)
    target = _target(binding, adapter, module)
    if target is None:
        packed = names.find(f"{module.path}.qweight") or names.find(f"{module.path}.weight_packed")
        if packed is not None:
            raise _quantised(packed, "packed codes", base)
        return names.hint(f"{module.path}.weight")
    for part in target.view.parts:
        _check_weight(names[part.tensor], base)
    if rule is not None:
        target = arranged_target(adapter, module, target, rule, names)
    target = _grown(binding, adapter, module, target)
    scale = None
    bias = module.factors.get("bias")
    if module.kind == "low-rank" and _streams(adapter, module, target):
        if target.stored is not None:
            slot = _current(binding, target.stored)
            lows = low_rank(adapter, index, weight, module, slot, names)
        else:
            lows = low_rank_view(adapter, index, weight, module, target.view)
        magnitude = module.factors.get("magnitude")
        if magnitude is not None:
            _bind_dora(binding, adapter, module, _current(binding, lows[0].part.tensor), lows, magnitude)
        else:
            for low in lows:
                binding.update(low.part.tensor, low)
        scale = lows[0].scale
    else:
        for stored, change in by_kind(adapter, index, weight, module, target, names):
            binding.update(stored, change)
            scale = change.context.scale * weight
    if bias is not None and scale is not None:
        _bind_lora_bias(binding, adapter, module, bias, scale)
    return None


def _bind_slots(
    binding: Binding,
    adapter: Adapter,
    index: int,
    weight: float,
    module: Module,
    rule: Mapping[str, Any],
    base: _Base,
) -> str | None:
    """Binds the trained parts of a fused module. Returns None, or why it has no home."""
    lows = slot_updates(adapter, index, weight, module, rule, binding.names)
    if lows is None:
        return binding.names.hint(f"{module.path}.weight")
    for low in lows:
        _check_weight(binding.names[low.part.tensor], base)
        binding.update(low.part.tensor, low)
    return None


def _target(binding: Binding, adapter: Adapter, module: Module) -> Target | None:
    """Where the weight of a module lies, with the shape of a tensor that replaces it."""
    names = binding.names
    leaves = (module.leaf,) if module.leaf else adapter.dialect.leaves
    for leaf in leaves:
        target = names.target(f"{module.path}.{leaf}", adapter.dialect.flat)
        if target is None:
            continue
        if target.stored is not None and target.stored in {**binding.replaced, **binding.grown}:
            return Target(whole_view(target.stored, _current(binding, target.stored).shape), target.stored)
        return target
    return None


def _grown(binding: Binding, adapter: Adapter, module: Module, target: Target) -> Target:
    """The target as large as the adapter needs it: where its file says so (a factor `shape`), or where its dialect
    widens layers of the base (`[path] grows`)."""
    if target.stored is None:
        return target
    shape = binding.names[target.stored].shape if target.stored not in binding.grown else binding.grown[target.stored]
    if "shape" in module.factors:
        wanted = tuple(int(n) for n in module.factors["shape"].numbers(adapter.name))
    elif adapter.dialect.grows and {"A", "B"} <= module.factors.keys() and len(shape) == 2:
        wanted = (module.factors["B"].shape[0], module.factors["A"].shape[1])
    else:
        return target
    if wanted == shape:
        return target
    if len(wanted) != len(shape) or any(new < old for old, new in zip(shape, wanted, strict=True)):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)} wants its weight padded from {shape} to {wanted}",
            file=adapter.name,
            tensors=[target.stored],
        )
    binding.grown[target.stored] = wanted
    binding.notes.append(
        f"{quoted(target.stored)} grows from {shape} to {wanted} with zeros, as the adapter was trained; "
        "a config that states its width must be changed to match"
    )
    return Target(whole_view(target.stored, wanted), target.stored)


def _streams(adapter: Adapter, module: Module, target: Target) -> bool:
    """Whether a low-rank pair goes through the updates that stream it best; `by_kind` does what is rarer."""
    if not MAGNITUDES.keys() & module.factors.keys():
        return True
    return "magnitude" in module.factors and target.stored is not None


def _layers(adapter: Adapter, module: Module) -> int | None:
    """How many experts have their own layer of a factor (n, ., .), where the dialect keeps experts so."""
    if "axis" not in adapter.dialect.experts or module.kind != "low-rank":
        return None
    sizes = {module.factors[name].shape[0] for name in ("A", "B") if len(module.factors[name].shape) == 3}
    return max(sizes, default=None)


def _bind_layers(
    binding: Binding, adapter: Adapter, index: int, weight: float, module: Module, count: int, base: _Base
) -> str | None:
    """Factors with an axis for experts: A (E or 1, r, in), B (E or 1, out, r), one module for each expert."""
    names, segment = binding.names, adapter.dialect.experts["axis"]
    head, _, tail = module.path.rpartition(f".{segment}.")
    if not head:
        return f"{quoted(module.path)} has factors with three axes and is no expert"
    if count == 1:  # both factors shared by all experts
        while names.target(f"{head}.{segment}.{count}.{tail}.weight") is not None:
            count += 1
    for e in range(count):
        path = f"{head}.{segment}.{e}.{tail}.weight"
        target = names.target(path)
        if target is None:
            return names.hint(path)
        for low in low_rank_view(adapter, index, weight, module, target.view, Pick("layer", e, count)):
            _check_weight(names[low.part.tensor], base)
            binding.update(low.part.tensor, low)
    return None


def _current(binding: Binding, name: str) -> Slot:
    """The slot as updates see it: with the shape of a tensor that replaces it."""
    slot, new = binding.names[name], binding.replaced.get(name)
    shape = slot.shape if new is None else new.factor.shape
    return Slot(slot.name, slot.source, slot.dtype, binding.grown.get(name, shape))


def _bind_dora(
    binding: Binding, adapter: Adapter, module: Module, slot: Slot, lows: list[LowRank], magnitude: Factor
) -> None:
    low = lows[0]
    place, flipped = low.part.place, low.part.flipped
    channels = place.cols if flipped else place.rows
    numel = magnitude.info.numel
    if len(lows) != 1 or numel != channels or place.rows * place.cols != _numel(slot.shape):
        raise MismatchError(
            "adapter.shape",
            f"{quoted(module.path)}: a magnitude of {numel} for {channels} output channels",
            file=adapter.name,
            tensors=[magnitude.key],
        )
    binding.update(slot.name, DoRA(low.adapter, module.path, low, magnitude.key, flipped))


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _bind_lora_bias(binding: Binding, adapter: Adapter, module: Module, bias: Factor, scale: float) -> None:
    """`bias += s b` (peft 0.21.2, `lora_bias`)."""
    target = binding.names.target(f"{module.path}.bias", adapter.dialect.flat)
    if target is None:
        raise UnsupportedError(
            "adapter.no-bias",
            f"{quoted(module.path)} trains a bias, the base has none there, and its architecture cannot hold one",
            fix="convert the base to an architecture with biases, or train without lora_bias",
            file=adapter.name,
            tensors=[bias.key],
        )
    view = target.view
    if bias.info.numel != view.rows * view.cols:
        raise MismatchError(
            "adapter.shape", f"{quoted(bias.key)} {bias.shape} does not fit {view.shape}", file=adapter.name
        )
    index = _index(binding)
    if target.stored is not None:
        binding.update(target.stored, Difference(index, module.path, bias.key, scale))
        return
    context = Context(view.shape, weight=scale)
    for i, part in enumerate(view.parts):
        keys = (("diff", bias.key),)
        binding.update(part.tensor, ByKind("difference", index, module.path, keys, context, view, i))


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
    if "weight" in found and names.find_stack(f"{module.path}.weight") is None:
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
        if own.endswith(".onnx"):
            continue  # never what an adapter was trained on
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
