"""Frames: every field of the associated data counts, and a compressed body has one form."""

from __future__ import annotations

import os
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from encfs.errors import FormatError, IntegrityError
from encfs.format import frames
from encfs.format.frames import (
    MAX_FRAME_SIZE,
    PADDING_UNIT,
    TAG_SIZE,
    FrameCipher,
    FrameGeometry,
    compress_body,
    decompress_body,
    stored_size_is_possible,
)
from encfs.format.suite import SUITES, derive_frame_key

ZSTD = 1
KEY, VOLUME = bytes(range(32)), bytes(range(100, 116))


def seal(index: int, plaintext: bytes, length: int, flags: int = 0, *, suite: str = "blake3") -> bytes:
    out = bytearray(len(plaintext) + TAG_SIZE)
    cipher = FrameCipher(SUITES[suite], VOLUME, KEY)
    cipher.seal_into(index, memoryview(plaintext), length, flags, memoryview(out))
    return bytes(out)


def test_known_answer() -> None:
    """Key derivation and one frame, so that neither ever changes unnoticed."""
    assert derive_frame_key(KEY, VOLUME).hex() == "2992e6cc60e1454f254e74cea75b823d4c385629e942f2b5a7743b332c720b3c"
    assert seal(3, b"plaintext", 9).hex() == "2840ac169c7e9378da3ca1132d5df3eb2b265831926fbe8591"
    assert seal(3, b"plaintext", 9, suite="sha256") != seal(3, b"plaintext", 9)


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 2**40))
def test_round_trip(plaintext: bytes, index: int) -> None:
    out = bytearray(len(plaintext))
    cipher = FrameCipher(SUITES["sha256"], VOLUME, KEY)
    stored = seal(index, plaintext, len(plaintext), suite="sha256")
    cipher.open_into(index, memoryview(stored), len(plaintext), 0, memoryview(out))
    assert out == plaintext


def test_everything_about_a_frame_is_authenticated_and_failure_wipes() -> None:
    stored = seal(5, b"secret" * 10, 60)
    right: dict[str, object] = {"suite": "blake3", "volume": VOLUME, "key": KEY, "index": 5, "length": 60, "flags": 0}
    wrong: list[dict[str, object]] = [
        {},
        {"suite": "sha256"},
        {"volume": bytes(16)},
        {"key": bytes(32)},
        {"index": 6},
        {"index": 5 + (1 << 32)},
        {"length": 61},
    ]
    for change in wrong:
        case = {**right, **change}
        out = bytearray(b"x" * 60)
        cipher = FrameCipher(SUITES[str(case["suite"])], case["volume"], case["key"])  # type: ignore[arg-type]
        if not change:
            cipher.open_into(5, memoryview(stored), 60, 0, memoryview(out))
            assert out == b"secret" * 10
            continue
        with pytest.raises(IntegrityError):
            cipher.open_into(case["index"], memoryview(stored), case["length"], 0, memoryview(out))  # type: ignore[arg-type]
        assert not any(out), change
    with pytest.raises(IntegrityError):
        FrameCipher(SUITES["blake3"], VOLUME, KEY).open_into(5, memoryview(stored), 60, ZSTD, memoryview(bytearray(60)))


def test_keys_show_in_no_repr() -> None:
    cipher = FrameCipher(SUITES["blake3"], VOLUME, KEY)
    assert KEY.hex() not in repr(cipher)
    assert not hasattr(cipher, "__dict__")


@pytest.mark.parametrize(
    ("size", "frame_size", "count", "last"),
    [(0, 4096, 0, None), (1, 4096, 1, 1), (4096, 4096, 1, 4096), (4097, 4096, 2, 1)],
)
def test_geometry(size: int, frame_size: int, count: int, last: int | None) -> None:
    geometry = FrameGeometry(size, frame_size)
    assert geometry.count == count
    if last is not None:
        assert geometry.length(count - 1) == last


def test_stored_sizes() -> None:
    assert stored_size_is_possible(4096 + 16, 4096, 0)
    assert not stored_size_is_possible(4096 + 15, 4096, 0)
    assert stored_size_is_possible(4096 + 16, 8192, ZSTD)
    for stored in (0, 15, 16, 17, 4096, 8192 + 16, 12288 + 16):
        assert not stored_size_is_possible(stored, 8192, ZSTD)


# -- compressed bodies

