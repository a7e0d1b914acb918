"""`cdh:REPOSITORY/TYPE/TAG[?port=N]`: a key from the Confidential Data Hub of this guest (Confidential Containers).

`cdh:sealed=FILE[?port=N]`: the same by a sealed secret in a file, whose signature is checked first.

The hub listens on the loopback interface, attests to the key broker that the guest was configured with, and gives the
resource in clear: to everything in this guest's network namespace.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from encfs.errors import FormatError, KeyFileError, KeyProviderError, TransportError
from encfs.kbs.protocol import MAX_RESOURCE, ResourcePath, parse_path
from encfs.kbs.resource import ReleasedKey, parse_resource
from encfs.keys.jwk import PublicKey
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.trust import KeyBinding
from encfs.webclient import Address, Deadline, WebClient

#: Where api-server-rest listens.
HOST, PORT = "127.0.0.1", 8006
#: Seconds: the hub attests before it answers.
TIMEOUT = 60.0
# Seconds to see whether anything listens; it is on this machine.
_LOOK_TIMEOUT = 1.0
_HINT = "write cdh:REPOSITORY/TYPE/TAG or cdh:sealed=FILE"


class CdhProvider:
    """Unwraps with a key that the hub fetched; keeps it until `close`."""

    def __init__(self, rest: str) -> None:
        self._path, self._sealed, self._port = _parse(rest)
        self._released: ReleasedKey | None = None

    @staticmethod
    def unavailable() -> str | None:
        try:
            with socket.create_connection((HOST, PORT), _LOOK_TIMEOUT):
                return None
        except OSError as error:
            return f"no Confidential Data Hub at {HOST}:{PORT}: {error.strerror or error}"

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
        content = self._resource(self._path or self._named_by_secret())
        try:
            return parse_resource(content, self.uri)
        finally:
            wipe(content)

    def _named_by_secret(self) -> ResourcePath:
        """Raises: KeyFileError for a secret that is malformed or not signed by its key."""
        from encfs.keys.files import load_trusted_key, parse_key, read_key_file
        from encfs.keys.jwk import PrivateKey
        from encfs.keys.sealedsecret import CREDENTIALS, parse_sealed_secret

        content, _ = read_key_file(self._sealed)
        secret = parse_sealed_secret(bytes(content), self._sealed)
        try:
            resource = secret.key_resource
            if resource is None:
                key: object = load_trusted_key(CREDENTIALS / secret.key_file)
            else:
                found = parse_key(self._resource(resource), secret.kid)
                key = found.public if isinstance(found, PrivateKey) else found
            if not isinstance(key, PublicKey):
                raise KeyFileError(f"{secret.kid} is no public key")
            secret.verify(key)
            return secret.resource()
        except FormatError as error:
            raise KeyFileError(f"{self._sealed}: {error.message}") from None

    def _resource(self, path: ResourcePath) -> bytearray:
        """A resource in clear, which the caller wipes. Raises: KeyProviderError."""
        address = Address("http", HOST, self._port, "")
        try:
            with WebClient(address, Deadline(TIMEOUT)) as client:
                answer = client.exchange("GET", f"/cdh/resource/{path}", limit=MAX_RESOURCE)
        except TransportError as error:
            raise KeyProviderError(
                f"the Confidential Data Hub gives no answer: {error.message}",
                hint="is this a confidential container with api-server-rest on?",
            ) from None
        if answer.status != 200:
            # 404 where the feature is off, 500 for whatever went wrong behind it.
            raise KeyProviderError(
                f"the Confidential Data Hub refused {path} with status {answer.status}",
                hint="its log, and the key broker's, say why",
            )
        return bytearray(answer.body)


def _parse(rest: str) -> tuple[ResourcePath | None, str, int]:
    name, separator, option = rest.partition("?")
    port = PORT
    if separator:
        number = option.removeprefix("port=")
        if number == option or not (number.isascii() and number.isdecimal() and len(number) < 6):
            raise KeyFileError("the cdh: URI has an option other than port=N", hint=_HINT)
        port = int(number)
    if not 0 < port < 1 << 16:
        raise KeyFileError(f"{port} is no port", hint=_HINT)
    sealed = name.removeprefix("sealed=")
    if sealed and sealed != name:
        return None, sealed, port
    try:
        return parse_path(name), "", port
    except FormatError as error:
        raise KeyFileError(error.message, hint=_HINT) from None
