"""The command line as a whole: errors and exit codes, streams, colours, progress, signals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramerge import errors
from loramerge.cli import main, options, sink
from loramerge.cli.sink import Sink
from loramerge.errors import InputError, LoramergeError, MismatchError, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "LORAMERGE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Sink], Any]], None]]:
    """Adds a command `act` to the group that does what it is told."""

    def install(action: Callable[[Sink], Any]) -> None:
        @click.command("act")
        @options.common
        def command(sink: Sink) -> None:
            """Act."""
            action(sink)

        module = ModuleType("act_command")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "act_command", module)
        monkeypatch.setitem(main.COMMANDS, "act", ("act_command", "Act."))

    yield install


def raising(error: BaseException) -> Callable[[Sink], None]:
    def action(sink: Sink) -> None:
        raise error

    return action


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.MismatchError, 3),
        (errors.UnsupportedError, 3),
        (errors.UnsafeError, 3),
        (errors.OutputError, 4),
        (errors.RemoteError, 5),
        (errors.LoramergeError, 1),
    ],
)
def test_each_error_has_its_exit_code(does: Any, capsys: Any, kind: type[LoramergeError], code: int) -> None:
    does(raising(kind("some.code", "something is wrong", fix="do this", file="a/b")))
    assert main.run(["act"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: something is wrong (a/b)\nfix:   do this\n"


def test_one_name_stands_with_the_file_and_several_below(does: Any, capsys: Any) -> None:
    does(raising(MismatchError("x", "no home", fix="look", file="lora", tensors=["a.weight"])))
    main.run(["act"])
    assert capsys.readouterr().err == "error: no home (lora: a.weight)\nfix:   look\n"
    does(raising(MismatchError("x", "no home", fix="look", file="lora", tensors=[f"t{i}" for i in range(8)])))
    main.run(["act"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: no home (lora)", *(f"       t{i}" for i in range(5)), "       and 3 more", "fix:   look"]


def test_what_the_message_says_already_is_not_repeated(does: Any, capsys: Any) -> None:
    does(raising(InputError("x", "'a.b' in out/file is odd", fix="look", file="out/file", tensors=["a.b"])))
    main.run(["act"])
    assert capsys.readouterr().err == "error: 'a.b' in out/file is odd\nfix:   look\n"
    does(raising(InputError("x", "the output has a.b.c", fix="look", file="out", tensors=["a.b"])))
    main.run(["act"])
    assert capsys.readouterr().err == "error: the output has a.b.c (out: a.b)\nfix:   look\n"


def test_control_characters_never_reach_the_terminal(does: Any, capsys: Any) -> None:
    nasty = "a\x1b[31m\n\u202e\udc80"
    does(raising(InputError("x", f"bad {nasty}", fix=nasty, file=nasty, tensors=["k\x07", "l\r"])))
    main.run(["act", "--json"])
    out, err = capsys.readouterr()
    for text in (out, err):
        assert all(c == "\n" or c.isprintable() for c in text)
    assert "\\x1b[31m\\n\\u202e\\udc80" in err
    assert json.loads(out)["error"]["file"] == nasty


def test_the_error_document(does: Any, capsys: Any) -> None:
    does(raising(MismatchError("adapter.unmatched", "no home", fix="other base", file="lora", tensors=["t"])))
    assert main.run(["act", "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "schema": 1,
        "ok": False,
        "error": {
            "code": "adapter.unmatched",
            "message": "no home",
            "file": "lora",
            "tensors": ["t"],
            "hint": "other base",
        },
        "exit_code": 3,
    }
    assert err.startswith("error: no home")


@pytest.mark.parametrize(
    ("arguments", "code", "fix"),
    [
        (["mrege"], "usage.command", "did you mean loramerge merge?"),
        (["xyzzy"], "usage.command", "loramerge --help lists the commands"),
        (["--jsn"], "usage.option", "loramerge --help lists the options"),
        (["merge", "--dtpye", "keep"], "usage.option", "did you mean --dtype?"),
        (["merge", "--xyzzy"], "usage.option", "loramerge merge --help lists the options"),
        (["merge", "base"], "usage.missing", "loramerge merge --help"),
        (["merge", "a", "b"], "usage.missing", "loramerge merge --help"),
        (["merge", "a", "b", "-o", "c", "--dtype", "bf16"], "usage.value", "loramerge merge --help"),
        (["merge", "a", "b", "-o", "c", "--jobs", "0"], "usage.value", "loramerge merge --help"),
        (["merge", "a", "b", "-o", "c", "--max-memory", "2X"], "usage.size", "write it as 2GB, 500MB or 1GiB"),
        (["merge", "a", "=0.5", "-o", "c"], "usage.weight", "write ADAPTER=0.7"),
        (["merge", "a", "b", "-o", "c", "--enable-lora", "1,2"], "usage.enable-lora", "--enable-lora 1,0,1"),
        (["merge", "a", "b", "-o", "c", "--device", "tpu"], "usage.device", None),
        (["merge", "a", "b", "-o", "c", "-q", "-v"], "usage.modes", "give one of them"),
        (["verify"], "usage.missing", "loramerge verify --help"),
        (["verify", "a", "b"], "usage.arguments", "loramerge verify --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors(capsys: Any, arguments: list[str], code: str, fix: str | None) -> None:
    assert main.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 2
    if fix is not None:
        assert err.splitlines()[1] == f"fix:   {fix}"
    quiet = "-q" not in arguments
    if quiet:
        assert main.run([*arguments, "--json"]) == 2
        document = json.loads(capsys.readouterr().out)
        assert document["error"]["code"] == code and document["exit_code"] == 2


def test_json_after_two_dashes_is_a_name(capsys: Any) -> None:
    assert main.run(["verify", "--", "--json"]) == 3
    assert capsys.readouterr().out == ""


def test_json_and_quiet_exclude_one_another(capsys: Any) -> None:
    assert main.run(["verify", "x", "--json", "-q"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage.modes"


def test_an_unexpected_error_is_one_of_our_own(does: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    does(raising(KeyError("oops")))
    assert main.run(["act"]) == 1
    err = capsys.readouterr().err
    assert "error: internal error: KeyError: 'oops'" in err and "report it" in err and "LORAMERGE_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LORAMERGE_DEBUG", "1")
    assert main.run(["act", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err and json.loads(out)["error"]["code"] == "internal"


def test_debug_shows_where_an_expected_error_comes_from(
    does: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMERGE_DEBUG", "1")
    does(raising(InputError("x", "bad")))
    assert main.run(["act"]) == 3
    assert "Traceback" in capsys.readouterr().err


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=repr,
)
def test_out_of_memory_names_its_remedy(does: Any, capsys: Any, error: Exception) -> None:
    does(raising(error))
    assert main.run(["act", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == "memory" and "--max-memory" in document["error"]["hint"]


def test_checked_and_different_is_one_without_an_error(does: Any, capsys: Any) -> None:
    def differs(sink: Sink) -> None:
        sink.result({"ok": False}, ["differs"], "differs")
        raise SystemExit(1)

    does(differs)
    assert main.run(["act"]) == 1
    assert capsys.readouterr() == ("differs\n", "")
    assert main.run(["act", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "ok": False}


def test_no_arguments_show_the_help(capsys: Any) -> None:
    assert main.run([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(name in err for name in main.COMMANDS)


def test_help_and_version(capsys: Any) -> None:
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, line) in main.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.M)
    assert main.run(["merge", "-h"]) == 0
    assert "--allow-unmatched" in capsys.readouterr().out
    assert main.run(["--version"]) == 0
    assert re.fullmatch(r"loramerge \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- signals


def test_ctrl_c_is_one_line(does: Any, capsys: Any) -> None:
    does(raising(KeyboardInterrupt()))
    assert main.run(["act"]) == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")
    assert main.run(["act", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_code"] == 130


SLEEPER = """
import sys, time, types, click, contextlib
from loramerge.cli import main, options
@click.command()
@options.common
def command(sink):
    with sink.progress_bar("x") as progress:
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned", flush=True)
sys.modules["act_command"] = types.SimpleNamespace(command=command)
main.COMMANDS["act"] = ("act_command", "Act.")
sys.exit(main.run(["act"]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=lambda v: str(v)
)
def test_signals_clean_up(number: signal.Signals, code: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert out == "cleaned\n" and len(err.splitlines()) == 1 and err.startswith("error: ")


def test_nohup_is_respected() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.replace("sleep(60)", "sleep(0.5)")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGHUP)
    child.communicate(timeout=30)
    assert child.returncode == 0


def test_signal_handlers_are_put_back(does: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    does(lambda sink: None)
    assert main.run(["act"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------------------------------- streams


def test_a_reader_that_left_is_no_error(cli: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = cli("--help", stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_told(cli: Any) -> None:
    with open("/dev/full", "w") as full:
        done = cli("verify", "nothing", "--json", stdout=full)
        assert done.returncode == 3 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_full_stdout_is_an_output_error(does: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    does(lambda sink: sink.result({}, ["x"], "x"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main.run(["act"]) == 4
        patch.setattr(sys, "stdout", None)
        assert main.run(["act"]) == 4
    assert "No space left" in capsys.readouterr().err


def test_names_beyond_the_encoding_do_not_end_the_run(cli: Any, tmp_path: Path) -> None:
    done = cli("verify", "größe", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 3 and "gr\\xf6\\xdfe" in done.stderr


def test_result_modes(capsys: Any) -> None:
    data, lines = {"out": "m"}, ["merged\x1b", "wrote m"]
    Sink().result(data, lines, "m")
    assert capsys.readouterr() == ("merged\\x1b\nwrote m\n", "")
    Sink(quiet=True).result(data, lines, "m")
    assert capsys.readouterr() == ("m\n", "")
    Sink(json=True).result(data, lines, "m")
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "ok": True, "out": "m"}


def test_say_and_warn(capsys: Any) -> None:
    Sink().say("base", "x")
    Sink().warn("careful")
    assert capsys.readouterr() == ("", "base      x\nwarning: careful\n")
    Sink(json=True).say("base", "x")
    Sink(json=True).warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")
    Sink(quiet=True).say("base", "x")
    Sink(quiet=True).warn("careful")
    assert capsys.readouterr() == ("", "")


def test_tables_are_aligned_and_never_cut() -> None:
    long = "x" * 200
    assert Sink().table([["a", "1", "z"], [long, "10", "\x07"]], header=["name", "n", "what"], align="lrl") == [
        f"{'name':<200}   n  what",
        f"{'a':<200}   1  z",
        f"{long}  10  \\x07",
    ]
    assert Sink().table([]) == []
    assert Sink().table([("a", "1"), ("bb", "22")]) == ["a    1", "bb  22"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "0"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"CI": "true"}, False, False),
        ({"CI": "false"}, True, False),
        ({"CI": "true", "FORCE_COLOR": "1"}, True, True),
    ],
    ids=str,
)
def test_colour_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, pipe: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sink.colour(Terminal()) is terminal
    assert sink.colour(io.StringIO()) is pipe


def test_errors_are_coloured_on_a_terminal_only(does: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    does(raising(InputError("x", "bad\x1b", fix="do")))
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    main.run(["act"])
    assert stream.getvalue() == "\x1b[31merror:\x1b[0m bad\\x1b\n\x1b[1mfix:  \x1b[0m do\n"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    main.run(["act"])
    assert "\x1b" not in stream.getvalue()


# ------------------------------------------------------------------------------------------------ progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock:
        now = 1000.0

    monkeypatch.setattr(sink.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_bar_is_redrawn_ten_times_a_second_and_erased(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(sink, "_columns", lambda: 80)
    gb = 10**9
    with Sink().progress_bar("merge") as progress:
        for tick in range(101):
            progress(tick * gb // 40, int(2.5 * gb))
            clock.now += 0.02
    text = stream.getvalue()
    frames = text.split("\r")[1:]
    assert 15 <= len(frames) <= 23
    assert all(len(re.sub(r"\x1b\[K", "", f).split("\n")[0]) < 80 for f in frames)
    assert re.search(r"merge  4\d % █+░+ 1\.\d/2\.5 GB  1\.2\d* GB/s  1 s left", text)
    assert text.endswith("\r\x1b[K")


def test_a_bar_makes_way_for_a_line(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    target = Sink()
    with target.progress_bar("merge") as progress:
        progress(1, 2)
        target.warn("careful")
    assert "\x1b[K\r\x1b[K\x1b[33mwarning:" in stream.getvalue()


def test_bars_without_unicode(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal("iso-8859-1"))
    monkeypatch.setattr(sink, "_columns", lambda: 80)
    with Sink().progress_bar("merge") as progress:
        progress(1, 2)
    assert stream.getvalue().isascii() and "###---" in stream.getvalue()


@pytest.mark.parametrize("columns", [1, 10, 20, 40])
def test_narrow_terminals(clock: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(sink, "_columns", lambda: columns)
    with Sink().progress_bar("merge") as progress:
        progress(1, 2)
    first = stream.getvalue().split("\r")[1].removesuffix("\x1b[K")
    assert len(first) < columns


def test_lines_in_a_pipe(clock: Any, capsys: Any) -> None:
    gb = 10**9
    with Sink().progress_bar("merge") as progress:
        for second in range(0, 101):  # 1 % a second
            progress(second * gb, 100 * gb)
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[3] == "merge 40 %  40.0/100.0 GB  1 GB/s  1 min 0 s left"


def test_a_short_job_in_a_pipe_is_silent(clock: Any, capsys: Any) -> None:
    with Sink().progress_bar("merge") as progress:
        for tick in range(11):
            progress(tick, 10)
            clock.now += 0.05
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", [Sink(quiet=True), Sink(json=True), Sink(progress=False)], ids=repr)
def test_no_progress_in_a_pipe_where_none_is_wanted(clock: Any, capsys: Any, target: Sink) -> None:
    with target.progress_bar("merge") as progress:
        for tick in range(100):
            progress(tick, 100)
            clock.now += 1
    assert capsys.readouterr().err == ""


def test_no_progress_on_a_terminal(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with Sink(progress=False).progress_bar("merge") as progress:
        progress(1, 2)
    assert stream.getvalue() == ""


def test_a_job_of_no_bytes(clock: Any, capsys: Any) -> None:
    with Sink().progress_bar("merge") as progress:
        progress(0, 0)
        clock.now += 20
        progress(0, 0)


def test_a_real_terminal_sees_the_bar_and_then_not() -> None:
    script = """
import time
from loramerge.cli.sink import Sink
with Sink().progress_bar("merge") as progress:
    for i in range(5):
        progress(i * 10**6, 4 * 10**6); time.sleep(0.12)
Sink().result({}, ["done"], "")
"""
    parent, child = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")} | {"TERM": "xterm", "PYTHONUTF8": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=child, stderr=child, env=env)
    os.close(child)
    seen = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    process.wait(30)
    os.close(parent)
    text = seen.decode()
    assert "merge  50 %" in text and text.endswith("\r\x1b[Kdone\r\n")


# ------------------------------------------------------------------------------------- values of the flags


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GB", 2 * 10**9),
        ("500MB", 5 * 10**8),
        ("1GiB", 2**30),
        ("1.5 gb", 15 * 10**8),
        ("4096", 4096),
        ("4096B", 4096),
        ("2G", 2 * 10**9),
        (".5kB", 500),
        ("1TiB", 2**40),
        (" 3 KiB ", 3072),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert options.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "2X", "0", "0.1", "1iB", "1 2GB", "nan", "9999999999TB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse_size(text)
    assert caught.value.code == "usage.size"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora", ("lora", 1.0)),
        ("lora=0.7", ("lora", 0.7)),
        ("lora=-0.2", ("lora", -0.2)),
        ("lora=+1", ("lora", 1.0)),
        ("lora=1e-3", ("lora", 1e-3)),
        ("lora=.5", ("lora", 0.5)),
        ("lora=2.", ("lora", 2.0)),
        ("a=0.5=1", ("a=0.5", 1.0)),
        ("a=b", ("a=b", 1.0)),
        ("a=b=0.5", ("a=b", 0.5)),
        ("a=nan", ("a=nan", 1.0)),
        ("a=", ("a=", 1.0)),
        ("a=0x1", ("a=0x1", 1.0)),
        ("a= 1", ("a= 1", 1.0)),
        ("with space/lo\nra=0", ("with space/lo\nra", 0.0)),
    ],
)
def test_adapters_and_weights(text: str, expected: tuple[str, float]) -> None:
    assert options.parse_adapter(text) == expected


@pytest.mark.parametrize("text", ["=0.5", "", "a=1e999"])
def test_weights_without_a_path(text: str) -> None:
    with pytest.raises(UsageError):
        options.parse_adapter(text)


@given(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False))
def test_any_path_takes_any_weight(path: str, weight: float) -> None:
    assert options.parse_adapter(f"{path}={weight!r}") == (path, weight)


@given(st.text())
def test_printable_text_is_printable_and_otherwise_itself(text: str) -> None:
    shown = sink.printable(text)
    assert shown.isprintable() or not shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_470_000_000, "2.47 GB"), (999_999, "1 MB"), (10**15, "1 PB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert sink.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.04 s"), (2.14, "2.1 s"), (9.97, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7440, "2 h 4 min")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert sink.duration(seconds) == text


def test_lists_of_flags() -> None:
    assert options.parse_flags("1,0, true") == (True, False, True)
