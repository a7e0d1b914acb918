"""Encryption that fails, wherever it does: nothing under the tag, every blob taken back, no stray file left."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from encfs.artifact import open_artifact
from encfs.errors import NotFoundError, SourceError, StorageError
from encfs.keys.providers import provider_from_uri
from encfs.oci.blobs import BlobSink, BlobWriter, Buffer, Descriptor
from encfs.oci.layout import Layout
from encfs.progress import NoProgress, Progress
from encfs.trust import TrustPolicy
from imagetool.pipeline.encrypt import EncryptOptions, EncryptResult, encrypt
from tests.support.artifacts import Keys, encrypt_tree, make_keys, make_small_tree
from tests.support.memory import MemoryStore

LARGE = 6 << 20


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small file, one that takes several reads, and more behind it."""
    path = make_small_tree(tmp_path / "source")
    (path / "a-large").write_bytes(os.urandom(LARGE))
    (path / "z-directory").mkdir()
    (path / "z-directory" / "last").write_text("last")
    return path


def run(source: Path, sink: BlobSink, keys: Keys, progress: Progress | None = None) -> EncryptResult:
    return encrypt(
        source,
        sink,
        [keys.public],
        signers=[keys.signer],
        options=EncryptOptions("acme/model", 1),
        tag="v1",
        progress=progress or NoProgress(),
    )


def files_of(layout: Path) -> list[str]:
    return sorted(str(path.relative_to(layout)) for path in layout.rglob("*") if not path.is_dir())


EMPTY_LAYOUT = ["index.json", "oci-layout"]


class Acting(NoProgress):
    """Does something once, when the first bytes were read."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action
        self.ended = False

    def advance(self, amount: int) -> None:
        if self._action is not None:
            action, self._action = self._action, None
            action()

    def end(self) -> None:
        self.ended = True


# -- sources that are not what they were


def rewrite(path: Path) -> None:
    """Other bytes, the same size, and the old modification time."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda source: os.truncate(source / "a-large", LARGE + 1),
    "shrinks": lambda source: os.truncate(source / "a-large", 1 << 20),
    "is emptied": lambda source: os.truncate(source / "a-large", 0),
    "is rewritten": lambda source: rewrite(source / "a-large"),
    "is chmodded": lambda source: (source / "a-large").chmod(0o600),
    "loses a later file": lambda source: (source / "small.txt").unlink(),
    "loses a later directory": lambda source: shutil.rmtree(source / "z-directory"),
    "vanishes": shutil.rmtree,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_is_refused_and_leaves_nothing(
    tmp_path: Path, keys: Keys, source: Path, change: str
) -> None:
    layout = Layout(tmp_path / "layout", create=True)
    progress = Acting(lambda: CHANGES[change](source))
    with pytest.raises(SourceError) as caught:
        run(source, layout, keys, progress)
    assert str(source) in caught.value.message
    assert progress.ended
    assert layout.tags() == []
    assert files_of(tmp_path / "layout") == EMPTY_LAYOUT
    layout.close()
    assert not (tmp_path / "layout").exists()


