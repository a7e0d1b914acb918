"""Real brokers and the real client: mounts, restarts, two brokers on one database, kills; what one address may do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from encfs.attestation import amd
from encfs.errors import RollbackError
from imagetool.broker.config import read_config
from imagetool.broker.rollback import check_mark
from tests.support.broker import (
    BIN,
    PATH,
    Answer,
    Handshake,
    Served,
    configure,
    copied,
    imagetool,
    make_broker,
    serving,
    set_policy,
    unwrapped,
)
from tests.support.postgres import Postgres, running_postgres
from tests.support.registry import reserved_port
from tests.support.snpchip import MEASUREMENT, SnpChip, trust_authority
from tests.support.tpm import SoftwareTpm, tpm
from tests.support.waiting import wait_until

__all__ = ["tpm"]

DIGEST = "sha256:" + "5a" * 32


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return request.getfixturevalue("postgres").database() if kind == "postgresql" else kind


@pytest.mark.fuse
def test_owner_and_consumer(tmp_path: Path, database: str) -> None:
    """Encrypt, put the key in, mount, read; a new version is released, and the old one is refused."""
    directory = make_broker(tmp_path / "b", "--database", database)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "file").write_text("plaintext")
    (tmp_path / "mnt").mkdir()
    imagetool("keygen", "-o", tmp_path / "owner.jwk", "--type", "ed25519")
    into = ("--broker", directory, "--resource", PATH)
    trust = ("--trust", "owner.jwk.pub", "--id", "acme/chat")
    made = imagetool("release", "src", "oci:store:v1", *into, "--sign", "owner.jwk", "--id", "acme/chat", cwd=tmp_path)
    assert (made["version"], made["floor_before"], made["refused"]) == (1, None, [])
    with serving(directory) as broker:

        def encfs(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [BIN / "encfs", *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
            )

        mounted = encfs("mount", "oci:store:v1", "mnt", "-k", broker.uri(), *trust)
        assert mounted.returncode == 0, mounted.stderr
        assert (tmp_path / "mnt" / "file").read_text() == "plaintext"
        assert encfs("umount", "mnt").returncode == 0

        imagetool(
            "encrypt", "src", "oci:store:v2", "-r", "kek.jwk", "--sign", "owner.jwk", "--id", "acme/chat",
            "--artifact-version", "2", cwd=tmp_path,
        )  # fmt: skip
        untrusted = imagetool("release", "oci:store:v2", *into, code=30, cwd=tmp_path)
        assert untrusted["error"]["type"] == "UnsignedError"
        released = imagetool("release", "oci:store:v2", *into, *trust, cwd=tmp_path)
        assert (released["version"], released["floor_before"]) == (2, 1)
        assert [(one["version"], one["consumer"]) for one in released["refused"]] == [(1, "address 127.0.0.1")]

        refused = encfs("cat", "oci:store:v1", "file", "-k", broker.uri(), *trust)
        assert (refused.returncode, refused.stdout) == (24, "")
        assert "does not allow it (floor)" in refused.stderr
        assert encfs("cat", "oci:store:v2", "file", "-k", broker.uri(), *trust).stdout == "plaintext"
        # Nobody goes back, the owner neither; in an archive it is the same artifact.
        imagetool("copy", "oci:store:v1", "oci-archive:v1.tar", cwd=tmp_path)
        back = imagetool("release", "oci-archive:v1.tar", *into, *trust, code=33, cwd=tmp_path)
        assert "below the floor 2" in back["error"]["message"]
    log = imagetool("broker", "releases", directory, "--path", PATH)["entries"]
    assert [one["event"] for one in log][-3:] == ["floor-raised", "refused", "released"]
    assert log[-2]["reasons"][0]["code"] == "floor"


def test_an_artifact_of_another_key_is_not_released(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    (tmp_path / "file").write_text("x")
    imagetool("keygen", "-o", tmp_path / "other.jwk")
    imagetool("encrypt", tmp_path / "file", f"oci:{tmp_path}/s:v1", "-r", tmp_path / "other.jwk.pub", "--id", "a")
    words = ("release", f"oci:{tmp_path}/s:v1", "--broker", directory, "--resource", PATH, "--allow-unsigned")
    assert "does not open" in imagetool(*words, code=22)["error"]["message"]
    assert imagetool("broker", "key", "list", directory)["keys"][0]["min_version"] is None


def test_a_restart_in_the_middle_of_a_handshake(tmp_path: Path, database: str) -> None:
    directory = make_broker(tmp_path / "b", "--database", database)
    address = f"127.0.0.1:{reserved_port()}"
    with serving(directory, listen=address) as first:
        begun, attested = Handshake(first.url, first.ca).begin(), Handshake(first.url, first.ca).attested()
        first.kill()
    with serving(directory, listen=address) as second:
        assert begun.attest().status == 200
        assert begun.opened(begun.resource()) == attested.opened(attested.resource())
        assert unwrapped(second.uri(), directory)
    assert imagetool("broker", "releases", directory, "--verify")["entries"] >= 3


def test_two_brokers_and_one_dies(tmp_path: Path, postgres: Postgres) -> None:
    """Handshakes that hop between brokers; then one is killed under load: every client gets its key, one chain."""
    directory = make_broker(tmp_path / "b", "--database", postgres.database())
    configure(directory, rate=5000, burst=10000)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    with serving(directory) as one, serving(other) as two:
        hopping = Handshake(one.url, one.ca).begin()
        hopping.url = two.url
        assert hopping.attest().status == 200
        hopping.url = one.url
        assert hopping.resource().status == 200
        # A nonce is used once over both.
        shared = Handshake(one.url, one.ca).begin()
        message = shared.message()
        statuses = []
        for url in (one.url, two.url):
            shared.url = url
            statuses.append(shared.attest(message).status)
        assert statuses == [200, 401]

        done = threading.Semaphore(0)

        def client(number: int) -> bool:
            urls = [one, two] if number % 2 else [two, one]
            opened = unwrapped(urls[0].uri(more=f"&url={urls[1].url}"), directory)
            done.release()
            return opened

        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(client, number) for number in range(48)]
            for _ in range(8):
                done.acquire()
            two.kill()
            assert all(task.result() for task in running)
        # A change by the owner reaches the one that is left.
        set_policy(directory, "")
        assert Handshake(one.url, one.ca).begin().attest().status == 401
    assert imagetool("broker", "releases", directory, "--verify")["entries"] >= 50


def _runs(pid: int) -> bool:
    """Not so for one that ended and that nobody has asked about yet: it has no command line any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        wait_until(lambda: len(broker.workers()) == 2)
        before = broker.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(broker.workers()) - set(before)) == 2)
        assert unwrapped(broker.uri(), directory)
        workers = broker.workers()
        # And where the process dies that holds them, none stays behind.
        broker.process.kill()
        broker.process.wait(60)
        wait_until(lambda: not any(_runs(pid) for pid in workers))


