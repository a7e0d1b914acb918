"""Read a structure of varying lengths from untrusted bytes, front to back, never past its end."""

from __future__ import annotations

from encfs.errors import FormatError


class Cursor:
    """What is left of some bytes. Every method takes from the front."""

    def __init__(self, data: bytes, what: str, *, big_endian: bool) -> None:
        self._data = data
        self._at = 0
        self._what = what
        self._big = big_endian

    def take(self, size: int) -> bytes:
        """The next `size` bytes. Raises: FormatError where there are fewer."""
        if size > len(self._data) - self._at:
            raise FormatError(f"{self._what} is cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        """The next `size` bytes as a number. Raises: FormatError."""
        return int.from_bytes(self.take(size), "big" if self._big else "little")

    def sized(self, prefix: int) -> bytes:
        """Bytes behind their own length, which has `prefix` bytes. Raises: FormatError."""
        return self.take(self.number(prefix))

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def rest(self) -> bytes:
        return self.take(self.left)

    def end(self) -> None:
        """Raises: FormatError where anything is left."""
        if self.left:
            raise FormatError(f"{self._what} has {self.left} bytes too many")
