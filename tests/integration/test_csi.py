"""The node plugin over its gRPC socket, and a sidecar without privilege that gets its descriptor from it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from encfs.csi import csi_pb2 as csi
from encfs.errors import EncfsError, PinError, TrustError, UsageError, WrongIdError
from encfs.image.compression import Compression
from encfs.sidecar import SidecarConfig, load_config, narrow
from tests.support.container_images import Store, archive, make_image
from tests.support.mounts import REPOSITORY, is_mounted
from tests.support.mounts import detach_all as detach

_NOBODY = 65534
_UID = "0b7f0b1e-3c1d-4d7e-9d6e-1f2a3b4c5d6e"
#: Without privilege, and imported before, since the interpreter may be where other users cannot go.
_SIDECAR = """
import contextlib, os, pkgutil, importlib, zoneinfo, oras.client, decimal, pydantic
import encfs.cli, encfs.mount.handover
from importlib.metadata import entry_points
for module in pkgutil.walk_packages(encfs.__path__, "encfs."):
    if not module.name.startswith(("encfs.fsspec", "encfs.safetensors", "encfs.tpm", "encfs.container", "encfs.csi")):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
[one.load() for one in entry_points(group="encfs.key_providers", name="file")]
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
encfs.cli.main()
"""


class Cluster:
    """A kubelet's directory, a running plugin, and an artifact with its keys."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.pod = base / "kubelet" / "pods" / _UID
        self.pod.mkdir(parents=True)
        self.target = self.pod / "volumes" / "kubernetes.io~csi" / "model" / "mount"
        self.socket = self.pod / "volumes" / "kubernetes.io~empty-dir" / "encfs" / "encfs.sock"
        model = base / "model"
        model.mkdir()
        self.content = random.Random(5).randbytes(2 << 20)
        (model / "weights").write_bytes(self.content)
        imagetool = Path(sys.executable).parent / "imagetool"
        for words in (
            ("keygen", "-o", base / "a.jwk"),
            ("keygen", "-o", base / "owner.jwk", "--type", "ed25519"),
            (
                *("encrypt", model, self.reference, "-r", base / "a.jwk.pub", "--sign", base / "owner.jwk"),
                *("--id", "acme/chat", "--artifact-version", "3"),
            ),
        ):
            subprocess.run([imagetool, *words], check=True, capture_output=True, timeout=120)
        (base / "run").mkdir(mode=0o700)
        self.configuration = base / "sidecar.toml"
        self.configuration.write_text(
            f'socket = "{self.socket}"\nreferences = ["oci:{base}/*"]\nkeys = ["file:{base}/a.jwk"]\n'
            f'trusted_keys = ["{base}/owner.jwk.pub"]\nids = ["acme/chat"]\nmin_version = 2\n'
        )
        for path in [base, *base.rglob("*")]:
            os.chown(path, _NOBODY, _NOBODY)
        parent = base
        while parent != Path("/tmp"):  # noqa: S108 - where pytest puts its directories
            parent.chmod(parent.stat().st_mode | 0o755)
            parent = parent.parent
        self.plugin = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "encfs", "csi-node", "--endpoint", f"unix:{base}/csi.sock"),
                *("--node-id", "node-1", "--kubelet-dir", base / "kubelet"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.plugin.stdout is not None
        assert b"serving CSI" in self.plugin.stdout.readline()
        self.channel = grpc.insecure_channel(f"unix:{base}/csi.sock")
        self.sidecars: list[subprocess.Popen[str]] = []

    @property
    def reference(self) -> str:
        return f"oci:{self.base / 'store'}:v3"

    def close(self) -> None:
        self.channel.close()
        for sidecar in self.sidecars:
            sidecar.kill()
            sidecar.communicate()
        self.plugin.terminate()
        self.plugin.communicate(timeout=30)
        detach(self.target)

    def call(self, method: str, **members: Any) -> Any:
        service = "Identity" if method in {"GetPluginInfo", "Probe", "GetPluginCapabilities"} else "Node"
        stub = self.channel.unary_unary(
            f"/csi.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(csi, f"{method}Response").FromString,
        )
        return stub(getattr(csi, f"{method}Request")(**members), timeout=60, wait_for_ready=True)

    def publish(self, volume: str = "csi-1", target: Path | None = None, **attributes: str) -> None:
        context = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": _UID, **attributes}
        self.call(
            "NodePublishVolume",
            volume_id=volume,
            target_path=str(target or self.target),
            volume_capability=csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume()),
            volume_context=context,
        )

    def unpublish(self) -> None:
        self.call("NodeUnpublishVolume", volume_id="csi-1", target_path=str(self.target))

    def sidecar(self) -> subprocess.Popen[str]:
        sidecar = subprocess.Popen(
            [sys.executable, "-c", _SIDECAR, "sidecar", "--config", str(self.configuration), "--json"],
            cwd=REPOSITORY,
            env={**os.environ, "ENCFS_RUNTIME_DIR": str(self.base / "run"), "XDG_CACHE_HOME": str(self.base / "run")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.sidecars.append(sidecar)
        return sidecar

    def refusal(self) -> dict[str, Any]:
        output, _ = self.sidecar().communicate(timeout=200)
        answer: dict[str, Any] = json.loads(output)["error"]
        return answer

    def read(self) -> bytes:
        """From a process that can be given up."""
        done = subprocess.run(["cat", self.target / "weights"], capture_output=True, check=True, timeout=200)
        return done.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.mark.fuse
@pytest.mark.root
def test_a_volume_from_publishing_to_the_end(cluster: Cluster) -> None:
    assert cluster.call("GetPluginInfo").name == "encfs.csi"
    assert cluster.call("Probe").ready.value
    assert cluster.call("NodeGetInfo").node_id == "node-1"
    attributes = {"reference": cluster.reference, "minVersion": "3"}
    cluster.publish(**attributes)
    cluster.publish(**attributes)  # again: the same answer
    with pytest.raises(grpc.RpcError) as other:
        cluster.publish("csi-2", **attributes)
    assert other.value.code() == grpc.StatusCode.ALREADY_EXISTS
    sidecar = cluster.sidecar()
    assert cluster.read() == cluster.content
    assert "CapEff:\t0000000000000000" in Path(f"/proc/{sidecar.pid}/status").read_text()
    # The descriptor is given to one daemon at a time; the next one goes on with the same mount.
    assert "served already" in cluster.refusal()["message"]
    descriptor = os.open(cluster.target / "weights", os.O_RDONLY)
    sidecar.kill()
    sidecar.communicate()
    successor = cluster.sidecar()
    assert successor.stdout is not None
    assert json.loads(successor.stdout.readline())["restarts"] == 1
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 100, 1 << 20) == cluster.content[1 << 20 : (1 << 20) + 100]
    os.close(descriptor)
    cluster.unpublish()
    cluster.unpublish()
    assert not cluster.target.exists()
    assert not is_mounted(cluster.target)


@pytest.mark.fuse
@pytest.mark.root
def test_a_container_image_is_all_of_its_layers(cluster: Cluster) -> None:
    image = Store(cluster.base / "image")
    lower, upper = archive({"weights": b"old", "kept": b"kept"}), archive({"weights": b"new"})
    make_image(image, "v1", [(lower, Compression.NONE), (upper, Compression.NONE)])
    reference = f"oci:{cluster.base / 'images'}:v1"
    words = ("encrypt", image.reference("v1"), reference, "-r", cluster.base / "a.jwk.pub", "--id", "acme/chat")
    options = ("--sign", cluster.base / "owner.jwk", "--artifact-version", "3")
    imagetool = Path(sys.executable).parent / "imagetool"
    subprocess.run([imagetool, *words, *options], check=True, capture_output=True, timeout=120)
    for path in (cluster.base / "images").rglob("*"):
        os.chown(path, _NOBODY, _NOBODY)
    cluster.publish(reference=reference)
    cluster.sidecar()
    assert cluster.read() == b"new"
    assert sorted(os.listdir(cluster.target)) == ["kept", "weights"]
    cluster.unpublish()


@pytest.mark.fuse
@pytest.mark.root
def test_what_the_configuration_does_not_allow_is_not_opened(cluster: Cluster) -> None:
    cluster.publish(reference=cluster.reference, id="acme/other")
    error = cluster.refusal()
    assert (error["type"], "none that the configuration allows" in error["message"]) == ("WrongIdError", True)
    cluster.unpublish()


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"refrence": "oci:x"}, "unknown volume attribute"),
        ({"minVersion": "-1"}, "is no version"),
        ({"socketVolume": "../up"}, "no name of a volume"),
        ({"csi.storage.k8s.io/pod.uid": "../../etc"}, "only inline volumes"),
        ({"csi.storage.k8s.io/ephemeral": "false"}, "only inline volumes"),
    ],
)
def test_volumes_that_are_not_published(cluster: Cluster, attributes: dict[str, str], message: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        cluster.publish(**attributes)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(refused.value.details())
    with pytest.raises(grpc.RpcError, match="not in the directory of the pod"):
        cluster.publish(target=cluster.base / "elsewhere")
    assert not is_mounted(cluster.target)


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
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(tmp_path / "c"))


# csi-sanity

#: Its tests of node services want a controller beside them, which there is none of; those are driven above.
_SERVICES = "Identity Service"


@pytest.mark.fuse
@pytest.mark.root
def test_csi_sanity(cluster: Cluster, tmp_path: Path) -> None:
    """The conformance suite of CSI, as far as it applies to node plugins without a controller."""
    program = shutil.which("csi-sanity")
    if program is None:
        program = _built(tmp_path)
    done = subprocess.run(
        [
            *(program, f"--csi.endpoint={cluster.base}/csi.sock", f"--csi.mountdir={tmp_path}/sanity-mount"),
            *(f"--csi.stagingdir={tmp_path}/sanity-staging", "--ginkgo.no-color", f"--ginkgo.focus={_SERVICES}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " 0 Failed" in done.stdout


def _built(tmp_path: Path) -> str:
    if shutil.which("go") is None:
        pytest.skip("there is no Go compiler to build csi-sanity with")
    subprocess.run(
        ["go", "install", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v5.3.1"],
        env={**os.environ, "GOBIN": str(tmp_path / "bin"), "GOFLAGS": "-mod=mod"},
        check=True,
        capture_output=True,
        timeout=280,
    )
    return str(tmp_path / "bin" / "csi-sanity")
