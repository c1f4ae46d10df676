"""Parameters that an adapter brings whole: replacements, new heads, copies of the base to ignore."""

from __future__ import annotations

from loramerge.adapters.adapter import Adapter, Module, Plain
from loramerge.adapters.kinds.base import Context
from loramerge.adapters.updates import Blend, ByKind, Difference
from loramerge.adapters.views import View
from loramerge.binding.binding import Binding, Matches, Replaced
from loramerge.binding.namespace import Slot, Target
from loramerge.errors import InputError, MismatchError, UnsupportedError
from loramerge.tensors.text import quoted, some


def bind_plain(
    binding: Binding,
    adapter: Adapter,
    index: int,
    weight: float,
    plain: Plain,
    matches: Matches,
) -> None:
    """A parameter that the adapter brings whole: a replacement, a copy of the base to ignore, or an error."""
    names, key = binding.names, plain.factor.key
    module, _, leaf = plain.path.rpartition(".")
    name = names.find(plain.path)
    factored = any(m.path == module and m.kind == "low-rank" for m in adapter.modules)
    vocabulary = leaf == "weight" and (
        names.families.is_vocabulary(module)
        or any(m.path == module and "embedding-A" in m.factors for m in adapter.modules)
    )
    called_for = plain.saved or vocabulary or _is_saved(adapter, module)
    called_for |= leaf == "bias" and _trains_biases(adapter.settings.get("bias"))
    if not called_for and factored and leaf == "weight" and adapter.dialect.plain.get("beside-factors") == "refuse":
        raise UnsupportedError(
            "adapter.holds-base",
            f"{quoted(module)} has its whole weight beside its factors: it may hold the update already",
            fix="save only the factors (lora_state_dict) while the model is in training mode",
            file=adapter.name,
            tensors=[key],
        )
    if not called_for and adapter.dialect.plain.get("allowed") != "any":
        dump = any(p.depth for p in adapter.plain)  # of a whole wrapped model: `X.base_layer.weight` beside the factors
        if dump and name is not None and names[name].shape == plain.factor.shape:
            matches.harmless.add(key)
            note = f"{adapter.name}: base weights beside the factors are ignored; the config does not call for them"
            if note not in binding.notes:
                binding.notes.append(note)
        else:
            matches.unmatched[key] = names.hint(plain.path) or "not a factor of any known kind"
        return
    if name is None and adapter.dialect.plain.get("new") == "refuse":
        matches.unmatched[key] = names.hint(plain.path)
        return
    if name is None:
        name = plain.path
        names.add(Slot(name, "", plain.factor.info.dtype, plain.factor.shape))
        binding.added.append(name)
    slot = names[name]
    if slot.shape != plain.factor.shape and not (
        (vocabulary and slot.shape[1:] == plain.factor.shape[1:]) or names.families.head_of(module)
    ):
        raise MismatchError(
            "base.replaced-shape",
            f"{quoted(key)} {plain.factor.shape} cannot replace {quoted(name)} {slot.shape}",
            fix="is this the base that the adapter was trained on?",
            file=adapter.name,
            tensors=[name],
        )
    if name in binding.replaced:
        raise MismatchError(
            "adapter.conflict",
            f"two adapters replace {quoted(name)}",
            fix=f"leave one out: --exclude '{module}'",
            file=adapter.name,
            tensors=[name],
        )
    matches.applied.add(key)
    if weight == 1 or name in binding.added:
        binding.replaced[name] = Replaced(index, plain.factor, plain.path, plain.depth > 0)
        if weight != 1:
            binding.notes.append(
                f"{adapter.name}: {quoted(name)} is new and taken whole, without the weight {weight:g}"
            )
    elif slot.shape == plain.factor.shape:
        binding.update(name, Blend(index, module, key, weight))
    else:
        raise MismatchError(
            "base.replaced-shape",
            f"{quoted(key)} has another shape than {quoted(name)} and cannot be taken to the weight {weight:g}",
            file=adapter.name,
            tensors=[name],
        )


