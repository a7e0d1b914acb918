"""Suites `registry-start`, `registry-read` and `registry-copy`: artifacts in a registry against pulls and skopeo."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from bench.contenders import KeyFiles, Mounted, encrypt_command, foreground
from bench.data import make_file
from bench.encryption import make_image
from bench.environment import Scale, Workspace, peak_memory, run, run_measured, say, tool
from bench.hollow import PROBE_BYTE, PROBE_NAME, make_hollow_artifact
from bench.registries import adopt_layout, delayed, served_registry
from bench.results import Comparison, Target

_FILES = 100
_LATENCY = 0.02
_MEMORY_TARGET = Target(200.0)
_FIRST_TENSOR = 1 << 20


@contextlib.contextmanager
def _mounted(port: int, repository: str, directory: Path, keys: KeyFiles) -> Iterator[Mounted]:
    """`encfs mount` with an empty cache, in the foreground: daemons have sessions, and priorities, of their own."""
    cache = directory / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    reference = f"docker://127.0.0.1:{port}/{repository}:bench"
    options = ["-k", str(keys.private), "--allow-unsigned", "--plain-http", "--cache-dir", str(cache), "-q", "-f"]
    with foreground(lambda target: [tool("encfs"), "mount", reference, str(target), *options]) as mounted:
        yield mounted


def _status(target: Path) -> dict[str, object]:
    mounts = json.loads(run([tool("encfs"), "status", "--json"]))["mounts"]
    found: dict[str, object] = next(item for item in mounts if item["mountpoint"] == str(target))
    return found


def measure_start(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """From the start of `encfs mount` to the first byte of a file at the end of the image, and the bytes until then."""
    directory = workspace.memory / "start"
    for size in scale.remote_artifacts:
        say(f"making an artifact of {_name(size)}")
        make_hollow_artifact(directory / "layout", size, _FILES, keys.public, probe=True)
        adopt_layout(directory / "layout", directory / "registry", _name(size).replace(" ", "").lower())
    seconds: dict[tuple[int, float], list[float]] = defaultdict(list)
    fetched: dict[tuple[int, float], list[float]] = defaultdict(list)
    with served_registry(directory / "registry") as port, delayed(port, _LATENCY) as far:
        for _ in range(scale.repetitions):
            for size in scale.remote_artifacts:
                for latency, way in ((0.0, port), (_LATENCY, far)):
                    started = time.perf_counter()
                    with _mounted(way, _name(size).replace(" ", "").lower(), directory, keys) as mounted:
                        with (mounted.path / PROBE_NAME).open("rb", buffering=0) as file:
                            assert file.read(1) == PROBE_BYTE
                        seconds[size, latency].append(time.perf_counter() - started)
                        transfer = _status(mounted.path)["transfer"]
                        assert isinstance(transfer, dict)
                        fetched[size, latency].append(transfer["bytes_from_registry"] / 1024)
    for (size, latency), series in seconds.items():
        condition = f"{_name(size)}, +{latency * 1000:.0f} ms" if latency else f"{_name(size)}, loopback"
        limit = Target(1.0 if latency else 0.5)
        yield _alone("encfs mount to first byte", condition, "s", series, limit)
        yield _alone("fetched until then", condition, "KiB", fetched[size, latency], Target(1024.0))
    shutil.rmtree(directory)


def measure_read(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """A cold file through the mount against a plain pull, and a whole model against skopeo's way to one."""
    directory = workspace.memory / "read"
    source = directory / "model"
    source.mkdir(parents=True)
    make_file(source / "model.safetensors", scale.file_size)
    size = (source / "model.safetensors").stat().st_size
    run(encrypt_command(source, directory / "layout", keys))
    private, public = _rsa_keys(directory)
    image = make_image(directory / "image", source / "model.safetensors")
    series: dict[str, list[float]] = defaultdict(list)
    peaks: list[float] = []
    with served_registry(directory / "registry") as port:
        ours, theirs = f"docker://127.0.0.1:{port}/model:bench", f"docker://127.0.0.1:{port}/image:bench"
        run([tool("imagetool"), "push", f"oci:{directory / 'layout'}:bench", ours, "--plain-http"])
        skopeo = [tool("skopeo"), "--insecure-policy", "copy", "-q"]
        encrypted = ["--dest-tls-verify=false", "--dest-compress=false", "--encryption-key", f"jwe:{public}"]
        run([*skopeo, *encrypted, f"oci:{image}:bench", theirs])

        def mount() -> None:
            started = time.perf_counter()
            with _mounted(port, "model", directory, keys) as mounted:
                ready = time.perf_counter()
                with (mounted.path / "model.safetensors").open("rb", buffering=0) as file:
                    assert len(file.read(_FIRST_TENSOR)) == min(size, _FIRST_TENSOR)
                    series["first tensor"].append(time.perf_counter() - started)
                    rest = _read_all(file.fileno())
                assert rest + _FIRST_TENSOR >= size
                ended = time.perf_counter()
                peaks.append(peak_memory(mounted.pid) / (1 << 20))
            series["mount"].append(size / (ended - ready) * 1e-6)
            series["load"].append(ended - started)

        def pull() -> None:
            usage = run_measured([tool("imagetool"), "pull", ours, f"oci:{directory / 'pulled'}:bench", "--plain-http"])
            series["pull"].append(size / usage.seconds * 1e-6)
            shutil.rmtree(directory / "pulled")

        def decrypt() -> None:
            started = time.perf_counter()
            run(
                [*skopeo, "--src-tls-verify=false", "--decryption-key", private, theirs, f"oci:{directory / 'clear'}:b"]
            )
            layer = max((directory / "clear/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
            (directory / "unpacked").mkdir()
            run(["tar", "-xf", layer, "-C", directory / "unpacked"])
            series["skopeo"].append(time.perf_counter() - started)
            shutil.rmtree(directory / "clear")
            shutil.rmtree(directory / "unpacked")

        _take_turns(scale.repetitions, [mount, pull, decrypt])
    shutil.rmtree(directory)
    target = Target(0.7)
    yield Comparison(
        "registry", "sequential cold read", "loopback", "default", "MB/s", "higher", series["mount"], "imagetool pull",
        series["pull"], target,
    )  # fmt: skip
    yield _against_skopeo("whole model", series["load"], series["skopeo"], 1 / 3)
    yield _against_skopeo("first tensor", series["first tensor"], series["skopeo"], 1 / 20)
    yield _alone("daemon's peak memory", "all of the above", "MiB", peaks, _MEMORY_TARGET)


def measure_copy(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Push and pull of the same blobs by ours and by skopeo, which need not know what is in them."""
    directory = workspace.memory / "copy"
    directory.mkdir()
    make_file(directory / "file.bin", scale.file_size)
    run(encrypt_command(directory / "file.bin", directory / "layout", keys))
    size = scale.file_size
    series: dict[str, list[float]] = defaultdict(list)
    peaks: list[float] = []
    layout, pulled = f"oci:{directory / 'layout'}:bench", directory / "pulled"
    skopeo = [tool("skopeo"), "--insecure-policy", "copy", "-q"]
    for repetition in range(scale.repetitions):
        say(f"copies: repetition {repetition + 1} of {scale.repetitions}")
        names = ["ours", "skopeo"] if repetition % 2 else ["skopeo", "ours"]
        for name in names:
            # An empty registry each time: neither finds blobs there, or another repository to mount them from.
            with served_registry(directory / "registry") as port:
                place = f"docker://127.0.0.1:{port}/bench:bench"
                push = (
                    [tool("imagetool"), "push", layout, place, "--plain-http"]
                    if name == "ours"
                    else [*skopeo, "--dest-tls-verify=false", layout, place]
                )
                pull = (
                    [tool("imagetool"), "pull", place, f"oci:{pulled}:bench", "--plain-http"]
                    if name == "ours"
                    else [*skopeo, "--src-tls-verify=false", place, f"oci:{pulled}:bench"]
                )
                for kind, command in (("push", push), ("pull", pull)):
                    usage = run_measured(command)
                    series[f"{name} {kind}"].append(size / usage.seconds * 1e-6)
                    if name == "ours":
                        peaks.append(usage.peak_memory / (1 << 20))
            shutil.rmtree(pulled)
            shutil.rmtree(directory / "registry")
    shutil.rmtree(directory)
    for kind in ("push", "pull"):
        yield Comparison(
            "registry", kind, "loopback", "default", "MB/s", "higher", series[f"ours {kind}"], "skopeo",
            series[f"skopeo {kind}"], Target(0.9),
        )  # fmt: skip
    yield _alone("peak memory of push and pull", "all of the above", "MiB", peaks, _MEMORY_TARGET)


def _take_turns(repetitions: int, contenders: Sequence[Callable[[], None]]) -> None:
    for repetition in range(repetitions):
        say(f"reading: repetition {repetition + 1} of {repetitions}")
        for position in range(len(contenders)):
            contenders[(position + repetition) % len(contenders)]()


def _read_all(descriptor: int) -> int:
    buffer = bytearray(1 << 20)
    total = 0
    while done := os.readv(descriptor, [buffer]):
        total += done
    return total


def _against_skopeo(workload: str, ours: Sequence[float], theirs: Sequence[float], limit: float) -> Comparison:
    condition = "loopback, to the last byte" if "whole" in workload else "loopback"
    target = Target(round(limit, 3))
    return Comparison("registry", workload, condition, "default", "s", "lower", ours, "skopeo", theirs, target)


def _alone(workload: str, condition: str, unit: str, ours: Sequence[float], target: Target) -> Comparison:
    return Comparison("registry", workload, condition, "default", unit, "lower", ours, target=target)


def _name(size: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size // 10**6} MB"


def _rsa_keys(directory: Path) -> tuple[Path, Path]:
    """A key pair as skopeo takes it: paths of the private and of the public part."""
    key = rsa.generate_private_key(65537, 3072)
    private, public = directory / "skopeo.key", directory / "skopeo.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public
