"""Tied embeddings, vocabulary and heads: what changes around the weights, and what the config must say then."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramerge.adapters.adapter import Adapter
from loramerge.adapters.updates import TokenRows
from loramerge.binding.binding import Binding
from loramerge.binding.families import Tied
from loramerge.binding.namespace import Namespace, Slot
from loramerge.errors import MismatchError, UnsupportedError
from loramerge.tensors.text import quoted


@dataclass(frozen=True, slots=True)
class Pair:
    """A tied pair of this base: the stored tensor, and the name its other end would have."""

    input: str
    output: str
    table: Tied


def tied_pairs(names: Namespace, config: Mapping[str, Any]) -> list[Pair]:
    """The tied pairs of a base: a head that its architecture has and its files lack.

    The head's name is added to the namespace, so that adapters find it.
    """
    facts = names.families
    architectures = config.get("architectures") or [""]
    has_head = any(str(architectures[0]).endswith(end) for end in facts.tie_heads)
    told = [config.get(facts.tie_field)]
    told += [c.get(facts.tie_field) for n in facts.tie_nested if isinstance(c := config.get(n), dict)]
    if not has_head or False in told:
        return []
    rows = [row for row in facts.tied if not row.model_types or names.model_type in row.model_types]
    exact: list[tuple[Tied, str | None]] = [(row, row.input) for row in rows if row.input in names]
    # Some files lack the prefix of the class (`wte` for `transformer.wte`): only where no name fits as it stands.
    found = exact or [(row, names.find(row.input)) for row in rows]
    pairs: list[Pair] = []
    for row, source in found:
        if source is None or row.output in names or any(source == p.input for p in pairs):
            continue
        slot = names[source]
        names.add(Slot(row.output, slot.source, slot.dtype, slot.shape))
        pairs.append(Pair(source, row.output, row))
    return pairs


def settle(
    binding: Binding,
    pairs: Sequence[Pair],
    adapters: Sequence[tuple[Adapter, float]],
    config: Mapping[str, Any],
) -> None:
    """Unties pairs of which only one side changes; leaves the others tied, with one change for both.

    Raises:
        UnsupportedError: `binding.tied` where a model's code gives an untied head another meaning.
    """
    names = binding.names
    together = any(adapter.settings.get("tied") for adapter, _ in adapters)
    for pair in pairs:
        head, body = binding.touched(pair.output), binding.touched(pair.input)
        rows_only = not head and all(isinstance(u, TokenRows) for u in binding.updates.get(pair.input, ()))
        same = head and body and (together or _equal(binding, pair))
        if not head and (not body or (rows_only and pair.input not in binding.replaced)):
            names.remove(pair.output)
            continue
        if same:
            binding.updates.pop(pair.output, None)
            binding.replaced.pop(pair.output, None)
            names.remove(pair.output)
            continue
        if pair.table.refuse:
            raise UnsupportedError(
                "binding.tied",
                f"the adapter changes only one of {quoted(pair.input)} and its tied head: {pair.table.refuse}",
                tensors=[pair.input],
            )
        stored = binding.replaced.get(pair.input)
        if stored is not None and stored.is_base and not head:
            binding.replaced[pair.output] = stored  # the weight before training is the head's too
        _check_vocabulary(binding, pair)
        binding.untied[pair.output] = pair.input
        for old, new in pair.table.also.items():
            source = names.find(old)
            if source is not None and new not in names:
                slot = names[source]
                names.add(Slot(new, slot.source, slot.dtype, slot.shape))
                binding.untied[new] = source
        binding.config[names.families.tie_field] = False
        binding.notes.append(f"{quoted(pair.output)} was tied to {quoted(pair.input)} and is now a tensor of its own")


def _equal(binding: Binding, pair: Pair) -> bool:
    """Both sides replaced by the same bytes, or the same rows by the same bytes."""
    a, b = binding.replaced.get(pair.input), binding.replaced.get(pair.output)
    if a is not None and b is not None:
        same_kind = (a.factor.info.dtype, a.factor.shape) == (b.factor.info.dtype, b.factor.shape)
        return same_kind and _bytes_equal(a.factor, b.factor) and not binding.updates.get(pair.output)
    return False


def _bytes_equal(a: Any, b: Any, step: int = 1 << 22) -> bool:
    for at in range(0, a.info.nbytes, step):
        n = min(step, a.info.nbytes - at)
        if a.file.source.read(a.info.begin + at, n) != b.file.source.read(b.info.begin + at, n):
            return False
    return True


def _check_vocabulary(binding: Binding, pair: Pair) -> None:
    ends = [binding.replaced.get(name) for name in (pair.input, pair.output)]
    rows = {binding.names[pair.input].shape[0] if end is None else end.factor.shape[0] for end in ends}
    if len(rows) > 1:
        raise MismatchError(
            "adapter.vocabulary",
            f"the adapter resizes only one of {quoted(pair.input)} and {quoted(pair.output)}",
            fix="save the adapter with both (save_embedding_layers=True)",
            tensors=[pair.input, pair.output],
        )


def patch_config(binding: Binding, adapters: Sequence[tuple[Adapter, float]], config: Mapping[str, Any]) -> None:
    """Vocabulary size, labels and architecture, where replaced or added tensors demand it."""
    facts, names = binding.names.families, binding.names
    for name, new in binding.replaced.items():
        module = name.rpartition(".")[0]
        if not facts.is_vocabulary(module) or new.factor.shape == names[name].shape or name in binding.added:
            continue
        _check_partner(binding, name, new.factor.shape[0], config)
        if new.factor.shape[0] != config.get("vocab_size", new.factor.shape[0]):
            binding.config["vocab_size"] = new.factor.shape[0]
        for nested in facts.tie_nested:
            inner = config.get(nested)
            if isinstance(inner, dict) and "vocab_size" in inner:
                binding.config.setdefault(nested, {})["vocab_size"] = new.factor.shape[0]
    _patch_head(binding, adapters, config)


def _check_partner(binding: Binding, name: str, rows: int, config: Mapping[str, Any]) -> None:
    """An untied partner must have been resized too."""
    names = binding.names
    for row in names.families.tied:
        ends = [names.find(row.input), names.find(row.output)]
        if name not in ends or None in ends:
            continue
        for end in ends:
            have = binding.replaced[end].factor.shape[0] if end in binding.replaced else names[str(end)].shape[0]
            if have != rows:
                raise MismatchError(
                    "adapter.vocabulary",
                    f"the adapter gives {quoted(name)} {rows} rows, but {quoted(end)} has {have}",
                    fix="save the adapter with both (save_embedding_layers=True)",
                    tensors=[name, str(end)],
                )


def _patch_head(binding: Binding, adapters: Sequence[tuple[Adapter, float]], config: Mapping[str, Any]) -> None:
    facts = binding.names.families
    for name, new in binding.replaced.items():
        adapter = adapters[new.adapter][0]
        task = adapter.settings.get("task")
        head = next((h for h in facts.heads if h["task"] == task and facts.head_of(name) is not None), None)
        head = head or (facts.head_of(name) if not task else None)
        if head is None or not any(m in name.split(".") for m in head["modules"]):
            continue
        known = config.get("architectures")
        if name in binding.added and isinstance(known, list) and known and "architectures" not in binding.config:
            stem = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", str(known[0]))
            binding.config["architectures"] = [stem + head["architecture"]]
        shape = new.factor.shape
        if head["labels"] and len(shape) == 2:
            # The last layer of the head has one row for each label; it is the smallest of its weights.
            labels = min(shape[0], binding.config.get("num_labels", shape[0]))
            binding.config["num_labels"] = labels
    labels = binding.config.pop("num_labels", None)
    if labels is None:
        return
    was = config.get("id2label")
    if isinstance(was, dict) and len(was) == labels and config.get("label2id"):
        return
    binding.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
    binding.config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
