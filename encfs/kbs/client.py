"""The client of the KBS protocol: attest with fresh evidence, fetch one resource, decrypt it.

The session's key pair lives in memory for one handshake and is never used again. A server that dies, forgets the
session or is busy is asked again from the start, the next of several first, until the time allowed is over; a refusal
is final.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Protocol
from urllib.parse import quote

from encfs.attestation.kbs import digest_of_json
from encfs.errors import FormatError, IntegrityError, KeyProviderError, KeyRefusedError, TransportError
from encfs.kbs import jwe, protocol
from encfs.kbs.protocol import ResourcePath
from encfs.keys.jwk import PrivateKey
from encfs.strictjson import loads_object
from encfs.webclient import Address, Answer, Deadline, WebClient, tls_context

#: Seconds for everything: handshakes, retries, waiting.
DEFAULT_TIMEOUT = 60.0
#: How often a handshake that a server refuses without a known reason is tried.
_UNCLEAR_ATTEMPTS = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0
_JSON = {"Content-Type": "application/json"}

_logger = logging.getLogger(__name__)


class EvidenceSource(Protocol):
    """Where evidence comes from."""

    @property
    def tee(self) -> str:
        """The TEE as the protocol names it: `snp`, `tdx`, `tpm` …"""

    def collect(self, report_data: bytes) -> object:
        """Fresh evidence with `report_data` (48 bytes) in it, in the protocol's JSON form. Raises: EncfsError."""


@dataclass(frozen=True, slots=True)
class KbsOptions:
    """Where the servers are, all equal to one another, and how they are trusted. `timeout` in seconds."""

    addresses: tuple[Address, ...]
    ca_file: str | None = None
    timeout: float = DEFAULT_TIMEOUT


class _TryAgainError(Exception):
    """This handshake is lost; another may succeed. `unclear` where the server may have meant it as a refusal."""

    def __init__(self, reason: str, *, unclear: bool = False) -> None:
        super().__init__(reason)
        self.unclear = unclear


class _VersionError(Exception):
    """The server speaks another version of the protocol."""


def fetch_resource(
    options: KbsOptions, path: ResourcePath, source: EvidenceSource, *, content_digest: str | None = None
) -> bytearray:
    """The plaintext of a resource, to be wiped by the caller.

    `content_digest` names the artifact that it is wanted for, so that the server's policy and log can know it.

    Raises: KeyRefusedError, saying what the server said, where its policy or verifier refuses; KeyProviderError where
    it cannot be reached in time or does not have it, or where its answers break the protocol; KeyFileError for an
    unusable CA file; what `source` raises.
    """
    deadline = Deadline(options.timeout)
    context = tls_context(options.ca_file) if any(one.scheme == "https" for one in options.addresses) else None
    unclear, attempt, pause = 0, 0, _FIRST_PAUSE
    while True:
        address = options.addresses[attempt % len(options.addresses)]
        attempt += 1
        try:
            with WebClient(address, deadline, context=context) as client:
                return _try_versions(client, path, source, content_digest)
        except _TryAgainError as error:
            reason = str(error)
            unclear += error.unclear
        except TransportError as error:
            reason = str(error)
        except (FormatError, IntegrityError) as error:
            raise KeyProviderError(f"{address} breaks the key broker protocol: {error.message}") from None
        if unclear >= _UNCLEAR_ATTEMPTS or deadline.left <= pause:
            raise KeyProviderError(
                f"no key for {path.uri}: {reason}", hint="check the address, the CA file and the broker's log"
            )
        _logger.info("%s; trying again", reason)
        # The other servers are asked at once; a pause only after each had its turn.
        if attempt % len(options.addresses) == 0:
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 -- spreads the load, nothing secret
            pause = min(2 * pause, _LONGEST_PAUSE)


def _try_versions(
    client: WebClient, path: ResourcePath, source: EvidenceSource, content_digest: str | None
) -> bytearray:
    for version in protocol.VERSIONS:
        try:
            return _handshake(client, path, source, version, content_digest)
        except _VersionError:
            continue
    spoken = ", ".join(protocol.VERSIONS)
    raise KeyProviderError(f"{client.address} speaks none of the versions {spoken} of the key broker protocol")


