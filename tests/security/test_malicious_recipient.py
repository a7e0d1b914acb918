"""A recipient who turns on the others: he holds every key, owns the store, and makes everything but signatures.

What he alters must be refused for the other recipients all the same: the payload by its commitment, the frames by the
hash tree, the descriptor by signature or pin.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encfs.artifact import load_artifact, open_artifact, open_payload
from encfs.encoding import b64url_decode, b64url_encode, sha256_digest
from encfs.errors import FormatError, IntegrityError, PinError, UnsignedError, WrongKeyError, WrongSignerError
from encfs.format.descriptor import ContentDescriptor, build_content
from encfs.format.frames import FLAG_ZSTD, FrameCipher
from encfs.format.suite import Suite
from encfs.format.tree import ENTRY_SIZE, FrameLocation, leaf_hash, pack_entry, write_tree
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.payload import build_payload, commitment, parse_payload
from encfs.keys.recipients import Recipient
from encfs.oci.blobs import Buffer, Descriptor
from encfs.signatures import sign
from encfs.trust import TrustPolicy
from tests.support.artifacts import make_keys, make_small_tree
from tests.support.hostile import Victim, attack, make_victim

FRAME = 4096


@pytest.fixture(scope="module", params=["blake3", "sha256"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    directory = tmp_path_factory.mktemp("victim")
    return make_victim(make_small_tree(directory / "tree"), make_keys(directory), hash_name=request.param)


# -- another payload


def reseal(victim: Victim, payload: bytes) -> bytes:
    """A flawless keyring for the same descriptor and the same recipient, with another payload."""
    return create_keyring(payload, victim.content.digest, [victim.keys.public])


def altered_payloads(victim: Victim) -> dict[str, bytes]:
    payload = victim.secret_payload
    secret = parse_payload(payload, victim.content.payload_commitment).volumes[0]
    document = json.loads(payload)
    [volume] = document["volumes"]
    return {
        "another key": build_payload([replace(secret, key=os.urandom(32))]),
        "another name": build_payload([replace(secret, name="/etc/passwd")]),
        "another id": build_payload([replace(secret, id=os.urandom(16))]),
        "an entry point": build_payload([secret], b'{"config":{"Entrypoint":["/bin/sh"]}}'),
        "the same keys under fresh randomness": build_payload([secret]),
        "the same members in another order": json.dumps(dict(reversed(document.items()))).encode(),
        "the same with white space": payload + b"\n",
        "cut": payload[:-1],
        "empty": b"",
        "a repeated volume": json.dumps({**document, "volumes": [volume, volume]}).encode(),
        "an unknown member": json.dumps({**document, "more": 1}).encode(),
    }


def test_every_other_payload_is_refused_by_the_commitment(victim: Victim) -> None:
    for what, payload in altered_payloads(victim).items():
        for trust in (victim.trust, TrustPolicy(pin=victim.content.digest), TrustPolicy(allow_unsigned=True)):
            error = attack(victim, victim.with_documents(keyring=reseal(victim, payload)), trust)
            assert isinstance(error, IntegrityError), what
            assert "commits to" in error.message, what
            assert error.hint, what


def test_the_same_payload_in_a_new_keyring_is_what_a_recipient_may_make(victim: Victim) -> None:
    assert attack(victim, victim.with_documents(keyring=reseal(victim, victim.secret_payload))) is None


def test_a_keyring_that_leaves_the_others_out_is_no_key_for_them(victim: Victim) -> None:
    other = generate_key("x25519")
    assert isinstance(other, PrivateKey)
    keyring = create_keyring(victim.secret_payload, victim.content.digest, [other.public])
    assert isinstance(attack(victim, victim.with_documents(keyring=keyring)), WrongKeyError)


def test_a_keyring_for_another_digest_is_refused(victim: Victim) -> None:
    keyring = create_keyring(victim.secret_payload, sha256_digest(b"another"), [victim.keys.public])
    assert isinstance(attack(victim, victim.with_documents(keyring=keyring)), IntegrityError)


# -- other frames, authentic under the right key


class _Spool:
    """A blob writer that keeps its bytes (`encfs.oci.blobs.BlobWriter`)."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, data: Buffer) -> None:
        self.content += data

    def commit(self, media_type: str) -> Descriptor:
        return Descriptor(media_type, sha256_digest(self.content), len(self.content))

    def abort(self) -> None:
        self.content.clear()


