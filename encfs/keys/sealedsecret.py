"""Sealed secrets of Confidential Containers: a signed reference to a secret, which a guest's key broker resolves.

    sealed.BASE64URL({"alg": "ES256", "kid"}).BASE64URL({"version", "type", "provider", …}).BASE64URL(SIGNATURE)

Type `vault` names a secret of a provider: of `kbs` it is a resource of the key broker. `envelope` carries the secret
itself, encrypted under a key that is encrypted by a provider's key: how, each provider knows, so that the Confidential
Data Hub, which has their clients and credentials, is what opens it. Source: guest-components,
confidential-data-hub/docs/SEALED_SECRET.md and hub/src/secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from encfs.encoding import b64url_decode
from encfs.errors import FormatError, KeyFileError
from encfs.kbs.protocol import ResourcePath, parse_path
from encfs.keys.jwk import PublicKey
from encfs.strictjson import loads_object

PREFIX = "sealed."
#: Where a guest has the public keys that are no resources, by name.
CREDENTIALS = Path("/run/confidential-containers/cdh/sealed-secret")
MAX_SIZE = 64 << 10
_VERSION = "0.1.0"
_COORDINATE_SIZE = 32
# Texts that each type has, beside the provider.
_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "vault": ("name",),
    "envelope": ("key_id", "encrypted_key", "encrypted_data", "wrap_type", "iv"),
}


@dataclass(frozen=True, slots=True)
class SealedSecret:
    """One that was parsed; nothing of it is to be believed before `verify`. `kid` names the key that signed it."""

    kid: str
    text: bytes
    signed: bytes
    signature: bytes
    payload: bytes

    @property
    def key_resource(self) -> ResourcePath | None:
        """The resource that holds its key; None for a file of the guest's. Raises: FormatError."""
        return parse_resource_uri(self.kid) if self.kid.startswith("kbs:") else None

    @property
    def key_file(self) -> str:
        """The name of that file. Raises: FormatError where it is no plain name."""
        if not self.kid or self.kid != Path(self.kid).name or not self.kid.isprintable():
            raise FormatError("kid of the sealed secret is neither a resource nor the name of a key")
        return self.kid

    def verify(self, key: PublicKey) -> None:
        """Raises: FormatError for a signature that is not the key's, and for keys on another curve than P-256."""
        if not isinstance(key.handle, ec.EllipticCurvePublicKey) or not isinstance(key.handle.curve, ec.SECP256R1):
            raise FormatError("the key of the sealed secret is not on P-256")
        if len(self.signature) != 2 * _COORDINATE_SIZE:
            raise FormatError("the signature of the sealed secret has a wrong length")
        r, s = self.signature[:_COORDINATE_SIZE], self.signature[_COORDINATE_SIZE:]
        try:
            der = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
            key.handle.verify(der, self.signed, ec.ECDSA(SHA256()))
        except InvalidSignature:
            raise FormatError("the sealed secret is not signed by its key") from None

    def resource(self) -> ResourcePath | None:
        """The resource that it stands for; None where the hub has to unseal it. Call `verify` first.

        Raises: FormatError.
        """
        document = loads_object(self.payload, limit=MAX_SIZE, what="the sealed secret")
        if document.get("version") != _VERSION:
            raise FormatError(f"the sealed secret has a version other than {_VERSION}")
        kind, provider = document.get("type"), document.get("provider")
        if not isinstance(kind, str) or kind not in _MEMBERS:
            raise FormatError("the sealed secret has a type that is not known")
        for member in ("provider", *_MEMBERS[kind]):
            if not isinstance(document.get(member), str):
                raise FormatError(f"the sealed secret of type {kind} has no text {member}")
        if kind == "vault" and provider == "kbs":
            return parse_resource_uri(document["name"])
        return None


def parse_sealed_secret(content: bytes, what: str) -> SealedSecret:
    """Raises: KeyFileError; `what` names it in messages."""
    text = content.strip().decode("ascii", "replace")
    parts = text.removeprefix(PREFIX).split(".")
    if not text.startswith(PREFIX) or len(parts) != 3 or len(content) > MAX_SIZE:
        raise KeyFileError(f"{what} is no sealed secret: it is not sealed.HEADER.PAYLOAD.SIGNATURE")
    try:
        header_bytes, payload, signature = (b64url_decode(part, "a part of it") for part in parts)
        header = loads_object(header_bytes, limit=MAX_SIZE, what="its header")
    except FormatError as error:
        raise KeyFileError(f"{what} is no sealed secret: {error.message}") from None
    kid = header.get("kid")
    if header.get("alg") != "ES256" or not isinstance(kid, str) or "crit" in header:
        raise KeyFileError(f"{what} is no sealed secret: its header is not one of ES256 with a kid")
    return SealedSecret(kid, text.encode("ascii"), f"{parts[0]}.{parts[1]}".encode("ascii"), signature, payload)


def parse_resource_uri(uri: object) -> ResourcePath:
    """`kbs://[HOST]/REPOSITORY/TYPE/TAG`; the host is the guest's to know. Raises: FormatError."""
    if not isinstance(uri, str) or not uri.startswith("kbs://"):
        raise FormatError("the sealed secret names something that is no resource, kbs:///REPOSITORY/TYPE/TAG")
    return parse_path(uri.removeprefix("kbs://").partition("/")[2])
