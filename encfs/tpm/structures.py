"""The TPM's own byte formats, as far as they must be the same everywhere (TPM 2.0 Library, Part 2): no TPM is needed.

All integers are big-endian. A `TPM2B` is a u16 length and that many bytes. Public areas (TPMT_PUBLIC, 12.2.4):

| type | fields behind type u16, nameAlg u16, objectAttributes u32, authPolicy TPM2B |
|---|---|
| KEYEDHASH | scheme u16 (null), unique TPM2B |
| ECC | symmetric, scheme, curve u16, kdf u16 (null), x TPM2B, y TPM2B |
| RSA | symmetric, scheme, keyBits u16, exponent u32 (0 is 65537), n TPM2B |

Every object of this project is made from one of the templates below, so one that was read is checked by building the
same area again, never by taking it apart.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from encfs.errors import FormatError

#: TPM2_ALG of the banks of platform configuration registers (PCRs) that are accepted. SHA-1 is not.
BANKS = {"sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
#: PCRs of a TPM for PCs.
PCR_COUNT = 24

#: The hash of names and policies of all objects here.
DIGEST_SIZE = 32

_ALG_RSA, _ALG_AES, _ALG_KEYEDHASH, _ALG_SHA256 = 0x0001, 0x0006, 0x0008, 0x000B
_ALG_NULL, _ALG_RSASSA, _ALG_OAEP, _ALG_ECDSA, _ALG_ECC, _ALG_CFB = 0x0010, 0x0014, 0x0017, 0x0018, 0x0023, 0x0043
_CURVE_P256, _CURVE_P384 = 0x0003, 0x0004

#: Private keys that are made in a TPM, by their curve (TPM2_ECC_CURVE) or the bits of their modulus.
RESIDENT_CURVES: Mapping[str, tuple[int, ec.EllipticCurve]] = {
    "p256": (_CURVE_P256, ec.SECP256R1()),
    "p384": (_CURVE_P384, ec.SECP384R1()),
}
RESIDENT_MODULI: Mapping[str, int] = {"rsa2048": 2048, "rsa3072": 3072}
RESIDENT_KINDS = (*RESIDENT_CURVES, *RESIDENT_MODULI)

# TPMA_OBJECT (8.3).
_FIXED = 0x02 | 0x10  # fixedTPM, fixedParent: never leaves this TPM
_ORIGIN = 0x20  # sensitiveDataOrigin: made by the TPM
_USER_AUTH, _ADMIN_POLICY, _NO_DA = 0x40, 0x80, 0x400
_RESTRICTED, _DECRYPT, _SIGN = 0x10000, 0x20000, 0x40000

# noDA: these have no password to guess, and a TPM in lockout still opens them.
SEALED_ATTRIBUTES = _FIXED | _ADMIN_POLICY | _NO_DA
KEY_ATTRIBUTES = _FIXED | _ORIGIN | _ADMIN_POLICY | _NO_DA | _DECRYPT
STORAGE_ATTRIBUTES = _FIXED | _ORIGIN | _USER_AUTH | _NO_DA | _RESTRICTED | _DECRYPT
#: What a storage root key that somebody else made must have set at least.
STORAGE_ATTRIBUTES_NEEDED = _FIXED | _ORIGIN | _RESTRICTED | _DECRYPT
ATTESTATION_ATTRIBUTES = _FIXED | _ORIGIN | _USER_AUTH | _NO_DA | _RESTRICTED | _SIGN
# Without adminWithPolicy: it is certified by its (empty) password, and used by its policy.
TRANSPORT_ATTRIBUTES = _FIXED | _ORIGIN | _NO_DA | _DECRYPT
_AUTHORIZER_ATTRIBUTES = _USER_AUTH | _SIGN

_NONE = struct.pack(">H", _ALG_NULL)
_AES_128_CFB = struct.pack(">HHH", _ALG_AES, 128, _ALG_CFB)
_OAEP_SHA256 = struct.pack(">HH", _ALG_OAEP, _ALG_SHA256)
_ECDSA_SHA256 = struct.pack(">HH", _ALG_ECDSA, _ALG_SHA256)
_RSASSA_SHA256 = struct.pack(">HH", _ALG_RSASSA, _ALG_SHA256)


def sized(data: bytes) -> bytes:
    """A TPM2B."""
    return struct.pack(">H", len(data)) + data


def object_name(public: bytes) -> bytes:
    """The name of an object: nameAlg (SHA-256) and the hash of its public area (Part 1, 16)."""
    return struct.pack(">H", _ALG_SHA256) + hashlib.sha256(public).digest()


def pcr_selection(bank: str, indices: Iterable[int]) -> bytes:
    """A TPML_PCR_SELECTION of one bank."""
    bits = sum(1 << index for index in indices)
    return struct.pack(">IHB", 1, BANKS[bank], 3) + bits.to_bytes(3, "little")


# -- templates: a public area with the policy given and nothing unique in it, or with what is unique about it


def storage_root() -> bytes:
    """The template of the storage root key (SRK): ECC P-256, as the TCG's provisioning guidance has it."""
    return _ecc(STORAGE_ATTRIBUTES, b"", _AES_128_CFB, _NONE, bytes(32), bytes(32))


