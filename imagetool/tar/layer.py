"""A layer's tar archive (OCI image-spec v1.1, layer.md) as an EROFS image with overlayfs's conventions.

Whiteouts become character devices 0:0, opaque markers an attribute of their directory. They are applied when the whole
archive has been read, since they speak of the layers below, wherever in the archive they stand: an entry of the same
name and layer stays. Of entries of one path the last counts. Names are relative to the layer's root, also where they
begin with `./` or `/`, as GNU tar, docker, containerd and umoci take them; those with `..`, and those that lead through
something that is no directory, are refused.

Not here: reading tar (`reader`), giving it back (`recipe`), several layers in one (`flatten`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from encfs.erofs.sparse import plan_chunks
from encfs.erofs.spool import open_temporary, storage_errors
from encfs.erofs.structures import printable
from encfs.erofs.writer import Entry, ErofsWriter, ImageSink
from encfs.errors import SourceError
from encfs.image.conventions import OPAQUE, PREFIX
from encfs.tar.reader import Member, TarReader
from imagetool.tar.below import DirectoriesBelow

WHITEOUT_PREFIX: Final = b".wh."
#: Everything with this prefix belongs to AUFS and is no entry, but for the marker of opaque directories.
_META_PREFIX: Final = b".wh..wh."
_OPAQUE_MARKER: Final = b".wh..wh..opq"
_WHITEOUT_MODE: Final = stat.S_IFCHR
_SHOWN: Final = 200
#: Longest path in a layer (bytes): PATH_MAX without the NUL, beyond which container tools fail.
_MAX_PATH: Final = 4095
#: Largest sparse file (bytes), that of ext4; and what the sparse files of a layer may need besides their data: a short
#: archive can describe files whose block maps and padding fill any disk.
_MAX_SPARSE_SIZE: Final = 1 << 44
_MAX_SPARSE_COST: Final = 1 << 30
_MAX_MAJOR: Final = 1 << 12
_MAX_MINOR: Final = 1 << 20

_SCHEMA: Final = """
CREATE TABLE hidden (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE opaque (path BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class Notes(Protocol):
    """Who wants to know how the archive is put together (`recipe.RecipeWriter`)."""

    def literal(self, data: bytes) -> None: ...

    def piece(self, offset: int, size: int) -> None: ...

    def inherited(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Whiteout:
    """`path` is hidden in the layers below; with `opaque` not itself, but everything in it."""

    path: bytes
    opaque: bool


class SparseBudget:
    """What the sparse files of one layer have cost so far."""

    def __init__(self) -> None:
        self._left = _MAX_SPARSE_COST

    def take(self, member: Member) -> None:
        """Raises: SourceError where a member's holes need too much room in an image."""
        if member.extents is None or not member.size:
            return
        if member.size > _MAX_SPARSE_SIZE:
            raise SourceError(f"{_shown(member.name)}: sparse file of {member.size} bytes, the limit is 16 TiB")
        self._left -= plan_chunks(member.size, member.extents).cost - member.stored
        if self._left < 0:
            raise SourceError(f"{_shown(member.name)}: the holes of the layer's sparse files need more than 1 GiB")


class Markers:
    """The whiteouts of one layer, in a temporary database. Close it."""

    def __init__(self) -> None:
        self._database = open_temporary(_SCHEMA)

    def add(self, marker: Whiteout) -> None:
        table = "opaque" if marker.opaque else "hidden"
        with storage_errors():
            self._database.execute(f"INSERT OR IGNORE INTO {table} VALUES (?)", (marker.path,))  # noqa: S608

    def hidden(self) -> Iterator[bytes]:
        """Paths that are hidden in the layers below, in bytewise order."""
        return self._select("SELECT path FROM hidden ORDER BY path")

    def opaque(self) -> Iterator[bytes]:
        """Directories whose contents in the layers below are hidden, in bytewise order."""
        return self._select("SELECT path FROM opaque ORDER BY path")

    def _select(self, query: str) -> Iterator[bytes]:
        with storage_errors():
            for (path,) in self._database.execute(query):
                yield path

    def close(self) -> None:
        self._database.close()


def write_layer(
    source: TarReader,
    sink: ImageSink,
    image: ErofsWriter,
    notes: Notes,
    below: DirectoriesBelow,
) -> None:
    """Add a whole archive to an image that writes to `sink` and replaces (`ErofsWriter`'s `replace`).

    Directories that the archive implies without naming them get the attributes that `below` knows of the layers below;
    it is told of this layer.
    Raises: SourceError naming the path; StorageError; what source and sink raise.
    """
    markers, budget = Markers(), SparseBudget()
    try:
        for member in source:
            item = classify(member)
            budget.take(member)
            if isinstance(item, Whiteout):
                markers.add(item)
            elif item is not None:
                image.add(item, _Contents(source, sink, notes), member.extents)
                if stat.S_ISDIR(item.mode):
                    below.directory(item)
                else:
                    below.other(item.path)
        _apply(markers, image, notes, below)
    finally:
        markers.close()


def _apply(markers: Markers, image: ErofsWriter, notes: Notes, below: DirectoriesBelow) -> None:
    for path in markers.hidden():
        below.hidden(path)
        kind = image.kind(path)
        if kind is None:
            image.add(Entry(path, _WHITEOUT_MODE))
        elif kind == stat.S_IFDIR:
            markers.add(Whiteout(path, opaque=True))
    for path in markers.opaque():
        if image.kind(path) is None:
            # The directory is in a layer below: here it is one that only its contents imply.
            image.imply_directory(path)
    for path in image.implied_directories():
        known = below.find(path)
        if known is not None:
            notes.inherited()
            image.add(known)
            below.directory(known)
    for path in markers.opaque():
        below.emptied(path)
        if image.kind(path) == stat.S_IFDIR:
            image.set_directory_xattr(path, OPAQUE, b"y")
    below.commit()


def classify(member: Member) -> Entry | Whiteout | None:
    """What a member means: an entry, a marker, or nothing. Raises: SourceError naming the path."""
    path = plain_path(member.name, member.name)
    directory, slash, name = path.rpartition(b"/")
    if name.startswith(_META_PREFIX):
        return Whiteout(directory, opaque=True) if name == _OPAQUE_MARKER else None
    if name.startswith(WHITEOUT_PREFIX):
        hidden = name.removeprefix(WHITEOUT_PREFIX)
        if hidden in (b"", b".", b".."):
            raise SourceError(f"{_shown(path)}: a whiteout of nothing")
        return Whiteout(directory + slash + hidden, opaque=False)
    if not member.kind:
        return Entry(path, 0, link_to=plain_path(member.link_name, member.name))
    return Entry(
        path,
        member.kind | member.mode,
        uid=member.uid,
        gid=member.gid,
        mtime_ns=member.mtime_ns,
        size=member.size,
        rdev=_device(path, member),
        target=member.link_name if member.kind == stat.S_IFLNK else b"",
        xattrs=_xattrs(path, member),
    )


def plain_path(name: bytes, shown: bytes) -> bytes:
    """A name of an archive as a path of an image: below its root, whatever slashes and dots it begins with.

    The targets of hard links are such names, too. Raises: SourceError where it leads out of the layer's root.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise SourceError(
            f"{_shown(shown)}: {_shown(name)} leads upwards with ..", hint="the names in a layer do not leave its root"
        )
    path = b"/".join(parts)
    if len(path) > _MAX_PATH:
        raise SourceError(f"{_shown(path)}: path of {len(path)} bytes, the limit is {_MAX_PATH}")
    return path


def _device(path: bytes, member: Member) -> int:
    if member.kind not in (stat.S_IFCHR, stat.S_IFBLK):
        return 0
    if not (0 <= member.major < _MAX_MAJOR and 0 <= member.minor < _MAX_MINOR):
        raise SourceError(f"{_shown(path)}: device number {member.major}:{member.minor} is out of range")
    if member.kind == stat.S_IFCHR and member.major == member.minor == 0:
        raise SourceError(f"{_shown(path)}: character device 0:0, which overlayfs takes for a whiteout")
    return os.makedev(member.major, member.minor)


def _xattrs(path: bytes, member: Member) -> tuple[tuple[bytes, bytes], ...]:
    for name, _value in member.xattrs:
        if name.startswith(PREFIX):
            raise SourceError(f"{_shown(path)}: the attribute {printable(name)} is reserved for overlayfs")
    return member.xattrs


def _shown(path: bytes) -> str:
    return printable(path) if len(path) <= _SHOWN else f"{printable(path[:_SHOWN])}..."


class _Contents:
    """A member's contents on their way into the image, noted where they go (`encfs.erofs.writer.DataSource`)."""

    def __init__(self, source: TarReader, sink: ImageSink, notes: Notes) -> None:
        self._source = source
        self._sink = sink
        self._notes = notes

    def readinto(self, buffer: memoryview, /) -> int:
        position = self._sink.position
        count = self._source.readinto(buffer)
        if count:
            self._notes.piece(position, count)
        return count
