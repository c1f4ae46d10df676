"""What a file or a directory is: an adapter or a checkpoint, told from headers alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loramerge.adapters.adapter import Adapter, Module
from loramerge.adapters.config import metadata_of, read_config
from loramerge.adapters.dialect import detect, dialects, weight_names
from loramerge.adapters.kinds import KINDS
from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.adapters.opening import open_adapter
from loramerge.errors import InputError, LoramergeError
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import PICKLE_SUFFIXES, Checkpoint, Component, PickleReader, open_checkpoint
from loramerge.tensors.dtypes import display, is_float
from loramerge.tensors.interrupted import beside
from loramerge.tensors.safetensors import TensorInfo
from loramerge.tensors.source import FileSource, stat_file
from loramerge.tensors.text import plural, quoted, some

# Names under which trainers save adapters; those of known dialects come from `formats/adapters/`.
_ADAPTER_FILE = re.compile(r"(\d+_)?(adapter_model|adapters|adapter_\d+|pytorch_lora_weights)\.(safetensors|bin|pt)")
# Names under which a directory holds a model of its own.
_MODEL_FILE = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
# Factors of dialects that may not be known here: enough to say "an adapter", never used to merge one.
_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|a|b|down|up|mid|embedding_[AB]|magnitude_vector)|lora\.(down|up)|lora_linear_layer"
    r"|lokr_[wt]|hada_[wt]|oft_(blocks|R|r)|boft_R|ia3_l|dora_scale|vera_lambda_[bd])([._]|\d|$)"
)
# A suffix that only quantised weights have -> the format.
_QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_scale_inv": "fp8 blocks",
    ".weight_scale": "scaled weights",
    "_blocks": "MXFP4",
}
RECEIPT = "loramerge.json"
MAX_RECEIPT_BYTES = 1 << 30  # it has an entry for every tensor


def open_weights(path: str | Path, *, read_pickle: PickleReader | None = None) -> Checkpoint:
    """Open the tensors of whatever `path` is, a checkpoint or an adapter, as tensors by name.

    In a directory the model goes before an adapter that lies beside it.

    Raises:
        LoramergeError: as `open_checkpoint`; InputError ``adapter.no_weights``: a config without weights.
    """
    name, path = str(path), Path(path)
    if name:
        stat_file(path, name)
    if not name or not path.is_dir():
        return open_checkpoint(name, read_pickle=read_pickle, onnx=True)
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return open_checkpoint(name, read_pickle=read_pickle, onnx=True)  # which says what is wrong with it
    if not any(_MODEL_FILE.fullmatch(n) for n in names) and "model_index.json" not in names:
        adapters = [n for n in weight_names() if n in names] or [n for n in names if _ADAPTER_FILE.fullmatch(n)]
        if adapters:
            return open_checkpoint(name, read_pickle=read_pickle, weight_names=adapters)
        configs = {d.detect["config"] for d in dialects() if "config" in d.detect}
        if configs & set(names) and not any(n.endswith((".safetensors", *PICKLE_SUFFIXES)) for n in names):
            message = f"holds an adapter's config and no weights; it holds {some(names, 10)}"
            raise InputError("adapter.no_weights", message, fix="download its weight file as well", file=name)
    return open_checkpoint(name, read_pickle=read_pickle, onnx=True)


def inspect(source: str | Path, *, read_pickle: PickleReader | None = None) -> dict[str, Any]:
    """Tell what a file or a directory is. Reads headers and configs, never a weight.

    Args:
        source: what the user typed.
        read_pickle: reader for PyTorch files; None refuses them.

    Returns:
        Plain data. Always: ``kind`` (``"adapter"`` or ``"checkpoint"``), ``source``, ``files`` (name, bytes,
        format, tensors), ``tensors``, ``bytes``, ``parameters``, ``dtypes`` (name -> tensors and bytes),
        ``metadata`` of the first file, ``notes``, and ``contents`` (name, dtype, shape, bytes, file).
        An adapter has ``mergeable``, where that is false ``why`` and ``fix``, and what `_describe_adapter`
        adds; a checkpoint has what `_describe_checkpoint` adds.

    Raises:
        LoramergeError: it cannot be read, or is neither.
    """
    checkpoint = open_weights(source, read_pickle=read_pickle)
    try:
        data = _describe_tensors(checkpoint)
        if _is_adapter(checkpoint):
            return {"kind": "adapter"} | data | _describe_adapter(checkpoint, read_pickle)
        return {"kind": "checkpoint"} | data | _describe_checkpoint(checkpoint)
    finally:
        checkpoint.close()


def _is_adapter(checkpoint: Checkpoint) -> bool:
    if checkpoint.components:
        return False
    if any(_ADAPTER_FILE.fullmatch(file.name) for file in checkpoint.files):
        return True
    config = checkpoint.config or {}
    # A few models were released with their own LoRA factors inside: their config says that they are models.
    if "architectures" in config or "model_type" in config:
        return False
    return detect(checkpoint.tensors, None, metadata_of(checkpoint)) is not None or bool(_factors(checkpoint.tensors))


def _factors(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if _FACTOR.search(key)]


def _describe_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = [located.info for located in checkpoint.tensors.values()]
    return {
        "source": checkpoint.name,
        "files": [
            {
                "name": file.name,
                "bytes": file.source.size,
                "format": file.kind,
                "tensors": len(file.header.tensors),
            }
            for file in checkpoint.files
        ],
        "tensors": len(infos),
        "bytes": checkpoint.nbytes,
        "parameters": sum(info.numel for info in infos),
        "dtypes": _histogram(infos),
        "metadata": dict(checkpoint.files[0].header.metadata),
        "notes": [],
        "contents": [
            {
                "name": name,
                "dtype": display(located.info.dtype),
                "shape": list(located.info.shape),
                "bytes": located.info.nbytes,
                "file": located.file.name,
            }
            for name, located in checkpoint.tensors.items()
        ],
    }


def _histogram(infos: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    """Tensors and bytes by dtype, the largest share first."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in infos:
        tensors[info.dtype] += 1
        nbytes[info.dtype] += info.nbytes
    order = sorted(tensors, key=lambda dtype: (-nbytes[dtype], dtype))
    return {display(dtype): {"tensors": tensors[dtype], "bytes": nbytes[dtype]} for dtype in order}


