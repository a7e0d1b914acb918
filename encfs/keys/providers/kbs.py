"""`kbs:https://HOST[:PORT]/REPOSITORY/TYPE/TAG[?OPTION&…]`: a key that a key broker releases to this TEE.

| option | |
|---|---|
| `url=URL` | another broker that serves the same keys; repeatable |
| `ca=FILE` | PEM file of the authorities that may have issued the brokers' certificates, and no others |
| `tee=NAME` | where the evidence comes from; `auto` by default |
| `ak=FILE` | the attestation key of this machine's TPM (`encfs attest enrol`), whose quote is the evidence |
| `timeout=SECONDS` | for everything, 60 by default |

`kbs:///REPOSITORY/TYPE/TAG?url=URL` is the same with every broker in an option. The path is never taken from the
artifact: whoever can open it could name another key there, one that comes without its refusals.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from encfs.attestation.collect.sources import AUTOMATIC, check_tee, evidence_source, unavailable
from encfs.errors import FormatError, KeyFileError
from encfs.kbs.client import DEFAULT_TIMEOUT, KbsOptions, fetch_resource
from encfs.kbs.evidence import ProtocolSource
from encfs.kbs.protocol import ResourcePath, parse_path
from encfs.kbs.resource import ReleasedKey, parse_resource
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.keys.uriquery import query_options
from encfs.trust import KeyBinding
from encfs.webclient import parse_address

_HINT = "write kbs:https://HOST:PORT/REPOSITORY/TYPE/TAG, with ?ca=FILE behind it for a private authority"
_OPTIONS = frozenset({"url", "ca", "tee", "ak", "timeout"})
_MAX_URI = 4096
_MAX_ADDRESSES = 16
_LONGEST_TIMEOUT = 3600

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    """What a URI asks for. `ak` is the file of a TPM's attestation key."""

    options: KbsOptions
    path: ResourcePath
    tee: str
    ak: str | None


class KbsProvider:
    """Unwraps with a key that a broker released; keeps it until `close`, since releases are counted."""

    def __init__(self, rest: str) -> None:
        self._request = _parse(rest)
        self._released: ReleasedKey | None = None

    @staticmethod
    def unavailable() -> str | None:
        return unavailable()

    @property
    def uri(self) -> str:
        return self._request.path.uri

    @property
    def binding(self) -> KeyBinding:
        return self._released.binding if self._released is not None else KeyBinding()

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        key = self._release(content_digest).key
        return unwrap_with_key(key, recipients, content_digest, self.uri, kid=self._request.path.uri)

    def fetch(self) -> SymmetricKey:
        key = self._release(None).key
        if not isinstance(key, SymmetricKey):
            raise KeyFileError(f"{self.uri} holds a private key: encrypt to its public half instead")
        return SymmetricKey(bytearray(key.secret), self.uri)

    def close(self) -> None:
        if self._released is not None:
            self._released.wipe()
        self._released = None

    def _release(self, content_digest: str | None) -> ReleasedKey:
        if self._released is None:
            request = self._request
            if any(address.scheme == "http" for address in request.options.addresses):
                _logger.warning(
                    "the key broker is asked without TLS: the key stays secret, but anyone on the way can withhold the "
                    "refusals that come with it"
                )
            source = ProtocolSource(evidence_source(request.tee, ak=request.ak))
            content = fetch_resource(request.options, request.path, source, content_digest=content_digest)
            try:
                self._released = parse_resource(content, self.uri)
            finally:
                wipe(content)
        return self._released


def split_front(front: str) -> tuple[str, ResourcePath]:
    """The broker's address (empty where it is left out) and the resource, of what stands before a URI's options.

    The last three names are the resource's; whatever stands before them is the broker's own path. Raises: KeyFileError.
    """
    if front.startswith("///"):
        head, names = "", [front[3:]]
    else:
        head, *names = front.rsplit("/", 3)
        if len(names) != 3 or not urlsplit(head).netloc:
            raise KeyFileError("the kbs: URI has no host, or no path of three names", hint=_HINT)
    try:
        return head, parse_path("/".join(names))
    except FormatError as error:
        raise KeyFileError(error.message, hint=_HINT) from None


def _parse(rest: str) -> _Request:
    if len(rest) > _MAX_URI or not rest.isascii() or not rest.isprintable():
        raise KeyFileError("the kbs: URI is too long or holds characters that do not belong there", hint=_HINT)
    front, _, query = rest.partition("?")
    head, path = split_front(front)
    addresses = [parse_address(head)] if head else []
    ca_file: str | None = None
    tee, timeout = AUTOMATIC, DEFAULT_TIMEOUT
    ak: str | None = None
    for name, value in query_options(query, "kbs", _OPTIONS, hint=_HINT, repeated=("url",)):
        match name:
            case "url":
                addresses.append(parse_address(value))
            case "ca":
                ca_file = value
            case "tee":
                tee = check_tee(value)
            case "ak":
                ak = value
            case _:
                timeout = _seconds(value)
    if not 0 < len(addresses) <= _MAX_ADDRESSES:
        raise KeyFileError(
            f"the kbs: URI names no broker, or more than {_MAX_ADDRESSES}", hint="add ?url=https://HOST:PORT"
        )
    return _Request(KbsOptions(tuple(addresses), ca_file, timeout), path, tee, ak)


def _seconds(text: str) -> float:
    if text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) <= _LONGEST_TIMEOUT:
        return float(text)
    raise KeyFileError(f"timeout={text[:16]!a} is not 1 to {_LONGEST_TIMEOUT} seconds")
