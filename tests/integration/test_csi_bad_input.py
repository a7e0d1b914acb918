"""What must not go wrong between node and sidecar, however one of them behaves: a clear line, in time, no plaintext.

Through the plugin's real gRPC socket and real FUSE mounts; where the node itself lies, root in the test stands in the
plugin's place. What arrives is told from what is configured by keys and artifacts that really exist.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from encfs.artifact import content_digest_of
from encfs.encoding import b64_encode
from encfs.mount.runtime import short_path
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID
from tests.support.cluster import LyingNode, Node, Pod, artifacts, give_to_nobody, liar, node, pod
from tests.support.image_artifacts import directory, encrypt_image, file, image_config, whiteout
from tests.support.mounts import is_mounted
from tests.support.waiting import wait_until

__all__ = ["artifacts", "liar", "node", "pod"]

pytestmark = [pytest.mark.fuse, pytest.mark.root]

_OTHER = "sha256:" + "0" * 64
#: Reads from the daemon, not the page cache, until that fails; says how.
_READER = """
import errno, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
try:
    while True:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(descriptor, 1 << 20, 0)
        print("reading", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


# What kubelet and pods do


def test_a_volume_ends_while_it_is_read(node: Node, pod: Pod) -> None:
    node.publish(pod, reference=pod.artifacts.reference())
    sidecar, _ = pod.serve()
    with subprocess.Popen([sys.executable, "-c", _READER, pod.weights], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        node.unpublish(pod)
        said = reader.stdout.read().splitlines()
        assert said[-1] in {"ENOTCONN", "ECONNABORTED"}
        assert reader.wait(60) == 0
    assert sidecar.wait(60) == 0
    assert not pod.target.exists()


@pytest.mark.parametrize(
    ("attributes", "configuration", "code", "said"),
    [
        ({}, {"keys": ["file:/nowhere/key.jwk"]}, 3, "/nowhere/key.jwk"),
        ({}, {"keys": ["file:{base}/stranger.jwk"]}, 22, "no key opens the keyring"),
        ({"reference": "oci:/etc:v3"}, {}, 30, "none that the configuration allows"),
        ({"reference": "oci:{base}/store:none"}, {}, 3, "no tag 'none'"),
        ({"reference": "oci:{base}/store:v1"}, {}, 33, "below the floor 2"),
        ({"reference": "oci:{base}/store:@@"}, {}, 2, "is not a tag"),
        ({"id": "acme/other"}, {}, 32, "none that the configuration allows"),
        ({"pin": _OTHER}, {}, 34, "not the pinned"),
        ({}, {"trusted_keys": ["{base}/recipient.jwk.pub"]}, 20, "cannot sign"),
    ],
)
def test_what_a_volume_cannot_be_is_told_to_pod_and_node(
    node: Node, pod: Pod, attributes: dict[str, str], configuration: dict[str, list[str]], code: int, said: str
) -> None:
    base = str(pod.artifacts.base)
    asked = {"reference": pod.artifacts.reference()} | attributes
    node.publish(pod, **{name: value.replace("{base}", base) for name, value in asked.items()})
    settings = {name: [one.replace("{base}", base) for one in values] for name, values in configuration.items()}
    error = pod.refusal(**settings)
    assert (error["exit_code"], said in error["message"]) == (code, True), error
    wait_until(lambda: node.condition(pod)[0])
    assert node.condition(pod) == (True, f"failed: {error['message']}")
    assert f"{pod.target}: failed: {error['message']}" in node.log.read_text()
    node.unpublish(pod)


def test_a_pod_has_its_own_paths_only(node: Node, pod: Pod) -> None:
    neighbour = Pod(node.directory, pod.artifacts)
    node.publish(pod, reference=pod.artifacts.reference())
    for target, volume, code in (
        (pod.target, "", grpc.StatusCode.INVALID_ARGUMENT),
        (neighbour.path / ".." / pod.uid / "volumes" / "x", "", grpc.StatusCode.INVALID_ARGUMENT),
        (neighbour.target, f"csi-{pod.uid}", grpc.StatusCode.ALREADY_EXISTS),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            node.publish(neighbour, target=target, volume=volume, reference=pod.artifacts.reference())
        assert refused.value.code() == code
    assert not is_mounted(neighbour.target)
    assert node.condition(pod) == (False, "waiting for a daemon")
    node.unpublish(pod)


def test_a_daemon_that_lies_to_the_plugin(node: Node, pod: Pod) -> None:
    """Whatever runs in the pod as its user can do no more than end its own volume, and leaves one line each time."""
    node.publish(pod, reference=pod.artifacts.reference())
    for line in (
        b'{"event": "negotiated", "init_reply": "!"}\n',
        b'{"event": "negotiated", "init_reply": "AAAA"}\n',
        b'{"event": "ready", "status": {"content_digest": "sha256:\\nforged line"}}\n',
        b'{"event": "failed", "message": "two\\nlines"}\n',
        b"[[[" * 1000 + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as liar:
            with short_path(pod.socket) as address:
                liar.connect(address)
            assert b"init_request" in liar.recv(1 << 16)
            liar.sendall(line)
        wait_until(lambda: "starting" not in node.condition(pod)[1])
    assert "\nforged" not in node.log.read_text()
    assert "failed: two lines" in node.log.read_text()
    assert "Traceback" not in node.log.read_text()
    pod.serve()
    assert pod.read() == pod.artifacts.content
    node.unpublish(pod)


# What a node may say


@pytest.mark.parametrize(
    ("attributes", "code", "said"),
    [
        ({"allow_unsigned": "true"}, 2, "unknown volume attribute"),
        ({"trust": "/evil.pub"}, 2, "unknown volume attribute"),
        ({"key": "file:/etc/shadow"}, 30, "none that the configuration allows"),
        ({"reference": "docker://evil.example/acme/chat:v3"}, 30, "none that the configuration allows"),
        ({"reference": "oci:{base}/store:v1", "minVersion": "0"}, 33, "below the floor 2"),
    ],
)
def test_a_node_that_widens_trust(liar: LyingNode, attributes: dict[str, str], code: int, said: str) -> None:
    base = str(liar.pod.artifacts.base)
    asked = {"reference": liar.pod.artifacts.reference()} | attributes
    liar.keeper.attributes = {name: value.replace("{base}", base) for name, value in asked.items()}
    with Background(liar.pod) as refused:
        channel, _ = liar.server.accept()
        liar.keeper.hand_over(channel)
        said_to_node = channel.makefile("rb").readline()
        channel.close()
    assert (refused.error["exit_code"], said in refused.error["message"]) == (code, True), refused.error
    event = json.loads(said_to_node)
    assert (event["event"], event["message"]) == ("failed", refused.error["message"])


def test_a_node_has_no_say_where_a_digest_is_configured(liar: LyingNode) -> None:
    """It says that another manifest of the same store was served before: only a tag may be gone on from."""
    with closing(Layout(liar.pod.artifacts.base / "store")) as store:
        old, new = store.manifest("v1"), store.manifest("v3")
    allowed = liar.pod.artifacts.reference("v1").removesuffix(":v1") + f"@{old.digest}"
    liar.keeper.attributes = {}
    liar.keeper.content_digest, liar.keeper.manifest_digest = content_digest_of(new), new.digest
    with Background(liar.pod, references=[allowed], min_version=1) as refused:
        channel, _ = liar.server.accept()
        liar.keeper.hand_over(channel)
        channel.makefile("rb").readline()
        channel.close()
    assert refused.error["exit_code"] == 40
    assert f"the reference names {content_digest_of(old)} now" in refused.error["message"]


class Background:
    """A sidecar that is expected to refuse, while the test plays the node."""

    def __init__(self, pod: Pod, patience: float = 30.0, **configuration: object) -> None:
        self.error: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(1)
        self._refusal = self._pool.submit(pod.refusal, patience, **configuration)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.error = self._refusal.result()
        finally:
            self._pool.shutdown()


def _message(liar: LyingNode, case: str) -> tuple[dict[str, object] | bytes, list[int]]:
    descriptor = liar.keeper.descriptor
    null, fuse = os.open(os.devnull, os.O_RDONLY), os.open("/dev/fuse", os.O_RDWR)
    plain: dict[str, object] = {"attributes": {"reference": liar.pod.artifacts.reference()}}
    message = {
        "a file": (liar.message(), [null]),
        "not mounted": (liar.message(**plain), [fuse]),
        "two": (liar.message(), [descriptor, null]),
        "none": (liar.message(), []),
        "begun by nobody": (liar.message(init_request=b64_encode(b"\0" * 104)), [descriptor]),
        "another request": (liar.message(init_request=b64_encode(b"x" * 64)), [descriptor]),
        "another reply": (liar.message(**plain, init_reply=b64_encode(b"\0" * 80)), [descriptor]),
        "not FUSE": (liar.message(**plain, mountpoint="/proc"), [descriptor]),
        "a forged line": (liar.message(**plain, mountpoint="/x\nINFO audit: all is well"), [descriptor]),
        "another content": (
            liar.message(**plain, content_digest=_OTHER, manifest_digest=_OTHER),
            [descriptor],
        ),
        "HTTP": (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", []),
    }
    chosen = message[case]
    for extra in {null, fuse} - set(chosen[1]):
        os.close(extra)
    return chosen


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("a file", "no descriptor of /dev/fuse"),
        ("not mounted", "mounted nowhere"),
        ("two", "2 descriptors"),
        ("none", "0 descriptors"),
        ("begun by nobody", "no first request of the kernel"),
        ("another request", "no first request of the kernel"),
        ("another reply", "negotiates another FUSE session"),
        ("not FUSE", "is proc, and no FUSE mount"),
        ("a forged line", "is no absolute path"),
        ("another content", "is gone"),
        ("HTTP", "no message of this protocol"),
    ],
)
def test_a_node_that_hands_over_something_else(liar: LyingNode, case: str, said: str) -> None:
    document, descriptors = _message(liar, case)
    with Background(liar.pod) as refused:
        channel = liar.hand_over(document, *descriptors)
        for descriptor in set(descriptors) - {liar.keeper.descriptor}:
            os.close(descriptor)
        # Not closed before it has answered: there is nobody at the other end who would mind.
        channel.shutdown(socket.SHUT_WR)
    channel.close()
    assert said in refused.error["message"], refused.error
    assert "\n" not in refused.error["message"]


def test_a_node_that_never_hands_over(liar: LyingNode) -> None:
    with Background(liar.pod, patience=1.0) as refused:
        channel, _ = liar.server.accept()
    channel.close()
    assert "no descriptor was handed over in time" in refused.error["message"]
    assert refused.error["exit_code"] == 40


def test_a_socket_of_another_kind(pod: Pod) -> None:
    pod.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, short_path(pod.socket) as address:
        other.bind(address)
        os.chmod(address, 0o666)  # noqa: S103 - the sidecar is another user
        error = pod.refusal(patience=1.0)
    assert "nobody hands a FUSE descriptor over" in error["message"]
    assert error["exit_code"] == 40


def test_one_connection_given_to_two_sidecars(liar: LyingNode) -> None:
    """The second one finds that somebody serves it, whatever the node says."""
    liar.keeper.attributes = {"reference": liar.pod.artifacts.reference()}
    first = liar.pod.start()
    channel, _ = liar.server.accept()
    with channel, channel.makefile("rb") as events:
        liar.keeper.hand_over(channel)
        while (event := json.loads(events.readline()))["event"] != "ready":
            liar.keeper.note(event)
        with Background(liar.pod) as refused:
            other = liar.hand_over(liar.message(mountpoint="/somewhere/else"), liar.keeper.descriptor)
        other.close()
        assert refused.error["exit_code"] == 40
        assert "another process serves the FUSE connection" in refused.error["message"]
        assert liar.pod.read() == liar.pod.artifacts.content
        # It is free again once that one has ended.
        first.kill()
        first.communicate()
    liar.pod.start()
    channel, _ = liar.server.accept()
    liar.keeper.hand_over(channel)
    assert liar.pod.read() == liar.pod.artifacts.content
    channel.close()


# Successors, and images


def test_a_tag_that_moves_does_not_change_what_a_pod_reads(node: Node, pod: Pod) -> None:
    pod.artifacts.encrypt(pod.artifacts.content, 4, "moving")
    node.publish(pod, reference=pod.artifacts.reference("moving"))
    sidecar, before = pod.serve()
    assert pod.read() == pod.artifacts.content
    descriptor = os.open(pod.weights, os.O_RDONLY)
    pod.artifacts.encrypt(b"other content, in the same place", 5, "moving")
    sidecar.kill()
    sidecar.communicate()
    successor, after = pod.serve()
    assert (after["content_digest"], after["restarts"]) == (before["content_digest"], 1)
    assert pod.read() == pod.artifacts.content
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 4096, 1 << 20) == pod.artifacts.content[1 << 20 : (1 << 20) + 4096]
    os.close(descriptor)
    successor.kill()
    _, said = successor.communicate()
    assert "is served on" in said
    # What was served is removed as well: the mount does not change over to something else by itself.
    layout = pod.artifacts.base / "store" / "blobs" / "sha256"
    (layout / after["manifest_digest"].removeprefix("sha256:")).unlink()
    error = pod.refusal()
    assert (error["type"], "is gone" in error["message"]) == ("NotFoundError", True)
    node.unpublish(pod)


def test_a_layered_image_is_served_as_one_tree(node: Node, pod: Pod) -> None:
    layers = [
        [
            directory(b""),
            directory(b"etc"),
            file(b"etc/kept", b"kept"),
            file(b"etc/gone", b"gone"),
            file(b"etc/new", b"old"),
        ],
        [directory(b""), directory(b"etc"), whiteout(b"etc/gone"), file(b"etc/new", b"new")],
    ]
    with closing(Layout(pod.artifacts.base / "store", create=True)) as store:
        encrypt_image(store, layers, pod.artifacts.keys, image_config(2), tag="image")
    give_to_nobody(pod.artifacts.base)
    node.publish(pod, reference=pod.artifacts.reference("image"))
    pod.serve(min_version=1, ids=[ARTIFACT_ID])
    etc = pod.target / "etc"
    assert sorted(os.listdir(etc)) == ["kept", "new"]
    assert (Path(etc, "kept").read_text(), Path(etc, "new").read_text()) == ("kept", "new")
    node.unpublish(pod)
