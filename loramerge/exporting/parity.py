"""Runs an export in onnxruntime against the model in torch, loaded by its own library, on random inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loramerge.exporting import reference, tasks, truncated
from loramerge.exporting.plan import DTYPES, ExportPlan
from loramerge.exporting.tasks import GraphSpec
from loramerge.merging import run
from loramerge.merging.stream import Result
from loramerge.tensors.text import plural

Array = NDArray[Any]
Named = dict[str, Array]

TOLERANCE = 1e-4
"""Of float32, relative to the largest output where that is over 1. Rounding alone gives about 1e-6 on a few layers."""

HALF_TIMES = 4.0
"""How many times what torch's own half precision is off an export in half precision may be off."""

TIMES_THE_MODEL = 4
"""Memory of a comparison: torch's weights, those on their way there, and the runtime's with its repacked copies."""

CPU = ["CPUExecutionProvider"]


@dataclass
class Found:
    """The differences so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    scale: float = 0.0
    half: float = 0.0

    def add(self, what: str, name: str, ours: Array, theirs: Array, mask: Array | None) -> None:
        """Compares one output; of padded rows only what a reader may look at."""
        if ours.shape != theirs.shape:
            self.rows.append({"inputs": what, "output": name, "difference": float("inf")})
            return
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        if mask is not None and a.ndim >= 2 and a.shape[:2] == mask.shape:
            a, b = a[mask.astype(bool)], b[mask.astype(bool)]
        if not a.size:
            return
        self.scale = max(self.scale, float(np.abs(b[np.isfinite(b)]).max(initial=0.0)))
        both = np.isfinite(a) & np.isfinite(b)
        same = bool((both | (a == b)).all())  # a mask of minus infinity is one on both sides
        difference = float(np.abs(a[both] - b[both]).max(initial=0.0)) if same else float("inf")
        self.rows.append({"inputs": what, "output": name, "difference": difference})


def compare(plan: ExportPlan, directory: Path, options: run.Options, results: Mapping[str, Result]) -> dict[str, Any]:
    """Compares an export with the model it came from.

    Returns:
        `{"ok", "largest", "tolerance", "worst", "runs", "outputs", "whole", "hashed", "note", "runtime"}`; `whole` is
        false where the model is too large to run: then a few layers ran, or none where those are too large as well
        (`largest` is None), and the weights were compared by digest.
    """
    import onnxruntime

    largest, needed = _room(options), TIMES_THE_MODEL * plan.nbytes
    shown, checked = plan, 0
    if needed > largest:
        shown = truncated.shallow(plan)
        checked = truncated.compare_digests(plan, directory, results)
        if TIMES_THE_MODEL * sum(plan.targets[name].nbytes for name in shown.weights) > largest:
            return _by_digest(checked, plan.settings.link_weights and not plan.merge.adapters)
    found = Found()
    model = reference.load(shown, torch.float32, options)
    with truncated.sessions(shown, directory, whole=shown is plan) as sessions, torch.inference_mode():
        for what, step in cases(shown, model, sessions):
            for name, (ours, theirs, mask) in step.items():
                found.add(what, name, ours, theirs, mask)
        if plan.dtype != "float32":
            found.half = _half_precision(shown, model, options)
    worst = max(found.rows, key=lambda row: row["difference"], default=None)
    value = float("inf") if worst is None else worst["difference"]
    tolerance = TOLERANCE * max(1.0, found.scale)
    if plan.dtype != "float32":
        tolerance = HALF_TIMES * found.half + 2.0**-10 * max(1.0, found.scale)
    note = ""
    if shown is not plan:
        layers = plural(truncated.DEPTH, "layer")
        note = f"too large to run whole: {layers} ran, the weights of all others were compared by digest"
    return {
        "ok": bool(value <= tolerance),
        "largest": value,
        "tolerance": tolerance,
        "worst": "" if worst is None else f"{worst['output']} of {worst['inputs']}",
        "runs": len({row["inputs"] for row in found.rows}),
        "outputs": len(found.rows),
        "whole": shown is plan,
        "hashed": checked,
        "note": note,
        "runtime": f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}",
    }


def _by_digest(checked: int, linked: bool) -> dict[str, Any]:
    weights = "are the checkpoint's own files" if linked else "were compared by digest"
    return {
        "ok": True,
        "largest": None,
        "tolerance": None,
        "worst": "",
        "runs": 0,
        "outputs": 0,
        "whole": False,
        "hashed": checked,
        "note": f"too large to run: the weights {weights}, the graph was only checked",
        "runtime": "",
    }


def _room(options: run.Options) -> int:
    """Bytes of memory that a comparison may take."""
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024 * 8 // 10
    except OSError:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else free
    return min(free, options.max_memory or free)


def cases(plan: ExportPlan, model: Any, sessions: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what the inputs are, output -> (ours, theirs, mask)) for every run."""
    random = np.random.default_rng(0)
    kind = plan.task.kind
    if kind == "decoder":
        yield from _decoder(plan, model, sessions, random)
    elif kind == "seq2seq":
        yield from _seq2seq(plan, model, sessions, random)
    else:
        yield from _encoder(plan, model, sessions, random)


