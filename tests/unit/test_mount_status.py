"""What daemons of other versions say about themselves."""

from __future__ import annotations

import pytest

from encfs.cli.status import _lines
from encfs.mount.options import MountStatus


def test_a_status_of_a_later_version_is_taken_for_what_is_known_of_it() -> None:
    status = MountStatus("/m", "serving", pid=7, stats={"failures": 1})
    assert MountStatus.from_json(status.to_json()) == status
    assert MountStatus.from_json(status.to_json() | {"what comes later": 1}) == status


@pytest.mark.parametrize("document", [None, [], {}, {"mountpoint": 1}])
def test_what_is_no_status(document: object) -> None:
    assert MountStatus.from_json(document) is None


def test_why_a_daemon_was_lost_or_not_replaced_is_shown_on_one_line() -> None:
    status = MountStatus("/m", "serving", restarts=2, reason="not replaced: no\nkey")
    assert list(_lines([status]))[1:] == ["    restarts 2: not replaced: no key"]
    assert len(list(_lines([MountStatus("/m", "serving")]))) == 1
