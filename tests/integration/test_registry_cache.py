"""A registry behind the ciphertext cache: filled whole, read in parts, damaged, and with the registry gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.artifact import open_artifact
from encfs.errors import IntegrityError, NotFoundError, TransportError, UsageError
from encfs.format.descriptor import parse_manifest
from encfs.keys.providers import provider_from_uri
from encfs.oci.cached import CachedSource
from encfs.oci.options import StoreOptions
from encfs.oci.prefetch import fill_cache
from encfs.oci.reference import parse_reference
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from tests.support.artifacts import Keys, encrypt_tree, make_keys
from tests.support.registry import DockerRegistry, Fault, FaultProxy
from tests.support.remote import connected, needs_docker_registry, running

pytestmark = needs_docker_registry


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Iterator[DockerRegistry]:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "data.bin").write_bytes(bytes(range(256)) * 4096 * 3)
    with running(tmp_path_factory.mktemp("registry")) as server:
        with connected(server.host) as registry:
            encrypt_tree(tree, registry, keys)
        yield server


def source(proxy: FaultProxy, cache: Path, tag: str = ":v1", size: int = 64 << 20) -> CachedSource:
    options = StoreOptions(plain_http=True, io_timeout=3.0, cache_dir=str(cache), cache_size=size)
    return CachedSource(parse_reference(f"docker://{proxy.host}/test/repo{tag}"), options)


def fill(store: CachedSource) -> int:
    index = parse_manifest(store.manifest().content)
    return fill_cache(store, [index.config, *index.blobs], NoProgress()).fetched


def image(store: CachedSource, keys: Keys) -> bytes:
    provider = provider_from_uri(f"file:{keys.recipient_file}")
    with open_artifact(store, keys=[provider], trust=TrustPolicy(allow_unsigned=True)) as artifact:
        [volume] = artifact.volumes
        return bytes(volume.read(0, volume.size))


def test_after_filling_the_registry_is_not_needed(
    proxy: FaultProxy, tmp_path: Path, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    first = source(proxy, tmp_path / "cache")
    assert fill(first) > 3 << 20
    assert fill(first) == 0
    digest = first.manifest().digest
    first.close()
    proxy.faults = [Fault("", times=-1, reply=(503, {}))]
    content = image(source(proxy, tmp_path / "cache"), keys)
    assert bytes(range(256)) * 4096 in content
    assert "as it was when the registry was last reached" in caplog.text
    seen = len(proxy.seen)
    assert image(source(proxy, tmp_path / "cache", f"@{digest}"), keys) == content
    assert len(proxy.seen) == seen, "nothing is asked for what is named by its digest"
    store = source(proxy, tmp_path / "empty")
    with pytest.raises(TransportError):
        store.manifest()
    store.close()


def test_a_tag_that_is_gone_is_gone(proxy: FaultProxy, tmp_path: Path) -> None:
    store = source(proxy, tmp_path / "cache")
    store.manifest()
    proxy.faults = [Fault("manifests", times=-1, reply=(404, {}))]
    with pytest.raises(NotFoundError):
        store.manifest()
    store.close()


def test_reads_are_kept_and_damage_is_fetched_again(proxy: FaultProxy, tmp_path: Path, keys: Keys) -> None:
    content = image(source(proxy, tmp_path / "cache"), keys)
    asked = len(proxy.requests("blobs"))
    assert image(source(proxy, tmp_path / "cache"), keys) == content
    assert len(proxy.requests("blobs")) == asked
    [part] = [path for path in (tmp_path / "cache/v1/blobs").iterdir() if path.stat().st_size > 3 << 20]
    with open(part, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    assert image(source(proxy, tmp_path / "cache"), keys) == content
    assert asked < len(proxy.requests("blobs")) <= asked + 2
    assert image(source(proxy, tmp_path / "cache"), keys) == content
    assert len(proxy.requests("blobs")) <= asked + 2


def test_filling_mends_damage_and_refuses_wrong_bytes(proxy: FaultProxy, tmp_path: Path) -> None:
    store = source(proxy, tmp_path / "cache")
    fill(store)
    [part] = [path for path in (tmp_path / "cache/v1/blobs").iterdir() if path.stat().st_size > 3 << 20]
    with open(part, "r+b") as file:
        file.write(b"damage")
    assert fill(store) > 3 << 20
    assert fill(store) == 0
    store.close()
    other = source(proxy, tmp_path / "other")
    proxy.faults = [Fault("^GET .*/blobs/", times=-1, corrupt=10)]
    with pytest.raises(IntegrityError):
        fill(other)
    other.close()


def test_a_cache_that_is_too_small_or_none(proxy: FaultProxy, tmp_path: Path) -> None:
    small = source(proxy, tmp_path / "cache", size=2 << 20)
    with pytest.raises(UsageError, match="the artifact has"):
        fill(small)
    small.close()
    store = CachedSource(parse_reference(f"docker://{proxy.host}/test/repo:v1"), StoreOptions(plain_http=True))
    with pytest.raises(UsageError, match="no cache"):
        fill(store)
    store.close()