class Forgery:
    """The victim's volume with one frame's plaintext replaced, sealed under the right key and nonce, and its tree."""

    def __init__(self, victim: Victim, index: int, plaintext: bytes, flags: int = 0) -> None:
        content = victim.content
        self._suite: Suite = content.suite
        self._volume = content.volumes[0]
        cipher = FrameCipher(self._suite, self._volume.id, victim.volume_key)
        body = plaintext if flags else plaintext.ljust(FRAME, b"!")
        frame = bytearray(len(body) + 16)
        cipher.seal_into(index, memoryview(body), FRAME, flags & 0xFF, memoryview(frame))
        segment = victim.blob(victim.segment_digest)
        stored = FRAME + 16
        place = (index - 1) % self._volume.frames * stored
        old_tree = victim.blob(victim.tree_digest)
        self.location = FrameLocation(leaf_hash(self._suite, index, bytes(frame)), place, len(frame), 0, flags)
        start = index * ENTRY_SIZE
        self.leaves = old_tree[:start] + pack_entry(self.location) + old_tree[start + ENTRY_SIZE :]
        self.segment = segment[:place] + bytes(frame) + segment[place + len(frame) :]
        assert len(self.segment) == len(segment)

    @property
    def tree(self) -> tuple[bytes, bytes]:
        """A tree that fits the forged frame, and its root."""
        spool = _Spool()
        root = write_tree(self._volume.root_input(self._suite), io.BytesIO(self.leaves), spool)
        return bytes(spool.content), root

    def content(self, victim: Victim) -> ContentDescriptor:
        """A descriptor that fits it all, of the same id, version and date."""
        tree, root = self.tree
        volume = replace(
            self._volume,
            root=root,
            tree_digest=sha256_digest(tree),
            segments=(replace(self._volume.segments[0], digest=sha256_digest(self.segment)),),
        )
        old = victim.content
        return build_content(
            artifact_id=old.id,
            version=old.version,
            created=old.created,
            suite=old.suite,
            payload_commitment=old.payload_commitment,
            volumes=[volume],
        )


@pytest.mark.parametrize("index", range(6))
def test_altered_frames_are_refused_with_and_without_a_tree_that_fits(victim: Victim, index: int) -> None:
    forgery = Forgery(victim, index, b"forged")
    store = victim.with_blob(victim.segment_digest, forgery.segment)
    error = attack(victim, store)
    assert isinstance(error, IntegrityError)
    assert "not what the root commits to" in error.message
    tree, root = forgery.tree
    assert root != victim.content.volumes[0].root
    store.blobs[victim.tree_digest] = tree
    error = attack(victim, store)
    assert isinstance(error, IntegrityError)
    assert "does not belong to the root" in error.message


