"""The public verbs, with the names and defaults of the command line's flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge import __version__, pickled
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.opening import open_adapter as _open_adapter
from loramerge.errors import UsageError
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
        ),
    )


def merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Receipt:
    """Folds adapters into a checkpoint: `W' = W + sum of weight * (alpha / r) * B A`, each rounded once.

    Args:
        base: a directory or file of weights, or what `open_checkpoint` gave.
        adapters: a path, `{path: weight}`, or a list of paths or (path, weight).
        out: a directory, or a `.safetensors` file for one file. Appears complete or not at all. None with `in_place`.
        on_plan: told the plan before work begins.
        progress: told (bytes done, bytes in all), about ten times a second, from this thread.
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

    Returns:
        the receipt; its `data` is what `out/loramerge.json` holds.

    Raises:
        UsageError, InputError, MismatchError, UnsupportedError, UnsafeError, OutputError: see `loramerge.errors`.
    """
    chosen = Options(**options)
    return run.merge(base, adapters, _place(base, out, chosen.in_place), chosen, __version__, on_plan, progress)


def unmerge(
    merged: Pathlike,
    out: Pathlike | None,
    adapters: Adapters = (),
    *,
    base: Pathlike | None = None,
    inexact: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
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


def plan_unmerge(
    merged: Pathlike,
    out: Pathlike | None,
    adapters: Adapters = (),
    *,
    base: Pathlike | None = None,
    inexact: bool = False,
    **options: Any,
) -> Plan:
    """What `unmerge` would do, decided from headers alone. Arguments and errors as `unmerge`; writes nothing."""
    from loramerge.merging import unmerge as back

    chosen = Options(**options)
    place = _place(merged, out, chosen.in_place)
    prepared = back.prepare_unmerge(merged, run.weighted(adapters), place, chosen, base, inexact)
    prepared.close()
    return prepared.plan


def switch(
    merged: Pathlike,
    adapters: Adapters,
    out: Pathlike | None,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
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


def plan_switch(merged: Pathlike, adapters: Adapters, out: Pathlike | None, **options: Any) -> Plan:
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


def verify(
    out: Pathlike,
    *,
    base: Pathlike | None = None,
    adapters: Adapters | None = None,
    undo: bool = False,
    allow_pickle: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
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
) -> dict[str, Tensor]:
    """The same merge for a state dict in memory, on the devices where its tensors are.

    Args:
        tensors: name -> tensor; nothing of it is changed, untouched tensors are shared with the result.
        config: the model's config as a dict, where names and shapes do not tell (tied heads, Conv1D).

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
    )
    return memory.merge_tensors(tensors, adapters, config, options)


def open_checkpoint(path: Pathlike, *, allow_pickle: bool = False) -> Checkpoint:
    """A checkpoint, from its headers."""
    return _open_checkpoint(str(path), read_pickle=pickled.read_header if allow_pickle else None)


def open_adapter(
    path: Pathlike,
    *,
    allow_pickle: bool = False,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    residual_base: bool = False,
    original_base: bool = False,
    grouped_experts: bool = False,
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


def inspect(source: Pathlike, *, allow_pickle: bool = False) -> dict[str, Any]:
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
) -> dict[str, Any]:
    """Writes an adapter in another dialect, exactly where the dialect can hold it.

    Args:
        adapter: the adapter's file or directory.
        out: a directory or a file, as the target's files are.
        to: a dialect of `formats/adapters/` with a `[write]` table, or a server of `formats/servers/`.
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


def diff(
    a: Pathlike,
    b: Pathlike,
    *,
    allow_pickle: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Compares two checkpoints tensor by tensor: equal, changed (with norms), missing."""
    from loramerge.merging import diff as differ

    read_pickle = pickled.read_header if allow_pickle else None
    return differ.diff(str(a), str(b), read_pickle=read_pickle, include=include, exclude=exclude, progress=progress)
