"""Secure key release without a sidecar: an SNP report to MAA, its token to the vault, the key unwrapped here.

1. An RSA key pair is made in memory; its public half is the runtime data, whose SHA-256 is the report data.
2. MAA (`/attest/SevSnpVM`) verifies the report and puts the public key into its token.
3. The vault (`/keys/NAME/release`) checks the token against the key's release policy, and wraps the key: an AES key
   under RSA-OAEP, the key itself under that AES key (RFC 5649, CKM_RSA_AES_KEY_WRAP).

For container groups on Azure (ACI and AKS), which have an SNP device; virtual machines attest through their vTPM
(`guest.py`). Sources: Microsoft's REST references of both
services; microsoft/confidential-sidecar-containers, pkg/attest and pkg/skr.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256, SHA384, HashAlgorithm

from encfs.attestation.collect.sources import Source
from encfs.encoding import b64url_encode
from encfs.errors import FormatError, KeyProviderError
from encfs.skr import CONTEXT_VARIABLE
from encfs.skr.release import MAA, Release, ask_maa, ask_vault
from encfs.skr.service import ask, text_member
from encfs.strictjson import loads_object
from encfs.webclient import Address, Deadline

# The host's certificates, the utility VM's endorsement and the policy.
_CERTIFICATES, _ENDORSEMENT, _POLICY = "host-amd-cert-base64", "reference-info-base64", "security-policy-base64"
_MAX_CONTEXT_FILE = 1 << 20

_RSA_BITS = 2048
_HASHES: Mapping[str, type[HashAlgorithm]] = {"sha1": SHA1, "sha256": SHA256, "sha384": SHA384}
_IDENTITY_PATH = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fvault.azure.net"


@dataclass(frozen=True, slots=True)
class Context:
    """What the host hands to a container group for its report."""

    certificates: str
    endorsement: str
    policy: bytes


def load_context(directory: Path | None = None) -> Context:
    """Raises: KeyProviderError where this is no confidential container group."""
    place = directory or Path(os.environ.get(CONTEXT_VARIABLE, ""))
    if place == Path():
        raise KeyProviderError(
            f"{CONTEXT_VARIABLE} is not set: this is no confidential container of Azure's",
            hint="without direct=yes the sidecar is asked",
        )
    try:
        certificates = loads_object(_decoded(place / _CERTIFICATES), limit=_MAX_CONTEXT_FILE, what=_CERTIFICATES)
    except FormatError as error:
        raise KeyProviderError(f"the security context is malformed: {error.message}") from None
    chain = "".join(str(certificates.get(name, "")) for name in ("vcekCert", "certificateChain"))
    return Context(chain, b64url_encode(_decoded(place / _ENDORSEMENT)), _decoded(place / _POLICY))


def _decoded(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_CONTEXT_FILE)
        return base64.b64decode(content.strip(), validate=True)
    except OSError as error:
        raise KeyProviderError(f"{path} cannot be read: {error.strerror}") from None
    except (binascii.Error, ValueError):
        raise KeyProviderError(f"{path} is not base64") from None


def access_token(metadata_service: Address, *, deadline: Deadline) -> str:
    """A token of the machine's managed identity for the vault. Raises: KeyProviderError."""
    service = "the managed identity of this machine"
    answer = ask(
        metadata_service, "GET", _IDENTITY_PATH, None, deadline=deadline, service=service, headers={"Metadata": "true"}
    )
    return text_member(answer, "access_token", service)


def release(wanted: Release, *, source: Source, context: Context) -> tuple[str, bytearray]:
    """The released key: its type (`oct`, `RSA`, `EC`) and its bytes (raw, or PKCS#8 in DER), which the caller wipes.

    Raises: KeyRefusedError where MAA or the release policy refuses; KeyProviderError, AttestationError.
    """
    private = rsa.generate_private_key(65537, _RSA_BITS)
    runtime = _runtime_data(private.public_key())
    report = source.collect(hashlib.sha256(runtime).digest())
    evidence = {
        "SnpReport": b64url_encode(report.content),
        "VcekCertChain": b64url_encode(context.certificates.encode()),
        "Endorsements": b64url_encode(json.dumps({"Uvm": [context.endorsement]}).encode()),
    }
    request = {
        "report": b64url_encode(json.dumps(evidence).encode()),
        "runtimeData": {"data": b64url_encode(runtime), "dataType": "JSON"},
        "initTimeData": {"data": b64url_encode(context.policy), "dataType": "JSON"},
        "nonce": int.from_bytes(os.urandom(7)),
    }
    attested = ask_maa(wanted, "SevSnpVM", request)

    def decrypt(data: bytes, digest: str) -> bytes:
        algorithm = _HASHES[digest]
        return private.decrypt(data, padding.OAEP(padding.MGF1(algorithm()), algorithm(), label=None))

    return ask_vault(wanted, text_member(attested, "token", MAA), decrypt, key_size=_RSA_BITS)


def _runtime_data(key: rsa.RSAPublicKey) -> bytes:
    numbers = key.public_numbers()
    size = (key.key_size + 7) // 8
    n = b64url_encode(numbers.n.to_bytes(size))
    # The key's own thumbprint (RFC 7638) names it.
    thumbprint = hashlib.sha256(f'{{"e":"AQAB","kty":"RSA","n":"{n}"}}'.encode()).digest()
    jwk = {"kty": "RSA", "key_ops": ["encrypt"], "kid": b64url_encode(thumbprint), "n": n, "e": "AQAB"}
    return json.dumps({"keys": [jwk]}, separators=(",", ":")).encode()