# ------------------------------------------------------------------------------------------------ adapters


def _describe_adapter(checkpoint: Checkpoint, read_pickle: PickleReader | None) -> dict[str, Any]:
    """``dialect``, ``title``, ``type``, ``base``, ``rank``, ``alpha``, ``scale`` (each ``[least, most]`` or None),
    flags, ``modules`` (how many), ``kinds``, ``targets``, ``module_list``, ``plain``, ``harmless``."""
    path = _adapter_path(checkpoint)
    config = _adapter_config(checkpoint) or {}
    dialect = detect(checkpoint.tensors, config or None, metadata_of(checkpoint))
    fields = {} if dialect is None else dialect.config
    data: dict[str, Any] = {
        "dialect": None if dialect is None else dialect.name,
        "title": None if dialect is None else dialect.title,
        "type": config.get(fields.get("type", "")),
        "base": config.get(fields.get("base", "")) or None,
        "mergeable": False,
    }
    try:
        adapter = open_adapter(path, read_pickle=read_pickle)
    except LoramergeError as error:
        return data | _refusal(error)
    try:
        return data | _describe_opened(adapter)
    finally:
        adapter.checkpoint.close()


def _refusal(error: LoramergeError) -> dict[str, Any]:
    return {
        "mergeable": False,
        "code": error.code,
        "why": error.message,
        "fix": error.fix,
        "about": list(error.tensors[:5]),
    }


def _adapter_path(checkpoint: Checkpoint) -> Path:
    """What to give to `open_adapter`: it knows fewer file names in a directory than are read here."""
    if checkpoint.directory is None or checkpoint.files[0].name in weight_names():
        return checkpoint.path
    return checkpoint.directory / checkpoint.files[0].name


