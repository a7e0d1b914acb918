"""The file behind `tpm2:FILE`: an object that only one TPM can open, and the policy that it opens under. JSON.

    {
      "format": "encfs-tpm2/1",
      "kind": "sealed",                  sealed: a key-encryption key; key: a private key; ak: an attestation key
      "srk": {"name": HEX, "handle": "0x81000001" or null},
      "public": BASE64,                  TPMT_PUBLIC
      "private": BASE64,                 encrypted by the TPM, opaque
      "policy": {                        null for ak
        "pcrs": {"bank": "sha256", "values": {"7": HEX, "11": HEX}} or null,
        "authorize": {"key": public JWK, "reference": TEXT,
                      "approvals": [{"pcrs": {…}, "signature": BASE64 DER}, …]} or null,
        "counter": {"index": "0x01800100", "name": HEX, "value": 5} or null
      }
    }

Nothing in it is secret, and it is not trusted: the public area must be what its kind and its policy come to, which the
TPM binds to the private part; the storage root key's name must be that of the TPM; approvals are checked by the TPM.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from cryptography.hazmat.primitives.asymmetric import rsa

from encfs.encoding import b64_decode, b64_encode, hex_decode
from encfs.errors import ConflictError, EncfsError, FormatError, KeyFileError, StorageError
from encfs.keys import jwkjson
from encfs.keys.files import create_file, read_key_file
from encfs.keys.jwk import PublicKey, Use, public_key
from encfs.strictjson import loads_object, show_name
from encfs.tpm import structures
from encfs.tpm.policy import (
    MAX_APPROVALS,
    NV_INDICES,
    Approval,
    Authorization,
    CounterLimit,
    PcrValues,
    Policy,
)
from encfs.tpm.structures import BANKS, PCR_COUNT

FORMAT = "encfs-tpm2/1"
#: Largest file (bytes): room for 64 approvals of 24 PCRs.
MAX_FILE_SIZE = 64 << 10

_MAX_AREA_SIZE = 2048
# More than any object here has (RSA-3072 under SHA-256: below 500), less than the TPM library has room for.
_MAX_PRIVATE_SIZE = 1024
_MAX_SIGNATURE_SIZE = 80
_NAME_SIZE = 2 + structures.DIGEST_SIZE
# Persistent handles (Part 2, 7.4).
_PERSISTENT = range(0x8100_0000, 0x8200_0000)

Kind = Literal["sealed", "key", "ak"]
_KINDS = ("sealed", "key", "ak")


@dataclass(frozen=True, slots=True)
class TpmObject:
    """An object under a storage root key (SRK). `srk_handle` is where the SRK persists, None: it is made anew."""

    kind: Kind
    srk_name: bytes
    srk_handle: int | None
    public: bytes = field(repr=False)
    private: bytes = field(repr=False)
    policy: Policy | None

    def key(self) -> rsa.RSAPublicKey:
        """The public half of an `ak`. Raises: FormatError where the public area is not that of one."""
        n = structures.modulus_of_rsa(self.public, structures.attestation_key())
        if structures.attestation_key(n) != self.public:
            raise FormatError("the public area is not that of an attestation key")
        return structures.rsa_public_key(n)

    def recipient(self) -> PublicKey:
        """The public half of a `key`, to encrypt to. Raises: FormatError where the public area is not that of one."""
        digest = self.policy.digest() if self.policy is not None else b""
        if self.kind != "key":
            raise FormatError("it is no private key")
        return public_key(structures.resident_public_key(self.public, digest), frozenset({Use.ENCRYPT}))

    def check(self) -> None:
        """Raises: FormatError unless the public area is what kind and policy come to."""
        if (self.kind == "ak") != (self.policy is None):
            raise FormatError(f"an object of kind {self.kind} has no policy, or one too many")
        if self.kind == "key":
            self.recipient()
        elif self.policy is not None:
            unique = structures.unique_of_sealed(self.public)
            if len(unique) != structures.DIGEST_SIZE:
                raise FormatError(f"what is unique about the sealed object is {len(unique)} bytes long")
            if structures.sealed_data(self.policy.digest(), unique) != self.public:
                raise FormatError("the policy is not that of the sealed object")
        else:
            self.key()


def load_object(path: str | os.PathLike[str]) -> TpmObject:
    """Read and check a file.

    Raises: KeyFileError for anything that is not as this module describes, NotFoundError, StorageError.
    """
    content, _ = read_key_file(path)
    try:
        found = _parse(loads_object(bytes(content), limit=MAX_FILE_SIZE, what="it"))
        found.check()
    except (FormatError, KeyFileError) as error:
        raise KeyFileError(f"{path} is no TPM key file: {error.message}", hint="make one with encfs seal") from None
    return found


def write_object(found: TpmObject, path: str | os.PathLike[str]) -> None:
    """Write a new file (mode 0600). Raises: ConflictError where it exists, NotFoundError, StorageError."""
    create_file(path, bytearray(serialize(found)), 0o600)


def replace_object(found: TpmObject, path: str | os.PathLike[str]) -> None:
    """Write the file in the place of another, at once or not at all; its mode is kept.

    Raises: NotFoundError, StorageError.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    create_file(temporary, bytearray(serialize(found)), 0o600)
    try:
        temporary.chmod(stat.S_IMODE(place.stat().st_mode))
        temporary.replace(place)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot replace {path}: {error.strerror}") from None


