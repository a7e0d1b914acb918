"""Commands on an index of artifacts: all of them, or the one that `--platform` chooses; in layouts and registries."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

import encfs
from encfs.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    RollbackError,
    UnsupportedError,
    UsageError,
    WrongKeyError,
    WrongSignerError,
)
from encfs.image.artifact import this_platform
from encfs.image.compression import Compression
from encfs.oci.layout import Layout
from tests.support.container_images import Store, archive, make_image, make_index
from tests.support.documented import assert_as_documented, documented, shape
from tests.support.remote import needs_docker_registry, running
from tests.support.shell import Shell

HERE = this_platform().architecture
OTHER = "s390x"
TRUST = ("--trust", "owner.jwk.pub", "--id", "acme/app", "--min-version", "1")
AUDITED = ("--trust", "auditor.jwk.pub", "--id", "acme/app", "--min-version", "1")
SOME_PIN = ("--pin", f"sha256:{'a' * 64}")
REF = "oci:enc:v1"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Keys, and in the layout `enc` an index `v1` of two platforms, and an artifact `single`."""
    shell = Shell(tmp_path_factory.mktemp("index"))
    for name, kind in (("tee", "x25519"), ("other", "x25519"), ("owner", "ed25519"), ("auditor", "ed25519")):
        shell.ok("imagetool", "keygen", "-o", f"{name}.jwk", "--type", kind)
    store = Store(shell.path / "plain")
    layers = {
        name: [(archive({"word": name.encode()}), Compression.GZIP), (archive({name: b"x" * 70000}), Compression.NONE)]
        for name in (HERE, OTHER)
    }
    make_index(store, "v1", layers)
    make_image(store, "single", layers[HERE], architecture=HERE)
    for tag in ("v1", "single"):
        signed = ("--sign", "owner.jwk", "--id", "acme/app", "--artifact-version", "1")
        shell.ok("imagetool", "encrypt", f"oci:plain:{tag}", f"oci:enc:{tag}", "-r", "tee.jwk.pub", *signed)
    return shell


@pytest.fixture
def shell(prepared: Shell, tmp_path: Path) -> Shell:
    """A copy to change."""
    shutil.copytree(prepared.path, tmp_path / "copy")
    return Shell(tmp_path / "copy")


def listed(shell: Shell, *words: str) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", shell.json(*words)["manifests"])


def blobs(shell: Shell, layout: str = "enc") -> set[str]:
    return set(os.listdir(shell.path / layout / "blobs/sha256"))


def index_digest(shell: Shell, layout: str = "enc") -> str:
    with closing(Layout(shell.path / layout, tag="v1")) as opened:
        return opened.document().digest


