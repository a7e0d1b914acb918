"""Evidence of what a machine runs: a TPM's signed statement of its PCRs, in the form of the KBS protocol.

`tpm`: {"ak_public": BASE64 DER SubjectPublicKeyInfo,
        "tpm_quote": {"message": BASE64 TPMS_ATTEST, "signature": BASE64 TPMT_SIGNATURE, "pcrs": [24 values in hex]}}

The attestation key (AK) is trusted because its owner enrolled it: `encfs attest enrol` while the machine is in good
hands, its public half into the verifier's policy. Verifying is `encfs.attestation`'s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tpm2_pytss import ESYS_TR, TPM2B_PUBLIC, TPML_PCR_SELECTION, TPMS_ATTEST

from encfs.encoding import b64_encode
from encfs.errors import KeyFileError, KeyProviderError
from encfs.tpm import structures
from encfs.tpm.connection import HANDLE, NV_UNINITIALIZED, translated
from encfs.tpm.keyfile import TpmObject, load_object
from encfs.tpm.policy import PcrValues
from encfs.tpm.storage import Storage, opened_storage

#: Bytes of `report_data` that a quote carries: its first ones (KBS protocol, attester `tpm`).
QUALIFYING_SIZE = 32
#: How often PCRs are read and quoted anew where they were extended in between.
_ATTEMPTS = 5

#: Where Azure's confidential VMs keep theirs: the report of the paravisor, and the AK that it vouches for.
AZURE_REPORT_INDEX, AZURE_AK_HANDLE = 0x01400001, 0x81000003
# Bounds of what is read from NV: a report is 2600 bytes; a TPM returns at least 512 at once (Part 2, 6.13).
_MAX_NV_SIZE, _NV_CHUNK = 16 << 10, 512
# TPM_ALG_ID (Part 2, 6.3).
_RSASSA, _SHA256 = 0x0014, 0x000B
# TPMA_NV (Part 2, 13.4).
_NV_OWNERREAD = 0x20000


@dataclass(frozen=True, slots=True)
class Quote:
    """A TPM's statement (TPMS_ATTEST), its signature (TPMT_SIGNATURE), and all 24 PCRs of the bank it is about."""

    message: bytes
    signature: bytes
    pcrs: tuple[bytes, ...]
    #: DER SubjectPublicKeyInfo of the key that signed.
    ak_public: bytes

    def evidence(self) -> dict[str, object]:
        """As the KBS protocol has it."""
        return {
            "ak_public": b64_encode(self.ak_public),
            "tpm_quote": {
                "message": b64_encode(self.message),
                "signature": b64_encode(self.signature),
                "pcrs": [value.hex() for value in self.pcrs],
            },
        }

    def raw_signature(self) -> bytes:
        """The RSA signature without what the TPM says of it. Raises: KeyProviderError for other keys."""
        return raw_rsa_signature(self.signature)


def raw_rsa_signature(signature: bytes) -> bytes:
    """Of a TPMT_SIGNATURE. Raises: KeyProviderError where it is none of RSASSA with SHA-256."""
    scheme, digest, size = struct.unpack_from(">HHH", signature)
    if (scheme, digest) != (_RSASSA, _SHA256) or len(signature) != 6 + size:
        raise KeyProviderError("the attestation key does not sign with RSA (RSASSA, SHA-256)")
    return signature[6:]


def create_attestation_key() -> TpmObject:
    """A new AK in the TPM of this machine: RSA-2048, for signing what the TPM itself states. Write it to a file.

    Raises: KeyProviderError where the TPM cannot be used.
    """
    with opened_storage() as storage:
        with translated("make an attestation key"):
            public, private = storage.create(structures.attestation_key())
        return TpmObject("ak", storage.root_name, storage.root_handle, public, private, None)


def attestation_public_key(found: TpmObject) -> bytes:
    """DER SubjectPublicKeyInfo of an AK: what a verifier's policy names. Raises: KeyFileError for other objects."""
    if found.kind != "ak":
        raise KeyFileError("it is not an attestation key", hint="make one with encfs attest enrol")
    return found.key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def collect_tpm_evidence(
    report_data: bytes, ak: str | int, pcrs: Iterable[int] = range(structures.PCR_COUNT), bank: str = "sha256"
) -> dict[str, object]:
    """Evidence of kind `tpm` about these PCRs, with the first 32 bytes of `report_data` (padded) in it.

    `ak` is the path of an AK's file, or the handle of a persistent one (an int, such as 0x81000003).

    Raises: KeyFileError for a malformed file; KeyRefusedError for an AK of another TPM; KeyProviderError where the TPM
    cannot be used.
    """
    selected = sorted(set(pcrs))
    if isinstance(ak, int):
        with opened_storage() as storage:
            return quote_with_handle(storage, ak, _qualifying(report_data), bank, selected).evidence()
    found = load_object(ak)
    public = attestation_public_key(found)
    with opened_storage(found.srk_name, found.srk_handle) as storage, storage.loaded(found) as key:
        return _quote(storage, key, public, _qualifying(report_data), bank, selected).evidence()


