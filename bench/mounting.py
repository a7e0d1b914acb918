"""Suite `mount`: seconds until `encfs mount` returns, for a small artifact and for one a thousand times its size."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contenders import KeyFiles, mount_command, unmount
from bench.environment import Scale, Workspace, run, say, tool
from bench.hollow import make_hollow_artifact
from bench.results import Comparison, Target

_SMALL = 100 * 10**6
_FILES = 100


def measure_mounting(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """The command to its return, when the mount answers; then the command that ends the mount."""
    directory = workspace.memory / "mount"
    target = directory / "target"
    target.mkdir(parents=True)
    sizes = {_name(size): size for size in (scale.large_artifact, _SMALL)}
    for name, size in sizes.items():
        say(f"making an artifact of {name}")
        make_hollow_artifact(directory / name.replace(" ", ""), size, _FILES, keys.public)
    mounts: dict[str, list[float]] = {name: [] for name in sizes}
    ends: dict[str, list[float]] = {name: [] for name in sizes}
    for repetition in range(scale.repetitions * 2):
        for name in sorted(sizes, reverse=bool(repetition % 2)):
            started = time.perf_counter()
            run(mount_command(directory / name.replace(" ", ""), target, keys))
            try:
                mounts[name].append(time.perf_counter() - started)
                _check(target, sizes[name])
                started = time.perf_counter()
                run([tool("encfs"), "umount", target])
                ends[name].append(time.perf_counter() - started)
            finally:
                unmount(target)
    large, small = sizes
    for workload, series in (("encfs mount", mounts), ("encfs umount", ends)):
        yield Comparison(
            "mount",
            workload,
            f"artifact of {large}",
            "default",
            "s",
            "lower",
            series[large],
            small,
            series[small],
            Target(1.1),
        )
    shutil.rmtree(directory)


def _name(size: int) -> str:
    return f"{size // 10**9} GB" if size >= 10**9 else f"{size // 10**6} MB"


def _check(target: Path, size: int) -> None:
    listed = sum(path.stat().st_size for path in target.iterdir())
    assert listed == size, f"the mount shows {listed} bytes instead of {size}"
