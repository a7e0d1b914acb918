"""A layout directory whose files are cut, extended, replaced by other kinds of files, or change while they are read."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from encfs.artifact import open_artifact
from encfs.errors import EncfsError, IntegrityError
from encfs.format.frames import FrameCipher
from encfs.format.suite import SUITES
from encfs.keys.payload import parse_payload
from encfs.keys.providers import KeyProvider, provider_from_uri
from encfs.oci.layout import Layout
from encfs.trust import TrustPolicy
from tests.support.artifacts import ARTIFACT_ID, encrypt_tree, make_keys, make_small_tree
from tests.support.hostile import SwitchingStore, Victim, attack, flips, make_victim, read_all

FRAME = 4096
STORED = FRAME + 16


@dataclass(frozen=True, slots=True)
class OnDisk:
    """An artifact in a layout directory, and what it says."""

    path: Path
    provider: KeyProvider
    trust: TrustPolicy
    plaintext: bytes

    def read(self) -> bytes:
        layout = Layout(self.path, tag="v1")
        try:
            return read_all(layout, [self.provider], self.trust)
        finally:
            layout.close()

    def blobs(self) -> list[Path]:
        return sorted((self.path / "blobs" / "sha256").iterdir())


@pytest.fixture
def on_disk(tmp_path: Path) -> OnDisk:
    keys = make_keys(tmp_path)
    layout = Layout(tmp_path / "layout", create=True)
    encrypt_tree(make_small_tree(tmp_path / "tree"), layout, keys, frame_size=FRAME)
    provider = provider_from_uri(str(keys.recipient_file))
    trust = TrustPolicy(keys=(keys.verifier,), artifact_id=ARTIFACT_ID, min_version=1)
    plaintext = read_all(layout, [provider], trust)
    layout.close()
    return OnDisk(tmp_path / "layout", provider, trust, plaintext)


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return make_victim(make_small_tree(tmp_path / "tree"), make_keys(tmp_path))


def outcome(on_disk: OnDisk) -> EncfsError | None:
    """The refusal, or None for exactly the right plaintext; everything else fails the test."""
    try:
        assert on_disk.read() == on_disk.plaintext
    except EncfsError as error:
        return error
    return None


def test_every_file_cut_at_every_length_is_refused(on_disk: OnDisk) -> None:
    files = [*on_disk.blobs(), on_disk.path / "index.json", on_disk.path / "oci-layout"]
    assert len(files) == 8
    for file in files:
        whole = file.read_bytes()
        # Every length of the documents and the tree; the segment at the edges of its frames and between.
        sizes = set(range(len(whole))) if len(whole) < 4096 else set(range(0, len(whole), 16)) | {len(whole) - 1}
        for size in sorted(sizes, reverse=True):
            os.truncate(file, size)
            assert outcome(on_disk) is not None, (file.name, size)
        file.write_bytes(whole)
    assert outcome(on_disk) is None


@pytest.mark.parametrize("tail", [b"\0", b"\n", b"x" * 4112])
def test_every_extended_blob_is_refused(on_disk: OnDisk, tail: bytes) -> None:
    for file in on_disk.blobs():
        whole = file.read_bytes()
        file.write_bytes(whole + tail)
        assert isinstance(outcome(on_disk), IntegrityError)
        file.write_bytes(whole)


def test_every_flipped_byte_of_the_index_is_refused_or_without_effect(on_disk: OnDisk) -> None:
    for name in ("index.json", "oci-layout"):
        file = on_disk.path / name
        whole = file.read_bytes()
        for _, changed in flips(whole, (1, 0x10, 0x80)):
            file.write_bytes(changed)
            outcome(on_disk)
        file.write_bytes(whole)


def test_every_pair_of_blobs_swapped_is_refused(on_disk: OnDisk) -> None:
    blobs = on_disk.blobs()
    for first, second in itertools.combinations(blobs, 2):
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        assert outcome(on_disk) is not None
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])


def test_blobs_that_are_no_regular_files_are_refused_without_waiting(on_disk: OnDisk, tmp_path: Path) -> None:
    for file in on_disk.blobs():
        kept = tmp_path / "kept"
        file.rename(kept)
        os.mkfifo(file)
        assert isinstance(outcome(on_disk), EncfsError)
        file.unlink()
        file.mkdir()
        assert isinstance(outcome(on_disk), EncfsError)
        file.rmdir()
        file.symlink_to(kept)
        assert isinstance(outcome(on_disk), EncfsError)
        file.unlink()
        file.symlink_to("/dev/zero")
        assert isinstance(outcome(on_disk), EncfsError)
        file.unlink()
        kept.rename(file)
    assert outcome(on_disk) is None


@pytest.mark.parametrize("name", ["index.json", "oci-layout"])
def test_index_and_marker_that_are_no_regular_files_are_refused_without_waiting(on_disk: OnDisk, name: str) -> None:
    file = on_disk.path / name
    file.unlink()
    os.mkfifo(file)
    writer = os.open(file, os.O_RDWR | os.O_NONBLOCK)  # a reader now waits for ever, unless it takes care not to
    try:
        assert outcome(on_disk) is not None
    finally:
        os.close(writer)
    assert outcome(on_disk) is not None
    file.unlink()
    file.mkdir()
    assert outcome(on_disk) is not None
    file.rmdir()
    file.symlink_to("/dev/zero")
    assert outcome(on_disk) is not None


def test_endless_documents_are_not_read_to_the_end(on_disk: OnDisk) -> None:
    for name in ("index.json", "oci-layout"):
        file = on_disk.path / name
        whole = file.read_bytes()
        os.truncate(file, 1 << 40)
        assert outcome(on_disk) is not None
        file.write_bytes(whole)
    assert outcome(on_disk) is None


def test_a_segment_cut_while_it_is_open_is_refused(on_disk: OnDisk) -> None:
    segment = max(on_disk.blobs(), key=lambda file: file.stat().st_size)
    whole = segment.read_bytes()
    layout = Layout(on_disk.path, tag="v1")
    with open_artifact(layout, keys=[on_disk.provider], trust=on_disk.trust) as artifact:
        [volume] = artifact.volumes
        buffer = memoryview(bytearray(volume.size))
        for size in range(len(whole) - 1, 0, -97):
            os.truncate(segment, size)
            with pytest.raises(IntegrityError, match="shorter"):
                volume.read_into(0, buffer)
            assert not any(buffer)
            # The frames that are left are still good. Frame 0 lies last, the others in order.
            kept = size // STORED
            assert volume.read(FRAME, kept * FRAME) == on_disk.plaintext[FRAME : (kept + 1) * FRAME]
        segment.write_bytes(whole)
        assert volume.read(0, volume.size) == on_disk.plaintext
    layout.close()


# -- contents that change between the check and the use


def forge(victim: Victim) -> bytes:
    """The segment with every frame sealed anew under the right key, nonce and associated data, for other plaintext."""
    content = victim.content
    descriptor = content.volumes[0]
    secret = parse_payload(victim.secret_payload, content.payload_commitment).volumes[0]
    cipher = FrameCipher(content.suite, descriptor.id, secret.key)
    sealed = bytearray()
    for index in (*range(1, descriptor.frames), 0):
        length = descriptor.geometry.length(index)
        frame = bytearray(length + 16)
        cipher.seal_into(index, memoryview(b"forged! " * (length // 8)), length, 0, memoryview(frame))
        sealed += frame
    assert len(sealed) == descriptor.segments[0].size
    return bytes(sealed)


def test_forged_frames_are_authentic_under_the_key(victim: Victim) -> None:
    """What the tests below rest on: without the hash tree, a reader would take these frames."""
    descriptor = victim.content.volumes[0]
    cipher = FrameCipher(SUITES["blake3"], descriptor.id, victim.volume_key)
    out = bytearray(FRAME)
    cipher.open_into(1, memoryview(forge(victim))[:STORED], FRAME, 0, memoryview(out))
    assert out == b"forged! " * (FRAME // 8)


@pytest.mark.parametrize("part", ["segment", "tree"])
def test_every_pattern_of_changes_between_reads_is_harmless(victim: Victim, part: str) -> None:
    """Read k sees the authentic or the forged content, for every pattern over the reads that happen."""
    if part == "segment":
        digest, other = victim.segment_digest, forge(victim)
    else:
        digest = victim.tree_digest
        other = victim.blob(digest)[48:] + victim.blob(digest)[:48]
    outcomes = set()
    for pattern in range(32):

        def choose(count: int, pattern: int = pattern) -> bool:
            return bool(pattern >> min(count, 4) & 1)

        error = attack(victim, SwitchingStore(victim.store, digest, other, choose))
        assert error is None or isinstance(error, IntegrityError)
        outcomes.add(type(error))
    assert outcomes == {type(None), IntegrityError}


@pytest.fixture
def flickering(victim: Victim, tmp_path: Path) -> Iterator[tuple[Victim, Path]]:
    """The victim in a layout whose segment is switched to forged frames and back, all the time, in a thread."""
    layout = Layout(tmp_path / "flickering", create=True)
    for digest, blob in victim.store.blobs.items():
        assert layout.write_blob(bytes(blob), "application/octet-stream").digest == digest
    assert victim.store.latest is not None
    layout.put_manifest(victim.store.latest.content, victim.store.latest.media_type, tag="v1")
    layout.close()
    file = layout.path / "blobs" / "sha256" / victim.segment_digest.removeprefix("sha256:")
    contents = victim.blob(victim.segment_digest), forge(victim)
    stop = threading.Event()

    def switch() -> None:
        descriptor = os.open(file, os.O_WRONLY)
        try:
            for content in itertools.cycle(contents):
                os.pwrite(descriptor, content, 0)
                if stop.wait(0.0002):
                    break
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        yield victim, layout.path
    finally:
        stop.set()
        thread.join()
    shutil.rmtree(layout.path)


def test_a_file_that_changes_while_it_is_read_gives_the_right_bytes_or_none(flickering: tuple[Victim, Path]) -> None:
    victim, path = flickering
    layout = Layout(path, tag="v1")
    right = refused = 0
    with open_artifact(layout, keys=[victim.provider], trust=victim.trust, cache_size=0) as artifact:
        [volume] = artifact.volumes
        buffer = memoryview(bytearray(volume.size))
        for _ in range(3000):
            try:
                volume.read_into(0, buffer)
            except IntegrityError:
                refused += 1
                assert not any(buffer)
            else:
                right += 1
                assert buffer == victim.plaintext
            if right > 20 and refused > 20:
                break
    layout.close()
    assert refused
    assert right
