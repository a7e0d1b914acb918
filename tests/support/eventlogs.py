"""Event logs as firmware writes them, and a TPM that measured the same: every event is extended into a real one."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from tests.support.tpm import SoftwareTpm

GLOBAL_VARIABLE = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
_ALGORITHMS = {0x0004: "sha1", 0x000B: "sha256"}


def variable(name: str, value: bytes) -> bytes:
    """UEFI_VARIABLE_DATA."""
    return GLOBAL_VARIABLE + struct.pack("<QQ", len(name), len(value)) + name.encode("utf-16-le") + value


def image(path: str) -> bytes:
    """UEFI_IMAGE_LOAD_EVENT with a device path of a file."""
    name = path.encode("utf-16-le") + b"\0\0"
    device = struct.pack("<BBH", 1, 1, 6) + b"\1\2" + struct.pack("<BBH", 4, 4, 4 + len(name)) + name
    device += struct.pack("<BBH", 0x7F, 0xFF, 4)
    return struct.pack("<QQQQ", 0x1000, 0x2000, 0, len(device)) + device


@dataclass
class Log:
    """A log that grows; `digests` are per event: of SHA-1 and SHA-256."""

    content: bytearray = field(default_factory=bytearray)
    extends: list[tuple[int, dict[str, bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        header = b"Spec ID Event03\0" + struct.pack("<IBBBB", 0, 0, 2, 0, 2)
        header += struct.pack("<I", len(_ALGORITHMS))
        for algorithm, name in _ALGORITHMS.items():
            header += struct.pack("<HH", algorithm, hashlib.new(name).digest_size)
        header += b"\0"
        self.content += struct.pack("<II20sI", 0, 3, bytes(20), len(header)) + header

    def add(self, pcr: int, kind: int, data: bytes, *, measured: bytes | None = None) -> None:
        """An event about `measured`, or about its own data."""
        content = data if measured is None else measured
        digests = {name: hashlib.new(name, content).digest() for name in _ALGORITHMS.values()}
        if kind == 3:
            digests = {name: bytes(len(value)) for name, value in digests.items()}
        self.content += struct.pack("<III", pcr, kind, len(digests))
        for algorithm, name in _ALGORITHMS.items():
            self.content += struct.pack("<H", algorithm) + digests[name]
        self.content += struct.pack("<I", len(data)) + data
        if kind != 3:
            self.extends.append((pcr, digests))

    def extend(self, tpm: SoftwareTpm) -> None:
        """Let a TPM measure what the log has."""
        for pcr, digests in self.extends:
            tpm.tool("pcrextend", f"{pcr}:" + ",".join(f"{name}={value.hex()}" for name, value in digests.items()))


def boot_log(*, secure_boot: bool = True, locality: int = 0) -> Log:
    """What a machine with UEFI, shim and GRUB measures, in short."""
    log = Log()
    if locality:
        log.add(0, 3, b"StartupLocality\0" + bytes([locality]))
    log.add(0, 0x00000008, "2.7\0".encode("utf-16-le"))
    log.add(0, 0x80000008, struct.pack("<QQ", 0xFF000000, 0x10000), measured=b"the firmware volume")
    log.add(7, 0x80000001, variable("SecureBoot", bytes([secure_boot])))
    log.add(1, 0x80000002, variable("BootOrder", b"\1\0"), measured=b"\1\0")
    for pcr in range(8):
        log.add(pcr, 0x00000004, bytes(4))
    log.add(4, 0x80000003, image("\\EFI\\debian\\shimx64.efi"), measured=b"shim")
    log.add(8, 0x0000000D, b"grub_cmd: linux /vmlinuz root=/dev/vda1\0", measured=b"linux /vmlinuz root=/dev/vda1")
    log.add(5, 0x80000007, b"Exit Boot Services Invocation")
    return log
