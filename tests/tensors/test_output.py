"""Outputs are all or nothing: refused before the first byte, absent, old or complete after any end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from loramerge.errors import OutputError, UsageError
from loramerge.tensors import output
from loramerge.tensors.output import Output, What, check_destination, check_space, sweep
from loramerge.tensors.writer import write_small_file

ROOT = Path(output.__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="tested on POSIX")

WITHOUT_RENAMEAT2 = """
import errno
from loramerge.tensors import output
def enosys(*args):
    raise OSError(errno.ENOSYS, "no")
output._renameat2 = enosys
"""


@pytest.fixture(params=["renameat2", "plain", "plain, no links"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the kernel's atomic exchange, without it, and without hard links either."""

    def enosys(*args: object) -> int:
        raise OSError(errno.ENOSYS, "no")

    if request.param == "renameat2":
        if output._renameat2 is None:
            pytest.skip("no renameat2 here")
    else:
        monkeypatch.setattr(output, "_renameat2", enosys)
    if request.param == "plain, no links":
        monkeypatch.setattr(os, "link", enosys)
    return str(request.param)


def python(code: str, *args: object, wait: bool = True) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if wait:
        process.wait(60)
    return process


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def make_model(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).write_text(f"old {name}")
    return folder


def code_of(dest: Path, inputs: list[Path], what: What = "directory", force: bool = True) -> str:
    try:
        check_destination(dest, inputs=inputs, force=force, what=what)
    except (OutputError, UsageError) as exc:
        assert exc.message and exc.fix
        return exc.code
    return "fine"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -------------------------------------------------------------------------------------------------- checks


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    model = make_model(tmp_path / "out")
    (tmp_path / "f").write_bytes(b"")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    assert code_of(model, [], force=False) == "output.exists"
    assert code_of(model, []) == "fine"
    assert code_of(tmp_path / "f", [], "file", force=False) == "output.exists"
    assert code_of(tmp_path / "f", [], "file") == "fine"
    assert code_of(tmp_path / "dangling", [], "file", force=False) == "output.exists"
    assert code_of(tmp_path / "new", [], force=False) == "fine"


def test_the_output_is_never_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "models" / "base")
    lora = tmp_path / "models" / "lora.safetensors"
    lora.write_bytes(b"x")
    os.symlink(base, tmp_path / "link")
    os.symlink(tmp_path / "models", tmp_path / "around")
    os.symlink(lora, tmp_path / "lora-link")
    monkeypatch.chdir(tmp_path / "models")
    refused = [
        (base, [base], "directory"),  # equal, in many spellings
        (Path("base"), [base], "directory"),
        (Path("../models/base"), [Path("base")], "directory"),
        (tmp_path / "link", [base], "directory"),
        (base, [tmp_path / "link"], "directory"),
        (tmp_path / "around" / "base", [Path("base")], "directory"),
        (lora, [base, lora], "file"),
        (Path("lora.safetensors"), [tmp_path / "lora-link"], "file"),
        (tmp_path / "lora-link", [lora], "file"),
        (base / "out", [base], "directory"),  # inside
        (base / "model-2.safetensors", [base], "file"),
        (tmp_path / "link" / "out", [base], "directory"),
        (Path("base/out"), [tmp_path / "link"], "directory"),
        (tmp_path / "models", [base], "directory"),  # around
        (tmp_path / "models", [lora], "directory"),
        (Path("."), [Path("base/model.safetensors")], "directory"),
        (tmp_path / "around", [Path("lora.safetensors")], "directory"),
    ]
    for dest, inputs, what in refused:
        for force in (False, True):
            assert code_of(dest, inputs, what, force) == "output.is-input", (dest, inputs)  # type: ignore[arg-type]
    assert code_of(tmp_path / "models" / "merged.safetensors", [base, lora], "file") == "fine"
    assert code_of(tmp_path / "models" / "merged", [base, lora]) == "fine"
    assert code_of(tmp_path / "models" / "base2", [base, tmp_path / "missing"]) == "fine"


