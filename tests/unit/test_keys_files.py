"""Key files: JWK and PEM of every kind, permissions, and what each use refuses."""

from __future__ import annotations

import base64
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from encfs.encoding import b64url_encode
from encfs.errors import ConflictError, EncfsError, KeyFileError, NotFoundError, StorageError
from encfs.keys.files import (
    MAX_KEY_FILE_SIZE,
    load_decryption_key,
    load_recipient_key,
    load_signing_key,
    load_trusted_key,
    parse_kek,
    parse_key,
    write_key_files,
)
from encfs.keys.jwk import GENERATED_TYPES, HybridPrivate, KeyKind, PrivateKey, PublicKey
from encfs.keys.jwkjson import private_jwk, public_jwk
from encfs.keys.secrets import SymmetricKey
from tests.support.keys import ENCRYPTING, SIGNING, key, private, public

PEM_KINDS = ("x25519", "p256", "p384", "rsa3072", "ed25519", "mldsa65")


def private_pem(
    kind: str,
    form: PrivateFormat = PrivateFormat.PKCS8,
    encryption: KeySerializationEncryption | None = None,
) -> bytes:
    handle = private(kind).handle
    assert not isinstance(handle, HybridPrivate)
    return handle.private_bytes(Encoding.PEM, form, encryption or NoEncryption())


def public_pem(kind: str, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
    handle = private(kind).handle
    assert not isinstance(handle, HybridPrivate)
    return handle.public_key().public_bytes(Encoding.PEM, form)


def secret_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("kind", GENERATED_TYPES)
def test_written_files_are_read_back(tmp_path: Path, kind: str) -> None:
    old = os.umask(0)
    try:
        written, beside = write_key_files(key(kind), tmp_path / "key")
    finally:
        os.umask(old)
    assert written == tmp_path / "key"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    if kind == "oct":
        assert beside is None
        assert sorted(os.listdir(tmp_path)) == ["key"]
        loaded = load_decryption_key(written)
        assert isinstance(loaded, SymmetricKey)
        again = load_recipient_key(written)
        made = key(kind)
        assert isinstance(again, SymmetricKey)
        assert isinstance(made, SymmetricKey)
        assert loaded.secret == again.secret == made.secret
        return
    assert beside == tmp_path / "key.pub"
    assert stat.S_IMODE(beside.stat().st_mode) == 0o644
    assert {"d", "priv"}.isdisjoint(json.loads(beside.read_text()))
    if kind in ENCRYPTING:
        assert load_recipient_key(beside) == public(kind)
        opened = load_decryption_key(written)
        assert isinstance(opened, PrivateKey)
        assert opened.public == public(kind)
    if kind in SIGNING:
        assert load_trusted_key(beside) == public(kind)
        assert load_signing_key(written).public == public(kind)


def test_existing_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConflictError, match="a exists"):
        write_key_files(private("x25519"), tmp_path / "a")
    (tmp_path / "b.pub").write_text("mine")
    with pytest.raises(ConflictError, match=r"b\.pub exists"):
        write_key_files(private("x25519"), tmp_path / "b")
    os.symlink(tmp_path / "nowhere", tmp_path / "c")
    with pytest.raises(ConflictError, match="c exists"):
        write_key_files(private("x25519"), tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b.pub", "c"]
    assert (tmp_path / "a").read_text() == (tmp_path / "b.pub").read_text() == "mine"


def test_writing_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"directory of .* does not exist"):
        write_key_files(private("x25519"), tmp_path / "none" / "key")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_key_files(private("x25519"), tmp_path / "file" / "key")


@pytest.mark.parametrize("kind", PEM_KINDS)
def test_pem(kind: str) -> None:
    parsed = parse_key(private_pem(kind), "it")
    assert isinstance(parsed, PrivateKey)
    assert parsed.public == public(kind)
    assert parse_key(public_pem(kind), "it") == public(kind)


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa3072"])
def test_traditional_pem(kind: str) -> None:
    pem = private_pem(kind, PrivateFormat.TraditionalOpenSSL)
    assert b"BEGIN EC PRIVATE KEY" in pem or b"BEGIN RSA PRIVATE KEY" in pem
    parsed = parse_key(pem, "it")
    assert isinstance(parsed, PrivateKey)
    assert parsed.public == public(kind)


def test_pkcs1_public_pem() -> None:
    pem = public_pem("rsa3072", PublicFormat.PKCS1)
    assert b"BEGIN RSA PUBLIC KEY" in pem
    assert parse_key(pem, "it") == public("rsa3072")


def test_openssl_writes_parameters_in_front() -> None:
    pem = subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey"], check=True, capture_output=True
    ).stdout
    assert b"BEGIN EC PARAMETERS" in pem
    parsed = parse_key(b"a comment\n" + pem, "it")
    assert isinstance(parsed, PrivateKey)
    assert parsed.kind is KeyKind.P256


