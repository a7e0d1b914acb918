"""Where the registry suites get their registries from: docker-registry on loopback, with or without added latency."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.environment import tool

_TIMEOUT = 30.0


@contextlib.contextmanager
def served_registry(directory: Path) -> Iterator[int]:
    """docker-registry with its storage in `directory`; its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "bench"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))  # JSON is YAML
    program = [tool("docker-registry"), "serve", str(directory / "config.json")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("docker-registry does not listen")
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """The port of a proxy that adds latency in front of another port; that port itself for none."""
    if not seconds:
        yield port
        return
    program = [sys.executable, "-m", "bench.latency", str(port), str(seconds)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def adopt_layout(layout: Path, registry: Path, repository: str) -> None:
    """Move a layout's blobs into the storage of a docker-registry that is not running, without reading them.

    Uploading an artifact of 1 TB of holes would take hours and make it a terabyte.
    """
    storage = registry / "storage/docker/registry/v2"
    place = storage / "repositories" / repository
    index = json.loads((layout / "index.json").read_text())
    manifest = index["manifests"][0]["digest"].removeprefix("sha256:")
    for blob in (layout / "blobs/sha256").iterdir():
        target = storage / "blobs/sha256" / blob.name[:2] / blob.name
        target.mkdir(parents=True, exist_ok=True)
        os.rename(blob, target / "data")
        _link(place / "_layers/sha256" / blob.name, blob.name)
    _link(place / "_manifests/revisions/sha256" / manifest, manifest)
    _link(place / "_manifests/tags/bench/current", manifest)
    _link(place / "_manifests/tags/bench/index/sha256" / manifest, manifest)
    shutil.rmtree(layout)


def _link(directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "link").write_text(f"sha256:{name}")
