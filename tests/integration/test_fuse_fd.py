"""FUSE descriptors that a node component hands over to a daemon without any privilege."""

from __future__ import annotations

import array
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encfs.mount.fusedevice import open_mounted
from encfs.mount.keeper import Keeper
from encfs.mount.options import MountOptions
from tests.support.cluster import NOBODY, give_to_nobody, open_directory
from tests.support.mounts import REPOSITORY, detach_all
from tests.support.waiting import LONG

pytestmark = [pytest.mark.fuse, pytest.mark.root]

#: The command without privilege: imported as root, since the interpreter may be where others cannot go.
_PROGRAM = """
import contextlib, os, pkgutil, importlib, zoneinfo, oras.client, decimal, pydantic
import encfs.cli, encfs.mount.handover
for module in pkgutil.walk_packages(encfs.__path__, "encfs."):
    if not module.name.startswith(("encfs.fsspec", "encfs.safetensors", "encfs.tpm", "encfs.container")):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
encfs.mount.handover.receive.__defaults__ = (float(os.environ.pop("ENCFS_TEST_PATIENCE")),)
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
encfs.cli.main()
"""


class Node:
    """What a node component has: root, a directory to mount at, and an artifact that the daemon may read."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.place = base / "mount"
        self.place.mkdir()
        model = base / "model"
        model.mkdir()
        self.content = random.Random(3).randbytes(3 << 20)
        (model / "weights").write_bytes(self.content)
        imagetool = Path(sys.executable).parent / "imagetool"
        for words in (
            ("keygen", "-o", base / "a.jwk"),
            ("encrypt", model, f"oci:{base / 'store'}:v1", "-r", base / "a.jwk.pub"),
        ):
            subprocess.run([imagetool, *words], check=True, capture_output=True, timeout=60)
        (base / "run").mkdir(mode=0o700)
        give_to_nobody(base)

    def mounted(self) -> int:
        """A descriptor that is mounted, and not served by anybody."""
        return open_mounted(str(self.place), MountOptions(allow_other=True))

    def daemon(self, where: str, *descriptors: int, patience: float = 60.0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-c", _PROGRAM, "mount", f"oci:{self.base / 'store'}:v1", "--fuse-fd", where),
                *("-k", str(self.base / "a.jwk"), "--allow-unsigned", "--json"),
            ],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "ENCFS_RUNTIME_DIR": str(self.base / "run"),
                "ENCFS_TEST_PATIENCE": str(patience),
            },
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def refused(self, where: str, *descriptors: int) -> dict[str, Any]:
        """The error of a daemon that does not come to serve, in bounded time."""
        output, _ = self.daemon(where, *descriptors, patience=3.0).communicate(timeout=LONG)
        answer: dict[str, Any] = json.loads(output)
        return answer

    def listen(self) -> tuple[socket.socket, str]:
        path = str(self.base / "node.sock")
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        os.chmod(path, 0o666)  # noqa: S103 - the daemon is another user
        server.listen()
        server.settimeout(LONG)
        return server, path

    def assert_serves(self, daemon: subprocess.Popen[str]) -> None:
        assert (self.place / "weights").read_bytes() == self.content
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert f"Uid:\t{NOBODY}\t{NOBODY}" in status


@pytest.fixture
def node() -> Iterator[Node]:
    with open_directory() as base:
        node = Node(base)
        yield node
        detach_all(node.place)


def _end(daemon: subprocess.Popen[str]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.communicate(timeout=LONG)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.communicate()
        raise


def test_an_inherited_descriptor_is_served_without_privilege(node: Node) -> None:
    descriptor = node.mounted()
    daemon = node.daemon(str(descriptor), descriptor)
    os.close(descriptor)
    node.assert_serves(daemon)
    _end(daemon)
    with pytest.raises(OSError, match="not connected"):
        (node.place / "weights").read_bytes()


def test_a_descriptor_comes_through_a_socket_and_outlives_the_daemon(node: Node) -> None:
    keeper = Keeper.begin(node.mounted(), str(node.place))
    server, path = node.listen()
    with server:
        for round_ in range(2):
            daemon = node.daemon(f"unix:{path}")
            channel, _ = server.accept()
            keeper.hand_over(channel)
            events = channel.makefile("rb")
            for name in ("negotiated", "ready")[: 2 - round_]:
                event = json.loads(events.readline())
                assert event["event"] == name
                keeper.note(event)
            node.assert_serves(daemon)
            daemon.kill()
            daemon.communicate()
            channel.close()
            events.close()
    keeper.close()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no", "neither a descriptor nor a socket"),
        ("unix:", "neither a descriptor nor a socket"),
        ("77", "no open descriptor"),
        ("unix:/nowhere/at/all", "nobody hands a FUSE descriptor over"),
    ],
)
def test_words_that_name_no_descriptor(node: Node, where: str, message: str) -> None:
    assert message in node.refused(where)["error"]["message"]


def test_descriptors_that_are_of_no_use(node: Node) -> None:
    with open(os.devnull) as null:
        assert "no descriptor of /dev/fuse" in node.refused(str(null.fileno()), null.fileno())["error"]["message"]
    unmounted = os.open("/dev/fuse", os.O_RDWR)
    assert "did not begin" in node.refused(str(unmounted), unmounted)["error"]["message"]
    os.close(unmounted)


def test_a_descriptor_is_handed_over_twice(node: Node) -> None:
    descriptor = node.mounted()
    first = node.daemon(str(descriptor), descriptor)
    node.assert_serves(first)
    # The kernel does not begin again; or a request of the first daemon is met.
    error = node.refused(str(descriptor), descriptor)["error"]
    assert "handed over twice" in (error["hint"] or "") or "in use already" in error["message"], error
    node.assert_serves(first)
    os.close(descriptor)
    _end(first)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "no descriptor was handed over in time"),
        (b"", "ended the handover"),
        (b'{"error": "the volume is gone"}\n', "the volume is gone"),
        (b"{}\n", "0 descriptors"),
        (b"[]\n", "no message of this protocol"),
        (b"\xff\n", "no message of this protocol"),
    ],
)
def test_givers_that_do_not_keep_to_it(node: Node, sent: bytes | None, message: str) -> None:
    server, path = node.listen()
    with server:
        daemon = node.daemon(f"unix:{path}", patience=3.0 if sent is None else 60.0)
        channel, _ = server.accept()
        if sent is None:
            output, _ = daemon.communicate(timeout=LONG)
            channel.close()
        else:
            channel.sendall(sent)
            channel.close()
            output, _ = daemon.communicate(timeout=LONG)
    error = json.loads(output)["error"]["message"]
    assert message in error


def test_a_giver_that_lies_about_the_descriptor(node: Node) -> None:
    server, path = node.listen()
    with server, open(os.devnull) as null:
        daemon = node.daemon(f"unix:{path}")
        channel, _ = server.accept()
        with channel:
            rights = array.array("i", [null.fileno()])
            channel.sendmsg([b'{"init_request": "AAAA"}\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            output, _ = daemon.communicate(timeout=LONG)
    assert "no descriptor of /dev/fuse" in json.loads(output)["error"]["message"]


def test_givers_of_another_user_are_not_trusted(node: Node) -> None:
    path = node.base / "other.sock"
    program = (
        "import os, socket, sys\nos.setresuid(1234, 1234, 1234)\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.bind({str(path)!r}); os.chmod({str(path)!r}, 0o666); s.listen(); s.accept(); sys.stdin.read()"
    )
    node.base.chmod(0o777)
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as other:
        assert "user 1234 is at the other end" in node.refused(f"unix:{path}")["error"]["message"]
        other.communicate()
