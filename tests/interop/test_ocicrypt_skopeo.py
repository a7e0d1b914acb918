"""ocicrypt with skopeo on the other side: each decrypts what the other encrypted."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import KeyFileError, KeyProviderError, WrongKeyError
from encfs.image.compression import Compression
from encfs.oci.layout import Layout
from imagetool.ocicrypt.edit import list_recipients
from tests.support.container_images import (
    KeyPair,
    Store,
    archive,
    gnupg,
    make_certificate,
    make_image,
    make_key,
    needs_gpg,
    run_decrypt,
    run_encrypt,
    skopeo_copy,
)

pytestmark = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")

KINDS = ("rsa", "p256", "p384", "p521")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An image of umoci's, with what it makes of two directories, and one with a layer of each compression."""
    directory = tmp_path_factory.mktemp("images")
    store = Store(directory / "store")
    numbers = random.Random(7)
    make_image(
        store,
        "made",
        [
            (archive({"bin/a": numbers.randbytes(700_000)}), Compression.NONE),
            (archive({"etc/b": b"text" * 50_000, "c": numbers.randbytes(3)}), Compression.GZIP),
            (archive({"usr/d": b"\0" * 1_000_000}), Compression.ZSTD),
        ],
    )
    return store


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, KeyPair]:
    directory = tmp_path_factory.mktemp("keys")
    return {kind: make_key(directory, kind) for kind in KINDS}


def _assert_same(store: Store, tag: str, other: Store, other_tag: str) -> None:
    assert other.plain_layers(other_tag) == store.plain_layers(tag)
    before, after = store.manifest(tag), other.manifest(other_tag)
    assert after.config == before.config
    assert store.blob(before.config.digest) == other.blob(after.config.digest)


