"""`encfs.open` for trio: the same calls, each in a worker thread, so that no other task waits for disk or network.

    async with await encfs.aio.open("oci:models:v1", key="me.jwk", pin="sha256:...") as artifact:
        config = await artifact.read("config.json")

A cancelled `list`, `stat`, `exists` or `read` is not waited for: its thread finishes on its own, and what it found is
dropped. The others end first, since they open something or write to what is the caller's.
"""

from __future__ import annotations

import builtins
import functools
import os
from types import TracebackType
from typing import Any, Self

import trio

import encfs
from encfs.api import Artifact
from encfs.extract import ExtractResult
from encfs.files import AnyPath, Entry


async def open(ref: str, **options: Any) -> AsyncArtifact:  # noqa: A001 - as `encfs.open`
    """Accept and open an artifact. Options and errors are those of `encfs.open`."""
    return AsyncArtifact(await trio.to_thread.run_sync(functools.partial(encfs.open, ref, **options)))


class AsyncArtifact:
    """An `encfs.api.Artifact` for trio. `artifact` is the synchronous one behind it."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    async def list(self, path: AnyPath = "", *, recursive: bool = False) -> builtins.list[Entry]:
        """All entries of a directory, sorted; with `recursive` everything below it."""

        def entries() -> builtins.list[Entry]:
            return builtins.list(self.artifact.list(path, recursive=recursive))

        return await trio.to_thread.run_sync(entries, abandon_on_cancel=True)

    async def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> Entry:
        """What stands at a path."""
        return await trio.to_thread.run_sync(
            functools.partial(self.artifact.stat, path, follow_symlinks=follow_symlinks), abandon_on_cancel=True
        )

    async def exists(self, path: AnyPath) -> bool:
        """Whether something stands at a path."""
        return await trio.to_thread.run_sync(self.artifact.exists, path, abandon_on_cancel=True)

    async def read(self, path: AnyPath, offset: int = 0, size: int | None = None) -> bytes:
        """A range of a regular file; all of it by default."""
        return await trio.to_thread.run_sync(self.artifact.read, path, offset, size, abandon_on_cancel=True)

    async def read_into(self, path: AnyPath, offset: int, buffer: bytearray | memoryview) -> int:
        """Decrypt a range into `buffer`. Not cancelled in the middle: the buffer is the thread's until it is done."""
        return await trio.to_thread.run_sync(self.artifact.read_into, path, offset, buffer)

    async def open(self, path: AnyPath, *, buffering: int = 1 << 20) -> trio._file_io.AsyncIOWrapper[Any]:
        """A regular file as trio's asynchronous file."""
        return trio.wrap_file(
            await trio.to_thread.run_sync(functools.partial(self.artifact.open, path, buffering=buffering))
        )

    async def extract(self, directory: str | os.PathLike[str]) -> ExtractResult:
        """Write the whole tree to a new or empty directory."""
        return await trio.to_thread.run_sync(self.artifact.extract, directory)

    async def aclose(self) -> None:
        """Close the artifact, whatever else is cancelled."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.artifact.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
