"""Bad networks and hostile registries: all of it ends in the right bytes or a typed error, in bounded time."""

from __future__ import annotations

import email.utils
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from encfs.errors import (
    AuthenticationError,
    EncfsError,
    IntegrityError,
    NotFoundError,
    TransportError,
    TransportTimeoutError,
)
from encfs.oci.blobs import Descriptor
from encfs.oci.registry import Registry
from tests.support.registry import DockerRegistry, Fault, FaultProxy, _ProxyHandler
from tests.support.remote import (
    MANIFEST,
    connected,
    describe,
    needs_docker_registry,
    put_image,
    randomness,
    serving,
)
from tests.support.waiting import LONG

pytestmark = needs_docker_registry

MIB = 1 << 20
SIZE = 3 * MIB + 11
CONTENT = randomness(SIZE, 1)
BLOB = describe(CONTENT)
GET_BLOB = "^GET .*/blobs/sha256"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with serving(tmp_path_factory.mktemp("registry"), CONTENT) as server:
        yield server


@pytest.fixture
def registry(proxy: FaultProxy) -> Iterator[Registry]:
    with connected(proxy.host, io_timeout=8.0) as registry:
        yield registry


def read(registry: Registry, offset: int = 0, size: int = SIZE, blob: Descriptor = BLOB) -> bytes:
    buffer = bytearray(size)
    registry.open_blob(blob).read_into(offset, memoryview(buffer))
    return bytes(buffer)


def seconds_of(error: type[EncfsError], call: Callable[[], object], match: str = ".") -> float:
    """How long a call takes that must fail."""
    started = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return time.monotonic() - started


# -- what passes


@pytest.mark.parametrize("cut", [0, 1, 65_536, SIZE - 1])
def test_cut_downloads_go_on_where_they_stopped(registry: Registry, proxy: FaultProxy, cut: int) -> None:
    proxy.faults = [Fault(GET_BLOB, cut=cut)]
    assert b"".join(registry.stream_blob(BLOB)) == CONTENT
    [first, second] = proxy.requests(GET_BLOB)
    assert first.range == ""
    assert second.range == (f"bytes={cut}-{SIZE - 1}" if cut else "")
    proxy.faults = [Fault(GET_BLOB, cut=cut)]
    assert read(registry, 100, SIZE - 100) == CONTENT[100:]


def test_a_body_cut_again_and_again(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(GET_BLOB, times=20, cut=100_000)]
    assert read(registry) == CONTENT
    assert len(proxy.requests(GET_BLOB)) == 21


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_temporary_statuses(registry: Registry, proxy: FaultProxy, status: int) -> None:
    proxy.faults = [Fault("", times=2, reply=(status, {}), body=b'{"errors":[{"message":"busy"}]}')]
    assert read(registry, 5, 10) == CONTENT[5:15]
    proxy.faults = [Fault("", times=2, reply=(status, {}))]
    assert registry.manifest().media_type == MANIFEST


@pytest.mark.parametrize("status", [400, 404, 405, 410, 418, 501])
def test_final_statuses_are_not_tried_again(registry: Registry, proxy: FaultProxy, status: int) -> None:
    proxy.faults = [Fault("", times=-1, reply=(status, {}), body=b'{"errors":[{"message":"so\\nit is"}]}')]
    error = NotFoundError if status in (404, 410) else TransportError
    assert seconds_of(error, lambda: read(registry), "so it is") < LONG
    assert len(proxy.seen) == 1


