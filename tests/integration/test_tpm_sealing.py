"""`encfs seal`, `encfs unseal` and `-k tpm2:FILE` with a real TPM (swtpm): what opens, and everything that must not."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

import encfs.cli
import imagetool.cli
from encfs.console import commandline
from encfs.errors import (
    ConflictError,
    EncfsError,
    KeyFileError,
    KeyProviderError,
    KeyRefusedError,
    NotFoundError,
    UsageError,
    WrongKeyError,
)
from encfs.keys.files import load_decryption_key
from encfs.keys.providers import fetched_key
from encfs.keys.secrets import SymmetricKey
from encfs.tpm.keyfile import load_object
from tests.integration.test_cdh import Hub, hub
from tests.support.artifacts import make_small_tree
from tests.support.documented import assert_as_documented
from tests.support.tpm import SoftwareTpm, software_tpm, tpm

__all__ = ["hub", "tpm"]

APPS = {"encfs": encfs.cli.app, "imagetool": imagetool.cli.app}


def run(*words: str) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        commandline.main(APPS[words[0]], words[0], words[1:])
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(cast("io.BytesIO", stream.buffer).getvalue().decode())
    return cast("int", caught.value.code), texts[0], texts[1]


def ok(*words: str) -> str:
    code, out, err = run(*words)
    assert code == 0, err
    return out


def refused(kind: type[EncfsError], *words: str) -> str:
    code, out, err = run(*words)
    assert code == kind.exit_code, err
    assert out == ""
    lines = [line for line in err.splitlines() if ": warning: " not in line]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture
def place(tmp_path: Path, tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a key `kek.jwk` that is sealed to PCRs 7 and 11 in `kek.tpm`."""
    monkeypatch.chdir(tmp_path)
    ok("imagetool", "keygen", "-o", "kek.jwk", "--type", "oct")
    tpm.extend(7)
    tpm.extend(11)
    ok("encfs", "seal", "kek.jwk", "-o", "kek.tpm", "--tpm2-pcrs", "sha256:7,11")
    return tmp_path


def plain(path: str = "kek.jwk") -> tuple[bytes, str | None]:
    key = load_decryption_key(path)
    assert isinstance(key, SymmetricKey)
    return bytes(key.secret), key.kid


def opened(path: str = "kek.tpm") -> tuple[bytes, str | None]:
    key = fetched_key(f"tpm2:{path}")
    return bytes(key.secret), key.kid


def test_an_artifact_is_read_with_a_sealed_key(place: Path, tpm: SoftwareTpm) -> None:
    make_small_tree(place / "src")
    ok("imagetool", "encrypt", "src", "oci:store:v1", "-r", "kek.jwk")
    Path("kek.jwk").unlink()
    words = ("encfs", "cat", "oci:store:v1", "small.txt", "-k", "tpm2:kek.tpm", "--allow-unsigned")
    assert ok(*words) == (place / "src" / "small.txt").read_text()
    tpm.restart()  # PCRs are all zeros again, as on a machine that booted something else
    assert "PCRs 7, 11 (sha256) differ from those at sealing" in refused(KeyRefusedError, *words)
    tpm.extend(7)
    tpm.extend(11)
    assert ok(*words) == (place / "src" / "small.txt").read_text()
    assert tpm.transient() == ""


@pytest.mark.fuse
def test_an_artifact_is_mounted_with_a_sealed_key(
    place: Path, tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "run").mkdir(mode=0o700)
    monkeypatch.setenv("ENCFS_RUNTIME_DIR", str(place / "run"))
    make_small_tree(place / "src")
    (place / "mnt").mkdir()
    ok("imagetool", "encrypt", "src", "oci:store:v1", "-r", "kek.jwk")
    words = ("encfs", "mount", "oci:store:v1", "mnt", "-k", "tpm2:kek.tpm", "--allow-unsigned")
    program("encfs", *words[1:])
    try:
        assert (place / "mnt" / "small.txt").read_bytes() == (place / "src" / "small.txt").read_bytes()
    finally:
        program("encfs", "umount", "mnt")
    tpm.extend(11)
    assert "PCR 11 (sha256) differ" in refused(KeyRefusedError, *words)
    assert not os.path.ismount(place / "mnt")


