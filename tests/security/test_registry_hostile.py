"""Commands against a registry that means harm: bounded memory and time, a typed error, nothing outside the target."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from encfs.errors import FormatError, IntegrityError, TransportError, UnsupportedError
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_source
from encfs.progress import NoProgress
from imagetool.pipeline.copy import copy_artifact
from tests.support.registry import Fault, FaultProxy, _ProxyHandler

MIB = 1 << 20
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = b'{"format":"encfs/1"}'


@pytest.fixture
def hostile() -> Iterator[FaultProxy]:
    """A registry that is nothing but what a test makes of it: there is none behind it."""
    proxy = FaultProxy("127.0.0.1:1")
    yield proxy
    proxy.close()


def run(place: Path, *words: str) -> tuple[int, str]:
    """Exit code and messages of a command in a directory of its own, which cannot write large files."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "HOME": str(place), "TMPDIR": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", "from imagetool.cli import main; main()", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (256 * MIB, 256 * MIB)),
    )
    return done.returncode, done.stderr


def pull(hostile: FaultProxy, target: Path) -> None:
    """What `imagetool pull` does, with little patience."""
    options = StoreOptions(plain_http=True, io_timeout=1.0)
    with (
        closing(open_source(parse_reference(reference(hostile)), options)) as source,
        closing(Layout(target, tag="v1", create=True)) as layout,
    ):
        copy_artifact(source, layout, tag="v1", progress=NoProgress())


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def entry(content: bytes, media_type: str, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content), **more}


def manifest(layers: list[dict[str, object]], **more: object) -> bytes:
    config = entry(CONFIG, "application/vnd.encfs.content.v1+json")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.encfs.artifact.v1"}
    return json.dumps({**document, "config": config, "layers": layers, **more}).encode()


def serve(content: bytes, media_type: str = MANIFEST) -> Fault:
    return Fault("manifests", times=-1, reply=(200, {"Content-Type": media_type}), body=content)


def reference(hostile: FaultProxy) -> str:
    return f"docker://{hostile.host}/acme/chat:v1"


FEW = ("--plain-http", "--io-timeout", "1")


# -- answers without an end


def stream(head: bytes, piece: bytes, pause: float = 0.0) -> Callable[[_ProxyHandler], None]:
    """Send something, then something else until the client has enough, or two minutes."""

    def act(handler: _ProxyHandler) -> None:
        handler.close_connection = True
        deadline = time.monotonic() + 120
        with contextlib.suppress(OSError):
            handler.wfile.write(head)
            while time.monotonic() < deadline:
                handler.wfile.write(piece)
                time.sleep(pause)

    return act


ENDLESS = {
    "body": stream(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", bytes(MIB)),
    "chunks": stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + bytes(MIB) + b"\r\n"),
    "length that is a lie": stream(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", bytes(MIB)),
    "headers": stream(b"HTTP/1.1 200 OK\r\n", b"X-Header: " + b"x" * 1000 + b"\r\n"),
    "line": stream(b"HTTP/1.1 200 OK\r\nX-Header: ", b"x" * MIB),
    "trailers": stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Trailer: x\r\n"),
    "interim answers": stream(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "dripping line": stream(b"HTTP/1.1 200 OK\r\nX-Header: ", b"x", 0.2),
    "dripping headers": stream(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.5),
    "dripping body": stream(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x", 0.2),
    "dripping blob": stream(b"HTTP/1.1 200 OK\r\nContent-Length: 4194304\r\n\r\n", b"x" * 100, 0.2),
    "dripping chunk size": stream(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0", 0.2),
    "dripping interim answers": stream(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.2),
    "not HTTP": stream(b"", b"SSH-2.0-OpenSSH\r\n" * 1000),
}


CLIENT = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from encfs.errors import EncfsError
from encfs.oci.blobs import Descriptor
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.registry import Registry

def ask(host):
    registry = Registry(parse_reference(f"docker://{host}/acme/chat:v1"), StoreOptions(plain_http=True, io_timeout=1.0))
    blob = Descriptor("application/octet-stream", "sha256:" + "0" * 64, 4 << 20)
    def stream():
        for piece in registry.stream_blob(blob):
            pass
    found = []
    for use in (registry.manifest, lambda: registry.has_blob(blob), lambda: registry.read_blob(blob, limit=4 << 20),
                stream, lambda: registry.referrers(blob.digest),
                lambda: registry.copy_blob(blob, lambda offset: iter([bytes(4 << 20)]), print)):
        started = time.monotonic()
        try:
            found.append([repr(use()), 0.0])
        except EncfsError as error:
            found.append([type(error).__name__, time.monotonic() - started])
    return found

with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(ask, sys.argv[1:]))
# Not ru_maxrss, which begins with what the process had that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"answers": answers, "memory": int(peak.split()[1]) * 1024}))
"""

#: What the client above takes at most (bytes), eight threads of it; a body that is kept would be far more.
MEMORY = 220 * MIB
PASSING = {"TransportError", "TransportTimeoutError", "IntegrityError", "FormatError"}


def test_answers_without_an_end() -> None:
    """Whatever is asked for: no request outlives its time limit by more than one step, and nothing piles up."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(closing(FaultProxy("127.0.0.1:1"))) for _ in ENDLESS]
        for proxy, act in zip(proxies, ENDLESS.values(), strict=True):
            proxy.faults = [Fault("", times=-1, act=act)]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *(proxy.host for proxy in proxies)],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for kind, answers in zip(ENDLESS, result["answers"], strict=True):
        for number, (outcome, seconds) in enumerate(answers):
            # An answer to HEAD has no body, whatever its headers say: it is over before anything goes wrong.
            assert outcome in PASSING or (number == 1 and outcome in ("True", "False")), (kind, number, outcome)
            assert seconds < 30, (kind, number, outcome)
    assert result["memory"] < MEMORY


# -- documents


def nested_index(depth: int) -> bytes:
    content = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()
    for _ in range(depth):
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(content, INDEX)]}
        content = json.dumps(document).encode()
    return content


