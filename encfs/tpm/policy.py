"""What must hold for a TPM object to be used: PCR values, or values that an owner approved, and a counter.

Policies are digests that the TPM builds up in a session (TPM 2.0 Library, Part 3, 23); here the same digests are
computed without one. The policy of an object is, in this order:

    PolicyPCR(values at sealing)                                     --tpm2-pcrs
    PolicyAuthorize(owner's key, reference)                          --tpm2-authorize
    PolicyOR of these two                                            both
    then PolicyNV(counter <= value at sealing)                       --tpm2-nv-counter

An approval is a signature over PolicyPCR(other values) and the reference. Reading and writing is `keyfile`'s, carrying
a policy out in a TPM `storage`'s.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from encfs.encoding import hex_decode
from encfs.errors import FormatError, KeyFileError, UsageError
from encfs.keys.jwk import KeyKind, PublicKey, Use
from encfs.strictjson import show_name
from encfs.tpm import structures
from encfs.tpm.structures import BANKS, PCR_COUNT

# Command codes, which policies hash (Part 2, 6.5.2).
_CC_POLICY_NV, _CC_POLICY_AUTHORIZE, _CC_POLICY_OR, _CC_POLICY_PCR = 0x149, 0x16A, 0x171, 0x17F
#: TPM_EO_UNSIGNED_LE (6.8).
UNSIGNED_LESS_OR_EQUAL = 0x0009

#: Bytes of the UTF-8 text that approvals name; TPM2B_NONCE holds no more than a digest for sure.
MAX_REFERENCE_SIZE = 32
#: Approvals that one object carries.
MAX_APPROVALS = 64

_SELECTION = re.compile(r"([a-z0-9]+):(.+)", re.ASCII)
_REGISTER = re.compile(r"([0-9]{1,2})(?:=([0-9a-f]+))?", re.ASCII)
_INDEX = re.compile(r"0x[0-9a-f]{1,8}", re.ASCII | re.IGNORECASE)
#: NV indices (Part 2, 7.5): handles of type 0x01.
NV_INDICES = range(0x0100_0000, 0x0200_0000)


@dataclass(frozen=True, slots=True)
class PcrRequest:
    """PCRs of a bank as a user names them: a value each, or None for what the TPM holds now."""

    bank: str
    values: Mapping[int, bytes | None]

    @property
    def complete(self) -> PcrValues | None:
        """The values, if all were given."""
        known = {index: value for index, value in self.values.items() if value is not None}
        return PcrValues(self.bank, known) if len(known) == len(self.values) else None


@dataclass(frozen=True, slots=True)
class PcrValues:
    """Values of some PCRs of one bank, by index, in the order of the indices."""

    bank: str
    values: Mapping[int, bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(sorted(self.values.items())))

    @property
    def selection(self) -> bytes:
        """Their TPML_PCR_SELECTION."""
        return structures.pcr_selection(self.bank, self.values)

    def composite(self) -> bytes:
        """SHA-256 of the values one after another, as PolicyPCR and quotes with SHA-256 have it."""
        return hashlib.sha256(b"".join(self.values.values())).digest()

    def policy(self) -> bytes:
        """The digest of PolicyPCR with these values alone."""
        return _extend(bytes(structures.DIGEST_SIZE), _CC_POLICY_PCR, self.selection + self.composite())


@dataclass(frozen=True, slots=True)
class Approval:
    """PCR values with somebody's DER signature. Untrusted: the TPM checks it."""

    pcrs: PcrValues
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authorization:
    """Whose approvals count: a P-256 key, for approvals that carry the reference. The approvals are not part of it."""

    key: PublicKey
    reference: str = ""
    approvals: tuple[Approval, ...] = ()

    def __post_init__(self) -> None:
        self.key.require(Use.SIGN, "the key that approves")
        if self.key.kind is not KeyKind.P256:
            raise KeyFileError(
                f"a TPM does not check signatures of type {self.key.kind.value}",
                hint="approve with a key of type p256: imagetool keygen --type p256",
            )
        if len(self.reference.encode()) > MAX_REFERENCE_SIZE:
            raise UsageError(f"the reference of approvals is longer than {MAX_REFERENCE_SIZE} bytes")

    @property
    def public(self) -> bytes:
        """The key's public area."""
        handle = self.key.handle
        if not isinstance(handle, ec.EllipticCurvePublicKey):
            raise TypeError("not an elliptic curve key")
        return structures.authorizer(handle)

    def policy(self) -> bytes:
        """The digest of PolicyAuthorize alone."""
        name = structures.object_name(self.public)
        first = _extend(bytes(structures.DIGEST_SIZE), _CC_POLICY_AUTHORIZE, name)
        return hashlib.sha256(first + self.reference.encode()).digest()

    def message(self, pcrs: PcrValues) -> bytes:
        """What is signed to approve these values: ECDSA with SHA-256 over it."""
        return pcrs.policy() + self.reference.encode()

    def digest(self, pcrs: PcrValues) -> bytes:
        """The hash of `message`, which the TPM checks the signature over."""
        return hashlib.sha256(self.message(pcrs)).digest()


