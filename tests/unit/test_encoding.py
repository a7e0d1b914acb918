"""Strict encodings: exactly one text per value."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encfs import encoding
from encfs.errors import FormatError


@given(st.binary(max_size=100))
def test_round_trips(data: bytes) -> None:
    assert encoding.b64url_decode(encoding.b64url_encode(data), "x") == data
    assert encoding.b64_decode(encoding.b64_encode(data), "x") == data
    assert encoding.hex_decode(data.hex(), "x") == data
    assert encoding.b64_encode(bytearray(data)) == base64.b64encode(data).decode()
    assert encoding.b64url_encode(memoryview(data)) == base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize(
    "text", ["AA==", "AA=", "A", "AB", "AAB", "A A", "AA\n", "+/", "ÀA", "A" * 5, None, 1, b"AA", ["AA"]]
)
def test_b64url_refuses(text: object) -> None:
    with pytest.raises(FormatError, match="value is not canonical base64url"):
        encoding.b64url_decode(text, "value")


@pytest.mark.parametrize("text", ["AA", "AB==", "AAB=", "A A=", "AA==\n", "-_==", "A===", "====", "AA==AA==", None, 0])
def test_b64_refuses(text: object) -> None:
    with pytest.raises(FormatError, match="value is not canonical base64"):
        encoding.b64_decode(text, "value")


@pytest.mark.parametrize("text", ["0", "AB", "0x", " 00", "00\n", "０0", None])
def test_hex_refuses(text: object) -> None:
    with pytest.raises(FormatError, match="value is not lower-case hexadecimal"):
        encoding.hex_decode(text, "value")


@given(st.text(alphabet="AQgwB-_=+/", max_size=9))
def test_one_text_per_value(text: str) -> None:
    for decode, encode in (
        (encoding.b64url_decode, encoding.b64url_encode),
        (encoding.b64_decode, encoding.b64_encode),
    ):
        try:
            data = decode(text, "x")
        except FormatError:
            continue
        assert encode(data) == text


def test_digest() -> None:
    digest = encoding.sha256_digest(b"abc")
    assert digest == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert encoding.parse_digest(digest) == bytes.fromhex(digest[7:])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "A" * 64,
        "sha512:" + "0" * 64,
        "0" * 64,
        "sha256:" + "0" * 64 + "\n",
        None,
    ],
)
def test_digest_refuses(text: object) -> None:
    with pytest.raises(FormatError, match="pin is not of the form"):
        encoding.parse_digest(text, "pin")
