"""PyTorch files: read lazily and exactly, and nothing in them is ever executed."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramerge import pickled
from loramerge.errors import InputError, LoramergeError, UnsafeError, UnsupportedError
from loramerge.tensors.checkpoint import open_checkpoint
from loramerge.tensors.safetensors import Header
from loramerge.tensors.source import FileSource

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "roberta_base_lora_mnli.bin"


def read(path: Path) -> Header:
    source = FileSource(path)
    try:
        return pickled.read_header(source)
    finally:
        source.close()


def refused(path: Path, kind: type[LoramergeError], code: str, *words: str) -> LoramergeError:
    with pytest.raises(kind) as caught:
        read(path)
    error = caught.value
    assert error.code == code, error.message
    assert error.fix
    assert error.file == str(path)
    assert "\n" not in error.message
    for word in words:
        assert word in error.message, error.message
    return error


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def check_bytes(path: Path, expected: dict[str, Any]) -> None:
    header, data = read(path), path.read_bytes()
    assert set(header.tensors) == set(expected)
    for name, tensor in expected.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert data[info.begin : info.end] == bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def rezip(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its members changed: ``{name: bytes}`` in, the same out."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in change(members).items():
            new.writestr(name, data)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return saved(
        tmp_path / "model.bin",
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    )


# --- what is read ---------------------------------------------------------------------------------


def test_tensors_are_found_where_they_lie(tmp_path: Path) -> None:
    content = {
        "float": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "bf16": torch.randn(2, 2, 2).bfloat16(),
        "int": torch.arange(10),
        "bool": torch.tensor([True, False]),
        "u16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "ünï": torch.nn.Parameter(torch.randn(2)),
        "buffer": torch.nn.Buffer(torch.randn(2)),
    }
    check_bytes(saved(tmp_path / "x.bin", content), content)
    header = read(tmp_path / "x.bin")
    assert header.data_start == 0
    assert header.metadata == {}
    assert header.tensors["bf16"].dtype == "BF16"
    assert header.tensors["f8"].dtype == "F8_E4M3"
    begins = [info.begin for info in header.tensors.values()]
    assert begins == sorted(begins)


def test_empty_tensors(tmp_path: Path) -> None:
    header = read(saved(tmp_path / "x.bin", {"e": torch.ones(0, 3), "f": torch.ones(2)}))
    assert (header.tensors["e"].shape, header.tensors["e"].nbytes) == ((0, 3), 0)


def test_shared_storage_and_slices(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    content = {"whole": base, "again": base, "rows": base.view(4, 3)[1:3], "tail": base[10:]}
    check_bytes(saved(tmp_path / "x.bin", content), content)
    tensors = read(tmp_path / "x.bin").tensors
    assert (tensors["whole"].begin, tensors["whole"].end) == (tensors["again"].begin, tensors["again"].end)
    assert tensors["rows"].begin == tensors["whole"].begin + 12
    assert list(tensors)[:2] == ["again", "whole"]


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_usual_wrappers_are_opened(tmp_path: Path, wrapper: str) -> None:
    inner = collections.OrderedDict(a=torch.ones(2), b=torch.zeros(3))
    content = {
        "epoch": 3,
        "loss": 0.5,
        "name": "x",
        wrapper: inner,
        "optimizer": {"state": {0: torch.ones(1)}},
    }
    check_bytes(saved(tmp_path / "x.bin", content), inner)


def test_plain_values_among_tensors_are_left_out(tmp_path: Path) -> None:
    content = {"a": torch.ones(2), "version": 3, "note": "x", "none": None, "flag": True}
    assert list(read(saved(tmp_path / "x.bin", content)).tensors) == ["a"]


def test_a_module_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    check_bytes(saved(tmp_path / "x.bin", model.state_dict()), model.state_dict())


def test_marks_in_the_file_cannot_move_the_data(good: Path) -> None:
    expected = torch.load(good, weights_only=True)
    # Other order and alignment than the marks promise: an archive packed again by another tool.
    rezip(good, lambda members: dict(sorted(members.items(), reverse=True)))
    check_bytes(good, expected)


@pytest.mark.skipif(not REAL.exists(), reason="the shared data is not here")
def test_the_file_of_the_lora_paper() -> None:
    header = read(REAL)
    assert len(header.tensors) == 52
    check_bytes(REAL, torch.load(REAL, weights_only=True, map_location="cpu"))
    checkpoint = open_checkpoint(REAL, read_pickle=pickled.read_header)
    assert checkpoint.files[0].kind == "pickle"
    assert checkpoint.tensors["roberta.encoder.layer.0.attention.self.query.lora_A"].info.shape == (8, 768)
    checkpoint.close()


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.zeros(64 * 2**20, dtype=torch.uint8)})
    source = FileSource(path)
    total = 0
    real = source.read_into

    def counting(offset: int, buffer: memoryview) -> None:
        nonlocal total
        total += len(buffer)
        real(offset, buffer)

    source.read_into = counting  # type: ignore[method-assign]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pickled.read_header(source).tensors["a"].nbytes == 64 * 2**20
    assert total < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    source.close()


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, loramerge.pickled, loramerge.tensors.checkpoint; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# --- code -----------------------------------------------------------------------------------------


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_code_is_never_executed(good: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    payload = pickle.dumps({"a": Runs(f"touch {witness}")}, 2)
    rezip(good, lambda members: {**members, "model/data.pkl": payload})
    refused(good, UnsafeError, "pickle.unsafe", "weights_only")
    with pytest.raises(UnsafeError) as caught:
        open_checkpoint(good)
    assert caught.value.code == "pickle.refused"
    assert not witness.exists()
    (tmp_path / "legacy.bin").write_bytes(payload)
    refused(tmp_path / "legacy.bin", UnsupportedError, "pickle.legacy")
    assert not witness.exists()


def test_the_environment_cannot_switch_the_guard_off(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rezip(good, lambda members: {**members, "model/data.pkl": pickle.dumps({"a": Runs("exit 7")}, 2)})
    refused(good, UnsafeError, "pickle.unsafe")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02}",
        b"garbage",
        b"cos\nsystem\n(S'exit 7'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"ctorch.serialization\nload\n.",
        b"\x80\x02}X\x01\x00\x00\x00aK\x01s",
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02]K\x01K\x02s.",  # SETITEM on a list
        b"cunknown_module\nThing\n)R.",
    ],
)
def test_hostile_pickles_end_in_one_error(good: Path, payload: bytes) -> None:
    rezip(good, lambda members: {**members, "model/data.pkl": payload})
    refused(good, UnsafeError, "pickle.unsafe")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_pickles_end_in_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("p") / "model.bin"
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(raw)
    try:
        header = read(path)
    except LoramergeError as error:
        assert error.exit_code == 3
        return
    assert all(0 <= info.begin <= info.end <= header.size for info in header.tensors.values())


# --- sizes ----------------------------------------------------------------------------------------


def with_storage(members: dict[str, bytes], data: bytes) -> dict[str, bytes]:
    return {**members, "model/data/0": data}


@pytest.mark.parametrize("length", [0, 23, 25, 4096])
def test_lying_storage_sizes_are_refused(good: Path, length: int) -> None:
    rezip(good, lambda members: with_storage(members, bytes(length)))
    refused(good, UnsafeError, "pickle.storage", "'a'", "24 bytes", str(length))


def test_missing_storage_is_refused(good: Path) -> None:
    rezip(good, lambda members: {name: data for name, data in members.items() if name != "model/data/0"})
    refused(good, UnsafeError, "pickle.unsafe", "data/0")


def test_a_view_beyond_its_storage_is_refused(good: Path) -> None:
    def enlarge(members: dict[str, bytes]) -> dict[str, bytes]:
        data = members["model/data.pkl"]
        assert data.count(b"K\x02K\x03\x86") == 1
        return {**members, "model/data.pkl": data.replace(b"K\x02K\x03\x86", b"K\x63K\x03\x86")}

    rezip(good, enlarge)
    refused(good, UnsafeError, "pickle.storage", "'a'", "1188 bytes", "24")


# --- the archive ----------------------------------------------------------------------------------


def test_compressed_members_are_refused_unread(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.bin", {"a": torch.ones(2)})
    bomb = bytes(64 * 2**20)
    rezip(path, lambda members: with_storage(members, bomb), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    refused(path, UnsafeError, "pickle.archive", "compressed")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "model/../../outside", "model\\..\\x", "C:/x"])
def test_members_that_lead_outside_are_refused(good: Path, name: str) -> None:
    rezip(good, lambda members: {**members, name: b"x"})
    refused(good, UnsafeError, "pickle.archive", "outside", repr(name))


def test_members_outside_the_root_are_refused(good: Path) -> None:
    rezip(good, lambda members: {**members, "other/data/0": b"x"})
    refused(good, UnsafeError, "pickle.archive", "'other/data/0'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members_are_refused(good: Path) -> None:
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("model/data/0", bytes(24))
    refused(good, UnsafeError, "pickle.archive", "two members", "model/data/0")


def patched(path: Path, signature: bytes, name: bytes, at: int, value: bytes) -> None:
    """Change a field of a member's header: `at` counts from its signature."""
    data = bytearray(path.read_bytes())
    fixed = 30 if signature == b"PK\x03\x04" else 46
    start = data.find(signature)
    while data[start + fixed : start + fixed + len(name)] != name:
        start = data.index(signature, start + 1)
    data[start + at : start + at + len(value)] = value
    path.write_bytes(data)


