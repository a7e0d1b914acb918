"""Mounts of artifacts in a registry: what is fetched and when, and what reads get while the registry is unwell."""

from __future__ import annotations

import base64
import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import Keys, encrypt_tree, make_keys
from tests.support.mounts import detach_all, end, end_mount, known_mounts, wait_for_end
from tests.support.registry import (
    PASSWORD,
    USERNAME,
    DockerRegistry,
    Fault,
    FaultProxy,
    TokenService,
    _ProxyHandler,
)
from tests.support.remote import connected, needs_docker_registry, randomness, running
from tests.support.waiting import LONG, wait_until

pytestmark = [needs_docker_registry, pytest.mark.fuse, pytest.mark.root]

MIB = 1 << 20
GET_BLOB = "^GET .*/blobs/sha256"
FILES = {"a": randomness(6 * MIB, 1), "b": randomness(6 * MIB, 2), "large": randomness(24 * MIB, 3)}
#: Seconds that a read goes on trying where it is to fail.
PATIENCE = 4.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "directory").mkdir()
    for name, content in FILES.items():
        (tree / "directory" / name).write_bytes(content)
    (tree / "small").write_text("small\n")
    return tree


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys: Keys, tree: Path) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("registry")) as server:
        with connected(server.host) as registry:
            encrypt_tree(tree, registry, keys)
        yield server


@dataclass
class Mount:
    """A mount in the background, and the directory of its files."""

    base: Path
    pid: int

    @property
    def path(self) -> Path:
        return self.base / "mount"

    def status(self) -> dict[str, Any]:
        [status] = [item for item in known_mounts(self.base / "run") if item.mountpoint == str(self.path)]
        return status.to_json()

    def transfer(self, name: str) -> float:
        return float(self.status()["transfer"][name])

    def log(self) -> str:
        return Path(self.status()["log_file"]).read_text()

    def open(self, name: str) -> int:
        return os.open(self.path / "directory" / name, os.O_RDONLY)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Past the kernel's read-ahead, which would hide what is asked for."""
        descriptor = self.open(name)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            content = bytearray()
            end = len(FILES[name]) if size is None else offset + size
            while offset + len(content) < end:
                content += os.pread(descriptor, min(MIB, end - offset - len(content)), offset + len(content))
            return bytes(content)
        finally:
            os.close(descriptor)

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        wait_until(lambda: condition(self.status()), self.status)
        return self.status()


