"""Intel SGX and TDX quotes (DCAP, ECDSA): their structures, and a parser. Nothing is verified here.

Sources: Intel "SGX ECDSA Quote Library API" (quote version 3), "TDX DCAP Quoting Library API" (versions 4 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.fields import Table
from encfs.errors import FormatError

#: Largest quote, bytes: real ones have about 5000.
MAX_QUOTE_SIZE = 64 << 10

HEADER = Table(
    "quote header",
    48,
    "<",
    {
        "version": (0, "u16"),
        "attestation_key_type": (2, "u16"),
        "tee_type": (4, "u32"),
        "qe_vendor_id": (12, 16),
        "user_data": (28, 20),
    },
)

#: Between header and body from version 5 on.
BODY_DESCRIPTOR = Table("quote body descriptor", 6, "<", {"type": (0, "u16"), "size": (2, "u32")})

#: sgx_report_body_t: of the enclave, and of the quoting enclave.
SGX_BODY = Table(
    "SGX report body",
    384,
    "<",
    {
        "cpu_svn": (0, 16),
        "misc_select": (16, "u32"),
        "attributes": (48, 16),
        "mrenclave": (64, 32),
        "mrsigner": (128, 32),
        "config_id": (192, 64),
        "isv_prod_id": (256, "u16"),
        "isv_svn": (258, "u16"),
        "report_data": (320, 64),
    },
)

_TD_FIELDS: dict[str, tuple[int, str | int]] = {
    "tee_tcb_svn": (0, 16),
    "mrseam": (16, 48),
    "mrsignerseam": (64, 48),
    "seam_attributes": (112, 8),
    "td_attributes": (120, 8),
    "xfam": (128, 8),
    "mrtd": (136, 48),
    "mrconfigid": (184, 48),
    "mrowner": (232, 48),
    "mrownerconfig": (280, 48),
    "rtmr0": (328, 48),
    "rtmr1": (376, 48),
    "rtmr2": (424, 48),
    "rtmr3": (472, 48),
    "report_data": (520, 64),
}
TD_BODY_10 = Table("TD report body", 584, "<", _TD_FIELDS)
TD_BODY_15 = Table("TD 1.5 report body", 648, "<", _TD_FIELDS | {"tee_tcb_svn2": (584, 16), "mrservicetd": (600, 48)})

_TEE_TYPES = {0: EvidenceKind.SGX, 0x81: EvidenceKind.TDX}
# (version, TEE type, body type or None) -> table, offset of the body.
_BODIES = {
    (3, 0, None): (SGX_BODY, 48),
    (4, 0, None): (SGX_BODY, 48),
    (4, 0x81, None): (TD_BODY_10, 48),
    (5, 0, 1): (SGX_BODY, 54),
    (5, 0x81, 2): (TD_BODY_10, 54),
    (5, 0x81, 3): (TD_BODY_15, 54),
}

SGX_FLAG_DEBUG = 0x02


_TD_MIGRATABLE = 1 << 29


def td_is_inspectable(attributes: bytes) -> bool:
    """Whether TD_ATTRIBUTES let the host look inside: any bit of its first byte (TUD), debugging and profiling."""
    return attributes[0] != 0


def td_is_migratable(attributes: bytes) -> bool:
    """Whether TD_ATTRIBUTES let the trust domain be moved to another machine."""
    return bool(int.from_bytes(attributes, "little") & _TD_MIGRATABLE)


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote cut into its parts. `body` has the fields of its table by name; `signed` is header and body."""

    kind: EvidenceKind
    version: int
    attestation_key_type: int
    vendor_id: bytes
    body: dict[str, Any]
    signed: bytes = field(repr=False)
    signature_data: bytes = field(repr=False)

    @property
    def debug(self) -> bool:
        if self.kind is EvidenceKind.SGX:
            return bool(self.body["attributes"][0] & SGX_FLAG_DEBUG)
        return td_is_inspectable(self.body["td_attributes"])


def quote_kind(data: bytes) -> EvidenceKind | None:
    """What kind of quote this begins like; None for none."""
    if len(data) < HEADER.size:
        return None
    header = HEADER.read(data)
    if header["version"] not in (3, 4, 5) or header["attestation_key_type"] not in (2, 3):
        return None
    return _TEE_TYPES.get(header["tee_type"])


def parse_quote(data: bytes) -> Quote:
    """Bytes behind it are ignored. Raises: FormatError: no quote of versions 3 to 5, cut short, too large."""
    if len(data) > MAX_QUOTE_SIZE:
        raise FormatError(f"the quote is {len(data)} bytes, more than the {MAX_QUOTE_SIZE} allowed")
    header = HEADER.read(data)
    version = header["version"]
    body_type = BODY_DESCRIPTOR.read(data, HEADER.size)["type"] if version >= 5 else None
    found = _BODIES.get((version, header["tee_type"], body_type))
    if found is None:
        raise FormatError(
            f"quotes of version {version}, TEE type {header['tee_type']:#x}, body {body_type} are not known"
        )
    table, offset = found
    kind = _TEE_TYPES[header["tee_type"]]
    body = table.read(data, offset)
    if version >= 5 and BODY_DESCRIPTOR.read(data, HEADER.size)["size"] != table.size:
        raise FormatError("the quote's body is not as long as its type")
    end = offset + table.size
    size = int.from_bytes(data[end : end + 4], "little")
    signature_data = data[end + 4 : end + 4 + size]
    if len(data) < end + 4 or len(signature_data) != size:
        raise FormatError("the quote is cut short")
    return Quote(
        kind=kind,
        version=version,
        attestation_key_type=header["attestation_key_type"],
        vendor_id=header["qe_vendor_id"],
        body=body,
        signed=data[:end],
        signature_data=signature_data,
    )
