"""One encrypted layer as a stream of plain bytes: opened with a key, its MAC checked, then decrypted.

Not here: what the bytes are compared with, and where they go (`images`, `conversion`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from encfs.errors import UnsupportedError
from encfs.image.compression import Compression
from encfs.image.mediatypes import LAYER_TYPES
from encfs.keys.secrets import wipe
from encfs.oci.blobs import BlobSource, Descriptor
from encfs.oci.files import storage_errors
from encfs.oci.layout import Layout
from encfs.progress import Progress
from encfs.strictjson import show_name
from imagetool.ocicrypt.cipher import CHUNK_SIZE, check_mac, decrypted
from imagetool.ocicrypt.options import Encryption, LayerKey, parse_encryption
from imagetool.ocicrypt.schemes import Opener, open_layer

#: Last part of an encrypted layer's media type.
SUFFIX = "+encrypted"


@dataclass(frozen=True, slots=True)
class OpenedLayer:
    """A layer and its key, which `key.wipe` forgets; `media_type` is that of the plain one.

    `diff_id` is None where the manifest is of no image, and so says nothing of its layers.
    """

    blob: Descriptor
    what: str
    key: LayerKey
    encryption: Encryption
    media_type: str
    compression: Compression
    diff_id: str | None


def is_encrypted(layer: Descriptor) -> bool:
    return layer.media_type.endswith(SUFFIX)


def opened_layer(layer: Descriptor, index: int, openers: Sequence[Opener], diff_id: str | None) -> OpenedLayer:
    """Raises: FormatError; UnsupportedError where it is a layer of an image and no archive; WrongKeyError, others."""
    what = f"layer {index}"
    media_type = layer.media_type.removesuffix(SUFFIX)
    known = LAYER_TYPES.get(media_type)
    if known is None and diff_id is not None:
        raise UnsupportedError(f"{what} is of the type {show_name(media_type)}, which cannot be checked")
    encryption = parse_encryption(layer.annotations, what)
    key, options = open_layer(encryption, openers, what)
    wipe(options)
    if known is None:
        return OpenedLayer(layer, what, key, encryption, media_type, Compression.NONE, diff_id)
    return OpenedLayer(layer, what, key, encryption, known.oci, known.compression, diff_id)


def plain_chunks(
    source: BlobSource, layer: OpenedLayer, spool: str | None, progress: Progress
) -> Generator[bytes, None, None]:
    """The plain bytes, which count only once the iterator has ended; none comes before the MAC was checked.

    `spool` is a directory for the ciphertext of what comes from a registry. Raises: IntegrityError, what the source
    raises.
    """
    with _read_twice(source, layer.blob, spool) as (read, again):
        checking = _watched(read(), "check", layer.blob, progress)
        fingerprint = check_mac(checking, layer.key, layer.encryption.mac, layer.what)
        yield from decrypted(_watched(again(), "decrypt", layer.blob, progress), layer.key, fingerprint, layer.what)


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
