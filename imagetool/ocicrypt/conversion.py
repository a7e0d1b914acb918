"""Between ocicrypt and this project's own format, with no plain layer on any disk.

`DecryptingSource` is a store whose encrypted layers are read as plain ones, and `EncryptingSink` one that encrypts the
layers that are written to it: whatever encrypts or restores an image does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from encfs.errors import ConflictError, FormatError
from encfs.format.descriptor import CONTENT_TYPE
from encfs.image.config import MAX_CONFIG_SIZE, parse_image_config
from encfs.image.manifest import (
    CONFIG_TYPES,
    INDEX_TYPES,
    ImageManifest,
    chosen_entries,
    parse_image_index,
    parse_image_manifest,
)
from encfs.keys.secrets import wipe
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Blob, BlobSource, BlobTarget, BlobWriter, Buffer, Descriptor, RawManifest
from encfs.progress import NoProgress
from encfs.strictjson import loads_object
from imagetool.ocicrypt.cipher import Encryptor
from imagetool.ocicrypt.layers import SUFFIX, OpenedLayer, is_encrypted, opened_layer, plain_chunks
from imagetool.ocicrypt.options import Encryption, fresh_key, private_options, without_encryption
from imagetool.ocicrypt.schemes import Opener, Recipient, wrapped_for


def is_artifact(source: BlobSource) -> bool:
    """Whether the source's reference names this project's artifact, or an index of such; else it may be an image.

    Only a look: whoever reads it finds out. Raises: FormatError, what the source raises.
    """
    raw = source.document()
    if raw.media_type in INDEX_TYPES:
        entries = chosen_entries(parse_image_index(raw.content, raw.media_type), ())
        if not entries:
            raise FormatError("the image index names no image")
        raw = source.document(entries[0].descriptor.digest)
    document = loads_object(raw.content, limit=MAX_MANIFEST_SIZE, what="the manifest")
    config = document.get("config")
    return isinstance(config, dict) and config.get("mediaType") == CONTENT_TYPE


class DecryptingSource:
    """A `BlobSource` whose encrypted layers are read as plain ones, under their names. Close it: it holds keys.

    Manifests are not those of the origin: types and annotations of layers are the plain ones'. Their diff IDs are to be
    checked by the reader, as for any other image.
    """

    def __init__(self, origin: BlobSource, openers: Sequence[Opener], spool_directory: str | None = None) -> None:
        """`origin` stays the caller's."""
        self._origin = origin
        self._openers = openers
        self._spool = spool_directory
        self._layers: dict[str, OpenedLayer] = {}

    def manifest(self, reference: str | None = None) -> RawManifest:
        return self._plain(self._origin.manifest(reference))

    def document(self, reference: str | None = None) -> RawManifest:
        """Raises: as the origin; ConflictError for an image without encrypted layers; WrongKeyError and others."""
        raw = self._origin.document(reference)
        return raw if raw.media_type in INDEX_TYPES else self._plain(raw)

    def _plain(self, raw: RawManifest) -> RawManifest:
        manifest = parse_image_manifest(raw.content, raw.media_type)
        if not any(map(is_encrypted, manifest.layers)):
            raise ConflictError("no layer of the image is encrypted", hint="encrypt it as it is: imagetool encrypt")
        diff_ids = self._diff_ids(manifest)
        layers = list(manifest.layers)
        for index, layer in enumerate(layers):
            if is_encrypted(layer):
                opened = opened_layer(layer, index, self._openers, diff_ids[index] if index < len(diff_ids) else None)
                if (former := self._layers.get(layer.digest)) is not None:
                    former.key.wipe()
                self._layers[layer.digest] = opened
                annotations = without_encryption(layer.annotations)
                layers[index] = replace(layer, media_type=opened.media_type, annotations=annotations)
        return RawManifest(manifest.rewritten(layers), raw.digest, raw.media_type)

    def _diff_ids(self, manifest: ImageManifest) -> tuple[str, ...]:
        if manifest.config.media_type not in CONFIG_TYPES:
            return ()
        return parse_image_config(self._origin.read_blob(manifest.config, limit=MAX_CONFIG_SIZE)).diff_ids

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        return self._origin.read_blob(descriptor, limit=limit)

    def open_blob(self, descriptor: Descriptor) -> Blob:
        return self._origin.open_blob(descriptor)

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """A layer's plain bytes, its MAC checked first; any other blob as it is."""
        layer = self._layers.get(descriptor.digest)
        if layer is None:
            return self._origin.stream_blob(descriptor, chunk_size=chunk_size, offset=offset, verify=verify)
        if offset:
            raise ValueError("a decrypted layer is read from its beginning")
        return plain_chunks(self._origin, layer, self._spool, NoProgress())

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._origin.has_blob(descriptor)

    def close(self) -> None:
        for layer in self._layers.values():
            layer.key.wipe()
        self._layers.clear()


