"""What a model is asked to do: its class, its inputs for tracing, which axes vary, and what its tensors are called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loramerge.errors import UnsupportedError, UsageError

Kind = Literal["decoder", "encoder", "seq2seq"]

TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""`--task` -> the class that picks the model's class."""

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = "total_sequence_length"
ENCODED = "encoder_sequence_length"

SAMPLE_BATCH, SAMPLE_LENGTH, SAMPLE_PAST, SAMPLE_ENCODED = 2, 3, 4, 5
"""Sizes while tracing: all different and none of them 1, which the tracer would take for a constant."""


@dataclass(frozen=True)
class Port:
    """One input or output tensor of a graph. `axes`: a name for an axis that varies, a number for one that does not."""

    name: str
    axes: tuple[str | int, ...]
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class GraphSpec:
    """One graph of an export.

    `file`: its name without folder. `inputs`: in the order of the graph. `part`: which part of the model is traced:
    `model`, `encoder`, `first` (decoder without a past) or `next` (decoder with one). `outputs`: names for what the
    trace gives, in its order, empty to keep the names that it has.
    """

    file: str
    part: Literal["model", "encoder", "first", "next"]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    """Heads and size of a head, by layer of the cache."""


@dataclass(frozen=True)
class Task:
    """What is exported: the model's class and the graphs it becomes."""

    name: str
    kind: Kind
    cls: type
    graphs: tuple[GraphSpec, ...] = field(default=())


def model_class(config: Any, task: str | None) -> type:
    """The class to export.

    Raises:
        UsageError: `usage.task`. UnsupportedError: `export.architecture`.
    """
    import transformers

    if task is not None and task not in TASKS:
        raise UsageError("usage.task", f"unknown task {task!r}", fix=f"one of {', '.join(TASKS)}")
    if task is not None:
        auto = getattr(transformers, TASKS[task])
        cls = auto._model_mapping.get(type(config), None)
        if isinstance(cls, tuple):
            names = config.architectures or []
            cls = next((c for c in cls if c.__name__ in names), cls[0])
        if cls is None:
            message = f"a model of type {config.model_type} has no class for {task}"
            raise UnsupportedError("export.architecture", message, fix="leave --task away, or give another")
        return _loaded(cls)
    names = config.architectures or []
    if not names:
        raise UnsupportedError(
            "export.architecture",
            "the config names no architecture",
            fix="give one of --task " + ", ".join(TASKS),
        )
    cls = getattr(transformers, names[0], None)
    if not inspect.isclass(cls) or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedError(
            "export.architecture",
            f"{names[0]} is no architecture of the installed library; code that comes with a model is never run",
            fix="export it with the tool of its authors, and merge into the ONNX model: loramerge merge MODEL.onnx ...",
        )
    return _loaded(cls)


def _loaded(cls: Any) -> type:
    assert inspect.isclass(cls)
    return cls


def task_of(cls: Any, config: Any, dtype: torch.dtype, name: str | None) -> Task:
    """The graphs that a class is exported to.

    Raises:
        UnsupportedError: `export.architecture`, `export.cache`.
    """
    if getattr(config, "is_encoder_decoder", False):
        graphs = _seq2seq(cls, config, dtype)
        speech = cls.main_input_name != "input_ids"
        return Task(
            name or ("automatic-speech-recognition" if speech else "text2text-generation"), "seq2seq", cls, graphs
        )
    if _is_causal(cls):
        return Task(name or "text-generation", "decoder", cls, (_decoder(cls, config, dtype),))
    return Task(name or _guessed(cls), "encoder", cls, (_encoder(cls, config, dtype),))


def _is_causal(cls: Any) -> bool:
    from transformers.models.auto import modeling_auto

    return cls.__name__ in set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _guessed(cls: Any) -> str:
    """The task's name by the class's, for the receipt."""
    from transformers.models.auto import modeling_auto

    tables: dict[str, Any] = {
        "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "multiple-choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    }
    for task, names in tables.items():
        if cls.__name__ in {n for v in names.values() for n in ([v] if isinstance(v, str) else v)}:
            return task
    return "feature-extraction"


def _takes(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.forward).parameters


