"""The readers of one blob, told apart by where they are, and what each is going to want. No request is made here."""

from __future__ import annotations

#: Bytes that are kept ahead of a reader at most.
_LARGEST_WINDOW = 16 << 20
#: Bytes of one request that reads ahead, so that several connections share a window.
_LEAST_AHEAD, _MOST_AHEAD = 512 << 10, 8 << 20
#: How far from the end of the last read (bytes) the next one counts as going on from there.
_SLACK = 64 << 10
#: How far behind that (bytes) a read still belongs to the same reader: the kernel asks for several pieces at a time.
_BEHIND = 2 << 20
#: Readers of one blob that are told apart.
_READERS = 8


class _Reader:
    """A reader that may go on: where its first read ended, where it is, how far was ordered."""

    __slots__ = ("ordered", "position", "start")

    def __init__(self, position: int) -> None:
        self.start = position
        self.position = position
        self.ordered = position

    @property
    def window(self) -> int:
        """Bytes that are wanted ahead of it: as many as it has gone on for, so that a short one does not cost much."""
        return min(self.position - self.start, _LARGEST_WINDOW)


class Readers:
    """Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._readers: list[_Reader] = []

    def orders(self, offset: int, size: int, end_of_blob: int) -> list[tuple[int, int]]:
        """Note a read; ranges (start, end) to fetch for a reader that goes on, each as a request of its own."""
        reader = self._find(offset, size)
        if reader is None or reader.ordered - reader.position > reader.window // 2:
            return []
        start = max(reader.ordered, reader.position)
        end = min(reader.position + reader.window, end_of_blob)
        step = max(_LEAST_AHEAD, min(_MOST_AHEAD, reader.window // 2))
        reader.ordered = max(reader.ordered, end)
        return [(first, min(first + step, end)) for first in range(start, end, step)]

    def _find(self, offset: int, size: int) -> _Reader | None:
        """The reader that goes on with a read; None where it is the first of one, or somewhere behind."""
        end = offset + size
        for number, reader in enumerate(self._readers):
            if reader.position <= offset <= reader.position + _SLACK:
                reader.position = end
                self._readers.append(self._readers.pop(number))
                return reader
            if reader.position - _BEHIND <= offset and end <= reader.position and reader.window:
                return None
        self._readers.append(_Reader(end))
        del self._readers[:-_READERS]
        return None