def _trains_biases(setting: object) -> bool:
    """Whether biases of the base were trained: all of them, or those of adapted modules (`lora_only`, `oft_only`)."""
    return isinstance(setting, str) and (setting == "all" or setting.endswith("_only"))


def bind_difference(binding: Binding, adapter: Adapter, index: int, weight: float, module: Module) -> str | None:
    """`W' = W + w d` with a whole stored difference of a parameter. Returns None, or why it has no home."""
    target, factor = _parameter(binding, adapter, module), module.factors["diff"]
    if target is None:
        return binding.names.hint(f"{module.path}.{module.leaf}")
    if target.stored is not None and factor.info.numel == target.view.rows * target.view.cols:
        binding.update(target.stored, Difference(index, module.path, factor.key, weight))
    else:
        _bind_by_view(binding, adapter, index, weight, module, target.view, "diff")
    return None


def _bind_by_view(
    binding: Binding, adapter: Adapter, index: int, weight: float, module: Module, view: View, name: str
) -> None:
    """A whole parameter's factor on a view of several parts.

    Raises:
        MismatchError: `adapter.shape`.
    """
    factor = module.factors[name]
    if factor.info.numel != view.rows * view.cols:
        raise MismatchError(
            "adapter.shape",
            f"{quoted(factor.key)} {factor.shape} does not fit {view.shape}",
            file=adapter.name,
            tensors=[part.tensor for part in view.parts],
        )
    context = Context(view.shape, weight=weight)
    for i, part in enumerate(view.parts):
        keys = ((name, factor.key),)
        binding.update(part.tensor, ByKind(module.kind, index, module.path, keys, context, view, i))


def bind_replacement(
    binding: Binding, adapter: Adapter, index: int, weight: float, module: Module, matches: Matches
) -> str | None:
    """A factor that takes the place of a parameter. Returns None, or why it has no home."""
    target, factor = _parameter(binding, adapter, module), module.factors["value"]
    if target is None:
        return binding.names.hint(f"{module.path}.{module.leaf}")
    if target.stored is None:
        _bind_by_view(binding, adapter, index, weight, module, target.view, "value")
        return None
    bind_plain(binding, adapter, index, weight, Plain(target.stored, factor, 0, True), matches)
    return None


def _parameter(binding: Binding, adapter: Adapter, module: Module) -> Target | None:
    """The parameter that a difference or replacement is of: a leaf of the module, or the path itself."""
    names, flat = binding.names, adapter.dialect.flat
    for path in (f"{module.path}.{module.leaf or 'weight'}", *(() if module.leaf == "bias" else (module.path,))):
        if (target := names.target(path, flat)) is not None:
            return target
    return None


def _is_saved(adapter: Adapter, module: str) -> bool:
    """Whether `modules_to_save` lists the module or one that holds it."""
    saved = adapter.settings.get("modules-to-save") or ()
    if not isinstance(saved, list | tuple) or not all(isinstance(s, str) for s in saved):
        raise InputError("adapter.config", "modules_to_save is not a list of names", file=adapter.name)
    segments = module.split(".")
    heads = [".".join(segments[: i + 1]) for i in range(len(segments))]
    # Without a dot before it, as PEFT matches: "norm" also saves "post_attention_layernorm".
    return any(head.endswith(s) for s in saved for head in heads)


def check_saved(adapter: Adapter, matches: Matches) -> None:
    """Modules that the config calls saved must have tensors (some trainers list heads that a model may not have)."""
    saved = adapter.settings.get("modules-to-save") or ()
    if not saved:
        return
    present = [s for s in saved if any(_holds(p, s) for p in adapter.plain)]
    if not present:
        raise InputError(
            "adapter.truncated",
            f"the config says that {some([str(s) for s in saved])} was trained, but the file has no tensor of it",
            fix="the file is incomplete: save or download it again",
            file=adapter.name,
        )


def _holds(plain: Plain, name: object) -> bool:
    return f".{name}." in f".{plain.path}"
