"""Evidence for the KBS protocol from this machine: which TEE it has, and a fresh report in the protocol's form.

The collecting is `encfs.attestation.collect`'s; nothing is judged here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.kbs import TEE_NAMES, to_kbs_evidence
from encfs.encoding import b64_encode
from encfs.errors import KeyFileError, KeyProviderError
from encfs.kbs.client import EvidenceSource

#: Bytes of the report data of an SNP report; shorter data is padded with zeros.
_REPORT_DATA_SIZE = 64
_SEV_GUEST = "/dev/sev-guest"
AUTOMATIC = "auto"


@dataclass(frozen=True, slots=True)
class SnpSource:
    """Reports of the AMD SEV-SNP firmware."""

    tee: str = TEE_NAMES[EvidenceKind.SNP]

    def collect(self, report_data: bytes) -> object:
        from encfs.attestation.collect.sev_guest import collect_report

        return to_kbs_evidence(collect_report(report_data.ljust(_REPORT_DATA_SIZE, b"\0")))


@dataclass(frozen=True, slots=True)
class SampleSource:
    """Evidence that proves nothing, for demonstrations: brokers refuse it unless they were told not to."""

    tee: str = TEE_NAMES[EvidenceKind.SAMPLE]

    def collect(self, report_data: bytes) -> object:
        return {"svn": "1", "report_data": b64_encode(report_data)}


_SOURCES: Mapping[str, type[SnpSource] | type[SampleSource]] = {"snp": SnpSource, "sample": SampleSource}
TEE_CHOICES = (AUTOMATIC, *_SOURCES)


def check_tee(name: str) -> str:
    """Raises: KeyFileError for a TEE from which no evidence can be collected."""
    if name not in TEE_CHOICES:
        raise KeyFileError(f"tee={name[:32]!a} is not known", hint=f"one of {', '.join(TEE_CHOICES)}")
    return name


def evidence_source(name: str) -> EvidenceSource:
    """The source that `name` asks for; `auto` is what this machine has, and never the sample.

    Raises: KeyFileError, KeyProviderError where the machine has none.
    """
    check_tee(name)
    if name != AUTOMATIC:
        return _SOURCES[name]()
    if os.path.exists(_SEV_GUEST):
        return SnpSource()
    raise KeyProviderError(
        "this machine has no TEE that evidence can be collected from (no /dev/sev-guest)",
        hint="say which with tee=NAME; tee=sample is for demonstrations",
    )