def test_links_that_lead_into_the_output_count(tmp_path: Path) -> None:
    """As the Hub cache has them: a model directory full of links."""
    out = make_model(tmp_path / "out")
    base = tmp_path / "base"
    base.mkdir()
    os.symlink(out / "model.safetensors", base / "model.safetensors")
    assert code_of(out, [base]) == "output.is-input"
    assert code_of(out / "model.safetensors", [base], "file") == "output.is-input"

    inner = make_model(tmp_path / "holds-link")
    os.symlink(base, inner / "base")
    assert code_of(inner, [inner / "base"]) == "output.is-input"
    assert code_of(inner, [inner / "base" / "model.safetensors"]) == "output.is-input"
    assert code_of(inner, [base]) == "fine"


def test_a_hard_link_to_an_input_is_the_input(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")
    assert code_of(tmp_path / "b", [tmp_path / "a"], "file") == "output.is-input"


def test_the_parent_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    for dest in (tmp_path / "no such" / "out", tmp_path / "f" / "out"):
        assert code_of(dest, []) == "output.no-parent"
    with pytest.raises(OutputError) as info:
        check_destination(tmp_path / "no such" / "out", inputs=[], force=False, what="file")
    assert info.value.fix == f"mkdir -p '{tmp_path}/no such'"


def test_kinds_must_agree(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    os.symlink(model, tmp_path / "dir-link")
    os.symlink(tmp_path / "file", tmp_path / "file-link")
    with socket.socket(socket.AF_UNIX) as sock:
        cwd = os.getcwd()
        os.chdir(tmp_path)  # the names of sockets are short
        sock.bind("socket")
        os.chdir(cwd)
    wrong: list[tuple[str, What]] = [("model", "file"), ("file", "directory")]
    wrong += [(n, "file") for n in ("fifo", "socket", "file-link", "dir-link")]
    wrong += [(n, "directory") for n in ("fifo", "socket", "file-link", "dir-link")]
    for name, what in wrong:
        assert code_of(tmp_path / name, [], what) == "output.kind", name
    assert code_of(Path("/dev/null"), [], "file") == "output.kind"


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([], "fine"),
        (["loramerge.json"], "fine"),
        (["config.json", "notes.txt"], "fine"),
        (["adapter_config.json"], "fine"),
        (["model_index.json"], "fine"),
        (["adapter.safetensors"], "fine"),
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], "fine"),
        (["thesis.tex"], "output.not-a-model"),
        (["a.safetensors", "b.safetensors"], "output.not-a-model"),
    ],
)
def test_force_deletes_models_only(tmp_path: Path, files: list[str], code: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("x")
    assert code_of(folder, []) == code


def test_force_never_deletes_home_cwd_or_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_model(tmp_path / "home")
    work = make_model(tmp_path / "work")
    make_model(work / "deep")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work / "deep")
    for dest in (home, work, work / "deep", Path("."), Path(".."), Path("/"), Path("/proc")):
        assert code_of(dest, []) == "output.not-a-model", dest
    assert names(home) == ["config.json", "model.safetensors"]


def test_odd_names(tmp_path: Path) -> None:
    assert code_of(Path("a\0b"), []) == "output.name"
    assert code_of(tmp_path / ("x" * 300), [], force=False) == "output.io"


