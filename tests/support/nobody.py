"""Running a part of a test that has root as an ordinary user, whom file modes and owners keep out of things."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def nobodys_place() -> Iterator[Path]:
    """A directory of the ordinary user, which he can reach (pytest's own are closed to everybody else)."""
    outer = Path(tempfile.mkdtemp())
    outer.chmod(0o711)
    inner = outer / "place"
    inner.mkdir()
    os.chown(inner, NOBODY, NOBODY)
    try:
        yield inner
    finally:
        shutil.rmtree(outer)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as the ordinary user."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
