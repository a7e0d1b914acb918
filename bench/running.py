"""Suite `run`: from an encrypted image in a registry to its command's first output, ours against skopeo and umoci.

The image has a layer of programs and libraries of this machine, compressed as images are, and a small one on top. The
peer pulls and decrypts all of it, unpacks it, and runs the command in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.contenders import KeyFiles
from bench.environment import Scale, Workspace, evict, run, say, tool
from bench.results import Comparison, Target

_SPEED = Target(0.2)
_FETCHED = Target(0.1)
#: What the image is filled with, in this order, up to the size that is wanted.
_SOURCES = ("/usr/lib", "/usr/bin", "/usr/share")
_COMMAND = ("/bin/busybox", "echo", "ready")
_PATIENCE = 30.0


def measure_running(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """A new place for what is fetched in every repetition; the registry's files are in the page cache."""
    directory = workspace.disk / "run"
    directory.mkdir()
    say(f"making an image of {scale.image_size >> 20} MiB")
    image = _make_image(directory / "image", scale.image_size)
    with _registry(directory) as address:
        say("encrypting it for both")
        ours, peer = f"docker://{address}/ours:bench", f"docker://{address}/peer:bench"
        run([tool("imagetool"), "encrypt", image, ours, "-r", keys.public, "--plain-http"])
        private = directory / "peer.pem"
        run([tool("openssl"), "genrsa", "-out", private, "3072"])
        public = directory / "peer.pub.pem"
        run([tool("openssl"), "rsa", "-in", private, "-pubout", "-out", public])
        options = ["--dest-tls-verify=false", f"--encryption-key=jwe:{public}"]
        run([tool("skopeo"), "--insecure-policy", "copy", *options, image, peer])
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        fetched: list[float] = []
        for repetition in range(scale.repetitions):
            say(f"run: repetition {repetition + 1} of {scale.repetitions}")
            for who in ("ours", "peer") if repetition % 2 else ("peer", "ours"):
                scratch = directory / "scratch"
                scratch.mkdir()
                os.sync()
                if who == "ours":
                    times[who].append(_run_ours(ours, scratch, keys))
                    fetched.append(_allocated(scratch) / scale.image_size)
                else:
                    times[who].append(_run_peer(peer, scratch, private))
                shutil.rmtree(scratch)
    name = f"image of {scale.image_size // 10**6} MB"
    peer_name = "skopeo copy, umoci unpack"
    yield Comparison(
        "run", "encfs run, first output", name, "default", "s", "lower", times["ours"], peer_name, times["peer"], _SPEED
    )
    yield Comparison("run", "encfs run, fetched of the image", name, "default", "", "lower", fetched, target=_FETCHED)
    evict(directory)
    shutil.rmtree(directory)


def _run_ours(reference: str, scratch: Path, keys: KeyFiles) -> float:
    options = ["-k", str(keys.private), "--allow-unsigned", "--plain-http", "--cache-dir", str(scratch / "cache")]
    words = [tool("encfs"), "run", "-q", reference, *options, "--entrypoint", _COMMAND[0], "--", *_COMMAND[1:]]
    started = time.perf_counter()
    return _first_output(words, started)


def _run_peer(reference: str, scratch: Path, private: Path) -> float:
    started = time.perf_counter()
    options = ["--src-tls-verify=false", f"--decryption-key={private}"]
    run([tool("skopeo"), "--insecure-policy", "copy", *options, reference, f"oci:{scratch / 'image'}:bench"])
    run([tool("umoci"), "unpack", "--image", f"{scratch / 'image'}:bench", scratch / "bundle"])
    return _first_output([tool("chroot"), str(scratch / "bundle" / "rootfs"), *_COMMAND], started)


def _first_output(words: Sequence[str], started: float) -> float:
    """Seconds since `started` when the command has said its line."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        errors = process.stderr.read().decode(errors="replace")
    if line != b"ready\n" or process.returncode:
        raise RuntimeError(f"{words[0]} failed with status {process.returncode}: {errors.strip()}")
    return seconds


def _allocated(directory: Path) -> int:
    """Bytes on the disk below a directory: the cache's files are sparse."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


# The image


def _make_image(layout: Path, size: int) -> str:
    """An OCI layout with an image of two layers, of `size` bytes unpacked."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers = [
        _add_layer(blobs, [("bin/busybox", tool("busybox")), *_files(size)]),
        _add_layer(blobs, [("etc/hostname", "/etc/hostname")]),
    ]
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Cmd": list(_COMMAND)},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _add_document(blobs, "application/vnd.oci.image.config.v1+json", config),
        "layers": [layer for _, layer in layers],
    }
    entry = _add_document(blobs, str(manifest["mediaType"]), manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "bench"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{layout}:bench"


def _files(size: int) -> Iterator[tuple[str, str]]:
    """Regular files of this machine, up to `size` bytes."""
    left = size
    for source in _SOURCES:
        for parent, directories, names in os.walk(source):
            directories.sort()
            for name in sorted(names):
                path = os.path.join(parent, name)
                length = os.lstat(path).st_size
                if os.path.isfile(path) and not os.path.islink(path) and length <= left:
                    left -= length
                    yield path.removeprefix("/"), path


def _add_layer(blobs: Path, files: Sequence[tuple[str, str]]) -> tuple[str, dict[str, object]]:
    """A compressed layer of files: its diff id and its descriptor."""
    plain = blobs / "layer.tar"
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in files:
            archive.add(path, name)
    diff_id = _digest(plain)
    run([tool("gzip"), "-6", plain])
    packed = plain.with_suffix(".tar.gz")
    digest, size = _digest(packed), packed.stat().st_size
    packed.rename(blobs / digest.removeprefix("sha256:"))
    media_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    return diff_id, {"mediaType": media_type, "digest": digest, "size": size}


def _add_document(blobs: Path, media_type: str, document: object) -> dict[str, object]:
    content = json.dumps(document).encode()
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


# The registry


@contextlib.contextmanager
def _registry(directory: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port of this machine: its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    storage = directory / "registry"
    config = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(storage)}}, "http": {"addr": address}}
    (directory / "registry.json").write_text(json.dumps(config))
    words = [tool("docker-registry"), "serve", str(directory / "registry.json")]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        try:
            _wait_for(address, one)
            yield address
        finally:
            one.terminate()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the registry does not start") from None
            time.sleep(0.05)
        else:
            return
