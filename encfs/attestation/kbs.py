"""The key broker protocol's forms: evidence as JSON, and how a session's key and nonce are bound to it.

Evidence that Confidential Containers' attesters send is JSON of the shape that each verifier's crate happens to have;
this module reads and writes these shapes. Source: confidential-containers/trustee, deps/verifier and kbs/docs, protocol
0.4.0.

| kind | TEE name | evidence |
|---|---|---|
| snp | `snp` | `{"attestation_report": {…every field…}, "cert_chain": [{"cert_type", "data"}] or null}` |
| tdx | `tdx` | `{"quote": base64, "cc_eventlog": base64 or null}` |
| sgx | `sgx` | `{"quote": base64}` |
| tpm | `tpm` | `{"ak_public": base64 DER, "tpm_quote": {"signature", "message": base64, "pcrs": [hex]}}` |
| azure-snp-vtpm | `az-snp-vtpm` | `{"version", "hcl_report", "vcek": base64url, "tpm_quote": {…, all in hex}}` |
| azure-tdx-vtpm | `az-tdx-vtpm` | the same with `td_quote` in the place of `vcek` |
| sample | `sample` | `{"svn", "report_data": base64}` |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import rfc8785

from encfs.attestation import snp
from encfs.attestation.amd import Tcb, endorsement_key
from encfs.attestation.evidence import MAX_EVIDENCE_SIZE, Endorsements, Evidence, EvidenceKind
from encfs.attestation.quotes import quote_kind
from encfs.encoding import b64_decode, b64_encode
from encfs.errors import FormatError
from encfs.strictjson import loads_object, show_name

#: What the protocol calls each kind.
TEE_NAMES: Mapping[EvidenceKind, str] = {
    EvidenceKind.SNP: "snp",
    EvidenceKind.TDX: "tdx",
    EvidenceKind.SGX: "sgx",
    EvidenceKind.TPM: "tpm",
    EvidenceKind.AZURE_SNP_VTPM: "az-snp-vtpm",
    EvidenceKind.AZURE_TDX_VTPM: "az-tdx-vtpm",
    EvidenceKind.SAMPLE: "sample",
}
_KINDS = {name: kind for kind, name in TEE_NAMES.items()}


def digest_of_json(data: object, algorithm: str = "sha384") -> bytes:
    """Digest of a JSON value in its canonical form (RFC 8785). Raises: FormatError where it has none."""
    return hashlib.new(algorithm, _canonical(data, "the runtime data")).digest()


def kind_of_tee(name: str) -> EvidenceKind:
    """The kind of evidence of a TEE as the protocol names it. Raises: FormatError for one that is not supported."""
    try:
        return _KINDS[name]
    except KeyError:
        raise FormatError(f"the TEE {show_name(name)} is not supported") from None


def from_kbs_evidence(tee: str, evidence: object) -> Evidence:
    """The evidence in an attestation request's `primary_evidence`.

    Raises: FormatError where it does not have the shape of its TEE, or is of another TEE than `tee` says.
    """
    kind = kind_of_tee(tee)
    if not isinstance(evidence, dict):
        raise FormatError("the evidence is not a JSON object")
    found = parse_document(evidence)
    if found.kind is not kind:
        raise FormatError(f"the evidence is of {TEE_NAMES[found.kind]}, not of {tee}")
    return found


def to_kbs_evidence(evidence: Evidence) -> dict[str, Any]:
    """What `primary_evidence` of an attestation request has to be; the TEE's name is `TEE_NAMES[evidence.kind]`.

    Raises: FormatError for tokens, which the protocol does not take as evidence, and malformed evidence.
    """
    match evidence.kind:
        case EvidenceKind.SNP:
            return _snp_to_json(evidence)
        case EvidenceKind.TDX:
            return {"cc_eventlog": None, "quote": b64_encode(evidence.content)}
        case EvidenceKind.SGX:
            return {"quote": b64_encode(evidence.content)}
        case EvidenceKind.MAA | EvidenceKind.EAR:
            raise FormatError("a token is no evidence of the key broker protocol")
    return loads_object(evidence.content, limit=MAX_EVIDENCE_SIZE, what="the evidence")


def parse_document(document: Mapping[str, object]) -> Evidence:
    """Evidence from a parsed JSON document, told apart by its members. Raises: FormatError."""
    members = set(document)
    if "attestation_report" in members:
        return _snp_from_json(document)
    if "tpm_quote" in members or {"quote", "report", "vcek"} <= members:
        return _of_tpm(document)
    if "quote" in members:
        quote = b64_decode(document["quote"], "quote")
        kind = quote_kind(quote)
        if kind is None:
            raise FormatError("the evidence has a quote that is neither one of TDX nor of SGX")
        return Evidence(kind, quote)
    if "svn" in members and "report_data" in members:
        return Evidence(EvidenceKind.SAMPLE, _canonical(dict(document), "the evidence"))
    raise FormatError("the evidence is a JSON document of no kind that is known")


def _of_tpm(document: Mapping[str, object]) -> Evidence:
    if "td_quote" in document:
        kind = EvidenceKind.AZURE_TDX_VTPM
    elif "ak_public" in document:
        kind = EvidenceKind.TPM
    elif "vcek" in document:
        kind = EvidenceKind.AZURE_SNP_VTPM
    else:
        raise FormatError("the evidence has a TPM quote and neither ak_public, vcek nor td_quote")
    return Evidence(kind, _canonical(dict(document), "the evidence"))


# The report as serde writes the struct of the `sev` crate: numbers, arrays of numbers, and these names.
_SAME_NAMES = ("version", "guest_svn", "policy", "vmpl", "key_info")
_BYTES = (
    *("family_id", "image_id", "report_data", "measurement", "host_data", "id_key_digest", "author_key_digest"),
    *("report_id", "report_id_ma", "chip_id"),
)
_RENAMED = {"sig_algo": "signature_algorithm", "plat_info": "platform_info"}
_OPTIONAL = {
    "cpuid_fam_id": "cpuid_family",
    "cpuid_mod_id": "cpuid_model",
    "cpuid_step": "cpuid_stepping",
    "launch_mit_vector": "launch_mitigations",
    "current_mit_vector": "current_mitigations",
}
_TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
_TCB_PARTS = ("bootloader", "tee", "snp", "microcode")
_VERSIONS = ("current", "committed")


def _snp_from_json(document: Mapping[str, object]) -> Evidence:
    fields = _object(document.get("attestation_report"), "attestation_report")
    values: dict[str, int | bytes] = {name: _number(fields, name) for name in _SAME_NAMES}
    values |= {ours: _number(fields, name) for name, ours in _RENAMED.items()}
    values |= {name: _bytes(fields.get(name), name, snp.REPORT.fields[name][1]) for name in _BYTES}
    values |= {ours: _number(fields, name) for name, ours in _OPTIONAL.items() if fields.get(name) is not None}
    for name in _VERSIONS:
        version = _object(fields.get(name), name)
        values |= {f"{name}_{part}": _number(version, part) for part in ("build", "minor", "major")}
    for name in _TCBS:
        numbers = _object(fields.get(name), name)
        fmc = numbers.get("fmc")
        product = "Milan" if fmc is None else "Turin"
        values[name] = snp.write_tcb(
            Tcb(
                **{part: _number(numbers, part) for part in _TCB_PARTS},
                fmc=None if fmc is None else _number(numbers, "fmc"),
            ),
            product,
        )
    signature = _object(fields.get("signature"), "signature")
    values |= {f"signature_{part}": _bytes(signature.get(part), f"signature {part}", 72) for part in "rs"}
    return Evidence(EvidenceKind.SNP, bytes(snp.REPORT.write(values)), Endorsements(_certificates(document)))


def _certificates(document: Mapping[str, object]) -> tuple[bytes, ...]:
    chain = document.get("cert_chain")
    if chain is None:
        return ()
    if not isinstance(chain, list) or len(chain) > 16:
        raise FormatError("cert_chain is not a list of at most 16 certificates")
    certificates = []
    for entry in chain:
        members = _object(entry, "an entry of cert_chain")
        if members.get("cert_type") in ("VCEK", "VLEK"):
            certificates.append(_bytes(members.get("data"), "a certificate", None))
    return tuple(certificates)


def _snp_to_json(evidence: Evidence) -> dict[str, Any]:
    report = snp.parse_report(evidence.content)
    keys = [(der, endorsement_key(der)) for der in evidence.endorsements.certificates]
    chain = [
        {"cert_type": "VLEK" if key.vlek else "VCEK", "data": list(der)}
        for der, key in keys
        if not isinstance(key, str)
    ]
    product = report.product or next((key.product for _, key in keys if not isinstance(key, str)), None)
    if product is None:
        # Before version 3 only the chip tells: Turin's id is eight bytes, the rest is zero.
        product = "Turin" if any(report.chip_id) and not any(report.chip_id[8:]) else "Milan"
    fields: dict[str, Any] = {name: getattr(report, name) for name in _SAME_NAMES}
    fields |= {name: getattr(report, ours) for name, ours in _RENAMED.items()}
    fields |= {name: list(getattr(report, name)) for name in _BYTES}
    present = {"cpuid_": report.version >= 3, "launch": report.version >= 5, "current": report.version >= 5}
    for name, ours in _OPTIONAL.items():
        there = next(value for prefix, value in present.items() if name.startswith(prefix))
        fields[name] = getattr(report, ours) if there else None
    for name in _VERSIONS:
        fields[name] = {part: getattr(report, f"{name}_{part}") for part in ("major", "minor", "build")}
    for name in _TCBS:
        tcb = snp.parse_tcb(getattr(report, name), product)
        fields[name] = {part: getattr(tcb, part) for part in ("fmc", *_TCB_PARTS)}
    fields["signature"] = {"r": list(report.signature_r), "s": list(report.signature_s)}
    return {"attestation_report": fields, "cert_chain": chain or None}


def _canonical(value: object, what: str) -> bytes:
    try:
        return rfc8785.dumps(value)  # type: ignore[arg-type]
    except rfc8785.CanonicalizationError as error:
        raise FormatError(f"{what} cannot be brought into canonical form: {error}") from None


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} of the evidence is not a JSON object")
    return value


def _number(members: Mapping[str, object], name: str) -> int:
    value = members.get(name)
    if type(value) is not int or value < 0:
        raise FormatError(f"{name} of the evidence is no number")
    return value


def _bytes(value: object, what: str, size: int | str | None) -> bytes:
    if isinstance(value, list) and (size is None or len(value) == size):
        try:
            return bytes(value)
        except (ValueError, TypeError):
            pass
    raise FormatError(f"{what} of the evidence is not a list of {size or 'its'} bytes")
