"""The public verbs, with the names and defaults of the command line's flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge import __version__, pickled
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter as _open_adapter
from loramerge.errors import UsageError
from loramerge.hub.reaching import reaching
from loramerge.merging import run
from loramerge.merging.plan import Plan
from loramerge.merging.receipt import Receipt
from loramerge.merging.run import Adapters, Options, Pathlike
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.checkpoint import open_checkpoint as _open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from loramerge.merging.switcher import Switcher as Switcher

ProgressCallback = Callable[[int, int], None]


def __getattr__(name: str) -> Any:
    if name == "Switcher":  # it needs torch, which the rest loads when it is called
        from loramerge.merging.switcher import Switcher

        return Switcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _place(model: Pathlike | Checkpoint, out: Pathlike | None, in_place: bool) -> Pathlike:
    """Where to write: `out`, or the place of the model itself.

    Raises:
        UsageError: `usage.output` for both or neither.
    """
    if (out is None) != in_place:
        problem = "both a place to write to and in-place are given" if in_place else "no place to write to is given"
        raise UsageError("usage.output", problem, fix="give either -o OUT or --in-place")
    if out is not None:
        return out
    return model.path if isinstance(model, Checkpoint) else model


@reaching(base="stream", adapters="adapters", checkpoint="base")
def plan_merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    dtype: str = "keep",
    compute_dtype: str = "float32",
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    jobs: int | None = None,
    max_memory: int | None = None,
    force: bool = False,
    allow_unmatched: bool = False,
    tokenizer: str = "auto",
    shard_size: int | None = None,
    allow_pickle: bool = False,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
    reversible: bool = False,
    link: bool = False,
    in_place: bool = False,
    no_undo: bool = False,
    method: str = "linear",
    method_options: Mapping[str, Any] | None = None,
    checkpoint: Pathlike | None = None,
    token: str | None = None,
    offline: bool = False,
) -> Plan:
    """What `merge` would do, decided from headers alone. Arguments and errors as `merge`; writes nothing."""
    return run.plan_merge(
        base,
        adapters,
        _place(base, out, in_place),
        Options(
            dtype=dtype,
            compute_dtype=compute_dtype,
            device=device,
            include=include,
            exclude=exclude,
            jobs=jobs,
            max_memory=max_memory,
            force=force,
            allow_unmatched=allow_unmatched,
            tokenizer=tokenizer,
            shard_size=shard_size,
            allow_pickle=allow_pickle,
            alpha=alpha,
            enable_lora=enable_lora,
            residual_base=residual_base,
            original_base=original_base,
            grouped_experts=grouped_experts,
            reversible=reversible,
            link=link,
            in_place=in_place,
            no_undo=no_undo,
            method=method,
            method_options=method_options or {},
            checkpoint=None if checkpoint is None else str(checkpoint),
        ),
    )


@reaching(base="stream", adapters="adapters", checkpoint="base")
def merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    checkpoint: Pathlike | None = None,
    attest: Pathlike | None = None,
    builder_id: str | None = None,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Receipt:
    """Folds adapters into a checkpoint: `W' = W + sum of weight * (alpha / r) * B A`, each rounded once.

    Args:
        base: a directory or file of weights, or what `open_checkpoint` gave. A reference to the Hub
            (`hf://ns/name[@revision][/path]`, or `ns/name` where no such path exists) is streamed: its weights are read
            once, checked to the end before `out` appears, and stored nowhere, unless the cache has them.
        adapters: a path or reference, `{path: weight}`, or a list of paths or (path, weight).
        out: a directory, or a `.safetensors` or `.onnx` file for one file. Appears complete or not at all. None with
            `in_place`.
        on_plan: told the plan before work begins.
        progress: told (bytes done, bytes in all), about ten times a second, from this thread.
        checkpoint: where `base` is an ONNX model: the checkpoint that it was exported from. Modules that neither the
            names in the graph nor its nodes tell are found by the values of their weights.
        attest, builder_id: as for `build`: a file for a statement of where `out` comes from. Inputs on disk and the
            output are read once more for it.
        dtype: `keep` (each tensor its own), `float32`, `float16` or `bfloat16`.
        compute_dtype: `float32`, or `float64` for correctly rounded results.
        device: `auto` (the CPU), `cpu`, `cuda`, `cuda:N`, `mps`.
        include, exclude: globs over the adapters' module paths.
        jobs: workers; by default one more than cores.
        max_memory: bytes; fewer workers are used to stay below.
        force: replace an existing `out`.
        allow_unmatched: leave out factors that match nothing in the base.
        tokenizer: `auto` (an adapter's set if it brings one), `base` or `adapter`.
        shard_size: bytes of an output file; by default the files are cut as the base's are.
        allow_pickle: read `.bin`/`.pt` files through torch's weights-only loader.
        alpha: alpha where nothing on disk says it (loralib).
        enable_lora: the trained slots of a grouped linear where nothing on disk says it (loralib).
        residual_base: `base` is the residual that an initialisation such as PiSSA left.
        original_base: `base` is the one from before training changed it (KaSA), so the change must be made again.
        grouped_experts: B of stacked experts has the expert slowest, as some versions of unsloth wrote it.
        reversible: write an undo file beside the weights, for `unmerge` and `switch`.
        link: hard-link files that nothing changes instead of copying them.
        in_place: rewrite `base` where it lies: only the bytes that change, through a journal, so that a run that is
            killed is finished or undone by the next one (see `recover`). Needs `reversible` or `no_undo`.
        no_undo: with `in_place`: do without an undo file, so that the base is gone.
        method: how the updates of several adapters are joined, matrix by matrix: `linear`, their sum, or one of
            `loramerge.methods.METHODS`. Weights are in the updates before the method sees them. What adapters bring
            whole is taken as a linear merge takes it.
        method_options: the method's own options by name, such as `{"density": 0.5}`; what is not given has the
            default that the method's table says.
        token, offline: how sources on the Hub are reached, as for `pull`; every verb that takes sources takes these.

    Returns:
        the receipt; its `data` is what `out/loramerge.json` holds.

    Raises:
        UsageError, InputError, MismatchError, UnsupportedError, UnsafeError, OutputError: see `loramerge.errors`.
    """
    chosen = Options(checkpoint=None if checkpoint is None else str(checkpoint), **options)
    place = _place(base, out, chosen.in_place)
    if attest is None:
        if builder_id is not None:
            raise UsageError("usage.attest", "--builder-id is for --attest", fix="give --attest FILE too")
        return run.merge(base, adapters, place, chosen, __version__, on_plan, progress)
    from pathlib import Path

    from loramerge.building import attest as attesting

    if chosen.in_place:
        fix = "leave --attest away, or -o OUT"
        raise UsageError("usage.attest", "a merge in place leaves no base to attest", fix=fix)
    attesting.check(Path(attest), chosen.force, builder_id)
    receipt = run.merge(base, adapters, place, chosen, __version__, on_plan, progress)
    paths = [Path(s.path if isinstance(s, Adapter) else s) for s, _ in run.weighted(adapters)]
    where = Path(base.path if isinstance(base, Checkpoint) else base)
    made = attesting.of_merge(
        receipt, where, paths, __version__, builder_id=builder_id, allow_pickle=chosen.allow_pickle
    )
    attesting.write(Path(attest), made)
    return receipt


@reaching(merged="whole", adapters="adapters", base="base")
def unmerge(
    merged: Pathlike,
    out: Pathlike | None,
    adapters: Adapters = (),
    *,
    base: Pathlike | None = None,
    inexact: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Receipt:
    """Takes out everything that was merged into a model.

    With an undo file (`merge(..., reversible=True)`) every weight comes back bit for bit, which digests prove. With
    `base` the tensors that the merge changed are read from the base again, and only those: exact too, and whatever the
    merge did. With neither the updates are computed again and subtracted, which gives some weights back wrong: only
    with `inexact`, and only where updates were added.

    Args:
        merged: what a merge wrote.
        out: as for `merge`.
        adapters: where given, checked to be those that were merged, and the place to find them for a subtraction.
        base: the base, as it was merged. Its files, cut as they are, are what `out` becomes.
        inexact: subtract where there is neither an undo file nor `base`.
        on_plan, progress: as for `merge`.
        options: `jobs`, `max_memory`, `force`, `allow_pickle`, `in_place`, as for `merge`.

    Returns:
        the receipt. In its `data`: `way` (`undo file`, `base` or `subtraction`), `removed` (the adapters), `proved`
        (how many of the tensors that came back have the digest that they had in the base), `unproved` (the names of
        the others), and after a subtraction `inexact`: `share` (of the changed weights, how many are expected to
        differ from the base) and `may_differ` (how many of them may).

    Raises:
        MismatchError: `unmerge.no-receipt`, `unmerge.no-undo`, `unmerge.adapter`, `unmerge.adapter-missing`,
            `unmerge.edited`, `unmerge.base`, `undo.foreign`; UnsupportedError: `unmerge.not-additive`; InputError:
            `undo.*`; OutputError, UsageError. All before anything is seen in `out`.
    """
    from loramerge.merging import unmerge as back

    given, chosen = run.weighted(adapters), Options(**options)
    place = _place(merged, out, chosen.in_place)
    return back.unmerge(merged, given, place, chosen, __version__, on_plan, progress, base, inexact)


@reaching(merged="whole", adapters="adapters", base="base")
def plan_unmerge(
    merged: Pathlike,
    out: Pathlike | None,
    adapters: Adapters = (),
    *,
    base: Pathlike | None = None,
    inexact: bool = False,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Plan:
    """What `unmerge` would do, decided from headers alone. Arguments and errors as `unmerge`; writes nothing."""
    from loramerge.merging import unmerge as back

    chosen = Options(**options)
    place = _place(merged, out, chosen.in_place)
    prepared = back.prepare_unmerge(merged, run.weighted(adapters), place, chosen, base, inexact)
    prepared.close()
    return prepared.plan


@reaching(merged="whole", adapters="adapters")
def switch(
    merged: Pathlike,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Receipt:
    """Takes out what was merged into a model and merges other adapters instead, in one pass, reversibly.

    Every weight is brought back exactly before it is changed: the result is what a merge into the base gives, bit for
    bit, however often a model was switched before.

    Args:
        merged: what `merge` with ``reversible=True``, or `switch`, wrote.
        adapters: those to merge instead, as for `merge`.
        out: as for `merge`.
        on_plan, progress: as for `merge`.
        options: as for `merge`, but for `dtype`, `shard_size` and `link`: the model keeps its form.

    Raises:
        LoramergeError: as `unmerge` and `merge`.
    """
    from loramerge.merging import unmerge as back

    given, chosen = run.weighted(adapters), Options(**options)
    place = _place(merged, out, chosen.in_place)
    return back.switch(merged, given, place, chosen, __version__, on_plan, progress)


@reaching(merged="whole", adapters="adapters")
def plan_switch(
    merged: Pathlike,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Plan:
    """What `switch` would do, decided from headers alone. Arguments and errors as `switch`; writes nothing."""
    from loramerge.merging import unmerge as back

    chosen = Options(**options)
    place = _place(merged, out, chosen.in_place)
    prepared = back.prepare_switch(merged, run.weighted(adapters), place, chosen)
    prepared.close()
    return prepared.plan


def recover(model: Pathlike) -> dict[str, Any]:
    """Finishes runs in place on a model that were interrupted, and clears what others left that changed nothing yet.

    A run in place is finished where all that it was to write lay in its journal, durably; before that the model is
    still the old one. `merge`, `unmerge` and `switch` do the same first with `in_place`; everything else refuses such
    a model (`input.interrupted`).

    Returns:
        `{"schema": 1, "model", "recovered": [{"model", "command"}]}`; nothing in `recovered` where nothing waited.

    Raises:
        InputError: `input.missing`, `journal.damaged`, `journal.version`, `journal.foreign`; UnsafeError:
            `journal.unsafe-name`; OutputError: `output.busy` where such a run is still going on, `output.*`.
    """
    from loramerge.merging import in_place

    return in_place.recover(model)


@reaching(out="whole", base="base", adapters="adapters")
def verify(
    out: Pathlike,
    *,
    base: Pathlike | None = None,
    adapters: Adapters | None = None,
    undo: bool = False,
    allow_pickle: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Checks an output against its receipt: the digests of all its tensors and files, the undo file included.

    Args:
        out: what `merge`, `unmerge` or `switch` wrote.
        base: replay the merge (or the switch) from this base, and compare every tensor; after an un-merge, compare with
            the base itself.
        adapters: replay it with these; by default with those that the receipt names.
        undo: bring every tensor back with the undo file, without writing, and compare its digest with the base's.
        allow_pickle, jobs, progress: as for `merge`.

    Returns:
        `{"schema": 1, "ok", "out", "command", "tensors", "equal", "differ", "files", "replayed", "undo"}`; `undo` is
        None or `{"ok", "why", "tensors", "back"}`: the tensors that do not come back, and how many do.

    Raises:
        InputError: the output or its receipt cannot be read. MismatchError: `unmerge.no-undo`.
    """
    from loramerge.merging import verify as verifier

    return verifier.verify(out, base, adapters, undo=undo, allow_pickle=allow_pickle, jobs=jobs, progress=progress)


@reaching(adapters="adapters")
def merge_tensors(
    tensors: Mapping[str, Tensor],
    adapters: Adapters,
    *,
    config: Mapping[str, Any] | None = None,
    compute_dtype: str = "float32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_unmatched: bool = False,
    allow_pickle: bool = False,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
    method: str = "linear",
    method_options: Mapping[str, Any] | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Tensor]:
    """The same merge for a state dict in memory, on the devices where its tensors are.

    Args:
        tensors: name -> tensor; nothing of it is changed, untouched tensors are shared with the result.
        config: the model's config as a dict, where names and shapes do not tell (tied heads, Conv1D).
        method, method_options: as for `merge`.

    Returns:
        name -> tensor, in the dtypes of `tensors`.
    """
    from loramerge.merging import memory

    options = Options(
        compute_dtype=compute_dtype,
        include=include,
        exclude=exclude,
        allow_unmatched=allow_unmatched,
        allow_pickle=allow_pickle,
        alpha=alpha,
        enable_lora=enable_lora,
        residual_base=residual_base,
        original_base=original_base,
        grouped_experts=grouped_experts,
        method=method,
        method_options=method_options or {},
    )
    return memory.merge_tensors(tensors, adapters, config, options)


@reaching(path="base")
def open_checkpoint(
    path: Pathlike, *, allow_pickle: bool = False, token: str | None = None, offline: bool = False
) -> Checkpoint:
    """A checkpoint, from its headers."""
    return _open_checkpoint(str(path), read_pickle=pickled.read_header if allow_pickle else None, onnx=True)


@reaching(path="adapter")
def open_adapter(
    path: Pathlike,
    *,
    allow_pickle: bool = False,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
    token: str | None = None,
    offline: bool = False,
) -> Adapter:
    """An adapter, from its headers and config."""
    return _open_adapter(
        str(path),
        read_pickle=pickled.read_header if allow_pickle else None,
        alpha=alpha,
        enable_lora=enable_lora,
        residual_base=residual_base,
        original_base=original_base,
        grouped_experts=grouped_experts,
    )


@reaching(source="model")
def inspect(
    source: Pathlike, *, allow_pickle: bool = False, token: str | None = None, offline: bool = False
) -> dict[str, Any]:
    """What a file or directory is: an adapter or a checkpoint, and all that its headers tell.

    Returns:
        plain data, see `loramerge.adapters.describe.inspect`; and ``family``: for a checkpoint its name and the layout
        of each component, or None; for an adapter the names of the families that its modules fit.
    """
    from loramerge.adapters import describe
    from loramerge.binding import recognise

    data = describe.inspect(str(source), read_pickle=pickled.read_header if allow_pickle else None)
    if data["kind"] == "checkpoint":
        shapes = {row["name"]: tuple(row["shape"]) for row in data["contents"]}
        data["family"] = recognise.family_of_checkpoint(shapes)
    else:
        data["family"] = recognise.families_of_adapter([row["path"] for row in data.get("module_list", ())])
    return data


@reaching(adapter="adapter", base="base")
def convert(
    adapter: Pathlike,
    out: Pathlike,
    to: str,
    *,
    base: Pathlike | None = None,
    rank: int | None = None,
    drop: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Writes an adapter in another dialect, exactly where the dialect can hold it.

    Args:
        adapter: the adapter's file or directory.
        out: a directory or a file, as the target's files are.
        to: a dialect of `formats/adapters/` with a `[write]` table, or a server of `formats/servers/`; or
            `onnx-adapter`: onnxruntime's own file for an adapter-ready graph, which `base` is then.
        base: the checkpoint it was trained on: tells names that are flattened, its own layout, and the weights that
            some kinds depend on.
        rank: write the nearest low-rank pair of this rank for what the target cannot hold.
        drop: leave out what the target cannot hold.
        include, exclude: globs over the adapter's module paths.
        alpha: alpha where nothing on disk says it (loralib).
        allow_pickle: read `.bin`/`.pt` files through torch's weights-only loader.
        force: replace an existing `out`.
        dry_run: compute and check everything, write nothing.

    Returns:
        `{"schema": 1, "out", "from", "to", "modules", "exact", "approximated", "error", "renamed", "joined", "cut",
        "dropped", "alpha", "files", "bytes", "rows", "notes"}`; `error` is relative to the norm of all changes that
        were approximated, `rows` tells each module.

    Raises:
        UsageError: `usage.target`, `output.name`. UnsupportedError: `convert.kind` for what the target cannot hold.
        MismatchError: `convert.needs-base`, and those of a merge where `base` is given. InputError, OutputError.
    """
    if to == "onnx-adapter":
        from loramerge.exporting import onnx_adapter

        if rank is not None or drop:
            raise UsageError("usage.value", "--rank and --drop are for dialects", fix="leave them away")
        return onnx_adapter.convert(
            str(adapter),
            str(out),
            base=None if base is None else str(base),
            include=include,
            exclude=exclude,
            alpha=alpha,
            read_pickle=pickled.read_header if allow_pickle else None,
            force=force,
            dry_run=dry_run,
        )
    from loramerge.converting import convert as converter

    return converter.convert(
        str(adapter),
        str(out),
        to,
        base=None if base is None else str(base),
        rank=rank,
        drop=drop,
        include=include,
        exclude=exclude,
        alpha=alpha,
        read_pickle=pickled.read_header if allow_pickle else None,
        force=force,
        dry_run=dry_run,
    )


@reaching(adapters="adapters", base="base")
def analyze(
    adapters: Adapters,
    *,
    base: Pathlike | None = None,
    html: Pathlike | None = None,
    png: Pathlike | None = None,
    force: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    points: int = 24,
    leading: int = 64,
    jobs: int | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
    allow_unmatched: bool = False,
    allow_pickle: bool = False,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """What adapters do, computed from their factors in float64, without forming a change as a whole.

    Args:
        adapters: as for `merge`; weights scale the updates.
        base: the checkpoint that they change; adds what needs its weights, which are read once.
        html: a file to write the report to, as one page that needs nothing else.
        png: a directory to write pictures to (needs matplotlib).
        force: replace what is at `html` and `png`.
        include, exclude: globs over the adapters' module paths.
        points: at how many ranks a side similarities are given, at most; 0 for all.
        leading: how many leading directions of each weight of the base to find, at most as many as the update has; 0
            for none.
        jobs: modules at the same time; by default one for each core, at most eight.
        alpha, enable_lora, residual_base, original_base, grouped_experts, allow_unmatched, allow_pickle: as for
            `merge`.
        progress: told (done, in all) now and then, from this thread.

    Returns:
        plain data, every field of which `loramerge.analysis.report` explains: `adapters`, `base`, `pairs` (totals of
        every two adapters), `modules` (one row a weight, with an entry for each adapter), `skipped` (with reasons),
        `notes`, `summary` (sentences).

    Raises:
        UsageError, InputError, MismatchError, UnsupportedError: as `merge`; UnsupportedError: `analyze.unsupported`
            where no module can be analysed; OutputError for `html` and `png`.
    """
    from loramerge.analysis import analyze as analyzer

    options = analyzer.Options(
        include=include,
        exclude=exclude,
        points=points,
        leading=leading,
        jobs=jobs,
        alpha=alpha,
        enable_lora=enable_lora,
        residual_base=residual_base,
        original_base=original_base,
        grouped_experts=grouped_experts,
        allow_unmatched=allow_unmatched,
    )
    return analyzer.analyze(
        [(a if isinstance(a, Adapter) else str(a), w) for a, w in run.weighted(adapters)],
        None if base is None else str(base),
        options,
        __version__,
        html=None if html is None else str(html),
        png=None if png is None else str(png),
        force=force,
        read_pickle=pickled.read_header if allow_pickle else None,
        progress=progress,
    )


@reaching(base="base", tuned="base")
def extract(
    base: Pathlike,
    tuned: Pathlike,
    out: Pathlike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    to: str | None = None,
    dtype: str = "float32",
    noise_floor: bool = True,
    embeddings: str = "whole",
    only_linear: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "auto",
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Makes an adapter of what a full fine-tune changed: `tuned - base` in fp32, its best low-rank factors by module.

    Linears and convolutions become pairs whose error is at most 1.001 times that of the best pair of their rank, which
    `certificate` proves. All else that changed (norms, biases, embeddings, heads) goes whole, as it is after training,
    so that base and adapter together are the fine-tune but for the errors that the result tells. Both checkpoints are
    read tensor by tensor; tensors with the same bytes are left alone. Bytes do not depend on `jobs`.

    Args:
        base, tuned: directories or files of weights.
        out: as the target's files are; PEFT's are a directory.
        rank: at most this rank for every module.
        energy: no more ranks than keep this share of a module's squared change, in (0, 1].
        budget: bytes of the adapter's weights; ranks go where they take most of the change for their size. At least
            one of these three; together the smallest rank counts.
        to: a dialect of `formats/adapters/` or a server of `formats/servers/`; PEFT's by default.
        dtype: of the factors, `float32`, `float16` or `bfloat16`; what that costs is part of the errors.
        noise_floor: leave out singular values that are no larger than the rounding of the fine-tune's own bfloat16 or
            float16; a module with none above gets no pair.
        embeddings: `whole`, or `low-rank` for pairs of embeddings and heads too.
        only_linear: leave out all that would go whole.
        include, exclude: globs over names of tensors or of their modules.
        device: `auto` (the CPU), `cpu`, `cuda`, `cuda:N`, `mps`.
        jobs: modules side by side, one thread each; by default as many as cores. Each holds one difference in fp32,
            and thin matrices beside it.
        allow_pickle: read `.bin`/`.pt` files through torch's weights-only loader.
        force: replace an existing `out`.
        dry_run: compare and decide, factor and write nothing.
        progress: told (bytes done, bytes in all), about ten times a second, from this thread.

    Returns:
        `{"schema": 1, "modules", "rank_zero", "ranks", "error", "model_error", "certificate", "rows", "whole",
        "left_out", "files", "bytes", "notes", ...}`: `error` is |tuned - base - BA| over all pairs relative to their
        changes, `model_error` the same of the whole model with what was left out; `rows` tells each module its rank,
        relative error, certificate and share of the squared change. With `dry_run` rows have no errors.

    Raises:
        MismatchError: `extract.equal` where nothing changed, `extract.empty` where nothing is left of it,
            `extract.missing`, `extract.extra`, `extract.shape`, `extract.architecture`, `extract.tied`.
        InputError: `extract.non-finite`. UnsupportedError: `extract.kind`, `extract.dtype`: what cannot be held, by
            name. UsageError: `usage.rank`, `usage.budget`, ...; OutputError. Nothing is written then.
    """
    from loramerge.extracting import extract as extractor
    from loramerge.extracting.options import Options as ExtractOptions

    options = ExtractOptions(
        rank=rank,
        energy=energy,
        budget=budget,
        to=to,
        dtype=dtype,
        noise_floor=noise_floor,
        embeddings=embeddings,
        only_linear=only_linear,
        include=include,
        exclude=exclude,
        device=device,
        jobs=jobs,
        force=force,
        dry_run=dry_run,
    )
    read_pickle = pickled.read_header if allow_pickle else None
    return extractor.extract(str(base), str(tuned), str(out), options, read_pickle=read_pickle, progress=progress)


@reaching(model="base", adapters="adapters")
def export(
    model: Pathlike | Checkpoint,
    out: Pathlike,
    *,
    to: str = "onnx",
    adapters: Adapters = (),
    task: str | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    layout: str = "optimum",
    verify: bool = True,
    link_weights: bool = False,
    adapter_ready: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Exports a model, adapters merged on the way, to an ONNX graph with its weights beside it.

    The graph is traced without loading a weight. The weights stream from the checkpoint through the merge into the
    data file, those that are only used transposed transposed: with adapters they are the bytes that `merge` writes.

    Args:
        model: a model's directory (config.json and weights), or what `open_checkpoint` gave.
        out: the directory to write. Appears complete, and compared with torch, or not at all.
        to: `onnx`, or `safetensors` for a merge or a copy.
        adapters: as for `merge`; none exports the model as it is.
        task: what the model is to do (`text-generation`, `feature-extraction`, ...); by default its own architecture.
        dtype: `float32` or `float16` (for `safetensors` as for `merge`); by default float16 where the weights are,
            else float32.
        opset: of the graph; by default the exporter's own.
        layout: `optimum`, `transformersjs` or `genai`: names of files, and the configs that those readers look for.
        verify: run the export in onnxruntime and the model in torch on random inputs, and compare.
        link_weights: the graph reads the weights from safetensors files in `out`, hard-linked where nothing changes.
        adapter_ready: the graph takes the factors of an adapter as inputs, which are empty by default.
        dry_run: trace and check everything, write nothing.
        progress: told (bytes done, bytes in all) of the weights.
        options: as for `merge`, of those that say how adapters are read and how to compute.

    Returns:
        what the receipt holds, and `out`, `to`, `plan`, `receipt`, `bytes_written`, `seconds`. `parity` is `{"ok",
        "largest", "tolerance", "worst", "runs", "whole", "note", ...}`, or None where that was not asked for.

    Raises:
        UnsupportedError: `export.extra` (a package is missing), `export.architecture`, `export.trace`, `export.cache`,
            `export.quantised`, `export.conversion`, `export.layout`. InputError: `export.no-config`,
            `export.missing`, `export.shape`. LoramergeError: `export.differs`: it does not compute what torch does.
            And all of `merge`.
    """
    from loramerge.exporting import export as exporter
    from loramerge.exporting.plan import Settings

    if to == "safetensors":
        chosen = Options(dtype=dtype or "keep", **options)
        return exporter.export_safetensors(model, adapters, out, chosen, __version__, progress, dry_run)
    if to != "onnx":
        raise UsageError("usage.target", f"there is no export to {to!r}", fix="--to onnx or --to safetensors")
    settings = Settings(
        task=task,
        dtype=None if dtype == "keep" else dtype,
        opset=opset,
        layout=layout,
        verify=verify,
        link_weights=link_weights,
        adapter_ready=adapter_ready,
    )
    return exporter.export(
        model, adapters, out, Options(**options), settings, __version__, progress=progress, dry_run=dry_run
    )


@reaching(adapters="adapters", base="base")
def combine(
    adapters: Adapters,
    out: Pathlike,
    *,
    method: str = "linear",
    method_options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    to: str | None = None,
    base: Pathlike | None = None,
    dtype: str = "float32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Makes one adapter of several: by default the weighted sum of their updates, exactly, whatever their ranks.

    Everything is computed in float64 from the factors; only methods that act element by element in the space `full`
    form a matrix of a weight's shape. What adapters bring whole is summed by its changes: kept where all agree, a mean
    where the weights sum to 1, else from `base`.

    Args:
        adapters: as for `merge`. Weights are in the updates before the method sees them, and may be negative.
        out: a directory or a file, as the target's files are.
        method: one of `loramerge.methods.METHODS`.
        method_options: the method's own options by name, such as `{"density": 0.5}`.
        rank, energy, budget: at most one of them: cut every module to the best product of at most this rank, to the
            smallest rank that keeps this share of its sum of squares, or all modules together to a weight file of at
            most so many bytes. Without one the numerical rank is kept, at most the sum of ranks.
        to: a dialect or server as for `convert`; by default the dialect of the first adapter.
        base: the checkpoint that they were trained on: tells which modules are one where names differ, and the weights
            that some kinds depend on.
        dtype: `float32`, `float16`, `bfloat16`, or `keep`: of each module the widest of its factors.
        include, exclude, alpha, allow_pickle, force, dry_run: as for `convert`.
        jobs: modules at the same time. The bytes that are written do not depend on it.
        progress: told (bytes of factors done, in all), from this thread.

    Returns:
        `{"schema": 1, "out", "method", "adapters", "to", "modules", "left_out", "ranks", "converted", "error",
        "distance", "norm", "whole", "metadata", "files", "bytes", "rows", "notes"}`: `left_out` names modules in which
        nothing is left; `error` is how far what is written is from the method's exact result, relative to that, for
        cutting and rounding; `distance` how far methods on factors are from the weighted sum, None for others; `rows`
        tells each module.

    Raises:
        UsageError: `usage.method`, `usage.method-option`, `usage.method-adapters`, `usage.rank`, `usage.target`.
        MismatchError: `combine.shape`, `combine.architecture`, `combine.needs-base`, `combine.empty`,
        `combine.budget`. UnsupportedError: `combine.rank` for a result of full rank without a place to cut it,
        `combine.weight` for kinds that depend on the weight, `combine.collision`, `combine.whole`, `combine.stacked`.
        InputError, OutputError.
    """
    from loramerge.combining import run as combining
    from loramerge.combining.ranks import Ranks

    options = combining.Options(
        to=to,
        base=None if base is None else str(base),
        dtype=dtype,
        include=include,
        exclude=exclude,
        alpha=alpha,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
        jobs=jobs,
        ranks=Ranks(rank=rank, energy=energy, budget=budget),
    )
    return combining.combine(run.weighted(adapters), str(out), method, method_options or {}, options, progress)


@reaching(adapter="adapter", base="base")
def resize(
    adapter: Pathlike | Adapter,
    out: Pathlike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    budget: int | None = None,
    to: str | None = None,
    base: Pathlike | None = None,
    dtype: str = "keep",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    alpha: float | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Brings an adapter to other ranks: every module to the best product of its rank, without forming the product.

    Args:
        adapter: its file or directory, or what `open_adapter` gave.
        out: a directory or a file, as the target's files are.
        rank: every module to this rank; those of a lower one get zeros up to it.
        energy: the smallest rank that keeps this share of the sum of squares.
        ratio: keep the singular values above the largest divided by this.
        budget: bytes of the weight file, spent where they keep most.
        to, base, dtype, include, exclude, alpha, allow_pickle, force, dry_run, jobs, progress: as for `combine`; the
            dtype is by default that of the factors.

    Returns, raises: as `combine`.
    """
    from loramerge.combining import run as combining
    from loramerge.combining.ranks import Ranks

    ranks = Ranks(rank=rank, energy=energy, ratio=ratio, budget=budget)
    if not ranks.stated:
        fix = "give one of rank (--rank N), energy, ratio, budget"
        raise UsageError("usage.rank", "nothing says to which rank", fix=fix)
    options = combining.Options(
        to=to,
        base=None if base is None else str(base),
        dtype=dtype,
        include=include,
        exclude=exclude,
        alpha=alpha,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
        jobs=jobs,
        ranks=ranks,
        padded=True,
    )
    return combining.combine([(adapter, 1.0)], str(out), "linear", {}, options, progress)


@reaching(a="model", b="model")
def diff(
    a: Pathlike,
    b: Pathlike,
    *,
    allow_pickle: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: ProgressCallback | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Compares two checkpoints tensor by tensor: equal, changed (with norms), missing."""
    from loramerge.merging import diff as differ

    read_pickle = pickled.read_header if allow_pickle else None
    return differ.diff(str(a), str(b), read_pickle=read_pickle, include=include, exclude=exclude, progress=progress)


def pull(
    repo: str,
    out: Pathlike | None = None,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Gets the files of a repository that a merge needs, and checks the digest of every one.

    Args:
        repo: `hf://ns/name[@revision][/path]` or `ns/name[@revision]`: a base or an adapter.
        out: a directory to write them to, which appears complete or not at all; None: into the Hub's cache.
        revision: a branch, tag or commit, where `repo` says none.
        include: globs over names of files: these instead of what a merge needs.
        exclude: globs over names of files to leave out.
        allow_pickle: take `.bin`/`.pt` weights where there are no others.
        force: replace an existing `out`.
        dry_run: look and tell, download no weights.
        token: a token of the Hub; by default `HF_TOKEN`, or that of `hf auth login`.
        offline: ask nobody; see that all is in the cache.
        progress: told (bytes done, bytes in all), from this thread.

    Returns:
        `{"schema": 1, "source", "repo", "revision", "commit", "kind", "out", "files", "bytes", "downloaded", ...}`;
        `source` is the reference with its commit, `kind` is `base`, `adapter` or `files`, and each of `files` has
        `name`, `size`, `sha256` (or `git`, its id there) and whether it was `cached`.

    Raises:
        RemoteError: `hub.*`; InputError, UsageError, OutputError.
    """
    from pathlib import Path

    from loramerge.hub import pull as puller

    return puller.pull(
        repo,
        None if out is None else Path(out),
        revision=revision,
        include=include,
        exclude=exclude,
        allow_pickle=allow_pickle,
        force=force,
        dry_run=dry_run,
        token=token,
        offline=offline,
        progress=progress,
    )


def build(
    recipe: Pathlike,
    *,
    locked: bool = False,
    no_lock: bool = False,
    attest: Pathlike | None = None,
    builder_id: str | None = None,
    no_push: bool = False,
    force: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    max_memory: int | None = None,
    on_step: Callable[[str, str], ProgressCallback | None] | None = None,
    token: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Builds the outputs of a recipe: the same bytes every time, and nothing that is there already.

    An output is left alone where the lock says that it was made of these inputs in this way, and its files have the
    digests that the lock has. The others are made one by one, each complete or not at all; the lock is written last.
    What a killed build has made is not made again.

    Args:
        recipe: a TOML file; paths in it are taken from its folder. Its lock is `recipe.lock` beside `recipe.toml`.
        locked: fail if a source, a file, the recipe or a version is not as locked, and let no output appear that is
            not; the lock is not changed, but for digests of outputs that it lacks.
        no_lock: neither read nor write a lock; references to the Hub are looked up again.
        attest: a file for an in-toto statement with SLSA provenance, to be signed.
        builder_id: the URI of who builds, for the statement.
        no_push: publish nothing, whatever the recipe says.
        force: replace outputs that are there and are not from the lock.
        dry_run: check everything, plan the merges, write nothing.
        jobs, max_memory: as for `merge`; the bytes do not depend on them.
        on_step: told an input or an output and what happens to it next: `check`, `build` or `push`. What it gives is
            told (bytes done, bytes in all).
        token, offline: as for `merge`. Offline all that the lock pins is taken from the cache.

    Returns:
        `{"schema": 1, "recipe", "lock", "lock_written", "inputs", "outputs", "built", "numerics", "attestation",
        "notes", ...}`: each of `outputs` has `path`, `to`, `status` (`built`, `current`, and in a dry run `absent`,
        `stale` or `foreign`), `files` (name, size, sha256), `retention`, `notes`, `pushed`.

    Raises:
        InputError: `recipe.*`, with the line, `lock.missing`, `lock.invalid`; MismatchError: `lock.input`,
            `lock.commit`, `lock.version`, `lock.recipe`, `lock.output`; OutputError: `output.*`; and all of `merge`
            and `export`.
    """
    from loramerge.building import build as builder

    settings = builder.Settings(
        locked=locked,
        no_lock=no_lock,
        dry_run=dry_run,
        force=force,
        jobs=jobs,
        max_memory=max_memory,
        attest=None if attest is None else str(attest),
        builder_id=builder_id,
        no_push=no_push,
        token=token,
        offline=offline,
    )
    return builder.build(recipe, settings, __version__, on_step=on_step, push=push)


def lock(
    recipe: Pathlike,
    *,
    dry_run: bool = False,
    token: str | None = None,
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Pins the inputs of a recipe: commits of what is on the Hub, the SHA-256 of every file, versions.

    Args:
        recipe: as for `build`.
        dry_run: look and tell, write nothing.
        token, offline: as for `merge`.
        progress: told (bytes done, bytes in all) of each input, from this thread.

    Returns:
        `{"schema": 1, "recipe", "lock", "written", "new", "changes", "inputs", "outputs", "numerics", ...}`.

    Raises:
        InputError: `recipe.*`, with the line; RemoteError: `hub.*`; OutputError.
    """
    from loramerge.building import locking

    return locking.lock(recipe, __version__, dry_run=dry_run, token=token, offline=offline, progress=progress)


def push(
    source: Pathlike,
    repo: str,
    *,
    revision: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    card: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    with_undo: bool = False,
    prune: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Puts a model or an adapter on the Hub, in one commit that shows all of its files or none.

    Large files are uploaded first, then the commit is made, if the branch is still where it was. What the branch has
    already is not sent, nor is what an interrupted push has uploaded. At the end the Hub is asked what it has.

    Args:
        source: a directory, or one file, which its receipt goes with. Hidden files, what unfinished runs left and the
            undo file stay behind; links are followed to files in the same directory only.
        repo: `ns/name[@branch]`, with `hf://` or without. Created if it is not there: private, unless `public`.
        revision: the branch, where `repo` says none; made from `main` if it is not there.
        public: make a new repository public. One that is there stays as it is.
        create_pr: open a pull request against `main` instead.
        tag: a tag for the commit; one that is there is not moved.
        message: the message of the commit.
        card: `auto`: a README.md is written from the receipt where there is none, or only one that was written so;
            `new`: in any case; `none`: never.
        include, exclude: globs over names of files.
        with_undo: push the undo file, so that whoever pulls can un-merge without the base.
        prune: delete weights in the repository that are not of this model, in the same commit.
        allow_pickle: push pickles, which can run code where they are loaded.
        dry_run: compare and tell, change nothing.
        token: a token of the Hub; by default `HF_TOKEN`, or that of `hf auth login`.
        progress: told (bytes done, bytes in all), from this thread.

    Returns:
        `{"schema": 1, "source", "repo", "branch", "url", "commit", "parent", "pull_request", "created", "private",
        "tag", "files", "deleted", "left", "bytes", "uploaded", "card", ...}`: each of `files` has `name`, `size`,
        whether it was `there` already and whether it was `made` for the push; `left` names what stayed behind, and
        why. `commit` is the one that has all of it, also where nothing had to be sent.

    Raises:
        RemoteError: `hub.*`, among them `hub.stale` (somebody else has pushed), `hub.tag`, and `push.two-models`.
        InputError: `push.empty`, `push.incomplete`, `push.name`, `input.interrupted`, `input.changed`.
        UnsafeError: `push.link`, `push.pickle`. UsageError: `push.path`, `push.revision`, `push.tag`, `push.card`.
    """
    from pathlib import Path

    from loramerge.hub import push as pusher

    return pusher.push(
        Path(source),
        repo,
        revision=revision,
        public=public,
        create_pr=create_pr,
        tag=tag,
        message=message,
        card=card,
        include=include,
        exclude=exclude,
        with_undo=with_undo,
        prune=prune,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        token=token,
        version=__version__,
        progress=progress,
    )
