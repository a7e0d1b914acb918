"""Programs that tests build from sources of their own: once for all processes, and anew when the sources change."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_BUILD = Path(__file__).parents[2] / "build"
#: Seconds: a busy machine with an empty cache of packages.
_TIMEOUT = 1800


def built_program(
    name: str, sources: Path, command: Callable[[Path], Sequence[str | Path]], environment: Mapping[str, str]
) -> Path:
    """The program that `command` makes, run in `sources`; it is told where to."""
    files = sorted(path for path in sources.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    target = _BUILD / f"judge-{name}-{digest}"
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "judge").exists():
            done = subprocess.run(
                command(target / "building"),
                cwd=sources,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
                env=dict(os.environ) | dict(environment),
            )
            assert done.returncode == 0, done.stderr
            (target / "building").rename(target / "judge")
    return target / "judge"
