"""Occlum's side of `/dev/sgx`, behind the ioctl: reads and writes the caller's memory as its library OS does."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass, field


@dataclass
class LibraryOs:
    """One enclave. `quote` is what it answers, with the caller's report data in it at `offset`."""

    quote: bytes
    offset: int
    #: What it says of sizes instead: of the first ioctl, of the second.
    says: int | None = None
    wrote: int | None = None
    error: int = 0
    requests: list[int] = field(default_factory=list)

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        os.fstat(descriptor)  # must be open
        self.requests.append(request)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        if request == 0x80047307:
            struct.pack_into("<I", argument, 0, len(self.quote) if self.says is None else self.says)
            return 0
        assert request == 0xC0187308
        data, size, buffer = struct.unpack("<QQQ", argument)
        (room,) = struct.unpack("<I", ctypes.string_at(size, 4))
        if room < len(self.quote):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        given = ctypes.string_at(data, 64)
        made = self.quote[: self.offset] + given + self.quote[self.offset + 64 :]
        ctypes.memmove(buffer, made, len(made))
        ctypes.memmove(size, struct.pack("<I", len(made) if self.wrote is None else self.wrote), 4)
        return 0
