"""Evidence for the KBS protocol from this machine, in the protocol's form.

Which interfaces there are and which is chosen is `encfs.attestation.collect.sources`'; nothing is judged here.
"""

from __future__ import annotations

from dataclasses import dataclass

from encfs.attestation.collect.sources import Source
from encfs.attestation.kbs import to_kbs_evidence
from encfs.errors import FormatError, KeyProviderError


@dataclass(frozen=True, slots=True)
class ProtocolSource:
    """A source of this machine as the client of the protocol wants it."""

    source: Source

    @property
    def tee(self) -> str:
        return self.source.tee

    def collect(self, report_data: bytes) -> object:
        evidence = self.source.collect(report_data)
        try:
            return to_kbs_evidence(evidence)
        except FormatError as error:
            raise KeyProviderError(f"this machine's evidence is malformed: {error.message}") from None
