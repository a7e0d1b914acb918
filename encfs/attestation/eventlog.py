"""The firmware's event log of a TPM: read it, replay it, compare it with the PCRs that the TPM signed.

The log explains what went into PCRs; it proves nothing by itself. A log that gives the signed values is genuine as far
as its digests go: what an event says of itself counts only where its digest is that of its data.

    TCG_PCClientPCREvent    pcr u32, type u32, SHA-1 digest, size u32, data         the first one: TCG_EfiSpecIdEvent
    TCG_PCR_EVENT2          pcr u32, type u32, count u32, count × (algorithm u16, digest), size u32, data

All numbers are little-endian. Source: TCG PC Client Platform Firmware Profile, 10.2 (crypto agile log) and 10.4.5
(EV_NO_ACTION). Linux has the log in /sys/kernel/security/tpm0/binary_bios_measurements: what the running system puts
into PCRs afterwards (IMA, systemd's phases) is not in it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from encfs.attestation.cursor import Cursor
from encfs.attestation.eventtext import NO_ACTION, describe, type_name
from encfs.attestation.findings import Findings, shorten
from encfs.attestation.verdict import Code
from encfs.errors import FormatError

#: Bounds: bytes of a log, its events, banks that it may have.
MAX_EVENT_LOG = 4 << 20
_MAX_EVENTS = 10_000
_MAX_BANKS = 8

_WHAT = "the event log"
_SIGNATURE = b"Spec ID Event03\0"
_LOCALITY_SIGNATURE = b"StartupLocality\0"
_LOCALITIES = (0, 3, 4)
_SHA1_SIZE = 20
_SHA256, _SHA256_SIZE = 0x000B, 32
_PCR_COUNT = 24
#: PCRs of the dynamic root of trust begin with all bits set.
_DYNAMIC = range(17, 23)


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement: what was extended into a PCR of the SHA-256 bank, and what the firmware says of it."""

    pcr: int
    type: int
    digest: bytes
    data: bytes = field(repr=False)

    @property
    def extended(self) -> bool:
        return self.type != NO_ACTION

    @property
    def covered(self) -> bool:
        """Whether its digest is that of its data, so that who signed the PCR vouches for the data."""
        return hmac.compare_digest(hashlib.sha256(self.data).digest(), self.digest)

    def __str__(self) -> str:
        text = describe(self.type, self.data)
        shown = f": {text}{'' if self.covered else ' (not covered by the digest)'}" if text else ""
        return f"{self.pcr} {type_name(self.type)} {self.digest.hex()}{shown}"


def parse_event_log(content: bytes) -> list[Event]:
    """All events, in order. Raises: FormatError where it is too large, cut short or has no bank of SHA-256."""
    if len(content) > MAX_EVENT_LOG:
        raise FormatError(f"{_WHAT} is larger than {MAX_EVENT_LOG} bytes")
    cursor = Cursor(content, _WHAT, big_endian=False)
    sizes = _parse_header(cursor)
    events: list[Event] = []
    while cursor.left:
        if len(events) == _MAX_EVENTS:
            raise FormatError(f"{_WHAT} has more than {_MAX_EVENTS} events")
        events.append(_parse_event(cursor, sizes))
    return events


def _parse_header(cursor: Cursor) -> Mapping[int, int]:
    """Sizes of digests by algorithm (TPM_ALG_ID)."""
    cursor.take(4)
    kind = cursor.number(4)
    cursor.take(_SHA1_SIZE)
    header = Cursor(cursor.sized(4), f"the header of {_WHAT}", big_endian=False)
    if kind != NO_ACTION or header.left < len(_SIGNATURE) or header.take(len(_SIGNATURE)) != _SIGNATURE:
        raise FormatError(f"{_WHAT} is no crypto agile log of a TPM 2.0")
    header.take(8)  # platform class, version of the specification, size of UINTN
    count = header.number(4)
    if not 0 < count <= _MAX_BANKS:
        raise FormatError(f"{_WHAT} has {count} banks")
    sizes = {header.number(2): header.number(2) for _ in range(count)}
    if sizes.get(_SHA256) != _SHA256_SIZE or len(sizes) != count:
        raise FormatError(f"{_WHAT} has no bank of SHA-256, or one twice")
    return sizes


