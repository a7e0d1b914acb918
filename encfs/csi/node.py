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
from encfs.csi.volume import Volume
from encfs.errors import EncfsError, MountError, UsageError
from encfs.mount.mountpoint import is_dead, top_mount, unmount, unmount_for_all
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

    def __init__(self, node_id: str, kubelet: Path, daemon_user: int) -> None:
        self._node_id = node_id
        self._kubelet = kubelet
        self._user = daemon_user
        self._lock = threading.Lock()
        self._volumes: dict[str, Volume] = {}

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
        attributes = dict(request.volume_context)
        if attributes.get(_EPHEMERAL) != "true" or not _NAME.fullmatch(attributes.get(_POD, "")):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "only inline volumes of pods (podInfoOnMount) are served")
        try:
            asked = check_attributes(attributes)
        except UsageError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        place = asked.get("socketVolume", "encfs")
        if not _NAME.fullmatch(place):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "socketVolume is no name of a volume")
        target = os.path.abspath(request.target_path)
        pod = self._kubelet / "pods" / attributes[_POD]
        if not target.startswith(f"{pod}/"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{target} is not in the directory of the pod")
        handover = pod / "volumes" / "kubernetes.io~empty-dir" / place / "encfs.sock"
        with self._lock:
            found = self._volumes.get(request.volume_id)
            if found is not None and (found.target, found.attributes) == (target, attributes):
                return csi.NodePublishVolumeResponse()
            if found is not None or any(one.target == target for one in self._volumes.values()):
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "the volume or its path is published differently")
            try:
                if _is_served(target):
                    log.info("%s: published by a plugin before this one, and served still", target)
                    return csi.NodePublishVolumeResponse()
                os.makedirs(target, exist_ok=True)
                self._volumes[request.volume_id] = Volume(target, handover, attributes, self._user)
            except (EncfsError, OSError) as error:
                context.abort(grpc.StatusCode.INTERNAL, str(error))
        log.info("%s: published for pod %s", target, attributes[_POD])
        return csi.NodePublishVolumeResponse()

    def _unpublish(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not request.volume_id or not request.target_path:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume id and target path are needed")
        target = os.path.abspath(request.target_path)
        with self._lock:
            volume = self._volumes.get(request.volume_id)
            if volume is not None and volume.target == target:
                del self._volumes[request.volume_id]
                volume.close()
            mine = top_mount(target)
            if mine is not None and mine.is_ours:
                # Of a plugin before this one.
                try:
                    unmount_for_all(target)
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
            usage=[csi.VolumeUsage(unit=csi.VolumeUsage.BYTES, total=volume.size, used=volume.size)],
            volume_condition=csi.VolumeCondition(abnormal=volume.is_abnormal, message=condition),
        )


def _is_served(target: str) -> bool:
    """Whether a volume of a plugin before this one is there, with the daemon that it was handed over to.

    A dead one is cleared away. Raises: MountError for what is somebody else's, and where that fails.
    """
    mine = top_mount(target)
    if mine is None:
        return False
    if not mine.is_ours:
        raise MountError(f"something else is mounted at {target} already ({mine.filesystem_type})")
    if not is_dead(target):
        return True
    unmount(target, lazy=True)
    return False


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


def start(node: Node, address: str) -> grpc.Server:
    """A server at `unix:PATH`, started. Raises: UsageError."""
    if not address.startswith("unix:"):
        raise UsageError(f"the plugin listens at a unix socket, not at {address!r}", hint="write unix:PATH")
    path = Path(address.removeprefix("unix:"))
    if path.is_socket():
        path.unlink()
    server = grpc.server(ThreadPoolExecutor(_WORKERS), handlers=node.handlers())
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise UsageError(f"cannot listen at {address}: {error}") from None
    server.start()
    return server
