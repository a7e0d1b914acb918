"""Messages of the KBS protocol (Trustee's docs/kbs_attestation_protocol.md), as client and server agree on them.

    POST /kbs/v0/auth      {"version", "tee", "extra-params"}         -> {"nonce", "extra-params"} and a session cookie
    POST /kbs/v0/attest    {"init-data", "runtime-data", "tee-evidence"}   -> {"token"}
    GET  /kbs/v0/resource/REPOSITORY/TYPE/TAG                              -> flattened JWE (`encfs.kbs.jwe`)

Version 0.2.0 has the session's public key and the evidence at the top of the second message instead of `runtime-data`
and `tee-evidence.primary_evidence`. A server accepts its own version alone, so a client tries several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from encfs.errors import FormatError
from encfs.strictjson import loads_object, show_name

PREFIX = "/kbs/v0"
#: Versions of the protocol that are spoken, newest first. Older ones wrap keys under RSA PKCS#1 v1.5 only.
VERSIONS = ("0.4.0", "0.2.0")
#: The last version with the flat form of the second message.
FLAT_VERSION = "0.2.0"
SESSION_COOKIE = "kbs-session-id"
#: Names an artifact's content digest in the query of a resource: Trustee hands it to its policy, our broker checks it.
DIGEST_PARAMETER = "content-digest"

#: What an error's `type` begins with; the rest says which kind it is.
ERROR_PREFIX = "https://github.com/confidential-containers/kbs/errors/"
ERROR_VERSION = "ProtocolVersion"
ERROR_SESSION = "SessionNotFound"
ERROR_DENIED = "PolicyDeny"
ERROR_EVIDENCE = "AttestationFailed"
ERROR_REQUEST = "InvalidRequest"
ERROR_MISSING = "ResourceNotFound"
ERROR_BUSY = "TooManyRequests"
ERROR_UNAVAILABLE = "Unavailable"

#: Bounds, bytes.
MAX_MESSAGE = 1 << 20
MAX_ERROR = 64 << 10
MAX_NONCE = 512
MAX_COOKIE = 512
MAX_RESOURCE = 256 << 10

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_COOKIE = re.compile(r"[A-Za-z0-9_-]{1,512}", re.ASCII)
_SHOWN = 400


@dataclass(frozen=True, slots=True)
class ResourcePath:
    """The three names of a resource, `REPOSITORY/TYPE/TAG`: letters, digits, `_`, `.`, `-`; none begins with a dot."""

    repository: str
    type: str
    tag: str

    def __str__(self) -> str:
        return f"{self.repository}/{self.type}/{self.tag}"

    @property
    def uri(self) -> str:
        """`kbs:///REPOSITORY/TYPE/TAG`: its name without a host, as recipients of artifacts carry it."""
        return f"kbs:///{self}"


def parse_path(text: str) -> ResourcePath:
    """Raises: FormatError."""
    parts = text.split("/")
    if len(parts) != 3 or not all(_PART.fullmatch(part) for part in parts):
        raise FormatError(f"{show_name(text)} is not a resource's path, REPOSITORY/TYPE/TAG")
    return ResourcePath(*parts)


def runtime_data(nonce: str, tee_public_key: Mapping[str, str], version: str) -> dict[str, object]:
    """What the evidence is bound to. `tee_public_key` is the session's public JWK."""
    bound: dict[str, object] = {"nonce": nonce, "tee-pubkey": dict(tee_public_key)}
    if version != FLAT_VERSION:
        bound["additional-evidence"] = ""
    return bound


def attest_message(
    nonce: str, tee_public_key: Mapping[str, str], evidence: object, version: str, init_data: Mapping[str, str] | None
) -> dict[str, object]:
    """The second message of the client."""
    if version == FLAT_VERSION:
        return {"tee-pubkey": dict(tee_public_key), "tee-evidence": evidence}
    return {
        "init-data": dict(init_data) if init_data is not None else None,
        "runtime-data": {"nonce": nonce, "tee-pubkey": dict(tee_public_key)},
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }


def parse_attest_message(message: Mapping[str, object], version: str) -> tuple[dict[str, str], object, str | None]:
    """The session's public JWK as it came (what evidence is bound to), the evidence, and the nonce where it is there.

    The counterpart of `attest_message` in an untrusted message. Raises: FormatError.
    """
    if version == FLAT_VERSION:
        return _public_jwk(message.get("tee-pubkey")), message.get("tee-evidence"), None
    if not isinstance(message.get("init-data"), dict | None):
        raise FormatError("init-data is neither a JSON object nor null")
    runtime, evidence = message.get("runtime-data"), message.get("tee-evidence")
    if not isinstance(runtime, dict) or not isinstance(evidence, dict):
        raise FormatError("runtime-data or tee-evidence is not a JSON object")
    nonce = runtime.get("nonce")
    if not isinstance(nonce, str) or len(nonce) > MAX_NONCE:
        raise FormatError("runtime-data has no nonce")
    if evidence.get("additional_evidence", "") != "":
        raise FormatError("evidence of further devices is not supported")
    return _public_jwk(runtime.get("tee-pubkey")), evidence.get("primary_evidence"), nonce


def _public_jwk(members: object) -> dict[str, str]:
    if not isinstance(members, dict) or not all(isinstance(value, str) for value in members.values()):
        raise FormatError("tee-pubkey is not a JSON object of texts")
    return dict(members)


def error_document(kind: str, detail: str) -> dict[str, str]:
    """ErrorInformation of kbs-types."""
    return {"type": ERROR_PREFIX + kind, "detail": detail}


@dataclass(frozen=True, slots=True)
class ErrorInformation:
    """Why a server refused: the kind (the end of `type`), and a detail for people, cut short and made printable."""

    kind: str
    detail: str


def parse_error(body: bytes) -> ErrorInformation:
    """What an error's body says; whatever is no ErrorInformation gives an empty kind."""
    try:
        document = loads_object(body, limit=MAX_ERROR, what="the error")
    except FormatError:
        return ErrorInformation("", "")
    kind, detail = document.get("type"), document.get("detail")
    shown = detail if isinstance(detail, str) else ""
    shown = "".join(one if one.isprintable() else "?" for one in shown)[:_SHOWN]
    return ErrorInformation(kind.rpartition("/")[2] if isinstance(kind, str) else "", shown)


def check_cookie(value: str) -> str:
    """A session id that is safe to send back. Raises: FormatError."""
    if not _COOKIE.fullmatch(value):
        raise FormatError("the session cookie is malformed")
    return value
