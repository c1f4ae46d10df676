"""A catalogue of bad inputs: each is refused with its code, in words that help, before anything is written.

Three tables of spoiled inputs, in the same sections: what is refused (`REFUSED`), what must be accepted (`ACCEPTED`)
and what is accepted with a warning (`WARNED`). Every case starts from the same good base and adapter.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.errors import LoramergeError

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, HIDDEN, KV, FFN, LAYERS, RANK, ALPHA = 16, 8, 4, 12, 2, 2, 4
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
TRAINED = ("self_attn.k_proj", "mlp.up_proj")
MODULE = "model.layers.0.mlp.up_proj"
KEY = f"base_model.model.{MODULE}.lora_"
A, B = f"{KEY}A.weight", f"{KEY}B.weight"
WEIGHT = f"{MODULE}.weight"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Tensors = dict[str, np.ndarray[Any, Any]]


# ------------------------------------------------------------------------------------------------- good inputs


def noise(*shape: int) -> np.ndarray[Any, Any]:
    seed = sum((i + 1) * n for i, n in enumerate(shape))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base_tensors() -> Tensors:
    tensors = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN), "model.norm.weight": noise(HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = noise(*shape)
    return tensors | {"lm_head.weight": noise(VOCABULARY, HIDDEN)}


def adapter_tensors() -> Tensors:
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in TRAINED:
            rows, cols = LINEARS[name]
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{module}.lora_A.weight": noise(RANK, cols), f"{module}.lora_B.weight": noise(rows, RANK)}
    return tensors


CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
ADAPTER_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["k_proj", "up_proj"],
    "base_model_name_or_path": None,
    "task_type": "CAUSAL_LM",
}


@dataclass
class World:
    """A base, an adapter, and how they are merged. `base` and `adapter` are what is given to the merge."""

    root: Path
    base: Path
    adapter: Path
    out: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.base / "model.safetensors"

    @property
    def factors(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def config(self) -> Path:
        return self.adapter / "adapter_config.json"

    def merge(self, **more: Any) -> Any:
        return lm.merge(str(self.base), str(self.adapter), str(self.out), **self.options, **more)


def good(root: Path) -> World:
    base, adapter = root / "base", root / "adapter"
    for path in (base, adapter):
        path.mkdir()
    save_file(base_tensors(), base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(CONFIG))
    save_file(adapter_tensors(), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return World(root, base, adapter, root / "out")


# ------------------------------------------------------------------------------------------------ how to spoil


Spoil = Callable[[World], object]


def container(content: bytes) -> Spoil:
    """The base's weight file has this content."""
    return lambda w: w.weights.write_bytes(content)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(*entries: dict[str, Any], data: int = 8) -> Spoil:
    """A base whose file has these entries, called t0, t1, ..., and so many bytes of data."""
    return container(raw({f"t{i}": e for i, e in enumerate(entries)}, b"\0" * data))


def edit(path: Callable[[World], Path], change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes a JSON file."""

    def spoil(w: World) -> None:
        document = json.loads(path(w).read_text())
        change(document)
        path(w).write_text(json.dumps(document))

    return spoil


def config(**fields: Any) -> Spoil:
    """Sets fields of the adapter's config."""
    return edit(lambda w: w.config, lambda d: d.update(fields))


def base_config(**fields: Any) -> Spoil:
    return edit(lambda w: w.base / "config.json", lambda d: d.update(fields))


def no(name: str) -> Spoil:
    """Removes a field of the adapter's config."""
    return edit(lambda w: w.config, lambda d: d.pop(name))


def config_text(old: str, new: str) -> Spoil:
    """Replaces text in the adapter's config."""

    def spoil(w: World) -> None:
        text = w.config.read_text()
        assert old in text
        w.config.write_text(text.replace(old, new))

    return spoil


def adapter(change: Callable[[Tensors], object]) -> Spoil:
    """Changes the tensors of the adapter."""

    def spoil(w: World) -> None:
        tensors = load_file(w.factors)
        change(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, w.factors)

    return spoil


def base(change: Callable[[Tensors], object]) -> Spoil:
    """Changes the tensors of the base."""

    def spoil(w: World) -> None:
        tensors = load_file(w.weights)
        change(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, w.weights, metadata={"format": "pt"})

    return spoil


def renamed(change: Callable[[str], str]) -> Spoil:
    """Renames the adapter's keys."""

    def rename(tensors: Tensors) -> None:
        items = {change(k): v for k, v in tensors.items()}
        tensors.clear()
        tensors.update(items)

    return adapter(rename)


def options(**values: Any) -> Spoil:
    return lambda w: w.options.update(values)


def all_of(*spoils: Spoil) -> Spoil:
    def spoil(w: World) -> None:
        for one in spoils:
            one(w)

    return spoil


def sharded(
    change: Callable[[dict[str, Any], dict[str, Tensors]], object] = lambda index, files: None,
    keep_single: bool = False,
) -> Spoil:
    """The base in two files and an index, changed by `change` before they are written."""

    def spoil(w: World) -> None:
        tensors = load_file(w.weights)
        names = sorted(tensors)
        files = {ONE: {n: tensors[n] for n in names[:5]}, TWO: {n: tensors[n] for n in names[5:]}}
        index = {"metadata": {"total_size": 0}, "weight_map": {n: f for f, ts in files.items() for n in ts}}
        change(index, files)
        for name, content in files.items():
            save_file(content, w.base / name, metadata={"format": "pt"})
        (w.base / INDEX).write_text(json.dumps(index))
        if not keep_single:
            w.weights.unlink()

    return spoil


def first(index: dict[str, Any]) -> str:
    return str(next(iter(index["weight_map"])))


def points_at(name: str) -> Spoil:
    """An index that names this file for one tensor."""
    return sharded(lambda index, files: index["weight_map"].update({first(index): name}))


def index_text(text: str) -> Spoil:
    return all_of(sharded(), lambda w: (w.base / INDEX).write_text(text))


def through_a_link(w: World) -> None:
    """An index that names a file in a subdirectory, which is a link to another place."""
    sharded(lambda index, files: index["weight_map"].update({n: f"sub/{f}" for n, f in index["weight_map"].items()}))(w)
    elsewhere = w.root / "elsewhere"
    elsewhere.mkdir()
    for name in (ONE, TWO):
        (w.base / name).rename(elsewhere / name)
    (w.base / "sub").symlink_to(elsewhere)


def link(target: str) -> Spoil:
    def spoil(w: World) -> None:
        w.weights.unlink()
        w.weights.symlink_to(target)

    return spoil


def through_one_link(w: World) -> None:
    w.weights.rename(w.root / "blob")
    w.weights.symlink_to(w.root / "blob")


def swap(w: World) -> None:
    w.base, w.adapter = w.adapter, w.base


def pickled(content: Any, name: str = "pytorch_model.bin") -> Spoil:
    """The base is a PyTorch file of this content."""

    def spoil(w: World) -> None:
        w.weights.unlink()
        torch.save(content, w.base / name)

    return spoil


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def evil(allow: bool, legacy: bool = False) -> Spoil:
    """A base that makes the directory `executed` if it is unpickled; the test checks that it does not exist."""

    def spoil(w: World) -> None:
        target = w.base / "pytorch_model.bin"
        w.weights.unlink()
        content = {"model.norm.weight": torch.zeros(8), "x": Evil(str(w.root / "executed"))}
        if legacy:
            target.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, target)
        w.options["allow_pickle"] = allow

    return spoil