def _certificate() -> bytes:
    return b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def _ed448() -> bytes:
    made = ed448.Ed448PrivateKey.generate()
    return made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _ed448_public() -> bytes:
    made = ed448.Ed448PrivateKey.generate().public_key()
    return made.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _brainpool() -> bytes:
    made = ec.generate_private_key(ec.BrainpoolP256R1())
    return made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "neither a JWK nor a PEM key"),
        (lambda: b"\x00\x01\x02", "neither a JWK nor a PEM key"),
        (lambda: b"hunter2\n", "neither a JWK nor a PEM key"),
        (lambda: b"{", "malformed JWK: it is not JSON"),
        (lambda: b'{"kty":"oct","k":"AA","k":"AA"}', "malformed JWK: it repeats the member 'k'"),
        (lambda: b'{"kty":"oct","k":"AA"}', "symmetric key of 1 bytes"),
        (lambda: b"x" * (MAX_KEY_FILE_SIZE + 1), "larger than 65536 bytes"),
        (lambda: private_pem("p256", encryption=BestAvailableEncryption(b"x")), "under a passphrase"),
        (
            lambda: private_pem("p256", PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"x")),
            "under a passphrase",
        ),
        (lambda: private_pem("ed25519", PrivateFormat.OpenSSH), "OpenSSH key"),
        (lambda: b"ssh-ed25519 AAAA me@here", "OpenSSH key"),
        (_certificate, "certificate, not a key"),
        (lambda: private_pem("p256") + private_pem("p384"), "more than one PEM key"),
        (lambda: private_pem("p256").replace(b"M", b"N", 1), "malformed PEM key"),
        (lambda: private_pem("p256")[:90], "malformed PEM key"),
        (lambda: b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", "malformed PEM key"),
        (_ed448, "unsupported type .Ed448PrivateKey"),
        (_ed448_public, "unsupported type .Ed448PublicKey"),
        (_brainpool, "curve brainpoolP256r1, which is not supported"),
    ],
)
def test_refused(content: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(KeyFileError, match=f"^FILE (is )?.*{reason}") as caught:
        parse_key(content(), "FILE")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_rsa_is_refused_before_its_primes_are_proved() -> None:
    """OpenSSL's check of 16,384 bits takes half a minute; the length alone is enough to refuse it."""
    der = subprocess.run(
        ["openssl", "asn1parse", "-genconf", "/dev/stdin", "-noout", "-out", "/dev/stdout"],
        input=_asn1_of_large_rsa(),
        check=True,
        capture_output=True,
    ).stdout
    pem = b"-----BEGIN RSA PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END RSA PRIVATE KEY-----\n"
    with pytest.raises(KeyFileError, match="FILE is an RSA key of 16383 bits; 2048 to 8192 are accepted"):
        parse_key(pem, "FILE")


def _asn1_of_large_rsa() -> bytes:
    prime = 2**8192 - 1
    values = [0, prime * (prime - 2) >> 1 | 1, 65537, 3, prime, prime - 2, 3, 3, 3]
    lines = ["asn1=SEQUENCE:key", "[key]"]
    lines += [f"v{index}=INTEGER:0x{value:x}" for index, value in enumerate(values)]
    return "\n".join(lines).encode() + b"\n"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o666, 0o601])
