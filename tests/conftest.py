"""What holds for every test: markers for what a machine must offer, and no silent skips where all of it must run.

With ENCFS_REQUIRE_ALL=1, or CI=true as continuous integration has it, a skipped test fails the run unless its reason is
one of `ALLOWED_SKIPS`: a run that tested less than it should must not look like one that passed.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

#: Reasons (whole, as regular expressions) for which a test may be skipped even where everything must run.
ALLOWED_SKIPS: tuple[str, ...] = ()

_REQUIRE_ALL = pytest.StashKey[bool]()
_SKIPPED = pytest.StashKey[list[tuple[str, str]]]()

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("encfs", deadline=None, print_blob=True)
settings.load_profile("encfs")

# nohup has it ignored, which programs that tests start would take for somebody's wish; a handler is not handed down.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REQUIRE_ALL] = os.environ.get("ENCFS_REQUIRE_ALL") == "1" or os.environ.get("CI") == "true"
    config.stash[_SKIPPED] = []
    config.pluginmanager.register(_SkipCollector(config), "encfs-skips")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") is not None and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session", autouse=True)
def _unprotected_tests() -> Iterator[None]:
    """Commands that tests run in this process do not change it for good: `test_hygiene` looks at others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("encfs.hardening.protect_keys", lambda: None)
        yield


class _SkipCollector:
    """Remembers what was skipped and why. With pytest-xdist it is the controller's that sees every report."""

    def __init__(self, config: pytest.Config) -> None:
        self._skipped = config.stash[_SKIPPED]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report.nodeid, report)

    def _note(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.fullmatch(allowed, reason) for allowed in ALLOWED_SKIPS):
            self._skipped.append((name, reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (
        session.config.stash[_REQUIRE_ALL]
        and session.config.stash[_SKIPPED]
        and session.exitstatus == pytest.ExitCode.OK
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = config.stash[_SKIPPED]
    if config.stash[_REQUIRE_ALL] and skipped:
        terminalreporter.section("skipped, but everything must run here", red=True)
        for name, reason in skipped:
            terminalreporter.line(f"{name}: {reason}")
