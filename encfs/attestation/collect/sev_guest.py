"""`/dev/sev-guest`: attestation reports and derived keys of an SEV-SNP guest, by ioctl.

Sources: Linux `include/uapi/linux/sev-guest.h` and `Documentation/virt/coco/sev-guest.rst`; AMD publication 56860,
chapter 7 for the messages. The ioctl is handed in, so that tests go through all of it but the kernel.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.fields import Table
from encfs.attestation.snp import REPORT_SIZE, parse_certificate_table
from encfs.errors import AttestationError, FormatError

DEVICE = Path("/dev/sev-guest")

#: What `fcntl.ioctl` does: (file descriptor, request, struct snp_guest_request_ioctl) -> result; raises OSError.
Ioctl = Callable[[int, int, bytearray], int]

# _IOWR('S', n, struct snp_guest_request_ioctl).
SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT = 0xC0205301, 0xC0205302
_MESSAGE_VERSION = 1

#: struct snp_guest_request_ioctl. The two errors are the halves of `exitinfo2`.
GUEST_REQUEST = Table(
    "guest request",
    32,
    "<",
    {
        "message_version": (0, "u8"),
        "request": (8, "u64"),
        "response": (16, "u64"),
        "firmware_error": (24, "u32"),
        "host_error": (28, "u32"),
    },
)
#: struct snp_report_req.
REPORT_REQUEST = Table("report request", 96, "<", {"report_data": (0, 64), "vmpl": (64, "u32")})
#: struct snp_ext_report_req.
EXTENDED_REQUEST = Table(
    "extended report request",
    112,
    "<",
    {**REPORT_REQUEST.fields, "certificates": (96, "u64"), "certificates_size": (104, "u32")},
)
#: struct snp_derived_key_req.
KEY_REQUEST = Table(
    "derived key request",
    32,
    "<",
    {
        "root_key": (0, "u32"),
        "fields": (8, "u64"),
        "vmpl": (16, "u32"),
        "guest_svn": (20, "u32"),
        "tcb_version": (24, "u64"),
    },
)
#: What firmware answers: MSG_REPORT_RSP and MSG_KEY_RSP.
REPORT_RESPONSE = Table(
    "report response", 4000, "<", {"status": (0, "u32"), "size": (4, "u32"), "report": (32, REPORT_SIZE)}
)
KEY_RESPONSE = Table("derived key response", 64, "<", {"status": (0, "u32")})
_KEY_OFFSET = 32
#: Bytes of a derived key.
KEY_SIZE = 32

# SNP_GUEST_VMM_ERR_INVALID_LEN: the buffer for the certificates is too small; the request then says what is needed.
_HOST_ERROR_TOO_SMALL = 1
_MAX_CERTIFICATES_SIZE = 64 << 10

#: Fields that may be mixed into a derived key: names and bits of GUEST_FIELD_SELECT.
KEY_FIELDS: Mapping[str, int] = MappingProxyType(
    {
        "policy": 1 << 0,
        "image-id": 1 << 1,
        "family-id": 1 << 2,
        "measurement": 1 << 3,
        "svn": 1 << 4,
        "tcb": 1 << 5,
    }
)
ROOT_KEYS: Mapping[str, int] = MappingProxyType({"vcek": 0, "vmrk": 1})


def device_problem(device: Path = DEVICE) -> str | None:
    """Why the device cannot be used by this process, found out by looking; None where it can."""
    if not device.exists():
        return f"{device} does not exist: this is no SEV-SNP guest"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    return None


def collect_report(report_data: bytes, *, vmpl: int = 0, device: Path = DEVICE, ioctl: Ioctl = fcntl.ioctl) -> Evidence:
    """A report over up to 64 bytes, with the certificates that the host has for it (often none).

    Raises: AttestationError where the device is missing or refuses.
    """
    if len(report_data) > 64:
        raise ValueError("report data is at most 64 bytes")
    fields: dict[str, int | bytes] = {"report_data": report_data.ljust(64, b"\0"), "vmpl": vmpl}
    size = 0
    # The first call, with no room, asks how much the certificates need.
    for _ in range(3):
        certificates = ctypes.create_string_buffer(size) if size else None
        request = EXTENDED_REQUEST.write(
            {
                **fields,
                "certificates": ctypes.addressof(certificates) if certificates is not None else 0,
                "certificates_size": size,
            }
        )
        response = bytearray(REPORT_RESPONSE.size)
        outcome = _call(device, ioctl, SNP_GET_EXT_REPORT, request, response, tolerate=_HOST_ERROR_TOO_SMALL)
        if outcome != _HOST_ERROR_TOO_SMALL:
            return _evidence(response, certificates.raw if certificates is not None else b"")
        size = EXTENDED_REQUEST.read(bytes(request))["certificates_size"]
        if not 0 < size <= _MAX_CERTIFICATES_SIZE:
            raise AttestationError(f"the host wants {size} bytes of room for certificates")
    raise AttestationError("the host keeps changing how much room its certificates need")


def derive_key(
    *,
    fields: int,
    root_key: int = 0,
    vmpl: int = 0,
    guest_svn: int = 0,
    tcb_version: int = 0,
    device: Path = DEVICE,
    ioctl: Ioctl = fcntl.ioctl,
) -> bytearray:
    """A key that firmware derives for this guest: 32 bytes, which the caller wipes.

    `fields` are bits of `KEY_FIELDS`. Raises: AttestationError where the device is missing or refuses.
    """
    request = KEY_REQUEST.write(
        {"root_key": root_key, "fields": fields, "vmpl": vmpl, "guest_svn": guest_svn, "tcb_version": tcb_version}
    )
    response = bytearray(KEY_RESPONSE.size)
    try:
        _call(device, ioctl, SNP_GET_DERIVED_KEY, request, response)
        status = int.from_bytes(response[:4], "little")
        key = response[_KEY_OFFSET : _KEY_OFFSET + KEY_SIZE]
    finally:
        response[:] = bytes(len(response))
    if status != 0:
        raise AttestationError(f"the SNP firmware refused to derive a key (status {status:#x})")
    if not any(key):
        raise AttestationError("the SNP firmware gave no key")
    return key


def _evidence(response: bytearray, table: bytes) -> Evidence:
    answer = REPORT_RESPONSE.read(bytes(response))
    if answer["status"] != 0:
        raise AttestationError(f"the SNP firmware refused to make a report (status {answer['status']:#x})")
    if answer["size"] != REPORT_SIZE:
        raise AttestationError(f"the SNP firmware gave a report of {answer['size']} bytes")
    try:
        certificates = parse_certificate_table(table)
    except FormatError as error:
        raise AttestationError(f"the host gave a malformed certificate table: {error.message}") from None
    return Evidence(EvidenceKind.SNP, answer["report"], Endorsements(certificates))


def _call(
    device: Path, ioctl: Ioctl, number: int, request: bytearray, response: bytearray, *, tolerate: int | None = None
) -> int:
    """Run one request; the host's error if it is the tolerated one, else 0."""
    incoming = (ctypes.c_char * len(request)).from_buffer(request)
    outgoing = (ctypes.c_char * len(response)).from_buffer(response)
    argument = GUEST_REQUEST.write(
        {
            "message_version": _MESSAGE_VERSION,
            "request": ctypes.addressof(incoming),
            "response": ctypes.addressof(outgoing),
        }
    )
    problem = ""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AttestationError(
            f"{device} cannot be opened: {error.strerror}",
            hint="this must run inside an SEV-SNP guest, as root, with the kernel module sev-guest",
        ) from None
    try:
        ioctl(descriptor, number, argument)
    except OSError as error:
        problem = error.strerror or str(error)
    finally:
        os.close(descriptor)
        # Else the buffers could not be resized or freed by their owner.
        del incoming, outgoing
    answer = GUEST_REQUEST.read(bytes(argument))
    if tolerate is not None and answer["host_error"] == tolerate:
        return tolerate
    if problem or answer["firmware_error"] or answer["host_error"]:
        raise AttestationError(
            f"{device} refused the request: {problem or 'error'} "
            f"(firmware {answer['firmware_error']:#x}, host {answer['host_error']:#x})"
        )
    return 0