def test_retry_after_is_honoured_and_bounded(registry: Registry, proxy: FaultProxy) -> None:
    for value in ("1", email.utils.formatdate(time.time() + 4, usegmt=True)):
        proxy.faults = [Fault("", reply=(429, {"Retry-After": value}))]
        started = time.monotonic()
        read(registry, 0, 10)
        assert time.monotonic() - started >= 1
    no_times = ("99999999999999999999", "-5", "soon", "01 Jan 2020 00:00:00 +99999999999999999999")
    for value in ("3600", *no_times, email.utils.formatdate(time.time() + 86400)):
        proxy.faults = [Fault("", times=2, reply=(429, {"Retry-After": value}))]
        started = time.monotonic()
        if value in no_times:
            read(registry, 0, 10)
        else:
            seconds_of(TransportError, lambda: read(registry, 0, 10), "429")
            proxy.faults = []
        assert time.monotonic() - started < LONG, "who asks for an hour is not waited for"


def test_registry_that_comes_back(server: DockerRegistry) -> None:
    with connected(server.host, io_timeout=20.0) as registry:
        assert read(registry, 0, 10) == CONTENT[:10]
        server.stop()
        timer = threading.Timer(1.0, server.start)
        timer.start()
        try:
            assert read(registry, 1000, 10) == CONTENT[1000:1010]
        finally:
            timer.join()


def test_blobs_on_another_host(registry: Registry, proxy: FaultProxy, server: DockerRegistry) -> None:
    """As with blob stores of clouds; the second address is asked directly as long as it works."""
    store = FaultProxy(server.host)
    try:
        target = f"http://{store.host}/v2/test/repo/blobs/{BLOB.digest}"
        proxy.faults = [Fault(GET_BLOB, times=-1, reply=(307, {"Location": target}))]
        opened = registry.open_blob(BLOB)
        buffer = memoryview(bytearray(10))
        for offset in (0, 1000, 2000):
            opened.read_into(offset, buffer)
            assert buffer == CONTENT[offset : offset + 10]
        assert (len(proxy.seen), len(store.seen)) == (1, 3)
        # Its signature has run out: a new address is asked for.
        store.faults = [Fault("", reply=(403, {}))]
        opened.read_into(3000, buffer)
        assert buffer == CONTENT[3000:3010]
        assert (len(proxy.seen), len(store.seen)) == (2, 5)
    finally:
        store.close()


# -- what does not pass


def test_registry_that_is_down_for_good(proxy: FaultProxy) -> None:
    with connected(proxy.host, io_timeout=2.0) as registry:
        read(registry, 0, 10)
        proxy.faults = [Fault("", times=-1, act=_ProxyHandler.hang_up)]
        assert seconds_of(TransportError, lambda: read(registry)) < LONG
        proxy.faults = []
        assert read(registry, 0, 10) == CONTENT[:10], "and it recovers"


def test_registry_that_never_answers(proxy: FaultProxy) -> None:
    with connected(proxy.host, io_timeout=1.0) as registry:
        proxy.faults = [Fault("", times=-1, act=lambda handler: time.sleep(10 * LONG))]
        assert seconds_of(TransportTimeoutError, registry.manifest) < LONG
        assert seconds_of(TransportTimeoutError, lambda: read(registry)) < LONG


def test_registry_that_drips(proxy: FaultProxy) -> None:
    def drip(handler: _ProxyHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(SIZE))
        handler.end_headers()
        for _ in range(SIZE):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    with connected(proxy.host, io_timeout=1.0) as registry:
        proxy.faults = [Fault("manifests", times=-1, act=drip)]
        assert seconds_of(TransportTimeoutError, registry.manifest) < LONG


def test_closing_ends_a_wait(proxy: FaultProxy) -> None:
    with connected(proxy.host, io_timeout=1000.0) as registry:
        read(registry, 0, 10)
        proxy.faults = [Fault("", times=-1, reply=(503, {"Retry-After": "200"}))]
        timer = threading.Timer(0.3, registry.close)
        timer.start()
        assert seconds_of(TransportError, lambda: read(registry, 0, 10), "closed") < LONG
        timer.join()