def test_a_file_that_becomes_a_pipe_is_refused_without_waiting(
    tmp_path: Path, keys: Keys, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between `lstat` and `open`: the attributes are read there."""
    from imagetool.sources import directory

    read_xattrs = directory._read_xattrs

    def swap(full: bytes, *, follow: bool) -> tuple[tuple[bytes, bytes], ...]:
        if full.endswith(b"a-large"):
            os.unlink(full)
            os.mkfifo(full)
        return read_xattrs(full, follow=follow)

    monkeypatch.setattr(directory, "_read_xattrs", swap)
    store = MemoryStore()
    with pytest.raises(SourceError, match="changed while"):
        run(source, store, keys)
    assert store.blobs == {}


@pytest.mark.root
@pytest.mark.parametrize("name", ["a-large", "z-directory"])
def test_an_unreadable_source_is_named_and_leaves_nothing(keys: Keys, source: Path, name: str) -> None:
    store = MemoryStore()
    (source / name).chmod(0)
    # Where everybody can reach it: pytest's directories are closed to all others.
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o711)  # noqa: S103
        shutil.move(source, outer)
        os.seteuid(65534)
        try:
            with pytest.raises(SourceError, match=name) as caught:
                run(Path(outer, source.name), store, keys)
        finally:
            os.seteuid(0)
    assert "--exclude" in (caught.value.hint or "")
    assert store.blobs == {}


@pytest.mark.parametrize("path", ["missing", "x" * 300, "y/" * 3000, "small.txt/below", "nul\0"])
def test_a_source_that_is_not_there(source: Path, keys: Keys, path: str) -> None:
    store = MemoryStore()
    with pytest.raises(NotFoundError):
        run(source / path, store, keys)
    assert store.blobs == {}


# -- sinks that fail


class FailingSink:
    """A sink whose operation number `fails_at` raises, before or after it has been done."""

    def __init__(self, sink: BlobSink, error: BaseException, fails_at: int, *, after: frozenset[str]) -> None:
        self._sink, self._error, self._left, self._after = sink, error, fails_at, after

    @contextmanager
    def _operation(self, name: str) -> Iterator[None]:
        self._left -= 1
        if self._left == 0 and name not in self._after:
            raise self._error
        yield
        if self._left == 0:
            raise self._error

    @property
    def failed(self) -> bool:
        return self._left <= 0

    def create_blob(self) -> BlobWriter:
        with self._operation("create_blob"):
            return FailingWriter(self._sink.create_blob(), self._operation)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        with self._operation("write_blob"):
            return self._sink.write_blob(content, media_type)

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._sink.has_blob(descriptor)

    def remove_blob(self, descriptor: Descriptor) -> None:
        self._sink.remove_blob(descriptor)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        with self._operation("put_manifest"):
            return self._sink.put_manifest(content, media_type, tag=tag, artifact_type=artifact_type)

    def close(self) -> None:
        self._sink.close()


class FailingWriter:
    def __init__(self, writer: BlobWriter, operation: Callable[[str], object]) -> None:
        self._writer, self._operation = writer, operation

    def write(self, data: Buffer) -> None:
        with self._operation("write"):  # type: ignore[attr-defined]
            self._writer.write(data)

    def digest(self) -> str:
        return self._writer.digest()

    def commit(self, media_type: str) -> Descriptor:
        with self._operation("commit"):  # type: ignore[attr-defined]
            return self._writer.commit(media_type)

    def abort(self) -> None:
        self._writer.abort()


@pytest.mark.parametrize("error", [StorageError("disk full"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
@pytest.mark.parametrize("after", [frozenset[str](), frozenset({"write", "write_blob"})], ids=["before", "after"])
def test_every_operation_of_the_sink_may_fail(
    tmp_path: Path, keys: Keys, source: Path, error: BaseException, after: frozenset[str]
) -> None:
    layout = Layout(tmp_path / "layout", create=True)
    for number in range(1, 100):
        sink = FailingSink(layout, error, number, after=after)
        with suppress(type(error)):
            run(source, sink, keys)
        if not sink.failed:
            break
        assert layout.tags() == []
        assert files_of(tmp_path / "layout") == EMPTY_LAYOUT, number
    assert 8 < number < 99
    assert layout.tags() == ["v1"]
    layout.close()


def test_an_interrupt_after_the_tag_was_moved_keeps_what_it_names(tmp_path: Path, keys: Keys, source: Path) -> None:
    layout = Layout(tmp_path / "layout", create=True)
    for number in range(1, 100):
        sink = FailingSink(layout, KeyboardInterrupt(), number, after=frozenset({"put_manifest"}))
        with suppress(KeyboardInterrupt):
            run(source, sink, keys)
        if layout.tags():
            break
    assert sink.failed
    layout.close()
    read_back(tmp_path / "layout", keys)


def read_back(path: Path, keys: Keys) -> bytes:
    layout = Layout(path, tag="v1")
    provider = provider_from_uri(str(keys.recipient_file))
    with open_artifact(layout, keys=[provider], trust=TrustPolicy(allow_unsigned=True)) as artifact:
        content = bytes(artifact.volumes[0].read(0, artifact.volumes[0].size))
    layout.close()
    return content


def test_a_failure_keeps_the_artifact_that_the_tag_named(tmp_path: Path, keys: Keys, source: Path) -> None:
    layout = Layout(tmp_path / "layout", create=True)
    run(source, layout, keys)
    before, manifest = files_of(tmp_path / "layout"), layout.manifest("v1").digest
    for number in range(1, 100):
        sink = FailingSink(layout, StorageError("disk full"), number, after=frozenset())
        with suppress(StorageError):
            run(source, sink, keys)
        if not sink.failed:
            break
        assert files_of(tmp_path / "layout") == before
        assert layout.manifest("v1").digest == manifest
        read_back(tmp_path / "layout", keys)
    assert layout.manifest("v1").digest != manifest
    layout.close()


def test_what_cannot_be_taken_back_does_not_hide_the_reason(keys: Keys, source: Path) -> None:
    class Stubborn(MemoryStore):
        def remove_blob(self, descriptor: Descriptor) -> None:
            self.asked = getattr(self, "asked", 0) + 1
            raise StorageError("cannot delete here")

    store = Stubborn()
    for number in range(1, 100):
        sink = FailingSink(store, StorageError("disk full"), number, after=frozenset())
        with pytest.raises(StorageError, match="disk full"):
            run(source, sink, keys)
        if store.blobs and getattr(store, "asked", 0) > 1:
            return
    raise AssertionError("nothing was to be taken back")


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.root
def test_a_full_disk_leaves_nothing_whenever_it_is_full(tmp_path: Path, keys: Keys) -> None:
    """From room for nothing to room for all, page by page: the disk fills up in every single step."""
    tree = make_small_tree(tmp_path / "tree")
    page = os.sysconf("SC_PAGE_SIZE")
    failures = 0
    for pages in range(3, 40):
        with small_disk(tmp_path / "disk", pages * page) as disk:
            layout = Layout(disk / "layout", create=True)
            free = os.statvfs(disk).f_bfree
            failure: StorageError | None = None
            try:
                encrypt_tree(tree, layout, keys)
            except StorageError as error:
                failure = error
            if failure is not None:
                failures += 1
                assert failure.hint
                assert layout.tags() == []
                assert files_of(disk / "layout") == EMPTY_LAYOUT
                assert os.statvfs(disk).f_bfree == free
            layout.close()
            if failure is None:
                read_back(disk / "layout", keys)
                assert failures > 8
                return
    raise AssertionError("it never fitted")


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "٣", "9" * 5000, "253402300800"])
def test_a_malformed_source_date_epoch_is_a_usage_error(
    keys: Keys, source: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    from encfs.errors import UsageError

    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        run(source, MemoryStore(), keys)
