"""Keys: what they are, what they may be used for, and their JSON form (RFC 7517, 7518, 8037, 9964).

A key either encrypts (it unwraps the key of a keyring) or signs; only P-256 may do both. Every key is checked in full
when it is made, so that whoever holds one of these objects need not ask again. Reading and writing files is `files`',
using the keys is `recipients`' and `encfs.signatures`'.

ML-KEM-768 with X25519 has no registered JWK form; ours is an AKP key (RFC 9964) whose `alg` is the private algorithm
`HPKE-MLKEM768X25519-A256GCM`, `pub` the 1184 bytes of ML-KEM-768 and the 32 bytes of X25519, `priv` the 32-byte seed
that SHAKE256 expands into both private keys (the X-Wing key derivation of draft-connolly-cfrg-xwing-kem).
"""

from __future__ import annotations

import enum
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import FormatError, KeyFileError
from encfs.keys.secrets import KEK_SIZE, SymmetricKey
from encfs.strictjson import show_name

#: `alg` of the post-quantum hybrid: HPKE (RFC 9180) with ML-KEM-768 + X25519, HKDF-SHA256 and AES-256-GCM.
HPKE_ALGORITHM = "HPKE-MLKEM768X25519-A256GCM"

#: Characters of a key id.
MAX_KID_SIZE = 256

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
_RSA_EXPONENT = 65537

_MLKEM_PUBLIC_SIZE, _X25519_SIZE = 1184, 32
_HYBRID_SEED_SIZE = 32
_MLDSA_PUBLIC_SIZE, _MLDSA_SEED_SIZE = 1952, 32