class EncryptingSink:
    """A `BlobTarget` for one image that encrypts the layers it is given, each under a fresh key.

    What `create_blob` writes is a layer; what `write_blob` writes, such as the config, stays as it is.
    """

    verifies = True

    def __init__(self, target: BlobTarget, recipients: Sequence[Recipient]) -> None:
        """`target` stays the caller's."""
        self._target = target
        self._recipients = recipients
        self._encryptions: dict[str, Encryption] = {}

    def create_blob(self) -> BlobWriter:
        writer = self._target.create_blob()
        try:
            return _EncryptingWriter(writer, self._recipients, self._encryptions)
        except BaseException:
            writer.abort()
            raise

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        return self._target.write_blob(content, media_type)

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._target.has_blob(descriptor)

    def remove_blob(self, descriptor: Descriptor) -> None:
        self._target.remove_blob(descriptor)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """The manifest with what its layers' readers need."""
        return self._target.put_manifest(
            self._annotated(content, media_type), media_type, tag=tag, artifact_type=artifact_type
        )

    def write_manifest(self, content: bytes, media_type: str) -> Descriptor:
        return self._target.write_manifest(self._annotated(content, media_type), media_type)

    def copy_blob(
        self, descriptor: Descriptor, stream: Callable[[int], Iterator[bytes]], advance: Callable[[int], None]
    ) -> None:
        """Not a layer: those are written."""
        self._target.copy_blob(descriptor, stream, advance)

    def close(self) -> None:
        return

    def _annotated(self, content: bytes, media_type: str) -> bytes:
        manifest = parse_image_manifest(content, media_type)
        return manifest.rewritten(
            [
                replace(layer, annotations={**layer.annotations, **self._encryptions[layer.digest].annotations()})
                for layer in manifest.layers
            ]
        )


class _EncryptingWriter:
    """A `BlobWriter`: plain bytes in, the ciphertext out. `digest` is the ciphertext's."""

    def __init__(self, writer: BlobWriter, recipients: Sequence[Recipient], encryptions: dict[str, Encryption]) -> None:
        self._writer = writer
        self._encryptions = encryptions
        self._key = fresh_key()
        # Others put the plain layer's digest in there; nothing follows from it, and it is not known yet.
        options = private_options(self._key, "")
        try:
            # Recipients first: one that cannot be reached should not be found out about after the layer.
            self._elements = tuple(wrapped_for(recipients, options))
        finally:
            wipe(options)
        self._encryptor = Encryptor(self._key)

    def write(self, data: Buffer) -> None:
        self._writer.write(self._encryptor.update(bytes(data)))

    def digest(self) -> str:
        return self._writer.digest()

    def commit(self, media_type: str) -> Descriptor:
        mac = self._encryptor.finish()
        written = self._writer.commit(media_type + SUFFIX)
        self._encryptions[written.digest] = Encryption(mac, self._elements)
        return written

    def abort(self) -> None:
        self._encryptor.abandon()
        self._key.wipe()
        self._writer.abort()
