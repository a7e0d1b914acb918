"""How often one address may ask, and how much it may send at once. Of one process: each counts by itself."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

_MAX_ADDRESSES = 65_536


class RateLimiter:
    """Token buckets, bounded in number. Not thread-safe: for the event loop."""

    def __init__(self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = float(rate), float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, address: str, cost: int = 1) -> bool:
        """Whether something of this address is within its rate; it is counted then."""
        now = self._clock()
        address = network(address)
        tokens, before = self._buckets.pop(address, (self._burst, now))
        tokens = min(self._burst, tokens + (now - before) * self._rate)
        allowed = tokens >= cost
        self._buckets[address] = (tokens - cost if allowed else tokens, now)
        if len(self._buckets) > _MAX_ADDRESSES:
            # The one that asked longest ago: it is the nearest to a full bucket.
            self._buckets.popitem(last=False)
        return allowed


class ByteBudget:
    """What may be in memory of requests that are not yet answered. Not thread-safe: for the event loop."""

    def __init__(self, size: int) -> None:
        """`size` in bytes; one address has half of it at most."""
        self._left = size
        self._share = size // 2
        self._taken: Counter[str] = Counter()

    def take(self, address: str, size: int) -> bool:
        """Whether so many bytes more are there for an address; they are taken then, until `give_back`."""
        name = network(address)
        if size > self._left or self._taken[name] + size > self._share:
            return False
        self._left -= size
        self._taken[name] += size
        return True

    def give_back(self, address: str, size: int) -> None:
        name = network(address)
        self._left += size
        self._taken[name] -= size
        if not self._taken[name]:
            del self._taken[name]


def network(address: str) -> str:
    """What counts as one address: of IPv6 the /64, within which everybody has as many as he likes."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:  # no address of the Internet's
        return address
    if not isinstance(found, IPv6Address):
        return address
    return str(found.ipv4_mapped) if found.ipv4_mapped is not None else found.packed[:8].hex()
