"""GGUF headers: what the package `gguf` writes is read alike; what contradicts itself is refused at once."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy
import pytest

from loramerge.errors import InputError, LoramergeError, UnsupportedError
from loramerge.tensors.gguf import read_header
from loramerge.tensors.source import FileSource

gguf = pytest.importorskip("gguf")


def write(path: Path, quantised: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", 1.5)
    writer.add_bool("x.flag", True)
    writer.add_uint64("x.large", 2**63)
    writer.add_array("x.words", ["a", "bé"])
    writer.add_array("x.numbers", list(range(100)))
    random_state = numpy.random.default_rng(0)
    for name, shape, dtype in (("a", (3, 5), "f4"), ("b", (7,), "f2"), ("c", (2, 3, 4), "f8"), ("d", (), "f4")):
        writer.add_tensor(name, random_state.standard_normal(shape or (1,)).astype(dtype))
    if quantised:
        for kind in ("BF16", "Q8_0", "Q4_1"):
            data = random_state.standard_normal((4, 64)).astype("f4")
            known = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(kind, gguf.quants.quantize(data, known), raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    header, source = read_header(FileSource(path))
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == ["a", "b", "c", "d", "BF16", "Q8_0", "Q4_1"]
    assert header.tensors.keys() == {t.name for t in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        plain = tensor.tensor_type == gguf.GGMLQuantizationType.F64  # which the package does not decode
        values = tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        raw = source.read(info.begin, info.nbytes)
        if info.dtype == "BF16":
            held = (numpy.frombuffer(raw, "<u2").astype("u4") << 16).view("f4")
        else:
            held = numpy.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[info.dtype])
        numpy.testing.assert_array_equal(held.reshape(info.shape), values.reshape(info.shape))
        assert source.read(info.begin + 2, info.nbytes - 3) == raw[2:-1]
    assert header.metadata["general.architecture"] == "llama" and header.metadata["adapter.lora.alpha"] == "1.5"
    assert header.metadata["x.flag"] == "true" and header.metadata["x.large"] == str(2**63)
    assert header.metadata["x.words"] == '["a", "b\\u00e9"]' and header.metadata["x.numbers"].startswith("[0, 1, 2")
    assert source.size == path.stat().st_size


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.gguf", quantised=False).read_bytes()
    end = max(i.end for i in read_header(FileSource(tmp_path / "x.gguf"))[0].tensors.values())
    for size in range(0, end, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_header(FileSource(tmp_path / "cut.gguf"))


def test_damaged_headers_are_read_or_refused_at_once(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.gguf").read_bytes()
    draw = random.Random(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(4, 900)] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
        (tmp_path / "bad.gguf").write_bytes(damaged)
        begin = time.monotonic()
        try:
            header, source = read_header(FileSource(tmp_path / "bad.gguf"))
            for info in header.tensors.values():
                assert len(source.read(info.begin, info.nbytes)) == info.nbytes
        except LoramergeError:
            refused += 1
        assert time.monotonic() - begin < 2
    assert refused > 50


def header(values: bytes = b"", tensors: int = 0, count: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + values + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (header(tensors=2**62), "ends within"),
        (header(count=2**62), "ends within"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 2**62), count=1), "ends within"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**62), count=1), "ends within"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1), count=1), "unknown type"),
        (header(text("a") + struct.pack("<I", 77), count=1), "unknown type"),
        (header(struct.pack("<Q", 2**60), count=1), "a text of"),
        (header((text("a") + struct.pack("<IB", 0, 1)) * 2, count=2), "two values"),
        (header(text("general.alignment") + struct.pack("<II", 4, 3), count=1), "aligns"),
        (header(text("general.alignment") + struct.pack("<II", 4, 0), count=1), "aligns"),
        (header(tensors=1, rest=text("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)), "larger than the file"),
        (header(tensors=1, rest=text("t") + struct.pack("<I", 2**30)), "axes"),
        (header(tensors=1, rest=text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**62)), "ends at byte"),
        (header(tensors=1, rest=text("t") + struct.pack("<IQIQ", 1, 5, 8, 0)), "blocks of 32"),
        (header(tensors=2, rest=(text("t") + struct.pack("<IQIQ", 1, 0, 0, 0)) * 2), "two tensors"),
        (header(struct.pack("<Q", 1) + b"\xff", count=1), "not UTF-8"),
    ],
)
def test_headers_that_contradict_the_file(raw: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(raw + bytes(64 if reason in ("blocks of 32", "two tensors", "aligns") else 0))
    begin = time.monotonic()
    with pytest.raises(InputError, match=reason):
        read_header(FileSource(tmp_path / "x.gguf"))
    assert time.monotonic() - begin < 2


def test_versions_and_types_that_are_not_read(tmp_path: Path) -> None:
    for version, reason in ((1, "version 1"), (3 << 24, "big-endian")):
        (tmp_path / "x.gguf").write_bytes(header(version=version))
        with pytest.raises(UnsupportedError, match=reason):
            read_header(FileSource(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_bytes(header(tensors=1, rest=text("t") + struct.pack("<IQIQ", 1, 32, 9999, 0)))
    with pytest.raises(UnsupportedError, match="not known"):
        read_header(FileSource(tmp_path / "x.gguf"))