def program(name: str, *words: str) -> None:
    """In a process of its own: `mount` forks a daemon."""
    import subprocess
    import sys

    code = f"from {name}.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_unseal_gives_the_key_with_its_id(place: Path) -> None:
    ok("encfs", "unseal", "kek.tpm", "-o", "again.jwk")
    assert plain("again.jwk") == plain() == opened()
    assert stat.S_IMODE(Path("again.jwk").stat().st_mode) == 0o600
    assert json.loads(ok("encfs", "unseal", "kek.tpm")) == json.loads(Path("kek.jwk").read_text())
    assert "again.jwk exists" in refused(ConflictError, "encfs", "unseal", "kek.tpm", "-o", "again.jwk")
    assert "give -o FILE" in run("encfs", "unseal", "kek.tpm", "--json")[2]


def test_a_key_without_an_id_stays_without(place: Path) -> None:
    members = json.loads(Path("kek.jwk").read_text())
    del members["kid"]
    Path("bare.jwk").write_text(json.dumps(members))
    Path("bare.jwk").chmod(0o600)
    ok("encfs", "seal", "bare.jwk", "-o", "bare.tpm", "--tpm2-pcrs", "sha256:7")
    assert opened("bare.tpm") == (plain()[0], None)


@pytest.mark.parametrize(("size", "fits"), [(96, True), (97, False)])
def test_the_longest_key_id(place: Path, size: int, fits: bool) -> None:
    members = json.loads(Path("kek.jwk").read_text()) | {"kid": "k" * size}
    Path("long.jwk").write_text(json.dumps(members))
    Path("long.jwk").chmod(0o600)
    words = ("encfs", "seal", "long.jwk", "-o", "long.tpm", "--tpm2-pcrs", "sha256:7")
    if fits:
        ok(*words)
        assert opened("long.tpm")[1] == "k" * size
    else:
        assert "the key id is longer than the 96 bytes" in refused(KeyFileError, *words)
        assert not Path("long.tpm").exists()


def test_json_and_what_the_file_shows(place: Path) -> None:
    sealed = json.loads(ok("encfs", "seal", "kek.jwk", "-o", "b.tpm", "--tpm2-pcrs", "sha256:7", "--json"))
    assert_as_documented("encfs seal", sealed)
    assert_as_documented("encfs unseal", json.loads(ok("encfs", "unseal", "b.tpm", "-o", "b.jwk", "--json")))
    text = Path("b.tpm").read_text()
    secret, _ = plain()
    assert base64.b64encode(secret).decode() not in text
    assert secret.hex() not in text


def test_a_sealed_key_is_sealed_again_to_other_values(place: Path, tpm: SoftwareTpm) -> None:
    """For an update that is known beforehand: the values after it are given, and the key is not seen meanwhile."""
    before = load_object("kek.tpm").policy
    assert before is not None
    assert before.pcrs is not None
    tpm.extend(11)
    shown = tpm.tool("pcrread", "sha256:11").stdout.decode().split("0x")[1].strip().lower()
    tpm.restart()
    tpm.extend(7)
    tpm.extend(11)
    ok("encfs", "seal", "tpm2:kek.tpm", "-o", "next.tpm", "--tpm2-pcrs", f"sha256:7,11={shown}")
    assert "PCR 11 (sha256) differ" in refused(KeyRefusedError, "encfs", "unseal", "next.tpm")
    tpm.extend(11)
    assert opened("next.tpm") == plain()


