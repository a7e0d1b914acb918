"""Encrypt and decrypt the layers of container images between two stores.

The config and what is not named stay as they are, byte for byte. Not here: walking an index and writing manifests
(`rewriting`), the cipher (`cipher`), the annotations (`options`), keys (`schemes`).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from encfs.errors import ConflictError, IntegrityError, UnsupportedError, UsageError
from encfs.image.compression import Compression, allowed_size, decompressed
from encfs.image.manifest import ImageManifest, Platform
from encfs.image.mediatypes import LAYER_TYPES
from encfs.keys.secrets import wipe
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor
from encfs.oci.files import storage_errors
from encfs.oci.layout import Layout
from encfs.progress import Progress
from encfs.strictjson import show_name
from imagetool.ocicrypt.cipher import CHUNK_SIZE, Encryptor, Tap, check_mac, decrypted, verified
from imagetool.ocicrypt.options import (
    Encryption,
    LayerKey,
    fresh_key,
    parse_encryption,
    private_options,
    without_encryption,
)
from imagetool.ocicrypt.rewriting import ImageResult, Rewriter
from imagetool.ocicrypt.schemes import Opener, Recipient, open_layer, wrapped_for

#: Last part of an encrypted layer's media type.
SUFFIX = "+encrypted"


@dataclass(frozen=True, slots=True)
class DecryptOptions:
    """`maximum` bounds the decompressed size of a layer in bytes (None: `allowed_size`).

    `spool_directory` is where the ciphertext of a layer waits that comes from a registry, since it is read twice.
    """

    maximum: int | None = None
    spool_directory: str | None = None


def is_encrypted(layer: Descriptor) -> bool:
    return layer.media_type.endswith(SUFFIX)


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
                jobs[index] = _decryption(manifest.layers[index], index, openers, diff_id)
                secrets.callback(jobs[index].key.wipe)
            return [
                _decrypt_layer(rewriter, jobs[index], options) if index in jobs else layer
                for index, layer in enumerate(manifest.layers)
            ]

    return rewriter.run(rewrite, tag=tag, platforms=platforms)


@dataclass(frozen=True, slots=True)
class _Decryption:
    """One layer, opened. `diff_id` is None where the manifest is of no image, and so says nothing of its layers."""

    blob: Descriptor
    what: str
    key: LayerKey
    encryption: Encryption
    media_type: str
    compression: Compression
    diff_id: str | None


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
            for chunk in verified(_watched(stream, "encrypt", layer, rewriter.progress), layer, what):
                new.write(encryptor.update(chunk))
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


def _decryption(layer: Descriptor, index: int, openers: Sequence[Opener], diff_id: str | None) -> _Decryption:
    what = f"layer {index}"
    media_type = layer.media_type.removesuffix(SUFFIX)
    known = LAYER_TYPES.get(media_type)
    if known is None and diff_id is not None:
        raise UnsupportedError(
            f"{what} is of the type {show_name(media_type)}, which cannot be checked: no tar archive"
        )
    encryption = parse_encryption(layer.annotations, what)
    key, options = open_layer(encryption, openers, what)
    wipe(options)
    compression = known.compression if known is not None else Compression.NONE
    return _Decryption(
        layer, what, key, encryption, known.oci if known is not None else media_type, compression, diff_id
    )


def _decrypt_layer(rewriter: Rewriter, job: _Decryption, options: DecryptOptions) -> Descriptor:
    with _read_twice(rewriter.source, job.blob, options.spool_directory) as (read, again), rewriter.new_layer() as new:
        checking = _watched(read(), "check", job.blob, rewriter.progress)
        fingerprint = check_mac(checking, job.key, job.encryption.mac, job.what)
        content = _content_tap(job, options)
        try:
            chunks = _watched(again(), "decrypt", job.blob, rewriter.progress)
            for chunk in decrypted(chunks, job.key, fingerprint, job.what):
                new.write(chunk)
                if content is not None:
                    content.feed(chunk)
            _check_content(job, content.finish() if content is not None else new.digest())
        finally:
            if content is not None:
                content.abandon()
        written = new.commit(job.media_type)
    return replace(written, annotations=without_encryption(job.blob.annotations))


def _content_tap(job: _Decryption, options: DecryptOptions) -> Tap[str] | None:
    """A thread that computes the digest of the decompressed layer; None where that is the layer itself."""
    if job.diff_id is None or job.compression is Compression.NONE:
        return None
    limit = allowed_size(job.blob.size, options.maximum)

    def run(chunks: Iterator[bytes]) -> str:
        digest = hashlib.sha256()
        for piece in decompressed(chunks, job.compression, limit=limit, what=job.what):
            digest.update(piece)
        return f"sha256:{digest.hexdigest()}"

    return Tap(run, "content")


def _check_content(job: _Decryption, digest: str) -> None:
    if job.diff_id not in (None, digest):
        raise IntegrityError(
            f"{job.what} is not the one that the image's config names: its diff ID is {digest}, not {job.diff_id}",
            hint="layers or configs of several images may have been mixed; ask who made the image",
        )


def _watched(chunks: Iterable[bytes], label: str, blob: Descriptor, progress: Progress) -> Iterator[bytes]:
    progress.begin(label, blob.size)
    for chunk in chunks:
        yield chunk
        progress.advance(len(chunk))


_Reading = Callable[[], Iterator[bytes]]


@contextmanager
def _read_twice(source: BlobSource, blob: Descriptor, spool: str | None) -> Iterator[tuple[_Reading, _Reading]]:
    """Two functions that stream the blob, to be called in this order; its digest is not verified.

    What comes from a registry is kept in a file without a name meanwhile, as the ciphertext that it is.
    """
    if isinstance(source, Layout):

        def stream() -> Iterator[bytes]:
            return source.stream_blob(blob, chunk_size=CHUNK_SIZE, verify=False)

        yield stream, stream
        return
    with storage_errors(spool or tempfile.gettempdir()):
        file = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 -- closed below

    def fetch() -> Iterator[bytes]:
        for chunk in source.stream_blob(blob, chunk_size=CHUNK_SIZE, verify=False):
            with storage_errors("the file for a layer on its way"):
                file.write(chunk)
            yield chunk

    def read_back() -> Iterator[bytes]:
        with storage_errors("the file for a layer on its way"):
            file.seek(0)
            while chunk := file.read(CHUNK_SIZE):
                yield chunk

    with file:
        yield fetch, read_back
