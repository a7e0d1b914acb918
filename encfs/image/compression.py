"""Decompression of image layers as a stream: tar, tar+gzip, tar+zstd (OCI image-spec v1.1, layer.md). Bounded.

What comes out is given in pieces of at most `PIECE_SIZE`, and no more in all than the caller allows: a bomb is an
error, never memory. Several gzip members or zstd frames in a row are one stream, as gzip(1), zstd(1) and container
engines read them; anything else behind the last one is an error, and so is an end in the middle.

zstd comes from the standard library of Python 3.14, or its backport: `zstandard`, which frames use, neither bounds the
output of a call nor tells a stream that is cut short from one that is complete.
"""

from __future__ import annotations

import enum
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

from encfs.errors import FormatError
from encfs.units import format_size

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Bytes of a piece of output at most.
PIECE_SIZE = 1 << 20
#: What a layer may grow to where nothing else is asked for: so many bytes, or so many times its compressed size.
DEFAULT_MAX_SIZE = 16 << 30
DEFAULT_MAX_RATIO = 64
# Logarithm of the largest window that a zstd frame may ask memory for: what zstd(1) takes without being asked, too.
_MAX_WINDOW_LOG = 27


class Compression(enum.Enum):
    """How a layer is compressed; the values are the suffixes of OCI's media types."""

    NONE = ""
    GZIP = "gzip"
    ZSTD = "zstd"


def allowed_size(compressed_size: int, maximum: int | None = None) -> int:
    """How many bytes a layer of `compressed_size` bytes may decompress to; `maximum` overrides the default."""
    return max(DEFAULT_MAX_SIZE, DEFAULT_MAX_RATIO * compressed_size) if maximum is None else maximum


def decompressed(chunks: Iterable[bytes], compression: Compression, *, limit: int, what: str) -> Iterator[bytes]:
    """The content of a layer whose bytes come in `chunks`; `what` names it in messages.

    Raises: FormatError where it is corrupt, cut short, has something behind its end, or is more than `limit` bytes.
    """
    size = 0
    for piece in _pieces(chunks, compression, what):
        size += len(piece)
        if size > limit:
            raise FormatError(
                f"{what} decompresses to more than {format_size(limit)}",
                hint="it may be a bomb; if it is none, allow larger layers",
            )
        yield piece


class _Decompressor(Protocol):
    """One member or frame, in the manner of the standard library."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class _Gzip:
    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data and not self._member.eof:
            yield self._member.decompress(data, PIECE_SIZE)
            data = self._member.unconsumed_tail
        # Output that no input stands for any more.
        while not self._member.eof and (piece := self._member.decompress(b"", PIECE_SIZE)):
            yield piece


class _Zstd:
    def __init__(self) -> None:
        self._frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._frame.decompress(data, PIECE_SIZE)
        while not self._frame.eof and not self._frame.needs_input:
            yield self._frame.decompress(b"", PIECE_SIZE)


def _pieces(chunks: Iterable[bytes], compression: Compression, what: str) -> Iterator[bytes]:
    if compression is Compression.NONE:
        yield from chunks
        return
    kind = _Gzip if compression is Compression.GZIP else _Zstd
    current: _Decompressor = kind()
    begun = False
    try:
        for chunk in chunks:
            data = bytes(chunk)
            while data:
                if current.eof:
                    current, begun = kind(), False
                begun = True
                yield from filter(None, current.feed(data))
                data = current.unused_data if current.eof else b""
    except (zlib.error, zstd.ZstdError) as error:
        raise FormatError(f"{what} is no sound {compression.value} stream: {error}") from None
    if not begun or not current.eof:
        raise FormatError(f"{what} ends in the middle of its {compression.value} stream")
