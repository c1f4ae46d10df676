"""What an export will do, decided before a byte is written: the merge, the graphs, and where every weight goes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from loramerge import pickled
from loramerge.errors import InputError, MismatchError, UnsupportedError, UsageError
from loramerge.exporting import graphs, names, tasks, tracing, weights
from loramerge.exporting.names import Origin
from loramerge.exporting.weights import Target
from loramerge.merging import receipt as receipts
from loramerge.merging import run, sidefiles
from loramerge.merging.plan import Plan, Step
from loramerge.tensors.checkpoint import Checkpoint, open_checkpoint
from loramerge.tensors.dtypes import display, is_float
from loramerge.tensors.output import check_destination, check_space
from loramerge.tensors.pipeline import input_folders
from loramerge.tensors.text import some

LAYOUTS = ("optimum", "transformersjs", "genai")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to export; the flags of the command line under the same names."""

    task: str | None = None
    dtype: str | None = None
    opset: int | None = None
    layout: str = "optimum"
    verify: bool = True
    link_weights: bool = False
    adapter_ready: bool = False

    def check(self) -> None:
        """Raises UsageError for values that mean nothing."""
        if self.layout not in LAYOUTS:
            raise UsageError("usage.layout", f"unknown layout {self.layout!r}", fix=f"one of {', '.join(LAYOUTS)}")
        if self.dtype not in (None, *DTYPES):
            raise UsageError("usage.dtype", f"unknown dtype {self.dtype!r}", fix=f"one of {', '.join(DTYPES)}")
        if self.task is not None and self.task not in tasks.TASKS:
            raise UsageError("usage.task", f"unknown task {self.task!r}", fix=f"one of {', '.join(tasks.TASKS)}")
        if self.opset is not None and not 18 <= self.opset <= 23:
            raise UsageError("usage.opset", f"opset {self.opset} is not written", fix="--opset 18 to 23")
        if self.link_weights and self.layout == "transformersjs":
            raise UsageError(
                "usage.link-weights",
                "--layout transformersjs wants the weights in a file of their own",
                fix="leave --link-weights away",
            )


@dataclass
class Graph:
    """One graph: its spec, and the `onnx_ir.Model` once it is traced."""

    spec: tasks.GraphSpec
    model: Any
    path: str
    """In the output, posix."""


@dataclass
class ExportPlan:
    """Everything that an export will do."""

    merge: Plan
    settings: Settings
    task: tasks.Task
    dtype: str
    config: Any
    graphs: list[Graph] = field(default_factory=list)
    weights: dict[str, tuple[Origin, str]] = field(default_factory=dict)
    """Name in the graphs -> what it is made of, its dtype."""
    turned: set[str] = field(default_factory=set)
    targets: dict[str, Target] = field(default_factory=dict)
    data_file: str = ""
    notes: list[str] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    """More of what the graphs say of themselves."""
    sites: list[str] = field(default_factory=list)
    """Modules that take an adapter at run time."""
    whole: bool = True
    """Whether it is the model with all its layers."""

    def stored_shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of the merge."""
        return self._steps[key].shape

    @cached_property
    def _steps(self) -> dict[str, Step]:
        return {step.tensor: step for step in self.merge.steps}

    @property
    def base(self) -> Checkpoint:
        return self.merge.base

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that the graphs read."""
        return sum(t.nbytes for t in self.targets.values())

    @property
    def written(self) -> int:
        """Bytes of weights that are written: none where files are linked."""
        if not self.settings.link_weights:
            return self.nbytes
        return sum(step.nbytes for file in self.merge.files if file.whole is None for step in file.steps)

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "base": self.base.name,
            "adapters": self.merge.to_data_adapters(),
            "task": self.task.name,
            "architecture": self.task.cls.__name__,
            "dtype": self.dtype,
            "opset": self.graphs[0].model.opset_imports.get("") if self.graphs else None,
            "layout": self.settings.layout,
            "tensors_changed": self.merge.counts()["changed"] if self.merge.adapters else 0,
            "weights": len(self.weights),
            "bytes_written": self.written,
            "graphs": [
                {
                    "file": graph.path,
                    "inputs": {
                        v.name: [_axis(d) for d in v.shape]
                        for v in graph.model.graph.inputs
                        if v.name not in graph.model.graph.initializers
                    },
                    "outputs": {v.name: [_axis(d) for d in v.shape or ()] for v in graph.model.graph.outputs},
                    "nodes": len(graph.model.graph),
                }
                for graph in self.graphs
            ],
            **({"adapter_sites": self.sites} if self.settings.adapter_ready else {}),
            "side_files": [{"name": f.name, "from": f.origin} for f in self.merge.side_files],
            "notes": [*self.merge.notes, *self.notes],
        }