def with_approval(found: TpmObject, approval: Approval) -> TpmObject:
    """The object with one approval more. One for the same PCR values is replaced.

    Raises: KeyFileError where it was not sealed for approvals; ConflictError where it has 64 already.
    """
    policy = found.policy
    if policy is None or policy.authorization is None:
        raise KeyFileError("nobody's approvals count for it", hint="seal it again with --tpm2-authorize PUBKEY")
    others = [one for one in policy.authorization.approvals if one.pcrs != approval.pcrs]
    if len(others) >= MAX_APPROVALS:
        raise ConflictError(f"it carries {MAX_APPROVALS} approvals already", hint="seal it again to begin anew")
    authorization = replace(policy.authorization, approvals=(*others, approval))
    return replace(found, policy=replace(policy, authorization=authorization))


def serialize(found: TpmObject) -> bytes:
    """The file's content."""
    handle = f"{found.srk_handle:#010x}" if found.srk_handle is not None else None
    members = {
        "format": FORMAT,
        "kind": found.kind,
        "srk": {"name": found.srk_name.hex(), "handle": handle},
        "public": b64_encode(found.public),
        "private": b64_encode(found.private),
        "policy": policy_document(found.policy) if found.policy is not None else None,
    }
    return json.dumps(members, indent=2).encode() + b"\n"


def policy_document(policy: Policy) -> dict[str, object]:
    """A policy as JSON."""
    authorize: dict[str, object] | None = None
    if policy.authorization is not None:
        authorize = {
            "key": jwkjson.public_jwk(policy.authorization.key),
            "reference": policy.authorization.reference,
            "approvals": [
                {"pcrs": pcrs_document(one.pcrs), "signature": b64_encode(one.signature)}
                for one in policy.authorization.approvals
            ],
        }
    counter: dict[str, object] | None = None
    if policy.counter is not None:
        limit = policy.counter
        counter = {"index": f"{limit.index:#010x}", "name": limit.name.hex(), "value": limit.value}
    pcrs = pcrs_document(policy.pcrs) if policy.pcrs is not None else None
    return {"pcrs": pcrs, "authorize": authorize, "counter": counter}


def pcrs_document(pcrs: PcrValues) -> dict[str, object]:
    """PCR values as JSON."""
    return {"bank": pcrs.bank, "values": {str(index): value.hex() for index, value in pcrs.values.items()}}


# -- reading