def sealed_data(policy: bytes, unique: bytes = b"") -> bytes:
    """Data that opens only under `policy` (a digest)."""
    return _head(_ALG_KEYEDHASH, SEALED_ATTRIBUTES, policy) + _NONE + sized(unique)


def resident_key(kind: str, policy: bytes, *unique: bytes) -> bytes:
    """A key that is used only under `policy`: for ECDH, or for RSA-OAEP with SHA-256. `unique` is x and y, or n."""
    if kind in RESIDENT_CURVES:
        x, y = unique or (b"", b"")
        return _ecc(KEY_ATTRIBUTES, policy, _NONE, _NONE, x, y, RESIDENT_CURVES[kind][0])
    (n,) = unique or (b"",)
    return _rsa(KEY_ATTRIBUTES, policy, _OAEP_SHA256, RESIDENT_MODULI[kind], n)


def attestation_key(n: bytes = b"") -> bytes:
    """An RSA-2048 key that signs (RSASSA, SHA-256) only what the TPM itself states."""
    return _rsa(ATTESTATION_ATTRIBUTES, b"", _RSASSA_SHA256, 2048, n)


def transport_key(policy: bytes, n: bytes) -> bytes:
    """An RSA-2048 key that is used only under `policy`, with the scheme that each use names. `n` may be random."""
    return _rsa(TRANSPORT_ATTRIBUTES, policy, _NONE, 2048, n)


def authorizer(key: ec.EllipticCurvePublicKey) -> bytes:
    """Somebody's P-256 key whose ECDSA signatures approve policies."""
    numbers = key.public_numbers()
    x, y = numbers.x.to_bytes(32), numbers.y.to_bytes(32)
    return _ecc(_AUTHORIZER_ATTRIBUTES, b"", _NONE, _ECDSA_SHA256, x, y)


def unique_of_sealed(public: bytes) -> bytes:
    """What `sealed_data` made of it. Raises: FormatError."""
    return _last_fields(public, 1, len(sealed_data(bytes(DIGEST_SIZE))) - 2)[0]


def modulus_of_rsa(public: bytes, template: bytes) -> bytes:
    """n of an area made from `template`, one of the RSA templates (big-endian). Raises: FormatError."""
    return _last_fields(public, 1, len(template) - 2)[0]


def resident_public_key(public: bytes, policy: bytes) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The key whose area this is: of some kind of `resident_key`, under `policy`. Raises: FormatError."""
    for kind in RESIDENT_KINDS:
        count = 2 if kind in RESIDENT_CURVES else 1
        try:
            unique = _last_fields(public, count, len(resident_key(kind, policy)) - 2 * count)
        except FormatError:
            continue
        if resident_key(kind, policy, *unique) == public:
            return rsa_public_key(unique[0]) if count == 1 else _point(unique, RESIDENT_CURVES[kind][1])
    raise FormatError("the policy is not that of the key, or the key is of another kind")


def _point(coordinates: Sequence[bytes], curve: ec.EllipticCurve) -> ec.EllipticCurvePublicKey:
    x, y = map(int.from_bytes, coordinates)
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise FormatError("a point is not on its curve") from None


def rsa_public_key(n: bytes) -> rsa.RSAPublicKey:
    """Raises: FormatError."""
    try:
        return rsa.RSAPublicNumbers(65537, int.from_bytes(n)).public_key()
    except ValueError:
        raise FormatError("an RSA modulus is malformed") from None


def _head(kind: int, attributes: int, policy: bytes) -> bytes:
    return struct.pack(">HHI", kind, _ALG_SHA256, attributes) + sized(policy)


def _ecc(
    attributes: int, policy: bytes, symmetric: bytes, scheme: bytes, x: bytes, y: bytes, curve: int = _CURVE_P256
) -> bytes:
    parameters = symmetric + scheme + struct.pack(">H", curve) + _NONE
    return _head(_ALG_ECC, attributes, policy) + parameters + sized(x) + sized(y)


def _rsa(attributes: int, policy: bytes, scheme: bytes, bits: int, n: bytes) -> bytes:
    return _head(_ALG_RSA, attributes, policy) + _NONE + scheme + struct.pack(">HI", bits, 0) + sized(n)


def _last_fields(public: bytes, count: int, offset: int) -> list[bytes]:
    """The TPM2Bs that an area ends with, exactly `count` of them from `offset` on."""
    fields = []
    for _ in range(count):
        if offset + 2 > len(public):
            break
        (size,) = struct.unpack_from(">H", public, offset)
        fields.append(public[offset + 2 : offset + 2 + size])
        offset += 2 + size
    if len(fields) != count or offset != len(public):
        raise FormatError("a TPM public area is truncated or has something behind it")
    return fields
