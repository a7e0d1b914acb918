"""Lines of listings, for whatever an image states."""

from __future__ import annotations

import stat

import pytest

from encfs.browse import Listed
from encfs.erofs.tree import Inode


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "1970-01-01 00:00"),
        (-1, "1969-12-31 23:59"),
        (253402300799, "9999-12-31 23:59"),
        (253402300800, "@253402300800"),
        ((1 << 63) - 1, "@9223372036854775807"),
        (-(1 << 63) + 1, "@-9223372036854775807"),
    ],
)
def test_any_time_can_be_shown(seconds: int, shown: str) -> None:
    inode = Inode(1, stat.S_IFREG | 0o644, 0, 0, 1, 5, 0, seconds * 1_000_000_000, 0, 0, 0, 0)
    assert Listed(b"name", inode, None).long_line().endswith(f" {shown} name")