def _parse(members: Mapping[str, object]) -> TpmObject:
    if members.get("format") != FORMAT:
        raise FormatError(f"its format is {show_name(members.get('format'))}, not {FORMAT}")
    _exactly(members, ("format", "kind", "srk", "public", "private", "policy"), "it")
    kind = members["kind"]
    if kind not in _KINDS:
        raise FormatError(f"its kind is {show_name(kind)}, not one of {', '.join(_KINDS)}")
    srk = _exactly(members["srk"], ("name", "handle"), "srk")
    handle = None if srk["handle"] is None else _number(srk["handle"], _PERSISTENT, "the handle of srk")
    policy = None if members["policy"] is None else _policy(members["policy"])
    return TpmObject(
        cast("Kind", kind),
        _bytes(hex_decode(srk["name"], "the name of srk"), _NAME_SIZE, _NAME_SIZE, "the name of srk"),
        handle,
        _bytes(b64_decode(members["public"], "public"), 1, _MAX_AREA_SIZE, "public"),
        _bytes(b64_decode(members["private"], "private"), 1, _MAX_PRIVATE_SIZE, "private"),
        policy,
    )


def _policy(value: object) -> Policy:
    members = _exactly(value, ("pcrs", "authorize", "counter"), "policy")
    try:
        return Policy(
            None if members["pcrs"] is None else _pcrs(members["pcrs"]),
            None if members["authorize"] is None else _authorization(members["authorize"]),
            None if members["counter"] is None else _counter(members["counter"]),
        )
    except FormatError:
        raise
    except EncfsError as error:
        raise FormatError(f"policy: {error.message}") from None


def _pcrs(value: object) -> PcrValues:
    members = _exactly(value, ("bank", "values"), "pcrs")
    bank, values = members["bank"], members["values"]
    if bank not in BANKS:
        raise FormatError("the PCR bank is unknown")
    if not isinstance(values, Mapping) or not values:
        raise FormatError("no PCR is named")
    size = {"sha256": 32, "sha384": 48, "sha512": 64}[str(bank)]
    names = {str(index): index for index in range(PCR_COUNT)}
    if unknown := set(values) - set(names):
        raise FormatError(f"{show_name(min(unknown))} is no PCR")
    return PcrValues(
        str(bank),
        {
            names[name]: _bytes(hex_decode(text, f"PCR {name}"), size, size, f"PCR {name}")
            for name, text in values.items()
        },
    )


def _authorization(value: object) -> Authorization:
    members = _exactly(value, ("key", "reference", "approvals"), "authorize")
    key, reference, approvals = members["key"], members["reference"], members["approvals"]
    if not isinstance(key, Mapping) or not isinstance(reference, str) or not isinstance(approvals, list):
        raise FormatError("authorize has members of the wrong type")
    if len(approvals) > MAX_APPROVALS:
        raise FormatError(f"it carries more than {MAX_APPROVALS} approvals")
    public = jwkjson.key_from_jwk(key)
    if not isinstance(public, PublicKey):
        raise FormatError("the key of authorize is no public key")
    return Authorization(public, reference, tuple(_approval(one) for one in approvals))


def _approval(value: object) -> Approval:
    members = _exactly(value, ("pcrs", "signature"), "an approval")
    signature = b64_decode(members["signature"], "a signature")
    return Approval(_pcrs(members["pcrs"]), _bytes(signature, 1, _MAX_SIGNATURE_SIZE, "a signature"))


def _counter(value: object) -> CounterLimit:
    members = _exactly(value, ("index", "name", "value"), "counter")
    limit = members["value"]
    if type(limit) is not int or limit < 0:
        raise FormatError("the counter's value is no number")
    name = _bytes(hex_decode(members["name"], "the counter's name"), _NAME_SIZE, _NAME_SIZE, "the counter's name")
    return CounterLimit(_number(members["index"], NV_INDICES, "the counter's index"), name, limit)


def _exactly(value: object, names: tuple[str, ...], what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{what} is not a JSON object")
    if missing := set(names) - set(value):
        raise FormatError(f"{what} lacks the member {min(missing)}")
    if unknown := set(value) - set(names):
        raise FormatError(f"{what} has the unknown member {show_name(min(unknown))}")
    return value


def _bytes(data: bytes, least: int, most: int, what: str) -> bytes:
    if not least <= len(data) <= most:
        raise FormatError(f"{what} is {len(data)} bytes long")
    return data


def _number(value: object, allowed: range, what: str) -> int:
    if isinstance(value, str) and len(value) == 10 and value.startswith("0x") and value.isalnum() and value.islower():
        number = int.from_bytes(hex_decode(value[2:], what))
        if number in allowed:
            return number
    raise FormatError(f"{what} is malformed")