@contextmanager
def mounted(base: Path, host: str, keys: Keys, *options: str, patience: float = LONG) -> Iterator[Mount]:
    """`encfs mount` of the artifact behind `host`, with a cache of its own."""
    (base / "mount").mkdir(exist_ok=True)
    place = [f"docker://{host}/test/repo:v1", str(base / "mount"), "-k", str(keys.recipient_file), "--allow-unsigned"]
    reach = ["--plain-http", "--io-timeout", str(patience), "--json"]
    cache = [] if any(word in options for word in ("--cache-size", "--cache-dir")) else ["--cache-dir", f"{base}/cache"]
    done = subprocess.run(
        [sys.executable, "-c", "from encfs.cli import main; main()", "mount", *place, *reach, *cache, *options],
        env={**os.environ, "ENCFS_RUNTIME_DIR": str(base / "run")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mount = Mount(base, json.loads(done.stdout)["pid"])
    try:
        yield mount
    finally:
        detach_all(mount.path)
        end(mount.pid)


def assert_eio(call: Callable[[], object]) -> float:
    """How long it takes until it fails with EIO."""
    started = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - looked at below
        call()
    assert caught.value.errno == errno.EIO
    return time.monotonic() - started


def fetched(proxy: FaultProxy) -> list[tuple[int, int]]:
    """The ranges (start, end) of the largest blob that were asked for."""
    found = []
    for item in proxy.requests(GET_BLOB):
        if item.range:
            start, _, last = item.range.removeprefix("bytes=").partition("-")
            found.append((int(start), int(last) + 1))
    return sorted(found)


# -- what is fetched


def test_what_a_mount_and_a_first_byte_cost(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys) as mount:
        assert (mount.path / "small").read_text() == "small\n"
        assert mount.transfer("bytes_from_registry") < MIB
        assert len(proxy.seen) <= 12
        assert mount.transfer("requests") == len(proxy.seen)


def test_a_random_read_fetches_its_frame_alone(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys) as mount:
        mount.read("large", 0, 10)
        before = mount.transfer("bytes_from_registry")
        for offset in (3 * MIB, 19 * MIB, 11 * MIB):
            assert mount.read("large", offset, 10) == FILES["large"][offset : offset + 10]
        assert mount.transfer("bytes_from_registry") - before <= 3 * (65536 + 2 * 4096)


def test_a_sequential_read_is_fetched_ahead_in_growing_requests(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys) as mount:
        with (mount.path / "directory" / "large").open("rb", buffering=0) as file:
            content = bytearray()
            while piece := file.read(128 << 10):
                content += piece
        assert content == FILES["large"]
        assert mount.transfer("bytes_read_ahead") > 16 * MIB
        ranges = fetched(proxy)
        assert max(end - start for start, end in ranges) >= 2 * MIB
        assert_disjoint(ranges)
        assert mount.transfer("bytes_from_registry") < 1.1 * sum(map(len, FILES.values()))


def test_what_is_fetched_ahead_is_in_proportion_to_what_was_read(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys) as mount:
        mount.read("large", 0, 10)
        before, asked = mount.transfer("bytes_from_registry"), fetched(proxy)
        for piece in range(8):
            mount.read("large", 4 * MIB + piece * (128 << 10), 128 << 10)
        mount.wait_for(lambda status: status["transfer"]["bytes_from_registry"] - before > 1.5 * MIB)
        ranges = [item for item in fetched(proxy) if item not in asked and item[0] >= 64 << 10]
        assert mount.transfer("bytes_read_ahead") > MIB / 2
        assert max(end for _, end in ranges) - min(start for start, _ in ranges) <= 2 * MIB + 3 * 65536


def assert_disjoint(ranges: list[tuple[int, int]]) -> None:
    """Nothing was downloaded twice. Small ranges are of the tree, another blob."""
    large = [item for item in ranges if item[0] >= 64 << 10]
    assert all(first[1] <= second[0] for first, second in pairwise(large)), large


@pytest.mark.parametrize("cache", [(), ("--cache-size", "0")])
def test_readers_of_the_same_range_share_its_request(
    proxy: FaultProxy, tmp_path: Path, keys: Keys, cache: tuple[str, ...]
) -> None:
    with mounted(tmp_path, proxy.host, keys, *cache) as mount, ExitStack() as stack:
        mount.read("large", 0, 10)
        asked = len(proxy.seen)
        proxy.faults = [Fault(GET_BLOB, times=-1, delay=0.5)]
        # Through O_DIRECT the kernel passes each read on; without it, pages would be shared before they reach us.
        descriptors = [os.open(mount.path / "directory" / "large", os.O_RDONLY | os.O_DIRECT) for _ in range(6)]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        results: list[bytes] = []

        def read(descriptor: int) -> None:

            buffer = mmap.mmap(-1, 4096)
            os.preadv(descriptor, [buffer], 9 * MIB)
            results.append(buffer[:])

        threads = [threading.Thread(target=read, args=(descriptor,)) for descriptor in descriptors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert results == [FILES["large"][9 * MIB : 9 * MIB + 4096]] * 6
        assert len(proxy.seen) == asked + 1


def test_without_a_cache_memory_is_bounded(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys, "--cache-size", "0") as mount:
        for name in FILES:
            assert mount.read(name) == FILES[name]
        assert mount.transfer("bytes_from_cache") == 0
        peak = next(line for line in Path(f"/proc/{mount.pid}/status").read_text().splitlines() if "VmHWM" in line)
        assert int(peak.split()[1]) < 200 << 10


@pytest.mark.parametrize("cache", [(), ("--cache-size", "0")])
def test_a_registry_without_range(proxy: FaultProxy, tmp_path: Path, keys: Keys, cache: tuple[str, ...]) -> None:
    proxy.faults = [Fault(GET_BLOB, times=-1, no_range=True)]
    with mounted(tmp_path, proxy.host, keys, *cache) as mount:
        assert mount.read("b", 3 * MIB, 10) == FILES["b"][3 * MIB : 3 * MIB + 10]
        assert mount.read("large") == FILES["large"]
        # Said in the process that mounted, or in the daemon: once in each at most.
        assert mount.log().count("fetched whole") <= 1
        if not cache:
            assert mount.transfer("bytes_from_registry") < 2.5 * sum(map(len, FILES.values()))


# -- in the background


def test_after_a_full_prefetch_the_registry_is_not_needed(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    proxy.faults = [Fault(GET_BLOB, skip=8, corrupt=100_000), Fault(GET_BLOB, skip=2, reply=(503, {}))]
    with mounted(tmp_path, proxy.host, keys, "--prefetch", "all") as mount:
        state = mount.wait_for(lambda status: status["prefetch"]["state"] == "done")["prefetch"]
        assert state["bytes_done"] == state["bytes_total"] > sum(map(len, FILES.values()))
        assert state["frames_wrong"] == 1, "found by the hash tree, and fetched again"
        assert state["frames_lost"] == 0
        assert_none_lost = len(proxy.seen)
        proxy.faults = [Fault("", times=-1, reply=(503, {}))]
        for name, content in FILES.items():
            assert mount.read(name) == content
        assert len(proxy.seen) == assert_none_lost
    with mounted(tmp_path, proxy.host, keys) as mount:
        assert mount.read("large") == FILES["large"]


def test_listed_files_are_fetched_in_their_order(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    (tmp_path / "list").write_text("/directory/b\nabsent\nsmall\n\n")
    with mounted(tmp_path, proxy.host, keys, "--prefetch", str(tmp_path / "list"), patience=PATIENCE) as mount:
        state = mount.wait_for(lambda status: status["prefetch"]["state"] == "done")["prefetch"]
        assert state["not_found"] == 1
        assert 6 * MIB < state["bytes_total"] == state["bytes_done"] < 7 * MIB
        assert "prefetch: absent: no such file" in mount.log()
        proxy.faults = [Fault("", times=-1, reply=(503, {}))]
        assert mount.read("b") == FILES["b"]
        assert_eio(lambda: mount.read("large", 5 * MIB, 10))


def test_the_background_keeps_its_rate_and_gives_way(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys, "--prefetch", "all", "--prefetch-rate", "1MiB") as mount:
        assert mount.read("large", 20 * MIB, 10) == FILES["large"][20 * MIB : 20 * MIB + 10]
        assert mount.status()["prefetch"]["bytes_fetched"] < 20 * MIB, "the rate is not the readers'"
        state = mount.wait_for(lambda status: status["prefetch"]["bytes_fetched"] > 0)["prefetch"]
        assert state["state"] in ("running", "paused")
        assert state["bytes_fetched"] < 30 * MIB
        end_mount(tmp_path / "run", mount.path)
        assert wait_for_end(mount.pid), "it does not wait for the rest"


def test_prefetch_goes_on_when_the_registry_is_back(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    proxy.faults = [Fault(GET_BLOB, skip=6, times=-1, reply=(503, {}))]
    with mounted(tmp_path, proxy.host, keys, "--prefetch", "all", patience=PATIENCE) as mount:
        state = mount.wait_for(lambda status: status["prefetch"]["state"] == "retrying")["prefetch"]
        assert "503" in state["error"]
        proxy.faults = []
        state = mount.wait_for(lambda status: status["prefetch"]["state"] == "done")["prefetch"]
        assert state["error"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefetch", "all", "--cache-size", "0"), "no cache"),
        (("--prefetch", "all", "--cache-size", "1MiB"), "raise --cache-size"),
        (("--prefetch", "nowhere"), "no file nowhere"),
        (("--prefetch", "/dev/null"), "lists no path"),
        (("--prefetch-rate", "1M"), "without --prefetch"),
    ],
)
def test_what_cannot_be_prefetched(
    proxy: FaultProxy, tmp_path: Path, keys: Keys, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(AssertionError, match=message), mounted(tmp_path, proxy.host, keys, *options):
        pass


# -- a registry that is unwell


def drip(handler: _ProxyHandler) -> None:
    handler.send_response(206)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    time.sleep(10 * LONG)


def hang(handler: _ProxyHandler) -> None:
    time.sleep(10 * LONG)


PASSING = {
    "cut": [Fault(GET_BLOB, times=2, cut=10_000)],
    "wrong bytes": [Fault(GET_BLOB, corrupt=5000)],
    "429": [Fault(GET_BLOB, times=2, reply=(429, {"Retry-After": "1"}))],
    "500": [Fault(GET_BLOB, times=2, reply=(500, {}))],
    "503": [Fault(GET_BLOB, times=2, reply=(503, {}))],
    "lost": [Fault(GET_BLOB, times=2, lose=True)],
    "slow": [Fault(GET_BLOB, times=3, delay=0.7)],
}
LASTING = {
    "cut": [Fault(GET_BLOB, times=-1, cut=0)],
    "wrong bytes": [Fault(GET_BLOB, times=-1, corrupt=5000)],
    "401": [Fault(GET_BLOB, times=-1, reply=(401, {}))],
    "404": [Fault(GET_BLOB, times=-1, reply=(404, {}))],
    "429": [Fault(GET_BLOB, times=-1, reply=(429, {"Retry-After": "100"}))],
    "500": [Fault(GET_BLOB, times=-1, reply=(500, {}))],
    "silent": [Fault(GET_BLOB, times=-1, act=hang)],
    "dripping": [Fault(GET_BLOB, times=-1, act=drip)],
    "redirect to nowhere": [Fault(GET_BLOB, times=-1, reply=(307, {"Location": "http://127.0.0.1:1/blob"}))],
    "name": [Fault(GET_BLOB, times=-1, reply=(307, {"Location": "http://no-such-host.invalid/blob"}))],
}


def test_what_passes_is_not_noticed(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys) as mount:
        for number, (name, faults) in enumerate(PASSING.items()):
            offset = (3 * number + 1) * MIB
            proxy.faults = [Fault(**vars(fault)) for fault in faults]
            assert mount.read("large", offset, 100) == FILES["large"][offset : offset + 100], name
        status = mount.status()
        assert status["transfer"]["retries"] >= 8
        assert status["transfer"]["refetches"] == 1
        assert status["stats"]["requests_failed"] == 0


def test_what_lasts_is_eio_in_time_and_passes_with_its_cause(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    """And what is at hand is served meanwhile."""
    with mounted(tmp_path, proxy.host, keys, patience=PATIENCE) as mount:
        assert mount.read("a", MIB, 4096) == FILES["a"][MIB : MIB + 4096]
        kept = mount.open("a")
        try:
            for number, (name, faults) in enumerate(LASTING.items()):
                offset = (2 * number + 2) * MIB
                proxy.faults = [Fault(**vars(fault)) for fault in faults]
                taken: list[float] = []
                thread = threading.Thread(
                    target=lambda at=offset, taken=taken: taken.append(assert_eio(lambda: mount.read("large", at, 10)))
                )
                thread.start()
                time.sleep(0.2)
                os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
                started = time.monotonic()
                assert os.pread(kept, 4096, MIB) == FILES["a"][MIB : MIB + 4096]
                waited = time.monotonic() - started
                thread.join(LONG)
                assert taken, name
                assert taken[0] < LONG, name
                # Had it waited for the other, it would have for nearly as long.
                assert waited < max(taken[0] / 2, PATIENCE / 2), name
                proxy.faults = []
                assert mount.read("large", offset, 10) == FILES["large"][offset : offset + 10], name
        finally:
            os.close(kept)


def test_a_registry_that_is_down_and_comes_back(server: DockerRegistry, tmp_path: Path, keys: Keys) -> None:
    for name, patience in (("down", PATIENCE), ("back", LONG)):
        (tmp_path / name).mkdir()
        with mounted(tmp_path / name, server.host, keys, patience=patience) as mount:
            assert mount.read("a", 0, 10) == FILES["a"][:10]
            server.stop()
            timer = threading.Timer(1.0, server.start)
            try:
                if name == "down":
                    assert PATIENCE / 4 < assert_eio(lambda mount=mount: mount.read("large", 6 * MIB, 10)) < LONG
                    assert f"{server.host}: connection refused" in mount.log().lower()
                    continue
                timer.start()
                assert mount.read("large", 9 * MIB, 10) == FILES["large"][9 * MIB : 9 * MIB + 10], "it waited"
                timer.join()
            finally:
                server.stop()
                server.start()


def test_a_token_that_expires_during_the_mount(
    tmp_path: Path, keys: Keys, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = TokenService(tmp_path / "tokens", validity=60)
    login = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    with running(tmp_path / "registry", token=service) as server:
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {server.host: {"auth": login}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
        with connected(server.host) as registry:
            encrypt_tree(tree, registry, keys)
        service.age = 118  # the registry's tolerance is a minute
        with mounted(tmp_path, server.host, keys) as mount:
            mount.read("a", 0, 10)
            given = len(service.given)
            service.age = 0
            time.sleep(3)
            assert mount.read("large", 9 * MIB, 10) == FILES["large"][9 * MIB : 9 * MIB + 10]
            assert len(service.given) > given
    service.close()


def test_a_redirect_to_another_host(server: DockerRegistry, proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    def elsewhere(handler: _ProxyHandler) -> None:
        handler.reply(307, Location=f"http://{server.host}{handler.path}")

    proxy.faults = [Fault(GET_BLOB, times=-1, act=elsewhere)]
    with mounted(tmp_path, proxy.host, keys) as mount:
        assert mount.read("large", 7 * MIB, 10) == FILES["large"][7 * MIB : 7 * MIB + 10]


def test_a_full_disk_below_the_cache(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M,mode=700", "tmpfs", str(disk)], check=True)
    try:
        with mounted(tmp_path, proxy.host, keys, "--cache-dir", str(disk / "cache")) as mount:
            for name, content in FILES.items():
                assert mount.read(name) == content
            assert mount.log().count("No space left on device") == 1
            assert mount.status()["stats"]["requests_failed"] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_cache_that_is_taken_away_while_it_is_mounted(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    """Cut short by whoever owns the disk, then removed: what was in it is fetched again."""
    with mounted(tmp_path, proxy.host, keys) as mount:
        assert mount.read("a") == FILES["a"]
        kept = mount.open("a")
        try:
            for take_away in (_cut_short, shutil.rmtree):
                take_away(tmp_path / "cache")
                os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(kept, MIB, 2 * MIB) == FILES["a"][2 * MIB : 3 * MIB]
                assert mount.read("b") == FILES["b"]
        finally:
            os.close(kept)
        assert mount.status()["stats"]["requests_failed"] == 0


def _cut_short(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > MIB:
            os.truncate(path, 4096)


def test_credentials_that_are_revoked_are_eio_and_named(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys, patience=PATIENCE) as mount:
        assert mount.read("a", 0, 10) == FILES["a"][:10]
        proxy.faults = [Fault(GET_BLOB, times=-1, reply=(401, {"WWW-Authenticate": 'Basic realm="r"'}))]
        assert assert_eio(lambda: mount.read("large", 6 * MIB, 10)) < LONG
        assert "AuthenticationError" in mount.log() or "credentials" in mount.log()
        proxy.faults = []
        assert mount.read("large", 9 * MIB, 10) == FILES["large"][9 * MIB : 9 * MIB + 10]


def test_a_mount_ends_while_reads_wait(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    with mounted(tmp_path, proxy.host, keys, patience=10 * LONG) as mount:
        descriptor = mount.open("large")
        proxy.faults = [Fault(GET_BLOB, times=-1, reply=(503, {}))]
        failed: list[int] = []

        def read() -> None:
            try:
                os.pread(descriptor, 4096, 5 * MIB)
            except OSError as error:
                failed.append(error.errno or 0)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.5)
        started = time.monotonic()
        end_mount(tmp_path / "run", mount.path, force=True)
        assert wait_for_end(mount.pid)
        thread.join(LONG)
        with suppress(OSError):
            os.close(descriptor)  # the connection is gone
        assert failed, "the read that waited got its error"
        assert time.monotonic() - started < 2 * LONG
