"""From texts on a command line to recipients and keys: which scheme is meant, and which file.

| text | recipient | key |
|---|---|---|
| `FILE`, `jwe:FILE`, `file:FILE` | a public key: JWE | a private key: JWE, PKCS #7; a symmetric one: packets of CoCo |
| `FILE`, `pkcs7:FILE` | a certificate: PKCS #7 | |
| `pgp:NAME` | a key in gpg's keyring: OpenPGP | |
| `pgp:` | | whatever gpg decrypts |
| `coco:kbs:///REPOSITORY/TYPE/TAG` | a KEK given beside it: packets of CoCo | |
| `kbs:…`, `cdh:…`, `tpm2:…`, … | | a KEK that is fetched: packets of CoCo |
| `provider:NAME[:PARAMETERS]`, `keyprovider:…` | a key provider | a key provider |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import rsa

from encfs.errors import IntegrityError, KeyFileError, MissingKeyError, WrongKeyError
from encfs.keyprovider.client import KeyService, parse_service
from encfs.keys.providers import known_schemes
from encfs.keys.secrets import SymmetricKey
from encfs.strictjson import show_name
from imagetool.ocicrypt import jwe, packets, pgp
from imagetool.ocicrypt.keyfiles import Certificate, PublicFile, load_private, load_public
from imagetool.ocicrypt.keyservice import kek_from_uri
from imagetool.ocicrypt.options import Element
from imagetool.ocicrypt.schemes import Opener, Recipient

_PROVIDER = "provider."


@dataclass(frozen=True, slots=True)
class JweRecipient:
    """A public key."""

    file: PublicFile
    scheme: str = "jwe"

    def wrap(self, options: bytearray) -> bytes:
        return jwe.encrypt(options, self.file.key, self.file.algorithm)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class CertificateRecipient:
    """An X.509 certificate."""

    certificate: Certificate
    scheme: str = "pkcs7"

    def wrap(self, options: bytearray) -> bytes:
        from imagetool.ocicrypt import pkcs7  # its ASN.1 is slow to import, and needed by few

        return pkcs7.encrypt(options, self.certificate)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PgpRecipient:
    """A key in gpg's public keyring."""

    recipient: str
    scheme: str = "pgp"

    def wrap(self, options: bytearray) -> bytes:
        return pgp.encrypt(options, self.recipient)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PacketRecipient:
    """A key-encryption key that guests of Confidential Containers get from their key broker, under `kid`."""

    kid: str
    kek: SymmetricKey
    scheme: str = _PROVIDER + packets.PROVIDER

    def wrap(self, options: bytearray) -> bytes:
        return packets.wrap(options, self.kek, self.kid)

    def close(self) -> None:
        self.kek.wipe()


@dataclass(frozen=True, slots=True)
class ServiceRecipient:
    """A key provider."""

    service: KeyService

    @property
    def scheme(self) -> str:
        return _PROVIDER + self.service.name

    def wrap(self, options: bytearray) -> bytes:
        return self.service.wrap(options)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PrivateKeyOpener:
    """A private key in a file."""

    name: str
    key: jwe.JwePrivateKey = field(repr=False)

    def handles(self, scheme: str) -> bool:
        return scheme == "jwe" or (scheme == "pkcs7" and isinstance(self.key, rsa.RSAPrivateKey))

    def unwrap(self, element: Element) -> bytearray:
        if element.scheme == "pkcs7" and isinstance(self.key, rsa.RSAPrivateKey):
            from imagetool.ocicrypt import pkcs7

            return pkcs7.decrypt(element.content, self.key, self.name)
        return jwe.decrypt(jwe.parse(element.content), self.key, self.name)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PgpOpener:
    """gpg, with the secret keys that it has."""

    name: str = "gpg"

    def handles(self, scheme: str) -> bool:
        return scheme == "pgp"

    def unwrap(self, element: Element) -> bytearray:
        return pgp.decrypt(element.content)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PacketOpener:
    """A key-encryption key, for packets whatever they call their key."""

    name: str
    kek: SymmetricKey

    def handles(self, scheme: str) -> bool:
        return scheme == _PROVIDER + packets.PROVIDER

    def unwrap(self, element: Element) -> bytearray:
        try:
            return packets.unwrap(packets.parse(element.content), self.kek)
        except IntegrityError as error:
            raise WrongKeyError(f"{self.name} does not open it: {error.message}") from None

    def close(self) -> None:
        self.kek.wipe()


