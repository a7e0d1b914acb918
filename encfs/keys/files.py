"""Key files: JWK or PEM in, JWK out, with the checks of permissions and of what a key is asked to do.

PEM may hold PKCS#8, SEC 1 or PKCS#1 private keys and SubjectPublicKeyInfo or PKCS#1 public keys, unencrypted. A private
key file of the caller's that others can read or write is refused, as OpenSSH does. Nothing here uses a key.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa

from encfs.encoding import b64_decode
from encfs.errors import ConflictError, FormatError, KeyFileError, NotFoundError, StorageError
from encfs.keys import jwk, jwkjson
from encfs.keys.jwk import Key, PrivateHandle, PrivateKey, PublicHandle, PublicKey, Use
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.strictjson import loads_object

_logger = logging.getLogger(__name__)

#: Largest key file (bytes).
MAX_KEY_FILE_SIZE = 64 << 10

_PEM_LABEL = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_PRIVATE_LABELS = frozenset({"PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"})
_PUBLIC_LABELS = frozenset({"PUBLIC KEY", "RSA PUBLIC KEY"})
_KEK_TEXT_SIZE = 44


def load_recipient_key(path: str | os.PathLike[str]) -> PublicKey | SymmetricKey:
    """The key to encrypt to, from a JWK or PEM file.

    Of a private key only the public part is taken, with a warning in the log: it need not be on the machine that
    encrypts. A symmetric key (`oct`) is its own recipient, and its file is checked like a private one.

    Raises: KeyFileError, NotFoundError, StorageError.
    """
    key = _load(path)
    if isinstance(key, PrivateKey):
        _logger.warning("%s is a private key; only its public part is used, and %s.pub would do", path, path)
        key = key.public
    if isinstance(key, PublicKey):
        key.require(Use.ENCRYPT, str(path))
    return key


def load_decryption_key(path: str | os.PathLike[str]) -> PrivateKey | SymmetricKey:
    """The private or symmetric key to decrypt with, from a JWK or PEM file. Raises: as `load_recipient_key`."""
    return decryption_key(_load(path), str(path))


def load_signing_key(path: str | os.PathLike[str]) -> PrivateKey:
    """The private key to sign with, from a JWK or PEM file. Raises: as `load_recipient_key`."""
    key = _load(path)
    if isinstance(key, SymmetricKey):
        raise KeyFileError(f"{path} is a symmetric key, which cannot sign", hint="give an ed25519, p256 or mldsa65 key")
    if isinstance(key, PublicKey):
        raise KeyFileError(f"{path} is a public key; signing needs the private one")
    key.require(Use.SIGN, str(path))
    return key


def load_trusted_key(path: str | os.PathLike[str]) -> PublicKey:
    """The public key whose signatures are trusted, from a JWK or PEM file.

    A private key is refused: a machine that only verifies should not be able to sign.

    Raises: as `load_recipient_key`.
    """
    key = _load(path)
    if isinstance(key, SymmetricKey):
        raise KeyFileError(
            f"{path} is a symmetric key, which verifies nothing", hint="give the signer's public key, FILE.pub"
        )
    if isinstance(key, PrivateKey):
        raise KeyFileError(
            f"{path} is a private key; trust needs only the public one",
            hint=f"give {path}.pub, and keep the private key off this machine",
        )
    key.require(Use.SIGN, str(path))
    return key


def decryption_key(key: Key, what: str) -> PrivateKey | SymmetricKey:
    """`key` if it can decrypt; `what` names it in messages. Raises: KeyFileError."""
    if isinstance(key, PublicKey):
        raise KeyFileError(f"{what} is a public key; decrypting needs the private one")
    if isinstance(key, PrivateKey):
        key.require(Use.ENCRYPT, what)
    return key


def parse_key(content: bytes | bytearray, what: str) -> Key:
    """The key of a JWK or PEM text; `what` names it in messages. Raises: KeyFileError."""
    if len(content) > MAX_KEY_FILE_SIZE:
        raise KeyFileError(f"{what} is larger than {MAX_KEY_FILE_SIZE} bytes: no key file")
    try:
        if content.lstrip().startswith(b"{"):
            return jwkjson.key_from_jwk(loads_object(content, limit=MAX_KEY_FILE_SIZE, what="it"))
        return _from_pem(content)
    except FormatError as error:
        raise KeyFileError(f"{what} is a malformed JWK: {error.message}") from None
    except KeyFileError as error:
        raise KeyFileError(f"{what} {error.message}", hint=error.hint) from None


def parse_kek(content: bytes | bytearray, what: str) -> SymmetricKey | None:
    """The key-encryption key of a text of 44 base64 characters, or None where the text is something else."""
    text = bytes(content.strip())
    if len(text) != _KEK_TEXT_SIZE or not text.isascii():
        return None
    try:
        secret = bytearray(b64_decode(text.decode("ascii"), what))
    except FormatError:
        return None
    return SymmetricKey(secret) if len(secret) == KEK_SIZE else None


def write_key_files(key: PrivateKey | SymmetricKey, path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Write the private JWK to `path` (mode 0600) and the public one to `path`.pub (none for a symmetric key).

    Neither file may exist. Returns both paths. Raises: ConflictError, NotFoundError, StorageError.
    """
    private = Path(path)
    _create(private, jwkjson.private_jwk(key), 0o600)
    if isinstance(key, SymmetricKey):
        return private, None
    public = private.with_name(private.name + ".pub")
    try:
        _create(public, jwkjson.public_jwk(key.public), 0o644)
    except BaseException:
        private.unlink()
        raise
    return private, public


