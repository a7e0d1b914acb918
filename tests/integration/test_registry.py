"""The registry client against two real implementations: blobs, manifests, copies, mounts, referrers, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    NotFoundError,
    TransportError,
    UnsupportedError,
    UsageError,
)
from encfs.oci.blobs import Descriptor
from encfs.oci.layout import Layout
from encfs.oci.reference import parse_reference
from encfs.oci.registry import INDEX_TYPE, Registry
from encfs.oci.transfer import copy_blobs
from encfs.progress import NoProgress
from tests.support.registry import Fault, FaultProxy, Server, reserved_port
from tests.support.remote import (
    MANIFEST,
    SEGMENT,
    connected,
    describe,
    needs_registries,
    put_image,
    randomness,
    started,
)

pytestmark = needs_registries

MIB = 1 << 20


@pytest.fixture(scope="module", params=["docker-registry", "ociserver"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(request.param, tmp_path_factory.mktemp("registry")) as server:
        yield server


def whole(content: bytes) -> object:
    return lambda offset: iter([content[offset:]])


# -- single blobs and manifests


def test_blob_and_manifest_come_back(server: Server) -> None:
    content = randomness(3 * MIB + 17, 1)
    with connected(server.host, "basic") as registry:
        writer = registry.create_blob()
        for start in range(0, len(content), 300_001):
            writer.write(memoryview(content)[start : start + 300_001])
        blob = writer.commit(SEGMENT)
        writer.abort()
        assert blob == describe(content)
        manifest = put_image(registry, [blob], seed=1)
        assert registry.has_blob(blob)
        assert registry.read_blob(blob, limit=4 * MIB) == content
        assert b"".join(registry.stream_blob(blob)) == content
        assert b"".join(registry.stream_blob(blob, offset=3 * MIB)) == content[3 * MIB :]
        opened = registry.open_blob(blob)
        buffer = memoryview(bytearray(5000))
        opened.read_into(1_000_003, buffer)
        assert buffer == content[1_000_003:1_005_003]
        assert not opened.try_read_into(0, buffer)
        assert registry.manifest().digest == registry.manifest("v1").digest == manifest.digest
        assert registry.manifest(manifest.digest).media_type == MANIFEST
    with connected(server.host, "basic") as registry:
        assert registry.manifest().digest == manifest.digest


def test_empty_blob(server: Server) -> None:
    with connected(server.host, "empty") as registry:
        blob = registry.write_blob(b"", SEGMENT)
        assert registry.read_blob(blob, limit=0) == b""
        assert registry.has_blob(blob)


def test_what_is_not_there(server: Server) -> None:
    absent = describe(b"absent")
    with connected(server.host, "nothing") as registry:
        assert not registry.has_blob(absent)
        for use in (
            registry.manifest,
            lambda: registry.manifest(absent.digest),
            lambda: registry.read_blob(absent, limit=100),
            lambda: list(registry.stream_blob(absent)),
            lambda: registry.open_blob(absent).read_into(0, memoryview(bytearray(2))),
        ):
            with pytest.raises(NotFoundError):
                use()
        with pytest.raises(FormatError):
            registry.read_blob(absent, limit=3)
        with pytest.raises(FormatError):
            registry.open_blob(Descriptor(SEGMENT, "sha256:../../x", 1))
        with pytest.raises(UsageError):
            registry.manifest("../x")


def test_blob_of_another_size_than_described(server: Server) -> None:
    with connected(server.host, "sizes") as registry:
        blob = registry.write_blob(b"ten bytes!", SEGMENT)
        for size in (9, 11):
            other = Descriptor(SEGMENT, blob.digest, size)
            assert not registry.has_blob(other)
            with pytest.raises(IntegrityError):
                registry.read_blob(other, limit=100)
            with pytest.raises(IntegrityError):
                registry.open_blob(other).read_into(size - 2, memoryview(bytearray(2)))
        with pytest.raises(IntegrityError):
            registry.open_blob(blob).read_into(8, memoryview(bytearray(3)))


def test_an_index_is_not_followed(server: Server) -> None:
    with connected(server.host, "index") as registry:
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
        registry.put_manifest(json.dumps(index).encode(), INDEX_TYPE)
        with pytest.raises(UnsupportedError, match="image index"):
            registry.manifest()


def test_removing_and_aborting(server: Server, tmp_path: Path) -> None:
    with connected(server.host, "removed", spool_dir=str(tmp_path)) as registry:
        blob = registry.write_blob(b"content", SEGMENT)
        registry.remove_blob(blob)
        registry.remove_blob(blob)
        assert not registry.has_blob(blob)
        writer = registry.create_blob()
        writer.write(bytes(MIB))
        writer.abort()
        writer.abort()
        assert not registry.has_blob(describe(bytes(MIB)))
        # Also while it is under way.
        writer = registry.create_blob()
        writer.write(bytes(32 * MIB))
        pending = writer.commit(SEGMENT)
        registry.remove_blob(pending)
        put_image(registry, [])
    assert not list(tmp_path.iterdir())


def test_wrong_spool_directory_is_named(server: Server, tmp_path: Path) -> None:
    with (
        connected(server.host, spool_dir=str(tmp_path / "absent")) as registry,
        pytest.raises(Exception, match="absent"),
    ):
        registry.create_blob()


# -- uploads


def test_large_blob_goes_in_chunks_and_a_small_one_whole(proxy: FaultProxy) -> None:
    content = randomness(70 * MIB, 2)
    done: list[int] = []
    with connected(proxy.host, "chunks") as registry:
        registry.copy_blob(describe(content), whole(content), done.append)
        registry.copy_blob(describe(b"small"), whole(b"small"), done.append)
        assert [item.headers["content-range"] for item in proxy.requests("^PATCH")] == [
            f"0-{64 * MIB - 1}",
            f"{64 * MIB}-{70 * MIB - 1}",
        ]
        assert sum(done) == 70 * MIB + 5
        assert registry.has_blob(describe(content))
        assert registry.read_blob(describe(b"small"), limit=10) == b"small"
        buffer = memoryview(bytearray(MIB))
        registry.open_blob(describe(content)).read_into(64 * MIB - 1000, buffer)
        assert buffer == content[64 * MIB - 1000 : 65 * MIB - 1000]


def test_uploads_in_the_background_fail_where_they_are_waited_for(proxy: FaultProxy) -> None:
    with connected(proxy.host, "background") as registry:
        writer = registry.create_blob()
        writer.write(b"content")
        proxy.faults = [Fault(r"^POST", reply=(403, {}))]
        writer.commit(SEGMENT)
        with pytest.raises(AuthenticationError):
            put_image(registry, [])


def test_source_that_lies_or_fails_is_named_as_the_culprit(server: Server) -> None:
    content = randomness(6 * MIB, 3)
    blob = describe(content)

    def failing(offset: int) -> Iterator[bytes]:
        yield content[offset : offset + MIB]
        raise NotFoundError("the source is gone")

    with connected(server.host, "lies") as registry:
        for stream, error in (
            (failing, NotFoundError),
            (lambda offset: iter([content[offset:-1]]), IntegrityError),
            (lambda offset: iter([bytes(1) + content[offset + 1 :]]), TransportError),
        ):
            with pytest.raises(error):
                registry.copy_blob(blob, stream, lambda size: None)
            assert not registry.has_blob(blob)


# -- copies between stores


def test_artifact_goes_from_layout_to_registry_to_layout(server: Server, tmp_path: Path) -> None:
    first = Layout(tmp_path / "first", create=True)
    contents = [randomness(size, size) for size in (9 * MIB, 100_000, 1)]
    blobs = [first.write_blob(content, SEGMENT) for content in contents]
    manifest = put_image(first, blobs)
    with connected(server.host, "copied") as registry:
        result = copy_blobs(first, registry, blobs, progress=NoProgress())
        assert (result.copied, result.present) == (3, 0)
        result = copy_blobs(first, registry, blobs, progress=NoProgress())
        assert (result.copied, result.copied_size, result.present) == (0, 0, 3)
        assert put_image(registry, blobs).digest == manifest.digest
        second = Layout(tmp_path / "second", create=True)
        assert copy_blobs(registry, second, blobs, progress=NoProgress()).copied == 3
        for blob, content in zip(blobs, contents, strict=True):
            assert second.read_blob(blob, limit=16 * MIB) == content
        second.close()
    first.close()


def test_blobs_are_mounted_from_a_neighbouring_repository(proxy: FaultProxy) -> None:
    content = randomness(5 * MIB, 5)
    blob = describe(content)
    with connected(proxy.host, "near/source") as source, connected(proxy.host, "near/target") as target:
        source.copy_blob(blob, whole(content), lambda size: None)
        sent = len(proxy.requests("^(PUT|PATCH)"))
        target.prefer_mounting(source)
        assert copy_blobs(source, target, [blob], progress=NoProgress()).copied_size == len(content)
        assert len(proxy.requests("^(PUT|PATCH)")) == sent, "nothing was uploaded"
        assert target.has_blob(blob)
        # What cannot be mounted is uploaded.
        other = describe(content[1:])
        target.copy_blob(other, whole(content[1:]), lambda size: None)
        assert target.has_blob(other)


# -- referrers


def test_referrers(server: Server) -> None:
    """By the API where there is one; docker-registry 2.8 has none, and the list is kept under a tag."""
    with connected(server.host, "referrers") as registry:
        subject = put_image(registry, [], seed=1)
        assert registry.referrers(subject.digest) == []
        reference = {"mediaType": MANIFEST, "digest": subject.digest, "size": subject.size}
        for seed in (2, 3, 3):
            put_image(registry, [], seed=seed, subject=reference)
        found = registry.referrers(subject.digest)
        assert {item.artifact_type for item in found} == {"application/vnd.encfs.artifact.v1"}
        assert registry.referrers(subject.digest, "application/vnd.encfs.artifact.v1") == found
        assert registry.referrers(subject.digest, "text/plain") == []
        assert len({item.digest for item in found}) == len(found) == 2


def test_referrers_by_api_over_pages(proxy: FaultProxy) -> None:
    digest = describe(b"subject").digest

    def page(number: int) -> bytes:
        entry = {
            "mediaType": MANIFEST,
            "digest": describe(b"%d" % number).digest,
            "size": 1,
            "artifactType": f"a/{number}",
        }
        return json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}).encode()

    with connected(proxy.host, "referrers") as registry:
        link = {"Link": '</v2/referrers/referrers/next>; rel="next"'}
        proxy.faults = [
            Fault("referrers/sha256", reply=(200, link), body=page(1)),
            Fault("referrers/next", reply=(200, {}), body=page(2)),
        ]
        assert [item.artifact_type for item in registry.referrers(digest)] == ["a/1", "a/2"]
        proxy.faults = [Fault("referrers/", times=-1, reply=(200, link), body=page(1))]
        assert len(registry.referrers(digest)) == 16, "a circle of pages has an end"
        for body in (b"", b"[]", b'{"manifests": 1}', b'{"manifests": [{"digest": "x"}]}'):
            proxy.faults = [Fault("referrers/", reply=(200, {}), body=body)]
            with pytest.raises(FormatError):
                registry.referrers(digest)


# -- concurrency, memory, time


def test_many_threads_share_a_registry(server: Server) -> None:
    content = randomness(4 * MIB, 6)
    failures: list[BaseException] = []
    with connected(server.host, "threads") as registry:
        blob = registry.write_blob(content, SEGMENT)
        opened = registry.open_blob(blob)

        def read(seed: int) -> None:
            try:
                for number in range(20):
                    offset = (seed * 7919 + number * 104_729) % (len(content) - 70_000)
                    buffer = memoryview(bytearray(65_552))
                    opened.read_into(offset, buffer)
                    assert buffer == content[offset : offset + 65_552]
            except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_memory_does_not_grow_with_the_blob(server: Server, tmp_path: Path) -> None:
    """A blob of 400 MiB is pushed from a spool, pulled, and copied, by a process of at most 200 MiB."""
    program = f"""
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.registry import Registry
from encfs.oci.transfer import copy_blobs
from encfs.progress import NoProgress
options = StoreOptions(plain_http=True, spool_dir={str(tmp_path)!r})
first = Registry(parse_reference("docker://{server.host}/memory/first"), options)
second = Registry(parse_reference("docker://{server.host}/memory/second"), options)
writer = first.create_blob()
for number in range(100):
    writer.write(number.to_bytes(4, "big") * (1 << 20))
blob = writer.commit("segment")
first.put_manifest(b'{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"x","digest":"'
    + blob.digest.encode() + b'","size":1}},"layers":[]}}', "{MANIFEST}")
layout = Layout({str(tmp_path / "layout")!r}, create=True)
assert copy_blobs(first, layout, [blob], progress=NoProgress()).copied_size == 400 << 20
assert copy_blobs(first, second, [blob], progress=NoProgress()).copied == 1
first.close(); second.close()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024


def test_nobody_listens() -> None:
    host = f"127.0.0.1:{reserved_port()}"
    with connected(host, io_timeout=5.0) as registry, pytest.raises(TransportError, match="refused"):
        registry.manifest()
    name = Registry(parse_reference("docker://no-such-host.invalid/a/b"))
    with pytest.raises(TransportError, match=r"no-such-host\.invalid"):
        name.manifest()
    name.close()
