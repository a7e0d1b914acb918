"""Intel's collateral for SGX and TDX quotes, as `dcap-qvl` writes it in JSON: of which platforms, and until when.

Nothing is verified here: whether it is Intel's, and what it says of a quote, is `dcap.py`'s to find out. What is read
chooses one of several, and tells an operator that it has to be fetched anew.

| member | |
|---|---|
| `tcb_info` | JSON as text: `id` (`SGX`, `TDX`), `fmspc`, `nextUpdate` |
| `qe_identity` | JSON as text: `nextUpdate` |
| `pck_crl`, `root_ca_crl` | revocation lists, DER in hexadecimal; the issuer of the first is the platform's CA |
| `…_issuer_chain` | certificates in PEM |
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from cryptography import x509

from encfs.attestation.certificates import reading_certificates
from encfs.attestation.evidence import Collateral, EvidenceKind, Platform
from encfs.encoding import hex_decode
from encfs.errors import ConflictError, FormatError
from encfs.strictjson import loads_object

#: Largest collateral of one platform, bytes; real ones have about 20,000.
MAX_COLLATERAL_SIZE = 1 << 20
#: Names of the certification authorities between a platform and Intel's root, and what Intel's services call them.
AUTHORITIES = {"Intel SGX PCK Platform CA": "platform", "Intel SGX PCK Processor CA": "processor"}
FMSPC_SIZE = 6

_KINDS = {"SGX": EvidenceKind.SGX, "TDX": EvidenceKind.TDX}
_CHAINS = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")


def parse_collateral(content: bytes, what: str) -> Collateral:
    """`what` names it in messages. Raises: FormatError."""
    members = loads_object(content, limit=MAX_COLLATERAL_SIZE, what=what)
    tcb_info, qe_identity = _document(members, "tcb_info", what), _document(members, "qe_identity", what)
    kind, fmspc = tcb_info.get("id"), hex_decode(_text(tcb_info, "fmspc", what).lower(), f"fmspc of {what}")
    if not isinstance(kind, str) or kind not in _KINDS or len(fmspc) != FMSPC_SIZE:
        raise FormatError(f"tcb_info of {what} is of no platform with SGX or TDX")
    ends = [_moment(one, what) for one in (tcb_info, qe_identity)]
    lists = [_revocation_list(members, name, what) for name in ("pck_crl", "root_ca_crl")]
    with reading_certificates(f"a certificate of {what}"):
        for name in _CHAINS:
            chain = x509.load_pem_x509_certificates(_text(members, name, what).encode())
            ends += [certificate.not_valid_after_utc for certificate in chain]
        authority = AUTHORITIES.get(str(lists[0].issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value))
        ends += [one.next_update_utc for one in lists if one.next_update_utc is not None]
    if authority is None:
        raise FormatError(f"pck_crl of {what} is not of a CA of Intel's platforms")
    return Collateral(Platform(_KINDS[kind], fmspc, authority), content, min(ends))


def require_one_each(named: Iterable[tuple[str, Collateral]]) -> tuple[Collateral, ...]:
    """All, each of a platform of its own. Raises: ConflictError naming two that are of the same one."""
    names: dict[Platform, str] = {}
    found = []
    for name, collateral in named:
        if (before := names.setdefault(collateral.platform, name)) != name:
            raise ConflictError(
                f"{before} and {name} are both Intel's collateral for {collateral.platform}", hint="keep the newer one"
            )
        found.append(collateral)
    return tuple(found)


def _text(members: dict[str, object], name: str, what: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise FormatError(f"{what} has no {name} that is text", hint="it is JSON as dcap-qvl writes it")
    return value


def _document(members: dict[str, object], name: str, what: str) -> dict[str, object]:
    return loads_object(_text(members, name, what).encode(), limit=MAX_COLLATERAL_SIZE, what=f"{name} of {what}")


def _moment(document: dict[str, object], what: str) -> datetime:
    text = _text(document, "nextUpdate", what)
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise FormatError(f"nextUpdate of {what} is not a time with its zone")


def _revocation_list(members: dict[str, object], name: str, what: str) -> x509.CertificateRevocationList:
    content = hex_decode(_text(members, name, what).lower(), f"{name} of {what}")
    with reading_certificates(f"{name} of {what}"):
        return x509.load_der_x509_crl(content)
