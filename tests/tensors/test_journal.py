"""Journals: a kill at any moment leaves a model old, new, or to be finished; nothing leads out of its directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramerge.errors import InputError, LoramergeError, OutputError, UnsafeError
from loramerge.tensors import journal, output
from loramerge.tensors.interrupted import NAME, journal_path, journals, model_of, refuse_interrupted
from loramerge.tensors.journal import Staging, recover

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, locks")

A, B = "a.safetensors", "sub/b.safetensors"
SIZE = 40_000
RUNS = {A: (SIZE, [(100, 9000), (20_000, 20_001), (30_000, SIZE)]), B: (SIZE, [(0, 5000)])}


def make(folder: Path) -> Path:
    """A model of two files, one in a folder, and what lies beside them."""
    (folder / "sub").mkdir(parents=True)
    for name in (A, B):
        (folder / name).write_bytes(bytes(i * 7 % 251 for i in range(SIZE)))
    (folder / "config.json").write_text("old")
    (folder / "tokenizer.json").write_text("going")
    (folder / "README.md").write_text("stays")
    return folder


def new_byte(name: str, at: int) -> int:
    return (at * 13 + len(name)) % 253


def stage(folder: Path) -> Staging:
    return Staging(folder, False, "switch", RUNS)


def fill(staging: Staging) -> None:
    for name, (_, pieces) in RUNS.items():
        for begin, end in pieces:
            for at in range(begin, end, 3000):
                stop = min(at + 3000, end)
                staging.write(name, at, memoryview(bytearray(new_byte(name, i) for i in range(at, stop))))
    (staging.directory / "config.json").write_text("new")
    (staging.directory / "sub").mkdir()
    (staging.directory / "sub" / "loramerge.json").write_text("a new file")
    staging.remove("tokenizer.json")


def rewrite(folder: Path) -> None:
    with stage(folder) as staging:
        fill(staging)
        staging.commit()
        staging.apply()


def committed(folder: Path) -> Path:
    """A model whose journal is binding and not carried out."""
    make(folder)
    with stage(folder) as staging:
        fill(staging)
        staging.commit()
    return folder / NAME


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """All files before and after, the latter worked out by hand."""
    old = tree(make(tmp_path_factory.mktemp("states") / "model"))
    new = dict(old)
    for name, (_, pieces) in RUNS.items():
        raw = bytearray(old[name])
        for begin, end in pieces:
            raw[begin:end] = bytes(new_byte(name, i) for i in range(begin, end))
        new[name] = bytes(raw)
    new |= {"config.json": b"new", "sub/loramerge.json": b"a new file"}
    del new["tokenizer.json"]
    return old, new


def test_ranges_are_rewritten_in_the_very_files_and_the_rest_is_not_touched(
    tmp_path: Path, states: tuple[dict[str, bytes], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model")
    inodes = {name: (folder / name).stat().st_ino for name in (A, B)}
    os.chmod(folder / "config.json", 0o640)
    written: list[tuple[int, int]] = []
    real = journal.write_all

    def write_all(fd: int, data: memoryview, offset: int) -> None:
        written.append((offset, offset + len(data)))
        real(fd, data, offset)

    monkeypatch.setattr(journal, "write_all", write_all)
    rewrite(folder)
    assert tree(folder) == states[1]
    assert {name: (folder / name).stat().st_ino for name in (A, B)} == inodes
    assert sum(end - begin for begin, end in written) == sum(e - b for _, pieces in RUNS.values() for b, e in pieces)
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o640


def test_without_a_commit_nothing_happened(tmp_path: Path, states: tuple[dict[str, bytes], dict[str, bytes]]) -> None:
    folder = make(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt), stage(folder) as staging:
        fill(staging)
        raise KeyboardInterrupt
    assert tree(folder) == states[0]
    assert recover(folder) == []


def test_a_committed_journal_is_seen_from_everywhere_and_carried_out_by_recover(
    tmp_path: Path, states: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    folder = tmp_path / "model"
    own = committed(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in (folder, folder / A, folder / B, folder / "sub", link, link / A):
        assert [os.path.realpath(found) for found in journals(path)] == [os.path.realpath(own)]
        with pytest.raises(InputError, match="half old") as caught:
            refuse_interrupted(path, "typed")
        assert caught.value.code == "input.interrupted" and caught.value.exit_code == 3
        assert caught.value.fix.startswith("loramerge recover ")
    assert journals(tmp_path) == [] and journals(folder / "config.json") != []
    assert journals(folder / "other") == []
    with pytest.raises(InputError):
        output.check_destination(folder, inputs=[], force=True, what="directory")
    done = recover(folder / B)
    assert [(each.model, each.command) for each in done] == [(folder, "switch")]
    assert tree(folder) == states[1]
    assert recover(folder) == []
    refuse_interrupted(folder, "typed")


def test_a_single_file_has_its_journal_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "m.x.safetensors"
    file.write_bytes(bytes(100))
    with Staging(file, True, "merge", {file.name: (100, [(10, 20)])}) as staging:
        staging.write(file.name, 10, memoryview(b"0123456789"))
        staging.commit()
    own = journal_path(file, True)
    assert own.name == "m.x.loramerge.journal" and model_of(own) == file
    assert journals(file) == [own] and journals(tmp_path) == [own]
    assert journals(tmp_path / "other.safetensors") == []
    recover(file)
    assert file.read_bytes() == bytes(10) + b"0123456789" + bytes(80)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "pwrite", "write", "fsync", "ftruncate", "chmod")


def killed_at(number: int, work: Callable[[], None], torn: bool) -> bool:
    """Does the work in a process that is gone at its n-th call; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def wrapped(call: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    if torn and call in (pwrite, write) and len(args[1]) > 1:
                        call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    os._exit(9)
                return call(*args, **kwargs)

            return counted

        pwrite, write = os.pwrite, os.write
        for name in CALLS:
            setattr(os, name, wrapped(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("torn", [False, True], ids=["whole writes", "torn writes"])
def test_a_kill_at_any_call_leaves_old_or_new_or_what_recover_finishes(
    tmp_path: Path, states: tuple[dict[str, bytes], dict[str, bytes]], torn: bool
) -> None:
    seen = {"old": 0, "new": 0, "waiting": 0}
    for number in range(1, 10_000):
        folder = make(tmp_path / str(number))
        if not killed_at(number, lambda folder=folder: rewrite(folder), torn):
            break
        waiting = bool(journals(folder))
        files = {name: raw for name, raw in tree(folder).items() if NAME not in name}
        if waiting:
            seen["waiting"] += 1
        else:
            assert files in states, f"call {number}: mixed, and nothing tells"
            seen["old" if files == states[0] else "new"] += 1
        # A kill during the recovery itself is no different.
        again = killed_at(1 + number % 17, lambda folder=folder: recover(folder) and None, torn)
        assert not again or journals(folder) or tree_of_weights(folder) in [weights(s) for s in states]
        recover(folder)
        assert tree(folder) == (states[1] if waiting else files), f"call {number}"
        if files == states[0] and not waiting:
            rewrite(folder)
        assert tree(folder) == states[1]
        shutil.rmtree(folder)
    assert number > 30 and all(seen.values()), seen


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in (A, B)}


def tree_of_weights(folder: Path) -> dict[str, bytes]:
    return weights(tree(folder))


def test_what_is_synced_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut: the journal is on the device before its name is, the model before the journal loses it."""
    folder = make(tmp_path / "model")
    events: list[str] = []
    fsync, rename, pwrite = os.fsync, os.rename, os.pwrite

    def path_of(fd: int) -> str:
        path = os.readlink(f"/proc/self/fd/{fd}")
        return os.path.relpath(path, folder).replace(f".partial-{path.rpartition('.partial-')[2].split('/')[0]}", "*")

    def traced_fsync(fd: int) -> None:
        events.append(f"sync {path_of(fd)}")
        fsync(fd)

    def traced_rename(a: Any, b: Any, **kwargs: Any) -> None:
        events.append(f"rename to {'journal' if os.fspath(b).endswith(NAME) else 'partial'}")
        rename(a, b, **kwargs)

    def traced_pwrite(fd: int, data: Any, offset: int) -> int:
        events.append(f"write {path_of(fd)}")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    monkeypatch.setattr(os, "pwrite", traced_pwrite)
    rewrite(folder)
    commit, end = events.index("rename to journal"), events.index("rename to partial")
    before, during, after = events[:commit], events[commit:end], events[end:]
    for name in ("data", "index.json", "files", "files/sub"):
        assert f"sync {NAME}*/{name}" in before
    assert f"sync {NAME}*" in before
    assert not [e for e in before if e in (f"write {A}", f"write {B}")]
    assert during[1] == "sync ."
    for name in (A, B):
        last = max(i for i, e in enumerate(during) if e == f"write {name}")
        assert f"sync {name}" in during[last:]
    assert "sync ." in during[2:] and "sync sub" in during
    assert after[1] == "sync ."


def test_a_second_run_is_refused_while_one_is_at_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    with stage(folder):
        script = (
            "import sys\nfrom pathlib import Path\nfrom loramerge.tensors.journal import Staging\n"
            f"Staging(Path(sys.argv[1]), False, 'merge', {{{A!r}: ({SIZE}, [(0, 1)])}}).__enter__()"
        )
        done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "OutputError: another run is rewriting" in done.stderr
        with pytest.raises(OutputError) as caught, stage(folder):
            pass
        assert caught.value.code == "output.busy"
    rewrite(folder)


def test_without_locks_the_first_commit_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model")
    monkeypatch.setattr(journal, "locked", lambda *args: contextlib.nullcontext())
    with stage(folder) as first, stage(folder) as second:
        fill(first)
        fill(second)
        first.commit()
        with pytest.raises(OutputError) as caught:
            second.commit()
        assert caught.value.code == "output.busy"
        first.apply()
    assert not [path for path in folder.iterdir() if "journal" in path.name]


def test_links_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    journal.check_links(folder, [A, B], "m")
    os.link(folder / A, tmp_path / "second")
    (tmp_path / "blob").write_bytes(b"x")
    (folder / "c.safetensors").symlink_to(tmp_path / "blob")
    for name, word in ((A, "hard link"), ("c.safetensors", "cache")):
        with pytest.raises(OutputError, match=word) as caught:
            journal.check_links(folder, [name], "m")
        assert caught.value.code == "in-place.link" and "-o OUT" in caught.value.fix


# --- foreign and damaged journals ---------------------------------------------------------------------------


def edit_index(own: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((own / "index.json").read_text())
    change(index)
    (own / "index.json").write_text(json.dumps(index))


def refused(folder: Path, before: dict[str, bytes]) -> LoramergeError:
    with pytest.raises(LoramergeError) as caught:
        recover(folder)
    assert tree(folder) == before, "something was written"
    return caught.value


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        pytest.param(lambda own: (own / "index.json").unlink(), "journal.damaged", id="no index"),
        pytest.param(lambda own: (own / "index.json").write_text("{"), "journal.damaged", id="no json"),
        pytest.param(lambda own: (own / "index.json").write_text("[]"), "journal.damaged", id="a list"),
        pytest.param(lambda own: edit_index(own, lambda i: i.update(format=2)), "journal.version", id="newer"),
        pytest.param(lambda own: edit_index(own, lambda i: i.pop("files")), "journal.damaged", id="no files"),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0]["ranges"][0].__setitem__(0, -1)),
            "journal.damaged",
            id="negative",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0]["ranges"][0].__setitem__(0, SIZE)),
            "journal.damaged",
            id="outside",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0]["ranges"][0].__setitem__(2, 1 << 60)),
            "journal.damaged",
            id="no such data",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0]["ranges"][0].__setitem__(2, True)),
            "journal.damaged",
            id="a boolean",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0].update(name="../x.safetensors")),
            "journal.unsafe-name",
            id="a file outside",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["remove"].append("/etc/passwd")), "journal.unsafe-name", id="root"
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["replace"][0].update(name="sub/../../x")),
            "journal.unsafe-name",
            id="a way out",
        ),
        pytest.param(
            lambda own: edit_index(own, lambda i: i["files"][0].update(name="config.json")),
            "journal.damaged",
            id="no weights",
        ),
        pytest.param(lambda own: (own / "files" / "config.json").write_text("NEW"), "journal.damaged", id="edited"),
        pytest.param(lambda own: (own / "files" / "config.json").unlink(), "journal.damaged", id="gone"),
        pytest.param(
            lambda own: os.truncate(own / "data", (own / "data").stat().st_size - 1), "journal.damaged", id="short"
        ),
        pytest.param(lambda own: (own.parent / A).unlink(), "journal.foreign", id="no such file"),
        pytest.param(lambda own: os.truncate(own.parent / B, SIZE + 1), "journal.foreign", id="another file"),
    ],
)
def test_a_damaged_or_hostile_journal_is_refused_before_anything_is_written(
    tmp_path: Path, damage: Callable[[Path], Any], code: str
) -> None:
    folder = tmp_path / "model"
    own = committed(folder)
    damage(own)
    assert refused(folder, tree(folder)).code == code
    with pytest.raises(InputError):
        refuse_interrupted(folder, "typed")


def test_every_flipped_byte_of_the_data_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    own = committed(folder)
    raw = (own / "data").read_bytes()
    index = json.loads((own / "index.json").read_text())
    ranges = [r for row in index["files"] for r in row["ranges"]]
    for _, length, at, _ in ranges:
        for position in (at, at + length - 1):
            (own / "data").write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            assert refused(folder, tree(folder)).code == "journal.damaged"
    (own / "data").write_bytes(raw)
    recover(folder)


def test_a_journal_writes_through_no_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    committed(folder)
    outside.mkdir()
    (outside / "b.safetensors").write_bytes(bytes(SIZE))
    before = tree(outside)
    shutil.rmtree(folder / "sub")
    (folder / "sub").symlink_to(outside)
    with pytest.raises(UnsafeError):
        recover(folder)
    (folder / "sub").unlink()
    (folder / "sub").mkdir()
    (folder / B).symlink_to(outside / "b.safetensors")
    with pytest.raises(InputError) as caught:
        recover(folder)
    assert caught.value.code == "journal.foreign"
    (folder / B).unlink()
    os.link(outside / "b.safetensors", folder / B)
    with pytest.raises(InputError):
        recover(folder)
    assert tree(outside) == before
