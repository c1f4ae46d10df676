"""Opens an adapter: its dialect told, its config read, every key named, every claim of its config checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.config import metadata_of, metadata_settings, patterns_of, read_config, sections_of, settings_of
from loramerge.adapters.dialect import Dialect, detect, told_by_config, unreadable, weight_names
from loramerge.adapters.keys import check_factors, sort_keys
from loramerge.adapters.oddities import oddities
from loramerge.errors import InputError, MismatchError, UnsupportedError
from loramerge.tensors import mounts
from loramerge.tensors.checkpoint import Checkpoint, PickleReader, open_checkpoint
from loramerge.tensors.text import plural, quoted, some


def open_adapter(
    path: str | os.PathLike[str],
    *,
    read_pickle: PickleReader | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
) -> Adapter:
    """Opens an adapter from its headers and its config.

    Args:
        path: the weight file or the directory that holds it.
        read_pickle: how to read `.bin`/`.pt` headers (`loramerge.pickled.read_header`); None refuses them.
        alpha: the alpha to use where nothing on disk says it (loralib).
        enable_lora: which slots of a grouped linear (loralib `MergedLinear`) were trained.
        residual_base: the base that will be given *is* the residual that an initialisation such as PiSSA left.
        original_base: the base that will be given is the one from before such a change.
        grouped_experts: B of stacked experts is (out, experts * r) with the expert slowest. Some versions of unsloth
            wrote it so, and nothing on disk tells.

    Raises:
        InputError: the file is broken, half a pair is missing, config and tensors disagree.
        UnsupportedError: what it holds is not a static change of weights, by name and with the reason.
        MismatchError: it is not an adapter at all.
        UnsafeError: a pickle without permission.
    """
    path = mounts.located(path)
    checkpoint = _open_weights(Path(path), str(path), read_pickle)
    try:
        told: dict[str, Any] = {} if enable_lora is None else {"enable-lora": list(enable_lora)}
        if grouped_experts:
            told["grouped-experts"] = True
        return _interpret(checkpoint, Path(path), alpha, told, residual_base, original_base)
    except BaseException:
        checkpoint.close()
        raise


def _interpret(
    checkpoint: Checkpoint,
    path: Path,
    alpha: float | None,
    told: Mapping[str, Any],
    residual_base: bool,
    original_base: bool,
) -> Adapter:
    """The adapter that an opened file and the config beside it are."""
    found, metadata = read_config(checkpoint), metadata_of(checkpoint)
    config = found.fields if found is not None else {}
    dialect = detect(checkpoint.tensors, config or None, metadata)
    if dialect is None:
        raise _not_an_adapter(checkpoint, config)
    where = found.where if found is not None else checkpoint.name
    notes: list[str] = []
    own = config if dialect.config and told_by_config(dialect, config) else {}
    settings = {
        **dialect.options,
        **metadata_settings(dialect, metadata, where),
        **settings_of(dialect, own, where, residual_base, notes, original_base),
    }
    notes += [n["text"] for n in dialect.notes if n["contains"] in metadata.get(n["metadata"], "")]
    sections = sections_of(dialect, metadata, checkpoint.name, notes)
    settings |= told
    rank_pattern, alpha_pattern = patterns_of(dialect, settings, where)
    if alpha is not None:
        if settings.get("alpha") not in (None, alpha):
            notes.append(f"alpha {alpha:g} as asked; the config says {settings['alpha']:g}")
        settings["alpha"] = alpha
    _check_only(dialect, settings, where)
    dialect = dialect.settled(settings)
    sorted_keys = sort_keys(dialect, checkpoint, settings)
    notes += [*sorted_keys.notes, *oddities(sorted_keys.modules, sorted_keys.plain, settings.get("target-modules"))]
    adapter = Adapter(
        name=checkpoint.name,
        path=path,
        dialect=dialect,
        checkpoint=checkpoint,
        modules=sorted_keys.modules,
        plain=sorted_keys.plain,
        harmless=sorted_keys.harmless,
        settings=settings,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        sections=sections,
        transposed=sorted_keys.transposed,
        notes=tuple(notes),
        config=own,
    )
    check_factors(adapter)
    if not own and "config" in dialect.detect and alpha is None and dialect.scale.get("missing") == "error":
        raise InputError(
            "adapter.no-config",
            f"there is no {dialect.detect['config']} beside it, so nothing says alpha",
            fix="put the config beside the weights, or give --alpha N",
            file=checkpoint.name,
        )
    return adapter


def _check_only(dialect: Dialect, settings: Mapping[str, Any], where: str) -> None:
    """Settings that must have one of a few values, for what is written with others is not known or not whole."""
    for name, row in dialect.only.items():
        if settings.get(name) is None and not row.get("required"):
            continue
        if settings.get(name) not in row["values"]:
            said = f"{name} is {quoted(settings.get(name))}"
            raise UnsupportedError("adapter.refused", f"{said}: {row['reason']}", file=where)


def _refuse_unreadable(path: Path, name: str, held: Sequence[str]) -> None:
    """Files that are known by their names to hold adapters in a form that is not read."""
    for file in held:
        if (dialect := unreadable(file)) is not None:
            raise UnsupportedError(
                "adapter.refused",
                f"{quoted(file)} is of {dialect.title}: {dialect.unreadable}",
                fix=dialect.options.get("fix", "convert it to PEFT with the tools of its trainer"),
                file=name,
            )


def _open_weights(path: Path, name: str, read_pickle: PickleReader | None) -> Checkpoint:
    names = weight_names() if path.is_dir() else None
    if names is None:
        _refuse_unreadable(path, name, [path.name])
    if names is not None and not any((path / n).exists() for n in names):
        held = sorted(p.name for p in path.iterdir())
        _refuse_unreadable(path, name, held)
        if any(n.endswith((".safetensors.index.json", ".bin.index.json")) or n == "config.json" for n in held):
            raise MismatchError(
                "adapter.is-model",
                "is a model directory, not an adapter",
                fix="the order is BASE ADAPTER; were they swapped?",
                file=name,
            )
    return open_checkpoint(path, read_pickle=read_pickle, weight_names=names)


def _not_an_adapter(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Exception:
    if not checkpoint.tensors:
        return InputError(
            "adapter.empty", "holds no tensors", fix="the save was interrupted? save it again", file=checkpoint.name
        )
    if config:
        known = some(sorted(config), 8)
        return UnsupportedError(
            "adapter.unknown",
            f"its config names no dialect that is known (fields {known})",
            file=checkpoint.name,
        )
    return MismatchError(
        "adapter.is-model",
        f"none of its {plural(len(checkpoint.tensors), 'tensor')} is a LoRA factor: a whole model?",
        fix="the order is BASE ADAPTER; were they swapped?",
        file=checkpoint.name,
        tensors=list(checkpoint.tensors)[:5],
    )
