"""Shared options: a flag is written here once, so that it means the same in every command that takes it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import click

from loramerge import methods
from loramerge.cli.sink import Sink
from loramerge.errors import UsageError
from loramerge.tensors.sizes import parse_size as parse_size

T = TypeVar("T")
Function = Callable[..., Any]

_WEIGHTED = re.compile(r"(.*)=([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(?::\d+)?")


def parse_adapter(text: str) -> tuple[str, float]:
    """``"lora=0.7"`` -> ``("lora", 0.7)``, ``"lora"`` -> ``("lora", 1.0)``.

    The weight is what follows the last `=`, if that is a number; a path that ends so is written ``a=0.5=1``.

    Raises:
        UsageError: ``usage.weight``: no path, or a number too large.
    """
    match = _WEIGHTED.fullmatch(text)
    path, weight = (match[1], float(match[2])) if match else (text, 1.0)
    if not path or not math.isfinite(weight):
        problem = "has no path before its weight" if match and not path else "is no path and weight"
        raise UsageError("usage.weight", f"{text!r} {problem}", fix="write ADAPTER=0.7")
    return path, weight


def parse_flags(text: str) -> tuple[bool, ...]:
    """``"1,0,1"`` -> ``(True, False, True)``.

    Raises:
        UsageError: ``usage.enable-lora``.
    """
    values = {"1": True, "true": True, "0": False, "false": False}
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(part in values for part in parts):
        raise UsageError("usage.enable-lora", f"{text!r} is not a list of 0 and 1", fix="--enable-lora 1,0,1")
    return tuple(values[part] for part in parts)


def parse_device(text: str) -> str:
    """``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: ``usage.device``.
    """
    if not _DEVICE.fullmatch(text):
        raise UsageError("usage.device", f"there is no device {text!r}", fix="--device auto, cpu, cuda, cuda:N or mps")
    return text


class Parsed(click.ParamType, Generic[T]):  # type: ignore[type-arg]  # generic in stubs only, before click 8.5
    """An option's type by one of the functions above."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T | Any:
        return self.parse(value) if isinstance(value, str) else value


SIZE = Parsed("size", parse_size)
ADAPTER = Parsed("adapter", parse_adapter)
FLAGS = Parsed("flags", parse_flags)
DEVICE = Parsed("device", parse_device)


def common(function: Function) -> Function:
    """`--json`, `-q`, `-v`, `--no-progress`: the command gets `sink` for them."""

    @functools.wraps(function)
    def with_sink(*args: Any, json: bool, quiet: bool, verbose: int, no_progress: bool, **kwargs: Any) -> Any:
        if json and quiet:
            raise UsageError("usage.modes", "--json and -q are two forms of the result", fix="give one of them")
        if quiet and verbose:
            raise UsageError("usage.modes", "-q and -v ask for opposite things", fix="give one of them")
        return function(*args, sink=Sink(json, quiet, verbose, not no_progress), **kwargs)

    for option in (
        click.option("--no-progress", is_flag=True, help="Show no progress."),
        click.option("-v", "--verbose", count=True, help="Show more detail."),
        click.option("-q", "--quiet", is_flag=True, help="Print the one value that matters, and no warnings."),
        click.option("--json", is_flag=True, help="Print the result as one JSON document."),
    ):
        with_sink = option(with_sink)
    return with_sink


def token(function: Function) -> Function:
    """`--token`. Stands below `common`: what is found on the way to the Hub is said by its `sink`."""

    @functools.wraps(function)
    def reaching(*args: Any, sink: Sink, token: str | None, **kwargs: Any) -> Any:
        from loramerge.hub.notices import heard_by

        def listen(kind: str, text: str) -> None:
            if kind == "warning":
                sink.warn(text)
            else:
                sink.say("hub", text)

        with heard_by(listen):
            return function(*args, sink=sink, token=token or None, **kwargs)

    made: Function = click.option(
        "--token", metavar="TOKEN", help="A token of the Hub (default: HF_TOKEN, or that of hf auth login)."
    )(reaching)
    return made


def hub(function: Function) -> Function:
    """`--token`, `--offline`, for commands that take sources. Stands below `common`."""
    return token(
        click.option("--offline", is_flag=True, help="Ask nobody: sources on the Hub are taken from the cache.")(
            function
        )
    )


def place(model: str) -> Callable[[Function], Function]:
    """`-o` or `--in-place`, and `--force`: the command gets `out`, which in place is the argument `model` itself."""

    def decorated(function: Function) -> Function:
        @functools.wraps(function)
        def placed(*args: Any, out: str | None, in_place: bool, **kwargs: Any) -> Any:
            if out is None and not in_place:
                fix = f"{click.get_current_context().command_path} --help"
                raise UsageError("usage.missing", "neither -o OUT nor --in-place is given", fix=fix)
            if out is not None and in_place:
                raise UsageError("usage.output", "-o and --in-place ask for opposite things", fix="give one of them")
            return function(*args, out=kwargs[model] if out is None else out, in_place=in_place, **kwargs)

        for option in (
            click.option("--force", is_flag=True, help="Replace OUT if it exists."),
            click.option("--in-place", is_flag=True, help=f"Rewrite what changes in {model.upper()} where it lies."),
            click.option(
                "-o",
                "--out",
                metavar="OUT",
                help="Where to write: a directory, or a .safetensors or .onnx file.",
            ),
        ):
            placed = option(placed)
        return placed

    return decorated


