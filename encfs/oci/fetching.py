"""How much of a blob is asked for, when, and for whom: between the readers of a blob and the registry.

What a reader lacks is asked for at once, in its own thread. A reader that goes on where it stopped has as much read
ahead of it as it has gone on for, by threads of `lanes`; one that jumps about gets what it asks for and nothing else. A
range is on its way once at most: whoever else wants it waits for the same bytes, which are given out as they arrive.
This has nothing to do with frames, which are the unit of encryption. What arrives goes to the ciphertext cache; where
there is none, or it does not take it, a bounded amount stays in memory.

Bytes are untrusted here, and checked by whoever reads. Not here: HTTP (`remote`), files of the cache (`cachedblob`),
what a reader will want next (`readers`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import NoReturn

from encfs.errors import AuthenticationError, EncfsError, NotFoundError, TransportError, TransportTimeoutError
from encfs.oci.cache import GRAIN
from encfs.oci.cachedblob import CachedBlob, in_order
from encfs.oci.fetcher import Fetch, Fetcher
from encfs.oci.lanes import Priority
from encfs.oci.readers import Readers
from encfs.oci.remote import RangeBlob

#: Bytes that are fetched together at least where each request brings a blob from its beginning.
_WHOLE_WINDOW = 8 << 20
#: Seconds before a reader asks by himself for what another's request did not bring.
_PAUSE = 0.05


class _MovedError(Exception):
    """The bytes are on their way in another fetch, or have to be asked for again. Never leaves this module."""


class FetchingBlob:
    """A `Blob` of a registry, behind the cache where there is one. Thread-safe."""

    def __init__(self, remote: RangeBlob, cached: CachedBlob | None, fetcher: Fetcher) -> None:
        self.size = remote.size
        self._remote = remote
        self._cached = cached
        self._fetcher = fetcher
        self._changed = threading.Condition()
        self._fetches: list[Fetch] = []
        self._readers = Readers()

    # -- reading

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """What is in memory, or in the cache without waiting for the disk."""
        if not buffer:
            return True
        if not self._take(offset, buffer):
            if self._cached is None or not self._cached.try_read_into(offset, buffer):
                return False
            self._fetcher.counters.add("bytes_from_cache", len(buffer))
        self._follow(offset, len(buffer))
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises: as the registry's blob; TransportTimeoutError where nothing arrives for the time allowed."""
        if not buffer:
            return
        self._follow(offset, len(buffer))
        if self._take(offset, buffer) or self._read_cached(offset, buffer, offset, offset + len(buffer)):
            return
        with self._fetcher.counters.waiting(), self._fetcher.lanes.reader_waits():
            deadline = monotonic() + self._fetcher.io_timeout
            while not self._fetch_into(offset, buffer, deadline):
                if monotonic() > deadline:
                    raise TransportTimeoutError("nothing arrives from the registry")

    def discard(self, offset: int, size: int) -> bool:
        """These bytes did not verify: forget every copy of them. True, since other ones may come."""
        self._fetcher.counters.add("refetches")
        with self._changed:
            for fetch in self._overlapping(offset, offset + size):
                self._remove(fetch)
        if self._cached is not None:
            self._cached.drop(offset, size)
        return self._remote.discard(offset, size)

    def close(self) -> None:
        """Harmless when called again."""
        with self._changed:
            for fetch in list(self._fetches):
                if fetch.finished:
                    self._remove(fetch)
        if self._cached is not None:
            self._cached.close()
        self._remote.close()

    def _take(self, offset: int, buffer: memoryview) -> bool:
        """Copy from memory, if all of it is there."""
        end = offset + len(buffer)
        with self._changed:
            position, found = offset, self._overlapping(offset, end)
            for fetch in found:
                if fetch.start > position or fetch.buffer is None or fetch.done < min(end, fetch.end):
                    return False
                position = fetch.end
            if position < end:
                return False
            for fetch in found:
                _copy(fetch, offset, buffer)
                if fetch.end <= end and self._on_disk(fetch):
                    self._remove(fetch)  # read to its end
                else:
                    self._fetcher.touch(fetch)
        return True

    def _on_disk(self, fetch: Fetch) -> bool:
        return fetch.finished and self._cached is not None and self._cached.writable

    # -- what is lacking

    def _fetch_into(self, offset: int, buffer: memoryview, deadline: float) -> bool:
        """Ask for what is lacking, wait for it, copy. False where it has to be tried again."""
        end = offset + len(buffer)
        own, others = self._claim(offset, end)
        for number, fetch in enumerate(own):
            if self._is_whole(fetch) and self._fetcher.lanes.spawn(lambda fetch=fetch: self._run_ahead(fetch)):  # type: ignore[misc]
                others.append(fetch)
                continue
            try:
                self._run_in_lane(fetch, deadline - monotonic())
            except _MovedError:
                self._abandon(own[number + 1 :])
                return False
            except BaseException:
                self._abandon(own[number + 1 :])
                raise
        for fetch in others:
            if not self._await(fetch, min(end, fetch.end), deadline):
                return False
        fetched = sorted((*own, *others), key=lambda fetch: fetch.start)
        return self._gather(offset, buffer, fetched)

    def _gather(self, offset: int, buffer: memoryview, fetched: Sequence[Fetch]) -> bool:
        """Copy from fetches where they have the bytes in memory, and the rest from the cache."""
        position, end = offset, offset + len(buffer)
        for fetch in fetched:
            if fetch.buffer is None:
                continue
            if position < fetch.start and not self._read_cached(offset, buffer, position, fetch.start):
                return False
            _copy(fetch, offset, buffer)
            position = max(position, fetch.end)
        return position >= end or self._read_cached(offset, buffer, position, end)

    def _read_cached(self, offset: int, buffer: memoryview, start: int, end: int) -> bool:
        if self._cached is None or not self._cached.read_into(start, buffer[start - offset : end - offset]):
            return False
        self._fetcher.counters.add("bytes_from_cache", end - start)
        return True

    def _claim(self, start: int, end: int) -> tuple[list[Fetch], list[Fetch]]:
        """New fetches for what nobody has asked for yet, and those of others that have to be waited for."""
        low, high = start // GRAIN * GRAIN, min(-(-end // GRAIN) * GRAIN, self.size)
        whole = self._fetcher.whole
        if whole and not self._keeps_whole():
            high = min(max(high, low + _WHOLE_WINDOW), self.size)
        missing = [(low, high)] if self._cached is None else self._cached.missing(low, high)
        own: list[Fetch] = []
        others: list[Fetch] = []
        with self._changed:
            for gap_start, gap_end in missing:
                position = gap_start
                for fetch in self._overlapping(gap_start, gap_end):
                    if position < fetch.start:
                        own.append(Fetch(position, fetch.start))
                    position = max(position, fetch.end)
                    if fetch not in others:
                        others.append(fetch)
                if position < gap_end:
                    own.append(Fetch(position, gap_end))
            if whole and own and self._keeps_whole():
                # One request brings all of the blob: everybody waits for that.
                under_way = [fetch for fetch in self._fetches if fetch.end - fetch.start == self.size]
                own, others = [] if under_way else [Fetch(0, self.size)], under_way or others
            self._fetches.extend(own)
        return own, [fetch for fetch in others if fetch.start < end and start < fetch.end]

    def _usable_cache(self) -> CachedBlob | None:
        return self._cached if self._cached is not None and self._cached.writable else None

    def _keeps_whole(self) -> bool:
        """Whether the cache has room for all of the blob."""
        return self._cached is not None and self._cached.writable and self._cached.room >= self.size

    def _is_whole(self, fetch: Fetch) -> bool:
        return self._fetcher.whole and fetch.end - fetch.start == self.size > _WHOLE_WINDOW

    def _await(self, fetch: Fetch, place: int, deadline: float) -> bool:
        """Wait until a fetch has got to a place. False where it failed: its reader had its own time.

        Raises: NotFoundError, AuthenticationError as it did; TransportTimeoutError.
        """
        with self._changed:
            seen = fetch.done
            fetch.awaited = True
            while fetch.done < place and not fetch.finished:
                rest = deadline - monotonic()
                if rest <= 0:
                    raise TransportTimeoutError("nothing arrives from the registry")
                self._changed.wait(rest)
                if fetch.done > seen:
                    seen, deadline = fetch.done, monotonic() + self._fetcher.io_timeout
            if isinstance(fetch.error, NotFoundError | AuthenticationError):
                raise type(fetch.error)(fetch.error.message, hint=fetch.error.hint)
            if fetch.error is not None:
                self._changed.wait(_PAUSE)
            return fetch.error is None

    def _overlapping(self, start: int, end: int) -> list[Fetch]:
        found = [fetch for fetch in self._fetches if fetch.start < end and start < fetch.end]
        return sorted(found, key=lambda fetch: fetch.start)

    def forget(self, fetch: Fetch) -> None:
        """Its memory is needed for something else."""
        with self._changed:
            if fetch in self._fetches:
                self._fetches.remove(fetch)

    def _remove(self, fetch: Fetch) -> None:
        if fetch in self._fetches:
            self._fetches.remove(fetch)
        self._fetcher.drop(fetch)

    def _abandon(self, fetches: Sequence[Fetch]) -> None:
        """Fetches that will not be run: who waits for them asks himself."""
        for fetch in fetches:
            self._finish(fetch, _MovedError())

    # -- one request

    def _run_in_lane(self, fetch: Fetch, seconds: float) -> None:
        """Raises: as `_run`; TransportTimeoutError where no connection gets free."""
        try:
            self._fetcher.lanes.enter(Priority.FOREGROUND, seconds)
        except EncfsError as error:
            self._finish(fetch, error)
            raise
        try:
            self._run(fetch, Priority.FOREGROUND)
        finally:
            self._fetcher.lanes.leave()

    def _run(self, fetch: Fetch, priority: Priority) -> None:
        """Do a fetch that was claimed, in a lane. Raises: what the registry's blob raises; _MovedError."""
        size = fetch.end - fetch.start
        in_memory = not (self._is_whole(fetch) and self._keeps_whole())
        reserved = in_memory and self._fetcher.reserve(size, anyway=priority is Priority.FOREGROUND)
        error: Exception | None = None
        try:
            if reserved and self._lacks(fetch):
                fetch.buffer = memoryview(bytearray(size))
                self._receive(fetch)
            elif in_memory and not reserved:
                _move()
            elif not in_memory:
                self._receive(fetch)
        except BaseException as problem:
            error = problem if isinstance(problem, Exception) else TransportError("interrupted")
            raise
        finally:
            self._finish(fetch, error, reserved=size if reserved else 0, keep=priority is not Priority.FOREGROUND)

    def _lacks(self, fetch: Fetch) -> bool:
        """Whether it is still missing in the cache: it may have arrived between the look there and the claim."""
        return self._cached is None or bool(self._cached.missing(fetch.start, fetch.end))

    def _finish(self, fetch: Fetch, error: Exception | None, *, reserved: int = 0, keep: bool = False) -> None:
        stays = False
        with self._changed:
            fetch.error, fetch.finished = error, True
            if error is None:
                fetch.done = fetch.end
            stays = (
                error is None
                and fetch.buffer is not None
                and fetch.end - fetch.start == reserved
                and (keep or self._usable_cache() is None)
                and fetch in self._fetches
            )
            if stays:
                self._fetcher.keep(fetch, self)
            elif fetch in self._fetches:
                self._fetches.remove(fetch)
            self._changed.notify_all()
        if reserved and not stays:
            self._fetcher.release(reserved)

    def _receive(self, fetch: Fetch) -> None:
        if not self._fetcher.probed:
            # Where a registry does not serve parts, one reader finds that out, and not all of them at a time.
            with self._fetcher.probe:
                pieces = self._remote.pieces(fetch.start, fetch.end - fetch.start)
                first = next(pieces, None)
                self._fetcher.probed = True
        else:
            pieces = self._remote.pieces(fetch.start, fetch.end - fetch.start)
            first = next(pieces, None)
        with _ended(pieces):
            if first is None:
                return
            if first[0] < fetch.start or first[0] + len(first[1]) > fetch.end:
                self._fetcher.whole = True
                if fetch.buffer is not None and self.size > _WHOLE_WINDOW and self._keeps_whole():
                    raise _MovedError  # and ask for all of it, for everybody
            if fetch.buffer is None:
                self._receive_on_disk(fetch, _chain(first, pieces))
            else:
                self._receive_in_memory(fetch, _chain(first, pieces))

    def _receive_in_memory(self, fetch: Fetch, pieces: Iterator[tuple[int, bytes]]) -> None:
        buffer = fetch.buffer
        assert buffer is not None  # noqa: S101 - who calls has looked
        for position, chunk in pieces:
            if self._fetcher.lanes.closed:
                raise TransportError("the store was closed while it was being read")
            first, last = max(position, fetch.start), min(position + len(chunk), fetch.end)
            if first < last:
                buffer[first - fetch.start : last - fetch.start] = memoryview(chunk)[first - position : last - position]
                self._arrived(fetch, last)
            if fetch.done >= fetch.end:
                break
        cached = self._usable_cache()
        if cached is not None:
            cached.write(fetch.start, buffer)

    def _receive_on_disk(
        self, fetch: Fetch, pieces: Iterator[tuple[int, bytes]], pace: Callable[[int, bool], None] | None = None
    ) -> None:
        cached = self._cached
        assert cached is not None  # noqa: S101 - fetches without a buffer are made where there is a cache
        for position, data in in_order(pieces):
            if self._fetcher.lanes.closed:
                raise TransportError("the store was closed while it was being read")
            if not cached.write(position, data):
                raise _MovedError
            self._arrived(fetch, position + len(data))
            if pace is not None:
                pace(len(data), fetch.awaited)

    def _arrived(self, fetch: Fetch, place: int) -> None:
        with self._changed:
            if place > fetch.done:
                fetch.done = min(place, fetch.end)
                self._changed.notify_all()

    # -- reading ahead

    def _follow(self, offset: int, size: int) -> None:
        """Note a read, and order what a reader that goes on is going to want. Never waits."""
        if not self._fetcher.lanes.follows:
            return
        with self._changed:
            orders = self._readers.orders(offset, size, self.size)
        for first, last in orders:
            self._fetcher.lanes.submit(lambda first=first, last=last: self._fetch_ahead(first, last))  # type: ignore[misc]

    def _fetch_ahead(self, start: int, end: int) -> None:
        # Claimed with a connection at hand: nobody shall wait for a fetch that waits itself.
        with self._fetcher.lanes.lane(Priority.AHEAD):
            own, _ = self._claim(start, end)
            for fetch in own:
                self._run_ahead(fetch)

    def _run_ahead(self, fetch: Fetch) -> None:
        try:
            self._run(fetch, Priority.AHEAD)
        except (EncfsError, _MovedError):
            return  # whoever wants these bytes asks for them, and is told why they do not come
        self._fetcher.counters.add("bytes_read_ahead", fetch.end - fetch.start)

    # -- in the background

    def prefetch(self, start: int, end: int, pace: Callable[[int, bool], None]) -> None:
        """Have the cache hold a range. `pace` is told of bytes as they arrive, and whether somebody waits for them.

        Raises: as the registry's blob; TransportError where the cache does not take them.
        """
        with self._fetcher.lanes.lane(Priority.BACKGROUND):
            own, others = self._claim(start, end)
            for number, fetch in enumerate(own):
                try:
                    self._prefetch_one(fetch, pace)
                except _MovedError:
                    self._abandon(own[number + 1 :])
                    raise TransportError("the cache does not take what is fetched") from None
                except BaseException:
                    self._abandon(own[number + 1 :])
                    raise
        for fetch in others:
            self._await(fetch, min(end, fetch.end), monotonic() + self._fetcher.io_timeout)

    def _prefetch_one(self, fetch: Fetch, pace: Callable[[int, bool], None]) -> None:
        error: Exception | None = None
        try:
            if not self._lacks(fetch):
                return
            pieces = self._remote.pieces(fetch.start, fetch.end - fetch.start)
            with _ended(pieces):
                self._receive_on_disk(fetch, pieces, pace)
        except BaseException as problem:
            error = problem if isinstance(problem, Exception) else TransportError("interrupted")
            raise
        finally:
            self._finish(fetch, error)


def _move() -> NoReturn:
    """Have it tried again in another way."""
    raise _MovedError


def _copy(fetch: Fetch, offset: int, buffer: memoryview) -> None:
    """Those bytes of a fetch that fall into `buffer`, which begins at `offset`."""
    assert fetch.buffer is not None  # noqa: S101 - who calls has looked
    first, last = max(fetch.start, offset), min(fetch.end, offset + len(buffer))
    if first < last:
        buffer[first - offset : last - offset] = fetch.buffer[first - fetch.start : last - fetch.start]


@contextmanager
def _ended(pieces: Iterator[tuple[int, bytes]]) -> Iterator[None]:
    """At the end, give the connection up, if the pieces were not taken to their end."""
    try:
        yield
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _chain(first: tuple[int, bytes], rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from rest