def test_places_without_permission(tmp_path: Path) -> None:
    """Also as root: in a process of somebody else's."""
    code = """
import os, sys
from pathlib import Path
from loramerge.errors import OutputError
from loramerge.tensors.output import Output, check_destination
folder = Path(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)
for dest in (folder / "new", folder / "model"):
    try:
        check_destination(dest, inputs=[], force=True, what="directory")
    except OutputError as exc:
        print(exc.code)
    try:
        with Output(dest, "directory", True):
            print("entered")
    except OutputError as exc:
        print(exc.code)
"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        folder.chmod(0o555)
        assert said(python(code, folder)).split() == ["output.permission"] * 4
        folder.chmod(0o755)
        assert names(folder) == ["model"]


def test_space_is_checked_with_numbers(tmp_path: Path) -> None:
    check_space(tmp_path / "out", 1000)
    with pytest.raises(OutputError) as info:
        check_space(tmp_path / "out", 1 << 60)
    assert info.value.code == "output.no-space"
    assert "1152921504.61 GB" in info.value.message
    with pytest.raises(OutputError) as info:
        check_space(tmp_path / "missing" / "out", 1)
    assert info.value.code == "output.io"


# -------------------------------------------------------------------------------------------------- outputs


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    write_small_file(folder / "config.json", text.encode())
    write_small_file(folder / "sub" / "w.safetensors", text.encode())


@pytest.mark.usefixtures("renames")
def test_a_new_directory(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    with Output(dest, "directory", False) as out:
        assert out.directory.parent == tmp_path
        assert re.fullmatch(r"out\.partial-[0-9a-f]{8}-\d+-\d+-[0-9a-f]{8}", out.directory.name)
        fill(out.directory, "new")
        assert not dest.exists()
        out.commit()
        assert names(tmp_path) == ["out"]
    assert (dest / "sub" / "w.safetensors").read_text() == "new"
    assert out.leftover is None
    with pytest.raises(ValueError, match="open"):
        _ = out.directory


@pytest.mark.usefixtures("renames")
def test_force_replaces_a_directory_and_keeps_its_mode(tmp_path: Path) -> None:
    dest = make_model(tmp_path / "out")
    dest.chmod(0o2750)
    with Output(dest, "directory", True) as out:
        fill(out.directory, "new")
        assert (dest / "config.json").read_text() == "old config.json"
        out.commit()
    assert names(tmp_path) == ["out"]
    assert names(dest) == ["config.json", "sub"]
    assert stat.S_IMODE(dest.stat().st_mode) == 0o2750


@pytest.mark.usefixtures("renames")
def test_a_file_with_companions(tmp_path: Path) -> None:
    dest = tmp_path / "m.safetensors"
    companions = ["m.safetensors.loramerge.json", "m.safetensors.undo"]

    def write(text: str, force: bool, built: list[str]) -> None:
        with Output(dest, "file", force, companions) as out:
            for name in ["m.safetensors", *built]:
                write_small_file(out.directory / name, text.encode())
            out.commit()

    write("one", False, companions)
    assert names(tmp_path) == ["m.safetensors", *companions]
    dest.chmod(0o640)
    write("two", True, companions)
    assert {(tmp_path / n).read_text() for n in names(tmp_path)} == {"two"}
    assert stat.S_IMODE(dest.stat().st_mode) == 0o640
    # An undo file of the old output would be wrong for the new one.
    write("three", True, companions[:1])
    assert names(tmp_path) == ["m.safetensors", companions[0]]
    # A companion without its file is what a kill between the renames leaves: no reason to refuse.
    dest.unlink()
    write("four", False, companions)
    assert {(tmp_path / n).read_text() for n in names(tmp_path)} == {"four"}


@pytest.mark.usefixtures("renames")
def test_companions_of_long_names_do_not_mix(tmp_path: Path) -> None:
    stem = "m" * 200
    built = [stem, f"{stem}.loramerge.json", f"{stem}.undo"]
    for name in built:
        (tmp_path / name).write_text(f"old {name}")
    with pytest.raises(OutputError), Output(tmp_path / stem, "file", True, built[1:]) as out:
        for name in built[1:]:
            write_small_file(out.directory / name, b"new")
        (out.directory / stem).mkdir()  # cannot replace a file
        out.commit()
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {n: f"old {n}" for n in built}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OutputError])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_an_exception_leaves_what_was(tmp_path: Path, what: What, error: type[BaseException]) -> None:
    outside = make_model(tmp_path / "outside")
    args = ("x", "y") if error is OutputError else ()
    with pytest.raises(error), Output(tmp_path / "out", what, False) as out:
        (out.directory / "half").write_text("x")
        os.symlink(outside, out.directory / "link")
        raise error(*args)
    assert names(tmp_path) == ["outside"]
    assert names(outside) == ["config.json", "model.safetensors"]
    with Output(tmp_path / "out", what, False) as out:
        (out.directory / "half").write_text("no commit")
    assert names(tmp_path) == ["outside"]


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_somebody_else_was_faster(tmp_path: Path, what: What) -> None:
    dest = tmp_path / "out"
    with pytest.raises(OutputError) as info, Output(dest, what, False, ["out.json"]) as out:
        for name in ("out", "out.json"):
            write_small_file(out.directory / name, b"slow")
        # Just before the rename: after the look whether the place is free.
        original = output.fsync_path

        def faster(path: Path) -> None:
            original(path)
            if not dest.exists():
                if what == "file":
                    dest.write_bytes(b"fast")
                else:
                    make_model(dest)

        output.fsync_path = faster  # type: ignore[attr-defined]
        try:
            out.commit()
        finally:
            output.fsync_path = original  # type: ignore[attr-defined]
    assert info.value.code == "output.exists"
    assert names(tmp_path) == ["out"]
    assert dest.read_bytes() == b"fast" if what == "file" else (dest / "config.json").exists()


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_failed_last_rename_changes_nothing(tmp_path: Path, what: What, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "out"
    if what == "file":
        dest.write_text("old")
    else:
        make_model(dest)
    (tmp_path / "out.json").write_text("old receipt")
    with pytest.raises(OutputError) as info, Output(dest, what, True, ["out.json"]) as out:
        for name in ("out", "out.json"):
            write_small_file(out.directory / name, b"new")

        def fail(function: str) -> None:
            real = getattr(os, function)

            def failing(source: Path, target: Path) -> None:
                if Path(target) == dest and ".old-" not in str(source):
                    raise OSError(errno.EIO, "no")
                real(source, target)

            monkeypatch.setattr(os, function, failing)

        fail("rename")
        fail("replace")
        if what == "directory":
            monkeypatch.setattr(output, "_rename2", lambda *args: False)
        out.commit()
    assert info.value.code == "output.io"
    assert names(tmp_path) == ["out", "out.json"]
    assert "old" in (dest if what == "file" else dest / "config.json").read_text()
    assert (tmp_path / "out.json").read_text() == "old receipt"


def test_what_has_become_of_the_destination_is_looked_at_again(tmp_path: Path) -> None:
    dest = make_model(tmp_path / "out")
    with pytest.raises(OutputError) as info, Output(dest, "directory", True) as out:
        fill(out.directory, "new")
        shutil.rmtree(dest)
        dest.mkdir()
        (dest / "thesis.tex").write_text("precious")
        out.commit()
    assert info.value.code == "output.not-a-model"
    assert names(tmp_path) == ["out"]
    assert names(dest) == ["thesis.tex"]


@pytest.mark.usefixtures("renames")
def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Output(Path("out"), "directory", False) as out:
        fill(out.directory, "new")
        os.chdir("elsewhere")
        out.commit()
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("name", ["x" * 250, "\u00fc" * 125, "ends.partial-", "sp ace\n[*]\u00e9"])
def test_long_and_odd_names(tmp_path: Path, name: str) -> None:
    left = tmp_path / (output._stem(tmp_path / name) + f".partial-{output._host_hash()}-{dead_pid()}-7-01234567")
    left.mkdir()
    with Output(tmp_path / name, "directory", False) as out:
        assert not left.exists(), "swept"
        assert len(os.fsencode(out.directory.name)) <= 255
        out.directory.name.encode()
        fill(out.directory, "new")
        out.commit()
    assert names(tmp_path) == [name]


def test_a_name_too_long_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError), Output(tmp_path / ("x" * 256), "directory", False) as out:
        out.commit()
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    code = """
import os, sys
from pathlib import Path
from loramerge.tensors.output import Output
from loramerge.tensors.writer import FileWriter, write_small_file
os.umask(int(sys.argv[2]))
folder = Path(sys.argv[1])
with Output(folder / "d", "directory", False) as out:
    out.commit()
