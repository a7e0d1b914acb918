"""The programs as a user runs them: the README's lines, every JSON shape of the documentation, every refusal."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    KeyFileError,
    MissingKeyError,
    MountError,
    NotFoundError,
    NotMountedError,
    PinError,
    RollbackError,
    SourceError,
    StorageError,
    UnsignedError,
    UnsupportedError,
    UsageError,
    WrongIdError,
    WrongKeyError,
    WrongSignerError,
)
from tests.support.artifacts import make_small_tree
from tests.support.documented import assert_as_documented, documented, shape
from tests.support.shell import Shell

ROOT = Path(__file__).parents[2]
TRUST = ["--trust", "owner.jwk.pub", "--id", "acme/chat", "--min-version", "3"]
OPEN = ["-k", "alice.jwk", *TRUST]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """For tests that change nothing."""
    return _prepare(tmp_path_factory.mktemp("shell"))


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """For tests that change something. What they leave mounted at `mnt` is unmounted."""
    prepared = _prepare(tmp_path)
    (tmp_path / "mnt").mkdir()
    yield prepared
    if os.path.ismount(tmp_path / "mnt"):
        prepared.ok("encfs", "umount", "mnt", "--force")


def _prepare(path: Path) -> Shell:
    (path / "run").mkdir(mode=0o700)
    shell = Shell(path)
    make_small_tree(path / "src")
    (path / "src" / "sub" / os.fsdecode(b"odd\xff\x1bname")).write_bytes(b"odd")
    for name, kind in [("alice", "x25519"), ("eve", "x25519"), ("owner", "ed25519"), ("mallory", "ed25519")]:
        shell.ok("imagetool", "keygen", "-o", f"{name}.jwk", "--type", kind)
    signed = ["--sign", "owner.jwk", "--id", "acme/chat", "--artifact-version", "3"]
    shell.ok("imagetool", "encrypt", "src", "oci:store:v3", "-r", "alice.jwk.pub", *signed)
    return shell


def test_json_of_commands_that_read(shared: Shell) -> None:
    assert_as_documented("imagetool inspect", shared.json("imagetool", "inspect", "oci:store:v3"))
    assert_as_documented("imagetool recipients list", shared.json("imagetool", "recipients", "list", "oci:store:v3"))
    assert_as_documented("imagetool verify", shared.json("imagetool", "verify", "oci:store:v3"))
    verified = shared.json("imagetool", "verify", "oci:store:v3", *OPEN)
    assert verified["decrypted"] is True
    assert shape(verified["origin"]) == shape(documented("imagetool decrypt")["origin"])
    listed_providers = shared.json("encfs", "providers")
    assert listed_providers.keys() == documented("encfs providers").keys()
    offered = cast("list[dict[str, object]]", listed_providers["providers"])
    assert {"scheme": "file", "usable": True, "reason": None} in offered
    assert all(set(one) == {"scheme", "usable", "reason"} for one in offered)
    for program in ("imagetool", "encfs"):
        listed = shared.json(program, "ls", "oci:store:v3", "small.txt", *OPEN)
        assert_as_documented("imagetool ls", listed)


def test_json_of_commands_that_write(shell: Shell) -> None:
    assert_as_documented("imagetool keygen", shell.json("imagetool", "keygen", "-o", "bob.jwk"))
    assert shell.json("imagetool", "keygen", "-o", "oct.jwk", "--type", "oct")["public"] is None
    words = ["src", "oci:store:v4", "-r", "alice.jwk.pub", "-r", "oct.jwk"]
    encrypted = shell.json("imagetool", "encrypt", *words)
    assert_as_documented("imagetool encrypt", encrypted)
    pin = ["--pin", str(encrypted["content_digest"])]
    decrypted = shell.json("imagetool", "decrypt", "oci:store:v4", "out", "-k", "alice.jwk", *pin)
    assert_as_documented("imagetool decrypt", decrypted, but=("origin",))
    assert decrypted["origin"] == {"proven": True, "pinned": True, "signer": None}
    extracted = shell.json("encfs", "extract", "oci:store:v3", "out3", *OPEN)
    assert_as_documented("imagetool decrypt", extracted)
    signed = shell.json("imagetool", "sign", "oci:store:v4", "--key", "owner.jwk", *pin)
    assert_as_documented("imagetool sign", signed)
    added = shell.json("imagetool", "recipients", "add", "oci:store:v4", "-r", "bob.jwk.pub", "-k", "oct.jwk", *pin)
    assert_as_documented("imagetool recipients add", added)
    removed = shell.json("imagetool", "recipients", "remove", "oci:store:v4", "bob.jwk.pub", *pin)
    assert_as_documented("imagetool recipients remove", removed)
    copied = shell.json("imagetool", "copy", "oci:store:v4", "oci:mirror:v4")
    assert_as_documented("imagetool copy", copied)
    assert copied["manifest_digest"] == removed["manifest_digest"]


@pytest.mark.fuse
def test_json_of_mounts(shell: Shell) -> None:
    mounted = shell.json("encfs", "mount", "oci:store:v3", "mnt", *OPEN)
    assert_as_documented("encfs mount", mounted)
    listed = shell.json("encfs", "status")["mounts"]
    assert isinstance(listed, list)
    (own,) = [one for one in listed if one["pid"] == mounted["pid"]]
    assert_as_documented("encfs mount", {**own, "warnings": []})
    assert documented("encfs status").keys() == {"mounts", "warnings"}
    assert shape(documented("encfs status")["mounts"]) == [
        {name: value for name, value in shape(documented("encfs mount")).items() if name != "warnings"}  # type: ignore[attr-defined]
    ]
    ended = shell.json("encfs", "umount", "mnt")
    assert_as_documented("encfs umount", ended)
    assert ended["mountpoint"] == mounted["mountpoint"]


@pytest.mark.fuse
def test_the_lines_of_the_readme(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("\n## Ten lines\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    ((?:imagetool|encfs) .*)$", section, re.MULTILINE)
    assert len(lines) == 10
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "mnt").mkdir()
    make_small_tree(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"layers": 12}')
    shell = Shell(tmp_path)
    for line in lines:
        words = shlex.split(line)
        output = shell.ok(*words)
        match words[:2]:
            case ["encfs", "mount"]:
                assert (tmp_path / "mnt" / "config.json").read_text() == '{"layers": 12}'
            case ["encfs", "status"]:
                assert f"{tmp_path}/mnt  serving" in output
            case ["encfs", "umount"]:
                assert not any((tmp_path / "mnt").iterdir())
            case ["encfs", "cat"]:
                assert output == '{"layers": 12}'


def test_targets_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^    make (\w+)", readme, re.MULTILINE) == ["demo", "test"]
    for target in re.findall(r"\bmake (\w+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / link).exists(), link


# Refusals: every one of its own exit code, and a line that says what to do.


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (WrongKeyError, ["-k", "eve.jwk", *TRUST], "eve.jwk opens none of the x25519 recipients"),
        (MissingKeyError, TRUST, "pass -k KEYURI"),
        (UnsignedError, ["-k", "alice.jwk"], "pass --pin sha256:"),
        (UsageError, ["-k", "alice.jwk", "--trust", "owner.jwk.pub"], "add --id NAME"),
        (UsageError, ["-k", "alice.jwk", "--id", "acme/chat"], "add --trust KEY or --pin DIGEST"),
        (WrongSignerError, ["-k", "alice.jwk", "--trust", "mallory.jwk.pub", "--id", "acme/chat"], "trusted key"),
        (WrongIdError, ["-k", "alice.jwk", "--trust", "owner.jwk.pub", "--id", "acme/code"], "check --id"),
        (RollbackError, ["-k", "alice.jwk", *TRUST[:-1], "4"], "fetch the current version"),
        (PinError, ["-k", "alice.jwk", "--pin", "sha256:" + "0" * 64], "not the pinned"),
        (UsageError, ["-k", "alice.jwk", "--pin", "0" * 64], "the pin is not of the form"),
        (NotFoundError, ["-k", "nobody.jwk", *TRUST], "nobody.jwk does not exist"),
        (NotFoundError, ["-k", "alice.jwk", "--trust", "nobody.pub", "--id", "x"], "nobody.pub does not exist"),
        (KeyFileError, ["-k", "alice.jwk.pub", *TRUST], "alice.jwk.pub is a public key"),
        (KeyFileError, ["-k", "src/small.txt", *TRUST], "src/small.txt"),
        (KeyFileError, ["-k", "carrier-pigeon:coo", *TRUST], "unknown key scheme"),
        (KeyFileError, ["-k", "env:NO_SUCH_VARIABLE", *TRUST], "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_a_reader_without_the_right_things(
    shared: Shell, kind: type[EncfsError], words: list[str], message: str
) -> None:
    assert message in shared.refused(kind, "encfs", "ls", "oci:store:v3", *words)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (NotFoundError, ["ls", "oci:store:v9", *OPEN], "name one of its tags: v3"),
        (NotFoundError, ["ls", "oci:nowhere:v3", *OPEN], "give the directory of an OCI layout"),
        (UsageError, ["ls", "store", *OPEN], "write oci:store"),
        (UsageError, ["ls", "https://host/x", *OPEN], "is a URL"),
        (NotFoundError, ["ls", "oci:store:v3", "no/such", *OPEN], "no/such"),
        (NotMountedError, ["umount", "src"], "encfs status lists the mounts"),
        (MountError, ["mount", "oci:store:v3", "nowhere", *OPEN], "create it"),
        (ConflictError, ["extract", "oci:store:v3", "src", *OPEN], "choose a new or an empty directory"),
        (ConflictError, ["extract", "oci:store:v3", "alice.jwk", *OPEN], "choose another target"),
        (NotFoundError, ["extract", "oci:store:v3", "no/where", *OPEN], "create it first"),
    ],
)
def test_a_reader_at_the_wrong_place(shared: Shell, kind: type[EncfsError], words: list[str], message: str) -> None:
    assert message in shared.refused(kind, "encfs", *words)


def test_a_directory_is_no_file(shared: Shell) -> None:
    done = shared.run("encfs", "cat", "oci:store:v3", "sub", *OPEN)
    assert done.returncode == SourceError.exit_code
    assert done.stderr == "encfs: error: sub is a directory, not a regular file\n"
    assert "leave --json out" in shared.refused(UsageError, "encfs", "cat", "oci:store:v3", "small.txt", *OPEN)


def test_a_directory_that_is_no_layout(shared: Shell) -> None:
    done = shared.run("imagetool", "inspect", "oci:src:v3")
    assert done.returncode in (NotFoundError.exit_code, FormatError.exit_code)
    assert "src is no OCI layout" in done.stderr
    assert "neither empty nor an OCI layout" in shared.refused(
        ConflictError, "imagetool", "encrypt", "src", "oci:src:v3", "-r", "alice.jwk.pub"
    )
    assert not (shared.path / "src" / "oci-layout").exists()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (NotFoundError, ["nothing", "oci:new:v1", "-r", "alice.jwk.pub"], "give an existing directory or file"),
        (MissingKeyError, ["src", "oci:new:v1"], "pass -r KEY or --passphrase-file FILE"),
        (NotFoundError, ["src", "oci:new:v1", "-r", "nobody.pub"], "nobody.pub does not exist"),
        (KeyFileError, ["src", "oci:new:v1", "-r", "owner.jwk.pub"], "cannot encrypt"),
        (KeyFileError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--sign", "alice.jwk"], "cannot sign"),
        (KeyFileError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--sign", "owner.jwk.pub"], "public key"),
        (UsageError, ["src", "new", "-r", "alice.jwk.pub"], "write oci:new"),
        (UsageError, ["src", "oci:new@sha256:" + "0" * 64, "-r", "alice.jwk.pub"], "name a tag"),
        (UnsupportedError, ["src", "docker-archive:new", "-r", "alice.jwk.pub"], "use oci:PATH:TAG"),
        (UsageError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--id", "no good"], "the artifact's id"),
        (UsageError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--artifact-version", "-1"], "2^53-1"),
        (UsageError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--segment-size", "1K"], "smaller"),
        (UsageError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "--frame-size", "5000"], "power of two"),
        (ConflictError, ["src", "oci:new:v1", "-r", "alice.jwk.pub", "-r", "alice.jwk.pub"], "given twice"),
    ],
)
def test_an_owner_s_mistakes(shared: Shell, kind: type[EncfsError], words: list[str], message: str) -> None:
    assert message in shared.refused(kind, "imagetool", "encrypt", *words)


def test_files_are_not_overwritten(shared: Shell) -> None:
    before = (shared.path / "alice.jwk").read_bytes()
    assert "keys are not overwritten" in shared.refused(ConflictError, "imagetool", "keygen", "-o", "alice.jwk")
    assert (shared.path / "alice.jwk").read_bytes() == before


def test_an_unsigned_artifact(shell: Shell) -> None:
    done = shell.run("imagetool", "encrypt", "src", "oci:store:raw", "-r", "alice.jwk.pub", "--id", "acme/chat")
    assert done.returncode == 0
    assert "imagetool: not signed: " in done.stderr
    digest = shell.json("imagetool", "inspect", "oci:store:raw")["content_digest"]
    assert "imagetool sign" in shell.refused(UnsignedError, "encfs", "ls", "oci:store:raw", *OPEN)
    warned = shell.run("encfs", "ls", "oci:store:raw", "-k", "alice.jwk", "--allow-unsigned")
    assert warned.returncode == 0
    assert "warning: the artifact's origin is not proven" in warned.stderr
    pinned = shell.run("encfs", "ls", "oci:store:raw", "-k", "alice.jwk", "--pin", str(digest))
    assert (pinned.returncode, pinned.stderr) == (0, "")
    # Signing something is vouching for it: the owner has to say for what.
    words = ["imagetool", "sign", "oci:store:raw", "--key", "owner.jwk"]
    shell.refused(UnsignedError, *words)
    shell.refused(PinError, *words, "--pin", "sha256:" + "1" * 64)
    shell.ok(*words, "--pin", str(digest))
    signed = shell.run(
        "encfs", "ls", "oci:store:raw", "-k", "alice.jwk", "--trust", "owner.jwk.pub", "--id", "acme/chat"
    )
    assert signed.returncode == 0
    assert "warning: no version floor" in signed.stderr


def test_recipients_come_and_go(shell: Shell) -> None:
    shell.ok("imagetool", "keygen", "-o", "bob.jwk", "--type", "p256")
    (shell.path / "word.txt").write_text("correct horse\n")
    (shell.path / "word.txt").chmod(0o600)
    words = ["oci:store:v3", "-k", "alice.jwk", *TRUST]
    shell.refused(
        UnsignedError, "imagetool", "recipients", "add", "oci:store:v3", "-r", "bob.jwk.pub", "-k", "alice.jwk"
    )
    shell.refused(MissingKeyError, "imagetool", "recipients", "add", *words)
    shell.ok("imagetool", "recipients", "add", *words, "-r", "bob.jwk.pub", "--passphrase-file", "word.txt")
    shell.refused(ConflictError, "imagetool", "recipients", "add", *words, "-r", "bob.jwk.pub")
    for key in ("bob.jwk", "passphrase:file=word.txt", "alice.jwk"):
        assert "small.txt" in shell.ok("encfs", "ls", "oci:store:v3", "-k", key, *TRUST)
    assert len(shell.ok("imagetool", "recipients", "list", "oci:store:v3").splitlines()) == 3
    removed = shell.run("imagetool", "recipients", "remove", "oci:store:v3", "1", *TRUST)
    assert removed.returncode == 0
    assert "raise --min-version" in removed.stderr
    shell.refused(WrongKeyError, "encfs", "ls", "oci:store:v3", "-k", "bob.jwk", *TRUST)
    shell.refused(NotFoundError, "imagetool", "recipients", "remove", "oci:store:v3", "bob.jwk.pub", *TRUST)
    shell.ok("imagetool", "recipients", "remove", "oci:store:v3", "1", *TRUST)
    shell.refused(UsageError, "imagetool", "recipients", "remove", "oci:store:v3", "alice.jwk.pub", *TRUST)


def test_a_passphrase_on_standard_input(shell: Shell) -> None:
    words = ["src", "oci:store:p", "--passphrase-file", "-"]
    shell.ok("imagetool", "encrypt", *words, input=b"correct horse\n")
    opened = ["-k", "passphrase:fd=0", "--allow-unsigned"]
    assert "small.txt" in shell.ok("encfs", "ls", "oci:store:p", *opened, input=b"correct horse")
    assert shell.run("encfs", "ls", "oci:store:p", *opened, input=b"wrong").returncode == WrongKeyError.exit_code


def test_a_weak_recipient_beside_a_strong_one(shell: Shell) -> None:
    shell.ok("imagetool", "keygen", "-o", "pq.jwk", "--type", "mlkem768x25519")
    document = shell.json("imagetool", "encrypt", "src", "oci:store:pq", "-r", "pq.jwk.pub", "-r", "alice.jwk.pub")
    assert isinstance(document["warnings"], list)
    assert len(document["warnings"]) == 1
    assert document["warnings"][0].startswith("a post-quantum recipient stands beside one that is not")
    assert shell.json("imagetool", "encrypt", "src", "oci:store:pq", "-r", "pq.jwk.pub")["warnings"] == []


def test_editing_wants_to_know_the_tag(shell: Shell) -> None:
    shell.ok("imagetool", "sign", "oci:store", "--key", "mallory.jwk", *TRUST)
    assert len(shell.json("imagetool", "inspect", "oci:store:v3")["signatures"]) == 2  # type: ignore[arg-type]
    shell.ok("imagetool", "encrypt", "src", "oci:store:v4", "-r", "alice.jwk.pub")
    words = ["--key", "mallory.jwk", *TRUST]
    assert "oci:PATH:TAG" in shell.refused(UsageError, "imagetool", "sign", "oci:store", *words)
    digest = shell.json("imagetool", "inspect", "oci:store:v3")["manifest_digest"]
    report = shell.json("imagetool", "sign", f"oci:store@{digest}", *words)
    assert report["tag"] is None
    result = shell.json("imagetool", "inspect", f"oci:store@{report['manifest_digest']}")
    assert len(result["signatures"]) == 3  # type: ignore[arg-type]
    assert len(shell.json("imagetool", "inspect", "oci:store:v3")["signatures"]) == 2  # type: ignore[arg-type]


def test_listings(shared: Shell) -> None:
    names = shared.ok("encfs", "ls", "oci:store:v3", *OPEN).splitlines()
    assert names == ["block.bin", "empty", "link", "small.txt", "sub"]
    below = shared.ok("encfs", "ls", "oci:store:v3", "sub", *OPEN).splitlines()
    assert below == ["sub/odd.bin", "sub/odd\\xff\\x1bname"], "escaped for the terminal"
    everything = shared.json("encfs", "ls", "oci:store:v3", "-R", *OPEN)["entries"]
    assert isinstance(everything, list)
    assert [one["path"] for one in everything] == [*names, "sub/odd.bin", "sub/odd\ufffd\x1bname"]
    odd = everything[-1]
    assert odd["path_base64"] == "c3ViL29kZP8bbmFtZQ=="
    link = everything[2]
    assert (link["type"], link["target"], link["mode"]) == ("symlink", "sub/odd.bin", "0777")
    long = shared.ok("encfs", "ls", "oci:store:v3", "-l", "link", *OPEN)
    assert long.startswith("lrwxrwxrwx ")
    assert long.endswith(" link -> sub/odd.bin\n")
    assert shared.ok("encfs", "ls", "oci:store:v3", "/sub/./", *OPEN).splitlines() == below


def test_contents(shared: Shell) -> None:
    assert shared.ok("encfs", "cat", "oci:store:v3", "small.txt", *OPEN) == "the quick brown fox\n"
    done = subprocess.run(
        [sys.executable, "-c", "from encfs.cli import main; main()", "cat", "oci:store:v3", "link", *OPEN],
        cwd=shared.path,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == (shared.path / "src" / "sub" / "odd.bin").read_bytes()


def test_a_changed_blob(shell: Shell) -> None:
    blobs = (shell.path / "store" / "blobs" / "sha256").iterdir()
    largest = max(blobs, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert "not what the root commits to" in shell.refused(IntegrityError, "imagetool", "verify", "oci:store:v3")
    shell.refused(IntegrityError, "imagetool", "decrypt", "oci:store:v3", "out", *OPEN)
    assert not (shell.path / "out").exists()
    assert not list(shell.path.glob(".out*"))


def test_a_broken_layout(shell: Shell) -> None:
    (shell.path / "store" / "index.json").write_text("{")
    shell.refused(FormatError, "imagetool", "inspect", "oci:store:v3")


@pytest.mark.root
def test_an_unreadable_source(shell: Shell) -> None:
    secret = shell.path / "src" / "secret"
    secret.write_text("x")
    secret.chmod(0)
    words = ["encrypt", str(shell.path / "src"), f"oci:{shell.path}/mine:v1", "-r", str(shell.path / "alice.jwk.pub")]
    # Root without the capabilities to read everything.
    powerless = [
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-dac_override,-dac_read_search",
    ]
    program = [sys.executable, "-c", "from imagetool.cli import main; main()"]
    done = subprocess.run([*powerless, *program, *words], capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == SourceError.exit_code, done.stderr
    assert "secret: Permission denied; run as a user who may read it, or leave it out with --exclude" in done.stderr
    listed = shell.run("imagetool", "inspect", f"oci:{shell.path}/mine:v1")
    assert listed.returncode == NotFoundError.exit_code
    assert not (shell.path / "mine").exists()


def test_a_full_disk(shell: Shell) -> None:
    """The file size limit of the process stands in for a full disk: the write fails in the same place."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from imagetool.cli import main; main()"
    )
    (shell.path / "big").write_bytes(os.urandom(4 << 20))
    done = subprocess.run(
        [sys.executable, "-c", code, "encrypt", "big", "oci:store:big", "-r", "alice.jwk.pub"],
        cwd=shell.path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == StorageError.exit_code, done.stderr
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    shell.refused(NotFoundError, "imagetool", "inspect", "oci:store:big")
