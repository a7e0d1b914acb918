"""A node as kubelet sees it: its directory, the node plugin behind a gRPC socket, pods with sidecars that hold keys.

`Node` is what is real: `encfs csi-node` as root. `LyingNode` stands in a plugin's place and hands over what it likes.
Sidecars are real processes, without any privilege.
"""

from __future__ import annotations

import array
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from encfs.console.terminal import INTERNAL_ERROR_EXIT_CODE
from encfs.csi import csi_pb2 as csi
from encfs.keys.files import write_key_files
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.mount.fusedevice import open_mounted
from encfs.mount.keeper import Keeper
from encfs.mount.options import MountOptions
from encfs.mount.runtime import short_path
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID, Keys, encrypt_tree, make_keys
from tests.support.mounts import REPOSITORY, detach_all

NOBODY = 65534
#: Without privilege; imported before, since the interpreter may be where other users cannot go.
_SIDECAR = """
import contextlib, importlib, os, pkgutil, zoneinfo, decimal, oras.client, pydantic
import encfs.cli, encfs.mount.handover
for module in pkgutil.walk_packages(encfs.__path__, "encfs."):
    if module.name.split(".")[1] not in {"fsspec", "safetensors", "tpm", "container", "csi", "attestation", "skr"}:
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
encfs.mount.handover.receive.__defaults__ = (float(os.environ.pop("ENCFS_TEST_PATIENCE")),)
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
encfs.cli.main()
"""


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that sidecars' user gets to: pytest keeps others out of its own, again whenever one starts."""
    with tempfile.TemporaryDirectory(prefix="encfs-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # noqa: S103 - that is what it is for
        yield Path(name)


def give_to_nobody(base: Path) -> None:
    """All of a directory, to sidecars' user."""
    for path in [base, *base.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


@dataclass(slots=True)
class Artifacts:
    """A layout with a model, versions 1 (tag v1) and 3 (v3), and the files of the keys."""

    base: Path
    keys: Keys
    content: bytes

    def reference(self, tag: str = "v3") -> str:
        return f"oci:{self.base / 'store'}:{tag}"

    def encrypt(self, content: bytes, version: int, tag: str) -> None:
        """For the same recipient, by the same owner."""
        model = self.base / "model"
        model.mkdir(exist_ok=True)
        (model / "weights").write_bytes(content)
        with closing(Layout(self.base / "store", create=True)) as store:
            encrypt_tree(model, store, self.keys, version=version, tag=tag)
        give_to_nobody(self.base)


def make_artifacts(base: Path) -> Artifacts:
    base.mkdir()
    keys = make_keys(base)
    write_key_files(keys.signer, base / "owner.jwk")
    stranger = generate_key("x25519")
    assert isinstance(stranger, PrivateKey)
    write_key_files(stranger, base / "stranger.jwk")
    artifacts = Artifacts(base, keys, random.Random(5).randbytes(2 << 20))
    artifacts.encrypt(b"old", 1, "v1")
    artifacts.encrypt(artifacts.content, 3, "v3")
    return artifacts


@dataclass(slots=True)
class Pod:
    """A pod's directory, and what its sidecar is configured with."""

    directory: Path
    artifacts: Artifacts
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    sidecars: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True)
        (self.directory / "run" / self.uid).mkdir(parents=True, mode=0o700)
        os.chown(self.directory / "run" / self.uid, NOBODY, NOBODY)
        give_to_nobody(self.directory / "run")

    @property
    def path(self) -> Path:
        return self.directory / "kubelet" / "pods" / self.uid

    @property
    def target(self) -> Path:
        return self.path / "volumes" / "kubernetes.io~csi" / "model" / "mount"

    @property
    def socket(self) -> Path:
        return self.path / "volumes" / "kubernetes.io~empty-dir" / "encfs" / "encfs.sock"

    @property
    def weights(self) -> Path:
        return self.target / "weights"

    def start(self, patience: float = 30.0, **configuration: object) -> subprocess.Popen[str]:
        """A sidecar, with members of its configuration changed."""
        base = self.artifacts.base
        members = {
            "socket": str(self.socket),
            "references": [f"oci:{base}/store:*"],
            "keys": [f"file:{base}/recipient.jwk"],
            "trusted_keys": [f"{base}/owner.jwk.pub"],
            "ids": [ARTIFACT_ID],
            "min_version": 2,
            **configuration,
        }
        file = self.directory / "run" / f"{self.uid}.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in members.items()))
        run = str(self.directory / "run" / self.uid)
        sidecar = subprocess.Popen(
            [sys.executable, "-c", _SIDECAR, "sidecar", "--config", str(file), "--json"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "ENCFS_RUNTIME_DIR": run,
                "XDG_CACHE_HOME": run,
                "ENCFS_TEST_PATIENCE": str(patience),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.sidecars.append(sidecar)
        return sidecar

    def serve(self, **configuration: object) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A sidecar that serves, and its status."""
        sidecar = self.start(**configuration)
        assert sidecar.stdout is not None
        status = json.loads(sidecar.stdout.readline())
        assert "error" not in status, status
        return sidecar, status

    def refusal(self, patience: float = 30.0, **configuration: object) -> dict[str, Any]:
        """The error of a sidecar that does not come to serve, in bounded time."""
        sidecar = self.start(patience, **configuration)
        output, said = sidecar.communicate(timeout=patience + 120)
        assert output, said
        answer: dict[str, Any] = json.loads(output)
        assert answer["exit_code"] == sidecar.returncode != INTERNAL_ERROR_EXIT_CODE, said
        return answer["error"] | {"exit_code": sidecar.returncode}

    def read(self) -> bytes:
        """By a process that can be given up."""
        return subprocess.run(["cat", self.weights], capture_output=True, check=True, timeout=120).stdout

    def kill(self) -> None:
        """All sidecars, as if the memory had run out."""
        for sidecar in self.sidecars:
            sidecar.kill()

    def end(self) -> None:
        self.kill()
        for sidecar in self.sidecars:
            sidecar.communicate()
        detach_all(self.target)


class Node:
    """`encfs csi-node`, and kubelet's calls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "plugin.log"
        self.endpoint = directory / "csi.sock"
        (directory / "kubelet" / "pods").mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(Path(sys.executable).parent / "encfs", "csi-node", "--endpoint", f"unix:{self.endpoint}"),
                    *("--node-id", "node-1", "--kubelet-dir", self.directory / "kubelet"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        assert b"serving CSI" in self.process.stdout.readline()
        self.channel = grpc.insecure_channel(f"unix:{self.endpoint}")

    def end(self, *, kill: bool = False) -> None:
        self.channel.close()
        (self.process.kill if kill else self.process.terminate)()
        self.process.communicate(timeout=60)

    def call(self, method: str, **members: Any) -> Any:
        service = "Identity" if method in {"GetPluginInfo", "Probe", "GetPluginCapabilities"} else "Node"
        stub = self.channel.unary_unary(
            f"/csi.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(csi, f"{method}Response").FromString,
        )
        return stub(getattr(csi, f"{method}Request")(**members), timeout=120, wait_for_ready=True)

    def publish(self, pod: Pod, *, volume: str = "", target: Path | None = None, **attributes: str) -> None:
        context = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": pod.uid, **attributes}
        self.call(
            "NodePublishVolume",
            volume_id=volume or f"csi-{pod.uid}",
            target_path=str(target or pod.target),
            volume_capability=csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume()),
            volume_context=context,
        )

    def unpublish(self, pod: Pod) -> None:
        self.call("NodeUnpublishVolume", volume_id=f"csi-{pod.uid}", target_path=str(pod.target))

    def condition(self, pod: Pod) -> tuple[bool, str]:
        """Whether the volume is abnormal, and what is said of it."""
        found = self.call("NodeGetVolumeStats", volume_id=f"csi-{pod.uid}", volume_path=str(pod.target))
        return found.volume_condition.abnormal, found.volume_condition.message


class LyingNode:
    """Root at the place where a plugin would be, with a FUSE mount of its own, and no intention to keep to anything."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        pod.target.mkdir(parents=True)
        pod.socket.parent.mkdir(parents=True)
        self.keeper = Keeper.begin(open_mounted(str(pod.target), MountOptions(allow_other=True)), str(pod.target))
        self.server = socket.socket(socket.AF_UNIX)
        with short_path(pod.socket) as address:
            self.server.bind(address)
            os.chmod(address, 0o666)  # noqa: S103 - the sidecar is another user
        self.server.listen()
        self.server.settimeout(120)

    def end(self) -> None:
        self.server.close()
        self.keeper.close()
        detach_all(self.pod.target)

    def hand_over(self, document: Mapping[str, object] | bytes, *descriptors: int) -> socket.socket:
        """To the next sidecar: just this message, and these descriptors."""
        channel, _ = self.server.accept()
        line = document if isinstance(document, bytes) else json.dumps(document).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        channel.sendmsg([line], rights)
        return channel

    def message(self, **more: object) -> dict[str, object]:
        """What the keeper would say of its connection, with changes."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.keeper.hand_over(ours)
            document: dict[str, object] = json.loads(theirs.recv(1 << 16))
        return document | more


# Fixtures of the modules that import them


@pytest.fixture(scope="module")
def artifacts() -> Iterator[Artifacts]:
    with open_directory() as base:
        yield make_artifacts(base / "artifacts")


@pytest.fixture(scope="module")
def node(artifacts: Artifacts) -> Iterator[Node]:
    node = Node(artifacts.base.parent)
    yield node
    node.end()


@pytest.fixture
def pod(node: Node, artifacts: Artifacts) -> Iterator[Pod]:
    pod = Pod(node.directory, artifacts)
    yield pod
    pod.end()


@pytest.fixture
def liar(pod: Pod) -> Iterator[LyingNode]:
    liar = LyingNode(pod)
    yield liar
    liar.end()
