"""The plan: what happens to every output tensor, decided from headers alone, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import ByKind, Difference, DoRA, LowRank, Update, to_data, uses
from loramerge.binding.binding import Binding
from loramerge.errors import UnsupportedError, UsageError
from loramerge.merging.methods import Combined, factor_files
from loramerge.merging.products import KEPT_BYTES
from loramerge.merging.sidefiles import SideFile
from loramerge.merging.undo import UndoFile, Undone
from loramerge.tensors.checkpoint import Checkpoint, Component, Located, WeightFile
from loramerge.tensors.dtypes import bits, is_float
from loramerge.tensors.hashing import BLOCK_BYTES, row_layout
from loramerge.tensors.padded import PaddedSource
from loramerge.tensors.safetensors import TensorInfo, encode_header, parse_header

Do = Literal["copy", "change", "add"]

ALIGNMENT = 4096
"""Tensor data of a written file starts at a multiple of this, so that it can be written past the page cache."""

OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

CODEC_ELEMENTS = 1 << 21
"""Elements that the undo codec works on at once (`bring_back.PIECE`)."""

CODEC_BYTES, DENSE_CODEC_BYTES = 32, 110
"""Memory that it takes for each of them, measured: where updates are products, and where they are made whole."""

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
    undo: Undone | None = None
    """How its source is brought back first, where that is a merged tensor."""

    @property
    def verbatim(self) -> bool:
        """Whether the bytes of the source are the bytes of the output."""
        return not self.updates and self.undo is None and self.dtype == self.source.info.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * bits(self.dtype) // 8


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of the output. `whole` is the untouched input file that it equals byte for byte.

    In the file itself the tensors of a pipeline's `component` have their own names, without its folder.
    """

    name: str
    steps: tuple[Step, ...]
    metadata: Mapping[str, str]
    whole: WeightFile | None = None
    component: str = ""
    header: bytes | None = None
    """Its header, where that is to be another file's byte for byte."""
    into: WeightFile | None = None
    """The file that is rewritten where it lies: it has all these tensors, in the same dtypes and shapes."""
    frame: WeightFile | None = None
    """The file that it equals but for what changes, byte for byte: an ONNX graph, or a file of external data."""

    def stored_name(self, step: Step) -> str:
        """What a tensor is called in the file."""
        return step.tensor.removeprefix(f"{self.component}/") if self.component else step.tensor

    def lies_there(self, step: Step) -> bool:
        """Whether the tensor is in the file already, which is rewritten where it lies."""
        here = self.into is not None and step.source.file is self.into and step.verbatim
        return here and self.into is not None and step.source.info is self.into.header.tensors[step.tensor]

    @property
    def written(self) -> list[Step]:
        """The steps whose bytes are written."""
        return [step for step in self.steps if not self.lies_there(step)]

    def layout(self) -> tuple[bytes, list[TensorInfo]]:
        """The bytes that are no tensor's, and where each tensor lies: for an untouched file, as in its source."""
        kept = self.into or self.frame
        if kept is not None:
            header = kept.frame if self.header is None else self.header
            return header, [kept.header.tensors[step.tensor] for step in self.steps]
        if self.whole is not None:
            return self.whole.frame, list(self.whole.header.tensors.values())
        if self.header is not None:
            infos = parse_header(self.header)
            return self.header, [infos[self.stored_name(s)] for s in self.steps]
        entries = [(self.stored_name(s), s.dtype, s.shape) for s in self.steps]
        return encode_header(entries, self.metadata, align=ALIGNMENT)

    @property
    def model(self) -> WeightFile | None:
        """The file whose layout it keeps, if there is one."""
        return self.into or self.frame or self.whole

    @property
    def gaps(self) -> tuple[tuple[int, int], ...] | None:
        """Where the bytes that are no tensor's go; None where they are a header."""
        return None if self.model is None else self.model.header.gaps