with Output(folder / "f", "file", False, ["f.json"]) as out:
    with FileWriter(out.directory / "f", 10):
        pass
    write_small_file(out.directory / "f.json", b"{}")
    out.commit()
"""
    said(python(code, tmp_path, mask))
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes == {"d": 0o777 & ~mask, "f": 0o666 & ~mask, "f.json": 0o666 & ~mask}


# -------------------------------------------------------------------------------------------------- kills


def test_only_the_partials_of_the_dead_are_swept(tmp_path: Path) -> None:
    host, me = output._host_hash(), os.getpid()
    ticks = output._process(me)[1] if output._process(me) else 0  # type: ignore[index]
    dead = dead_pid()
    swept = [f"out.partial-{host}-{dead}-5-aaaaaaaa", f"out.partial-{host}-{4_999_999_999}-5-aaaaaaaa"]
    if ticks:
        swept.append(f"out.partial-{host}-{me}-{ticks + 1}-aaaaaaaa")  # the number is somebody else's now
    kept = [
        f"out.partial-{host}-{me}-{ticks}-aaaaaaaa",
        f"out.partial-{host}-{me}-0-aaaaaaaa",
        f"out.partial-00000000-{dead}-5-aaaaaaaa",
        f"out2.partial-{host}-{dead}-5-aaaaaaaa",
        f"out.partial-{host}-{dead}-5-aaaaaaaa.txt",
        "out.partial-mine",
    ]
    for name in swept + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("x")
    outside = make_model(tmp_path / "outside")
    os.symlink(outside, tmp_path / swept[0] / "link")
    os.symlink(outside, tmp_path / f"out.partial-{host}-{dead}-6-aaaaaaaa")
    kept += ["outside", f"out.partial-{host}-{dead}-6-aaaaaaaa"]
    sweep(tmp_path / "out")
    assert names(tmp_path) == sorted(kept)
    assert names(outside) == ["config.json", "model.safetensors"]


def test_an_old_output_moved_aside_by_the_dead_is_put_back(tmp_path: Path) -> None:
    dest = tmp_path / "out"
    aside = tmp_path / f"out.old-{output._host_hash()}-{dead_pid()}-5-aaaaaaaa"
    make_model(aside)
    with pytest.raises(OutputError) as info, Output(dest, "directory", False):
        pass
    assert info.value.code == "output.exists"
    assert names(tmp_path) == ["out"]
    make_model(aside)  # now beside a destination: it was replaced
    sweep(dest)
    assert names(tmp_path) == ["out"]
    live = tmp_path / f"out.old-{output._host_hash()}-{os.getpid()}-0-aaaaaaaa"
    dest.rename(live)
    sweep(dest)
    assert names(tmp_path) == [live.name]


KILLS = """
import os, random, signal, sys, time, traceback
from pathlib import Path
from loramerge.tensors.output import Output, check_destination
from loramerge.tensors.writer import AlignedBuffer, FileWriter, write_small_file