def rezipped(change: Callable[[str, bytes], tuple[str, bytes]]) -> Spoil:
    """A harmless PyTorch base, its zip members changed one by one."""

    def spoil(w: World) -> None:
        pickled({k: torch.from_numpy(v) for k, v in base_tensors().items()})(w)
        path = w.base / "pytorch_model.bin"
        with zipfile.ZipFile(path) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members:
                archive.writestr(*change(name, data))
        w.options["allow_pickle"] = True

    return spoil


def loralib(change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None, **more: Any) -> Spoil:
    """The adapter is a loralib file."""

    def spoil(w: World) -> None:
        tensors = {f"{MODULE}.lora_A": torch.ones(RANK, HIDDEN), f"{MODULE}.lora_B": torch.ones(FFN, RANK)}
        change(tensors)
        w.adapter = w.root / "lora.pt"
        torch.save(tensors, w.adapter)
        w.options.update({"allow_pickle": True, **more})

    return spoil


def grouped_convolution(w: World) -> None:
    base(lambda t: t.update({"conv.weight": noise(8, 2, 3, 3)}))(w)
    factors = {
        "base_model.model.conv.lora_A.weight": noise(RANK, 8, 3, 3),
        "base_model.model.conv.lora_B.weight": noise(8, RANK, 1, 1),
    }
    adapter(lambda t: t.update(factors))(w)


def vocabulary(rows: int, *names: str) -> Spoil:
    """Whole vocabulary tensors of `rows` rows in the adapter."""
    return adapter(lambda t: t.update({f"base_model.model.{n}.weight": noise(rows, HIDDEN) for n in names}))


def merged_already(w: World) -> None:
    """The base is the result of the same merge."""
    again = w.root / "merged"
    lm.merge(str(w.base), str(w.adapter), str(again))
    w.base = again


