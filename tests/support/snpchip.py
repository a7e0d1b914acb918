"""A made-up SEV-SNP chip: reports that verify, under roots of its own that a test puts in the place of AMD's.

The roots are pinned in `encfs.attestation.amd` and cannot be configured; a test replaces that module's private lookup.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from encfs.attestation import amd, snp
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.kbs import to_kbs_evidence

MEASUREMENT = bytes(range(48))
_OID = "1.3.6.1.4.1.3704.1"
_TCB = {"bootloader": (1, 3), "tee": (2, 0), "snp": (3, 8), "microcode": (8, 115)}


class SnpChip:
    """One Milan chip and the authority that vouches for it."""

    def __init__(self) -> None:
        self._root, self._key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        self.chip_id = os.urandom(64)
        self._ask = _certificate("made-up ASK", self._root, "made-up ASK", self._root, {})
        extensions = {f"{_OID}.3.{number}": bytes([2, 1, value]) for number, value in _TCB.values()}
        vcek = _certificate("SEV-VCEK", self._key, "made-up ASK", self._root, extensions | {f"{_OID}.4": self.chip_id})
        self.vcek = vcek.public_bytes(Encoding.DER)

    @property
    def authority(self) -> bytes:
        """The certificate (DER) that stands in for AMD's."""
        return self._ask.public_bytes(Encoding.DER)

    def report(self, report_data: bytes, **fields: Any) -> bytes:
        tcb = bytes([3, 0, 0, 0, 0, 0, 8, 115])
        values: dict[str, Any] = {
            "version": 2,
            "signature_algorithm": 1,
            "policy": 0x30000,
            "measurement": MEASUREMENT,
            "report_data": report_data.ljust(64, b"\0"),
            "chip_id": self.chip_id,
            **dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), tcb),
        }
        raw = bytearray(snp.REPORT.write(values | fields))
        r, s = decode_dss_signature(self._key.sign(bytes(raw[:0x2A0]), ec.ECDSA(SHA384())))
        raw[0x2A0 : 0x2A0 + 72] = r.to_bytes(72, "little")
        raw[0x2E8 : 0x2E8 + 72] = s.to_bytes(72, "little")
        return bytes(raw)

    def evidence(self, report_data: bytes, **fields: Any) -> dict[str, Any]:
        """In the KBS protocol's form, with the certificate."""
        report = self.report(report_data, **fields)
        return to_kbs_evidence(Evidence(EvidenceKind.SNP, report, Endorsements((self.vcek,))))


def trust_authority(der: bytes) -> None:
    """Put a made-up authority in the place of AMD's, in this process and those that it forks."""
    certificate = x509.load_der_x509_certificate(der)
    found = amd._Issuers(certificate, certificate, certificate.not_valid_after_utc)
    amd._issuers = lambda _product: found  # type: ignore[assignment]


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    extensions: dict[str, bytes],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )
    for oid, value in extensions.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(issuer_key, SHA384())