LENGTH = 65536
PLAIN = b"abcdefgh" * (LENGTH // 8)


def body_of(compressed: bytes, *, stated: int | None = None, padding: bytes | None = None) -> bytes:
    head = struct.pack(">I", len(compressed) if stated is None else stated) + compressed
    return head + (bytes(-len(head) % PADDING_UNIT) if padding is None else padding)


def test_compressed_bodies_round_trip_and_are_padded() -> None:
    for plaintext in (PLAIN, bytes(LENGTH), os.urandom(30_000) + bytes(LENGTH - 30_000)):
        body = compress_body(memoryview(plaintext), zstandard.ZstdCompressor())
        assert body is not None
        assert len(body) % PADDING_UNIT == 0
        assert decompress_body(body, LENGTH, 0) == plaintext


def test_what_compression_does_not_shrink_by_a_unit_stays_as_it_is() -> None:
    compressor = zstandard.ZstdCompressor()
    assert compress_body(memoryview(os.urandom(LENGTH)), compressor) is None
    assert compress_body(memoryview(bytes(PADDING_UNIT)), compressor) is None
    assert compress_body(memoryview(bytes(PADDING_UNIT + 1)), compressor) is not None


def malformed_bodies() -> dict[str, bytes]:
    right = zstandard.ZstdCompressor().compress(PLAIN)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(PLAIN)
    larger = zstandard.ZstdCompressor().compress(PLAIN + b"x")
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(PLAIN)
    # A frame that states the right size and holds more: its header is spliced onto another frame's blocks.
    header = zstandard.frame_header_size(right)
    other = zstandard.frame_header_size(bomb)
    return {
        "empty": b"",
        "three bytes": b"\0\0\0",
        "length beyond the body": body_of(right, stated=1 << 20),
        "length of nothing": body_of(b""),
        "padding that is not zero": body_of(right)[:-1] + b"\1",
        "a whole unit of padding": body_of(right) + bytes(PADDING_UNIT),
        "trailing data": body_of(right + b"x"),
        "two frames": body_of(right + right),
        "a skippable frame behind": body_of(right + b"\x50\x2a\x4d\x18\0\0\0\0"),
        "a skippable frame in front": body_of(b"\x50\x2a\x4d\x18\0\0\0\0" + right),
        "no size stated": body_of(unsized),
        "another size stated": body_of(larger),
        "a bomb": body_of(bomb),
        "a bomb that states the right size": body_of(right[:header] + bomb[other:]),
        "a damaged checksum": body_of(checked[:-1] + bytes([checked[-1] ^ 1])),
        "cut": body_of(right[:-1]),
        "no zstd": body_of(b"not zstd at all"),
    }


@pytest.mark.parametrize("what", malformed_bodies())
def test_malformed_bodies_are_refused(what: str) -> None:
    with pytest.raises(FormatError, match="compressed frame 9 is malformed"):
        decompress_body(malformed_bodies()[what], LENGTH, 9)


def test_a_dictionary_is_refused() -> None:
    samples: list[bytes | bytearray | memoryview] = [
        os.urandom(4) * 50 + b"common text %d" % number for number in range(200)
    ]
    dictionary = zstandard.train_dictionary(4096, samples)
    compressed = zstandard.ZstdCompressor(dict_data=dictionary).compress(PLAIN)
    with pytest.raises(FormatError, match="dictionary"):
        decompress_body(body_of(compressed), LENGTH, 0)


def test_a_window_beyond_any_frame_is_refused() -> None:
    """A header that asks for a window of 2 GiB would have the decompressor allocate it."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0x80, 0xA8]) + struct.pack("<I", LENGTH)
    assert zstandard.get_frame_parameters(header).window_size > 2 * MAX_FRAME_SIZE
    with pytest.raises(FormatError, match="window"):
        decompress_body(body_of(header + b"\1\0\0"), LENGTH, 0)


def test_every_flipped_byte_of_a_compressed_body_is_refused_or_the_same() -> None:
    """Behind the tag only the owner can write one of these; the decompressor has to bear it all the same."""
    plaintext = (b"some text that compresses " * 400)[:8192]
    body = compress_body(memoryview(plaintext), zstandard.ZstdCompressor())
    assert body is not None
    for position in range(len(body)):
        changed = bytearray(body)
        changed[position] ^= 0x41
        try:
            result = decompress_body(bytes(changed), 8192, 0)
        except FormatError:
            continue
        assert len(result) == 8192


def test_the_associated_data_has_one_layout() -> None:
    assert frames._ASSOCIATED_DATA.size == 14 + 1 + 1 + 16 + 8 + 4
    assert frames._NONCE.pack(1) == bytes(11) + b"\1"
