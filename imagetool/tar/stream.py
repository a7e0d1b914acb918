"""Bytes from pieces: counted, bounded, hashed; decompressed by what they begin with. Memory is bounded by a window.

gzip (RFC 1952, several members as well) and zstd (RFC 8878, several frames as well) are told by their magic numbers and
not by a media type: docker archives have none, and what is read is checked against the layer's diff ID in any case.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Final

from encfs.errors import SourceError

_GZIP_MAGIC: Final = b"\x1f\x8b"
#: The magic numbers of a zstd frame, and of a skippable one (its first byte's lower half is free).
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"
_PIECE_SIZE: Final = 1 << 18
#: Largest window of a zstd frame (bytes): what `zstd` itself reads without being asked for more.
_MAX_WINDOW: Final = 1 << 27


class ByteStream:
    """What comes out of an iterator of pieces. At most `limit` bytes; `what` names it in messages."""

    def __init__(self, pieces: Iterator[bytes], *, limit: int, what: str) -> None:
        self._pieces = pieces
        self._limit = limit
        self._what = what
        self._piece = memoryview(b"")
        self._hash = hashlib.sha256()
        self.size = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Raises: SourceError where there are more bytes than allowed; what the pieces raise."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self.size += len(piece)
            if self.size > self._limit:
                raise SourceError(
                    f"{self._what} unpacks to more than {self._limit} bytes",
                    hint="allow more with --max-layer-size if you trust it",
                )
            self._hash.update(piece)
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def digest(self) -> str:
        """`sha256:<hex>` of all bytes so far."""
        return f"sha256:{self._hash.hexdigest()}"


def decompressed(pieces: Iterator[bytes], what: str) -> Iterator[bytes]:
    """The plain bytes of pieces that are gzip, zstd or plain, in pieces that are not larger than 256 KiB where they
    were compressed. Raises: SourceError where the compressed data are damaged or cut short."""
    source = _Pieces(pieces)
    head = source.peek(4)
    if head.startswith(_GZIP_MAGIC):
        return _gunzipped(source, what)
    if head == _ZSTD_MAGIC or (head[1:] == _ZSTD_SKIPPABLE and head[:1] and head[0] >> 4 == 5):
        return _unzstd(source, what)
    return iter(source)


class _Pieces:
    """Pieces of which the first bytes can be looked at. Also the file that zstandard reads from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self.ended = False

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(1 << 20):
            yield piece

    def peek(self, size: int) -> bytes:
        while len(self._piece) < size and self._more():
            pass
        return self._piece[:size]

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, b"" at the end."""
        while not self._piece and self._more():
            pass
        if size < 0 or len(self._piece) <= size:
            piece, self._piece = self._piece, b""
            return piece
        piece, self._piece = self._piece[:size], self._piece[size:]
        return piece

    def _more(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            self.ended = True
            return False
        self._piece += piece
        return True


def _gunzipped(source: _Pieces, what: str) -> Iterator[bytes]:
    try:
        data = b""
        while data := data or source.read(_PIECE_SIZE):
            member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            while not member.eof:
                piece = member.decompress(data, _PIECE_SIZE)
                if piece:
                    yield piece
                data = member.unconsumed_tail
                if not data and not member.eof and not piece:
                    data = source.read(_PIECE_SIZE)
                    if not data:
                        raise _damaged(what, "gzip", "cut short")
            data = member.unused_data
    except zlib.error as error:
        raise _damaged(what, "gzip", "damaged") from error


def _unzstd(source: _Pieces, what: str) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    try:
        with decompressor.stream_reader(source, read_across_frames=True, closefd=False) as reader:  # type: ignore[arg-type]
            while piece := reader.read(_PIECE_SIZE):
                yield piece
    except zstandard.ZstdError as error:
        raise _damaged(what, "zstd", "damaged") from error


def _damaged(what: str, kind: str, how: str) -> SourceError:
    return SourceError(f"{what}: its {kind} data are {how}", hint="get it again from where it came from")