def test_members_that_lie_about_themselves_are_refused(good: Path) -> None:
    pristine = rezip(good, lambda members: members).read_bytes()
    central, local = b"PK\x01\x02", b"PK\x03\x04"
    for signature, at, value, word in (
        (central, 20, b"\xff\xff\xff\x0f" * 2, "does not lie in the file"),  # both sizes
        (central, 20, b"\xff", "compressed"),
        (central, 8, b"\x01", "encrypted"),
        (central, 42, b"\xff\xff\xff\x0f", ""),  # offset beyond the file
        (central, 42, b"\x00\x00\x00\x00", "calls itself"),
        (local, 8, b"\x08", "does not lie in the file"),  # deflated after all
        (local, 30, b"n", "calls itself"),
        (local, 26, b"\xff\xff", ""),
    ):
        good.write_bytes(pristine)
        patched(good, signature, b"model/data/0", at, value)
        refused(good, UnsafeError, "pickle.archive", word)


def test_overlapping_members_are_refused(good: Path) -> None:
    rezip(good, lambda members: members)
    patched(good, b"PK\x01\x02", b"model/data/0", 20, (200).to_bytes(4, "little") * 2)
    refused(good, UnsafeError, "pickle.archive", "overlaps")


def test_other_zip_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", b"x")
    refused(path, InputError, "pickle.archive", "not a PyTorch checkpoint")
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    refused(path, InputError, "pickle.archive")


