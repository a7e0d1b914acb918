"""AMD's certificates: the pinned roots of each CPU generation, and the certificate of the key that signs SNP reports.

ARK -> ASK -> VCEK (a chip's own key), or ARK -> ASVK -> VLEK (a cloud provider's key). ARK, ASK and ASVK are data files
of this package, taken from AMD's key distribution service; they are the only issuers accepted, whatever comes with the
evidence. Source: AMD publication 57230, "VCEK Certificate and KDS Interface Specification", table 8 for the extensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from importlib.resources import files

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from encfs.attestation.certificates import reading_certificates
from encfs.errors import FormatError

PRODUCTS = ("Milan", "Genoa", "Turin")

#: Largest endorsement certificate, bytes; real ones have about 1400.
MAX_CERTIFICATE_SIZE = 8192

_TCB = "1.3.6.1.4.1.3704.1.3"
# Extension of each security version number.
_TCB_EXTENSIONS = {
    "bootloader": f"{_TCB}.1",
    "tee": f"{_TCB}.2",
    "snp": f"{_TCB}.3",
    "microcode": f"{_TCB}.8",
    "fmc": f"{_TCB}.9",
}
_HARDWARE_ID = "1.3.6.1.4.1.3704.1.4"
_PROVIDER_ID = "1.3.6.1.4.1.3704.1.5"
_OCTET_STRING, _IA5_STRING, _INTEGER = 0x04, 0x16, 0x02


@dataclass(frozen=True, slots=True)
class Tcb:
    """Security version numbers of SNP firmware, 0 to 255 each; `fmc` from Turin on."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    def to_claim(self) -> dict[str, int]:
        numbers = {"bootloader": self.bootloader, "tee": self.tee, "snp": self.snp, "microcode": self.microcode}
        return numbers if self.fmc is None else numbers | {"fmc": self.fmc}


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """A VCEK or VLEK whose certificate was issued by a pinned ASK or ASVK. `chip_id` is a VCEK's, `provider` a VLEK's.

    Its validity is still to be compared with the clock.
    """

    vlek: bool
    product: str
    tcb: Tcb
    chip_id: bytes
    provider: str
    not_before: datetime
    not_after: datetime
    key: ec.EllipticCurvePublicKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Issuers:
    ask: x509.Certificate
    asvk: x509.Certificate
    not_after: datetime


def endorsement_key(der: bytes) -> EndorsementKey | str:
    """The key in a VCEK or VLEK certificate, or why the certificate is not accepted.

    The result is kept: a broker sees the same chips again and again.
    """
    # Looked at first: what is too large must not be kept.
    if len(der) > MAX_CERTIFICATE_SIZE:
        return f"the endorsement certificate is larger than {MAX_CERTIFICATE_SIZE} bytes"
    return _endorsement_key(der)


@lru_cache(maxsize=1024)
def _endorsement_key(der: bytes) -> EndorsementKey | str:
    try:
        with reading_certificates("an endorsement certificate"):
            certificate = x509.load_der_x509_certificate(der)
            name = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
            issuer = certificate.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
            extensions = {
                extension.oid.dotted_string: extension.value.value
                for extension in certificate.extensions
                if isinstance(extension.value, x509.UnrecognizedExtension)
            }
            key = certificate.public_key()
    except FormatError as error:
        return error.message
    if name not in ("SEV-VCEK", "SEV-VLEK"):
        return "no VCEK or VLEK certificate"
    vlek = name == "SEV-VLEK"
    found = _issued_by(certificate, vlek=vlek)
    if found is None:
        return f"the {name} certificate was not issued by AMD (its issuer is given as {ascii(issuer)[:40]})"
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return f"the key of the {name} certificate is not on P-384"
    product, not_after = found
    try:
        return EndorsementKey(
            vlek=vlek,
            product=product,
            tcb=_tcb(extensions, product),
            chip_id=b"" if vlek else _hardware_id(extensions, product),
            provider=_provider(extensions) if vlek else "",
            not_before=certificate.not_valid_before_utc,
            not_after=min(certificate.not_valid_after_utc, not_after),
            key=key,
        )
    except (KeyError, ValueError):
        return f"the {name} certificate lacks an extension of AMD's, or has a malformed one"


def _issued_by(certificate: x509.Certificate, *, vlek: bool) -> tuple[str, datetime] | None:
    for product in PRODUCTS:
        issuers = _issuers(product)
        try:
            certificate.verify_directly_issued_by(issuers.asvk if vlek else issuers.ask)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return product, issuers.not_after
    return None


@cache
def _issuers(product: str) -> _Issuers:
    """The pinned issuers of a generation. They are checked against their root although they are our own files."""
    content = files("encfs.attestation").joinpath("data", f"amd-{product.lower()}.pem").read_bytes()
    ask, ark, asvk = x509.load_pem_x509_certificates(content)
    for certificate in (ark, ask, asvk):
        certificate.verify_directly_issued_by(ark)
    return _Issuers(ask, asvk, min(ark.not_valid_after_utc, ask.not_valid_after_utc, asvk.not_valid_after_utc))


def _tcb(extensions: dict[str, bytes], product: str) -> Tcb:
    names = set(_TCB_EXTENSIONS) - (set() if product == "Turin" else {"fmc"})
    return Tcb(**{name: _small_integer(extensions[_TCB_EXTENSIONS[name]]) for name in names})


def _small_integer(der: bytes) -> int:
    """A DER INTEGER of 0 to 255."""
    value = int.from_bytes(_unwrap(der, _INTEGER), signed=True)
    if not 0 <= value <= 255 or len(der) > 4:
        raise ValueError("out of range")
    return value


def _hardware_id(extensions: dict[str, bytes], product: str) -> bytes:
    """The chip id as reports have it, 64 bytes: raw, or (newer certificates) an OCTET STRING; 8 bytes from Turin on."""
    raw = extensions[_HARDWARE_ID]
    size = 8 if product == "Turin" else 64
    value = raw if len(raw) == size else _unwrap(raw, _OCTET_STRING)
    if len(value) != size:
        raise ValueError("wrong length")
    return value.ljust(64, b"\0")


def _provider(extensions: dict[str, bytes]) -> str:
    return _unwrap(extensions[_PROVIDER_ID], _IA5_STRING).decode("ascii")


def _unwrap(der: bytes, tag: int) -> bytes:
    """The content of a DER value with a length below 128."""
    if len(der) < 3 or der[0] != tag or der[1] > 127 or der[1] != len(der) - 2:
        raise ValueError("not the expected DER value")
    return der[2:]