def test_what_is_left_of_a_killed_broker_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its processes counted is in files: those of brokers that are gone are removed, and no others."""
    directory = make_broker(tmp_path / "b")

    monkeypatch.setenv("ENCFS_RUNTIME_DIR", str(tmp_path / "run"))

    def left() -> set[Path]:
        return set((tmp_path / "run" / "broker").iterdir())

    with serving(directory) as killed:
        wait_until(lambda: len(killed.workers()) == 2)
        (first,) = left()
        assert [one.stat().st_mode & 0o777 for one in (first.parent, first)] == [0o700, 0o700]
        workers = killed.workers()
        killed.kill()
        wait_until(lambda: not any(_runs(pid) for pid in workers))
    assert left() == {first}
    with serving(directory) as one:
        wait_until(lambda: len(one.workers()) == 2)
        (second,) = left()
        assert second != first
        with serving(directory):
            assert second in left()
            assert len(left()) == 2
        assert left() == {second}
        # What it counts is still there.
        client = Handshake(one.url, one.ca)
        wait_until(lambda: b'step="metrics"' in client.request("GET", "/metrics").body)
    assert left() == set()


def test_a_crowd_is_told_to_wait(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    configure(directory, max_sessions=10)
    with serving(directory) as broker:
        late = Handshake(broker.url, broker.ca).begin()
        for number in range(10):
            Handshake(broker.url, broker.ca, source=f"127.0.1.{number + 1}").attested()
        wait_until(lambda: Handshake(broker.url, broker.ca).auth().kind == "TooManyRequests")
        wait_until(lambda: late.attest({}).kind == "TooManyRequests")


def test_one_address_does_not_keep_others_out(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    configure(directory, max_sessions=80, burst=60)
    with serving(directory) as broker:
        attested = [Handshake(broker.url, broker.ca).begin().attest().status for _ in range(30)]
        # A quarter of the sessions, half of it in either worker.
        assert 10 <= attested.count(200) <= 21
        assert set(attested) == {200, 429}
        address = urlsplit(broker.url)
        context = ssl.create_default_context(cafile=str(broker.ca))
        connections = []
        for _ in range(160):
            raw = socket.create_connection(("127.0.0.1", address.port), timeout=60)
            connections.append(context.wrap_socket(raw, server_hostname="127.0.0.1"))
        wait_until(lambda: sum(map(_is_closed, connections)) >= 40)
        assert Handshake(broker.url, broker.ca, source="127.0.0.2").attested().resource().status == 200
        for connection in connections:
            connection.close()


def _is_closed(connection: ssl.SSLSocket) -> bool:
    """By the other side: what else it may have sent (tickets of TLS) is passed over."""
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except ssl.SSLWantReadError:
        return False
    except OSError:
        return True


def test_large_messages_of_one_address(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    config = directory / "broker.toml"
    config.write_text(config.read_text().replace("rate = 50", "rate = 1").replace("burst = 200", "burst = 120"))
    with serving(directory) as broker:
        crowd = Handshake(broker.url, broker.ca).begin()
        assert crowd.request("POST", "/kbs/v0/auth", b"{" * (17 << 10)).status == 413
        large = b'{"a":[' + b",".join([b"{}"] * 60_000) + b"]}"
        statuses = {crowd.request("POST", "/kbs/v0/attest", large).status for _ in range(100)}
        assert statuses == {400, 429}
        assert Handshake(broker.url, broker.ca, source="127.0.0.2").attested().resource().status == 200


@pytest.mark.parametrize("start", [b"2\r\n{}\r\n0\r\n", b""], ids=["trailers", "chunks"])
def test_a_request_without_end(tmp_path: Path, start: bytes) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory, "--plain-http") as broker:
        raw = socket.create_connection(("127.0.0.1", urlsplit(broker.url).port), timeout=60)
        raw.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + start)
        piece = b"X-Y: " + b"z" * 16379 if start else b"1\r\nx\r\n" * 2000
        with raw, pytest.raises(OSError, match=r"reset|Broken pipe"):
            raw.sendall(piece * 1000)


def test_rates_of_one_address(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    configure(directory, rate=1, burst=5)
    with serving(directory) as broker:
        # As many as a slow machine does not send while two workers let one through each second.
        answers = [Handshake(broker.url, broker.ca).auth() for _ in range(40)]
        assert {answer.status for answer in answers} == {200, 429}
        assert 429 in {Handshake(broker.url, broker.ca).request("GET", "/metrics").status for _ in range(40)}
        # The client waits and gets its key.
        assert unwrapped(broker.uri(), directory)


def test_sample_evidence_without_demo(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    words = [BIN / "imagetool", "broker", "serve", directory, "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        answer = Handshake(url, directory / "tls.crt").begin().attest()
        process.terminate()
        process.communicate(timeout=60)
    assert (answer.status, answer.kind) == (401, "AttestationFailed")
    assert imagetool("broker", "releases", directory)["entries"][-1]["reasons"][0]["code"] == "sample"


def test_without_tls(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory, "--plain-http") as broker:
        assert broker.url.startswith("http://")
        assert Handshake(broker.url).attested().resource().status == 200
        assert "plain-http" in broker.errors.read_text()


def test_what_init_refuses(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.database()
    imagetool("broker", "init", tmp_path / "a", "--database", url)
    assert imagetool("broker", "init", tmp_path / "a", code=4)["error"]["type"] == "ConflictError"
    again = imagetool("broker", "init", tmp_path / "b", "--database", url, code=4)
    assert "belongs to a broker already" in again["error"]["message"]
    imagetool("broker", "init", tmp_path / "c", "--database", "mysql://x/y", code=2)
    imagetool("broker", "init", tmp_path / "d", "--cert", "x", code=2)
    for malformed in ("postgresql://u:hidden@[::1/x", "postgresql://u:hidden@127.0.0.1:port/x"):
        assert "hidden" not in json.dumps(imagetool("broker", "init", tmp_path / "d", "--database", malformed, code=2))
    for name in ("", "a b", "a..b", "ü"):
        imagetool("broker", "init", tmp_path / "d", "--host", name, code=2)
    away = imagetool("broker", "init", tmp_path / "e", "--database", "postgresql://u:hidden@127.0.0.1:1/x", code=6)
    assert "hidden" not in json.dumps(away)
    # Nothing is left of it that stands in the way of the next attempt.
    imagetool("broker", "init", tmp_path / "e")
    for address in ("\udcff:80", f"{'a' * 300}:80", "nowhere.invalid:80"):
        imagetool("broker", "serve", tmp_path / "e", "--listen", address, code=2)
    imagetool("broker", "releases", tmp_path / "e", "--after", str(1 << 64), code=2)
    (tmp_path / "e" / "broker.toml").write_text(f"kek = {'[' * 20_000}")
    assert "nests too deep" in imagetool("broker", "key", "list", tmp_path / "e", code=10)["error"]["message"]


# SNP


def test_snp_reports_over_the_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of a made-up chip, signed afresh for each session; its authority stands in for AMD's in the server."""
    chip = SnpChip()
    (tmp_path / "authority.der").write_bytes(chip.authority)
    monkeypatch.setattr(amd, "_issuers", amd._issuers)  # put back at the end
    trust_authority(chip.authority)
    rule = f'[key."default/*"]\ntee = "snp"\nmeasurements = "{MEASUREMENT.hex()}"\ntcb = [{{ snp = 8 }}]\n'
    directory = make_broker(tmp_path / "b", policy=rule)
    command = [sys.executable, "-m", "tests.support.snpbroker", tmp_path / "authority.der"]
    with serving(directory, command=command) as broker:

        def answer(**fields: Any) -> Answer:
            client = Handshake(broker.url, broker.ca, tee="snp", evidence=lambda data: chip.evidence(data, **fields))
            attested = client.begin().attest()
            return client.resource() if attested.status == 200 else attested

        assert answer().status == 200
        for fields, code in (
            ({"measurement": bytes(48)}, "measurement"),
            ({"policy": 0xB0000}, "debug"),
            ({"vmpl": 1}, "vmpl"),
            ({"reported_tcb": bytes(8)}, "certificate"),
            ({"chip_id": b"\1" * 64}, "certificate"),
            ({"report_data": bytes(64)}, "report-data"),
        ):
            refused = answer(**fields) if "report_data" not in fields else _stale(broker, chip)
            assert refused.status == 401, fields
            entry = imagetool("broker", "releases", directory)["entries"][-1]
            assert code in [one["code"] for one in entry["reasons"]], fields
    # Without the made-up authority the same chip is nobody's.
    with serving(directory) as broker:
        stranger = Handshake(broker.url, broker.ca, tee="snp", evidence=chip.evidence)
        assert stranger.begin().attest().kind == "AttestationFailed"


