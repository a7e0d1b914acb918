"""Where the system gives no more threads (a container's limit of processes), reading goes on, slower."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import trio

from encfs.errors import StorageError
from encfs.mount.workers import Workers
from encfs.oci.lanes import Lanes
from encfs.prefetching import Prefetch, Selection

Limit = Callable[[int], None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Of the program's own threads, only so many can be started from now on."""
    start = threading.Thread.start
    left = 0

    def start_or_fail(thread: threading.Thread) -> None:
        nonlocal left
        if thread.name.startswith("encfs-"):
            if not left:
                raise RuntimeError("can't start new thread")
            left -= 1
        start(thread)

    def set_limit(number: int) -> None:
        nonlocal left
        left = number

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    return set_limit


def test_read_ahead(limit: Limit) -> None:
    lanes = Lanes(4)
    done = [threading.Event() for _ in range(3)]
    assert not lanes.submit(done[0].set)
    assert not lanes.spawn(done[0].set)
    limit(1)
    for event in done[1:]:
        assert lanes.submit(event.set)
        assert event.wait(60)
    lanes.close(60.0)
    assert not done[0].is_set()


def test_requests_of_a_mount(limit: Limit) -> None:
    async def serve() -> None:
        workers = Workers(4)
        with pytest.raises(StorageError, match="can't start new thread"):
            await workers.run(int)
        assert not workers.busy
        limit(1)
        results: list[int] = []

        async def call(number: int) -> None:
            results.append(await workers.run(int, number))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(call, number)
        assert sorted(results) == [0, 1, 2]
        assert not workers.busy

    trio.run(serve)


@pytest.mark.parametrize(("threads", "state"), [(0, "failed"), (2, "done")])
def test_prefetch(limit: Limit, threads: int, state: str) -> None:
    """With nothing to fetch."""
    prefetch = Prefetch(SimpleNamespace(), Selection("none", ()))  # type: ignore[arg-type]
    prefetch._selection = Selection("list", ())
    prefetch._lanes = Lanes(4)
    prefetch._concurrency = 3
    limit(threads)
    prefetch.start()
    deadline = time.monotonic() + 60
    while (status := prefetch.status())["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    prefetch.close()
    assert status["state"] == state
    assert bool(status["error"]) == (state == "failed")
