"""What the commands share that write a new manifest for an artifact: which tag moves, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encfs.console.commandparts import RegistryOptions
from encfs.console.terminal import Terminal
from encfs.errors import UsageError

if TYPE_CHECKING:
    from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor


@dataclass(frozen=True, slots=True)
class Edited:
    """An artifact's store for reading and writing, and the tag that is to name the new manifest (None: none does)."""

    reference: str
    source: BlobSource
    sink: BlobTarget
    tag: str | None


@contextmanager
def edited(reference: str, registry: RegistryOptions) -> Iterator[Edited]:
    """Open an artifact to change what surrounds its content.

    Without a tag in the reference it is the only tag of the layout that moves, or `latest` in a registry.

    Raises: UsageError, what the store raises.
    """
    from encfs.oci.layout import Layout
    from encfs.oci.reference import DEFAULT_TAG, parse_reference

    parsed = parse_reference(reference)
    if parsed.transport == "docker":
        from encfs.oci.registry import Registry

        with closing(Registry(parsed, registry.store())) as remote:
            tag = parsed.tag if parsed.tag is not None or parsed.digest is not None else DEFAULT_TAG
            yield Edited(reference, remote, remote, tag)
        return
    if parsed.transport != "oci":
        raise UsageError(
            f"{reference} is neither a layout nor in a registry",
            hint="write oci:PATH:TAG or docker://HOST/REPOSITORY:TAG; an archive is copied to a layout first",
        )
    with closing(Layout(parsed.path, tag=parsed.tag, digest=parsed.digest)) as layout:
        tag = parsed.tag
        if tag is None and parsed.digest is None:
            tags = layout.tags()
            if len(tags) != 1:
                raise UsageError(f"{reference} does not say which tag is to move", hint="write oci:PATH:TAG")
            (tag,) = tags
            layout.document()
        yield Edited(reference, layout, layout, tag)


def report(terminal: Terminal, artifact: Edited, manifest: Descriptor, done: str) -> None:
    """Say what the new manifest is and where it is found."""
    where = f"tag {artifact.tag} moved" if artifact.tag is not None else "no tag names it"
    terminal.result(
        {"reference": artifact.reference, "tag": artifact.tag, "manifest_digest": manifest.digest},
        [f"{artifact.reference}: {done}; {where}", f"manifest        {manifest.digest}"],
    )
