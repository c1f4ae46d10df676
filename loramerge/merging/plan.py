"""The plan: what happens to every output tensor, decided from headers alone, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import DoRA, Update, to_data
from loramerge.binding.binding import Binding
from loramerge.errors import UnsupportedError, UsageError
from loramerge.merging.sidefiles import SideFile
from loramerge.tensors.checkpoint import Checkpoint, WeightFile
from loramerge.tensors.dtypes import bits, is_float
from loramerge.tensors.hashing import BLOCK_BYTES, row_layout
from loramerge.tensors.safetensors import TensorInfo, encode_header

Do = Literal["copy", "change", "add"]

ALIGNMENT = 4096
"""Tensor data of a written file starts at a multiple of this, so that it can be written past the page cache."""

OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

TORCH_BYTES = 300_000_000
"""Memory of the interpreter with torch loaded, measured, rounded up."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor's bytes come from: input 0 is the base, n the n-th adapter."""

    input: int
    name: str
    file: WeightFile
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor.

    `copy`: bytes as they are. `change`: the source, with updates, in dtype `dtype`. `add`: a tensor that the base
    does not have under this name. Steps do not depend on one another.
    """

    tensor: str
    do: Do
    source: Source
    dtype: str
    shape: tuple[int, ...]
    updates: tuple[Update, ...] = ()

    @property
    def verbatim(self) -> bool:
        """Whether the bytes of the source are the bytes of the output."""
        return not self.updates and self.dtype == self.source.info.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * bits(self.dtype) // 8


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output. `whole` is the untouched input file that it equals byte for byte."""

    name: str
    steps: tuple[Step, ...]
    metadata: Mapping[str, str]
    whole: WeightFile | None = None

    def layout(self) -> tuple[bytes, list[TensorInfo]]:
        """The header, and where each tensor lies: for an untouched file, as in its source."""
        if self.whole is not None:
            source = self.whole.header
            return self.whole.source.read(0, source.data_start), list(source.tensors.values())
        return encode_header([(s.tensor, s.dtype, s.shape) for s in self.steps], self.metadata, align=ALIGNMENT)


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do. `to_data` is its JSON form, which `--dry-run` prints."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    files: tuple[OutputFile, ...]
    index_name: str | None
    binding: Binding
    side_files: tuple[SideFile, ...]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    jobs: int = 1

    @property
    def steps(self) -> list[Step]:
        return [step for file in self.files for step in file.steps]

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(step.nbytes for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Bytes of all source tensors and factors."""
        factors = sum(a.nbytes for a, _ in self.adapters)
        return factors + sum(s.source.info.nbytes for s in self.steps if s.source.input == 0)

    def counts(self) -> dict[str, int]:
        """How many tensors are copied, changed and added."""
        counts = {"copied": 0, "changed": 0, "added": 0}
        for step in self.steps:
            counts[{"copy": "copied", "change": "changed", "add": "added"}[step.do]] += 1
        return counts

    def memory(self, jobs: int) -> int:
        """Bytes of memory the run will take at most, torch included: an estimate from headers."""
        per_worker = 0
        factors = 0
        sizes = {(i, k): f.info.numel for i, (a, _) in enumerate(self.adapters) for k, f in a.factors().items()}
        wide = 8 if self.options.get("compute_dtype") == "float64" else 4
        for step in self.steps:
            rows, row_bytes = row_layout(bits(step.dtype), step.shape)
            block = max(min(BLOCK_BYTES, rows * row_bytes), row_bytes)
            if step.source.info.dtype != step.dtype:
                block += block * bits(step.source.info.dtype) // bits(step.dtype)
            per_worker = max(per_worker, block)
            keys = {(u.adapter, key) for u in step.updates for key in u.keys}
            factors = max(factors, sum(2 * wide * sizes[k] for k in keys))
        scratch = 4 * wide * (1 << 18)
        return TORCH_BYTES + jobs * (per_worker + scratch) + factors

    def to_data_adapters(self) -> list[dict[str, Any]]:
        """What becomes of each adapter, as plain data."""
        return [
            {
                "source": adapter.name,
                "weight": weight,
                "dialect": adapter.dialect.name,
                "modules": matches.modules,
                "modules_matched": matches.matched,
                "tensors": len(adapter.checkpoint.tensors),
                "tensors_applied": len(matches.applied),
                "harmless": sorted(matches.harmless),
                "excluded": sorted(matches.excluded),
                "unmatched": sorted(matches.unmatched),
            }
            for (adapter, weight), matches in zip(self.adapters, self.binding.matches, strict=True)
        ]

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data."""
        counts = self.counts()
        return {
            "base": self.base.name,
            "adapters": self.to_data_adapters(),
            "options": dict(self.options),
            "tensors_changed": counts["changed"],
            "tensors_copied": counts["copied"],
            "tensors_added": counts["added"],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "memory": self.memory(self.jobs),
            "jobs": self.jobs,
            "config": dict(self.binding.config),
            "notes": list(self.notes),
            "files": [
                {
                    "name": file.name,
                    "copied_whole": file.whole is not None,
                    "steps": [
                        {
                            "tensor": s.tensor,
                            "do": s.do,
                            "dtype": s.dtype,
                            "shape": list(s.shape),
                            "source": {
                                "input": s.source.input,
                                "file": s.source.file.name,
                                "tensor": s.source.name,
                                "bytes": [s.source.info.begin, s.source.info.end],
                            },
                            "updates": [to_data(u) for u in s.updates],
                        }
                        for s in file.steps
                    ],
                }
                for file in self.files
            ],
            "side_files": [{"name": f.name, "from": f.origin} for f in self.side_files],
        }


def make_plan(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    binding: Binding,
    *,
    side_files: Sequence[SideFile] = (),
    dtype: str = "keep",
    shard_size: int | None = None,
    single_file: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a merge.

    Args:
        base, adapters, binding: what was opened and bound.
        dtype: `keep`, or the dtype of every floating-point tensor of the output.
        shard_size: cut the output into files of about this many bytes; None keeps the base's files.
        single_file: write one file of this name.

    Raises:
        UsageError: an unknown dtype.
        UnsupportedError: a DoRA weight whose rows are longer than a block.
    """
    if dtype != "keep" and dtype not in OUTPUT_DTYPES:
        raise UsageError("usage.dtype", f"unknown dtype {dtype!r}", fix=f"one of keep, {', '.join(OUTPUT_DTYPES)}")
    by_file: dict[str, list[Step]] = {file.name: [] for file in base.files}
    last = base.files[-1].name
    for name, slot in binding.names.slots.items():
        located = base.tensors.get(slot.source)
        home = last if located is None or name in binding.untied else located.file.name
        by_file[home].append(_step(base, binding, name, dtype))
    files = _arrange(base, by_file, shard_size, single_file)
    index_name = None
    if single_file is None and (base.index_name is not None or len(files) > 1):
        index_name = "model.safetensors.index.json"
        if base.index_name is not None and base.index_name.endswith(".safetensors.index.json"):
            index_name = base.index_name
    return Plan(
        base=base,
        adapters=tuple(adapters),
        files=files,
        index_name=index_name,
        binding=binding,
        side_files=tuple(side_files),
        options=options or {},
        notes=tuple(n for a, _ in adapters for n in (f"{a.name}: {note}" for note in a.notes)) + tuple(binding.notes),
    )


def _step(base: Checkpoint, binding: Binding, name: str, dtype: str) -> Step:
    slot = binding.names[name]
    updates = tuple(binding.updates.get(name, ()))
    new = binding.replaced.get(name)
    if new is not None:
        source = Source(new.adapter + 1, new.factor.key, new.factor.file, new.factor.info)
        kept = source.info.dtype if name in binding.added else slot.dtype
    else:
        located = base.tensors[slot.source]
        source, kept = Source(0, slot.source, located.file, located.info), slot.dtype
    if dtype != "keep" and is_float(kept) and bits(kept) >= 16:
        kept = OUTPUT_DTYPES[dtype]
    if any(isinstance(u, DoRA) for u in updates):
        rows, _ = row_layout(bits(kept), source.info.shape)
        if rows != source.info.shape[0]:
            raise UnsupportedError("binding.row", "a DoRA weight with rows of more than 8 MiB", tensors=[name])
    do: Do = "copy"
    if name in binding.added or name in binding.untied or name != slot.source:
        do = "add"
    elif updates or new is not None or kept != source.info.dtype:
        do = "change"
    return Step(name, do, source, kept, source.info.shape, updates)


def _arrange(
    base: Checkpoint, by_file: Mapping[str, list[Step]], shard_size: int | None, single_file: str | None
) -> tuple[OutputFile, ...]:
    """Output files from steps grouped by the base's files."""
    metadata: dict[str, str] = {}
    for file in base.files:
        metadata |= file.header.metadata
    if single_file is not None:
        steps = tuple(s for group in by_file.values() for s in group)
        return (_output_file(single_file, steps, metadata, base),)
    if shard_size is None:
        return tuple(
            _output_file(_safetensors_name(f.name), tuple(by_file[f.name]), f.header.metadata, base)
            for f in base.files
            if by_file[f.name] or not base.tensors
        )
    shards: list[list[Step]] = [[]]
    size = 0
    for group in by_file.values():
        for step in group:
            if shards[-1] and size + step.nbytes > shard_size:
                shards.append([])
                size = 0
            shards[-1].append(step)
            size += step.nbytes
    if len(shards) == 1:
        return (_output_file("model.safetensors", tuple(shards[0]), metadata, base),)
    total = len(shards)
    return tuple(
        _output_file(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(steps), metadata, base)
        for i, steps in enumerate(shards, 1)
    )


def _safetensors_name(name: str) -> str:
    """The output's name for a file of the base: pickled files become safetensors under the usual name."""
    if name.endswith(".safetensors"):
        return name
    stem = name.rpartition(".")[0] or name
    return stem.replace("pytorch_model", "model") + ".safetensors"


def _output_file(name: str, steps: tuple[Step, ...], metadata: Mapping[str, str], base: Checkpoint) -> OutputFile:
    """`whole` is set where the steps are exactly the tensors of one safetensors file of the base, untouched."""
    first = steps[0].source.file if steps else None
    whole = (
        first
        if first is not None
        and first.kind == "safetensors"
        and first in base.files
        and all(s.do == "copy" and s.verbatim and s.source.file is first for s in steps)
        and [s.tensor for s in steps] == list(first.header.tensors)
        else None
    )
    # Hashes of the old weights would be lies; `format` is what transformers 4 insists on.
    kept = {k: v for k, v in metadata.items() if not k.startswith("sshs_") and k != "modelspec.hash_sha256"}
    return OutputFile(name, steps, {**kept, "format": "pt"}, whole)
