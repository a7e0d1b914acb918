"""JWE (RFC 7516, JSON serialisation) as ocicrypt wraps private options with it.

| `alg` | key | written | read |
|---|---|---|---|
| `RSA-OAEP` (RFC 7518, 4.3: SHA-1) | RSA | for RSA keys, since ocicrypt-rs knows no other | yes |
| `RSA-OAEP-256` | RSA | where a JWK asks for it | yes |
| `ECDH-ES+A256KW` (4.6) | P-256, P-384, P-521 | for EC keys | yes |
| `ECDH-ES+A128KW`, `ECDH-ES+A192KW` | the same | where a JWK asks for it | yes |

`enc` is A256GCM when written; A128GCM, A192GCM and the three of AES-CBC with HMAC are read too. One recipient is
written, flattened, as go-jose does it. Read are both serialisations. Refused are `crit`, `zip`, `b64` and an
`unprotected` header; recipients of unknown algorithms are passed over. The algorithms are put together from
`cryptography`'s primitives, as for keyrings (docs/decisions/0003-jwe-without-jwcrypto.md); jwcrypto judges them in the
tests.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import FormatError, IntegrityError, UsageError, WrongKeyError
from encfs.keys.recipients import agreed_kek
from encfs.keys.secrets import wipe
from encfs.strictjson import loads_object, show_name
from imagetool.ocicrypt.options import MAX_ELEMENT_SIZE

JwePublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
JwePrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_OAEP: Mapping[str, padding.OAEP] = {
    "RSA-OAEP": padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None),  # noqa: S303 -- what the name means
    "RSA-OAEP-256": padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None),
}
#: Bytes of the key-encryption key.
_ECDH: Mapping[str, int] = {"ECDH-ES+A256KW": 32, "ECDH-ES+A192KW": 24, "ECDH-ES+A128KW": 16}
#: By `enc`: bytes of the content-encryption key, and the hash of the MAC where it is not GCM.
_ENC: Mapping[str, tuple[int, str]] = {
    "A256GCM": (32, ""),
    "A192GCM": (24, ""),
    "A128GCM": (16, ""),
    "A128CBC-HS256": (32, "sha256"),
    "A192CBC-HS384": (48, "sha384"),
    "A256CBC-HS512": (64, "sha512"),
}
_CURVES: Mapping[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}

#: Algorithms of either kind of key, the one that is written by default first.
ALGORITHMS: Mapping[str, tuple[str, ...]] = {"rsa": tuple(_OAEP), "ec": tuple(_ECDH)}

MAX_RECIPIENTS = 64
_FORBIDDEN = ("crit", "zip", "b64")
_MEMBERS = frozenset({"protected", "unprotected", "header", "encrypted_key", "recipients", "iv", "ciphertext", "tag"})


@dataclass(frozen=True, slots=True)
class JweRecipient:
    """One recipient: its header with the protected one merged in, untrusted."""

    header: Mapping[str, object]
    encrypted_key: bytes = field(repr=False)

    @property
    def alg(self) -> str:
        return str(self.header.get("alg"))


@dataclass(frozen=True, slots=True)
class Jwe:
    """A parsed JWE."""

    enc: str
    recipients: tuple[JweRecipient, ...]
    protected: str = field(repr=False)
    iv: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)
    tag: bytes = field(repr=False)
    document: Mapping[str, object] = field(repr=False)

    def without(self, dropped: Collection[int]) -> bytes:
        """The same of the general serialisation without some of its recipients. Raises: ValueError for all of them."""
        entries = self.document.get("recipients")
        rest = [entry for at, entry in enumerate(entries) if at not in dropped] if isinstance(entries, list) else []
        if not rest:
            raise ValueError("no recipient would be left")
        document = {name: value for name, value in self.document.items() if name != "encrypted_key"}
        return json.dumps(document | {"recipients": rest}, separators=(",", ":")).encode()


def encrypt(content: bytes | bytearray, key: JwePublicKey, algorithm: str | None = None) -> bytes:
    """A flattened JWE that the private half of `key` opens. Raises: UsageError where the algorithm does not fit."""
    cek = bytearray(secrets.token_bytes(32))
    header: dict[str, object] = {"alg": _algorithm(key, algorithm), "enc": "A256GCM"}
    try:
        if isinstance(key, rsa.RSAPublicKey):
            wrapped = key.encrypt(bytes(cek), _OAEP[str(header["alg"])])
        else:
            ephemeral = ec.generate_private_key(key.curve)
            header["epk"] = _epk(ephemeral.public_key())
            wrapped = _wrap(ephemeral.exchange(ec.ECDH(), key), str(header["alg"]), cek)
        protected = b64url_encode(json.dumps(header, separators=(",", ":")).encode())
        iv = secrets.token_bytes(12)
        sealed = AESGCM(cek).encrypt(iv, content, protected.encode("ascii"))
    finally:
        wipe(cek)
    members = {
        "protected": protected,
        "encrypted_key": b64url_encode(wrapped),
        "iv": b64url_encode(iv),
        "ciphertext": b64url_encode(sealed[:-16]),
        "tag": b64url_encode(sealed[-16:]),
    }
    return json.dumps(members, separators=(",", ":")).encode()


def parse(content: bytes) -> Jwe:
    """An untrusted JWE of either JSON serialisation. Raises: FormatError."""
    members = loads_object(content, limit=MAX_ELEMENT_SIZE, what="the JWE")
    if unknown := set(members) - _MEMBERS:
        raise FormatError(f"the JWE has the unknown member {show_name(min(unknown))}")
    if members.get("unprotected"):
        raise FormatError("the JWE has an unprotected header, which is not supported")
    protected = members.get("protected")
    shared = loads_object(
        b64url_decode(protected, "the JWE's protected header"), limit=MAX_ELEMENT_SIZE, what="the JWE's header"
    )
    enc = shared.get("enc")
    if not isinstance(enc, str) or enc not in _ENC:
        raise FormatError(f"the JWE's enc {show_name(enc)} is not supported; {', '.join(_ENC)} are")
    recipients = tuple(_recipient(shared, entry, index) for index, entry in enumerate(_entries(members)))
    ciphertext = b64url_decode(members.get("ciphertext"), "the JWE's ciphertext")
    iv, tag = b64url_decode(members.get("iv"), "the JWE's iv"), b64url_decode(members.get("tag"), "the JWE's tag")
    size, hash_name = _ENC[enc]
    if (len(iv), len(tag)) != ((16, size // 2) if hash_name else (12, 16)):
        raise FormatError(f"the JWE's iv and tag are {len(iv)} and {len(tag)} bytes, which does not fit {enc}")
    return Jwe(enc, recipients, str(protected), iv, ciphertext, tag, members)


def decrypt(jwe: Jwe, key: JwePrivateKey, name: str) -> bytearray:
    """The content, to be wiped by the caller, through the first recipient that `key` opens; `name` stands for the key.

    Raises: WrongKeyError saying what was tried; IntegrityError where the content was altered.
    """
    fitting = [recipient for recipient in jwe.recipients if recipient.alg in _algorithms(key)]
    opened = False
    for recipient in fitting:
        try:
            cek = bytearray(_unwrap(recipient, key))
        except (ValueError, InvalidUnwrap, FormatError):
            continue
        try:
            if len(cek) == _ENC[jwe.enc][0]:
                opened = True
                return _open(jwe, cek)
        except (ValueError, InvalidTag):
            continue
        finally:
            wipe(cek)
    if opened:
        raise IntegrityError(f"{name} opens a recipient of the JWE, but its content was altered")
    if fitting:
        raise WrongKeyError(f"{name} opens none of {len(fitting)} JWE recipients of its type")
    present = ", ".join(sorted({show_name(recipient.alg) for recipient in jwe.recipients}))
    raise WrongKeyError(f"{name} is for {' or '.join(_algorithms(key))}, and the JWE has {present}")


def _algorithm(key: JwePublicKey, algorithm: str | None) -> str:
    fitting = ALGORITHMS["rsa" if isinstance(key, rsa.RSAPublicKey) else "ec"]
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name not in {one.name for one in _CURVES.values()}:
        raise UsageError(f"keys on the curve {key.curve.name} have no place in a JWE", hint="use P-256, P-384 or P-521")
    if algorithm is None:
        return fitting[0]
    if algorithm not in fitting:
        raise UsageError(f"{show_name(algorithm)} does not fit the key; {', '.join(fitting)} do")
    return algorithm


def _algorithms(key: JwePrivateKey) -> tuple[str, ...]:
    return ALGORITHMS["rsa" if isinstance(key, rsa.RSAPrivateKey) else "ec"]


def _entries(members: Mapping[str, object]) -> Sequence[object]:
    if "recipients" not in members:
        return [{name: members[name] for name in ("header", "encrypted_key") if name in members}]
    entries = members["recipients"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_RECIPIENTS:
        raise FormatError(f"the JWE's recipients are not a list of 1 to {MAX_RECIPIENTS}")
    # go-jose up to version 2 repeats the first one's key at the top, as in skopeo 1.9.
    first = entries[0].get("encrypted_key") if isinstance(entries[0], dict) else None
    if "header" in members or members.get("encrypted_key") not in (None, first):
        raise FormatError("the JWE is neither of the flattened nor of the general serialisation")
    return entries


def _recipient(shared: Mapping[str, object], entry: object, index: int) -> JweRecipient:
    what = f"recipient {index} of the JWE"
    if not isinstance(entry, dict) or set(entry) - {"header", "encrypted_key"}:
        raise FormatError(f"{what} is not made of header and encrypted_key")
    own = entry.get("header", {})
    if not isinstance(own, dict):
        raise FormatError(f"{what} has a header that is no JSON object")
    if twice := set(own) & set(shared):
        raise FormatError(f"{what} repeats the protected header's {show_name(min(twice))}")
    header = {**shared, **own}
    for name in _FORBIDDEN:
        if name in header:
            raise FormatError(f"{what} has the header {name}, which is not allowed")
    if not isinstance(header.get("alg"), str):
        raise FormatError(f"{what} has no alg")
    return JweRecipient(header, b64url_decode(entry.get("encrypted_key"), f"encrypted_key of {what}"))


def _epk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    name = next(name for name, curve in _CURVES.items() if curve.name == key.curve.name)
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    half = len(point) // 2
    return {"kty": "EC", "crv": name, "x": b64url_encode(point[:half]), "y": b64url_encode(point[half:])}


def _parse_epk(value: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(value, dict) or value.get("kty") != "EC" or value.get("crv") not in _CURVES or "d" in value:
        raise FormatError("epk is no public EC key")
    curve = _CURVES[str(value["crv"])]
    x, y = b64url_decode(value.get("x"), "epk's x"), b64url_decode(value.get("y"), "epk's y")
    size = (curve.key_size + 7) // 8
    if len(x) != size or len(y) != size:
        raise FormatError("epk has coordinates of the wrong length")
    return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)


def _wrap(shared: bytes, algorithm: str, cek: bytearray) -> bytes:
    kek = agreed_kek(shared, algorithm, _ECDH[algorithm])
    try:
        return aes_key_wrap(kek, cek)
    finally:
        wipe(kek)


def _unwrap(recipient: JweRecipient, key: JwePrivateKey) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.decrypt(recipient.encrypted_key, _OAEP[recipient.alg])
    epk = _parse_epk(recipient.header.get("epk"))
    if epk.curve.name != key.curve.name:
        raise ValueError("another curve")
    apu, apv = (b64url_decode(recipient.header.get(name, ""), name) for name in ("apu", "apv"))
    kek = agreed_kek(key.exchange(ec.ECDH(), epk), recipient.alg, _ECDH[recipient.alg], apu=apu, apv=apv)
    try:
        return aes_key_unwrap(kek, recipient.encrypted_key)
    finally:
        wipe(kek)


def _open(jwe: Jwe, cek: bytearray) -> bytearray:
    """Raises: InvalidTag, ValueError."""
    associated = jwe.protected.encode("ascii")
    _, hash_name = _ENC[jwe.enc]
    if not hash_name:
        content = bytearray(len(jwe.ciphertext))
        try:
            AESGCM(cek).decrypt_into(jwe.iv, jwe.ciphertext + jwe.tag, associated, content)
        except BaseException:
            wipe(content)
            raise
        return content
    half = len(cek) // 2
    # RFC 7518, 5.2.2.2: the MAC is checked before anything is decrypted.
    message = associated + jwe.iv + jwe.ciphertext + (8 * len(associated)).to_bytes(8, "big")
    if not hmac.compare_digest(hmac.digest(cek[:half], message, hash_name)[:half], jwe.tag):
        raise InvalidTag
    cipher = Cipher(algorithms.AES(cek[half:]), modes.CBC(jwe.iv)).decryptor()
    unpadder = PKCS7(128).unpadder()
    return bytearray(unpadder.update(cipher.update(jwe.ciphertext) + cipher.finalize()) + unpadder.finalize())
