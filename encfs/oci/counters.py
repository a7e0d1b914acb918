"""What was transferred since a store was opened: one object for all its registries, mirrors and caches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class TransferCounters:
    """Counters that only grow. Thread-safe; `to_json` is what `encfs status` shows and monitoring exports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {
            "bytes_from_registry": 0,
            "bytes_from_cache": 0,
            "bytes_read_ahead": 0,
            "bytes_prefetched": 0,
            "requests": 0,
            "retries": 0,
            "refetches": 0,
            "reads_waited": 0,
            "seconds_waited": 0.0,
        }

    def add(self, name: str, amount: float = 1) -> None:
        """Raises: KeyError for a counter that is not there."""
        with self._lock:
            self._counts[name] += amount

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a read that has to wait, and for how long."""
        started = monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._counts["reads_waited"] += 1
                self._counts["seconds_waited"] += monotonic() - started

    def to_json(self) -> dict[str, float]:
        """Bytes, numbers of things, and seconds, by name: `bytes_from_registry` counts bodies as they arrived."""
        with self._lock:
            counts = dict(self._counts)
        counts["seconds_waited"] = round(counts["seconds_waited"], 3)
        return counts
