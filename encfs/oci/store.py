"""Which store serves a reference: the one place that knows all transports. Not here: the stores themselves."""

from __future__ import annotations

from encfs.errors import UnsupportedError, UsageError
from encfs.oci.layout import Layout
from encfs.oci.reference import Reference


def open_source(reference: Reference) -> Layout:
    """The store to read a reference from. Raises: UsageError, UnsupportedError, what opening the store raises."""
    if reference.transport == "oci":
        return Layout(reference.path, tag=reference.tag, digest=reference.digest)
    raise _unfit(reference)


def open_sink(reference: Reference) -> Layout:
    """The store to write to under a reference; a layout is created if need be. Raises: as `open_source`."""
    if reference.digest is not None:
        raise UsageError(f"{reference}: a digest cannot be written to", hint="name a tag")
    if reference.transport == "oci":
        return Layout(reference.path, tag=reference.tag, create=True)
    raise _unfit(reference)


def _unfit(reference: Reference) -> UsageError | UnsupportedError:
    if reference.transport == "path":
        return UsageError(f"{reference} names no artifact", hint=f"write oci:{reference} for an OCI layout")
    return UnsupportedError(f"{reference}: this transport is not supported here", hint="use oci:PATH:TAG")
