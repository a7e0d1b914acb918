"""Give a container image back from an artifact: its config's exact bytes, its layers' exact tar archives.

Each archive is put together from its layer's volume and its auxiliary one (`imagetool.tar.recipe`), and counts only
when it has its diff ID. The manifest is a new one: how the layers were compressed is not recorded.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import zstandard

from encfs.artifact import Artifact
from encfs.errors import EncfsError, FormatError, IntegrityError, UnsupportedError
from encfs.format.volume import VolumeReader
from encfs.image.artifact import AUXILIARY_PREFIX, LAYER_PREFIX
from encfs.image.compression import Compression
from encfs.image.config import ImageConfig, parse_image_config
from encfs.image.manifest import CONFIG_TYPE, MANIFEST_TYPE
from encfs.oci.blobs import BlobTarget, BlobWriter, Descriptor
from encfs.progress import Progress
from imagetool.pipeline.publish import TrackedSink
from imagetool.tar.recipe import Recipe

_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_WINDOW = 1 << 20
_AHEAD = 4
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class RestoredImage:
    """What was written. `size` is that of the plain archives, `stored_size` of all blobs (bytes)."""

    manifest: Descriptor
    config: ImageConfig
    layers: int
    size: int
    stored_size: int
    seconds: float


def check_restorable(artifact: Artifact) -> None:
    """Before anything is made for it. Raises: as `restore_image`, where the artifact has not what an image needs."""
    _image(artifact)


def restore_image(
    artifact: Artifact,
    sink: BlobTarget,
    *,
    compression: Compression = Compression.GZIP,
    tag: str | None,
    progress: Progress,
) -> RestoredImage:
    """Write the image that was encrypted; all volumes must be open. The tag is moved last.

    Raises: UnsupportedError where the artifact is no image, or one whose layers were made into one; IntegrityError,
    FormatError, what the stores raise.
    """
    started = time.monotonic()
    content, config, pairs = _image(artifact)
    progress.begin("decrypt", sum(layer.size for layer, _ in pairs.values()))
    tracked = TrackedSink(sink)
    size = 0
    try:
        layers: dict[str, Descriptor] = {}
        for diff_id, (layer, auxiliary) in pairs.items():
            layers[diff_id], plain_size = _restore_layer(layer, auxiliary, diff_id, tracked, compression, progress)
            size += plain_size
        written = tracked.write_blob(content, CONFIG_TYPE)
        document = _manifest(written, [layers[diff_id] for diff_id in config.diff_ids])
        manifest = tracked.put_manifest(document, MANIFEST_TYPE, tag=tag)
    except BaseException:
        tracked.take_back()
        raise
    finally:
        progress.end()
    stored_size = written.size + manifest.size + sum(layer.size for layer in layers.values())
    return RestoredImage(manifest, config, len(config.diff_ids), size, stored_size, time.monotonic() - started)


def _image(artifact: Artifact) -> tuple[bytes, ImageConfig, dict[str, tuple[VolumeReader, VolumeReader]]]:
    """The config, as it was and parsed, and the two volumes of each layer by its diff ID."""
    content = artifact.payload.image_config
    if content is None:
        raise UnsupportedError("the artifact is no container image", hint="decrypt it to a directory")
    config = parse_image_config(content)
    volumes = _volumes(artifact)
    pairs = {
        diff_id: (_named(volumes, LAYER_PREFIX + diff_id), _named(volumes, AUXILIARY_PREFIX + diff_id))
        for diff_id in config.diff_ids
    }
    return content, config, pairs


def _volumes(artifact: Artifact) -> dict[str, VolumeReader]:
    names = [artifact.payload.volume(volume_id).name for volume_id in artifact.volume_ids]
    if len(set(names)) != len(names):
        raise FormatError("the artifact has two volumes of one name")
    return dict(zip(names, artifact.volumes, strict=True))


def _named(volumes: dict[str, VolumeReader], name: str) -> VolumeReader:
    if name not in volumes:
        raise UnsupportedError(
            "the artifact does not have the image's layers one by one",
            hint="decrypt it to a directory: it was encrypted with --flatten, or by something else",
        )
    return volumes[name]


def _restore_layer(
    layer: VolumeReader,
    auxiliary: VolumeReader,
    diff_id: str,
    sink: TrackedSink,
    compression: Compression,
    progress: Progress,
) -> tuple[Descriptor, int]:
    digest = hashlib.sha256()
    size = 0
    writer = sink.create_blob()
    try:
        with closing(_Windows(layer)) as windows:
            output = _Output(writer, compression)
            for piece in Recipe(auxiliary).archive(windows.read):
                digest.update(piece)
                size += len(piece)
                output.write(piece)
                progress.advance(len(piece))
            output.finish()
        # Before the blob becomes visible.
        if f"sha256:{digest.hexdigest()}" != diff_id:
            raise IntegrityError(
                "its archive cannot be put together again: another diff ID comes out",
                hint="the artifact was not made as it should have been; ask its owner for another one",
            )
        media_type = f"{_LAYER_TYPE}+{compression.value}" if compression.value else _LAYER_TYPE
        return writer.commit(media_type), size
    except EncfsError as error:
        raise type(error)(f"layer {diff_id}: {error.message}", hint=error.hint) from error
    finally:
        writer.abort()


class _Windows:
    """A volume read from front to back in whole windows, the next ones ahead of time. Close it."""

    def __init__(self, volume: VolumeReader) -> None:
        self._volume = volume
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="decrypt")
        self._windows: dict[int, Future[memoryview]] = {}

    def read(self, offset: int, size: int) -> Iterator[memoryview]:
        """Raises: FormatError where that is beyond the volume; what the volume raises."""
        if offset + size > self._volume.size:
            raise FormatError("the artifact's record of the archive leads beyond the layer's volume")
        end = offset + size
        while offset < end:
            index, start = divmod(offset, _WINDOW)
            piece = self._window(index)[start : start + end - offset]
            offset += len(piece)
            yield piece

    def _window(self, index: int) -> memoryview:
        for old in [known for known in self._windows if not index <= known < index + _AHEAD]:
            self._windows.pop(old).cancel()
        for wanted in range(index, index + _AHEAD):
            if wanted not in self._windows and wanted * _WINDOW < self._volume.size:
                self._windows[wanted] = self._pool.submit(self._read_window, wanted)
        return self._windows[index].result()

    def _read_window(self, index: int) -> memoryview:
        offset = index * _WINDOW
        buffer = memoryview(bytearray(min(_WINDOW, self._volume.size - offset)))
        self._volume.read_into(offset, buffer)
        return buffer

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Compressor(Protocol):
    def compress(self, data: bytes | memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Output:
    """A blob that is compressed on its way. The same input gives the same bytes."""

    def __init__(self, writer: BlobWriter, compression: Compression) -> None:
        self._writer = writer
        self._compressor: _Compressor | None = None
        if compression is Compression.GZIP:
            self._compressor = zlib.compressobj(_GZIP_LEVEL, wbits=16 + zlib.MAX_WBITS)
        elif compression is Compression.ZSTD:
            self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()

    def write(self, data: bytes | memoryview) -> None:
        packed = data if self._compressor is None else self._compressor.compress(data)
        if packed:
            self._writer.write(packed)

    def finish(self) -> None:
        if self._compressor is not None:
            self._writer.write(self._compressor.flush())


def _manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    def described(blob: Descriptor) -> dict[str, object]:
        return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}

    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": described(config),
        "layers": [described(layer) for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()
