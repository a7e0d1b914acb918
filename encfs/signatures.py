"""Signatures over a content descriptor: DSSE envelopes (secure-systems-lab/dsse 1.0.2) with one fixed payload type.

    {"payload": base64(config blob), "payloadType": "application/vnd.encfs.content.v1+json",
     "signatures": [{"keyid", "sig": base64}]}

What is signed is PAE(payloadType, payload). The verifier computes it from the config blob's own bytes and never from
the envelope, whose payload must equal them. The algorithm is the trusted key's: Ed25519, ECDSA P-256 (DER, SHA-256), or
pure ML-DSA-65 with an empty context. `keyid` is written for people to read, and ignored.

Which keys are trusted, and for what, is `encfs.trust`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rfc8785

from encfs.encoding import b64_decode, b64_encode
from encfs.errors import FormatError, MissingKeyError, UnsignedError, WrongSignerError
from encfs.format.descriptor import CONTENT_TYPE
from encfs.keys.jwk import PrivateKey, PublicKey, Use
from encfs.strictjson import loads_object, show_name

#: What is signed is the config blob, under its own media type.
PAYLOAD_TYPE = CONTENT_TYPE

#: Most envelopes of an artifact, and most signatures in one envelope.
MAX_ENVELOPES = 16
MAX_SIGNATURES = 8
# Room in an envelope for everything but the payload: eight ML-DSA signatures are 36 KiB.
_ROOM = 64 << 10
_MAX_SIGNATURE_SIZE = 4 << 10

_BASE64URL_TO_BASE64 = str.maketrans("-_", "+/")


@dataclass(frozen=True, slots=True)
class Verified:
    """The trusted key that signed, and what else was found: one line per envelope that could not be read."""

    signer: PublicKey
    malformed: tuple[str, ...]


def max_envelope_size(content_size: int) -> int:
    """The largest envelope (bytes) that is looked at for a config blob of `content_size` bytes."""
    return 4 * ((content_size + 2) // 3) + _ROOM


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding (protocol.md, "Signature Definition")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(content: bytes, key: PrivateKey) -> bytes:
    """An envelope with `key`'s signature over the config blob `content`.

    Raises: KeyFileError where the key cannot sign.
    """
    key.require(Use.SIGN, f"the signing key {key.kid}")
    signature = key.sign(pae(PAYLOAD_TYPE, content))
    return rfc8785.dumps(
        {
            "payload": b64_encode(content),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": key.kid, "sig": b64_encode(signature)}],
        }
    )


def verify(envelopes: Sequence[bytes], content: bytes, keys: Sequence[PublicKey]) -> Verified:
    """The first of the trusted `keys` with a valid signature over the config blob `content` in any of the envelopes.

    An envelope that is malformed, or is about another content, is passed over and reported: envelopes are added by
    anyone who can write to the registry, and one must not hide another's signature. That is safe, since an envelope
    counts for nothing but a signature that a trusted key made over `content` itself.

    Raises: MissingKeyError without keys; KeyFileError for a key that does not sign; FormatError for more than 16
    envelopes; UnsignedError without any; WrongSignerError where none is by a trusted key.
    """
    if not keys:
        raise MissingKeyError("no trusted key was given", hint="pass --trust KEY")
    for key in keys:
        key.require(Use.SIGN, f"the trusted key {key.kid}")
    if len(envelopes) > MAX_ENVELOPES:
        raise FormatError(f"the artifact has {len(envelopes)} signatures; {MAX_ENVELOPES} are allowed")
    if not envelopes:
        raise UnsignedError("the artifact is not signed", hint="ask its owner to sign it: imagetool sign REF --key KEY")
    message = pae(PAYLOAD_TYPE, content)
    signer: PublicKey | None = None
    malformed: list[str] = []
    for index, envelope in enumerate(envelopes):
        try:
            signatures = _parse(envelope, content)
        except FormatError as error:
            malformed.append(f"signature {index} is ignored: {error.message}")
            continue
        if signer is None:
            signer = next((key for key in keys for signature in signatures if key.verify(signature, message)), None)
    if signer is not None:
        return Verified(signer, tuple(malformed))
    trusted = ", ".join(key.kid for key in keys)
    reasons = "".join(f"; {reason}" for reason in malformed)
    raise WrongSignerError(
        f"none of the artifact's {len(envelopes)} signatures is by a trusted key ({trusted}){reasons}",
        hint="pass the signer's public key with --trust, or have the artifact signed by a trusted key",
    )


def _parse(envelope: bytes, content: bytes) -> list[bytes]:
    """The signatures of one untrusted envelope that is about `content`. Raises: FormatError."""
    members = loads_object(envelope, limit=max_envelope_size(len(content)), what="the envelope")
    # Members we do not know are ignored, as DSSE demands.
    if members.get("payloadType") != PAYLOAD_TYPE:
        raise FormatError(f"the envelope's payloadType is {show_name(members.get('payloadType'))}, not {PAYLOAD_TYPE}")
    if _base64(members.get("payload"), "the envelope's payload") != content:
        raise FormatError("the envelope's payload is not this artifact's content descriptor")
    signatures = members.get("signatures")
    if not isinstance(signatures, list) or not 0 < len(signatures) <= MAX_SIGNATURES:
        raise FormatError(f"the envelope's signatures are not a list of 1 to {MAX_SIGNATURES}")
    return [_signature(entry) for entry in signatures]


def _signature(entry: object) -> bytes:
    if not isinstance(entry, dict):
        raise FormatError("the envelope's signatures are not all JSON objects")
    if not isinstance(entry.get("keyid", ""), str):
        raise FormatError("the envelope has a keyid that is no string")
    signature = _base64(entry.get("sig"), "the envelope's sig")
    if len(signature) > _MAX_SIGNATURE_SIZE:
        raise FormatError(f"the envelope has a signature of more than {_MAX_SIGNATURE_SIZE} bytes")
    return signature


def _base64(text: object, what: str) -> bytes:
    """Padded base64 in either alphabet, which DSSE obliges verifiers to take; otherwise strict."""
    if isinstance(text, str) and ("-" in text or "_" in text) and "+" not in text and "/" not in text:
        text = text.translate(_BASE64URL_TO_BASE64)
    return b64_decode(text, what)
