"""The CSI services of the node plugin (Identity, Node), for ephemeral inline volumes, over a unix socket.

It mounts /dev/fuse at the target and hands the descriptor over; it sees ciphertext nowhere, and no key. Not here: what
becomes of a volume then (`volume`).
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc

from encfs.csi import csi_pb2 as csi
from encfs.csi.records import Records, VolumeRecord
from encfs.csi.volume import Volume
from encfs.errors import EncfsError, MountError, UsageError
from encfs.mount.mountpoint import top_mount, unmount_stack
from encfs.sidecar import check_attributes

NAME = "encfs.csi"
_WORKERS = 8
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)
_POD = "csi.storage.k8s.io/pod.uid"
_EPHEMERAL = "csi.storage.k8s.io/ephemeral"

_RPC = csi.NodeServiceCapability.RPC
_CAPABILITIES = csi.NodeGetCapabilitiesResponse(
    capabilities=[
        csi.NodeServiceCapability(rpc=_RPC(type=kind)) for kind in (_RPC.GET_VOLUME_STATS, _RPC.VOLUME_CONDITION)
    ]
)

log = logging.getLogger("encfs.csi")


class Node:
    """The published volumes of this node. Thread-safe."""

    def __init__(self, node_id: str, kubelet: Path, daemon_user: int, state: Path) -> None:
        """`state` is where the volumes are written down, and those of a plugin before this one are found.

        Raises: StorageError.
        """
        self._node_id = node_id
        self._kubelet = kubelet
        self._user = daemon_user
        self._lock = threading.Lock()
        self._records = Records(state)
        self._volumes: dict[str, Volume] = {}
        for record in self._records.load():
            self._restore(record)

    def _restore(self, record: VolumeRecord) -> None:
        """Go on with a volume of a plugin before this one; forget it where it is not mounted any more (a reboot)."""
        try:
            handover = self._handover(record)
            mine = top_mount(record.target)
            if mine is None or not mine.is_ours:
                log.info("%s: published before, and not mounted any more: kubelet publishes it again", record.target)
                self._records.remove(record.volume_id)
            else:
                self._volumes[record.volume_id] = Volume.restore(record, handover, self._user, self._records.save)
                log.info("%s: published before, and taken up", record.target)
        except (EncfsError, OSError) as error:
            log.error("%s: cannot be taken up: %s", record.target, error)  # noqa: TRY400 - foreseen

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """What to add to a gRPC server."""
        identity = {
            "GetPluginInfo": (lambda *_: csi.GetPluginInfoResponse(name=NAME, vendor_version=version("encfs"))),
            "GetPluginCapabilities": (lambda *_: csi.GetPluginCapabilitiesResponse()),
            "Probe": (lambda *_: csi.ProbeResponse(ready={"value": True})),
        }
        node = {
            "NodePublishVolume": self._publish,
            "NodeUnpublishVolume": self._unpublish,
            "NodeGetCapabilities": (lambda *_: _CAPABILITIES),
            "NodeGetVolumeStats": self._describe,
            "NodeGetInfo": (lambda *_: csi.NodeGetInfoResponse(node_id=self._node_id)),
        }
        return (_service("csi.v1.Identity", identity), _service("csi.v1.Node", node))

    def _publish(self, request: Any, context: grpc.ServicerContext) -> Any:
        capability = request.volume_capability
        if not request.volume_id or not request.target_path or not request.HasField("volume_capability"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume id, target path and capability are needed")
        if capability.WhichOneof("access_type") == "block":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there are no block volumes")
        record = VolumeRecord(request.volume_id, os.path.abspath(request.target_path), dict(request.volume_context))
        target = record.target
        try:
            handover = self._handover(record)
        except UsageError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        with self._lock:
            found = self._volumes.get(record.volume_id)
            if found is not None and (found.target, found.record.attributes) == (target, record.attributes):
                if not found.has_ended:
                    return csi.NodePublishVolumeResponse()
            elif found is not None or any(one.target == target for one in self._volumes.values()):
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "the volume or its path is published differently")
            try:
                if found is not None:
                    found.close()
                    del self._volumes[record.volume_id]
                begin = Volume.restore
                if not _is_left(target):
                    # What is mounted may be dead, or wait for a daemon: nothing is asked of it.
                    os.makedirs(target, exist_ok=True)
                    begin = Volume.publish
                self._records.save(record)
                self._volumes[record.volume_id] = begin(record, handover, self._user, self._records.save)
            except (EncfsError, OSError) as error:
                self._records.remove(record.volume_id)
                context.abort(grpc.StatusCode.INTERNAL, str(error))
        log.info("%s: published for pod %s", target, record.attributes[_POD])
        return csi.NodePublishVolumeResponse()

    def _handover(self, record: VolumeRecord) -> Path:
        """Where the daemon of a volume fetches its descriptor. Raises: UsageError for what is no volume of a pod."""
        attributes = record.attributes
        if attributes.get(_EPHEMERAL) != "true" or not _NAME.fullmatch(attributes.get(_POD, "")):
            raise UsageError("only inline volumes of pods (podInfoOnMount) are served")
        place = check_attributes(attributes).get("socketVolume", "encfs")
        if not _NAME.fullmatch(place):
            raise UsageError("socketVolume is no name of a volume")
        pod = self._kubelet / "pods" / attributes[_POD]
        if not record.target.startswith(f"{pod}/"):
            raise UsageError(f"{record.target} is not in the directory of the pod")
        return pod / "volumes" / "kubernetes.io~empty-dir" / place / "encfs.sock"

    def _unpublish(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not request.volume_id or not request.target_path:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume id and target path are needed")
        target = os.path.abspath(request.target_path)
        with self._lock:
            volume = self._volumes.get(request.volume_id)
            try:
                if volume is not None and volume.target == target:
                    volume.close()
                    del self._volumes[request.volume_id]
                    self._records.remove(request.volume_id)
                else:
                    # Of a plugin before this one that has left no record.
                    unmount_stack(target)
            except EncfsError as error:
                context.abort(grpc.StatusCode.INTERNAL, str(error))
            try:
                os.rmdir(target)
            except FileNotFoundError:
                return csi.NodeUnpublishVolumeResponse()
            except OSError as error:
                context.abort(grpc.StatusCode.INTERNAL, f"{target} cannot be removed: {error.strerror}")
        log.info("%s: unpublished", target)
        return csi.NodeUnpublishVolumeResponse()

    def _describe(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The condition of a volume, as the events of its pod show it. Its files are not touched: they may hang."""
        if not request.volume_id or not request.volume_path:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume id and volume path are needed")
        with self._lock:
            volume = self._volumes.get(request.volume_id)
        if volume is None or volume.target != os.path.abspath(request.volume_path):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such volume is published there by this plugin")
            raise AssertionError  # abort has raised
        condition = volume.condition
        return csi.NodeGetVolumeStatsResponse(
            usage=[csi.VolumeUsage(unit=csi.VolumeUsage.BYTES, total=volume.record.size, used=volume.record.size)],
            volume_condition=csi.VolumeCondition(abnormal=volume.is_abnormal, message=condition),
        )