folder, what, force, kills = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
dest, companion = folder / "out", "out.json"
buffer = AlignedBuffer(70000)
random.seed(4)

def run(generation):
    check_destination(dest, inputs=[], force=force, what=what)
    with Output(dest, what, force, [companion] if what == "file" else []) as out:
        files = ["out"] if what == "file" else ["a.safetensors", "sub/b.safetensors"]
        if what == "directory":
            (out.directory / "sub").mkdir()
        for name in files:
            with FileWriter(out.directory / name, 70000) as file:
                window = buffer.window(0, 70000)
                window[:] = generation.to_bytes(4, "big") * 17500
                file.write(0, window)
        small = companion if what == "file" else "config.json"
        write_small_file(out.directory / small, str(generation).encode())
        out.commit()

def generation(path):
    data = path.read_bytes()
    assert len(data) == 70000 and data == data[:4] * 17500, "torn"
    return int.from_bytes(data[:4], "big")

def check(after_success):
    if not os.path.lexists(dest):
        assert not after_success
        return 0
    if what == "file":
        found, receipt = generation(dest), int((folder / companion).read_text())
        assert receipt == found if after_success else receipt >= found
        return found
    found = {generation(dest / "a.safetensors"), generation(dest / "sub" / "b.safetensors"),
             int((dest / "config.json").read_text())}
    assert len(found) == 1, found
    return found.pop()

