"""Fixtures and small helpers of the tests that talk to registries."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from encfs.oci.blobs import BlobSink, Descriptor
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.registry import Registry
from tests.support.registry import DOCKER_REGISTRY, DockerRegistry, OciServer, Server

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
SEGMENT = "application/vnd.encfs.segment.v1"

#: For registries without TLS.
PLAIN = StoreOptions(plain_http=True, io_timeout=10.0)

needs_registries = pytest.mark.skipif(
    DOCKER_REGISTRY is None or not OciServer.can_be_built(),
    reason="docker-registry, or Go 1.24 to build the second registry of the tests, is not installed",
)
needs_docker_registry = pytest.mark.skipif(DOCKER_REGISTRY is None, reason="docker-registry is not installed")


def describe(content: bytes, media_type: str = SEGMENT) -> Descriptor:
    return Descriptor(media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def randomness(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@contextmanager
def connected(host: str, repository: str = "test/repo", **options: object) -> Iterator[Registry]:
    """A repository without TLS, with little patience."""
    settings = {"plain_http": True, "io_timeout": 10.0, **options}
    registry = Registry(parse_reference(f"docker://{host}/{repository}:v1"), StoreOptions(**settings))  # type: ignore[arg-type]
    try:
        yield registry
    finally:
        registry.close()


@contextmanager
def running(directory: Path, **options: object) -> Iterator[DockerRegistry]:
    registry = DockerRegistry(directory, **options)  # type: ignore[arg-type]
    try:
        yield registry
    finally:
        registry.stop()


@contextmanager
def serving(directory: Path, content: bytes) -> Iterator[DockerRegistry]:
    """A registry that has one blob, and an image of it as `test/repo:v1`."""
    with running(directory) as server:
        with connected(server.host) as registry:
            put_image(registry, [registry.write_blob(content, SEGMENT)])
        yield server


@contextmanager
def started(kind: str, directory: Path) -> Iterator[Server]:
    """A registry of one of two kinds, which both let blobs be deleted."""
    server = OciServer(directory) if kind == "ociserver" else DockerRegistry(directory, delete=True)
    try:
        yield server
    finally:
        server.stop()


def put_image(sink: BlobSink, blobs: list[Descriptor], *, seed: int = 0, **extra: object) -> Descriptor:
    """A manifest of the shape of our artifacts over blobs that are there already."""
    config = sink.write_blob(b'{"format":"encfs/1","seed":%d}' % seed, "application/vnd.encfs.content.v1+json")
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.encfs.artifact.v1",
        "config": {"mediaType": config.media_type, "digest": config.digest, "size": config.size},
        "layers": [{"mediaType": item.media_type, "digest": item.digest, "size": item.size} for item in blobs],
        **extra,
    }
    return sink.put_manifest(json.dumps(document).encode(), MANIFEST)
