"""What works beside the mount of an artifact in a registry: read-ahead, the background fetch, and their counters.

Threads do not survive the way into the background: until the mount answers in its daemon, nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Mapping

from encfs.artifact import Artifact
from encfs.mount.companion import Companion, NoCompanion
from encfs.oci.cached import CachedSource
from encfs.prefetching import Prefetch, Selection


class LazyReading:
    """A `Companion`."""

    def __init__(self, source: CachedSource, prefetch: Prefetch) -> None:
        self._source = source
        self._prefetch = prefetch
        source.fetcher.lanes.read_ahead = False

    def start(self) -> None:
        self._source.fetcher.lanes.read_ahead = True
        self._prefetch.start()

    def transfer(self) -> Mapping[str, float]:
        return self._source.counters.to_json()

    def prefetch(self) -> Mapping[str, object]:
        return self._prefetch.status()

    def close(self) -> None:
        self._prefetch.close()


def companion_for(artifact: Artifact, selection: Selection, *, rate: int | None = None) -> Companion:
    """What works beside the mount of `artifact`. Raises: UsageError, as `Prefetch`."""
    prefetch = Prefetch(artifact, selection, rate=rate)
    if not isinstance(artifact.source, CachedSource):
        return NoCompanion()
    return LazyReading(artifact.source, prefetch)
