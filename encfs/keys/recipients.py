"""One recipient of a keyring: its JWE header, and wrapping and unwrapping the content-encryption key (CEK) for it.

| `alg` | key | per-recipient header | `encrypted_key` |
|---|---|---|---|
| `ECDH-ES+A256KW` (RFC 7518, 4.6) | P-256, P-384, X25519 | `epk` | 40 bytes, RFC 3394 |
| `RSA-OAEP-256` (4.3) | RSA | | as long as the modulus |
| `A256KW` (4.4) | 32-byte KEK | | 40 bytes, RFC 3394 |
| `PBES2-HS512+A256KW` (4.8) | passphrase | `p2s`, `p2c` | 40 bytes, RFC 3394 |
| `HPKE-MLKEM768X25519-A256GCM` (ours) | ML-KEM-768 + X25519 | | enc (1120 bytes), ciphertext (48 bytes) |
| `OCICRYPT-KEYPROVIDER` (ours) | has a service that wraps | `provider` | the packet that the service made |

Each may carry `kid`, a hint. The algorithms are put together from the primitives of `cryptography` and not done by
jwcrypto, for the reasons in docs/decisions/0003-jwe-without-jwcrypto.md; jwcrypto is the judge of them in the tests.
"""

from __future__ import annotations

import base64
import re
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from encfs.encoding import b64_decode, b64url_decode, b64url_encode
from encfs.errors import EncfsError, FormatError, KeyProviderError, WrongKeyError
from encfs.keys import jwk, jwkjson
from encfs.keys.jwk import HPKE_ALGORITHM, KeyKind, PrivateHandle, PublicKey, Use
from encfs.keys.secrets import Passphrase, SymmetricKey, wipe
from encfs.strictjson import loads_object, show_name

CEK_SIZE = 32

ECDH = "ECDH-ES+A256KW"
RSA = "RSA-OAEP-256"
KEK = "A256KW"
PBES2 = "PBES2-HS512+A256KW"
HPKE = HPKE_ALGORITHM
SERVICE = "OCICRYPT-KEYPROVIDER"

#: PBKDF2 iterations: written, and accepted.
ITERATIONS = 600_000
MIN_ITERATIONS, MAX_ITERATIONS = 210_000, 1_000_000
_SALT_SIZE = 16
_MAX_SALT_SIZE = 64

