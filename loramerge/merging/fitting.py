"""Which tensors of a live model adapters change, and what cannot be done to a model where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import TokenRows, Update, to_data
from loramerge.binding.binding import Binding
from loramerge.errors import UnsupportedError
from loramerge.merging.live import Live
from loramerge.tensors.dtypes import bits
from loramerge.tensors.hashing import digest_tensor
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.source import ByteSource
from loramerge.tensors.text import quoted, some

ON_DISK = "merge into files instead, and load the result (loramerge merge)"


def changed_names(binding: Binding, adapters: Sequence[Adapter], live: Live) -> list[str]:
    """The tensors that change, one name for each piece of memory.

    Raises:
        UnsupportedError: `switcher.shape` for what adds or resizes tensors, `switcher.tied` for a change of one tensor
            that others share; and those of `Live.check`.
    """
    names = binding.names
    touched = [name for name in names.slots if binding.touched(name)]
    resized = [n for n, new in binding.replaced.items() if n in names and new.factor.shape != names[n].shape]
    if binding.untied:
        name, other = next(iter(binding.untied.items()))
        raise _tied(name, other)
    copied = [name for name, slot in names.slots.items() if slot.source != name]
    changed = [*binding.added, *resized, *binding.grown, *copied]
    if changed:
        raise UnsupportedError(
            "switcher.shape",
            f"the adapter adds, resizes or repeats {some(changed)}, and a live model keeps its shape",
            fix=ON_DISK,
            tensors=changed,
        )
    groups = {live.group[name] for name in touched}
    chosen = [_chosen(group, binding, adapters, live) for group in groups]
    place = {name: i for i, name in enumerate(touched)}
    chosen.sort(key=place.__getitem__)
    live.check(chosen)
    return chosen


def _chosen(group: tuple[str, ...], binding: Binding, adapters: Sequence[Adapter], live: Live) -> str:
    """The name whose change is made, of all names of one piece of memory."""
    touched = [name for name in group if binding.touched(name)]
    owners = {live.owner[name] for name in touched}
    others = [name for name in group if live.owner[name] not in owners]
    if others and not _rows_for_all(touched, binding):
        raise _tied(touched[0], others[0])
    if not others and any(adapter.settings.get("tied") for adapter in adapters):
        return touched[0]
    first = _change(touched[0], group, binding, adapters) if len(touched) > 1 else None
    for name in touched[1:]:
        if _change(name, group, binding, adapters) != first:
            raise _tied(touched[0], name)
    return touched[0]


def _rows_for_all(touched: Sequence[str], binding: Binding) -> bool:
    """Whether only rows of an embedding change: those of a head that is tied to it then change too."""
    names = binding.names
    heads = {names.find(row.output) for row in names.families.tied}
    return all(
        name not in binding.replaced
        and name not in heads
        and all(isinstance(update, TokenRows) for update in binding.updates[name])
        for name in touched
    )


def _tied(name: str, other: str) -> UnsupportedError:
    return UnsupportedError(
        "switcher.tied",
        f"{quoted(name)} and {quoted(other)} share their memory, and the adapter changes them differently",
        fix=f"untie them in the model; or {ON_DISK}",
        tensors=[name, other],
    )


def _change(name: str, group: Sequence[str], binding: Binding, adapters: Sequence[Adapter]) -> Any:
    """What is done to a tensor, comparable with what is done to another name of it: factors by their bytes."""
    new = binding.replaced.get(name)
    replaced = None
    if new is not None:
        info = new.factor.info
        replaced = info.dtype, info.shape, new.factor.transposed, _digest(new.factor.file.source, info)
    return replaced, [_comparable(update, group, adapters) for update in binding.updates.get(name, ())]


def _comparable(update: Update, group: Sequence[str], adapters: Sequence[Adapter]) -> Any:
    tensors = adapters[update.adapter].checkpoint.tensors

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if key != "module"}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, str) and value in update.keys:
            return _digest(tensors[value].file.source, tensors[value].info)
        return "" if value in group else value

    return plain(to_data(update))


def _digest(source: ByteSource, info: TensorInfo) -> str:
    return digest_tensor(source, info.begin, bits(info.dtype), info.shape)
