"""One timed load of all tensors of a file, in a process of its own: `python -m bench.loading READER FILE [KEY]`.

What a reader imports and sets up at its first use is done before, with a small file of the same kind, so that only the
load is timed. Prints seconds and the bytes of all tensors as JSON. Not here: who is compared (`tensors`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Tensors = Mapping[str, Any]


def main() -> int:
    reader, small, path, *key = sys.argv[1:]
    load = _READERS[reader](*key)
    load(small)
    started = time.perf_counter()
    tensors = load(path)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "size": sum(tensor.nbytes for tensor in tensors.values())}))
    return 0


def _plain() -> Callable[[str], Tensors]:
    from safetensors.numpy import load_file

    return load_file


def _mapped() -> Callable[[str], Tensors]:
    """As a model server does it through a mount: the file mapped, each tensor copied out of the mapping."""
    from safetensors import safe_open

    def load(path: str) -> Tensors:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    return load


def _ours(key: str) -> Callable[[str], Tensors]:
    import encfs.safetensors

    def load(reference: str) -> Tensors:
        return encfs.safetensors.load_file(reference, "model.safetensors", key=key, allow_unsigned=True)

    return load


def _cryptotensors(key: str) -> Callable[[str], Tensors]:
    import cryptotensors
    from cryptotensors.numpy import load_file

    with open(key, encoding="utf-8") as file:
        cryptotensors.register_direct_key_provider(keys=json.load(file))
    return load_file


def _tensorizer(key: str) -> Callable[[str], Tensors]:
    from tensorizer import DecryptionParams, TensorDeserializer

    with open(key, "rb") as file:
        decryption = DecryptionParams.from_key(file.read())

    def load(path: str) -> Tensors:
        with TensorDeserializer(path, device="cpu", encryption=decryption, num_readers=2) as tensors:
            return dict(tensors.items())

    return load


_READERS: Mapping[str, Callable[..., Callable[[str], Tensors]]] = {
    "plain": _plain,
    "mapped": _mapped,
    "encfs": _ours,
    "cryptotensors": _cryptotensors,
    "tensorizer": _tensorizer,
}


if __name__ == "__main__":
    sys.exit(main())
