"""What an opened artifact is made of: the layers of a container image with its config, or one tree of files.

Volume names (they are in the sealed payload): `layer/<diff id>` is a layer with overlayfs's conventions, `rootfs` all
layers made into one, `tar/<diff id>` an auxiliary volume that only going back to the original image needs. Everything
here is behind the commitment of the signed descriptor; an image index is not, and never decides anything: whatever
manifest it names, the decrypted config has to be for the platform that was asked for.
"""

from __future__ import annotations

import platform as machine
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from encfs.artifact import Artifact, content_digest_of
from encfs.errors import EncfsError, FormatError, NotFoundError, UnsupportedError, UsageError
from encfs.format.volume import VolumeReader
from encfs.image.config import ImageConfig, parse_image_config
from encfs.image.manifest import INDEX_TYPES, IndexEntry, Platform, chosen_entries, parse_image_index
from encfs.oci.blobs import BlobSource, RawManifest

LAYER_PREFIX = "layer/"
AUXILIARY_PREFIX = "tar/"
FLAT_NAME = "rootfs"
#: What a reference names that was removed.
_NOTHING = "nothing"

_Result = TypeVar("_Result")

#: Manifests of an index that a message names.
_SHOWN_ENTRIES = 8

#: What uname(2) says, as container images call it. A variant where images for others do not run.
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
}


def this_platform() -> Platform:
    """That of the machine this runs on."""
    name = machine.machine()
    return Platform("linux", *_ARCHITECTURES.get(name, (name, "")))


def choose_manifest(source: BlobSource, document: RawManifest, wanted: Platform) -> RawManifest:
    """`document`, what the source's reference names; where that is an index, the first of it for the platform.

    Raises: UsageError where the index has none; FormatError; UnsupportedError for an index within an index; what the
    source raises.
    """
    if document.media_type not in INDEX_TYPES:
        return document
    index = parse_image_index(document.content, document.media_type)
    return source.manifest(chosen_entries(index, [wanted])[0].descriptor.digest)


def artifact_entries(document: RawManifest, wanted: Platform | None = None) -> list[IndexEntry] | None:
    """The entries of an image index that are artifacts, or the one for a platform; None for what is no index.

    Raises: UsageError where `wanted` is given and there is nothing to choose from, or nothing for it; FormatError;
    UnsupportedError for an index within the index, or one without any artifact.
    """
    if document.media_type not in INDEX_TYPES:
        if wanted is not None:
            raise UsageError(
                "--platform chooses in an image index, and the reference is a single artifact", hint="leave it out"
            )
        return None
    index = parse_image_index(document.content, document.media_type)
    entries = chosen_entries(index, [] if wanted is None else [wanted])
    if any(entry.descriptor.media_type in INDEX_TYPES for entry in entries):
        raise UnsupportedError("the image index has another index in it", hint="name one manifest by its digest")
    if not entries:
        raise UnsupportedError("the image index lists no artifact")
    return entries if wanted is None else entries[:1]


def for_each_artifact(
    source: BlobSource,
    document: RawManifest,
    act: Callable[[RawManifest, Platform | None], _Result],
    wanted: Platform | None = None,
) -> Iterator[_Result]:
    """What `act` makes of the manifest that a reference names, or of each in an image index, in the index's order.

    `act` gets the platform that the index says a manifest is for (None where it says nothing, and without an index). It
    is called as results are asked for, so that one manifest is in memory at a time. A failure says whose it is.
    Raises: as `artifact_entries`; what the source and `act` raise.
    """
    entries = artifact_entries(document, wanted)
    if entries is None:
        yield act(document, None)
        return
    for entry in entries:
        try:
            result = act(source.manifest(entry.descriptor.digest), entry.platform)
        except EncfsError as error:
            raise type(error)(f"{_entry_name(entry)}: {error.message}", hint=error.hint) from error
        yield result


def check_pin_names_one(document: RawManifest, pin: str | None, wanted: Platform | None) -> None:
    """Raises: UsageError where a pin, which is one artifact's content digest, is given for an index of several."""
    if pin is None:
        return
    entries = artifact_entries(document, wanted)
    if entries is not None and len(entries) > 1:
        shown = ", ".join(_entry_name(entry) for entry in entries[:_SHOWN_ENTRIES])
        more = ", …" if len(entries) > _SHOWN_ENTRIES else ""
        raise UsageError(
            f"--pin is the content digest of one artifact, and the reference is an index of {len(entries)}",
            hint=f"choose one with --platform: {shown}{more}",
        )


