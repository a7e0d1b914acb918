"""A mount as a service sees it: probes, metrics, logs, systemd's messages, mount(8)'s helper."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from encfs.cli.fstab import words_of
from encfs.errors import MountError, UsageError
from encfs.mount.health import Probes, listen_at, respond
from encfs.mount.metrics import ReadTimes, render
from encfs.mount.options import MountStatus
from tests.support.mounts import detach_all

_BIN = Path(sys.executable).parent


class _Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def _get(path: Path, what: str) -> tuple[int, str]:
    connection = _Unix(path)
    try:
        connection.request("GET", what)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _read_all(descriptor: int) -> None:
    while os.read(descriptor, 1 << 20):
        continue


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(os.urandom(4 << 20))
    for words in (
        ("keygen", "-o", tmp_path / "a.jwk"),
        ("encrypt", model, f"oci:{tmp_path / 'store'}:v1", "-r", tmp_path / "a.jwk.pub"),
    ):
        subprocess.run([_BIN / "imagetool", *words], check=True, capture_output=True, timeout=120)
    (tmp_path / "mount").mkdir()
    yield tmp_path
    detach_all(tmp_path / "mount")


@pytest.mark.fuse
@pytest.mark.root
def test_a_mount_as_a_service(base: Path) -> None:
    """One mount by mount(8)'s helper, told to systemd, scraped, damaged, and read about in its log."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(base / "notify"))
    manager.settimeout(60)
    options = (
        f"key=file:{base}/a.jwk,allow-unsigned,log-format=json,log-file={base}/log,listen=unix:{base}/http,_netdev"
    )
    subprocess.run(
        [_BIN / "mount.fuse.encfs", f"oci:{base / 'store'}:v1", base / "mount", "-o", options],
        env={**os.environ, "ENCFS_RUNTIME_DIR": str(base / "run"), "NOTIFY_SOCKET": str(base / "notify")},
        check=True,
        timeout=120,
    )
    with manager:
        assert manager.recv(1000).startswith(b"READY=1\n")
    assert _get(base / "http", "/healthz") == (200, "ok\n")
    assert _get(base / "http", "/readyz") == (200, "ready\n")
    before = (base / "mount" / "weights").read_bytes()
    assert before == (base / "model" / "weights").read_bytes()
    families = {family.name: family for family in text_string_to_metric_families(_get(base / "http", "/metrics")[1])}
    assert families["encfs_read_bytes"].samples[0].value >= 4 << 20
    assert families["encfs_verify_failures"].samples[0].value == 0
    assert families["encfs_mount_info"].samples[0].labels["mountpoint"] == str(base / "mount")
    assert next(one.value for one in families["encfs_read_seconds"].samples if one.name.endswith("count")) > 0

    blob = max((base / "store").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    with blob.open("r+b") as stream:
        stream.seek(blob.stat().st_size // 2)
        stream.write(b"damaged!")
    descriptor = os.open(base / "mount" / "weights", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.raises(OSError, match="Input/output"):
        _read_all(descriptor)
    os.close(descriptor)
    after = {family.name: family for family in text_string_to_metric_families(_get(base / "http", "/metrics")[1])}
    assert after["encfs_requests_failed"].samples[0].value > 0
    lines = [json.loads(line) for line in (base / "log").read_text().splitlines()]
    audit = {line["audit"]["event"]: line["audit"] for line in lines if "audit" in line}
    assert audit["mount"]["key"] == f"file:{base}/a.jwk"
    assert (audit["mount"]["signer"], audit["mount"]["pinned"]) == (None, False)
    assert audit["mount"]["content_digest"].startswith("sha256:")
    assert audit["integrity_failure"]["error"] == "IntegrityError"


#: Nothing can be written but the runtime directory and the cache, as with readOnlyRootFilesystem in a pod.
_READ_ONLY = """
mount --make-rprivate / && mount -o remount,ro,bind / || exit 1
for place in /tmp /var/tmp "$1"; do mount --rbind "$place" "$place"; mount -o remount,ro,bind "$place"; done
for place in run cache; do mount -t tmpfs none "$1/$place"; done
cd / && ! touch /tmp/x /var/tmp/x "$1/x" 2>/dev/null || exit 1
shift && exec "$@"
"""


@pytest.mark.fuse
@pytest.mark.root
def test_a_mount_needs_no_place_for_temporary_files(base: Path) -> None:
    for name in ("run", "cache"):
        (base / name).mkdir()
    words = [_BIN / "encfs", "mount", f"oci:{base / 'store'}:v1", base / "mount", "-k", base / "a.jwk"]
    daemon = subprocess.Popen(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            _READ_ONLY,
            "sh",
            base,
            *words,
            "--allow-unsigned",
            "--foreground",
            "--json",
        ],
        env={
            **os.environ,
            "ENCFS_RUNTIME_DIR": str(base / "run" / "state"),
            "XDG_CACHE_HOME": str(base / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert daemon.stdout is not None
    status = json.loads(daemon.stdout.readline())
    daemon.terminate()
    _, said = daemon.communicate(timeout=60)
    assert status.get("state") == "serving", said


@pytest.mark.fuse
@pytest.mark.root
def test_a_mount_that_fails_leaves_no_socket(base: Path) -> None:
    words = [_BIN / "encfs", "mount", f"oci:{base / 'store'}:v1", base / "mount", "-k", base / "a.jwk"]
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh", *words),
            *("--allow-unsigned", "--foreground", "--listen", f"unix:{base / 'probes'}"),
        ],
        env={**os.environ, "ENCFS_RUNTIME_DIR": str(base / "run")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == MountError.exit_code, done.stderr
    assert [path for path in base.rglob("*") if path.is_socket()] == []


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"200 OK"),
        (b"GET /readyz HTTP/1.0\r\nHost: x\r\n\r\n", b"503 Service Unavailable"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01" * 3000, b"400 Bad Request"),
    ],
)
def test_what_is_answered(head: bytes, status: bytes) -> None:
    assert respond(head, Probes(lambda: False, lambda: "m\n")).startswith(b"HTTP/1.1 " + status + b"\r\n")


def test_metrics_of_names_with_everything_in_them() -> None:
    times = ReadTimes()
    times.observe(0.003)
    times.observe(100.0)
    waiting = times.begin()
    status = MountStatus('/mnt/"a\\b\n', "serving", started=time.time() - 5, transfer={"bytes_from_registry": 3})
    families = {one.name: one for one in text_string_to_metric_families(render(status, times, ready=True))}
    assert families["encfs_mount_info"].samples[0].labels["mountpoint"] == '/mnt/"a\\b\n'
    assert families["encfs_transfer_bytes_from_registry"].samples[0].value == 3
    assert families["encfs_reads_hung"].samples[0].value == 0
    buckets = [one.value for one in families["encfs_read_seconds"].samples if "le" in one.labels]
    assert (buckets[0], buckets[-2], buckets[-1]) == (0, 1, 2)
    times.end(waiting)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "10.0.0.1:80", "localhost:80", "127.0.0.1", "127.0.0.1:99999", ""])
def test_only_loopback_is_listened_at(address: str) -> None:
    with pytest.raises(UsageError, match="neither a loopback address"):
        listen_at(address)


def test_words_of_mount_8() -> None:
    words = words_of(
        ["oci:store:v1", "/mnt", "-n", "-o", "ro,_netdev,key=tpm2:/k,id=a,min_version=3,supervise,x-systemd.automount"]
    )
    assert words == [
        *("mount", "oci:store:v1", "/mnt", "--allow-other", "--key", "tpm2:/k", "--id", "a"),
        *("--min-version", "3", "--supervise"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("key=env:KEY", "cannot be had at boot"),
        ("key=passphrase:", "cannot be had at boot"),
        ("fuse-fd=3", "unknown mount option"),
        ("supervise=yes", "unknown mount option"),
        ("key=", "unknown mount option"),
    ],
)
def test_options_that_no_table_may_have(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        words_of(["REF", "/mnt", "-o", options])
