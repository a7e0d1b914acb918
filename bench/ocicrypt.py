"""Suite `ocicrypt`: encrypted images of one large layer, made and opened by ours and by skopeo, on tmpfs."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from bench.contenders import KeyFiles
from bench.data import make_file
from bench.encryption import add_json, largest_blob, make_image
from bench.environment import Scale, Workspace, run, run_measured, say, tool, touch_memory
from bench.results import Comparison, Target

_TARGET = Target(3.0)


def measure_ocicrypt(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Encryption and decryption for one RSA key, of an uncompressed layer and of one that is gzip; `keys` is unused."""
    directory = workspace.memory / "ocicrypt"
    directory.mkdir()
    source = directory / "file.bin"
    make_file(source, scale.file_size)
    public, private = _make_keys(directory)
    plain = make_image(directory / "tar", source)
    source.unlink()
    for layer, image in (("tar", plain), ("tar+gzip", _compressed(plain, directory / "gzip"))):
        encrypted = directory / "encrypted"
        run(_skopeo(image, encrypted, "--encryption-key", f"jwe:{public}"))
        ours = [tool("imagetool"), "ocicrypt"]
        output = directory / "output"
        yield from _compare(
            f"encrypt, 1 layer ({layer})",
            [*ours, "encrypt", f"oci:{image}:bench", f"oci:{output}:bench", "-r", str(public)],
            _skopeo(image, output, "--encryption-key", f"jwe:{public}"),
            largest_blob(image),
            output,
            scale,
        )
        yield from _compare(
            f"decrypt, 1 layer ({layer})",
            [*ours, "decrypt", f"oci:{encrypted}:bench", f"oci:{output}:bench", "-k", str(private)],
            _skopeo(encrypted, output, "--decryption-key", str(private)),
            largest_blob(image),
            output,
            scale,
        )
        shutil.rmtree(encrypted)
    shutil.rmtree(directory)


def _compare(
    workload: str, ours: list[str], theirs: list[str], size: int, output: Path, scale: Scale
) -> Iterator[Comparison]:
    commands = {"ours": ours, "skopeo": theirs}
    speeds: dict[str, list[float]] = defaultdict(list)
    memory: list[float] = []
    for repetition in range(scale.repetitions):
        say(f"{workload}: repetition {repetition + 1} of {scale.repetitions}")
        for name in sorted(commands, reverse=repetition % 2 == 1):
            touch_memory(output.parent, size + size // 8)
            usage = run_measured(commands[name])
            assert largest_blob(output) == size, f"{name} wrote something else than one layer of {size} bytes"
            shutil.rmtree(output)
            speeds[name].append(size / usage.seconds * 1e-6)
            if name == "ours":
                memory.append(usage.peak_memory / (1 << 20))
    yield Comparison(
        "ocicrypt",
        workload,
        "tmpfs to tmpfs",
        "default",
        "MB/s",
        "higher",
        speeds["ours"],
        "skopeo",
        speeds["skopeo"],
        _TARGET,
        note=f"peak memory {max(memory):.0f} MiB",
    )


def _skopeo(source: Path, destination: Path, *options: str) -> list[str]:
    words = [tool("skopeo"), "--insecure-policy", "copy", "-q", "--dest-oci-accept-uncompressed-layers", *options]
    return [*words, f"oci:{source}:bench", f"oci:{destination}:bench"]


def _make_keys(directory: Path) -> tuple[Path, Path]:
    key = rsa.generate_private_key(65537, 3072)
    public, private = directory / "rsa.pub.pem", directory / "rsa.pem"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    private.touch(0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return public, private


def _compressed(image: Path, target: Path) -> Path:
    """The same image with its layer compressed, which random bytes do not become smaller by."""
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    index = json.loads((image / "index.json").read_text())
    entry = index["manifests"][0]
    manifest = json.loads(_blob(image, entry["digest"]).read_text())
    layer = manifest["layers"][0]
    with (
        gzip.open(blobs / "layer", "wb", compresslevel=1) as output,
        _blob(image, layer["digest"]).open("rb") as plain,
    ):
        shutil.copyfileobj(plain, output, 1 << 20)
    # In pieces: what this process once had in memory counts as that of the commands it starts.
    with (blobs / "layer").open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    size = (blobs / "layer").stat().st_size
    (blobs / "layer").rename(_blob(target, digest))
    layer |= {"mediaType": layer["mediaType"] + "+gzip", "digest": digest, "size": size}
    shutil.copy(_blob(image, manifest["config"]["digest"]), blobs)
    index["manifests"] = [add_json(blobs, entry["mediaType"], manifest) | {"annotations": entry["annotations"]}]
    (target / "index.json").write_text(json.dumps(index))
    shutil.copy(image / "oci-layout", target)
    return target


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")
