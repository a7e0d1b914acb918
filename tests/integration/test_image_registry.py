"""Container images from a registry to a registry, with nothing on disk between: encrypted, run, and given back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import UnsupportedError, WrongKeyError, WrongSignerError
from encfs.image.artifact import this_platform
from encfs.image.compression import Compression
from tests.support.container_images import Store, make_image, make_index, skopeo
from tests.support.image_layers import archive, needs_skopeo, regular, symlink
from tests.support.remote import needs_docker_registry, running

pytestmark = [needs_docker_registry, needs_skopeo, pytest.mark.fuse, pytest.mark.root]

HERE = this_platform().architecture
OTHER = "s390x"
PLAIN = "--plain-http"
TRUST = ("-k", "tee.jwk", "--trust", "owner.jwk.pub", "--id", "acme/app", "--min-version", "1")


def layers(word: bytes) -> list[tuple[bytes, Compression]]:
    """Of an image whose /bin/true does what its name says."""
    busybox = Path("/bin/busybox").read_bytes()
    bottom = archive(
        regular("bin/busybox", busybox, mode=0o755), symlink("bin/true", "busybox"), symlink("bin/cat", "busybox")
    )
    return [(bottom, Compression.GZIP), (archive(regular("word", word)), Compression.ZSTD)]


@dataclass(frozen=True)
class Owner:
    """A directory with keys and plain images, and a registry."""

    place: Path
    host: str

    @property
    def images(self) -> Store:
        return Store(self.place / "images")

    def reference(self, name: str) -> str:
        return f"docker://{self.host}/{name}"

    def call(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"from {program}.cli import main; main()", *words],
            cwd=self.place,
            env={**os.environ, "XDG_CACHE_HOME": str(self.place / "cache"), "TMPDIR": str(self.place / "tmp")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def answer(self, *words: str) -> dict[str, Any]:
        done = self.call("imagetool", *words, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def encrypt(self, source: str, target: str) -> dict[str, Any]:
        signed = ("--sign", "owner.jwk", "--id", "acme/app", "--artifact-version", "1")
        return self.answer("encrypt", source, target, "-r", "tee.jwk.pub", *signed, PLAIN)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """`app:v1` and, for two platforms, `app:all` are in the registry."""
    place = tmp_path_factory.mktemp("owner")
    (place / "tmp").mkdir()
    with running(tmp_path_factory.mktemp("registry")) as server:
        owner = Owner(place, server.host)
        owner.answer("keygen", "-o", "tee.jwk")
        owner.answer("keygen", "-o", "owner.jwk", "--type", "ed25519")
        make_image(owner.images, "v1", layers(b"one platform\n"), architecture=HERE)
        make_index(owner.images, "all", {OTHER: layers(b"another machine\n"), HERE: layers(b"this machine\n")})
        for tag in ("v1", "all"):
            skopeo(
                *("copy", "--all", "--preserve-digests", "--dest-tls-verify=false"),
                *(owner.images.reference(tag), owner.reference(f"app:{tag}")),
            )
        yield owner


def assert_is_given_back(owner: Owner, encrypted: str, name: str, original: str, *options: str) -> None:
    """Decrypted in the registry, the image has its config's bytes and its archives, as skopeo reads them."""
    target = owner.reference(f"back-{name}:v1")
    result = owner.answer("decrypt", encrypted, target, *TRUST, *options, PLAIN)
    config = skopeo("inspect", "--tls-verify=false", "--config", "--raw", target).encode()
    manifest = owner.images.manifest(original)
    assert f"sha256:{hashlib.sha256(config).hexdigest()}" == manifest.config.digest
    back = Store(owner.place / f"back-{name}")
    skopeo("copy", "--preserve-digests", "--src-tls-verify=false", target, back.reference("v1"))
    copied = back.manifest("v1")
    assert copied.config.digest == manifest.config.digest
    unpacked = [
        subprocess.run(["gzip", "-dc"], input=data, capture_output=True, check=True).stdout
        for data in back.plain_layers("v1")
    ]
    assert [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in unpacked] == json.loads(config)["rootfs"][
        "diff_ids"
    ]
    inspected = json.loads(skopeo("inspect", "--tls-verify=false", target))
    assert (inspected["Digest"], inspected["Architecture"]) == (result["manifest_digest"], result["platform"][6:])


