"""A layer's plain bytes on their way: read piece by piece, counted, and hashed to its diff ID."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator


class ByteStream:
    """What comes out of an iterator of pieces (`encfs.tar.reader.Input`)."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._hash = hashlib.sha256()
        self.size = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a part of `buffer` from its start; 0 at the end. Raises: what the pieces raise."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self.size += len(piece)
            self._hash.update(piece)
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def digest(self) -> str:
        """`sha256:<hex>` of all pieces so far."""
        return f"sha256:{self._hash.hexdigest()}"
