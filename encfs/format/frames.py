"""One frame: how it is sealed and opened, compressed and padded. Not here: where frames lie (`tree`, `writer`).

A sealed frame is AES-256-GCM ciphertext and its 16-byte tag. The nonce is the frame's index, the associated data
binds format, suite, flags, volume, index and plaintext length (format.md, "Frames").
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encfs.errors import FormatError, IntegrityError
from encfs.format.suite import Suite, derive_frame_key

TAG_SIZE = 16
MIN_FRAME_SIZE = 4096
MAX_FRAME_SIZE = 4 << 20
DEFAULT_FRAME_SIZE = 32 << 10
#: A compressed frame's sealed plaintext is padded to a multiple of this many bytes.
PADDING_UNIT = 4096

#: Associated data: label, suite number, flags, volume id, frame index, plaintext length. Big-endian.
_ASSOCIATED_DATA = struct.Struct(">14s B B 16s Q I")
_LABEL = b"encfs/1 frame\0"
#: Nonce: four zero bytes and the frame index. Big-endian.
_NONCE = struct.Struct(">4x Q")
#: What stands before the compressed bytes: their length.
_COMPRESSED_LENGTH = struct.Struct(">I")


#: Flags of a frame, in its tree entry and its associated data. Plain integers: `enum` costs as much per frame as AES.
FLAG_ZSTD = 1
KNOWN_FLAGS = FLAG_ZSTD


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """How a volume of `size` bytes is cut: every frame holds `frame_size` bytes but the last, which holds the rest."""

    size: int
    frame_size: int

    @property
    def count(self) -> int:
        """Number of frames; 0 for an empty volume."""
        return -(-self.size // self.frame_size)

    def length(self, index: int) -> int:
        """Plaintext bytes of frame `index`."""
        return min(self.frame_size, self.size - index * self.frame_size)


def check_frame_size(frame_size: int) -> None:
    """Raises FormatError unless `frame_size` is a power of two within bounds."""
    if not MIN_FRAME_SIZE <= frame_size <= MAX_FRAME_SIZE or frame_size & (frame_size - 1):
        raise FormatError(f"frame size {frame_size} is not a power of two from {MIN_FRAME_SIZE} to {MAX_FRAME_SIZE}")


def stored_size_is_possible(stored: int, length: int, flags: int) -> bool:
    """Whether a frame of `length` plaintext bytes with these `flags` can be stored in `stored` bytes."""
    if flags & FLAG_ZSTD:
        body = stored - TAG_SIZE
        return 0 < body < length and body % PADDING_UNIT == 0
    return stored == length + TAG_SIZE


class FrameCipher:
    """Seals and opens the frames of one volume. Thread-safe. Holds the frame key; its `repr` shows none of it."""

    __slots__ = ("_aead", "_suite", "_volume_id")

    def __init__(self, suite: Suite, volume_id: bytes, volume_key: bytes | bytearray) -> None:
        self._suite = suite
        self._volume_id = volume_id
        self._aead = AESGCM(derive_frame_key(volume_key, volume_id))

    def _associated_data(self, index: int, length: int, flags: int) -> bytes:
        return _ASSOCIATED_DATA.pack(_LABEL, self._suite.number, flags, self._volume_id, index, length)

    def seal_into(self, index: int, plaintext: memoryview, length: int, flags: int, out: memoryview) -> None:
        """Seal `plaintext` (as stored: already compressed and padded if `flags` say so) of a frame of `length` bytes.

        `out` has room for exactly the ciphertext and the tag. Each index may be sealed once per volume key.
        """
        self._aead.encrypt_into(_NONCE.pack(index), plaintext, self._associated_data(index, length, flags), out)

    def open_into(self, index: int, stored: memoryview, length: int, flags: int, out: memoryview) -> None:
        """Open a frame into `out`, which has exactly `length` bytes. On failure `out` is wiped.

        Raises: IntegrityError where the tag does not fit; FormatError where an authentic frame is malformed inside.
        """
        if flags & FLAG_ZSTD:
            out[:] = self._open_compressed(index, stored, length, flags)
            return
        try:
            self._aead.decrypt_into(_NONCE.pack(index), stored, self._associated_data(index, length, flags), out)
        except InvalidTag:
            # decrypt_into leaves the unauthenticated plaintext in the buffer.
            out[:] = bytes(len(out))
            raise IntegrityError(f"frame {index} does not authenticate under its volume's key") from None

    def _open_compressed(self, index: int, stored: memoryview, length: int, flags: int) -> bytes:
        try:
            body = self._aead.decrypt(_NONCE.pack(index), stored, self._associated_data(index, length, flags))
        except InvalidTag:
            raise IntegrityError(f"frame {index} does not authenticate under its volume's key") from None
        return decompress_body(body, length, index)


_per_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor: contexts are costly to make and may not be shared."""
    try:
        return _per_thread.decompressor  # type: ignore[no-any-return]
    except AttributeError:
        _per_thread.decompressor = zstandard.ZstdDecompressor()
        return _per_thread.decompressor  # type: ignore[no-any-return]


def compress_body(plaintext: memoryview, compressor: zstandard.ZstdCompressor) -> bytes | None:
    """The padded, compressed body of a frame, or None where it would not be smaller than the frame itself."""
    compressed = compressor.compress(plaintext)
    used = _COMPRESSED_LENGTH.size + len(compressed)
    padded = -(-used // PADDING_UNIT) * PADDING_UNIT
    if padded >= len(plaintext):
        return None
    return _COMPRESSED_LENGTH.pack(len(compressed)) + compressed + bytes(padded - used)


def decompress_body(body: bytes, length: int, index: int) -> bytes:
    """Undo `compress_body`: exactly `length` bytes, the padding all zeros and the shortest. Raises FormatError."""

    def malformed(why: str) -> FormatError:
        return FormatError(f"compressed frame {index} is malformed: {why}")

    if len(body) < _COMPRESSED_LENGTH.size:
        raise malformed("no room for the length")
    (size,) = _COMPRESSED_LENGTH.unpack_from(body)
    end = _COMPRESSED_LENGTH.size + size
    if end > len(body) or len(body) - end >= PADDING_UNIT:
        raise malformed("the length does not fit the body")
    if body.count(0, end) != len(body) - end:
        raise malformed("the padding is not all zeros")
    compressed = memoryview(body)[_COMPRESSED_LENGTH.size : end]
    try:
        # max_output_size does not bound a zstd frame that states its content size: look at that first.
        parameters = zstandard.get_frame_parameters(compressed)
        if parameters.content_size != length or parameters.dict_id:
            raise malformed("it states another size or wants a dictionary")
        if parameters.window_size > MAX_FRAME_SIZE * 2:
            raise malformed("its window is too large")
        plaintext = _decompressor().decompress(compressed, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise malformed(str(error)) from None
    if len(plaintext) != length:
        raise malformed("it holds another number of bytes than it states")
    return plaintext