def _stale(broker: Served, chip: SnpChip) -> Answer:
    """A report of another session."""
    client = Handshake(broker.url, broker.ca, tee="snp", evidence=lambda _data: chip.evidence(bytes(48)))
    return client.begin().attest()


# The TPM


def test_a_sealed_kek_and_a_mark_in_the_tpm(tmp_path: Path, tpm: SoftwareTpm) -> None:
    imagetool("keygen", "--type", "oct", "-o", tmp_path / "root.jwk")
    sealed = tmp_path / "kek.tpm2"
    subprocess.run(
        [BIN / "encfs", "seal", tmp_path / "root.jwk", "-o", sealed, "--tpm2-pcrs", "sha256:7"],
        check=True,
        capture_output=True,
    )
    (tmp_path / "root.jwk").unlink()
    directory = make_broker(tmp_path / "b", "--kek", f"tpm2:{sealed}", "--tpm2-nv-counter", "0x01800101")
    assert not (directory / "kek.jwk").exists()
    copied(directory, tmp_path / "old.db")
    with serving(directory) as broker:
        assert unwrapped(broker.uri(), directory)
    set_policy(directory, "")
    with serving(directory) as broker:
        assert Handshake(broker.url, broker.ca).begin().attest().status == 401

    # An old copy with the old policy is put back: the TPM has seen more.
    for name in ("broker.db", "broker.db-wal", "broker.db-shm"):
        (directory / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "old.db", directory / "broker.db")
    refused = imagetool("broker", "serve", directory, "--listen", "127.0.0.1:0", code=33)
    assert "an old copy was put back" in refused["error"]["message"]
    before = imagetool("broker", "policy", "show", directory)["epoch"]
    set_policy(directory, "", code=33)
    assert imagetool("broker", "policy", "show", directory)["epoch"] == before

    # Another boot state: the KEK stays sealed.
    tpm.extend(7)
    assert imagetool("broker", "key", "list", directory, code=24)["error"]["type"] == "KeyRefusedError"


