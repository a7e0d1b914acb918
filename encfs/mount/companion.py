"""What works beside a mount in its daemon, and is shown with it: a protocol, and the one that does nothing.

Not here: what it does (`encfs.lazy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Companion(Protocol):
    """Work beside a mount. It must not start a thread before `start`, which is called in the daemon's process."""

    def start(self) -> None:
        """The mount answers. Must not block."""

    def transfer(self) -> Mapping[str, float]:
        """Counters of what was transferred; see `encfs.oci.counters.TransferCounters`."""

    def prefetch(self) -> Mapping[str, object]:
        """How far the background fetch is; see `encfs.prefetching.Prefetch.status`."""

    def close(self) -> None:
        """The mount has ended."""


class NoCompanion:
    """Nothing works beside the mount."""

    def start(self) -> None:
        return

    def transfer(self) -> Mapping[str, float]:
        return {}

    def prefetch(self) -> Mapping[str, object]:
        return {}

    def close(self) -> None:
        return