def test_secret_files_that_others_can_access(tmp_path: Path, mode: int) -> None:
    for kind in ("x25519", "oct"):
        path = secret_file(tmp_path / kind, json.dumps(private_jwk(key(kind))).encode())
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=f"accessible by others \\(mode {mode:04o}\\); chmod 600"):
            load_decryption_key(path)
    with pytest.raises(KeyFileError, match="accessible by others"):
        load_recipient_key(tmp_path / "oct")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_private_modes(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path / "key", json.dumps(private_jwk(private("x25519"))).encode())
    path.chmod(mode)
    load_decryption_key(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_secret_files_of_other_owners(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "key", json.dumps(private_jwk(private("x25519"))).encode())
    path.chmod(0o444)
    os.chown(path, 12345, 12345)
    load_decryption_key(path)


def test_public_files_may_be_read_by_everybody(tmp_path: Path) -> None:
    path = tmp_path / "key.pub"
    path.write_bytes(public_pem("p256"))
    path.chmod(0o666)
    assert load_recipient_key(path) == load_trusted_key(path) == public("p256")


def test_a_pipe_is_a_key_file() -> None:
    reader, writer = os.pipe()
    os.write(writer, private_pem("x25519"))
    os.close(writer)
    try:
        loaded = load_decryption_key(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
    assert isinstance(loaded, PrivateKey)
    assert loaded.public == public("x25519")


def test_a_named_pipe_is_not_judged_by_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    path.chmod(0o644)
    writer = threading.Thread(target=path.write_bytes, args=[private_pem("x25519")])
    writer.start()
    try:
        loaded = load_decryption_key(path)
    finally:
        writer.join()
    assert loaded.kid == public("x25519").kid


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none does not exist"):
        load_decryption_key(tmp_path / "none")
    with pytest.raises(KeyFileError, match="is a directory"):
        load_decryption_key(tmp_path)
    with pytest.raises(KeyFileError, match="larger than 65536 bytes"):
        load_decryption_key("/dev/zero")
    with pytest.raises(KeyFileError, match="NUL"):
        load_decryption_key("a\0b")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot read key file"):
        load_decryption_key(tmp_path / "file" / "x")


def test_a_private_key_as_recipient_gives_its_public_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = secret_file(tmp_path / "key", private_pem("x25519"))
    with caplog.at_level(logging.WARNING, "encfs"):
        loaded = load_recipient_key(path)
    assert loaded == public("x25519")
    assert isinstance(loaded, PublicKey)
    assert f"{path} is a private key; only its public part is used" in caplog.text


@pytest.mark.parametrize(
    ("load", "kind", "part", "reason"),
    [
        (
            load_recipient_key,
            "ed25519",
            "public",
            "is of type ed25519, which cannot encrypt; give a key of type x25519",
        ),
        (load_recipient_key, "mldsa65", "private", "is of type mldsa65, which cannot encrypt"),
        (load_decryption_key, "x25519", "public", "is a public key; decrypting needs the private one"),
        (load_decryption_key, "ed25519", "private", "cannot encrypt"),
        (load_signing_key, "ed25519", "public", "is a public key; signing needs the private one"),
        (
            load_signing_key,
            "x25519",
            "private",
            "is of type x25519, which cannot sign; give a key of type ed25519, p256",
        ),
        (load_signing_key, "p384", "private", "cannot sign"),
        (load_signing_key, "rsa3072", "private", "cannot sign"),
        (load_signing_key, "oct", "private", "is a symmetric key, which cannot sign"),
        (load_trusted_key, "ed25519", "private", r"is a private key; trust needs only the public one; give .*\.pub"),
        (load_trusted_key, "mlkem768x25519", "public", "cannot sign"),
        (load_trusted_key, "oct", "private", "is a symmetric key, which verifies nothing"),
    ],
)
def test_wrong_key_for_the_use(
    tmp_path: Path, load: Callable[[Path], object], kind: str, part: str, reason: str
) -> None:
    members = private_jwk(key(kind)) if part == "private" else public_jwk(public(kind))
    path = secret_file(tmp_path / "key", json.dumps(members).encode())
    with pytest.raises(KeyFileError, match=reason) as caught:
        load(path)
    assert str(path) in caught.value.message


def test_kek_text() -> None:
    secret = os.urandom(32)
    parsed = parse_kek(base64.b64encode(secret) + b"\n", "it")
    assert parsed is not None
    assert (bytes(parsed.secret), parsed.kid) == (secret, None)
    for text in (b"", base64.b64encode(secret)[:-1], base64.b64encode(bytes(31)), b"!" * 44, b"\xff" * 44, b"A" * 44):
        assert parse_kek(text, "it") is None


@pytest.mark.parametrize("kind", ["x25519", "p256", "ed25519"])
def test_no_byte_of_a_pem_file_can_be_changed_into_a_crash(kind: str) -> None:
    content = bytearray(private_pem(kind))
    for at in range(len(content)):
        content[at] ^= 0x11
        try:
            parsed = parse_key(content, "it")
        except EncfsError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert isinstance(parsed, PrivateKey)
        content[at] ^= 0x11


def test_other_members_are_ignored() -> None:
    members = public_jwk(public("x25519")) | {"x5u": "https://example.org/", "ext": "x", "kid": "mine"}
    parsed = parse_key(json.dumps(members).encode(), "it")
    assert isinstance(parsed, PublicKey)
    assert parsed.kid == public("x25519").kid
    assert parsed.kid != b64url_encode(b"mine")


def test_a_disk_that_takes_a_part_leaves_no_key_file(tmp_path: Path) -> None:
    program = """
import resource, sys
from encfs.errors import StorageError
from encfs.keys.files import write_key_files
from encfs.keys.jwk import generate_key
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_key_files(generate_key("ed25519"), sys.argv[1])
except StorageError as error:
    print(error.message)
"""
    words = [sys.executable, "-c", program, tmp_path / "key"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert "cannot write" in done.stdout
    assert list(tmp_path.iterdir()) == []