def _decoder(cls: Any, config: Any, dtype: torch.dtype) -> GraphSpec:
    takes = _takes(cls)
    if "past_key_values" not in takes:
        raise UnsupportedError(
            "export.cache",
            f"{cls.__name__} keeps a state that is no key-value cache, which this export does not know",
            fix="--task feature-extraction exports the model without its head and cache",
        )
    text = config.get_text_config(decoder=True)
    layers = cache_shapes(cls, config, text)
    ports = [Port("input_ids", (BATCH, SEQUENCE)), Port("attention_mask", (BATCH, TOTAL))]
    if "position_ids" in takes:
        ports.append(Port("position_ids", (BATCH, SEQUENCE)))
    ports += _cache_ports("past_key_values.{}.{}", layers, PAST, dtype)
    outputs = [Port("logits", (BATCH, SEQUENCE, text.vocab_size), dtype)]
    outputs += _cache_ports("present.{}.{}", layers, TOTAL, dtype)
    return GraphSpec("model.onnx", "model", tuple(ports), tuple(outputs), tuple(layers))


def _cache_ports(pattern: str, layers: Sequence[tuple[int, int]], axis: str, dtype: torch.dtype) -> list[Port]:
    return [
        Port(pattern.format(i, what), (BATCH, heads, axis, size), dtype)
        for i, (heads, size) in enumerate(layers)
        for what in ("key", "value")
    ]