number = absent = swept = 0
for _ in range(kills):
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            while True:
                number += 1
                run(number)
                if not force:
                    os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    time.sleep(random.random() * 0.03 * random.random())
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    swept += any(".partial-" in name for name in os.listdir(folder))
    number = max(number, check(False)) + 1000
    if not os.path.lexists(dest):
        absent += 1
    if force or not os.path.lexists(dest):
        run(number)
        assert check(True) == number
        left = {name for name in os.listdir(folder)} - {"out", companion}
        assert not left, left
    if not force:
        os.system(f"rm -rf '{dest}' '{folder / companion}'")
print(kills, absent, swept)
"""


@pytest.mark.parametrize(
    ("what", "force", "plain"),
    [
        ("directory", True, False),
        ("directory", True, True),
        ("directory", False, False),
        ("file", True, False),
        ("file", True, True),
        ("file", False, True),
    ],
)
def test_a_kill_at_any_moment_leaves_nothing_or_all(tmp_path: Path, what: What, force: bool, plain: bool) -> None:
    code = (WITHOUT_RENAMEAT2 if plain else "") + KILLS
    kills, _, swept = said(python(code, tmp_path, what, force, 60, wait=False)).split()
    assert kills == "60"
    assert int(swept) > 5, "the kills came at moments that prove nothing"


class Trap:
    """Raises an exception once, at the n-th of all calls of the functions that it is put around."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: int, exception: BaseException, after: bool) -> None:
        self.patch = patch
        self.countdown = moment
        self.exception = exception
        self.after = after

    def put_around(self, module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*args: object, **kwargs: object) -> object:
            self.countdown -= 1
            now = self.countdown == -1
            if now and not self.after:
                raise self.exception
            result = real(*args, **kwargs)
            if now:
                raise self.exception
            return result

        self.patch.setattr(module, name, call)


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize(
    ("exception", "after"),
    [(KeyboardInterrupt(), False), (KeyboardInterrupt(), True), (OSError(errno.EIO, "broken"), False)],
)
def test_an_end_at_any_call_of_the_commit_leaves_old_or_new(
    tmp_path: Path, what: What, exception: BaseException, after: bool
) -> None:
    # A file system that cannot delete is beside the point: what is left is told by `leftover`.
    calls = ["rename", "replace", "fsync", "chmod", "link"]
    if isinstance(exception, KeyboardInterrupt):
        calls += ["unlink", "rmdir"]
    for moment in range(60):
        folder = tmp_path / str(moment)
        dest = folder / "out"
        folder.mkdir()
        (folder / "out.json").write_text("old")
        if what == "file":
            dest.write_text("old")
        else:
            make_model(dest, "config.json")
            (dest / "config.json").write_text("old")
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            trap = Trap(patch, moment, exception, after)
            try:
                with Output(dest, what, True, ["out.json"]) as out:
                    for name in ("out", "out.json", "config.json"):
                        (out.directory / name).write_text("new")
                    if output._renameat2 is not None:
                        trap.put_around(output, "_renameat2")
                    for name in calls:
                        trap.put_around(os, name)
                    out.commit()
                    patch.undo()
            except (KeyboardInterrupt, OutputError):
                failed = True
        assert names(folder) == ["out", "out.json"]
        text = (dest / "config.json" if what == "directory" else dest).read_text()
        assert text in ("old", "new")
        if what == "file":
            assert (folder / "out.json").read_text() == text
        if not failed and trap.countdown >= 0:
            assert text == "new" and moment > 2
            return
    pytest.fail("the commit never got through")


