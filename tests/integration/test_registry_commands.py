"""Commands on docker:// references, against a real distribution server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import IntegrityError, NotFoundError, TransportError, UnsignedError, UsageError
from tests.support.documented import assert_as_documented
from tests.support.registry import DockerRegistry, Fault, FaultProxy, Server
from tests.support.remote import needs_registries, running, started

pytestmark = needs_registries

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("registry"), delete=True) as server:
        yield server


@pytest.fixture(scope="module", params=["docker-registry", "ociserver"])
def any_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(request.param, tmp_path_factory.mktemp("any")) as server:
        yield server


def command(program: str, *words: str) -> list[str]:
    return [sys.executable, "-c", f"from {program}.cli import main; main()", *words]


def run(place: Path, program: str, *words: str, code: int = 0) -> str:
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "TMPDIR": str(place)}
    done = subprocess.run(
        command(program, *words),
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def answer(place: Path, *words: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(place, "imagetool", *words, "--json"))
    return document


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, a model of 40 MiB in segments of 8 MiB, and `oci:store:v1`, its encryption."""
    place = tmp_path_factory.mktemp("owner")
    (place / "model").mkdir()
    (place / "model/weights").write_bytes(os.urandom(40 * MIB))
    (place / "model/config.json").write_text("{}\n")
    run(place, "imagetool", "keygen", "-o", "alice.jwk")
    run(place, "imagetool", "keygen", "-o", "bob.jwk")
    for name in ("owner", "auditor"):
        run(place, "imagetool", "keygen", "-o", f"{name}.jwk", "--type", "ed25519")
    encrypt(place, "oci:store:v1")
    return place


def encrypt(place: Path, reference: str, *words: str) -> dict[str, Any]:
    signed = ["--sign", "owner.jwk", "--id", "acme/chat", "--artifact-version", "1", "--segment-size", "8MiB"]
    return answer(place, "encrypt", "model", reference, "-r", "alice.jwk.pub", *signed, *words)


TRUST = ["--trust", "owner.jwk.pub", "--id", "acme/chat", "--min-version", "0"]
OPEN = ["-k", "alice.jwk", *TRUST]
PLAIN = "--plain-http"


def test_copies_in_all_directions_keep_the_digest(place: Path, any_server: Server, tmp_path: Path) -> None:
    server = any_server
    with closing(FaultProxy(server.host)) as proxy:
        copies_in_all_directions(place, server, proxy, tmp_path)


def copies_in_all_directions(place: Path, server: Server, proxy: FaultProxy, layouts: Path) -> None:
    first, second = f"docker://{server.host}/dirs/a:v1", f"docker://{server.host}/dirs/b:v1"
    pushed = answer(place, "push", "oci:store:v1", first, PLAIN)
    digest = pushed["manifest_digest"]
    assert pushed["blobs_present"] == 0
    assert pushed["size_copied"] > 40 * MIB
    again = answer(place, "copy", "oci:store:v1", first, PLAIN)
    assert (again["blobs_copied"], again["blobs_present"]) == (0, pushed["blobs_copied"])
    # Mounted from the repository beside it: no body is sent.
    mounted = f"docker://{proxy.host}/dirs/mounted:v1"
    answer(place, "copy", f"docker://{proxy.host}/dirs/a@{digest}", mounted, PLAIN)
    assert not proxy.requests("^PATCH ")
    assert len(proxy.requests("^POST .*mount=sha256")) == pushed["blobs_copied"]
    assert answer(place, "copy", first, second, PLAIN)["manifest_digest"] == digest
    pulled = answer(place, "pull", second, f"oci:{layouts}/pulled:v1", PLAIN)
    assert pulled["manifest_digest"] == digest
    assert answer(place, "copy", f"oci:{layouts}/pulled:v1", f"oci:{layouts}/again:v1")["manifest_digest"] == digest
    assert run(place, "imagetool", "verify", f"oci:{layouts}/again:v1", *TRUST)


def test_encrypt_straight_to_the_registry_and_read_it(place: Path, any_server: Server, tmp_path: Path) -> None:
    reference = f"docker://{any_server.host}/straight:v1"
    made = encrypt(place, reference, PLAIN)
    inspected = answer(place, "inspect", reference, PLAIN)
    assert inspected["content_digest"] == made["content_digest"]
    assert len(inspected["volumes"][0]["segments"]) > 3
    assert answer(place, "verify", reference, PLAIN, *OPEN)["decrypted"] is True
    for program in ("encfs", "imagetool"):
        assert "weights" in run(place, program, "ls", reference, PLAIN, *OPEN)
    assert run(place, "encfs", "cat", reference, "config.json", PLAIN, *OPEN) == "{}\n"
    run(place, "encfs", "extract", reference, str(tmp_path / "out"), PLAIN, *OPEN)
    assert (tmp_path / "out/weights").read_bytes() == (place / "model/weights").read_bytes()
    assert not [item for item in place.iterdir() if item.name.startswith(".encfs")], "nothing stays in the spool"


