"""Who can open an encrypted image: listing, adding and removing, by its manifests alone; no layer is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from encfs.errors import ConflictError, MissingKeyError, NotFoundError, UsageError
from encfs.image.manifest import ImageManifest, Platform, chosen_entries, parse_image, parse_image_manifest
from encfs.keys.secrets import wipe
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor
from encfs.progress import NoProgress
from imagetool.ocicrypt import jwe
from imagetool.ocicrypt.descriptions import describe
from imagetool.ocicrypt.images import chosen_layers
from imagetool.ocicrypt.layers import is_encrypted
from imagetool.ocicrypt.options import Element, Encryption, parse_encryption, without_encryption
from imagetool.ocicrypt.rewriting import ImageResult, Rewriter
from imagetool.ocicrypt.schemes import Opener, Recipient, open_layer, wrapped_for


@dataclass(frozen=True, slots=True)
class Entry:
    """One recipient of a layer: its number there, its scheme, and what is known of it without a key (untrusted)."""

    number: int
    scheme: str
    description: str
    element: int
    #: Which of a JWE's recipients it is.
    inner: int


@dataclass(frozen=True, slots=True)
class LayerRecipients:
    """An encrypted layer of an image, and who can open it."""

    layer: int
    descriptor: Descriptor
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class ImageRecipients:
    """The encrypted layers of one image; `platform` as an index says it."""

    digest: str
    platform: Platform | None
    layers: tuple[LayerRecipients, ...]


def list_recipients(source: BlobSource, platforms: Sequence[Platform] = ()) -> list[ImageRecipients]:
    """Every image's encrypted layers with their recipients, of which nothing is proven. Raises: FormatError, others."""
    raw = source.document()
    image = parse_image(raw)
    if isinstance(image, ImageManifest):
        return [ImageRecipients(raw.digest, None, _layers(image))]
    found = []
    for entry in chosen_entries(image, platforms):
        content = source.document(entry.descriptor.digest).content
        manifest = parse_image_manifest(content, entry.descriptor.media_type)
        found.append(ImageRecipients(entry.descriptor.digest, entry.platform, _layers(manifest)))
    return found


def add_recipients(
    source: BlobSource,
    sink: BlobTarget,
    openers: Sequence[Opener],
    recipients: Sequence[Recipient],
    *,
    tag: str | None,
    layers: Sequence[int] = (),
) -> ImageResult:
    """Wrap the keys of the encrypted layers, all or those of the given numbers, for more recipients.

    Raises: MissingKeyError, WrongKeyError, ConflictError where nothing is encrypted, what the stores raise.
    """
    if not recipients:
        raise MissingKeyError("no recipient was given", hint="pass one with -r RECIPIENT")

    def add(encryption: Encryption, what: str) -> Encryption:
        key, options = open_layer(encryption, openers, what)
        key.wipe()
        try:
            return replace(encryption, elements=(*encryption.elements, *wrapped_for(recipients, options)))
        finally:
            wipe(options)

    return _edit(source, sink, add, tag, layers)


def remove_recipients(
    source: BlobSource, sink: BlobTarget, selector: int | str, *, tag: str | None, layers: Sequence[int] = ()
) -> ImageResult:
    """Drop a recipient by its number, or all of a scheme, from the encrypted layers. It may have kept their keys.

    A number must mean the same kind of recipient in all of them.

    Raises: NotFoundError, UsageError for the last ones of a layer, ConflictError, what the stores raise.
    """
    seen: set[tuple[str, str]] = set()

    def remove(encryption: Encryption, what: str) -> Encryption:
        entries = _entries(encryption)
        chosen = [entry for entry in entries if selector in (entry.number, entry.scheme)]
        if not chosen:
            raise NotFoundError(f"{what} has no recipient {selector}", hint="see: imagetool ocicrypt recipients list")
        if len(chosen) == len(entries):
            raise UsageError(f"the last recipient of {what} cannot be removed", hint="add another one first")
        if isinstance(selector, int):
            seen.add((chosen[0].scheme, chosen[0].description))
            if len(seen) > 1:
                raise ConflictError(
                    f"recipient {selector} is not the same in all layers", hint="name them with --layer"
                )
        return replace(encryption, elements=_without(encryption, chosen))

    return _edit(source, sink, remove, tag, layers)


def _edit(
    source: BlobSource,
    sink: BlobTarget,
    change: Callable[[Encryption, str], Encryption],
    tag: str | None,
    layers: Sequence[int],
) -> ImageResult:
    changed = 0
    if not any(image.layers for image in list_recipients(source)):
        raise ConflictError("no layer of the image is encrypted")

    def rewrite(manifest: ImageManifest) -> list[Descriptor]:
        nonlocal changed
        result = list(manifest.layers)
        for index in chosen_layers(manifest, layers):
            layer = manifest.layers[index]
            if is_encrypted(layer):
                encryption = change(parse_encryption(layer.annotations, f"layer {index}"), f"layer {index}")
                # Read back by the reader's own rules: too many recipients are found out here.
                annotations = {**without_encryption(layer.annotations), **encryption.annotations()}
                parse_encryption(annotations, f"layer {index}")
                result[index] = replace(layer, annotations=annotations)
                changed += 1
        return result

    result = Rewriter(source, sink, NoProgress()).run(rewrite, tag=tag)
    return replace(result, layers=changed)


def _layers(manifest: ImageManifest) -> tuple[LayerRecipients, ...]:
    return tuple(
        LayerRecipients(index, layer, _entries(parse_encryption(layer.annotations, f"layer {index}")))
        for index, layer in enumerate(manifest.layers)
        if is_encrypted(layer)
    )


def _entries(encryption: Encryption) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for index, element in enumerate(encryption.elements):
        for inner, description in enumerate(describe(element)):
            entries.append(Entry(len(entries), element.scheme, description, index, inner))
    return tuple(entries)


def _without(encryption: Encryption, chosen: Sequence[Entry]) -> tuple[Element, ...]:
    kept = []
    for index, element in enumerate(encryption.elements):
        dropped = {entry.inner for entry in chosen if entry.element == index}
        remaining = len(describe(element)) - len(dropped)
        if not dropped:
            kept.append(element)
        elif remaining:
            kept.append(replace(element, content=jwe.parse(element.content).without(dropped)))
    return tuple(kept)
