"""What a key of the broker is for: releases of artifacts and of images for several platforms, and encrypting to it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.image.compression import Compression
from encfs.oci.layout import Layout
from tests.support.broker import PATH, imagetool, make_broker, set_policy
from tests.support.container_images import Store, archive, make_image, make_index
from tests.support.documented import assert_as_documented

OWN = f"kbs:///{PATH}"
PLATFORMS = ("amd64", "arm64")


class Owner:
    """A broker whose key is for the line acme/chat from version 2 on; a signing key; sources; a layout `store`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.broker = make_broker(place / "b")
        (place / "src").mkdir()
        (place / "src" / "file").write_text("plaintext")
        imagetool("keygen", "-o", place / "owner.jwk", "--type", "ed25519")
        imagetool("keygen", "-o", place / "other.jwk")
        images = Store(place / "plain")
        layers = {one: [(archive({"word": one.encode()}), Compression.GZIP)] for one in PLATFORMS}
        make_index(images, "all", layers)
        make_image(images, "one", layers["amd64"], architecture="amd64")

    @property
    def word(self) -> str:
        return f"{OWN}?broker={self.broker}"

    def encrypt(self, source: str, tag: str, version: int, *, artifact_id: str = "acme/chat", code: int = 0) -> Any:
        source = f"oci:{self.place}/{source}" if ":" in source else str(self.place / source)
        line = ("--id", artifact_id, "--artifact-version", str(version))
        words = ("encrypt", source, self.reference(tag), "-r", self.word, "--sign", self.place / "owner.jwk", *line)
        return imagetool(*words, code=code)

    def reference(self, tag: str) -> str:
        return f"oci:{self.place}/store:{tag}"

    def release(self, tag: str, *more: str, code: int = 0) -> Any:
        trust = ("--trust", self.place / "owner.jwk.pub", "--id", "acme/chat")
        words = ("release", self.reference(tag), "--broker", self.broker, "--resource", PATH, *trust, *more)
        return imagetool(*words, code=code)

    def floor(self) -> tuple[str | None, int | None]:
        (key,) = imagetool("broker", "key", "list", self.broker)["keys"]
        return key["artifact_id"], key["min_version"]

    @property
    def store(self) -> Store:
        return Store(self.place / "store")


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    made = Owner(tmp_path_factory.mktemp("release"))
    assert made.encrypt("src", "v2", 2)["warnings"] == []
    made.release("v2")
    assert made.floor() == ("acme/chat", 2)
    return made


def test_what_consumers_would_refuse_is_not_encrypted(owner: Owner) -> None:
    """Another id, a new one, a version below the floor: said before anything is written."""
    other = owner.encrypt("src", "wrong", 2, artifact_id="acme/other", code=4)["error"]
    assert "is for the artifact 'acme/chat'" in other["message"]
    assert "--id acme/chat" in other["hint"]
    below = owner.encrypt("plain:all", "wrong", 1, code=33)["error"]
    assert "version 1 is below the floor 2" in below["message"]
    words = ("encrypt", owner.place / "src", owner.reference("wrong"), "-r", owner.word)
    assert "refuses a new id" in imagetool(*words, code=4)["error"]["message"]
    assert "wrong" not in owner.store.tags()
    # Not by itself either, when the release makes the artifact.
    into = ("--broker", owner.broker, "--resource", PATH, "--sign", owner.place / "owner.jwk", "--id", "acme/other")
    words = ("release", owner.place / "src", owner.reference("wrong"), *into)
    assert "is for the artifact 'acme/chat'" in imagetool(*words, code=4)["error"]["message"]
    assert "wrong" not in owner.store.tags()
    # A later version of the line is what the key is for, and so is any artifact for a key without a floor.
    owner.encrypt("src", "v3", 3)
    imagetool("encrypt", owner.place / "src", owner.reference("free"), "-r", f"kbs:///free/key/a?broker={owner.broker}")
    imagetool("broker", "key", "remove", owner.broker, "free/key/a")


def test_nor_to_a_key_that_comes_with_refusals_by_itself(owner: Owner) -> None:
    """What the resource holds, in a file; and a rule of a key that is not there yet, which is not made then."""
    key = json.loads((owner.place / "kek.jwk").read_text())
    held = owner.place / "held.json"
    held.write_text(json.dumps({"key": key, "id": "acme/chat", "min_version": 2}))
    held.chmod(0o600)
    words = ("encrypt", owner.place / "src", owner.reference("file"), "-r", f"{OWN}?key={held}")
    assert "refuses a new id" in imagetool(*words, code=4)["error"]["message"]
    line = ("--id", "acme/chat", "--artifact-version")
    assert "below the floor 2" in imagetool(*words, *line, "1", code=33)["error"]["message"]
    imagetool(*words, *line, "2")
    rule = f'[key."{PATH}"]\ntee = "sample"\n'
    set_policy(owner.broker, f'{rule}[key."fresh/*"]\ntee = "sample"\nartifact_id = "acme/fresh"\n')
    try:
        fresh = ("-r", f"kbs:///fresh/key/a?broker={owner.broker}")
        refused = imagetool("encrypt", owner.place / "src", owner.reference("fresh"), *fresh, code=4)["error"]
        assert "is for the artifact 'acme/fresh'" in refused["message"]
        assert [one["path"] for one in imagetool("broker", "key", "list", owner.broker)["keys"]] == [PATH]
    finally:
        set_policy(owner.broker, rule)


