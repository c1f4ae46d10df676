"""Strict JSON: what is accepted, what is refused, and that nothing but InputError comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramerge.errors import InputError
from loramerge.tensors import strictjson


def loads(data: bytes, **options: Any) -> Any:
    return strictjson.loads(data, where="config.json", code="config.invalid", **options)


def refused(data: bytes, *words: str, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        loads(data, **options)
    assert caught.value.code == "config.invalid"
    assert caught.value.file == "config.json"
    assert caught.value.fix
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message
    return caught.value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    # st.text() makes no surrogates
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(json_values, st.booleans())
def test_valid_documents_mean_what_the_standard_parser_says(value: Any, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert loads(data) == json.loads(data)


def test_byte_order_mark_is_accepted_unless_forbidden() -> None:
    assert loads(b'\xef\xbb\xbf{"r": 8}') == {"r": 8}
    refused(b'\xef\xbb\xbf{"r": 8}', allow_bom=False)


def test_syntax_error_tells_line_and_column() -> None:
    refused(b'{\n  "r": 8,\n  "alpha" 16\n}', "line 3", "column 11")
    refused(b"", "line 1", "column 1")


def test_bytes_that_are_not_utf8_tell_line_and_byte() -> None:
    refused(b'{"a": 1,\n "b": "\xff"}', "not UTF-8", "line 2", "byte 8")
    refused('{"a": 1}'.encode("utf-16"), "not UTF-8")
    refused(b'{"\xed\xa0\x80": 1}', "not UTF-8")  # a surrogate, encoded


def test_duplicate_keys_are_refused_at_any_level() -> None:
    refused(b'{"r": 8, "r": 16}', "duplicate key 'r'")
    refused(b'{"a": [{"x": 1, "x": 1}]}', "duplicate key 'x'")
    refused(b'{"a": 1, "\\u0061": 1}', "duplicate key 'a'")


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity"])
def test_literals_outside_the_standard_are_refused(text: bytes) -> None:
    refused(b'{"alpha": ' + text + b"}", text.decode(), "not a JSON number")


def test_numbers_out_of_range_are_refused() -> None:
    refused(b"[1e999]", "out of range")
    refused(b"[-1e999]", "out of range")
    refused(b"[" + b"9" * 66 + b"]", "66 digits")
    refused(b"[" + b"9" * 10_000 + b"]")
    refused(b"[" + b"9" * 10_000 + b"," + b" " * 2_000_000 + b"1]")


def test_large_but_real_integers_are_accepted() -> None:
    assert loads(b'{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 10**29


def test_minus_zero_is_not_an_integer() -> None:
    assert type(loads(b"-0")) is float
    assert type(loads(b"0")) is int


@pytest.mark.parametrize("text", [b'"\\ud800"', b'{"\\udfff": 1}', b'[["\\ud800\\u0041"]]', b'"\\udc00\\ud800"'])
def test_lone_surrogates_are_refused(text: bytes) -> None:
    refused(text, "lone surrogate")


def test_surrogate_pairs_are_accepted() -> None:
    assert loads(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_nesting_is_bounded_far_and_near() -> None:
    assert loads(b"[" * 64 + b"]" * 64)
    refused(b"[" * 65 + b"]" * 65, "nested more than 64")
    refused(b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64")
    refused(b"[" * 1_000_000, "nested")
    refused(b"[" * 1_000_000 + b"]" * 1_000_000, "nested")
    refused(b"[[[]]]", "nested more than 2", max_depth=2)


def test_length_is_bounded() -> None:
    refused(b"[1, 2, 3]", "9 bytes", max_bytes=8)


def test_a_key_is_escaped_in_the_message() -> None:
    message = refused(b'{"\\u001b[2J": 1, "\\u001b[2J": 2}').message
    assert "\x1b" not in message
    assert "\\x1b" in message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('{}[]",:0123456789eE+-.\\utrfalsnN ', max_size=40).map(str.encode))
def test_nothing_but_input_error_comes_out(data: bytes) -> None:
    try:
        value = loads(data)
    except InputError:
        return
    json.dumps(value).encode()
