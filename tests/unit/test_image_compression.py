"""Decompression of layers: equal to what was compressed, whatever the pieces; bounded; corrupt and cut streams."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.errors import FormatError
from encfs.image.compression import PIECE_SIZE, Compression, allowed_size, decompressed
from encfs.image.mediatypes import LAYER_TYPES

_CONTENT = random.Random(1).randbytes(300_000) + bytes(2_000_000)
_COMPRESSORS = {
    Compression.NONE: bytes,
    Compression.GZIP: gzip.compress,
    Compression.ZSTD: lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
_COMPRESSED = {kind: _COMPRESSORS[kind](_CONTENT) for kind in Compression}
_SQUEEZED = [Compression.GZIP, Compression.ZSTD]


def _chunks(data: bytes, size: int) -> Iterator[bytes]:
    for position in range(0, len(data), size):
        yield data[position : position + size]


def _all(data: bytes, kind: Compression, *, size: int = 4096, limit: int = 1 << 30) -> bytes:
    return b"".join(decompressed(_chunks(data, size), kind, limit=limit, what="the layer"))


@pytest.mark.parametrize("kind", list(Compression))
@given(size=st.integers(97, 1 << 20), copies=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_content_comes_back(kind: Compression, size: int, copies: int) -> None:
    assert _all(_COMPRESSED[kind] * copies, kind, size=size) == _CONTENT * copies


@pytest.mark.parametrize("kind", _SQUEEZED)
@pytest.mark.parametrize("size", [0, 1, 20, len(_COMPRESSED[Compression.ZSTD]) - 1])
def test_a_stream_that_is_cut_short_is_refused(kind: Compression, size: int) -> None:
    with pytest.raises(FormatError, match=f"the layer ends in the middle of its {kind.value} stream"):
        _all(_COMPRESSED[kind][:size], kind)


@pytest.mark.parametrize("kind", _SQUEEZED)
def test_something_behind_the_end_is_refused(kind: Compression) -> None:
    with pytest.raises(FormatError, match=f"sound {kind.value} stream"):
        _all(_COMPRESSED[kind] + b"something else", kind)


@pytest.mark.parametrize("kind", _SQUEEZED)
def test_a_corrupt_stream_is_refused(kind: Compression) -> None:
    data = bytearray(_COMPRESSED[kind])
    data[1000] ^= 1
    with pytest.raises(FormatError, match="sound"):
        _all(bytes(data), kind)


@pytest.mark.parametrize("kind", list(Compression))
def test_more_than_is_allowed_is_refused(kind: Compression) -> None:
    assert _all(_COMPRESSED[kind], kind, limit=len(_CONTENT)) == _CONTENT
    with pytest.raises(FormatError, match="decompresses to more than") as caught:
        _all(_COMPRESSED[kind], kind, limit=len(_CONTENT) - 1)
    assert caught.value.hint is not None


@pytest.mark.parametrize("kind", _SQUEEZED)
def test_a_bomb_takes_no_memory(kind: Compression) -> None:
    bomb = _COMPRESSORS[kind](bytes(64 << 20))
    tracemalloc.start()
    try:
        pieces = [len(piece) for piece in decompressed([bomb], kind, limit=1 << 30, what="it")]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(pieces) == 64 << 20
    assert max(pieces) <= PIECE_SIZE
    assert peak < 8 << 20


def test_a_zstd_frame_with_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    # Without its size a frame states the window that it was made with.
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(_CONTENT) + compressor.flush()
    with pytest.raises(FormatError, match="sound zstd"):
        _all(data, Compression.ZSTD)


def test_allowed_sizes() -> None:
    assert allowed_size(1) == 16 << 30
    assert allowed_size(1 << 30) == 64 << 30
    assert allowed_size(1 << 30, 5) == 5


def test_layer_types_of_docker_have_names_in_oci() -> None:
    layer = LAYER_TYPES["application/vnd.docker.image.rootfs.diff.tar.gzip"]
    assert layer.oci == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert layer.compression is Compression.GZIP
    assert all(LAYER_TYPES[kind.oci] == kind for kind in LAYER_TYPES.values())
    assert len(LAYER_TYPES) == 12
