"""A model's graph without its weights: the model is built with memory that nothing touches, traced, and folded."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from loramerge.errors import UnsupportedError
from loramerge.exporting import tasks
from loramerge.exporting.tasks import GraphSpec, Port

SIZES: Mapping[str, int] = {
    tasks.BATCH: tasks.SAMPLE_BATCH,
    tasks.SEQUENCE: tasks.SAMPLE_LENGTH,
    tasks.PAST: tasks.SAMPLE_PAST,
    tasks.TOTAL: tasks.SAMPLE_PAST + tasks.SAMPLE_LENGTH,
    tasks.ENCODED: tasks.SAMPLE_ENCODED,
    "image_batch_size": 3,
    "num_choices": 3,
    "height": 64,
    "width": 96,
    "frames": 48,
    "samples": 3200,
}


def load_config(directory: str | os.PathLike[str]) -> Any:
    """A model's config, from a local directory and without running any code of it.

    Raises:
        UnsupportedError: `export.architecture`: the library does not know this type of model.
    """
    import transformers

    try:
        with quietly():
            return transformers.AutoConfig.from_pretrained(
                os.fspath(directory), local_files_only=True, trust_remote_code=False
            )
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UnsupportedError(
            "export.architecture",
            f"the installed library cannot read this config: {reason}",
            fix="code that comes with a model is never run; merge into the ONNX model instead, if there is one",
            file=directory,
        ) from None


def build(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model whose parameters are memory that was never written, and so takes no room; buffers are what they are."""
    from transformers.initialization import no_init_weights

    with quietly(), no_init_weights():
        model = cls._from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def trace(model: Any, spec: GraphSpec, opset: int | None) -> Any:
    """The ONNX graph (an `onnx_ir.Model`) of one part of a model; initializers have the names of its parameters.

    Raises:
        UnsupportedError: `export.trace`, with what the exporter said.
    """
    from transformers.exporters import exporter_onnx

    library: Any = exporter_onnx

    traced, prefix = model, ""
    if spec.part == "encoder":
        traced = model.get_encoder()
        prefix = next(f"{name}." for name, module in model.named_modules() if module is traced)
    inputs, shapes = _inputs(spec)
    if (
        "past_key_values" not in inputs
        and spec.part != "first"
        and "use_cache" in inspect.signature(traced.forward).parameters
    ):
        inputs["use_cache"] = False
    try:
        with quietly():
            options = library.OnnxConfig(dynamic=True, optimize=False, opset_version=opset, dynamic_shapes=shapes)
            made, _ = library.OnnxExporter().export_program(traced, inputs, options)
    except Exception as error:  # whatever a tracer that follows Python code into every model may raise
        raise UnsupportedError(
            "export.trace",
            f"the exporter cannot trace {type(model).__name__} ({type(error).__name__}: {_first_line(error)})",
            fix="merge into an ONNX model of it instead, if there is one: loramerge merge MODEL.onnx ADAPTER -o OUT",
        ) from error
    if prefix:
        for name, value in list(made.graph.initializers.items()):
            if _is_parameter(traced, name):
                del made.graph.initializers[name]
                value.name = prefix + name
                made.graph.initializers[value.name] = value
    return made


def _is_parameter(model: Any, name: str) -> bool:
    return name in dict(model.named_parameters(remove_duplicate=False)) or name in dict(model.named_buffers())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"


def _tensor(port: Port) -> torch.Tensor:
    shape = [SIZES[axis] if isinstance(axis, str) else axis for axis in port.axes]
    if port.dtype.is_floating_point:
        return torch.zeros(shape, dtype=port.dtype)
    if "mask" in port.name:
        return torch.ones(shape, dtype=port.dtype)
    return torch.zeros(shape, dtype=port.dtype)


def _varies(port: Port) -> dict[int, Any]:
    auto = torch.export.Dim.AUTO
    return {i: auto for i, axis in enumerate(port.axes) if isinstance(axis, str)}


def _inputs(spec: GraphSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of `forward`, and which of their axes vary."""
    import transformers

    inputs: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    own: list[Port] = []
    for port in spec.inputs:
        if port.name.startswith("past_key_values."):
            own.append(port)
            continue
        inputs[port.name], shapes[port.name] = _tensor(port), _varies(port)
    if "position_ids" in inputs:
        first = tasks.SAMPLE_PAST
        at = torch.arange(first, first + tasks.SAMPLE_LENGTH)[None]
        inputs["position_ids"] = at.repeat(tasks.SAMPLE_BATCH, 1)
    if spec.part in ("first", "next"):
        inputs["decoder_input_ids"], shapes["decoder_input_ids"] = inputs.pop("input_ids"), shapes.pop("input_ids")
        inputs, shapes = _with_encoded(inputs, shapes)
    if spec.part == "first":
        inputs["use_cache"] = True
    if own:
        half = len(own) // 2 if spec.part == "next" else len(own)
        caches = [_cache(part) for part in (own[:half], own[half:]) if part]
        cache = caches[0] if len(caches) == 1 else transformers.EncoderDecoderCache(*caches)
        inputs["past_key_values"] = cache
        shapes["past_key_values"] = [_varies(port) for port in own]
        inputs["use_cache"] = True
    return inputs, shapes


def _with_encoded(inputs: dict[str, Any], shapes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the encoder gave, and its mask, under the names that `forward` has for them."""
    if "encoder_attention_mask" in inputs:
        inputs["attention_mask"] = inputs.pop("encoder_attention_mask")
        shapes["attention_mask"] = shapes.pop("encoder_attention_mask")
    inputs["encoder_outputs"] = (inputs.pop("encoder_hidden_states"),)
    shapes["encoder_outputs"] = (shapes.pop("encoder_hidden_states"),)
    order = ["decoder_input_ids", "attention_mask", "encoder_outputs"]
    return {k: inputs[k] for k in order if k in inputs}, {k: shapes[k] for k in order if k in shapes}


def _cache(ports: list[Port]) -> Any:
    import transformers

    cache = transformers.DynamicCache()
    for index in range(0, len(ports), 2):
        cache.update(_tensor(ports[index]), _tensor(ports[index + 1]), index // 2)
    return cache


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings and progress that the libraries print: what matters is raised."""
    import transformers

    talk: Any = transformers.logging
    verbosity = talk.get_verbosity()
    bars = talk.is_progress_bar_enabled()
    level = logging.root.manager.disable
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        talk.set_verbosity(verbosity)
        if bars:
            talk.enable_progress_bar()