@pytest.mark.parametrize("kind", KINDS)
def test_skopeo_encrypts_and_we_decrypt(store: Store, keys: Mapping[str, KeyPair], kind: str, tmp_path: Path) -> None:
    theirs, plain = Store(tmp_path / "theirs"), Store(tmp_path / "plain")
    skopeo_copy(store.reference("made"), theirs.reference("x"), "--encryption-key", f"jwe:{keys[kind].public}")
    assert all(layer.media_type.endswith("+encrypted") for layer in theirs.manifest("x").layers)
    result = run_decrypt(theirs.reference("x"), plain.reference("x"), [keys[kind].private])
    assert (result.images, result.layers) == (1, 3)
    _assert_same(store, "made", plain, "x")
    assert [layer.media_type for layer in plain.manifest("x").layers] == [
        layer.media_type for layer in store.manifest("made").layers
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_we_encrypt_and_skopeo_decrypts(store: Store, keys: Mapping[str, KeyPair], kind: str, tmp_path: Path) -> None:
    ours, plain = Store(tmp_path / "ours"), Store(tmp_path / "plain")
    run_encrypt(store.reference("made"), ours.reference("x"), [keys[kind].public])
    skopeo_copy(ours.reference("x"), plain.reference("x"), "--decryption-key", keys[kind].private)
    _assert_same(store, "made", plain, "x")


def test_several_recipients_of_skopeo_each_open(store: Store, keys: Mapping[str, KeyPair], tmp_path: Path) -> None:
    theirs = Store(tmp_path / "theirs")
    options = [option for kind in KINDS for option in ("--encryption-key", f"jwe:{keys[kind].public}")]
    skopeo_copy(store.reference("made"), theirs.reference("x"), *options)
    for kind in KINDS:
        plain = Store(tmp_path / kind)
        run_decrypt(theirs.reference("x"), plain.reference("x"), [keys[kind].private])
        _assert_same(store, "made", plain, "x")


def test_each_of_several_recipients_of_ours_opens_with_skopeo(
    store: Store, keys: Mapping[str, KeyPair], tmp_path: Path
) -> None:
    ours = Store(tmp_path / "ours")
    run_encrypt(store.reference("made"), ours.reference("x"), [keys[kind].public for kind in KINDS])
    for kind in KINDS:
        plain = Store(tmp_path / kind)
        skopeo_copy(ours.reference("x"), plain.reference("x"), "--decryption-key", keys[kind].private)
        _assert_same(store, "made", plain, "x")


def test_chosen_layers(store: Store, keys: Mapping[str, KeyPair], tmp_path: Path) -> None:
    ours, theirs, plain = Store(tmp_path / "ours"), Store(tmp_path / "theirs"), Store(tmp_path / "plain")
    run_encrypt(store.reference("made"), ours.reference("x"), [keys["p256"].public], layers=[0, -1])
    skopeo_copy(
        *(store.reference("made"), theirs.reference("x"), "--encryption-key", f"jwe:{keys['p256'].public}"),
        *("--encrypt-layer", "0", "--encrypt-layer", "-1"),
    )
    for encrypted in (ours, theirs):
        types = [layer.media_type.endswith("+encrypted") for layer in encrypted.manifest("x").layers]
        assert types == [True, False, True]
        assert encrypted.manifest("x").layers[1] == store.manifest("made").layers[1]
    skopeo_copy(ours.reference("x"), plain.reference("ours"), "--decryption-key", keys["p256"].private)
    run_decrypt(theirs.reference("x"), plain.reference("theirs"), [keys["p256"].private])
    _assert_same(store, "made", plain, "ours")
    _assert_same(store, "made", plain, "theirs")


def test_an_image_of_umocis_goes_both_ways_and_is_unpacked(keys: Mapping[str, KeyPair], tmp_path: Path) -> None:
    if shutil.which("umoci") is None:
        pytest.skip("umoci is not installed")
    images = Store(tmp_path / "images")
    content = tmp_path / "content"
    (content / "bin").mkdir(parents=True)
    shutil.copy("/bin/sh", content / "bin" / "sh")
    (content / "link").symlink_to("bin/sh")
    (content / "setuid").touch()
    (content / "setuid").chmod(0o4711)
    _umoci("init", "--layout", images.path)
    _umoci("new", "--image", f"{images.path}:real")
    _umoci("insert", "--rootless", "--image", f"{images.path}:real", content, "/")
    _umoci("insert", "--rootless", "--image", f"{images.path}:real", content / "bin", "/second")
    run_encrypt(images.reference("real"), images.reference("ours"), [keys["rsa"].public, keys["p384"].public])
    skopeo_copy(images.reference("ours"), images.reference("back"), "--decryption-key", keys["p384"].private)
    skopeo_copy(images.reference("real"), images.reference("theirs"), "--encryption-key", f"jwe:{keys['rsa'].public}")
    run_decrypt(images.reference("theirs"), images.reference("again"), [keys["rsa"].private])
    for tag in ("back", "again"):
        _assert_same(images, "real", images, tag)
    _umoci("unpack", "--rootless", "--image", f"{images.path}:again", tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked" / "rootfs"
    assert (unpacked / "bin" / "sh").read_bytes() == Path("/bin/sh").read_bytes()
    assert (unpacked / "second" / "sh").is_file()
    assert (unpacked / "link").is_symlink()
    assert (unpacked / "setuid").stat().st_mode & 0o7777 == 0o4711


# -- PKCS #7 and OpenPGP


@dataclass(frozen=True)
class Holder:
    """Somebody with a key of each kind that skopeo knows. `options` are skopeo's for decrypting, by kind."""

    recipients: Mapping[str, str]
    keys: Mapping[str, str]
    options: Mapping[str, list[object]]


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory, keys: Mapping[str, KeyPair]) -> Iterator[Holder]:
    directory = tmp_path_factory.mktemp("holder")
    certificate = make_certificate(directory)
    with pytest.MonkeyPatch.context() as patch, gnupg(directory / "gnupg", "holder@example.org") as secret_key:
        patch.setenv("GNUPGHOME", str(directory / "gnupg"))
        yield Holder(
            {
                "jwe": f"jwe:{keys['p256'].public}",
                "pkcs7": f"pkcs7:{certificate.public}",
                "pgp": "pgp:holder@example.org",
            },
            {"jwe": str(keys["p256"].private), "pkcs7": str(certificate.private), "pgp": "pgp:"},
            {
                "jwe": ["--decryption-key", keys["p256"].private],
                "pkcs7": ["--decryption-key", certificate.private, "--decryption-key", certificate.public],
                "pgp": ["--decryption-key", secret_key],
            },
        )


SCHEMES = ("jwe", "pkcs7", "pgp")


@needs_gpg
@pytest.mark.parametrize("scheme", ["pkcs7", "pgp"])
def test_other_kinds_of_recipients_of_skopeos(store: Store, holder: Holder, scheme: str, tmp_path: Path) -> None:
    theirs, plain = Store(tmp_path / "theirs"), Store(tmp_path / "plain")
    skopeo_copy(store.reference("made"), theirs.reference("x"), "--encryption-key", holder.recipients[scheme])
    run_decrypt(theirs.reference("x"), plain.reference("x"), [holder.keys[scheme]])
    _assert_same(store, "made", plain, "x")
    with pytest.raises(WrongKeyError, match=f"is encrypted for {scheme}, which"):
        run_decrypt(theirs.reference("x"), plain.reference("y"), [holder.keys["jwe"]])


@needs_gpg
def test_all_kinds_at_once_in_both_directions(store: Store, holder: Holder, tmp_path: Path) -> None:
    ours, theirs, plain = Store(tmp_path / "ours"), Store(tmp_path / "theirs"), Store(tmp_path / "plain")
    run_encrypt(store.reference("made"), ours.reference("x"), list(holder.recipients.values()))
    options = [option for recipient in holder.recipients.values() for option in ("--encryption-key", recipient)]
    skopeo_copy(store.reference("made"), theirs.reference("x"), *options)
    for encrypted in (ours, theirs):
        annotations = encrypted.manifest("x").layers[0].annotations
        assert {name.rpartition(".")[2] for name in annotations} == {"pubopts", *SCHEMES}
    for scheme in SCHEMES:
        skopeo_copy(ours.reference("x"), plain.reference(f"ours-{scheme}"), *holder.options[scheme])
        run_decrypt(theirs.reference("x"), plain.reference(f"theirs-{scheme}"), [holder.keys[scheme]])
        run_decrypt(ours.reference("x"), plain.reference(f"both-{scheme}"), [holder.keys[scheme]])
        for tag in (f"ours-{scheme}", f"theirs-{scheme}", f"both-{scheme}"):
            _assert_same(store, "made", plain, tag)
    with closing(Layout(theirs.path, tag="x")) as layout:
        (image,) = list_recipients(layout)
    assert {entry.scheme for entry in image.layers[0].entries} == set(SCHEMES)
    descriptions = {entry.scheme: entry.description for entry in image.layers[0].entries}
    assert descriptions["pkcs7"].startswith("issuer 'CN=holder' serial ")
    assert descriptions["pgp"].startswith("keys ")


@needs_gpg
def test_gpg_says_what_is_wrong(store: Store, holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Store(tmp_path / "ours")
    with pytest.raises(KeyFileError, match=r"gpg cannot encrypt to 'nobody@example\.org': .*No public key"):
        run_encrypt(store.reference("made"), ours.reference("x"), ["pgp:nobody@example.org"])
    run_encrypt(store.reference("made"), ours.reference("x"), [holder.recipients["pgp"]])
    reference = ours.change("x", _alter_pgp)
    with pytest.raises(WrongKeyError, match="gpg does not decrypt it"):
        run_decrypt(reference, ours.reference("no"), ["pgp:"])
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(WrongKeyError, match="No secret key"):
        run_decrypt(ours.reference("x"), ours.reference("no"), ["pgp:"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KeyProviderError, match="gpg cannot be started"):
        run_decrypt(ours.reference("x"), ours.reference("no"), ["pgp:"])
    assert "no" not in ours.tags()


def _alter_pgp(document: dict[str, Any]) -> None:
    name = "org.opencontainers.image.enc.keys.pgp"
    for layer in document["layers"]:
        content = bytearray(base64.b64decode(layer["annotations"][name]))
        content[-30] ^= 1
        layer["annotations"][name] = base64.b64encode(content).decode()


def test_manifests_keep_what_is_theirs(store: Store, keys: Mapping[str, KeyPair], tmp_path: Path) -> None:
    ours = Store(tmp_path / "ours")
    run_encrypt(store.reference("made"), ours.reference("x"), [keys["p256"].public])
    document = ours.manifest("x").document
    assert document["annotations"] == {"org.example.kept": "yes"}
    annotations = ours.manifest("x").layers[0].annotations
    assert set(annotations) == {
        "org.opencontainers.image.enc.pubopts",
        "org.opencontainers.image.enc.keys.jwe",
    }
    assert json.dumps(document).count(store.manifest("made").layers[0].digest) == 0, "the plain digest is not told"


def _umoci(*arguments: object) -> None:
    done = subprocess.run(["umoci", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
