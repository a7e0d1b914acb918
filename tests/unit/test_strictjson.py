"""The strict JSON reader: what it accepts means one thing, everything else is a FormatError."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encfs import strictjson
from encfs.errors import FormatError

LIMIT = 1 << 16


def load(content: bytes) -> object:
    return strictjson.loads(content, limit=LIMIT, what="document")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a":1,"a":1}', "repeats the member 'a'"),
        (b'{"a":1,"\\u0061":2}', "repeats the member 'a'"),
        (b'[{"x":{"b":0,"c":1,"b":null}}]', "repeats the member 'b'"),
        (b"1.0", "no integer"),
        (b"1e3", "no integer"),
        (b"[NaN]", "NaN"),
        (b"-Infinity", "Infinity"),
        (b"9007199254740992", "out of range"),
        (b"-9007199254740992", "out of range"),
        (b"-0", "out of range"),
        (b"9" * 60000, "out of range"),
        (b"[" * 17 + b"]" * 17, "deeper than 16"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "deeper than 16"),
        (b"[" * 60000, "deeper than 16"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udc00x":1}', "surrogate"),
        (b'"a\\u0000b"', "NUL"),
        ('"é\\u0000"'.encode(), "NUL"),
        (b'"a\nb"', "not JSON"),
        (b"01", "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b"[1,]", "not JSON"),
        (b" " * (LIMIT + 1), "more than the 65536"),
    ],
)
def test_refused(content: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        load(content)
    assert caught.value.message.startswith("document ")
    assert "\n" not in str(caught.value)


def test_accepted_at_the_bounds() -> None:
    assert load(b"[9007199254740991,-9007199254740991]") == [2**53 - 1, 1 - 2**53]
    assert load(b"[" * 16 + b"]" * 16) is not None
    assert load('{"a":"\\ud83d\\ude00é"}'.encode()) == {"a": "😀é"}
    assert load(b"1".rjust(LIMIT)) == 1


def test_the_number_of_values_is_bounded() -> None:
    """What is parsed takes up to 30 times the memory of its text."""
    for piece in (b"{},", b"[],", b"0,"):
        with pytest.raises(FormatError, match="document holds more than 262144 values"):
            strictjson.loads(b"[" + piece * (1 << 18) + b"0]", limit=1 << 20, what="document")
    assert strictjson.loads(b"[" + b"0," * 100_000 + b"0]", limit=1 << 20, what="document") == [0] * 100_001


def test_errors_do_not_carry_the_document() -> None:
    with pytest.raises(FormatError) as caught:
        load(b'{"k":"topsecret"')
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_object_wanted() -> None:
    assert strictjson.loads_object(b'{"a":[]}', limit=9, what="document") == {"a": []}
    with pytest.raises(FormatError, match="document is not a JSON object"):
        strictjson.loads_object(b"[]", limit=9, what="document")


def test_shown_names_are_one_short_ascii_line() -> None:
    assert strictjson.show_name("a\nb") == "'a\\nb'"
    assert len(strictjson.show_name("x" * 10_000)) < 60
    assert strictjson.show_name("\u202eevil") == "'\\u202eevil'"


_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**53, 2**53 - 1) | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=12,
)


@given(_json)
def test_round_trip(value: object) -> None:
    try:
        assert load(json.dumps(value).encode()) == value
    except FormatError as error:
        assert "deeper" in error.message  # noqa: PT017


@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123eE.-\\unl tr', max_size=40).map(str.encode))
def test_anything_else_is_a_format_error(content: bytes) -> None:
    try:
        value = load(content)
    except FormatError:
        return
    assert json.loads(content) == value
