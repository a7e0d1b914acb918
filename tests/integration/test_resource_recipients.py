"""Encrypting to the name of a key that a broker holds, without asking it: `-r kbs:///…` with `key=` and `broker=`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encfs.console.terminal import Terminal
from encfs.errors import KeyFileError, UsageError, WrongKeyError
from encfs.keys.jwk import generate_key
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.recipients import NamedKey, RecipientKey, unwrap_with_key
from encfs.keys.secrets import SymmetricKey
from imagetool.cli.recipientkeys import parse_resource_recipient, recipient_keys
from tests.support.broker import SAMPLE_POLICY, Served, imagetool, make_broker, serving, set_policy

DIGEST = "sha256:" + "5a" * 32


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """It holds default/key/chat (`kek.jwk` beside its directory) and default/key/pair, a private key (`pair.jwk`)."""
    place = tmp_path_factory.mktemp("broker")
    directory = make_broker(place / "b", "--host", "127.0.0.1")
    imagetool("keygen", "--type", "p256", "-o", place / "pair.jwk")
    imagetool("broker", "key", "add", directory, "default/key/pair", "--opaque", place / "pair.jwk")
    (place / "data").mkdir()
    (place / "data" / "file").write_bytes(b"content")
    with serving(directory) as served:
        yield served


def recipients(broker: Served, tag: str, *words: str, code: int = 0) -> Any:
    """The recipients of an artifact that was encrypted to `words`."""
    place = broker.directory.parent
    options = [option for word in words for option in ("-r", word)]
    made = imagetool("encrypt", place / "data", f"oci:{place / 'store'}:{tag}", *options, code=code)
    return made if code else imagetool("inspect", f"oci:{place / 'store'}:{tag}")["recipients"]


def read(broker: Served, tag: str, path: str) -> bytes:
    """What a consumer reads with `-k kbs:…`."""
    place = broker.directory.parent
    out = place / f"out-{tag}"
    imagetool(
        *("decrypt", f"oci:{place / 'store'}:{tag}", out, "-k", broker.uri(path), "--allow-unsigned"),
    )
    return (out / "file").read_bytes()


def released(broker: Served) -> int:
    return sum(one["event"] == "released" for one in imagetool("broker", "releases", broker.directory)["entries"])


def test_a_key_that_the_owner_has(broker: Served) -> None:
    place = broker.directory.parent
    before = released(broker)
    found = recipients(broker, "own", f"kbs:///default/key/chat?key={place / 'kek.jwk'}")
    assert [(one["type"], one["kid"]) for one in found] == [("oct", "kbs:///default/key/chat")]
    assert released(broker) == before, "nobody was asked"
    assert read(broker, "own", "default/key/chat") == b"content"
    # The URI that consumers use, with the file behind it, means the same.
    assert recipients(broker, "uri", broker.uri(more=f"&key={place / 'kek.jwk'}"))[0]["kid"] == found[0]["kid"]


@pytest.mark.parametrize("source", ["pair.jwk.pub", "pair.jwk", "broker"])
def test_a_key_pair_that_the_broker_holds(broker: Served, source: str) -> None:
    place = broker.directory.parent
    where = f"broker={broker.directory}" if source == "broker" else f"key={place / source}"
    found = recipients(broker, f"pair-{source}", f"kbs:///default/key/pair?{where}")
    assert [(one["type"], one["kid"]) for one in found] == [("p256", "kbs:///default/key/pair")]
    assert read(broker, f"pair-{source}", "default/key/pair") == b"content"


def test_one_command_makes_the_key_in_the_broker(broker: Served) -> None:
    word = f"kbs:///default/key/fresh?broker={broker.directory}"
    made = recipients(broker, "made", word)
    assert [(one["type"], one["kid"]) for one in made] == [("oct", "kbs:///default/key/fresh")]
    assert read(broker, "made", "default/key/fresh") == b"content"
    # And takes the same one the next time.
    recipients(broker, "again", word)
    assert read(broker, "again", "default/key/fresh") == b"content"
    entries = imagetool("broker", "releases", broker.directory)["entries"]
    assert sum(one["event"] == "key-added" and one["path"] == "default/key/fresh" for one in entries) == 1


def test_a_key_without_a_rule_is_warned_of(broker: Served) -> None:
    place = broker.directory.parent
    word = f"kbs:///other/key/chat?broker={broker.directory}"
    made = imagetool("encrypt", place / "data", f"oci:{place / 'store'}:norule", "-r", word)
    assert any("no rule of the policy is for other/key/chat" in text for text in made["warnings"])


def test_fetching_is_asked_for(broker: Served) -> None:
    before = released(broker)
    refused = recipients(broker, "fetch", broker.uri(), code=2)
    assert "does not say where the key is" in refused["error"]["message"]
    assert "fetch=yes" in refused["error"]["hint"]
    assert released(broker) == before
    assert recipients(broker, "fetch", broker.uri(more="&fetch=yes"))[0]["kid"] == "kbs:///default/key/chat"
    assert released(broker) == before + 1


def test_a_fetched_key_that_comes_with_refusals(broker: Served) -> None:
    """What it is not for is not encrypted to it, as whoever opens with it would refuse that."""
    set_policy(broker.directory, SAMPLE_POLICY + '[key."bound/*"]\ntee = "sample"\nartifact_id = "acme/bound"\n')
    imagetool("broker", "key", "add", broker.directory, "bound/key/a", "--kek", broker.directory.parent / "kek.jwk")
    place = broker.directory.parent
    words = ("encrypt", place / "data", f"oci:{place / 'store'}:bound", "-r", broker.uri("bound/key/a", "&fetch=yes"))
    refused = imagetool(*words, "--id", "acme/other", code=4)["error"]
    assert "is for the artifact 'acme/bound': whoever gets it refuses the id 'acme/other'" in refused["message"]
    imagetool(*words, "--id", "acme/bound")
    assert read(broker, "bound", "bound/key/a") == b"content"


def test_another_recipient_is_added(broker: Served) -> None:
    place = broker.directory.parent
    recipients(broker, "add", f"kbs:///default/key/chat?key={place / 'kek.jwk'}")
    reference = f"oci:{place / 'store'}:add"
    words = ["-r", f"cdh:default/key/pair?key={place / 'pair.jwk.pub'}", "-k", str(place / "kek.jwk")]
    imagetool("recipients", "add", reference, *words, "--allow-unsigned")
    assert read(broker, "add", "default/key/pair") == b"content"
    imagetool("recipients", "remove", reference, "kbs:///default/key/chat", "--allow-unsigned")
    assert [one["kid"] for one in imagetool("inspect", reference)["recipients"]] == ["kbs:///default/key/pair"]
    twice = recipients(broker, "twice", *(f"kbs:///default/key/chat?key={place / 'kek.jwk'}",) * 2, code=4)
    assert "is a recipient already" in twice["error"]["message"]


# Forms of a key, and what is no recipient


@pytest.mark.parametrize("form", ["raw", "base64", "jwk", "json", "private-json"])
def test_the_file_holds_what_the_resource_does(tmp_path: Path, form: str) -> None:
    kek = bytes(range(32))
    pair = generate_key("x25519")
    assert not isinstance(pair, SymmetricKey)
    from encfs.keys import jwkjson

    text = base64.b64encode(kek).decode()
    content = {
        "raw": kek,
        "base64": text.encode(),
        "jwk": json.dumps({"kty": "oct", "k": base64.urlsafe_b64encode(kek).rstrip(b"=").decode()}).encode(),
        "json": json.dumps({"key": text, "id": "acme/chat", "min_version": 3}).encode(),
        "private-json": json.dumps({"key": jwkjson.private_jwk(pair)}).encode(),
    }[form]
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    with recipient_keys(Terminal("test"), [f"kbs:///default/key/chat?key={file}"], None, []) as keys:
        keyring = parse_keyring(create_keyring(b"secret", DIGEST, keys), DIGEST)
        assert keyring.recipients[0].kid == "kbs:///default/key/chat"
    key = pair if form == "private-json" else SymmetricKey(bytearray(kek))
    assert len(unwrap_with_key(key, keyring.recipients, DIGEST, "it")) == 32
    assert not isinstance(keys[0], SymmetricKey) or not any(keys[0].secret), "wiped"


def test_the_named_recipient_is_tried_first() -> None:
    """Of many recipients of a kind, the one that carries the resource's name; the message shows the order."""
    pairs = [generate_key("p256") for _ in range(3)]
    keys: list[RecipientKey] = [
        NamedKey(pair.public, f"kbs:///default/key/{number}")
        for number, pair in enumerate(pairs)
        if not isinstance(pair, SymmetricKey)
    ]
    keyring = parse_keyring(create_keyring(b"secret", DIGEST, keys), DIGEST)
    other = generate_key("p256")
    assert not isinstance(other, SymmetricKey)
    with pytest.raises(WrongKeyError, match=r"tried 2, 0, 1"):
        unwrap_with_key(other, keyring.recipients, DIGEST, "it", kid="kbs:///default/key/2")


