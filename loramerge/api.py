"""The public verbs, with the names and defaults of the command line's flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loramerge import __version__, pickled
from loramerge.adapters.adapter import Adapter
from loramerge.adapters.adapter import open_adapter as _open_adapter
from loramerge.merging import run
from loramerge.merging.plan import Plan
from loramerge.merging.receipt import Receipt
from loramerge.merging.run import Adapters, Options, Pathlike
from loramerge.tensors.checkpoint import Checkpoint
from loramerge.tensors.checkpoint import open_checkpoint as _open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

ProgressCallback = Callable[[int, int], None]


def plan_merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike,
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
    link: bool = False,
) -> Plan:
    """What `merge` would do, decided from headers alone. Arguments and errors as `merge`; writes nothing."""
    return run.plan_merge(
        base,
        adapters,
        out,
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
            link=link,
        ),
    )


def merge(
    base: Pathlike | Checkpoint,
    adapters: Adapters,
    out: Pathlike,
    *,
    on_plan: Callable[[Plan], None] | None = None,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> Receipt:
    """Folds adapters into a checkpoint: `W' = W + sum of weight * (alpha / r) * B A`, each rounded once.

    Args:
        base: a directory or file of weights, or what `open_checkpoint` gave.
        adapters: a path, `{path: weight}`, or a list of paths or (path, weight).
        out: a directory, or a `.safetensors` file for one file. Appears complete or not at all.
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
        link: hard-link files that nothing changes instead of copying them.

    Returns:
        the receipt; its `data` is what `out/loramerge.json` holds.

    Raises:
        UsageError, InputError, MismatchError, UnsupportedError, UnsafeError, OutputError: see `loramerge.errors`.
    """
    return run.merge(base, adapters, out, Options(**options), __version__, on_plan, progress)


def verify(
    out: Pathlike,
    *,
    base: Pathlike | None = None,
    adapters: Adapters | None = None,
    allow_pickle: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Checks an output against its receipt; with `base`, replays the merge and compares every tensor.

    Returns:
        `{"schema": 1, "ok", "out", "tensors", "equal", "differ", "files", "replayed"}`.

    Raises:
        InputError: the output or its receipt cannot be read.
    """
    from loramerge.merging import verify as verifier

    return verifier.verify(out, base, adapters, allow_pickle=allow_pickle, jobs=jobs, progress=progress)


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
) -> Adapter:
    """An adapter, from its headers and config."""
    return _open_adapter(
        str(path),
        read_pickle=pickled.read_header if allow_pickle else None,
        alpha=alpha,
        enable_lora=enable_lora,
        residual_base=residual_base,
    )


def inspect(source: Pathlike, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a file or directory is: an adapter or a checkpoint, and all that its headers tell."""
    from loramerge.adapters import describe

    return describe.inspect(str(source), read_pickle=pickled.read_header if allow_pickle else None)


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