def test_the_mark_is_of_one_tpm_and_moved_by_one_at_a_time(tmp_path: Path, tpm: SoftwareTpm) -> None:
    directory = make_broker(tmp_path / "b", "--tpm2-nv-counter", "0x01800101")
    mark = read_config(directory).mark
    assert mark is not None
    with ThreadPoolExecutor(4) as pool:
        # Changes by the owner, and workers that notice them: the mark comes up to the epoch, and no further.
        list(pool.map(lambda epoch: subprocess.run(_check(directory, epoch), check=True), [6, 6, 6, 6]))
    check_mark(mark, 6)
    with pytest.raises(RollbackError):
        check_mark(mark, 5)

    # The counter is gone: nobody knows what was seen.
    tpm.tool("nvundefine", "0x01800101")
    refused = imagetool("broker", "serve", directory, "--listen", "127.0.0.1:0", code=23)
    assert "is not there" in refused["error"]["message"]
    # So it is with another TPM, although that has a counter there.
    tpm.replace()
    tpm.tool("nvdefine", "0x01800101", "-C", "o", "-a", "authread|authwrite|ownerread|ownerwrite|no_da|nt=1")
    tpm.tool("nvincrement", "0x01800101")
    refused = imagetool("broker", "serve", directory, "--listen", "127.0.0.1:0", code=24)
    assert "not the TPM" in refused["error"]["message"]


def _check(directory: Path, epoch: int) -> list[str]:
    """A process that has seen an epoch."""
    code = (
        "import sys, pathlib; from imagetool.broker import config, rollback; "
        "rollback.check_mark(config.read_config(pathlib.Path(sys.argv[1])).mark, int(sys.argv[2]))"
    )
    return [sys.executable, "-c", code, str(directory), str(epoch)]
