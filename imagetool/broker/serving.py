"""The broker's processes: one that holds the socket and watches, and workers that are forked from it and serve.

Forked, not started anew: the KEK is asked for once, and what is loaded is shared memory. A worker that dies is
replaced; sessions are in the database, so nothing but the requests it was at is lost, and clients repeat those.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from encfs.errors import FormatError, NotFoundError, StorageError, UsageError
from encfs.hardening import forbid_swapping
from encfs.kbs.protocol import MAX_MESSAGE
from imagetool.broker.config import BrokerConfig
from imagetool.broker.endorsements import EndorsementDirectory, Reminder
from imagetool.broker.opening import OpenedBroker
from imagetool.broker.rollback import check_mark

#: Connections of one worker.
_MAX_CONNECTIONS = 1000
#: Descriptors that a worker wants: those connections, as many whose handshake has not ended, database, sockets.
_WANTED_FILES = 4096
#: Bytes of messages that one worker has in memory.
_BODIES_SIZE = 32 << 20
#: Bytes that a request has on the average; most evidence is smaller.
_REQUEST_SIZE = 32 << 10
_KEEP_ALIVE = 15
_BACKLOG = 1024
#: Seconds for requests under way when a broker is ended.
_GRACE = 10
#: Seconds between a worker's death and its successor.
_RESTART_PAUSE = 0.5
_PARENT_CHECK = 1.0
#: Seconds between looks at the endorsements.
_LOOK_INTERVAL = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`plain`: without TLS. `workers`: processes. `demo`: `sample` evidence is let through where a rule names it."""

    host: str
    port: int
    plain: bool = False
    demo: bool = False
    workers: int = 2


@contextmanager
def listening(options: ServeOptions) -> Iterator[socket.socket]:
    """The socket that all workers accept from. Raises: UsageError, StorageError."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):  # the latter for names that no DNS has
        raise UsageError(f"{options.host[:64]!a} is no address to listen on", hint="write HOST:PORT") from None
    with socket.socket(family, kind, number) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise StorageError(f"cannot listen on {options.host}:{options.port}: {error.strerror}") from None
        yield listener


def server_context(config: BrokerConfig) -> ssl.SSLContext:
    """TLS 1.2 and later with the broker's certificate. Raises: UsageError, NotFoundError, FormatError."""
    if config.certificate is None or config.private_key is None:
        raise UsageError(
            "the broker has no certificate", hint="name certificate and private_key in broker.toml, or --plain-http"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    chain, key = config.path(config.certificate), config.path(config.private_key)
    for path in (chain, key):
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist", hint="it is named in broker.toml")
    try:
        # A key under a passphrase would be asked for on the terminal.
        context.load_cert_chain(chain, key, password=_no_passphrase)
    except (ssl.SSLError, ValueError):
        raise FormatError(f"{chain} and {key} are no certificate with its key (PEM, without a passphrase)") from None
    return context


def _no_passphrase() -> str:
    raise ValueError("keys under a passphrase are not supported")


def prepare(opened: OpenedBroker) -> EndorsementDirectory:
    """What must be in order before anybody is served: the state, the mark of its epoch, the endorsements.

    Raises: IntegrityError, RollbackError and others.
    """
    state = opened.load_state()
    if opened.config.mark is not None:
        check_mark(opened.config.mark, state.epoch)
    return EndorsementDirectory(opened.config.endorsements_path)


def serve(
    opened: OpenedBroker, options: ServeOptions, listener: socket.socket, endorsements: EndorsementDirectory
) -> None:
    """Serve until a signal ends it, which arrives as KeyboardInterrupt."""
    context = None if options.plain else server_context(opened.config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _WANTED_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_WANTED_FILES, hard), hard))
    # Connections to a database do not survive a fork: each worker makes its own.
    opened.database.close()
    _load_what_workers_need()
    gc.collect()
    gc.freeze()
    workers: set[int] = set()
    reminder = Reminder(endorsements)
    # Waited for, with a limit: it stays pending until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        while True:
            while len(workers) < options.workers:
                workers.add(_fork(opened, options, listener, context, endorsements))
            reminder.look()
            signal.sigtimedwait({signal.SIGCHLD}, _LOOK_INTERVAL)
            if _reap(workers):
                time.sleep(_RESTART_PAUSE)
    finally:
        _end(workers)


