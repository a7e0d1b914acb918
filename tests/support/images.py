"""EROFS images in plain files: a sink for the writer, a reader over a file, and the verdicts of kernel and fsck."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from encfs.erofs.reader import ErofsReader
from encfs.erofs.writer import Entry, ErofsWriter, ImageSummary

TEST_UUID = bytes(range(16))


class FileSink:
    """An `ImageSink` that is a plain file. `room` is the size of its buffer: small ones exercise the writer's loops."""

    def __init__(self, path: Path, *, room: int = 1 << 20) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._buffer = memoryview(bytearray(room))
        self.position = 0

    def buffer(self) -> memoryview:
        return self._buffer

    def advance(self, size: int) -> None:
        assert 0 <= size <= len(self._buffer)
        self.write(self._buffer[:size])

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = self._file.write(view)
            view = view[count:]
            self.position += count

    def skip(self, size: int) -> None:
        """Leave a hole in the file."""
        self._file.seek(size, os.SEEK_CUR)
        self.position += size

    def set_head(self, data: bytes) -> None:
        assert len(data) <= 4096
        assert len(data) <= self.position
        assert os.pwrite(self._file.fileno(), data, 0) == len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


#: An entry, its contents, and its extents where the contents are sparse.
Item = tuple[Entry, bytes] | tuple[Entry, bytes, Sequence[tuple[int, int]]]


def write_image(
    path: Path,
    items: Iterable[Item],
    *,
    epoch: int = 0,
    synthesise_parents: bool = False,
    room: int = 1 << 20,
) -> ImageSummary:
    """Write an image of entries whose contents are in memory."""
    with (
        FileSink(path, room=room) as sink,
        ErofsWriter(sink, uuid=TEST_UUID, epoch=epoch, synthesise_parents=synthesise_parents) as writer,
    ):
        for item in items:
            writer.add(item[0], io.BytesIO(item[1]), item[2] if len(item) == 3 else None)
        return writer.finish()


@contextmanager
def open_image(path: Path) -> Iterator[ErofsReader]:
    """A reader over an image file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield ErofsReader(lambda offset, size: os.pread(descriptor, size, offset), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def fsck(path: Path) -> None:
    """`fsck.erofs` with every file's contents read; fails with what it prints."""
    result = subprocess.run(["fsck.erofs", "--extract", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@contextmanager
def kernel_mount(image: Path, directory: Path) -> Iterator[Path]:
    """Mount an image at `directory` with the kernel's EROFS. Needs root and loop devices."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", str(image), str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
