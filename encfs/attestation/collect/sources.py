"""Which evidence this machine can give, and collecting it: the one place that knows all interfaces.

Each is named as the key broker protocol names its TEE. `auto` takes the first that the machine has, in the order of
`_AUTOMATIC`: hardware that measures this very guest or enclave before Azure's vTPM, and a TPM only where an attestation
key is named. `sample` proves nothing and is never chosen.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from encfs.attestation.collect import gramine, occlum, sev_guest, tsm
from encfs.attestation.collect.sev_guest import Ioctl
from encfs.attestation.evidence import Evidence, EvidenceKind
from encfs.attestation.kbs import TEE_NAMES
from encfs.errors import AttestationError, FormatError, KeyFileError, KeyProviderError
from encfs.webclient import Address

AUTOMATIC = "auto"
#: What may be asked for by name.
TEE_CHOICES = (AUTOMATIC, *TEE_NAMES.values())
_KINDS = {name: kind for kind, name in TEE_NAMES.items()}
#: Bytes of report data in reports and quotes; shorter data is padded with zeros.
REPORT_DATA_SIZE = 64


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a machine's interfaces are. The defaults are those of every Linux."""

    tsm: Path = tsm.ROOT
    sev_guest: Path = sev_guest.DEVICE
    gramine: Path = gramine.ROOT
    occlum: Path = occlum.DEVICE
    chassis: Path = Path("/sys/class/dmi/id/chassis_asset_tag")
    #: The TPM's directory of securityfs, with the firmware's event log.
    tpm_logs: Path = Path("/sys/kernel/security/tpm0")
    #: Azure's metadata service; None: where it is on every machine.
    metadata_service: Address | None = None
    ioctl: Ioctl = fcntl.ioctl


