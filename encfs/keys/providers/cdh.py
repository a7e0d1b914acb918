"""`cdh:REPOSITORY/TYPE/TAG`: a key from the Confidential Data Hub of this guest (Confidential Containers).

`cdh:sealed=FILE`: the same by a sealed secret in a file, whose signature is checked first. Of type `vault` it names a
resource of the hub; any other has the hub itself unseal it, over its socket.

| option | |
|---|---|
| `port=N` | where api-server-rest listens on the loopback interface, 8006 by default |
| `socket=PATH` | the hub's own socket, for everything; without it only unsealing is done there, at the usual place |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from encfs.cdh import PORT, Hub, hub_problem
from encfs.errors import FormatError, KeyFileError
from encfs.kbs.protocol import ResourcePath, parse_path
from encfs.kbs.resource import ReleasedKey, parse_resource
from encfs.keys.jwk import PublicKey
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.keys.uriquery import query_options
from encfs.strictjson import show_name
from encfs.trust import KeyBinding

_HINT = "write cdh:REPOSITORY/TYPE/TAG or cdh:sealed=FILE, with ?port=N or ?socket=PATH behind it"
_MAX_SOCKET_PATH = 100


class CdhProvider:
    """Unwraps with a key that the hub fetched; keeps it until `close`."""

    def __init__(self, rest: str) -> None:
        self._path, self._sealed, self._hub = _parse(rest)
        self._released: ReleasedKey | None = None

    @staticmethod
    def unavailable() -> str | None:
        return hub_problem()

    @property
    def uri(self) -> str:
        return f"cdh:sealed={self._sealed}" if self._path is None else f"cdh:{self._path}"

    @property
    def binding(self) -> KeyBinding:
        return self._released.binding if self._released is not None else KeyBinding()

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        if self._released is None:
            self._released = self._fetch()
        kid = self._path.uri if self._path is not None else None
        return unwrap_with_key(self._released.key, recipients, content_digest, self.uri, kid=kid)

    def fetch(self) -> SymmetricKey:
        if self._released is None:
            self._released = self._fetch()
        if not isinstance(self._released.key, SymmetricKey):
            raise KeyFileError(f"{self.uri} holds a private key: encrypt to its public half instead")
        return SymmetricKey(bytearray(self._released.key.secret), self._path.uri if self._path is not None else None)

    def close(self) -> None:
        if self._released is not None:
            self._released.wipe()
        self._released = None

    def _fetch(self) -> ReleasedKey:
        content = self._hub.resource(self._path) if self._path is not None else self._by_secret()
        try:
            return parse_resource(content, self.uri)
        finally:
            wipe(content)

    def _by_secret(self) -> bytearray:
        """What the sealed secret stands for. Raises: KeyFileError where it is malformed or not signed by its key."""
        from encfs.keys.files import load_trusted_key, parse_key, read_key_file
        from encfs.keys.jwk import PrivateKey
        from encfs.keys.sealedsecret import CREDENTIALS, parse_sealed_secret

        content, _ = read_key_file(self._sealed)
        secret = parse_sealed_secret(bytes(content), self._sealed)
        try:
            signer = secret.key_resource
            if signer is None:
                key: object = load_trusted_key(CREDENTIALS / secret.key_file)
            else:
                found = parse_key(self._hub.resource(signer), secret.kid)
                key = found.public if isinstance(found, PrivateKey) else found
            if not isinstance(key, PublicKey):
                raise KeyFileError(f"{secret.kid} is no public key")
            secret.verify(key)
            resource = secret.resource()
        except FormatError as error:
            raise KeyFileError(f"{self._sealed}: {error.message}") from None
        return self._hub.resource(resource) if resource is not None else self._hub.unseal(secret.text)


def _parse(rest: str) -> tuple[ResourcePath | None, str, Hub]:
    name, separator, query = rest.partition("?")
    hub = _parse_hub(query) if separator else Hub()
    sealed = name.removeprefix("sealed=")
    if sealed and sealed != name:
        return None, sealed, hub
    try:
        return parse_path(name), "", hub
    except FormatError as error:
        raise KeyFileError(error.message, hint=_HINT) from None


def _parse_hub(query: str) -> Hub:
    options = dict(query_options(query, "cdh", ("port", "socket"), hint=_HINT))
    port, path = options.get("port", str(PORT)), options.get("socket")
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise KeyFileError(f"{port[:16]!a} is no port", hint=_HINT)
    if path is not None and not (path.startswith("/") and len(path) <= _MAX_SOCKET_PATH):
        raise KeyFileError(f"socket={show_name(path)} is no absolute path of a socket", hint=_HINT)
    return Hub(int(port), Path(path) if path is not None else None)
