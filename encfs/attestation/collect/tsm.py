"""configfs-tsm: the kernel's one interface to reports of SEV-SNP and quotes of TDX (Linux 6.7 and later).

A request is a directory that is made, written to, read, and removed again. Source: Linux
`Documentation/ABI/testing/configfs-tsm-report`. The directory under which requests are made is handed in.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.quotes import MAX_QUOTE_SIZE, quote_kind
from encfs.attestation.snp import REPORT_SIZE, parse_certificate_table
from encfs.errors import AttestationError, FormatError

_logger = logging.getLogger(__name__)

ROOT = Path("/sys/kernel/config/tsm/report")

#: What `provider` says, and the kind of evidence that comes of it.
PROVIDERS: Mapping[str, EvidenceKind] = {"sev_guest": EvidenceKind.SNP, "tdx_guest": EvidenceKind.TDX}

#: Bytes of `inblob`; TDX takes no fewer.
_INPUT_SIZE = 64
_MAX_CERTIFICATES = 64 << 10
_ATTEMPTS = 5
# After one write; another number means that somebody else wrote to our request.
_EXPECTED_GENERATION = "1"


def problem(root: Path = ROOT) -> str | None:
    """Why no report can be asked for here, found out by looking; None where one can."""
    if not root.is_dir():
        return f"{root} does not exist (configfs-tsm, Linux 6.7 and later)"
    if not os.access(root, os.W_OK):
        return f"{root} may not be used by this user"
    return None


def provided_kind(root: Path = ROOT) -> EvidenceKind:
    """The kind of evidence that this machine makes. Raises: AttestationError for one that is not known."""
    with _request(root) as request:
        return _kind(request)


def collect_report(report_data: bytes, *, root: Path = ROOT) -> Evidence:
    """An SNP report (with the host's certificates, where it has them) or a TDX quote over up to 64 bytes.

    Raises: AttestationError where the interface is missing or refuses.
    """
    if len(report_data) > _INPUT_SIZE:
        raise ValueError(f"report data is at most {_INPUT_SIZE} bytes")
    for _ in range(_ATTEMPTS):
        with _request(root) as request:
            kind = _kind(request)
            _write(request / "inblob", report_data.ljust(_INPUT_SIZE, b"\0"))
            content = _read(request / "outblob", MAX_QUOTE_SIZE)
            certificates = _read(request / "auxblob", _MAX_CERTIFICATES, optional=True)
            if _text(request / "generation") != _EXPECTED_GENERATION:
                continue
        return _evidence(kind, content, certificates)
    raise AttestationError(f"requests below {root} are changed by another program", hint="try again")


@contextmanager
def _request(root: Path) -> Iterator[Path]:
    # A name that nobody else's request has: making an existing directory fails.
    path = root / f"encfs-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        path.mkdir()
    except OSError as error:
        raise AttestationError(
            f"{root} takes no request: {error.strerror}",
            hint="this must run as root in an SEV-SNP or TDX guest with Linux 6.7 or later",
        ) from None
    try:
        yield path
    finally:
        try:
            path.rmdir()
        except OSError as error:
            # What went wrong before is what the user should hear of; the kernel drops it with the next reboot.
            _logger.debug("%s cannot be removed: %s", path, error)


def _kind(request: Path) -> EvidenceKind:
    provider = _text(request / "provider")
    try:
        return PROVIDERS[provider]
    except KeyError:
        raise AttestationError(f"reports of the provider {provider[:32]!a} are not supported") from None


def _evidence(kind: EvidenceKind, content: bytes, table: bytes) -> Evidence:
    if kind is EvidenceKind.TDX:
        if quote_kind(content) is not EvidenceKind.TDX:
            raise AttestationError("the kernel gave something that is no TDX quote")
        return Evidence(kind, content)
    if len(content) != REPORT_SIZE:
        raise AttestationError(f"the kernel gave an SNP report of {len(content)} bytes")
    try:
        return Evidence(kind, content, Endorsements(parse_certificate_table(table)))
    except FormatError as error:
        raise AttestationError(f"the host gave a malformed certificate table: {error.message}") from None


def _text(path: Path) -> str:
    return _read(path, 256).decode("ascii", "replace").strip()


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("wb", buffering=0) as stream:
            written = stream.write(content)
    except OSError as error:
        raise _refusal(path, error) from None
    if written != len(content):
        raise AttestationError(f"{path} took {written} of {len(content)} bytes")


def _read(path: Path, limit: int, *, optional: bool = False) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        # The kernel shows `auxblob` only where there is one, and gives ENOENT or EINVAL for none.
        if optional and error.errno in (errno.ENOENT, errno.EINVAL, errno.ENXIO):
            return b""
        raise _refusal(path, error) from None
    if len(content) > limit:
        raise AttestationError(f"{path} holds more than {limit} bytes")
    return content


def _refusal(path: Path, error: OSError) -> AttestationError:
    return AttestationError(f"{path.name} of configfs-tsm fails: {error.strerror}", hint="the kernel's log says why")