def test_nor_is_the_key_added_to_such_an_artifact(owner: Owner) -> None:
    of_others = owner.reference("others")
    key = owner.place / "other.jwk"
    imagetool("encrypt", owner.place / "src", of_others, "-r", f"{key}.pub", "--id", "acme/other")
    add = ("recipients", "add", of_others, "-r", owner.word, "-k", key, "--allow-unsigned")
    assert "whoever gets it refuses" in imagetool(*add, code=4)["error"]["message"]
    assert len(imagetool("inspect", of_others)["recipients"]) == 1
    mine = owner.reference("mine")
    line = ("--id", "acme/chat", "--artifact-version", "2")
    imagetool("encrypt", owner.place / "src", mine, "-r", f"{key}.pub", *line)
    imagetool("recipients", "add", mine, "-r", owner.word, "-k", key, "--allow-unsigned")
    assert [one["kid"] for one in imagetool("inspect", mine)["recipients"]][-1] == OWN


def test_content_that_a_rule_does_not_name_yet_is_warned_of(owner: Owner) -> None:
    rule = f'[key."{PATH}"]\ntee = "sample"\n'
    set_policy(owner.broker, f'{rule}content_digests = ["sha256:{"5a" * 32}"]\n')
    try:
        (warning,) = owner.encrypt("src", "pinned", 2)["warnings"]
        assert f"{OWN} is for certain content" in warning
    finally:
        set_policy(owner.broker, rule)


def test_an_image_for_several_platforms_is_one_release(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    assert owner.encrypt("plain:all", "i3", 3)["index"]
    released = owner.release("i3")
    digests = {one["platform"]: one["content_digest"] for one in released["artifacts"]}
    assert set(digests) == {"linux/amd64", "linux/arm64"}
    assert len(set(digests.values())) == 2
    assert (released["version"], released["floor_before"], released["refused"]) == (3, None, [])
    assert owner.floor() == ("acme/chat", 3)
    entry = imagetool("broker", "releases", owner.broker)["entries"][-1]
    assert (entry["event"], entry["content_digests"]) == ("floor-raised", list(digests.values()))
    # All of it, or nothing: one artifact that is not trusted, or that the key does not open, ends it.
    imagetool("keygen", "-o", tmp_path / "stranger.jwk", "--type", "ed25519")
    stranger = ("--trust", tmp_path / "stranger.jwk.pub", "--id", "acme/chat")
    into = ("--broker", owner.broker, "--resource", PATH)
    refused = imagetool("release", owner.reference("i3"), *into, *stranger, code=31)
    assert "linux/amd64" in refused["error"]["message"]
    # One platform of it by itself; then it is known what the others are, too.
    owner.encrypt("plain:all", "i4", 4)
    one = owner.release("i4", "--platform", "linux/arm64")
    assert [entry["platform"] for entry in one["artifacts"]] == ["linux/arm64"]
    both = owner.release("i4")
    assert (both["version"], both["floor_before"]) == (4, 4)
    assert both["warnings"] == []
    # A digest pins one of them.
    pinned = ("--pin", both["artifacts"][0]["content_digest"])
    assert (
        "--pin is the content digest of one"
        in imagetool("release", owner.reference("i4"), *into, *pinned, code=2)["error"]["message"]
    )
    owner.release("i3", code=33)
    assert owner.floor() == ("acme/chat", 4)
    del both["stderr"]
    assert_as_documented("imagetool release", both, but=("warnings", "refused"))


def test_an_index_of_two_versions_is_no_release(tmp_path: Path) -> None:
    """Nobody signs an index: whoever stores it may put an older artifact of the owner's into it."""
    owner = Owner(tmp_path)
    owner.encrypt("plain:all", "i3", 3)
    owner.encrypt("plain:all", "i4", 4)
    documents = {}
    for tag in ("i3", "i4"):
        with closing(Layout(owner.store.path, tag=tag)) as layout:
            documents[tag] = json.loads(layout.document().content)
    older = documents["i3"]["manifests"][1]
    owner.store.put(documents["i4"] | {"manifests": [documents["i4"]["manifests"][0], older]}, "mixed")
    refused = owner.release("mixed", code=4)["error"]
    assert "it is not one release" in refused["message"]
    assert "--platform" in refused["hint"]
    assert owner.floor() == (None, None)