def _qualifying(report_data: bytes) -> bytes:
    return report_data[:QUALIFYING_SIZE].ljust(QUALIFYING_SIZE, b"\0")


def collect_azure_evidence(
    report_data: bytes, pcrs: Iterable[int] = range(structures.PCR_COUNT)
) -> tuple[bytes, Quote]:
    """The paravisor's report (HCL) of an Azure confidential VM, and a quote by the AK that it vouches for.

    The quote carries all of `report_data`, at most 64 bytes.

    Raises: KeyProviderError where this is no such machine or the TPM cannot be used.
    """
    with opened_storage() as storage:
        report = azure_report(storage)
        return report, quote_with_handle(storage, AZURE_AK_HANDLE, report_data, "sha256", sorted(set(pcrs)))


def read_azure_report() -> bytes:
    """That report alone. Raises: as `collect_azure_evidence`."""
    with opened_storage() as storage:
        return azure_report(storage)


def azure_report(storage: Storage) -> bytes:
    """The paravisor's report. Raises: KeyProviderError where this is no such machine."""
    return read_nv(storage, AZURE_REPORT_INDEX, "the report of an Azure confidential VM")


def read_nv(storage: Storage, index: int, what: str) -> bytes:
    """All of an NV index. Raises: KeyProviderError where it is not there or larger than 16 KiB."""
    absent = KeyProviderError(f"the TPM does not hold {what} (NV index {index:#010x})")
    with translated(f"read {what}", {HANDLE: absent, NV_UNINITIALIZED: absent}):
        handle = storage.tpm.tr_from_tpmpublic(index)
        public, _ = storage.tpm.nv_read_public(handle)
        size = int(public.nvPublic.dataSize)
        if size > _MAX_NV_SIZE:
            raise KeyProviderError(f"{what} is {size} bytes, more than the {_MAX_NV_SIZE} allowed")
        owner = bool(int(public.nvPublic.attributes) & _NV_OWNERREAD)
        content = b""
        while len(content) < size:
            piece = bytes(
                storage.tpm.nv_read(
                    handle,
                    min(_NV_CHUNK, size - len(content)),
                    len(content),
                    auth_handle=ESYS_TR.OWNER if owner else handle,
                    session1=storage.answers_encrypted(),
                )
            )
            if not piece:
                raise KeyProviderError(f"the TPM gives less of {what} than the {size} bytes that it names")
            content += piece
    return content


def quote_with_handle(storage: Storage, handle: int, qualifying: bytes, bank: str, selected: list[int]) -> Quote:
    """A quote by a persistent key. Raises: KeyProviderError."""
    absent = KeyProviderError(
        f"no attestation key is at {handle:#010x}",
        hint="make one with encfs attest enrol, and name its file",
    )
    with translated("look at the attestation key", {HANDLE: absent}):
        key = storage.tpm.tr_from_tpmpublic(handle)
        public, _, _ = storage.tpm.read_public(key)
    return _quote(storage, key, _spki(public), qualifying, bank, selected)


def _quote(
    storage: Storage, key: ESYS_TR, ak_public: bytes, qualifying: bytes, bank: str, selected: list[int]
) -> Quote:
    selection, _ = TPML_PCR_SELECTION.unmarshal(structures.pcr_selection(bank, selected))
    for _ in range(_ATTEMPTS):
        pcrs = storage.read_pcrs(bank, list(range(structures.PCR_COUNT)))
        with translated("quote its PCRs"):
            attested, signature = storage.tpm.quote(key, selection, qualifying, session1=storage.session())
        message = bytes(attested)
        stated, _ = TPMS_ATTEST.unmarshal(message)
        quoted = PcrValues(bank, {index: pcrs.values[index] for index in selected})
        if bytes(stated.attested.quote.pcrDigest) == quoted.composite():
            return Quote(message, bytes(signature.marshal()), tuple(pcrs.values.values()), ak_public)
    raise KeyProviderError("the PCRs are extended all the time, so no quote fits them", hint="try again")


def _spki(public: TPM2B_PUBLIC) -> bytes:
    return bytes(public.to_der())