def _adapter_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The config beside the weights, if it can be read; `open_adapter` says what is wrong where it cannot."""
    try:
        found = read_config(checkpoint)
        return None if found is None else dict(found.fields)
    except LoramergeError:
        return None


def _describe_opened(adapter: Adapter) -> dict[str, Any]:
    settings = adapter.settings
    data: dict[str, Any] = {
        "dialect": adapter.dialect.name,
        "title": adapter.dialect.title,
        "type": settings.get("type"),
        "version": settings.get("version"),
        "base": settings.get("base") or settings.get("trained-on"),
        "family_hint": settings.get("family-hint"),
        "task": settings.get("task"),
        "mergeable": True,
        "rslora": bool(settings.get("rslora")),
        "dora": any(MAGNITUDES.keys() & module.factors.keys() for module in adapter.modules),
        "bias": settings.get("bias", "none"),
        "lora_bias": any("bias" in module.factors for module in adapter.modules),
        "modules_to_save": list(settings.get("modules-to-save") or ()),
        "modules": len(adapter.modules),
        "kinds": dict(Counter(_kind(module) for module in adapter.modules)),
        "targets": dict(Counter(_target(module.path) for module in adapter.modules).most_common()),
        "plain": [plain.factor.key for plain in adapter.plain],
        "harmless": list(adapter.harmless),
    }
    rows = []
    refused: LoramergeError | None = None
    for module in adapter.modules:
        row: dict[str, Any] = {"path": module.path, "kind": _kind(module), "factors": _shapes(module)}
        try:
            row |= _strength(adapter, module)
        except LoramergeError as error:
            refused = refused or error
        rows.append(row)
    for name in ("rank", "alpha", "scale"):
        values = [row[name] for row in rows if row.get(name) is not None]
        data[name] = [min(values), max(values)] if values else None
    notes = list(adapter.notes)
    if data["harmless"]:
        notes.append(
            f"{plural(len(adapter.harmless), 'tensor')} without effect on a merge: {some(adapter.harmless, 3)}"
        )
    for field, patterns in (("rank-pattern", adapter.rank_pattern), ("alpha-pattern", adapter.alpha_pattern)):
        field = adapter.dialect.config.get(field, field)
        # Patterns name the parameters of stacked experts, which only the base tells.
        if (unused := patterns.unused()) and not settings.get("target-parameters"):
            notes.append(f"{field} has keys that match no module: {some(unused)}")
        if patterns.overlaps:
            name, keys = next(iter(patterns.overlaps.items()))
            notes.append(f"{field} has keys that disagree on {quoted(name)} ({some(keys)}): the first counts")
    data |= {"notes": notes, "module_list": rows}
    return data if refused is None else data | _refusal(refused)


def _target(path: str) -> str:
    """The last segment of a path; of a flattened one all of it, `N` for the number of a block."""
    return path.rpartition(".")[2] if "." in path else re.sub(r"(?<=_)\d+(?=_)", "N", path)


def _kind(module: Module) -> str:
    if MAGNITUDES.keys() & module.factors.keys():
        return f"{module.kind} with DoRA"
    return f"{module.kind} embedding" if "embedding-A" in module.factors else module.kind


def _shapes(module: Module) -> dict[str, list[int]]:
    return {name: list(factor.shape) for name, factor in sorted(module.factors.items())}


def _strength(adapter: Adapter, module: Module) -> dict[str, Any]:
    """Rank, alpha and scale of one module, as far as its kind has them."""
    kind = KINDS.get(module.kind)
    if kind is None or not kind.scaled:
        return {}
    if module.kind != "low-rank":
        known = (*kind.required, *kind.optional)
        rank = kind.rank({name: f.shape for name, f in module.factors.items() if name in known})
        return {} if rank is None else _scaled(adapter, module, rank, 1)
    a, b = ("embedding-A", "embedding-B") if "embedding-A" in module.factors else ("A", "B")
    down, up = module.factors[a].shape, module.factors[b].shape
    if len(down) == 3 and "axis" in adapter.dialect.experts:  # one layer an expert
        return _scaled(adapter, module, down[1], 1) | {"experts": max(down[0], up[0])}
    rows, columns = down[0], up[1]
    # A of a grouped linear (loralib's MergedLinear) has the rows of all its slots, B has one rank of columns.
    # Factors of stacked experts have as many times the rank on both sides as there are experts.
    rank, stacked = columns, 1
    claimed = adapter.rank_pattern.lookup(module.path) or adapter.settings.get("rank")
    if rows == columns and adapter.settings.get("target-parameters") and claimed and rows % claimed == 0:
        stacked = int(rows // claimed)
        rank = rows // stacked
    return _scaled(adapter, module, rank, stacked) | ({"experts": stacked} if stacked > 1 else {})


def _scaled(adapter: Adapter, module: Module, rank: int, stacked: int) -> dict[str, Any]:
    own = None if "alpha" in getattr(KINDS[module.kind], "optional", ()) else adapter.alpha(module)
    scale = adapter.scale(module.path, rank * stacked, stacked=stacked, own=own)
    section = adapter.section(module.path)
    alpha = own
    if alpha is None:
        alpha = section.alpha_pattern.lookup(module.path.removeprefix(section.prefix))
    if alpha is None:
        alpha = section.settings.get("alpha")
    return {"rank": rank, "alpha": alpha, "scale": scale}


# --------------------------------------------------------------------------------------------- checkpoints


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """``model_type``, ``architectures``, ``layers``, ``tied_embeddings`` (None: not said), ``quantised``
    (the format or None), ``index``, ``config_dtype``, ``receipt`` (what was merged into it, or None),
    ``models`` of a pipeline (``folder``, ``class``, ``files``, ``tensors``, ``bytes``, ``parameters``, ``dtypes``,
    ``quantised``)."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else {}
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    architectures = config.get("architectures")
    notes = []
    if checkpoint.config is None and not checkpoint.components:
        notes.append("there is no config.json: names and shapes are all there is to go by")
    factors = _factors(checkpoint.tensors)
    if factors:
        notes.append(f"{plural(len(factors), 'tensor')} look like LoRA factors inside the model: {some(factors, 3)}")
    if not checkpoint.tensors:
        notes.append("holds no tensors")
    if checkpoint.directory is not None:
        beside = [n for n in weight_names() if (checkpoint.directory / n).is_file()]
        if beside:
            notes.append(f"an adapter lies in the same directory: inspect {quoted(beside[0])} itself")
    receipt, complaint = _receipt(checkpoint)
    return {
        "model_type": config.get("model_type"),
        "architectures": architectures if isinstance(architectures, list) else [],
        "layers": config.get("num_hidden_layers", inner.get("num_hidden_layers")),
        "config_dtype": config.get("dtype") or config.get("torch_dtype") or None,
        "tied_embeddings": tied if isinstance(tied, bool) else None,
        "quantised": next(filter(None, (_quantised(model.checkpoint) for model in checkpoint.models)), None),
        "index": checkpoint.index_name,
        "receipt": receipt,
        "models": [_describe_component(component) for component in checkpoint.components],
        "notes": notes + complaint,
    }


