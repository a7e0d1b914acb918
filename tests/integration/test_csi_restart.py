"""The node plugin ends and comes back, with and without the daemons that it handed connections to."""

from __future__ import annotations

import array
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from encfs.csi.records import VolumeRecord
from encfs.csi.volume import Volume
from encfs.encoding import b64_encode
from encfs.mount import keeper as keeping
from encfs.mount.fusedevice import claim, open_mounted, read_init, refuse_requests, resend
from encfs.mount.keeper import Keeper
from encfs.mount.mountpoint import current_mounts
from encfs.mount.options import MountOptions
from encfs.mount.runtime import short_path
from tests.support.cluster import NOBODY, Node, Pod, artifacts, node, pod
from tests.support.mounts import detach_all, is_mounted
from tests.support.waiting import wait_until

__all__ = ["artifacts", "node", "pod"]

pytestmark = [pytest.mark.fuse, pytest.mark.root]


def _mounts(target: Path) -> int:
    return sum(one.mountpoint == str(target) for one in current_mounts())


def _is_served(node: Node, pod: Pod, digest: str) -> bool:
    return node.condition(pod) == (False, f"serving {digest}")


@contextmanager
def _container(pod: Pod) -> Iterator[subprocess.Popen[str]]:
    """What a container of the pod sees: the volume, in a mount namespace of its own, as HostToContainer has it.

    A line of its input is a command, and a line of its output what that said.
    """
    script = 'mkdir "$2" && mount --rbind "$1" "$2" && mount --make-rslave "$2" && echo ready && exec sh'
    view = pod.directory / f"view-{pod.uid}"
    container = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh", pod.target, view],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with container:
        assert container.stdout is not None
        assert container.stdout.readline() == "ready\n"
        yield container


def _sees(container: subprocess.Popen[str], pod: Pod) -> str:
    assert container.stdin is not None
    assert container.stdout is not None
    container.stdin.write(f"sha256sum {pod.directory}/view-{pod.uid}/weights 2>&1\n")
    container.stdin.flush()
    return container.stdout.readline().strip()


@pytest.fixture
def shared(node: Node) -> Iterator[None]:
    """kubelet's directory takes part in propagation, as it does on a node. The plugin must see it from there."""
    node.end()
    kubelet = node.directory / "kubelet"
    subprocess.run(["mount", "--bind", kubelet, kubelet], check=True)
    subprocess.run(["mount", "--make-shared", kubelet], check=True)
    node.start()
    yield
    node.end()
    detach_all(kubelet)
    node.start()


def test_daemons_bring_their_connections_back(node: Node, pod: Pod) -> None:
    """After that a daemon can end again, and open files go on with the next one."""
    node.publish(pod, reference=pod.artifacts.reference())
    sidecar, status = pod.serve()
    descriptor = os.open(pod.weights, os.O_RDONLY)
    for _ in range(2):
        node.end(kill=True)
        assert pod.read() == pod.artifacts.content
        node.start()
        wait_until(lambda: _is_served(node, pod, status["content_digest"]))
    assert "served already" in pod.refusal()["message"]
    sidecar.kill()
    sidecar.communicate()
    _, later = pod.serve()
    assert (later["content_digest"], later["reason"]) == (status["content_digest"], "the daemon is gone")
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 100, 1 << 20) == pod.artifacts.content[1 << 20 : (1 << 20) + 100]
    os.close(descriptor)
    assert _mounts(pod.target) == 1
    node.unpublish(pod)
    assert not pod.target.exists()
    assert list((node.directory / "volumes").iterdir()) == []


def test_both_end_and_containers_see_what_is_mounted_anew(node: Node, shared: None, pod: Pod) -> None:
    pod.artifacts.encrypt(pod.artifacts.content, 4, "remounted")
    node.publish(pod, reference=pod.artifacts.reference("remounted"))
    sidecar, before = pod.serve()
    with _container(pod) as container:
        digest = _sees(container, pod)
        node.end(kill=True)
        sidecar.kill()
        sidecar.communicate()
        assert "not connected" in _sees(container, pod)
        # Meanwhile the tag has moved: a pod does not change over to something else by itself.
        pod.artifacts.encrypt(b"something else", 5, "remounted")
        starting = pod.start()  # as kubelet does, which knows nothing of the plugin
        node.start()
        assert starting.stdout is not None
        after = json.loads(starting.stdout.readline())
        assert after["content_digest"] == before["content_digest"]
        assert "mounted anew" in after["reason"]
        assert _sees(container, pod) == digest
        container.communicate()
    assert _mounts(pod.target) == 2
    node.unpublish(pod)
    assert starting.wait(60) == 0
    assert not pod.target.exists()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_volume_that_waits_for_its_first_daemon(node: Node, pod: Pod, recorded: bool) -> None:
    node.publish(pod, reference=pod.artifacts.reference())
    node.end(kill=True)
    if not recorded:  # as a plugin of a version without records leaves it
        [record] = (node.directory / "volumes").iterdir()
        record.unlink()
        node.start()
        node.publish(pod, reference=pod.artifacts.reference())
    else:
        node.start()
    wait_until(lambda: "mounted anew" in node.condition(pod)[1])
    node.publish(pod, reference=pod.artifacts.reference())
    pod.serve()
    assert pod.read() == pod.artifacts.content
    node.unpublish(pod)


