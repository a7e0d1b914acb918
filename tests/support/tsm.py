"""configfs-tsm as a kernel serves it: a FUSE filesystem in a process of its own, with one provider behind it.

A directory that is made is a request, and has its files at once; `outblob` is made of what was written to `inblob`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Provider:
    """`template` is what comes out, with the 64 bytes of `inblob` at `offset`. `racing`: others write to requests."""

    name: str
    template: bytes
    offset: int
    auxiliary: bytes = b""
    racing: bool = False
    failing: bool = False


@contextmanager
def serving(provider: Provider) -> Iterator[Path]:
    """The directory in which requests are made."""
    root = Path(tempfile.mkdtemp(prefix="encfs-tsm-"))
    values = asdict(provider) | {"template": provider.template.hex(), "auxiliary": provider.auxiliary.hex()}
    server = subprocess.Popen([sys.executable, "-m", "tests.support.tsm", str(root)], stdin=subprocess.PIPE)
    try:
        assert server.stdin is not None
        server.stdin.write(json.dumps(values).encode())
        server.stdin.close()
        deadline = time.monotonic() + 60
        while not root.is_mount():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield root
        assert list(root.iterdir()) == [], "a request was left behind"
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(root)], check=False)
        server.wait(60)
        shutil.rmtree(root)


FILES = ("provider", "inblob", "outblob", "auxblob", "generation")


def main(root: str) -> None:
    import pyfuse3
    import trio

    values: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    template, auxiliary = bytes.fromhex(values["template"]), bytes.fromhex(values["auxiliary"])

    class Operations(pyfuse3.Operations):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.requests: dict[int, str] = {}
            self.inputs: dict[int, bytes] = {}
            self.writes: dict[int, int] = {}
            self.next = 100

        # inode: 1 the root; N*100 a request; N*100 + 1 + index a file of it
        async def getattr(self, inode: int, ctx: object = None) -> Any:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            directory = inode == 1 or inode % 100 == 0
            entry.st_mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644
            entry.st_nlink, entry.st_size, entry.st_uid = 1, 0 if directory else 1 << 16, os.getuid()
            entry.attr_timeout = entry.entry_timeout = 0
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: object = None) -> Any:
            text = os.fsdecode(name)
            if parent == 1:
                for inode, found in self.requests.items():
                    if found == text:
                        return await self.getattr(inode)
            elif text in FILES and (text != "auxblob" or values["name"] == "sev_guest"):
                return await self.getattr(parent + 1 + FILES.index(text))
            raise pyfuse3.FUSEError(errno.ENOENT)

        async def mkdir(self, parent: int, name: bytes, mode: int, ctx: object) -> Any:
            inode, self.next = self.next, self.next + 100
            self.requests[inode] = os.fsdecode(name)
            self.writes[inode] = 0
            return await self.getattr(inode)

        async def rmdir(self, parent: int, name: bytes, ctx: object) -> None:
            self.requests = {inode: one for inode, one in self.requests.items() if one != os.fsdecode(name)}

        async def opendir(self, inode: int, ctx: object) -> int:
            return inode

        async def readdir(self, handle: int, start: int, token: Any) -> None:
            for index, (inode, name) in enumerate(list(self.requests.items())[start:] if handle == 1 else ()):
                pyfuse3.readdir_reply(token, os.fsencode(name), await self.getattr(inode), start + index + 1)

        async def open(self, inode: int, flags: int, ctx: object) -> Any:
            return pyfuse3.FileInfo(fh=inode, direct_io=True)

        async def setattr(self, inode: int, attr: object, fields: object, fh: object, ctx: object) -> Any:
            return await self.getattr(inode)

        async def write(self, handle: int, offset: int, content: bytes) -> int:
            request = handle // 100 * 100
            if handle - request - 1 != FILES.index("inblob") or len(content) != 64:
                raise pyfuse3.FUSEError(errno.EINVAL)
            self.inputs[request] = content
            self.writes[request] += 2 if values["racing"] else 1
            return len(content)

        async def read(self, handle: int, offset: int, size: int) -> bytes:
            request = handle // 100 * 100
            name = FILES[handle - request - 1]
            if name == "outblob" and (values["failing"] or request not in self.inputs):
                raise pyfuse3.FUSEError(errno.EIO)
            at = values["offset"]
            content = {
                "provider": values["name"].encode() + b"\n",
                "outblob": template[:at] + self.inputs.get(request, b"") + template[at + 64 :],
                "auxblob": auxiliary,
                "generation": f"{self.writes[request]}\n".encode(),
            }[name]
            return bytes(content[offset : offset + size])

    pyfuse3.init(Operations(), root, {"fsname=encfs-tsm-test", *pyfuse3.default_options})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1])
