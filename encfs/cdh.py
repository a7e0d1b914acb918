"""The Confidential Data Hub of a confidential container (Confidential Containers), as its client.

    GET http://127.0.0.1:8006/cdh/resource/REPOSITORY/TYPE/TAG      api-server-rest: resources, and nothing else
    ttrpc unix:///run/confidential-containers/cdh.sock              the hub itself
        /api.GetResourceService/GetResource      1 "kbs:///…"       -> 1 the resource
        /api.SealedSecretService/UnsealSecret    1 "sealed.…"       -> 1 the plaintext

The hub attests to the key broker that the guest was configured with. Nothing authenticates its clients: whatever shares
the guest's network, or the socket, gets the same. Source: guest-components, protos/confidential-data-hub/api.proto and
api-server-rest.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from encfs.errors import KeyProviderError, TransportError
from encfs.kbs.protocol import MAX_RESOURCE, ResourcePath
from encfs.webclient import Address, Deadline, WebClient

HOST, PORT = "127.0.0.1", 8006
SOCKET = Path("/run/confidential-containers/cdh.sock")
#: Seconds: the hub attests before it answers.
TIMEOUT = 60.0
# Seconds to see whether anything listens; it is on this machine.
_LOOK_TIMEOUT = 1.0
_WHAT = "the Confidential Data Hub"
_RESOURCE_METHOD = "/api.GetResourceService/GetResource"
_UNSEAL_METHOD = "/api.SealedSecretService/UnsealSecret"


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub is. With a `socket` everything is asked there, without one only what HTTP does not offer."""

    port: int = PORT
    socket: Path | None = None

    def resource(self, path: ResourcePath) -> bytearray:
        """A resource in clear, which the caller wipes. Raises: KeyProviderError."""
        if self.socket is not None:
            return self._call(_RESOURCE_METHOD, path.uri.encode("ascii"))
        try:
            with WebClient(Address("http", HOST, self.port, ""), Deadline(TIMEOUT)) as client:
                answer = client.exchange("GET", f"/cdh/resource/{path}", limit=MAX_RESOURCE)
        except TransportError as error:
            raise KeyProviderError(
                f"{_WHAT} gives no answer: {error.message}",
                hint="is this a confidential container with api-server-rest on?",
            ) from None
        if answer.status != 200:
            # 404 where the feature is off, 500 for whatever went wrong behind it.
            raise KeyProviderError(
                f"{_WHAT} refused {path} with status {answer.status}",
                hint="its log, and the key broker's, say why",
            )
        return bytearray(answer.body)

    def unseal(self, secret: bytes) -> bytearray:
        """The plaintext of a sealed secret, `sealed.…`, which the caller wipes. Raises: KeyProviderError."""
        return self._call(_UNSEAL_METHOD, secret)

    def _call(self, method: str, request: bytes) -> bytearray:
        from encfs.keyprovider.ttrpc import call

        path = self.socket if self.socket is not None else SOCKET
        try:
            return call(str(path), method, bytearray(request), TIMEOUT, _WHAT)
        except KeyProviderError as error:
            raise KeyProviderError(
                error.message,
                hint=f"the hub's socket must be in this container ({SOCKET}, or socket=PATH); its log says more",
            ) from None


def hub_problem() -> str | None:
    """Why no hub can be asked on this machine."""
    if SOCKET.is_socket():
        return None
    try:
        with socket.create_connection((HOST, PORT), _LOOK_TIMEOUT):
            return None
    except OSError as error:
        return f"no Confidential Data Hub at {HOST}:{PORT}: {error.strerror or error}"
