"""Every byte flipped, every length cut, everything swapped, repeated and mixed: refused, or without effect.

The adversary owns the store and keeps every digest that he writes consistent (tests/support/hostile.py). Nobody here
holds a key; `test_malicious_recipient` is about those who do.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable

import pytest

from encfs.artifact import open_artifact
from encfs.errors import (
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RollbackError,
    TrustError,
    UnsignedError,
    WrongSignerError,
)
from encfs.format.tree import ENTRY_SIZE, FANOUT, TreeGeometry
from encfs.trust import TrustPolicy
from tests.support.artifacts import make_keys, make_small_tree
from tests.support.hostile import Victim, attack, clone, flips, make_victim, read_all, with_manifest

FRAME = 4096
STORED = FRAME + 16
ALL_BITS = tuple(1 << bit for bit in range(8))


@pytest.fixture(scope="module", params=["blake3", "sha256"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """The smallest artifact with a file in it: three frames."""
    directory = tmp_path_factory.mktemp("victim")
    (directory / "tree").mkdir()
    (directory / "tree" / "secret").write_bytes(os.urandom(3000))
    return make_victim(directory / "tree", make_keys(directory), hash_name=request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Victim, Victim]:
    """Versions 1 and 2 of one line of releases: same recipient, same signer, same sizes everywhere, other bytes."""
    directory = tmp_path_factory.mktemp("pair")
    keys = make_keys(directory)
    old = make_victim(make_small_tree(directory / "old"), keys, version=1)
    new = make_victim(make_small_tree(directory / "new"), keys, version=2)
    assert len(old.plaintext) == len(new.plaintext)
    assert old.plaintext != new.plaintext
    return old, new


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """Three nodes of level 0 under one of level 1."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "tree").mkdir()
    (directory / "tree" / "weights").write_bytes(os.urandom(2 * FANOUT * FRAME + 5 * FRAME))
    large = make_victim(directory / "tree", make_keys(directory))
    assert len(TreeGeometry.of(large.content.volumes[0].frames).levels) == 2
    return large


def unsigned(victim: Victim) -> TrustPolicy:
    """A reader who takes anything: what protects him is not the signature."""
    return TrustPolicy(allow_unsigned=True)


# -- every byte


def test_every_flipped_bit_of_the_tree_is_refused(victim: Victim) -> None:
    for position, changed in flips(victim.blob(victim.tree_digest), ALL_BITS):
        error = attack(victim, victim.with_blob(victim.tree_digest, changed))
        assert isinstance(error, IntegrityError), position


def test_every_flipped_byte_of_the_segment_is_refused(victim: Victim) -> None:
    """In place, under an open artifact; the untouched frames stay readable."""
    blob = bytearray(victim.blob(victim.segment_digest))
    with open_artifact(victim.with_blob(victim.segment_digest, blob), keys=[victim.provider], trust=victim.trust) as it:
        [volume] = it.volumes
        buffer = memoryview(bytearray(volume.size))
        for position in range(len(blob)):
            blob[position] ^= 1 << position % 8
            with pytest.raises(IntegrityError):
                volume.read_into(0, buffer)
            assert not any(buffer), position
            blob[position] ^= 1 << position % 8
            if position % STORED == 0:
                assert volume.read_into(0, buffer) == len(victim.plaintext)
                assert buffer == victim.plaintext


@pytest.mark.parametrize("policy", [None, unsigned], ids=["signed", "unsigned"])
def test_every_flipped_bit_of_the_descriptor_is_refused(
    victim: Victim, policy: Callable[[Victim], TrustPolicy] | None
) -> None:
    trust = policy(victim) if policy else None
    for position, changed in flips(victim.content.content, ALL_BITS):
        assert attack(victim, victim.with_documents(content=changed), trust) is not None, position


def test_every_flipped_bit_of_the_keyring_is_refused_or_without_effect(victim: Victim) -> None:
    keyring = victim.blob(victim.index.keyring.digest)
    refused = sum(
        attack(victim, victim.with_documents(keyring=changed), unsigned(victim)) is not None
        for _, changed in flips(keyring, ALL_BITS)
    )
    # Only the key id of a recipient is a hint without effect.
    assert refused >= 8 * (len(keyring) - 60)


