"""PKCS #7 and OpenPGP of ocicrypt: what is written comes back, and damage gives one of our errors."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from encfs.errors import FormatError, KeyFileError, WrongKeyError
from imagetool.ocicrypt import pgp, pkcs7
from imagetool.ocicrypt.keyfiles import Certificate, load_private, load_public
from imagetool.ocicrypt.keys import parse_opener, parse_recipient
from imagetool.ocicrypt.options import Element
from tests.support.container_images import make_certificate, make_key

CONTENT = b'{"symkey":"x"}'


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate")).public


@pytest.fixture(scope="module")
def key(certificate: Path) -> rsa.RSAPrivateKey:
    key = load_private(certificate.with_suffix(".key"))
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


@pytest.fixture(scope="module")
def message(certificate: Path) -> bytes:
    loaded = load_public(certificate)
    assert isinstance(loaded, Certificate)
    return pkcs7.encrypt(CONTENT, loaded)


def test_there_and_back(message: bytes, key: rsa.RSAPrivateKey) -> None:
    assert pkcs7.decrypt(message, key, "it") == CONTENT
    (described,) = pkcs7.describe(message)
    assert described.startswith("issuer 'CN=holder' serial ")


def test_another_key_opens_nothing(message: bytes) -> None:
    with pytest.raises(WrongKeyError, match="it opens none of the PKCS #7 recipients"):
        pkcs7.decrypt(message, rsa.generate_private_key(65537, 2048), "it")


@given(noise=st.binary(max_size=64), position=st.integers(0, 10**4))
def test_damage_is_found(message: bytes, key: rsa.RSAPrivateKey, noise: bytes, position: int) -> None:
    content = bytearray(message)
    at = position % len(content)
    content[at : at + len(noise)] = noise
    try:
        found = pkcs7.decrypt(bytes(content), key, "it")
    except (FormatError, WrongKeyError):
        return
    # Issuer, serial number and the outer content type are not authenticated by anything.
    assert found == CONTENT


def test_openssl_sees_its_outside(message: bytes, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (tmp_path / "message").write_bytes(message)
    words = ("openssl", "asn1parse", "-inform", "DER", "-in", str(tmp_path / "message"))
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for name in (":pkcs7-envelopedData", ":rsaEncryption", ":pkcs7-data", ":aes-256-gcm"):
        assert name in text


def test_files_choose_their_scheme(certificate: Path, tmp_path: Path) -> None:
    ec = make_key(tmp_path, "p256")
    assert parse_recipient(str(certificate)).scheme == "pkcs7"
    assert parse_recipient(f"pkcs7:{certificate}").scheme == "pkcs7"
    assert parse_recipient(str(ec.public)).scheme == "jwe"
    assert parse_opener(str(certificate.with_suffix(".key"))).handles("pkcs7")
    assert not parse_opener(str(ec.private)).handles("pkcs7")
    for text, problem in (
        (f"jwe:{certificate}", "is a certificate"),
        (f"pkcs7:{ec.public}", "is no certificate"),
        ("pgp:", "names nothing"),
        ("jwe:", "names nothing"),
    ):
        with pytest.raises(KeyFileError, match=problem):
            parse_recipient(text)
    with pytest.raises(KeyFileError, match="followed by something"):
        parse_opener("pgp:alice")
    with pytest.raises(FormatError, match="PKCS #7 message is malformed"):
        parse_opener(str(certificate.with_suffix(".key"))).unwrap(Element("pkcs7", b"\x30\x00"))


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (b"\x85\x01\x0c", "0102030405060708"),
        (b"\xc1\x5e", "0102030405060708"),
        (b"\xc1\xc0\x20", "0102030405060708"),
    ],
)
def test_key_ids_of_openpgp(header: bytes, ids: str) -> None:
    size = {b"\x85": 0x10C, b"\xc1": 0x5E if len(header) == 2 else 192 + 0x20}[header[:1]]
    packet = header + b"\x03" + bytes.fromhex(ids) + b"\x01" + bytes(size - 10)
    assert pgp.describe(packet + b"\xd2\xff" + bytes(50)) == [f"keys {ids}"]
    assert pgp.describe(packet + packet + b"\xd2\x01x") == [f"keys {ids}, {ids}"]


def test_malformed_openpgp() -> None:
    for content in (b"", b"\x00", b"\xc1", b"\xc1\x03\x03ab", b"hello", b"\x84\x02\x04\x01"):
        with pytest.raises(FormatError):
            pgp.describe(content)
    numbers = random.Random(3)
    for _ in range(2000):
        try:
            pgp.describe(bytes((numbers.choice((0x84, 0x85, 0xC1)),)) + numbers.randbytes(numbers.randrange(40)))
        except FormatError:
            continue
