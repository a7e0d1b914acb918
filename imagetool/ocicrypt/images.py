"""Encrypt and decrypt the layers of container images between two stores.

The config and what is not named stay as they are, byte for byte. Not here: walking an index and writing manifests
(`rewriting`), the cipher (`cipher`), the annotations (`options`), keys (`schemes`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from encfs.errors import ConflictError, IntegrityError, UnsupportedError, UsageError
from encfs.image.compression import Compression, allowed_size, decompressed
from encfs.image.manifest import ImageManifest, Platform
from encfs.image.mediatypes import LAYER_TYPES
from encfs.keys.secrets import wipe
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor
from encfs.progress import Progress
from encfs.strictjson import show_name
from imagetool.ocicrypt.cipher import CHUNK_SIZE, Encryptor, Tap, verified
from imagetool.ocicrypt.layers import SUFFIX, OpenedLayer, is_encrypted, opened_layer, plain_chunks
from imagetool.ocicrypt.options import (
    Encryption,
    fresh_key,
    private_options,
    without_encryption,
)
from imagetool.ocicrypt.rewriting import ImageResult, Rewriter
from imagetool.ocicrypt.schemes import Opener, Recipient, wrapped_for


@dataclass(frozen=True, slots=True)
class DecryptOptions:
    """`maximum` bounds the decompressed size of a layer in bytes (None: `allowed_size`).

    `spool_directory` is where the ciphertext of a layer waits that comes from a registry, since it is read twice.
    """

    maximum: int | None = None
    spool_directory: str | None = None


def chosen_layers(manifest: ImageManifest, numbers: Sequence[int]) -> list[int]:
    """Layers by their numbers, from 0 and from -1 backwards; none given: all. Raises: UsageError."""
    count = len(manifest.layers)
    for number in numbers:
        if not -count <= number < count:
            raise UsageError(f"the image has no layer {number}", hint=f"it has 0 to {count - 1}, or {-count} to -1")
    return sorted({number % count for number in numbers}) if numbers else list(range(count))


def encrypt_image(
    source: BlobSource,
    sink: BlobTarget,
    recipients: Sequence[Recipient],
    *,
    tag: str | None,
    layers: Sequence[int] = (),
    platforms: Sequence[Platform] = (),
    progress: Progress,
) -> ImageResult:
    """Encrypt the layers of an image, all or those of the given numbers, each under a fresh key.

    Raises: UsageError for a layer or platform that is not there; ConflictError for a layer that is encrypted already;
    UnsupportedError for one that cannot be; FormatError, IntegrityError, what the stores and recipients raise.
    """
    rewriter = Rewriter(source, sink, progress)

    def rewrite(manifest: ImageManifest) -> list[Descriptor]:
        chosen = chosen_layers(manifest, layers)
        if not chosen:
            raise ConflictError("the image has no layers to encrypt")
        for index in chosen:
            _check_encryptable(manifest.layers[index], f"layer {index}")
        return [
            _encrypt_layer(rewriter, layer, recipients, f"layer {index}") if index in chosen else layer
            for index, layer in enumerate(manifest.layers)
        ]

    return rewriter.run(rewrite, tag=tag, platforms=platforms)


def decrypt_image(
    source: BlobSource,
    sink: BlobTarget,
    openers: Sequence[Opener],
    *,
    tag: str | None,
    layers: Sequence[int] = (),
    platforms: Sequence[Platform] = (),
    options: DecryptOptions,
    progress: Progress,
) -> ImageResult:
    """Decrypt the encrypted layers of an image, all or those of the given numbers.

    Of each layer the MAC over all of its ciphertext is checked before any of it is decrypted; what comes out must
    decompress to what the config's diff ID says.

    Raises: ConflictError where nothing is encrypted; IntegrityError, FormatError; WrongKeyError and others of keys;
    what the stores raise.
    """
    rewriter = Rewriter(source, sink, progress)

    def rewrite(manifest: ImageManifest) -> list[Descriptor]:
        config = rewriter.config(manifest)
        with ExitStack() as secrets:
            # Keys first: nothing is read or written of an image that no key opens.
            jobs = {}
            for index in _encrypted_layers(manifest, layers):
                diff_id = config.diff_ids[index] if config is not None else None
                jobs[index] = opened_layer(manifest.layers[index], index, openers, diff_id)
                secrets.callback(jobs[index].key.wipe)
            return [
                _decrypt_layer(rewriter, jobs[index], options) if index in jobs else layer
                for index, layer in enumerate(manifest.layers)
            ]

    return rewriter.run(rewrite, tag=tag, platforms=platforms)


def _check_encryptable(layer: Descriptor, what: str) -> None:
    if is_encrypted(layer):
        raise ConflictError(
            f"{what} is encrypted already",
            hint="choose others with --layer, or let more keys open it: imagetool ocicrypt recipients add",
        )
    if layer.media_type not in LAYER_TYPES:
        raise UnsupportedError(
            f"{what} is of the type {show_name(layer.media_type)}, which no reader of ocicrypt takes encrypted",
            hint="for other artifacts there is imagetool encrypt",
        )


def _encrypt_layer(rewriter: Rewriter, layer: Descriptor, recipients: Sequence[Recipient], what: str) -> Descriptor:
    key = fresh_key()
    options = private_options(key, layer.digest)
    encryptor = Encryptor(key)
    try:
        # Recipients first: one that cannot be reached should not be found out about after the layer.
        elements = tuple(wrapped_for(recipients, options))
        with rewriter.new_layer() as new:
            stream = rewriter.source.stream_blob(layer, chunk_size=CHUNK_SIZE, verify=False)
            rewriter.progress.begin("encrypt", layer.size)
            for chunk in verified(stream, layer, what):
                new.write(encryptor.update(chunk))
                rewriter.progress.advance(len(chunk))
            encryption = Encryption(encryptor.finish(), elements)
            written = new.commit(LAYER_TYPES[layer.media_type].oci + SUFFIX)
    finally:
        encryptor.abandon()
        wipe(options)
        key.wipe()
    return replace(written, annotations={**layer.annotations, **encryption.annotations()})


def _encrypted_layers(manifest: ImageManifest, numbers: Sequence[int]) -> list[int]:
    chosen = chosen_layers(manifest, numbers)
    encrypted = [index for index in chosen if is_encrypted(manifest.layers[index])]
    if numbers and encrypted != chosen:
        raise ConflictError(f"layer {next(index for index in chosen if index not in encrypted)} is not encrypted")
    if not encrypted:
        raise ConflictError("no layer of the image is encrypted", hint="copy it as it is")
    return encrypted


def _decrypt_layer(rewriter: Rewriter, layer: OpenedLayer, options: DecryptOptions) -> Descriptor:
    content = _content_tap(layer, options)
    chunks = plain_chunks(rewriter.source, layer, options.spool_directory, rewriter.progress)
    try:
        with closing(chunks), rewriter.new_layer() as new:
            for chunk in chunks:
                new.write(chunk)
                if content is not None:
                    content.feed(chunk)
            _check_content(layer, content.finish() if content is not None else new.digest())
            written = new.commit(layer.media_type)
    finally:
        if content is not None:
            content.abandon()
    return replace(written, annotations=without_encryption(layer.blob.annotations))


def _content_tap(layer: OpenedLayer, options: DecryptOptions) -> Tap[str] | None:
    """A thread that computes the digest of the decompressed layer; None where that is the layer itself."""
    if layer.diff_id is None or layer.compression is Compression.NONE:
        return None
    limit = allowed_size(layer.blob.size, options.maximum)

    def run(chunks: Iterator[bytes]) -> str:
        digest = hashlib.sha256()
        for piece in decompressed(chunks, layer.compression, limit=limit, what=layer.what):
            digest.update(piece)
        return f"sha256:{digest.hexdigest()}"

    return Tap(run, "content")


def _check_content(layer: OpenedLayer, digest: str) -> None:
    if layer.diff_id not in (None, digest):
        raise IntegrityError(
            f"{layer.what} is not the one that the image's config names: its diff ID is {digest}, not {layer.diff_id}",
            hint="layers or configs of several images may have been mixed; ask who made the image",
        )