def _describe_component(component: Component) -> dict[str, Any]:
    checkpoint = component.checkpoint
    infos = [located.info for located in checkpoint.tensors.values()]
    return {
        "folder": component.folder,
        "class": component.class_name,
        "files": len(checkpoint.files),
        "tensors": len(infos),
        "bytes": checkpoint.nbytes,
        "parameters": sum(info.numel for info in infos),
        "dtypes": _histogram(infos),
        "quantised": _quantised(checkpoint),
    }


def _quantised(checkpoint: Checkpoint) -> str | None:
    config = (checkpoint.config or {}).get("quantization_config")
    if isinstance(config, dict):
        return str(config.get("quant_method") or "of a kind that its config does not name")
    names = checkpoint.tensors
    for suffix, what in _QUANTISED.items():
        if any(name.endswith(suffix) for name in names):
            return what
    for located in names.values():
        # The narrow floats say nothing without scales, which other tensors hold.
        if is_float(located.info.dtype) and located.info.dtype[:2] in ("F8", "F6", "F4"):
            return display(located.info.dtype)
    return None


def _receipt(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, list[str]]:
    """What a merge left with its output, in short. And a note where there is one that cannot be read."""
    path = checkpoint.directory / RECEIPT if checkpoint.directory is not None else beside(checkpoint.path, RECEIPT)
    if not os.path.lexists(path):
        return None, []
    try:
        source = FileSource(path)
        try:
            raw = source.read(0, min(source.size, MAX_RECEIPT_BYTES + 1))
        finally:
            source.close()
        data = strictjson.loads(raw, where=source.name, code="receipt.invalid", max_bytes=MAX_RECEIPT_BYTES)
        if not isinstance(data, dict):
            raise InputError("receipt.invalid", "is not a JSON object", file=path)
    except LoramergeError as error:
        return None, [f"its receipt {path.name} cannot be read: {error.message}"]
    return {"name": path.name} | _summary(data), []


def _summary(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The few fields of a receipt that say what was merged, each only where it has the type it should have."""

    def field(row: object, name: str, kind: type | tuple[type, ...]) -> Any:
        value = row.get(name) if isinstance(row, dict) else None
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    rows = receipt.get("adapters")
    return {
        "version": field(receipt, "version", str),
        "base": field(receipt.get("base"), "source", str),
        "adapters": [
            {"source": field(row, "source", str), "weight": field(row, "weight", (int, float))}
            for row in (rows if isinstance(rows, list) else [])
        ],
        "retention": field(receipt.get("retention"), "total", (int, float)),
    }
