"""Signed tokens (JWS, compact form) of other verifiers: the signature, by a key that the policy trusts, and the dates.

A token says itself where its keys are to be found (`jku`) and which it is signed by (`jwk`, `x5c`): nothing of that is
followed or believed. Trusted are keys that the policy names, and certificates in `x5c` that lead to an authority that
it names. Sources: RFC 7515, RFC 7519. What the claims mean is `maa.py`'s and `ear.py`'s.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from encfs.attestation.certificates import MAX_CERTIFICATES, der_certificates, reading_certificates
from encfs.attestation.evidence import MAX_EVIDENCE_SIZE
from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Code
from encfs.encoding import b64url_decode
from encfs.errors import FormatError
from encfs.strictjson import loads_object

#: How far clocks may be apart.
LEEWAY = timedelta(seconds=60)
_MAX_KEYS = 32
_MAX_CHAIN = 4
_MIN_RSA_BITS = 2048
# Whatever is not here is refused: `none`, and HMAC with a public key as its secret, first of all.
_RSA: Mapping[str, tuple[type[HashAlgorithm], bool]] = {
    "RS256": (SHA256, False),
    "RS384": (SHA384, False),
    "RS512": (SHA512, False),
    "PS256": (SHA256, True),
    "PS384": (SHA384, True),
    "PS512": (SHA512, True),
}
_EC: Mapping[str, tuple[type[HashAlgorithm], type[ec.EllipticCurve], int]] = {
    "ES256": (SHA256, ec.SECP256R1, 32),
    "ES384": (SHA384, ec.SECP384R1, 48),
    "ES512": (SHA512, ec.SECP521R1, 66),
}
_CURVES: Mapping[str, type[ec.EllipticCurve]] = {
    "P-256": ec.SECP256R1,
    "P-384": ec.SECP384R1,
    "P-521": ec.SECP521R1,
}
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Token:
    """A token cut into its parts."""

    header: Mapping[str, object]
    claims: Mapping[str, object] = field(repr=False)
    signed: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def parse_token(content: bytes) -> Token:
    """Raises: FormatError."""
    parts = content.decode("ascii", "replace").split(".")
    if len(parts) != 3:
        raise FormatError("the token is not of the compact form")
    header, claims, signature = (
        b64url_decode(part, f"the {what} of the token")
        for part, what in zip(parts, ("header", "payload", "signature"), strict=True)
    )
    return Token(
        loads_object(header, limit=MAX_EVIDENCE_SIZE, what="the header of the token"),
        loads_object(claims, limit=MAX_EVIDENCE_SIZE, what="the payload of the token"),
        f"{parts[0]}.{parts[1]}".encode("ascii"),
        signature,
    )


def trusted_keys(content: bytes, what: str) -> tuple[bytes, ...]:
    """Keys to trust, as SubjectPublicKeyInfo in DER, out of a file that the user vouches for.

    Taken are a JWK set (with `x5c`, as Microsoft's, or numbers), public keys in PEM, and certificates, whose key counts
    without a look at who issued them. Raises: FormatError.
    """
    text = content.strip()
    if text.startswith(b"{"):
        return _jwk_set(loads_object(text, limit=MAX_EVIDENCE_SIZE, what=what), what)
    if not (blocks := _PUBLIC_PEM.findall(text)):
        return tuple(_certificate_key(der, what) for der in der_certificates(content, what))
    try:
        return tuple(_der(load_pem_public_key(block)) for block in blocks[:_MAX_KEYS])
    except (ValueError, UnsupportedAlgorithm):
        raise FormatError(f"{what} holds a malformed key") from None


def check_signature(findings: Findings, token: Token, policy: EvidencePolicy, now: datetime) -> bool:
    """Signature, dates and issuer; whether the claims are those of a trusted issuer."""
    algorithm = token.header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in {*_RSA, *_EC}:
        findings.refuse(Code.ALGORITHM, f"the token's signature algorithm {ascii(algorithm)[:24]} is not allowed")
        return False
    if "crit" in token.header:
        findings.refuse(Code.UNSUPPORTED, "the token has a critical header, and none is known")
        return False
    keys = [_load(der) for der in policy.token_keys]
    if (leaf := _leaf(findings, token.header.get("x5c"), policy.token_authorities, now)) is not None:
        keys.append(leaf)
    if not policy.token_keys and not policy.token_authorities:
        findings.refuse(Code.MISSING, "the policy names no key and no authority for tokens: anyone can make one")
        return False
    if not any(_verifies(algorithm, key, token) for key in keys):
        findings.refuse(Code.SIGNATURE, "the token is not signed by a key that the policy trusts")
        return False
    _check_dates(findings, token.claims, now)
    _check_issuer(findings, token.claims, policy)
    return True


def check_nonce(findings: Findings, values: Sequence[object], policy: EvidencePolicy) -> None:
    """`values` are those that the token carries."""
    if policy.nonce is None:
        if policy.report_data is None:
            findings.leave_unchecked(Code.NONCE, "the policy gives no nonce: the token may be an old one")
    elif policy.nonce not in values:
        findings.refuse(Code.NONCE, "the token does not carry the expected nonce")


def _check_dates(findings: Findings, claims: Mapping[str, object], now: datetime) -> None:
    for name, required in (("exp", True), ("nbf", False), ("iat", False)):
        value = claims.get(name)
        if value is None and not required:
            continue
        if type(value) is not int or not 0 < value < 1 << 40:
            findings.refuse(Code.EXPIRED, f"the token has no usable {name}")
            continue
        at = datetime.fromtimestamp(value, UTC) if value < 1 << 36 else datetime.max.replace(tzinfo=UTC)
        findings.claims[name] = value
        if name == "exp" and now - LEEWAY > at:
            findings.refuse(Code.EXPIRED, f"the token expired at {at:%Y-%m-%d %H:%M:%S} UTC")
        elif name != "exp" and now + LEEWAY < at:
            findings.refuse(Code.EXPIRED, f"the token is not valid before {at:%Y-%m-%d %H:%M:%S} UTC ({name})")


def _check_issuer(findings: Findings, claims: Mapping[str, object], policy: EvidencePolicy) -> None:
    issuer = claims.get("iss")
    if isinstance(issuer, str):
        findings.claims["issuer"] = issuer
    if not policy.issuers:
        findings.leave_unchecked(Code.ISSUER, "the policy does not say who may have issued the token")
    elif issuer not in policy.issuers:
        findings.refuse(Code.ISSUER, f"the token's issuer {ascii(issuer)[:80]} is not one that the policy allows")


def _leaf(findings: Findings, chain: object, authorities: Sequence[bytes], now: datetime) -> Key | None:
    """The key of a header's `x5c` where it leads to an authority."""
    if chain is None or not authorities:
        return None
    if not isinstance(chain, list) or not 0 < len(chain) <= _MAX_CHAIN:
        findings.refuse(Code.CHAIN, f"x5c of the token is not a list of 1 to {_MAX_CHAIN} certificates")
        return None
    try:
        with reading_certificates("a certificate of the token"):
            certificates = [x509.load_der_x509_certificate(_base64(one)) for one in chain]
            roots = [x509.load_der_x509_certificate(der) for der in authorities]
            issued = _is_issued(certificates, roots, now)
            key = _fit(certificates[0].public_key())
    except FormatError:
        findings.refuse(Code.CHAIN, "x5c of the token has a malformed certificate")
        return None
    if not issued:
        findings.refuse(Code.CHAIN, "the certificates of the token do not lead to an authority that the policy names")
        return None
    return key


def _is_issued(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: datetime) -> bool:
    for at, certificate in enumerate(chain):
        if not certificate.not_valid_before_utc - LEEWAY <= now <= certificate.not_valid_after_utc + LEEWAY:
            return False
        if at and not _is_authority(certificate, at - 1):
            return False
        if any(certificate == root for root in roots) or any(_issued_by(certificate, root, at) for root in roots):
            return True
        if at + 1 == len(chain) or not _issued_by(certificate, chain[at + 1], at):
            return False
    return False


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate, below: int) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return _is_authority(issuer, below)


