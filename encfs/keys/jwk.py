"""Keys: what they are, what they may be used for, their names (RFC 7638 thumbprints), and making new ones.

A key either encrypts (it unwraps the key of a keyring) or signs; only P-256 may do both. Every key is checked in full
when it is made, so that whoever holds one of these objects need not ask again. The JSON form is `jwkjson`'s, reading
and writing files is `files`', using the keys is `recipients`' and `encfs.signatures`'.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, mlkem, padding, rsa, x25519

from encfs.encoding import b64url_encode
from encfs.errors import KeyFileError
from encfs.keys.secrets import KEK_SIZE, SymmetricKey
from encfs.strictjson import show_name

#: `alg` of the post-quantum hybrid: HPKE (RFC 9180) with ML-KEM-768 + X25519, HKDF-SHA256 and AES-256-GCM.
HPKE_ALGORITHM = "HPKE-MLKEM768X25519-A256GCM"

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
_RSA_EXPONENT = 65537

#: Bytes of the seed that both private keys of the hybrid come from.
HYBRID_SEED_SIZE = 32

_P25519 = 2**255 - 19
# y-coordinates of the points of small order on edwards25519: under such a "public key" anyone can sign.
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_ED25519_SMALL_ORDER = frozenset({0, 1, _P25519 - 1, _Y8, _P25519 - _Y8})


class KeyKind(enum.Enum):
    """Kinds of asymmetric keys; the values are what `imagetool keygen --type` and messages call them."""

    X25519 = "x25519"
    P256 = "p256"
    P384 = "p384"
    RSA = "rsa"
    ED25519 = "ed25519"
    MLDSA65 = "mldsa65"
    HYBRID = "mlkem768x25519"


class Use(enum.Enum):
    """What a key is used for."""

    ENCRYPT = "encrypt"
    SIGN = "sign"


_ENCRYPT, _SIGN = frozenset({Use.ENCRYPT}), frozenset({Use.SIGN})
#: What each kind can do.
CAPABILITIES: Mapping[KeyKind, frozenset[Use]] = {
    KeyKind.X25519: _ENCRYPT,
    KeyKind.P256: _ENCRYPT | _SIGN,
    KeyKind.P384: _ENCRYPT,
    KeyKind.RSA: _ENCRYPT,
    KeyKind.ED25519: _SIGN,
    KeyKind.MLDSA65: _SIGN,
    KeyKind.HYBRID: _ENCRYPT,
}
_KINDS_FOR = {
    Use.ENCRYPT: "x25519, p256, p384, rsa, mlkem768x25519 or oct",
    Use.SIGN: "ed25519, p256 or mldsa65",
}
#: The curves of RFC 7518 that are supported, with the bytes of a coordinate.
CURVES: Mapping[str, tuple[KeyKind, ec.EllipticCurve, int]] = {
    "P-256": (KeyKind.P256, ec.SECP256R1(), 32),
    "P-384": (KeyKind.P384, ec.SECP384R1(), 48),
}
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
_HPKE_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, slots=True)
class HybridPublic:
    """ML-KEM-768 and X25519 public keys, used together."""

    mlkem: mlkem.MLKEM768PublicKey
    x25519: x25519.X25519PublicKey

    def to_bytes(self) -> bytes:
        return self.mlkem.public_bytes_raw() + self.x25519.public_bytes_raw()


@dataclass(frozen=True, slots=True)
class HybridPrivate:
    """ML-KEM-768 and X25519 private keys that come from one 32-byte seed."""

    seed: bytes = field(repr=False)
    mlkem: mlkem.MLKEM768PrivateKey
    x25519: x25519.X25519PrivateKey

    def public_key(self) -> HybridPublic:
        return HybridPublic(self.mlkem.public_key(), self.x25519.public_key())


PublicHandle = (
    x25519.X25519PublicKey
    | ec.EllipticCurvePublicKey
    | rsa.RSAPublicKey
    | ed25519.Ed25519PublicKey
    | mldsa.MLDSA65PublicKey
    | HybridPublic
)
PrivateHandle = (
    x25519.X25519PrivateKey
    | ec.EllipticCurvePrivateKey
    | rsa.RSAPrivateKey
    | ed25519.Ed25519PrivateKey
    | mldsa.MLDSA65PrivateKey
    | HybridPrivate
)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A checked public key. Two are equal if they are the same key, whatever file they came from.

    `kid` is its RFC 7638 thumbprint (SHA-256, base64url); `uses` is what its kind can do, narrowed by its JWK.
    """

    kind: KeyKind
    kid: str
    uses: frozenset[Use] = field(compare=False, repr=False)
    handle: PublicHandle = field(compare=False, repr=False)

    def require(self, use: Use, what: str) -> None:
        """Raises: KeyFileError unless the key may be used for `use`; `what` names it in the message."""
        if use not in self.uses:
            raise _unfit(self.kind, use, what)

    def encrypt_oaep(self, data: bytes | bytearray) -> bytes:
        """RSA-OAEP with SHA-256 in both places (RFC 7518, section 4.3)."""
        if not isinstance(self.handle, rsa.RSAPublicKey):
            raise TypeError("not an RSA key")
        return encrypt_oaep(self.handle, data)

    def encrypt_hpke(self, data: bytes | bytearray, info: bytes) -> bytes:
        """HPKE base mode, single shot: enc || ciphertext."""
        if not isinstance(self.handle, HybridPublic):
            raise TypeError("not a hybrid key")
        return _HPKE_SUITE.encrypt(data, hpke.MLKEM768X25519PublicKey(self.handle.mlkem, self.handle.x25519), info)

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` over `message` is this key's.

        Ed25519, ECDSA (DER, SHA-256) or pure ML-DSA-65 with an empty context, by the kind of the key.
        """
        try:
            match self.handle:
                case ed25519.Ed25519PublicKey():
                    self.handle.verify(signature, message)
                case ec.EllipticCurvePublicKey():
                    self.handle.verify(signature, message, ec.ECDSA(hashes.SHA256()))
                case mldsa.MLDSA65PublicKey():
                    self.handle.verify(signature, message, None)
                case _:
                    return False
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A checked private key. Its secret part is never in `repr` nor compared."""

    public: PublicKey
    handle: PrivateHandle = field(compare=False, repr=False)

    @property
    def kind(self) -> KeyKind:
        return self.public.kind

    @property
    def kid(self) -> str:
        """The thumbprint of the public part."""
        return self.public.kid

    def require(self, use: Use, what: str) -> None:
        """Raises: KeyFileError unless the key may be used for `use`; `what` names it in the message."""
        self.public.require(use, what)

    def exchange(self, peer: PublicKey) -> bytes:
        """The shared secret of ECDH with a key of the same kind. Raises: ValueError where it is the neutral element."""
        match self.handle, peer.handle:
            case x25519.X25519PrivateKey() as own, x25519.X25519PublicKey() as other:
                return own.exchange(other)
            case ec.EllipticCurvePrivateKey() as own_ec, ec.EllipticCurvePublicKey() as other_ec:
                return own_ec.exchange(ec.ECDH(), other_ec)
            case _:
                raise ValueError("keys of different kinds")

    def decrypt_oaep(self, data: bytes) -> bytes:
        """The counterpart of `PublicKey.encrypt_oaep`. Raises: ValueError."""
        if not isinstance(self.handle, rsa.RSAPrivateKey):
            raise TypeError("not an RSA key")
        return self.handle.decrypt(data, _OAEP)

    def decrypt_hpke(self, data: bytes, info: bytes) -> bytes:
        """The counterpart of `PublicKey.encrypt_hpke`. Raises: InvalidTag."""
        if not isinstance(self.handle, HybridPrivate):
            raise TypeError("not a hybrid key")
        return _HPKE_SUITE.decrypt(data, hpke.MLKEM768X25519PrivateKey(self.handle.mlkem, self.handle.x25519), info)

    def sign(self, message: bytes) -> bytes:
        """The counterpart of `PublicKey.verify`. Raises: KeyFileError where the key cannot sign."""
        match self.handle:
            case ed25519.Ed25519PrivateKey() if Use.SIGN in self.public.uses:
                return self.handle.sign(message)
            case ec.EllipticCurvePrivateKey() if Use.SIGN in self.public.uses:
                return self.handle.sign(message, ec.ECDSA(hashes.SHA256()))
            case mldsa.MLDSA65PrivateKey() if Use.SIGN in self.public.uses:
                return self.handle.sign(message, None)
            case _:
                raise _unfit(self.kind, Use.SIGN, "the signing key")


Key = PublicKey | PrivateKey | SymmetricKey


def encrypt_oaep(handle: rsa.RSAPublicKey, data: bytes | bytearray) -> bytes:
    """RSA-OAEP with SHA-256 in both places (RFC 7518, section 4.3)."""
    return handle.encrypt(bytes(data), _OAEP)


def public_key(handle: PublicHandle, uses: frozenset[Use] | None = None) -> PublicKey:
    """Check a library's key and name it. `uses` None: whatever its kind can do.

    Raises: KeyFileError for RSA below 2048 or above 8192 bits or with an exponent other than 65537, for points of small
    order, and for curves other than P-256 and P-384.
    """
    match handle:
        case x25519.X25519PublicKey():
            kind = KeyKind.X25519
            _check_x25519(handle)
        case ec.EllipticCurvePublicKey():
            kind = _curve_kind(handle.curve)
        case rsa.RSAPublicKey():
            kind = KeyKind.RSA
            _check_rsa(handle)
        case ed25519.Ed25519PublicKey():
            kind = KeyKind.ED25519
            _check_ed25519(handle)
        case mldsa.MLDSA65PublicKey():
            kind = KeyKind.MLDSA65
        case HybridPublic():
            kind = KeyKind.HYBRID
            _check_x25519(handle.x25519)
        case _:
            raise KeyFileError(f"is of an unsupported type ({type(handle).__name__})")
    members = public_members(handle)
    canonical = "{" + ",".join(f'"{name}":"{members[name]}"' for name in sorted(members)) + "}"
    kid = b64url_encode(hashlib.sha256(canonical.encode()).digest())
    return PublicKey(kind, kid, CAPABILITIES[kind] if uses is None else uses, handle)


def private_key(handle: PrivateHandle, uses: frozenset[Use] | None = None) -> PrivateKey:
    """Check a library's private key and name it. Raises: KeyFileError as `public_key` does."""
    return PrivateKey(public_key(handle.public_key(), uses), handle)


def generate_key(kind: str) -> PrivateKey | SymmetricKey:
    """A fresh key: x25519, p256, p384, rsa3072, ed25519, mldsa65, mlkem768x25519, or oct (with a random key id).

    Raises: KeyFileError for any other name.
    """
    match kind:
        case "x25519":
            return private_key(x25519.X25519PrivateKey.generate())
        case "p256":
            return private_key(ec.generate_private_key(ec.SECP256R1()))
        case "p384":
            return private_key(ec.generate_private_key(ec.SECP384R1()))
        case "rsa3072":
            return private_key(rsa.generate_private_key(_RSA_EXPONENT, 3072))
        case "ed25519":
            return private_key(ed25519.Ed25519PrivateKey.generate())
        case "mldsa65":
            return private_key(mldsa.MLDSA65PrivateKey.generate())
        case "mlkem768x25519":
            return private_key(expand_hybrid(secrets.token_bytes(HYBRID_SEED_SIZE)))
        case "oct":
            return SymmetricKey(bytearray(secrets.token_bytes(KEK_SIZE)), b64url_encode(secrets.token_bytes(16)))
        case _:
            raise KeyFileError(f"unknown key type {show_name(kind)}", hint=f"types are {', '.join(GENERATED_TYPES)}")


#: What `generate_key` takes.
GENERATED_TYPES = ("x25519", "p256", "p384", "rsa3072", "ed25519", "mldsa65", "mlkem768x25519", "oct")


def expand_hybrid(seed: bytes) -> HybridPrivate:
    """SHAKE256(seed, 96): 64 bytes for ML-KEM-768's key generation, 32 for X25519's private key."""
    expanded = hashlib.shake_256(seed).digest(96)
    return HybridPrivate(
        seed,
        mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        x25519.X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def point_members(handle: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """The public members of a key on one of NIST's curves, P-521 as well (RFC 7518, section 6.2.1)."""
    # Imported here: it brings formats along (OpenSSH's) that take longer to load than all keys.
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    size = (handle.curve.key_size + 7) // 8
    point = handle.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    x, y = point[1 : 1 + size], point[1 + size :]
    return {"kty": "EC", "crv": f"P-{handle.curve.key_size}", "x": b64url_encode(x), "y": b64url_encode(y)}


def public_members(handle: PublicHandle) -> dict[str, str]:
    """Exactly the members that RFC 7638 (RFC 9964 for AKP) hashes."""
    match handle:
        case x25519.X25519PublicKey():
            return {"kty": "OKP", "crv": "X25519", "x": b64url_encode(handle.public_bytes_raw())}
        case ed25519.Ed25519PublicKey():
            return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(handle.public_bytes_raw())}
        case ec.EllipticCurvePublicKey():
            _curve_kind(handle.curve)
            return point_members(handle)
        case rsa.RSAPublicKey():
            numbers = handle.public_numbers()
            return {"kty": "RSA", "n": number_text(numbers.n), "e": number_text(numbers.e)}
        case mldsa.MLDSA65PublicKey():
            return {"kty": "AKP", "alg": "ML-DSA-65", "pub": b64url_encode(handle.public_bytes_raw())}
        case HybridPublic():
            return {"kty": "AKP", "alg": HPKE_ALGORITHM, "pub": b64url_encode(handle.to_bytes())}


def _unfit(kind: KeyKind, use: Use, what: str) -> KeyFileError:
    if use in CAPABILITIES[kind]:
        return KeyFileError(
            f"{what} is of type {kind.value}, but its JWK does not allow it to {use.value} (use, key_ops or alg)",
            hint=f"give a key made to {use.value}",
        )
    return KeyFileError(
        f"{what} is of type {kind.value}, which cannot {use.value}", hint=f"give a key of type {_KINDS_FOR[use]}"
    )


def _curve_kind(curve: ec.EllipticCurve) -> KeyKind:
    for kind, supported, _ in CURVES.values():
        if curve.name == supported.name:
            return kind
    raise KeyFileError(f"is on the curve {curve.name}, which is not supported")


def _check_x25519(key: x25519.X25519PublicKey) -> None:
    if int.from_bytes(key.public_bytes_raw(), "little") >= _P25519:
        raise KeyFileError("is not a canonical X25519 public key")
    try:
        # Private scalars are multiples of the cofactor, so every exchange with a point of small order gives zero.
        x25519.X25519PrivateKey.from_private_bytes(bytes(32)).exchange(key)
    except ValueError:
        raise KeyFileError("is an X25519 point of small order, which any key agrees with") from None


def _check_ed25519(key: ed25519.Ed25519PublicKey) -> None:
    y = int.from_bytes(key.public_bytes_raw(), "little") & (2**255 - 1)
    if y >= _P25519:
        raise KeyFileError("is not a canonical Ed25519 public key")
    if y in _ED25519_SMALL_ORDER:
        raise KeyFileError("is an Ed25519 point of small order, under which anyone can sign")


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    numbers = key.public_numbers()
    check_rsa_numbers(numbers.n, numbers.e)


def check_rsa_numbers(n: int, e: int) -> None:
    if not MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS:
        raise KeyFileError(
            f"is an RSA key of {n.bit_length()} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted",
        )
    if e != _RSA_EXPONENT:
        raise KeyFileError(f"is an RSA key with a public exponent other than {_RSA_EXPONENT}")
    if n % 2 == 0:
        raise KeyFileError("is an RSA key with an even modulus")


def number_text(number: int) -> str:
    return b64url_encode(number.to_bytes((number.bit_length() + 7) // 8))