def test_mounted_from_the_registry(place: Path, server: DockerRegistry) -> None:
    reference = f"docker://{server.host}/mounting:v1"
    run(place, "imagetool", "push", "oci:store:v1", reference, PLAIN)
    (place / "mnt").mkdir()
    run(place, "encfs", "mount", reference, "mnt", PLAIN, *OPEN)
    try:
        with open(place / "mnt/weights", "rb") as mounted, open(place / "model/weights", "rb") as original:
            for position in (0, 17 * MIB + 5, 39 * MIB):
                mounted.seek(position)
                original.seek(position)
                assert mounted.read(10_000) == original.read(10_000)
    finally:
        run(place, "encfs", "umount", "mnt")


def test_lines_of_the_readme(place: Path, server: DockerRegistry) -> None:
    """Word for word but for the host, its lack of TLS, and names that are taken."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.split("\n## Registries\n")[1].split("\n## ")[0]
    lines = [line.split() for line in section.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    (place / "readme").mkdir()
    for program, *words in lines:
        words = [word.replace("HOST", f"{server.host}/readme") for word in words]
        run(place, program, *(str(place / "readme") if word == "mnt" else word for word in words), PLAIN)
    try:
        assert (place / "readme/config.json").read_text() == "{}\n"
    finally:
        run(place, "encfs", "umount", "readme")


def test_pulled_into_the_cache_it_is_read_without_the_registry(place: Path, tmp_path: Path) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    with running(tmp_path / "registry") as server:
        reference = f"docker://{server.host}/cached:v1"
        run(place, "imagetool", "push", "oci:store:v1", reference, PLAIN)
        pulled = answer(place, "pull", reference, PLAIN, *cache)
        assert_as_documented("imagetool pull", pulled)
        assert pulled["size_fetched"] == pulled["size"] > 40 * MIB
        assert answer(place, "pull", reference, PLAIN, *cache)["size_fetched"] == 0
    few = ["--io-timeout", "0.5"]
    (place / "offline").mkdir()
    run(place, "encfs", "mount", reference, "offline", PLAIN, *OPEN, *cache, *few)
    try:
        assert (place / "offline/weights").read_bytes() == (place / "model/weights").read_bytes()
    finally:
        run(place, "encfs", "umount", "offline")
    # Who keeps no cache has nothing.
    run(place, "encfs", "cat", reference, "config.json", PLAIN, *OPEN, *few, "--cache-size", "0", code=50)


def test_changes_in_the_registry_want_trust(place: Path, any_server: Server) -> None:
    reference = f"docker://{any_server.host}/changes:v1"
    run(place, "imagetool", "push", "oci:store:v1", reference, PLAIN)
    refused = UnsignedError.exit_code
    run(place, "imagetool", "sign", reference, PLAIN, "--key", "auditor.jwk", code=refused)
    run(place, "imagetool", "recipients", "add", reference, PLAIN, "-r", "bob.jwk.pub", "-k", "alice.jwk", code=refused)
    answer(place, "sign", reference, PLAIN, "--key", "auditor.jwk", *TRUST)
    moved = answer(place, "recipients", "add", reference, PLAIN, "-r", "bob.jwk.pub", *OPEN)
    assert moved["tag"] == "v1"
    assert len(answer(place, "recipients", "list", reference, PLAIN)["recipients"]) == 2
    auditor = ["--trust", "auditor.jwk.pub", "--id", "acme/chat", "--min-version", "0"]
    assert run(place, "encfs", "cat", reference, "config.json", PLAIN, "-k", "bob.jwk", *auditor) == "{}\n"
    answer(place, "recipients", "remove", reference, "1", PLAIN, *TRUST)
    assert len(answer(place, "recipients", "list", reference, PLAIN)["recipients"]) == 1


@pytest.mark.parametrize("way", ["push", "pull"])
def test_killed_in_the_middle_goes_on(place: Path, server: DockerRegistry, proxy: FaultProxy, way: str) -> None:
    remote, layout = f"docker://{proxy.host}/killed-{way}:v1", "oci:store:v1"
    if way == "pull":
        answer(place, "push", "oci:store:v1", remote.replace(proxy.host, server.host), PLAIN)
        layout = "oci:killed:v1"
    segments = answer(place, "inspect", "oci:store:v1")["volumes"][0]["segments"]
    # After three segments the registry falls silent, and the command is killed. Only segments are sent by PATCH; what
    # is fetched before them are the config, the keyring, a signature and the tree.
    pattern, skip = ("^PATCH ", 3) if way == "push" else ("^GET .*/blobs/", 4 + 3)
    proxy.faults = [Fault(pattern, times=-1, skip=skip, delay=60)]
    words = (layout, remote) if way == "push" else (remote, layout)
    process = subprocess.Popen(
        command("imagetool", way, *words, PLAIN, "--concurrency", "1"), cwd=place, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(proxy.requests(pattern)) <= skip:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    proxy.faults = []
    before = moved(proxy, way)
    done = answer(place, way, *words, PLAIN)
    assert done["blobs_present"] >= 3
    # What crossed the wire: the second time no more than what was missing, and the segment that was cut.
    assert moved(proxy, way) - before <= done["size_copied"] + 8 * MIB
    assert moved(proxy, way) <= sum(item["size"] for item in segments) + 2 * 8 * MIB
    assert done["size_copied"] <= sum(item["size"] for item in segments) - 3 * 8 * MIB + MIB
    run(place, "imagetool", "verify", words[1], *([PLAIN] if way == "push" else []), *TRUST)


def moved(proxy: FaultProxy, way: str) -> int:
    """Bytes of blobs that went through the proxy so far."""
    if way == "pull":
        return sum(item.sent for item in proxy.requests("^GET .*/blobs/"))
    return sum(int(item.headers.get("content-length", 0)) for item in proxy.requests("^(PATCH|PUT) .*/blobs/"))


@pytest.mark.root
def test_encryption_to_a_registry_needs_room_for_three_segments(place: Path, server: DockerRegistry) -> None:
    """40 MiB in segments of 8 MiB, on a disk of 28 MiB."""
    spool = place / "spool"
    spool.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", spool], check=True)
    try:
        environment = {**os.environ, "TMPDIR": str(spool)}
        words = ["-r", "alice.jwk.pub", "--segment-size", "8MiB", PLAIN]
        to = f"docker://{server.host}/spooled:v1"
        encrypting = command("imagetool", "encrypt", "model", to, *words)
        subprocess.run(encrypting, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
        assert not list(spool.iterdir())
    finally:
        subprocess.run(["umount", spool], check=True)
    assert len(answer(place, "inspect", to, PLAIN)["volumes"][0]["segments"]) >= 5


def test_a_mirror_on_the_command_line(place: Path, server: DockerRegistry, proxy: FaultProxy, tmp_path: Path) -> None:
    run(place, "imagetool", "push", "oci:store:v1", f"docker://{server.host}/mirrored:v1", PLAIN)
    remote, mirror = f"docker://{server.host}/mirrored:v1", ["--mirror", f"http://{proxy.host}"]
    assert run(place, "encfs", "cat", remote, "config.json", PLAIN, *OPEN, *mirror, "--cache-size", "0") == "{}\n"
    assert proxy.requests("^GET .*/blobs/")
    # All of its bytes are wrong from here on: nobody is told a wrong one.
    proxy.faults = [Fault("^GET", times=-1, corrupt=0)]
    pulled = answer(place, "pull", remote, f"oci:{tmp_path}/pulled:v1", PLAIN, *mirror)
    assert run(place, "imagetool", "verify", f"oci:{tmp_path}/pulled:v1", *TRUST)
    assert pulled["size_copied"] > 40 * MIB
    refused = run(place, "encfs", "cat", remote, "config.json", *OPEN, "--mirror", "ftp://x", code=UsageError.exit_code)
    assert "is no mirror" in refused
    run(place, "imagetool", "verify", remote, PLAIN, *mirror, code=UsageError.exit_code)


def test_wrong_bytes_are_refused_and_leave_no_tag(place: Path, server: DockerRegistry, proxy: FaultProxy) -> None:
    run(place, "imagetool", "push", "oci:store:v1", f"docker://{server.host}/wrong:v1", PLAIN)
    proxy.faults = [Fault("^GET .*/blobs/", times=-1, corrupt=0)]
    remote = f"docker://{proxy.host}/wrong:v1"
    line = run(place, "imagetool", "pull", remote, "oci:wrong:v1", PLAIN, code=IntegrityError.exit_code)
    assert "than its digest says" in line
    # What a blob has of right bytes may stay, to be gone on with.
    line = run(place, "imagetool", "inspect", "oci:wrong:v1", code=NotFoundError.exit_code)
    assert "no tag" in line or "No such file" in line


def test_what_is_refused(place: Path, server: DockerRegistry) -> None:
    absent = f"docker://{server.host}/absent:v1"
    run(place, "imagetool", "pull", absent, "oci:none:v1", PLAIN, code=NotFoundError.exit_code)
    assert not (place / "none").exists()
    # TLS is never left out by itself.
    assert "--plain-http" in run(place, "imagetool", "inspect", absent, code=TransportError.exit_code)
    for words, message in (
        (["push", absent, "oci:x:v1"], "is not of the form oci:"),
        (["pull", absent, "oci:x:v1", "--cache-dir", "c"], "are for what goes into the cache"),
        (["pull", absent, "--cache-size", "0"], "there is no cache to fetch into"),
        (["pull", "oci:store:v1", "oci:x:v1"], "is not of the form docker:"),
        (["push", "oci:store:v1", f"docker://{server.host}/a@sha256:{'0' * 64}"], "a digest cannot be written to"),
        (["inspect", absent, "--key-file", "alice.jwk"], "--key-file is given without --cert-file"),
        (["inspect", absent, "--concurrency", "0"], "invalid value for '--concurrency'"),
    ):
        assert message in run(place, "imagetool", *words, code=UsageError.exit_code)