def skopeo_digest(owner: Owner, reference: str) -> str:
    """The digest of a tag's manifest or index, in the registry's words."""
    raw = skopeo("inspect", "--tls-verify=false", "--raw", reference)
    return f"sha256:{hashlib.sha256(raw.encode()).hexdigest()}"


def test_an_image_is_encrypted_run_and_decrypted_in_a_registry(owner: Owner) -> None:
    encrypted = owner.reference("enc:v1")
    made = owner.encrypt(owner.reference("app:v1"), encrypted)
    raw = json.loads(skopeo("inspect", "--tls-verify=false", "--raw", encrypted))
    assert made["images"][0]["manifest_digest"] == skopeo_digest(owner, encrypted)
    assert not any("tar" in layer["mediaType"] for layer in raw["layers"])
    done = owner.call("encfs", "run", "-q", encrypted, *TRUST, PLAIN, "--", "/bin/cat", "/word")
    assert (done.returncode, done.stdout) == (0, "one platform\n"), done.stderr
    done = owner.call("encfs", "run", "-q", encrypted, *TRUST, PLAIN)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert_is_given_back(owner, encrypted, "v1", "v1")


def test_an_index_of_platforms_too(owner: Owner) -> None:
    encrypted = owner.reference("enc-all:v1")
    made = owner.encrypt(owner.reference("app:all"), encrypted)
    index = json.loads(skopeo("inspect", "--tls-verify=false", "--raw", encrypted))
    platforms = {entry["platform"]["architecture"]: entry["digest"] for entry in index["manifests"]}
    assert platforms == {image["platform"][6:]: image["manifest_digest"] for image in made["images"]}
    assert set(platforms) == {HERE, OTHER}
    done = owner.call("encfs", "run", "-q", encrypted, *TRUST, PLAIN, "--", "/bin/cat", "/word")
    assert (done.returncode, done.stdout) == (0, "this machine\n"), done.stderr
    for architecture in (HERE, OTHER):
        options = ("--platform", f"linux/{architecture}")
        assert_is_given_back(owner, encrypted, architecture, f"all-{architecture}", *options)
    # skopeo copies the index as it is, and what it copied opens.
    skopeo(
        *("copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"),
        *(encrypted, owner.reference("moved:v1")),
    )
    done = owner.call("encfs", "run", "-q", owner.reference("moved:v1"), *TRUST, PLAIN, "--", "/bin/cat", "/word")
    assert (done.returncode, done.stdout) == (0, "this machine\n"), done.stderr


def test_nothing_is_pushed_where_the_key_or_the_trust_is_wrong(owner: Owner) -> None:
    encrypted, target = owner.reference("enc-refused:v1"), owner.reference("nothing:v1")
    owner.encrypt(owner.reference("app:v1"), encrypted)
    owner.answer("keygen", "-o", "stranger.jwk")
    owner.answer("keygen", "-o", "forger.jwk", "--type", "ed25519")
    for error, words in (
        (WrongKeyError, ("-k", "stranger.jwk", *TRUST[2:])),
        (WrongSignerError, (*TRUST[:2], "--trust", "forger.jwk.pub", *TRUST[4:])),
    ):
        done = owner.call("imagetool", "decrypt", encrypted, target, *words, PLAIN)
        assert done.returncode == error.exit_code, done.stderr
        assert "manifest unknown" in skopeo("inspect", "--tls-verify=false", "--raw", target, check=False)


def test_what_is_no_image_leaves_no_layout(owner: Owner) -> None:
    (owner.place / "files").mkdir()
    (owner.place / "files/a").write_text("a file\n")
    owner.encrypt("files", "oci:files-encrypted:v1")
    done = owner.call("imagetool", "decrypt", "oci:files-encrypted:v1", "oci:no/layout:v1", *TRUST)
    assert done.returncode == UnsupportedError.exit_code, done.stderr
    assert "no container image" in done.stderr
    assert not (owner.place / "no").exists()