RACE = """
import sys, time
from pathlib import Path
from loramerge.errors import OutputError
from loramerge.tensors.output import Output
from loramerge.tensors.writer import write_small_file
folder, what, me = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for turn in range(25):
    dest = folder / f"out{turn}"
    try:
        with Output(dest, what, False, [dest.name + ".json"]) as out:
            for name in (dest.name, dest.name + ".json"):
                write_small_file(out.directory / name, me.encode())
            Path(sys.argv[4], f"{turn}-{me}").touch()
            while not Path(sys.argv[4], f"{turn}-{1 - int(me)}").exists():
                time.sleep(0)
            out.commit()
        print("won")
    except OutputError as exc:
        print(exc.code)
"""


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_of_two_processes_one_wins_completely(tmp_path: Path, what: What, plain: bool) -> None:
    (tmp_path / "flags").mkdir()
    folder = tmp_path / "outputs"
    folder.mkdir()
    code = (WITHOUT_RENAMEAT2 if plain else "") + RACE
    both = [python(code, folder, what, i, tmp_path / "flags", wait=False) for i in (0, 1)]
    results = [said(process).split() for process in both]
    for turn, pair in enumerate(zip(*results, strict=True)):
        assert sorted(pair) == ["output.exists", "won"], turn
        dest = folder / f"out{turn}"
        winner = str(pair.index("won"))
        inner = [dest, folder / f"out{turn}.json"] if what == "file" else list(dest.iterdir())
        assert len(inner) == 2
        if what == "directory" or not plain:  # without an atomic exchange the loser's receipt may stay
            assert {path.read_text() for path in inner} == {winner}, turn
        else:
            assert dest.read_text() == winner
    assert not [name for name in names(folder) if "partial" in name]


# -------------------------------------------------------------------------------------------------- syncs


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("no strace here")
    code = """
import sys
from pathlib import Path
from loramerge.tensors.output import Output
from loramerge.tensors.writer import FileWriter, write_small_file
with Output(Path(sys.argv[1]), "directory", False) as out:
    (out.directory / "sub").mkdir()
    with FileWriter(out.directory / "sub" / "w.safetensors", 100000) as file:
        file.write(0, memoryview(bytearray(100000)))
    write_small_file(out.directory / "loramerge.json", b"{}")
    out.commit()
"""
    log = tmp_path / "log"
    trace = "trace=fsync,rename,renameat,renameat2"
    run = subprocess.run(
        [strace, "-f", "-y", "-o", str(log), "-e", trace, sys.executable, "-c", code, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if run.returncode:
        pytest.skip(f"strace is not allowed here: {run.stderr[-200:]}")
    events = []
    for line in log.read_text().splitlines():
        synced = re.search(r"fsync\(\d+<(.*?)>", line)
        if synced:
            events.append(re.sub(r"out\.partial-[^/]*", "P", os.path.relpath(synced[1], tmp_path)))
        elif "rename" in line and "out" in line:
            events.append("rename")
    assert events == ["P/sub/w.safetensors", "P/loramerge.json", "P/sub", "P", "rename", "."]


def test_directories_that_cannot_be_synced_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "fsync", fsync)
    with Output(tmp_path / "out", "directory", False) as out:
        fill(out.directory, "new")
        out.commit()
    assert names(tmp_path) == ["out"]


def test_what_could_not_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = make_model(tmp_path / "out")
    with Output(dest, "directory", True) as out:
        fill(out.directory, "new")
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        out.commit()
    monkeypatch.undo()
    assert out.leftover is not None
    assert names(out.leftover) == ["config.json", "model.safetensors"]
    assert names(dest) == ["config.json", "sub"]


def test_entering_is_quick_beside_many_files(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / f"lora{i}.safetensors").touch()
    begin = time.perf_counter()
    with Output(tmp_path / "out", "directory", False):
        pass
    assert time.perf_counter() - begin < 1
