"""The OCI layout: what it writes, what it keeps, what it refuses, and what interruption leaves behind."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    TransportError,
    UnsupportedError,
    UsageError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.oci.files import RESUMABLE_DAYS, TEMPORARY_PREFIX, FilePool, PooledFile
from encfs.oci.layout import Layout
from tests.support.nobody import NOBODY, as_nobody

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
SEGMENT = "application/vnd.encfs.segment.v1"
BIG = 9 << 20  # large enough for a copy to be resumable


def describe(content: bytes) -> Descriptor:
    return Descriptor(SEGMENT, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def blob_file(path: Path, descriptor: Descriptor) -> Path:
    return path / "blobs/sha256" / descriptor.digest.removeprefix("sha256:")


def make_empty(path: Path) -> None:
    """As `umoci init` makes one."""
    (path / "blobs/sha256").mkdir(parents=True)
    (path / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def temporaries(path: Path) -> list[str]:
    return [item.name for item in path.rglob(".encfs*")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layout"


@pytest.fixture
def layout(path: Path) -> Iterator[Layout]:
    layout = Layout(path, create=True)
    yield layout
    layout.close()


# -- blobs


def test_blob_comes_back(layout: Layout, path: Path) -> None:
    content = random.Random(1).randbytes(3_000_001)
    writer = layout.create_blob()
    for start in range(0, len(content), 700_001):  # below and above what is hashed in a thread
        writer.write(memoryview(content)[start : start + 700_001])
    assert not any(path.glob("blobs/sha256/*")), "invisible until it is committed"
    blob = writer.commit(SEGMENT)
    writer.abort()
    assert blob == describe(content)
    assert layout.read_blob(blob, limit=4 << 20) == content
    assert b"".join(layout.stream_blob(blob, chunk_size=65537)) == content
    assert b"".join(layout.stream_blob(blob, offset=2_999_990)) == content[2_999_990:]
    opened = layout.open_blob(blob)
    buffer = memoryview(bytearray(1000))
    opened.read_into(1_234_567, buffer)
    assert buffer == content[1_234_567:1_235_567]
    assert opened.try_read_into(0, buffer)
    assert buffer == content[:1000]
    with pytest.raises(IntegrityError, match="shorter"):
        opened.read_into(len(content) - 10, buffer)
    assert not opened.discard(0, 10)
    opened.close()
    opened.close()
    assert not temporaries(path)


def test_empty_blob(layout: Layout) -> None:
    blob = layout.write_blob(b"", SEGMENT)
    assert layout.read_blob(blob, limit=0) == b""
    assert list(layout.stream_blob(blob)) == []


def test_aborted_blob_leaves_nothing(layout: Layout, path: Path) -> None:
    writer = layout.create_blob()
    writer.write(bytes(5 << 20))
    writer.abort()
    writer.abort()
    assert sorted(item.name for item in path.rglob("*") if item.is_file()) == ["index.json", "oci-layout"]


def test_equal_blob_is_kept_and_one_of_another_size_replaced(layout: Layout, path: Path) -> None:
    blob = layout.write_blob(b"content", SEGMENT)
    inode = blob_file(path, blob).stat().st_ino
    layout.write_blob(b"content", SEGMENT)
    assert blob_file(path, blob).stat().st_ino == inode
    blob_file(path, blob).write_bytes(b"cont")
    assert not layout.has_blob(blob)
    layout.write_blob(b"content", SEGMENT)
    assert layout.has_blob(blob)
    assert layout.read_blob(blob, limit=100) == b"content"
    assert not temporaries(path)


def test_wrong_content_size_and_kind_of_file_are_refused(layout: Layout, path: Path, tmp_path: Path) -> None:
    blob = layout.write_blob(b"content", SEGMENT)
    file = blob_file(path, blob)
    with pytest.raises(FormatError):
        layout.read_blob(blob, limit=6)
    file.write_bytes(b"CONTENT")
    with pytest.raises(IntegrityError):
        layout.read_blob(blob, limit=100)
    with pytest.raises(IntegrityError):
        list(layout.stream_blob(blob))
    file.write_bytes(b"content and more")
    for use in (lambda: layout.read_blob(blob, limit=100), lambda: layout.open_blob(blob)):
        with pytest.raises(IntegrityError):
            use()
    file.unlink()
    assert not layout.has_blob(blob)
    with pytest.raises(NotFoundError):
        layout.open_blob(blob)
    (tmp_path / "elsewhere").write_bytes(b"content")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EncfsError):
        layout.read_blob(blob, limit=100)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(IntegrityError, match="regular"):
        layout.open_blob(blob)
    file.unlink()
    file.mkdir()
    with pytest.raises(IntegrityError, match="regular"):
        layout.open_blob(blob)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "sha512:" + "a" * 64, "", "x"])
def test_digests_are_no_paths(layout: Layout, digest: str) -> None:
    blob = Descriptor(SEGMENT, digest, 1)
    for use in (lambda: layout.open_blob(blob), lambda: layout.has_blob(blob), lambda: layout.remove_blob(blob)):
        with pytest.raises(FormatError):
            use()


def test_removed_blob_is_gone_and_removing_again_is_harmless(layout: Layout) -> None:
    blob = layout.write_blob(b"content", SEGMENT)
    layout.remove_blob(blob)
    layout.remove_blob(blob)
    assert not layout.has_blob(blob)


def test_full_disk_is_a_storage_error(layout: Layout, path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = layout.create_blob()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(StorageError):
            writer.write(bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.abort()
    assert not list(path.glob("blobs/sha256/*"))


# -- open files


def test_more_blobs_than_descriptors(layout: Layout) -> None:
    layout._files = FilePool(4)
    blobs = [layout.write_blob(b"%d" % number, SEGMENT) for number in range(40)]
    opened = [layout.open_blob(blob) for blob in blobs]
    before = len(os.listdir("/proc/self/fd"))
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        choice = random.Random(seed)
        try:
            for _ in range(300):
                number = choice.randrange(40)
                buffer = memoryview(bytearray(len(b"%d" % number)))
                opened[number].read_into(0, buffer)
                assert buffer == b"%d" % number
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    for blob in opened:
        blob.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_file_in_use_is_closed_only_afterwards(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    pool = FilePool(1)
    file = PooledFile(lambda: os.open(tmp_path / "file", os.O_RDONLY))
    state = pool.acquire(file)
    pool.close()
    assert os.pread(state.file, 1, 0) == b"x"
    pool.release(state)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pread(state.file, 1, 0)


# -- the index and its tags


def test_tags(layout: Layout, path: Path) -> None:
    with pytest.raises(NotFoundError, match="empty"):
        layout.manifest()
    first = layout.put_manifest(b'{"a":1}', MANIFEST, tag="v1", artifact_type="application/x")
    assert layout.manifest().content == b'{"a":1}'
    second = layout.put_manifest(b'{"a":2}', MANIFEST, tag="v2")
    layout.put_manifest(b'{"a":2}', MANIFEST, tag="latest")
    layout.put_manifest(b'{"a":2}', MANIFEST, tag="latest")
    assert layout.tags() == ["latest", "v1", "v2"]
    assert layout.manifest("v1").digest == first.digest
    assert layout.manifest("latest").content == b'{"a":2}'
    assert layout.manifest(second.digest).content == b'{"a":2}'
    with pytest.raises(UsageError, match=r"several.*latest, v1, v2"):
        layout.manifest()
    with pytest.raises(NotFoundError, match=r"no tag 'v3'.*latest, v1, v2"):
        layout.manifest("v3")
    layout.put_manifest(b'{"a":3}', MANIFEST, tag="v1")
    assert layout.manifest("v1").content == b'{"a":3}'
    assert layout.manifest(first.digest).content == b'{"a":1}', "still there under its digest"
    layout.untag("v1")
    assert layout.tags() == ["latest", "v2"]
    with pytest.raises(NotFoundError):
        layout.untag("v1")
    with pytest.raises(UsageError):
        layout.put_manifest(b"{}", MANIFEST, tag="../x")
    index = json.loads((path / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    assert json.loads((path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def test_reference_of_the_opened_layout(layout: Layout, path: Path) -> None:
    first = layout.put_manifest(b'{"a":1}', MANIFEST, tag="v1")
    layout.put_manifest(b'{"a":2}', MANIFEST, tag="v2")
    for named in (Layout(path, tag="v1"), Layout(path, digest=first.digest)):
        assert named.manifest().content == b'{"a":1}'
        assert named.manifest("v2").content == b'{"a":2}'
        named.close()


def test_foreign_entries_and_members_survive(layout: Layout, path: Path) -> None:
    blob = layout.write_blob(b"{}", MANIFEST)
    foreign = {
        "mediaType": MANIFEST,
        "digest": blob.digest,
        "size": blob.size,
        "platform": {"architecture": "arm64", "os": "linux"},
        "annotations": {"org.opencontainers.image.ref.name": "theirs", "x": "y"},
    }
    document = {"schemaVersion": 2, "manifests": [foreign], "annotations": {"note": "kept"}}
    (path / "index.json").write_text(json.dumps(document))
    layout.put_manifest(b'{"a":1}', MANIFEST, tag="ours")
    index = json.loads((path / "index.json").read_bytes())
    assert index["manifests"][0] == foreign
    assert index["annotations"] == {"note": "kept"}
    assert layout.tags() == ["ours", "theirs"]


def test_many_writers_lose_no_tag(path: Path) -> None:
    make_empty(path)
    program = (
        "import sys; from encfs.oci.layout import Layout; l = Layout(sys.argv[1], create=True)\n"
        "for n in range(12): l.put_manifest(b'%s-%d' % (sys.argv[2].encode(), n), 'm', tag=f'{sys.argv[2]}-{n}')\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "abc"]
    shared = Layout(path)
    threads = [
        threading.Thread(target=shared.put_manifest, args=(b"t", "m"), kwargs={"tag": f"t-{n}"}) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert shared.tags() == sorted([f"{name}-{n}" for name in "abc" for n in range(12)] + [f"t-{n}" for n in range(8)])
    shared.close()


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"manifests": {}}',
        b'{"manifests": [1]}',
        b'{"manifests": [{"mediaType": "m", "digest": "sha256:../x", "size": 1}]}',
        b'{"manifests": [{"mediaType": "m", "digest": "sha256:%s", "size": -1}]}' % (b"a" * 64),
        b'{"manifests": [{"mediaType": "m", "digest": "sha256:%s", "size": true}]}' % (b"a" * 64),
        b'{"manifests": [{"mediaType": 1, "digest": "sha256:%s", "size": 1}]}' % (b"a" * 64),
        b'{"manifests": [{"mediaType": "m", "digest": "sha256:%s", "size": 1, "annotations": []}]}' % (b"a" * 64),
        b'{"manifests": [], "manifests": []}',
        b'{"manifests": ' + b"[" * 100_000,
        b'{"manifests": []}' + b" " * MAX_MANIFEST_SIZE,
    ],
)
def test_damaged_index(layout: Layout, path: Path, index: bytes) -> None:
    (path / "index.json").write_bytes(index)
    for use in (layout.manifest, layout.tags, lambda: layout.put_manifest(b"{}", MANIFEST, tag="x")):
        with pytest.raises(FormatError) as caught:
            use()
        assert len(str(caught.value)) < 300
    assert (path / "index.json").read_bytes() == index, "a damaged index is never overwritten"


def test_index_naming_an_index_is_not_followed(layout: Layout) -> None:
    layout.put_manifest(b'{"schemaVersion":2,"manifests":[]}', INDEX, tag="multi")
    with pytest.raises(UnsupportedError, match="image index"):
        layout.manifest("multi")


def test_oversized_manifest_is_not_read(layout: Layout) -> None:
    layout.put_manifest(b" " * (MAX_MANIFEST_SIZE + 1), MANIFEST, tag="huge")
    with pytest.raises(FormatError):
        layout.manifest("huge")


# -- creating and opening


def test_opening_what_is_no_layout(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Layout(tmp_path / "absent")
    with pytest.raises(NotFoundError, match="no OCI layout"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(UnsupportedError):
        Layout(tmp_path)


def test_creating(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    with pytest.raises(ConflictError):
        Layout(tmp_path / "used", create=True)
    assert [item.name for item in (tmp_path / "used").iterdir()] == ["file"]
    # A creation that was cut short before the marker was written.
    (tmp_path / "cut/blobs").mkdir(parents=True)
    (tmp_path / "cut/index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    layout = Layout(tmp_path / "cut", create=True)
    layout.put_manifest(b"{}", MANIFEST, tag="x")
    layout.close()
    layout = Layout(tmp_path / "cut", create=True)
    assert layout.tags() == ["x"]
    layout.close()


@pytest.mark.root
def test_a_layout_that_may_not_be_entered_is_not_one_that_is_missing(path: Path) -> None:
    make_empty(path)
    path.chmod(0o700)
    with as_nobody(), pytest.raises(StorageError, match="Permission denied"):
        Layout(path)


# -- copies that go on where they stopped


def unfinished_file(path: Path, blob: Descriptor) -> Path:
    return path / f"{TEMPORARY_PREFIX}{blob.digest.removeprefix('sha256:')}"


def test_interrupted_copy_goes_on(layout: Layout, path: Path) -> None:
    content = random.Random(2).randbytes(BIG)
    blob = describe(content)
    done: list[int] = []
    offsets: list[int] = []

    def cut(offset: int) -> Iterator[bytes]:
        offsets.append(offset)
        yield content[offset : offset + (5 << 20)]
        raise TransportError("cut")

    def whole(offset: int) -> Iterator[bytes]:
        offsets.append(offset)
        yield from (content[start : start + (1 << 20)] for start in range(offset, BIG, 1 << 20))

    with pytest.raises(TransportError):
        layout.copy_blob(blob, cut, done.append)
    assert not layout.has_blob(blob)
    assert len(temporaries(path)) == 1
    done.clear()
    layout.copy_blob(blob, whole, done.append)
    assert offsets == [0, 5 << 20]
    assert sum(done) == BIG
    assert layout.read_blob(blob, limit=BIG) == content
    assert not temporaries(path)


def test_copy_of_wrong_bytes_leaves_nothing_to_go_on_with(layout: Layout, path: Path) -> None:
    content = random.Random(3).randbytes(BIG)
    blob = describe(content)
    wrong = bytes(1) + content[1:]
    for stream in (
        lambda offset: iter([wrong[offset:]]),
        lambda offset: iter([content[offset:-1]]),
        lambda offset: iter([content[offset:], b"x"]),
        lambda offset: iter(lambda: bytes(1 << 20), None),  # endless
    ):
        with pytest.raises(IntegrityError):
            layout.copy_blob(blob, stream, lambda size: None)
        assert not layout.has_blob(blob)
        assert not temporaries(path)


def test_unfinished_file_that_was_damaged_costs_only_its_own_bytes(layout: Layout, path: Path) -> None:
    """A disk that lost some bytes in a power failure says nothing about the source."""
    content = random.Random(4).randbytes(BIG)
    blob = describe(content)
    unfinished = unfinished_file(path, blob)
    for damage in (b"x" * 1000, b"x" * BIG, content + b"x"):
        unfinished.write_bytes(damage)
        done: list[int] = []
        layout.copy_blob(blob, lambda offset: iter([content[offset:]]), done.append)
        assert layout.read_blob(blob, limit=BIG) == content
        assert sum(done) == BIG
        assert not temporaries(path)
        layout.remove_blob(blob)
    unfinished.write_bytes(b"x" * 1000)
    with pytest.raises(IntegrityError):
        layout.copy_blob(blob, lambda offset: iter([bytes(1) + content[offset + 1 :]]), lambda size: None)
    assert not temporaries(path)


def test_what_was_put_where_an_unfinished_file_would_lie_is_left_alone(
    layout: Layout, path: Path, tmp_path: Path
) -> None:
    content = random.Random(6).randbytes(BIG)
    blob = describe(content)
    unfinished = unfinished_file(path, blob)
    precious = tmp_path / "precious"
    precious.write_bytes(content[:100])

    def foreign() -> None:
        unfinished.write_bytes(content[:100])
        os.chown(unfinished, NOBODY, NOBODY)

    placed: list[Callable[[], object]] = [
        lambda: unfinished.symlink_to(precious),
        lambda: unfinished.hardlink_to(precious),
        lambda: os.mkfifo(unfinished),
        unfinished.mkdir,
    ]
    if os.geteuid() == 0:
        placed.append(foreign)
    for place in placed:
        place()
        layout.copy_blob(blob, lambda offset: iter([content[offset:]]), lambda size: None)
        assert layout.read_blob(blob, limit=BIG) == content
        layout.remove_blob(blob)
        assert precious.read_bytes() == content[:100]
        (unfinished.rmdir if unfinished.is_dir() else unfinished.unlink)()


def test_two_copies_of_one_blob_at_once(layout: Layout, path: Path) -> None:
    content = random.Random(5).randbytes(BIG)
    blob = describe(content)
    unfinished = unfinished_file(path, blob)
    with open(unfinished, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"of another process")
        other.flush()
        layout.copy_blob(blob, lambda offset: iter([content[offset:]]), lambda size: None)
        assert unfinished.read_bytes() == b"of another process"
    assert layout.read_blob(blob, limit=BIG) == content


def test_stale_files_are_removed_and_living_ones_not(path: Path) -> None:
    make_empty(path)
    dead = path / f"{TEMPORARY_PREFIX}{'a' * 16}"
    living = path / f"{TEMPORARY_PREFIX}{'b' * 16}"
    resumable = path / f"{TEMPORARY_PREFIX}{'c' * 64}"
    forgotten = path / f"{TEMPORARY_PREFIX}{'d' * 64}"
    for file in (dead, living, resumable, forgotten):
        file.write_bytes(b"x")
    long_ago = time.time() - (RESUMABLE_DAYS + 1) * 86400
    os.utime(forgotten, (long_ago, long_ago))
    with open(living, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Layout(path, create=True).close()
    assert sorted(temporaries(path)) == sorted([living.name, resumable.name])


def test_a_disk_that_was_full_when_the_layout_was_made_leaves_nothing_half(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(StorageError):
            Layout(path, create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with closing(Layout(path, create=True)) as layout:
        layout.put_manifest(b"{}", MANIFEST, tag="x")
        assert layout.tags() == ["x"]


def test_who_makes_a_layout_waits_for_who_takes_it_back(path: Path) -> None:
    """What is looked at and then removed, or made, must not change in between."""
    path.mkdir()
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    maker = threading.Thread(target=lambda: Layout(path, create=True).put_manifest(b"{}", MANIFEST, tag="x"))
    maker.start()
    maker.join(0.2)
    assert not list(path.iterdir())
    os.close(held)
    maker.join(60)
    with closing(Layout(path)) as layout:
        assert layout.tags() == ["x"]


def test_killed_writer_leaves_nothing_visible(path: Path) -> None:
    program = (
        "import sys, time; from encfs.oci.layout import Layout; w = Layout(sys.argv[1], create=True).create_blob()\n"
        "w.write(bytes(1 << 20)); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.kill()
    layout = Layout(path, create=True)
    assert not list(path.glob("blobs/sha256/*"))
    assert not temporaries(path)
    layout.close()


# -- layouts that nothing came into


def test_a_layout_that_nothing_came_into_goes_with_what_was_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a/b/layout"
    layout = Layout(path, create=True)
    writer = layout.create_blob()
    writer.write(b"half a blob")
    writer.abort()
    blob = layout.write_blob(b"taken back", SEGMENT)
    layout.remove_blob(blob)
    layout.close()
    layout.close()
    assert list(tmp_path.iterdir()) == []
    # A directory that was there stays.
    path.mkdir(parents=True)
    Layout(path, create=True).close()
    assert list(path.iterdir()) == []


def test_a_layout_stays_that_something_came_into(path: Path) -> None:
    layout = Layout(path, create=True)
    layout.write_blob(b"content", SEGMENT)
    layout.close()
    assert (path / "oci-layout").exists()
    other = path.parent / "tagged"
    layout = Layout(other, create=True)
    layout.put_manifest(b"{}", MANIFEST, tag="v1")
    layout.untag("v1")
    layout.close()
    assert (other / "oci-layout").exists()


def test_an_empty_layout_of_somebody_else_s_stays(path: Path) -> None:
    make_empty(path)
    Layout(path, create=True).close()
    assert (path / "oci-layout").exists()
    assert (path / "blobs/sha256").is_dir()


def test_an_unfinished_copy_is_kept_to_be_gone_on_with(path: Path) -> None:
    content = bytes(BIG)

    def cut(offset: int) -> Iterator[bytes]:
        yield content[offset : offset + (1 << 20)]
        raise TransportError("cut")

    layout = Layout(path, create=True)
    with pytest.raises(TransportError):
        layout.copy_blob(describe(content), cut, lambda size: None)
    layout.close()
    assert len(temporaries(path)) == 1
    assert (path / "oci-layout").exists()


def test_a_layout_is_not_taken_from_under_another_writer(path: Path) -> None:
    first = Layout(path, create=True)
    second = Layout(path, create=True)
    writer = second.create_blob()
    writer.write(b"content")
    first.close()
    blob = writer.commit(SEGMENT)
    second.put_manifest(b"{}", MANIFEST, tag="v1")
    second.close()
    with closing(Layout(path)) as reading:
        assert reading.read_blob(blob, limit=100) == b"content"


def test_a_directory_that_is_taken_back_while_it_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib makes it, is told that it is there, and only then looks whether it is a directory."""
    path.mkdir()
    real = Path.is_dir

    def is_dir(self: Path, **options: bool) -> bool:
        if self == path:
            monkeypatch.undo()
            path.rmdir()
        return real(self, **options)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    with closing(Layout(path, create=True)) as layout:
        layout.put_manifest(b"{}", "m", tag="v1")
    assert sorted(item.name for item in path.iterdir()) == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_is_no_directory_is_not_waited_for(path: Path, what: str) -> None:
    if what == "file":
        path.write_text("x")
    else:
        path.symlink_to("nowhere")
    with pytest.raises(StorageError, match="File exists"):
        Layout(path, create=True)
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        Layout(path / "below", create=True)


def test_layouts_that_come_and_go_lose_nothing(path: Path) -> None:
    """Several processes make the same layout and take it back again, while others put something into it."""
    program = (
        "import sys\nfrom encfs.oci.layout import Layout\n"
        "for n in range(40):\n"
        "    l = Layout(sys.argv[1], create=True)\n"
        "    if sys.argv[2] == 'put' and n == 39: l.put_manifest(sys.argv[3].encode(), 'm', tag=sys.argv[3])\n"
        "    l.close()\n"
    )
    jobs = [("idle", "a"), ("put", "b"), ("put", "c")]
    workers = [subprocess.Popen([sys.executable, "-c", program, str(path), *job]) for job in jobs]
    try:
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    with closing(Layout(path)) as reading:
        assert reading.tags() == ["b", "c"]