def test_a_whole_new_descriptor_needs_a_signature(victim: Victim) -> None:
    """The forgery in full: frames, tree, descriptor, and a keyring for it. Only its origin gives it away."""
    forgery = Forgery(victim, 1, b"forged")
    content = forgery.content(victim)
    keyring = create_keyring(victim.secret_payload, content.digest, [victim.keys.public])
    mallory = generate_key("ed25519")
    assert isinstance(mallory, PrivateKey)

    def refusal(signatures: list[bytes], trust: TrustPolicy) -> Exception | None:
        store = victim.with_documents(content=content.content, keyring=keyring, signatures=signatures)
        store.blobs[content.volumes[0].tree_digest] = forgery.tree[0]
        store.blobs[content.volumes[0].segments[0].digest] = forgery.segment
        return attack(victim, store, trust)

    [old] = victim.signatures
    own = sign(content.content, mallory)
    # The old signature in an envelope about the new descriptor.
    moved = json.loads(old)
    moved["payload"] = json.loads(own)["payload"]
    relabelled = json.loads(own)
    relabelled["signatures"][0]["keyid"] = victim.keys.verifier.kid
    assert isinstance(refusal([], victim.trust), UnsignedError)
    for signatures in ([old], [own], [old, own], [json.dumps(moved).encode()], [json.dumps(relabelled).encode()]):
        assert isinstance(refusal(signatures, victim.trust), WrongSignerError)
    assert isinstance(refusal([old], TrustPolicy(pin=victim.content.digest)), PinError)
    assert isinstance(refusal([], TrustPolicy()), UnsignedError)

    # Nothing but a proof of origin stands against it: with --allow-unsigned it is read, and said to be unproven.
    store = victim.with_documents(content=content.content, keyring=keyring, signatures=[old])
    store.blobs[content.volumes[0].tree_digest] = forgery.tree[0]
    store.blobs[content.volumes[0].segments[0].digest] = forgery.segment
    with open_artifact(store, keys=[victim.provider], trust=TrustPolicy(allow_unsigned=True)) as artifact:
        assert not artifact.origin.proven
        assert bytes(artifact.volumes[0].read(FRAME, 6)) == b"forged"


def test_the_old_keyring_does_not_fit_a_new_descriptor(victim: Victim) -> None:
    content = Forgery(victim, 1, b"forged").content(victim)
    store = victim.with_documents(content=content.content)
    assert isinstance(attack(victim, store, TrustPolicy(allow_unsigned=True)), IntegrityError)


def signed_forgery(victim: Victim, plaintext: bytes, flags: int, *, index: int = 1) -> Exception | None:
    """What a reader makes of a malformed frame that an owner signed: the last line of defence is the frame's own."""
    forgery = Forgery(victim, index, plaintext, flags)
    content = forgery.content(victim)
    store = victim.with_documents(
        content=content.content,
        keyring=create_keyring(victim.secret_payload, content.digest, [victim.keys.public]),
        signatures=[sign(content.content, victim.keys.signer)],
    )
    store.blobs[content.volumes[0].tree_digest] = forgery.tree[0]
    store.blobs[content.volumes[0].segments[0].digest] = forgery.segment
    return attack(victim, store)


def test_compressed_frames_are_never_larger_than_frames(victim: Victim) -> None:
    """A 4 KiB frame cannot be stored compressed: nothing would be saved. Whoever signed it made no artifact of ours."""
    assert isinstance(signed_forgery(victim, bytes(4096), FLAG_ZSTD), FormatError)


@pytest.mark.parametrize("flags", [2, 3, 0x8000])
def test_unknown_flags_are_refused(victim: Victim, flags: int) -> None:
    assert isinstance(signed_forgery(victim, bytes(4096), flags), FormatError)


# -- AES-GCM commits to no key


def _multiply(left: int, right: int) -> int:
    """Product in the field of GHASH (NIST SP 800-38D, section 6.3): bit 0 is the most significant."""
    result = 0
    for bit in range(127, -1, -1):
        if right >> bit & 1:
            result ^= left
        left = (left >> 1) ^ (0xE1 << 120 if left & 1 else 0)
    return result


def _power(base: int, exponent: int) -> int:
    result = 1 << 127
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        exponent >>= 1
    return result


def _encrypt_block(key: bytes, block: bytes) -> int:
    return int.from_bytes(Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(block), "big")  # noqa: S305


def _blocks(data: bytes) -> list[int]:
    padded = data + bytes(-len(data) % 16)
    return [int.from_bytes(padded[start : start + 16], "big") for start in range(0, len(padded), 16)]


