"""Writes expressed items: keys, config and metadata by the target's `[write]` table, all or nothing."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.kinds.magnitude import MAGNITUDES
from loramerge.converting.express import Expressed, is_turned, round_alpha, suffix_of
from loramerge.converting.hashes import digests
from loramerge.converting.items import DTYPES, Item
from loramerge.converting.target import Target
from loramerge.converting.uniform import uniform
from loramerge.errors import InputError, UsageError
from loramerge.tensors.gguf_writer import encode_gguf
from loramerge.tensors.output import What
from loramerge.tensors.safetensors import encode_header
from loramerge.tensors.text import quoted

NAMES = {dtype: name for name, dtype in DTYPES.items()}
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Built:
    """The files of an output by name, ready to be written. `weights`: the one that holds the tensors."""

    files: Mapping[str, bytes]
    weights: str
    what: What


def _wrapped(items: Sequence[Item], target: Target) -> tuple[Item, ...]:
    """Items of which whole parameters of a module that has factors, too, lie in the wrapped module (`X.base_layer`)."""
    segment = target.dialect.transparent
    paths = {item.path for item in items if item.kind != "plain"}
    return tuple(
        replace(i, path=f"{i.path}.{segment}") if segment and i.kind == "plain" and i.path in paths else i
        for i in items
    )


def destination(out: Path, target: Target) -> tuple[What, str]:
    """Whether OUT is a file or a directory, and the name of the weight file.

    Raises:
        UsageError: `output.name` where the target's files cannot have this name.
    """
    kind, container = target.write["out"], target.write.get("container", "safetensors")
    suffixes = TORCH_SUFFIXES if container == "torch" else (f".{container}",)
    named = out.suffix in suffixes
    if kind == "directory":
        if out.suffix in (*TORCH_SUFFIXES, ".safetensors"):
            raise UsageError(
                "output.name", f"{target.title} is written as a directory, not as a file", fix="-o DIRECTORY"
            )
        return "directory", target.write["file"]
    if kind == "file" and not named:
        raise UsageError("output.name", f"{target.title} is one {suffixes[0]} file", fix=f"-o {out.name}{suffixes[0]}")
    return ("file", out.name) if named else ("directory", target.write["file"])


def build(
    expressed: Expressed,
    target: Target,
    what: What,
    file: str,
    settings: Mapping[str, Any],
    carried: Mapping[str, str] | None = None,
) -> Built:
    """The bytes of every file.

    Args:
        settings: of the source, for what a config says that is no number of a module.
        carried: metadata of the source that still holds; what the target writes itself goes before it.

    Raises:
        InputError: `convert.duplicate` for two tensors under one name.
    """
    expressed = replace(expressed, items=_wrapped(expressed.items, target))
    tensors: dict[str, Tensor] = {}
    for item in expressed.items:
        for key, tensor in keys_of(item, target):
            if key in tensors:
                raise InputError(
                    "convert.duplicate",
                    f"two tensors of the adapter would be {quoted(key)}",
                    fix="leave one of them out with --exclude",
                    tensors=[item.module],
                )
            tensors[key] = tensor.detach().contiguous()
    files: dict[str, bytes] = {}
    metadata: dict[str, Any] = {**(carried or {}), **target.write.get("metadata", {})}
    method = expressed.method
    fields = method.get("fields", {})
    numbers = {path: (_rank(item), _alpha(item)) for path, item in _numbered(expressed.items, target).items()}
    metadata |= method.get("metadata", {})
    if target.write.get("numbers") == "metadata":
        metadata |= _informing(fields, numbers)
    if "config" in target.write:
        document = _config(expressed, target, numbers, settings)
        files[target.write["config"]] = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
    if "metadata-config" in target.write:
        document = {}
        for prefix in sorted({_prefix(item, target) for item in expressed.items}):
            mine = [item for item in expressed.items if _prefix(item, target) == prefix]
            own = {p.removeprefix(prefix): v for p, v in numbers.items() if p.startswith(prefix)}
            part = Expressed(tuple(mine), method)
            section = _config(part, target, own, {}, prefix)
            document |= {f"{prefix}{name}": value for name, value in section.items()}
        metadata[target.write["metadata-config"]] = json.dumps(document, indent=2, sort_keys=True)
    if target.write.get("container") == "torch":
        files[file] = _torch_bytes(tensors)
    elif target.write.get("container") == "gguf":
        alpha = next((a for _, a in numbers.values()), 1.0)
        told: dict[str, str | float] = {"alpha": float(alpha), "architecture": str(settings.get("architecture"))}
        metadata |= {theirs: told[ours] for ours, theirs in fields.items()}
        rows = [(key, NAMES[t.dtype], tuple(t.shape), _raw(t)) for key, t in tensors.items()]
        files[file] = encode_gguf(metadata, rows)
    else:
        files[file] = _safetensors_bytes(tensors, metadata, target.write.get("hashes", {}))
    return Built(files, file, what)


# --------------------------------------------------------------------------------------------------------- tensors


def keys_of(item: Item, target: Target) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one item under the target's names."""
    if item.kind == "plain":
        suffix = suffix_of(target.keys.get("plain", {}), "value", item.leaf)
        yield item.path + (suffix or f".{item.leaf}"), item.factors["value"]
        return
    keys = target.keys[item.kind]
    for name, factor in item.factors.items():
        suffix = suffix_of(keys, name, item.leaf)
        assert suffix is not None
        key = item.path + suffix
        yield key, factor.mT if is_turned(keys, name) and factor.dim() > 1 else factor
    if item.magnitude is not None:
        name = next(n for n in MAGNITUDES if n in keys)
        vector, axes = item.magnitude.vector, _axes(item)
        if MAGNITUDES[name] == "plain":
            shape = (-1,) if axes == 2 else (1, -1, *[1] * (axes - 2))
        else:
            shape = (-1, *[1] * (axes - 1)) if item.magnitude.axis == "output" else (1, -1, *[1] * (axes - 2))
        yield item.path + keys[name], vector.reshape(shape)
    if target.scale == "tensor" and item.rank is not None and "alpha" not in item.factors:
        yield item.path + target.write["alpha"], torch.tensor(_alpha(item), dtype=torch.float32)