def test_every_flipped_bit_of_the_signature_is_refused_or_without_effect(victim: Victim) -> None:
    [signature] = victim.signatures
    refused = 0
    for position, changed in flips(signature, ALL_BITS):
        error = attack(victim, victim.with_documents(signatures=[changed]))
        assert error is None or isinstance(error, WrongSignerError | FormatError), position
        refused += error is not None
    # `keyid` is ignored, and members that DSSE does not know are.
    assert refused >= 8 * (len(signature) - 100)


def test_every_flipped_bit_of_the_manifest_is_refused_or_without_effect(victim: Victim) -> None:
    assert victim.store.latest is not None
    for _, changed in flips(victim.store.latest.content, ALL_BITS):
        attack(victim, with_manifest(victim.store, changed))


@pytest.mark.parametrize("part", ["content", "keyring", "signature"])
def test_documents_are_refused_where_their_digest_does_not_fit(victim: Victim, part: str) -> None:
    index = victim.index
    digest = {"content": index.config, "keyring": index.keyring, "signature": index.signatures[0]}[part].digest
    for position, changed in flips(victim.blob(digest)):
        assert isinstance(attack(victim, victim.with_blob(digest, changed)), IntegrityError), position


# -- every length


@pytest.mark.parametrize("part", ["content", "keyring", "signature", "manifest"])
def test_documents_cut_at_every_length_are_refused(victim: Victim, part: str) -> None:
    assert victim.store.latest is not None
    documents = {
        "content": victim.content.content,
        "keyring": victim.blob(victim.index.keyring.digest),
        "signature": victim.signatures[0],
        "manifest": victim.store.latest.content,
    }
    for size in range(len(documents[part])):
        cut = documents[part][:size]
        if part == "manifest":
            store = with_manifest(victim.store, cut)
        elif part == "signature":
            store = victim.with_documents(signatures=[cut])
        else:
            store = victim.with_documents(**{part: cut})  # type: ignore[arg-type]
        assert attack(victim, store) is not None, size


@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", b"{}", b"]", b"\xff" * 5000])
def test_extended_documents_are_refused_or_without_effect(victim: Victim, tail: bytes) -> None:
    assert victim.store.latest is not None
    blank = tail.isspace()
    assert attack(victim, victim.with_documents(content=victim.content.content + tail)) is not None
    keyring = victim.blob(victim.index.keyring.digest) + tail
    assert (attack(victim, victim.with_documents(keyring=keyring)) is None) == blank
    signatures = [victim.signatures[0] + tail]
    assert (attack(victim, victim.with_documents(signatures=signatures)) is None) == blank
    manifest = victim.store.latest.content + tail
    assert (attack(victim, with_manifest(victim.store, manifest)) is None) == blank


@pytest.mark.parametrize("filler", [0, 0xFF])
def test_a_tree_that_ends_in_filler_is_refused_from_every_length(victim: Victim, filler: int) -> None:
    """A store that goes on with zeros where it has lost the rest."""
    original = victim.blob(victim.tree_digest)
    blob = bytearray(original)
    for position in reversed(range(len(blob))):
        blob[position] = filler
        if blob != original:
            error = attack(victim, victim.with_blob(victim.tree_digest, bytes(blob)))
            assert isinstance(error, IntegrityError), position


@pytest.mark.parametrize("filler", [0, 0xFF])
def test_a_segment_that_ends_in_filler_is_refused_from_every_length(victim: Victim, filler: int) -> None:
    original = victim.blob(victim.segment_digest)
    blob = bytearray(original)
    with open_artifact(victim.with_blob(victim.segment_digest, blob), keys=[victim.provider], trust=victim.trust) as it:
        [volume] = it.volumes
        buffer = memoryview(bytearray(volume.size))
        for position in reversed(range(len(blob))):
            blob[position] = filler
            if blob != original:
                with pytest.raises(IntegrityError):
                    volume.read_into(0, buffer)


# -- swapped, repeated, dropped


