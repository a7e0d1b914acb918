"""Secure key release to an Azure confidential VM, which attests through its vTPM.

1. A key is made in the vTPM, bound to its PCRs and certified by its attestation key (`encfs.tpm.guest`).
2. MAA (`/attest/AzureGuest`) verifies the paravisor's hardware report, the quote, the event log and the certification.
   Its token names the key (`TpmEphemeralEncryptionKey`), and is itself encrypted to it: RSAES-PKCS1-v1_5, AES-GCM.
3. The vault wraps what it releases to that key, and it is unwrapped in the vTPM, while the PCRs are what they were.

Nothing here judges anything: MAA and the key's release policy do. Sources: Azure/cvm-attestation-tools;
Azure/confidential-computing-cvm-guest-attestation; Edgeless Systems' go-azguestattestation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encfs.attestation.azure import HclReport, parse_hcl_report
from encfs.attestation.collect.azure import certificate_chain, td_quote
from encfs.attestation.evidence import EvidenceKind
from encfs.encoding import b64_decode, b64_encode, b64url_decode, b64url_encode
from encfs.errors import FormatError, KeyProviderError
from encfs.skr.release import MAA, Release, ask_maa, ask_vault
from encfs.skr.service import text_member
from encfs.strictjson import loads_object
from encfs.webclient import Address

if TYPE_CHECKING:
    from encfs.tpm.guest import GuestKey, GuestStatement

_PROTOCOL = "2.0"
_SYSTEM = b"Linux"
_MAX_TOKEN = 1 << 20
_NONCE_SIZE = 32
#: Associated data of the encrypted token.
_ASSOCIATED = b"Transport Key"
_KEY_SIZES = (16, 24, 32)


def release(wanted: Release, *, event_log: bytes, metadata_service: Address) -> tuple[str, bytearray]:
    """The released key: its type (`oct`, `RSA`, `EC`) and its bytes (raw, or PKCS#8 in DER), which the caller wipes.

    `event_log` is the firmware's. Raises: KeyRefusedError where MAA or the release policy refuses; KeyProviderError,
    AttestationError.
    """
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.guest import KEY_BITS, opened_guest

    with opened_guest() as guest:
        info = _attestation_info(guest.statement, event_log, metadata_service)
        answer = ask_maa(wanted, "AzureGuest", {"AttestationInfo": b64url_encode(json.dumps(info).encode())})
        try:
            attested = _opened_token(text_member(answer, "token", MAA), guest)
        except FormatError as error:
            raise KeyProviderError(f"{MAA} answers with something that is no token: {error.message}") from None
        return ask_vault(wanted, attested, guest.decrypt_oaep, key_size=KEY_BITS)


def _attestation_info(statement: GuestStatement, event_log: bytes, service: Address) -> dict[str, object]:
    try:
        hcl = parse_hcl_report(statement.report)
    except FormatError as error:
        raise KeyProviderError(f"the report in the vTPM is malformed: {error.message}") from None
    system = b64_encode(_SYSTEM)
    return {
        "AttestationProtocolVersion": _PROTOCOL,
        "OSType": system,
        "OSDistro": system,
        "OSVersionMajor": 0,
        "OSVersionMinor": 0,
        "OSBuild": system,
        "TcgLogs": b64_encode(event_log),
        "ClientPayload": {"nonce": b64_encode(os.urandom(_NONCE_SIZE))},
        "TpmInfo": _tpm_info(statement),
        "IsolationInfo": _isolation_info(hcl, service),
    }


def _tpm_info(statement: GuestStatement) -> dict[str, object]:
    from encfs.tpm.guest import PCRS

    quote = statement.quote
    return {
        "AikCert": b64_encode(statement.ak_certificate),
        "AikPub": b64_encode(statement.ak_public),
        "PcrQuote": b64_encode(quote.message),
        "PcrSignature": b64_encode(quote.raw_signature()),
        "EncKeyPub": b64_encode(statement.key_public),
        "EncKeyCertifyInfo": b64_encode(statement.certification),
        "EncKeyCertifyInfoSignature": b64_encode(statement.certification_signature),
        "PcrSet": list(PCRS),
        "PCRs": [{"Index": index, "Digest": b64_encode(quote.pcrs[index])} for index in PCRS],
    }


def _isolation_info(hcl: HclReport, service: Address) -> dict[str, object]:
    if hcl.kind is EvidenceKind.AZURE_TDX_VTPM:
        quote = td_quote(service, hcl)
        return {
            "Type": "Tdx",
            "Evidence": {"Proof": b64_encode(quote), "RunTimeData": b64_encode(hcl.runtime_data)},
        }
    proof = {
        "SnpReport": b64url_encode(hcl.hardware_report),
        "VcekCertChain": b64url_encode(certificate_chain(service).encode()),
    }
    return {
        "Type": "SevSnp",
        "Evidence": {
            "Proof": b64url_encode(json.dumps(proof).encode()),
            "RunTimeData": b64url_encode(hcl.runtime_data),
        },
    }


def _opened_token(text: str, guest: GuestKey) -> str:
    """The token that MAA encrypted to the key. Raises: FormatError."""
    envelope = loads_object(b64url_decode(text.rstrip("="), "it"), limit=_MAX_TOKEN, what="it")
    parameters = envelope.get("EncryptionParams")
    if not isinstance(parameters, Mapping):
        raise FormatError("it has no EncryptionParams")
    wrapped = b64_decode(envelope.get("EncryptedInnerKey"), "EncryptedInnerKey")
    iv, tag = b64_decode(parameters.get("Iv"), "Iv"), b64_decode(envelope.get("AuthenticationData"), "its tag")
    ciphertext = b64_decode(envelope.get("Jwt"), "Jwt")
    try:
        key = guest.decrypt_pkcs1(wrapped)
        if len(key) in _KEY_SIZES:
            return AESGCM(key).decrypt(iv, ciphertext + tag, _ASSOCIATED).decode("ascii")
    except (InvalidTag, ValueError):
        pass
    raise FormatError("it does not open with the key that was attested")
