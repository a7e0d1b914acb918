"""What vouches for evidence and did not come along with it: certificates of chips, Intel's collateral. Not trusted.

A directory of the operator's: VCEK and VLEK certificates (`*.der`, `*.crt`, `*.pem`), and `collateral.json`. It is read
once; what is in it is judged by `encfs.attestation` like anything that comes with evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from encfs.attestation import snp
from encfs.attestation.amd import MAX_CERTIFICATE_SIZE, endorsement_key
from encfs.attestation.certificates import MAX_CERTIFICATES, der_certificates
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.errors import FormatError, NotFoundError

_MAX_FILES = 10_000
_MAX_FILE = 2 * MAX_CERTIFICATES * MAX_CERTIFICATE_SIZE
_MAX_COLLATERAL = 1 << 20


@dataclass(frozen=True, slots=True)
class EndorsementStore:
    """Certificates by the chip they are of (VLEKs under the empty one), and collateral."""

    certificates: Mapping[bytes, tuple[bytes, ...]]
    collateral: bytes | None = None

    def for_evidence(self, evidence: Evidence) -> Endorsements:
        """What is known for some evidence, beside what it brought along: that may be of no use."""
        if evidence.kind is EvidenceKind.SNP:
            report = snp.parse_report(evidence.content)
            chip = report.chip_id if report.signing_key == "VCEK" else b""
            return Endorsements(self.certificates.get(chip, ()))
        if evidence.kind in (EvidenceKind.TDX, EvidenceKind.SGX, EvidenceKind.AZURE_TDX_VTPM):
            return Endorsements(collateral=self.collateral)
        return Endorsements()


def load_endorsements(directory: Path | None) -> EndorsementStore:
    """Raises: NotFoundError; FormatError naming a file that is of no use."""
    if directory is None:
        return EndorsementStore({})
    if not directory.is_dir():
        raise NotFoundError(f"the directory of endorsements {directory} does not exist")
    found: dict[bytes, tuple[bytes, ...]] = {}
    collateral = None
    for path in sorted(directory.iterdir())[:_MAX_FILES]:
        if path.name == "collateral.json":
            collateral = path.read_bytes()[: _MAX_COLLATERAL + 1]
        elif path.suffix in (".der", ".crt", ".cer", ".pem"):
            with path.open("rb") as stream:
                content = stream.read(_MAX_FILE)
            for der in der_certificates(content, str(path)):
                key = endorsement_key(der)
                if isinstance(key, str):
                    raise FormatError(f"{path}: {key}", hint="only VCEK and VLEK certificates belong there")
                found[key.chip_id] = (*found.get(key.chip_id, ()), der)
    if collateral is not None and len(collateral) > _MAX_COLLATERAL:
        raise FormatError(f"collateral.json in {directory} is larger than {_MAX_COLLATERAL} bytes")
    return EndorsementStore(found, collateral)