@pytest.mark.parametrize(
    "words",
    [("inspect",), ("verify",), ("verify", "-k", "tee.jwk", *TRUST), ("recipients", "list")],
    ids=["inspect", "verify", "verify-opened", "recipients"],
)
def test_all_artifacts_are_told_of_or_one(prepared: Shell, words: tuple[str, ...]) -> None:
    command = "imagetool recipients list" if words[0] == "recipients" else f"imagetool {words[0]}"
    at = 2 if words[0] == "recipients" else 1
    call = ("imagetool", *words[:at], REF, *words[at:])
    everything = prepared.json(*call)
    assert everything.keys() == documented(command, 1).keys()
    assert everything["index_digest"] == index_digest(prepared)
    rows = cast("list[dict[str, Any]]", everything["manifests"])
    assert [row.pop("platform") for row in rows] == [f"linux/{HERE}", f"linux/{OTHER}"]
    assert rows[0]["content_digest"] != rows[1]["content_digest"]
    shown = cast("list[dict[str, Any]]", documented(command, 1)["manifests"])[0]
    assert all(row.keys() == shown.keys() - {"platform"} for row in rows)
    one = prepared.json(*call, "--platform", f"linux/{OTHER}")
    assert one.keys() == documented(command).keys()
    assert one["content_digest"] == rows[1]["content_digest"]
    single = prepared.json("imagetool", *words[:at], "oci:enc:single", *words[at:])
    assert shape(single) == shape(one)
    if words == ("verify",):
        assert_as_documented("imagetool verify", single)
    lines = prepared.ok(*call)
    assert f"linux/{HERE}" in lines
    assert f"linux/{OTHER}" in lines


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", REF),
        ("verify", REF),
        ("recipients", "list", REF),
        ("sign", REF, "--key", "auditor.jwk", *TRUST),
        ("recipients", "add", REF, "-r", "other.jwk.pub", "-k", "tee.jwk", *TRUST),
        ("recipients", "remove", REF, "0", *TRUST),
        ("copy", REF, "oci:made:v1"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_platform_that_is_not_there(shell: Shell, words: tuple[str, ...]) -> None:
    line = shell.refused(UsageError, "imagetool", *words, "--platform", "linux/riscv64")
    assert f"it is for linux/{HERE}, linux/{OTHER}" in line
    words = tuple("oci:enc:single" if word == REF else word for word in words)
    line = shell.refused(UsageError, "imagetool", *words, "--platform", f"linux/{HERE}")
    assert "is a single artifact" in line
    assert not (shell.path / "made").exists()


@pytest.mark.parametrize("words", [("verify",), ("sign", "--key", "auditor.jwk")], ids=["verify", "sign"])
def test_a_pin_means_one_artifact(shell: Shell, words: tuple[str, ...]) -> None:
    line = shell.refused(UsageError, "imagetool", *words, REF, *SOME_PIN)
    for row in listed(shell, "imagetool", "inspect", REF):
        assert f"{row['platform']} ({row['manifest_digest']})" in line
        pinned = ("--pin", str(row["content_digest"]), "--platform", str(row["platform"]))
        shell.ok("imagetool", *words, REF, *pinned)


def test_signatures_for_all_and_for_one(shell: Shell) -> None:
    before = shell.json("imagetool", "inspect", REF)
    signed = shell.json("imagetool", "sign", REF, "--key", "auditor.jwk", *TRUST)
    assert_as_documented("imagetool sign", signed)
    assert signed["manifest_digest"] == index_digest(shell)
    after = listed(shell, "imagetool", "verify", REF, *AUDITED)
    assert [row["content_digest"] for row in after] == [
        row["content_digest"] for row in cast("list[dict[str, Any]]", before["manifests"])
    ]
    again = ("--platform", f"linux/{OTHER}")
    shell.ok("imagetool", "sign", REF, "--key", "owner.jwk", *AUDITED, *again)
    assert [len(row["signatures"]) for row in listed(shell, "imagetool", "inspect", REF)] == [2, 3]
    # skopeo rewrites an index whose descriptors have an artifactType.
    with closing(Layout(shell.path / "enc", tag="v1")) as layout:
        entries = json.loads(layout.document().content)["manifests"]
    assert [entry["platform"]["architecture"] for entry in entries] == [HERE, OTHER]
    assert not any("artifactType" in entry for entry in entries)
    assert "word" in shell.ok("encfs", "ls", REF, "-k", "tee.jwk", *AUDITED)


def test_where_one_artifact_is_refused_none_is_changed(shell: Shell) -> None:
    shell.ok("imagetool", "sign", REF, "--key", "auditor.jwk", *TRUST, "--platform", f"linux/{HERE}")
    before, digest = blobs(shell), index_digest(shell)
    # The first is accepted, and written; the second is not.
    line = shell.refused(WrongSignerError, "imagetool", "sign", REF, "--key", "owner.jwk", *AUDITED)
    assert f"linux/{OTHER} (sha256:" in line
    assert (blobs(shell), index_digest(shell)) == (before, digest)
    shell.refused(RollbackError, "imagetool", "verify", REF, *TRUST, "--min-version", "2")


def test_recipients_come_and_go(shell: Shell) -> None:
    shell.refused(WrongKeyError, "imagetool", "verify", REF, "-k", "other.jwk")
    shell.ok("imagetool", "recipients", "add", REF, "-r", "other.jwk.pub", "-k", "tee.jwk", *TRUST)
    shell.ok("imagetool", "verify", REF, "-k", "other.jwk")
    here = ("--platform", f"linux/{HERE}")
    shell.ok("imagetool", "recipients", "remove", REF, "0", *TRUST, *here)
    shell.ok("imagetool", "recipients", "add", REF, "-r", "tee.jwk.pub", "-k", "other.jwk", *TRUST, *here)
    # Number 0 is now another recipient in either of them.
    before = blobs(shell)
    line = shell.refused(ConflictError, "imagetool", "recipients", "remove", REF, "0", *TRUST)
    assert "not the same in all artifacts" in line
    assert blobs(shell) == before
    shell.ok("imagetool", "recipients", "remove", REF, "tee.jwk.pub", *TRUST)
    rows = listed(shell, "imagetool", "recipients", "list", REF)
    assert [len(row["recipients"]) for row in rows] == [1, 1]
    shell.refused(WrongKeyError, "imagetool", "verify", REF, "-k", "tee.jwk")


def swap_platforms(shell: Shell) -> None:
    """Two indexes that lie: `swapped` has the platforms exchanged, `nested` names an index."""
    with closing(Layout(shell.path / "enc", tag="v1")) as layout:
        document = json.loads(layout.document().content)
        for entry, name in zip(document["manifests"], (OTHER, HERE), strict=True):
            entry["platform"]["architecture"] = name
        layout.put_manifest(json.dumps(document).encode(), document["mediaType"], tag="swapped")
        document["manifests"][1] = {**document["manifests"][1], "mediaType": document["mediaType"]}
        layout.put_manifest(json.dumps(document).encode(), document["mediaType"], tag="nested")


def test_an_index_that_lies(shell: Shell) -> None:
    """Platforms exchanged: seen with a key. A damaged artifact: seen, and named."""
    swap_platforms(shell)
    shell.ok("imagetool", "verify", "oci:enc:swapped", *TRUST)
    line = shell.refused(FormatError, "imagetool", "verify", "oci:enc:swapped", "-k", "tee.jwk", *TRUST)
    assert f"lists for linux/{OTHER} is for linux/{HERE}" in line
    for words in (("inspect",), ("verify",), ("recipients", "list")):
        shell.refused(UnsupportedError, "imagetool", *words, "oci:enc:nested")
        line = shell.refused(UnsupportedError, "imagetool", *words, "oci:plain:v1")
        assert f"linux/{HERE} (sha256:" in line
    segment = listed(shell, "imagetool", "inspect", REF)[1]["volumes"][0]["segments"][0]["digest"]
    blob = shell.path / "enc/blobs" / segment.replace(":", "/")
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(content)
    assert f"linux/{OTHER} (sha256:" in shell.refused(IntegrityError, "imagetool", "verify", REF)
    shell.ok("imagetool", "verify", REF, "--platform", f"linux/{HERE}")
    shell.refused(UnsupportedError, "imagetool", "copy", "oci:plain:v1", "oci:made:v1")
    assert not (shell.path / "made").exists()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("registry"), delete=True) as server:
        yield server.host


