"""Suites `encrypt` and `encrypt-memory`: encryption on tmpfs against skopeo and age; peak memory for awkward inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from bench.contenders import KeyFiles, encrypt_command
from bench.data import make_file, make_small_files
from bench.environment import Scale, Usage, Workspace, run, run_measured, say, tool, touch_memory
from bench.results import Comparison, Target

_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_MEMORY_TARGET = Target(300.0)


def measure_encryption(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """One incompressible file: into a layout by ours, as the layer of an image by skopeo, as a file by age."""
    directory = workspace.memory / "encrypt"
    directory.mkdir()
    source = directory / "file.bin"
    make_file(source, scale.file_size)
    image = make_image(directory / "image", source)
    public_key = _make_rsa_key(directory / "skopeo.pem")
    age_recipient = _make_age_key(directory / "age.key")
    output = directory / "output"
    size = source.stat().st_size
    skopeo = [
        *(tool("skopeo"), "--insecure-policy", "copy", "-q", "--dest-compress=false"),
        *("--encryption-key", f"jwe:{public_key}", f"oci:{image}:bench", f"oci:{output}:bench"),
    ]
    age = [tool("age"), "-r", age_recipient, "-o", str(output), str(source)]
    commands: Mapping[str, tuple[list[str], Callable[[Path], bool]]] = {
        "ours": (encrypt_command(source, output, keys), lambda path: largest_blob(path) >= min(size, 1 << 29)),
        "skopeo": (skopeo, lambda path: size <= largest_blob(path) < size * 1.01),
        "age": (age, lambda path: size <= path.stat().st_size < size * 1.01),
    }
    usages: dict[str, list[Usage]] = defaultdict(list)
    names = list(commands)
    for repetition in range(scale.repetitions):
        say(f"encryption: repetition {repetition + 1} of {scale.repetitions}")
        for position in range(len(names)):
            name = names[(position + repetition) % len(names)]
            command, fits = commands[name]
            touch_memory(directory, size + size // 8)
            usages[name].append(run_measured(command))
            assert fits(output), f"{name} wrote something else than the uncompressed bytes, encrypted"
            _remove(output)
    speeds = {name: [size / usage.seconds * 1e-6 for usage in series] for name, series in usages.items()}
    for peer, target in (("skopeo", Target(5.0)), ("age", Target(1.0))):
        yield Comparison(
            "encrypt",
            "1 file, incompressible",
            "tmpfs to tmpfs",
            "default",
            "MB/s",
            "higher",
            speeds["ours"],
            peer,
            speeds[peer],
            target,
        )
    yield _memory("1 file, incompressible", [usage.peak_memory for usage in usages["ours"]])
    shutil.rmtree(directory)


def measure_memory(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """A large sparse file, and very many small files."""
    directory = workspace.memory / "memory"
    directory.mkdir()
    sparse = directory / "sparse.bin"
    with sparse.open("wb") as file:
        for part in range(64):
            file.seek(scale.sparse_size // 64 * part)
            file.write(os.urandom(1 << 20))
        file.truncate(scale.sparse_size)
    many = directory / "many"
    say(f"making {scale.many_files} small files")
    make_small_files(many, scale.many_files, largest=4096)
    for name, source in (
        (f"sparse file of {scale.sparse_size >> 30} GiB", sparse),
        (f"{scale.many_files} small files", many),
    ):
        say(f"encrypting: {name}")
        usage = run_measured(encrypt_command(source, directory / "output", keys))
        yield _memory(name, [usage.peak_memory], note=f"{usage.seconds:.1f} s")
        _remove(directory / "output")
    shutil.rmtree(directory)


def _memory(workload: str, peaks: list[int], note: str = "") -> Comparison:
    values = [peak / (1 << 20) for peak in peaks]
    return Comparison(
        "encrypt",
        "encrypt's peak memory",
        workload,
        "default",
        "MiB",
        "lower",
        values,
        target=_MEMORY_TARGET,
        note=note,
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def largest_blob(layout: Path) -> int:
    return max(path.stat().st_size for path in (layout / "blobs" / "sha256").iterdir())


def make_image(layout: Path, source: Path) -> Path:
    """An OCI image layout whose only layer is an uncompressed tar of `source`."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with tarfile.open(layout / "layer.tar", "w") as archive:
        archive.add(source, source.name)
    with (layout / "layer.tar").open("rb") as file:
        layer_digest = hashlib.file_digest(file, "sha256").hexdigest()
    layer_size = (layout / "layer.tar").stat().st_size
    (layout / "layer.tar").rename(blobs / layer_digest)
    layer = {"mediaType": _LAYER_TYPE, "digest": f"sha256:{layer_digest}", "size": layer_size}
    config = add_json(
        blobs,
        "application/vnd.oci.image.config.v1+json",
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        },
    )
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = add_json(
        blobs, manifest_type, {"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer]}
    )
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "bench"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return layout


def add_json(blobs: Path, media_type: str, document: Mapping[str, object]) -> dict[str, object]:
    content = json.dumps(document).encode()
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _make_rsa_key(path: Path) -> Path:
    public = rsa.generate_private_key(65537, 3072).public_key()
    path.write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


def _make_age_key(path: Path) -> str:
    run([tool("age-keygen"), "-o", path])
    for line in path.read_text().splitlines():
        if line.startswith("# public key: "):
            return line.removeprefix("# public key: ")
    raise RuntimeError("age-keygen wrote no public key")
