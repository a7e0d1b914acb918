"""`python -m bench`: run the suites, print the table, write JSON and a picture."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from bench.broker import measure_broker
from bench.contenders import KeyFiles
from bench.encryption import measure_encryption, measure_memory
from bench.environment import FULL, QUICK, Scale, Workspace, compile_packages, describe_machine, describe_versions, say
from bench.filesystem import measure_file, measure_tree
from bench.kernel import measure_kernel
from bench.mounting import measure_mounting
from bench.ocicrypt import measure_ocicrypt
from bench.remote import measure_copy, measure_read, measure_start
from bench.report import draw, markdown_table, write_json
from bench.results import Comparison
from bench.running import measure_running
from bench.sealed import measure_sealed
from bench.tensors import measure_tensors

_SUITES: Mapping[str, Callable[[Workspace, Scale, KeyFiles], Iterator[Comparison]]] = {
    "file": measure_file,
    "tree": measure_tree,
    "encrypt": measure_encryption,
    "encrypt-memory": measure_memory,
    "ocicrypt": measure_ocicrypt,
    "mount": measure_mounting,
    "registry-start": measure_start,
    "registry-read": measure_read,
    "registry-copy": measure_copy,
    "kernel": measure_kernel,
    "run": measure_running,
    "tpm": measure_sealed,
    "safetensors": measure_tensors,
    "broker": measure_broker,
}
_RESULTS = Path(__file__).parent / "results"


def main() -> int:
    arguments = _parse()
    # So that mounts and temporary directories go when the run is ended from outside.
    signal.signal(signal.SIGTERM, _exit)
    compile_packages()
    scale = QUICK if arguments.quick else FULL
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    comparisons: list[Comparison] = []
    stem = arguments.output / f"{when.replace(':', '')}{'-quick' if arguments.quick else ''}"
    draws = find_spec("matplotlib") is not None
    if not draws:
        say("matplotlib is not installed, so there will be no picture: pip install 'encfs[bench]'")
    with Workspace.create(arguments.directory, arguments.memory_directory) as workspace:
        machine, versions = describe_machine(workspace), describe_versions()
        keys = KeyFiles.make(workspace.memory)
        for name in arguments.only or _SUITES:
            say(f"suite {name}")
            comparisons += _SUITES[name](workspace, scale, keys)
            # A suite that fails takes nothing along of those before it.
            write_json(stem.with_suffix(".json"), when, machine, versions, comparisons)
    if draws:
        draw(stem.with_suffix(".png"), _title(when, machine, versions), comparisons)
    print(_title(when, machine, versions))
    print(", ".join(f"{name} {version.removeprefix(name).strip()}" for name, version in versions.items()))
    print()
    print(markdown_table(comparisons))
    print()
    print(f"{stem}.json, {stem}.png" if draws else f"{stem}.json")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure encfs against its peers.")
    parser.add_argument("--quick", action="store_true", help="small data, one repetition: shows that everything runs")
    parser.add_argument(
        "--only", action="append", choices=list(_SUITES), metavar="SUITE", help=f"one of {', '.join(_SUITES)}"
    )
    parser.add_argument("--directory", type=Path, help="where data on the disk goes (10 GiB; default: the system's)")
    parser.add_argument("--memory-directory", type=Path, default=Path("/dev/shm"), help="a tmpfs (4 GiB)")  # noqa: S108
    parser.add_argument("--output", type=Path, default=_RESULTS, help="directory of the results")
    return parser.parse_args()


def _title(when: str, machine: Mapping[str, object], versions: Mapping[str, str]) -> str:
    return f"encfs {versions['encfs']}, {when[:10]}, {machine['cpus']} CPUs {machine['cpu']}, Linux {machine['kernel']}"


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