@needs_docker_registry
def test_from_layout_to_registry_and_back(shell: Shell, host: str) -> None:
    remote, digest = f"docker://{host}/app:v1", index_digest(shell)
    pushed = shell.json("imagetool", "push", REF, remote, "--plain-http")
    assert_as_documented("imagetool copy", pushed)
    assert pushed["manifest_digest"] == digest
    assert shell.json("imagetool", "pull", remote, "oci:back:v1", "--plain-http")["manifest_digest"] == digest
    assert blobs(shell, "back") < blobs(shell)
    assert len(listed(shell, "imagetool", "verify", "oci:back:v1", "-k", "tee.jwk", *TRUST)) == 2
    again = shell.json("imagetool", "copy", REF, remote, "--plain-http")
    assert again["blobs_copied"] == 0
    # One of them keeps its digest, and is an artifact like any other.
    row = listed(shell, "imagetool", "inspect", remote, "--plain-http")[1]
    other = ("--platform", f"linux/{OTHER}")
    one = shell.json("imagetool", "copy", remote, "oci:one:v1", "--plain-http", *other)
    assert one["manifest_digest"] == row["manifest_digest"]
    assert shell.json("imagetool", "verify", "oci:one:v1")["content_digest"] == row["content_digest"]
    # Changed where it is.
    shell.ok("imagetool", "sign", remote, "--key", "auditor.jwk", *TRUST, "--plain-http")
    assert len(listed(shell, "imagetool", "verify", remote, *AUDITED, "--plain-http")) == 2


@needs_docker_registry
def test_pulled_into_the_cache_it_is_there_without_the_registry(shell: Shell, tmp_path: Path) -> None:
    cache = ("--plain-http", "--cache-dir", str(tmp_path / "cache"), "--io-timeout", "0.5")
    with running(tmp_path / "registry") as server:
        remote = f"docker://{server.host}/app:v1"
        shell.ok("imagetool", "push", REF, remote, "--plain-http")
        part = shell.json("imagetool", "pull", remote, *cache, "--platform", f"linux/{HERE}")
        assert part["manifest_digest"] == listed(shell, "imagetool", "inspect", REF)[0]["manifest_digest"]
        whole = shell.json("imagetool", "pull", remote, *cache)
        assert_as_documented("imagetool pull", whole)
        assert whole["manifest_digest"] == index_digest(shell)
        assert 0 < cast("int", whole["size_fetched"]) < cast("int", whole["size"])
    for name in (HERE, OTHER):
        chosen = ("--platform", f"linux/{name}", "-k", "tee.jwk", *TRUST, *cache)
        assert sorted(shell.ok("encfs", "ls", remote, *chosen).split()) == sorted([name, "word"])


def test_python_takes_this_machines_or_the_one_that_is_asked_for(prepared: Shell, shell: Shell) -> None:
    def read(path: Path, tag: str = "v1", **options: Any) -> str:
        options = {"key": str(path / "tee.jwk"), "allow_unsigned": True, **options}
        with encfs.open(f"oci:{path / 'enc'}:{tag}", **options) as artifact:
            return artifact.read("word").decode()

    assert read(prepared.path) == read(prepared.path, tag="single") == HERE
    assert read(prepared.path, platform=f"linux/{OTHER}") == OTHER
    with pytest.raises(UsageError, match="riscv64"):
        read(prepared.path, platform="linux/riscv64")
    with pytest.raises(UnsupportedError, match="is for linux/"):
        read(prepared.path, tag="single", platform=f"linux/{OTHER}")
    swap_platforms(shell)
    with pytest.raises(UnsupportedError, match=f"is for linux/{OTHER}"):
        read(shell.path, tag="swapped")
