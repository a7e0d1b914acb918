"""The layers of an image as the one tree that they make together, without the kernel's overlayfs.

A path leads to the topmost layer that has it; directories of several layers are one, down to an opaque one, to
something that is no directory, or to a whiteout. A directory's number is that of its topmost part. What lies below it
depends on its path, which is remembered for a bounded number of directories, and found again from the part's `..`
where it was forgotten: so nothing has to be kept for as long as somebody knows a number.

Layers may come from someone hostile: every part of a directory must name, as its parent, the part of the parent's in
the same layer. That rules out loops and directories in two places.
"""

from __future__ import annotations

import heapq
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import MAX_PATH, TYPE_DIRECTORY, TYPE_REGULAR, TYPE_SYMLINK
from encfs.erofs.tree import DirectoryEntry, Inode, resolve
from encfs.errors import FormatError
from encfs.image.conventions import is_opaque, is_whiteout, shown_xattrs
from encfs.image.stack import Images, join, split

#: Directories whose parts, and whose places, are remembered.
_REMEMBERED = 4096
_PLACES = 65536
#: Levels of directories at most: a path of MAX_PATH bytes has no more.
_DEPTH = MAX_PATH // 2
#: `.` and `..` come first in a directory of several parts.
_DOTS = 2
_NO_DEVICES = frozenset({TYPE_DIRECTORY, TYPE_REGULAR, TYPE_SYMLINK})


@dataclass(frozen=True, slots=True)
class _Directory:
    """One directory: its number, its parent's, and its parts, topmost first: layer and inode within it."""

    number: int
    parent: int
    parts: tuple[tuple[int, Inode], ...]


