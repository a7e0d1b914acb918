"""The units of deploy/systemd under a real systemd: readiness, reload, crashes, stop, mount units, /etc/fstab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from encfs.keys.files import write_key_files
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID, encrypt_tree, make_keys
from tests.support.machine import Machine, booted
from tests.support.mounts import REPOSITORY

_UNITS = REPOSITORY / "deploy" / "systemd"
_BIN = Path(sys.executable).parent
_SERVICE = "encfs@chat.service"
_STATUS = f"{_BIN}/encfs status --json"
#: Reads from the daemon, by a file that stays open, whenever a line comes.
_READER = r"""
import os, sys
descriptor = os.open("/mnt/chat/weights", os.O_RDONLY)
for line in sys.stdin:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        print(len(os.pread(descriptor, 4096, 8192)), flush=True)
    except OSError as error:
        print(error, flush=True)
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """With the commands in the path, an artifact, and what the units' comments say is to be put where."""
    with booted() as machine:
        keys = make_keys(machine.shared)
        write_key_files(keys.signer, machine.shared / "owner.jwk")
        model = machine.shared / "model"
        model.mkdir()
        (model / "weights").write_bytes(os.urandom(1 << 20))
        with closing(Layout(machine.shared / "store", create=True)) as store:
            encrypt_tree(model, store, keys, version=3)
        shutil.copy(_UNITS / "encfs@.service", machine.shared)
        unit = (_UNITS / "srv-chat.mount").read_text()
        for word, ours in (
            ("docker://registry.example/acme/chat:v3", "oci:/test/store:v1"),
            ("/srv/chat", "/mnt/unit"),
            ("key=tpm2:/etc/encfs/kek.tpm", "key=file:/etc/encfs/key.jwk"),
            ("id=acme/chat", f"id={ARTIFACT_ID}"),
        ):
            assert word in unit
            unit = unit.replace(word, ours)
        (machine.shared / "mnt-unit.mount").write_text(unit)
        options = f"key=file:/etc/encfs/key.jwk,trust=/etc/encfs/owner.pub,id={ARTIFACT_ID},min-version=3,supervise"
        (machine.shared / "fstab").write_text(f"oci:/test/store:v1 /mnt/table fuse.encfs {options},noauto 0 0\n")
        for name, key in (("chat", "key.jwk"), ("wrong", "owner.jwk")):
            (machine.shared / f"{name}.conf").write_text(
                f"REF=oci:/test/store:v1\nDIR=/mnt/{name}\n"
                f"OPTIONS=--key /etc/encfs/{key} --trust /etc/encfs/owner.pub --id {ARTIFACT_ID} --min-version 3\n"
            )
        machine.shell(
            "cp /test/recipient.jwk /etc/encfs/key.jwk; cp /test/owner.jwk.pub /etc/encfs/owner.pub;"
            "cp /test/owner.jwk /test/*.conf /etc/encfs/; cp /test/*.service /test/*.mount /etc/systemd/system/;"
            "cp /test/fstab /etc/fstab; mkdir -p /mnt/chat /mnt/wrong /mnt/unit /mnt/table;"
            f"ln -sf {_BIN}/encfs /usr/local/bin/encfs; ln -sf {_BIN}/mount.fuse.encfs /sbin/mount.fuse.encfs;"
            "systemctl daemon-reload"
        )
        yield machine


def wait_until(condition: Callable[[], bool], machine: Machine, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, machine.journal(_SERVICE)
        time.sleep(0.2)


def restarts(machine: Machine) -> int:
    """Of the daemon, as it says itself; -1 while there is none that serves."""
    found = json.loads(machine.shell(f"{_STATUS} || true"))["mounts"]
    return next((one["restarts"] for one in found if one["state"] == "serving"), -1)


@pytest.mark.fuse
@pytest.mark.root
def test_the_service(machine: Machine) -> None:
    machine.run("systemctl", "start", _SERVICE)
    # It is ready once the mount answers, and not before.
    assert machine.shell("stat --format %s /mnt/chat/weights").strip() == str(1 << 20)
    assert machine.property(_SERVICE, "ActiveState") == "active"
    assert machine.property(_SERVICE, "StatusText") == "serving /mnt/chat"
    assert "audit: event mount" in machine.journal(_SERVICE)
    words = ["nsenter", "--target", str(machine.first), "--all", sys.executable, "-c", _READER]
    reader = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def read() -> str:
            assert reader.stdin is not None
            assert reader.stdout is not None
            print(file=reader.stdin, flush=True)
            return reader.stdout.readline().strip()

        assert read() == "4096"
        supervisor = machine.property(_SERVICE, "MainPID")
        machine.run("systemctl", "reload", _SERVICE)
        wait_until(lambda: restarts(machine) == 1, machine)
        assert read() == "4096"
        # A daemon that is killed is the supervisor's to replace.
        machine.shell(f"kill -KILL $(pgrep -P {supervisor})")
        wait_until(lambda: restarts(machine) == 2, machine)
        assert read() == "4096"
        assert machine.property(_SERVICE, "MainPID") == supervisor
        assert machine.property(_SERVICE, "NRestarts") == "0"
        # A supervisor that is killed is systemd's: a new mount, in the same place.
        machine.shell(f"kill -KILL {supervisor}")
        wait_until(lambda: machine.property(_SERVICE, "NRestarts") == "1" and restarts(machine) == 0, machine)
        assert machine.property(_SERVICE, "ActiveState") == "active"
        assert read() != "4096"
        reader.stdin.close()
    assert machine.shell("stat --format %s /mnt/chat/weights").strip() == str(1 << 20)

    machine.run("systemctl", "stop", _SERVICE)
    assert machine.property(_SERVICE, "Result") == "success"
    assert machine.shell("findmnt --noheadings /mnt/chat || true") == ""
    assert json.loads(machine.shell(_STATUS))["mounts"] == []


@pytest.mark.fuse
@pytest.mark.root
def test_a_service_that_cannot_start_says_why(machine: Machine) -> None:
    assert "failed" in machine.run("systemctl", "start", "encfs@wrong", check=False).stderr
    [line] = {line for line in machine.journal("encfs@wrong").splitlines() if "error:" in line}
    assert "/etc/encfs/owner.jwk" in line
    assert machine.property("encfs@wrong", "ActiveState") == "activating"  # it tries again
    machine.run("systemctl", "stop", "encfs@wrong")
    assert machine.shell("findmnt --noheadings /mnt/wrong || true") == ""


@pytest.mark.fuse
@pytest.mark.root
def test_mount_units_and_tables(machine: Machine) -> None:
    machine.run("systemctl", "start", "mnt-unit.mount")
    machine.run("mount", "/mnt/table")
    for place, unit in (("/mnt/unit", "mnt-unit.mount"), ("/mnt/table", "mnt-table.mount")):
        assert machine.shell(f"stat --format %s {place}/weights").strip() == str(1 << 20)
        assert machine.property(unit, "ActiveState") == "active"
        assert machine.shell(f"findmnt --noheadings --output FSTYPE {place}").strip() == "fuse.encfs"
    machine.run("systemctl", "stop", "mnt-unit.mount")
    machine.run("umount", "/mnt/table")
    wait_until(lambda: json.loads(machine.shell(_STATUS))["mounts"] == [], machine)
    assert machine.property("mnt-unit.mount", "Result") == "success"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    for name in ("encfs@.service", "srv-chat.mount"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", _UNITS / name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    words = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=85", _UNITS / "encfs@.service"]
    judged = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert judged.returncode == 0, judged.stdout[-500:]