THIS_MACHINE = Machine()


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of evidence, ready to be collected."""

    kind: EvidenceKind
    _collect: Callable[[bytes], Evidence]

    @property
    def tee(self) -> str:
        """Its name in the key broker protocol."""
        return TEE_NAMES[self.kind]

    def collect(self, report_data: bytes) -> Evidence:
        """Fresh evidence with `report_data` (up to 64 bytes) in it.

        Raises: AttestationError, KeyProviderError (TPM), KeyFileError (attestation key).
        """
        return self._collect(report_data)


def check_tee(name: str) -> str:
    """Raises: KeyFileError for a TEE from which no evidence can be collected."""
    if name not in TEE_CHOICES:
        raise KeyFileError(f"tee={name[:32]!a} is not known", hint=f"one of {', '.join(TEE_CHOICES)}")
    return name


def evidence_source(tee: str = AUTOMATIC, *, ak: str | None = None, machine: Machine = THIS_MACHINE) -> Source:
    """The source that `tee` asks for. `ak` is the file of a TPM's attestation key; with `auto` it means the TPM.

    Raises: KeyFileError for names and keys that do not fit; AttestationError where the machine has nothing to give.
    """
    check_tee(tee)
    if ak is not None and tee not in (AUTOMATIC, "tpm"):
        raise KeyFileError(f"an attestation key is of no use with tee={tee}", hint="tee=tpm, or none")
    if tee == "tpm" and ak is None:
        raise KeyFileError("tee=tpm needs an attestation key", hint="make one with encfs attest enrol, give ak=FILE")
    if tee != AUTOMATIC:
        return _source(_KINDS[tee], ak, machine)
    if ak is not None:
        return _source(EvidenceKind.TPM, ak, machine)
    reasons = []
    for look in _AUTOMATIC:
        found = look(machine)
        if isinstance(found, EvidenceKind):
            return _source(found, None, machine)
        reasons.append(found)
    raise AttestationError(
        f"this machine has no TEE that evidence can be collected from ({'; '.join(reasons)})",
        hint="say which with tee=NAME, or give a TPM's attestation key with ak=FILE",
    )


def event_log(machine: Machine = THIS_MACHINE) -> bytes:
    """The firmware's event log of this machine's TPM, which was read as one. Raises: AttestationError."""
    from encfs.attestation.eventlog import MAX_EVENT_LOG, parse_event_log

    path = machine.tpm_logs / "binary_bios_measurements"
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_EVENT_LOG + 1)
        parse_event_log(content)
    except OSError as error:
        raise AttestationError(
            f"the event log {path} cannot be read: {error.strerror}",
            hint="it is root's, in securityfs, where the firmware handed one over",
        ) from None
    except FormatError as error:
        raise AttestationError(f"{path}: {error.message}") from None
    return content


def unavailable(machine: Machine = THIS_MACHINE) -> str | None:
    """Why no evidence can be had on this machine, found out by looking; a TPM counts, with a key enrolled."""
    from encfs.tpm.availability import unavailable as tpm_problem

    problems = [
        tsm.problem(machine.tsm),
        sev_guest.device_problem(machine.sev_guest),
        gramine.problem(machine.gramine),
        occlum.problem(machine.occlum),
        tpm_problem(),
    ]
    return None if None in problems else "no TEE and no TPM: " + "; ".join(filter(None, problems))


def _look_for_tsm(machine: Machine) -> EvidenceKind | str:
    return tsm.problem(machine.tsm) or tsm.provided_kind(machine.tsm)


def _look_for_sev_guest(machine: Machine) -> EvidenceKind | str:
    return sev_guest.device_problem(machine.sev_guest) or EvidenceKind.SNP


def _look_for_gramine(machine: Machine) -> EvidenceKind | str:
    return gramine.problem(machine.gramine) or EvidenceKind.SGX


def _look_for_occlum(machine: Machine) -> EvidenceKind | str:
    return occlum.problem(machine.occlum) or EvidenceKind.SGX


def _look_for_azure(machine: Machine) -> EvidenceKind | str:
    from encfs.attestation.collect import azure

    if not azure.is_azure(machine.chassis):
        return "this is no virtual machine of Azure's"
    try:
        return azure.provided_kind()
    except KeyProviderError as error:
        return error.message


_AUTOMATIC: tuple[Callable[[Machine], EvidenceKind | str], ...] = (
    _look_for_tsm,
    _look_for_sev_guest,
    _look_for_gramine,
    _look_for_occlum,
    _look_for_azure,
)


def _source(kind: EvidenceKind, ak: str | None, machine: Machine) -> Source:
    if kind is EvidenceKind.TPM:
        if ak is None:
            raise ValueError("a TPM's evidence needs an attestation key")
        return Source(kind, lambda report_data: _tpm(report_data, ak))
    collect = _COLLECTORS[kind]
    return Source(kind, lambda report_data: collect(report_data, machine))


def _snp(report_data: bytes, machine: Machine) -> Evidence:
    # Older kernels have the device alone.
    if machine.tsm.is_dir():
        return _of_kind(EvidenceKind.SNP, tsm.collect_report(_padded(report_data), root=machine.tsm))
    return sev_guest.collect_report(_padded(report_data), device=machine.sev_guest, ioctl=machine.ioctl)


def _tdx(report_data: bytes, machine: Machine) -> Evidence:
    return _of_kind(EvidenceKind.TDX, tsm.collect_report(_padded(report_data), root=machine.tsm))


def _sgx(report_data: bytes, machine: Machine) -> Evidence:
    # Gramine says itself what is wrong where neither is there.
    if gramine.problem(machine.gramine) is not None and occlum.problem(machine.occlum) is None:
        return occlum.collect_quote(_padded(report_data), device=machine.occlum, ioctl=machine.ioctl)
    return gramine.collect_quote(_padded(report_data), root=machine.gramine)


def _tpm(report_data: bytes, ak: str) -> Evidence:
    import json

    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.quote import collect_tpm_evidence

    return Evidence(EvidenceKind.TPM, json.dumps(collect_tpm_evidence(report_data, ak)).encode())


def _azure(kind: EvidenceKind) -> Callable[[bytes, Machine], Evidence]:
    def collect(report_data: bytes, machine: Machine) -> Evidence:
        from encfs.attestation.collect import azure

        service = machine.metadata_service or azure.METADATA_SERVICE
        return _of_kind(kind, azure.collect_evidence(report_data, service=service))

    return collect


def _sample(report_data: bytes, _machine: Machine) -> Evidence:
    import json

    from encfs.encoding import b64_encode

    return Evidence(EvidenceKind.SAMPLE, json.dumps({"svn": "1", "report_data": b64_encode(report_data)}).encode())


_COLLECTORS: Mapping[EvidenceKind, Callable[[bytes, Machine], Evidence]] = {
    EvidenceKind.SNP: _snp,
    EvidenceKind.TDX: _tdx,
    EvidenceKind.SGX: _sgx,
    EvidenceKind.AZURE_SNP_VTPM: _azure(EvidenceKind.AZURE_SNP_VTPM),
    EvidenceKind.AZURE_TDX_VTPM: _azure(EvidenceKind.AZURE_TDX_VTPM),
    EvidenceKind.SAMPLE: _sample,
}


def _padded(report_data: bytes) -> bytes:
    return report_data.ljust(REPORT_DATA_SIZE, b"\0")


def _of_kind(kind: EvidenceKind, evidence: Evidence) -> Evidence:
    if evidence.kind is not kind:
        raise AttestationError(f"this machine gives evidence of {TEE_NAMES[evidence.kind]}, not of {TEE_NAMES[kind]}")
    return evidence