class MergedTree(Images):
    """As `encfs.erofs.tree.Tree`. Directories have one link, as where their number is not known (and in overlayfs)."""

    def __init__(self, layers: Sequence[ErofsReader]) -> None:
        """`layers` lowest first."""
        super().__init__(layers)
        self._lock = threading.Lock()
        self._known: OrderedDict[int, _Directory] = OrderedDict()
        self._places: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        parts = []
        for index in reversed(range(len(self.images))):
            image = self.images[index]
            inode = image.inode(image.root)
            parts.append((index, inode))
            if is_opaque(inode, image.xattrs(inode)):
                break
        self.root = join(parts[0][0], parts[0][1].nid)
        self._root = _Directory(self.root, self.root, tuple(parts))

    # As a tree

    def inode(self, number: int) -> Inode:
        inode = super().inode(number)
        return replace(inode, nlink=1) if stat.S_ISDIR(inode.mode) else inode

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        return shown_xattrs(super().xattrs(inode))

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        merged = self._directory(directory.nid)
        if name in (b".", b".."):
            return merged.number if name == b"." else merged.parent
        found = self._find(merged, name)
        return found.number if isinstance(found, _Directory) else found

    def entries(self, directory: Inode, start: int = 0) -> Iterator[DirectoryEntry]:
        """As `Tree.entries`. From the middle of a directory of several parts, what comes before is read again."""
        merged = self._directory(directory.nid)
        if len(merged.parts) == 1:
            return self._entries_of_one(merged, start)
        return self._entries_of_several(merged, start)

    def resolve(self, path: bytes, follow: bool = True) -> Inode:
        return resolve(self, path, follow)

    # Names

    def _find(self, directory: _Directory, name: bytes) -> _Directory | int | None:
        """What a name stands for: a directory, the number of something else, or nothing."""
        parts: list[tuple[int, Inode]] = []
        for index, part in directory.parts:
            image = self.images[index]
            nid = image.lookup(part, name)
            if nid is None:
                continue
            inode = image.inode(nid)
            if not stat.S_ISDIR(inode.mode):
                if parts or is_whiteout(inode):
                    break
                return join(index, nid)
            if nid == image.root or image.lookup(inode, b"..") != part.nid:
                raise FormatError(f"EROFS directory {nid} is reached from elsewhere than its parent")
            parts.append((index, inode))
            if is_opaque(inode, image.xattrs(inode)):
                break
        if not parts:
            return None
        found = _Directory(join(parts[0][0], parts[0][1].nid), directory.number, tuple(parts))
        self._remember(found, name)
        return found

    def _remember(self, directory: _Directory, name: bytes) -> None:
        with self._lock:
            self._known[directory.number] = directory
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._remember_place(directory.number, directory.parent, name)

    def _remember_place(self, number: int, parent: int, name: bytes) -> None:
        with self._lock:
            self._places[number] = (parent, name)
            if len(self._places) > _PLACES:
                self._places.popitem(last=False)

    def _directory(self, number: int) -> _Directory:
        """The directory with this number. Raises: FormatError where its path leads elsewhere."""
        if number == self.root:
            return self._root
        current, names = number, list[bytes]()
        while (known := self._recall(current)) is None:
            place = self._places.get(current)
            if place is None:
                names += self._path_in_layer(current)
                known = self._root
                break
            current, name = place
            names.append(name)
            if len(names) > _DEPTH:
                raise FormatError(f"EROFS directory {number} lies in a circle, or too deep")
        for name in reversed(names):
            found = self._find(known, name)
            if not isinstance(found, _Directory):
                raise FormatError(f"EROFS directory {number} is not where its parent says")
            known = found
        if known.number != number:
            raise FormatError(f"EROFS directory {number} is hidden by another layer")
        return known

    def _recall(self, number: int) -> _Directory | None:
        if number == self.root:
            return self._root
        with self._lock:
            known = self._known.get(number)
            if known is not None:
                self._known.move_to_end(number)
            return known

    def _path_in_layer(self, number: int) -> list[bytes]:
        """Names from a directory up to the root, within its own layer, the directory's own first."""
        index, nid = split(number)
        image = self._image(number)
        names: list[bytes] = []
        while nid != image.root:
            above = image.lookup(image.inode(nid), b"..")
            parent = image.inode(image.root if above is None else above)
            name = next((entry.name for entry in image.entries(parent) if _leads_to(entry, nid)), None)
            if name is None or len(names) > _DEPTH:
                raise FormatError(f"EROFS directory {split(number)[1]} of layer {index} is not in its parent")
            names.append(name)
            nid = parent.nid
        return names

    # Listings

    def _entries_of_one(self, directory: _Directory, start: int) -> Iterator[DirectoryEntry]:
        index, part = directory.parts[0]
        image = self.images[index]
        for entry in image.entries(part, start):
            if entry.name == b".":
                number = directory.number
            elif entry.name == b"..":
                number = directory.parent
            elif _hides(image, entry):
                continue
            else:
                number = self._number(directory, index, entry)
            yield DirectoryEntry(entry.name, number, entry.type, entry.next)

    def _entries_of_several(self, directory: _Directory, start: int) -> Iterator[DirectoryEntry]:
        dots = ((b".", directory.number), (b"..", directory.parent))
        for place, (name, number) in enumerate(dots, 1):
            if place > start:
                yield DirectoryEntry(name, number, TYPE_DIRECTORY, place)
        previous = b""
        place = _DOTS
        streams = [self._named(depth, index, part) for depth, (index, part) in enumerate(directory.parts)]
        for name, _, index, entry in heapq.merge(*streams, key=lambda item: item[:2]):
            # The topmost layer that has the name decides.
            if name == previous:
                continue
            previous = name
            place += 1
            if place > start and not _hides(self.images[index], entry):
                yield DirectoryEntry(name, self._number(directory, index, entry), entry.type, place)

    def _named(self, depth: int, index: int, part: Inode) -> Iterator[tuple[bytes, int, int, DirectoryEntry]]:
        for entry in self.images[index].entries(part):
            if entry.name not in (b".", b".."):
                yield entry.name, depth, index, entry

    def _number(self, directory: _Directory, index: int, entry: DirectoryEntry) -> int:
        number = join(index, entry.nid)
        if entry.type == TYPE_DIRECTORY and number not in self._places:
            # Whoever lists a directory goes on to what is in it.
            self._remember_place(number, directory.number, entry.name)
        return number


def _hides(image: ErofsReader, entry: DirectoryEntry) -> bool:
    """Whether an entry is a whiteout. Only those of other kinds than the most common are looked at."""
    return entry.type not in _NO_DEVICES and is_whiteout(image.inode(entry.nid))


def _leads_to(entry: DirectoryEntry, nid: int) -> bool:
    return entry.nid == nid and entry.name not in (b".", b"..")
