"""What works beside the mount of an artifact in a registry: read-ahead, the background fetch, and their counters.

Threads do not survive the way into the background: until the mount answers in its daemon, nothing is read ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from encfs.artifact import Artifact
from encfs.oci.counters import TransferCounters
from encfs.oci.lanes import Lanes
from encfs.oci.layoutsource import LayoutSource
from encfs.prefetching import Prefetch, Selection

if TYPE_CHECKING:
    from encfs.oci.blobs import BlobSource
    from encfs.oci.fetcher import Fetcher


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
    fetcher = _fetcher_of(artifact.source)
    if fetcher is None:
        return LazyReading(TransferCounters(), prefetch, None)
    return LazyReading(fetcher.counters, prefetch, fetcher.lanes)


def hold_threads(source: BlobSource) -> None:
    """Have no thread of the source's started until the artifact's `LazyReading` is: the process is going to fork."""
    fetcher = _fetcher_of(source)
    if fetcher is not None:
        fetcher.lanes.read_ahead = False


def _fetcher_of(source: BlobSource) -> Fetcher | None:
    """What a registry's blobs are fetched by."""
    if isinstance(source, LayoutSource):
        # The registry's client takes a while to load, and layouts do without it.
        return None
    from encfs.oci.cached import CachedSource

    return source.fetcher if isinstance(source, CachedSource) else None