def test_every_truncation_is_refused(good: Path) -> None:
    data = good.read_bytes()
    for length in range(0, len(data), 7):
        good.write_bytes(data[:length])
        with pytest.raises(LoramergeError):
            read(good)


def test_byte_order(good: Path) -> None:
    rezip(good, lambda members: {**members, "model/byteorder": b"big"})
    refused(good, UnsupportedError, "pickle.big-endian")
    rezip(good, lambda members: {**members, "model/byteorder": b"middle"})
    refused(good, InputError, "pickle.archive", "byte order")
    rezip(good, lambda members: {name: data for name, data in members.items() if name != "model/byteorder"})
    read(good)


def test_torchscript_is_refused(good: Path) -> None:
    rezip(good, lambda members: {**members, "model/constants.pkl": b"x"})
    refused(good, UnsupportedError, "pickle.torchscript")


def test_the_legacy_format_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert "torch.save(torch.load(" in refused(tmp_path / "x.bin", UnsupportedError, "pickle.legacy").fix


def test_other_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"")
    refused(path, InputError, "input.empty", "empty")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, InputError, "input.format", "LFS")


# --- content --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], ("list",)),
        (3, ("int",)),
        ({}, ("no tensors",)),
        ({"epoch": 3}, ("no tensors", "'epoch'")),
        ({"weights": {"a": torch.ones(1)}}, ("no tensors", "'weights'")),
        ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, ("several", "'model'")),
        ({1: torch.ones(1)}, ("int", "not a string")),
        ({"a": torch.ones(1), "b": [torch.ones(1)]}, ("'b'", "list")),
        ({"a": torch.ones(1), "b": {"c": 1}}, ("'b'", "dict")),
        ({"state_dict": {"a": torch.ones(1), "b": {"c": torch.ones(1)}}}, ("'b'", "dict")),
        (torch.ones(3), ("Tensor",)),
    ],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    refused(saved(tmp_path / "x.bin", content), InputError, "pickle.content", *words)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.ones(2, 3).T, "contiguous"),
        (torch.ones(1).expand(4), "contiguous"),
        (torch.ones(8)[::2], "contiguous"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, tensor: Any, word: str) -> None:
    path = saved(tmp_path / "x.bin", {"fine": torch.ones(1), "odd": tensor})
    error = refused(path, UnsupportedError, "pickle.tensor", "'odd'", word)
    assert error.tensors == ("odd",)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    refused(saved(tmp_path / "x.bin", {"q": tensor}), UnsupportedError, "pickle.tensor", "quantised")


def test_an_old_torch_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(good, UnsupportedError, "pickle.torch-version", "2.10", "2.9.1")


def test_the_input_is_not_changed(good: Path) -> None:
    before = hashlib.sha256(good.read_bytes()).hexdigest()
    read(good)
    assert hashlib.sha256(good.read_bytes()).hexdigest() == before
