"""What works beside a mount: what one of a layout does not load, and no thread before a process forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from encfs.encoding import sha256_digest
from encfs.format.descriptor import TREE_TYPE
from encfs.lazy import hold_threads
from encfs.oci.blobs import Descriptor
from encfs.oci.cached import CachedSource
from encfs.oci.fetching import FetchingBlob
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from tests.support.artifacts import encrypt_tree, make_keys, make_small_tree

_PROGRAM = """
import json, sys
from encfs.artifact import open_artifact
from encfs.keys.providers import provider_from_uri
from encfs.lazy import companion_for
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_source
from encfs.prefetching import parse_selection
from encfs.trust import TrustPolicy
import encfs.mount.session
store = open_source(parse_reference(sys.argv[1]))
with open_artifact(store, keys=[provider_from_uri(sys.argv[2])], trust=TrustPolicy(allow_unsigned=True)) as artifact:
    companion = companion_for(artifact, parse_selection("none"))
    print(json.dumps([companion.prefetch()["state"], *sys.modules]))
    companion.close()
"""


def test_no_client_of_registries_is_loaded(tmp_path: Path) -> None:
    keys = make_keys(tmp_path)
    encrypt_tree(make_small_tree(tmp_path / "tree"), Layout(str(tmp_path / "store"), create=True), keys)
    words = [f"oci:{tmp_path / 'store'}:v1", f"file:{keys.recipient_file}"]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    state, *modules = json.loads(done.stdout)
    assert state == "off"
    assert not {"requests", "oras", "encfs.oci.registry", "encfs.oci.cached"} & set(modules)


class WithoutRange:
    """A blob of a registry that answers each request with all of it, of which the end takes until `go_on`."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.go_on = threading.Event()
        self._content = content

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        yield 0, self._content[: 2 << 20]
        self.go_on.wait(20)
        yield 2 << 20, self._content[2 << 20 :]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise AssertionError("it is asked for pieces")

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    def discard(self, offset: int, size: int) -> bool:
        return True

    def close(self) -> None:
        return


def test_no_thread_goes_on_where_the_process_is_going_to_fork(tmp_path: Path) -> None:
    options = StoreOptions(plain_http=True, cache_dir=str(tmp_path / "cache"))
    content = os.urandom(9 << 20)
    blob = Descriptor(TREE_TYPE, sha256_digest(content), len(content))
    with closing(CachedSource(parse_reference("docker://127.0.0.1:1/a:b"), options)) as source:
        for held in (False, True):
            remote = WithoutRange(content)
            if held:
                hold_threads(source)
                remote.go_on.set()
                assert source.cache is not None
                source.cache.remove_part(f"{blob.digest.removeprefix('sha256:')}.0")
            fetching = FetchingBlob(remote, source.cached_blob(blob), source.fetcher)
            buffer = bytearray(100)
            fetching.read_into(0, memoryview(buffer))
            assert bytes(buffer) == content[:100]
            assert any(thread.name == "encfs-whole" for thread in threading.enumerate()) is not held
            remote.go_on.set()
            for thread in threading.enumerate():
                if thread.name == "encfs-whole":
                    thread.join(20)
            fetching.close()