@dataclass(frozen=True, slots=True)
class ServiceOpener:
    """A key provider."""

    service: KeyService

    @property
    def name(self) -> str:
        return str(self.service)

    def handles(self, scheme: str) -> bool:
        return scheme == _PROVIDER + self.service.name

    def unwrap(self, element: Element) -> bytearray:
        return self.service.unwrap(element.content)

    def close(self) -> None:
        return


def parse_recipient(text: str, kek: str | None = None) -> Recipient:
    """`kek` is the key URI of the key for recipients that are named only. Secrets in it are wiped by its `close`.

    Raises: KeyFileError, MissingKeyError, NotFoundError, StorageError, and others of key URIs.
    """
    scheme, separator, rest = text.partition(":")
    if separator and scheme == "coco":
        return _packet_recipient(rest, kek)
    if not separator or scheme not in _RECIPIENTS:
        return _file_recipient(text)
    if not rest:
        raise KeyFileError(f"{show_name(text)} names nothing behind {scheme}:")
    return _RECIPIENTS[scheme](rest)


def parse_opener(text: str) -> Opener:
    """Secrets in it are wiped by its `close`. Raises: as `parse_recipient`."""
    scheme, separator, rest = text.partition(":")
    if not separator:
        return _file_opener(text)
    if scheme in _OPENERS:
        return _OPENERS[scheme](rest)
    if scheme in known_schemes():
        return PacketOpener(f"{scheme}: key", kek_from_uri(text))
    return _file_opener(text)


def _file_recipient(path: str) -> Recipient:
    key = load_public(path)
    return CertificateRecipient(key) if isinstance(key, Certificate) else JweRecipient(key)


def _jwe_recipient(path: str) -> Recipient:
    key = load_public(path)
    if isinstance(key, Certificate):
        raise KeyFileError(f"{path} is a certificate, not a key", hint=f"write pkcs7:{path}")
    return JweRecipient(key)


def _certificate_recipient(path: str) -> Recipient:
    key = load_public(path)
    if not isinstance(key, Certificate):
        raise KeyFileError(f"{path} is no certificate", hint=f"write jwe:{path}")
    return CertificateRecipient(key)


def _pgp_opener(rest: str) -> Opener:
    if rest:
        raise KeyFileError("pgp: is followed by something", hint="write pgp: alone; GNUPGHOME says which keyring")
    return PgpOpener()


def _packet_recipient(rest: str, kek: str | None) -> Recipient:
    kid = packets.check_kid(rest)
    if kek is None:
        raise MissingKeyError(f"the key of {kid} is not given", hint="pass it with --kek KEYURI")
    return PacketRecipient(kid, kek_from_uri(kek))


def _file_opener(path: str) -> Opener:
    key = load_private(path)
    return PacketOpener(path, key) if isinstance(key, SymmetricKey) else PrivateKeyOpener(path, key)


_RECIPIENTS: Mapping[str, Callable[[str], Recipient]] = {
    "jwe": _jwe_recipient,
    "pkcs7": _certificate_recipient,
    "pgp": PgpRecipient,
    "file": _file_recipient,
    "provider": lambda rest: ServiceRecipient(parse_service(rest)),
    "keyprovider": lambda rest: ServiceRecipient(parse_service(rest)),
}
_OPENERS: Mapping[str, Callable[[str], Opener]] = {
    "file": _file_opener,
    "pgp": _pgp_opener,
    "provider": lambda rest: ServiceOpener(parse_service(rest)),
    "keyprovider": lambda rest: ServiceOpener(parse_service(rest)),
}
