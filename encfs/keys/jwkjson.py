"""The JSON form of keys, JWK (RFC 7517, 7518, 8037, 9964): reading strictly, and writing.

ML-KEM-768 with X25519 has no registered JWK form; ours is an AKP key (RFC 9964) whose `alg` is the private algorithm
`HPKE-MLKEM768X25519-A256GCM`, `pub` the 1184 bytes of ML-KEM-768 and the 32 bytes of X25519, `priv` the 32-byte seed
that SHAKE256 expands into both private keys, as X-Wing does (draft-connolly-cfrg-xwing-kem, section 5.2).

`kid` is always the thumbprint, whatever a file says, except for symmetric keys, which have none but what the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, mlkem, rsa, x25519

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import FormatError, KeyFileError
from encfs.keys.jwk import (
    CAPABILITIES,
    CURVES,
    HPKE_ALGORITHM,
    HYBRID_SEED_SIZE,
    HybridPrivate,
    HybridPublic,
    Key,
    KeyKind,
    PrivateHandle,
    PrivateKey,
    PublicHandle,
    PublicKey,
    Use,
    check_rsa_numbers,
    expand_hybrid,
    number_text,
    private_key,
    public_key,
    public_members,
)
from encfs.keys.secrets import KEK_SIZE, SymmetricKey
from encfs.strictjson import show_name

#: Characters of a key id.
MAX_KID_SIZE = 256

_MLKEM_PUBLIC_SIZE, _X25519_SIZE, _ED25519_SIZE = 1184, 32, 32
_MLDSA_PUBLIC_SIZE, _MLDSA_SEED_SIZE = 1952, 32
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
_USES: Mapping[str, frozenset[Use]] = {"enc": frozenset({Use.ENCRYPT}), "sig": frozenset({Use.SIGN})}
_OPERATIONS = {
    Use.ENCRYPT: frozenset({"encrypt", "decrypt", "wrapKey", "unwrapKey", "deriveKey", "deriveBits"}),
    Use.SIGN: frozenset({"sign", "verify"}),
}


def public_jwk(key: PublicKey) -> dict[str, str]:
    """The public JWK with its thumbprint as `kid`."""
    return public_members(key.handle) | {"kid": key.kid}


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


def is_unknown_curve(members: object) -> bool:
    """Whether an untrusted `epk` names a curve that this version does not know at all."""
    crv = members.get("crv") if isinstance(members, dict) else None
    return isinstance(crv, str) and crv not in CURVES and crv not in ("X25519", "Ed25519")


def _from_jwk(members: Mapping[str, object]) -> Key:
    if "keys" in members and "kty" not in members:
        raise KeyFileError("is a set of JWKs, not a single key")
    if members.get("kty") == "oct":
        return _symmetric(members)
    handle = _public_handle(members)
    kind = public_key(handle).kind
    uses = _declared_uses(members, CAPABILITIES[kind], _ALGORITHMS[kind])
    public = public_key(handle, uses)
    if not {"d", "priv"} & set(members):
        return public
    private = private_key(_private_handle(kind, members), uses)
    if private.public != public:
        raise KeyFileError("has a private part that does not belong to its public part")
    return private


def _symmetric(members: Mapping[str, object]) -> SymmetricKey:
    _declared_uses(members, _USES["enc"], {"A256KW": Use.ENCRYPT})
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
        uses &= _USES.get(use, frozenset())
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
            return ed25519.Ed25519PublicKey.from_public_bytes(_sized(members, "x", _ED25519_SIZE))
        case "EC" if isinstance(crv, str) and crv in CURVES:
            return point_from_jwk(members, CURVES[crv][1], crv)
        case "OKP" | "EC":
            raise KeyFileError(f"is on the curve {show_name(crv)}, which is not supported")
        case "RSA":
            n, e = _number(members, "n"), _number(members, "e")
            check_rsa_numbers(n, e)
            return rsa.RSAPublicNumbers(e, n).public_key()
        case "AKP" if members.get("alg") == "ML-DSA-65":
            return mldsa.MLDSA65PublicKey.from_public_bytes(_sized(members, "pub", _MLDSA_PUBLIC_SIZE))
        case "AKP" if members.get("alg") == HPKE_ALGORITHM:
            return _hybrid_public(_sized(members, "pub", _MLKEM_PUBLIC_SIZE + _X25519_SIZE))
        case "AKP":
            raise KeyFileError(f"is for the algorithm {show_name(members.get('alg'))}, which is not supported")
        case None:
            raise FormatError("it has no kty")
        case _:
            raise KeyFileError(f"is of the type {show_name(kty)}, which is not supported")


def point_from_jwk(members: Mapping[str, object], curve: ec.EllipticCurve, crv: str) -> ec.EllipticCurvePublicKey:
    """The point of a JWK of an elliptic curve. Raises: FormatError; KeyFileError where it is not on the curve."""
    size = (curve.key_size + 7) // 8
    x, y = _sized(members, "x", size), _sized(members, "y", size)
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + x + y)
    except ValueError:
        raise KeyFileError(f"has a point that is not on the curve {crv}") from None


def _hybrid_public(data: bytes) -> HybridPublic:
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
                return ed25519.Ed25519PrivateKey.from_private_bytes(_sized(members, "d", _ED25519_SIZE))
            case KeyKind.P256 | KeyKind.P384:
                _, curve, size = CURVES[cast(str, members["crv"])]
                return ec.derive_private_key(int.from_bytes(_sized(members, "d", size)), curve)
            case KeyKind.RSA:
                return _rsa_private(members)
            case KeyKind.MLDSA65:
                return mldsa.MLDSA65PrivateKey.from_seed_bytes(_sized(members, "priv", _MLDSA_SEED_SIZE))
            case KeyKind.HYBRID:
                return expand_hybrid(_sized(members, "priv", HYBRID_SEED_SIZE))
    except ValueError:
        pass  # raised below, without the context: it may quote numbers
    raise KeyFileError(problem)


def _rsa_private(members: Mapping[str, object]) -> rsa.RSAPrivateKey:
    if "oth" in members:
        raise KeyFileError("is an RSA key of more than two primes")
    n, e, d, p, q, dp, dq, qi = (_number(members, name) for name in ("n", "e", "d", "p", "q", "dp", "dq", "qi"))
    return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, rsa.RSAPublicNumbers(e, n)).private_key()


def _private_members(handle: PrivateHandle) -> dict[str, str]:
    match handle:
        case x25519.X25519PrivateKey() | ed25519.Ed25519PrivateKey():
            return {"d": b64url_encode(handle.private_bytes_raw())}
        case ec.EllipticCurvePrivateKey():
            return {"d": b64url_encode(handle.private_numbers().private_value.to_bytes((handle.key_size + 7) // 8))}
        case rsa.RSAPrivateKey():
            numbers = handle.private_numbers()
            return {
                "d": number_text(numbers.d),
                "p": number_text(numbers.p),
                "q": number_text(numbers.q),
                "dp": number_text(numbers.dmp1),
                "dq": number_text(numbers.dmq1),
                "qi": number_text(numbers.iqmp),
            }
        case mldsa.MLDSA65PrivateKey():
            return {"priv": b64url_encode(handle.private_bytes_raw())}
        case HybridPrivate():
            return {"priv": b64url_encode(handle.seed)}


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