def _axis(dim: Any) -> int | str | None:
    return dim if isinstance(dim, int) else getattr(dim, "value", None)


def plan_export(
    model: run.Pathlike | Checkpoint,
    adapters: run.Adapters,
    out: run.Pathlike,
    options: run.Options,
    settings: Settings,
) -> ExportPlan:
    """Opens, binds, traces and lays out; nothing is written, no weight is read.

    Raises:
        LoramergeError: anything wrong with the inputs, their match, the model, the destination or the space for it.
    """
    settings.check()
    given = run.weighted(adapters)
    destination = Path(out)
    if destination.suffix in (".onnx", ".safetensors"):
        raise UsageError(
            "usage.output",
            "an export is a directory: a graph, its weights and the model's files",
            fix=f"-o {destination.with_suffix('')}",
        )
    check = partial(check_destination, destination, force=options.force, what="directory")
    typed = [Path(p) for p in (model, *(a for a, _ in given)) if isinstance(p, str | os.PathLike)]
    if all(path.exists() for path in typed):
        check(inputs=[*typed, *(folder for path in typed for folder in input_folders(path))])
    opened = model if isinstance(model, Checkpoint) else open_model(model, options)
    dtype = settings.dtype or _own_dtype(opened)
    options = replace(options, dtype=dtype)
    options.check()
    _check_model(opened)
    merge = run.plan_tensors(opened, given, options)
    if not options.force and given and (before := receipts.merged_before(opened, [a for a, _ in merge.adapters])):
        raise MismatchError(
            "base.already-merged",
            f"the model's own receipt says that {before} is merged into it already",
            fix="export it without --adapter, or --force to apply it twice",
            file=opened.name,
        )
    merge = replace(merge, jobs=run.jobs_for(merge, options))
    config = read_config(merge)
    cls = tasks.model_class(config, settings.task)
    task = tasks.task_of(cls, config, DTYPES[dtype], settings.task)
    _check_layout(task, settings)
    plan = ExportPlan(merge, settings, task, dtype, config)
    if settings.dtype is None and dtype == "float32" and _kinds(opened) - {"F32"}:
        plan.notes.append(
            "the weights are written as float32, which onnxruntime runs on a CPU; --dtype float16 halves them"
        )
    network = tracing.build(cls, config, DTYPES[dtype])
    trace_graphs(plan, network)
    lay_out(plan)
    if settings.adapter_ready:
        from loramerge.exporting import ready

        plan.sites = ready.make_ready(plan)
    check_space(destination, plan.written + run.SPACE_MARGIN)
    return plan


def open_model(model: run.Pathlike, options: run.Options) -> Checkpoint:
    """Opens a model by its headers."""
    return open_checkpoint(
        os.fspath(model), read_pickle=pickled.read_header if options.allow_pickle else None, onnx=True
    )


def _kinds(base: Checkpoint) -> set[str]:
    return {t.info.dtype for t in base.tensors.values() if is_float(t.info.dtype)}


def _own_dtype(base: Checkpoint) -> str:
    """float16 where the weights are, else float32: what a CPU runs."""
    return "float16" if _kinds(base) == {"F16"} else "float32"


def _check_model(base: Checkpoint) -> None:
    if base.components:
        raise UnsupportedError(
            "export.pipeline", "is a pipeline of several models", fix="give one component's folder", file=base.name
        )
    if any(file.kind.startswith("onnx") for file in base.files):
        raise UnsupportedError(
            "export.is-onnx",
            "is an ONNX model already",
            fix="loramerge merge MODEL.onnx ADAPTER -o OUT.onnx merges into it",
            file=base.name,
        )
    if base.directory is None or base.config is None:
        raise InputError(
            "export.no-config",
            "has no config.json, which tells what to compute with these weights",
            fix="give the model's directory",
            file=base.name,
        )
    quantised = base.config.get("quantization_config")
    odd = [name for name, t in base.tensors.items() if _is_quantised(t.info.dtype, t.info.shape)]
    if quantised is not None or odd:
        what = (
            f"the config tells of {quantised.get('quant_method', 'quantised')} weights"
            if isinstance(quantised, dict)
            else f"{some(odd)} {'are' if len(odd) > 1 else 'is'} {display(base.tensors[odd[0]].info.dtype)}"
        )
        raise UnsupportedError(
            "export.quantised",
            f"the weights are quantised: {what}",
            fix="export the model that it was quantised from, and quantise the ONNX model",
            file=base.name,
        )


