"""Suite `kernel`: the kernel's EROFS over the daemon (`--backend erofs`), against the same tree on ext4. Needs root."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import workloads
from bench.contenders import KeyFiles, Mounted, Ours
from bench.data import make_small_files
from bench.environment import Scale, Workspace, evict, run, say, tool, touch_memory
from bench.results import Comparison, Target

#: ext4 may take so many times as long: what lies between is decryption, and the way through the daemon.
_TARGET = Target(1.2)
_STEPS = {"find": workloads.find, "tar": workloads.tar}


@dataclass(frozen=True, slots=True)
class _Ext4:
    """The tree in clear, in an image of its own behind a loop device."""

    stored: Path
    name: str = "ext4"

    @classmethod
    def make(cls, source: Path, directory: Path) -> _Ext4:
        stored = directory / "ext4"
        stored.mkdir()
        size = sum(-(-path.stat().st_size // 4096) * 4096 + 512 for path in source.rglob("*")) * 5 // 4 + (64 << 20)
        say("making the ext4 image")
        run([tool("mkfs.ext4"), "-q", "-d", source, stored / "image", f"{size >> 10}k"])
        return cls(stored)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Mounted]:
        target = Path(tempfile.mkdtemp(prefix="encfs-bench-mount-"))
        try:
            run([tool("mount"), "-o", "loop,ro", self.stored / "image", target])
            try:
                yield Mounted(target, os.getpid())
            finally:
                run([tool("umount"), target])
        finally:
            target.rmdir()


def measure_kernel(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """`find` and `tar` over 10,000 small files on a new mount, from a cold disk."""
    source = workspace.disk / "kernel-tree"
    make_small_files(source, scale.tree_files)
    ours = Ours.make("kernel", source, workspace.disk, keys, mount_options=["--backend", "erofs"])
    peer = _Ext4.make(source, workspace.disk)
    series: dict[tuple[str, str], list[float]] = {(step, who.name): [] for step in _STEPS for who in (ours, peer)}
    for repetition in range(scale.repetitions):
        say(f"kernel: repetition {repetition + 1} of {scale.repetitions}")
        for step, measure in _STEPS.items():
            for who in (ours, peer) if repetition % 2 else (peer, ours):
                evict(who.stored, workloads.TOOLS)
                touch_memory(workspace.memory, 256 << 20)
                with who.mounted() as mounted:
                    series[step, who.name].append(measure(mounted.path))
    for step in _STEPS:
        yield Comparison(
            "kernel",
            f"{step}, cold, --backend erofs",
            "cold disk",
            "default",
            "s",
            "lower",
            series[step, ours.name],
            peer.name,
            series[step, peer.name],
            _TARGET,
        )