_MAX_SERVICE_CONTENT = 4096
_WRAPPED = range(CEK_SIZE + 8, CEK_SIZE + 8 + 1)
#: Largest `encrypted_key` (bytes) of any algorithm, unknown ones too.
MAX_ENCRYPTED_KEY_SIZE = 16 << 10
# Lengths of `encrypted_key` (bytes).
_SIZES: Mapping[str, range] = {
    ECDH: _WRAPPED,
    RSA: range(jwk.MIN_RSA_BITS // 8, jwk.MAX_RSA_BITS // 8 + 1),
    KEK: _WRAPPED,
    PBES2: _WRAPPED,
    HPKE: range(1120 + CEK_SIZE + 16, 1120 + CEK_SIZE + 16 + 1),
    SERVICE: range(1, MAX_ENCRYPTED_KEY_SIZE + 1),
}
_MAX_ALGORITHM_SIZE = 64

#: Header members that would change how a JWE is read, or send the reader somewhere: never accepted.
FORBIDDEN_MEMBERS = frozenset({"enc", "zip", "crit", "jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "b64"})

_KINDS: Mapping[str, str] = {
    RSA: KeyKind.RSA.value,
    KEK: "oct",
    PBES2: "passphrase",
    HPKE: KeyKind.HYBRID.value,
    SERVICE: "keyprovider",
}
#: Name of a service: what ocicrypt's configuration of key providers calls it.
_SERVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class WrappingService:
    """A recipient whose key somebody else has: `wrap` makes a packet of secret bytes, which only they open."""

    name: str
    wrap: Callable[[bytearray], bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A public key whose private half a key service holds under the name `kid`, which readers look for."""

    key: PublicKey
    kid: str


RecipientKey = PublicKey | NamedKey | SymmetricKey | Passphrase | WrappingService


@dataclass(frozen=True, slots=True)
class Recipient:
    """One entry of a keyring, checked as far as its algorithm is known. Nothing in it is secret or authenticated.

    `epk` is the sender's ephemeral key (ECDH), `salt` and `iterations` PBES2's, `service` names who wrapped it. An
    entry of an algorithm or curve that is not one of ours may be of a later version: it is kept as it is, and never
    tried.
    """

    index: int
    alg: str
    kid: str | None
    encrypted_key: bytes = field(repr=False)
    epk: PublicKey | None = None
    salt: bytes = field(default=b"", repr=False)
    iterations: int = 0
    service: str = ""

    @property
    def kind(self) -> str:
        """What opens it, in the words of `imagetool keygen --type`: x25519, rsa, oct, passphrase …; `unknown`."""
        return self.epk.kind.value if self.epk is not None else _KINDS.get(self.alg, "unknown")


class UnwrappingKey(Protocol):
    """A private key, or one that lives elsewhere (a TPM) and does these operations there.

    `PrivateKey` is the usual one. An operation that the key's kind does not have is never called. All raise ValueError
    or InvalidTag where the input does not fit; whatever else they raise ends the attempt.
    """

    @property
    def kind(self) -> KeyKind: ...

    @property
    def kid(self) -> str: ...

    def exchange(self, peer: PublicKey) -> bytes: ...

    def decrypt_oaep(self, data: bytes) -> bytes: ...

    def decrypt_hpke(self, data: bytes, info: bytes) -> bytes: ...


def parse_recipient(index: int, header: object, encrypted_key: object) -> Recipient:
    """One recipient from its untrusted `header` and `encrypted_key`. Raises: FormatError, naming its index."""
    try:
        return _parse(index, header, encrypted_key)
    except FormatError as error:
        raise FormatError(f"keyring recipient {index}: {error.message}") from None


def wrap(cek: bytearray, key: RecipientKey, content_digest: str) -> dict[str, object]:
    """A new recipient as a member of a JWE's `recipients`. `content_digest` is bound to by HPKE only.

    Raises: KeyFileError where the key's declared use forbids it.
    """
    match key:
        case SymmetricKey():
            return _entry(KEK, key.kid, {}, aes_key_wrap(key.secret, cek))
        case Passphrase():
            salt = secrets.token_bytes(_SALT_SIZE)
            parameters = {"p2s": b64url_encode(salt), "p2c": ITERATIONS}
            return _entry(PBES2, None, parameters, _wrap_once(_stretch(key, salt, ITERATIONS), cek))
        case WrappingService():
            return _entry(SERVICE, None, {"provider": key.name}, _wrap_by_service(key, cek, content_digest))
        case NamedKey():
            entry = wrap(cek, key.key, content_digest)
            return entry | {"header": {**dict(entry["header"]), "kid": key.kid}}  # type: ignore[call-overload]
        case PublicKey():
            key.require(Use.ENCRYPT, f"the recipient key {key.kid}")
            if key.kind is KeyKind.RSA:
                return _entry(RSA, key.kid, {}, key.encrypt_oaep(cek))
            if key.kind is KeyKind.HYBRID:
                return _entry(HPKE, key.kid, {}, key.encrypt_hpke(cek, _hpke_info(content_digest)))
            ephemeral = jwk.private_key(_ephemeral(key))
            epk = jwk.public_members(ephemeral.public.handle)
            return _entry(ECDH, key.kid, {"epk": epk}, _wrap_once(agreed_kek(ephemeral.exchange(key)), cek))


def unwrap_with_key(
    key: UnwrappingKey | SymmetricKey,
    recipients: Sequence[Recipient],
    content_digest: str,
    name: str,
    *,
    kid: str | None = None,
) -> bytearray:
    """The CEK (mutable, the caller wipes it) from the first recipient that `key` opens.

    Recipients that carry its `kid`, or the one given (what a key service calls it), are tried first, then all others
    for keys of its kind. `name` stands for the key in messages.

    Raises: WrongKeyError saying what was tried.
    """
    kind = "oct" if isinstance(key, SymmetricKey) else key.kind.value
    fitting = [recipient for recipient in recipients if recipient.kind == kind]
    named = {key.kid, kid} - {None}
    fitting.sort(key=lambda recipient: recipient.kid not in named)
    if isinstance(key, SymmetricKey):
        kek = key.secret
        return _first(fitting, lambda recipient: aes_key_unwrap(kek, recipient.encrypted_key), name, kind)
    return _first(fitting, lambda recipient: _unwrap_asymmetric(key, recipient, content_digest), name, kind)


def unwrap_with_passphrase(passphrase: Passphrase, recipients: Sequence[Recipient], name: str) -> bytearray:
    """The CEK (mutable, the caller wipes it) from the first passphrase recipient that `passphrase` opens.

    `parse_keyring` bounds how many there are and how long each takes. Raises: WrongKeyError saying what was tried.
    """

    def unwrap(recipient: Recipient) -> bytes:
        return _unwrap_once(_stretch(passphrase, recipient.salt, recipient.iterations), recipient.encrypted_key)

    return _first([recipient for recipient in recipients if recipient.alg == PBES2], unwrap, name, "passphrase")


def unwrap_with_service(
    name: str, unwrap: Callable[[bytes], bytearray], recipients: Sequence[Recipient], content_digest: str
) -> bytearray:
    """The CEK (mutable, the caller wipes it) from the first recipient of the service `name` that `unwrap` opens.

    `unwrap` gives what is in a packet, which is wiped here. Raises: WrongKeyError saying what was tried; what `unwrap`
    raised where it opened none.
    """
    fitting = [recipient for recipient in recipients if recipient.service == name]
    if not fitting:
        others = ", ".join(sorted({recipient.service for recipient in recipients if recipient.service}))
        raise WrongKeyError(
            f"the keyring has no recipient of the key provider {name}" + (f"; it has some of {others}" * bool(others))
        )
    failure: EncfsError | None = None
    for recipient in fitting:
        try:
            content = unwrap(recipient.encrypted_key)
        except EncfsError as error:
            failure = failure or error
            continue
        try:
            return _parse_service_content(content, content_digest)
        except FormatError as error:
            failure = failure or WrongKeyError(f"what the key provider {name} unwrapped is no key: {error.message}")
        finally:
            wipe(content)
    raise failure or WrongKeyError(f"the key provider {name} opens no recipient")


def mixes_post_quantum(recipients: Sequence[Recipient | RecipientKey]) -> bool:
    """Whether a post-quantum recipient stands beside one that a quantum computer opens: it protects nothing then.

    Symmetric keys and passphrases count as neither.
    """
    kinds = {recipient.kind for recipient in recipients if isinstance(recipient, Recipient)}
    public = [recipient.key if isinstance(recipient, NamedKey) else recipient for recipient in recipients]
    kinds |= {key.kind.value for key in public if isinstance(key, PublicKey)}
    return KeyKind.HYBRID.value in kinds and not kinds <= {KeyKind.HYBRID.value, "oct", "passphrase", "unknown"}


def _first(fitting: Sequence[Recipient], unwrap: Callable[[Recipient], bytes], name: str, kind: str) -> bytearray:
    for recipient in fitting:
        try:
            cek = bytearray(unwrap(recipient))
        except (ValueError, InvalidTag, InvalidUnwrap):
            continue
        if len(cek) == CEK_SIZE:
            return cek
        wipe(cek)
    if fitting:
        tried = ", ".join(str(recipient.index) for recipient in fitting)
        raise WrongKeyError(f"{name} opens none of the {kind} recipients (tried {tried})")
    raise WrongKeyError(f"{name} is for recipients of type {kind}, and the keyring has none")


def _unwrap_asymmetric(key: UnwrappingKey, recipient: Recipient, content_digest: str) -> bytes:
    if recipient.epk is not None:
        return _unwrap_once(agreed_kek(key.exchange(recipient.epk)), recipient.encrypted_key)
    if recipient.alg == RSA:
        return key.decrypt_oaep(recipient.encrypted_key)
    return key.decrypt_hpke(recipient.encrypted_key, _hpke_info(content_digest))


def _parse(index: int, header: object, encrypted_key: object) -> Recipient:
    if not isinstance(header, dict):
        raise FormatError("header is not a JSON object")
    alg = header.get("alg")
    if not isinstance(alg, str) or not 0 < len(alg) <= _MAX_ALGORITHM_SIZE or not alg.isascii():
        raise FormatError("alg is missing or malformed")
    if forbidden := FORBIDDEN_MEMBERS & set(header):
        raise FormatError(f"header member {show_name(min(forbidden))} is not allowed")
    kid = header.get("kid")
    if kid is not None:
        kid = jwkjson.check_kid(kid)
    wrapped = b64url_decode(encrypted_key, "encrypted_key")
    if len(wrapped) > MAX_ENCRYPTED_KEY_SIZE:
        raise FormatError(f"encrypted_key is larger than {MAX_ENCRYPTED_KEY_SIZE} bytes")
    recipient = Recipient(index, alg, kid, wrapped)
    if alg not in _SIZES:
        return recipient
    own = {ECDH: {"epk"}, PBES2: {"p2s", "p2c"}, SERVICE: {"provider"}}.get(alg, set())
    if missing := own - set(header):
        raise FormatError(f"header lacks the member {min(missing)}")
    if unknown := set(header) - own - {"alg", "kid"}:
        raise FormatError(f"header member {show_name(min(unknown))} does not belong to {alg}")
    if len(wrapped) not in _SIZES[alg]:
        raise FormatError(f"encrypted_key of {len(wrapped)} bytes does not fit {alg}")
    if alg == ECDH and not jwkjson.is_unknown_curve(header["epk"]):
        return Recipient(index, alg, kid, wrapped, epk=jwkjson.agreement_key_from_jwk(header["epk"]))
    if alg == PBES2:
        return Recipient(index, alg, kid, wrapped, salt=_salt(header), iterations=_iterations(header))
    if alg == SERVICE:
        name = header["provider"]
        if not isinstance(name, str) or not _SERVICE_NAME.fullmatch(name):
            raise FormatError("provider is not the name of a key provider")
        return Recipient(index, alg, kid, wrapped, service=name)
    return recipient


def _salt(header: Mapping[str, object]) -> bytes:
    salt = b64url_decode(header.get("p2s"), "p2s")
    if not _SALT_SIZE <= len(salt) <= _MAX_SALT_SIZE:
        raise FormatError(f"p2s is {len(salt)} bytes, not {_SALT_SIZE} to {_MAX_SALT_SIZE}")
    return salt


def _iterations(header: Mapping[str, object]) -> int:
    count = header.get("p2c")
    if type(count) is not int or not MIN_ITERATIONS <= count <= MAX_ITERATIONS:
        raise FormatError(f"p2c is not between {MIN_ITERATIONS} and {MAX_ITERATIONS}")
    return count


def _entry(alg: str, kid: str | None, parameters: Mapping[str, object], wrapped: bytes) -> dict[str, object]:
    header: dict[str, object] = {"alg": alg, **parameters}
    if kid is not None:
        header["kid"] = kid
    return {"header": header, "encrypted_key": b64url_encode(wrapped)}


def _ephemeral(key: PublicKey) -> PrivateHandle:
    if isinstance(key.handle, ec.EllipticCurvePublicKey):
        return ec.generate_private_key(key.handle.curve)
    return x25519.X25519PrivateKey.generate()


def _wrap_once(kek: bytearray, cek: bytearray) -> bytes:
    try:
        return aes_key_wrap(kek, cek)
    finally:
        wipe(kek)


def _unwrap_once(kek: bytearray, wrapped: bytes) -> bytes:
    try:
        return aes_key_unwrap(kek, wrapped)
    finally:
        wipe(kek)


def agreed_kek(
    shared: bytes, algorithm: str = ECDH, size: int = CEK_SIZE, *, apu: bytes = b"", apv: bytes = b""
) -> bytearray:
    """The key-encryption key (`size` bytes) of ECDH-ES with key wrapping: Concat KDF (RFC 7518, 4.6.2).

    Keyrings have neither PartyUInfo (`apu`) nor PartyVInfo (`apv`).
    """
    other = b"".join(struct.pack(">I", len(part)) + part for part in (algorithm.encode("ascii"), apu, apv))
    kek = bytearray(size)
    ConcatKDFHash(SHA256(), size, other + struct.pack(">I", 8 * size)).derive_into(shared, kek)
    return kek


def _stretch(passphrase: Passphrase, salt: bytes, iterations: int) -> bytearray:
    """The key-encryption key of PBES2-HS512+A256KW (RFC 7518, 4.8.1)."""
    kek = bytearray(CEK_SIZE)
    kdf = PBKDF2HMAC(SHA512(), CEK_SIZE, PBES2.encode("ascii") + b"\0" + salt, iterations)
    kdf.derive_into(passphrase.secret, kek)
    return kek


def _wrap_by_service(service: WrappingService, cek: bytearray, content_digest: str) -> bytes:
    content = _service_content(cek, content_digest)
    try:
        packet = service.wrap(content)
    finally:
        wipe(content)
    if len(packet) not in _SIZES[SERVICE]:
        raise KeyProviderError(
            f"the key provider {service.name} made a packet of {len(packet)} bytes, not 1 to {MAX_ENCRYPTED_KEY_SIZE}"
        )
    return packet


def _service_content(cek: bytearray, content_digest: str) -> bytearray:
    """What is handed to a service: private options of ocicrypt, in canonical form (RFC 8785), without a nonce."""
    return bytearray(
        b'{"cipheroptions":{},"digest":"%b","symkey":"%b"}' % (content_digest.encode("ascii"), base64.b64encode(cek))
    )


def _parse_service_content(content: bytearray, content_digest: str) -> bytearray:
    """Raises: FormatError unless it is what was handed to the service for this very artifact."""
    document = loads_object(content, limit=_MAX_SERVICE_CONTENT, what="it")
    if set(document) != {"cipheroptions", "digest", "symkey"} or document["cipheroptions"] != {}:
        raise FormatError("it has other members than a keyring's packet")
    if document["digest"] != content_digest:
        raise FormatError("it was wrapped for another artifact")
    cek = bytearray(b64_decode(document["symkey"], "its key"))
    if len(cek) != CEK_SIZE:
        wipe(cek)
        raise FormatError(f"its key has another length than {CEK_SIZE} bytes")
    return cek


def _hpke_info(content_digest: str) -> bytes:
    return HPKE.encode("ascii") + content_digest.encode("ascii")
