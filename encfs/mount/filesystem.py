"""The FUSE requests of a read-only tree: an EROFS image behind pyfuse3.

FUSE inode number = EROFS inode number, file handle = EROFS inode number; nothing is kept per inode or open file, so
that `forget` and `release` are free. Everything is immutable: the kernel may keep names, attributes, their absence and
contents as long as it likes.

Requests are answered on the event loop's thread where the bytes are at hand (a thread would cost more than the work),
and in worker threads where disk or network has to be waited for. Not here: mounting and ending (`daemon`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from encfs.erofs.structures import BLOCK_SIZE, MAX_NAME
from encfs.erofs.tree import Inode
from encfs.mount.failures import FailureLog
from encfs.mount.listing import Listings
from encfs.mount.metrics import ReadTimes
from encfs.mount.reading import ImageContents, NotAtHandError
from encfs.mount.workers import Workers
from encfs.tracing import note_read

#: Seconds for which the kernel may keep names and attributes: thirty years. It would take the largest doubles amiss.
_FOREVER = 1e9
#: Requests that wait for disk or network at the same time.
_WAITING_THREADS = 16
#: Number that stands for inode number 0, which FUSE does not have. EROFS numbers end well below.
_ZERO_ALIAS = 1 << 60
_SECTOR = 512
_TRUSTED = b"trusted."

T = TypeVar("T")


class ImageFilesystem(pyfuse3.Operations):
    """Answers requests from one image."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, contents: ImageContents, failures: FailureLog, *, enable_acl: bool = True) -> None:
        super().__init__()
        self.enable_acl = enable_acl
        self.waits = 0
        self.times = ReadTimes()
        self._contents = contents
        self._image = contents.image
        self._failures = failures
        self._workers = Workers(_WAITING_THREADS)
        self._listings = Listings(contents, self._attributes)
        root = contents.image.root
        # FUSE has no number 0, and its root is always 1: these change places. All others are the same on both sides.
        self._numbers = {0: _ZERO_ALIAS, 1: root or _ZERO_ALIAS, root: 1}
        self._nids = {number: nid for nid, number in self._numbers.items()}
        self._absent = EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = _FOREVER
        self._absent.attr_timeout = _FOREVER

    def init(self) -> None:
        self._contents.bind_to_loop()

    # How a request is answered

    async def _answer(self, function: Callable[..., T], *arguments: object) -> T:
        """Call `function` here; in a worker thread where that would wait; any failure becomes EIO."""
        try:
            return function(*arguments)
        except NotAtHandError:
            pass
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - the daemon survives any request
            self._fail(error)
        return await self._answer_in_thread(function, *arguments)

    async def _answer_in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        self.waits += 1
        try:
            return await self._workers.run(function, *arguments)
        except (FUSEError, trio.Cancelled):
            raise
        except Exception as error:  # noqa: BLE001 - the daemon survives any request
            self._fail(error)

    # What polling asks

    def may_look(self) -> bool:
        """Whether no worker thread wants the interpreter's lock."""
        return not self._workers.busy

    def work_ahead(self) -> bool:
        """Do a little of what will be asked for next. False where there is nothing to do."""
        return self._listings.prepare()

    def _fail(self, error: Exception) -> NoReturn:
        self._failures.record(error)
        raise FUSEError(errno.EIO) from None

    # Names and attributes

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return await self._answer(self._lookup, parent_inode, name)

    def _lookup(self, parent: int, name: bytes) -> EntryAttributes:
        if len(name) > MAX_NAME:
            raise FUSEError(errno.ENAMETOOLONG)
        nid = self._image.lookup(self._contents.inode(self._nids.get(parent, parent)), name)
        if nid is None:
            return self._absent
        return self._attributes(self._contents.inode(nid), EntryAttributes())

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._answer(self._getattr, inode)

    def _getattr(self, number: int) -> EntryAttributes:
        return self._attributes(self._contents.inode(self._nids.get(number, number)), EntryAttributes())

    def _attributes(self, inode: Inode, entry: EntryAttributes) -> EntryAttributes:
        entry.st_ino = self._numbers.get(inode.nid, inode.nid)
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blocks = -(-inode.size // BLOCK_SIZE) * (BLOCK_SIZE // _SECTOR)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.mtime_ns
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        return entry

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._answer(self._readlink, inode)

    def _readlink(self, number: int) -> bytes:
        return self._image.readlink(self._contents.inode(self._nids.get(number, number)))

    async def forget(self, inode_list: object) -> None:
        return

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        stats = StatvfsData()
        stats.f_bsize = stats.f_frsize = BLOCK_SIZE
        stats.f_blocks = self._image.block_count
        stats.f_files = self._image.inode_count
        stats.f_namemax = MAX_NAME
        return stats

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """Asked only without `default_permissions`: whoever gets this far may read."""
        return True

    # Extended attributes

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        value = (await self._answer(self._xattrs, inode)).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        names = await self._answer(self._xattrs, inode)
        # As other filesystems do: only the privileged see trusted attributes.
        return [name for name in names if ctx.uid == 0 or not name.startswith(_TRUSTED)]

    def _xattrs(self, number: int) -> dict[bytes, bytes]:
        return self._image.xattrs(self._contents.inode(self._nids.get(number, number)))

    # Directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._nids.get(inode, inode)

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        try:
            self._listings.reply(fh, start_id, token)
        except NotAtHandError:
            await self._answer_in_thread(self._listings.reply_waiting, fh, start_id, token)
        except Exception as error:  # noqa: BLE001 - the daemon survives any request
            self._fail(error)

    async def releasedir(self, fh: int) -> None:
        return

    # Contents

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise FUSEError(errno.EROFS)
        return FileInfo(fh=self._nids.get(inode, inode), keep_cache=True)

    # pyfuse3 takes any buffer.
    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]
        started = time.perf_counter()
        try:
            data = self._contents.read_now(fh, off, size)
            self._note_read(started, size)
            return data  # noqa: TRY300 - the usual end
        except NotAtHandError:
            pass
        except Exception as error:  # noqa: BLE001 - the daemon survives any request
            self._fail(error)
        buffer = self._contents.take_buffer(size)
        waiting = self.times.begin()
        try:
            data = await self._answer_in_thread(self._contents.read_waiting, fh, off, buffer[:size])
        except FUSEError:
            self._contents.return_buffer(buffer)
            raise
        finally:
            self.times.end(waiting)
            self._note_read(started, size)
        # Free again: the reply is sent before this thread runs another handler (pyfuse3's fuse_read_async). Where the
        # call was cancelled instead, its thread may still write to the buffer, and nobody gets it any more.
        self._contents.return_buffer(buffer)
        return data

    def _note_read(self, started: float, size: int) -> None:
        seconds = time.perf_counter() - started
        self.times.observe(seconds)
        note_read(seconds, size)

    async def release(self, fh: int) -> None:
        return

    async def flush(self, fh: int) -> None:
        # Said once: the kernel does not ask again.
        raise FUSEError(errno.ENOSYS)

    # Whatever would write. The kernel answers these itself unless someone remounts it read-write.

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EROFS)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EROFS)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EROFS)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EROFS)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EROFS)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EROFS)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        raise FUSEError(errno.EROFS)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EROFS)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        raise FUSEError(errno.EROFS)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        raise FUSEError(errno.EROFS)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EROFS)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.EROFS)
