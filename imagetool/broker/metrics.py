"""What Prometheus reads: requests by step and outcome, how long they took, over all processes of one broker; and until
when collateral is valid.

prometheus-client keeps values of several processes in files of a directory; it looks for the directory's name in the
environment when it is imported, so `prepare` comes first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from encfs.attestation.evidence import Collateral
from encfs.errors import StorageError
from encfs.mount.runtime import ENVIRONMENT_VARIABLE, runtime_directory

if TYPE_CHECKING:
    from prometheus_client import Metric

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "metrics-"


@contextmanager
def prepared() -> Iterator[None]:
    """A directory for the values of all processes that are forked within, removed at the end.

    It is in the user's runtime directory, in memory as a rule, and not on the database's disk: files that are mapped
    and cannot grow end a process. It is locked as long as one of the processes lives: those of brokers that were killed
    are removed, and no others.

    Raises: StorageError.
    """
    if "prometheus_client" in sys.modules:
        raise RuntimeError("prometheus-client was imported too early")
    brokers = runtime_directory() / "broker"
    try:
        brokers.mkdir(mode=0o700, exist_ok=True)
        with _opened(brokers) as all_of_them:
            fcntl.flock(all_of_them, fcntl.LOCK_EX)
            for left in brokers.glob(f"{_PREFIX}*"):
                _remove_unused(left)
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=brokers))
            lock = os.open(directory, _OPEN)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise StorageError(
            f"{brokers}, for what the broker's processes count, cannot be used: {error.strerror}",
            hint=f"name another runtime directory in {ENVIRONMENT_VARIABLE}",
        ) from None
    os.environ[_DIRECTORY] = str(directory)
    try:
        yield
    finally:
        del os.environ[_DIRECTORY]
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, _OPEN)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_unused(directory: Path) -> None:
    with _opened(directory) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(directory)


class Metrics:
    """One process's. Made after the fork, or before it and used after it."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self._requests = Counter(
            "encfs_broker_requests_total",
            "Requests by step, HTTP status and reason (ok, or a code of the log)",
            ["step", "status", "reason"],
        )
        self._seconds = Histogram(
            "encfs_broker_request_seconds",
            "From the request's headers to the answer",
            ["step"],
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
        )

    def count(self, step: str, status: int, reason: str, seconds: float) -> None:
        self._requests.labels(step, str(status), reason).inc()
        self._seconds.labels(step).observe(seconds)

    def exposition(self, collateral: Iterable[Collateral]) -> tuple[bytes, str]:
        """The text for Prometheus, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector
        from prometheus_client.registry import Collector

        class Expiries(Collector):
            def collect(self) -> Iterable[Metric]:
                yield _expiries(collateral)

        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        # Not a value of each process's: all read the same directory.
        registry.register(Expiries())
        return generate_latest(registry), CONTENT_TYPE_LATEST


def _expiries(collateral: Iterable[Collateral]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(
        "encfs_broker_collateral_expiry_timestamp_seconds",
        "When Intel's collateral for a platform ends: its quotes are refused from then on",
        labels=("tee", "fmspc", "ca"),
    )
    for one in collateral:
        platform = one.platform
        family.add_metric((platform.kind, platform.fmspc.hex(), platform.ca), one.expires.timestamp())
    return family
