"""What a mount counts, as Prometheus reads it (text exposition format 0.0.4). Not here: who serves it (`health`)."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator, Mapping

from encfs.mount.options import MountStatus

#: Upper bounds of the buckets, in seconds: from a frame in memory to a registry that hardly answers.
_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
#: Seconds after which a read that waits counts as hung.
_HUNG = 10.0

#: Counters of the status: member, name, help.
_COUNTERS = (
    ("bytes_read", "encfs_read_bytes_total", "Plaintext bytes that were read from the volumes."),
    ("bytes_fetched", "encfs_stored_bytes_total", "Bytes of segments and trees that were read from the store."),
    ("frames_verified", "encfs_frames_verified_total", "Frames that were verified and decrypted."),
    ("cache_hits", "encfs_plaintext_cache_hits_total", "Frames that were found in the daemon's memory."),
    ("failures", "encfs_verify_failures_total", "Frames and nodes that did not verify, or could not be had."),
    ("requests_failed", "encfs_requests_failed_total", "Requests that were answered with an error of the mount's own."),
    ("requests_waited", "encfs_requests_waited_total", "Requests that waited for disk or network."),
)


class ReadTimes:
    """How long reads take, and which take too long. For the event loop's thread."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0
        self._waiting: dict[int, float] = {}
        self._next = 0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self.total += seconds

    def begin(self) -> int:
        """A read has to wait. Returns what ends it."""
        self._next += 1
        self._waiting[self._next] = time.monotonic()
        return self._next

    def end(self, number: int) -> None:
        self._waiting.pop(number, None)

    @property
    def hung(self) -> int:
        now = time.monotonic()
        return sum(now - since > _HUNG for since in self._waiting.values())


def render(status: MountStatus, times: ReadTimes, *, ready: bool) -> str:
    """All of it."""
    return "".join(f"{line}\n" for line in _lines(status, times, ready))


def _lines(status: MountStatus, times: ReadTimes, ready: bool) -> Iterator[str]:
    labels = {"mountpoint": status.mountpoint, "content_digest": status.content_digest, "backend": status.backend}
    yield from _metric("encfs_mount_info", "gauge", "What is mounted.", 1, labels)
    yield from _metric("encfs_ready", "gauge", "Whether the mount answers.", int(ready))
    yield from _metric("encfs_uptime_seconds", "gauge", "Age of this daemon.", max(0.0, time.time() - status.started))
    yield from _metric("encfs_restarts_total", "counter", "Daemons before this one.", status.restarts)
    for member, name, about in _COUNTERS:
        yield from _metric(name, "counter", about, status.stats.get(member, 0))
    for member, value in status.transfer.items():
        kind = "gauge" if member.endswith(("rate", "latency", "depth", "seconds", "lanes")) else "counter"
        name = f"encfs_transfer_{member}" + ("_total" if kind == "counter" else "")
        yield from _metric(name, kind, f"Transfer: {member.replace('_', ' ')}.", value)
    yield from _metric("encfs_reads_hung", "gauge", f"Reads that have waited for more than {_HUNG:g} s.", times.hung)
    yield "# HELP encfs_read_seconds How long reads take, as the daemon sees them."
    yield "# TYPE encfs_read_seconds histogram"
    count = 0
    for bound, bucket in zip([*map(str, _BUCKETS), "+Inf"], times.buckets, strict=True):
        count += bucket
        yield f'encfs_read_seconds_bucket{{le="{bound}"}} {count}'
    yield f"encfs_read_seconds_sum {times.total:.9g}"
    yield f"encfs_read_seconds_count {count}"


def _metric(
    name: str, kind: str, about: str, value: float, labels: Mapping[str, str] | None = None
) -> tuple[str, str, str]:
    shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in (labels or {}).items())
    return (
        f"# HELP {name} {about}",
        f"# TYPE {name} {kind}",
        f"{name}{{{shown}}} {value}" if shown else f"{name} {value}",
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