def test_every_pair_of_frames_swapped_and_repeated_is_refused(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    blob = victim.blob(victim.segment_digest)
    frames = [blob[start : start + STORED] for start in range(0, len(blob), STORED)]
    for first, second in itertools.permutations(range(len(frames)), 2):
        repeated, swapped = list(frames), list(frames)
        repeated[first] = frames[second]
        swapped[first], swapped[second] = frames[second], frames[first]
        for changed in (repeated, swapped):
            error = attack(victim, victim.with_blob(victim.segment_digest, b"".join(changed)))
            assert isinstance(error, IntegrityError)


def test_every_pair_of_tree_entries_swapped_and_repeated_is_refused(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    blob = victim.blob(victim.tree_digest)
    entries = [blob[start : start + ENTRY_SIZE] for start in range(0, len(blob), ENTRY_SIZE)]
    for first, second in itertools.permutations(range(len(entries)), 2):
        repeated, swapped = list(entries), list(entries)
        repeated[first] = entries[second]
        swapped[first], swapped[second] = entries[second], entries[first]
        for changed in (repeated, swapped):
            assert isinstance(attack(victim, victim.with_blob(victim.tree_digest, b"".join(changed))), IntegrityError)


def test_frames_and_their_entries_swapped_together_are_refused(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    tree, segment = bytearray(victim.blob(victim.tree_digest)), bytearray(victim.blob(victim.segment_digest))
    tree[:ENTRY_SIZE], tree[ENTRY_SIZE : 2 * ENTRY_SIZE] = tree[ENTRY_SIZE : 2 * ENTRY_SIZE], tree[:ENTRY_SIZE]
    segment[:STORED], segment[-STORED:] = segment[-STORED:], segment[:STORED]
    store = victim.with_blob(victim.tree_digest, bytes(tree))
    store.blobs[victim.segment_digest] = bytes(segment)
    assert isinstance(attack(victim, store), IntegrityError)


def test_every_node_swapped_and_repeated_is_refused(large: Victim) -> None:
    geometry = TreeGeometry.of(large.content.volumes[0].frames)
    blob = large.blob(large.tree_digest)
    assert geometry.levels[0].nodes == 3
    for level in geometry.levels[:-1]:
        spans = [level.span(node) for node in range(level.nodes)]
        for (to, size), (start, _) in itertools.permutations(spans, 2):
            other = blob[start : start + size]
            changed = blob[:to] + other + blob[to + len(other) :]
            assert len(changed) == len(blob)
            assert isinstance(attack(large, large.with_blob(large.tree_digest, changed)), IntegrityError)
    top = geometry.levels[-1]
    hashes = [blob[start : start + 32] for start in range(0, top.size, 32)]
    for order in itertools.product(range(3), repeat=3):
        if order != (0, 1, 2):
            changed = b"".join(hashes[number] for number in order) + blob[top.size :]
            assert isinstance(attack(large, large.with_blob(large.tree_digest, changed)), IntegrityError)


def test_every_frame_of_a_large_volume_replaced_by_others_is_refused(large: Victim) -> None:
    """One read per frame: what is refused is exactly the frame that changed, and all others stay readable."""
    blob = large.blob(large.segment_digest)
    count = len(blob) // STORED
    changing = bytearray(blob)
    store = large.with_blob(large.segment_digest, b"")
    store.blobs[large.segment_digest] = changing
    with open_artifact(store, keys=[large.provider], trust=large.trust, cache_size=0) as artifact:
        [volume] = artifact.volumes
        for place in range(count):
            index = (place + 1) % count  # frame 0 lies last
            start = place * STORED
            expected = large.plaintext[index * FRAME : (index + 1) * FRAME]
            for other in (place + 1, place + FANOUT, place * 7 + 3):
                source = other % count * STORED
                if source == start:
                    continue
                changing[start : start + STORED] = blob[source : source + STORED]
                with pytest.raises(IntegrityError, match=f"frame {index}:"):
                    volume.read_into(index * FRAME, memoryview(bytearray(FRAME)))
            changing[start : start + STORED] = blob[start : start + STORED]
            assert volume.read(index * FRAME, FRAME) == expected


# -- mixed and replayed


PARTS = ("content", "keyring", "signature", "tree", "segment")


@pytest.mark.parametrize("trusting", [False, True], ids=["signed", "unsigned"])
def test_parts_of_two_artifacts_do_not_mix(pair: tuple[Victim, Victim], trusting: bool) -> None:
    old, new = pair
    trust = TrustPolicy(allow_unsigned=True) if trusting else old.trust
    for choice in itertools.product((old, new), repeat=len(PARTS)):
        chosen = dict(zip(PARTS, choice, strict=True))
        content = chosen["content"]
        store = content.with_documents(
            content=content.content.content,
            keyring=chosen["keyring"].blob(chosen["keyring"].index.keyring.digest),
            signatures=chosen["signature"].signatures,
        )
        # The frames of either are served under the digests that the descriptor asks for.
        store.blobs[content.tree_digest] = chosen["tree"].blob(chosen["tree"].tree_digest)
        store.blobs[content.segment_digest] = chosen["segment"].blob(chosen["segment"].segment_digest)
        needed = {part: chosen[part] for part in PARTS if not (trusting and part == "signature")}
        if len({victim.version for victim in needed.values()}) == 1:
            assert attack(content, store, trust) is None
        else:
            error = attack(content, store, trust)
            assert error is not None, {part: item.version for part, item in chosen.items()}
            if chosen["signature"] is not content and not trusting:
                assert isinstance(error, TrustError | IntegrityError)


def test_replay_of_an_older_version_is_refused_by_the_floor(pair: tuple[Victim, Victim]) -> None:
    old, new = pair
    assert attack(old, old.store) is None
    assert isinstance(attack(old, old.store, new.trust), RollbackError)
    assert attack(new, new.store, old.trust) is None


def test_replayed_signature_of_the_older_version_does_not_vouch(pair: tuple[Victim, Victim]) -> None:
    old, new = pair
    assert isinstance(attack(new, new.with_documents(signatures=old.signatures)), WrongSignerError)
    # Beside the right one it does no harm.
    assert attack(new, new.with_documents(signatures=[*old.signatures, *new.signatures])) is None


def test_signatures_stripped_or_multiplied(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    assert isinstance(attack(victim, victim.with_documents(signatures=[])), UnsignedError)
    assert attack(victim, victim.with_documents(signatures=victim.signatures * 16)) is None
    assert isinstance(attack(victim, victim.with_documents(signatures=victim.signatures * 17)), FormatError)


def test_no_keyring_and_two_keyrings_are_refused(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    assert victim.store.latest is not None
    manifest = json.loads(victim.store.latest.content)
    keyring, *rest = manifest["layers"]
    for layers in (rest, [keyring, keyring, *rest]):
        changed = json.dumps({**manifest, "layers": layers}).encode()
        assert isinstance(attack(victim, with_manifest(victim.store, changed)), FormatError)


def test_order_and_presence_of_data_layers_do_not_matter(pair: tuple[Victim, Victim]) -> None:
    """Trees and segments are found by the descriptor, so what the manifest says of them is without effect."""
    victim, other = pair
    assert victim.store.latest is not None
    manifest = json.loads(victim.store.latest.content)
    layers = manifest["layers"]
    foreign = json.loads(other.store.latest.content)["layers"][-2:]  # type: ignore[union-attr]
    for changed in (layers[::-1], layers[:2], [*layers[:2], *foreign], [*foreign, *layers], layers + layers[2:] * 50):
        store = with_manifest(victim.store, json.dumps({**manifest, "layers": changed}).encode())
        assert attack(victim, store) is None


def test_missing_blobs_are_named(pair: tuple[Victim, Victim]) -> None:
    victim = pair[0]
    digests = [victim.index.config.digest, *(item.digest for item in victim.index.blobs)]
    assert len(digests) == 5
    for digest in digests:
        store = clone(victim.store)
        del store.blobs[digest]
        error = attack(victim, store)
        assert isinstance(error, NotFoundError)
        assert digest in error.message


def test_nothing_is_given_out_before_trust_and_keys(victim: Victim) -> None:
    """The refusals come before any segment is touched."""
    store = clone(victim.store)
    store.blobs[victim.segment_digest] = b""
    store.blobs[victim.tree_digest] = b""
    with pytest.raises(UnsignedError):
        read_all(store, [victim.provider], TrustPolicy())
    with pytest.raises(EncfsError, match="no key was given"):
        read_all(store, [], victim.trust)