def _entry_name(entry: IndexEntry) -> str:
    digest = entry.descriptor.digest
    return digest if entry.platform is None else f"{entry.platform} ({digest})"


@dataclass(frozen=True, slots=True)
class Served:
    """What a daemon served that this process takes over from: it goes on with just that, whatever a tag says now."""

    content_digest: str
    manifest_digest: str


def choose_served(source: BlobSource, wanted: Platform, served: Served) -> tuple[RawManifest, str]:
    """The manifest to go on with; and what the reference names by now, empty where that is the same content.

    A reference may name another manifest of the same content (other recipients): that one is taken. Where it names
    other content, or nothing any more, what was served is asked for by its digest. Whoever says what was served is not
    trusted with anything: all rules apply to it as to what the reference names.

    Raises: as `choose_manifest`; NotFoundError where what was served is gone.
    """
    try:
        manifest = choose_manifest(source, source.document(), wanted)
    except NotFoundError:
        named = _NOTHING
    else:
        named = content_digest_of(manifest)
        if named == served.content_digest:
            return manifest, ""
    try:
        manifest = source.manifest(served.manifest_digest)
    except NotFoundError as error:
        raise NotFoundError(
            f"the reference names {named} now, and what was served, {served.content_digest}, is gone",
            hint="unmount and mount again, or open it again, to change over to what it names",
        ) from error
    return manifest, named


@dataclass(frozen=True, slots=True)
class ImageParts:
    """The volumes to read, lowest layer first, and the config where the artifact is a container image.

    `layered`: they follow overlayfs's conventions, also where there is one only.
    """

    volumes: tuple[VolumeReader, ...]
    config: ImageConfig | None
    layered: bool


def is_needed(name: str) -> bool:
    """Whether a volume of this name is read at all, and has to be opened."""
    return not name.startswith(AUXILIARY_PREFIX)


def image_parts(artifact: Artifact, platform: Platform | None = None) -> ImageParts:
    """The parts of an artifact; for a container image only if it is for `platform`, where one is asked for.

    Raises: FormatError where volumes and config contradict one another; UnsupportedError for another platform.
    """
    content = artifact.payload.image_config
    config = None if content is None else parse_image_config(content)
    if config is not None and platform is not None:
        check_platform(config, platform)
    names = [artifact.payload.volume(volume_id).name for volume_id in artifact.volume_ids]
    by_name = dict(zip(names, artifact.volumes, strict=True))
    layers = {name for name in names if name.startswith(LAYER_PREFIX)}
    if config is None or not layers:
        return ImageParts(_only_volume(artifact), config, layered=False)
    wanted = [LAYER_PREFIX + diff_id for diff_id in config.diff_ids]
    if set(wanted) != set(names):
        raise FormatError("the volumes of the artifact are not the layers that the image's config names")
    return ImageParts(tuple(by_name[name] for name in wanted), config, layered=True)


def check_image_platform(artifact: Artifact, wanted: Platform) -> None:
    """Raises: UnsupportedError where the artifact is a container image for another platform."""
    if artifact.payload.image_config is not None:
        check_platform(parse_image_config(artifact.payload.image_config), wanted)


def check_listed_platform(config: ImageConfig, listed: Platform | None) -> None:
    """Raises: FormatError where an image is not for the platform that an index, which nobody signed, lists it for.

    The variant may be left out on either side.
    """
    actual = Platform(config.os, config.architecture, config.variant)
    if listed is not None and not (actual.matches(listed) or listed.matches(actual)):
        raise FormatError(f"what the image index lists for {listed} is for {actual}, as its config says")


def require_config(parts: ImageParts) -> ImageConfig:
    """The config of what must be a container image. Raises: UnsupportedError."""
    if parts.config is None:
        raise UnsupportedError("the artifact is no container image", hint="mount it with encfs mount")
    return parts.config


def _only_volume(artifact: Artifact) -> tuple[VolumeReader, ...]:
    if len(artifact.volumes) != 1:
        raise UnsupportedError(
            f"the artifact has {len(artifact.volumes)} volumes and is no container image; this version reads one"
        )
    return artifact.volumes


def check_platform(config: ImageConfig, wanted: Platform) -> None:
    """Raises: UnsupportedError where an image is for another platform."""
    actual = Platform(config.os, config.architecture, config.variant)
    if not actual.matches(wanted):
        raise UnsupportedError(
            f"the image is for {actual}, not for {wanted}",
            hint=f"choose it with --platform {actual}, or another manifest of the index",
        )
