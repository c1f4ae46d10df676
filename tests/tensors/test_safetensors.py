"""The safetensors reader and header writer against the safetensors library and the catalogue of bad files."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loramerge.errors import InputError
from loramerge.tensors.dtypes import BITS
from loramerge.tensors.safetensors import Header, TensorInfo, encode_header, read_header
from loramerge.tensors.source import FileSource

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Memory:
    """A byte source in memory."""

    def __init__(self, data: bytes) -> None:
        self.name, self.data, self.size = "typed.safetensors", data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def check_unchanged(self) -> None: ...

    def close(self) -> None: ...


def container(header: Any, data: bytes = b"", *, pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += pad
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    as_list = [list(value) if isinstance(value, tuple) else value for value in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def ours(data: bytes) -> Header:
    return read_header(Memory(data))


def library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the library makes of a file, None where it refuses it."""
    try:
        pairs = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in pairs}


def refused(data: bytes, code: str, *words: str, tensors: tuple[str, ...] | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        ours(data)
    error = caught.value
    assert error.code == code, error.message
    assert error.file == "typed.safetensors"
    assert error.fix
    for word in words:
        assert word in error.message, error.message
    if tensors is not None:
        assert error.tensors == tensors
    return error


def agree(data: bytes) -> None:
    """The library's verdict and ours are the same, or ours is one of the stricter ones."""
    expected = library(data)
    try:
        header = ours(data)
    except InputError as error:
        if expected is not None:
            words = ("duplicate key", "nested more than", "entry is not a JSON object", "unknown dtype")
            words += ("dimensions, more than",)
            assert any(word in error.message for word in words), f"too strict: {error.message}: {data!r}"
        return
    assert expected is not None, f"too lax: {data!r}"
    # The library's names for dtypes are the ones on disk.
    got = {n: (i.dtype, i.shape, data[i.begin : i.end]) for n, i in header.tensors.items()}
    assert got == expected


@pytest.fixture(scope="module")
def good() -> bytes:
    tensors = {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 5), dtype=np.float16),
        "ünïcode\n": np.zeros(3, dtype=np.uint8),
    }
    return save(tensors, metadata={"format": "np"})


