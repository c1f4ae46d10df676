"""Adapters bound to a checkpoint of any format: to its tensors as they are, or to the parameters of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge.adapters.adapter import Adapter
from loramerge.binding.bind import bind
from loramerge.binding.binding import Binding
from loramerge.binding.namespace import Slot, slots_of
from loramerge.tensors.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loramerge.merging.run import Options


def bind_checkpoint(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    options: Options,
    *,
    slots: Sequence[Slot] | None = None,
    config: Mapping[str, Any] | None = None,
    receipt: Mapping[str, Any] | None = None,
) -> Binding:
    """Decides what adapters do to each tensor of a checkpoint. Errors as `loramerge.binding.bind.bind`.

    Args:
        slots, config: its tensors and config as they are once what was merged is taken out, where something was.
        receipt: of the merge that made it, where one did.
    """
    if checkpoint.onnx is not None:
        from loramerge.merging.onnx import bind_model

        return bind_model(checkpoint, adapters, options, receipt)
    if slots is None:
        slots = slots_of({name: (t.info.dtype, t.info.shape) for name, t in checkpoint.tensors.items()})
        config = checkpoint.config
    return bind(
        slots,
        config,
        adapters,
        include=options.include,
        exclude=options.exclude,
        allow_unmatched=options.allow_unmatched,
        base_name=checkpoint.name,
    )
