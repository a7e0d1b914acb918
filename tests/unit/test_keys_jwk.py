"""Keys and their JSON form: known answers, round trips, agreement with jwcrypto, and everything that is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import traceback
from collections.abc import Callable, Mapping

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from encfs.encoding import b64url_encode
from encfs.errors import EncfsError, KeyFileError
from encfs.keys.jwk import (
    GENERATED_TYPES,
    HPKE_ALGORITHM,
    KeyKind,
    PrivateKey,
    PublicKey,
    Use,
    expand_hybrid,
    generate_key,
    private_key,
    public_key,
)
from encfs.keys.jwkjson import key_from_jwk, private_jwk, public_jwk
from encfs.keys.secrets import SymmetricKey
from tests.support.jose import JWK
from tests.support.keys import ENCRYPTING, SIGNING, key, private, public

STANDARD = ("x25519", "p256", "p384", "rsa3072", "ed25519", "mldsa65")

# RFC 7638, section 3.1.
RSA_N = (
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn6"
    "4tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n9"
    "1CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
)


def parse_public(members: Mapping[str, object]) -> PublicKey:
    parsed = key_from_jwk(members)
    assert isinstance(parsed, PublicKey)
    return parsed


def test_thumbprint_of_rfc_7638() -> None:
    parsed = parse_public({"kty": "RSA", "n": RSA_N, "e": "AQAB", "alg": "RSA-OAEP-256", "kid": "2011-04-29"})
    assert parsed.kid == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_key_and_signature_of_rfc_8037() -> None:
    """Appendix A.1 to A.4: key, thumbprint and signature."""
    parsed = key_from_jwk(
        {
            "kty": "OKP",
            "crv": "Ed25519",
            "d": "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A",
            "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        }
    )
    assert isinstance(parsed, PrivateKey)
    assert parsed.kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    message = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
    signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
    assert b64url_encode(parsed.sign(message)) == signature


def test_hybrid_key_of_the_x_wing_draft() -> None:
    """draft-connolly-cfrg-xwing-kem, appendix C, first vector: seed and public key (both ends, and a digest of all)."""
    seed = bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26")
    data = expand_hybrid(seed).public_key().to_bytes()
    assert data[:32].hex() == "e2236b35a8c24b39b10aa1323a96a919a2ced88400633a7b07131713fc14b2b5"
    assert data[-32:].hex() == "859edb06eff389b27dce59844570216223593d4ba32d9abac8cd049040ef6534"
    assert hashlib.sha256(data).hexdigest() == "2e816deebcd76c5c80d0cd2d174478871658e8e2ff42bc9d4a6e486372e856bb"


@pytest.mark.parametrize("kind", GENERATED_TYPES)
def test_round_trip(kind: str) -> None:
    made = key(kind)
    back = key_from_jwk(private_jwk(made))
    if isinstance(made, SymmetricKey):
        assert isinstance(back, SymmetricKey)
        assert (back.secret, back.kid) == (made.secret, made.kid)
        return
    assert isinstance(back, PrivateKey)
    assert back.public == made.public
    assert private_jwk(back) == private_jwk(made)
    assert parse_public(dict(public_jwk(made.public))) == made.public
    assert not {"d", "p", "q", "dp", "dq", "qi", "priv", "k"} & set(public_jwk(made.public))


@pytest.mark.parametrize("kind", STANDARD)
def test_jwcrypto_reads_ours(kind: str) -> None:
    theirs = JWK(**private_jwk(private(kind)))
    assert theirs.thumbprint() == public(kind).kid
    assert theirs.has_private


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (KeyKind.X25519, {"kty": "OKP", "crv": "X25519"}),
        (KeyKind.ED25519, {"kty": "OKP", "crv": "Ed25519"}),
        (KeyKind.P256, {"kty": "EC", "crv": "P-256"}),
        (KeyKind.P384, {"kty": "EC", "crv": "P-384"}),
        (KeyKind.RSA, {"kty": "RSA", "size": 2048}),
        (KeyKind.MLDSA65, {"kty": "AKP", "alg": "ML-DSA-65"}),
    ],
)
def test_we_read_jwcrypto_keys(kind: KeyKind, parameters: dict[str, str | int]) -> None:
    theirs = JWK(generate=parameters["kty"], **{name: value for name, value in parameters.items() if name != "kty"})
    ours = key_from_jwk(json.loads(theirs.export_private()))
    assert isinstance(ours, PrivateKey)
    assert (ours.kind, ours.kid) == (kind, theirs.thumbprint())
    assert parse_public(json.loads(theirs.export_public())) == ours.public


def test_symmetric_keys_do_not_publish_a_hash_of_themselves() -> None:
    made, again = generate_key("oct"), generate_key("oct")
    assert isinstance(made, SymmetricKey)
    assert isinstance(again, SymmetricKey)
    assert made.kid is not None
    assert made.kid != again.kid
    assert made.kid != b64url_encode(hashlib.sha256(made.secret).digest())
    without = key_from_jwk({"kty": "oct", "k": b64url_encode(made.secret)})
    assert isinstance(without, SymmetricKey)
    assert without.kid is None


@pytest.mark.parametrize("kind", GENERATED_TYPES)
def test_secrets_are_not_shown(kind: str) -> None:
    made = key(kind)
    shown = repr(made) + str(made)
    for name, value in private_jwk(made).items():
        if name in {"d", "p", "q", "dp", "dq", "qi", "priv", "k"}:
            raw = base64.urlsafe_b64decode(value + "==")
            assert value not in shown
            assert raw.hex() not in shown
            assert repr(raw)[2:20] not in shown


@pytest.mark.parametrize("kind", GENERATED_TYPES)
def test_uses(kind: str) -> None:
    made = key(kind)
    if isinstance(made, SymmetricKey):
        return
    for use, kinds in ((Use.ENCRYPT, ENCRYPTING), (Use.SIGN, SIGNING)):
        if kind in kinds:
            made.require(use, "it")
        else:
            with pytest.raises(KeyFileError, match=f"FILE is of type .*, which cannot {use.value}; give a key of type"):
                made.require(use, "FILE")


@pytest.mark.parametrize(
    ("kind", "declared", "uses"),
    [
        ("p256", {}, {Use.ENCRYPT, Use.SIGN}),
        ("p256", {"use": "sig"}, {Use.SIGN}),
        ("p256", {"use": "enc"}, {Use.ENCRYPT}),
        ("p256", {"key_ops": ["verify"]}, {Use.SIGN}),
        ("p256", {"key_ops": ["deriveBits"]}, {Use.ENCRYPT}),
        ("p256", {"key_ops": []}, {Use.ENCRYPT, Use.SIGN}),
        ("p256", {"alg": "ES256"}, {Use.SIGN}),
        ("p256", {"alg": "ECDH-ES+A256KW"}, {Use.ENCRYPT}),
        ("rsa3072", {"use": "enc", "alg": "RSA-OAEP-256", "key_ops": ["wrapKey", "unwrapKey"]}, {Use.ENCRYPT}),
        ("ed25519", {"alg": "Ed25519"}, {Use.SIGN}),
        ("ed25519", {"alg": "EdDSA", "use": "sig"}, {Use.SIGN}),
    ],
)
def test_declared_uses(kind: str, declared: dict[str, object], uses: set[Use]) -> None:
    parsed = parse_public(public_jwk(public(kind)) | declared)
    assert parsed.uses == uses
    narrowed = key_from_jwk(private_jwk(private(kind)) | declared)
    assert isinstance(narrowed, PrivateKey)
    if Use.SIGN not in uses:
        with pytest.raises(KeyFileError, match="sign"):
            narrowed.sign(b"message")


def test_a_narrowed_key_says_why_it_is_refused() -> None:
    parsed = parse_public(public_jwk(public("p256")) | {"use": "sig"})
    with pytest.raises(KeyFileError, match=r"FILE is of type p256, but its JWK does not allow it to encrypt"):
        parsed.require(Use.ENCRYPT, "FILE")


@pytest.mark.parametrize(
    ("kind", "declared"),
    [
        ("x25519", {"use": "sig"}),
        ("ed25519", {"use": "enc"}),
        ("p256", {"use": "enc", "alg": "ES256"}),
        ("p256", {"use": "sig", "key_ops": ["deriveKey"]}),
        ("p256", {"use": "tls"}),
        ("x25519", {"key_ops": ["sign"]}),
        ("p256", {"key_ops": ["frobnicate"]}),
    ],
)
def test_contradicting_uses(kind: str, declared: dict[str, object]) -> None:
    with pytest.raises(KeyFileError, match="contradict"):
        key_from_jwk(public_jwk(public(kind)) | declared)


@pytest.mark.parametrize(
    ("kind", "alg"),
    [
        ("rsa3072", "RSA-OAEP"),
        ("rsa3072", "RSA1_5"),
        ("rsa3072", "RS256"),
        ("p256", "ECDH-ES"),
        ("p256", "ECDH-ES+A128KW"),
        ("p384", "ES384"),
        ("oct", "A128KW"),
        ("oct", "dir"),
        ("oct", "HS256"),
    ],
)
def test_other_algorithms(kind: str, alg: str) -> None:
    with pytest.raises(KeyFileError, match=f"meant for the algorithm '{alg}'".replace("+", r"\+")):
        key_from_jwk(private_jwk(key(kind)) | {"alg": alg})


def _without(members: dict[str, str], name: str) -> dict[str, object]:
    return {other: value for other, value in members.items() if other != name}


_zero = b64url_encode(bytes(32))
_p25519 = 2**255 - 19


def _le(number: int) -> str:
    return b64url_encode(number.to_bytes(32, "little"))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no kty"),
        ({"kty": "DSA"}, "type 'DSA'"),
        ({"kty": 5}, "type 5"),
        ({"kty": ["oct"]}, "not supported"),
        ({"keys": []}, "set of JWKs"),
        ({"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"}, "curve 'P-521'"),
        ({"kty": "EC", "crv": "secp256k1"}, "curve 'secp256k1'"),
        ({"kty": "EC", "crv": ["P-256"]}, "not supported"),
        ({"kty": "EC"}, "curve None"),
        ({"kty": "OKP", "crv": "Ed448", "x": "AA"}, "curve 'Ed448'"),
        ({"kty": "OKP", "crv": "X25519"}, "x is not canonical base64url"),
        ({"kty": "OKP", "crv": "X25519", "x": "AAAA"}, "x is 3 bytes, not 32"),
        ({"kty": "OKP", "crv": "X25519", "x": _zero + "="}, "x is not canonical base64url"),
        ({"kty": "OKP", "crv": "X25519", "x": 3}, "x is not canonical base64url"),
        ({"kty": "EC", "crv": "P-256", "x": _zero, "y": _zero}, "not on the curve"),
        ({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}, "algorithm 'ML-DSA-44'"),
        ({"kty": "AKP", "pub": "AA"}, "algorithm None"),
        ({"kty": "AKP", "alg": "ML-DSA-65", "pub": "AA"}, "pub is 1 bytes"),
        ({"kty": "AKP", "alg": HPKE_ALGORITHM, "pub": "AA"}, "pub is 1 bytes"),
        ({"kty": "AKP", "alg": HPKE_ALGORITHM, "pub": b64url_encode(b"\xff" * 1216)}, "invalid ML-KEM-768"),
        ({"kty": "oct"}, "k is not canonical"),
        ({"kty": "oct", "k": b64url_encode(bytes(31))}, "31 bytes; 32 are needed"),
        ({"kty": "oct", "k": b64url_encode(bytes(33))}, "33 bytes; 32 are needed"),
        ({"kty": "oct", "k": _zero, "kid": ""}, "kid is not"),
        ({"kty": "oct", "k": _zero, "kid": "a\nb"}, "kid is not"),
        ({"kty": "oct", "k": _zero, "kid": "x" * 257}, "kid is not"),
        ({"kty": "oct", "k": _zero, "kid": 7}, "kid is not"),
        ({"kty": "oct", "k": _zero, "use": "sig"}, "contradict"),
        ({"kty": "oct", "k": _zero, "use": 1}, "use is not a string"),
        ({"kty": "oct", "k": _zero, "key_ops": "wrapKey"}, "key_ops is not a list"),
        ({"kty": "oct", "k": _zero, "key_ops": [1]}, "key_ops is not a list"),
        ({"kty": "oct", "k": _zero, "alg": 1}, "alg is not a string"),
        ({"kty": "RSA", "n": RSA_N, "e": "Aw"}, "exponent other than 65537"),
        ({"kty": "RSA", "n": RSA_N, "e": "AQ"}, "exponent other than 65537"),
        ({"kty": "RSA", "n": RSA_N, "e": "AAEAAQ"}, "e is not a canonical number"),
        ({"kty": "RSA", "n": "", "e": "AQAB"}, "n is not a canonical number"),
        ({"kty": "RSA", "n": b64url_encode(b"\xff" * 255), "e": "AQAB"}, "2040 bits; 2048 to 8192"),
        ({"kty": "RSA", "n": b64url_encode(b"\xff" * 1025), "e": "AQAB"}, "8200 bits; 2048 to 8192"),
        ({"kty": "RSA", "n": b64url_encode(b"\xff" * 255 + b"\xfe"), "e": "AQAB"}, "even modulus"),
    ],
)
def test_refused(members: dict[str, object], reason: str) -> None:
    with pytest.raises(KeyFileError, match=reason) as caught:
        key_from_jwk(members)
    assert "\n" not in str(caught.value)


def _edwards_multiple(count: int, y: int) -> tuple[int, int]:
    """count * P on edwards25519 in affine coordinates, P the point with this y: to prove the constants of the code."""
    p = _p25519
    d = -121665 * pow(121666, -1, p) % p
    square = (y * y - 1) * pow(d * y * y + 1, -1, p) % p
    x = pow(square, (p + 3) // 8, p)
    if (x * x - square) % p:
        x = x * pow(2, (p - 1) // 4, p) % p
    assert (x * x - square) % p == 0
    total = (0, 1)
    for _ in range(count):
        (x1, y1), (x2, y2) = total, (x, y)
        t = d * x1 * x2 * y1 * y2 % p
        total = (
            (x1 * y2 + y1 * x2) * pow(1 + t, -1, p) % p,
            (y1 * y2 + x1 * x2) * pow(1 - t, -1, p) % p,
        )
    return total


def test_ed25519_points_of_small_order() -> None:
    from encfs.keys.jwk import _ED25519_SMALL_ORDER

    assert len(_ED25519_SMALL_ORDER) == 5
    for y in _ED25519_SMALL_ORDER:
        assert _edwards_multiple(8, y) == (0, 1)
        for encoded in (y, y | 1 << 255):
            with pytest.raises(KeyFileError, match="small order"):
                key_from_jwk({"kty": "OKP", "crv": "Ed25519", "x": _le(encoded)})
    with pytest.raises(KeyFileError, match="not a canonical Ed25519"):
        key_from_jwk({"kty": "OKP", "crv": "Ed25519", "x": _le(_p25519 + 1)})


# RFC 7748 and the well-known list of u-coordinates of order 1, 2, 4 and 8 on the curve and its twist.
@pytest.mark.parametrize(
    "u",
    [
        0,
        1,
        _p25519 - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    ],
)
def test_x25519_points_of_small_order(u: int) -> None:
    with pytest.raises(KeyFileError, match="small order"):
        key_from_jwk({"kty": "OKP", "crv": "X25519", "x": _le(u)})
    hybrid = base64.urlsafe_b64decode(public_jwk(public("mlkem768x25519"))["pub"] + "==")[:1184]
    with pytest.raises(KeyFileError, match="small order"):
        key_from_jwk({"kty": "AKP", "alg": HPKE_ALGORITHM, "pub": b64url_encode(hybrid + u.to_bytes(32, "little"))})


@pytest.mark.parametrize("u", [_p25519, _p25519 + 5, 2**255 - 1, 2**255 + 9])
def test_x25519_not_canonical(u: int) -> None:
    with pytest.raises(KeyFileError, match="not a canonical X25519"):
        key_from_jwk({"kty": "OKP", "crv": "X25519", "x": _le(u)})


@pytest.mark.parametrize("kind", [kind for kind in GENERATED_TYPES if kind != "oct"])
def test_private_part_of_another_key(kind: str) -> None:
    mixed = private_jwk(private(kind)) | public_jwk(public(kind, 1))
    with pytest.raises(KeyFileError, match="private part"):
        key_from_jwk(mixed)


@pytest.mark.parametrize("kind", [kind for kind in GENERATED_TYPES if kind != "oct"])
def test_missing_and_shortened_members(kind: str) -> None:
    members = private_jwk(private(kind))
    secret = {"d", "priv"} & set(members)
    for name in set(members) - {"kid"} - secret - ({"alg"} if kind in STANDARD and kind != "mldsa65" else set()):
        with pytest.raises(KeyFileError):
            key_from_jwk(_without(members, name))
    for name in set(members) - {"kid", "kty", "crv", "alg"}:
        with pytest.raises(KeyFileError):
            key_from_jwk({**members, name: members[name][:-4]})


def test_rsa_private_parts() -> None:
    members = private_jwk(private("rsa3072"))
    with pytest.raises(KeyFileError, match="more than two primes"):
        key_from_jwk({**members, "oth": []})
    with pytest.raises(KeyFileError, match="invalid private part"):
        key_from_jwk({**members, "p": members["q"]})
    with pytest.raises(KeyFileError, match="invalid private part"):
        key_from_jwk({**members, "d": "AQAB"})


@pytest.mark.parametrize("d", [0, 2**256 - 1])
def test_p256_private_out_of_range(d: int) -> None:
    members = private_jwk(private("p256")) | {"d": b64url_encode(d.to_bytes(32))}
    with pytest.raises(KeyFileError, match="invalid private part"):
        key_from_jwk(members)


def test_library_keys_are_checked() -> None:
    with pytest.raises(KeyFileError, match="exponent"):
        private_key(rsa.generate_private_key(3, 2048))
    with pytest.raises(KeyFileError, match="1024 bits"):
        private_key(rsa.generate_private_key(65537, 1024))  # noqa: S505 (too small on purpose)
    with pytest.raises(KeyFileError, match="curve secp521r1"):
        private_key(ec.generate_private_key(ec.SECP521R1()))
    assert public_key(ed25519.Ed25519PrivateKey.generate().public_key()).uses == {Use.SIGN}
    assert public_key(x25519.X25519PrivateKey.generate().public_key()).uses == {Use.ENCRYPT}


def test_unknown_type() -> None:
    with pytest.raises(KeyFileError, match="unknown key type 'rsa1024'; types are x25519, p256"):
        generate_key("rsa1024")


@given(st.data())
def test_any_changed_member_is_refused_or_another_key(data: st.DataObject) -> None:
    """One member replaced by anything: never a crash, and never a private key that does not match its public part."""
    kind = data.draw(st.sampled_from([kind for kind in GENERATED_TYPES if kind != "rsa3072"]))
    members: dict[str, object] = dict(private_jwk(key(kind)))
    name = data.draw(st.sampled_from(sorted(members)))
    anything = st.none() | st.booleans() | st.integers() | st.text(max_size=60) | st.lists(st.text(max_size=3))
    members[name] = data.draw(
        anything | st.binary(max_size=70).map(b64url_encode) | st.dictionaries(st.text(), anything)
    )
    try:
        parsed = key_from_jwk(members)
    except KeyFileError:
        return
    if isinstance(parsed, PrivateKey):
        assert parsed.public.kid == public(kind).kid


@pytest.mark.parametrize("kind", GENERATED_TYPES)
def test_errors_do_not_quote_secrets(kind: str) -> None:
    members = private_jwk(key(kind))
    for name in {"d", "p", "priv", "k"} & set(members):
        broken = members[name][:-3] + "!" + members[name][-2:]
        try:
            key_from_jwk({**members, name: broken})
        except EncfsError as error:
            text = "".join(traceback.format_exception(error))
            assert members[name][:12] not in text
        else:
            pytest.fail("accepted")


_CALLS: list[tuple[str, Callable[[PrivateKey], object]]] = [
    ("x25519", lambda made: made.decrypt_oaep(b"")),
    ("rsa3072", lambda made: made.decrypt_hpke(b"", b"")),
    ("x25519", lambda made: made.public.encrypt_oaep(b"")),
    ("rsa3072", lambda made: made.public.encrypt_hpke(b"", b"")),
]


@pytest.mark.parametrize(("kind", "call"), _CALLS)
def test_operations_of_another_kind(kind: str, call: Callable[[PrivateKey], object]) -> None:
    with pytest.raises(TypeError):
        call(private(kind))
    with pytest.raises(ValueError, match="different kinds"):
        private(kind).exchange(public("p384"))
    assert not public(kind).verify(b"signature", b"message")