def write_public_key(key: PublicKey, path: str | os.PathLike[str]) -> None:
    """Write a public JWK to a new file. Raises: ConflictError, NotFoundError, StorageError."""
    _create(Path(path), jwkjson.public_jwk(key), 0o644)


def create_file(path: str | os.PathLike[str], content: bytearray, mode: int) -> None:
    """Write a new file that was not there, durably; `content` is wiped in any case.

    Raises: ConflictError where it exists, NotFoundError, StorageError.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file, memoryview(content) as view:
                os.fchmod(file.fileno(), mode)
                written = 0
                # A disk that is almost full takes a part, and refuses the rest.
                while written < len(view):
                    written += file.write(view[written:])
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise
    except FileExistsError:
        raise ConflictError(
            f"{path} exists", hint="remove it or choose another name; keys are not overwritten"
        ) from None
    except FileNotFoundError:
        raise NotFoundError(f"the directory of {path} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        wipe(content)


def _create(path: Path, members: dict[str, str], mode: int) -> None:
    create_file(path, bytearray(json.dumps(members, indent=2).encode() + b"\n"), mode)


def _load(path: str | os.PathLike[str]) -> Key:
    content, private = read_key_file(path)
    try:
        key = parse_key(content, str(path))
    finally:
        wipe(content)
    if not isinstance(key, PublicKey):
        private.check()
    return key


class FileAccess:
    """Who may read an open key file; asked only once the file turns out to hold a secret."""

    def __init__(self, path: str | os.PathLike[str], status: os.stat_result) -> None:
        self._path = path
        self._status = status

    def check(self) -> None:
        """Refuse a regular file of the caller's that group or others can access, as OpenSSH does. Raises: KeyFileError.

        Files of other owners are let through: whoever owns them has decided (a pod's secret volume, say).
        """
        mode = self._status.st_mode
        if stat.S_ISREG(mode) and self._status.st_uid == os.geteuid() and mode & 0o077:
            raise KeyFileError(
                f"{self._path} holds a secret key and is accessible by others (mode {stat.S_IMODE(mode):04o})",
                hint=f"chmod 600 {self._path} (in a pod: defaultMode: 0400)",
            )


def read_key_file(path: str | os.PathLike[str]) -> tuple[bytearray, FileAccess]:
    """The content of a key file or pipe, to be wiped by the caller.

    Raises: NotFoundError, StorageError; KeyFileError where it is a directory or larger than 64 KiB.
    """
    content = bytearray(MAX_KEY_FILE_SIZE + 1)
    filled = 0
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            with memoryview(content) as view:
                while filled < len(content) and (count := file.readinto(view[filled:])):
                    filled += count
    except FileNotFoundError:
        raise NotFoundError(f"key file {path} does not exist") from None
    except IsADirectoryError:
        raise KeyFileError(f"{path} is a directory, not a key file") from None
    except OSError as error:
        raise StorageError(f"cannot read key file {path}: {error.strerror}") from None
    except ValueError:
        raise KeyFileError("the name of a key file holds a NUL character") from None
    if filled > MAX_KEY_FILE_SIZE:
        wipe(content)
        raise KeyFileError(f"{path} is larger than {MAX_KEY_FILE_SIZE} bytes: no key file")
    del content[filled:]
    return content, FileAccess(path, status)


def _from_pem(content: bytes | bytearray) -> Key:
    labels = [label.decode() for label in _PEM_LABEL.findall(content)]
    keys = [label for label in labels if label in _PRIVATE_LABELS | _PUBLIC_LABELS]
    if "ENCRYPTED PRIVATE KEY" in labels or b"Proc-Type: 4,ENCRYPTED" in content:
        raise KeyFileError(
            "is a PEM key under a passphrase, which is not supported", hint="remove it: openssl pkey -in FILE -out NEW"
        )
    if "OPENSSH PRIVATE KEY" in labels or content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        raise KeyFileError("is an OpenSSH key, which is not supported", hint="make one with imagetool keygen")
    if "CERTIFICATE" in labels:
        raise KeyFileError("is a certificate, not a key", hint="extract its key: openssl x509 -pubkey -noout -in FILE")
    if not keys:
        raise KeyFileError("is neither a JWK nor a PEM key", hint="make a key with imagetool keygen")
    if len(keys) > 1:
        raise KeyFileError("holds more than one PEM key")
    try:
        if keys[0] in _PUBLIC_LABELS:
            return jwk.public_key(_supported_public(content))
        return jwk.private_key(_supported_private(content))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass  # raised below, without the context of a parser that may quote the content
    raise KeyFileError("is a malformed PEM key, or one of an unsupported type")


def _supported_public(content: bytes | bytearray) -> PublicHandle:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    handle = load_pem_public_key(bytes(content))
    if not isinstance(handle, PublicHandle):
        raise KeyFileError(f"is of an unsupported type ({type(handle).__name__})")
    return handle


def _supported_private(content: bytes | bytearray) -> PrivateHandle:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    # Size and exponent are looked at before the primes are proved, which takes seconds for large keys.
    handle = load_pem_private_key(bytes(content), None, unsafe_skip_rsa_key_validation=True)
    if isinstance(handle, rsa.RSAPrivateKey):
        jwk.public_key(handle.public_key())
        handle = load_pem_private_key(bytes(content), None)
    if not isinstance(handle, PrivateHandle):
        raise KeyFileError(f"is of an unsupported type ({type(handle).__name__})")
    return handle
