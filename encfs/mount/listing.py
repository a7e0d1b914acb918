"""Directory listings: replies of as many entries as fit, each with its attributes, and what comes next prepared ahead.

While the kernel and its caller work on a reply, the entries that follow are looked up; at the end of a directory, where
directories are visited in the order in which they were listed, those of the next one. Not here: what a directory holds
(`encfs.erofs.reader`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import islice

import pyfuse3
from pyfuse3 import EntryAttributes, ReaddirToken

from encfs.erofs.structures import TYPE_DIRECTORY
from encfs.erofs.tree import DirectoryEntry, Inode
from encfs.errors import EncfsError
from encfs.mount.reading import ImageContents, NotAtHandError

#: Listings under way of which the place is kept; any other place is found again in the image.
_CURSORS = 8
#: Entries that are prepared at most, about what the largest reply holds, and at a time.
_AHEAD = 160
_STEP = 4
#: Directories that a walk is expected to visit, and how many of the first it may skip.
_EXPECTED = 4096
_SKIPPED = 16

_Prepared = tuple[bytes, EntryAttributes, int]


class _Cursor:
    """A place in a directory: what was looked up but not sent, then what is still to be looked up."""

    __slots__ = ("directories", "ended", "entries", "prepared")

    def __init__(self, entries: Iterator[DirectoryEntry]) -> None:
        self.entries = entries
        self.ended = False
        self.prepared: deque[_Prepared] = deque()
        #: The directories among the entries that were looked up.
        self.directories: list[int] = []


class Listings:
    """Answers readdir requests. Everything but `reply_waiting` is for the event loop's thread only."""

    def __init__(
        self, contents: ImageContents, attributes: Callable[[Inode, EntryAttributes], EntryAttributes]
    ) -> None:
        """`attributes` fills in those of an inode."""
        self._contents = contents
        self._attributes = attributes
        self._cursors: OrderedDict[tuple[int, int], _Cursor] = OrderedDict()
        self._ahead: tuple[int, int] | None = None
        self._expected: deque[int] = deque(maxlen=_EXPECTED)
        self._walking = False

    def reply(self, nid: int, start: int, token: ReaddirToken) -> None:
        """Add entries from `start` to the reply until it is full; nothing at the end. Raises: as `ErofsReader`."""
        if start == 0:
            self._note_visit(nid)
        cursor = self._cursors.pop((nid, start), None) or self._cursor(nid, start)
        self._ahead = None
        place = self._fill(cursor, start, token)
        if place is None:
            return
        if place != start:
            self._keep((nid, place), cursor)
        if cursor.ended and not cursor.prepared:
            # A walk goes on below this directory before it goes on beside it.
            self._expected.extendleft(reversed(cursor.directories))
            cursor.directories.clear()

    def reply_waiting(self, nid: int, start: int, token: ReaddirToken) -> None:
        """The same in any thread, which may have to wait."""
        self._fill(self._cursor(nid, start), start, token)

    def prepare(self) -> bool:
        """Look up a few of the entries that will be asked for next. False where there is nothing to do."""
        if self._ahead is None and not self._begin_next_directory():
            return False
        key = self._ahead
        cursor = self._cursors.get(key) if key else None
        if key is None or cursor is None or len(cursor.prepared) >= _AHEAD:
            self._ahead = None
            return False
        try:
            for _ in range(_STEP):
                item = self._next(cursor)
                if item is None:
                    self._ahead = None
                    return self._walking
                cursor.prepared.append(item)
        except Exception:  # noqa: BLE001 - whatever it is, the request itself will meet it, and tell
            del self._cursors[key]
            self._ahead = None
            self._walking = False
        return True

    def _note_visit(self, nid: int) -> None:
        """A listing begins: is this a walk through the directories in the order in which they were listed?"""
        for skipped, expected in enumerate(islice(self._expected, _SKIPPED)):
            if expected == nid:
                for _ in range(skipped + 1):
                    self._expected.popleft()
                self._walking = True
                return
        self._walking = False

    def _begin_next_directory(self) -> bool:
        """During a walk, a cursor for the directory that comes next."""
        if not self._walking or not self._expected:
            return False
        key = (self._expected[0], 0)
        if key in self._cursors:
            return False
        try:
            self._keep(key, self._cursor(*key))
        except Exception:  # noqa: BLE001 - as in `prepare`
            self._walking = False
            return False
        return True

    def _keep(self, key: tuple[int, int], cursor: _Cursor) -> None:
        self._cursors[key] = cursor
        self._ahead = key
        if len(self._cursors) > _CURSORS:
            self._cursors.popitem(last=False)

    def _cursor(self, nid: int, start: int) -> _Cursor:
        return _Cursor(self._contents.image.entries(self._contents.inode(nid), start))

    def _next(self, cursor: _Cursor) -> _Prepared | None:
        entry = next(cursor.entries, None)
        if entry is None:
            cursor.ended = True
            return None
        if entry.type == TYPE_DIRECTORY and entry.name not in (b".", b".."):
            cursor.directories.append(entry.nid)
        return entry.name, self._attributes(self._contents.image.inode(entry.nid), EntryAttributes()), entry.next

    def _fill(self, cursor: _Cursor, start: int, token: ReaddirToken) -> int | None:
        """The place behind the last entry that was added; None where the cursor is of no more use."""
        place = start
        try:
            while True:
                item = cursor.prepared.popleft() if cursor.prepared else self._next(cursor)
                if item is None:
                    return place
                if not pyfuse3.readdir_reply(token, *item):
                    cursor.prepared.appendleft(item)
                    return place
                place = item[2]
        except (NotAtHandError, EncfsError):
            # What is in the reply already is good: the kernel asks again from where it ends.
            if place == start:
                raise
            return None
