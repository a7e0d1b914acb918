"""Suites `file` and `tree`: reading through FUSE, ours against gocryptfs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import workloads
from bench.contenders import Contender, Gocryptfs, KeyFiles, Mounted, Ours
from bench.data import copy_packages, make_file, make_small_files
from bench.environment import Scale, Workspace, evict, peak_memory, say, touch_memory, warm
from bench.results import Better, Comparison, Target

FRAME_SIZES = (16 << 10, 32 << 10, 64 << 10)

#: Where the ciphertext is when a workload starts; the mount itself is always new.
_CONDITIONS: Mapping[str, Callable[[Path], None]] = {
    "page cache": warm,
    "cold disk": lambda stored: evict(stored, workloads.TOOLS),
}


@dataclass(frozen=True, slots=True)
class _Workload:
    """`steps` run one after the other on one new mount; each gives one figure under its name."""

    steps: Sequence[tuple[str, Callable[[Mounted, int], float]]]


@dataclass(frozen=True, slots=True)
class _Figure:
    unit: str
    better: Better
    target: Target | None
    factor: float = 1.0


_FIGURES = {
    "sequential, cold": _Figure("MB/s", "higher", Target(1.5, 2.5), 1e-6),
    "sequential, warm": _Figure("MB/s", "higher", Target(3.0, 5.0), 1e-6),
    "random 4 KiB, cold": _Figure("1/s", "higher", Target(0.5, 1.0)),
    "find, cold": _Figure("s", "lower", Target(0.5)),
    "tar, cold": _Figure("s", "lower", Target(0.6)),
    "import, cold": _Figure("s", "lower", Target(0.95)),
}
_MEMORY = "daemon's peak memory"
_Series = dict[tuple[str, str, str], list[float]]


def measure_file(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Sequential and random reads of one large file, for every frame size."""
    source = workspace.disk / "file.bin"
    make_file(source, scale.file_size)
    contenders: list[Contender] = [
        Ours.make(_frame_name(size), source, workspace.disk, keys, ["--frame-size", str(size)]) for size in FRAME_SIZES
    ]
    contenders.append(Gocryptfs.make(source, workspace.disk))
    source.unlink()

    def path(mounted: Mounted) -> Path:
        return mounted.path / source.name

    plan = [
        _Workload(
            [
                ("sequential, cold", lambda mounted, seed: workloads.sequential_read(path(mounted))),
                ("sequential, warm", lambda mounted, seed: workloads.sequential_read(path(mounted))),
            ]
        ),
        _Workload(
            [
                (
                    "random 4 KiB, cold",
                    lambda mounted, seed: workloads.random_reads(path(mounted), scale.random_reads, seed),
                )
            ]
        ),
    ]
    yield from _compare("file", contenders, plan, scale.repetitions, workspace, scale.file_size)


def measure_tree(workspace: Workspace, scale: Scale, keys: KeyFiles) -> Iterator[Comparison]:
    """Walking and reading many small files, and importing from a mount, with the default frame size."""
    source = workspace.disk / "tree"
    make_small_files(source / "files", scale.tree_files)
    copy_packages(source / "packages")
    contenders: list[Contender] = [
        Ours.make("default", source, workspace.disk, keys),
        Gocryptfs.make(source, workspace.disk),
    ]
    plan = [
        _Workload([("find, cold", lambda mounted, seed: workloads.find(mounted.path / "files"))]),
        _Workload([("tar, cold", lambda mounted, seed: workloads.tar(mounted.path / "files"))]),
        _Workload([("import, cold", lambda mounted, seed: workloads.import_packages(mounted.path / "packages"))]),
    ]
    yield from _compare("tree", contenders, plan, scale.repetitions, workspace, 256 << 20)


def _frame_name(size: int) -> str:
    return f"{size >> 10} KiB frames"


def _compare(
    suite: str,
    contenders: Sequence[Contender],
    plan: Sequence[_Workload],
    repetitions: int,
    workspace: Workspace,
    room: int,
) -> Iterator[Comparison]:
    """Run every workload for every contender in turn, in another order each time; the last contender is the peer.

    `room` is about how many bytes a workload brings into the page cache.
    """
    series: _Series = defaultdict(list)
    for condition, prepare in _CONDITIONS.items():
        for repetition in range(repetitions):
            say(f"{suite}, ciphertext in {condition}: repetition {repetition + 1} of {repetitions}")
            for workload in plan:
                for position in range(len(contenders)):
                    contender = contenders[(position + repetition) % len(contenders)]
                    prepare(contender.stored)
                    touch_memory(workspace.memory, room)
                    with contender.mounted() as mounted:
                        for name, step in workload.steps:
                            series[condition, name, contender.name].append(step(mounted, repetition))
                        series[condition, _MEMORY, contender.name].append(peak_memory(mounted.pid))
                    # What the daemon closed is given back before the next one is timed.
                    time.sleep(0.2)
    *ours, peer = contenders
    for condition in _CONDITIONS:
        for workload in plan:
            for name, _ in workload.steps:
                for contender in ours:
                    yield _comparison(suite, name, condition, contender.name, peer.name, series)
    for contender in ours:
        yield Comparison(
            suite,
            _MEMORY,
            "all of the above",
            contender.name,
            "MiB",
            "lower",
            [_largest_memory(series, contender.name)],
            target=Target(150.0),
            note=f"{peer.name}: {_largest_memory(series, peer.name):.0f} MiB",
        )


def _comparison(suite: str, name: str, condition: str, ours: str, peer: str, series: _Series) -> Comparison:
    figure = _FIGURES[name]
    return Comparison(
        suite,
        name,
        condition,
        ours,
        figure.unit,
        figure.better,
        [value * figure.factor for value in series[condition, name, ours]],
        peer,
        [value * figure.factor for value in series[condition, name, peer]],
        figure.target,
    )


def _largest_memory(series: _Series, contender: str) -> float:
    """MiB, over all conditions and workloads."""
    return max(max(values) for (_, name, who), values in series.items() if name == _MEMORY and who == contender) / (
        1 << 20
    )
