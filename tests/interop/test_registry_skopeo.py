"""skopeo as the judge of what we put into registries: it copies artifacts in all directions and changes no byte."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from encfs.errors import EncfsError
from encfs.oci.layout import Layout
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_sink, open_source
from encfs.progress import NoProgress
from imagetool.pipeline.check import verify
from imagetool.pipeline.copy import copy_artifact
from tests.support.artifacts import encrypt_tree, make_keys
from tests.support.registry import Server
from tests.support.remote import PLAIN, needs_registries, started

pytestmark = [needs_registries, pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")]

KINDS = ("docker-registry", "ociserver")


def skopeo(*words: str) -> bytes:
    done = subprocess.run(["skopeo", *words], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    top = tmp_path_factory.mktemp("registries")
    with started(KINDS[0], top / "first") as first, started(KINDS[1], top / "second") as second:
        yield dict(zip(KINDS, (first, second), strict=True))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`oci:LAYOUT:v1`, an artifact of several segments."""
    place = tmp_path_factory.mktemp("owner")
    (place / "tree").mkdir()
    (place / "tree/weights").write_bytes(bytes(range(256)) * (20 << 12))
    with closing(Layout(place / "layout", tag="v1", create=True)) as sink:
        encrypt_tree(place / "tree", sink, make_keys(place), segment_size=8 << 20)
    return place / "layout"


def copy(source: str, target: str) -> None:
    with closing(open_source(parse_reference(source), PLAIN)) as store:
        reference = parse_reference(target)
        with closing(open_sink(reference, PLAIN)) as sink:
            copy_artifact(store, sink, tag=reference.tag, progress=NoProgress())


def check(reference: str) -> bytes:
    """The manifest, after everything it names was verified."""
    with closing(open_source(parse_reference(reference), PLAIN)) as store:
        verify(store, trust=None, progress=NoProgress())
        return store.manifest().content


@pytest.mark.parametrize("kind", KINDS)
def test_skopeo_shows_and_copies_what_we_push(
    servers: dict[str, Server], layout: Path, tmp_path: Path, kind: str
) -> None:
    manifest = check(f"oci:{layout}:v1")
    pushed = f"docker://{servers[kind].host}/ours:v1"
    copy(f"oci:{layout}:v1", pushed)
    assert skopeo("inspect", "--raw", "--tls-verify=false", pushed) == manifest
    skopeo("copy", "--src-tls-verify=false", pushed, f"oci:{tmp_path}/copy:v1")
    assert check(f"oci:{tmp_path}/copy:v1") == manifest
    tls = ("--src-tls-verify=false", "--dest-tls-verify=false")
    for other in servers.values():
        target = f"docker://{other.host}/from-{kind}:v1"
        skopeo("copy", *tls, pushed, target)
        assert check(target) == manifest
    # `skopeo inspect` without --raw wants the config of a container image.
    plain = subprocess.run(["skopeo", "inspect", "--tls-verify=false", pushed], capture_output=True, check=False)
    assert plain.returncode != 0


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_skopeo_pushes(servers: dict[str, Server], layout: Path, tmp_path: Path, kind: str) -> None:
    manifest = check(f"oci:{layout}:v1")
    pushed = f"docker://{servers[kind].host}/theirs:v1"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{layout}:v1", pushed)
    assert check(pushed) == manifest
    copy(pushed, f"oci:{tmp_path}/copy:v1")
    assert check(f"oci:{tmp_path}/copy:v1") == manifest
    described = json.loads(skopeo("inspect", "--raw", f"oci:{tmp_path}/copy:v1"))
    assert described["artifactType"] == "application/vnd.encfs.artifact.v1"


def test_between_the_two_kinds_of_registry(servers: dict[str, Server], layout: Path) -> None:
    manifest = check(f"oci:{layout}:v1")
    first, second = (servers[kind].host for kind in KINDS)
    copy(f"oci:{layout}:v1", f"docker://{first}/there:v1")
    copy(f"docker://{first}/there:v1", f"docker://{second}/there:v1")
    copy(f"docker://{second}/there:v1", f"docker://{first}/back:v1")
    assert skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{first}/back:v1") == manifest
    assert check(f"docker://{first}/back:v1") == manifest
    with pytest.raises(EncfsError):
        check(f"docker://{second}/back:v1")