def bad_number(value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[A][0, :3] = value

    return change


def with_(name: str, value: np.ndarray[Any, Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def zero_B(tensors: Tensors) -> None:
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = np.zeros_like(tensors[key])


def whole_base(tensors: Tensors) -> None:
    """A dump of the wrapped model: `X.base_layer.weight` where X was trained, the plain name elsewhere."""
    for name, value in base_tensors().items():
        module = name.removesuffix(".weight")
        trained = f"base_model.model.{module}.lora_A.weight" in tensors
        tensors[f"base_model.model.{module}{'.base_layer' if trained else ''}.weight"] = value


def transposed(tensors: Tensors) -> None:
    for key in tensors:
        tensors[key] = tensors[key].T


def exchanged(tensors: Tensors) -> None:
    for key in [k for k in tensors if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def deep() -> bytes:
    return b'{"t":' + b"[" * 50_000 + b"]" * 50_000 + b"}"


# -------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Case:
    """`words` must all be in the message, the fix or the names of the error (or in a note of the receipt)."""

    name: str
    spoil: Spoil
    code: str = ""
    words: tuple[str, ...] = ()


def refused(name: str, code: str, spoil: Spoil, *words: str) -> Case:
    return Case(name, spoil, code, words)


PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
HUGE = 2**40

REFUSED: dict[str, list[Case]] = {
    "container": [
        refused("empty", "input.empty", container(b""), "empty", "incomplete"),
        refused(
            "lfs", "input.format", container(b"version https://git-lfs.github.com/spec/v1\n"), "LFS", "git lfs pull"
        ),
        refused("html", "input.format", container(b"<!DOCTYPE html><html></html>"), "web page"),
        refused("zip", "input.format", container(b"PK\x03\x04" + b"\0" * 40), "zip"),
        refused("pickle", "input.format", container(pickle.dumps({"a": 1}, protocol=2)), "pickle"),
        refused("gzip", "input.format", container(b"\x1f\x8b\x08" + b"\0" * 40), "gzip"),
        refused("gguf", "input.format", container(b"GGUF\x03\0\0\0" + b"\0" * 40), "GGUF"),
        refused("png", "safetensors.length", container(PNG), "not a safetensors file"),
        refused("five-bytes", "safetensors.length", container(b"\1\2\3\4\5"), "5 bytes"),
        refused("length-zero", "safetensors.length", container(b"\0" * 8), "zero"),
        refused(
            "length-beyond-file", "safetensors.truncated", container(raw(b"{}", length=90)), "promises 90", "has 2"
        ),
        refused("length-beyond-limit", "safetensors.length", container(raw(b"{}", length=10**8 + 1)), "100000001"),
        refused("length-2^64", "safetensors.length", container(raw(b"{}", length=2**64 - 1)), "18446744073709551615"),
        refused("not-utf8", "safetensors.json", container(raw(b'{"a\xff":1}')), "UTF-8"),
        refused("not-json", "safetensors.json", container(raw(b'{"t": nope}')), "line 1", "column"),
        refused("not-an-object", "safetensors.json", container(raw(b"[1, 2]")), "object"),
        refused("nested", "safetensors.json", container(raw(deep())), "nested"),
        refused("entry-nested", "safetensors.json", container(raw(b'{"t":' + b"[" * 99 + b"]" * 99 + b"}")), "nested"),
        refused("truncated", "safetensors.truncated", header(entry((4,), (0, 16))), "promises", "truncated"),
        refused("trailing", "safetensors.trailing", header(entry(), data=11), "3 trailing bytes"),
        refused("gap", "safetensors.offsets", header(entry(), entry((1,), (12, 16)), data=16), "gap", "t1"),
        refused("overlap", "safetensors.offsets", header(entry(), entry((1,), (4, 8))), "overlap", "t1"),
        refused("reversed", "safetensors.offsets", header(entry((2,), (8, 0))), "reversed"),
        refused("negative", "safetensors.offsets", header(entry((2,), (-8, 0))), "unsigned"),
        refused("fractional", "safetensors.offsets", header(entry((2,), (0, 8.0))), "unsigned"),
        refused("boolean-offset", "safetensors.offsets", header(entry((2,), (False, 8))), "unsigned"),
        refused("three-offsets", "safetensors.offsets", header(entry((2,), (0, 4, 8))), "two"),
        refused("not-from-zero", "safetensors.offsets", header(entry((2,), (8, 16)), data=16), "expected at 0"),
        refused("size", "safetensors.size", header(entry((3,), (0, 8))), "12 bytes", "give 8"),
        refused("overflow", "safetensors.size", header(entry((HUGE, HUGE), (0, 8))), "overflow"),
        refused("negative-shape", "safetensors.entry", header(entry((-2,), (0, 8))), "unsigned"),
        refused("boolean-shape", "safetensors.entry", header(entry((True, 2), (0, 8))), "unsigned"),
        refused("dtype", "safetensors.dtype", header(entry(dtype="F128")), "F128", "t0"),
        refused("no-dtype", "safetensors.entry", header({"shape": [2], "data_offsets": [0, 8]}), "no dtype"),
        refused("no-shape", "safetensors.entry", header({"dtype": "F32", "data_offsets": [0, 8]}), "no shape"),
        refused("no-offsets", "safetensors.entry", header({"dtype": "F32", "shape": [2]}), "no data_offsets"),
        refused("duplicate", "safetensors.json", container(raw(b'{"t":1,"t":2}')), "duplicate", "t"),
        refused("metadata", "safetensors.metadata", container(raw({"__metadata__": {"n": 1}})), "n", "string"),
        refused("metadata-list", "safetensors.metadata", container(raw({"__metadata__": []})), "object"),
        refused("adapter-truncated", "safetensors.truncated", lambda w: os.truncate(w.factors, 700), "promises"),
        refused("adapter-empty-file", "input.empty", lambda w: os.truncate(w.factors, 0), "incomplete"),
        refused("adapter-no-tensors", "adapter.empty", adapter(lambda t: t.clear()), "no tensors"),
    ],
    "index": [
        refused("dots", "index.unsafe-name", points_at("../x.safetensors"), "../x.safetensors", "leaves"),
        refused("dots-inside", "index.unsafe-name", points_at("a/../../x.safetensors"), "leaves"),
        refused("absolute", "index.unsafe-name", points_at("/etc/x.safetensors"), "relative"),
        refused("drive", "index.unsafe-name", points_at("C:x.safetensors"), "relative"),
        refused("backslash", "index.unsafe-name", points_at("a\\x.safetensors"), "backslash"),
        refused("backslash-dots", "index.unsafe-name", points_at("..\\x.safetensors"), "leaves"),
        refused("nul", "index.unsafe-name", points_at("x\0.safetensors"), "NUL"),
        refused("suffix", "index.unsafe-name", points_at("x.bin"), ".safetensors"),
        refused("link-trick", "index.unsafe-name", through_a_link, "link"),
        refused(
            "shard-missing",
            "index.missing-file",
            all_of(sharded(), lambda w: (w.base / ONE).unlink()),
            ONE,
            "5 tensors",
        ),
        refused(
            "tensor-missing",
            "index.missing-tensor",
            sharded(lambda index, files: files[ONE].pop(first(index))),
            "1 tensor",
            ONE,
            "lm_head.weight",
        ),
        refused(
            "tensor-elsewhere",
            "index.misplaced",
            sharded(lambda index, files: files[TWO].update({first(index): files[ONE].pop(first(index))})),
            ONE,
            TWO,
            "lm_head.weight",
        ),
        refused(
            "tensor-twice",
            "index.duplicate",
            sharded(lambda index, files: files[TWO].update({first(index): files[ONE][first(index)]})),
            ONE,
            TWO,
            "lm_head.weight",
        ),
        refused(
            "tensor-unlisted",
            "index.unlisted",
            sharded(lambda index, files: index["weight_map"].pop(first(index))),
            "lm_head.weight",
            "not listed",
        ),
        refused("not-json", "index.invalid", index_text('{"weight_map": {]'), "line 1", "column"),
        refused("no-map", "index.invalid", index_text('{"metadata": {}}'), "weight_map"),
        refused("map-list", "index.invalid", index_text('{"weight_map": ["a"]}'), "weight_map"),
        refused("map-number", "index.invalid", index_text('{"weight_map": {"a": 3}}'), "'a'"),
        refused("map-twice", "index.invalid", index_text('{"weight_map": {"a": "b", "a": "c"}}'), "duplicate"),
        refused("dangling", "input.dangling", link("nowhere"), "nowhere", "cache"),
        refused("loop", "input.loop", link("model.safetensors"), "back to itself"),
        refused(
            "two-layouts",
            "checkpoint.ambiguous",
            all_of(sharded(keep_single=True), base(without("lm_head.weight"))),
            INDEX,
            "model.safetensors",
        ),
        refused("no-weights", "checkpoint.no-weights", lambda w: w.weights.rename(w.base / "notes.txt"), "notes.txt"),
        refused("missing", "input.missing", lambda w: setattr(w, "base", w.root / "bsae"), "exist"),
    ],
    "config": [
        refused("missing", "adapter.no-config", lambda w: w.config.unlink(), "alpha", "--alpha"),
        refused("loralib-alpha", "adapter.alpha", loralib(), "alpha", "--alpha"),
        refused("not-json", "adapter.config", config_text('"r": 2', '"r" 2'), "line 1", "column"),
        refused("not-an-object", "adapter.config", lambda w: w.config.write_text("[]"), "object"),
        refused("duplicate", "adapter.config", config_text('"r": 2', '"r": 2, "r": 4'), "duplicate", "'r'"),
        refused("utf16", "adapter.config", lambda w: w.config.write_bytes('{"r": 2}'.encode("utf-16")), "UTF-8"),
        refused("type", "adapter.type", config(peft_type="LOHA2"), "LOHA2"),
        refused("unknown-key", "adapter.field", config(some_new_note="hello"), "some_new_note"),
        refused("alpha-missing", "adapter.alpha", no("lora_alpha"), "alpha", "--alpha"),
        refused("alpha-null", "adapter.alpha", config(lora_alpha=None), "alpha", "--alpha"),
        refused("alpha-nan", "adapter.config", config(lora_alpha=float("nan")), "NaN"),
        refused("alpha-infinite", "adapter.config", config(lora_alpha=float("inf")), "Infinity"),
        refused("alpha-1e999", "adapter.config", config_text('"lora_alpha": 4', '"lora_alpha": 1e999'), "1e999"),
        refused("alpha-string", "adapter.config", config(lora_alpha="16"), "lora_alpha", "16"),
        refused("alpha-true", "adapter.config", config(lora_alpha=True), "lora_alpha", "True"),
        refused("alpha-negative", "adapter.config", config(lora_alpha=-1), "lora_alpha", "-1"),
        refused("rank-zero", "adapter.config", config(r=0), "r is 0"),
        refused("rank-negative", "adapter.config", config(r=-4), "r is -4"),
        refused("rank-string", "adapter.config", config(r="16"), "16"),
        refused("rank-differs", "adapter.rank", config(r=8), "rank 8", "rank 2", "0.5", "or 2?"),
        refused("pattern-type", "adapter.config", config(rank_pattern={"up_proj": "4"}), "rank_pattern", "4"),
        refused("pattern-list", "adapter.config", config(alpha_pattern=["up_proj"]), "alpha_pattern"),
        refused("pattern-broken", "adapter.config", config(alpha_pattern={"(up": 4}), "(up"),
        refused("pattern-hangs", "adapter.pattern", config(alpha_pattern={"(a+)+b": 4}), "(a+)+b"),
        refused("dora-flag", "adapter.dora", config(use_dora=True), "magnitude", "use_dora"),
        refused(
            "dora-no-flag", "adapter.dora", adapter(with_(f"{KEY}magnitude_vector", noise(FFN))), "magnitude", MODULE
        ),
        refused("alora", "adapter.refused", config(alora_invocation_tokens=[1, 2]), "aLoRA"),
        refused("arrow", "adapter.refused", config(arrow_config={"top_k": 2}), "Arrow"),
        refused("qalora", "adapter.refused", config(use_qalora=True), "QALoRA"),
        refused("prompt", "adapter.type", config(peft_type="PROMPT_TUNING"), "PROMPT_TUNING", "no weight"),
        refused("prefix", "adapter.type", config(peft_type="PREFIX_TUNING"), "PREFIX_TUNING", "no weight"),
        refused("xlora", "adapter.type", config(peft_type="XLORA"), "XLORA", "run time"),
        refused("poly", "adapter.type", config(peft_type="POLY"), "POLY", "run time"),
        refused("grouped-conv", "adapter.grouped-conv", grouped_convolution, "grouped convolution"),
        *(
            refused(name, "adapter.init", config(init_lora_weights=name), name, "--residual-base")
            for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        refused("kasa", "adapter.refused", config(kasa_config={"rank": 2}), "KaSA"),
        refused("replication", "binding.layers", config(layer_replication=[[0, 3]]), "layer 2", "has 2"),
        refused("replication-type", "adapter.config", config(layer_replication="twice"), "layer_replication"),
    ],
    "adapter": [
        refused("no-B", "adapter.half-pair", adapter(without(B)), MODULE, "A but no B"),
        refused("no-A", "adapter.half-pair", adapter(without(A)), MODULE, "B but no A"),
        refused(
            "no-match",
            "adapter.no-match",
            renamed(lambda k: k.replace("up_proj", "fc1").replace("k_proj", "key")),
            "8 tensors",
            "key",
            "model.layers.0",
        ),
        refused(
            "no-match-allowed",
            "adapter.no-match",
            all_of(renamed(lambda k: k.replace("_proj", "_linear")), options(allow_unmatched=True)),
            "8 tensors",
        ),
        refused(
            "some-match",
            "adapter.unmatched",
            renamed(lambda k: k.replace("layers.1.mlp.up_proj", "layers.1.mlp.fc1")),
            "2 of 8",
            "fc1",
            "--allow-unmatched",
        ),
        refused(
            "layer-beyond",
            "adapter.unmatched",
            renamed(lambda k: k.replace("layers.1.", "layers.7.")),
            "layers 0..1",
        ),
        refused("shape", "adapter.shape", adapter(with_(A, noise(RANK, 10))), "(2, 10)", "(12, 8)", "base"),
        refused("transposed", "adapter.shape", adapter(transposed), "transposed"),
        refused("exchanged", "adapter.shape", adapter(exchanged), "exchanged"),
        refused("ranks", "adapter.rank", adapter(with_(B, noise(FFN, 3))), "rank 2", "rank 3", MODULE),
        refused("zero3", "adapter.empty-tensor", adapter(with_(B, np.zeros(0, np.float32))), "ZeRO-3", B),
        refused("flat", "adapter.flat", adapter(with_(A, noise(RANK * HIDDEN))), "gathering"),
        refused("nan", "adapter.non-finite", adapter(bad_number(np.nan)), A, "3 "),
        refused("infinity", "adapter.non-finite", adapter(bad_number(np.inf)), A, "3 "),
        refused("integers", "adapter.dtype", adapter(with_(A, np.ones((RANK, HIDDEN), np.int32))), A, "int32"),
        refused(
            "overflow",
            "merge.overflow",
            all_of(
                base(lambda t: t.update({WEIGHT: t[WEIGHT].astype(np.float16)})),
                adapter(lambda t: t.update({A: np.full((RANK, HIDDEN), 3e4, np.float32)})),
            ),
            WEIGHT,
            "float16",
            "--dtype",
            "largest",
        ),
        refused(
            "full-model",
            "adapter.is-model",
            all_of(lambda w: save_file(base_tensors(), w.factors), lambda w: w.config.unlink()),
            "model",
            "swapped",
        ),
        refused(
            "model-directory",
            "adapter.is-model",
            lambda w: setattr(w, "adapter", w.base),
            "model",
            "swapped",
        ),
        refused("swapped", "base.is-adapter", swap, "adapter", "swapped"),
        refused(
            "adapter-as-base",
            "base.is-adapter",
            lambda w: setattr(w, "base", w.factors),
            "adapter",
            "swapped",
        ),
        refused(
            "two-names",
            "adapter.names",
            renamed(lambda k: k.replace(".weight", ".one.weight" if "layers.0" in k else ".two.weight")),
            "'one'",
            "'two'",
        ),
        refused(
            "two-dialects",
            "adapter.unmatched",
            adapter(with_("lora_unet_model_layers_0_mlp_up_proj.lora_down.weight", noise(RANK, HIDDEN))),
            "lora_down",
        ),
        refused("suffix", "adapter.unmatched", adapter(with_(f"{KEY}C.weight", noise(RANK, RANK))), "lora_C"),
        refused(
            "embedding-rows",
            "adapter.shape",
            adapter(
                lambda t: t.update(
                    {
                        "base_model.model.model.embed_tokens.lora_embedding_A": noise(RANK, VOCABULARY + 3),
                        "base_model.model.model.embed_tokens.lora_embedding_B": noise(HIDDEN, RANK),
                    }
                )
            ),
            "adds 3 tokens",
        ),
        refused("one-vocabulary", "adapter.vocabulary", vocabulary(VOCABULARY + 3, "model.embed_tokens"), "lm_head"),
        refused(
            "loralib-holds-base",
            "adapter.holds-base",
            loralib(lambda t: t.update({WEIGHT: torch.ones(FFN, HIDDEN)}), alpha=4),
            MODULE,
            "already",
        ),
        refused("saved-missing", "adapter.truncated", config(modules_to_save=["lm_head"]), "lm_head", "incomplete"),
    ],
    "base": [
        refused(
            "gptq",
            "base.quantised",
            all_of(
                base(lambda t: (t.pop(WEIGHT), t.update({f"{MODULE}.qweight": np.ones((1, FFN), np.int32)}))),
                base_config(quantization_config={"quant_method": "gptq", "bits": 4}),
            ),
            "quantised",
            "gptq",
            MODULE,
        ),
        refused(
            "bitsandbytes",
            "base.quantised",
            all_of(
                base(with_(WEIGHT, np.ones((FFN * HIDDEN // 2, 1), np.uint8))),
                base_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ),
            "quantised",
            "bitsandbytes",
            MODULE,
        ),
        refused(
            "fp8",
            "base.quantised",
            lambda w: _fp8(w),
            "float8_e4m3",
            MODULE,
        ),
        refused(
            "replaced-shape",
            "base.replaced-shape",
            all_of(
                config(modules_to_save=["norm"]),
                adapter(with_("base_model.model.model.norm.weight", noise(HIDDEN + 1))),
            ),
            "(9,)",
            "(8,)",
            "model.norm.weight",
        ),
        refused("merged-already", "base.already-merged", merged_already, "adapter", "--force"),
        refused("no-tensors", "base.empty", base(lambda t: t.clear()), "no tensors"),
        refused("non-finite", "base.non-finite", base(lambda t: t[WEIGHT].fill(np.nan)), WEIGHT, "finite"),
        refused("config", "config.invalid", lambda w: (w.base / "config.json").write_text("{,}"), "line 1"),
        refused(
            "pipeline",
            "base.pipeline",
            lambda w: (w.base / "model_index.json").write_text("{}"),
            "component",
        ),
    ],
    "pickle": [
        refused("refused", "pickle.refused", evil(allow=False), "--allow-pickle", "safetensors"),
        refused("legacy-refused", "pickle.refused", evil(allow=False, legacy=True), "--allow-pickle"),
        refused("code", "pickle.unsafe", evil(allow=True), "weights_only"),
        refused("legacy", "pickle.legacy", evil(allow=True, legacy=True), "torch.load"),
        refused("global", "pickle.unsafe", all_of(pickled({"x": Path("a")}), options(allow_pickle=True)), "pathlib"),
        refused("no-tensors", "pickle.content", all_of(pickled({"x": 1}), options(allow_pickle=True)), "no tensors"),
        refused("list", "pickle.content", all_of(pickled([1]), options(allow_pickle=True)), "list"),
        refused(
            "sizes",
            "pickle.storage",
            rezipped(lambda n, d: (n, d[:-4] if n.endswith("/data/0") else d)),
            "claims",
        ),
        refused(
            "path",
            "pickle.archive",
            rezipped(lambda n, d: (n.replace("/data/0", "/../../data/0"), d)),
            "outside",
        ),
        refused(
            "adapter-pickle",
            "pickle.refused",
            loralib(alpha=4, allow_pickle=False),
            "--allow-pickle",
        ),
    ],
}


def _fp8(w: World) -> None:
    tensors = {k: torch.from_numpy(v) for k, v in base_tensors().items()}
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, w.weights)


def raw_base(change: Callable[[dict[str, Any]], Any], prefix: bytes = b"", pad: int = 0) -> Spoil:
    """Rewrites the header of the base's file, with the same data."""

    def spoil(w: World) -> None:
        content = w.weights.read_bytes()
        length = int.from_bytes(content[:8], "little")
        document = json.loads(content[8 : 8 + length])
        document = change(document) or document
        text = prefix + json.dumps(document, ensure_ascii=False).encode() + b" " * pad
        w.weights.write_bytes(raw(text, content[8 + length :]))

    return spoil


def extra_field(document: dict[str, Any]) -> None:
    document["model.norm.weight"]["note"] = "kept by some writer"


WRAPPERS: dict[str, Callable[[str], str]] = {
    "ddp": lambda k: f"module.{k}",
    "compile": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "fsdp": lambda k: k.replace("mlp.", "_fsdp_wrapped_module.mlp."),
    "doubled": lambda k: f"base_model.model.{k}",
    "adapter-name": lambda k: k.replace(".weight", ".default.weight"),
    "none": lambda k: k.removeprefix("base_model.model."),
}

ACCEPTED: dict[str, list[Case]] = {
    "container": [
        Case("zero-elements", base(with_("nothing", np.zeros((0, 4), np.float32)))),
        Case("scalar", base(with_("scale", np.array(2.0, np.float32)))),
        Case("non-ascii", base(with_("gewicht.ä.重み", noise(3)))),
        Case("control-characters", base(with_("a\x1b[31m\nb", noise(3)))),
        Case("unsorted", raw_base(lambda d: dict(reversed(d.items())))),
        Case("padding", raw_base(lambda d: None, pad=123)),
        Case("leading-space", raw_base(lambda d: None, prefix=b"  ")),
        Case("no-metadata", raw_base(lambda d: {k: v for k, v in d.items() if k != "__metadata__"})),
        Case("extra-key", raw_base(extra_field)),
    ],
    "index": [
        Case("plain", sharded()),
        Case("no-metadata", sharded(lambda index, files: index.pop("metadata"))),
        Case("total-size", sharded(lambda index, files: index["metadata"].update(total_size=-5))),
        Case("link", through_one_link),
    ],
    "config": [
        Case("bom", lambda w: w.config.write_bytes(b"\xef\xbb\xbf" + w.config.read_bytes())),
        Case("unknown-but-unset", config(some_new_feature=None, another=False)),
        Case("rank-pattern", all_of(config(r=8, rank_pattern={"up_proj": 2, "k_proj": 2}))),
        Case("residual-base", all_of(config(init_lora_weights="pissa"), options(residual_base=True))),
        Case("replication", config(layer_replication=[[0, 2], [0, 2]])),
        Case("alpha-given", all_of(lambda w: w.config.unlink(), options(alpha=4))),
        Case("loralib", loralib(alpha=4)),
    ],
    "adapter": [
        *(Case(f"wrapper-{name}", renamed(change)) for name, change in WRAPPERS.items()),
        Case("resized", vocabulary(VOCABULARY + 3, "model.embed_tokens", "lm_head")),
        Case(
            "tied-head",
            all_of(
                base(without("lm_head.weight")),
                base_config(tie_word_embeddings=True),
                adapter(
                    lambda t: t.update(
                        {
                            "base_model.model.lm_head.lora_A.weight": noise(RANK, HIDDEN),
                            "base_model.model.lm_head.lora_B.weight": noise(VOCABULARY, RANK),
                        }
                    )
                ),
            ),
        ),
    ],
    "base": [Case("merged-already", all_of(merged_already, options(force=True)))],
    "pickle": [
        Case(
            "allowed",
            all_of(pickled({k: torch.from_numpy(v) for k, v in base_tensors().items()}), options(allow_pickle=True)),
        )
    ],
}

WARNED: dict[str, list[Case]] = {
    "index": [Case("both-layouts", sharded(keep_single=True), words=(INDEX,))],
    "config": [
        Case("alpha-zero", config(lora_alpha=0), words=("alpha", "0")),
        Case("pattern-unused", config(alpha_pattern={"nothing_like_it": 8}), words=("nothing_like_it",)),
        Case("patterns-clash", config(alpha_pattern={"up_proj": 8, ".*proj": 16}), words=("up_proj", ".*proj")),
        Case("base-name", config(base_model_name_or_path="some/other-model"), words=("some/other-model", "base")),
    ],
    "adapter": [
        Case(
            "left-out",
            all_of(
                renamed(lambda k: k.replace("layers.1.mlp.up_proj", "layers.1.mlp.fc1")),
                options(allow_unmatched=True),
            ),
            words=("2 tensors", "fc1"),
        ),
        Case(
            "whole-base",
            adapter(whole_base),
            words=("base weights",),
        ),
        Case("zero-B", adapter(zero_B), words=("zero",)),
    ],
    "base": [
        Case("no-config", lambda w: (w.base / "config.json").unlink(), words=("config.json",)),
        Case("vocabulary", base_config(vocab_size=VOCABULARY + 5), words=("21", "16")),
    ],
}


def cases(table: Mapping[str, list[Case]]) -> list[Any]:
    return [pytest.param(case, id=f"{section}-{case.name}") for section, rows in table.items() for case in rows]


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return good(tmp_path)


# --------------------------------------------------------------------------------------------------- the tests


def test_the_good_inputs_are_good(world: World) -> None:
    receipt = world.merge()
    assert receipt.counts["changed"] == 4
    assert receipt.notes == ()


@pytest.mark.parametrize("case", cases(REFUSED))
def test_refused(case: Case, world: World) -> None:
    case.spoil(world)
    before = listing(world.root)
    with pytest.raises(LoramergeError) as caught:
        world.merge()
    error = caught.value
    assert error.code == case.code, error.message
    assert error.exit_code == 3
    assert listing(world.root) == before
    said = " ".join([error.message, error.fix, *error.tensors])
    assert [word for word in case.words if word not in said] == [], said
    assert error.fix, "no way out is given"
    assert error.file, "no file is named"
    assert "\n" not in error.message and error.message.isprintable()


@pytest.mark.parametrize("case", cases(ACCEPTED))
def test_accepted(case: Case, world: World) -> None:
    case.spoil(world)
    world.merge()
    assert lm.verify(str(world.out))["ok"]
    assert not list(world.root.glob("*.partial-*"))


@pytest.mark.parametrize("case", cases(WARNED))
def test_accepted_with_a_warning(case: Case, world: World) -> None:
    case.spoil(world)
    receipt = world.merge()
    assert lm.verify(str(world.out))["ok"]
    assert any(all(word in note for word in case.words) for note in receipt.notes), receipt.notes


def test_a_file_without_tensors_can_be_read(world: World) -> None:
    base(lambda t: t.clear())(world)
    assert lm.open_checkpoint(str(world.base)).tensors == {}


def test_a_wrong_total_size_is_written_right(world: World) -> None:
    sharded(lambda index, files: index["metadata"].update(total_size=3))(world)
    world.merge()
    total = sum(t.nbytes for t in base_tensors().values())
    assert json.loads((world.out / INDEX).read_text())["metadata"]["total_size"] == total


def test_zero_factors_give_the_base(world: World) -> None:
    adapter(zero_B)(world)
    world.merge()
    merged = load_file(world.out / "model.safetensors")
    assert all(np.array_equal(merged[k], v) for k, v in base_tensors().items())


def test_wrapper_prefixes_change_nothing(world: World) -> None:
    world.merge()
    expected = load_file(world.out / "model.safetensors")
    for name, change in WRAPPERS.items():
        save_file({change(k): v for k, v in adapter_tensors().items()}, world.factors)
        world.out = world.root / f"out-{name}"
        world.merge()
        merged = load_file(world.out / "model.safetensors")
        assert all(np.array_equal(merged[k], v) for k, v in expected.items()), name


def test_a_tied_head_that_changes_is_untied_in_the_config(world: World) -> None:
    case = next(c for c in ACCEPTED["adapter"] if c.name == "tied-head")
    case.spoil(world)
    world.merge()
    assert json.loads((world.out / "config.json").read_text())["tie_word_embeddings"] is False
    merged = load_file(world.out / "model.safetensors")
    assert np.array_equal(merged["model.embed_tokens.weight"], base_tensors()["model.embed_tokens.weight"])
    assert not np.array_equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_a_resized_vocabulary_is_told_to_the_config(world: World) -> None:
    vocabulary(VOCABULARY + 3, "model.embed_tokens", "lm_head")(world)
    world.merge()
    assert json.loads((world.out / "config.json").read_text())["vocab_size"] == VOCABULARY + 3


def test_replicated_layers_are_counted_in_the_config(world: World) -> None:
    config(layer_replication=[[0, 2], [0, 2]])(world)
    world.merge()
    assert json.loads((world.out / "config.json").read_text())["num_hidden_layers"] == 4
    assert "model.layers.3.mlp.up_proj.weight" in load_file(world.out / "model.safetensors")


@pytest.mark.parametrize("what", ["base", "adapter"])
@pytest.mark.parametrize("how", ["grows", "touched", "gone"])
def test_an_input_that_changes_during_the_merge_is_noticed(what: str, how: str, world: World) -> None:
    path = world.weights if what == "base" else world.factors

    def spoil(_: Any) -> None:
        if how == "grows":
            path.write_bytes(path.read_bytes() + b"\0")
        elif how == "touched":
            os.utime(path, (1, 1))
        else:
            path.unlink()

    with pytest.raises(LoramergeError) as caught:
        world.merge(on_plan=spoil)
    assert (caught.value.code, caught.value.exit_code) == ("input.changed", 3)
    assert listing(world.root) == [n for n in listing(world.root) if n.split("/")[0] in ("base", "adapter")]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("verb", ["merge", "inspect", "open_checkpoint"])
def test_code_in_a_pickle_never_runs(verb: str, allow: bool, legacy: bool, world: World) -> None:
    evil(allow=allow, legacy=legacy)(world)
    with pytest.raises(LoramergeError) as caught:
        world.merge() if verb == "merge" else getattr(lm, verb)(str(world.base), allow_pickle=allow)
    assert caught.value.exit_code == 3
    assert not (world.root / "executed").exists()


# -------------------------------------------------------------------------------------------- the command line


def place(w: World, name: str) -> Path:
    w.out = w.root / name
    return w.out


def existing(w: World) -> None:
    w.out.mkdir()
    (w.out / "config.json").write_text("{}")


def no_model(w: World) -> None:
    w.out.mkdir()
    (w.out / "a.txt").write_text("")


def link_to_base(w: World) -> None:
    w.out.symlink_to(w.base)


OUTPUTS: list[Case] = [
    Case("is-base", lambda w: setattr(w, "out", w.base), "output.is-input", ("is the input",)),
    Case("is-adapter", lambda w: setattr(w, "out", w.adapter), "output.is-input", ("is the input",)),
    Case("inside-base", lambda w: setattr(w, "out", w.base / "merged"), "output.is-input", ("inside", "base")),
    Case("around-inputs", lambda w: setattr(w, "out", w.root), "output.is-input", ("contains",)),
    Case("dotted-base", lambda w: setattr(w, "out", w.root / "x" / ".." / "base"), "output.is-input", ()),
    Case("link-to-base", link_to_base, "output.is-input", ()),
    Case("exists", existing, "output.exists", ("--force",)),
    Case("file-exists", lambda w: w.out.write_text("x"), "output.exists", ("--force",)),
    Case("parent-is-file", lambda w: place(w, "base/config.json/out"), "output.no-parent", ("not a directory",)),
    Case("no-parent", lambda w: place(w, "a/b/out"), "output.no-parent", ("does not exist", "mkdir -p")),
    Case("long-name", lambda w: place(w, "x" * 300), "output.io", ("name",)),
]
FORCED: list[Case] = [
    Case("is-base", lambda w: setattr(w, "out", w.base), "output.is-input", ("is the input",)),
    Case("file-in-the-way", lambda w: w.out.write_text("x"), "output.kind", ("file",)),
    Case("not-a-model", no_model, "output.not-a-model", ("model",)),
    Case("pipe-in-the-way", lambda w: os.mkfifo(w.out), "output.kind", ("pipe",)),
]


@pytest.mark.parametrize(
    ("case", "force"),
    [
        pytest.param(c, f, id=f"{c.name}{'-forced' if f else ''}")
        for t, f in ((OUTPUTS, False), (FORCED, True))
        for c in t
    ],
)
def test_an_output_that_cannot_be_written_is_refused(case: Case, force: bool, world: World) -> None:
    if case.name == "dotted-base":
        (world.root / "x").mkdir()
    case.spoil(world)
    before = listing(world.root)
    with pytest.raises(LoramergeError) as caught:
        world.merge(force=force)
    error = caught.value
    assert (error.code, error.exit_code) == (case.code, 4), error.message
    assert listing(world.root) == before
    said = f"{error.message} {error.fix}"
    assert [word for word in case.words if word not in said] == [], said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_refused(world: World) -> None:
    place(world, "locked/out").parent.mkdir(mode=0o555)
    with pytest.raises(LoramergeError) as caught:
        world.merge()
    assert (caught.value.code, caught.value.exit_code) == ("output.permission", 4)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"dtype": "float17"}, "usage.dtype"),
        ({"compute_dtype": "int8"}, "usage.value"),
        ({"tokenizer": "mine"}, "usage.value"),
        ({"jobs": 0}, "usage.value"),
        ({"device": "abacus"}, "usage.device"),
    ],
)
def test_a_senseless_request_is_a_usage_error(values: dict[str, Any], code: str, world: World) -> None:
    before = listing(world.root)
    with pytest.raises(LoramergeError) as caught:
        world.merge(**values)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert listing(world.root) == before


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_must_be_finite(weight: float, world: World) -> None:
    with pytest.raises(LoramergeError) as caught:
        lm.merge(str(world.base), {str(world.adapter): weight}, str(world.out))
    assert (caught.value.code, caught.value.exit_code) == ("usage.weight", 2)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LORAMERGE_DEBUG"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "loramerge", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


COMMANDS: list[tuple[str, Spoil, tuple[str, ...], int, str]] = [
    ("truncated", lambda w: os.truncate(w.weights, 900), (), 3, "safetensors.truncated"),
    ("unmatched", renamed(lambda k: k.replace("layers.1.", "layers.7.")), (), 3, "adapter.unmatched"),
    ("pickle", evil(allow=False), (), 3, "pickle.refused"),
    ("exists", existing, (), 4, "output.exists"),
    ("is-input", lambda w: setattr(w, "out", w.base), ("--force",), 4, "output.is-input"),
    ("non-finite", adapter(bad_number(np.nan)), (), 3, "adapter.non-finite"),
]


@pytest.mark.parametrize(("name", "spoil", "flags", "exit_code", "code"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_the_command_ends_with_the_code_and_two_lines(
    name: str, spoil: Spoil, flags: tuple[str, ...], exit_code: int, code: str, world: World
) -> None:
    spoil(world)
    before = listing(world.root)
    done = command("merge", world.base, world.adapter, "-o", world.out, *flags)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "fix:"))]
    assert [line.partition(":")[0] for line in lines] == ["error", "fix"]
    assert listing(world.root) == before
    told = command("merge", world.base, world.adapter, "-o", world.out, *flags, "--json")
    document = json.loads(told.stdout)
    assert told.returncode == document["exit_code"] == exit_code
    assert document["ok"] is False and document["schema"] == 1
    assert document["error"]["code"] == code
    assert listing(world.root) == before


@pytest.mark.parametrize(
    "flags", [["--no-such-flag"], ["--dtype", "float17"], ["--jobs", "many"], ["--max-memory", "lots"]]
)
def test_the_command_refuses_a_senseless_flag(flags: list[str], world: World) -> None:
    before = listing(world.root)
    done = command("merge", world.base, world.adapter, "-o", world.out, *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert listing(world.root) == before


def test_names_from_files_are_escaped_on_the_terminal(world: World) -> None:
    adapter(with_("base_model.model.evil\x1b[2J\n.lora_A.weight", noise(2, 8)))(world)
    done = command("merge", world.base, world.adapter, "-o", world.out)
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
