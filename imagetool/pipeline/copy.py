"""Copy an artifact between stores, byte for byte: its manifest keeps its digest."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from encfs.errors import IntegrityError
from encfs.format.descriptor import ARTIFACT_TYPE, parse_manifest
from encfs.oci.blobs import BlobSink, BlobSource, Descriptor
from encfs.progress import Progress

#: Blobs that are copied at the same time.
DEFAULT_CONCURRENCY = 2


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What was copied: blobs that were missing and their bytes, and blobs that were there already."""

    manifest: Descriptor
    copied: int
    copied_size: int
    present: int


def copy_artifact(
    source: BlobSource,
    sink: BlobSink,
    *,
    tag: str | None,
    progress: Progress,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> CopyResult:
    """Copy the artifact that the source's reference names; every blob's size and digest is verified on the way.

    Blobs that the sink has are passed over. The manifest is written, and the tag moved, last.
    Raises: FormatError, UnsupportedError, IntegrityError, what the stores raise.
    """
    manifest = source.manifest()
    parsed = parse_manifest(manifest.content)
    blobs = {item.digest: item for item in (parsed.config, *parsed.blobs)}
    missing = [item for item in blobs.values() if not sink.has_blob(item)]
    size = sum(item.size for item in missing)
    progress.begin("copy", size)
    copier = _Copier(source, sink, progress)
    try:
        with ThreadPoolExecutor(concurrency, thread_name_prefix="copy") as pool:
            tasks = [pool.submit(copier.copy, item) for item in missing]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                copier.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        progress.end()
    written = sink.put_manifest(manifest.content, manifest.media_type, tag=tag, artifact_type=ARTIFACT_TYPE)
    return CopyResult(written, len(missing), size, len(blobs) - len(missing))


class _Copier:
    """Copies single blobs in several threads that report to one progress."""

    def __init__(self, source: BlobSource, sink: BlobSink, progress: Progress) -> None:
        self._source = source
        self._sink = sink
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Have running copies end at their next chunk."""
        self._stopped = True

    def copy(self, blob: Descriptor) -> None:
        writer = self._sink.create_blob()
        try:
            for chunk in self._source.stream_blob(blob):
                if self._stopped:
                    return
                writer.write(chunk)
                with self._lock:
                    self._progress.advance(len(chunk))
            if writer.commit(blob.media_type).digest != blob.digest:
                raise IntegrityError(f"blob {blob.digest} has other content than its digest says")
        finally:
            writer.abort()
