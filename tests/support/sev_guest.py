"""The other side of `/dev/sev-guest`, behind the ioctl: reads and writes the caller's memory as the kernel does."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import struct
from dataclasses import dataclass, field

from encfs.attestation.collect import sev_guest


@dataclass
class Firmware:
    """One guest on one chip. `report` is what it answers to report requests, with the caller's data in it."""

    report: bytes = bytes(1184)
    certificates: bytes = b""
    policy: int = 0x30000
    measurement: bytes = bytes(48)
    svn: int = 3
    status: int = 0
    error: int = 0
    #: The size that the host claims to need for certificates, each time it is asked.
    lies: list[int] = field(default_factory=list)
    requests: list[dict[str, object]] = field(default_factory=list)

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        os.fstat(descriptor)  # must be open
        call = sev_guest.GUEST_REQUEST.read(bytes(argument))
        assert call["message_version"] == 1
        if self.error:
            struct.pack_into("<I", argument, 24, self.error)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if request == sev_guest.SNP_GET_DERIVED_KEY:
            return self._derive(call["request"], call["response"])
        assert request == sev_guest.SNP_GET_EXT_REPORT
        return self._report(call["request"], call["response"], argument)

    def _derive(self, source: int, target: int) -> int:
        asked = sev_guest.KEY_REQUEST.read(ctypes.string_at(source, 32))
        self.requests.append(asked)
        if self.status or asked["guest_svn"] > self.svn:
            ctypes.memmove(target, struct.pack("<I", self.status or 0x16), 4)
            return 0
        fields = asked["fields"]
        mixed = [str(asked).encode()]
        mixed += [str(self.policy).encode()] if fields & 1 else []
        mixed += [self.measurement] if fields & 8 else []
        key = hashlib.sha256(b"|".join(mixed)).digest()
        ctypes.memmove(target, struct.pack("<I28x32s", 0, key), 64)
        return 0

    def _report(self, source: int, target: int, argument: bytearray) -> int:
        asked = sev_guest.EXTENDED_REQUEST.read(ctypes.string_at(source, 112))
        self.requests.append(asked)
        needed = self.lies.pop(0) if self.lies else -(-len(self.certificates) // 4096) * 4096
        if asked["certificates_size"] < needed:
            ctypes.memmove(source + 104, struct.pack("<I", needed), 4)
            struct.pack_into("<I", argument, 28, 1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.certificates:
            ctypes.memmove(asked["certificates"], self.certificates, len(self.certificates))
        report = self.report[:0x50] + asked["report_data"] + self.report[0x90:]
        ctypes.memmove(target, struct.pack("<II24x", self.status, len(report)) + report, 32 + len(report))
        return 0


def certificate_table(*certificates: bytes) -> bytes:
    """A table as hosts make it, each certificate under some GUID."""
    offset = 24 * (len(certificates) + 1)
    entries, content = b"", b""
    for index, der in enumerate(certificates):
        entries += struct.pack("<16sII", bytes([index + 1] * 16), offset + len(content), len(der))
        content += der
    return entries + bytes(24) + content
