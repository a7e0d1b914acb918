"""Occlum's `/dev/sgx`: an SGX quote of the enclave that this program runs in, by ioctl.

Occlum's library OS answers the ioctl itself; the device of that name is none of the kernel's. Source: Occlum,
src/libos/src/fs/dev_fs/dev_sgx and demos/remote_attestation/dcap. The ioctl is handed in, so that tests go through all
of it but the library OS.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

from encfs.attestation.collect.sev_guest import Ioctl
from encfs.attestation.evidence import Evidence, EvidenceKind
from encfs.attestation.fields import Table
from encfs.attestation.quotes import MAX_QUOTE_SIZE, quote_kind
from encfs.errors import AttestationError

DEVICE = Path("/dev/sgx")
# _IOR('s', 7, u32), _IOWR('s', 8, struct of three pointers).
GET_QUOTE_SIZE, GENERATE_QUOTE = 0x80047307, 0xC0187308
_SIZE_BYTES = 4
_REPORT_DATA_SIZE = 64

#: sgxioc_gen_dcap_quote_arg_t: pointers to 64 bytes, to the size of the buffer (in and out), to the buffer.
QUOTE_ARGUMENT = Table(
    "quote argument", 24, "<", {"report_data": (0, "u64"), "quote_size": (8, "u64"), "quote": (16, "u64")}
)


def problem(device: Path = DEVICE) -> str | None:
    """Why no quote can be had here, found out by looking; None where one may be."""
    if not device.exists():
        return f"{device} does not exist: this is no SGX enclave under Occlum"
    if device.is_dir():
        return f"{device} is a directory, as drivers of hosts make it: this is no SGX enclave under Occlum"
    if not os.access(device, os.R_OK):
        return f"{device} may not be opened by this user"
    return None


def collect_quote(report_data: bytes, *, device: Path = DEVICE, ioctl: Ioctl = fcntl.ioctl) -> Evidence:
    """A DCAP quote over up to 64 bytes. Raises: AttestationError where there is none to be had."""
    if len(report_data) > _REPORT_DATA_SIZE:
        raise ValueError(f"report data is at most {_REPORT_DATA_SIZE} bytes")
    if found := problem(device):
        raise AttestationError(found)
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            quote = _quote(descriptor, report_data.ljust(_REPORT_DATA_SIZE, b"\0"), ioctl)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AttestationError(
            f"Occlum gives no quote: {error.strerror}", hint="does the host's quoting service (AESM, PCCS) run?"
        ) from None
    if quote_kind(quote) is not EvidenceKind.SGX:
        raise AttestationError("Occlum gave something that is no SGX quote")
    return Evidence(EvidenceKind.SGX, quote)


def _quote(descriptor: int, report_data: bytes, ioctl: Ioctl) -> bytes:
    answer = bytearray(_SIZE_BYTES)
    ioctl(descriptor, GET_QUOTE_SIZE, answer)
    size = int.from_bytes(answer, "little")
    if not 0 < size <= MAX_QUOTE_SIZE:
        raise AttestationError(f"Occlum says that a quote has {size} bytes; up to {MAX_QUOTE_SIZE} are accepted")
    data = ctypes.create_string_buffer(report_data, _REPORT_DATA_SIZE)
    length, content = ctypes.c_uint32(size), ctypes.create_string_buffer(size)
    argument = QUOTE_ARGUMENT.write(
        {
            "report_data": ctypes.addressof(data),
            "quote_size": ctypes.addressof(length),
            "quote": ctypes.addressof(content),
        }
    )
    ioctl(descriptor, GENERATE_QUOTE, argument)
    if length.value > size:
        raise AttestationError("Occlum says that the quote is longer than its buffer")
    return content.raw[: length.value]