def colliding_ciphertext(keys: tuple[bytes, bytes], iv: bytes, aad: bytes, head: bytes) -> bytes:
    """Ciphertext and tag that begin with `head` and are valid under both keys (Dodis et al. 2018, section 3)."""
    body = head + bytes(-len(head) % 16)
    lengths = (len(aad) * 8) << 64 | (len(body) + 16) * 8
    blocks = [*_blocks(aad), *_blocks(body), 0, lengths]
    free = len(blocks) - 2
    hashes = [_encrypt_block(key, bytes(16)) for key in keys]
    masks = [_encrypt_block(key, iv + b"\0\0\0\1") for key in keys]

    def ghash(subkey: int) -> int:
        result = 0
        for block in blocks:
            result = _multiply(result ^ block, subkey)
        return result

    # The free block's share is X * H^2 under either key: choose X so that both tags come out the same.
    difference = ghash(hashes[0]) ^ ghash(hashes[1]) ^ masks[0] ^ masks[1]
    factor = _multiply(hashes[0], hashes[0]) ^ _multiply(hashes[1], hashes[1])
    blocks[free] = _multiply(difference, _power(factor, 2**128 - 2))
    tag = ghash(hashes[0]) ^ masks[0]
    return body + blocks[free].to_bytes(16, "big") + tag.to_bytes(16, "big")


class _Recipient:
    """A key provider who was wrapped this content-encryption key."""

    uri = "test:"

    def __init__(self, cek: bytes) -> None:
        self._cek = cek

    def unwrap(self, recipients: object, content_digest: str) -> bytearray:
        assert all(isinstance(item, Recipient) for item in recipients)  # type: ignore[attr-defined]
        return bytearray(self._cek)

    def close(self) -> None:
        return


def test_one_keyring_that_two_recipients_open_to_two_payloads_is_refused(victim: Victim) -> None:
    """One ciphertext, valid under two keys: both recipients get an authentic payload, and the commitment tells."""
    ceks = os.urandom(32), os.urandom(32)
    keyring = json.loads(victim.blob(victim.index.keyring.digest))
    iv, aad = b64url_decode(keyring["iv"], "iv"), f"{keyring['protected']}.{keyring['aad']}".encode()
    head = AESGCM(ceks[0]).encrypt(iv, victim.secret_payload, aad)[:-16]
    sealed = colliding_ciphertext(ceks, iv, aad, head)
    keyring["ciphertext"], keyring["tag"] = b64url_encode(sealed[:-16]), b64url_encode(sealed[-16:])
    forged = json.dumps(keyring).encode()

    parsed = parse_keyring(forged, victim.content.digest)
    first, second = (bytes(parsed.open([_Recipient(cek)])) for cek in ceks)
    assert first.startswith(victim.secret_payload)
    assert not second.startswith(victim.secret_payload[:8])  # the same keyring, another payload: GCM took both
    assert commitment(first) != commitment(second)
    loaded = load_artifact(victim.with_documents(keyring=forged))
    for cek in ceks:
        with pytest.raises(IntegrityError, match="commits to"):
            open_payload(loaded, [_Recipient(cek)])


def test_a_frame_that_opens_under_two_keys_needs_the_key_that_was_committed_to(victim: Victim) -> None:
    """The payload with another volume key is refused before any frame is read, whatever the frame would do."""
    secret = parse_payload(victim.secret_payload, victim.content.payload_commitment).volumes[0]
    payload = build_payload([replace(secret, key=os.urandom(32))])
    store = victim.with_documents(keyring=reseal(victim, payload))
    store.reads = 0
    assert isinstance(attack(victim, store), IntegrityError)
    assert store.reads == 0


def test_no_refusal_carries_a_secret(victim: Victim) -> None:
    """No error that the forgeries above cause carries a key or the payload."""
    secrets = [victim.volume_key, b64url_encode(victim.volume_key).encode(), victim.secret_payload]
    for payload in altered_payloads(victim).values():
        error = attack(victim, victim.with_documents(keyring=reseal(victim, payload)))
        assert not any(secret in str(error).encode() + repr(error).encode() for secret in secrets)
        assert error is not None
        assert error.__cause__ is None
        assert error.__context__ is None
