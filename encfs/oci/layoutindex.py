"""The index of an OCI image layout: which manifests are in it, under which tags; changed in one step under a lock.

Everything read is untrusted. Not here: the blobs (`layout`), other image indexes (`encfs.image.manifest`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from encfs.encoding import parse_digest
from encfs.errors import FormatError, NotFoundError, StorageError, UsageError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.oci.files import storage_errors
from encfs.oci.layoutdirectory import INDEX_FILE, lock, read_file
from encfs.strictjson import loads_object

_NEW_INDEX_FILE = ".encfs-index.json"
_TAG_ANNOTATION = "org.opencontainers.image.ref.name"
_LISTED_TAGS = 8


class LayoutIndex:
    """The file `index.json` of the layout whose directory is `root`. Thread-safe."""

    def __init__(self, root: int, path: Path) -> None:
        self._root = root
        self._path = path
        self._lock = threading.Lock()

    def entries(self) -> list[Descriptor]:
        """Raises: NotFoundError, FormatError, StorageError."""
        return parse_entries(read_file(self._root, self._path, INDEX_FILE, MAX_MANIFEST_SIZE), self._path)

    def add(self, manifest: Descriptor, tag: str | None) -> None:
        """List a manifest; the tag names it, and no other one any more.

        Raises: FormatError, ConflictError, StorageError.
        """
        entry: dict[str, object] = {
            "mediaType": manifest.media_type,
            "digest": manifest.digest,
            "size": manifest.size,
        }
        if manifest.artifact_type:
            entry["artifactType"] = manifest.artifact_type
        if tag:
            entry["annotations"] = {_TAG_ANNOTATION: tag}
        with self._changed() as entries:
            if tag:
                entries[:] = [item for item in entries if not _has_tag(item, tag)]
            if entry not in entries:
                entries.append(entry)

    def untag(self, tag: str) -> None:
        """Raises: NotFoundError; as `add`."""
        with self._changed() as entries:
            kept = [item for item in entries if not _has_tag(item, tag)]
            if len(kept) == len(entries):
                raise NotFoundError(f"{self._path} has no tag {tag!r}")
            entries[:] = kept

    @contextlib.contextmanager
    def _changed(self) -> Iterator[list[object]]:
        """The entries under a lock against other threads and processes; written back if the block ends well."""
        with self._lock:
            lock(self._root, fcntl.LOCK_EX, self._path)
            try:
                index = _parse(read_file(self._root, self._path, INDEX_FILE, MAX_MANIFEST_SIZE), self._path)
                yield _manifests(index, self._path)
                self._write(json.dumps(index, indent=2).encode())
            finally:
                fcntl.flock(self._root, fcntl.LOCK_UN)

    def _write(self, content: bytes) -> None:
        if len(content) > MAX_MANIFEST_SIZE:
            raise StorageError(f"{self._path}/{INDEX_FILE} would be larger than 4 MiB", hint="use another layout")
        with storage_errors(self._path / INDEX_FILE):
            # One temporary name is enough under the lock, and what a crash leaves there is written over.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(_NEW_INDEX_FILE, flags, 0o644, dir_fd=self._root)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(file)
                os.rename(_NEW_INDEX_FILE, INDEX_FILE, src_dir_fd=self._root, dst_dir_fd=self._root)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):  # it may have its new name already
                    os.unlink(_NEW_INDEX_FILE, dir_fd=self._root)
                raise
            os.fsync(self._root)


def parse_entries(content: bytes, where: object) -> list[Descriptor]:
    """What an `index.json` lists; `where` names the layout in messages. Raises: FormatError."""
    return [_parse_entry(item) for item in _manifests(_parse(content, where), where)]


def tags_of(entries: Iterable[Descriptor]) -> list[str]:
    """All tags, sorted."""
    return sorted({entry.annotations[_TAG_ANNOTATION] for entry in entries if _TAG_ANNOTATION in entry.annotations})


def find_entry(entries: Sequence[Descriptor], reference: str | None, where: object) -> Descriptor | None:
    """The entry of a tag or digest, or the only one (None); None where a digest is not listed.

    Raises: NotFoundError; UsageError where the choice is open.
    """
    if reference is not None and reference.startswith("sha256:"):
        return next((entry for entry in entries if entry.digest == reference), None)
    if reference is not None:
        # Where a tag stands twice, the entry written last counts.
        for entry in reversed(entries):
            if entry.annotations.get(_TAG_ANNOTATION) == reference:
                return entry
        raise NotFoundError(f"{where} has no tag {reference!r}", hint=_tags_hint(entries))
    if len({entry.digest for entry in entries}) == 1:
        return entries[0]
    if not entries:
        raise NotFoundError(f"{where} is an empty OCI layout")
    raise UsageError(f"{where} holds several artifacts", hint=_tags_hint(entries))


def _parse(content: bytes, where: object) -> dict[str, object]:
    return loads_object(content, limit=MAX_MANIFEST_SIZE, what=f"{where}/{INDEX_FILE}")


def _manifests(index: Mapping[str, object], where: object) -> list[object]:
    entries = index.get("manifests")
    if not isinstance(entries, list):
        raise FormatError(f"{where}/{INDEX_FILE} has no list of manifests")
    return entries


def _has_tag(item: object, tag: str) -> bool:
    return _parse_entry(item).annotations.get(_TAG_ANNOTATION) == tag


def _tags_hint(entries: Sequence[Descriptor]) -> str:
    tags = tags_of(entries)
    if not tags:
        return "name a manifest by its digest, oci:PATH@sha256:…"
    shown = ", ".join(ascii(tag)[1:-1][:64] for tag in tags[:_LISTED_TAGS])
    return f"name one of its tags: {shown}{', …' if len(tags) > _LISTED_TAGS else ''}"


def _parse_entry(value: object) -> Descriptor:
    """A descriptor of the untrusted index."""
    if not isinstance(value, dict):
        raise FormatError("an entry of the layout's index is not an object")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    annotations = value.get("annotations", {})
    if not isinstance(media_type, str) or not isinstance(annotations, dict):
        raise FormatError("an entry of the layout's index has no media type, or odd annotations")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise FormatError("an entry of the layout's index has no size")
    parse_digest(digest, "a digest of the layout's index")
    strings: Mapping[str, str] = {key: item for key, item in annotations.items() if isinstance(item, str)}
    return Descriptor(media_type, str(digest), size, annotations=strings)
