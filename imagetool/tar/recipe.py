"""How to make a layer's tar archive again from its volume: the auxiliary volume `tar/<diff id>` (docs/format.md).

An archive is what no file of the image holds (headers, extended headers, padding: the *literals*), and pieces of file
contents, which lie in the layer's volume already. The recipe keeps the literals, and of every piece where it belongs:
after so many literal bytes, so many bytes of the volume from an offset on.
"""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Callable, Iterator
from struct import Struct
from typing import IO, Final, Protocol

import zstandard

from encfs.erofs.reader import ErofsReader
from encfs.erofs.tree import Inode
from encfs.erofs.writer import Entry, ErofsWriter, ImageSink
from encfs.errors import FormatError, StorageError

#: Literal bytes before the piece (u64), its offset in the layer's volume (u64), its size (u64); the last record of a
#: recipe may have a size of 0, for literals at the end.
_RECORD: Final = Struct(">QQQ")
_LITERALS: Final = b"literals"
_PIECES: Final = b"pieces"
_INHERITS: Final = b"inherits"
_ROOT_MODE: Final = stat.S_IFDIR | 0o755
_FILE_MODE: Final = stat.S_IFREG | 0o644
_STEP: Final = 1 << 20
_UUID: Final = bytes(16)


class _Readable(Protocol):
    size: int

    def read(self, offset: int, size: int, /) -> bytes | memoryview: ...


class RecipeWriter:
    """Takes note of an archive in order. Literals wait compressed in an unnamed temporary file; close it."""

    def __init__(self) -> None:
        """Raises: StorageError."""
        try:
            self._literals = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
            self._pieces = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"no temporary file: {error.strerror}") from error
        self._compressed = zstandard.ZstdCompressor(level=1).stream_writer(self._literals, closefd=False)
        self._literal_size = 0
        self._record = [0, 0, 0]
        self._inherits = False

    def literal(self, data: bytes) -> None:
        """Bytes that no file of the image holds. Raises: OSError where temporary storage is full."""
        if self._record[2]:
            self._flush()
        self._record[0] += len(data)
        self._literal_size += len(data)
        self._compressed.write(data)

    def piece(self, offset: int, size: int) -> None:
        """File contents that were written to the layer's volume at `offset`."""
        if self._record[2] and self._record[1] + self._record[2] != offset:
            self._flush()
        if not self._record[2]:
            self._record[1] = offset
        self._record[2] += size

    def inherited(self) -> None:
        """The layer's image has attributes of directories from the layers below."""
        self._inherits = True

    def _flush(self) -> None:
        self._pieces.write(_RECORD.pack(*self._record))
        self._record = [0, 0, 0]

    def write(self, sink: ImageSink) -> None:
        """The recipe as an EROFS image of a few files. Raises: what the sink raises, OSError."""
        if self._record[0] or self._record[2]:
            self._flush()
        self._compressed.close()  # type: ignore[no-untyped-call]
        sizes = self._pieces.tell()
        self._literals.seek(0)
        self._pieces.seek(0)
        with ErofsWriter(sink, uuid=_UUID) as image:
            image.add(Entry(b"", _ROOT_MODE))
            literals = zstandard.ZstdDecompressor().stream_reader(self._literals, closefd=False)
            image.add(Entry(_LITERALS, _FILE_MODE, size=self._literal_size), literals)
            image.add(Entry(_PIECES, _FILE_MODE, size=sizes), _Unbuffered(self._pieces))
            if self._inherits:
                image.add(Entry(_INHERITS, _FILE_MODE))
            image.finish()

    def close(self) -> None:
        self._literals.close()
        self._pieces.close()


class _Unbuffered:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readinto(self, buffer: memoryview, /) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Recipe:
    """The recipe in an opened auxiliary volume."""

    def __init__(self, volume: _Readable) -> None:
        """Raises: FormatError where it is none; what the volume raises."""
        self._image = ErofsReader(volume.read, volume.size)
        root = self._image.inode(self._image.root)
        files = {
            entry.name: self._image.inode(entry.nid) for entry in self._image.entries(root) if entry.name[:1] != b"."
        }
        if not {_LITERALS, _PIECES} <= files.keys() <= {_LITERALS, _PIECES, _INHERITS} or not all(
            stat.S_ISREG(inode.mode) for inode in files.values()
        ):
            raise FormatError("the artifact's record of a layer's tar archive is malformed")
        if files[_PIECES].size % _RECORD.size:
            raise FormatError("the artifact's record of a layer's tar archive is cut short")
        self._literals, self._pieces, self._inherits = files[_LITERALS], files[_PIECES], _INHERITS in files

    @property
    def inherits(self) -> bool:
        """Whether the layer's image has attributes of directories from the layers that were below it."""
        return self._inherits

    def archive(self, read_volume: Callable[[int, int], Iterator[bytes | memoryview]]) -> Iterator[bytes | memoryview]:
        """The archive's bytes in order; `read_volume(offset, size)` gives those of the layer's volume.

        Raises: FormatError; what the volumes raise.
        """
        position = 0
        for data in self._chunks(self._pieces, 0, self._pieces.size, _RECORD.size << 12):
            for literal, offset, size in _RECORD.iter_unpack(data):
                if position + literal > self._literals.size:
                    raise FormatError("the artifact's record of a layer's tar archive contradicts itself")
                yield from self._chunks(self._literals, position, literal, _STEP)
                position += literal
                if size:
                    yield from read_volume(offset, size)
        if position != self._literals.size:
            raise FormatError("the artifact's record of a layer's tar archive contradicts itself")

    def _chunks(self, inode: Inode, start: int, size: int, step: int) -> Iterator[bytes]:
        for offset in range(start, start + size, step):
            yield self._image.read(inode, offset, min(step, start + size - offset))