def _handshake(
    client: WebClient, path: ResourcePath, source: EvidenceSource, version: str, content_digest: str | None
) -> bytearray:
    key = jwe.session_key(use_rsa=version == protocol.FLAT_VERSION)
    public = jwe.public_members(key.public)
    request = {"version": version, "tee": source.tee, "extra-params": _extra_parameters(version)}
    answer = _post(client, "/auth", request, {})
    if answer.status == 401 and protocol.parse_error(answer.body).kind == protocol.ERROR_VERSION:
        raise _VersionError
    challenge = _object(client, answer, "the challenge")
    nonce = challenge.get("nonce")
    if not isinstance(nonce, str) or not 0 < len(nonce) <= protocol.MAX_NONCE:
        raise FormatError("the challenge has no nonce")
    cookie = {"Cookie": f"{protocol.SESSION_COOKIE}={_session(answer)}"}
    digest = digest_of_json(protocol.runtime_data(nonce, public, version))
    message = protocol.attest_message(nonce, public, source.collect(digest), version, None)
    _object(client, _post(client, "/attest", message, cookie), "the attestation result")
    return _resource(client, path, key, cookie, content_digest)


def _extra_parameters(version: str) -> object:
    return "" if version == protocol.FLAT_VERSION else {"supported-hash-algorithms": ["sha384"]}


def _resource(
    client: WebClient, path: ResourcePath, key: PrivateKey, cookie: Mapping[str, str], content_digest: str | None
) -> bytearray:
    query = f"?{protocol.DIGEST_PARAMETER}={quote(content_digest, safe=':')}" if content_digest else ""
    answer = client.exchange("GET", f"{protocol.PREFIX}/resource/{path}{query}", headers=cookie)
    if answer.status == 404:
        detail = protocol.parse_error(answer.body).detail or "no such resource"
        raise KeyProviderError(f"{client.address} has no {path.uri}: {detail}")
    return jwe.decrypt(_object(client, answer, "the resource"), key)


def _post(client: WebClient, step: str, message: Mapping[str, object], headers: Mapping[str, str]) -> Answer:
    body = json.dumps(message).encode()
    if len(body) > protocol.MAX_MESSAGE:
        raise KeyProviderError("the evidence is larger than the key broker protocol allows")
    return client.exchange("POST", protocol.PREFIX + step, body=body, headers={**_JSON, **headers})


def _object(client: WebClient, answer: Answer, what: str) -> dict[str, object]:
    """The body of an answer that is a success. Raises: KeyProviderError, _TryAgainError, FormatError."""
    if answer.status == 200:
        return loads_object(answer.body, limit=protocol.MAX_MESSAGE, what=what)
    error = protocol.parse_error(answer.body)
    said = f"{client.address}: {error.detail or f'status {answer.status}'}"
    if answer.status in (408, 425, 429) or answer.status >= 500 or error.kind == protocol.ERROR_SESSION:
        raise _TryAgainError(said)
    # Trustee answers 401 to nearly everything, a session that it lost by a restart included.
    if answer.status == 401 and error.kind not in (protocol.ERROR_DENIED, protocol.ERROR_EVIDENCE):
        raise _TryAgainError(said, unclear=True)
    # By its policy, as every provider says it; anything else is a request that it does not take.
    kind = KeyRefusedError if error.kind in (protocol.ERROR_DENIED, protocol.ERROR_EVIDENCE) else KeyProviderError
    raise kind(f"the key broker refused: {said}", hint="the broker's log of releases says why")


def _session(answer: Answer) -> str:
    for header in answer.headers.get_all("Set-Cookie") or ():
        if len(header) > 4 * protocol.MAX_COOKIE:
            continue
        try:
            found = SimpleCookie(header).get(protocol.SESSION_COOKIE)
        except CookieError:
            continue
        if found is not None:
            return protocol.check_cookie(found.value)
    raise FormatError("the challenge comes without a session cookie")
