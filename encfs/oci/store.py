"""Which store serves a reference: the one place that knows all transports. Not here: the stores themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encfs.errors import UnsupportedError, UsageError
from encfs.oci.options import StoreOptions
from encfs.oci.reference import Reference

if TYPE_CHECKING:
    from encfs.oci.blobs import BlobSource, BlobTarget


def open_source(reference: Reference, options: StoreOptions | None = None) -> BlobSource:
    """The store to read a reference from. Raises: UsageError, UnsupportedError, what opening the store raises."""
    # Stores are imported here: a mount of a local layout needs no HTTP, and one from a registry no layout.
    if reference.transport == "oci":
        from encfs.oci.layout import Layout

        return Layout(reference.path, tag=reference.tag, digest=reference.digest)
    if reference.transport == "oci-archive":
        from encfs.oci.layoutarchive import LayoutArchive

        return LayoutArchive(reference.path, tag=reference.tag, digest=reference.digest)
    if reference.transport == "docker":
        from encfs.oci.cached import CachedSource

        return CachedSource(reference, options)
    raise _unfit(reference)


def open_sink(reference: Reference, options: StoreOptions | None = None) -> BlobTarget:
    """The store to write to under a reference; a layout is created if need be, an archive always.

    Raises: as `open_source`; ConflictError where an archive exists.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference}: a digest cannot be written to", hint="name a tag")
    if reference.transport == "oci":
        from encfs.oci.layout import Layout

        return Layout(reference.path, tag=reference.tag, create=True)
    if reference.transport == "oci-archive":
        from encfs.oci.layoutarchive import ArchiveSink

        return ArchiveSink(reference.path)
    if reference.transport == "docker":
        from encfs.oci.registry import Registry

        return Registry(reference, options)
    raise _unfit(reference)


def _unfit(reference: Reference) -> UsageError | UnsupportedError:
    if reference.transport == "path":
        return UsageError(f"{reference} names no artifact", hint=f"write oci:{reference} for an OCI layout")
    return UnsupportedError(
        f"{reference}: this transport is not supported here",
        hint="use oci:PATH:TAG, oci-archive:FILE:TAG or docker://HOST/REPOSITORY:TAG",
    )
