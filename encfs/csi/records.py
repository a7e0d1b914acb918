"""What the node plugin has published, written down for the plugin that comes after it: one small file for a volume.

Neither keys nor descriptors are in it. Kubelet does not publish again what it has published, so that a plugin that is
restarted knows its volumes from here alone. Not here: what becomes of a volume (`volume`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from encfs.encoding import parse_digest
from encfs.errors import FormatError, StorageError
from encfs.strictjson import MAX_INTEGER

_SUFFIX = ".json"
#: Bytes of one record; more than kubelet lets a volume have attributes.
_MAX_SIZE = 1 << 20

log = logging.getLogger("encfs.csi")


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A published volume: where it is mounted, what it was asked for with, and what was served, once something was.

    `size` is in bytes of the images that are served.
    """

    volume_id: str
    target: str
    attributes: Mapping[str, str]
    content_digest: str = ""
    manifest_digest: str = ""
    size: int = 0


class Records:
    """The records in a directory, which only its owner can enter."""

    def __init__(self, directory: Path) -> None:
        """Raises: StorageError."""
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the plugin's state {directory} cannot be made: {error.strerror}") from None

    def load(self) -> list[VolumeRecord]:
        """All that can be read. What cannot is named in the log, and left where it is. Raises: StorageError."""
        found = []
        try:
            paths = sorted(path for path in self._directory.iterdir() if path.suffix == _SUFFIX)
        except OSError as error:
            raise StorageError(f"the plugin's state {self._directory} cannot be read: {error.strerror}") from None
        for path in paths:
            try:
                found.append(_parse(path))
            except (OSError, ValueError, RecursionError, FormatError) as error:
                log.warning("%s is no record of a volume, and is passed over: %s", path, error)
        return found

    def save(self, record: VolumeRecord) -> None:
        """In place of what there was of this volume, whole or not at all. Raises: StorageError."""
        path = self._path(record.volume_id)
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StorageError(f"the plugin's state {path} cannot be written: {error.strerror}") from None

    def remove(self, volume_id: str) -> None:
        """Where there is one."""
        with suppress(FileNotFoundError):
            self._path(volume_id).unlink()

    def _path(self, volume_id: str) -> Path:
        return self._directory / (hashlib.sha256(volume_id.encode()).hexdigest() + _SUFFIX)


def _parse(path: Path) -> VolumeRecord:
    """Raises: OSError, ValueError, FormatError."""
    with path.open("rb") as file:
        content = file.read(_MAX_SIZE + 1)
    if len(content) > _MAX_SIZE:
        raise ValueError("it is too large")
    match json.loads(content):
        case {
            "volume_id": str(volume_id),
            "target": str(target),
            "attributes": dict(attributes),
            "content_digest": str(content_digest),
            "manifest_digest": str(manifest_digest),
            "size": int(size),
        } if all(isinstance(value, str) for value in attributes.values()) and 0 <= size <= MAX_INTEGER:
            for digest in filter(None, (content_digest, manifest_digest)):
                parse_digest(digest)
            return VolumeRecord(volume_id, target, attributes, content_digest, manifest_digest, size)
        case _:
            raise ValueError("a member is missing, or of a wrong kind")