def _is_left(target: str) -> bool:
    """Whether a mount of a plugin before this one is there, of which it left no record.

    Raises: MountError for somebody else's.
    """
    mine = top_mount(target)
    if mine is not None and not mine.is_ours:
        raise MountError(f"something else is mounted at {target} already ({mine.filesystem_type})")
    return mine is not None


def _service(name: str, methods: Mapping[str, Callable[[Any, grpc.ServicerContext], Any]]) -> grpc.GenericRpcHandler:
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            function,
            request_deserializer=getattr(csi, f"{method}Request").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for method, function in methods.items()
    }
    return grpc.method_handlers_generic_handler(name, handlers)


def endpoint_path(endpoint: str) -> Path:
    """The socket that `unix:PATH` stands for. Raises: UsageError."""
    path = endpoint.removeprefix("unix:")
    if path == endpoint or not path:
        raise UsageError(f"the plugin listens at a unix socket, not at {endpoint!r}", hint="write unix:PATH")
    return Path(path)


def start(node: Node, path: Path) -> grpc.Server:
    """A server at this socket, started. Raises: UsageError."""
    if path.is_socket():
        path.unlink()
    server = grpc.server(ThreadPoolExecutor(_WORKERS), handlers=node.handlers())
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise UsageError(f"cannot listen at {path}: {error}") from None
    server.start()
    return server