DOCUMENTS = {
    "brackets": (b"[" * (4 * MIB), MANIFEST, FormatError),
    "objects": (b'{"a":' * (MIB // 2), MANIFEST, FormatError),
    "number": (b'{"schemaVersion":' + b"9" * (2 * MIB) + b"}", MANIFEST, FormatError),
    "layers": (manifest([entry(b"", "application/vnd.encfs.segment.v1")] * 20_000), MANIFEST, FormatError),
    "too large": (b" " * (5 * MIB), MANIFEST, TransportError),
    "deep index": (nested_index(50), INDEX, UnsupportedError),
    "index that is called a manifest": (nested_index(2), MANIFEST, UnsupportedError),
    "duplicate members": (b'{"schemaVersion":2,"schemaVersion":2}', MANIFEST, FormatError),
    "not UTF-8": (b'{"a":"\xff"}', MANIFEST, FormatError),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(hostile: FaultProxy, tmp_path: Path, kind: str) -> None:
    content, media_type, error = DOCUMENTS[kind]
    hostile.faults = [serve(content, media_type)]
    started = time.monotonic()
    with pytest.raises(error):
        pull(hostile, tmp_path / "layout")
    assert time.monotonic() - started < 60
    assert len(hostile.seen) == 1, "nothing that it names was asked for"


def test_an_index_that_names_itself(hostile: FaultProxy, tmp_path: Path) -> None:
    """By its digest it cannot; whoever answers each digest with the same index is caught by the digest."""
    content = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(b"x", MANIFEST)]}).encode()
    hostile.faults = [serve(content, INDEX)]
    for name, error in ((reference(hostile), UnsupportedError), (f"{digest_of(b'x')}", IntegrityError)):
        text = name if name.startswith("docker") else f"docker://{hostile.host}/acme/chat@{name}"
        with (
            closing(open_source(parse_reference(text), StoreOptions(plain_http=True, io_timeout=1.0))) as source,
            pytest.raises(error),
        ):
            source.manifest()


# -- names that lead elsewhere


TRICKS = ["../../evil", "/evil", "..", "a/../../../evil", "evil\n", "\x1b[2Jevil", "CON", "evil\0"]


def tree_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if "cache" not in path.parts}


def test_a_refused_pull_makes_no_layout(hostile: FaultProxy, tmp_path: Path) -> None:
    layer = {"mediaType": "application/vnd.encfs.segment.v1", "digest": "sha256:../../evil", "size": 1}
    hostile.faults = [serve(manifest([layer]))]
    code, messages = run(tmp_path, "pull", reference(hostile), "oci:layout:v1", *FEW)
    assert code == FormatError.exit_code, messages
    assert messages.count("\n") == 1, messages
    assert not tree_of(tmp_path)


def test_titles_are_no_paths(hostile: FaultProxy, tmp_path: Path) -> None:
    """Annotations are names that other tools write files under."""
    blob = b"payload of a hostile registry"
    titled = [
        entry(blob, "application/vnd.encfs.segment.v1", annotations={"org.opencontainers.image.title": trick})
        for trick in TRICKS
    ]
    content = manifest(titled, annotations={"org.opencontainers.image.ref.name": "../../evil"})
    hostile.faults = [
        serve(content),
        Fault(f"blobs/{digest_of(blob)}", times=-1, reply=(200, {}), body=blob),
        Fault(f"blobs/{digest_of(CONFIG)}", times=-1, reply=(200, {}), body=CONFIG),
    ]
    place = tmp_path / "a/b/c"
    place.mkdir(parents=True)
    _, messages = run(place, "pull", reference(hostile), "oci:layout:v1", *FEW)
    assert "\x1b" not in messages
    found = tree_of(tmp_path) - {"a", "a/b", "a/b/c"}
    assert all(path.startswith("a/b/c/layout") for path in found), found
    assert not [path for path in found if "evil" in path]
    assert not Path("/evil").exists()


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../../../evil", "../evil", "sha256:" + "0" * 63 + "/", "sha512:" + "0" * 128, "sha256:" + "A" * 64, 7],
)
def test_digests_are_no_paths(hostile: FaultProxy, tmp_path: Path, digest: object) -> None:
    layer = {"mediaType": "application/vnd.encfs.segment.v1", "digest": digest, "size": 1}
    hostile.faults = [serve(manifest([layer])), Fault("blobs", times=-1, reply=(200, {}), body=b"x")]
    with pytest.raises(FormatError):
        pull(hostile, tmp_path / "layout")
    assert all(path.startswith("layout") for path in tree_of(tmp_path))
    assert not [path for path in (tmp_path / "layout/blobs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("size", [-1, 1 << 62, 1e300, True, "1"])
def test_sizes_are_bounded(hostile: FaultProxy, tmp_path: Path, size: object) -> None:
    """A stated size reserves nothing: neither memory nor space on disk."""
    layer = {"mediaType": "application/vnd.encfs.segment.v1", "digest": f"sha256:{'0' * 64}", "size": size}
    hostile.faults = [
        serve(manifest([layer])),
        Fault(f"blobs/{digest_of(CONFIG)}", times=-1, reply=(200, {}), body=CONFIG),
        Fault("blobs", times=-1, reply=(200, {}), body=b"x"),
    ]
    with pytest.raises((FormatError, IntegrityError)):
        pull(hostile, tmp_path / "layout")
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert used < MIB