_P25519 = 2**255 - 19
# y-coordinates of the points of small order on edwards25519: under such a "public key" anyone can sign.
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7
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
_CAPABILITIES: Mapping[KeyKind, frozenset[Use]] = {
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
# The algorithms of this project, per kind: a JWK that names another `alg` was made for another use.
_ALGORITHMS: Mapping[KeyKind, Mapping[str, Use]] = {
    KeyKind.X25519: {"ECDH-ES+A256KW": Use.ENCRYPT},
    KeyKind.P256: {"ECDH-ES+A256KW": Use.ENCRYPT, "ES256": Use.SIGN},
    KeyKind.P384: {"ECDH-ES+A256KW": Use.ENCRYPT},
    KeyKind.RSA: {"RSA-OAEP-256": Use.ENCRYPT},
    KeyKind.ED25519: {"EdDSA": Use.SIGN, "Ed25519": Use.SIGN},
    KeyKind.MLDSA65: {"ML-DSA-65": Use.SIGN},
    KeyKind.HYBRID: {HPKE_ALGORITHM: Use.ENCRYPT},
}
_OPERATIONS = {
    Use.ENCRYPT: frozenset({"encrypt", "decrypt", "wrapKey", "unwrapKey", "deriveKey", "deriveBits"}),
    Use.SIGN: frozenset({"sign", "verify"}),
}
_CURVES: Mapping[str, tuple[KeyKind, ec.EllipticCurve, int]] = {
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
        return self.handle.encrypt(bytes(data), _OAEP)

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
    members = _public_members(handle)
    canonical = "{" + ",".join(f'"{name}":"{members[name]}"' for name in sorted(members)) + "}"
    kid = b64url_encode(hashlib.sha256(canonical.encode()).digest())
    return PublicKey(kind, kid, _CAPABILITIES[kind] if uses is None else uses, handle)


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
            return private_key(_expand_hybrid(secrets.token_bytes(_HYBRID_SEED_SIZE)))
        case "oct":
            return SymmetricKey(bytearray(secrets.token_bytes(KEK_SIZE)), b64url_encode(secrets.token_bytes(16)))
        case _:
            raise KeyFileError(f"unknown key type {show_name(kind)}", hint=f"types are {', '.join(GENERATED_TYPES)}")


#: What `generate_key` takes.
GENERATED_TYPES = ("x25519", "p256", "p384", "rsa3072", "ed25519", "mldsa65", "mlkem768x25519", "oct")


def public_jwk(key: PublicKey) -> dict[str, str]:
    """The public JWK with its thumbprint as `kid`."""
    return _public_members(key.handle) | {"kid": key.kid}


def private_jwk(key: PrivateKey | SymmetricKey) -> dict[str, str]:
    """The JWK with all its secrets: only for writing it to a private file."""
    if isinstance(key, SymmetricKey):
        members = {"kty": "oct", "k": b64url_encode(key.secret), "alg": "A256KW"}
        return members | ({"kid": key.kid} if key.kid is not None else {})
    return public_jwk(key.public) | _private_members(key.handle)


def key_from_jwk(members: Mapping[str, object]) -> Key:
    """The key of a parsed JWK: a PrivateKey where it has private members, a SymmetricKey for `oct`.

    Members this project does not know are ignored, as RFC 7517 asks; nothing is ever fetched (`x5u`).

    Raises: KeyFileError, worded to follow the name of the file ("is not …").
    """
    try:
        return _from_jwk(members)
    except FormatError as error:
        raise KeyFileError(f"is a malformed JWK: {error.message}") from None


def agreement_key_from_jwk(members: object) -> PublicKey:
    """The public P-256, P-384 or X25519 key of an `epk` header (RFC 7518, section 4.6.1.1): exactly its public members.

    Raises: FormatError.
    """
    if not isinstance(members, dict):
        raise FormatError("epk is not a JSON object")
    wanted = {"OKP": {"kty", "crv", "x"}, "EC": {"kty", "crv", "x", "y"}}.get(str(members.get("kty")), set())
    if set(members) != wanted:
        raise FormatError("epk is no public EC or OKP key, or has other members than kty, crv, x and y")
    try:
        key = public_key(_public_handle(members))
    except KeyFileError as error:
        raise FormatError(f"epk {error.message}") from None
    if key.kind not in (KeyKind.X25519, KeyKind.P256, KeyKind.P384):
        raise FormatError("epk is not for key agreement")
    return key


def _from_jwk(members: Mapping[str, object]) -> Key:
    if "keys" in members and "kty" not in members:
        raise KeyFileError("is a set of JWKs, not a single key")
    if members.get("kty") == "oct":
        return _symmetric(members)
    handle = _public_handle(members)
    kind = public_key(handle).kind
    uses = _declared_uses(members, _CAPABILITIES[kind], _ALGORITHMS[kind])
    public = public_key(handle, uses)
    if not {"d", "priv"} & set(members):
        return public
    private = private_key(_private_handle(kind, members), uses)
    if private.public != public:
        raise KeyFileError("has a private part that does not belong to its public part")
    return private


def _symmetric(members: Mapping[str, object]) -> SymmetricKey:
    _declared_uses(members, _ENCRYPT, {"A256KW": Use.ENCRYPT})
    kid = members.get("kid")
    if kid is not None:
        check_kid(kid)
    secret = bytearray(b64url_decode(members.get("k"), "k"))
    if len(secret) != KEK_SIZE:
        raise KeyFileError(f"is a symmetric key of {len(secret)} bytes; {KEK_SIZE} are needed")
    return SymmetricKey(secret, cast("str | None", kid))


def check_kid(kid: object) -> str:
    """A key id of 1 to 256 printable ASCII characters. Raises: FormatError."""
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID_SIZE or not kid.isascii() or not kid.isprintable():
        raise FormatError(f"kid is not 1 to {MAX_KID_SIZE} printable ASCII characters")
    return kid


def _declared_uses(
    members: Mapping[str, object], capable: frozenset[Use], algorithms: Mapping[str, Use]
) -> frozenset[Use]:
    """`capable`, narrowed by `use`, `key_ops` and `alg`. Raises: KeyFileError where nothing is left; FormatError."""
    uses = capable
    if (use := members.get("use")) is not None:
        if not isinstance(use, str):
            raise FormatError("use is not a string")
        uses &= {"enc": _ENCRYPT, "sig": _SIGN}.get(use, frozenset())
    if (operations := members.get("key_ops")) is not None:
        if not isinstance(operations, list) or not all(isinstance(operation, str) for operation in operations):
            raise FormatError("key_ops is not a list of strings")
        # An empty list is what WebCrypto exports for the public half of an ECDH key: it says nothing.
        if operations:
            uses = frozenset(use for use in uses if _OPERATIONS[use] & set(operations))
    if (algorithm := members.get("alg")) is not None:
        if not isinstance(algorithm, str):
            raise FormatError("alg is not a string")
        if algorithm not in algorithms:
            raise KeyFileError(
                f"is meant for the algorithm {show_name(algorithm)}, not for {' or '.join(sorted(algorithms))}"
            )
        uses &= {algorithms[algorithm]}
    if not uses:
        raise KeyFileError("has a use, key_ops or alg that contradict one another or its type")
    return uses


def _public_handle(members: Mapping[str, object]) -> PublicHandle:
    kty, crv = members.get("kty"), members.get("crv")
    match kty:
        case "OKP" if crv == "X25519":
            return x25519.X25519PublicKey.from_public_bytes(_sized(members, "x", _X25519_SIZE))
        case "OKP" if crv == "Ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(_sized(members, "x", 32))
        case "EC" if isinstance(crv, str) and crv in _CURVES:
            _, curve, size = _CURVES[crv]
            x, y = _sized(members, "x", size), _sized(members, "y", size)
            try:
                return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)
            except ValueError:
                raise KeyFileError(f"has a point that is not on the curve {crv}") from None
        case "OKP" | "EC":
            raise KeyFileError(f"is on the curve {show_name(crv)}, which is not supported")
        case "RSA":
            n, e = _number(members, "n"), _number(members, "e")
            _check_rsa_numbers(n, e)
            return rsa.RSAPublicNumbers(e, n).public_key()
        case "AKP" if members.get("alg") == "ML-DSA-65":
            return mldsa.MLDSA65PublicKey.from_public_bytes(_sized(members, "pub", _MLDSA_PUBLIC_SIZE))
        case "AKP" if members.get("alg") == HPKE_ALGORITHM:
            return hybrid_public(_sized(members, "pub", _MLKEM_PUBLIC_SIZE + _X25519_SIZE))
        case "AKP":
            raise KeyFileError(f"is for the algorithm {show_name(members.get('alg'))}, which is not supported")
        case None:
            raise FormatError("it has no kty")
        case _:
            raise KeyFileError(f"is of the type {show_name(kty)}, which is not supported")


def hybrid_public(data: bytes) -> HybridPublic:
    """The 1184 + 32 bytes of a hybrid public key. Raises: KeyFileError where ML-KEM's check of its part fails."""
    try:
        return HybridPublic(
            mlkem.MLKEM768PublicKey.from_public_bytes(data[:_MLKEM_PUBLIC_SIZE]),
            x25519.X25519PublicKey.from_public_bytes(data[_MLKEM_PUBLIC_SIZE:]),
        )
    except ValueError:
        raise KeyFileError("has an invalid ML-KEM-768 public key") from None


def _private_handle(kind: KeyKind, members: Mapping[str, object]) -> PrivateHandle:
    problem = "has an invalid private part"
    try:
        match kind:
            case KeyKind.X25519:
                return x25519.X25519PrivateKey.from_private_bytes(_sized(members, "d", _X25519_SIZE))
            case KeyKind.ED25519:
                return ed25519.Ed25519PrivateKey.from_private_bytes(_sized(members, "d", 32))
            case KeyKind.P256 | KeyKind.P384:
                _, curve, size = _CURVES[cast(str, members["crv"])]
                return ec.derive_private_key(int.from_bytes(_sized(members, "d", size)), curve)
            case KeyKind.RSA:
                return _rsa_private(members)
            case KeyKind.MLDSA65:
                return mldsa.MLDSA65PrivateKey.from_seed_bytes(_sized(members, "priv", _MLDSA_SEED_SIZE))
            case KeyKind.HYBRID:
                return _expand_hybrid(_sized(members, "priv", _HYBRID_SEED_SIZE))
    except ValueError:
        pass  # raised below, without the context: it may quote numbers
    raise KeyFileError(problem)


def _rsa_private(members: Mapping[str, object]) -> rsa.RSAPrivateKey:
    if "oth" in members:
        raise KeyFileError("is an RSA key of more than two primes")
    n, e, d, p, q, dp, dq, qi = (_number(members, name) for name in ("n", "e", "d", "p", "q", "dp", "dq", "qi"))
    return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, rsa.RSAPublicNumbers(e, n)).private_key()