def test_a_file_of_the_library_is_read(good: bytes) -> None:
    header = ours(good)
    agree(good)
    assert header.metadata == {"format": "np"}
    assert header.size == len(good)
    assert header.data_start == 8 + struct.unpack("<Q", good[:8])[0]
    info = header.tensors["b.weight"]
    assert (info.dtype, info.shape, info.numel, info.nbytes) == ("F32", (2, 3), 6, 24)
    assert np.frombuffer(good[info.begin : info.end], np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert header.tensors["a"].numel == 1
    begins = [info.begin for info in header.tensors.values()]
    assert begins == sorted(begins)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_is_read(dtype: str) -> None:
    data = container({"a": entry(dtype, (8, 3), (0, 3 * BITS[dtype]))}, bytes(3 * BITS[dtype]))
    assert ours(data).tensors["a"].nbytes == 3 * BITS[dtype]
    agree(data)


ACCEPTED = {
    "no tensors": container({}),
    "no tensors, metadata only": container({"__metadata__": {"a": "b"}}),
    "metadata null": container({"__metadata__": None}),
    "scalar": container({"a": entry("F32", (), (0, 4))}, bytes(4)),
    "zero elements": container({"a": entry("F32", (0, 7), (0, 0))}),
    "zero elements between": container(
        {"z": entry("U8", (2,), (0, 2)), "a": entry("U8", (0,), (2, 2)), "b": entry("U8", (1,), (2, 3))},
        bytes(3),
    ),
    "unsorted": container({"b": entry("U8", (1,), (3, 4)), "a": entry("U8", (3,), (0, 3))}, bytes(4)),
    "padding spaces": container({"a": entry()}, bytes(4), pad=b" " * 100),
    "leading space": container(b'  {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "leading newlines": container(b"\n" * 600 + b"{}"),
    "unaligned": container({"a": entry("U8", (1,), (0, 1)), "b": entry("F64", (1,), (1, 9))}, bytes(9), pad=b" "),
    "non-ASCII": container(json.dumps({"模型.ü": entry()}, ensure_ascii=False).encode(), bytes(4)),
    "escaped surrogate pair": container(b'{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "empty name": container({"": entry()}, bytes(4)),
    "hostile name": container({"../../etc/passwd\x1b[2J\0": entry()}, bytes(4)),
    "extra keys": container({"a": {**entry(), "comment": [1, {"x": None}]}}, bytes(4)),
    "zero before overflow": container({"a": entry("U8", (0, 2**62, 2**62), (0, 0))}),
    "F4 in whole bytes": container({"a": entry("F4", (2, 3), (0, 3))}, bytes(3)),
    "F6 in whole bytes": container({"a": entry("F6_E2M3", (4,), (0, 3))}, bytes(3)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_format_allows_is_accepted(name: str) -> None:
    ours(ACCEPTED[name])
    agree(ACCEPTED[name])


REFUSED: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "empty file": (b"", "input.empty", ("empty", "download incomplete")),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "input.format", ("Git LFS pointer",)),
    "html": (b"<!DOCTYPE html><html>", "input.format", ("web page",)),
    "zip": (b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(30), "input.format", ("zip",)),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "input.format", ("pickle",)),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03abc", "input.format", ("gzip",)),
    "gguf": (b"GGUF\3\0\0\0" + bytes(16), "input.format", ("GGUF",)),
    "index": (b'{"weight_map": {}}', "input.format", ("JSON",)),
    "short": (b"\1\2\3", "safetensors.length", ("3 bytes",)),
    "length zero": (bytes(16), "safetensors.length", ("zero",)),
    "length beyond file": (struct.pack("<Q", 50) + b"{}", "safetensors.truncated", ("50", "2")),
    "length beyond file, no header": (struct.pack("<Q", 50) + b"xx", "safetensors.length", ("50", "2")),
    "length beyond limit": (
        struct.pack("<Q", 10**8 + 1) + b"{}",
        "safetensors.length",
        ("100000001", "100000000"),
    ),
    "length near 2**64": (struct.pack("<Q", 2**64 - 8) + b"{}", "safetensors.length", (str(2**64 - 8),)),
    "header not UTF-8": (container(b'{"\xff": 1}'), "safetensors.json", ("UTF-8",)),
    "header not JSON": (container(b'{"a": }'), "safetensors.json", ("line 1, column 7",)),
    "header with BOM": (container(b"\xef\xbb\xbf{}"), "safetensors.json", ()),
    "header an array": (container(b"[1, 2]"), "safetensors.json", ("object",)),
    "header two objects": (container(b"{}{}"), "safetensors.json", ("extra data",)),
    "NUL padding": (container(b"{}\0\0"), "safetensors.json", ()),
    "nested absurdly": (container(b'{"a":' * 100_000), "safetensors.json", ("nested",)),
    "nested in an extra key": (
        container({"a": {**entry(), "x": json.loads("[" * 80 + "]" * 80)}}, bytes(4)),
        "safetensors.json",
        ("nested",),
    ),
    "lone surrogate": (
        container(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "safetensors.json",
        ("surrogate",),
    ),
    "truncated": (
        container({"a": entry()}, bytes(3)),
        "safetensors.truncated",
        ("truncated", "promises", "file has"),
    ),
    "trailing": (container({"a": entry()}, bytes(5)), "safetensors.trailing", ("1 trailing byte:",)),
    "trailing, no tensors": (container({}, bytes(2)), "safetensors.trailing", ("2 trailing bytes",)),
    "gap at start": (container({"a": entry(offsets=(1, 5))}, bytes(5)), "safetensors.offsets", ("gap",)),
    "gap": (
        container({"a": entry(), "b": entry(offsets=(5, 9))}, bytes(9)),
        "safetensors.offsets",
        ("'b'", "5", "4", "gap"),
    ),
    "overlap": (
        container({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)),
        "safetensors.offsets",
        ("overlap",),
    ),
    "alias": (container({"a": entry(), "b": entry()}, bytes(4)), "safetensors.offsets", ("overlap",)),
    "reversed": (container({"a": entry(offsets=(4, 0))}, bytes(4)), "safetensors.offsets", ("reversed",)),
    "negative offset": (
        container({"a": entry(offsets=(-4, 0))}, bytes(4)),
        "safetensors.offsets",
        ("unsigned", "-4"),
    ),
    "fractional offset": (
        container({"a": entry(offsets=(0, 4.0))}, bytes(4)),
        "safetensors.offsets",
        ("4.0",),
    ),
    "boolean offset": (
        container({"a": entry("U8", (1,), (False, True))}, bytes(1)),
        "safetensors.offsets",
        ("unsigned",),
    ),
    "three offsets": (container({"a": entry(offsets=(0, 4, 4))}, bytes(4)), "safetensors.offsets", ()),
    "offsets a string": (container({"a": entry(offsets="04")}, bytes(4)), "safetensors.offsets", ()),
    "offset beyond 2**64": (container({"a": entry(offsets=(2**64, 2**64 + 4))}), "safetensors.offsets", ()),
    "size and shape disagree": (
        container({"a": entry("F32", (2, 3), (0, 20))}, bytes(20)),
        "safetensors.size",
        ("'a'", "[2, 3]", "F32", "24", "20"),
    ),
    "product overflows": (
        container({"a": entry("F32", (2**32, 2**32), (0, 0))}),
        "safetensors.size",
        ("'a'", "overflow"),
    ),
    "product overflows before a zero": (
        container({"a": entry("U8", (2**62, 2**62, 0), (0, 0))}),
        "safetensors.size",
        ("overflow",),
    ),
    "bits overflow": (container({"a": entry("U8", (2**61,), (0, 2**61))}), "safetensors.size", ("overflow",)),
    "half bytes": (
        container({"a": entry("F4", (3,), (0, 1))}, bytes(1)),
        "safetensors.size",
        ("whole bytes",),
    ),
    "negative shape": (container({"a": entry(shape=(-1,))}, bytes(4)), "safetensors.entry", ("shape", "-1")),
    "boolean shape": (container({"a": entry(shape=(True,))}, bytes(4)), "safetensors.entry", ("shape",)),
    "minus zero": (
        container(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "safetensors.entry",
        ("shape",),
    ),
    "shape a number": (container({"a": entry(shape=1)}, bytes(4)), "safetensors.entry", ("shape",)),
    "unknown dtype": (container({"a": entry("F31")}, bytes(4)), "safetensors.dtype", ("'a'", "'F31'")),
    "dtype a number": (container({"a": entry(32)}, bytes(4)), "safetensors.dtype", ()),
    "dtype a list": (container({"a": entry(["F32"])}, bytes(4)), "safetensors.dtype", ()),
    "no dtype": (
        container({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "safetensors.entry",
        ("dtype",),
    ),
    "no shape": (
        container({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
        "safetensors.entry",
        ("no shape",),
    ),
    "no offsets": (
        container({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        "safetensors.entry",
        ("data_offsets",),
    ),
    "entry a list": (
        container({"a": ["F32", [1], [0, 4]]}, bytes(4)),
        "safetensors.entry",
        ("'a'", "object"),
    ),
    "entry null": (container({"a": None}), "safetensors.entry", ("object",)),
    "duplicate key": (
        container(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
        "safetensors.json",
        ("duplicate key 'a'",),
    ),
    "duplicate metadata": (
        container(b'{"__metadata__":{},"__metadata__":{}}'),
        "safetensors.json",
        ("duplicate key",),
    ),
    "metadata value a number": (
        container({"__metadata__": {"r": 8}}),
        "safetensors.metadata",
        ("'r'", "string"),
    ),
    "metadata a list": (container({"__metadata__": ["a"]}), "safetensors.metadata", ("object",)),
    "too many dimensions": (
        container({"a": entry("U8", (1,) * 65, (0, 1))}, bytes(1)),
        "safetensors.limit",
        ("65", "64"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_catalogue_of_bad_containers(name: str) -> None:
    data, code, words = REFUSED[name]
    refused(data, code, *words)
    agree(data)


def test_errors_name_the_tensor_and_escape_it() -> None:
    error = refused(container({"w\x1b[2J": entry("F31")}, bytes(4)), "safetensors.dtype", tensors=("w\x1b[2J",))
    assert "\x1b" not in error.message
    assert len(refused(container({"w" * 100_000: entry("F31")}, bytes(4)), "safetensors.dtype").message) < 400
    assert len(refused(container({"a": entry("F31" * 9999)}, bytes(4)), "safetensors.dtype").message) < 400
    assert len(refused(container({"a": entry(shape=["x"] * 9999)}, bytes(4)), "safetensors.entry").message) < 400


def test_every_truncation_is_refused(good: bytes) -> None:
    for length in range(len(good)):
        with pytest.raises(InputError):
            ours(good[:length])


def test_every_bit_flip_of_the_header_agrees_with_the_library(good: bytes) -> None:
    for position in range(ours(good).data_start):
        for bit in range(8):
            data = bytearray(good)
            data[position] ^= 1 << bit
            agree(bytes(data))


@FUZZ
@given(st.data())
def test_byte_mutations_agree_with_the_library(good: bytes, data: st.DataObject) -> None:
    mutated = bytearray(good)
    start = ours(good).data_start
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, start - 1))
        how = data.draw(st.sampled_from(["set", "insert", "delete"]))
        char = data.draw(st.sampled_from(b'{}[]",:0123456789-.eE \\\n\0\x80tfn') | st.integers(0, 255))
        if how == "set":
            mutated[at] = char
        elif how == "insert":
            mutated.insert(at, char)
        else:
            del mutated[at]
    if data.draw(st.booleans()):  # make the length right again, so that the JSON is looked at
        mutated[:8] = struct.pack("<Q", max(start - 8 + len(mutated) - len(good), 0))
    agree(bytes(mutated))


odd_integers = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**32, 2**61, 2**63, 2**64 - 1, 2**64, 10**30])
odd_values: st.SearchStrategy[Any] = odd_integers | st.sampled_from(
    [None, True, False, 0.0, 4.0, -0.0, "4", "F32", [], {}, [0], [0, 4], [4, 0], [[0, 4]], {"a": 1}]
)


@FUZZ
@given(st.data())
def test_structured_mutations_agree_with_the_library(data: st.DataObject) -> None:
    header: dict[str, Any] = {}
    position = 0
    for name in data.draw(st.lists(st.text(max_size=3), max_size=4, unique=True)):
        dtype = data.draw(st.sampled_from(sorted(BITS)))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8]), max_size=3))
        size = int(np.prod(shape)) * BITS[dtype] // 8
        header[name] = entry(dtype, shape, [position, position + size])
        position += size
    if data.draw(st.booleans()):
        header["__metadata__"] = data.draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2)) | odd_values)
    names = [name for name in header if name != "__metadata__"]
    if names:
        for _ in range(data.draw(st.integers(0, 2))):
            name = data.draw(st.sampled_from(names))
            key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x", ""]))
            value = data.draw(odd_values)
            if not key:
                header[name] = value
            elif isinstance(header[name], dict):
                if key in ("shape", "data_offsets") and data.draw(st.booleans()):
                    value = data.draw(st.lists(odd_values, max_size=3))
                header[name][key] = value
    order = data.draw(st.permutations(list(header)))
    slack = data.draw(st.sampled_from([0, 0, 0, 0, -1, 1]))
    pad = b" " * data.draw(st.integers(0, 3))
    agree(container({name: header[name] for name in order}, bytes(max(position + slack, 0)), pad=pad))


@FUZZ
@given(st.binary(max_size=80), st.booleans())
def test_raw_bytes_agree_with_the_library(data: bytes, framed: bool) -> None:
    agree(container(b"{" + data) if framed else data)


def test_a_sparse_file_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    tensors = [("a", "F32", (5, 2**28)), ("b", "U8", (4,))]
    head, infos = encode_header(tensors, {}, align=4096)
    with open(path, "wb") as out:
        out.write(head)
        out.seek(infos[1].begin)
        out.write(b"tail")
    source = FileSource(path)
    header = read_header(source)
    assert list(header.tensors.values()) == infos
    assert infos[1].begin > 5 * 2**30
    assert source.read(infos[1].begin, 4) == b"tail"
    with safetensors.safe_open(path, "np") as theirs:
        assert bytes(theirs.get_tensor("b")) == b"tail"


def test_reading_a_large_header_is_fast(tmp_path: Path) -> None:
    names = [(f"model.layers.{i // 300}.mlp.experts.{i}.up_proj.weight", "BF16", (0, 4096)) for i in range(20_000)]
    source = Memory(encode_header(names, {})[0])
    times = []
    for _ in range(4):
        start = time.perf_counter()
        assert len(read_header(source).tensors) == 20_000
        times.append(time.perf_counter() - start)
    assert min(times) < 0.6  # 0.15 s here; the rest is for busy machines


@pytest.mark.parametrize(
    ("fill", "word"),
    [(b'"%d":{},', "entry has no dtype"), (b'"a":[],', "duplicate"), (b'"%d":', "expecting ','")],
)
def test_hostile_large_headers_are_refused_in_time(fill: bytes, word: str) -> None:
    body = b"".join(fill % i if b"%" in fill else fill for i in range(200_000))
    start = time.perf_counter()
    with pytest.raises(InputError, match=word):
        ours(container(b"{" + body.rstrip(b",") + b"}"))
    assert time.perf_counter() - start < 10


# --- encode_header --------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(max_size=8).filter(lambda name: name != "__metadata__")
specs = st.lists(
    st.tuples(names, st.sampled_from([d for d in sorted(BITS) if BITS[d] >= 8]), shapes),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


@settings(max_examples=150, deadline=None)
@given(specs, st.dictionaries(st.text(max_size=4), st.text(max_size=4)), st.sampled_from([1, 8, 64, 4096]))
def test_encoded_headers_are_read_back_by_both_readers(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], align: int
) -> None:
    head, infos = encode_header(iter(tensors), metadata, align=align)
    assert len(head) % align == 0
    assert [(info.name, info.dtype, info.shape) for info in infos] == tensors
    data = head + bytes(infos[-1].end - len(head) if infos else 0)
    header = ours(data)
    assert header.data_start == len(head)
    assert header.metadata == metadata
    assert sorted(header.tensors.values(), key=lambda i: i.name) == sorted(infos, key=lambda i: i.name)
    assert library(data) is not None
    agree(data)
    assert encode_header(tensors, metadata, align=align) == (head, infos)


def test_the_order_of_keys_is_metadata_then_tensors() -> None:
    head, _ = encode_header([("b", "U8", (1,)), ("a", "F32", ())], {"format": "pt"})
    assert list(json.loads(head[8:])) == ["__metadata__", "b", "a"]
    assert b"__metadata__" not in encode_header([("b", "U8", (1,))], {})[0]


@pytest.mark.parametrize(
    ("tensors", "metadata", "code"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], {}, "safetensors.entry"),
        ([("__metadata__", "U8", (1,))], {}, "safetensors.entry"),
        ([("a", "U8", (-1,))], {}, "safetensors.entry"),
        ([("a", "U8", (True,))], {}, "safetensors.entry"),
        ([("\ud800", "U8", (1,))], {}, "safetensors.entry"),
        ([("a", "float32", (1,))], {}, "safetensors.dtype"),
        ([("a", "F4", (3,))], {}, "safetensors.size"),
        ([("a", "F32", (2**40, 2**40))], {}, "safetensors.size"),
        ([("a", "U8", (1,))], {"r": 8}, "safetensors.metadata"),
        ([("a", "U8", (1,))], {"note": "x" * 100_000_001}, "safetensors.limit"),
    ],
)
def test_headers_that_the_format_does_not_allow_are_not_written(tensors: Any, metadata: Any, code: str) -> None:
    with pytest.raises(InputError) as caught:
        encode_header(tensors, metadata)
    assert caught.value.code == code


def test_infos_are_values() -> None:
    info = TensorInfo("a", "F32", (2, 3), 100, 124)
    assert info == TensorInfo("a", "F32", (2, 3), 100, 124)
    assert hash(info)
    with contextlib.suppress(AttributeError, TypeError):
        info.begin = 1  # type: ignore[misc]
    assert info.begin == 100