def _is_quantised(dtype: str, shape: tuple[int, ...]) -> bool:
    low = is_float(dtype) and dtype not in ("F32", "F16", "BF16", "F64")
    return low or (dtype in ("I8", "U8") and len(shape) > 1)


def _check_layout(task: tasks.Task, settings: Settings) -> None:
    if settings.layout == "genai" and task.kind != "decoder":
        raise UnsupportedError(
            "export.layout", f"the genai layout is for text generation, this is {task.name}", fix="--layout optimum"
        )
    if settings.layout == "transformersjs" and task.kind == "seq2seq":
        raise UnsupportedError(
            "export.layout",
            "the transformersjs layout of an encoder-decoder is not written yet",
            fix="--layout optimum",
        )


def read_config(merge: Plan) -> Any:
    """The config of the model as it will be: with what adapters change of it (a larger vocabulary, an untied head)."""
    assert merge.base.directory is not None
    raw = (merge.base.directory / "config.json").read_bytes()
    with tempfile.TemporaryDirectory(prefix="loramerge-") as folder:
        (Path(folder) / "config.json").write_bytes(sidefiles.patched_config(raw, merge.binding.config, None))
        return tracing.load_config(folder)


def trace_graphs(plan: ExportPlan, network: Any, only: set[str] | None = None) -> None:
    """Traces every graph of the task, and finds what each of its weights is made of.

    `only`: turn these weights and no others; by default all that every graph uses turned alone.

    Raises:
        InputError: `export.missing`: the graph needs weights that the checkpoint does not have.
    """
    shapes = {step.tensor: step.shape for step in plan.merge.steps}
    dtypes = {step.tensor: step.dtype for step in plan.merge.steps}
    found = names.origins(network, shapes)
    same = names.canonical(network, found)
    state = network.state_dict()
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    made: list[Graph] = []
    turnable: list[tuple[set[str], set[str]]] = []
    for spec in plan.task.graphs:
        traced = tracing.trace(network, spec, plan.settings.opset)
        used = _rename(traced, same, found, parameters)
        missing = sorted(name for name in used if name not in found)
        if missing:
            raise InputError(
                "export.missing",
                f"the checkpoint has no {some(missing)}, which {plan.task.cls.__name__} needs",
                fix="--task feature-extraction exports the model without its head; or give the whole checkpoint",
                file=plan.base.name,
                tensors=missing,
            )
        with tracing.quietly():
            graphs.fold(traced, used)
            graphs.name_ports(traced, spec)
        used &= set(traced.graph.initializers)
        turnable.append((used, graphs.turnable(traced, used)))
        made.append(Graph(spec, traced, spec.file))
        for name in [n for n in traced.graph.initializers if n in used]:  # in an order that is always the same
            kinds = {dtypes[piece.key] for piece in found[name].pieces}
            stored = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}.get(state[name].dtype)
            if kinds != {stored}:
                raise UnsupportedError(
                    "export.dtype",
                    f"{name} is {some(sorted(display(k) for k in kinds))}, and {state[name].dtype} in the graph",
                    fix="--dtype float32",
                    tensors=[name],
                )
            plan.weights[name] = (found[name], next(iter(kinds)))
    turned = {name for _, able in turnable for name in able} if only is None else only
    turned -= {name for used, able in turnable for name in used - able}
    if plan.settings.link_weights:
        turned = set()
    for graph in made:
        graphs.turn_weights(graph.model, turned)
        graphs.strip(graph.model)
    plan.turned, plan.graphs = turned, made


def _rename(traced: Any, same: Mapping[str, str], found: Mapping[str, Origin], parameters: set[str]) -> set[str]:
    """Gives weights that share memory one name, and tells which initializers are weights."""
    used = set()
    for name, value in list(traced.graph.initializers.items()):
        known = same.get(name)
        if known is None or (known not in found and name not in parameters):
            continue  # a constant, or a table that the model makes itself
        if known != name:
            graphs.rename_initializer(traced, value, known)
        used.add(known)
    return used


def lay_out(plan: ExportPlan) -> None:
    """Names the files and gives every weight its place."""
    name_files(plan)
    if plan.settings.link_weights:
        plan.targets = weights.linked(plan.weights, plan.merge.files)
    else:
        plan.targets = weights.arrange(plan.weights, plan.turned, plan.data_file)


def name_files(plan: ExportPlan) -> None:
    """Names the graphs and the data file as the layout has them."""
    folder = "onnx/" if plan.settings.layout == "transformersjs" else ""
    suffix = "_fp16" if folder and plan.dtype == "float16" else ""
    for graph in plan.graphs:
        graph.path = f"{folder}{graph.spec.file.removesuffix('.onnx')}{suffix}.onnx"
    plan.data_file = f"{folder}model{suffix}.onnx_data"