def _axes(item: Item) -> int:
    if item.shape is not None and item.exact_shape:
        return len(item.shape)
    return max(2, *(f.dim() for f in item.factors.values()))


def _rank(item: Item) -> int | None:
    return item.claimed or item.rank


def _alpha(item: Item) -> float:
    return round_alpha(item.scale * (_rank(item) or 1))


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names as the safetensors library lays them out: wide dtypes first (the order of its enum), then by name."""
    place = {name: i for i, name in enumerate(_enum())}
    return sorted(tensors, key=lambda key: (-place[NAMES[tensors[key].dtype]], key))


def _enum() -> Sequence[str]:
    from loramerge.tensors.dtypes import BITS

    return list(BITS)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], hashes: Mapping[str, str]) -> bytes:
    names = _order(tensors)
    entries = [(name, NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names]
    data = b"".join(_raw(tensors[name]) for name in names)
    if hashes:
        head, _ = encode_header(entries, metadata)
        metadata = {**metadata, **digests(head, iter([data]), hashes)}
    head, _ = encode_header(entries, metadata)
    return head + data


def _torch_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- config and metadata


def _numbered(items: Sequence[Item], target: Target) -> dict[str, Item]:
    """Module path, as the config names it -> the item whose rank and alpha it has."""
    prefix = "" if target.roles else target.write.get("prefix", "")
    return {item.parameter or item.path.removeprefix(prefix): item for item in items if _rank(item) is not None}


def _prefix(item: Item, target: Target) -> str:
    return next((row["prefix"] for row in target.roles if item.path.startswith(row["prefix"])), "")


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _informing(fields: Mapping[str, str], numbers: Mapping[str, tuple[int | None, float]]) -> dict[str, str]:
    """Rank and alpha as metadata that only informs."""
    told = {}
    for index, name in enumerate(("rank", "alpha")):
        values = {pair[index] for pair in numbers.values()}
        if name in fields and values:
            told[fields[name]] = str(_number(values.pop() or 0)) if len(values) == 1 else "Dynamic"
    return told


def _config(
    expressed: Expressed,
    target: Target,
    numbers: Mapping[str, tuple[int | None, float]],
    settings: Mapping[str, Any],
    prefix: str | None = None,
) -> dict[str, Any]:
    """The config: the method's own constants, then what its `fields` name."""
    method, items = expressed.method, expressed.items
    fields: Mapping[str, str] = method.get("fields", {})
    own = target.write.get("prefix", "") if prefix is None else prefix
    ranks = Counter(rank for rank, _ in numbers.values() if rank)
    rank = ranks.most_common(1)[0][0] if ranks else 1
    alphas = Counter(alpha for _, alpha in numbers.values())
    alpha = alphas.most_common(1)[0][0] if alphas else float(rank)
    said: dict[str, Any] = {
        "rank": rank,
        "alpha": _number(alpha),
        "rank-pattern": {_pattern(path): r for path, (r, _) in numbers.items() if r != rank},
        "alpha-pattern": {_pattern(path): _number(a) for path, (_, a) in numbers.items() if a != alpha},
        "targets": _targets(
            [i.path.removeprefix(own) for i in items if _rank(i) is not None and not i.parameter], target
        ),
        "dora": any(i.magnitude is not None for i in items),
        "lora-bias": any("bias" in i.factors for i in items),
        "scale": next((i.scale for i in items if i.rank is not None), 1.0),
    }
    again = uniform([i for i in items if i.kind == method.get("again")]) if method.get("again") else None
    if again is not None:
        said |= {"factor": again.factor, "both": again.both}
    said["core"] = any({"t1", "t2"} & i.factors.keys() for i in items)
    inner = f".{target.dialect.transparent}"
    saved = {i.path.removeprefix(own) for i in items if i.kind == "plain" and i.leaf == "weight"}
    whole = sorted(path for path in saved if not path.endswith(inner))
    if whole:
        said["whole"] = settings.get("modules-to-save") or whole
    for ours in ("bias", "token-rows", "task", "base", "tied", "fan-in-fan-out"):
        if settings.get(ours):
            said[ours] = settings[ours]
    if parameters := sorted(i.parameter for i in items if i.parameter):
        # Which axis is which in their factors depends on the release that wrote them.
        said |= {"target-parameters": parameters, "version": target.write["stacked-as"]}
    document: dict[str, Any] = json.loads(json.dumps(method.get("config", {})))
    if said["dora"]:
        document |= method.get("dora", {})
    for ours, theirs in fields.items():
        if ours in said:
            _put(document, theirs, said[ours])
    return document


def _put(document: dict[str, Any], name: str, value: Any) -> None:
    *folders, last = name.split(".")
    for folder in folders:
        document = document.setdefault(folder, {})
    document[last] = value


def _pattern(path: str) -> str:
    """A regular expression for exactly this path (the reader tries it at the beginning, too)."""
    return f"^{re.escape(path)}"


def _targets(paths: Sequence[str], target: Target) -> list[str]:
    """The modules by their full paths, or, for servers that expect them so, by their last names."""
    if target.last_names:
        return sorted({path.rpartition(".")[2] for path in paths})
    if layers := target.write.get("in-layers"):
        inside = re.compile(rf"(?:^|.*\.){re.escape(layers)}\.\d+\.")
        return sorted({inside.sub("", path) for path in paths})
    return sorted(set(paths))
