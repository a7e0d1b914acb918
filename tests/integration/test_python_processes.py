"""An artifact in several processes: forked from the one that opened it, or started anew with a pickled one.

As a data loader of PyTorch has them, multiprocessing, dask.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from pathlib import Path

import fsspec
import pytest

import encfs
from encfs.api import Artifact
from encfs.errors import NotFoundError, UsageError
from encfs.oci.options import StoreOptions
from tests.support.artifacts import ARTIFACT_ID
from tests.support.opened import Stored, store_tree
from tests.support.remote import running
from tests.support.shell import Shell

LARGE = 5_000_001
#: Seconds until a process is taken for hanging.
PATIENCE = 300


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(LARGE)


@pytest.fixture(scope="module")
def stored(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("processes")
    (root / "tree").mkdir()
    (root / "tree" / "large.bin").write_bytes(content)
    return store_tree(root / "tree", root)


@pytest.fixture(params=["layout", "registry"])
def artifact(request: pytest.FixtureRequest, stored: Stored, tmp_path: Path) -> Iterator[Artifact]:
    """One that was read from, so that it has threads and connections."""
    if request.param == "layout":
        with stored.open(threads=3) as opened:
            opened.read("large.bin")
            yield opened
        return
    with running(tmp_path / "registry") as registry:
        reference = f"docker://{registry.host}/acme/large:v1"
        options = StoreOptions(plain_http=True, cache_dir=str(tmp_path / "cache"), cache_size=0)
        Shell(tmp_path).ok("imagetool", "push", stored.reference, reference, "--plain-http")
        with encfs.open(reference, store=options, threads=3, **stored.options) as opened:
            opened.read("large.bin")
            yield opened


def _read(artifact: Artifact, answers: Queue[object]) -> None:
    """What a child does: several threads read all of it at once, and one goes on with a file."""
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(artifact.read("large.bin"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    artifact.close()
    answers.put((len(found), set(found)))


def _answer_of(context: BaseContext, artifact: Artifact) -> object:
    answers = context.Queue()
    process = context.Process(target=_read, args=(artifact, answers))
    process.start()
    try:
        return answers.get(timeout=PATIENCE)
    finally:
        process.kill()
        process.join()


def test_a_forked_process_reads(artifact: Artifact, content: bytes) -> None:
    assert _answer_of(multiprocessing.get_context("fork"), artifact) == (3, {content})
    # What the child closed was its own.
    assert artifact.read("large.bin") == content


def test_forks_in_the_middle_of_reads(artifact: Artifact, content: bytes) -> None:
    """Locks that other threads hold just then stay locked in the child for ever."""
    done = threading.Event()

    def go_on() -> None:
        while not done.is_set():
            assert artifact.read("large.bin", 7, 3_000_000) == content[7:3_000_007]

    readers = [threading.Thread(target=go_on) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(5):
            assert _answer_of(multiprocessing.get_context("fork"), artifact) == (3, {content})
    finally:
        done.set()
        for reader in readers:
            reader.join()


def test_a_pickled_artifact_is_opened_again(artifact: Artifact, content: bytes) -> None:
    assert _answer_of(multiprocessing.get_context("spawn"), artifact) == (3, {content})


def test_no_secret_is_pickled(stored: Stored) -> None:
    with stored.open() as artifact:
        pickled = pickle.dumps(artifact)
        keys = [volume.key for volume in artifact._opened.payload.volumes]
    assert keys
    assert not [key for key in keys if bytes(key) in pickled]


def test_a_pickled_artifact_stays_the_same_content(stored: Stored, tmp_path: Path) -> None:
    """Where the tag moves on, what was opened is opened by its digest, and nothing else takes its place."""
    shutil.copytree(stored.layout, tmp_path / "store")
    reference = f"oci:{tmp_path}/store:v1"
    with encfs.open(reference, **stored.options) as artifact:
        pickled, digest = pickle.dumps(artifact), artifact.content_digest

    def release(layout: str) -> None:
        """A new version of the same line, by the same owner."""
        keys = stored.layout.parent
        shell.ok(
            *("imagetool", "encrypt", str(keys / "tree"), f"oci:{layout}:v1", "-r", f"{keys}/recipient.jwk"),
            *("--sign", f"{keys}/signer.jwk", "--id", ARTIFACT_ID, "--artifact-version", "2"),
        )

    shell = Shell(tmp_path)
    release("store")
    with pickle.loads(pickled) as again:  # noqa: S301 - made here
        assert again.content_digest == digest
    shutil.rmtree(tmp_path / "store")
    release("store")
    with pytest.raises(NotFoundError, match=digest):
        pickle.loads(pickled)  # noqa: S301 - made here


def test_files_of_a_closed_artifact_say_so(stored: Stored) -> None:
    artifact = stored.open()
    file = artifact.open("large.bin")
    artifact.close()
    artifact.close()
    for use in (
        lambda: artifact.read("large.bin"),
        lambda: artifact.stat("large.bin"),
        lambda: list(artifact.list()),
        lambda: file.read(10),
    ):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_a_filesystem_of_fsspec_is_used_by_forked_and_by_new_processes(stored: Stored, content: bytes) -> None:
    files = fsspec.filesystem("encfs", ref=stored.reference, skip_instance_cache=True, **stored.options)
    assert files.cat_file("large.bin") == content
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map_async(files.cat_file, ["large.bin"] * 4).get(PATIENCE)
        assert found == [content] * 4
    files.artifact.close()
