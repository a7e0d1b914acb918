"""The fields of a rule in a policy file: how each is read, and the bounds. `policy.py` puts rules together."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.kbs import TEE_NAMES, kind_of_tee
from encfs.attestation.policy import SnpTcbFloor
from encfs.attestation.tpmquote import PCR_COUNT, load_attestation_key, public_der
from encfs.encoding import hex_decode, parse_digest
from encfs.errors import FormatError
from encfs.strictjson import MAX_INTEGER, show_name

_MAX_VALUES = 1024
_TCB_NUMBERS = ("bootloader", "tee", "snp", "microcode", "fmc")
_PRODUCTS = ("Milan", "Genoa", "Turin")
_RTMR_COUNT = 4
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*", re.ASCII)
_STATUS = re.compile(r"[A-Za-z]{1,64}", re.ASCII)
_ARTIFACT_ID_SIZE = 255

Reader = Callable[[object], Any]


def _alternatives(read: Reader) -> Reader:
    """One value or a list of them."""

    def parse(value: object) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        if not 0 < len(values) <= _MAX_VALUES:
            raise FormatError(f"holds no value, or more than {_MAX_VALUES}: an empty list would allow anything")
        return tuple(read(one) for one in values)

    return parse


def _octets(*sizes: int) -> Reader:
    def parse(value: object) -> bytes:
        data = hex_decode(value, "a value")
        if len(data) not in sizes:
            raise FormatError(f"holds a value of {len(data)} bytes; it has {' or '.join(map(str, sizes))}")
        return data

    return parse


def _integer(low: int, high: int) -> Reader:
    def parse(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"is not a number from {low} to {high}")
        return value

    return parse


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise FormatError("is neither true nor false")
    return value


def _text(pattern: re.Pattern[str], what: str) -> Reader:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise FormatError(f"is not {what}")
        return value

    return parse


def _kind(value: object) -> EvidenceKind:
    if not isinstance(value, str):
        raise FormatError(f"is not one of {', '.join(TEE_NAMES.values())}")
    return kind_of_tee(value)


def _digest(value: object) -> str:
    parse_digest(value, "a value")
    return str(value)


def _artifact_id(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value.encode()) <= _ARTIFACT_ID_SIZE or not value.isprintable():
        raise FormatError(f"is not 1 to {_ARTIFACT_ID_SIZE} bytes of text")
    return value


def _moment(value: object) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise FormatError("is no time with its zone, such as 2027-01-31T00:00:00Z")
    return value.astimezone(UTC)


def _registers(count: int, size: int) -> Reader:
    """A table of registers by number, each with its alternatives."""
    alternatives = _alternatives(_octets(size))

    def parse(value: object) -> dict[int, tuple[bytes, ...]]:
        if not isinstance(value, dict) or not value:
            raise FormatError(f'is not a table such as {{ 7 = "{size} bytes in hex" }}')
        found: dict[int, tuple[bytes, ...]] = {}
        for name, values in value.items():
            if not re.fullmatch(r"0|[1-9][0-9]?", str(name), re.ASCII) or int(name) >= count:
                raise FormatError(f"has the number {show_name(name)}; there are 0 to {count - 1}")
            found[int(name)] = alternatives(values)
        return found

    return parse


def _floor(value: object) -> SnpTcbFloor:
    if not isinstance(value, dict) or not value:
        raise FormatError('is not a table such as { product = "Milan", snp = 8, microcode = 115 }')
    if unknown := set(value) - {"product", *_TCB_NUMBERS}:
        raise FormatError(f"has {show_name(min(unknown))}, which is not known")
    product = value.get("product")
    if product not in (None, *_PRODUCTS):
        raise FormatError(f"has a product that is not one of {', '.join(_PRODUCTS)}")
    number = _integer(0, 255)
    return SnpTcbFloor(product, **{name: number(value[name]) for name in _TCB_NUMBERS if name in value})


def _attestation_key(value: object) -> bytes:
    """SubjectPublicKeyInfo in DER, from PEM or base64."""
    text = value if isinstance(value, str) else ""
    match = _PEM.fullmatch(text.strip())
    try:
        der = base64.b64decode("".join((match[1] if match else text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("holds a key that is neither PEM nor base64") from None
    return public_der(load_attestation_key(der))


#: Fields that go into `EvidencePolicy`, by the names they have there.
EVIDENCE_FIELDS: Mapping[str, Reader] = {
    "measurements": _alternatives(_octets(32, 48)),
    "signers": _alternatives(_octets(32, 48)),
    "product_ids": _alternatives(_integer(0, 0xFFFF)),
    "min_svn": _integer(0, 0xFFFFFFFF),
    "host_data": _alternatives(_octets(32, 48)),
    "allow_debug": _flag,
    "allow_migration": _flag,
    "max_vmpl": _integer(0, 3),
    "chip_ids": _alternatives(_octets(64)),
    "tcb_statuses": lambda value: frozenset(_alternatives(_text(_STATUS, "a TCB status of Intel's"))(value)),
    "allow_missing_collateral": _flag,
    "rtmrs": _registers(_RTMR_COUNT, 48),
    "pcrs": _registers(PCR_COUNT, 32),
    "attestation_keys": _alternatives(_attestation_key),
}
#: The same under other names in the file.
TEE_FIELD, TCB_FIELD = "tee", "tcb"
read_kinds = _alternatives(_kind)
read_floors = _alternatives(_floor)
#: Fields about the request and the artifact.
RULE_FIELDS: Mapping[str, Reader] = {
    "content_digests": _alternatives(_digest),
    "artifact_id": _artifact_id,
    "min_version": _integer(0, MAX_INTEGER),
    "expires": _moment,
    "releases": _integer(1, MAX_INTEGER),
    "any_workload": _flag,
}