@dataclass(frozen=True, slots=True)
class IndexFile:
    """An index to write: its name, the component that it is of ("" for one model), metadata to keep."""

    name: str
    component: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do. `to_data` is its JSON form, which `--dry-run` prints."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    files: tuple[OutputFile, ...]
    indexes: tuple[IndexFile, ...]
    binding: Binding
    side_files: tuple[SideFile, ...]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    jobs: int = 1
    undo: UndoFile | None = None
    """Where the steps that bring tensors back read what was lost."""
    in_place: Checkpoint | None = None
    """The model that is rewritten where it lies, all files of the plan being its own."""
    recording: bool = False
    """Whether what is changed is written to an undo file."""
    way: str = ""
    """How an un-merge comes back: `undo file`, `base` or `subtraction`."""

    @property
    def steps(self) -> list[Step]:
        return [step for file in self.files for step in file.steps]

    @property
    def factor_files(self) -> list[Any]:
        """What the updates name by number: the adapters, and after them what a method made of them."""
        return factor_files(self.binding, [adapter for adapter, _ in self.adapters])

    @property
    def bytes_written(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(step.nbytes for file in self.files for step in file.written)

    @property
    def bytes_read(self) -> int:
        """Bytes of all source tensors and factors."""
        factors = sum(a.nbytes for a, _ in self.adapters)
        return factors + sum(s.source.info.nbytes for f in self.files for s in f.written if s.source.input == 0)

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
        products = self.binding.products
        if products is not None:
            sizes |= {(len(self.adapters), key): products.elements(key) for key in products}
            factors = min(KEPT_BYTES, products.held_bytes)
        wide = 8 if self.options.get("compute_dtype") == "float64" else 4
        whole = codec = once = 0
        for step in self.steps:
            rows, row_bytes = row_layout(bits(step.dtype), step.shape)
            block = max(min(BLOCK_BYTES, rows * row_bytes), row_bytes)
            if step.source.info.dtype != step.dtype:
                block += block * bits(step.source.info.dtype) // bits(step.dtype)
            coded = step.undo is not None or (self.recording and bool(step.updates))
            per_worker = max(per_worker, 2 * block if coded else block)  # the original beside what it becomes
            if coded:
                known = (*step.updates, *(() if step.undo is None else step.undo.updates))
                each = CODEC_BYTES if all(isinstance(u, LowRank | Difference) for u in known) else DENSE_CODEC_BYTES
                codec = max(codec, each * min(prod(step.shape), CODEC_ELEMENTS))
            keys = {use for u in step.updates for use in uses(u)}
            once = max(once, sum(2 * wide * sizes[k] for k in keys))
            # Kinds that need the weight as a whole hold it, their result and what the formula makes of it.
            whole = max([whole, *(4 * wide * u.view.rows * u.view.cols for u in step.updates if isinstance(u, ByKind))])
            whole = max([whole, *(u.held_bytes for u in step.updates if isinstance(u, Combined))])
        scratch = 4 * wide * (1 << 18)
        # What a source that is read from elsewhere keeps of its stream, together with those beside it.
        window = max((getattr(file.source, "window_bytes", 0) for file in self.base.files), default=0)
        return TORCH_BYTES + window + jobs * (per_worker + scratch + whole + codec) + factors + once

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
            **({"way": self.way} if self.way else {}),
            **({"in_place": True} if self.in_place is not None else {}),
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
                            **({} if s.undo is None else {"undo": s.undo.how}),
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
        by_file[home].append(step_of(base.tensors, binding, name, dtype))
    files: list[OutputFile] = []
    indexes: list[IndexFile] = []
    for model in base.models:
        made = _arrange(base, model, by_file, shard_size, single_file)
        files += made
        if single_file is None and base.onnx is None and (model.checkpoint.index_name is not None or len(made) > 1):
            name = _index_name(model, cut=shard_size is not None)
            indexes.append(IndexFile(name, model.folder, model.checkpoint.index or {}))
    return Plan(
        base=base,
        adapters=tuple(adapters),
        files=tuple(files),
        indexes=tuple(indexes),
        binding=binding,
        side_files=tuple(side_files),
        options=options or {},
        notes=tuple(n for a, _ in adapters for n in (f"{a.name}: {note}" for note in a.notes)) + tuple(binding.notes),
    )


def step_of(tensors: Mapping[str, Located], binding: Binding, name: str, dtype: str) -> Step:
    """What happens to one tensor of the output. `tensors`: those of the base."""
    slot = binding.names[name]
    updates = tuple(binding.updates.get(name, ()))
    new = binding.replaced.get(name)
    if new is not None:
        source = Source(new.adapter + 1, new.factor.key, new.factor.file, new.factor.info)
        kept = source.info.dtype if name in binding.added else slot.dtype
    else:
        located = tensors[slot.source]
        source, kept = Source(0, slot.source, located.file, located.info), slot.dtype
        if name in binding.grown:
            source = _padded(source, binding.grown[name])
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


def _padded(source: Source, shape: tuple[int, ...]) -> Source:
    """A source with zeros behind each axis of its tensor."""
    info = source.info
    inner = PaddedSource(source.file.source, info.begin, bits(info.dtype) // 8, info.shape, shape)
    return replace(
        source,
        file=replace(source.file, source=inner),
        info=TensorInfo(info.name, info.dtype, shape, 0, inner.size),
    )


def _arrange(
    base: Checkpoint,
    model: Component,
    by_file: Mapping[str, list[Step]],
    shard_size: int | None,
    single_file: str | None,
) -> list[OutputFile]:
    """Output files of one model, from steps grouped by the base's files."""
    inputs = [file for file in base.files if file.component == model.folder]
    if base.onnx is not None:
        return [_framed(file, base, tuple(by_file[file.name]), single_file) for file in inputs]
    metadata: dict[str, str] = {}
    for file in inputs:
        metadata |= file.header.metadata
    if single_file is not None:
        steps = tuple(s for file in inputs for s in by_file[file.name])
        return [_output_file(single_file, steps, metadata, base)]
    if shard_size is None:
        return [
            _output_file(_safetensors_name(f.name), tuple(by_file[f.name]), f.header.metadata, base, model.folder)
            for f in inputs
            if by_file[f.name] or not base.tensors
        ]
    shards: list[list[Step]] = [[]]
    size = 0
    for file in inputs:
        for step in by_file[file.name]:
            if shards[-1] and size + step.nbytes > shard_size:
                shards.append([])
                size = 0
            shards[-1].append(step)
            size += step.nbytes
    stem, total = _in_folder(model, _stem(model)), len(shards)
    names = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if total == 1:
        names = [f"{stem}.safetensors"]
    return [
        _output_file(name, tuple(steps), metadata, base, model.folder)
        for name, steps in zip(names, shards, strict=True)
    ]


ONE_FILE = (".safetensors", ".onnx")
"""Suffixes of outputs that are one file, and not a directory. An ONNX model may have its weights beside it."""


def _framed(file: WeightFile, base: Checkpoint, steps: tuple[Step, ...], single_file: str | None) -> OutputFile:
    """A file of an ONNX model with the bytes of tensors changed and all others as they are."""
    name = file.name
    if single_file is not None:
        graph = base.files[0].name
        name = single_file if file is base.files[0] else name.removeprefix(graph[: graph.rfind("/") + 1])
    for step in steps:
        info = file.header.tensors[step.tensor]
        if step.do == "add" or (step.dtype, step.shape) != (info.dtype, info.shape):
            raise UnsupportedError(
                "onnx.shape",
                f"{step.tensor!r} would become {step.dtype} {list(step.shape)}, the graph needs {info.dtype} "
                f"{list(info.shape)}",
                tensors=[step.tensor],
            )
    whole = file if all(s.verbatim and s.source.file is file for s in steps) else None
    return OutputFile(name, steps, file.header.metadata, whole, frame=file)


STEMS = ("diffusion_pytorch_model",)
"""Names of weight files that their loaders look for, other than `model`."""


def _stem(model: Component) -> str:
    """What the weights of a model are called: `model`, unless loaders of its kind look for another name."""
    named = model.checkpoint.index_name or model.checkpoint.files[0].name
    return next((stem for stem in STEMS if named.startswith(stem)), "model")


def _index_name(model: Component, cut: bool) -> str:
    """The index of a model: the base's own, or the usual name where it has none, or one of pickled files.

    An index of a variant (`.safetensors.index.fp16.json`) keeps its name as long as its files keep theirs.
    """
    own = model.checkpoint.index_name or ""
    if not own.endswith(".safetensors.index.json") and (cut or ".safetensors.index." not in own):
        own = f"{_stem(model)}.safetensors.index.json"
    return _in_folder(model, own)


def _in_folder(model: Component, name: str) -> str:
    return f"{model.folder}/{name}" if model.folder else name


def _safetensors_name(name: str) -> str:
    """The output's name for a file of the base: pickled files become safetensors under the usual name."""
    if name.endswith(".safetensors"):
        return name
    folder, slash, last = (name.rpartition(".")[0] or name).rpartition("/")
    if not last.startswith(STEMS):
        last = last.replace("pytorch_model", "model")
    return f"{folder}{slash}{last}.safetensors"


def is_stale(key: str) -> bool:
    """Whether an entry of a file's metadata is a hash of its weights."""
    return key.startswith("sshs_") or key == "modelspec.hash_sha256"


def _output_file(
    name: str, steps: tuple[Step, ...], metadata: Mapping[str, str], base: Checkpoint, component: str = ""
) -> OutputFile:
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
    kept = {k: v for k, v in metadata.items() if not is_stale(k)}
    return OutputFile(name, steps, {**kept, "format": "pt"}, whole, component)