@pytest.mark.parametrize(
    "word",
    [
        "kbs:///default/key/chat",
        "cdh:default/key/chat",
        "kbs:///default/key/chat?key=",
        "kbs:///default/key/chat?key=a&key=b",
        "kbs:///default/key/chat?key=a&broker=b",
        "kbs:///default/key/chat?fetch=no",
        "kbs:///default/key/chat?key=a&ca=b",
        "kbs:///default/key/chat?key=a&other=b",
        "kbs:///default/key?key=a",
        "kbs:///default/key/..?key=a",
        "kbs:default/key/chat?key=a",
        "kbs:https://kbs.example/default/key/chat?other=x&key=a",
        "cdh:sealed=x?key=a",
        "cdh:default/key/chat?key=a&host=evil",
        f"kbs:///{'r' * 120}/{'t' * 120}/{'n' * 120}?key=a",
    ],
)
def test_what_is_no_recipient(word: str) -> None:
    with pytest.raises((UsageError, KeyFileError)):
        parse_resource_recipient(word)


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    for name, content, message in (
        ("short", bytes(31), "neither a JWK nor a PEM"),
        ("signs", json.dumps(_public("ed25519")).encode(), "cannot encrypt"),
        ("more", b'{"key": "AAAA", "later": 1}', "malformed|has the member"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        file.chmod(0o600)
        with (
            pytest.raises(KeyFileError, match=message),
            recipient_keys(Terminal("test"), [f"kbs:///a/b/c?key={file}"], None, []),
        ):
            raise AssertionError("it was taken")
    open_file = tmp_path / "open"
    open_file.write_bytes(bytes(32))
    open_file.chmod(0o644)
    with (
        pytest.raises(KeyFileError, match="accessible by others"),
        recipient_keys(Terminal("test"), [f"kbs:///a/b/c?key={open_file}"], None, []),
    ):
        raise AssertionError("it was taken")


def _public(kind: str) -> dict[str, str]:
    from encfs.keys import jwkjson

    key = generate_key(kind)
    assert not isinstance(key, SymmetricKey)
    return jwkjson.public_jwk(key.public)
