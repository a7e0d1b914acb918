"""What is timed on a mounted tree. Each gives its figure: bytes per second, reads per second, or seconds."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from bench.data import IMPORTED
from bench.environment import tool

_BLOCK = 4096


def sequential_read(path: Path, block: int = 1 << 20) -> float:
    """Bytes per second of reading a file from front to back in blocks, as `dd bs=1M` does."""
    buffer = bytearray(block)
    total = 0
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            total += size
    seconds = time.perf_counter() - started
    assert total == path.stat().st_size, f"{path} was read short"
    return total / seconds


def random_reads(path: Path, count: int, seed: int) -> float:
    """4 KiB reads per second, one at a time, at `count` distinct aligned offsets."""
    blocks = path.stat().st_size // _BLOCK
    numbers = random.Random(seed).sample(range(blocks), min(count, blocks))
    buffers = [bytearray(_BLOCK)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        started = time.perf_counter()
        for number in numbers:
            if os.preadv(descriptor, buffers, number * _BLOCK) != _BLOCK:
                raise RuntimeError(f"{path} was read short")
        return len(numbers) / (time.perf_counter() - started)
    finally:
        os.close(descriptor)


def find(root: Path) -> float:
    """Seconds of `find` with a stat of everything it finds."""
    return _timed([tool("find"), str(root), "-printf", "%s %m %T@ %p\\n"])


def tar(root: Path) -> float:
    """Seconds of `tar` into a pipe: straight to /dev/null it would not read the files."""
    started = time.perf_counter()
    with subprocess.Popen([tool("tar"), "-C", str(root), "-cf", "-", "."], stdout=subprocess.PIPE) as archiver:
        reader = subprocess.run([tool("cat")], stdin=archiver.stdout, stdout=subprocess.DEVNULL, check=True)
    if archiver.returncode or reader.returncode:
        raise RuntimeError(f"tar failed with status {archiver.returncode}")
    return time.perf_counter() - started


def import_packages(root: Path) -> float:
    """Seconds of a fresh interpreter that imports large packages from `root`, where they were compiled before."""
    # Without the site module nothing but the standard library can be found elsewhere.
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {IMPORTED}"
    return _timed([tool("python"), "-I", "-S", "-B", "-c", code])


#: Commands whose own files are to be in memory before a workload is timed from a cold disk.
TOOLS = (
    [tool("find"), "--version"],
    [tool("tar"), "--version"],
    [tool("cat"), "--version"],
    [
        tool("python"),
        "-I",
        "-S",
        "-B",
        "-c",
        "import argparse, ctypes, decimal, fractions, inspect, json, pickle, random",
    ],
)


def _timed(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
