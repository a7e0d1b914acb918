"""JWE of ocicrypt: jwcrypto opens what is written, and what it writes in every accepted algorithm is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK

from encfs.encoding import b64url_encode
from encfs.errors import EncfsError, FormatError, IntegrityError, KeyFileError, UsageError, WrongKeyError
from encfs.keys.secrets import SymmetricKey
from imagetool.ocicrypt import jwe
from imagetool.ocicrypt.keyfiles import PublicFile, load_private, load_public

CONTENT = b'{"symkey":"x"}'
ECDH = ("ECDH-ES+A256KW", "ECDH-ES+A192KW", "ECDH-ES+A128KW")
OAEP = ("RSA-OAEP", "RSA-OAEP-256")
ENC = ("A256GCM", "A192GCM", "A128GCM", "A128CBC-HS256", "A192CBC-HS384", "A256CBC-HS512")
RSA = rsa.generate_private_key(65537, 2048)
EC = {
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
}
ALGORITHMS = [*((name, RSA) for name in OAEP), *((name, key) for name in ECDH for key in EC.values())]


def foreign(key: jwe.JwePrivateKey) -> JWK:
    return JWK.from_pem(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def theirs(recipients: list[tuple[str, jwe.JwePrivateKey]], enc: str = "A256GCM") -> bytes:
    token = JWE(CONTENT, protected=json.dumps({"enc": enc}), algs=[*OAEP, *ECDH, *ENC])
    for algorithm, key in recipients:
        token.add_recipient(foreign(key), json.dumps({"alg": algorithm}))
    return str(token.serialize()).encode()


@pytest.mark.parametrize(("algorithm", "key"), ALGORITHMS)
def test_jwcrypto_opens_what_is_written(algorithm: str, key: jwe.JwePrivateKey) -> None:
    content = jwe.encrypt(CONTENT, key.public_key(), algorithm)
    token = JWE(algs=[algorithm, "A256GCM"])
    token.deserialize(content.decode(), foreign(key))
    assert token.payload == CONTENT
    assert jwe.decrypt(jwe.parse(content), key, "it") == CONTENT


@pytest.mark.parametrize(("algorithm", "key"), ALGORITHMS)
def test_what_jwcrypto_writes_is_opened(algorithm: str, key: jwe.JwePrivateKey) -> None:
    assert jwe.decrypt(jwe.parse(theirs([(algorithm, key)])), key, "it") == CONTENT


@pytest.mark.parametrize("enc", ENC)
@pytest.mark.parametrize("key", [RSA, EC["P-384"]], ids=["rsa", "ec"])
def test_every_content_encryption_of_general_serialisation(enc: str, key: jwe.JwePrivateKey) -> None:
    others = [("RSA-OAEP-256", rsa.generate_private_key(65537, 2048)), ("ECDH-ES+A128KW", EC["P-521"])]
    own = "RSA-OAEP" if key is RSA else "ECDH-ES+A192KW"
    parsed = jwe.parse(theirs([*others, (own, key)], enc))
    assert len(parsed.recipients) == 3
    assert jwe.decrypt(parsed, key, "it") == CONTENT


def test_defaults_are_what_ocicrypt_rs_knows() -> None:
    assert jwe.parse(jwe.encrypt(CONTENT, RSA.public_key())).recipients[0].alg == "RSA-OAEP"
    assert jwe.parse(jwe.encrypt(CONTENT, EC["P-256"].public_key())).recipients[0].alg == "ECDH-ES+A256KW"
    with pytest.raises(UsageError, match="does not fit"):
        jwe.encrypt(CONTENT, RSA.public_key(), "ECDH-ES+A256KW")
    with pytest.raises(UsageError, match="secp256k1"):
        jwe.encrypt(CONTENT, ec.generate_private_key(ec.SECP256K1()).public_key())


def test_a_recipient_is_taken_out() -> None:
    parsed = jwe.parse(theirs([("RSA-OAEP", RSA), ("ECDH-ES+A256KW", EC["P-256"])]))
    rest = jwe.parse(parsed.without({0}))
    assert jwe.decrypt(rest, EC["P-256"], "it") == CONTENT
    with pytest.raises(WrongKeyError, match="is for RSA-OAEP or RSA-OAEP-256, and the JWE has 'ECDH-ES"):
        jwe.decrypt(rest, RSA, "it")
    with pytest.raises(ValueError, match="no recipient"):
        rest.without({0})


def test_the_first_key_repeated_as_old_go_jose_does() -> None:
    document = json.loads(theirs([("RSA-OAEP", RSA), ("ECDH-ES+A256KW", EC["P-256"])]))
    document["encrypted_key"] = document["recipients"][0]["encrypted_key"]
    parsed = jwe.parse(json.dumps(document).encode())
    assert jwe.decrypt(parsed, EC["P-256"], "it") == CONTENT
    assert "encrypted_key" not in json.loads(parsed.without({0}))
    document["encrypted_key"] = document["recipients"][1]["encrypted_key"]
    with pytest.raises(FormatError, match="neither"):
        jwe.parse(json.dumps(document).encode())


def test_unknown_algorithms_are_passed_over_and_named() -> None:
    document = json.loads(theirs([("RSA-OAEP", RSA), ("ECDH-ES+A256KW", EC["P-256"])]))
    document["recipients"][0]["header"]["alg"] = "RSA1_5"
    parsed = jwe.parse(json.dumps(document).encode())
    assert jwe.decrypt(parsed, EC["P-256"], "it") == CONTENT
    with pytest.raises(WrongKeyError, match="RSA1_5"):
        jwe.decrypt(parsed, RSA, "it")


def _flattened() -> dict[str, Any]:
    document = json.loads(jwe.encrypt(CONTENT, EC["P-256"].public_key()))
    assert isinstance(document, dict)
    return document


def _protected(**members: object) -> str:
    return b64url_encode(json.dumps({"alg": "RSA-OAEP", "enc": "A256GCM"} | members).encode())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"protected": _protected(crit=["exp"])}, "header crit"),
        ({"protected": _protected(zip="DEF")}, "header zip"),
        ({"header": {"crit": ["exp"]}}, "header crit"),
        ({"header": {"enc": "A128GCM"}}, "repeats"),
        ({"protected": _protected(enc="A256CTR")}, "not supported"),
        ({"protected": _protected(enc=None)}, "not supported"),
        ({"protected": b64url_encode(b'{"enc":"A256GCM"}')}, "no alg"),
        ({"protected": b64url_encode(b'{"enc":"A256GCM","enc":"A256GCM"}')}, "repeats"),
        ({"unprotected": {"alg": "RSA-OAEP"}}, "unprotected"),
        ({"more": 1}, "unknown member"),
        ({"iv": b64url_encode(bytes(11))}, "11 and 16 bytes"),
        ({"tag": b64url_encode(bytes(12))}, "12 and 12 bytes"),
        ({"ciphertext": "no base64!"}, "canonical base64url"),
        ({"encrypted_key": 5}, "canonical base64url"),
        ({"recipients": []}, "list of 1 to 64"),
        ({"recipients": [{}] * 65}, "list of 1 to 64"),
        ({"recipients": [{"header": []}]}, "neither|no JSON object"),
    ],
)
def test_malformed_ones_are_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        jwe.parse(json.dumps(_flattened() | change).encode())


@pytest.mark.parametrize(
    "epk",
    [
        None,
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": "P-256", "x": b64url_encode(bytes(32)), "y": b64url_encode(b"\1" * 32)},
        {"kty": "OKP", "crv": "X25519", "x": b64url_encode(bytes(32))},
    ],
)
def test_invalid_points_open_nothing(epk: object) -> None:
    header = {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "epk": epk}
    document = _flattened() | {"protected": b64url_encode(json.dumps(header).encode())}
    with pytest.raises(WrongKeyError):
        jwe.decrypt(jwe.parse(json.dumps(document).encode()), EC["P-256"], "it")


@pytest.mark.parametrize("enc", ["A256GCM", "A128CBC-HS256"])
@pytest.mark.parametrize("member", ["ciphertext", "tag", "iv"])
def test_altered_content_is_found(enc: str, member: str) -> None:
    document = json.loads(theirs([("RSA-OAEP", RSA)], enc))
    text = document[member]
    document[member] = ("B" if text[0] != "B" else "C") + text[1:]
    with pytest.raises(IntegrityError, match="content was altered"):
        jwe.decrypt(jwe.parse(json.dumps(document).encode()), RSA, "it")


@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_nothing_but_our_errors_comes_of_damage(noise: bytes, position: int) -> None:
    content = bytearray(theirs_once)
    at = position % len(content)
    content[at : at + len(noise)] = noise
    try:
        jwe.decrypt(jwe.parse(bytes(content)), RSA, "it")
    except EncfsError:
        pass
    else:
        assert bytes(content) == theirs_once


theirs_once = theirs([("RSA-OAEP", RSA)])


# -- key files


def _write(path: Path, content: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("key", [RSA, EC["P-521"]], ids=["rsa", "p521"])
def test_key_files(
    tmp_path: Path,
    encoding: serialization.Encoding,
    form: serialization.PrivateFormat,
    key: jwe.JwePrivateKey,
) -> None:
    private = _write(tmp_path / "key", key.private_bytes(encoding, form, serialization.NoEncryption()))
    loaded = load_private(private)
    assert not isinstance(loaded, SymmetricKey)
    assert loaded.private_numbers() == key.private_numbers()
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path in (private, _write(tmp_path / "public", public)):
        parsed = load_public(path)
        assert isinstance(parsed, PublicFile)
        assert parsed.key.public_numbers() == key.public_key().public_numbers()


@pytest.mark.parametrize("algorithm", [None, "RSA-OAEP", "RSA-OAEP-256"])
def test_jwks_choose_their_algorithm(tmp_path: Path, algorithm: str | None) -> None:
    members = json.loads(foreign(RSA).export()) | ({"alg": algorithm} if algorithm else {})
    path = _write(tmp_path / "key.jwk", json.dumps(members).encode())
    parsed = load_public(path)
    assert isinstance(parsed, PublicFile)
    assert parsed.algorithm == algorithm
    assert not isinstance(load_private(path), SymmetricKey)


def test_unfit_key_files_are_refused(tmp_path: Path) -> None:
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    private = RSA.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = RSA.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    weak = rsa.generate_private_key(65537, 1024).public_key()  # noqa: S505 -- to be refused
    for name, content, problem in (
        ("public", public, "is a public key"),
        ("locked", locked, "under a passphrase"),
        ("noise", b"\x30\x03abc", "neither a JWK nor"),
        ("empty", b"", "neither a JWK nor"),
        ("json", b"{}", "malformed JWK"),
    ):
        with pytest.raises(KeyFileError, match=problem):
            load_private(_write(tmp_path / name, content))
    short = weak.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(KeyFileError, match="1024 bits"):
        load_public(_write(tmp_path / "weak", short))
    with pytest.raises(KeyFileError, match="symmetric"):
        load_public(_write(tmp_path / "kek", bytes(range(32))))
    open_to_all = _write(tmp_path / "open", private)
    open_to_all.chmod(0o644)
    with pytest.raises(KeyFileError, match="accessible by others"):
        load_private(open_to_all)
