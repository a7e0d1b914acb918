"""What works beside the mount of an artifact in a registry: read-ahead, the background fetch, and their counters.

Threads do not survive the way into the background: until the mount answers in its daemon, nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Mapping

from encfs.artifact import Artifact
from encfs.oci.counters import TransferCounters
from encfs.oci.lanes import Lanes
from encfs.oci.layoutsource import LayoutSource
from encfs.prefetching import Prefetch, Selection


class LazyReading:
    """A `Companion`."""

    def __init__(self, counters: TransferCounters, prefetch: Prefetch, lanes: Lanes | None) -> None:
        """`lanes`: of the registry, if the artifact is in one."""
        self._counters = counters
        self._prefetch = prefetch
        self._lanes = lanes
        if lanes is not None:
            lanes.read_ahead = False

    def start(self) -> None:
        if self._lanes is not None:
            self._lanes.read_ahead = True
        self._prefetch.start()

    def transfer(self) -> Mapping[str, float]:
        return self._counters.to_json()

    def prefetch(self) -> Mapping[str, object]:
        return self._prefetch.status()

    def close(self) -> None:
        self._prefetch.close()


def companion_for(artifact: Artifact, selection: Selection, *, rate: int | None = None) -> LazyReading:
    """What works beside the mount of `artifact`. Raises: UsageError, as `Prefetch`."""
    prefetch = Prefetch(artifact, selection, rate=rate)
    source = artifact.source
    if not isinstance(source, LayoutSource):
        # The registry's client takes a while to load, and layouts do without it.
        from encfs.oci.cached import CachedSource

        if isinstance(source, CachedSource):
            return LazyReading(source.counters, prefetch, source.fetcher.lanes)
    return LazyReading(TransferCounters(), prefetch, None)
