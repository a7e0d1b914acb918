"""Where a benchmark runs: temporary directories, page cache, machine and versions, and running commands."""

from __future__ import annotations

import compileall
import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. Sizes in bytes."""

    repetitions: int
    file_size: int
    random_reads: int
    tree_files: int
    many_files: int
    sparse_size: int
    large_artifact: int
    image_size: int
    remote_artifacts: tuple[int, ...]


FULL = Scale(5, 1 << 30, 16384, 10_000, 200_000, 1 << 40, 100 * 10**9, 300 * 10**6, (100 * 10**6, 10 * 10**9, 10**12))
QUICK = Scale(1, 64 << 20, 1024, 500, 2_000, 16 << 30, 10 * 10**9, 30 * 10**6, (100 * 10**6, 10 * 10**9))


@dataclass(frozen=True, slots=True)
class Workspace:
    """Temporary directories of one run: on the disk and in memory (tmpfs)."""

    disk: Path
    memory: Path

    @classmethod
    @contextlib.contextmanager
    def create(cls, disk: Path | None, memory: Path) -> Iterator[Workspace]:
        with (
            tempfile.TemporaryDirectory(prefix="encfs-bench-", dir=disk, ignore_cleanup_errors=True) as on_disk,
            tempfile.TemporaryDirectory(prefix="encfs-bench-", dir=memory, ignore_cleanup_errors=True) as in_memory,
        ):
            yield cls(Path(on_disk), Path(in_memory))


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def tool(name: str) -> str:
    """The program of this interpreter's environment, or of PATH. Raises RuntimeError where it is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed")
    return found


def run(arguments: Sequence[str | Path]) -> str:
    """Run a command to its end and give its stdout. Raises RuntimeError with its stderr where it fails."""
    command = [str(argument) for argument in arguments]
    # Files and not pipes: a daemon that kept them would have this wait for its end.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, check=False)
        output.seek(0)
        errors.seek(0)
        if done.returncode:
            raise RuntimeError(f"{arguments[0]} failed with status {done.returncode}: {errors.read().strip()}")
        return output.read()


@dataclass(frozen=True, slots=True)
class Usage:
    """Wall-clock seconds, CPU seconds and peak resident memory (bytes) of a command."""

    seconds: float
    cpu_seconds: float
    peak_memory: int


def run_measured(arguments: Sequence[str | Path]) -> Usage:
    """Run a command and say what it took.

    The kernel's figure for peak memory is never below that of the process that started it: this one stays small.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.DEVNULL, stderr=errors)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{arguments[0]} failed: {errors.read().decode(errors='replace').strip()}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def files_below(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names)


def warm(directory: Path) -> None:
    """Bring every file below a directory, and its metadata, into the page cache."""
    buffer = bytearray(_CHUNK)
    for path in files_below(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(directory: Path, keep: Iterable[Sequence[str | Path]] = ()) -> None:
    """Drop every file below a directory from the page cache; then run the commands `keep`, whose own files are wanted.

    As root the kernel's caches of inodes and names go too (those of the whole machine: it has no narrower way).
    """
    os.sync()
    for path in files_below(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if os.access(_DROP_CACHES, os.W_OK):
        _DROP_CACHES.write_text("3\n")
    for command in keep:
        run(command)


def compile_packages() -> None:
    """Have everything that `encfs` and `imagetool` import in byte code, as pip does when it installs.

    uv leaves that to the first start, and with PYTHONDONTWRITEBYTECODE every start would compile it all again: that
    doubles the time of a mount.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    root = Path(__file__).parent.parent
    for package in ("encfs", "imagetool"):
        compileall.compile_dir(root / package, quiet=1)
    waiting = ["encfs"]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(name)
            for file in distribution.files or ():
                if file.suffix == ".py":
                    compileall.compile_file(str(distribution.locate_file(file)), quiet=1)
            needed = {re.split(r"[^\w.-]", line)[0] for line in distribution.requires or () if "extra ==" not in line}
            waiting += needed - seen
            seen |= needed


def touch_memory(directory: Path, size: int) -> None:
    """Have the kernel hand out and take back `size` bytes of a tmpfs.

    The host of a virtual machine takes unused memory away, and giving it back costs several times as much as writing to
    it: whoever ran first would pay for all.
    """
    ballast = directory / "ballast"
    chunk = bytes(_CHUNK)
    try:
        with ballast.open("wb", buffering=0) as file:
            for _ in range(-(-size // _CHUNK)):
                file.write(chunk)
    finally:
        ballast.unlink(missing_ok=True)


def peak_memory(pid: int) -> int:
    """Peak resident memory of a running process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"process {pid} states no peak memory")


def describe_machine(workspace: Workspace) -> dict[str, object]:
    """CPU, memory, kernel, filesystems."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cpu_flags": [
            flag for flag in ("aes", "vaes", "sha_ni", "avx2", "avx512f") if flag in fields.get("flags", "").split()
        ],
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory,
        "kernel": platform.release(),
        "disk": run(["stat", "-f", "-c", "%T", workspace.disk]).strip(),
        "load_at_start": os.getloadavg()[0],
    }


def describe_versions() -> dict[str, str]:
    """Of the interpreter, of what ours is built on, and of the peers."""
    names = ("encfs", "cryptography", "blake3", "pyfuse3", "trio")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    for name in ("safetensors", "cryptotensors", "tensorizer", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for name, option in (
        ("gocryptfs", "-version"),
        ("skopeo", "--version"),
        ("umoci", "--version"),
        ("age", "--version"),
        ("tar", "--version"),
    ):
        if shutil.which(name):
            versions[name] = run([name, option]).splitlines()[0].split(";")[0]
    return versions
