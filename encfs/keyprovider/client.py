"""Ask a key provider: a program over its standard streams, a gRPC server, or a ttrpc server on a unix socket.

Every request has a time limit, and every answer a size. Requests carry keys, so gRPC without TLS goes to this machine
only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encfs.childprocess import run_bounded
from encfs.errors import FormatError, KeyFileError, KeyProviderError
from encfs.keyprovider import grpcmessage
from encfs.keyprovider.config import Command, GrpcServer, Service, TlsFiles, find_service, is_name
from encfs.keyprovider.protocol import (
    DEFAULT_PARAMETERS,
    MAX_MESSAGE_SIZE,
    parse_unwrap_answer,
    parse_wrap_answer,
    unwrap_request,
    wrap_request,
)
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name

#: Seconds that one request may take: a provider may have to attest first.
TIMEOUT = 60.0
_LOCAL = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\]):\d{1,5}", re.ASCII)
_MAX_TLS_FILE = 256 << 10


@dataclass(frozen=True, slots=True)
class KeyService:
    """A named provider and the parameters to give it. It is looked up in the configuration when it is asked."""

    name: str
    parameters: bytes
    timeout: float = TIMEOUT

    def __str__(self) -> str:
        return f"keyprovider:{self.name}"

    def wrap(self, options: bytes | bytearray) -> bytes:
        """The packet that the provider makes of some secret options. Raises: KeyProviderError."""
        answer = self._ask(wrap_request(self.name, self.parameters, options), grpcmessage.WRAP_METHOD)
        try:
            return parse_wrap_answer(answer, str(self))
        except FormatError as error:
            raise KeyProviderError(error.message) from None
        finally:
            wipe(answer)

    def unwrap(self, packet: bytes) -> bytearray:
        """The options in a packet, to be wiped by the caller. Raises: KeyProviderError."""
        answer = self._ask(unwrap_request(self.name, self.parameters, packet), grpcmessage.UNWRAP_METHOD)
        try:
            return parse_unwrap_answer(answer, str(self))
        except FormatError as error:
            raise KeyProviderError(error.message) from None
        finally:
            wipe(answer)

    def _ask(self, request: bytearray, method: str) -> bytearray:
        try:
            return _ask(find_service(self.name), request, method, self.timeout, str(self))
        finally:
            wipe(request)


def parse_service(text: str) -> KeyService:
    """`NAME[:PARAMETERS]`. Raises: KeyFileError."""
    name, separator, parameters = text.partition(":")
    if not is_name(name):
        raise KeyFileError(
            f"{show_name(name)} cannot be the name of a key provider", hint="write keyprovider:NAME[:PARAMETERS]"
        )
    return KeyService(name, parameters.encode() if separator and parameters else DEFAULT_PARAMETERS)


def _ask(service: Service, request: bytearray, method: str, timeout: float, what: str) -> bytearray:
    if isinstance(service, Command):
        return _run(service, request, timeout, what)
    if isinstance(service, GrpcServer):
        return _call(service, request, method, timeout, what)
    from encfs.keyprovider.ttrpc import call

    return call(service.path, method, request, timeout, what)


def _run(command: Command, request: bytearray, timeout: float, what: str) -> bytearray:
    finished = run_bounded(command.words, request, limit=MAX_MESSAGE_SIZE, timeout=timeout, what=what)
    if finished.status != 0:
        wipe(finished.output)
        raise KeyProviderError(f"{what} failed with status {finished.status}: {finished.complaint()}")
    return finished.output


def _call(server: GrpcServer, request: bytearray, method: str, timeout: float, what: str) -> bytearray:
    if server.tls is None and not server.address.startswith("unix:") and not _LOCAL.fullmatch(server.address):
        raise KeyProviderError(
            f"{what} is at {show_name(server.address)}, and keys are sent to other machines under TLS only",
            hint='add "grpc-tls": {"root-ca-file": FILE} to its configuration',
        )
    grpc = grpcmessage.import_grpc()
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_SIZE),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]
    if server.tls is None:
        channel = grpc.insecure_channel(server.address, options=options)
    else:
        if server.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", server.tls.server_name))
        channel = grpc.secure_channel(server.address, _credentials(grpc, server.tls), options=options)
    try:
        answer: bytes = channel.unary_unary(method)(grpcmessage.encode(request), timeout=timeout)
        return bytearray(grpcmessage.decode(answer))
    except grpc.RpcError as error:
        detail = ascii(str(error.details()))[1:-1][:300]
        raise KeyProviderError(f"{what} failed with {error.code().name}: {detail}") from None
    except FormatError as error:
        raise KeyProviderError(f"{what}: {error.message}") from None
    finally:
        channel.close()


def _credentials(grpc: Any, tls: TlsFiles) -> Any:
    return grpc.ssl_channel_credentials(_read(tls.authorities), _read(tls.key), _read(tls.certificate))


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_TLS_FILE)
    except OSError as error:
        raise KeyProviderError(f"a file for TLS with a key provider, {path}: {error.strerror}") from None