def _expand_hybrid(seed: bytes) -> HybridPrivate:
    """SHAKE256(seed, 96): 64 bytes for ML-KEM-768's key generation, 32 for X25519's private key."""
    expanded = hashlib.shake_256(seed).digest(96)
    return HybridPrivate(
        seed,
        mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        x25519.X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def _public_members(handle: PublicHandle) -> dict[str, str]:
    """Exactly the members that RFC 7638 (RFC 9964 for AKP) hashes."""
    match handle:
        case x25519.X25519PublicKey():
            return {"kty": "OKP", "crv": "X25519", "x": b64url_encode(handle.public_bytes_raw())}
        case ed25519.Ed25519PublicKey():
            return {"kty": "OKP", "crv": "Ed25519", "x": b64url_encode(handle.public_bytes_raw())}
        case ec.EllipticCurvePublicKey():
            crv, size = {_CURVES[name][0]: (name, _CURVES[name][2]) for name in _CURVES}[_curve_kind(handle.curve)]
            point = handle.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
            x, y = point[1 : 1 + size], point[1 + size :]
            return {"kty": "EC", "crv": crv, "x": b64url_encode(x), "y": b64url_encode(y)}
        case rsa.RSAPublicKey():
            numbers = handle.public_numbers()
            return {"kty": "RSA", "n": _number_text(numbers.n), "e": _number_text(numbers.e)}
        case mldsa.MLDSA65PublicKey():
            return {"kty": "AKP", "alg": "ML-DSA-65", "pub": b64url_encode(handle.public_bytes_raw())}
        case HybridPublic():
            return {"kty": "AKP", "alg": HPKE_ALGORITHM, "pub": b64url_encode(handle.to_bytes())}


def _private_members(handle: PrivateHandle) -> dict[str, str]:
    match handle:
        case x25519.X25519PrivateKey() | ed25519.Ed25519PrivateKey():
            return {"d": b64url_encode(handle.private_bytes_raw())}
        case ec.EllipticCurvePrivateKey():
            return {"d": b64url_encode(handle.private_numbers().private_value.to_bytes((handle.key_size + 7) // 8))}
        case rsa.RSAPrivateKey():
            numbers = handle.private_numbers()
            return {
                "d": _number_text(numbers.d),
                "p": _number_text(numbers.p),
                "q": _number_text(numbers.q),
                "dp": _number_text(numbers.dmp1),
                "dq": _number_text(numbers.dmq1),
                "qi": _number_text(numbers.iqmp),
            }
        case mldsa.MLDSA65PrivateKey():
            return {"priv": b64url_encode(handle.private_bytes_raw())}
        case HybridPrivate():
            return {"priv": b64url_encode(handle.seed)}


def _unfit(kind: KeyKind, use: Use, what: str) -> KeyFileError:
    if use in _CAPABILITIES[kind]:
        return KeyFileError(
            f"{what} is of type {kind.value}, but its JWK does not allow it to {use.value} (use, key_ops or alg)",
            hint=f"give a key made to {use.value}",
        )
    return KeyFileError(
        f"{what} is of type {kind.value}, which cannot {use.value}", hint=f"give a key of type {_KINDS_FOR[use]}"
    )


def _curve_kind(curve: ec.EllipticCurve) -> KeyKind:
    for kind, supported, _ in _CURVES.values():
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
    _check_rsa_numbers(numbers.n, numbers.e)


def _check_rsa_numbers(n: int, e: int) -> None:
    if not MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS:
        raise KeyFileError(
            f"is an RSA key of {n.bit_length()} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted",
        )
    if e != _RSA_EXPONENT:
        raise KeyFileError(f"is an RSA key with a public exponent other than {_RSA_EXPONENT}")
    if n % 2 == 0:
        raise KeyFileError("is an RSA key with an even modulus")


def _sized(members: Mapping[str, object], name: str, size: int) -> bytes:
    data = b64url_decode(members.get(name), name)
    if len(data) != size:
        raise FormatError(f"{name} is {len(data)} bytes, not {size}")
    return data


def _number(members: Mapping[str, object], name: str) -> int:
    """Base64urlUInt of RFC 7518, section 2: big-endian without leading zeros."""
    data = b64url_decode(members.get(name), name)
    if not data or data[0] == 0:
        raise FormatError(f"{name} is not a canonical number")
    return int.from_bytes(data)


def _number_text(number: int) -> str:
    return b64url_encode(number.to_bytes((number.bit_length() + 7) // 8))
