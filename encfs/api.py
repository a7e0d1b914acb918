"""What `encfs.open` gives: an accepted artifact with its files. Not here: the rules of opening (`encfs.artifact`)."""

from __future__ import annotations

import _thread
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from encfs.artifact import Artifact as OpenedArtifact
from encfs.artifact import open_artifact, opened_anew
from encfs.browse import open_image
from encfs.erofs.tree import Tree
from encfs.errors import PinError
from encfs.extract import ExtractResult
from encfs.files import AnyPath, Entry, File, Files
from encfs.format.plaintext import Volume
from encfs.image.artifact import Served, check_image_platform, choose_manifest, choose_served, is_needed, this_platform
from encfs.image.manifest import parse_platform
from encfs.keys.files import load_trusted_key
from encfs.keys.providers import provider_from_uri
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_source
from encfs.progress import Progress
from encfs.trust import Origin, TrustPolicy

AnyFile = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Opening:
    """What `encfs.open` was called with, which documents it. No secret is in it: keys are named by URI."""

    ref: str
    key: str | Sequence[str]
    pin: str | None
    trust: AnyFile | Sequence[AnyFile]
    artifact_id: str | None
    min_version: int | None
    allow_unsigned: bool
    platform: str | None
    store: StoreOptions | None
    threads: int | None


class Artifact:
    """An accepted artifact. Thread-safe, read-only; close it, or use it as a context manager.

    It may be used by processes that are forked from this one: what each of them reads with is opened anew there, from
    the same place, without asking for a key. A pickled one is opened by its reference again, in another process by the
    same rules and options, and must have the same content.

    Attributes: `content_digest` (`sha256:<hex>`, its identity), `id` and `version` of the release, `origin`: what was
    proven about where it comes from.
    """

    def __init__(self, opened: OpenedArtifact, opening: Opening) -> None:
        """Takes `opened` over. Raises: UnsupportedError, FormatError; `opened` is closed then."""
        self._opened = opened
        self._opening = opening
        try:
            image = open_image(opened)
            self.files = Files(image.volume, image.tree, threads=opening.threads, after_fork=self._open_again)
        except BaseException:
            opened.close()
            raise
        self.content_digest: str = opened.content_digest
        self.id: str = opened.content.id
        self.version: int = opened.content.version
        self.origin: Origin = opened.origin

    def list(self, path: AnyPath = "", *, recursive: bool = False) -> Iterator[Entry]:
        """What is in a directory, sorted; with `recursive` everything below it. Raises: as `Files.list`."""
        return self.files.list(path, recursive=recursive)

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> Entry:
        """What stands at a path. Raises: NotFoundError and others, as `Files.stat`."""
        return self.files.stat(path, follow_symlinks=follow_symlinks)

    def exists(self, path: AnyPath) -> bool:
        """Whether something stands at a path, symbolic links followed."""
        return self.files.exists(path)

    def open(self, path: AnyPath, *, buffering: int = 1 << 20) -> io.BufferedReader:
        """A regular file as a seekable binary file. Raises: as `Files.open`."""
        return self.files.open(path, buffering=buffering)

    def open_raw(self, path: AnyPath) -> File:
        """The same without a buffer."""
        return self.files.open_raw(path)

    def read(self, path: AnyPath, offset: int = 0, size: int | None = None) -> bytes:
        """A range of a regular file; all of it by default. Raises: as `Files.read`."""
        return self.files.read(path, offset, size)

    def read_into(self, path: AnyPath, offset: int, buffer: bytearray | memoryview) -> int:
        """Decrypt a range straight into `buffer`, on several threads; wiped on failure. Raises: as `Files.read`."""
        return self.files.read_into(path, offset, buffer)

    def extract(self, directory: AnyFile, progress: Progress | None = None) -> ExtractResult:
        """Write the whole tree to a new or empty directory. Raises: as `Files.extract`."""
        return self.files.extract(directory, progress)

    def close(self) -> None:
        """End the threads, forget cached plaintext, close the store. Files that are open read no further."""
        _close(self.files, self._opened)

    def __del__(self) -> None:
        """One that was not closed is closed when nobody has it any more.

        In a thread of its own, since the garbage collector may run in the middle of anything, with any lock held; and
        one that `threading`, which has locks as well, does not start.
        """
        files = getattr(self, "files", None)
        if files is not None and not files.closed:
            with suppress(RuntimeError):  # at the interpreter's end, when everything goes
                _thread.start_new_thread(_close_in_thread, (files, self._opened))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _open_same, (self._opening, Served(self.content_digest, self._opened.manifest_digest))

    def _open_again(self) -> tuple[Volume, Tree]:
        """In a forked process: the same from a store of its own, since connections and locks are the parent's."""
        opened = opened_anew(self._opened, open_source(parse_reference(self._opening.ref), self._opening.store))
        try:
            image = open_image(opened)
        except BaseException:
            opened.close()
            raise
        self._opened = opened
        return image.volume, image.tree

    def __repr__(self) -> str:
        return f"<encfs.Artifact {self.id!r} version {self.version} {self.content_digest}>"


def _close(files: Files, opened: OpenedArtifact) -> None:
    # What the parent of a fork has open is the parent's to close.
    if files.close():
        opened.close()


def _close_in_thread(files: Files, opened: OpenedArtifact) -> None:
    # In one that `threading` knows: it keeps a record for ever of any other that joins threads.
    threading.Thread(target=_close, args=(files, opened), name="encfs-close", daemon=True).start()


def open_artifact_by_reference(opening: Opening, served: Served | None = None) -> Artifact:
    """`encfs.open`, which documents it. With `served`, this content, whatever the reference names by now."""
    policy = TrustPolicy(
        pin=opening.pin,
        keys=tuple(load_trusted_key(path) for path in _listed(opening.trust)),
        artifact_id=opening.artifact_id,
        min_version=opening.min_version,
        allow_unsigned=opening.allow_unsigned,
    )
    reference = parse_reference(opening.ref)
    platform = opening.platform
    with ExitStack() as stack:
        # Closed at the end: what they unwrapped is in the artifact then, and their own secrets are of no further use.
        providers = [stack.enter_context(closing(provider_from_uri(str(uri)))) for uri in _listed(opening.key)]
        wanted = this_platform() if platform is None else parse_platform(platform)
        source = open_source(reference, opening.store)
        try:
            if served is None:
                document = source.document()
                manifest = choose_manifest(source, document, wanted)
                by_platform = manifest is not document
            else:
                manifest, _ = choose_served(source, wanted, served)
                by_platform = False
        except BaseException:
            source.close()
            raise
        opened = open_artifact(
            source, keys=providers, trust=policy, label=opening.ref, wanted=is_needed, manifest=manifest
        )
    try:
        # An index is signed by nobody: what it says of platforms has to be what the image says.
        if platform is not None or by_platform:
            check_image_platform(opened, wanted)
    except BaseException:
        opened.close()
        raise
    return Artifact(opened, opening)


def _open_same(opening: Opening, served: Served) -> Artifact:
    """What a pickled artifact becomes. Raises: as `encfs.open`; PinError where it would be other content."""
    artifact = open_artifact_by_reference(opening, served)
    if artifact.content_digest != served.content_digest:
        artifact.close()
        raise PinError(f"{opening.ref} is {artifact.content_digest}, and {served.content_digest} was pickled")
    return artifact


def _listed(given: AnyFile | Sequence[AnyFile]) -> Sequence[AnyFile]:
    return [given] if isinstance(given, str | os.PathLike) else given