def _parse_event(cursor: Cursor, sizes: Mapping[int, int]) -> Event:
    pcr, kind, count = cursor.number(4), cursor.number(4), cursor.number(4)
    if pcr >= _PCR_COUNT and kind != NO_ACTION:
        raise FormatError(f"{_WHAT} extends a PCR beyond the {_PCR_COUNT} of a PC")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = cursor.number(2)
        if algorithm not in sizes or algorithm in digests:
            raise FormatError(f"{_WHAT} has an event with a digest that its header does not know, or twice")
        digests[algorithm] = cursor.take(sizes[algorithm])
    if _SHA256 not in digests:
        raise FormatError(f"{_WHAT} has an event without a SHA-256 digest")
    return Event(pcr, kind, digests[_SHA256], cursor.sized(4))


def replay(events: Collection[Event]) -> dict[int, bytes]:
    """What the events make of all PCRs of the SHA-256 bank. Raises: FormatError for a locality that there is not."""
    values = {index: (b"\xff" if index in _DYNAMIC else b"\0") * _SHA256_SIZE for index in range(_PCR_COUNT)}
    values[0] = bytes(_SHA256_SIZE - 1) + bytes([_startup_locality(events)])
    for event in events:
        if event.extended:
            values[event.pcr] = hashlib.sha256(values[event.pcr] + event.digest).digest()
    return values


def _startup_locality(events: Collection[Event]) -> int:
    for event in events:
        if not event.extended and event.data.startswith(_LOCALITY_SIGNATURE):
            found = event.data[len(_LOCALITY_SIGNATURE) :]
            if len(found) != 1 or found[0] not in _LOCALITIES:
                raise FormatError(f"{_WHAT} says that the TPM was started from a locality that there is not")
            return found[0]
    return 0


def check_event_log(findings: Findings, content: bytes, wanted: Collection[int] | None) -> None:
    """That the log gives the PCRs that were signed, `wanted` ones or (None) all. To be called after the quote's check.

    Raises: FormatError for a malformed log.
    """
    events = parse_event_log(content)
    claimed = findings.claims.get("pcrs")
    if not isinstance(claimed, Mapping):
        # A quote whose values were not believed is refused already.
        if not findings.refused:
            findings.refuse(Code.EVENT_LOG, "the evidence has no PCRs that an event log could explain")
        return
    signed = {int(index): bytes.fromhex(str(value)) for index, value in claimed.items()}
    compared = sorted(signed if wanted is None else wanted)
    for index in compared:
        if index not in signed:
            findings.refuse(Code.EVENT_LOG, f"the quote does not cover PCR {index}, which the event log is to explain")
            return
    made = replay(events)
    differing = [index for index in compared if not hmac.compare_digest(made[index], signed[index])]
    if differing:
        first, *others = differing
        more = f"; so do PCRs {', '.join(map(str, others))}" if others else ""
        findings.refuse(
            Code.EVENT_LOG,
            f"the event log disagrees about PCR {first}: it gives {shorten(made[first])}, and the TPM signed "
            f"{shorten(signed[first])}{more}",
        )
        return
    findings.claims["events"] = list(_shown(events, compared))
    left = sorted(signed.keys() - set(compared))
    if left:
        findings.leave_unchecked(
            Code.EVENT_LOG, f"the event log was not compared with PCRs {', '.join(map(str, left))}"
        )


def _shown(events: Collection[Event], compared: Collection[int]) -> Iterator[str]:
    for event in events:
        if event.extended and event.pcr in compared:
            yield str(event)
