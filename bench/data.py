"""The data that is measured: an incompressible file, a tree of small files, an installed Python package."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from pathlib import Path

from bench.environment import run, tool

#: What the import workload imports, and the installed packages it needs in the tree.
IMPORTED = "numpy, sympy"
_PACKAGES = ("numpy", "numpy.libs", "sympy", "mpmath")
_CHUNK = 1 << 20


def make_file(path: Path, size: int) -> None:
    """A file of `size` random bytes."""
    with path.open("wb") as file:
        for offset in range(0, size, _CHUNK):
            file.write(os.urandom(min(_CHUNK, size - offset)))


def make_small_files(root: Path, count: int, *, largest: int = 64 << 10) -> None:
    """`count` files of random bytes, 100 to a directory, ten directories to one above.

    Sizes are the same in every run, from 0 bytes to `largest`, log-uniform: most are small, as in a source tree.
    """
    sizes = random.Random(1)
    pool = os.urandom(largest * 2)
    for number in range(count):
        directory = root / f"area-{number // 1000:03}" / f"group-{number // 100 % 10}"
        if number % 100 == 0:
            directory.mkdir(parents=True, exist_ok=True)
        size = int(largest ** sizes.random()) - 1
        start = sizes.randrange(largest)
        (directory / f"file-{number:06}.dat").write_bytes(pool[start : start + size])


def copy_packages(target: Path) -> None:
    """Copy the installed packages that the import workload needs, and compile them there, as an installer does."""
    target.mkdir(parents=True)
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        raise RuntimeError("numpy is not installed: install the bench extra")
    installed = Path(spec.origin).parent.parent
    for name in _PACKAGES:
        if (installed / name).is_dir():
            shutil.copytree(installed / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([tool("python"), "-m", "compileall", "-q", target])
