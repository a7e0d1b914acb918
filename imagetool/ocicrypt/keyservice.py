"""Be a key provider of ocicrypt's: wrap and unwrap with key-encryption keys that are named as a key broker's resources.

Packets are those of Confidential Containers. Not here: how requests come and go (`grpcserver`, the command).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from encfs.errors import FormatError, KeyFileError, NotFoundError, UsageError
from encfs.keyprovider.protocol import (
    DEFAULT_PARAMETERS,
    UnwrapRequest,
    WrapRequest,
    parse_request,
    unwrap_answer,
    wrap_answer,
)
from encfs.keys.providers import fetched_key
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.strictjson import show_name
from imagetool.ocicrypt import packets


class KeyService:
    """Answers requests. Holds keys: close it."""

    def __init__(self, keys: Mapping[str, SymmetricKey], name: str = packets.PROVIDER) -> None:
        """`keys` by the URI that packets name, taken over; `name` is what clients call this provider."""
        self._keys = dict(keys)
        self._name = name

    def answer(self, request: bytes | bytearray) -> bytearray:
        """The answer to one untrusted request, to be wiped by the caller.

        Raises: FormatError, NotFoundError where no such key is here, IntegrityError for a packet of another key.
        """
        parsed = parse_request(request)
        if isinstance(parsed, UnwrapRequest):
            return self._unwrap(parsed)
        try:
            return self._wrap(parsed)
        finally:
            wipe(parsed.options)

    def close(self) -> None:
        for key in self._keys.values():
            key.wipe()

    def _wrap(self, request: WrapRequest) -> bytearray:
        if not request.options:
            raise FormatError("the request has nothing to wrap")
        kid = self._wanted(request.parameters.get(self._name, ()))
        return wrap_answer(packets.wrap(request.options, self._key(kid), kid))

    def _unwrap(self, request: UnwrapRequest) -> bytearray:
        packet = packets.parse(request.annotation)
        options = packets.unwrap(packet, self._key(packet.kid))
        try:
            return unwrap_answer(options)
        finally:
            wipe(options)

    def _key(self, kid: str) -> SymmetricKey:
        key = self._keys.get(kid)
        if key is None:
            raise NotFoundError(f"there is no key {show_name(kid)} here")
        return key

    def _wanted(self, parameters: Sequence[bytes]) -> str:
        """The key that a client asked for: `keyid=KID[::algorithm=A256GCM]` as CoCo's provider takes it, or `KID`."""
        text = b"".join(parameters[:1]).decode("utf-8", "replace")
        if text in ("", DEFAULT_PARAMETERS.decode()):
            if len(self._keys) != 1:
                raise FormatError("the request names no key, and there are several here")
            return next(iter(self._keys))
        if "=" not in text.partition("?")[0]:
            return text
        options = dict(part.partition("=")[::2] for part in text.split("::"))
        if unknown := set(options) - {"keyid", "algorithm"}:
            raise FormatError(f"the parameter {show_name(min(unknown))} is not supported")
        if options.get("algorithm", "A256GCM") != "A256GCM":
            raise FormatError(f"the algorithm {show_name(options['algorithm'])} is not supported; A256GCM is")
        if "keyid" not in options:
            raise FormatError("the request names no key")
        return options["keyid"]


def load_keys(texts: Sequence[str]) -> dict[str, SymmetricKey]:
    """The keys of `KID=KEYURI`, the first of each KID, wiped by the caller.

    Raises: UsageError, KeyFileError, and others of key URIs.
    """
    keys: dict[str, SymmetricKey] = {}
    try:
        for kid, uri in map(_split, texts):
            if kid not in keys:
                keys[kid] = kek_from_uri(uri)
    except BaseException:
        for key in keys.values():
            key.wipe()
        raise
    return keys


def _split(text: str) -> tuple[str, str]:
    kid, separator, uri = text.partition("=")
    if not separator or not uri:
        raise UsageError(f"{show_name(text)} is not of the form KID=KEYURI")
    return packets.check_kid(kid), uri


def kek_from_uri(uri: str) -> SymmetricKey:
    """The key-encryption key of a key URI, or in a file as a key broker has it: 32 bytes, or JWK, or base64 of them.

    Raises: KeyFileError, NotFoundError, and others of key URIs.
    """
    from imagetool.ocicrypt.keyfiles import load_private

    scheme, separator, rest = uri.partition(":")
    if separator and scheme != "file":
        return fetched_key(uri, bare=True)
    path = rest if separator else uri
    key = load_private(path)
    if not isinstance(key, SymmetricKey):
        raise KeyFileError(f"{path} is no symmetric key, and one of 32 bytes is needed")
    return key
