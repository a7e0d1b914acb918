"""The server's certificate where the owner has none: self-signed, for the names and addresses that clients use."""

from __future__ import annotations

import datetime
import re
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from encfs.errors import UsageError
from encfs.keys.files import create_file

_DAYS = 825
#: RFC 1123, 2.1, with a wildcard in front.
_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.ASCII)


def write_self_signed(names: list[str], certificate: Path, private_key: Path) -> None:
    """A certificate and its P-256 key as PEM files; clients are given the certificate as their CA file.

    Raises: UsageError for a malformed name, ConflictError, StorageError.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "encfs key broker")])
    now = datetime.datetime.now(datetime.UTC)
    try:
        alternatives = [_general_name(name) for name in names]
    except ValueError:
        raise UsageError("a --host is neither a DNS name nor an IP address") from None
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A day back: clients' clocks are not exact.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        # Clients trust it as an authority; with a path length of zero and no signing of others.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, SHA256())
    )
    private = bytearray(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    create_file(private_key, private, 0o600)
    create_file(certificate, bytearray(made.public_bytes(Encoding.PEM)), 0o644)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise
        return x509.DNSName(name)
