"""The broker's database: locked, full, hung, altered, set back; clocks that were set back. The real server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from encfs.kbs import jwe
from imagetool.broker.opening import open_broker
from imagetool.broker.refusals import MAX_OF_ADDRESS
from imagetool.broker.sessions import begin
from imagetool.broker.tickets import write_cookie
from tests.support.broker import (
    BIN,
    PATH,
    Handshake,
    copied,
    imagetool,
    make_broker,
    serving,
    set_policy,
    unwrapped,
)
from tests.support.postgres import running_postgres
from tests.support.waiting import wait_until


def test_a_locked_database(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        client = Handshake(broker.url, broker.ca).attested()
        lock = sqlite3.connect(directory / "broker.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        answer = client.resource()
        assert (answer.status, answer.kind) == (503, "Unavailable")
        lock.execute("ROLLBACK")
        lock.close()
        assert client.resource().status == 200
        assert "is locked" in broker.errors.read_text()
    log = imagetool("broker", "releases", directory, "--path", PATH)["entries"]
    assert [one["event"] for one in log] == ["key-added", "released"]


def test_a_database_that_another_program_keeps_for_itself(tmp_path: Path) -> None:
    """Not even readable: every answer is in time, and none is a key."""
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        client = Handshake(broker.url, broker.ca).attested()
        other = Handshake(broker.url, broker.ca).begin()
        keeper = sqlite3.connect(directory / "broker.db", isolation_level=None, timeout=0)
        keeper.execute("PRAGMA locking_mode = EXCLUSIVE")

        def taken() -> bool:
            """Workers have it open, and so have their successors a moment later."""
            for pid in broker.workers():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                keeper.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                return False
            return True

        wait_until(taken)
        wait_until(lambda: len(broker.workers()) == 2)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.resource), pool.submit(other.attest)]
            assert client.request("GET", "/healthz").status == 200
            assert not any(one.done() for one in asked), "nothing else waits for the database"
            for one in asked:
                answer = one.result()
                assert (answer.status, answer.kind) == (503, "Unavailable")
        assert client.request("GET", "/readyz").status == 503
        keeper.close()
        assert client.resource().status == 200
        assert other.attest().status == 200
        assert "is locked" in broker.errors.read_text()
    imagetool("broker", "releases", directory, "--verify")


def test_postgresql_stopped_and_started(tmp_path: Path) -> None:
    with running_postgres() as server:
        directory = make_broker(tmp_path / "b", "--database", server.database())
        with serving(directory) as broker:
            client = Handshake(broker.url, broker.ca).attested()
            assert client.resource().status == 200
            other = Handshake(broker.url, broker.ca).begin()
            server.stop()
            for answer in (client.resource(), other.attest(), client.resource()):
                assert (answer.status, answer.kind) == (503, "Unavailable")
            assert client.request("GET", "/readyz").status == 503
            assert client.request("GET", "/healthz").status == 200
            assert "hidden" not in broker.errors.read_text()
            server.start()
            wait_until(lambda: client.request("GET", "/readyz").status == 200)
            # Nothing of it is lost, neither the sessions nor the nonce that was not spent.
            assert client.resource().status == 200
            assert other.attest().status == 200
            assert unwrapped(broker.uri(), directory)
        log = imagetool("broker", "releases", directory, "--path", PATH)["entries"]
        assert [one["event"] for one in log] == ["key-added", "released", "released", "released"]
        imagetool("broker", "releases", directory, "--verify")


def _fill(descriptor: int) -> None:
    while True:
        os.write(descriptor, bytes(4096))


@pytest.mark.root
def test_a_full_database(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", place], check=True)
    try:
        directory = make_broker(place / "b")
        with serving(directory) as broker:
            client = Handshake(broker.url, broker.ca).attested()
            filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
            with pytest.raises(OSError, match="No space left"):
                _fill(filler)
            os.close(filler)
            statuses = {client.resource().status for _ in range(12)}
            assert 503 in statuses
            answer = client.resource()
            assert (answer.status, answer.kind) == (503, "Unavailable")
            (place / "filler").unlink()
            assert client.resource().status == 200
        imagetool("broker", "releases", directory, "--verify")
    finally:
        subprocess.run(["umount", place], check=True)


def test_no_release_outlives_its_session_when_the_power_fails(tmp_path: Path) -> None:
    """A session's row is not forced onto the disk, a release is: whatever of the write-ahead log is left, a nonce that
    is usable again has released nothing."""
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        for _ in range(3):
            first, second = (Handshake(broker.url, broker.ca).attested() for _ in range(2))
            for client in (second, first, second):
                assert client.resource().status == 200
        database, log = (directory / f"broker.db{suffix}" for suffix in ("", "-wal"))
        main, written = database.read_bytes(), log.read_bytes()
    # The log's header, and frames of a page each (SQLite's file format, section 4.1); what is cut off is not replayed.
    page = int.from_bytes(written[8:12])
    seen = set()
    for end in range(32, len(written) + 1, 24 + page):
        (tmp_path / "left.db").write_bytes(main)
        (tmp_path / "left.db-wal").write_bytes(written[:end])
        with closing(sqlite3.connect(tmp_path / "left.db")) as left:
            spent = {_public_name(identity) for (identity,) in left.execute("SELECT id FROM sessions")}
            entries = [json.loads(text) for (text,) in left.execute("SELECT entry FROM decisions")]
        released = {one["session"] for one in entries if one["event"] == "released"}
        assert released <= spent
        seen.add((len(spent), len(released)))
    # All of the way was looked at, sessions without a release as well.
    assert {(0, 0), (2, 0), (2, 1), (6, 6)} <= seen


def _public_name(identity: str) -> str:
    """What names a session in the log (`Session.public_name`)."""
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def test_refused_evidence_does_not_fill_the_log(tmp_path: Path) -> None:
    """Somebody without a TEE sends without end: so many entries in an hour, then a number."""
    directory = make_broker(tmp_path / "b")
    sent = MAX_OF_ADDRESS + 15
    with serving(directory) as broker:
        for _ in range(sent):
            client = Handshake(broker.url, broker.ca, evidence=lambda _data: {"svn": "1", "report_data": "AAAA"})
            answer = client.begin().attest()
            assert (answer.status, answer.kind) == (401, "AttestationFailed")
            # Whether it has an entry of its own or not: the nonce is used up.
            assert client.attest().kind == "SessionNotFound"
        # What genuine evidence is refused has its entry all the same, and so has what is released.
        assert Handshake(broker.url, broker.ca).attested().resource("other/key/chat").status == 401
        assert Handshake(broker.url, broker.ca).attested().resource().status == 200
        log = imagetool("broker", "releases", directory)["entries"]
        assert [one["event"] for one in log[3:]] == ["refused-evidence"] * MAX_OF_ADDRESS + ["refused", "released"]
        # The hour is over.
        with sqlite3.connect(directory / "broker.db") as connection:
            connection.execute("UPDATE refusals SET interval = interval - 1")

        def last() -> dict[str, object]:
            found: dict[str, object] = imagetool("broker", "releases", directory)["entries"][-1]
            return found

        wait_until(lambda: last()["event"] == "refused-evidence-counted")
        assert last()["counts"] == [{"tee": "sample", "code": "report-data", "count": 15}]
    imagetool("broker", "releases", directory, "--verify")
    shown = subprocess.run(
        [BIN / "imagetool", "broker", "releases", directory], capture_output=True, text=True, check=True
    )
    assert "15 more of sample (report-data)" in shown.stdout.splitlines()[-1]


def test_a_database_that_was_altered_serves_nobody(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        client = Handshake(broker.url, broker.ca).attested()
        with sqlite3.connect(directory / "broker.db") as connection:
            connection.execute("UPDATE state SET policy = '', epoch = epoch + 1")
        assert client.resource().status == 503
        assert client.request("GET", "/readyz").status == 503
        assert client.request("GET", "/healthz").status == 200
        assert "altered" in broker.errors.read_text()
    assert imagetool("broker", "key", "list", directory, code=11)["error"]["type"] == "IntegrityError"


def test_another_public_key_in_an_attested_session(tmp_path: Path) -> None:
    """Who writes to the database puts a key of theirs into a session whose evidence was accepted."""
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        client = Handshake(broker.url, broker.ca).attested()
        mine = jwe.public_members(jwe.session_key().public)
        with sqlite3.connect(directory / "broker.db") as connection:
            connection.execute("UPDATE sessions SET public_key = ?", (json.dumps(mine),))
        assert client.resource().status == 401
    assert imagetool("broker", "releases", directory)["entries"][-1]["reasons"][0]["code"] == "report-data"


def test_a_database_set_back_under_a_running_broker(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    copied(directory, tmp_path / "old.db")
    set_policy(directory, "")
    # One worker, which has seen the newer epoch.
    with serving(directory, "--workers", "1") as broker:
        assert Handshake(broker.url, broker.ca).begin().attest().status == 401
        assert Handshake(broker.url, broker.ca).request("GET", "/readyz").status == 200
        with sqlite3.connect(tmp_path / "old.db") as source, sqlite3.connect(directory / "broker.db") as target:
            source.backup(target)
        assert Handshake(broker.url, broker.ca).request("GET", "/readyz").status == 503
        assert "set back" in broker.errors.read_text()


def test_clocks_that_were_set_back_end_sessions(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    opened = open_broker(directory)
    opened.database.close()
    with serving(directory) as broker:
        ahead, behind = (Handshake(broker.url, broker.ca).attested() for _ in range(2))
        with sqlite3.connect(directory / "broker.db") as connection:
            for client, shift in ((ahead, 3_600_000), (behind, -3_600_000)):
                connection.execute(
                    "UPDATE sessions SET created = created + ?, expires = expires + ? WHERE nonce = ?",
                    (shift, shift, client.nonce),
                )
        for client in (ahead, behind):
            assert client.resource().kind == "SessionNotFound"
        # Cookies that a broker of this database gave out long ago, or by a clock that was ahead.
        for shift, expected in ((0, ""), (3_600_000, "SessionNotFound"), (-301_000, "SessionNotFound")):
            session = begin("0.4.0", "sample", time.time_ns() // 1_000_000 + shift, 300_000)
            client = Handshake(broker.url, broker.ca, nonce=session.nonce)
            client.cookie = f"kbs-session-id={write_cookie(opened.vault, session)}"
            assert client.attest().kind == expected
        assert unwrapped(broker.uri(), directory)


def test_expired_sessions_are_deleted(tmp_path: Path) -> None:
    directory = make_broker(tmp_path / "b")
    with serving(directory) as broker:
        Handshake(broker.url, broker.ca).attested()
        with sqlite3.connect(directory / "broker.db") as connection:
            connection.execute("UPDATE sessions SET expires = 1")
            connection.commit()

            def left() -> int:
                return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])

            wait_until(lambda: left() == 0)
