"""Adapters for adapter-ready graphs: factors by the graph's input names, in onnxruntime's own file format."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter
from loramerge.adapters.operators import AddProduct
from loramerge.binding.bind import bind
from loramerge.binding.namespace import slots_of
from loramerge.errors import InputError, MismatchError, UnsupportedError, UsageError
from loramerge.exporting import packages, ready
from loramerge.merging.deltas import NoWeights
from loramerge.merging.stream import Factors
from loramerge.tensors import strictjson
from loramerge.tensors.checkpoint import PickleReader
from loramerge.tensors.output import Output, check_destination
from loramerge.tensors.text import some
from loramerge.tensors.writer import fsync_path, output_errors

TARGET = "onnx-adapter"
SUFFIX = ".onnx_adapter"
VERSION = 1


def convert(
    source: str,
    out: str,
    *,
    base: str | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    weight: float = 1.0,
    read_pickle: PickleReader | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes an adapter for an adapter-ready graph (see `loramerge.convert`). Factors are in the graph's dtype, B with
    `alpha / r` in it; updates that meet in one layer become one pair of the summed rank.

    Raises:
        UsageError: `usage.base`, `output.name`. MismatchError: `onnx.not-ready`, `onnx.site`, and those of a merge.
        UnsupportedError: `convert.kind`: an update that is no product; `export.extra`.
    """
    if base is None:
        raise UsageError("usage.base", "an ONNX adapter is for one graph", fix="--base MODEL.onnx")
    packages.check_runtime("writing an ONNX adapter")
    destination, model = Path(out), _model_file(Path(base), base)
    if destination.suffix != SUFFIX:
        raise UsageError("output.name", f"{out} is no name for an ONNX adapter", fix=f"-o {destination.stem}{SUFFIX}")
    check_destination(destination, inputs=[Path(source), model], force=force, what="file")
    table, dtype = read_sites(model, base)
    adapter = open_adapter(source, read_pickle=read_pickle, alpha=alpha)
    with closing(adapter.checkpoint):
        pairs, modules = _pairs(adapter, table, _config(model), include, exclude, base, weight)
        parameters = {name: value.to(dtype).contiguous() for name, value in pairs.items()}
        for name, value in parameters.items():
            if not bool(torch.isfinite(value).all()):
                raise UnsupportedError(
                    "merge.overflow", f"{name} does not fit the graph's dtype", fix="export the graph in float32"
                )
    nbytes = sum(value.nbytes for value in parameters.values())
    if not dry_run:
        _write(destination, parameters, force)
        nbytes = destination.stat().st_size
    return {
        "schema": 1,
        "out": out,
        "source": adapter.name,
        "from": adapter.dialect.name,
        "from_title": adapter.dialect.title,
        "to": TARGET,
        "to_title": "ONNX adapter",
        "modules": modules,
        "exact": modules,
        "approximated": 0,
        "error": None,
        "renamed": modules,
        "joined": 0,
        "cut": 0,
        "dropped": [],
        "alpha": None,
        "files": {destination.name: nbytes},
        "bytes": nbytes,
        "rows": [
            {
                "module": name.removesuffix(".lora_A.weight"),
                "path": name,
                "kind": "low-rank",
                "rank": int(value.shape[1]),
                "scale": 1.0,
                "how": "exact",
                "error": None,
            }
            for name, value in parameters.items()
            if name.endswith(".lora_A.weight")
        ],
        "notes": list(adapter.notes),
    }


def _model_file(path: Path, shown: str) -> Path:
    """The graph: a file, or the one of a directory."""
    if not path.is_dir():
        return path
    found = [p for p in (path / "model.onnx", path / "onnx" / "model.onnx") if p.is_file()]
    if not found:
        raise InputError("input.missing", "holds no model.onnx", fix="give the .onnx file", file=shown)
    return found[0]


