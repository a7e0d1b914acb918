"""A key provider as a gRPC server: the service that `encfs.keyprovider.client` asks, and skopeo, and ocicrypt-rs.

It answers whoever reaches it. Its address is a unix socket, for the owner alone, or a port of this machine: anything
wider needs TLS with client certificates, and is left to what is made for that.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UsageError,
)
from encfs.keyprovider import grpcmessage
from encfs.keyprovider.protocol import MAX_MESSAGE_SIZE
from encfs.strictjson import show_name

_logger = logging.getLogger(__name__)

_LOCAL = re.compile(r"(?:127(?:\.\d{1,3}){3}|localhost|\[::1\]):\d{1,5}", re.ASCII)
_WORKERS = 4
#: Requests that may wait; more are turned away.
_MAX_CONCURRENT = 64
_GRACE = 5.0
#: Seconds to see whether anything listens at a socket.
_LOOK_TIMEOUT = 1.0


@contextmanager
def serving(address: str, answer: Callable[[bytes], bytearray]) -> Iterator[str]:
    """Serve until the block ends; gives the address, with the port that was taken for port 0.

    `address` is `unix:PATH` or `HOST:PORT` of this machine; `answer` makes the answer to one request.

    Raises: UsageError for another address; ConflictError where it is taken; KeyProviderError without gRPC.
    """
    grpc = grpcmessage.import_grpc()
    path = address.removeprefix("unix:") if address.startswith("unix:") else None
    if path is None and not _LOCAL.fullmatch(address):
        raise UsageError(f"{show_name(address)} is no address of this machine", hint="give unix:PATH or 127.0.0.1:PORT")
    if path is not None:
        _remove_socket(path)
    server = grpc.server(
        ThreadPoolExecutor(_WORKERS, thread_name_prefix="keyprovider"),
        maximum_concurrent_rpcs=_MAX_CONCURRENT,
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_SIZE), ("grpc.so_reuseport", 0)],
    )
    server.add_generic_rpc_handlers((_handlers(grpc, answer),))
    # For the owner alone from the first moment on.
    mask = os.umask(0o177)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise ConflictError(f"{address} cannot be served", hint="is something else serving there?") from None
    finally:
        os.umask(mask)
    server.start()
    try:
        yield address if path is not None else f"{address.rpartition(':')[0]}:{port}"
    finally:
        server.stop(_GRACE).wait(_GRACE)
        if path is not None:
            with suppress(FileNotFoundError):
                os.unlink(path)


def wait_for_signal() -> None:
    """Until SIGTERM or SIGINT."""
    stopped = threading.Event()
    former = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopped.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _handlers(grpc: Any, answer: Callable[[bytes], bytearray]) -> Any:
    codes = {
        FormatError: grpc.StatusCode.INVALID_ARGUMENT,
        NotFoundError: grpc.StatusCode.NOT_FOUND,
        IntegrityError: grpc.StatusCode.PERMISSION_DENIED,
    }

    def handle(message: bytes, context: Any) -> bytes:
        try:
            return grpcmessage.encode(answer(grpcmessage.decode(message)))
        except EncfsError as error:
            _logger.warning("refused: %s", error.message)
            context.abort(codes.get(type(error), grpc.StatusCode.INTERNAL), error.message)
            raise

    method = grpc.unary_unary_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(
        "keyprovider.KeyProviderService", {name.rpartition("/")[2]: method for name in _METHODS}
    )


_METHODS = (grpcmessage.WRAP_METHOD, grpcmessage.UNWRAP_METHOD)


def _remove_socket(path: str) -> None:
    """A socket that a killed server left. Raises: ConflictError, StorageError."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConflictError(f"{path} exists and is no socket")
        with socket.socket(socket.AF_UNIX) as looking:
            looking.settimeout(_LOOK_TIMEOUT)
            looking.connect(path)
        raise ConflictError(f"something is serving at {path}", hint="stop that first, or choose another path")
    except ConnectionRefusedError:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