def cache_shapes(cls: Any, config: Any, text: Any) -> list[tuple[int, int]]:
    """Heads and size of a head of every layer of the key-value cache: from a forward pass without numbers, or where
    the model has steps that need numbers, from its config.

    Raises:
        UnsupportedError: `export.cache`: a cache of another form (states of recurrent layers, for example).
    """
    import transformers

    cache: Any = None
    try:
        with torch.device("meta"), torch.no_grad():
            model = cls(config).eval()
            ids = torch.zeros(SAMPLE_BATCH, SAMPLE_LENGTH, dtype=torch.int64)
            cache = model(input_ids=ids, use_cache=True).past_key_values
    except Exception:
        cache = None  # what a model does with numbers cannot be foreseen: the config tells the rest
    if cache is not None:
        layers: Any = getattr(cache, "layers", None)
        plain = layers and all(isinstance(layer, transformers.cache_utils.DynamicLayer) for layer in layers)
        if not plain or any(layer.keys.shape != layer.values.shape for layer in layers):
            raise UnsupportedError(
                "export.cache",
                f"{cls.__name__} has a cache that is not made of equal keys and values",
                fix="--task feature-extraction exports the model without its head and cache",
            )
        return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]
    kinds = set(getattr(text, "layer_types", None) or ())
    if any("attention" not in kind or "linear" in kind for kind in kinds):
        raise UnsupportedError(
            "export.cache",
            f"{cls.__name__} has layers without keys and values",
            fix="--task feature-extraction exports the model without its head and cache",
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [(int(heads), int(size))] * int(text.num_hidden_layers)


def _encoder(cls: Any, config: Any, dtype: torch.dtype) -> GraphSpec:
    ports = _main_ports(cls, config, dtype, encoder=False)
    return GraphSpec("model.onnx", "model", tuple(ports))


def _main_ports(cls: Any, config: Any, dtype: torch.dtype, *, encoder: bool) -> list[Port]:
    """The inputs by which data enters a model."""
    takes = _takes(cls)
    main = cls.main_input_name
    ports: list[Port] = []
    if main == "input_ids":
        leading: tuple[str | int, ...] = (BATCH,)
        if "MultipleChoice" in cls.__name__:
            leading = (BATCH, "num_choices")
        ports = [Port(name, (*leading, SEQUENCE)) for name in ("input_ids", "attention_mask") if name in takes]
        if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1 and not encoder:
            ports.append(Port("token_type_ids", (*leading, SEQUENCE)))
        if "pixel_values" in takes and getattr(config, "vision_config", None) is not None:
            ports.append(_pixels(config.vision_config, dtype, "image_batch_size"))
    elif main == "pixel_values":
        ports = [_pixels(config, dtype, BATCH)]
    elif main == "input_features" and getattr(config, "num_mel_bins", None) is not None:
        frames: str | int = "frames"
        if getattr(config, "max_source_positions", None) is not None:
            frames = 2 * config.max_source_positions
        ports = [Port("input_features", (BATCH, config.num_mel_bins, frames), dtype)]
    elif main == "input_values":
        ports = [Port("input_values", (BATCH, "samples"), dtype)]
    if not ports:
        raise UnsupportedError(
            "export.architecture",
            f"{cls.__name__} takes inputs that this export does not know (the first is {main})",
            fix="merge into a checkpoint, and export that with the tool of the model's authors",
        )
    return ports


def _pixels(config: Any, dtype: torch.dtype, batch: str) -> Port:
    size = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    if size is None:
        return Port("pixel_values", (batch, channels, "height", "width"), dtype)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return Port("pixel_values", (batch, channels, height, width), dtype)


def _seq2seq(cls: Any, config: Any, dtype: torch.dtype) -> tuple[GraphSpec, ...]:
    """Encoder, decoder without a past, decoder with one: the three files that readers of this layout know."""
    if "past_key_values" not in _takes(cls) or not hasattr(cls, "prepare_inputs_for_generation"):
        raise UnsupportedError(
            "export.architecture",
            f"{cls.__name__} is an encoder-decoder that does not generate",
            fix="--task text2text-generation or automatic-speech-recognition",
        )
    data = _main_ports(cls, config, dtype, encoder=True)
    width = int(config.hidden_size)
    audio = cls.main_input_name != "input_ids"
    encoded_axis: str | int = ENCODED
    if audio and getattr(config, "max_source_positions", None) is not None:
        encoded_axis = int(config.max_source_positions)
    hidden = Port("encoder_hidden_states", (BATCH, encoded_axis, width), dtype)
    encoder = GraphSpec("encoder_model.onnx", "encoder", tuple(data), (Port("last_hidden_state", hidden.axes, dtype),))
    layers = _decoder_layers(cls, config, data)
    mask = [] if audio else [Port("encoder_attention_mask", (BATCH, ENCODED))]
    tokens = Port("input_ids", (BATCH, SEQUENCE))
    logits = Port("logits", (BATCH, SEQUENCE, int(config.vocab_size)), dtype)

    def both(pattern: str, own: str) -> list[Port]:
        return _two_caches(pattern, layers, own, encoded_axis, dtype)

    first = GraphSpec(
        "decoder_model.onnx",
        "first",
        (tokens, *mask, hidden),
        (logits, *both("present.{}.{}.{}", SEQUENCE)),
        layers,
    )
    following = GraphSpec(
        "decoder_with_past_model.onnx",
        "next",
        (tokens, *mask, hidden, *both("past_key_values.{}.{}.{}", PAST)),
        (logits, *_cache_ports("present.{}.decoder.{}", layers, TOTAL, dtype)),
        layers,
    )
    return encoder, first, following


def _decoder_layers(cls: Any, config: Any, data: Sequence[Port]) -> tuple[tuple[int, int], ...]:
    """Heads and size of a head of the cache of every layer of an encoder-decoder, as `cache_shapes` has them."""
    sizes: dict[Any, int] = {
        BATCH: SAMPLE_BATCH,
        SEQUENCE: SAMPLE_LENGTH,
        "frames": 48,
        "samples": 3200,
        "height": 64,
        "width": 64,
    }
    try:
        with torch.device("meta"), torch.no_grad():
            model = cls(config).eval()
            inputs = {
                p.name: torch.zeros([a if isinstance(a, int) else sizes[a] for a in p.axes], dtype=p.dtype)
                for p in data
            }
            inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
            ids = torch.zeros(SAMPLE_BATCH, SAMPLE_LENGTH, dtype=torch.int64)
            cache = model(**inputs, decoder_input_ids=ids, use_cache=True).past_key_values
        return tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.self_attention_cache.layers)
    except Exception:  # what a model does with numbers cannot be foreseen: the config tells the rest
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        count = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
        size = getattr(config, "d_kv", None) or config.hidden_size // heads
        return ((int(heads), int(size)),) * int(count or config.num_hidden_layers)


def _two_caches(
    pattern: str, layers: Sequence[tuple[int, int]], own: str, encoded: str | int, dtype: torch.dtype
) -> list[Port]:
    """The decoder's own cache, then that of what was encoded: the order in which a trace has them."""
    sides = (("decoder", own), ("encoder", encoded))
    return [
        Port(pattern.format(i, side, what), (BATCH, heads, axis, size), dtype)
        for side, axis in sides
        for i, (heads, size) in enumerate(layers)
        for what in ("key", "value")
    ]
