"""What commands print that tell of an artifact, or of every artifact of an image index."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from encfs.console.commandparts import RegistryOptions, opened_source, wanted_platform
from encfs.console.terminal import Terminal

if TYPE_CHECKING:
    from encfs.artifact import LoadedArtifact
    from encfs.image.manifest import Platform
    from encfs.oci.blobs import RawManifest


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of one artifact: members of the JSON object, and lines; `platform` as an index says it."""

    platform: Platform | None
    members: dict[str, object]
    lines: list[str]


def tell_of_public(
    terminal: Terminal,
    reference: str,
    platform: str | None,
    registry: RegistryOptions,
    describe: Callable[[LoadedArtifact], tuple[dict[str, object], list[str]]],
) -> None:
    """Print what `describe` makes of an artifact's public documents: members of the JSON object, and lines."""
    from encfs.artifact import load_artifact
    from encfs.image.artifact import for_each_artifact

    with opened_source(reference, registry) as source:

        def told(manifest: RawManifest, listed: Platform | None) -> Told:
            return Told(listed, *describe(load_artifact(source, manifest)))

        document = source.document()
        found = for_each_artifact(source, document, told, wanted_platform(platform))
        tell(terminal, reference, document, platform, found)


def tell(terminal: Terminal, reference: str, document: RawManifest, platform: str | None, told: Iterable[Told]) -> None:
    """Print one artifact as it is, and those of an index as a list, unless `--platform` chose one.

    Of an index they are printed as they come: a failure in the middle leaves a JSON array unfinished.
    """
    from encfs.image.manifest import INDEX_TYPES

    if document.media_type not in INDEX_TYPES or platform is not None:
        (one,) = told
        terminal.result({"reference": reference, **one.members}, one.lines)
        return
    remaining = iter(told)
    # What is no index of artifacts shows by its first entry: nothing was printed then.
    found = itertools.chain([next(remaining)], remaining)
    terminal.line(f"{reference}: image index {document.digest}")
    if terminal.settings.json:
        head = {"reference": reference, "index_digest": document.digest}
        terminal.stream(head, "manifests", (({"platform": _name(one), **one.members}, "") for one in found))
        return
    for one in found:
        for line in ("", f"platform        {_name(one) or 'not stated'}", *one.lines):
            terminal.line(line)


def _name(one: Told) -> str | None:
    return None if one.platform is None else str(one.platform)
