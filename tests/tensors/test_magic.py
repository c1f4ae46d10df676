"""Files told by their first bytes."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from loramerge.tensors import magic
from loramerge.tensors.dtypes import BITS, bits, display, is_float


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


def an_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1048576\n"

CASES = [
    (save({"a": np.zeros(3, np.float32)}), "safetensors"),
    ((17).to_bytes(8, "little") + b'  {"a": 1}       ', "safetensors"),
    (a_zip(), "zip"),
    (b"PK\x05\x06" + bytes(18), "zip"),
    *[(pickle.dumps({"a": 1}, protocol), "pickle") for protocol in (2, 3, 4, 5)],
    (b"GGUF\x03\x00\x00\x00" + bytes(20), "gguf"),
    (gzip.compress(b"hello"), "gzip"),
    (LFS, "lfs-pointer"),
    (b"<!DOCTYPE html><html></html>", "html"),
    (b"\n\n  <!doctype HTML>", "html"),
    (b"\xef\xbb\xbf<html lang=en>", "html"),
    (an_npy(), "npy"),
    (json.dumps({"weight_map": {"a": "b"}}).encode(), "json"),
    (b'\xef\xbb\xbf  {"a": 1}', "json"),
    (b"[1, 2]", "json"),
    (b"", "empty"),
    (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "onnx"),
    (b"\x08\x0a\x3a\x90\x01", "onnx"),
    (b"\x00" * 4, "unknown"),
    (b"\xff" * 64, "unknown"),
    (b"x", "unknown"),
]


@pytest.mark.parametrize(("data", "kind"), CASES, ids=[f"{i}-{kind}" for i, (_, kind) in enumerate(CASES)])
def test_a_file_is_told_by_its_first_bytes(data: bytes, kind: str) -> None:
    assert magic.identify(data[: magic.PREFIX_BYTES], len(data)) == kind


def test_a_header_length_that_spells_another_magic_is_still_safetensors() -> None:
    for start in (b"\x1f\x8b", b"\x80\x02", b"\x08\x08\x12"):
        assert magic.identify(start.ljust(8, b"\0") + b'{"a":', 50_000_000) == "safetensors"


@pytest.mark.parametrize("kind", sorted({kind for _, kind in CASES}))
def test_every_kind_is_described_with_a_fix(kind: str) -> None:
    what, fix = magic.describe(kind)
    assert what
    assert fix


def test_descriptions_name_the_usual_way_out() -> None:
    assert "git lfs pull" in magic.describe("lfs-pointer")[1]
    assert "--allow-pickle" in magic.describe("zip")[1]
    assert "download" in magic.describe("empty")[0]


def test_dtypes_have_the_sizes_of_the_format() -> None:
    assert len(BITS) == 22
    assert (bits("BF16"), bits("F32"), bits("F4"), bits("F6_E2M3"), bits("C64"), bits("BOOL")) == (
        16,
        32,
        4,
        6,
        64,
        8,
    )
    with pytest.raises(KeyError):
        bits("F16 ")


def test_dtypes_have_names_for_people() -> None:
    names = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8", "X1": "X1"}
    assert {name: display(name) for name in names} == names
    assert len({display(name) for name in BITS}) == len(BITS)


def test_floats_are_told_from_the_rest() -> None:
    not_floats = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "C64"}
    assert {name for name in BITS if not is_float(name)} == not_floats
    assert not is_float("NOPE")