def test_wrong_bytes(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(GET_BLOB, corrupt=SIZE // 2)]
    seconds_of(IntegrityError, lambda: list(registry.stream_blob(BLOB)))
    proxy.faults = [Fault(GET_BLOB, corrupt=SIZE // 2)]
    assert registry.read_blob(BLOB, limit=4 * MIB) == CONTENT, "a second try may bring the right ones"
    proxy.faults = [Fault(GET_BLOB, times=-1, corrupt=SIZE // 2)]
    seconds_of(IntegrityError, lambda: registry.read_blob(BLOB, limit=4 * MIB))
    digest = registry.manifest().digest
    proxy.faults = [Fault("manifests", times=-1, corrupt=20)]
    seconds_of(IntegrityError, lambda: registry.manifest(digest))


def test_registry_without_range(registry: Registry, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.faults = [Fault(GET_BLOB, times=-1, no_range=True)]
    with caplog.at_level(logging.WARNING, "encfs"):
        for offset in (0, 1_000_000, SIZE - 10):
            assert read(registry, offset, 10) == CONTENT[offset : offset + 10]
    assert len([item for item in caplog.records if "fetched whole" in item.message]) == 1
    pieces = list(registry.open_blob(BLOB).pieces(1_000_000, 10))
    assert pieces[0][0] == 0, "what came before is given to who wants to keep it"
    # Resumed all the same, from its beginning.
    proxy.faults = [Fault(GET_BLOB, cut=2 * MIB, no_range=True), Fault(GET_BLOB, times=-1, no_range=True)]
    assert b"".join(registry.stream_blob(BLOB)) == CONTENT


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": f"bytes 1001-1010/{SIZE}"},
        {"Content-Range": f"bytes 1000-1009/{SIZE + 1}"},
        {"Content-Range": f"bytes 1000-2000/{SIZE}"},
        {"Content-Range": f"bytes 1000-999/{SIZE}"},
        {"Content-Range": "bytes */10"},
        {"Content-Range": "bytes 1000-99999999999999999999999999/99999999999999999999999999"},
        {"Content-Range": ""},
        {"Content-Length": "11"},
    ],
)
def test_lies_about_ranges(registry: Registry, proxy: FaultProxy, headers: dict[str, str]) -> None:
    proxy.faults = [Fault(GET_BLOB, times=-1, headers=headers)]
    seconds_of(IntegrityError, lambda: read(registry, 1000, 10))


def test_more_bytes_than_asked_for(registry: Registry, proxy: FaultProxy) -> None:
    headers = {"Content-Range": f"bytes 1000-1009/{SIZE}", "Connection": "close", "Content-Length": ""}

    def overlong(handler: _ProxyHandler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", headers["Content-Range"])
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(bytes(20))
        handler.close_connection = True

    proxy.faults = [Fault(GET_BLOB, times=-1, act=overlong)]
    seconds_of(IntegrityError, lambda: read(registry, 1000, 10), "more bytes")


def test_shorter_than_it_claims(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault(GET_BLOB, times=-1, reply=(416, {}))]
    seconds_of(IntegrityError, lambda: read(registry, 1000, 10), "shorter")
    proxy.faults = [Fault(GET_BLOB, times=-1, reply=(200, {}), body=b"short")]
    seconds_of(IntegrityError, lambda: list(registry.stream_blob(BLOB)), "5 bytes")


def endless(handler: _ProxyHandler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(4096):
        handler.wfile.write(bytes(MIB))


def test_endless_bodies(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("", times=-1, act=endless)]
    seconds_of(TransportError, registry.manifest, "more than")
    seconds_of(IntegrityError, lambda: registry.read_blob(BLOB, limit=4 * MIB))
    seconds_of(IntegrityError, lambda: list(registry.stream_blob(BLOB)), "more bytes")
    seconds_of(TransportError, lambda: registry.referrers(BLOB.digest), "more than")


def test_huge_manifest(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("manifests", times=-1, reply=(200, {}), body=b" " * (5 * MIB))]
    seconds_of(TransportError, registry.manifest, "more than")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/v2/test/repo/manifests/v1", "circle"),
        ("file:///etc/passwd", "no address"),
        ("gopher://x/", "no address"),
        ("http://user:password@127.0.0.1/", "no address"),
        ("http://[::1", "no address"),
        ("//", "circle"),
    ],
)
def test_redirects_that_lead_nowhere(registry: Registry, proxy: FaultProxy, location: str, message: str) -> None:
    proxy.faults = [Fault("", times=-1, reply=(302, {"Location": location}))]
    assert seconds_of(TransportError, registry.manifest, message) < 2
    assert len(proxy.seen) <= 6


def test_compressed_answers_are_refused(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("", times=-1, headers={"Content-Encoding": "gzip"})]
    seconds_of(TransportError, registry.manifest, "gzip")
    seconds_of(TransportError, lambda: read(registry), "gzip")


def test_authentication_is_not_tried_again(registry: Registry, proxy: FaultProxy) -> None:
    for status in (401, 403):
        proxy.seen.clear()
        proxy.faults = [Fault("", times=-1, reply=(status, {}))]
        assert seconds_of(AuthenticationError, registry.manifest) < 2
        assert len(proxy.seen) == 1


# -- uploads


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encfs.oci.upload._CHUNK_SIZE", MIB)
    monkeypatch.setattr("encfs.oci.upload._SINGLE_SIZE", MIB)


@pytest.fixture
def fresh() -> bytes:
    """Content that no repository has yet."""
    return randomness(SIZE, time.monotonic_ns())


def upload(registry: Registry, content: bytes) -> list[int]:
    """Upload, check what arrived, and give the offsets at which the source was opened."""
    opened: list[int] = []
    done: list[int] = []

    def stream(offset: int) -> Iterator[bytes]:
        opened.append(offset)
        yield from (content[start : start + 300_000] for start in range(offset, len(content), 300_000))

    blob = describe(content)
    registry.copy_blob(blob, stream, done.append)
    assert sum(done) == len(content)
    assert min(done, default=0) >= 0
    assert registry.read_blob(blob, limit=len(content)) == content
    return opened


@pytest.mark.usefixtures("small_chunks")
class TestUploads:
    def test_in_chunks(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        assert upload(registry, fresh) == [0], "the source is read once"
        assert len(proxy.requests("^PATCH")) == 4

    def test_cut_between_chunks_goes_on(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        proxy.faults = [Fault("^PATCH", skip=1, cut_request=0)]
        assert upload(registry, fresh) == [0, MIB]
        assert len(proxy.requests("^POST")) == 1, "in the same session"

    @pytest.mark.parametrize("cut", [1, 500_000])
    def test_cut_in_a_chunk(self, registry: Registry, proxy: FaultProxy, fresh: bytes, cut: int) -> None:
        """docker-registry gives a session up that has another number of bytes than its own token says."""
        proxy.faults = [Fault("^PATCH", skip=1, cut_request=cut)]
        opened = upload(registry, fresh)
        # How much it took of the cut chunk is a matter of time: asked for the rest first, it gives up in the end.
        assert opened[0] == opened[-1] == 0
        assert set(opened) <= {0, MIB}
        assert len(proxy.requests("^POST")) == 2

    def test_registry_that_kept_a_part(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        """Others say how much they have, and are believed."""
        proxy.faults = [
            Fault("^PATCH", skip=1, cut_request=0),
            Fault("^GET .*uploads", reply=(204, {"Range": f"0-{MIB + 99}"})),
            Fault("^PATCH", skip=1, reply=(404, {})),
        ]
        assert upload(registry, fresh) == [0, MIB + 100, 0]
        assert proxy.requests("^PATCH")[2].headers["content-range"].startswith(f"{MIB + 100}-")

    def test_lost_answer_to_a_chunk(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        """The registry has it, but we do not know."""
        proxy.faults = [Fault("^PATCH", skip=1, lose=True)]
        assert upload(registry, fresh) == [0, 0]

    @pytest.mark.parametrize("status", [500, 503, 429])
    def test_busy(self, registry: Registry, proxy: FaultProxy, fresh: bytes, status: int) -> None:
        proxy.faults = [
            Fault("^POST", reply=(status, {})),
            Fault("^PATCH", skip=1, reply=(status, {"Retry-After": "1"})),
            Fault("^PUT", reply=(status, {})),
        ]
        upload(registry, fresh)

    def test_lost_session(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        proxy.faults = [Fault("^PATCH", skip=2, reply=(404, {}))]
        assert upload(registry, fresh) == [0, 0]
        assert len(proxy.requests("^POST")) == 2

    @pytest.mark.parametrize("status", [201, 400, 405, 411, 413, 415, 501])
    def test_registry_without_chunks(self, registry: Registry, proxy: FaultProxy, fresh: bytes, status: int) -> None:
        proxy.faults = [Fault("^PATCH", times=-1, reply=(status, {}))]
        upload(registry, fresh)
        upload(registry, fresh[::-1])
        assert len(proxy.requests("^PATCH")) == 1, "it is remembered"
        assert [int(item.headers["content-length"]) for item in proxy.requests("^PUT")] == [SIZE, SIZE]

    @pytest.mark.parametrize("cut", [0, 1_000_000])
    def test_cut_whole_upload_begins_anew(self, registry: Registry, proxy: FaultProxy, fresh: bytes, cut: int) -> None:
        proxy.faults = [Fault("^PATCH", times=-1, reply=(405, {})), Fault("^PUT", cut_request=cut)]
        assert upload(registry, fresh)[-1] == 0
        assert len(proxy.requests("^POST")) == 3

    def test_smallest_chunk(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        proxy.faults = [Fault("^POST", headers={"OCI-Chunk-Min-Length": str(2 * MIB)})]
        upload(registry, fresh)
        assert [int(item.headers["content-length"]) for item in proxy.requests("^PATCH")] == [2 * MIB, SIZE - 2 * MIB]

    def test_registry_that_keeps_less(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        """It answers 202 with a smaller range than was sent; a lie here, so that the next chunk is refused."""
        proxy.faults = [Fault("^PATCH", headers={"Range": "0-499999"})]
        upload(registry, fresh)
        assert proxy.requests("^PATCH")[1].headers["content-range"].startswith("500000-")

    def test_registry_that_never_gets_on(self, proxy: FaultProxy, fresh: bytes) -> None:
        with connected(proxy.host, io_timeout=2.0) as registry:
            for pattern, status in (("^PATCH", 503), ("^PUT", 500), ("^PATCH", 416), ("^PATCH", 404)):
                proxy.seen.clear()
                proxy.faults = [Fault(pattern, times=-1, reply=(status, {}))]
                assert seconds_of(EncfsError, lambda: upload(registry, fresh)) < 8
                assert len(proxy.requests(pattern)) <= 6
                proxy.faults = []

    def test_registry_that_does_not_say_where_to(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        proxy.faults = [Fault("^POST", times=-1, reply=(202, {}))]
        seconds_of(TransportError, lambda: upload(registry, fresh), "where to upload")

    def test_refused_upload(self, registry: Registry, proxy: FaultProxy, fresh: bytes) -> None:
        for pattern in ("^POST", "^PATCH", "^PUT"):
            proxy.faults = [Fault(pattern, times=-1, reply=(403, {}))]
            assert seconds_of(AuthenticationError, lambda: upload(registry, fresh)) < 3


def test_manifest_that_is_stored_as_another(registry: Registry, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("^PUT .*manifests", headers={"Docker-Content-Digest": f"sha256:{'0' * 64}"})]
    seconds_of(IntegrityError, lambda: put_image(registry, [BLOB]))