@dataclass(frozen=True, slots=True)
class CounterLimit:
    """An NV counter that must not have moved beyond `value`. `name` is the TPM's name of the index."""

    index: int
    name: bytes
    value: int

    @property
    def operand(self) -> bytes:
        """The value as the TPM keeps counters."""
        return self.value.to_bytes(8)

    def policy(self, before: bytes) -> bytes:
        """The digest of PolicyNV behind another policy."""
        compared = hashlib.sha256(self.operand + struct.pack(">HH", 0, UNSIGNED_LESS_OR_EQUAL)).digest()
        return _extend(before, _CC_POLICY_NV, compared + self.name)


@dataclass(frozen=True, slots=True)
class Policy:
    """All of an object's policy; PCR values, an authorization, or both."""

    pcrs: PcrValues | None
    authorization: Authorization | None = None
    counter: CounterLimit | None = None

    def __post_init__(self) -> None:
        check_conditions(self.pcrs, self.authorization)

    @property
    def branches(self) -> list[bytes]:
        """The digests of its alternatives."""
        return [part.policy() for part in (self.pcrs, self.authorization) if part is not None]

    def digest(self) -> bytes:
        """The `authPolicy` of an object with this policy."""
        branches = self.branches
        digest = branches[0]
        if len(branches) > 1:
            digest = _extend(bytes(structures.DIGEST_SIZE), _CC_POLICY_OR, b"".join(branches))
        return digest if self.counter is None else self.counter.policy(digest)


def check_conditions(pcrs: PcrRequest | PcrValues | None, authorization: Authorization | None) -> None:
    """Raises: UsageError where a policy would have neither."""
    if pcrs is None and authorization is None:
        raise UsageError(
            "nothing says when the TPM may open it", hint="give --tpm2-pcrs, such as sha256:7, or --tpm2-authorize"
        )


def parse_pcrs(text: str) -> PcrRequest:
    """`BANK:INDEX[=HEX],…`, such as `sha256:7,11` or `sha256:7,11=5891…`. Raises: UsageError."""
    match = _SELECTION.fullmatch(text)
    if match is None:
        raise UsageError(f"{show_name(text)} names no PCRs", hint="write a bank and indices, such as sha256:7,11")
    bank, registers = match[1], match[2]
    if bank not in BANKS:
        raise UsageError(f"the PCR bank {show_name(bank)} is not supported", hint=f"use {', '.join(BANKS)}")
    values: dict[int, bytes | None] = {}
    for word in registers.split(","):
        register = _REGISTER.fullmatch(word)
        if register is None or int(register[1]) >= PCR_COUNT:
            raise UsageError(
                f"{show_name(word)} is no PCR", hint=f"write 0 to {PCR_COUNT - 1}, or INDEX=VALUE in lower-case hex"
            )
        index = int(register[1])
        if index in values:
            raise UsageError(f"PCR {index} is named twice")
        values[index] = None if register[2] is None else _value(bank, index, register[2])
    return PcrRequest(bank, values)


def parse_nv_index(text: str) -> int:
    """An NV index in hexadecimal, such as `0x01800100`. Raises: UsageError."""
    index = int(text, 16) if _INDEX.fullmatch(text) else 0
    if index not in NV_INDICES:
        raise UsageError(f"{show_name(text)} is no NV index", hint="write one of the owner's range, such as 0x01800100")
    return index


def differing(expected: PcrValues, present: PcrValues) -> list[int]:
    """The PCRs whose present value is another."""
    return [index for index, value in expected.values.items() if present.values.get(index) != value]


def _value(bank: str, index: int, text: str) -> bytes:
    size = hashlib.new(bank).digest_size
    try:
        value = hex_decode(text, "value")
    except FormatError:
        value = b""
    if len(value) != size:
        raise UsageError(f"the value of PCR {index} is not {2 * size} hexadecimal digits")
    return value


def _extend(digest: bytes, command: int, arguments: bytes) -> bytes:
    """PolicyUpdate (Part 1, 19.7)."""
    return hashlib.sha256(digest + struct.pack(">I", command) + arguments).digest()