def test_a_connection_that_somebody_aborts_is_replaced(node: Node, pod: Pod) -> None:
    node.publish(pod, reference=pod.artifacts.reference())
    sidecar, _ = pod.serve()
    # umount -f of somebody who does not know better; it is still used, and stays there, dead.
    descriptor = os.open(pod.target, os.O_RDONLY)
    subprocess.run(["umount", "-f", pod.target], check=False, capture_output=True)
    assert sidecar.wait(60) == 0
    wait_until(lambda: "mounted anew" in node.condition(pod)[1])
    os.close(descriptor)
    pod.serve()
    assert pod.read() == pod.artifacts.content
    node.unpublish(pod)


def test_the_end_of_a_daemon_is_seen_before_the_next_one_is_let_in(node: Node, pod: Pod) -> None:
    """The plugin may have had no time for either: both are there when it looks."""
    node.publish(pod, reference=pod.artifacts.reference())
    sidecar, _ = pod.serve()
    node.process.send_signal(signal.SIGSTOP)
    sidecar.kill()
    sidecar.communicate()
    with socket.socket(socket.AF_UNIX) as successor:
        with short_path(pod.socket) as address:
            successor.connect(address)
        node.process.send_signal(signal.SIGCONT)
        successor.settimeout(60)
        assert b"init_request" in successor.recv(1 << 16)
    node.unpublish(pod)


def test_a_mount_that_somebody_takes_away_is_made_again_when_it_is_published_again(node: Node, pod: Pod) -> None:
    node.publish(pod, reference=pod.artifacts.reference())
    detach_all(pod.target)
    wait_until(lambda: node.condition(pod) == (True, "it is not mounted any more"))
    node.publish(pod, reference=pod.artifacts.reference())
    pod.serve()
    assert pod.read() == pod.artifacts.content
    node.unpublish(pod)


def test_what_is_no_record_or_not_mounted_any_more_is_passed_over(node: Node, pod: Pod) -> None:
    """After a reboot there are no mounts; kubelet publishes again what is still wanted."""
    node.publish(pod, reference=pod.artifacts.reference())
    node.end()
    state = node.directory / "volumes"
    [record] = state.iterdir()
    told = json.loads(record.read_text())
    detach_all(pod.target)
    for number, text in enumerate(
        (
            "{",
            "[]",
            json.dumps({**told, "target": 1}),
            json.dumps({**told, "content_digest": "x"}),
            json.dumps({**told, "volume_id": "other", "target": "/etc"}),
            "[" * 100_000,
        )
    ):
        (state / f"{number}.json").write_text(text)
    node.start()
    assert not record.exists()
    said = node.log.read_text()
    assert "kubelet publishes it again" in said
    assert said.count("is no record of a volume") == 5
    assert "/etc is not in the directory of the pod" in said
    assert "Traceback" not in said
    node.publish(pod, reference=pod.artifacts.reference())
    pod.serve()
    assert pod.read() == pod.artifacts.content
    node.unpublish(pod)
    for path in state.iterdir():
        path.unlink()


# Without the machinery around it


