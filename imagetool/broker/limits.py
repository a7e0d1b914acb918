"""How often one address may ask: token buckets, bounded in number. Of one process: each counts by itself."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_MAX_ADDRESSES = 65_536


class RateLimiter:
    """Not thread-safe: for the event loop."""

    def __init__(self, rate: int, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = float(rate), float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, address: str) -> bool:
        """Whether a request of this address is within its rate; it is counted then."""
        now = self._clock()
        tokens, before = self._buckets.pop(address, (self._burst, now))
        tokens = min(self._burst, tokens + (now - before) * self._rate)
        allowed = tokens >= 1
        self._buckets[address] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _MAX_ADDRESSES:
            # The one that asked longest ago: it is the nearest to a full bucket.
            self._buckets.popitem(last=False)
        return allowed