def _is_authority(certificate: x509.Certificate, below: int) -> bool:
    """Whether it may issue certificates, with so many other authorities below it (RFC 5280, 4.2.1.9 and 4.2.1.3)."""
    extensions = certificate.extensions
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    if not constraints.ca or (constraints.path_length is not None and constraints.path_length < below):
        return False
    try:
        return extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def _verifies(algorithm: str, key: Key, token: Token) -> bool:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            digest, pss = _RSA[algorithm]
            scheme = padding.PSS(padding.MGF1(digest()), padding.PSS.DIGEST_LENGTH) if pss else padding.PKCS1v15()
            key.verify(token.signature, token.signed, scheme, digest())
            return True
        digest, curve, size = _EC[algorithm]
        if not isinstance(key.curve, curve) or len(token.signature) != 2 * size:
            return False
        r, s = token.signature[:size], token.signature[size:]
        key.verify(encode_dss_signature(int.from_bytes(r), int.from_bytes(s)), token.signed, ec.ECDSA(digest()))
    except (KeyError, InvalidSignature):
        # KeyError: the algorithm is one of the other kind of key.
        return False
    return True


def _jwk_set(document: Mapping[str, object], what: str) -> tuple[bytes, ...]:
    keys = document.get("keys", [document])
    if not isinstance(keys, list) or not 0 < len(keys) <= _MAX_KEYS:
        raise FormatError(f"{what} is no set of 1 to {_MAX_KEYS} JWKs")
    return tuple(_jwk(one, what) for one in keys)


def _jwk(members: object, what: str) -> bytes:
    if not isinstance(members, dict):
        raise FormatError(f"{what} holds something that is no JWK")
    try:
        if (chain := members.get("x5c")) is not None:
            if not isinstance(chain, list) or not 0 < len(chain) <= MAX_CERTIFICATES:
                raise FormatError(f"x5c in {what} is no list of certificates")
            return _certificate_key(_base64(chain[0]), what)
        numbers = {
            name: int.from_bytes(b64url_decode(members[name], f"{name} in {what}"))
            for name in ("n", "e", "x", "y")
            if name in members
        }
        if members.get("kty") == "RSA":
            return _der(rsa.RSAPublicNumbers(numbers["e"], numbers["n"]).public_key())
        curve = _CURVES[members["crv"]]()
        return _der(ec.EllipticCurvePublicNumbers(numbers["x"], numbers["y"], curve).public_key())
    except (KeyError, TypeError, ValueError, UnsupportedAlgorithm):
        raise FormatError(f"{what} holds a JWK that is no RSA key and none on a NIST curve") from None


def _certificate_key(der: bytes, what: str) -> bytes:
    with reading_certificates(f"a certificate in {what}"):
        return _der(x509.load_der_x509_certificate(der).public_key())


def _der(key: object) -> bytes:
    return _fit(key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _load(der: bytes) -> Key:
    return _fit(load_der_public_key(der))


def _fit(key: object) -> Key:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, tuple(_CURVES.values())):
        return key
    raise ValueError("neither RSA of 2048 bits nor on a NIST curve")


def _base64(text: object) -> bytes:
    # x5c is base64 with padding, not base64url (RFC 7517, 4.7).
    if not isinstance(text, str):
        raise FormatError("a certificate is no text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("a certificate is not base64") from None