def read_sites(path: Path, shown: str) -> tuple[Mapping[str, Any], torch.dtype]:
    """The table of sites of an adapter-ready model, and the dtype of its factors.

    Raises:
        MismatchError: `onnx.not-ready`. InputError: `onnx.invalid`.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except OSError as error:
        raise InputError("input.missing", error.strerror or "cannot be read", file=shown) from None
    except Exception:  # what its parser raises for bytes that are no model
        raise InputError("onnx.invalid", "is no ONNX model", fix="give the .onnx file", file=shown) from None
    text = {p.key: p.value for p in model.metadata_props}.get(ready.SITES)
    if text is None:
        raise MismatchError(
            "onnx.not-ready", "has no inputs for an adapter", fix="loramerge export ... --adapter-ready", file=shown
        )
    table = strictjson.loads(text.encode(), where=shown, code="onnx.invalid")
    good = isinstance(table, dict) and table.get("schema") == ready.SCHEMA
    if not good or not isinstance(table.get("sites"), dict) or not isinstance(table.get("tensors"), dict):
        raise InputError("onnx.invalid", "has a table of sites that is not of this version", file=shown)
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    kinds = {inputs.get(ready.site_names(module)[0]) for module in table["sites"]}
    if not kinds or None in kinds or len(kinds) > 1:
        raise InputError("onnx.invalid", "has sites without inputs", file=shown)
    return table, torch.float16 if kinds == {onnx.TensorProto.FLOAT16} else torch.float32


def _config(model: Path) -> dict[str, Any] | None:
    for folder in (model.parent, model.parent.parent):
        path = folder / "config.json"
        if path.is_file():
            found = strictjson.loads(path.read_bytes(), where=str(path), code="config.invalid")
            return found if isinstance(found, dict) else None
    return None


def _pairs(
    adapter: Adapter,
    table: Mapping[str, Any],
    config: dict[str, Any] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    shown: str,
    weight: float,
) -> tuple[dict[str, Tensor], int]:
    """Input name -> factor, in float32; and how many modules of the adapter they are of."""
    shapes = {name: (str(dtype), tuple(int(n) for n in shape)) for name, (dtype, shape) in table["tensors"].items()}
    binding = bind(slots_of(shapes), config, [(adapter, weight)], include=include, exclude=exclude, base_name=shown)
    changed = [*binding.added, *binding.replaced, *binding.grown, *binding.untied]
    sites = {row["tensor"]: (module, row["stored"]) for module, row in table["sites"].items()}
    wrong = sorted({*changed, *(name for name in binding.updates if name not in sites)})
    if wrong:
        raise MismatchError(
            "onnx.site",
            f"the adapter changes {some(wrong)}, where the graph takes no adapter",
            fix="merge it on export instead: loramerge export BASE --adapter ADAPTER -o OUT",
            tensors=wrong,
        )
    factors = Factors([adapter], torch.float64, torch.device("cpu"))
    made: dict[str, Tensor] = {}
    for name, updates in binding.updates.items():
        module, stored = sites[name]
        rows, cols = shapes[name][1]
        left, right = [], []
        for update in updates:
            try:
                operator = update.operator(factors.read, NoWeights())
            except AssertionError:
                operator = update  # type: ignore[assignment]  # looks at the weight: refused below
            if operator is None:
                continue
            if not isinstance(operator, AddProduct):
                raise UnsupportedError(
                    "convert.kind",
                    f"{update.module} is a {update.kind} update, which is no product that a graph could add",
                    fix="merge it on export instead: loramerge export BASE --adapter ADAPTER -o OUT",
                    tensors=[update.module],
                )
            L, R = _placed(operator, rows, cols)
            left.append(L)
            right.append(R)
        if not left:
            continue
        L, R = torch.cat(left, dim=1), torch.cat(right, dim=0)
        a, b = ready.site_names(module)
        made[a], made[b] = (R.T, L.T) if stored == "out-in" else (L, R)
        made[a], made[b] = made[a].float(), made[b].float()
    return made, binding.matches[0].matched


def _placed(operator: AddProduct, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """`(L, R)` with the change of the whole stored tensor = L R: zeros where the operator does not reach."""
    p = operator.place
    first, odd = divmod(p.begin, p.cols)
    if odd or p.cols != cols or math.prod((rows, cols)) < p.begin + p.rows * p.cols:
        raise UnsupportedError("convert.kind", "an update of rows that are not the weight's", fix="merge it instead")
    L = operator.L.new_zeros(rows, operator.L.shape[1])
    R = operator.R.new_zeros(operator.R.shape[0], cols)
    L[first : first + p.rows] = operator.L
    R[:, p.c0 : p.c1 : p.step] = operator.R
    return L, R


def _write(destination: Path, parameters: Mapping[str, Tensor], force: bool) -> None:
    import onnxruntime

    output = Output(destination, "file", force)
    try:
        with output:
            path = output.directory / destination.name
            made = onnxruntime.AdapterFormat()
            made.set_adapter_version(VERSION)
            made.set_model_version(VERSION)
            values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v.numpy()) for k, v in parameters.items()}
            made.set_parameters(values)
            with output_errors(path):
                made.export_adapter(str(path))
            fsync_path(path)
            output.commit()
    finally:
        output.close()