class _Daemon:
    """A FUSE mount that is answered with EIO, by a thread: enough for not to be dead. Its own words are made up."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self.descriptor = open_mounted(str(place), MountOptions(allow_other=True))
        self.request = read_init(self.descriptor, 30)
        _, _, unique, *_ = struct.unpack_from("=IIQ", self.request)
        # struct fuse_out_header and fuse_init_out of linux/fuse.h, of the kernel's own version.
        major, minor, read_ahead = struct.unpack_from("=III", self.request, 40)
        self.reply = struct.pack("=IiQIIII48x", 80, 0, unique, major, minor, read_ahead, 0)
        os.write(self.descriptor, self.reply)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while not self._ended.is_set() and refuse_requests(self.descriptor):
            select.select([self.descriptor], [], [], 0.05)

    def pause(self) -> None:
        self._ended.set()
        self._thread.join()

    def end(self) -> None:
        self.pause()
        os.close(self.descriptor)
        detach_all(self.place)

    def message(self, **more: object) -> dict[str, object]:
        served = {"content_digest": _CONTENT, "manifest_digest": _CONTENT}
        given = {"init_request": b64_encode(self.request), "init_reply": b64_encode(self.reply)}
        return {"event": "returned", **given, **served, **more}


_CONTENT = "sha256:" + "1" * 64


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[_Daemon]:
    daemon = _Daemon(tmp_path / "mount")
    yield daemon
    daemon.end()


def _bring(volume: Volume, place: Path, message: dict[str, object], *descriptors: int) -> socket.socket:
    """A connection to the plugin, by which this was brought back to it."""
    channel = socket.socket(socket.AF_UNIX)
    channel.settimeout(60)
    with short_path(place) as address:
        channel.connect(address)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([json.dumps(message).encode() + b"\n"], rights)
    return channel


def test_only_the_connection_that_is_mounted_can_be_brought_back(daemon: _Daemon, tmp_path: Path) -> None:
    """Until its daemon comes, which may be slow, nobody else is let in: nor another daemon, nor another connection."""
    other = _Daemon(tmp_path / "other")
    place = tmp_path / "encfs.sock"
    saved: list[VolumeRecord] = []
    record = VolumeRecord("v", str(daemon.place), {}, _CONTENT, _CONTENT, 7)
    volume = Volume.restore(record, place, NOBODY, saved.append)
    good = daemon.message()
    with open(os.devnull) as null:
        for message, *descriptors in (
            (good, null.fileno()),
            (good, other.descriptor),
            (good, daemon.descriptor, daemon.descriptor),
            (good,),
            ({"event": "ready"}, daemon.descriptor),
            (daemon.message(content_digest="sha256:" + "0" * 64), daemon.descriptor),
            (daemon.message(init_request="AAAA"), daemon.descriptor),
            (daemon.message(init_reply=None), daemon.descriptor),
            (daemon.message(init_reply=7), daemon.descriptor),
        ):
            with _bring(volume, place, message, *descriptors) as channel:
                assert b"has not brought its connection back" in channel.recv(1 << 16), message
    assert volume.condition.startswith("served by a daemon that has not brought its connection back")
    with _bring(volume, place, good, daemon.descriptor):
        wait_until(lambda: volume.condition == f"serving {_CONTENT}")
        assert not volume.is_abnormal
    wait_until(lambda: volume.condition == "the daemon is gone")
    # Now there is something to hand over.
    with socket.socket(socket.AF_UNIX) as successor:
        successor.settimeout(60)
        with short_path(place) as address:
            successor.connect(address)
        given = json.loads(successor.recv(1 << 16))
    assert given["init_request"] == good["init_request"]
    assert (given["init_reply"], given["content_digest"]) == (good["init_reply"], _CONTENT)
    assert (given["restarts"], given["bring_back"]) == (1, True)
    volume.close()
    assert not is_mounted(daemon.place)
    assert saved == []
    other.end()


def test_a_daemon_that_makes_the_descriptor_block_does_not_stop_the_plugin(
    daemon: _Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two share an open file. What waits is refused all the same, and the volume can be closed."""
    monkeypatch.setattr("encfs.csi.volume.PATIENCE", 0.0)
    volume = Volume.restore(VolumeRecord("v", str(daemon.place), {}), tmp_path / "s", NOBODY, lambda _: None)
    with _bring(volume, tmp_path / "s", daemon.message(), daemon.descriptor):
        wait_until(lambda: volume.condition == f"serving {_CONTENT}")
        daemon.pause()
        os.set_blocking(daemon.descriptor, True)
    with pytest.raises(OSError, match="Input/output error"):
        (daemon.place / "x").stat()
    volume.close()
    assert not is_mounted(daemon.place)


def test_nobody_who_was_not_handed_it_can_keep_a_connection_locked(daemon: _Daemon) -> None:
    """A daemon marks it as served by a lock. With /dev/fuse itself, any other pod's sidecar could do so."""
    with open("/dev/fuse", "r+b", buffering=0) as everybodys:
        fcntl.lockf(everybodys, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claim(daemon.descriptor)
    assert os.fstat(daemon.descriptor).st_nlink == 0


@pytest.mark.parametrize("can_resend", [True, False])
def test_what_a_daemon_took_and_did_not_answer(
    daemon: _Daemon, monkeypatch: pytest.MonkeyPatch, can_resend: bool
) -> None:
    """A kernel that can sends it again to the next one. With another it ends with the daemon."""
    monkeypatch.setattr(keeping, "can_resend", lambda init: can_resend)
    daemon.pause()
    with subprocess.Popen(["stat", daemon.place / "x"], stderr=subprocess.PIPE, text=True) as caller:
        assert caller.stderr is not None
        select.select([daemon.descriptor], [], [])
        os.read(daemon.descriptor, 1 << 20)
        keeper = Keeper.take_back(daemon.message(), os.dup(daemon.descriptor), str(daemon.place), {})
        os.close(daemon.descriptor)
        daemon.descriptor = os.open(os.devnull, os.O_RDONLY)
        if can_resend:
            resend(keeper.descriptor)
            select.select([keeper.descriptor], [], [])
            assert keeper.refuse_requests()
        said = caller.stderr.read()
    assert ("Input/output error" if can_resend else "connection abort") in said
    keeper.close()