# ------------------------------------------------------------------------------------------------- inputs


def _length(plan: ExportPlan, wanted: int) -> int:
    text = plan.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None) or 1 << 20
    return int(min(wanted, max(1, most - 4)))


def _tokens(plan: ExportPlan, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random tokens, none of them the one for padding (some models look for it in the ids)."""
    text = plan.config.get_text_config(decoder=True)
    pad = getattr(text, "pad_token_id", None)
    ids = random.integers(0, text.vocab_size, shape, dtype=np.int64)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % text.vocab_size
    return ids


def _mask(batch: int, length: int, left: bool) -> Array:
    """Ones, with fewer of them in every row but the last."""
    mask = np.ones((batch, length), dtype=np.int64)
    for row in range(batch - 1):
        away = min(length - 1, length // 3 + row)
        mask[row, slice(0, away) if left else slice(length - away, length)] = 0
    return mask


def _positions(mask: Array, length: int) -> Array:
    positions: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:]
    return positions


def _port_shapes(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {p.name: tuple(sizes[a] if isinstance(a, str) else a for a in p.axes) for p in spec.inputs}


def _to_torch(feeds: Mapping[str, Array], model: Any) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value).to(model.dtype) if value.dtype.kind == "f" else torch.from_numpy(value)
        for name, value in feeds.items()
    }


def _run(session: Any, feeds: Mapping[str, Array]) -> Named:
    """One run; inputs that the graph does not have are left out."""
    inputs = {value.name: value.type for value in session.get_inputs()}
    cast = {k: v.astype(np.float16) if inputs[k] == "tensor(float16)" else v for k, v in feeds.items() if k in inputs}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, cast), strict=True))


# ------------------------------------------------------------------------------------------------- tasks

DECODER_SHAPES = ((1, 1, False), (1, 7, False), (2, 12, True), (3, 33, True))


def _decoder(
    plan: ExportPlan, model: Any, sessions: Mapping[str, Any], random: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = plan.graphs[0].spec
    session = sessions[plan.graphs[0].path]
    dtype = np.float16 if plan.dtype == "float16" else np.float32
    for batch, wanted, padded in DECODER_SHAPES:
        length = _length(plan, wanted)
        mask = _mask(batch, length, left=True) if padded else np.ones((batch, length), dtype=np.int64)
        ids = _tokens(plan, random, (batch, length))
        past: Named = {
            f"past_key_values.{i}.{what}": np.zeros((batch, heads, 0, size), dtype)
            for i, (heads, size) in enumerate(spec.layers)
            for what in ("key", "value")
        }
        cache: Any = None
        steps = [ids, *([_tokens(plan, random, (batch, n)) for n in (1, 3)] if wanted in (7, 12) else [])]
        for number, tokens in enumerate(steps):
            if number:
                mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
            feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": _positions(mask, tokens.shape[1])}
            got = _run(session, {**feeds, **past})
            known = {p.name for p in spec.inputs}
            given = _to_torch({k: v for k, v in feeds.items() if k in known}, model)
            want = model(**given, past_key_values=cache, use_cache=True)
            cache = want.past_key_values
            past = {k.replace("present.", "past_key_values."): v for k, v in got.items() if k.startswith("present.")}
            what = f"{batch} x {tokens.shape[1]}" + (", left padding" if padded else "")
            what += f", past {mask.shape[1] - tokens.shape[1]}" if number else ""
            shown = mask[:, -tokens.shape[1] :]
            yield what, {"logits": (got["logits"], want.logits.float().numpy(), shown)}


def _encoder(
    plan: ExportPlan, model: Any, sessions: Mapping[str, Any], random: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    graph = plan.graphs[0]
    for batch, wanted, padded in ((1, 1, False), (1, 7, False), (3, 33, True)):
        sizes = _sizes(plan, batch, wanted)
        feeds = _feeds(plan, graph.spec, sizes, random, padded)
        got = _run(sessions[graph.path], feeds)
        want = model(**_to_torch(feeds, model), return_dict=True)
        mask = feeds.get("attention_mask")
        what = f"{batch} x {sizes[tasks.SEQUENCE]}" if mask is not None else f"batch {batch}"
        what += ", padding" if padded and mask is not None else ""
        flat = {k: v for k, v in want.items() if isinstance(v, torch.Tensor)}
        yield what, {k: (got[k], flat[k].float().numpy(), mask) for k in got if k in flat}


def _sizes(plan: ExportPlan, batch: int, wanted: int) -> dict[str, int]:
    length = _length(plan, wanted)
    return {
        tasks.BATCH: batch,
        tasks.SEQUENCE: length,
        "image_batch_size": batch,
        "num_choices": 2,
        "height": 64 + 32 * (batch - 1),
        "width": 96,
        "frames": 40 + 4 * wanted,
        "samples": 3200 + 160 * wanted,
        tasks.ENCODED: length,
    }


def _feeds(
    plan: ExportPlan, spec: GraphSpec, sizes: Mapping[str, int], random: np.random.Generator, padded: bool
) -> Named:
    """Random inputs of a graph that data enters by."""
    feeds: Named = {}
    for name, shape in _port_shapes(spec, sizes).items():
        if name == "input_ids":
            feeds[name] = _tokens(plan, random, shape)
            if plan.task.kind == "encoder" and getattr(plan.config, "eos_token_id", None) is not None:
                _end(feeds[name], plan.config)
        elif name == "token_type_ids":
            feeds[name] = random.integers(0, 2, shape, dtype=np.int64)
        elif name == "attention_mask":
            rows = int(np.prod(shape[:-1]))
            mask = _mask(rows, shape[-1], left=False) if padded else np.ones((rows, shape[-1]), np.int64)
            feeds[name] = mask.reshape(shape)
        else:
            feeds[name] = random.standard_normal(shape, dtype=np.float32)
    return feeds


def _end(ids: Array, config: Any) -> None:
    """Some models take what they saw at the last token of all for the whole: there is one."""
    end = config.eos_token_id
    ids[..., -1] = end[0] if isinstance(end, list) else end


def _seq2seq(
    plan: ExportPlan, model: Any, sessions: Mapping[str, Any], random: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    encoder, first, following = plan.graphs
    for batch, wanted, padded in ((1, 1, False), (2, 9, True)):
        sizes = _sizes(plan, batch, wanted)
        feeds = _feeds(plan, encoder.spec, sizes, random, padded)
        got = _run(sessions[encoder.path], feeds)
        given = _to_torch(feeds, model)
        want = model.get_encoder()(**given, return_dict=True)
        mask = feeds.get("attention_mask")
        what = f"batch {batch}" + (", padding" if padded and mask is not None else "")
        hidden = got["last_hidden_state"]
        yield f"encoder, {what}", {"last_hidden_state": (hidden, want.last_hidden_state.float().numpy(), mask)}
        more = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        sides: Named = {} if mask is None else {"encoder_attention_mask": mask}
        cache: Any = None
        past: Named = {}
        for number, length in enumerate((3, 1, 2)):
            tokens = _tokens(plan, random, (batch, length))
            session = sessions[(following if number else first).path]
            out = _run(session, {"input_ids": tokens, "encoder_hidden_states": hidden, **sides, **past})
            ref = model(
                encoder_outputs=want,
                decoder_input_ids=torch.from_numpy(tokens),
                past_key_values=cache,
                use_cache=True,
                **more,
            )
            cache = ref.past_key_values
            past |= {k.replace("present.", "past_key_values."): v for k, v in out.items() if k.startswith("present.")}
            yield f"decoder step {number}, {what}", {"logits": (out["logits"], ref.logits.float().numpy(), None)}


def _half_precision(plan: ExportPlan, model: Any, options: run.Options) -> float:
    """How far torch's own half precision is from its float32, on the first output.

    Where it has no kernels for that, what eight roundings in a row would be: 2**-11 relative each.
    """
    random = np.random.default_rng(1)
    spec = plan.graphs[0].spec
    sizes = _sizes(plan, 2, 12)
    if plan.task.kind == "decoder":
        feeds: Named = {"input_ids": _tokens(plan, random, (2, sizes[tasks.SEQUENCE]))}
    else:
        feeds = _feeds(plan, spec, sizes, random, padded=False)
    if plan.task.kind == "seq2seq":
        feeds["decoder_input_ids"] = _tokens(plan, random, (2, 5))
    first = model(**_to_torch(feeds, model), return_dict=True)[0].double()
    try:
        half = reference.load(plan, DTYPES[plan.dtype], options)
        second = half(**_to_torch(feeds, half), return_dict=True)[0].double()
    except RuntimeError:
        return 2.0**-8 * float(first.abs().max())
    return float((first - second).abs().max())
