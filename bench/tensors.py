"""Suite `safetensors`: a model's tensors, ours against CryptoTensors, tensorizer and unencrypted safetensors."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import workloads
from bench.contenders import KeyFiles, Ours
from bench.environment import Scale, Usage, Workspace, peak_memory, run, say, touch_memory
from bench.results import Comparison, Target

_SMALL = 1 << 20
_FILE = "model.safetensors"
#: Bytes of one tensor, as of a layer of a small language model.
_TENSOR = 32 << 20


@dataclass(frozen=True, slots=True)
class _Stored:
    """One way to keep the model: what `bench.loading` is told, for the model and for a small one."""

    reader: str
    small: str
    model: str
    key: str | None = None

    def load(self) -> float:
        """Bytes per second of one load in a new process."""
        key = [self.key] if self.key else []
        document = json.loads(run([sys.executable, "-m", "bench.loading", self.reader, self.small, self.model, *key]))
        return float(document["size"] / document["seconds"])


def measure_tensors(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """A model on tmpfs, loaded whole: by the library, and through a mount by mapping the file."""
    directory = workspace.memory / "tensors"
    size = scale.file_size * 2
    sizes = {"small": _SMALL, "model": size}
    stored: dict[str, dict[str, str]] = defaultdict(dict)
    for which, wanted in sizes.items():
        say(f"writing tensors: {which}")
        source = directory / which
        source.mkdir(parents=True)
        tensors = _make_tensors(wanted)
        stored["plain"][which] = str(_write_plain(tensors, source))
        stored["cryptotensors"][which] = str(_write_cryptotensors(tensors, directory, which))
        stored["tensorizer"][which] = str(_write_tensorizer(tensors, directory, which))
        del tensors
        stored["encfs"][which] = f"oci:{Ours.make('default', source, directory, keys).stored}:bench"
    key_files = {
        "plain": None,
        "encfs": str(keys.private),
        "cryptotensors": str(directory / "cryptotensors.json"),
        "tensorizer": str(directory / "tensorizer.key"),
    }
    ways = {name: _Stored(name, paths["small"], paths["model"], key_files[name]) for name, paths in stored.items()}
    series: dict[str, list[float]] = defaultdict(list)
    for repetition in range(scale.repetitions):
        say(f"load: repetition {repetition + 1} of {scale.repetitions}")
        order = list(ways)
        for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
            touch_memory(workspace.memory, size)
            series[name].append(ways[name].load() * 1e-6)
    for peer, target in (("cryptotensors", 2.0), ("tensorizer", 1.5), ("plain", 0.8)):
        yield _comparison("load all tensors", "library", series, "encfs", peer, target)
    yield from _measure_mounted(workspace, scale, keys, source, stored, size)
    yield _measure_memory(workspace, scale, keys)
    shutil.rmtree(directory)


def _measure_mounted(
    workspace: Workspace, scale: Scale, keys: KeyFiles, source: Path, stored: Mapping[str, Mapping[str, str]], size: int
) -> Iterator[Comparison]:
    """Mapped through a new mount each time, against the same file on tmpfs."""
    layout = Path(stored["encfs"]["model"].removeprefix("oci:").removesuffix(":bench"))
    ours = Ours("default", layout, keys, Usage(0, 0, 0))
    series: dict[str, list[float]] = defaultdict(list)
    memory = 0.0
    for repetition in range(scale.repetitions):
        say(f"mapped: repetition {repetition + 1} of {scale.repetitions}")
        touch_memory(workspace.memory, size)
        series["plain"].append(_Stored("mapped", stored["plain"]["small"], str(source / _FILE)).load() * 1e-6)
        touch_memory(workspace.memory, size)
        with ours.mounted() as mounted:
            path = str(mounted.path / _FILE)
            series["mount"].append(_Stored("mapped", stored["plain"]["small"], path).load() * 1e-6)
            memory = max(memory, peak_memory(mounted.pid) / (1 << 20))
    yield _comparison("safe_open (mmap), all tensors", "cold mount", series, "mount", "plain", 0.6)
    yield Comparison(
        "safetensors", "daemon's peak memory", "the same", "default", "MiB", "lower", [memory], target=Target(150.0)
    )


def _measure_memory(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Comparison:
    """The daemon while a large sparse file is read whole."""
    size = scale.large_artifact // 2
    source = workspace.disk / "sparse-model"
    source.mkdir()
    with (source / "weights.bin").open("wb") as file:
        # Some data at both ends, so that not all of it is a hole.
        file.write(os.urandom(_TENSOR))
        file.seek(size - _TENSOR)
        file.write(os.urandom(_TENSOR))
    ours = Ours.make("default", source, workspace.disk, keys)
    say("reading a sparse model through the mount")
    with ours.mounted() as mounted:
        speed = workloads.sequential_read(mounted.path / "weights.bin")
        memory = peak_memory(mounted.pid) / (1 << 20)
    shutil.rmtree(source)
    return Comparison(
        "safetensors",
        "daemon's peak memory",
        f"{size / 1e9:.0f} GB (sparse) read whole",
        "default",
        "MiB",
        "lower",
        [memory],
        target=Target(150.0),
        note=f"{speed * 1e-6:,.0f} MB/s",
    )


def _comparison(
    workload: str, condition: str, series: Mapping[str, Sequence[float]], ours: str, peer: str, target: float
) -> Comparison:
    return Comparison(
        "safetensors",
        workload,
        condition,
        "default",
        "MB/s",
        "higher",
        series[ours],
        "safetensors, unencrypted" if peer == "plain" else peer,
        series[peer],
        Target(target),
    )


# The same tensors, as each of them keeps them


def _make_tensors(size: int) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(size)
    count = max(1, size // _TENSOR)
    return {
        f"layers.{number}.weight": random.integers(0, 256, size // count, dtype=np.uint8)
        .view(np.float16)
        .reshape(64, -1)
        for number in range(count)
    }


def _write_plain(tensors: Mapping[str, Any], source: Path) -> Path:
    from safetensors.numpy import save_file

    save_file(dict(tensors), source / _FILE)
    return source / _FILE


def _write_cryptotensors(tensors: Mapping[str, Any], directory: Path, which: str) -> Path:
    """Encrypted with AES-256-GCM and signed, its default format."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptotensors.numpy import save_file

    key_file = directory / "cryptotensors.json"
    if key_file.exists():
        keys = json.loads(key_file.read_text())
    else:
        signing = Ed25519PrivateKey.generate()
        keys = [
            {"kty": "oct", "alg": "aes256gcm", "kid": "content", "k": _base64(os.urandom(32))},
            {
                "kty": "okp",
                "crv": "Ed25519",
                "alg": "ed25519",
                "kid": "owner",
                "d": _base64(signing.private_bytes_raw()),
                "x": _base64(signing.public_key().public_bytes_raw()),
            },
        ]
        key_file.write_text(json.dumps(keys))
    path = directory / f"{which}.cryptotensors"
    save_file(dict(tensors), path, config={"enc_key": keys[0], "sign_key": keys[1]})
    return path


def _write_tensorizer(tensors: Mapping[str, Any], directory: Path, which: str) -> Path:
    import torch
    from tensorizer import EncryptionParams, TensorSerializer

    key_file = directory / "tensorizer.key"
    if not key_file.exists():
        key_file.write_bytes(EncryptionParams.random().key)
    path = directory / f"{which}.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=key_file.read_bytes()))
    serializer.write_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    serializer.close()
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
