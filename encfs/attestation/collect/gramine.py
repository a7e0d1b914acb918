"""Gramine's pseudo-files: an SGX quote of the enclave that this program runs in.

Source: Gramine documentation, "Attestation and Secret Provisioning", low-level interface: 64 bytes are written to
`user_report_data`, the quote is read from `quote`. Key files are `encfs.keys.providers.gramine`'s.
"""

from __future__ import annotations

from pathlib import Path

from encfs.attestation.evidence import Evidence, EvidenceKind
from encfs.attestation.quotes import MAX_QUOTE_SIZE, quote_kind
from encfs.errors import AttestationError

ROOT = Path("/dev/attestation")
_REPORT_DATA_SIZE = 64
_WANTED_TYPE = "dcap"


def problem(root: Path = ROOT) -> str | None:
    """Why no quote can be had here, found out by looking; None where one can."""
    try:
        found = (root / "attestation_type").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return f"{root}/attestation_type cannot be read: this is no SGX enclave under Gramine"
    if found != _WANTED_TYPE:
        return f'the manifest has sgx.remote_attestation = {ascii(found)[:18]}, and "{_WANTED_TYPE}" is needed'
    return None


def collect_quote(report_data: bytes, *, root: Path = ROOT) -> Evidence:
    """A DCAP quote over up to 64 bytes. Raises: AttestationError where there is none to be had."""
    if len(report_data) > _REPORT_DATA_SIZE:
        raise ValueError(f"report data is at most {_REPORT_DATA_SIZE} bytes")
    if found := problem(root):
        raise AttestationError(found, hint='set sgx.remote_attestation = "dcap" in the manifest')
    try:
        with (root / "user_report_data").open("wb", buffering=0) as stream:
            stream.write(report_data.ljust(_REPORT_DATA_SIZE, b"\0"))
        with (root / "quote").open("rb") as stream:
            quote = stream.read(MAX_QUOTE_SIZE + 1)
    except OSError as error:
        raise AttestationError(f"Gramine gives no quote: {error.strerror}", hint="does its AESM service run?") from None
    if len(quote) > MAX_QUOTE_SIZE or quote_kind(quote) is not EvidenceKind.SGX:
        raise AttestationError("Gramine gave something that is no SGX quote")
    return Evidence(EvidenceKind.SGX, quote)
