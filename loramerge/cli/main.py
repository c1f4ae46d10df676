"""The command group, the console entry, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from loramerge import __version__
from loramerge.cli.sink import SCHEMA, Sink, write_json
from loramerge.errors import LoramergeError, UsageError

PROGRAM = "loramerge"

# Name -> (module, first line of its help), so that listing the commands imports none of them.
COMMANDS = {
    "merge": ("loramerge.cli.merge", "Merge adapters into a checkpoint."),
    "unmerge": ("loramerge.cli.unmerge", "Take out of a model what was merged into it."),
    "switch": ("loramerge.cli.switch", "Merge other adapters instead of those in a model."),
    "recover": ("loramerge.cli.recover", "Finish a run in place that was interrupted."),
    "combine": ("loramerge.cli.combine", "Make one adapter of several."),
    "resize": ("loramerge.cli.resize", "Bring an adapter to other ranks."),
    "convert": ("loramerge.cli.convert", "Write an adapter in another dialect."),
    "extract": ("loramerge.cli.extract", "Make an adapter of what a full fine-tune changed."),
    "export": ("loramerge.cli.export", "Export a model to ONNX, adapters merged on the way."),
    "verify": ("loramerge.cli.verify", "Check an output against its receipt, or replay its merge."),
    "inspect": ("loramerge.cli.inspect", "Tell what a file or directory is."),
    "analyze": ("loramerge.cli.analyze", "Tell what adapters do, from their factors."),
    "diff": ("loramerge.cli.diff", "Compare two checkpoints tensor by tensor."),
    "build": ("loramerge.cli.build", "Build the outputs of a recipe, the same bytes every time."),
    "lock": ("loramerge.cli.lock", "Pin the inputs of a recipe."),
    "pull": ("loramerge.cli.pull", "Get a base or an adapter from the Hub, checked."),
    "push": ("loramerge.cli.push", "Put a model or an adapter on the Hub, in one commit."),
    "doctor": ("loramerge.cli.doctor", "Check this machine and this installation."),
    "demo": ("loramerge.cli.demo", "Make a tiny model, merge two adapters into it, verify the result."),
}

INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class LazyGroup(click.Group):
    """Commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = _nearest(args[0], COMMANDS)
            fix = f"did you mean {PROGRAM} {near}?" if near else f"{PROGRAM} --help lists the commands"
            raise UsageError("usage.command", f"there is no command {args[0]!r}", fix=fix)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Merge LoRA adapters into model checkpoints: exactly, at the speed of copying, in bounded memory."""


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (the console entry).

    0 done; 1 checked and different, or an error of our own; 2 usage; 3 input; 4 output; 5 the Hub;
    130, 143 and 129 after SIGINT, SIGTERM and SIGHUP; 141 where the reader of our output has gone away.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _tolerate_any_text()
    if args is None and f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        cli.main(prog_name=PROGRAM)
    code = 0
    try:
        with _signals_raise():
            code = _guarded(arguments)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except BrokenPipeError:
        _forget_streams()
        return CLOSED_PIPE
    except KeyboardInterrupt:  # a second one, during the clean-up after the first
        return INTERRUPTED
    except OSError:  # stdout could not be written to the end, which has been reported
        _forget_streams()
        return code or 4
    return code


def _guarded(arguments: list[str]) -> int:
    """Runs a command; every way to fail is reported here."""
    json = "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments
    try:
        return _invoke(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        raise
    except LoramergeError as error:
        return _report(error, error.exit_code, json)
    except click.UsageError as error:
        return _report(_usage(error), UsageError.exit_code, json)
    except click.ClickException as error:
        return _report(UsageError("usage.value", _sentence(error.format_message())), UsageError.exit_code, json)
    except (KeyboardInterrupt, click.Abort):
        return _report(LoramergeError("interrupted", "interrupted"), INTERRUPTED, json)
    except _Stopped as stop:
        name = signal.Signals(stop.number).name
        return _report(LoramergeError("stopped", f"stopped by {name}"), 128 + stop.number, json)
    except Exception as error:
        return _report(_unexpected(error), 1, json)


def _invoke(arguments: list[str]) -> int:
    if not arguments:
        with cli.make_context(PROGRAM, ["--help"], resilient_parsing=True) as ctx:
            click.echo(cli.get_help(ctx), err=True)
        return UsageError.exit_code
    try:
        with cli.make_context(PROGRAM, arguments) as ctx:
            cli.invoke(ctx)
    except click.exceptions.Exit as stop:  # --help, --version
        return stop.exit_code
    return 0


def _report(error: LoramergeError, code: int, json: bool) -> int:
    if os.environ.get("LORAMERGE_DEBUG") == "1":
        traceback.print_exc()
    Sink().error(error)
    if json:
        details = {
            "code": error.code,
            "message": error.message,
            "file": error.file,
            "tensors": list(error.tensors),
            "hint": error.fix or None,
        }
        with contextlib.suppress(LoramergeError):  # stdout cannot be written: the message above has to do
            write_json({"schema": SCHEMA, "ok": False, "error": details, "exit_code": code})
    return code


def _usage(error: click.UsageError) -> UsageError:
    """click's complaint in our words: what is wrong, and the nearest thing that would be right."""
    command = error.ctx.command_path if error.ctx is not None else PROGRAM
    fix = f"{command} --help"
    if isinstance(error, click.NoSuchOption):
        known = [name for p in error.ctx.command.params for name in p.opts] if error.ctx is not None else []
        near = _nearest(error.option_name, known)
        fix = f"did you mean {near}?" if near else f"{fix} lists the options"
        return UsageError("usage.option", f"{command} has no option {error.option_name!r}", fix=fix)
    if isinstance(error, click.MissingParameter):
        return UsageError("usage.missing", _sentence(error.format_message()), fix=fix)
    if isinstance(error, click.BadParameter):
        return UsageError("usage.value", _sentence(error.format_message()), fix=fix)
    return UsageError("usage.arguments", _sentence(error.format_message()), fix=fix)


def _sentence(text: str) -> str:
    """In the manner of our messages: one line, no capital, no full stop."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _nearest(word: str, known: Any) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, 1)), None)


def _unexpected(error: Exception) -> LoramergeError:
    """What no part of the program foresaw. torch tells that memory is out by a RuntimeError of its own."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return LoramergeError("memory", "out of memory", fix="--max-memory SIZE or --jobs 1 takes less")
    fix = f"please report it{_tracker()}, with what the same command prints under LORAMERGE_DEBUG=1"
    return LoramergeError("internal", f"internal error: {text[:500]}", fix=fix)


def _tracker() -> str:
    """Where to report: what the package itself says."""
    from importlib.metadata import PackageNotFoundError, metadata

    with contextlib.suppress(PackageNotFoundError):
        for entry in metadata(PROGRAM).get_all("Project-URL") or []:
            label, _, url = entry.partition(",")
            if label.strip().lower() in ("issues", "bug tracker", "tracker"):
                return f" at {url.strip()}"
    return ""


class _Stopped(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that context managers clean up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise in the main thread. A signal that the parent has us ignore (nohup) stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # the clean-up is under way: asking again changes nothing
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in old.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in old.items():
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def _tolerate_any_text() -> None:
    """Names that a stream's encoding cannot express must not end the run: bytes come out as they came in."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            utf8 = (getattr(stream, "encoding", "") or "").lower().replace("-", "") == "utf8"
            reconfigure(errors=errors if utf8 else "backslashreplace")


def _forget_streams() -> None:
    """Nobody reads any more: what is still buffered goes nowhere, instead of failing again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.dup2(nowhere, number)
    os.close(nowhere)