def test_pcrs_that_prove_nothing_are_warned_of(place: Path) -> None:
    _, _, err = run("encfs", "seal", "kek.jwk", "-o", "weak.tpm", "--tpm2-pcrs", "sha256:9,16")
    assert "PCR 9 is all zeros" in err
    assert "any program can reset PCR 16" in err


# -- refusals


@pytest.mark.parametrize(("extended", "named"), [((7,), "PCR 7"), ((11,), "PCR 11"), ((7, 11), "PCRs 7, 11")])
def test_other_pcrs_are_named(place: Path, tpm: SoftwareTpm, extended: tuple[int, ...], named: str) -> None:
    for index in extended:
        tpm.extend(index)
    assert f"{named} (sha256) differ from those at sealing" in refused(KeyRefusedError, "encfs", "unseal", "kek.tpm")
    assert tpm.transient() == ""


def test_pcrs_that_are_not_sealed_to_do_not_matter(place: Path, tpm: SoftwareTpm) -> None:
    tpm.extend(8)
    assert opened() == plain()


@pytest.fixture
def other() -> Iterator[SoftwareTpm]:
    yield from software_tpm()


def test_another_tpm(place: Path, other: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in (7, 11):
        other.extend(index)
    monkeypatch.setenv("TPM2TOOLS_TCTI", other.tcti)
    assert "not the TPM that the file was made with" in refused(KeyRefusedError, "encfs", "unseal", "kek.tpm")
    # Nor where the file says that it was made with this one.
    ok("encfs", "seal", "kek.jwk", "-o", "here.tpm", "--tpm2-pcrs", "sha256:7,11")
    members = json.loads(Path("kek.tpm").read_text())
    members["srk"] = json.loads(Path("here.tpm").read_text())["srk"]
    Path("kek.tpm").write_text(json.dumps(members))
    line = refused(KeyProviderError, "encfs", "unseal", "kek.tpm")
    assert "the file was altered, or is of another TPM" in line


def test_a_tpm_that_was_cleared(place: Path, tpm: SoftwareTpm) -> None:
    tpm.tool("clear", "-c", "p")
    assert "or it was cleared since" in refused(KeyRefusedError, "encfs", "unseal", "kek.tpm")


@pytest.mark.parametrize("words", [("unseal", "kek.tpm"), ("seal", "kek.jwk", "-o", "x", "--tpm2-pcrs", "sha256:7")])
def test_no_tpm(place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", "device:/dev/no-such-tpm")
    line = refused(KeyProviderError, "encfs", *words)
    assert "there is no TPM to use: /dev/no-such-tpm does not exist" in line
    monkeypatch.setenv("TPM2TOOLS_TCTI", f"swtpm:path={place}/nobody")
    assert "does not answer" in refused(KeyProviderError, "encfs", *words)
    assert not Path("x").exists()


def test_a_locked_out_tpm(tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage root key that somebody made without noDA cannot be used during a lockout; ours can."""
    monkeypatch.chdir(tmp_path)
    ok("imagetool", "keygen", "-o", "kek.jwk", "--type", "oct")
    seal = ("encfs", "seal", "kek.jwk", "--tpm2-pcrs", "sha256:7", "-o")
    ok(*seal, "ours.tpm")
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"
    root = str(tmp_path / "root.ctx")
    words = ("-C", "o", "-g", "sha256", "-G", "ecc256:null:aes128cfb", "-a", attributes, "-c", root)
    tpm.tool("createprimary", *words)
    tpm.tool("evictcontrol", "-C", "o", "-c", root, "0x81000001")
    ok(*seal, "theirs.tpm")
    assert json.loads(Path("theirs.tpm").read_text())["srk"]["handle"] == "0x81000001"
    assert opened("theirs.tpm") == plain()
    lock_out(tpm, tmp_path)
    line = refused(KeyProviderError, "encfs", "unseal", "theirs.tpm")
    assert "locked out after too many wrong passwords" in line
    assert "tpm2_dictionarylockout" in line
    assert opened("ours.tpm") == plain()


def lock_out(tpm: SoftwareTpm, place: Path) -> None:
    tpm.tool("dictionarylockout", "-s", "-n", "1", "-t", "1000", "-l", "1000")
    parent, child = str(place / "p.ctx"), str(place / "c.ctx")
    tpm.tool("createprimary", "-C", "o", "-c", parent)
    attributes = "fixedtpm|fixedparent|userwithauth"
    (place / "data").write_bytes(b"data")
    words = ("-i", str(place / "data"), "-p", "right", "-a", attributes, "-c", child)
    tpm.tool("create", "-C", parent, *words)
    for _ in range(2):
        tpm.tool("unseal", "-c", child, "-p", "wrong", check=False)
    shown = tpm.tool("getcap", "properties-variable").stdout.decode()
    assert "inLockout: 1" in " ".join(shown.split())


def flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(data).decode()


def cut(text: str) -> str:
    return base64.b64encode(base64.b64decode(text)[:-1]).decode()


def longer(text: str) -> str:
    return base64.b64encode(base64.b64decode(text) + bytes(1500)).decode()


def last_flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[-1] ^= 1
    return base64.b64encode(data).decode()


def long_unique(text: str) -> str:
    data = base64.b64decode(text)
    return base64.b64encode(data[:-34] + b"\x01\x00" + bytes(256)).decode()


ALTERED: list[tuple[str, Callable[[Any], Any], type[EncfsError], str]] = [
    ("format", lambda _: "encfs-tpm2/2", KeyFileError, "its format is"),
    ("kind", lambda _: "key", KeyFileError, "or the key is of another kind"),
    ("kind", lambda _: "ak", KeyFileError, "has no policy, or one too many"),
    ("kind", lambda _: "other", KeyFileError, "its kind is"),
    ("srk.name", lambda text: text[:-1] + ("0" if text[-1] != "0" else "1"), KeyRefusedError, "not the TPM"),
    ("srk.name", lambda text: text[:-2], KeyFileError, "the name of srk is 33 bytes"),
    ("srk.handle", lambda _: "0x01000001", KeyFileError, "the handle of srk is malformed"),
    ("public", flipped, KeyFileError, "the policy is not that of the sealed object"),
    ("public", last_flipped, KeyProviderError, "altered, or is of another TPM"),
    ("public", cut, KeyFileError, "truncated"),
    ("public", longer, KeyFileError, "something behind it"),
    ("public", long_unique, KeyFileError, "unique about the sealed object is 256 bytes long"),
    ("private", flipped, KeyProviderError, "altered, or is of another TPM"),
    ("private", last_flipped, KeyProviderError, "altered, or is of another TPM"),
    ("private", cut, KeyProviderError, "altered, or is of another TPM"),
    ("private", longer, KeyFileError, "private is 16"),
    ("private", lambda _: "AAAA", KeyProviderError, "altered, or is of another TPM"),
    ("policy", lambda _: None, KeyFileError, "has no policy, or one too many"),
    ("policy.pcrs", lambda _: None, KeyFileError, "nothing says when"),
    ("policy.pcrs.bank", lambda _: "sha384", KeyFileError, "PCR 7 is 32 bytes long"),
    ("policy.pcrs.bank", lambda _: "sha1", KeyFileError, "the PCR bank is unknown"),
    ("policy.pcrs.values.7", lambda _: "00" * 32, KeyFileError, "the policy is not that of the sealed object"),
    ("policy.pcrs.values", lambda old: {"7": old["7"]}, KeyFileError, "the policy is not that"),
    ("policy.counter", lambda _: {"index": "0x01800100", "name": "00" * 34, "value": 1}, KeyFileError, "not that of"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), ALTERED)
def test_altered_files(
    place: Path, tpm: SoftwareTpm, name: str, change: Callable[[Any], Any], kind: type[EncfsError], message: str
) -> None:
    members = json.loads(Path("kek.tpm").read_text())
    *parents, last = name.split(".")
    inner = members
    for parent in parents:
        inner = inner[parent]
    inner[last] = change(inner[last])
    Path("kek.tpm").write_text(json.dumps(members))
    assert message in refused(kind, "encfs", "unseal", "kek.tpm")
    assert tpm.transient() == ""


def test_a_policy_exchanged_with_its_digest(place: Path, tpm: SoftwareTpm) -> None:
    """Who writes values that hold now, and the public area that fits them, does not get what was sealed to others."""
    tpm.extend(11)
    ok("imagetool", "keygen", "-o", "mine.jwk", "--type", "oct")
    ok("encfs", "seal", "mine.jwk", "-o", "mine.tpm", "--tpm2-pcrs", "sha256:7,11")
    theirs, mine = (json.loads(Path(name).read_text()) for name in ("kek.tpm", "mine.tpm"))
    Path("mixed.tpm").write_text(json.dumps(mine | {"private": theirs["private"]}))
    assert "altered, or is of another TPM" in refused(KeyProviderError, "encfs", "unseal", "mixed.tpm")


def test_a_handle_is_only_where_to_look_first(place: Path) -> None:
    members = json.loads(Path("kek.tpm").read_text())
    members["srk"]["handle"] = "0x81000001"
    Path("kek.tpm").write_text(json.dumps(members))
    assert opened() == plain()


def test_other_files_and_keys(place: Path) -> None:
    assert "no TPM key file" in refused(KeyFileError, "encfs", "unseal", "kek.jwk")
    refused(NotFoundError, "encfs", "unseal", "nothing.tpm")
    ok("imagetool", "keygen", "-o", "alice.jwk")
    seal = ("encfs", "seal", "alice.jwk", "-o", "x", "--tpm2-pcrs")
    assert "a symmetric one is needed" in refused(KeyFileError, *seal, "sha256:7")
    assert "names no PCRs" in refused(UsageError, *seal, "7")
    assert "is not supported" in refused(UsageError, *seal, "sha1:7")
    assert "is no PCR" in refused(UsageError, *seal, "sha256:24")
    assert "exists" in refused(ConflictError, "encfs", "seal", "kek.jwk", "-o", "kek.tpm", "--tpm2-pcrs", "sha256:7")
    assert "hands no symmetric key out" in refused(KeyFileError, "encfs", "seal", "passphrase:", *seal[3:], "sha256:7")
    assert not Path("x").exists()


def test_refusals_that_came_with_a_key_are_not_sealed_away(place: Path, hub: Hub) -> None:
    secret = base64.b64encode(plain()[0]).decode()
    hub.resources["default/key/bound"] = json.dumps({"key": secret, "min_version": 4}).encode()
    hub.resources["default/key/bare"] = json.dumps({"key": secret}).encode()
    uri = "cdh:default/key/{}?port=" + str(urlsplit(hub.url).port)
    words = ("-o", "hub.tpm", "--tpm2-pcrs", "sha256:7")
    assert "came with refusals" in refused(KeyFileError, "encfs", "seal", uri.format("bound"), *words)
    assert not Path("hub.tpm").exists()
    ok("encfs", "seal", uri.format("bare"), *words)
    assert opened("hub.tpm") == (plain()[0], "kbs:///default/key/bare")


def test_a_sealed_key_that_is_not_the_artifact_s(place: Path) -> None:
    make_small_tree(place / "src")
    ok("imagetool", "keygen", "-o", "right.jwk", "--type", "oct")
    ok("imagetool", "encrypt", "src", "oci:store:v1", "-r", "right.jwk")
    words = ("encfs", "ls", "oci:store:v1", "-k", "tpm2:kek.tpm", "--allow-unsigned")
    assert "opens none of the oct recipients" in refused(WrongKeyError, *words)
