"""An uncompressed tar archive in a file, as container tools write them: members by name, read in place, never unpacked.

Hard and symbolic links are followed as `docker save` uses them, from one member to another. Not here: what is in the
members.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import normpath

from encfs.errors import FormatError, NotFoundError, SourceError, StorageError, UnsupportedError, UsageError
from encfs.strictjson import show_name
from encfs.tar.reader import TarReader

_STEP = 1 << 20
_MAX_MEMBERS = 1 << 16
_MAX_LINKS = 4
#: What compressed archives begin with.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a member's contents lie in the archive (bytes); `link` where it is a link to another one instead."""

    offset: int
    size: int
    link: str | None


class TarFile:
    """One archive file. Thread-safe. Close it."""

    def __init__(self, path: str, *, hint: str) -> None:
        """`hint` says what writes such archives.

        Raises: NotFoundError, StorageError; UsageError where it is no regular file; UnsupportedError where it is
        compressed; SourceError where it is no tar archive.
        """
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise NotFoundError(f"{path} does not exist", hint=hint) from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        try:
            self._check_file()
            self.members = dict(self._index())
        except SourceError as error:
            os.close(self.file)
            raise SourceError(f"{path}: {error.message}", hint=hint) from None
        except BaseException:
            os.close(self.file)
            raise

    def _check_file(self) -> None:
        if not stat.S_ISREG(os.fstat(self.file).st_mode):
            raise UsageError(f"{self.path} is no regular file", hint="an unpacked image layout is written oci:PATH")
        head = self._pread(8, 0)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise UnsupportedError(
                    f"{self.path} is compressed with {name}",
                    hint="decompress the file first; layers may be compressed",
                )

    def _index(self) -> Iterator[tuple[str, Place]]:
        source = _FileInput(self.file, self.path)
        for count, member in enumerate(TarReader(source, lambda _data: None, source.skip)):
            if count == _MAX_MEMBERS:
                raise SourceError(f"it holds more than {_MAX_MEMBERS} files, which no saved image does")
            name = _normal(os.fsdecode(member.name))
            if member.kind == stat.S_IFREG and member.extents is None:
                yield name, Place(source.position, member.stored, None)
            elif member.kind in (0, stat.S_IFLNK):
                target = os.fsdecode(member.link_name)
                below = str(PurePosixPath(name).parent / target) if member.kind else target
                yield name, Place(0, 0, _normal(below))

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self.file, size, offset)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None

    def find(self, name: str) -> Place:
        """Where a member's contents are, behind links. Raises: FormatError where there are none."""
        wanted = _normal(name)
        for _ in range(_MAX_LINKS):
            place = self.members.get(wanted)
            if place is None:
                raise FormatError(f"{self.path} has no {show_name(wanted)}, which an image of it needs")
            if place.link is None:
                return place
            wanted = place.link
        raise FormatError(f"{self.path}: {show_name(name)} is a link to a link, and so on")

    def small(self, name: str, limit: int) -> bytes:
        """A member whole. Raises: FormatError where it is missing, or larger than `limit` bytes; as `read`."""
        place = self.find(name)
        if place.size > limit:
            raise FormatError(f"{self.path}: {show_name(name)} has {place.size} bytes, more than the {limit} allowed")
        return self.read(place, 0, place.size)

    def stream(self, place: Place) -> Iterator[bytes]:
        """A member's contents in pieces. Raises: as `read`."""
        for offset in range(0, place.size, _STEP):
            yield self.read(place, offset, min(_STEP, place.size - offset))

    def read(self, place: Place, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of a member on. Raises: StorageError; SourceError where the file is cut short."""
        data = self._pread(size, place.offset + offset)
        if len(data) != size:
            raise SourceError(f"{self.path} is cut short", hint="save the image again")
        return data

    def close(self) -> None:
        """Harmless when called again."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class _FileInput:
    """An archive file from its start (`encfs.tar.reader.Input`)."""

    def __init__(self, file: int, path: str) -> None:
        self._file = file
        self._path = path
        self.position = 0

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            count = os.preadv(self._file, [buffer], self.position)
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror}") from None
        self.position += count
        return count

    def skip(self, size: int) -> None:
        self.position += size


def _normal(name: str) -> str:
    # Two slashes at the start would stay two (POSIX).
    return normpath("/" + name.lstrip("/"))[1:]
