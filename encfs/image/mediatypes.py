"""Media types of image layers: which are known, how they are compressed, and what Docker's are called in OCI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from encfs.image.compression import Compression

_OCI = "application/vnd.oci.image.layer.v1.tar"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"


@dataclass(frozen=True, slots=True)
class LayerType:
    """A layer that is a tar archive: its media type in OCI's words, and its compression."""

    oci: str
    compression: Compression


def _types() -> Mapping[str, LayerType]:
    types: dict[str, LayerType] = {}
    for compression in Compression:
        for base, docker in ((_OCI, _DOCKER), (_OCI_FOREIGN, _DOCKER_FOREIGN)):
            layer = LayerType(f"{base}+{compression.value}" if compression.value else base, compression)
            types[layer.oci] = layer
            types[f"{docker}.{compression.value}" if compression.value else docker] = layer
    return types


#: By media type, OCI's and Docker's.
LAYER_TYPES: Mapping[str, LayerType] = _types()
