"""AES_256_CTR_HMAC_SHA256 over the bytes of a layer, as a stream, with the hashing on threads of its own.

Encrypt, then MAC: HMAC-SHA256 over the ciphertext alone, under the same 32 bytes as AES-256-CTR. The MAC is known only
at the end, so whoever decrypts has to check it first: `check_mac` reads the ciphertext once for it, `decrypted` a
second time. That the second reading gives what was checked is told by a fingerprint, BLAKE3 because it costs a sixth
of SHA-256. The blob's digest is not computed: the MAC's key is fixed by the annotations, and under a known key HMAC is
as collision-resistant as the digest.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from encfs.errors import IntegrityError
from encfs.oci.blobs import Descriptor
from imagetool.ocicrypt.options import LayerKey

_Result = TypeVar("_Result")

#: Bytes of a layer that are worked on at a time.
CHUNK_SIZE = 1 << 20
# Chunks that may wait for one thread.
_QUEUE_SIZE = 4


class Tap(Generic[_Result]):
    """A thread that reads along: `function` gets an iterator over the chunks that `feed` was given.

    Ends with `finish`, or with `abandon` where the stream is not going to be complete; one of them must be called.
    """

    def __init__(self, function: Callable[[Iterator[bytes]], _Result], name: str) -> None:
        self._function = function
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_QUEUE_SIZE)
        self._result: list[_Result] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def feed(self, chunk: bytes) -> None:
        """The next chunk; waits while the thread is far behind."""
        self._chunks.put(chunk)

    def finish(self) -> _Result:
        """What the function returned once it saw the end. Raises: what the function raised."""
        self._chunks.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def abandon(self) -> None:
        """End the thread; harmless when called again, or after `finish`."""
        self._abandoned = True
        if self._thread.is_alive():
            self._chunks.put(None)
            self._thread.join()

    def _run(self) -> None:
        chunks = self._iterate()
        try:
            self._result.append(self._function(chunks))
        except BaseException as error:  # noqa: BLE001 -- raised again by `finish`
            self._error = error
        # So that `feed` never waits for a function that has ended early.
        for _ in chunks:
            pass

    def _iterate(self) -> Iterator[bytes]:
        # No generator: one that its consumer's exception closed could not be drained.
        return iter(self._next, None)

    def _next(self) -> bytes | None:
        chunk = self._chunks.get()
        return None if self._abandoned else chunk


def hashing_tap() -> Tap[bytes]:
    """A thread that computes the SHA-256 of a stream."""

    def run(chunks: Iterator[bytes]) -> bytes:
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        return digest.digest()

    return Tap(run, "digest")


def mac_tap(key: LayerKey) -> Tap[bytes]:
    """A thread that computes the HMAC of a stream of ciphertext."""

    def run(chunks: Iterator[bytes]) -> bytes:
        mac = hmac.new(key.secret, digestmod="sha256")
        for chunk in chunks:
            mac.update(chunk)
        return mac.digest()

    return Tap(run, "hmac")


class Encryptor:
    """Encrypts one layer. `finish` or `abandon` must be called."""

    def __init__(self, key: LayerKey) -> None:
        self._cipher = Cipher(algorithms.AES256(key.secret), modes.CTR(key.nonce)).encryptor()
        self._mac = mac_tap(key)

    def update(self, chunk: bytes) -> bytes:
        """The ciphertext of the next chunk."""
        encrypted = self._cipher.update(chunk)
        self._mac.feed(encrypted)
        return encrypted

    def finish(self) -> bytes:
        """The MAC, 32 bytes."""
        return self._mac.finish()

    def abandon(self) -> None:
        self._mac.abandon()


def check_mac(chunks: Iterable[bytes], key: LayerKey, expected: bytes, what: str) -> bytes:
    """Read all of a layer's ciphertext and check its MAC; `what` names the layer in the message.

    Returns a fingerprint of the ciphertext. Raises: IntegrityError, and whatever the chunks raise.
    """
    fingerprint = blake3()
    mac = mac_tap(key)
    try:
        for chunk in chunks:
            mac.feed(chunk)
            fingerprint.update(chunk)
        computed = mac.finish()
    finally:
        mac.abandon()
    if not hmac.compare_digest(computed, expected):
        raise IntegrityError(f"{what} was altered: its HMAC is wrong", hint="fetch the image again, or ask its maker")
    return fingerprint.digest()


def decrypted(chunks: Iterable[bytes], key: LayerKey, checked: bytes, what: str) -> Iterator[bytes]:
    """The plain bytes of a layer whose MAC was checked; `checked` is its fingerprint, `what` names it.

    The bytes count only once the iterator has ended: until then the ciphertext could be another than the one that was
    checked. Raises: IntegrityError where it was, and whatever the chunks raise.
    """
    cipher = Cipher(algorithms.AES256(key.secret), modes.CTR(key.nonce)).decryptor()
    fingerprint = blake3()
    for chunk in chunks:
        fingerprint.update(chunk)
        yield cipher.update(chunk)
    if fingerprint.digest() != checked:
        raise IntegrityError(f"{what} changed while it was read")


def verified(chunks: Iterable[bytes], blob: Descriptor, what: str) -> Iterator[bytes]:
    """The same chunks, their digest computed beside whatever is done with them, and checked at the end.

    Raises: IntegrityError, and whatever the chunks raise.
    """
    digest = hashing_tap()
    try:
        for chunk in chunks:
            digest.feed(chunk)
            yield chunk
        if f"sha256:{digest.finish().hex()}" != blob.digest:
            raise IntegrityError(f"{what} has other content than its digest {blob.digest} says")
    finally:
        digest.abandon()
