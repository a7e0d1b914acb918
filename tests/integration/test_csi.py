"""The node plugin over its gRPC socket, and sidecars without privilege that get their descriptors from it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from encfs.csi import csi_pb2 as csi
from encfs.errors import EncfsError, PinError, TrustError, UsageError, WrongIdError
from encfs.sidecar import SidecarConfig, load_config, narrow
from tests.support.cluster import Node, Pod, artifacts, node, pod
from tests.support.mounts import detach_all, is_mounted
from tests.support.programs import csi_sanity
from tests.support.registry import OciServer
from tests.support.waiting import wait_until

__all__ = ["artifacts", "node", "pod"]


@pytest.mark.fuse
@pytest.mark.root
def test_a_volume_from_publishing_to_the_end(node: Node, pod: Pod) -> None:
    assert node.call("GetPluginInfo").name == "encfs.csi"
    assert node.call("Probe").ready.value
    assert node.call("NodeGetInfo").node_id == "node-1"
    attributes = {"reference": pod.artifacts.reference(), "minVersion": "3"}
    node.publish(pod, **attributes)
    node.publish(pod, **attributes)  # again: the same answer
    assert node.condition(pod) == (False, "waiting for a daemon")
    with pytest.raises(grpc.RpcError) as other:
        node.publish(pod, volume="csi-2", **attributes)
    assert other.value.code() == grpc.StatusCode.ALREADY_EXISTS
    sidecar, status = pod.serve()
    assert pod.read() == pod.artifacts.content
    wait_until(lambda: node.condition(pod) == (False, f"serving {status['content_digest']}"))
    assert "CapEff:\t0000000000000000" in Path(f"/proc/{sidecar.pid}/status").read_text()
    # The descriptor is given to one daemon at a time; the next one goes on with the same mount.
    assert "served already" in pod.refusal()["message"]
    descriptor = os.open(pod.weights, os.O_RDONLY)
    sidecar.kill()
    sidecar.communicate()
    _, status = pod.serve()
    assert status["restarts"] == 1
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 100, 1 << 20) == pod.artifacts.content[1 << 20 : (1 << 20) + 100]
    os.close(descriptor)
    node.unpublish(pod)
    node.unpublish(pod)
    assert not pod.target.exists()
    assert not is_mounted(pod.target)
    with pytest.raises(grpc.RpcError) as gone:
        node.condition(pod)
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND


# What attributes may do


def _config(**more: Any) -> SidecarConfig:
    members = {"references": ("docker://r.example/acme/*",), "keys": ("file:a", "file:b"), "ids": ("x", "y"), **more}
    return SidecarConfig(socket="/s", **members)


_GOOD = {"reference": "docker://r.example/acme/chat:v1", "id": "x", "csi.storage.k8s.io/pod.name": "p"}


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({**_GOOD, "reference": "docker://evil.example/acme/chat:v1"}, TrustError),
        ({**_GOOD, "key": "file:c"}, TrustError),
        ({**_GOOD, "id": "z"}, WrongIdError),
        ({**_GOOD, "trust": "evil.pub"}, UsageError),
        ({**_GOOD, "allow_unsigned": "true"}, UsageError),
        ({"reference": _GOOD["reference"]}, UsageError),
        ({"id": "x"}, UsageError),
    ],
)
def test_attributes_never_widen(attributes: dict[str, str], kind: type[EncfsError]) -> None:
    with pytest.raises(kind):
        narrow(_config(pins=("sha256:" + "0" * 64,)), attributes)


def test_attributes_narrow() -> None:
    pin = "sha256:" + "1" * 64
    request = narrow(
        _config(min_version=5, pins=(pin, "sha256:" + "2" * 64)),
        {**_GOOD, "key": "file:b", "minVersion": "4", "pin": pin},
    )
    assert (request.keys, request.trust.min_version, request.trust.artifact_id) == (("file:b",), 5, "x")
    assert request.trust.pin == pin
    assert narrow(_config(min_version=5, pins=(pin,)), {**_GOOD, "minVersion": "9"}).trust.min_version == 9
    with pytest.raises(PinError):
        narrow(_config(pins=(pin,)), {**_GOOD, "pin": "sha256:" + "3" * 64})


def test_only_the_star_stands_for_other_references() -> None:
    """What else a shell's pattern has occurs in references: an IPv6 address is in brackets."""
    own, other = "docker://[::1]:5000/acme/chat:v1", "docker://1:5000/acme/chat:v1"
    pins = ("sha256:" + "0" * 64,)
    assert narrow(_config(references=(own,), pins=pins), {"id": "x"}).reference == own
    patterns = _config(references=("docker://[::1]:5000/*", "oci:/models/?"), pins=pins)
    assert narrow(patterns, {"reference": own, "id": "x"}).reference == own
    for reference in (other, "oci:/models/x", f"x{own}"):
        with pytest.raises(TrustError):
            narrow(patterns, {"reference": reference, "id": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks"),
        ("socket = 1", "lacks"),
        ('socket = "/s"\nreferences = ["a"]\nkeys = ["k"]', "trusts nothing"),
        ('socket = "/s"\nreferences = ["a"]\nkeys = ["k"]\nids = ["i"]', "trusts nothing"),
        ('socket = "s"\nreferences = ["a"]\nkeys = ["k"]\npins = ["sha256:00"]', "wrong kind"),
        ('socket = "/s"\nreferences = ["a"]\nkeys = ["k"]\npins = ["sha256:00"]', "the pin"),
        ('socket = "/s"\nreferences = ["a"]\nkeys = ["k"]\nallow_unsigned = true', "unknown member"),
        ("\x00", "no TOML"),
        (f"socket = {'[' * 20_000}", "no TOML"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(tmp_path / "c"))


# csi-sanity


class _Controller:
    """What csi-sanity wants beside the node plugin, which has no controller: volumes to publish, by name only.

    It passes calls of the plugin's services on as they are, and says in its place that there is a controller: without
    that csi-sanity leaves out what publishes volumes. Messages of its own are few enough to be written by hand.
    """

    def __init__(self, node: Node, pod: Pod) -> None:
        self._node = node
        self._context = {
            "csi.storage.k8s.io/ephemeral": "true",
            "csi.storage.k8s.io/pod.uid": pod.uid,
            "reference": pod.artifacts.reference(),
        }
        self.volumes = 0
        self.published: list[str] = []
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=(self,))
        self.endpoint = f"unix:{node.directory}/sanity.sock"
        self._server.add_insecure_port(self.endpoint)
        self._server.start()

    def end(self) -> None:
        self._server.stop(1).wait()

    def service(self, details: Any) -> Any:
        own = {
            "/csi.v1.Controller/CreateVolume": self._create,
            "/csi.v1.Controller/DeleteVolume": lambda *_: b"",
            # ControllerServiceCapability.rpc.type = CREATE_DELETE_VOLUME
            "/csi.v1.Controller/ControllerGetCapabilities": lambda *_: _field(1, _field(1, b"\x08\x01")),
            # PluginCapability.service.type = CONTROLLER_SERVICE
            "/csi.v1.Identity/GetPluginCapabilities": lambda *_: _field(1, _field(1, b"\x08\x01")),
        }
        return grpc.unary_unary_rpc_method_handler(own.get(details.method) or self._pass_on(details.method))

    def _create(self, _: bytes, __: grpc.ServicerContext) -> bytes:
        self.volumes += 1
        entries = [
            _field(3, _field(1, key.encode()) + _field(2, value.encode())) for key, value in self._context.items()
        ]
        return _field(1, _field(2, b"sanity-%d" % self.volumes) + b"".join(entries))

    def _pass_on(self, method: str) -> Any:
        call = self._node.channel.unary_unary(method)

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                reply: bytes = call(request, timeout=60)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            if method.endswith("/NodePublishVolume"):
                self.published.append(csi.NodePublishVolumeRequest.FromString(request).volume_id)
            return reply

        return answer


def _field(number: int, content: bytes) -> bytes:
    """A member of a protobuf message, of bytes."""
    assert len(content) < 1 << 14
    length = bytes([len(content)]) if len(content) < 128 else bytes([len(content) & 127 | 128, len(content) >> 7])
    return bytes([number << 3 | 2]) + length + content


def _restart(pod: Pod, ended: threading.Event) -> None:
    while not ended.is_set():
        pod.start(patience=60.0).communicate()


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.skipif(not OciServer.can_be_built(), reason="there is no Go 1.24 to build csi-sanity with")
def test_csi_sanity(node: Node, pod: Pod) -> None:
    """The conformance suite of CSI: all of Identity and Node, volumes published ten times over among them."""
    program = csi_sanity()
    controller = _Controller(node, pod)
    pod.target.parent.parent.mkdir(parents=True)
    # What is published is looked at: as in a pod, a sidecar is there, and is started again when its volume has ended.
    ended = threading.Event()
    restarting = threading.Thread(target=_restart, args=(pod, ended))
    restarting.start()
    try:
        done = subprocess.run(
            [
                *(program, f"--csi.endpoint={controller.endpoint}", f"--csi.mountdir={pod.target.parent}"),
                *(f"--csi.stagingdir={pod.directory}/staging", "--ginkgo.no-color", "--ginkgo.json-report=report"),
                "--ginkgo.focus=Identity Service|Node Service",
            ],
            cwd=pod.directory,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        # The plugin itself has no controller, and says so.
        direct = subprocess.run(
            [program, f"--csi.endpoint=unix:{node.endpoint}", "--ginkgo.no-color", "--ginkgo.focus=Identity Service"],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert direct.returncode == 0, direct.stdout[-4000:]
    finally:
        ended.set()
        pod.kill()
        restarting.join()
        controller.end()
        detach_all(pod.target.parent / "target")
    [suite] = json.loads((pod.directory / "report").read_text())
    states: dict[str, list[str]] = {}
    for one in suite["SpecReports"]:
        if "Service" in str(one["ContainerHierarchyTexts"]):
            name = " ".join([*one["ContainerHierarchyTexts"], one["LeafNodeText"]])
            states.setdefault(one["State"], []).append(name)
    ran = states["passed"]
    assert sum(name.startswith("Identity Service") for name in ran) == 3
    # What is left out is of staging and growing volumes, which inline ones never do.
    left_out = [name for name in states["skipped"] if name.startswith("Node Service")]
    assert all(name.split()[2] in {"NodeStageVolume", "NodeUnstageVolume", "NodeExpandVolume"} for name in left_out)
    assert sum(name.startswith("Node Service") for name in ran) == 14, ran
    assert len(controller.published) > 10
    assert not is_mounted(pod.target.parent / "target")