def output(function: Function) -> Function:
    """`-o`, `--force`."""
    function = click.option("--force", is_flag=True, help="Replace OUT if it exists.")(function)
    return click.option(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help="Where to write: a directory, or a .safetensors or .onnx file.",
    )(function)


def selection(function: Function) -> Function:
    """`--include`, `--exclude`."""
    function = click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Leave out the names that match; may be repeated."
    )(function)
    return click.option(
        "--include", multiple=True, metavar="GLOB", help="Take only the names that match; may be repeated."
    )(function)


def allow_pickle(function: Function) -> Function:
    """`--allow-pickle`."""
    return click.option(
        "--allow-pickle", is_flag=True, help="Read .bin, .pt, .pth and .ckpt files too (through weights_only)."
    )(function)


def jobs(function: Function) -> Function:
    """`--jobs`."""
    return click.option(
        "--jobs", type=click.IntRange(min=1), metavar="N", help="Threads to use (default: as many as pay off)."
    )(function)


def max_memory(function: Function) -> Function:
    """`--max-memory`."""
    return click.option("--max-memory", type=SIZE, metavar="SIZE", help="Stay below this much memory, such as 2GB.")(
        function
    )


def arithmetic(function: Function) -> Function:
    """`--dtype`, `--compute-dtype`, `--device`."""
    return click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
        default="keep",
        show_default=True,
        help="Floating-point type of the output; keep: each tensor's own.",
    )(computing(function))


def computing(function: Function) -> Function:
    """`--compute-dtype`, `--device`."""
    function = click.option(
        "--device", type=DEVICE, default="auto", show_default=True, metavar="auto|cpu|cuda[:N]|mps", help="Compute on."
    )(function)
    return click.option(
        "--compute-dtype",
        type=click.Choice(["float32", "float64"]),
        default="float32",
        show_default=True,
        help="Compute in.",
    )(function)


def factor_dtype(default: str) -> Callable[[Function], Function]:
    """`--dtype` of an adapter's factors."""
    return click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
        default=default,
        show_default=True,
        help="Floating-point type of the output; keep: of each module the widest of its factors.",
    )


def adapters(function: Function) -> Function:
    """What says how adapters are to be read: `--alpha` and its like, `--allow-unmatched`, `--tokenizer`."""
    for option in (
        click.option(
            "--tokenizer",
            type=click.Choice(["auto", "base", "adapter"]),
            default="auto",
            show_default=True,
            help="Whose tokenizer to carry; auto: the adapter's if it brings one.",
        ),
        click.option("--allow-unmatched", is_flag=True, help="Let adapter tensors that match nothing in BASE be."),
        click.option(
            "--grouped-experts", is_flag=True, help="B of stacked experts is grouped by expert (some of unsloth)."
        ),
        click.option("--original-base", is_flag=True, help="BASE is the model before training changed it (KaSA)."),
        click.option("--residual-base", is_flag=True, help="BASE is the residual model that the adapter's start left."),
        click.option("--enable-lora", type=FLAGS, metavar="1,0,1", help="Trained parts of a grouped linear."),
        click.option("--alpha", type=float, metavar="N", help="Alpha, where nothing on disk says it."),
    ):
        function = option(function)
    return function


def dry_run(function: Function) -> Function:
    """`--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")(function)


def method(function: Function) -> Function:
    """`--method` and the options of all methods: the command gets its name, and `method_options`, those given."""

    @functools.wraps(function)
    def with_method(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in methods.OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        return function(*args, method_options=given, **kwargs)

    made: Function = with_method
    for option in reversed(list(methods.OPTIONS.values())):
        made = _method_option(option)(made)
    names = ", ".join(methods.METHODS)
    return click.option(
        "--method", default="linear", show_default=True, metavar="METHOD", help=f"How to combine: {names}."
    )(made)


def _method_option(option: methods.Option) -> Callable[[Function], Function]:
    """One option of methods; its help tells which take it, with their defaults."""
    defaults = {m.name: m.options[option.name] for m in methods.METHODS.values() if option.name in m.options}
    if option.type is bool:
        said = ", ".join(f"{name} {'on' if default else 'off'}" for name, default in defaults.items())
        flags = [f"{option.flag}/--no-{option.flag[2:]}"]
    else:
        said = ", ".join(
            name if default is None else f"{name} {default:g}" if isinstance(default, float) else f"{name} {default}"
            for name, default in defaults.items()
        )
        flags = [option.flag, *option.also]
    kind: Any = click.Choice(option.choices) if option.choices else None if option.type is bool else option.type
    metavar = None if option.type is bool else "|".join(option.choices) or ("METHOD" if option.type is str else "X")
    return click.option(*flags, option.name, type=kind, default=None, metavar=metavar, help=f"{option.help} [{said}]")
