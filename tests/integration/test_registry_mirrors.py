"""Mirrors in front of a registry: tried first, never relied on, and told nothing."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from encfs.artifact import open_artifact
from encfs.errors import IntegrityError, NotFoundError, TransportError, UsageError
from encfs.keys.providers import provider_from_uri
from encfs.oci.blobs import Descriptor
from encfs.oci.cached import CachedSource
from encfs.oci.layout import Layout
from encfs.oci.mirrors import Mirror, parse_mirror
from encfs.oci.options import StoreOptions
from encfs.oci.prefetch import fill_cache
from encfs.oci.reference import parse_reference
from encfs.oci.transfer import copy_blobs
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from tests.support.artifacts import encrypt_tree, make_keys
from tests.support.registry import PASSWORD, USERNAME, Authority, DockerRegistry, Fault, FaultProxy, _ProxyHandler
from tests.support.remote import connected, describe, needs_docker_registry, randomness, running, serving
from tests.support.waiting import LONG, wait_until

pytestmark = needs_docker_registry

MIB = 1 << 20
CONTENT = randomness(6 * MIB, 7)
BLOB = describe(CONTENT)
GET_BLOB = r"^GET .*/blobs/sha256:"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with serving(tmp_path_factory.mktemp("registry"), CONTENT) as server:
        yield server


@pytest.fixture
def origin(server: DockerRegistry) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server.host)
    yield proxy
    proxy.close()


@pytest.fixture
def mirror(server: DockerRegistry) -> Iterator[FaultProxy]:
    """A perfect mirror: the same server at another address."""
    proxy = FaultProxy(server.host)
    yield proxy
    proxy.close()


@contextmanager
def source(origin: str, *mirrors: str, repository: str = "test/repo:v1", **options: object) -> Iterator[CachedSource]:
    settings = {"plain_http": True, "io_timeout": 8.0, "mirrors": mirrors, **options}
    opened = CachedSource(parse_reference(f"docker://{origin}/{repository}"), StoreOptions(**settings))  # type: ignore[arg-type]
    with closing(opened):
        yield opened


def read(store: CachedSource, offset: int = 0, size: int = BLOB.size) -> bytes:
    buffer = bytearray(size)
    with closing(store.open_blob(BLOB)) as blob:
        blob.read_into(offset, memoryview(buffer))
    return bytes(buffer)


# -- how mirrors are written


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        ("mirror.example", Mirror("mirror.example")),
        ("mirror.example:5000/cache/hub/", Mirror("mirror.example:5000", "cache/hub")),
        ("https://[::1]:5000", Mirror("[::1]:5000")),
        ("http://mirror.example/a", Mirror("mirror.example", "a", plain_http=True)),
        ("HTTP://mirror.example", Mirror("mirror.example", plain_http=True)),
    ],
)
def test_mirrors_are_understood(text: str, mirror: Mirror) -> None:
    assert parse_mirror(text, plain_http=False) == mirror
    assert parse_mirror("mirror.example", plain_http=True).plain_http
    assert not parse_mirror("https://mirror.example", plain_http=True).plain_http
    reference = mirror.reference(parse_reference("docker://registry.example/acme/chat:v1"))
    assert (reference.registry, reference.tag) == (mirror.host, "v1")
    assert reference.repository == f"{mirror.prefix}/acme/chat".lstrip("/")


@pytest.mark.parametrize(
    "text",
    ["", "/", "ftp://mirror.example", "http://", "http://user@mirror.example", "mirror.example/UPPER", "a:99999",
     "mirror.example/a?b=c", "mirror.example/../x", "oci:layout", "https://mirror.example/a:tag", "a\nb"],
)  # fmt: skip
def test_malformed_mirrors_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no mirror") as caught:
        parse_mirror(text, plain_http=False)
    assert "HOST[:PORT][/PREFIX]" in str(caught.value.hint)
    with pytest.raises(UsageError), source("registry.example", text):
        pass


def test_a_source_that_is_refused_leaves_no_file_open(tmp_path: Path) -> None:
    options = StoreOptions(mirrors=("b ad",), cache_dir=str(tmp_path / "cache"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UsageError):
        CachedSource(parse_reference("docker://registry.example/a:b"), options)
    assert os.listdir("/proc/self/fd") == before


# -- who is asked


def test_a_good_mirror_spares_the_registry(origin: FaultProxy, mirror: FaultProxy) -> None:
    with source(origin.host, mirror.host) as store:
        manifest = store.manifest()
        assert [item.path.rsplit("/", 1)[1] for item in origin.seen] == ["v1"], "what the tag means, from the registry"
        assert store.document(manifest.digest).content == manifest.content
        assert store.read_blob(BLOB, limit=BLOB.size) == CONTENT
        assert read(store, 1000, 10) == CONTENT[1000:1010]
        assert b"".join(store.stream_blob(BLOB)) == CONTENT
        assert len(origin.seen) == 1
        assert len(mirror.seen) == 4


def test_mirrors_are_tried_in_their_order(origin: FaultProxy, mirror: FaultProxy, server: DockerRegistry) -> None:
    with closing(FaultProxy(server.host)) as second, source(origin.host, second.host, mirror.host) as store:
        read(store, 0, 10)
        assert (len(second.seen), len(mirror.seen)) == (1, 0)
        second.faults = [Fault("", times=-1, reply=(503, {}))]
        read(store, 10, 10)
        read(store, 20, 10)
        assert (len(second.seen), len(mirror.seen), len(origin.seen)) == (2, 2, 0)


def test_a_mirror_without_the_artifact_is_asked_once_for_each_blob(
    origin: FaultProxy, mirror: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    with source(origin.host, f"{mirror.host}/elsewhere") as store:
        for offset in range(0, 50, 10):
            assert read(store, offset, 10) == CONTENT[offset : offset + 10]
    assert [item.path.split("/blobs")[0] for item in mirror.seen] == ["/v2/elsewhere/test/repo"]
    assert len(origin.seen) == 5
    assert not caplog.records, "nobody promised that it is there"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("", times=-1, reply=(500, {})),
        Fault("", times=-1, reply=(429, {"Retry-After": "600"})),
        Fault("", times=-1, reply=(401, {"WWW-Authenticate": 'Basic realm="x"'})),
        Fault("", times=-1, reply=(302, {"Location": "file:///etc/passwd"})),
        Fault("", times=-1, act=_ProxyHandler.hang_up),
        Fault("", times=-1, headers={"Content-Range": "bytes 5-9/10"}),
        Fault("", times=-1, headers={"Content-Encoding": "gzip"}),
    ],
    ids=["500", "429", "401", "redirect", "hangs up", "lies", "compresses"],
)
def test_a_bad_mirror_costs_one_request(
    origin: FaultProxy, mirror: FaultProxy, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.faults = [fault]
    started = time.monotonic()
    with source(origin.host, mirror.host) as store:
        for offset in range(0, 50, 10):
            assert read(store, 100 + offset, 10) == CONTENT[100 + offset : 110 + offset]
    assert time.monotonic() - started < LONG
    assert len(mirror.seen) == 1
    assert len([item for item in caplog.records if item.levelno >= logging.WARNING]) == 1


def test_a_mirror_that_is_down_or_silent(origin: FaultProxy, mirror: FaultProxy) -> None:
    with source(origin.host, "127.0.0.1:1") as store:
        assert read(store) == CONTENT
    mirror.faults = [Fault("", times=-1, act=lambda handler: time.sleep(10 * LONG))]
    started = time.monotonic()
    with source(origin.host, mirror.host, io_timeout=4.0) as store:  # a mirror gets a quarter of it
        assert read(store) == CONTENT
        assert read(store) == CONTENT
    assert time.monotonic() - started < LONG
    assert len(mirror.seen) == 1


def test_a_mirror_that_is_cut_or_drips_is_left_in_the_middle(
    origin: FaultProxy, mirror: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with source(origin.host, mirror.host) as store:
        mirror.faults = [Fault(GET_BLOB, cut=2 * MIB)]
        assert read(store) == CONTENT
        [rest] = origin.requests(GET_BLOB)
        assert rest.range.startswith("bytes=")
        assert int(rest.range[6:].split("-")[0]) > MIB, "the rest comes from the registry"
    monkeypatch.setattr("encfs.oci.mirrors._JUDGE_SECONDS", 0.3)
    mirror.faults = [Fault(GET_BLOB, drip=0.2)]  # 20 KiB a second: minutes in all
    started = time.monotonic()
    with source(origin.host, mirror.host) as store:
        assert read(store) == CONTENT
    assert time.monotonic() - started < LONG


def test_a_mirror_rests_longer_with_every_failure_and_comes_back(
    origin: FaultProxy, mirror: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("encfs.oci.mirrors.time", SimpleNamespace(monotonic=lambda: clock.now))
    mirror.faults = [Fault("", times=2, reply=(500, {}))]
    with source(origin.host, mirror.host) as store:
        for now, asked in ((0, 1), (14, 1), (16, 2), (32, 2), (45, 2), (47, 3), (48, 4)):
            clock.now = now
            read(store, 0, 10)
            assert len(mirror.seen) == asked, now


# -- wrong bytes


@pytest.mark.parametrize("cached", [False, True])
def test_wrong_bytes_are_fetched_again_from_the_registry(
    origin: FaultProxy, mirror: FaultProxy, cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = make_keys(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/data").write_bytes(CONTENT)
    with connected(origin.host, "test/artifact") as registry:
        encrypt_tree(tmp_path / "tree", registry, keys)
    mirror.faults = [Fault(GET_BLOB, times=-1, corrupt=100)]
    options = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    with source(origin.host, mirror.host, repository="test/artifact:v1", **options) as store:
        origin.seen.clear()
        provider = provider_from_uri(f"file:{keys.recipient_file}")
        with open_artifact(store, keys=[provider], trust=TrustPolicy(allow_unsigned=True)) as artifact:
            [volume] = artifact.volumes
            for offset in range(0, volume.size, MIB):
                volume.read(offset, min(MIB, volume.size - offset))
    # Nothing is asked twice of a mirror that lied: it rests.
    assert 1 <= len(mirror.requests(GET_BLOB)) <= 3
    assert "not asked for 600 seconds" in caplog.text


def test_wrong_bytes_in_a_copy_and_in_filling(origin: FaultProxy, mirror: FaultProxy, tmp_path: Path) -> None:
    for number, way in enumerate(("layout", "cache", "blob", "manifest")):
        mirror.seen.clear()
        mirror.faults = [Fault(r"^GET .*(blobs|manifests)/sha256:", times=-1, corrupt=5)]
        options = {"cache_dir": str(tmp_path / f"cache{number}")} if way == "cache" else {}
        with source(origin.host, mirror.host, **options) as store:
            if way == "layout":
                layout = Layout(tmp_path / "layout", create=True)
                result = copy_blobs(store, layout, [BLOB], progress=NoProgress())
                assert result.copied_size == BLOB.size
                assert layout.read_blob(BLOB, limit=BLOB.size) == CONTENT
                layout.close()
            elif way == "cache":
                store.manifest()
                fill_cache(store, [BLOB], NoProgress())
                assert read(store) == CONTENT
            elif way == "blob":
                assert store.read_blob(BLOB, limit=BLOB.size) == CONTENT
            else:
                digest = store.manifest().digest
                assert store.document(digest).digest == digest
        assert mirror.seen, way


def test_what_is_wrong_everywhere_is_refused(origin: FaultProxy, mirror: FaultProxy) -> None:
    for proxy in (origin, mirror):
        proxy.faults = [Fault(GET_BLOB, times=-1, corrupt=5)]
    with source(origin.host, mirror.host) as store, pytest.raises(IntegrityError):
        store.read_blob(BLOB, limit=BLOB.size)
    with source(origin.host, mirror.host) as store, pytest.raises(IntegrityError):
        list(store.stream_blob(BLOB))


# -- without the registry


def test_a_tag_is_asked_of_mirrors_only_where_the_registry_is_gone(
    origin: FaultProxy, mirror: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    absent = "test/repo:other"
    with source(origin.host, mirror.host, repository=absent) as store, pytest.raises(NotFoundError):
        store.manifest()
    assert not mirror.seen, "the registry has spoken"
    origin.faults = [Fault("", times=-1, act=_ProxyHandler.hang_up)]
    with source(origin.host, mirror.host) as store:
        assert store.manifest().digest
        assert f"as {mirror.host} says" in caplog.text
        assert read(store) == CONTENT
    with source(origin.host, mirror.host, repository=absent) as store, pytest.raises(TransportError):
        store.manifest()


def test_the_registry_goes_while_the_mirror_rests(origin: FaultProxy, mirror: FaultProxy) -> None:
    mirror.faults = [Fault("", reply=(500, {}))]
    with source(origin.host, mirror.host, io_timeout=2.0) as store:
        read(store, 0, 10)
        origin.faults = [Fault("", times=-1, reply=(500, {}))]
        assert read(store, 10, 10) == CONTENT[10:20], "better from there than not at all"


def test_errors_are_those_of_the_registry(origin: FaultProxy, mirror: FaultProxy) -> None:
    absent = Descriptor(BLOB.media_type, f"sha256:{'0' * 64}", 10)
    with source(origin.host, mirror.host) as store, pytest.raises(NotFoundError, match=origin.host):
        store.read_blob(absent, limit=10)


# -- credentials


def test_a_mirror_gets_its_own_credentials_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    encoded = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    with running(tmp_path / "guarded", basic=True) as server:
        config = tmp_path / "config.json"
        with closing(FaultProxy(server.host)) as origin, closing(FaultProxy(server.host)) as mirror:
            config.write_text(json.dumps({"auths": {origin.host: {"auth": encoded}}}))
            with connected(origin.host) as registry:
                registry.write_blob(CONTENT, BLOB.media_type)
            with source(origin.host, mirror.host) as store:
                assert read(store) == CONTENT
            assert [item.status for item in mirror.seen] == [401]
            assert "authorization" not in mirror.seen[0].headers
            config.write_text(json.dumps({"auths": {host: {"auth": encoded} for host in (origin.host, mirror.host)}}))
            origin.seen.clear()
            with source(origin.host, mirror.host) as store:
                assert read(store) == CONTENT
            assert not origin.seen
            assert mirror.seen[-1].headers["authorization"] == f"Basic {encoded}"


def test_a_mirror_does_not_see_the_client_certificate(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    certificate, key = authority.issue("client")
    with (
        running(tmp_path / "open") as server,
        running(tmp_path / "mutual", tls=authority, client_ca=authority) as mutual,
        closing(FaultProxy(server.host, tls=authority)) as origin,
    ):
        with connected(server.host) as registry:
            registry.write_blob(CONTENT, BLOB.media_type)
        secure = {
            "plain_http": False,
            "ca_file": str(authority.file),
            "cert_file": str(certificate),
            "key_file": str(key),
        }
        with source(origin.host, mutual.host, **secure) as store:
            # The mirror asks for a certificate and gets none; the registry, which has one offered, serves.
            assert read(store) == CONTENT
        assert len(origin.seen) == 1


# -- a real pull-through cache


def test_a_pull_through_proxy(server: DockerRegistry, origin: FaultProxy, tmp_path: Path) -> None:
    with running(tmp_path / "through", proxy_of=f"http://{origin.host}") as through:
        with source(origin.host, f"http://{through.host}", repository=f"test/repo@{_digest(server)}") as store:
            store.manifest()
            assert read(store, MIB, MIB) == CONTENT[MIB : 2 * MIB]
            assert b"".join(store.stream_blob(BLOB)) == CONTENT
        assert {item.headers.get("user-agent") for item in origin.seen} != {"encfs"}
        assert not [item for item in origin.seen if item.headers.get("user-agent") == "encfs"], "it is asked for us"
        wait_until(through.blob_file(BLOB.digest).exists)
        origin.faults = [Fault("", times=-1, reply=(503, {}))]
        with source(origin.host, f"http://{through.host}", repository=f"test/repo@{_digest(server)}") as store:
            assert b"".join(store.stream_blob(BLOB)) == CONTENT


def _digest(server: DockerRegistry) -> str:
    with connected(server.host) as registry:
        return registry.manifest().digest
