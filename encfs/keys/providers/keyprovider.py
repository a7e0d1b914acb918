"""`keyprovider:NAME[:PARAMETERS]`: a key provider of ocicrypt's protocol, as OCICRYPT_KEYPROVIDER_CONFIG has it.

It is handed the packets that it (or one of the same name) made when the artifact was encrypted, and gives back the
content-encryption key, which so leaves it: over a pipe, a unix socket, or gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence

from encfs.keyprovider.client import parse_service
from encfs.keyprovider.config import unavailable
from encfs.keys.recipients import Recipient, unwrap_with_service


class KeyServiceProvider:
    """Has every key unwrapped elsewhere, and keeps nothing."""

    def __init__(self, rest: str) -> None:
        self._service = parse_service(rest)

    @staticmethod
    def unavailable() -> str | None:
        return unavailable()

    @property
    def uri(self) -> str:
        return str(self._service)

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        return unwrap_with_service(self._service.name, self._service.unwrap, recipients, content_digest)

    def close(self) -> None:
        return
