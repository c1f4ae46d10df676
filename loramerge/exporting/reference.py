"""The model in torch, loaded by its own library: what an export is compared with."""

from __future__ import annotations

from typing import Any

import torch

from loramerge.errors import LoramergeError
from loramerge.exporting import tracing
from loramerge.exporting.plan import ExportPlan
from loramerge.merging import memory, run
from loramerge.merging.kernels import TORCH_DTYPES


def load(plan: ExportPlan, dtype: torch.dtype, options: run.Options) -> Any:
    """The model with its weights in `dtype`, adapters merged in memory: another way than that of the export.

    The numbers are those of the export's own dtype: what rounding to half precision did to weights is no difference.
    """
    stored = {"float32": torch.float32, "float16": torch.float16}[plan.dtype]
    wanted = {piece.key for origin, _ in plan.weights.values() for piece in origin.pieces}
    tensors = {name: _read(plan, name, stored) for name in plan.base.tensors if _needed(plan, name, wanted)}
    pairs = [(adapter, weight) for adapter, weight in plan.merge.adapters]
    if pairs:
        from dataclasses import replace

        chosen = replace(options, dtype="keep", allow_unmatched=options.allow_unmatched or not plan.whole)
        tensors = memory.merge_tensors(tensors, pairs, plan.base.config, chosen)
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    with tracing.quietly():
        model, report = plan.task.cls.from_pretrained(  # type: ignore[attr-defined]
            None, config=plan.config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    used = {name for name in report["missing_keys"] if name in plan.weights}
    if used:
        raise LoramergeError("internal", f"the library did not find {sorted(used)[:5]} in the weights of the export")
    return model.eval()


def _needed(plan: ExportPlan, name: str, wanted: set[str]) -> bool:
    return plan.whole or name in wanted


def _read(plan: ExportPlan, name: str, stored: torch.dtype) -> torch.Tensor:
    located = plan.base.tensors[name]
    raw = bytearray(located.info.nbytes)
    located.file.source.read_into(located.info.begin, memoryview(raw))
    flat = torch.frombuffer(raw, dtype=TORCH_DTYPES[located.info.dtype]) if raw else torch.empty(0)
    tensor = flat.view(located.info.shape)
    # Merging sums in float32 and rounds once: from a stored dtype that is coarser, nothing is lost on the way there.
    return (
        tensor.to(torch.float32 if stored == torch.float32 else tensor.dtype) if tensor.is_floating_point() else tensor
    )