def _reap(workers: set[int]) -> bool:
    """Take those out of the workers that have ended; whether there were any."""
    before = len(workers)
    for worker in list(workers):
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid:
            workers.discard(pid)
            _logger.error("a worker ended (%s) and is replaced", _cause(status))
    return len(workers) < before


def _load_what_workers_need() -> None:
    """Before the fork, so that all of them share it; not before the listening address was told."""
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

    import imagetool.broker.app
    import imagetool.broker.httpbounds  # noqa: F401


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(workers: set[int]) -> None:
    for pid in list(workers):
        if not _signal(pid, signal.SIGTERM):
            workers.discard(pid)
    deadline = time.monotonic() + _GRACE + 2
    while workers and time.monotonic() < deadline:
        for pid in list(workers):
            if os.waitpid(pid, os.WNOHANG)[0]:
                workers.discard(pid)
        time.sleep(0.02)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _signal(pid: int, number: int) -> bool:
    """Whether it is still a child: the signal that ends us may come between a worker's end and its being noted."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _fork(
    opened: OpenedBroker,
    options: ServeOptions,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    endorsements: EndorsementDirectory,
) -> int:
    # A signal that comes between fork and the child's own handlers must not run the parent's clean-up in the child.
    blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    # Not asked for later: by then it may have died, and another be the parent.
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            for number in blocked:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked | {signal.SIGCHLD})
            _work(opened, options, listener, context, endorsements, parent)
            code = 0
        except BaseException as error:  # noqa: BLE001 -- nothing of the parent's may run in the child
            _logger.error("a worker cannot serve: %s: %s", type(error).__name__, error)  # noqa: TRY400 -- no values
        finally:
            sys.stderr.flush()
            os._exit(code)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


def _work(
    opened: OpenedBroker,
    options: ServeOptions,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    endorsements: EndorsementDirectory,
    parent: int,
) -> None:
    import asyncio

    import uvicorn

    from imagetool.broker.app import Limits, make_app
    from imagetool.broker.database import Database
    from imagetool.broker.handlers import Broker, Settings
    from imagetool.broker.httpbounds import Loop, bounded_protocol
    from imagetool.broker.limits import ByteBudget, RateLimiter
    from imagetool.broker.metrics import Metrics

    # Locked memory is not inherited.
    forbid_swapping()
    config = opened.config
    broker = Broker(
        Database(opened.database.url),
        opened.vault,
        endorsements,
        Settings(config.session_lifetime, config.max_sessions, options.demo, config.mark),
    )
    # An address has a half of all sessions at most, over all processes.
    share = max(config.max_sessions // (4 * options.workers), 1)
    limits = Limits(
        requests=RateLimiter(config.rate, config.burst),
        volume=RateLimiter(config.rate * _REQUEST_SIZE, max(config.burst * _REQUEST_SIZE, MAX_MESSAGE)),
        sessions=RateLimiter(share / config.session_lifetime, share),
        bodies=ByteBudget(_BODIES_SIZE),
    )
    app = make_app(broker, limits, Metrics(), secure=context is not None)
    settings = uvicorn.Config(
        app,
        http=bounded_protocol(config.burst),
        loop="none",  # ours, below
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        # Nobody stands in front of it unless the operator says so, and headers are anybody's to write.
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        # The context was made and checked before the fork.
        ssl_context_factory=(lambda _config, _default: context) if context is not None else None,
    )
    server = uvicorn.Server(settings)

    async def run() -> None:
        watching = asyncio.create_task(_watch(server, parent))
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(run())


async def _watch(server: object, parent: int) -> None:
    """End when the process that holds the socket is gone: nobody could end this one any more."""
    import asyncio

    while os.getppid() == parent:
        await asyncio.sleep(_PARENT_CHECK)
    server.should_exit = True  # type: ignore[attr-defined]


def default_workers() -> int:
    """As many as there are processors for this process, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def split_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, with brackets around an IPv6 address. Raises: UsageError."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UsageError(f"{text[:64]!a} is not HOST:PORT", hint="such as 127.0.0.1:8080 or [::]:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


def relative_to(directory: Path, path: str) -> str:
    """A path for `broker.toml`: relative to the broker's directory where it lies there."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(directory)) if absolute.is_relative_to(directory) else str(absolute)
